"""What judge.py measured, as a Markdown table with a row per task, and whether each base reaches the bars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

LORA_SIZE, LORA_BAR = 200, 3.0
ZERO_SHOT_BAR = 5.0
BEATING_SIZE = 1000
"""What makes a base worth having: points over TF-IDF at a size, untrained points over the commonest label, and at a larger
size better than TF-IDF on most tasks."""

Results = dict[str, Any]
"""One task's numbers."""
Column = dict[str, list[float | None]]
"""Task -> accuracy of each seed, or None where training failed."""


def one_line(name: str, result: Results) -> str:
    """A task's numbers as a line."""
    zero_shot = f"zero-shot {_shown([result['zero_shot']])}, calibrated {_shown([result['zero_shot_calibrated']])}"
    parts = [f"majority {_shown([result['majority']])}", zero_shot]
    parts += [
        f"{size}: TF-IDF {_shown(result['tf_idf'].get(size, []))}, LoRA {_shown(seeds)}" for size, seeds in result["lora"].items()
    ]
    return f"{name}: {'; '.join(parts)}; {result['seconds']} s" + "".join(f"; {why}" for why in result["failures"].values())


def table(files: Sequence[Path]) -> str:
    """Files of results as a Markdown table, and below it whether each base passes the bars."""
    bases = read_results(files)
    tasks = sorted(set[str]().union(*bases.values()))
    found_of = {name: [results[name] for results in bases.values() if name in results] for name in tasks}
    sizes = sorted({size for every in found_of.values() for found in every for size in found["lora"]}, key=int)
    columns: dict[str, Column] = {"majority": {name: [found_of[name][0]["majority"]] for name in tasks}}
    for title, key in (("zero-shot", "zero_shot"), ("calibrated", "zero_shot_calibrated")):
        columns |= {f"{base} {title}": {name: [found[key]] for name, found in bases[base].items()} for base in bases}
    for size in sizes:
        known = {name: [found["tf_idf"][size] for found in found_of[name] if size in found["tf_idf"]] for name in tasks}
        columns[f"TF-IDF@{size}"] = {name: seeds[0] for name, seeds in known.items() if seeds}
    for base, results in bases.items():
        for size in sizes:
            columns[f"{base} LoRA@{size}"] = {name: found["lora"].get(size, []) for name, found in results.items()}
    lines = ["| task | " + " | ".join(columns) + " |", "|---" + "|--:" * len(columns) + "|"]
    for name in tasks:
        cells = [_shown(column.get(name, []), with_sd="LoRA" in title) for title, column in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shared = [name for name in tasks if all(_values(column.get(name, [])) for column in columns.values())]
    means = [_shown([mean(_values(column[name])) for name in shared] if shared else []) for column in columns.values()]
    lines += [f"| mean of {len(shared)} | {' | '.join(means)} |", "", *(line for base in bases for line in bars(base, columns))]
    failures = [
        (base, *lost) for base, results in bases.items() for found in results.values() for lost in found["failures"].items()
    ]
    return "\n".join([*lines, *(f"- {base}: {key} was not trained: {why}" for base, key, why in failures)])


def read_results(files: Sequence[Path]) -> dict[str, dict[str, Results]]:
    """Results by base and task. Files of one name must have one setting, all files the same rows and seeds."""
    bases: dict[str, dict[str, Results]] = {}
    settings: dict[str, Results] = {}
    for file in files:
        whole = json.loads(file.read_text(encoding="utf-8"))
        facts, name = whole["settings"], whole["settings"]["name"]
        if settings.setdefault(name, facts) != facts:
            raise SystemExit(f"{file} and another file of {name} have other settings; measure one of them with another --name")
        if any(facts[key] != known[key] for known in settings.values() for key in ("num_rows", "num_seeds")):
            raise SystemExit(f"{file} has other test rows or seeds than the files before it; measure all with the same")
        bases.setdefault(name, {}).update(whole["tasks"])
    return bases


def bars(base: str, columns: Mapping[str, Column]) -> list[str]:
    """What a base must reach, and what it does reach on the tasks that have both numbers."""

    def gains(ours: str, theirs: str) -> list[float]:
        mine, known = (
            {name: mean(_values(seeds)) for name, seeds in columns.get(title, {}).items() if _values(seeds)}
            for title in (ours, theirs)
        )
        return [100 * (mine[name] - known[name]) for name in mine.keys() & known.keys()]

    def line(what: str, bar: str, reached: list[float], is_passed: bool, shown: str) -> str:
        verdict = f"{shown} over {len(reached)} tasks, {'passed' if is_passed else 'missed'}" if reached else "not measured"
        return f"- {base}: {what} (bar: {bar}): {verdict}"

    at_size = gains(f"{base} LoRA@{LORA_SIZE}", f"TF-IDF@{LORA_SIZE}")
    untrained, calibrated = (gains(f"{base} {title}", "majority") for title in ("zero-shot", "calibrated"))
    later = gains(f"{base} LoRA@{BEATING_SIZE}", f"TF-IDF@{BEATING_SIZE}")
    better = sum(gain > 0 for gain in later)

    def by_mean(what: str, bar: float, found: list[float]) -> str:
        points = mean(found) if found else 0.0
        return line(what, f"+{bar:.0f} points", found, points >= bar, f"{points:+.1f}")

    return [
        by_mean(f"LoRA less TF-IDF at {LORA_SIZE}", LORA_BAR, at_size),
        by_mean("zero-shot less majority", ZERO_SHOT_BAR, untrained),
        by_mean("zero-shot, calibrated, less majority", ZERO_SHOT_BAR, calibrated),
        line(f"LoRA better than TF-IDF at {BEATING_SIZE}", "most tasks", later, 2 * better > len(later), f"{better} better"),
    ]


def _values(seeds: Sequence[float | None]) -> list[float]:
    return [value for value in seeds if value is not None]


def _shown(seeds: Sequence[float | None], *, with_sd: bool = False) -> str:
    """Mean in per cent, over the seeds that there are."""
    values = [100 * value for value in _values(seeds)]
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if with_sd and len(values) > 1 else "")
