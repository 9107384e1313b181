"""What every benchmark shares: arguments, interleaved timing, and a report that is a table, a JSON file and an exit code.

Variants run A, B, C, A, B, C ... in one process and a ratio is the median of the ratios of each round, so that a machine
that is slower for a while slows both sides of a ratio.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
QUICK_S = 2.5
"""A quick run starts no further round of a group after this long, unless the rounds were asked for."""
LIBRARIES = ("torch", "transformers", "peft")
Times = Mapping[str, list[float]]
"""Variant -> seconds of each round."""


@dataclass(frozen=True)
class Settings:
    """How a benchmark was called."""

    is_quick: bool
    json_file: Path | None
    num_rounds: int
    max_s: float
    """No further round of a group starts after this many seconds."""
    device: torch.device
    base: str = ""
    """Shape of the base, where a benchmark has several."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    variant: str
    seconds: float | None = None
    ratio: float | None = None
    difference: float | None = None
    """Largest absolute difference to the oracle."""
    tolerance: float | None = None
    note: str = ""

    @property
    def is_correct(self) -> bool:
        """Whether the difference is allowed; a NaN is not."""
        return self.difference is None or self.tolerance is None or self.difference <= self.tolerance


@dataclass
class Report:
    """What a benchmark found."""

    name: str
    settings: Settings
    config: dict[str, object]
    ratios: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    extra: dict[str, object] = field(default_factory=dict)
    """More results for the JSON file, by name."""

    def add(self, row: Row) -> None:
        """Note a line and show it at once: a full run takes minutes."""
        self.rows.append(row)
        numbers = {"s": row.seconds, "ratio": row.ratio, "difference": row.difference, "tolerance": row.tolerance}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items() if value is not None)
        print(f"{row.group}, {row.variant}: {shown} {row.note}", file=sys.stderr, flush=True)

    def finish(self) -> int:
        """Print the table, write the JSON file, and return the exit code: 1 where a result was wrong, never for a slow one."""
        Console(width=150).print(self._table())
        print("  ".join(f"{name} {value:.3g}" for name, value in self.ratios.items()))
        is_correct = all(row.is_correct for row in self.rows)
        if self.settings.json_file:
            content = {
                "benchmark": self.name,
                "ratios": self.ratios,
                "is_correct": is_correct,
                "rows": [{**asdict(row), "is_correct": row.is_correct} for row in self.rows],
                **self.extra,
                "config": {**self.config, "is_quick": self.settings.is_quick, "num_rounds": self.settings.num_rounds},
                "machine": machine(self.settings.device),
                "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
                "commit": commit(),
            }
            self.settings.json_file.parent.mkdir(parents=True, exist_ok=True)
            self.settings.json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return 0 if is_correct else 1

    def _table(self) -> Table:
        table = Table(title=f"{self.name} on {self.settings.device.type}")
        for column in ("group", "variant", "ms", "ratio", "max difference", "correct", "note"):
            table.add_column(column, justify="right" if column in ("ms", "ratio", "max difference") else "left")
        for row in self.rows:
            table.add_row(
                row.group,
                row.variant,
                "" if row.seconds is None else f"{1000 * row.seconds:.1f}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
                "" if row.difference is None else f"{row.difference:.2g} (<= {row.tolerance or 0:.2g})",
                "" if row.difference is None else "yes" if row.is_correct else "[bold red]NO",
                row.note,
            )
        return table


def read_settings(
    description: str, quick_rounds: int, full_rounds: int, *, has_cuda: bool = True, bases: Sequence[str] = ()
) -> Settings:
    """Parse the command line and set the threads: as many as there are cores. The first of `bases` is the default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and only what the named ratios need")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--rounds", type=int, help=f"rounds (default {full_rounds}, quick {quick_rounds})")
    if has_cuda:
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    if bases:
        parser.add_argument("--base", choices=bases, default=bases[0])
    given = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device(given.device if has_cuda else "cpu")
    num_rounds = given.rounds or (quick_rounds if given.quick else full_rounds)
    max_s = QUICK_S if given.quick and not given.rounds else math.inf
    return Settings(given.quick, given.json, num_rounds, max_s, device, given.base if bases else "")


def interleave(variants: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, list[float]]:
    """Time every variant once a round. The caller has run each before: the first call is never typical."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    for number in range(settings.num_rounds):
        if number and time.perf_counter() - start > settings.max_s:
            break
        for name, run in variants.items():
            times[name].append(seconds_of(run, settings.device))
    return times


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time one call, the work that it left on a GPU included; as in timeit, the garbage collector waits."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds


def ratio(times: Times, numerator: str, denominator: str) -> float:
    """Median over the rounds of one variant's time over another's."""
    return statistics.median(a / b for a, b in zip(times[numerator], times[denominator], strict=True))


def median(times: Times, variant: str) -> float:
    """Median seconds of a variant."""
    return statistics.median(times[variant])


def gemm_flops(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Floating point operations per second that a large square product sustains here: the median of five."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / statistics.median(seconds_of(lambda: torch.mm(a, b), device) for _ in range(5))


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products run on hardware made for them; without, one takes some 50 times as long as in float32."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def machine(device: torch.device) -> dict[str, object]:
    """Say what the numbers were measured on; no host name."""
    cpu_info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "num_cores": psutil.cpu_count(logical=False),
        "num_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "has_fast_bf16": has_fast_bf16(device),
        "load_average": os.getloadavg()[0],
        "system": platform.system(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
    }


def commit() -> str:
    """Name the commit, with `+changes` where the working tree differs; `unknown` outside a repository."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
