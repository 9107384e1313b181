"""The report for machines that read text: JUnit XML for CI, Markdown for a pull request's comment."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from orchestrator.report_words import MARKS, TONES, Decision, cut, p_value, percent, signed

MAX_MARKDOWN = 60_000
"""Characters; GitHub refuses a comment above 65,536."""
MAX_REASON = 300
FAILURES = (Decision.REFUSED, Decision.IN_PRODUCTION)
SKIPS = (Decision.HELD_BACK, Decision.IN_DOUBT, Decision.UNPROVEN, Decision.AGAINST_ADVICE)
_FORBIDDEN_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ACTIVE_IN_MARKDOWN = {ord(mark): f"&#{ord(mark)};" for mark in string.punctuation if mark not in ",.;-()'%?+=/"}
_CHECKS = {"judged": "gate", "rechecked": "gate again", "unchanged": "unchanged", "verified": "canaries", "failed": "gate"}


def junit(report: dict[str, Any]) -> bytes:
    """One test case per task, and one for all changed tasks together. A task under an advisory gate is never a failure."""
    suite = ElementTree.Element("testsuite", name="orchestrator", timestamp=report["created"])
    for task in report["tasks"]:
        _add_case(suite, task["task"], _CHECKS[task["state"]], *_judgement(task))
    if pooled := report["pooled"]:
        text = f"{pooled['num_losses']} lost, {pooled['num_wins']} won, {p_value(pooled['p'])}, over {', '.join(pooled['tasks'])}"
        _add_case(suite, "release", "all changed tasks together", "failure" if pooled["is_drop"] else "", "got worse", text)
    for name, kind in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(len(list(suite.iter(kind)))))
    root = ElementTree.Element("testsuites", {name: value for name, value in suite.attrib.items() if name != "timestamp"})
    root.append(suite)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def markdown(report: dict[str, Any]) -> str:
    """The table first, the flips folded; what is too long is left out and counted."""
    head = [
        f"## {_icon(report['outcome'])} {report['outcome']}: {plain(report['sentence'])}",
        *(plain(report[name]) for name in ("evidence", "next_step") if report[name]),
    ]
    table = [
        "| task | verdict | before | now | points | 90 % interval | lost / won of n | p (Holm) |",
        "|---|---|---|---|--:|---|---|---|",
    ]
    reasons = [
        f"- **{plain(task['task'])}**: {plain(cut(_why(task), MAX_REASON))}"
        for task in report["tasks"]
        if _tone(task) in ("bad", "warn")
    ]
    tail = f"{_facts(report)}. The whole report: report.html and report.json beside this file.\n"
    room = MAX_MARKDOWN - len("\n\n".join([*head, tail])) - 1000
    rows, num_rows_hidden = _fitting([_row(task) for task in report["tasks"]], room * 2 // 3)
    room -= sum(map(len, rows))
    reasons, _ = _fitting(reasons, room // 2)
    room -= sum(map(len, reasons))
    quiet = [task for task in report["tasks"] if task["search"] and _tone(task) in ("good", "calm")]  # others say it above
    searches, _ = _fitting([f"- **{plain(task['task'])}**: {plain(task['search']['sentence'])}" for task in quiet], room // 2)
    room -= sum(map(len, searches))
    live, _ = _fitting([f"- {plain(row['sentence'])}" for row in report["live"]], room // 2)
    room -= sum(map(len, live))
    flips, _ = _fitting([_flips_of(task) for task in report["tasks"] if task["flips"]], room)
    parts = [*head, "\n".join([*table, *rows])]
    if num_rows_hidden:
        parts.append(f"{num_rows_hidden} more tasks are in report.html.")
    if live:
        live = ["### Live: champion against challenger (agreement, not accuracy)", "\n".join(live)]
    parts += ["\n".join(reasons), "\n".join(searches), *live, *flips, tail]
    return "\n\n".join(part for part in parts if part)


def plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    escaped = " ".join(_FORBIDDEN_IN_XML.sub("\ufffd", text).split()).translate(_ACTIVE_IN_MARKDOWN)
    escaped = re.sub("&#58;(?= |$)", ":", escaped)  # else it may begin an emoji's name or end an address's scheme
    # GitHub links bare addresses and people even where everything is escaped; a zero-width space stops it.
    return re.sub(r"(?i)www(?=\.)|(?<!\w)&#64;", lambda found: f"{found.group()}\u200b", escaped)


def _add_case(suite: ElementTree.Element, task: str, check: str, kind: str, message: str, text: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_xml(task), name=_xml(check))
    if kind:
        ElementTree.SubElement(case, kind, message=_xml(message)).text = _xml(text)
    elif text:
        ElementTree.SubElement(case, "system-out").text = _xml(text)


def _judgement(task: dict[str, Any]) -> tuple[str, str, str]:
    """JUnit's element, its message and its text."""
    decision, why = task["decision"], _why(task)
    if decision == Decision.FAILED:
        return "error", decision, why
    if decision in FAILURES:
        return "skipped" if task["policy"] == "advisory" else "failure", decision, why
    return "skipped" if decision in SKIPS else "", decision, why


def _why(task: dict[str, Any]) -> str:
    reasons = task["verdict"]["reasons"] if task["verdict"] else ()
    return task["error"] or "; ".join([*reasons, *task["warnings"]])


def _row(task: dict[str, Any]) -> str:
    verdict, before, now = task["verdict"], task["reference_result"], task["candidate_result"]
    cells = [
        plain(task["task"]),
        f"{MARKS[_tone(task)]} {plain(task['decision'])}",
        f"{percent(before['value'])} {plain(before['system'])}" if before else plain(task["champion"] or "none"),
        f"{percent(now['value'])} {plain(now['system'])}" if now else "",
    ]
    if verdict:
        low, high = verdict["interval"]
        cells += [
            signed(verdict["difference"]),
            f"{signed(low)} to {signed(high)}",
            f"{verdict['num_losses']} / {verdict['num_wins']} of {task['num_examples']}",
            ""
            if verdict["p_holm"] is None
            else p_value(verdict["p_holm"]).removeprefix("p = ").removeprefix("p ").replace("<", "&lt;"),
        ]
    else:
        cells += ["", "", "", ""]
    return f"| {' | '.join(cells)} |"


def _flips_of(task: dict[str, Any]) -> str:
    lines = [f"<details><summary>{plain(task['task'])}: examples that only one side gets right</summary>", ""]
    lines += ["| | text | right | before | now |", "|---|---|---|---|---|"]
    for flip in task["flips"]:
        cells = (flip["text"], flip["gold"], flip["reference_answer"], flip["candidate_answer"])
        lines.append(f"| {'lost' if flip['kind'] == 'loss' else 'won'} | {' | '.join(map(_code, cells))} |")
    if task["num_flips_hidden"]:
        lines += ["", f"{task['num_flips_hidden']} more are in flips.jsonl."]
    return "\n".join([*lines, "", "</details>"])


def _code(text: str) -> str:
    return f"<code>{plain(text)}</code>" if text.strip() else ""


def _facts(report: dict[str, Any]) -> str:
    facts = {"created": report["created"], "who": report["who"], **report["facts"]}
    return ", ".join(f"{plain(name)} <code>{plain(value)}</code>" for name, value in facts.items() if value)


def _fitting(parts: Sequence[str], room: int) -> tuple[list[str], int]:
    """The first parts that fit into so many characters, and how many do not."""
    kept: list[str] = []
    for part in parts:
        room -= len(part) + 2
        if room < 0:
            break
        kept.append(part)
    return kept, len(parts) - len(kept)


def _tone(task: dict[str, Any]) -> str:
    return TONES[Decision(task["decision"])]


def _icon(outcome: str) -> str:
    return {"ERROR": "⛔", "BLOCK": "❌", "HOLD": "⚠️", "CLEAR": "✅"}[outcome]


def _xml(text: str) -> str:
    return _FORBIDDEN_IN_XML.sub("\ufffd", text)
