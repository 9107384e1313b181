"""A comparison as rows of plain strings, the same for the terminal, the page and Markdown; and what the terminal shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

from orchestrator.compare_advice import advise
from orchestrator.compare_result import MethodComparison
from orchestrator.methods import Summary
from orchestrator.report_words import percent, share, signed_share, size
from orchestrator.tables import print_rich, table_of


class MethodCells(NamedTuple):
    """One method; an empty cell says that there is no such number."""

    part: str
    method: str
    examples: str
    seeds: str
    accuracy: str
    interval: str
    spread: str
    to_adapter: str
    """Paired difference to the task's own adapter."""
    to_adapter_interval: str
    ill_formed: str
    train_s: str
    ms_per_text: str
    trained: str
    disk: str
    note: str


HEADINGS = MethodCells(
    part="part",
    method="method",
    examples="examples",
    seeds="seeds",
    accuracy="accuracy",
    interval="95 % interval",
    spread="spread",
    to_adapter="to the adapter",
    to_adapter_interval="95 % interval",
    ill_formed="no label",
    train_s="training s",
    ms_per_text="ms a text",
    trained="parameters",
    disk="on disk",
    note="note",
)
NUMBERS = MethodCells._fields[2:-1]
"""Columns of numbers."""
INTERVALS = {"accuracy": "interval", "to_adapter": "to_adapter_interval"}
"""Columns whose interval a page can write beneath them."""
PIPE_WIDTH = 240


def cells_of(found: MethodComparison) -> list[MethodCells]:
    """Every method in the order in which it came."""
    return [_cells(found, summary) for summary in found.summaries]


def shown_columns(rows: Sequence[MethodCells]) -> list[tuple[str, str]]:
    """Name and heading of every column in which there is something."""
    both = zip(MethodCells._fields, HEADINGS, strict=True)
    return [(name, heading) for name, heading in both if any(getattr(row, name) for row in rows)]


def print_comparison(found: MethodComparison) -> None:
    """Print the table, what the numbers are, and what to do."""
    rows = cells_of(found)
    columns = shown_columns(rows)
    table = table_of(*(heading for _, heading in columns))
    for column, (name, _) in zip(table.columns, columns, strict=True):
        column.justify, column.no_wrap = ("right", True) if name in NUMBERS else ("left", False)
    for before, row in zip([None, *rows], rows, strict=False):
        is_same = before is not None and before.part == row.part
        if before and not is_same:
            table.add_section()
        shown = row._replace(part="") if is_same else row
        table.add_row(*(Text(getattr(shown, name)) for name, _ in columns))
    print_rich(table, PIPE_WIDTH)
    print(caption(found))
    print(f"{found.order.task}: {advise(found).text}")


def caption(found: MethodComparison) -> str:
    """What the numbers are of."""
    order = found.order
    seeds = f"{len(order.seeds)} seeds" if len(order.seeds) > 1 else "1 seed, so that no spread is known"
    counts = f"{len(order.gold)} gate examples, {order.num_train} training examples, {len(order.labels)} labels, {seeds}"
    return (
        f"{counts}; base {order.base}. Interval: what other gate examples could have shown; spread: standard deviation over "
        "seeds. A method that writes freely is wrong where it wrote no label."
    )


def _cells(found: MethodComparison, summary: Summary) -> MethodCells:
    examples = str(summary.num_train) if summary.num_train else ""
    if not summary.num_seeds:
        empty = MethodCells(summary.part, summary.method, examples, *[""] * (len(HEADINGS) - 3))
        return empty._replace(note=f"skipped: {summary.skipped}")
    gap = found.to_own(summary)
    return MethodCells(
        part=summary.part,
        method=summary.method,
        examples=examples,
        seeds=str(summary.num_seeds),
        accuracy=share(summary.accuracy),
        interval=f"{share(summary.interval[0])}-{share(summary.interval[1])}",
        spread=share(summary.spread) if summary.num_seeds > 1 else "",
        to_adapter=signed_share(gap.value) if gap else "",
        to_adapter_interval=f"{signed_share(gap.low)} to {signed_share(gap.high)}" if gap else "",
        ill_formed=percent(summary.ill_formed) if summary.ill_formed else "",
        train_s=_number(summary.train_s) if summary.train_s else "",
        ms_per_text=_number(summary.ms_per_text) if summary.ms_per_text else "",
        trained=f"{summary.num_trained:,}" if summary.num_trained else "",
        disk=size(summary.disk_bytes) if summary.disk_bytes else "",
        note="; ".join(part for part in ("the others are held against it" if summary is found.own else "", summary.note) if part),
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
