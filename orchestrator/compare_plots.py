"""Three plots of a comparison as SVG: accuracy against examples, against seconds of training, against milliseconds a text.

Text stays text, and colours become CSS variables with a fallback, so that the page's dark mode reaches them and a file by itself
looks right, too. The same comparison gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from matplotlib.typing import RcKeyType
from numpy.typing import NDArray

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
STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compare",
    "font.size": 12,
    "axes.titlesize": 12,
    "text.color": TEXT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": DIM,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}
WIDTH, HEIGHT = 5.2, 4.4
"""Inches of 72 points: as wide as a phone, so that nothing shrinks below what can be read."""
MIN_RATIO = 1.6
MAX_NAME, LABEL_SIZE = 26, 11
OFFSETS = [
    *((side * 8, rise) for rise in (0, 9, -9) for side in (1, -1)),
    *((0, rise) for rise in (13, -13)),
    *((side * 9, rise) for rise in (19, -19, 30, -30, 42, -42) for side in (1, 0, -1)),
]
"""Where a label may stand beside its mark in points, nearest first."""
FAR, MARGIN = 14, 8
"""From where on a line leads to the mark; how far a label may reach past the frame."""


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
    ticks = _apart([mark.x for mark in marks])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
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
    chosen, others = _best_and_frontier(named)
    _label(axes, [*lines, *chosen], others)
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
    _label(axes, *_best_and_frontier(marks))
    return figure


def _by_answering(found: MethodComparison) -> Figure | None:
    ran = [one for one in found.summaries if one.num_seeds and one.ms_per_text > 0]
    largest = {(one.part, one.method): one for one in sorted(ran, key=lambda one: one.num_train)}
    marks = [Mark(one.ms_per_text, one) for one in largest.values()]  # a method answers as fast however many examples it saw
    if not marks:
        return None
    figure, axes = _axes("milliseconds a text", marks, list(largest.values()))
    _label(axes, *_best_and_frontier(marks))
    return figure


def _best_free(shown: Sequence[Summary], part: str) -> Summary | None:
    """The best of a part that takes no labelled example."""
    return max((one for one in shown if one.part == part and not one.num_train), key=lambda one: one.accuracy, default=None)


def _axes(x_label: str, marks: Sequence[Mark], shown: Sequence[Summary]) -> tuple[Figure, Axes]:
    """A logarithmic plot with every mark and its interval."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=72)
    FigureCanvasAgg(figure)  # measures text
    figure.subplots_adjust(left=0.1, right=0.97, top=0.92, bottom=0.13)
    axes = figure.subplots()
    axes.set_xscale("log")
    low, high = min(mark.x for mark in marks), max(mark.x for mark in marks)
    axes.set_xlim(low / 1.6, high * 1.6)
    ticks = _log_ticks(low / 1.3, high * 1.3)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    bottom = min(one.interval[0] for one in shown)
    axes.set_ylim(max(bottom - 0.04, 0.0), min(max(one.interval[1] for one in shown) + 0.04, 1.02))
    axes.yaxis.set_major_formatter(lambda value, _: share(value).rstrip("0").rstrip(".") or "0")
    axes.set_title("accuracy", loc="left", color=DIM)
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
    return fine if len(fine) <= 7 else [power for power in powers if low <= power <= high]


def _apart(values: Iterable[float]) -> list[float]:
    """Those values, largest first, whose numbers do not touch on a logarithmic axis."""
    kept = list[float]()
    for value in sorted(set(values), reverse=True):
        if not kept or kept[-1] / value >= MIN_RATIO:
            kept.append(value)
    return kept


def _best_and_frontier(marks: Sequence[Mark]) -> tuple[list[Mark], list[Mark]]:
    """The best of every part, and further marks that nothing cheaper beats, best first."""
    ordered = sorted(marks, key=lambda mark: (-mark.summary.accuracy, mark.x))
    best: dict[str, Mark] = {}
    for mark in ordered:
        best.setdefault(mark.summary.part, mark)
    others = [mark for mark in ordered if mark not in best.values() and not any(_beats(other, mark) for other in marks)]
    return list(best.values()), others


def _beats(one: Mark, other: Mark) -> bool:
    is_no_worse = one.x <= other.x and one.summary.accuracy >= other.summary.accuracy
    return is_no_worse and (one.x, one.summary.accuracy) != (other.x, other.summary.accuracy)


def _label(axes: Axes, named: Sequence[Mark], others: Sequence[Mark]) -> None:
    """Write names beside marks, each at the nearest place that covers nothing drawn and no other name, else where least.

    Those of `others` are left out where there is no such place close by.
    """
    ink_P2, frame, taken = _ink(axes), axes.get_window_extent(), list[Bbox]()
    for mark in (*named, *others):
        place, colour = (mark.x, mark.summary.accuracy), COLOURS[mark.summary.part]
        text = axes.annotate(mark.name, place, (0, 0), textcoords="offset points", va="center", fontsize=LABEL_SIZE, color=colour)

        def stand(offset: tuple[float, float], text: Annotation = text) -> Bbox:
            text.set(position=offset, ha="left" if offset[0] > 0 else "right" if offset[0] < 0 else "center")
            return text.get_window_extent().padded(2)  # browsers leave more room around letters

        costs = [_cost(stand(offset), ink_P2, frame, taken) for offset in OFFSETS]
        offset = OFFSETS[costs.index(min(costs))]
        if mark in others and (min(costs) > 0 or abs(offset[1]) > FAR):
            text.remove()
            continue
        box = stand(offset)
        taken.append(box)
        if abs(offset[1]) > FAR:
            side = box.x0 if offset[0] > 0 else box.x1 if offset[0] < 0 else (box.x0 + box.x1) / 2
            edge = axes.transData.inverted().transform((side, box.y0 if offset[1] > 0 else box.y1))
            axes.plot(*zip(place, edge, strict=True), color=colour, linewidth=0.5)


def _ink(axes: Axes) -> NDArray[np.float64]:
    """Points 3 pixels apart on everything drawn, P x 2."""
    points = [np.empty((0, 2))]
    for line in axes.lines:
        corners_C2 = line.get_transform().transform(line.get_xydata())
        points += [np.linspace(a, b, int(np.hypot(*(b - a)) / 3) + 2) for a, b in pairwise(corners_C2)]
        if line.get_marker() not in ("None", None):
            points += [corners_C2 + np.array([right, up]) for right in (-4, 0, 4) for up in (-4, 0, 4)]
    return np.concatenate(points)


def _cost(box: Bbox, ink_P2: NDArray[np.float64], frame: Bbox, taken: Sequence[Bbox]) -> float:
    """What a name would cover there: points of ink, other names, and what is outside the plot."""
    covered = ((ink_P2 > (box.x0, box.y0)) & (ink_P2 < (box.x1, box.y1))).all(axis=1).sum()
    shared = sum(both.width * both.height for other in taken if (both := Bbox.intersection(box, other)))
    outside = (
        max(frame.x0 - box.x0, 0) + max(box.x1 - frame.x1 - MARGIN, 0) + max(frame.y0 - box.y0, 0) + max(box.y1 - frame.y1, 0)
    )
    return float(covered + shared + 10 * outside)


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
