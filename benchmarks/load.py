"""Load for an HTTP server: closed loop (as fast as it answers) and open loop (at a rate, whether it answers or not)."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from benchmarks.serving_tasks import Asked


@dataclass(frozen=True)
class Load:
    """What a load measured."""

    inputs_per_s: float
    p50_ms: float
    p99_ms: float
    num_errors: int


@dataclass(frozen=True)
class Server:
    """Where to ask."""

    url: str
    is_multiplexed: bool = False
    """Whether the task goes into Ray Serve's header."""
    pid: int = 0
    """Of the process that answers; 0 where Ray Serve's replicas do."""

    def request(self, some: Sequence[Asked]) -> dict[str, Any]:
        """One request's arguments; all its inputs are of one task."""
        texts: str | list[str] = some[0].text if len(some) == 1 else [asked.text for asked in some]
        headers = {"serve_multiplexed_model_id": some[0].task} if self.is_multiplexed else {}
        return {"url": f"{self.url}/v1/classify", "json": {"model": some[0].task, "input": texts}, "headers": headers}


async def answers_of(server: Server, asked: Sequence[Asked]) -> list[list[float]]:
    """The probabilities of each text, one request after another."""
    async with aiohttp.ClientSession() as session:
        found = []
        for one in asked:
            async with session.post(**server.request([one])) as response:
                response.raise_for_status()
                found.append(list((await response.json())["results"][0]["probabilities"].values()))
        return found


async def closed_loop(server: Server, requests: Sequence[Sequence[Asked]], num_clients: int, seconds: float) -> Load:
    """Keep so many clients asking one request after another."""
    turns = itertools.cycle(requests)
    took: list[float] = []
    counts = {"inputs": 0, "errors": 0}
    started = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() - started < seconds:
            some = next(turns)
            began = time.perf_counter()
            async with session.post(**server.request(some)) as response:
                await response.read()
                counts["errors"] += response.status != 200
                counts["inputs"] += len(some)
            took.append(time.perf_counter() - began)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=num_clients)) as session:
        await asyncio.gather(*(client(session) for _ in range(num_clients)))
    return _load(counts["inputs"] / (time.perf_counter() - started), took, counts["errors"])


async def open_loop(server: Server, requests: Sequence[Sequence[Asked]], per_s: float, seconds: float) -> Load:
    """Send requests at random moments (Poisson), so many a second; latency counts from the moment that each was due."""
    rng, turns = random.Random(0), itertools.cycle(requests)
    took: list[float] = []
    counts = {"inputs": 0, "errors": 0}

    async def send(session: aiohttp.ClientSession, due: float) -> None:
        some = next(turns)
        try:
            async with session.post(**server.request(some)) as response:
                await response.read()
                counts["errors"] += response.status != 200
        except aiohttp.ClientError:
            counts["errors"] += 1
        counts["inputs"] += len(some)
        took.append(time.perf_counter() - due)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1000)) as session:
        started = due = time.perf_counter()
        sending: set[asyncio.Task[None]] = set()
        while due - started < seconds:
            due += rng.expovariate(per_s)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(send(session, due))
            sending.add(task)
            task.add_done_callback(sending.discard)
        await asyncio.gather(*sending)
        elapsed = time.perf_counter() - started
    return _load(counts["inputs"] / elapsed, took, counts["errors"])


def _load(inputs_per_s: float, took: Sequence[float], num_errors: int) -> Load:
    p50, p99 = np.percentile(took, [50, 99])
    return Load(inputs_per_s, 1000 * float(p50), 1000 * float(p99), num_errors)
