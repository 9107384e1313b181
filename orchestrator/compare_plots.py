"""Three plots of a comparison as SVG: accuracy against examples, against seconds of training, against milliseconds a text.

Text stays text, and colours become CSS variables with a fallback, so that the page's dark mode reaches them and a file by itself
looks right, too. The same comparison gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from orchestrator.compare_result import MethodComparison
from orchestrator.methods import Part, Summary
from orchestrator.report_words import cut, share

COLOURS: dict[Part, str] = {
    "baselines": "#565e6d",
    "prompting": "#a8480a",
    "variants": "#17663b",
    "alone": "#6b3fa0",
    "curve": "#1f5fae",
    "merged": "#0b7285",
}
MARKERS: dict[Part, str] = {"baselines": "D", "prompting": "s", "variants": "^", "alone": "v", "curve": "o", "merged": "P"}
"""A part is known by its marker, too."""
TEXT, DIM, LINE = "#1a1d23", "#565e6c", "#d5d9e0"
VARIABLES = {TEXT: "text", DIM: "dim", LINE: "line", **{colour: part for part, colour in COLOURS.items()}}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compare",
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": DIM,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}
WIDTH, HEIGHT = 5.2, 4.0
"""Inches of 72 points: as wide as a phone, so that nothing shrinks below what can be read."""
MAX_LABELS, MAX_NAME = 9, 34
OFFSETS = [
    (side * gap, rise)
    for gap, rises in ((7, (0, 8, -8)), (9, (17, -17)), (14, (27, -27, 38, -38)))
    for rise in rises
    for side in (1, -1)
]
"""Where a label may stand beside its mark, nearest first."""


@dataclass(frozen=True)
class Mark:
    """A method's place in a plot."""

    x: float
    summary: Summary

    @property
    def name(self) -> str:
        """Its label on one line."""
        return cut(" ".join("".join(char if char.isprintable() else " " for char in self.summary.method).split()), MAX_NAME)


def draw_plots(found: MethodComparison) -> dict[str, str]:
    """Draw what there is something to draw of: file stem -> SVG."""
    with rc_context(STYLE):
        drawn = {"examples": _by_examples(found), "training": _by_training(found), "answering": _by_answering(found)}
        return {name: _svg(figure, name) for name, figure in drawn.items() if figure}


def _by_examples(found: MethodComparison) -> Figure | None:
    """The learning curve with its seeds; prompts and baselines where their examples are, those without any as lines."""
    shown = found.ran("curve", "prompting", "baselines")
    marks = [Mark(one.num_train, one) for one in shown if one.num_train]
    if not any(mark.summary.part == "curve" for mark in marks):
        return None
    figure, axes = _axes("labelled examples", marks, shown)
    for method in dict.fromkeys(one.method for one in shown if one.part == "curve"):
        line = sorted((one for one in shown if one.part == "curve" and one.method == method), key=lambda one: one.num_train)
        axes.plot([one.num_train for one in line], [one.accuracy for one in line], color=COLOURS["curve"], linewidth=1.6)
        for one in line:
            dots = [row.accuracy(found.order.gold) for row in found.runs(one)]
            axes.plot([one.num_train] * len(dots), dots, "_", color=COLOURS["curve"], markersize=9)
    free = [best for part in ("prompting", "baselines") if (best := _best_free(shown, part))]
    for one in free:
        axes.axhline(one.accuracy, color=COLOURS[one.part], linewidth=1.2, linestyle=(0, (4, 3)))
    last = max(one.num_train for one in shown if one.part == "curve")
    named = [mark for mark in marks if mark.summary.part != "curve" or mark.x == last]
    lines = [Mark(axes.get_xlim()[0] * 1.05, one) for one in free]
    _label(axes, [*lines, *_notable(named)], marks)
    return figure


def _by_training(found: MethodComparison) -> Figure | None:
    ran = found.ran("curve", "prompting", "baselines", "variants", "alone")
    trained = [one.train_s for one in ran if one.train_s > 0]
    if not trained:
        return None
    nothing = min(trained) / 4
    marks = [Mark(one.train_s or nothing, one) for one in ran]
    figure, axes = _axes("seconds of training", marks, ran)
    if len(trained) < len(ran):
        axes.axvline(nothing * 2, color=LINE, linewidth=1)
        ticks = [tick for tick in axes.get_xticks() if tick > nothing * 2]
        axes.set_xticks([nothing, *ticks], ["none", *(f"{tick:g}" for tick in ticks)])
    _label(axes, _notable(marks), marks)
    return figure


def _by_answering(found: MethodComparison) -> Figure | None:
    ran = [one for one in found.summaries if one.num_seeds and one.ms_per_text > 0]
    largest = {(one.part, one.method): one for one in sorted(ran, key=lambda one: one.num_train)}
    marks = [Mark(one.ms_per_text, one) for one in largest.values()]  # a method answers as fast however many examples it saw
    if not marks:
        return None
    figure, axes = _axes("milliseconds a text", marks, list(largest.values()))
    _label(axes, _notable(marks), marks)
    return figure


def _best_free(shown: Sequence[Summary], part: str) -> Summary | None:
    """The best of a part that takes no labelled example."""
    return max((one for one in shown if one.part == part and not one.num_train), key=lambda one: one.accuracy, default=None)


def _axes(x_label: str, marks: Sequence[Mark], shown: Sequence[Summary]) -> tuple[Figure, Axes]:
    """A logarithmic plot with every mark and its interval."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=72)
    FigureCanvasAgg(figure)  # measures text
    figure.subplots_adjust(left=0.11, right=0.97, top=0.93, bottom=0.13)
    axes = figure.subplots()
    axes.set_xscale("log")
    low, high = min(mark.x for mark in marks), max(mark.x for mark in marks)
    axes.set_xlim(low / 1.6, high * 1.6)
    sizes = sorted({mark.x for mark in marks if mark.summary.part == "curve"}) if x_label == "labelled examples" else []
    ticks = sizes or _log_ticks(low / 1.3, high * 1.3)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    bottom = min(one.interval[0] for one in shown)
    axes.set_ylim(max(bottom - 0.04, 0.0), min(max(one.interval[1] for one in shown) + 0.04, 1.02))
    axes.yaxis.set_major_formatter(lambda value, _: share(value).rstrip("0").rstrip(".") or "0")
    axes.set_title("accuracy", loc="left", fontsize=10, color=DIM)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for mark in marks:
        one, colour = mark.summary, COLOURS[mark.summary.part]
        axes.plot([mark.x, mark.x], one.interval, color=colour, linewidth=1, alpha=0.45)
        axes.plot([mark.x], [one.accuracy], MARKERS[one.part], color=colour, markersize=5.5)
    return figure, axes


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or the powers alone where that were too many."""
    powers = [10.0**power for power in range(-4, 8)]
    fine = [unit * power for power in powers for unit in (1, 2, 5) if low <= unit * power <= high]
    return fine if len(fine) <= 6 else [power for power in powers if low <= power <= high]


def _notable(marks: Sequence[Mark]) -> list[Mark]:
    """Marks worth a label, best first: what nothing cheaper beats, and the best of every part."""
    best: dict[str, Mark] = {}
    for mark in sorted(marks, key=lambda mark: (-mark.summary.accuracy, mark.x)):
        best.setdefault(mark.summary.part, mark)
    frontier = [mark for mark in marks if not any(_beats(other, mark) for other in marks)]
    chosen = {id(mark): mark for mark in (*best.values(), *frontier)}
    return sorted(chosen.values(), key=lambda mark: (mark not in best.values(), -mark.summary.accuracy))[:MAX_LABELS]


def _beats(one: Mark, other: Mark) -> bool:
    is_no_worse = one.x <= other.x and one.summary.accuracy >= other.summary.accuracy
    return is_no_worse and (one.x, one.summary.accuracy) != (other.x, other.summary.accuracy)


def _label(axes: Axes, named: Sequence[Mark], marks: Sequence[Mark]) -> None:
    """Write names beside marks, each at the nearest place that covers no mark and no other name, else where it covers least."""
    places = [axes.transData.transform((mark.x, mark.summary.accuracy)) for mark in marks]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]
    frame = axes.get_window_extent()
    for mark in named:
        text = axes.annotate(
            mark.name,
            (mark.x, mark.summary.accuracy),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=COLOURS[mark.summary.part],
        )
        tried = []
        for right, up in OFFSETS:
            text.set(position=(right, up), ha="left" if right > 0 else "right")
            box = text.get_window_extent()
            outside = (
                box.width
                - max(min(box.x1, frame.x1 + 8) - max(box.x0, frame.x0), 0)
                + max(frame.y0 - box.y0, box.y1 - frame.y1, 0)
            )
            covered = sum(inter.width * inter.height for other in taken if (inter := Bbox.intersection(box, other)))
            tried.append((covered + 40 * outside, (right, up), box))
            if covered + outside <= 0.01:
                break
        _, (right, up), box = min(tried, key=lambda one: one[0])
        text.set(position=(right, up), ha="left" if right > 0 else "right")
        if abs(up) > 10:
            where = axes.transData.inverted().transform((box.x0 if right > 0 else box.x1, (box.y0 + box.y1) / 2))
            axes.plot([mark.x, where[0]], [mark.summary.accuracy, where[1]], color=COLOURS[mark.summary.part], linewidth=0.5)
        taken.append(box)


def _svg(figure: Figure, name: str) -> str:
    """An SVG element without prolog, date or ids that another plot on the page has, too."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: _variable(found.group()), text)
    return text.replace("font-family: 'DejaVu Sans'", "font-family: 'DejaVu Sans', Verdana, sans-serif").strip()


def _variable(colour: str) -> str:
    return f"var(--{VARIABLES[colour]}, {colour})" if colour in VARIABLES else colour
