"""The report's files: an HTML page without network access, JSON, flips, JUnit, Markdown; find the newest; shorten it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from multilora.errors import RequestError
from orchestrator.config import OrchestratorConfig
from orchestrator.files import write_whole
from orchestrator.report_text import junit, markdown
from orchestrator.report_words import MARKS, TONES, p_value, percent, points, signed


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
    """Write the report's five files into the folder, each whole or not at all; return the HTML file.

    report.json has everything but `flips`, which are lines of flips.jsonl; it comes last, so who finds it finds the others.
    """
    flips = "".join(json.dumps(flip, allow_nan=False) + "\n" for flip in report["flips"])
    write_whole(folder / "flips.jsonl", flips.encode())
    write_whole(folder / "junit.xml", junit(report))
    write_whole(folder / "report.md", encoded(markdown(report)))
    write_whole(folder / "report.html", encoded(_page(report)))
    kept = {name: value for name, value in report.items() if name != "flips"}
    write_whole(folder / "report.json", json.dumps(kept, allow_nan=False).encode() + b"\n")
    return folder / "report.html"


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


def page_environment() -> Environment:
    """Templates beside this module: everything is escaped, and what is not given is an error."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, points=points, signed=signed, p_value=p_value)
    return environment


def _page(report: dict[str, Any]) -> str:
    return page_environment().get_template("report.html.jinja").render(report=report, tones=TONES, marks=MARKS)


def encoded(text: str) -> bytes:
    """A lone surrogate from a data file must not cost the report."""
    return text.encode("utf-8", errors="replace")
