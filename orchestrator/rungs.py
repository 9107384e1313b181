"""The attribution ladder's numbers: the same examples answered by one system after another, and who owns each difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.metrics import is_right

if TYPE_CHECKING:
    from orchestrator.dataset import Example

OWNERS = {
    "zero-shot base": "base",
    "offline": "training",
    "offline as served": "dtype",
    "engine alone": "engine",
    "mixed batch": "batching",
    "endpoint": "endpoint",
    "router": "router",
}
"""Rungs from the bottom up, and who owns what changes from the rung below."""


@dataclass(frozen=True)
class Reply:
    """One system's answer to one example."""

    answer: str
    probabilities: tuple[float, ...] = ()
    """In label order; none of a free text."""


@dataclass(frozen=True)
class RungAnswers:
    """What the system of one rung answered, or why it did not."""

    name: str
    """One of OWNERS."""
    how: str
    """The system, for people."""
    replies: tuple[Reply, ...] = ()
    skipped: str = ""
    """Why there are no replies."""
    is_fault: bool = False
    """Whether the system is there and does not answer with this adapter."""


@dataclass(frozen=True)
class Rung:
    """One rung's numbers; those against the rung below are None where nothing below was measured."""

    name: str
    how: str
    owner: str
    """Who owns the difference to the measured rung below."""
    skipped: str = ""
    is_fault: bool = False
    num_right: int | None = None
    accuracy: float | None = None
    """num_right over the ladder's num_examples."""
    num_lost: int | None = None
    """Examples that the rung below has right and this one wrong."""
    num_won: int | None = None
    """The other way round."""
    num_changed: int | None = None
    """Examples with another answer than on the rung below, also where both are wrong."""
    max_difference: float | None = None
    """Largest difference of one label's probability from the rung below; None for a free text."""

    @property
    def is_measured(self) -> bool:
        """Whether the system answered."""
        return self.num_right is not None


@dataclass(frozen=True)
class Ladder:
    """One champion's gate examples from the base to what a user gets."""

    task: str
    system: str
    """`task@version`."""
    base: str
    num_examples: int
    num_gate: int
    """Examples of the whole gate split."""
    rungs: tuple[Rung, ...]
    created: str
    """ISO time."""

    @property
    def conclusion(self) -> str:
        """Where the points come from and where they go, in plain words."""
        measured = [rung for rung in self.rungs if rung.is_measured]
        steps = [rung for rung in measured if rung.num_changed is not None]
        faults = [f"{rung.name} gives no answer: {rung.skipped}" for rung in self.rungs if rung.is_fault]
        training = [rung for rung in steps if rung.owner == "training"]
        serving = [rung for rung in steps if rung.owner != "training"]
        parts = [self._gain(rung) for rung in training]
        if serving:
            first, last = measured[measured.index(serving[0]) - 1], serving[-1]
            parts.append(self._serving(serving, f"from {first.name} to {last.name}"))
        return "; ".join([*parts, *faults]) + "."

    def _gain(self, rung: Rung) -> str:
        below = self._below(rung)
        change = self._points((rung.num_right or 0) - (below.num_right or 0))
        right = f"{below.num_right} -> {rung.num_right} of {self.num_examples} right"
        return f"training changes {change} against the zero-shot base ({right})"

    def _serving(self, steps: Sequence[Rung], path: str) -> str:
        moved = [rung for rung in steps if rung.num_changed]
        if not moved:
            return f"serving loses nothing: 0 flips on {self.num_examples} examples {path}"
        change = self._points(sum((rung.num_won or 0) - (rung.num_lost or 0) for rung in moved))
        owners = ", ".join(f"{rung.owner} ({_flips(rung)})" for rung in moved)
        return f"serving changes {change} on {self.num_examples} examples {path}, by {owners}"

    def _below(self, rung: Rung) -> Rung:
        measured = [other for other in self.rungs if other.is_measured]
        return measured[measured.index(rung) - 1]

    def _points(self, num_examples: int) -> str:
        points = 100 * num_examples / self.num_examples
        return f"{points:+.1f} points" if num_examples else "0 points"


def build_rungs(found: Sequence[RungAnswers], gate: Sequence[Example]) -> tuple[Rung, ...]:
    """Hold each rung's replies against those of the measured rung below it."""
    rungs, below, is_base = list[Rung](), tuple[Reply, ...](), True
    for one in found:
        # The first rung with the adapter owns what training did, whichever rung that is.
        owner = "training" if is_base and below else OWNERS[one.name]
        if one.skipped:
            rungs.append(Rung(one.name, one.how, OWNERS[one.name], one.skipped, one.is_fault))
            continue
        is_right_now = _right(one.replies, gate)
        rung = Rung(one.name, one.how, owner, num_right=sum(is_right_now), accuracy=sum(is_right_now) / len(gate))
        rungs.append(_against(rung, one.replies, below, gate) if below else rung)
        is_base = is_base and not below
        below = one.replies
    return tuple(rungs)


def _against(rung: Rung, replies: Sequence[Reply], below: Sequence[Reply], gate: Sequence[Example]) -> Rung:
    pairs = list(zip(_right(below, gate), _right(replies, gate), strict=True))
    differences = [
        abs(p - q)
        for one, other in zip(replies, below, strict=True)
        for p, q in zip(one.probabilities, other.probabilities, strict=True)
    ]
    return replace(
        rung,
        num_lost=sum(before and not now for before, now in pairs),
        num_won=sum(now and not before for before, now in pairs),
        num_changed=sum(one.answer != other.answer for one, other in zip(replies, below, strict=True)),
        max_difference=max(differences, default=None),
    )


def _right(replies: Sequence[Reply], gate: Sequence[Example]) -> list[bool]:
    return [is_right(example.label, reply.answer) for example, reply in zip(gate, replies, strict=True)]


def _flips(rung: Rung) -> str:
    others = (rung.num_changed or 0) - (rung.num_lost or 0) - (rung.num_won or 0)
    moved = f"; {others} from one wrong answer to another" if others else ""
    return f"{rung.num_lost} lost, {rung.num_won} won{moved}"
