"""An endpoint over adapters that nobody trained, with plain PEFT as the oracle of every answer."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from plain_peft import plain_peft, plain_probabilities
from tiny_adapters import TEXTS, TinyTask, item_of

import serve.pyfunc_model as pyfunc_model
from e2e.conftest import CommandLine
from multilora.artifact import AdapterArtifact
from multilora.registry import CHAMPION, AdapterVersion, Registry
from orchestrator import background

TOLERANCE = 1e-3
RETRY = (429, 502, 503, 504)
NUM_ATTEMPTS = 9
LONGEST_PAUSE_S = 5.0
MadeOf = tuple[str, TinyTask, int]
"""Family, task, seed."""


async def ask_patiently(
    client: httpx.AsyncClient, path: str, body: object, on_failure: Callable[[str, str], None] = lambda kind, text: None
) -> httpx.Response:
    """Ask as docs/serving.md tells clients to; `on_failure` hears of every attempt that is tried again.

    Returns the last answer, whatever it is; raises where the last attempt had none.
    """
    for attempt in range(NUM_ATTEMPTS):
        pause_s = min(0.1 * 2**attempt, LONGEST_PAUSE_S)
        try:
            response = await client.post(path, json=body)
        except httpx.TransportError as error:
            on_failure(type(error).__name__, str(error))
            if attempt == NUM_ATTEMPTS - 1:
                raise
        else:
            if response.status_code not in RETRY:
                break
            on_failure(str(response.status_code), response.text)
            pause_s = float(response.headers.get("retry-after", pause_s))
        await asyncio.sleep(pause_s)
    return response


@dataclass
class Endpoint:
    """A workspace with registered adapters, and the endpoint that serves its champions."""

    cli: CommandLine
    registry: Registry
    serve_file: Path
    versions: dict[MadeOf, AdapterVersion] = field(default_factory=dict)
    expected: dict[str, list[list[float]]] = field(default_factory=dict)
    """Digest -> probabilities for each of TEXTS."""
    url: str = field(default_factory=lambda: f"http://127.0.0.1:{free_port()}")

    def register(self, task: str, artifact: AdapterArtifact) -> AdapterVersion:
        """Make an adapter the next version of its task."""
        run = self.registry.start_run(task, artifact.digest[:16], {}, {})
        return self.registry.register(run, artifact.folder, artifact.digest, Path(pyfunc_model.__file__), "", {})

    def learn(self, adapters: Iterable[MadeOf], tiny_adapter, fresh_base, base_folder) -> None:
        """Ask plain PEFT what each adapter answers."""
        for family, task, seed in adapters:
            artifact = tiny_adapter(family, task, seed)
            base, model = fresh_base(family), plain_peft(base_folder(family), family, artifact)
            self.expected[artifact.digest] = [plain_probabilities(base, model, task, text, task.temperature) for text in TEXTS]

    def crown(self, *adapters: MadeOf) -> None:
        """Make adapters the champions of their tasks."""
        for made_of in adapters:
            self.registry.set_alias(self.versions[made_of], CHAMPION)

    def serve(self, *options: object) -> None:
        """Start the endpoint."""
        self.cli.run("serve", "--port", self.url.rpartition(":")[2], *options)

    async def ask(self, client: httpx.AsyncClient, task: TinyTask, number: int) -> httpx.Response:
        """Ask one text."""
        return await ask_patiently(client, "/v1/classify", {"model": task.name, "input": item_of(task, TEXTS[number])})

    def check(self, response: httpx.Response, number: int) -> str:
        """Hold an answer against the oracle of the version that it says it is from; returns its digest."""
        assert response.status_code == 200, response.text
        body = response.json()
        if "results" in body:
            digest, seen = body["digest"], list(body["results"][0]["probabilities"].values())
        else:
            digest = response.headers["x-adapter-digest"]
            seen = [math.exp(token["logprob"]) for token in body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]
        expected = self.expected[digest][number]
        # A conversation's alternatives come in the order of their probabilities.
        assert seen == pytest.approx(expected if "results" in body else sorted(expected, reverse=True), abs=TOLERANCE)
        return str(digest)

    def replicas(self) -> list[psutil.Process]:
        """Processes of this endpoint's replicas; another one may run on this machine."""
        running = background.find(self.serve_file)
        family = psutil.Process(running.pid).children(recursive=True) if running else []
        return [process for process in family if "ServeReplica:adapters" in command_of(process)]

    def addresses(self) -> list[str]:
        """Of the replicas that are ready, to ask each by itself."""
        found = []
        for process in self.replicas():
            with suppress(psutil.Error, httpx.HTTPError, ValueError):
                ports = [c.laddr.port for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                (port,) = [port for port in ports if 30_000 <= port <= 31_000]  # Ray Serve's for its replicas
                address = f"http://127.0.0.1:{port}"
                if httpx.get(f"{address}/readyz", timeout=10).status_code == 200:
                    found.append(address)
        return found


def command_of(process: psutil.Process) -> str:
    """How a process was called; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
