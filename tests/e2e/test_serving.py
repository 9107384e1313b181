"""Serving as people run it: replicas behind HAProxy, real HTTP clients, plain PEFT as the oracle. Nothing is trained here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny_adapters import CARDS, MAIL, MOOD, TEXTS

from e2e.conftest import CommandLine, wait_for
from e2e.endpoint import Endpoint
from multilora.registry import CHALLENGER, Registry
from orchestrator.config import OrchestratorConfig

pytestmark = [pytest.mark.e2e]
LETTERS = replace(CARDS, name="letters")
ADAPTERS = (("encoder", CARDS, 1), ("encoder", CARDS, 2), ("encoder", MOOD, 1), ("encoder", MAIL, 1), ("seq2seq", LETTERS, 1))


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory, tiny_adapter, fresh_base, base_folder) -> Iterator[Endpoint]:
    workspace = tmp_path_factory.mktemp("serving") / "workspace"
    cli = CommandLine(workspace)
    config = OrchestratorConfig(workspace=workspace)
    workspace.mkdir()
    registry = Registry(config.registry_uri, config.artifact_root)
    registry.initialise()
    made = Endpoint(cli, registry, config.serve_file)
    made.learn(ADAPTERS, tiny_adapter, fresh_base, base_folder)
    made.versions = {made_of: made.register(made_of[1].name, tiny_adapter(*made_of)) for made_of in ADAPTERS}
    made.crown(*(made_of for made_of in ADAPTERS if made_of[2] == 1))
    made.serve("--replicas", 2, "--slots", 2, "--host-adapters", 3)
    yield made
    cli.run("stop")


async def asked(endpoint: Endpoint, num_requests: int, seed: int) -> set[str]:
    """Ask random texts of random tasks at once, check every answer, and return the digests that were seen."""
    rng = random.Random(seed)
    picked = [(rng.choice([a[1] for a in ADAPTERS if a[2] == 1]), rng.randrange(len(TEXTS))) for _ in range(num_requests)]
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as client:
        responses = await asyncio.gather(*(endpoint.ask(client, task, number) for task, number in picked))
    return {endpoint.check(response, number) for response, (_, number) in zip(responses, picked, strict=True)}


def test_every_answer_is_plain_pefts_in_mixed_batches_and_after_eviction(endpoint: Endpoint) -> None:
    digests = {endpoint.versions[made_of].digest for made_of in ADAPTERS if made_of[2] == 1}
    for seed in range(3):
        assert asyncio.run(asked(endpoint, 200, seed)) == digests


def test_haproxy_is_in_front_and_nothing_of_it_listens_beyond_this_machine(endpoint: Endpoint) -> None:
    proxies = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "haproxy"]
    listening = [c for p in proxies for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert int(endpoint.url.rpartition(":")[2]) in {connection.laddr.port for connection in listening}
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
    # The replicas' own HTTP ports; Ray's ports between its processes are other ones.
    http = [c for p in endpoint.replicas() for c in p.net_connections("inet") if 30_000 <= c.laddr.port <= 31_000]
    assert {c.laddr.ip for c in http if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_metrics_tell_of_all_replicas_whichever_is_asked(endpoint: Endpoint) -> None:
    """Two hundred requests are spread over two replicas; each of them tells of all."""

    def counted() -> dict[str, float]:
        found = text_string_to_metric_families(httpx.get(f"{endpoint.url}/metrics").text)
        samples = [s for family in found for s in family.samples if s.name == "adapters_inputs_total"]
        return {sample.labels["task"]: sample.value for sample in samples}

    before = counted()
    asyncio.run(asked(endpoint, 200, 3))
    after = [counted() for _ in range(8)]
    assert all(seen == after[0] for seen in after)
    assert sum(after[0].values()) - sum(before.values()) == 200


def test_promotion_and_roll_back_reach_all_replicas(endpoint: Endpoint) -> None:
    first, second = (endpoint.versions["encoder", CARDS, number] for number in (1, 2))

    async def digests() -> set[str]:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as client:
            answers = await asyncio.gather(*(endpoint.ask(client, CARDS, 0) for _ in range(32)))
        return {endpoint.check(answer, 0) for answer in answers}

    for made_of, version in ((("encoder", CARDS, 2), second), (("encoder", CARDS, 1), first)):
        endpoint.crown(made_of)
        wait_for(lambda expected=version.digest: asyncio.run(digests()) == {expected}, 60)


def test_a_killed_replica_costs_no_answer_and_comes_back(endpoint: Endpoint) -> None:
    before = endpoint.replicas()
    assert len(before) == 2

    async def under_load() -> None:
        asking = [asyncio.create_task(asked(endpoint, 60, seed)) for seed in range(10, 14)]
        await asyncio.sleep(0)
        before[0].kill()
        await asyncio.gather(*asking)

    asyncio.run(under_load())
    wait_for(lambda: len(endpoint.replicas()) == 2 and before[0].pid not in {p.pid for p in endpoint.replicas()}, 120)
    asyncio.run(asked(endpoint, 60, seed=20))


@pytest.mark.long
def test_a_challenger_answers_its_share_and_no_count_is_lost(endpoint: Endpoint) -> None:
    champion, challenger = (endpoint.versions["encoder", CARDS, number] for number in (1, 2))
    endpoint.cli.run("stop")
    endpoint.registry.set_alias(challenger, CHALLENGER)
    endpoint.serve("--replicas", 2, "--challenger", "cards=50%", "--challenger", "mood=shadow")

    async def digests() -> list[str]:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as client:
            numbers = [number for number in range(len(TEXTS)) for _ in range(8)]
            answers = await asyncio.gather(*(endpoint.ask(client, CARDS, number) for number in numbers))
        return [endpoint.check(answer, number) for answer, number in zip(answers, numbers, strict=True)]

    seen = asyncio.run(digests())
    assert set(seen) == {champion.digest, challenger.digest}
    assert len({tuple(set(seen[first : first + 8])) for first in range(0, len(seen), 8)}) == 2  # a text, one version
    endpoint.cli.run("stop")
    (row,) = endpoint.cli.json("live")
    for side, version in ((row["champion"], champion), (row["challenger"], challenger)):
        assert (side["system"], side["num_requests"]) == (version.key, seen.count(version.digest))
