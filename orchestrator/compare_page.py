"""A comparison's files: one HTML page without network access, JSON, Markdown, and its plots as SVG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from orchestrator.compare_advice import advise
from orchestrator.compare_plots import draw_plots
from orchestrator.compare_result import MethodComparison
from orchestrator.compare_table import INTERVALS, NUMBERS, caption, cells_of, shown_columns
from orchestrator.files import write_whole
from orchestrator.report_page import encoded, page_environment
from orchestrator.report_text import plain
from orchestrator.report_words import MARKS, share

PAGE, DATA, TEXT = "compare.html", "compare.json", "compare.md"


def faces(found: MethodComparison) -> dict[str, str]:
    """Every file of a comparison, name -> text."""
    plots = draw_plots(found)
    return {
        **{f"{name}.svg": svg for name, svg in plots.items()},
        DATA: json.dumps(as_json(found), allow_nan=False) + "\n",
        TEXT: markdown(found),
        PAGE: page(found, plots),
    }


def write_faces(files: dict[str, str], folder: Path) -> Path:
    """Write the files, each whole or not at all; return the page."""
    for name, text in files.items():
        write_whole(folder / name, encoded(text))
    return folder / PAGE


def as_json(found: MethodComparison) -> dict[str, Any]:
    """All numbers and the advice, as plain values."""
    advice = advise(found)
    return {**found.as_dict(), "advice": {"tone": advice.tone, "headline": advice.headline, "details": advice.details}}


def page(found: MethodComparison, plots: dict[str, str]) -> str:
    """The page. Every text is escaped; the plots are elements already."""
    cells = cells_of(found)
    return (
        page_environment()
        .get_template("compare.html.jinja")
        .render(
            order=found.order,
            advice=advise(found),
            plots={name: Markup(svg) for name, svg in plots.items()},  # made by matplotlib, which escapes
            cells=cells,
            columns=[(name, heading) for name, heading in shown_columns(cells) if name not in ("part", *INTERVALS.values())],
            intervals=INTERVALS,
            caption=caption(found),
            command=command_of(found),
            runs=[(row, "" if row.skipped else share(row.accuracy(found.order.gold))) for row in found.rows],
            marks=MARKS,
        )
    )


def markdown(found: MethodComparison) -> str:
    """The advice, the table and the command that makes it again."""
    cells = cells_of(found)
    columns = shown_columns(cells)
    lines = [
        f"| {' | '.join(heading for _, heading in columns)} |",
        f"|{'|'.join('--:' if name in NUMBERS else '---' for name, _ in columns)}|",
        *(f"| {' | '.join(plain(getattr(row, name)) for name, _ in columns)} |" for row in cells),
    ]
    parts = [f"### {found.order.task}", plain(advise(found).text), "\n".join(lines), plain(caption(found))]
    return "\n\n".join([*parts, f"    {command_of(found)}"]) + "\n"


def command_of(found: MethodComparison) -> str:
    """What to type to get this comparison."""
    order = found.order
    parts = list(dict.fromkeys((*found.finished, *found.failed, *found.cut_off)))
    settings = f"--parts {','.join(parts)} --seeds {len(order.seeds)} --sizes {','.join(map(str, order.sizes))}"
    return f"orchestrator compare {order.task}.yaml {settings}"
