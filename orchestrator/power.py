"""Whether a gate split is large enough for its margin; said at spec time, so it counts rows and loads neither data nor scipy."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from statistics import NormalDist

from multilora.spec import LOCAL_SUFFIXES, HubSource, TaskSpec

ALPHA_MARGIN = 0.05
"""For "not worse by the margin"; see judge.py."""
FLIP_RATE = 0.06
"""Share of answers that flip when a task is trained again, as long as none was observed: 4 to 8 % for a thousand examples, more
for fewer (measured on AG News)."""
GATE_SHARE, GATE_MOST = 0.4, 1000
"""Of the training rows, what is cut off for the gate where the spec names no file for it."""
Z_POWER = NormalDist().inv_cdf(0.8)


def examples_needed(flip_rate: float, margin: float, alpha: float = ALPHA_MARGIN) -> int:
    """Examples that prove an unchanged task not worse, with 80 % power: (z_alpha + z_power)^2 x flip rate / margin^2."""
    return math.ceil((_z(alpha) + Z_POWER) ** 2 * flip_rate / margin**2)


def provable_margin(num_examples: int, flip_rate: float = FLIP_RATE) -> float:
    """Smallest margin in whole points that so many examples can prove an unchanged task to keep, with 80 % power."""
    return math.ceil(100 * (_z(ALPHA_MARGIN) + Z_POWER) * math.sqrt(flip_rate / num_examples)) / 100


def detectable_drop(flip_rate: float, num_examples: int, alpha: float) -> float:
    """Smallest true drop of accuracy that is found with 80 % power, where `flip_rate` of the answers flip without any.

    A drop d adds d to the flips, so d solves d = (z_alpha + z_power) x sqrt((flip rate + d) / n).
    """
    half = (_z(alpha) + Z_POWER) ** 2 / num_examples / 2
    return min(half + math.sqrt(half**2 + 2 * half * flip_rate), 1.0)


def power_warning(spec: TaskSpec, observed: float | None) -> str:
    """Say that the gate split cannot support the margin; empty where it can, or where its size is not known yet.

    `observed` is the share of answers that flipped when the task was last trained again.
    """
    num_examples = num_gate_examples(spec)
    rate, margin = FLIP_RATE if observed is None else observed, spec.gate.margin
    needed = examples_needed(rate, margin)
    if num_examples is None or num_examples >= needed:
        return ""
    known = "assumed" if observed is None else "seen last time"
    return (
        f"{num_examples} gate examples cannot prove {100 * margin:g} points at a flip rate of {100 * rate:.1f} % ({known}); "
        f"{needed} can, or a gate.margin of {provable_margin(num_examples, rate):g}"
    )


def num_gate_examples(spec: TaskSpec) -> int | None:
    """Rows of the gate split, before duplicates are dropped; None where a hub or a broken file would have to be asked."""
    if spec.data.gate is not None:
        return _num_rows(spec.data.gate)
    num_rows = _num_rows(spec.data.train)
    return None if num_rows is None else round(min(GATE_SHARE * num_rows, GATE_MOST))


def _num_rows(source: str | HubSource) -> int | None:
    if isinstance(source, HubSource):
        return None
    file = Path(source)
    kind = LOCAL_SUFFIXES.get(file.suffix.lower())
    try:
        if kind == "csv":
            with file.open(encoding="utf-8-sig", newline="") as stream:
                rows = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
                return sum(bool(row) for row in rows) - 1
        if kind == "json":
            text = file.read_text(encoding="utf-8-sig")
            return len(json.loads(text)) if text.lstrip().startswith("[") else sum(map(bool, map(str.strip, text.split("\n"))))
    except (OSError, ValueError, csv.Error):
        pass  # whoever loads the data names what is wrong with it
    return None


def _z(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha)
