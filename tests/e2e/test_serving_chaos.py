"""An endpoint under load while everything around it changes or breaks: every answer is the oracle's.

`make chaos` runs it: CHAOS_SERVING_S seconds (90), and until everything was done once; seed CHAOS_SERVING_SEED (0).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file
from tiny_adapters import CARDS, MAIL, MOOD, TEXTS, TinyTask, item_of

from e2e.conftest import CommandLine, wait_for
from e2e.endpoint import NUM_ATTEMPTS, Endpoint, MadeOf, ask_patiently, free_port
from e2e.test_chaos import MlflowServer
from multilora.artifact import CARD, WEIGHTS, AdapterArtifact, digest_in, read_artifact
from multilora.registry import CHAMPION, AdapterVersion, Registry
from orchestrator.config import OrchestratorConfig

pytestmark = [pytest.mark.e2e, pytest.mark.long]
CHAOS_S = float(os.environ.get("CHAOS_SERVING_S", "90"))
SEED = int(os.environ.get("CHAOS_SERVING_SEED", "0"))
NUM_CLIENTS, PAUSE_S = 4, 0.1
"""Each client waits between two requests: on two cores a registry that starts wants some of the time too."""
AFTER_KILL_S = 20.0
"""How long after a replica's death a request may fail at its first attempt."""
LETTERS, FLEETING, HOLLOW = replace(CARDS, name="letters"), replace(MOOD, name="fleeting"), replace(MOOD, name="hollow")
LATE = [replace(MOOD, name=f"late-{number}") for number in range(3)]
STEADY = [("encoder", CARDS), ("encoder", MOOD), ("encoder", MAIL), ("seq2seq", LETTERS)]
ADAPTERS: list[MadeOf] = [(family, task, seed) for family, task in STEADY for seed in (1, 2)]
PASSING: list[MadeOf] = [("encoder", task, 1) for task in (FLEETING, *LATE)]


@dataclass
class Load:
    """Clients that ask all the time, and what became of every request."""

    endpoint: Endpoint
    is_over: threading.Event = field(default_factory=threading.Event)
    num_answers: Counter[str] = field(default_factory=Counter)
    """By route."""
    failures: list[tuple[float, str, str, str]] = field(default_factory=list)
    """(time, task, status or error, text) of every attempt that was tried again."""
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Ask until it is over."""
        async with httpx.AsyncClient(base_url=self.endpoint.url, timeout=60) as client:
            await asyncio.gather(*(self._client(client, random.Random(f"{SEED} {number}")) for number in range(NUM_CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        while not self.is_over.is_set():
            made_of = draw.choice([*ADAPTERS, *PASSING, ("encoder", HOLLOW, 1)])
            path = draw.choice(["/v1/classify", "/v1/classify", "/v1/chat/completions"])
            await self._ask(client, made_of, path, draw.randrange(len(TEXTS)), is_pinned=draw.random() < 0.3)
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, client: httpx.AsyncClient, made_of: MadeOf, path: str, number: int, *, is_pinned: bool) -> None:
        task = made_of[1]
        version = self.endpoint.versions.get(made_of) if is_pinned else None
        model = version.key if version else task.name
        began = time.monotonic()

        def failed(kind: str, text: str) -> None:
            self.failures.append((time.monotonic(), task.name, kind, text[:200]))

        if task is HOLLOW:
            response = await client.post(path, json=question(path, model, task, number))
            if response.status_code == 503:
                return  # its only champion is broken
        else:
            try:
                response = await ask_patiently(client, path, question(path, model, task, number), failed)
            except httpx.TransportError as error:
                self.wrong.append(f"{model} {path}: no answer in {NUM_ATTEMPTS} attempts: {error!r}")
                return
        self.num_answers[path] += 1
        if response.status_code == 404 and task in (FLEETING, HOLLOW, *LATE) and not version:
            return  # it may not be there now
        try:
            digest = self.endpoint.check(response, number)
            known = {found.digest for found in list(self.endpoint.versions.values()) if found.task == task.name}
            assert digest in ({version.digest} if version else known)
        except (AssertionError, KeyError) as error:
            self.wrong.append(f"{model} {path} {response.status_code} after {time.monotonic() - began:.1f} s: {error}")


def question(path: str, model: str, task: TinyTask, number: int) -> dict:
    """One text in the words of a route."""
    item = item_of(task, TEXTS[number])
    if path == "/v1/classify":
        return {"model": model, "input": item}
    text = TEXTS[number] if len(item) == 1 else json.dumps(item)
    return {"model": model, "messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": 20}


@dataclass
class Chaos:
    """Breaks and changes what the endpoint stands on, one thing after another, in an order that the seed decides."""

    endpoint: Endpoint
    mlflow: MlflowServer
    copies: Path
    """Where the endpoint keeps what it downloaded."""
    late: list[tuple[MadeOf, AdapterArtifact]]
    zeroed: dict[str, AdapterVersion]
    """By task: a version that its canaries refuse."""
    crowned: dict[str, MadeOf]
    """What each task should answer with."""
    draw: random.Random = field(default_factory=lambda: random.Random(SEED))
    kills: list[float] = field(default_factory=list)
    """When a replica died."""
    num_done: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        """Do everything once, then whatever comes, until the time is over."""
        actions: list[Callable[[], None]] = [
            self.crown_another, self.crown_zeroed, self.damage_a_copy, self.delete_copies, self.register, self.drop_alias,
            self.kill_a_replica, self.restart_mlflow,
        ]  # fmt: skip
        ends = time.monotonic() + CHAOS_S
        todo = self.draw.sample(actions, len(actions))
        while todo or time.monotonic() < ends:
            action = todo.pop() if todo else self.draw.choice(actions)
            time.sleep(self.draw.uniform(0.2, 1.5))
            print(f"{ends - time.monotonic():5.1f} s left: {action.__name__}", flush=True)  # noqa: T201
            action()
            self.num_done[action.__name__] += 1

    def crown_another(self) -> None:
        """Promote, or roll back: there are two versions of each."""
        family, task = self.draw.choice(STEADY)
        self.crowned[task.name] = (family, task, 3 - self.crowned[task.name][2])
        self.endpoint.crown(self.crowned[task.name])

    def crown_zeroed(self) -> None:
        """A champion that is none: the good version goes on; not on a replica that never knew it, so none may be starting."""
        self.wait_for_replicas()
        task = self.draw.choice(STEADY)[1].name
        self.endpoint.registry.set_alias(self.zeroed[task], CHAMPION)
        time.sleep(self.draw.uniform(1.0, 4.0))
        self.endpoint.crown(self.crowned[task])

    def damage_a_copy(self) -> None:
        """Cut, change or take away a file of a downloaded adapter."""
        found = [file for name in (CARD, WEIGHTS) for file in self.copies.glob(f"[!.]*/[!.]*/artifacts/*/{name}")]
        if not found:
            return
        file = self.draw.choice(found)
        kind = self.draw.choice(["cut", "change", "take away"])
        if kind == "take away":
            file.unlink()
        else:
            with file.open("r+b") as stream:
                stream.truncate(100) if kind == "cut" else stream.write(b"\0" * 50)

    def delete_copies(self) -> None:
        """Take all downloads away."""
        shutil.rmtree(self.copies, ignore_errors=True)

    def register(self) -> None:
        """A new task comes."""
        if self.late:
            made_of, artifact = self.late.pop()
            self.endpoint.versions[made_of] = self.endpoint.register(made_of[1].name, artifact)
            self.endpoint.crown(made_of)
            self.crowned[made_of[1].name] = made_of

    def drop_alias(self) -> None:
        """A task goes, and comes back."""
        self.endpoint.registry.drop_alias(FLEETING.name, CHAMPION)
        time.sleep(self.draw.uniform(0.5, 3.0))
        self.endpoint.crown(("encoder", FLEETING, 1))

    def kill_a_replica(self) -> None:
        """kill -9; not the last one that answers."""
        self.wait_for_replicas()
        self.draw.choice(self.endpoint.replicas()).kill()
        self.kills.append(time.monotonic())

    def restart_mlflow(self) -> None:
        """kill -9 of the registry. What answers goes on from this machine's copies, so these must be there."""
        self.wait_for_replicas()
        wait_for(self.are_copies_whole, 60)
        self.mlflow.kill()
        time.sleep(self.draw.uniform(0.5, 5.0))
        self.mlflow.start()

    def wait_for_replicas(self) -> None:
        """Until both answer."""
        wait_for(lambda: len(self.endpoint.addresses()) == 2, 120)

    def are_copies_whole(self) -> bool:
        """Whether all versions are on disk as they were registered, once both replicas were asked for all of them."""
        for address in self.endpoint.addresses():
            for made_of, version in self.endpoint.versions.items():
                response = ask_at(address, "/v1/classify", question("/v1/classify", version.key, made_of[1], 0))
                assert self.endpoint.check(response, 0) == version.digest
        return all(
            version.digest in map(digest_in, self.copies.glob(f"{version.task}/{version.version}-*/artifacts/*"))
            for version in self.endpoint.versions.values()
        )


def ask_at(address: str, path: str, body: object) -> httpx.Response:
    """Ask one replica itself, patiently."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            return await ask_patiently(client, path, body)

    return asyncio.run(ask())


def zeroed(artifact: AdapterArtifact, folder: Path) -> AdapterArtifact:
    """The same adapter with weights of zero: its digest is right, its canaries are not."""
    shutil.copytree(artifact.folder, folder)
    save_file({name: x * 0 for name, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return read_artifact(folder)


@pytest.fixture
def chaos(tmp_path, tiny_adapter, fresh_base, base_folder) -> Iterator[Chaos]:
    """A registry on a real server, two replicas with room for a third of the adapters, nothing broken yet."""
    mlflow = MlflowServer(tmp_path, free_port())
    mlflow.start()
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    cli = CommandLine(workspace, {"MLFLOW_TRACKING_URI": mlflow.url})
    config = OrchestratorConfig(workspace=workspace, tracking_uri=mlflow.url)
    endpoint = Endpoint(cli, Registry(mlflow.url, patience_s=60), config.serve_file)
    endpoint.learn([*ADAPTERS, *PASSING], tiny_adapter, fresh_base, base_folder)
    at_first = [*ADAPTERS, ("encoder", FLEETING, 1)]
    endpoint.versions = {made_of: endpoint.register(made_of[1].name, tiny_adapter(*made_of)) for made_of in at_first}
    crowned = {made_of[1].name: made_of for made_of in at_first if made_of[2] == 1}
    endpoint.crown(*crowned.values())
    refused = {
        task.name: endpoint.register(task.name, zeroed(tiny_adapter(family, task, 3), tmp_path / task.name))
        for family, task in [*STEADY, ("encoder", HOLLOW)]
    }
    endpoint.registry.set_alias(refused[HOLLOW.name], CHAMPION)
    endpoint.serve("--replicas", 2, "--slots", 2, "--host-adapters", 3)
    late = [(("encoder", task, 1), tiny_adapter("encoder", task, 1)) for task in LATE]
    yield Chaos(endpoint, mlflow, config.downloads_dir / "serve", late, refused, crowned)
    cli.run("stop")
    mlflow.kill()


def test_whatever_happens_every_answer_is_the_oracles(chaos: Chaos) -> None:
    endpoint, load = chaos.endpoint, Load(chaos.endpoint)
    chaos.wait_for_replicas()
    fresh_bytes = max(process.memory_info().rss for process in endpoint.replicas())

    async def under_load() -> None:
        loading = asyncio.create_task(load.run())
        try:
            await asyncio.to_thread(chaos.run)
        finally:
            load.is_over.set()
        await loading

    asyncio.run(under_load())
    late_s = [min((at - kill for kill in chaos.kills if at >= kill), default=float("inf")) for at, *_ in load.failures]
    failures = Counter(kind for _, _, kind, _ in load.failures)
    answers = f"{dict(load.num_answers)} answers, {len(load.wrong)} wrong"
    tried_again = f"tried again: {dict(failures)}, at most {max(late_s, default=0):.1f} s after a kill"
    print(f"seed {SEED}: {answers}; {tried_again}; {dict(chaos.num_done)}")  # noqa: T201
    assert not load.wrong, "\n".join(load.wrong[:10])
    unexplained = [failure for failure, after_s in zip(load.failures, late_s, strict=True) if after_s > AFTER_KILL_S]
    assert not unexplained, unexplained[:10]
    assert all(load.num_answers[path] > 50 for path in ("/v1/classify", "/v1/chat/completions"))

    chaos.wait_for_replicas()
    for address in endpoint.addresses():
        for task, made_of in chaos.crowned.items():
            ask = partial(ask_at, address, "/v1/classify", question("/v1/classify", task, made_of[1], 1))
            wait_for(lambda ask=ask, made_of=made_of: endpoint.check(ask(), 1) == endpoint.versions[made_of].digest, 60)
    assert len(endpoint.replicas()) == 2
    assert max(process.memory_info().rss for process in endpoint.replicas()) < 1.5 * fresh_bytes + 100 * 2**20
