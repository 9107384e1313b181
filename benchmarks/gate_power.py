"""How often does the gate block a harmless release, and how often a harmful one?

Releases are simulated: of a task's n gate answers a share psi flips when nothing changed, half of the flips losses; a true drop
of d adds d to the losses. Each release is decided by the code that decides real ones (judge.decide on compare_counts, which
judge.judge is made of); only the comparison of a pair of counts is kept, for the same pair occurs often. NOTES is the same table
from the project's notes, simulated independently with 20,000 releases a cell.

Correct is: no cell differs from the notes by more than the rounding of the printed number and 4.5 standard errors of both
simulations (of 256 comparisons, one in 600 such tables does by chance), and no cell blocks more of the harmless
releases than 5 % and three standard errors.
Beside it the rule that most tools have, "fail where accuracy fell by 2 points or more": its false alarms on the same releases.

    python benchmarks/gate_power.py [--quick] [--json FILE] [--rounds N]     a round is 1,000 releases a cell
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

from benchmarks.timing import Report, Row, read_settings
from multilora.spec import GateSpec
from orchestrator.comparison import Comparison, compare_counts
from orchestrator.judge import ALPHA_HARD, ALPHA_MARGIN, ALPHA_POOLED, ALPHA_TASKS, Outcome, VerdictKind, decide

GATE = GateSpec()
COLUMNS = ("false block", "1x-2", "1x-3", "1x-5", "1x-10", "all -1", "CLEAR", "not worse")
"""Percent of releases that are blocked: nothing changed, one task lost 2, 3, 5, 10 points, all lost 1; then, when nothing
changed, percent of releases that are CLEAR and of tasks that are NON_INFERIOR."""
DROPS = {"1x-2": 0.02, "1x-3": 0.03, "1x-5": 0.05, "1x-10": 0.10}
NAIVE_DROP = 0.02
NUM_NOTES = 20_000
MAX_ERRORS = 4.5
NOTES = {
    (0.04, 100, 1): (1.0, 9, 16, 37, 82, 3, 24, 24),
    (0.04, 100, 5): (2.1, 6, 10, 24, 66, 14, 0, 24),
    (0.04, 100, 10): (2.0, 5, 8, 16, 54, 26, 0, 24),
    (0.04, 100, 20): (2.3, 4, 5, 11, 44, 48, 0, 24),
    (0.04, 200, 1): (2.0, 22, 38, 69, 99, 9, 37, 37),
    (0.04, 200, 5): (3.4, 13, 23, 51, 95, 30, 1, 36),
    (0.04, 200, 10): (3.1, 9, 16, 40, 92, 50, 0, 37),
    (0.04, 200, 20): (2.9, 7, 12, 32, 88, 79, 0, 37),
    (0.04, 500, 1): (2.6, 47, 76, 98, 100, 17, 69, 69),
    (0.04, 500, 5): (4.2, 31, 57, 93, 100, 61, 15, 69),
    (0.04, 500, 10): (4.0, 24, 48, 88, 100, 88, 2, 69),
    (0.04, 500, 20): (4.5, 18, 39, 83, 100, 99, 0, 69),
    (0.04, 1000, 1): (3.2, 77, 96, 100, 100, 32, 92, 92),
    (0.04, 1000, 5): (4.4, 59, 89, 100, 100, 89, 66, 92),
    (0.04, 1000, 10): (4.7, 49, 84, 100, 100, 99, 44, 92),
    (0.04, 1000, 20): (4.6, 40, 77, 100, 100, 100, 19, 92),
    (0.08, 100, 1): (2.1, 9, 14, 30, 70, 4, 16, 16),
    (0.08, 100, 5): (3.3, 7, 10, 18, 51, 13, 0, 16),
    (0.08, 100, 10): (3.1, 5, 7, 12, 40, 18, 0, 16),
    (0.08, 100, 20): (3.0, 4, 5, 9, 32, 30, 0, 16),
    (0.08, 200, 1): (2.7, 15, 26, 52, 95, 8, 24, 24),
    (0.08, 200, 5): (3.8, 10, 16, 35, 85, 20, 0, 24),
    (0.08, 200, 10): (3.6, 8, 12, 28, 79, 32, 0, 24),
    (0.08, 200, 20): (4.1, 6, 10, 21, 71, 55, 0, 24),
    (0.08, 500, 1): (2.9, 32, 55, 90, 100, 12, 46, 46),
    (0.08, 500, 5): (4.4, 20, 38, 78, 100, 39, 2, 46),
    (0.08, 500, 10): (4.5, 15, 29, 69, 100, 65, 0, 46),
    (0.08, 500, 20): (4.3, 12, 23, 60, 100, 90, 0, 46),
    (0.08, 1000, 1): (2.8, 55, 84, 100, 100, 20, 71, 71),
    (0.08, 1000, 5): (4.2, 36, 68, 98, 100, 65, 18, 71),
    (0.08, 1000, 10): (4.4, 29, 60, 96, 100, 91, 3, 71),
    (0.08, 1000, 20): (4.8, 23, 51, 94, 100, 100, 0, 71),
}
"""(flip rate, gate examples, changed tasks) -> percent by column, as printed there."""
QUICK = [(0.04, 200, 1), (0.04, 200, 10)]


@dataclass(frozen=True)
class Cell:
    """What was simulated for one line of the table."""

    flip_rate: float
    num_examples: int
    num_tasks: int
    num_releases: int
    percent: tuple[float, ...]
    """By column."""
    naive: float
    """Percent of harmless releases in which some task's accuracy fell by 2 points or more."""


@cache
def comparison(num_losses: int, num_wins: int, num_examples: int) -> Comparison:
    """Compare two systems of which the better one gets everything right; the decision does not depend on how good they are."""
    return compare_counts(GATE, num_examples, num_losses, num_wins, num_examples - num_losses - num_wins)


def simulate(flip_rate: float, num_examples: int, num_tasks: int, num_releases: int) -> Cell:
    """Simulate one line of the table."""
    rng = np.random.default_rng(zlib.crc32(f"{flip_rate} {num_examples} {num_tasks}".encode()))
    names = [f"task-{index}" for index in range(num_tasks)]

    def draw(drops: Sequence[float]) -> np.ndarray:
        """Losses and wins: releases x tasks x 2."""
        chances = [(flip_rate / 2 + drop, flip_rate / 2, 1 - flip_rate - drop) for drop in drops]
        return np.stack([rng.multinomial(num_examples, chance, size=num_releases)[:, :2] for chance in chances], axis=1)

    def shares(drops: Sequence[float]) -> tuple[float, float, float, float]:
        """Percent of releases blocked and cleared, of tasks not worse, and of releases that the naive rule fails."""
        drawn, num_blocked, num_clear, num_good = draw(drops), 0, 0, 0
        for release in drawn.tolist():
            found = decide({task: comparison(*pair, num_examples) for task, pair in zip(names, release, strict=True)}, {})
            num_blocked += found.outcome is Outcome.BLOCK
            num_clear += found.outcome is Outcome.CLEAR
            num_good += sum(verdict.kind is VerdictKind.NON_INFERIOR for verdict in found.verdicts.values())
        # Counts, for a drop of 4 in 200 is 2 points and rounding must not hide it.
        naive = ((drawn[..., 0] - drawn[..., 1]) >= math.ceil(NAIVE_DROP * num_examples - 1e-9)).any(axis=1).mean()
        return (
            100 * num_blocked / num_releases,
            100 * num_clear / num_releases,
            100 * num_good / drawn.shape[1] / num_releases,
            100 * float(naive),
        )

    harmless, clear, not_worse, naive = shares([0.0] * num_tasks)
    blocked = [shares([drop, *[0.0] * (num_tasks - 1)])[0] for drop in DROPS.values()]
    everywhere = shares([0.01] * num_tasks)[0]
    return Cell(flip_rate, num_examples, num_tasks, num_releases, (harmless, *blocked, everywhere, clear, not_worse), naive)


def errors_apart(cell: Cell) -> tuple[float, ...]:
    """By column: difference from the notes beyond their rounding, in standard errors of both simulations."""
    found = []
    for column, ours, theirs in zip(COLUMNS, cell.percent, NOTES[cell.flip_rate, cell.num_examples, cell.num_tasks], strict=True):
        # Shares of tasks rest on as many draws as there are tasks.
        per_release = cell.num_tasks if column == "not worse" else 1
        num_ours, num_theirs = cell.num_releases * per_release, NUM_NOTES * per_release
        share = (ours * num_ours + theirs * num_theirs) / (num_ours + num_theirs) / 100
        share = min(max(share, 1 / NUM_NOTES), 1 - 1 / NUM_NOTES)
        rounding = 0.05 if column == "false block" else 0.5
        error = 100 * math.sqrt(share * (1 - share) * (1 / num_ours + 1 / num_theirs))
        found.append(max(abs(ours - theirs) - rounding, 0.0) / error)
    return tuple(found)


def main() -> int:
    """Simulate all cells, compare them with the notes, and report."""
    settings = read_settings(__doc__ or "", quick_rounds=1, full_rounds=20, has_cuda=False)
    config = {
        "alpha_tasks": ALPHA_TASKS, "alpha_pooled": ALPHA_POOLED, "alpha_margin": ALPHA_MARGIN, "alpha_hard": ALPHA_HARD,
        "margin": GATE.margin, "hard_drop": GATE.hard_drop, "num_releases": 1000 * settings.num_rounds, "columns": COLUMNS,
    }  # fmt: skip
    report = Report("gate_power", settings, config)
    keys = QUICK if settings.is_quick else list(NOTES)
    with ProcessPoolExecutor() as pool:
        cells = list(pool.map(simulate, *zip(*keys, strict=True), [1000 * settings.num_rounds] * len(keys)))
    apart = [errors_apart(cell) for cell in cells]
    limit = 5 + 3 * 100 * math.sqrt(0.05 * 0.95 / (1000 * settings.num_rounds))
    for cell, errors in zip(cells, apart, strict=True):
        theirs = NOTES[cell.flip_rate, cell.num_examples, cell.num_tasks]
        pairs = [f"{ours:.{digits}f} ({notes})" for ours, notes, digits in zip(cell.percent, theirs, (1, *[0] * 7), strict=True)]
        group = f"psi {cell.flip_rate:.0%}, n {cell.num_examples}, N {cell.num_tasks}"
        report.add(Row(group, "errors from notes", difference=max(errors), tolerance=MAX_ERRORS, note="  ".join(pairs)))
        report.add(Row(group, "false block, %", difference=cell.percent[0], tolerance=limit, note=f"naive rule {cell.naive:.1f}"))
    points = [
        abs(ours - theirs)
        for cell in cells
        for ours, theirs in zip(cell.percent, NOTES[cell.flip_rate, cell.num_examples, cell.num_tasks], strict=True)
    ]
    report.ratios = {
        "max_false_block_percent": max(cell.percent[0] for cell in cells),
        "max_points_from_notes": max(points),
        "max_errors_from_notes": max(map(max, apart)),
        "max_naive_false_alarm_percent": max(cell.naive for cell in cells),
    }
    report.extra["cells"] = [
        {
            "flip_rate": cell.flip_rate, "num_examples": cell.num_examples, "num_tasks": cell.num_tasks,
            "ours": dict(zip(COLUMNS, (round(value, 2) for value in cell.percent), strict=True)),
            "notes": dict(zip(COLUMNS, NOTES[cell.flip_rate, cell.num_examples, cell.num_tasks], strict=True)),
            "errors_apart": dict(zip(COLUMNS, (round(value, 2) for value in errors), strict=True)),
            "naive_false_alarm": round(cell.naive, 2),
        }
        for cell, errors in zip(cells, apart, strict=True)
    ]  # fmt: skip
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
