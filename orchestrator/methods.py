"""What `orchestrator compare` asks and finds: ways to solve one task, each with its answers and its costs. No torch.

One row is one method with one seed on the task's gate split. Rows of the same method differ in their seed only, and are
summarised together: mean accuracy, interval, spread over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from multilora.spec import TaskSpec
from orchestrator.dataset import TaskDataset
from orchestrator.paired import wilson

Part = Literal["baselines", "prompting", "variants", "alone", "curve", "merged"]
"""Without training; the base with other prompts; adapters trained together; methods that train alone; by number of examples."""

ENGINE, SWITCHED, MERGED = "unmerged in the engine", "switched by PEFT", "merged into the base"
"""Ways to run one adapter, each in both paces: a method of part "merged" is called `<way>, <pace>`."""
PACES = ("batched", "one by one")
AS_IN_FILE = "as in the task file"
"""Note of the variant that is the task's own adapter."""


@dataclass(frozen=True)
class MethodRow:
    """One method with one seed: its answer to every gate example, and what it cost."""

    part: Part
    method: str
    """For people, unique within its part: `4 examples, balanced`; a curve's name every size shares: `adapter`."""
    answers: tuple[str | None, ...] = ()
    """In gate order; None where what was generated is no label."""
    num_train: int = 0
    """Labelled examples that it learns from or shows."""
    seed: int = 0
    train_s: float = 0.0
    """Seconds of training; of adapters trained together each one's share."""
    ms_per_text: float = 0.0
    """Wall milliseconds to answer, over all gate examples in batches."""
    num_trained: int = 0
    """Parameters that training changes."""
    disk_bytes: int = 0
    """What must be kept beside the base."""
    note: str = ""
    """What a reader must know to read the row rightly."""
    skipped: str = ""
    """Why there is no answer; the row stays in the table."""

    @property
    def num_ill_formed(self) -> int:
        """Generated answers that are no label."""
        return sum(answer is None for answer in self.answers)

    def accuracy(self, gold: Sequence[str]) -> float:
        """Share of gate examples answered with their gold label; an ill-formed answer is wrong."""
        return sum(a == b for a, b in zip(self.answers, gold, strict=True)) / len(gold)


@dataclass(frozen=True)
class Bench:
    """What every part is given: the task, its examples and what is wanted. Plain values, so that it travels to a worker."""

    spec: TaskSpec
    dataset: TaskDataset
    folder: Path
    """Scratch folder of this comparison; a part writes below `folder / part`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (25, 50, 100, 200, 500)
    """Training examples of the learning curve; those beyond the train split are left out, and all of it is added."""
    max_slots: int = 16
    """Most adapters that train together."""

    @property
    def gold(self) -> tuple[str, ...]:
        """Gold labels in gate order."""
        return tuple(example.label for example in self.dataset.gate)

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's labels in the user's order."""
        return tuple(self.spec.labels or ())


@dataclass(frozen=True)
class Summary:
    """All seeds of one method."""

    part: Part
    method: str
    num_train: int
    num_seeds: int
    accuracy: float
    """Mean over seeds."""
    interval: tuple[float, float]
    """Wilson 95 % interval of the mean accuracy on this many gate examples: what another gate split could have shown."""
    spread: float
    """Standard deviation over seeds (n - 1); 0.0 with one seed."""
    lowest: float
    highest: float
    ill_formed: float
    """Share of generated answers that are no label."""
    train_s: float
    ms_per_text: float
    num_trained: int
    disk_bytes: int
    note: str
    skipped: str


def summarise(rows: Iterable[MethodRow], gold: Sequence[str]) -> list[Summary]:
    """Put the seeds of each method together, in the order in which methods first come; no method is left out."""
    together: dict[tuple[str, str, int], list[MethodRow]] = {}
    for row in rows:
        together.setdefault((row.part, row.method, row.num_train), []).append(row)
    return [_summary(group, gold) for group in together.values()]


def _summary(group: Sequence[MethodRow], gold: Sequence[str]) -> Summary:
    first = group[0]
    ran = [row for row in group if not row.skipped]
    values = [row.accuracy(gold) for row in ran]
    mean = statistics.fmean(values) if values else 0.0
    return Summary(
        part=first.part,
        method=first.method,
        num_train=first.num_train,
        num_seeds=len(ran),
        accuracy=mean,
        interval=wilson(round(mean * len(gold)), len(gold)) if values else (0.0, 1.0),
        spread=statistics.stdev(values) if len(values) > 1 else 0.0,
        lowest=min(values, default=0.0),
        highest=max(values, default=0.0),
        ill_formed=sum(row.num_ill_formed for row in ran) / (len(ran) * len(gold)) if ran else 0.0,
        train_s=statistics.fmean(row.train_s for row in ran) if ran else 0.0,
        ms_per_text=statistics.median(row.ms_per_text for row in ran) if ran else 0.0,
        num_trained=max((row.num_trained for row in ran), default=0),
        disk_bytes=max((row.disk_bytes for row in ran), default=0),
        note=next((row.note for row in group if row.note), ""),
        skipped=next((row.skipped for row in group if row.skipped), "") if not ran else "",
    )
