"""How fast does one endpoint answer for 16 tasks, and for 1,000, beside what a user would otherwise run?

MiniLM, or a model of Flan-T5 small's shape, in float32; real short texts, random adapters of rank 8 on every linear layer,
uniform and Zipf traffic. In turn:

engine     offline, in this process: mixed batches against a plain padded batch of 32 through transformers (`engine_vs_padded`),
           against the base alone through our engine (`vs_base`), 64 adapters over 16 slots against 64 (`overflow_64_over_16`)
http       our endpoint (Ray Serve, HAProxy) against PEFT with set_adapter in FastAPI (`vs_set_adapter`), a merged model per task
           (`vs_merged`), serve.multiplexed with serve.batch (`vs_multiplexed`), the engine alone (`http_vs_engine`): 64 clients
           in a closed loop, a few seconds each in turns, for this machine's speed may change; then an open loop at 80 % of each
           one's own rate for the latencies. The clients run on the same cores
lifecycle  cold load of an adapter, promotion to the first answer on every replica's clients
scale      1,000 registered adapters, 64 slots, 256 in host memory: start-up, listing, routing, memory

Every server's probabilities are held against plain PEFT's.

    python benchmarks/serve.py [--quick] [--base minilm|flan-t5-small] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

import httpx
import psutil
from mlflow import MlflowClient

from benchmarks.load import Load, Server, answers_of, closed_loop, open_loop
from benchmarks.rivals import Peft
from benchmarks.serving_scale import measure_scale
from benchmarks.serving_tasks import BASES, LABELS, RANK, AdapterMaker, Asked, base_spec, real_texts, traffic, write_and_crown
from benchmarks.timing import ROOT, Report, Row, interleave, median, ratio, read_settings, seconds_of
from multilora.artifact import AdapterArtifact
from multilora.base_model import load_base
from multilora.registry import Registry
from orchestrator.config import OrchestratorConfig
from serve.engine import Engine, Work

TASKS = [f"task-{number:02}" for number in range(16)]
TOLERANCE = 1e-3
NUM_CLIENTS = 64
PORT = 8790
RIVALS = {"set-adapter": "vs_set_adapter", "merged": "vs_merged", "multiplexed": "vs_multiplexed"}


def main() -> int:
    """Run all parts and report."""
    settings = read_settings(__doc__ or "", quick_rounds=2, full_rounds=5, has_cuda=False, bases=BASES)
    sizes = {"rank": RANK, "num_tasks": len(TASKS), "num_clients": NUM_CLIENTS, "num_labels": len(LABELS)}
    report = Report("serve", settings, {**sizes, "base": settings.base})
    with tempfile.TemporaryDirectory(prefix="serve-benchmark-") as folder:
        config = OrchestratorConfig(workspace=Path(folder) / "workspace")
        config.workspace.mkdir()
        registry = Registry(config.registry_uri, config.artifact_root)
        registry.initialise()
        client = MlflowClient(config.registry_uri, registry_uri=config.registry_uri)
        maker = AdapterMaker(load_base(base_spec(settings.base, Path(folder) / "base"), "cpu"))
        adapters = Path(folder) / "adapters"
        artifacts = [write_and_crown(maker, client, adapters, task, seed) for seed, task in enumerate(TASKS)]
        run_engine = measure_engine(report, maker, artifacts)
        with endpoint(config) as ours:
            measure_http(report, ours, adapters, run_engine)
            measure_promotion(report, ours, maker, client, adapters)
        measure_scale(report, maker, Path(folder) / "scale", 100 if settings.is_quick else 1000)
    return report.finish()


def measure_engine(report: Report, maker: AdapterMaker, artifacts: Sequence[AdapterArtifact]) -> Callable[[], float]:
    """Measure the engine without HTTP; returns what measures its texts per second once more."""
    num = 256 if report.settings.is_quick else 1024
    asked = traffic(TASKS, num, is_zipf=False)
    engine = Engine(load_base(maker.base.spec, "cpu"), 16, 8, max_batch_tokens=1024)
    for artifact in artifacts:
        engine.bind(artifact, 1)
    plain = Peft(artifacts[0].folder.parents[2])
    texts = [one.text for one in asked]
    columns = [{"text": text} for text in texts]

    def run_padded() -> None:
        for first in range(0, len(texts), 32):
            plain.run_base(texts[first : first + 32])

    def run_engine() -> None:
        engine.classify([Work(f"{one.task}@1", engine.prompt(f"{one.task}@1", one.text)) for one in asked])

    variants = {
        "engine": run_engine,
        "base": lambda: engine.classify_zero_shot(maker.prompt_format, columns),
        "padded": run_padded,
    }
    for run in variants.values():
        run()
    times = interleave(variants, report.settings)
    for name in variants:
        seconds = median(times, name)
        report.add(Row("engine", name, seconds / num, ratio(times, name, "engine"), note=f"{num / seconds:.0f} texts/s"))
    report.ratios |= {"engine_vs_padded": ratio(times, "padded", "engine"), "vs_base": ratio(times, "base", "engine")}
    measure_overflow(report, maker, num)
    return lambda: num / seconds_of(run_engine, report.settings.device)


def measure_overflow(report: Report, maker: AdapterMaker, num: int) -> None:
    """64 adapters over 16 slots, in batches as they come under load, against a slot for each."""
    tasks = [f"many-{number:02}" for number in range(64)]
    asked = traffic(tasks, num, is_zipf=True, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        written = [maker.write(Path(folder) / task, task, seed) for seed, task in enumerate(tasks)]
        sizes = {"over_16": 16, "resident": 64}
        engines = {
            name: Engine(load_base(maker.base.spec, "cpu"), size, RANK, max_batch_tokens=1024) for name, size in sizes.items()
        }
        for engine in engines.values():
            for artifact in written:
                engine.bind(artifact, 1)

    def run(engine: Engine) -> None:
        works = [Work(f"{one.task}@1", engine.prompt(f"{one.task}@1", one.text)) for one in asked]
        for first in range(0, len(works), NUM_CLIENTS):
            engine.classify(works[first : first + NUM_CLIENTS])

    variants = {name: lambda engine=engine: run(engine) for name, engine in engines.items()}
    for once in variants.values():
        once()
    times = interleave(variants, report.settings)
    report.ratios["overflow_64_over_16"] = ratio(times, "resident", "over_16")
    for name in variants:
        seconds = median(times, name)
        note = f"{num / seconds:.0f} texts/s"
        report.add(Row("overflow", name, seconds / num, ratio(times, name, "resident"), note=note))


def measure_http(report: Report, ours: Server, adapters: Path, run_engine: Callable[[], float]) -> None:
    """Measure our endpoint beside the engine, then beside each rival, by the same clients."""
    checked = [Asked(task, text) for task, text in zip(TASKS, real_texts(), strict=False)]
    plain = Peft(adapters)
    for task in TASKS:
        plain.load(task)
    expected = [list(plain.probabilities(one.task, [one.text])[0].values()) for one in checked]

    def check(name: str, server: Server) -> None:
        seen = asyncio.run(answers_of(server, checked))
        difference = max(abs(a - b) for row, other in zip(seen, expected, strict=True) for a, b in zip(row, other, strict=True))
        report.add(Row("http", name, difference=difference, tolerance=TOLERANCE, note=f"memory {_memory_mb(server)} MB"))

    check("ours", ours)
    measure_beside_engine(report, ours, run_engine)
    for kind, name in RIVALS.items():
        with rival(kind, adapters) as other:
            check(kind, other)
            report.ratios[name] = min(measure_beside(report, ours, kind, other, mix) for mix in ("uniform", "zipf"))


def measure_beside_engine(report: Report, ours: Server, run_engine: Callable[[], float]) -> None:
    """One input a request, 32 inputs a request, and the engine alone, in turns."""
    asked = traffic(TASKS, 4096, is_zipf=False, seed=2)
    by_task = [[one for one in asked if one.task == task] for task in TASKS]
    packed = [some[first : first + 32] for some in by_task for first in range(0, len(some) - 31, 32)]
    single = [[one] for one in asked]
    rates: dict[str, list[float]] = {"http": [], "http32": [], "engine": []}
    _closed(report, ours, single)  # warm
    for _ in range(_num_rounds(report)):
        rates["http"].append(_closed(report, ours, single).inputs_per_s)
        rates["http32"].append(_closed(report, ours, packed[::7] + packed, num_clients=8).inputs_per_s)
        rates["engine"].append(run_engine())
    for name in ("http", "http32"):
        report.ratios[f"{name}_vs_engine"] = ratio(rates, name, "engine")
        note = f"{median(rates, name):.0f} inputs/s, the engine {median(rates, 'engine'):.0f}"
        report.add(Row("http", f"ours, {name}", ratio=report.ratios[f"{name}_vs_engine"], note=note))


def measure_beside(report: Report, ours: Server, kind: str, other: Server, mix: str) -> float:
    """Measure both in turns; returns how many times as many inputs a second ours answers."""
    requests = [[one] for one in traffic(TASKS, 4096, is_zipf=mix == "zipf", seed=3)]
    servers = {"ours": ours, kind: other}
    closed: dict[str, list[Load]] = {name: [] for name in servers}
    for server in servers.values():
        _closed(report, server, requests)  # warm
    for _ in range(_num_rounds(report)):
        for name, server in servers.items():
            closed[name].append(_closed(report, server, requests))
    rates = {name: [load.inputs_per_s for load in loads] for name, loads in closed.items()}
    for name, server in servers.items():
        opened = asyncio.run(open_loop(server, requests, 0.8 * median(rates, name), _closed_s(report)))
        middle = sorted(closed[name], key=lambda load: load.inputs_per_s)[len(closed[name]) // 2]
        label = f"{name}, {mix}" if name == kind else f"{name} beside {kind}, {mix}"
        report.add(Row("http", label, 1 / middle.inputs_per_s, ratio(rates, name, "ours"), note=_said(middle)))
        report.add(Row("http", f"{label}, open loop at 80 %", 1 / opened.inputs_per_s, note=_said(opened)))
    return ratio(rates, "ours", kind)


def _closed(report: Report, server: Server, requests: Sequence[Sequence[Asked]], num_clients: int = NUM_CLIENTS) -> Load:
    load = asyncio.run(closed_loop(server, requests, num_clients, _closed_s(report)))
    if load.num_errors:  # what they took is no speed
        report.add(Row("http", f"errors of {server.url}", difference=load.num_errors, tolerance=0))
    return load


def _closed_s(report: Report) -> float:
    """Long beside the seconds that serve.multiplexed takes for 64 requests, which it answers 32 at a time."""
    return 3.0 if report.settings.is_quick else 8.0


def _num_rounds(report: Report) -> int:
    return min(3, report.settings.num_rounds)


def measure_promotion(report: Report, server: Server, maker: AdapterMaker, client: MlflowClient, adapters: Path) -> None:
    """Seconds from moving the alias to the first answer by the new version."""
    took = []
    for number in range(5):
        artifact = write_and_crown(maker, client, adapters, TASKS[0], 100 + number)
        started = time.perf_counter()
        while httpx.post(f"{server.url}/v1/classify", json={"model": TASKS[0], "input": "a"}).json()["digest"] != artifact.digest:
            time.sleep(0.02)
        took.append(time.perf_counter() - started)
    report.extra["promotion_s"] = took
    report.ratios["promotion_s"] = max(took)
    report.add(Row("lifecycle", "promotion to first answer", max(took), note="longest of five"))


@contextmanager
def endpoint(config: OrchestratorConfig) -> Iterator[Server]:
    """Our endpoint, as its command starts it."""
    argv = [sys.executable, "-m", "orchestrator", "serve", "--port", str(PORT), "--workspace", str(config.workspace)]
    subprocess.run(argv, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield Server(f"http://127.0.0.1:{PORT}")
    finally:
        subprocess.run([sys.executable, "-m", "orchestrator", "stop", "--workspace", str(config.workspace)], check=True, cwd=ROOT)


@contextmanager
def rival(kind: str, adapters: Path) -> Iterator[Server]:
    """A rival in a process of its own."""
    argv = [sys.executable, str(ROOT / "benchmarks" / "rivals.py"), kind, str(PORT + 1), str(adapters)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    url = f"http://127.0.0.1:{PORT + 1}"
    try:
        for _ in range(600):
            time.sleep(0.2)
            try:
                if httpx.get(f"{url}/readyz", timeout=5, headers={"serve_multiplexed_model_id": TASKS[0]}).status_code == 200:
                    break
            except httpx.HTTPError:
                continue
        is_multiplexed = kind == "multiplexed"
        yield Server(url, is_multiplexed, pid=0 if is_multiplexed else process.pid)
    finally:
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=10)
        for left in alive:
            left.kill()


def _memory_mb(server: Server) -> int:
    """Memory of the process that answers."""
    if server.pid:
        return int(psutil.Process(server.pid).memory_info().rss) // 2**20
    name = "Multiplexed" if server.is_multiplexed else "ServeReplica:adapters"
    replicas = [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or ())]
    return sum(p.memory_info().rss for p in replicas) // 2**20


def _said(load: Load) -> str:
    errors = f", {load.num_errors} ERRORS" if load.num_errors else ""
    return f"{load.inputs_per_s:.0f} inputs/s, p50 {load.p50_ms:.0f} ms, p99 {load.p99_ms:.0f} ms{errors}"


if __name__ == "__main__":
    raise SystemExit(main())
