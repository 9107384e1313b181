"""Hold what the field says of prompts and fine-tuning against stored comparisons, and write docs/evidence.md.

orchestrator compare TASK.yaml --sizes 25,100,200     # for every task
python benchmarks/claims.py WORKSPACE... > docs/evidence.md
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

from scipy.stats import f as f_distribution
from scipy.stats import wilcoxon

from orchestrator.compare_page import command_of, markdown
from orchestrator.compare_result import Difference, MethodComparison
from orchestrator.compare_store import CompareStore
from orchestrator.methods import Part, Summary
from orchestrator.report_words import share, signed_share

FEW, MANY = 100, 200
"""Examples of which the first claim speaks."""
VANILLA, INSTRUCTION, HEAD = (
    "vanilla fine-tuning with a head",
    "instruction fine-tuning of all parameters",
    "LoRA with a head (PEFT)",
)
LEVEL = 0.05
CLAIMED: frozenset[Part] = frozenset(("prompting", "alone", "curve"))
"""Parts that a comparison must have finished to count for the claims."""
Find = Callable[[MethodComparison], Summary | None]


@dataclass(frozen=True)
class Verdict:
    """One claim, what was found, and the table that shows it."""

    claim: str
    finding: str
    table: tuple[tuple[str, ...], ...]
    """Headings first."""


def adapter_at(size: int) -> Find:
    """The learning curve's adapter with the most examples up to `size`."""

    def find(found: MethodComparison) -> Summary | None:
        sizes = [one for one in found.ran("curve") if one.method == "adapter" and one.num_train <= size]
        return max(sizes, key=lambda one: one.num_train, default=None)

    return find


def named(part: str, method: str) -> Find:
    """A method by its name."""
    return lambda found: next(
        (one for one in found.summaries if (one.part, one.method) == (part, method) and one.num_seeds), None
    )


def beats_prompting(all_found: Sequence[MethodComparison]) -> Verdict:
    """Claim 1: the adapter against the prompt that is best on the very gate examples, which favours the prompt."""
    rows: list[tuple[str, ...]] = [
        ("task", f"adapter, {FEW}", f"adapter, {MANY}", "best prompt", "", f"{FEW} less prompt", f"{MANY} less prompt")
    ]
    gaps: dict[int, list[Difference]] = {FEW: [], MANY: []}
    for found in all_found:
        prompt, few, many = found.best("prompting"), adapter_at(FEW)(found), adapter_at(MANY)(found)
        if not (prompt and few and many):
            continue
        for size, own in ((FEW, few), (MANY, many)):
            gaps[size].append(found.difference(own, prompt))
        shown = [share(few.accuracy), share(many.accuracy), prompt.method, share(prompt.accuracy)]
        rows.append((found.order.task, *shown, *(interval(gaps[size][-1]) for size in gaps)))
    sentences = [f"with {size} examples {_outcome(gaps[size])}" for size in gaps]
    return Verdict("Fine-tuning beats prompting at 100 to 200 examples.", _sentence("; ".join(sentences)), tuple(rows))


def _outcome(gaps: Sequence[Difference]) -> str:
    better, worse = sum(gap.low > 0 for gap in gaps), sum(gap.high < 0 for gap in gaps)
    mean = statistics.fmean(gap.value for gap in gaps)
    p = float(wilcoxon([gap.value for gap in gaps]).pvalue)
    return (
        f"{judged(mean, p)}: the adapter is shown better on {better} of {len(gaps)} tasks, shown worse on {worse}, "
        f"{signed_share(mean)} on average (Wilcoxon test over tasks: p = {p:.3f})"
    )


def judged(value: float, p: float) -> str:
    """A verdict: `value` is above zero where the claim holds, `p` two-sided."""
    if not p < LEVEL:  # or no number, where nothing differs
        return "neither confirmed nor contradicted"
    return "confirmed" if value > 0 else "contradicted"


def is_more_stable(all_found: Sequence[MethodComparison]) -> Verdict:
    """Claim 2: standard deviation of accuracy over seeds, pooled over tasks; for prompts over wordings too."""
    methods: dict[str, Find] = {
        f"adapter, {FEW} examples": adapter_at(FEW),
        f"adapter, {MANY} examples": adapter_at(MANY),
        "adapter, all examples": adapter_at(10**9),
        "examples in the prompt, 16 a label": named("prompting", "prototypes, 16 per label"),
        "examples in the prompt, 4 a label": named("prompting", "prototypes, 4 per label"),
        VANILLA: named("alone", VANILLA),
        INSTRUCTION: named("alone", INSTRUCTION),
        HEAD: named("alone", HEAD),
    }
    spreads = {
        name: [(one.spread, one.num_seeds) for found in all_found if (one := find(found))] for name, find in methods.items()
    }
    rows: list[tuple[str, ...]] = [("method", "tasks", "seeds", "standard deviation of accuracy")]
    for name, known in spreads.items():
        seeds = "/".join(sorted({str(num) for _, num in known}))
        rows.append((name, str(len(known)), seeds, f"{100 * pooled(known)[0]:.1f} points"))
    wordings = [statistics.stdev(values) for found in all_found if len(values := zero_shot(found)) > 1]
    rows.append(("zero-shot, over wordings instead of seeds", str(len(wordings)), "", f"{100 * _rms(wordings):.1f} points"))
    # Like with like: with all examples seeds change start and order alone, with fewer also which examples there are.
    alike = (("adapter, all examples", VANILLA), (f"adapter, {FEW} examples", "examples in the prompt, 16 a label"))
    sentences = [f"{own} against {other} {_ratio(spreads[own], spreads[other])}" for own, other in alike if spreads[other]]
    return Verdict("It is more stable over seeds.", _sentence("; ".join(sentences)), tuple(rows))


def zero_shot(found: MethodComparison) -> list[float]:
    """Accuracy of every wording without an example."""
    return [
        one.accuracy for one in found.ran("prompting") if one.method.startswith("zero-shot") and "generated" not in one.method
    ]


def pooled(spreads: Iterable[tuple[float, int]]) -> tuple[float, int]:
    """Standard deviation pooled over tasks, and its degrees of freedom, from each task's (deviation, seeds)."""
    both = [(spread**2, num - 1) for spread, num in spreads if num > 1]
    freedom = sum(num for _, num in both)
    return (math.sqrt(sum(value * num for value, num in both) / freedom), freedom) if freedom else (0.0, 0)


def _ratio(ours: Sequence[tuple[float, int]], theirs: Sequence[tuple[float, int]]) -> str:
    """Two pooled deviations with the two-sided F test of equal variances."""
    (own, own_freedom), (other, other_freedom) = pooled(ours), pooled(theirs)
    if not own or not other:
        return "not comparable, one of them has no spread"
    one_sided = float(f_distribution.sf(other**2 / own**2, other_freedom, own_freedom))
    p = min(1.0, 2 * min(one_sided, 1 - one_sided))
    return f"{judged(other - own, p)}, {100 * own:.1f} to {100 * other:.1f} points (F test of equal variances: p = {p:.3f})"


def takes_less_time(all_found: Sequence[MethodComparison]) -> Verdict:
    """Claim 3: seconds of training with all examples, against fine-tuning of all parameters with a head."""
    methods: dict[str, Find] = {
        "adapter, in its group": adapter_at(10**9),
        HEAD: named("alone", HEAD),
        INSTRUCTION: named("alone", INSTRUCTION),
    }
    rows: list[tuple[str, ...]] = [("task", "examples", f"{VANILLA}, s", *(f"{name}, s" for name in methods))]
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for found in all_found:
        vanilla = named("alone", VANILLA)(found)
        seconds = {name: one.train_s for name, find in methods.items() if (one := find(found))}
        if vanilla is None:  # it could not run
            continue
        rows.append(
            (found.order.task, str(vanilla.num_train), f"{vanilla.train_s:.1f}", *(f"{value:.1f}" for value in seconds.values()))
        )
        for name, value in seconds.items():
            ratios[name].append(value / vanilla.train_s)
    sentences = [f"{name} {_time(values)}" for name, values in ratios.items()]
    return Verdict("It needs less time than vanilla fine-tuning.", _sentence("; ".join(sentences)), tuple(rows))


def _time(ratios: Sequence[float]) -> str:
    """Times as a share of vanilla fine-tuning's, with Wilcoxon's test over tasks."""
    mean, p = statistics.geometric_mean(ratios), float(wilcoxon([math.log(ratio) for ratio in ratios]).pvalue)
    return f"takes {mean:.2f} of its time ({judged(1 - mean, p)}, Wilcoxon test over tasks: p = {p:.3f})"


def means(all_found: Sequence[MethodComparison], *parts: Part) -> tuple[tuple[str, ...], ...]:
    """Mean accuracy over tasks of every method of these parts that ran on all of them, the best first; headings first."""
    ran: dict[tuple[str, str], list[float]] = {}
    for found in all_found:
        for one in found.ran(*parts):
            size = str(one.num_train) if one.part == "curve" and one.num_train < found.order.num_train else ""
            ran.setdefault((one.part, f"{one.method} {size and f'with {size} examples'}".strip()), []).append(one.accuracy)
    everywhere = {key: values for key, values in ran.items() if len(values) == len(all_found)}
    ordered = sorted(everywhere, key=lambda key: -statistics.fmean(everywhere[key]))
    return (("part", "method", "mean accuracy"), *((*key, share(statistics.fmean(everywhere[key]))) for key in ordered))


def interval(gap: Difference) -> str:
    """A difference with its 95 % interval."""
    return f"{signed_share(gap.value)} ({signed_share(gap.low)} to {signed_share(gap.high)})"


def as_markdown(verdicts: Sequence[Verdict], all_found: Sequence[MethodComparison]) -> str:
    """The claims, means, then every comparison whole."""
    parts = [INTRODUCTION]
    for number, verdict in enumerate(verdicts, start=1):
        parts += [f"## Claim {number}: {verdict.claim}", verdict.finding, _table(verdict.table)]
    for kinds in (("baselines", *sorted(CLAIMED)), ("variants",)):
        finished = [found for found in all_found if set(found.finished) >= set(kinds)]
        if finished:
            heading = f"## Means over {len(finished)} tasks: {', '.join(kinds)}"
            parts += [heading, _table(means(finished, *kinds))]
    parts += ["## Every method on every task", *(markdown(found).strip() for found in all_found)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *others))


def load(workspaces: Iterable[Path]) -> list[MethodComparison]:
    """All comparisons of some workspaces, by task, those with most seeds first."""
    files = [file for workspace in workspaces for file in (workspace / "compare").glob("*/*/order.json")]
    found = [CompareStore(file.parent).load() for file in files]
    return sorted(found, key=lambda one: (one.order.task, -len(one.order.seeds), command_of(one)))


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values)) if values else 0.0


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


INTRODUCTION = """# Evidence

What `orchestrator compare` measured on eight tasks: the demo's five, and three public sets of which
benchmarks/public_tasks.py draws 200 training, 50 select and 400 gate rows. The base is MiniLM (22.6M parameters) in float32.
Two comparisons ran side by side, each on one CPU core that had other work at times, so seconds and milliseconds compare
within a table, and only roughly.

    python benchmarks/public_tasks.py FOLDER
    orchestrator compare TASK.yaml --parts baselines,prompting,alone,curve --sizes 25,100,200      # for each of the eight
    orchestrator compare TASK.yaml --parts variants,merged --quick                                 # one seed, six tasks
    python benchmarks/claims.py WORKSPACE... > docs/evidence.md

What a reader must know:

- MiniLM is an encoder. It reads neither an instruction nor examples beside its input, so "prompting" is what it does
  untrained: it compares the text with the labels' names and meanings (zero-shot), or with the mean of some labelled examples
  (prototypes, what examples in a prompt are to it). Nothing here says how well a large generative model is prompted.
- The best prompt is chosen on the gate examples themselves, which favours prompts.
- Seeds change an adapter's start and the order of its examples, and in the learning curve which examples it gets.
- An adapter's training time is its share of a group that trains together; the methods of part "alone" train one after
  another.
- Adapters have the learning rate of their task files, 0.002. The methods of part "alone" choose from two, with the first
  seed, on the select split; those two were set after a look at one task (support-intent), its gate included.
- Confirmed or contradicted means p < 0.05 in the test that is named, over these tasks; nothing is corrected for the number of
  claims."""


def main() -> int:
    """Print docs/evidence.md."""
    all_found = load(map(Path, sys.argv[1:]))
    whole = [found for found in all_found if set(found.finished) >= CLAIMED]
    if not whole:
        print("usage: python benchmarks/claims.py WORKSPACE..., with finished comparisons in them", file=sys.stderr)
        return 2
    verdicts = [judge(whole) for judge in (beats_prompting, is_more_stable, takes_less_time)]
    print(as_markdown(verdicts, all_found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
