"""Replicas that come while requests queue up and go when they do not: every answer is plain PEFT's, and none is lost."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest
from tiny_adapters import CARDS, MOOD, TEXTS

from e2e.conftest import CommandLine, wait_for
from e2e.endpoint import Endpoint
from multilora.registry import Registry
from orchestrator.config import OrchestratorConfig

pytestmark = [pytest.mark.e2e, pytest.mark.long]
ADAPTERS = (("encoder", CARDS, 1), ("encoder", MOOD, 1))
NUM_CLIENTS = 48
TIMEOUT_S = 180


def test_a_replica_comes_with_the_load_and_goes_without_it(cli: CommandLine, tiny_adapter, fresh_base, base_folder) -> None:
    config = OrchestratorConfig(workspace=cli.workspace)
    cli.workspace.mkdir(parents=True, exist_ok=True)
    registry = Registry(config.registry_uri, config.artifact_root)
    registry.initialise()
    endpoint = Endpoint(cli, registry, config.serve_file)
    endpoint.learn(ADAPTERS, tiny_adapter, fresh_base, base_folder)
    endpoint.versions = {made_of: endpoint.register(made_of[1].name, tiny_adapter(*made_of)) for made_of in ADAPTERS}
    endpoint.crown(*ADAPTERS)
    scaling = ("--target-requests", 4, "--upscale-delay", 1, "--downscale-delay", 5)
    endpoint.serve("--replicas", 1, "--max-replicas", 2, *scaling)
    assert len(endpoint.replicas()) == 1
    num_asked = asyncio.run(_asked_until_there_are(endpoint, 2, NUM_CLIENTS))
    assert num_asked > NUM_CLIENTS
    # A trickle goes on while the second one leaves: what it has taken it answers.
    asyncio.run(_asked_until_there_are(endpoint, 1, 1))
    assert cli.json("status")["endpoint"] == endpoint.url


async def _asked_until_there_are(endpoint: Endpoint, num_replicas: int, num_clients: int) -> int:
    """Ask without a pause until so many replicas run, and a little longer; checks every answer. Returns how many there were."""
    is_over, num_asked = asyncio.Event(), 0

    async def go_on(seed: int) -> None:
        nonlocal num_asked
        rng = random.Random(seed)
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as client:
            while not is_over.is_set():
                (_, task, _), number = rng.choice(ADAPTERS), rng.randrange(len(TEXTS))
                endpoint.check(await endpoint.ask(client, task, number), number)
                num_asked += 1

    asking = [asyncio.create_task(go_on(seed)) for seed in range(num_clients)]
    try:
        await asyncio.to_thread(
            wait_for, lambda: len(endpoint.replicas()) == len(endpoint.addresses()) == num_replicas, TIMEOUT_S
        )
        await asyncio.sleep(2)
    finally:
        is_over.set()
        await asyncio.gather(*asking)
    return num_asked
