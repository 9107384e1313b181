"""Does the endpoint stay as it is under load: memory, file descriptors, latency, errors?

One replica behind HAProxy answers for four adapters of rank 8 (random weights) over the embedded MiniLM, or over a tiny encoder
where its package is not installed. First many clients at once measure the most requests a second; then requests come at 80 % of
that at fixed times, whether or not earlier ones are answered, and a latency counts from the time that a request was due.
Correct is: no request failed, every answer is the one that the same text got before the load, and memory is flat: the 95 %
interval of the growth in the second half (least squares) ends below 1 MiB a minute; a run of less than two minutes cannot tell.

    python benchmarks/soak.py [--minutes 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # tiny adapters
sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

import aiohttp
import numpy as np
import psutil
import torch
from scipy.stats import linregress, t
from tiny_adapters import CARDS, TEXTS, TinyTask, write_tiny_adapter
from tiny_bases import build_bert

from benchmarks.timing import ROOT, Report, Row, Settings
from multilora.base_files import EMBEDDED
from multilora.base_model import FrozenBase, load_base
from multilora.lora import AdapterSlots
from multilora.registry import CHAMPION, Registry
from multilora.spec import BaseSpec
from multilora.target_modules import match_modules
from orchestrator import background
from orchestrator.config import OrchestratorConfig
from serve.pyfunc_model import __file__ as pyfunc_code

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TASKS = [replace(CARDS, name=f"cards-{number}", rank=8) for number in range(4)]
SHARE, NUM_CLIENTS, MEASURE_S = 0.8, 16, 15.0
SAMPLE_EVERY_S = 1.0
FLAT_MIB_PER_MINUTE = 1.0
TOLERANCE = 1e-3
MIB = 2**20
QUESTIONS = [(task.name, text) for task in TASKS for text in TEXTS]


@dataclass
class Soak:
    """What was seen under load."""

    latencies_s: list[tuple[float, float]] = field(default_factory=list)
    """(when it was due, seconds from then to the answer), times since the load's start."""
    errors: list[tuple[float, str]] = field(default_factory=list)
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """(when, name -> MiB or number)."""


def main() -> int:
    """Serve, measure, soak, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    given = parser.parse_args()
    model = MINILM if find_spec(EMBEDDED[MINILM].package) else "tiny encoder"
    settings = Settings(False, given.json, 1, math.inf, torch.device("cpu"))
    report = Report("soak", settings, {"minutes": given.minutes, "share": SHARE, "base": model, "num_adapters": len(TASKS)})
    with tempfile.TemporaryDirectory() as folder, endpoint(Path(folder), model) as (url, pid):
        asyncio.run(soak(url, pid, given.minutes * 60, report))
    return report.finish()


async def soak(url: str, pid: int, seconds: float, report: Report) -> None:
    """Ask for the right answers, find the most requests a second, then ask at a share of it."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(60)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as client:
        expected = [await ask(client, *question) for question in QUESTIONS]
        most = await most_per_second(client)
        seen = await under_load(client, expected, SHARE * most, seconds, pid)
    report.ratios |= {"max_per_s": most, "rate_per_s": SHARE * most}
    for minute in range(math.ceil(seconds / 60)):
        add_minute(report, seen, minute)
    add_memory(report, seen, seconds)
    report.extra["samples"] = [{"s": round(at, 1), **values} for at, values in seen.samples]
    report.extra["errors"] = [message for _, message in seen.errors[:20]]
    note = f"of {len(seen.latencies_s)} requests"
    report.add(Row("all", "errors", difference=float(len(seen.errors)), tolerance=0.0, note=note))


async def ask(client: aiohttp.ClientSession, task: str, text: str) -> list[float]:
    """Probabilities of one text's labels. Raises ClientError, TimeoutError."""
    async with client.post("/v1/classify", json={"model": task, "input": text}, raise_for_status=True) as response:
        return list((await response.json())["results"][0]["probabilities"].values())


async def most_per_second(client: aiohttp.ClientSession) -> float:
    """Requests a second that clients get answered who ask again as soon as they have an answer."""
    ends, numbers = time.monotonic() + MEASURE_S, count()

    async def one() -> None:
        while time.monotonic() < ends:
            await ask(client, *QUESTIONS[next(numbers) % len(QUESTIONS)])

    await asyncio.gather(*(one() for _ in range(NUM_CLIENTS)))
    return next(numbers) / MEASURE_S


async def under_load(
    client: aiohttp.ClientSession,
    expected: Sequence[Sequence[float]],
    rate: float,
    seconds: float,
    pid: int,
) -> Soak:
    """Send requests at fixed times and look at the processes meanwhile."""
    seen, began = Soak(), time.monotonic()

    async def one(number: int, due: float) -> None:
        which = number % len(QUESTIONS)
        try:
            answer = await ask(client, *QUESTIONS[which])
            if not np.allclose(answer, expected[which], atol=TOLERANCE):
                seen.errors.append((due, f"{QUESTIONS[which]}: {answer}, before {expected[which]}"))
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.errors.append((due, repr(error)))
        seen.latencies_s.append((due, time.monotonic() - began - due))

    async def watch() -> None:
        while True:
            seen.samples.append((time.monotonic() - began, sample(pid)))
            await asyncio.sleep(SAMPLE_EVERY_S)

    async with asyncio.TaskGroup() as both:  # a watch that fails ends the load
        watching = both.create_task(watch())
        async with asyncio.TaskGroup() as asking:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                asking.create_task(one(number, number / rate))
        watching.cancel()
    return seen


def sample(pid: int) -> dict[str, float]:
    """Resident MiB and open files of the replica and of HAProxy, which begins a new process with each new configuration."""
    values = dict.fromkeys(("replica_mib", "replica_fds", "haproxy_mib", "haproxy_fds"), 0.0)
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            is_replica = "ServeReplica:adapters" in " ".join(process.cmdline())
            if is_replica or process.name() == "haproxy":
                name = "replica" if is_replica else "haproxy"
                values[f"{name}_mib"] += process.memory_info().rss / MIB
                values[f"{name}_fds"] += process.num_fds()
    return values


def add_minute(report: Report, seen: Soak, minute: int) -> None:
    """One line of the table."""
    latencies = np.array([latency for due, latency in seen.latencies_s if due // 60 == minute])
    samples = [values for at, values in seen.samples if at // 60 == minute]
    if not len(latencies) or not samples:
        return
    num_errors = sum(at // 60 == minute for at, _ in seen.errors)
    mean = {name: float(np.mean([values[name] for values in samples])) for name in samples[0]}
    p50, p99 = np.percentile(latencies, [50, 99])
    shown = ", ".join(f"{name} {value:.1f}" for name, value in mean.items())
    report.add(Row(f"minute {minute + 1}", "p50", float(p50), note=f"{len(latencies)} requests, {num_errors} errors, {shown}"))
    report.add(Row(f"minute {minute + 1}", "p99", float(p99)))


def add_memory(report: Report, seen: Soak, seconds: float) -> None:
    """How fast memory grows, with a 95 % interval."""
    # The most requests that ever waited at once set how much memory is kept, and a machine that is slow for a moment lifts
    # that for good; a leak goes on.
    start = seconds / 2
    points = [(at / 60, values) for at, values in seen.samples if at >= start]
    for name in ("replica_mib", "haproxy_mib"):
        fit = linregress([at for at, _ in points], [values[name] for _, values in points])
        slope, half = float(fit.slope), float(t.ppf(0.975, len(points) - 2) * fit.stderr)
        report.ratios[f"{name}_per_minute"] = slope
        verdict = "memory flat" if slope + half < FLAT_MIB_PER_MINUTE else "MEMORY GROWS, or the run is too short to tell"
        note = f"{verdict}: {slope:.3f} MiB a minute, 95 % interval {slope - half:.3f} to {slope + half:.3f}"
        # Under two minutes the memory that the load itself takes is still growing.
        counts = seconds >= 120
        report.add(Row("memory", name, None, None, slope + half if counts else None, FLAT_MIB_PER_MINUTE, note))


@contextmanager
def endpoint(folder: Path, model: str) -> Iterator[tuple[str, int]]:
    """Serve the adapters with one replica; its URL, and the process that started everything."""
    config = OrchestratorConfig(workspace=folder / "workspace")
    config.workspace.mkdir()
    registry = Registry(config.registry_uri, config.artifact_root)
    registry.initialise()
    base = load_base(BaseSpec(model=model if model == MINILM else str(build_bert(folder / "bert"))), "cpu")
    slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), 1, max(task.rank for task in TASKS))
    for seed, task in enumerate(TASKS):
        register(registry, base, slots, task, seed, folder / task.name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "orchestrator"]
    environment = {**os.environ, "ORCHESTRATOR_HOME": str(config.workspace), "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "serve", "--port", str(port)], env=environment, check=True)
    try:
        running = background.find(config.serve_file)
        assert running is not None, "the endpoint ended"
        yield running.url, running.pid
    finally:
        subprocess.run([*command, "stop"], env=environment, check=True)


def register(registry: Registry, base: FrozenBase, slots: AdapterSlots, task: TinyTask, seed: int, folder: Path) -> None:
    """Make a random adapter the champion of its task."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (
            torch.randn(task.rank, layer.in_features, generator=generator) * layer.in_features**-0.5,
            torch.randn(layer.out_features, task.rank, generator=generator) * (0.2 / task.rank),
        )
        for name, layer in slots.layers.items()
    }
    with torch.no_grad():
        artifact = write_tiny_adapter(folder / "adapter", base, slots, tensors, task)
    run = registry.start_run(task.name, artifact.digest[:16], {}, {})
    registry.set_alias(registry.register(run, artifact.folder, artifact.digest, Path(pyfunc_code), "", {}), CHAMPION)


if __name__ == "__main__":
    raise SystemExit(main())
