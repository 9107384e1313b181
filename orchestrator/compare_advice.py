"""What a person should do after a comparison, in words. Pure.

Nothing is called better unless zero is outside the interval of the paired difference, and where many methods are looked at,
outside one that is corrected for their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.compare_result import LEVEL, WITH_ADAPTERS, Difference, MethodComparison
from orchestrator.learning_curve import fit_learning_curve
from orchestrator.methods import ENGINE, MERGED, PACES, Part, Summary
from orchestrator.power import examples_needed
from orchestrator.report_words import duration, listed, share, signed_share, size

MAX_NEEDED = 100_000
"""Gate examples above which a number would only be funny."""


@dataclass(frozen=True)
class Advice:
    """What to do, and what it rests on."""

    tone: Literal["good", "warn", "calm"]
    """Train; not known yet; do without."""
    headline: str
    details: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join([self.headline, *self.details])


def advise(found: MethodComparison) -> Advice:
    """Say whether the adapter is worth its training, what it costs, what more labels would buy, and what else was tried."""
    own = found.own
    parts: tuple[Part, ...] = ("prompting", "baselines") if own else ("prompting", "baselines", "alone")
    rivals = [rival for part in parts if (rival := found.best(part))]
    rivals.sort(key=lambda rival: -rival.accuracy)
    missing, command = _missing(found), f"orchestrator compare {found.order.task}.yaml --parts"
    if own is None and not rivals:
        reasons = listed(list(dict.fromkeys(row.skipped for row in found.rows if row.skipped)) or ["no part gave a row"])
        return Advice("warn", f"Nothing could be compared: {reasons}.", missing)
    if own is None:
        known = f"The adapter was not tried: {name_of(rivals[0])} is right for {_accuracy(found, rivals[0])}."
        return Advice("warn", f"{known} What it would add: {command} curve.", (_costs(rivals), *missing))
    details = (_costs([own, *rivals]), *_outlook(found), *_others(found), *_merged(found), *missing)
    if not rivals:
        known = f"An adapter trained with {own.num_train} examples is right for {_accuracy(found, own)}."
        return Advice("warn", f"{known} Whether a prompt would do: {command} baselines,prompting.", details)
    return _verdict(found, own, rivals, details)


def name_of(summary: Summary) -> str:
    """A method as a sentence names it."""
    kind = {"prompting": "the best prompt", "baselines": "the best baseline", "alone": "the best of part alone"}.get(summary.part)
    return f"{kind} ({summary.method})" if kind else summary.method


def _verdict(found: MethodComparison, own: Summary, rivals: Sequence[Summary], details: tuple[str, ...]) -> Advice:
    """Hold the adapter against the best prompt and the best baseline, the more accurate one first."""
    (rival, gap), *others = [(rival, found.difference(own, rival)) for rival in rivals]
    same = f"on the same {len(found.order.gold)} gate examples"
    measured = f"{share(own.accuracy)} with {own.num_train} examples against {share(rival.accuracy)} for {name_of(rival)}."
    more = "".join(f"; against {share(other.accuracy)} for {name_of(other)} {_interval(its_gap)}" for other, its_gap in others)
    evidence = f"The difference is {_interval(gap)} {same}{more}."
    if len(found.ran(*(rival.part for rival in rivals))) > len(rivals):
        evidence += " What it is held against is the best of several on these very examples, which favours that."
    if gap.low > 0 and all(its_gap.low > 0 for _, its_gap in others):
        return Advice("good", f"Train an adapter: {measured}", (evidence, *details))
    if gap.high < 0:
        return Advice("calm", f"Do without an adapter: {measured}", (evidence, *details))
    needed = _needed(gap)
    enough = f" About {needed:,} gate examples would tell a difference of this size." if needed else ""
    evidence += f"{enough} Until then take what is cheaper."
    return Advice("warn", f"Too close to call: the adapter has {measured}", (evidence, *details))


def _costs(summaries: Sequence[Summary]) -> str:
    def cost(summary: Summary) -> str:
        training = f"{duration(summary.train_s)} of training" if summary.train_s else "no training"
        kept = f", {size(summary.disk_bytes)} beside the base" if summary.disk_bytes else ""
        name = "the adapter" if summary.part in WITH_ADAPTERS else name_of(summary)
        return f"{name} {training}, {duration(summary.ms_per_text / 1000)} a text{kept}"

    return f"Cost: {'; '.join(map(cost, summaries))}."


def _outlook(found: MethodComparison) -> tuple[str, ...]:
    """What the last doubling of the examples bought, and where the fitted curve goes."""
    own = found.own
    curve = sorted((one for one in found.ran("curve") if own and one.method == own.method), key=lambda one: one.num_train)
    if len(curve) < 2:
        return ()
    last = curve[-1]
    before = max(
        (one for one in curve[:-1] if one.num_train <= last.num_train / 2), key=lambda one: one.num_train, default=curve[-2]
    )
    gain = found.difference(last, before)
    rows = [row for one in curve for row in found.runs(one)]
    fitted = fit_learning_curve((row.num_train, row.seed, row.accuracy(found.order.gold)) for row in rows)
    outlook = (fitted.sentence,) if fitted.law else ()
    step = f"{before.num_train} to {last.num_train} examples changed {_interval(gain)}"
    if gain.low > 0:
        return (f"More labels still pay: {step}.", *outlook)
    flat = last
    for one in reversed(curve[:-1]):
        if found.difference(last, one).is_shown:
            break
        flat = one
    return (f"The curve shows no gain after {flat.num_train} examples: {step}.", *outlook)


def _others(found: MethodComparison) -> tuple[str, ...]:
    """The best other way to train, corrected for how many were looked at."""
    own = found.own
    others = [one for one in found.ran("variants", "alone") if one is not own]
    if own is None or not others:
        return ()
    best = max(others, key=lambda one: one.accuracy)
    count = f"{len(others)} other {'way' if len(others) == 1 else 'ways'} to train"
    if best.accuracy <= own.accuracy:
        return (f"None of {count} comes out above it; the best is {best.method} with {share(best.accuracy)}.",)
    gap = found.difference(best, own, 1 - (1 - LEVEL) / len(others))
    known = "is better still" if gap.is_shown else "is not shown better"
    how = f", corrected for {len(others)} comparisons" if len(others) > 1 else ""
    return (f"The best of {count}, {best.method}, {known}: {share(best.accuracy)} ({_interval(gap)}{how}).",)


def _merged(found: MethodComparison) -> tuple[str, ...]:
    """What merging the adapter into the base would change."""
    ran = {one.method: one for one in found.ran("merged")}
    both = [[ran.get(f"{way}, {pace}") for way in (MERGED, ENGINE)] for pace in PACES]
    ratios = [merged.ms_per_text / engine.ms_per_text for merged, engine in both if merged and engine and engine.ms_per_text]
    merged, engine = both[0]
    if not merged or not engine or len(ratios) < len(PACES):
        return ()
    paces = " and ".join(f"{ratio:.2f} times {pace}" for ratio, pace in zip(ratios, PACES, strict=True))
    return (
        f"Merged into the base it is right for {share(merged.accuracy)}, in the engine for {share(engine.accuracy)}; the merged "
        f"model takes {paces} of the engine's time, and {size(merged.disk_bytes)} a task instead of {size(engine.disk_bytes)}: "
        "merge what is served alone, keep adapters where several tasks share a base.",
    )


def _missing(found: MethodComparison) -> tuple[str, ...]:
    """What a reader must not take for compared."""
    failed = [f"{part} failed ({reason})" for part, reason in found.failed.items()]
    parts = [*failed, *(f"{part} was cut off" for part in found.cut_off)]
    return (f"Not complete: {'; '.join(parts)}; the same command goes on.",) if parts else ()


def _accuracy(found: MethodComparison, summary: Summary) -> str:
    low, high = summary.interval
    return f"{share(summary.accuracy)} (95 % interval {share(low)} to {share(high)}) of {len(found.order.gold)} gate examples"


def _interval(gap: Difference) -> str:
    return f"{signed_share(gap.value)}, 95 % interval {signed_share(gap.low)} to {signed_share(gap.high)}"


def _needed(gap: Difference) -> int | None:
    """Gate examples that would tell this difference from zero with 80 % power; None where no sensible number would."""
    if not gap.value:
        return None
    needed = examples_needed(gap.flip_rate, abs(gap.value), alpha=(1 - LEVEL) / 2)
    unit = 10 ** max(int(math.log10(needed)) - 1, 0)  # two digits are all that it is known to
    return None if needed > MAX_NEEDED else math.ceil(needed / unit) * unit
