"""Part of benchmarks/serve.py: a replica in this process over a registry of 1,000 adapters, and cold loads."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import httpx
import psutil
from mlflow import MlflowClient

from benchmarks.serving_tasks import AdapterMaker, crown, traffic
from benchmarks.timing import Report, Row
from multilora.artifact import read_artifact
from multilora.registry import ADAPTER_PATH, Registry
from serve.app import build_app
from serve.auth import Doorkeeper
from serve.config import ServeConfig
from serve.replica import Replica

NUM_REQUESTS = 3000


def measure_scale(report: Report, maker: AdapterMaker, root: Path, num_adapters: int) -> None:
    """Start-up, listing, routing, memory with so many registered adapters, beside 16."""
    few = asyncio.run(_measure(report, maker, root / "few", 16))
    many = asyncio.run(_measure(report, maker, root / "many", num_adapters))
    report.ratios |= {
        "scale_start_s": many["start_s"],
        "cold_load_ms": many["cold_load_ms"],
        "scale_routing_vs_16": many["routing_s"] / few["routing_s"],
        "scale_listing_ms": 1000 * many["listing_s"],
    }
    report.extra["scale"] = {"16": few, str(num_adapters): many}


async def _measure(report: Report, maker: AdapterMaker, root: Path, num_adapters: int) -> dict[str, float]:
    tasks = [f"scaled-{number:04}" for number in range(num_adapters)]
    registry_uri = _register(maker, root, tasks)
    config = ServeConfig(tracking_uri=registry_uri, downloads_dir=root / "downloads", num_slots=64, num_host_adapters=256)
    started = time.perf_counter()
    replica = Replica(config)
    app = build_app(replica, Doorkeeper(None), config)
    found: dict[str, float] = {}
    try:
        await replica.sync()
        found["start_s"] = time.perf_counter() - started
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica", timeout=60) as client:
            found["listing_s"] = await _median_s(lambda: client.get("/v1/models"), 20)
            found["look_s"] = await _median_s(replica.sync, 5)
            found["routing_s"] = await _median_s(lambda: replica._version(tasks[-1]), 1000)
            before = psutil.Process().memory_info().rss
            for asked in traffic(tasks, NUM_REQUESTS if num_adapters > 16 else 300, is_zipf=True):
                response = await client.post("/v1/classify", json={"model": asked.task, "input": asked.text})
                response.raise_for_status()
            found["memory_growth_mb"] = (psutil.Process().memory_info().rss - before) / 2**20
            found["num_bound"] = len(replica._store._bound)
        found["cold_load_ms"] = 1000 * await _cold_load_s(replica)
    finally:
        await replica.close()
    note = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    report.add(Row("scale", f"{num_adapters} adapters", found["start_s"], note=note))
    return found


def _register(maker: AdapterMaker, root: Path, tasks: list[str]) -> str:
    """Register adapters of the same tensors under all names; returns the registry's address."""
    root.mkdir(parents=True)
    uri = f"sqlite:///{root / 'mlflow.db'}"
    Registry(uri, root / "artifacts").initialise()
    client = MlflowClient(uri, registry_uri=uri)
    first = maker.write(root / "first", tasks[0], 0)
    for task in tasks:
        folder = root / "adapters" / task / "artifacts" / ADAPTER_PATH
        folder.parent.mkdir(parents=True)
        maker.write(folder, task, 0, canaries_of=first)
        crown(client, read_artifact(folder))
    return uri


async def _median_s(call, num: int) -> float:  # type: ignore[no-untyped-def]
    took = []
    for _ in range(num):
        started = time.perf_counter()
        await call()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


async def _cold_load_s(replica: Replica) -> float:
    """Bind adapters that are on this machine's disk and not in memory: read, check, canaries."""
    took = []
    for version in list(replica.served())[:20]:
        server = replica._store._bound.pop(version.key, None)
        if server is not None:
            server.engine.unbind(version.key)
        await asyncio.to_thread(replica._registry.download, version, replica._config.downloads_dir)
        started = time.perf_counter()
        await replica._store.bind(version)
        took.append(time.perf_counter() - started)
    return statistics.median(took)
