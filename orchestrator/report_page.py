"""The report's files: report.json and one HTML page without network access; find the newest; shorten it for a terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from multilora.errors import RequestError
from orchestrator.config import OrchestratorConfig


class SummaryRow(NamedTuple):
    """One task as plain strings, for a terminal table."""

    task: str
    verdict: str
    champion: str
    candidate: str
    difference: str
    n: str
    baselines: str
    note: str


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write report.json and report.html into the folder, each whole or not at all; return the HTML file."""
    folder.mkdir(parents=True, exist_ok=True)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(percent=percent, points=points, p_value=p_value)
    page = environment.get_template("report.html.jinja").render(report=report)
    _write(folder / "report.json", json.dumps(report, allow_nan=False) + "\n")
    return _write(folder / "report.html", page)


def latest_report(config: OrchestratorConfig) -> tuple[dict[str, Any], Path]:
    """The newest report and its HTML file. Raises RequestError where there is none yet."""
    found = sorted(config.reports_dir.glob("*/report.json"))
    if not found:
        raise RequestError(f"there is no report in {config.workspace} yet; run: orchestrator submit tasks/*.yaml")
    report: dict[str, Any] = json.loads(found[-1].read_text(encoding="utf-8"))
    return report, found[-1].with_name("report.html")


def summary_rows(report: dict[str, Any]) -> list[SummaryRow]:
    """Shorten a report to one row of plain strings per task, in the report's order."""
    rows = []
    for task in report["tasks"]:
        verdict, before, candidate = task["verdict"], task["reference_result"], task["candidate_result"]
        rows.append(
            SummaryRow(
                task=task["task"],
                verdict=f"{task['decision']} ({verdict['kind']})" if verdict else task["decision"],
                champion=f"{percent(before['value'])} ({before['system']})" if before else task["champion"] or "none",
                candidate=f"{percent(candidate['value'])} ({candidate['system']})" if candidate else "",
                difference=points(verdict["difference"]) if verdict else "",
                n=str(task["num_examples"]) if candidate else "",
                baselines=", ".join(f"{base['system']} {percent(base['value'])}" for base in task["baselines"]),
                note=task["error"] or "; ".join([*(verdict["reasons"] if verdict else ()), *task["warnings"]]),
            )
        )
    return rows


def percent(value: float) -> str:
    """0.1234 -> 12.3 %."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Format a difference of two shares in points, with its sign; what rounds to zero has none."""
    return f"{100 * value:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")


def p_value(value: float) -> str:
    """A p value as people read it."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _write(path: Path, text: str) -> Path:
    """Write through a temporary neighbour; a lone surrogate from a data file must not cost the report."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(text.encode("utf-8", errors="replace"))
    return draft.replace(path)
