"""Hyper-parameter search over one task: which settings are tried, which end early, which one wins. Pure; no torch.

Everything is decided on the select split; the gate split is no input of anything here. Candidates end early by synchronous
successive halving (arXiv 1502.07943): at each rung the better part goes on. A rung lies at the same share of every candidate's
own epochs, because there they are at the same place of their learning rate schedules.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from multilora.spec import SearchSpec, TaskSpec
from orchestrator.files import write_whole

NOTHING = (-math.inf, -math.inf)
MAX_RANK = 256


class Fate(StrEnum):
    """What a candidate does next."""

    TRAIN = "TRAIN"
    WAIT = "WAIT"
    """For the others to reach the rung that it reached."""
    DROPPED = "DROPPED"
    """Enough others did better at a rung."""
    OVER = "OVER"
    """Trained to its end, or failed."""


@dataclass(frozen=True)
class Result:
    """A candidate on the select split after one of its epochs."""

    epoch: int
    value: float | None
    """The gate's metric; None for a free-text task, which its loss alone decides."""
    loss: float
    unix_ms: int

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better; the loss breaks the many ties of a small select split."""
        return (-self.loss if self.value is None else self.value, -self.loss)

    @property
    def shown(self) -> float:
        """The number that a person looks at."""
        return self.loss if self.value is None else self.value


@dataclass(frozen=True)
class Trail:
    """How far a candidate came."""

    epochs: int
    """All that it may take."""
    results: tuple[Result, ...] = ()
    end: Literal["", "finished", "failed"] = ""
    reason: str = ""
    """Why it failed."""

    def has_reached(self, epoch: int) -> bool:
        """Whether it has a result after this epoch, or has ended well before it."""
        return self.end == "finished" or any(result.epoch >= epoch for result in self.results)

    def best(self, epoch: int | None = None) -> tuple[float, float]:
        """Rank of its best result up to an epoch, to be compared; NOTHING where there is none."""
        return max((result.rank for result in self.results if epoch is None or result.epoch <= epoch), default=NOTHING)

    @property
    def best_result(self) -> Result | None:
        """Of the epoch whose adapter is kept."""
        return max(self.results, key=lambda result: result.rank, default=None)

    @property
    def metrics(self) -> dict[str, float]:
        """Its best result as the trainer tells it of a finished adapter."""
        best = self.best_result
        return {"select/best": best.shown, "train/best_epoch": float(best.epoch)} if best else {}


TRAILS = TypeAdapter(dict[str, Trail])
"""Run key of a candidate -> its trail; the spec's own setting comes first."""


def candidates(spec: TaskSpec) -> tuple[TaskSpec, ...]:
    """List a spec for each setting that its search tries, the spec's own first; none without a search."""
    if spec.search is None:
        return ()
    own = (spec.train.learning_rate, spec.lora.rank, spec.train.epochs)
    others = [setting for setting in product(*_values(spec, spec.search)) if setting != own]
    if len(others) >= spec.search.num_candidates:
        chosen = random.Random(spec.train.seed).sample(range(len(others)), spec.search.num_candidates - 1)
        others = [others[i] for i in sorted(chosen)]
    return tuple(
        spec.model_copy(
            update={
                "search": None,
                "lora": spec.lora.model_copy(update={"rank": rank}),
                "train": spec.train.model_copy(update={"learning_rate": rate, "epochs": epochs}),
            }
        )
        for rate, rank, epochs in (own, *others)
    )


def setting_of(spec: TaskSpec) -> dict[str, float]:
    """The values that a search may change."""
    return {"learning_rate": spec.train.learning_rate, "rank": spec.lora.rank, "epochs": spec.train.epochs}


def searched(spec: TaskSpec) -> TaskSpec:
    """The spec with the search that it asks for, or else the default one."""
    return spec if spec.search else spec.model_copy(update={"search": SearchSpec()})


def fates(trails: Sequence[Trail], eta: int) -> list[Fate]:
    """Decide what each candidate does next; the first is the spec's own setting, which is trained to its end.

    What was decided at a rung stays decided, whatever comes later. The best so far always goes on, and as long as any candidate
    is neither over nor dropped, one of them trains.
    """
    found = [Fate.OVER if trail.end else Fate.TRAIN for trail in trails]
    alive = list(range(len(trails)))
    for rung in _rungs([trail.epochs for trail in trails], eta):
        epoch_of = {i: rung.epoch(trails[i].epochs) for i in alive}
        # One that fails counts at the rungs that it reached before.
        alive = [i for i in alive if trails[i].end != "failed" or trails[i].has_reached(epoch_of[i])]
        there = [i for i in alive if trails[i].has_reached(epoch_of[i])]
        if len(there) < len(alive):
            return [Fate.WAIT if i in there and fate is Fate.TRAIN else fate for i, fate in enumerate(found)]
        ranked = sorted(alive, key=lambda i: trails[i].best(epoch_of[i]), reverse=True)
        kept = {0, *ranked[: rung.num_kept]}
        for i in alive:
            if i not in kept and found[i] is Fate.TRAIN:
                found[i] = Fate.DROPPED
        alive = [i for i in alive if i in kept]
    return found


def winner(trails: Sequence[Trail]) -> int | None:
    """The best of those that were trained to their end, ties broken by loss and then by order; None where all failed.

    The spec's own setting, which comes first, yields only to a better value: a lower loss alone is no reason to leave it.
    """
    finished = [i for i, trail in enumerate(trails) if trail.end == "finished"]
    best = max(finished, key=lambda i: trails[i].best(), default=None)
    is_tie = best is not None and 0 in finished and trails[0].best()[0] == trails[best].best()[0]
    return 0 if is_tie else best


def planned_epochs(epochs: Sequence[int], eta: int) -> int:
    """Most epochs that halving leaves of all candidates' together: the spec's own, which comes first, and the longest go on."""
    ordered = [epochs[0], *sorted(epochs[1:], reverse=True)]
    rungs = _rungs(epochs, eta)
    return sum(
        next((rung.epoch(own) for rung in rungs if place > rung.num_kept), own)  # besides the spec's own, num_kept others
        for place, own in enumerate(ordered)
    )


@dataclass(frozen=True)
class Found:
    """What a search found, for people and scripts."""

    num_candidates: int
    num_dropped: int
    """Ended early."""
    num_failed: int
    chosen: Mapping[str, float]
    """learning_rate, rank and epochs."""
    is_own: bool
    """Whether the spec's own setting is the best."""
    metric: str
    """What `select` and `own_select` are: the gate's metric, or `loss` for a free-text task."""
    select: float
    own_select: float | None
    """The spec's own setting on the select split; None where it failed."""
    num_select: int

    @property
    def sentence(self) -> str:
        """What a person should know of it, with the reason not to trust the number."""
        ended = [f"{count} {how}" for count, how in ((self.num_dropped, "ended early"), (self.num_failed, "failed")) if count]
        setting = ", ".join(f"{name} {value:g}" for name, value in self.chosen.items())
        parts = f" ({', '.join(ended)})" if ended else ""
        own = "; the spec's own setting failed" if self.own_select is None else f"; spec's own {self.own_select:.3f}"
        if self.is_own:
            own = ", the spec's own setting"
        return (
            f"search: {self.num_candidates} candidates{parts}, chosen {setting} on select {self.metric} {self.select:.3f}{own}. "
            f"The best of several on {self.num_select} select examples is an optimistic number; the gate judges."
        )


FOUND = TypeAdapter(Found)


def found_of(specs: Sequence[TaskSpec], trails: Sequence[Trail], num_select: int) -> Found | None:
    """Sum a search up; None where no candidate was trained to its end."""
    chosen = winner(trails)
    best = None if chosen is None else trails[chosen].best_result
    if chosen is None or best is None:
        return None
    own = trails[0].best_result if trails[0].end == "finished" else None
    return Found(
        num_candidates=len(trails),
        num_dropped=sum(not trail.end for trail in trails),
        num_failed=sum(trail.end == "failed" for trail in trails),
        chosen=setting_of(specs[chosen]),
        is_own=chosen == 0,
        metric="loss" if best.value is None else specs[0].gate.metric,
        select=best.shown,
        own_select=own.shown if own else None,
        num_select=num_select,
    )


def load_trails(file: Path, epochs: Mapping[str, int]) -> dict[str, Trail]:
    """Read what is known of candidates, given all of them with their epochs; `file` need not exist."""
    known = TRAILS.validate_json(file.read_bytes()) if file.is_file() else {}
    return {key: known.get(key, Trail(count)) for key, count in epochs.items()}


def store_trails(file: Path, trails: Mapping[str, Trail]) -> None:
    """Keep what is known of candidates."""
    write_whole(file, TRAILS.dump_json(dict(trails)))


def _values(spec: TaskSpec, search: SearchSpec) -> list[list[float]]:
    """Learning rates, ranks and epochs to combine, each list in the user's order without repetitions."""
    own = setting_of(spec)
    listed: dict[str, list[float]] = {name: list(dict.fromkeys(getattr(search, name))) for name in own}
    if not any(listed.values()):
        rate, rank = spec.train.learning_rate, spec.lora.rank
        rates = [float(f"{min(1.0, rate * factor):.3g}") for factor in (1 / 3, 3)]
        listed = {"learning_rate": [rates[0], rate, rates[1]], "rank": [max(1, rank // 2), rank, min(MAX_RANK, 2 * rank)]}
    return [list(dict.fromkeys(listed.get(name) or [value])) for name, value in own.items()]


@dataclass(frozen=True)
class _Rung:
    """Where candidates are compared."""

    divisor: int
    num_kept: int

    def epoch(self, epochs: int) -> int:
        """The epoch after which a candidate of so many is compared."""
        return -(-epochs // self.divisor)


def _rungs(epochs: Sequence[int], eta: int) -> list[_Rung]:
    """The rungs of candidates with so many epochs, lowest first: as many as both can be divided by `eta`."""
    divisors: list[int] = []
    while eta > 1 and eta ** (len(divisors) + 1) <= min(len(epochs), max(epochs)):
        divisors.append(eta ** (len(divisors) + 1))
    return [_Rung(divisor, -(-len(epochs) // kept)) for divisor, kept in zip(reversed(divisors), divisors, strict=True)]
