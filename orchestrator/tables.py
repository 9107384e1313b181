"""What the command line prints for people: plan, result, report and evidence as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.cross import BASE
from orchestrator.progress import Progress, plain_line
from orchestrator.report_page import SummaryRow, summary_rows
from orchestrator.report_words import percent, points
from orchestrator.state import Update
from orchestrator.submissions import PLANNED, PlannedSubmission, State, Submission, SubmitResult

if TYPE_CHECKING:
    from multilora.task_router import RouterCard
    from orchestrator.aliases import VersionRow
    from orchestrator.cross import CrossMatrix
    from orchestrator.history import Cell, PromotionEvent
    from orchestrator.inspect_data import Finding
    from orchestrator.plan import Plan
    from orchestrator.room import TrainingGroup
    from orchestrator.rungs import Ladder
    from orchestrator.status import TaskStatus

FINDING_STYLES = {"fact": "dim", "look": "yellow", "corrected": "magenta"}
MAX_FLIPS = 10
"""Kinds of live flips printed per pair."""


def print_plan(planned: PlannedSubmission, gpu_price: float | None = None) -> None:
    """Print groups, what they take, what is unchanged and what cannot run; `gpu_price` is that of one GPU for an hour."""
    if planned.unchanged:
        print(f"unchanged, nothing to train: {', '.join(planned.unchanged)}")
    sizes = planned.num_examples or {}
    if planned.plan.groups:
        table = table_of("group", "base", "tasks", "examples", "steps", "device", "memory", "time")
        for group in planned.plan.groups:
            table.add_row(
                group.group_id,
                f"{group.base.model} {group.base.dtype}",
                "\n".join(group.members),
                "\n".join(str(sizes[name]) for name in group.members),
                str(group.num_steps),
                device_of(group),
                f"~{group.memory_bytes / 2**30:.1f} GiB",
                f"~{group.seconds / 60:.1f} min",
            )
        print_rich(table)
        print(f"in all: {cost_of(planned.plan, gpu_price)}")
    for task, reason in planned.plan.refused:
        print(f"cannot run here: {task}: {reason}", file=sys.stderr)
    for note in planned.notes:
        print(f"note: {note}")


def device_of(group: TrainingGroup) -> str:
    """Say what a group runs on."""
    workers = f"{group.workers} x " if group.workers > 1 else ""
    return workers + (f"{group.gpus:g} {group.accelerator or 'GPU'}" if group.gpus else f"{group.cpus:g} CPU")


def cost_of(plan: Plan, gpu_price: float | None) -> str:
    """Say what a plan takes."""
    parts = [f"~{plan.makespan_s / 60:.1f} min"]
    if plan.gpu_hours:
        parts.append(f"~{plan.gpu_hours:.2f} GPU-hours")
        if gpu_price is not None:
            parts.append(f"~{plan.gpu_hours * gpu_price:.2f} at {gpu_price:g} a GPU-hour")
    return ", ".join(parts)


def print_status(rows: Sequence[TaskStatus], submissions: Sequence[tuple[str, State]], endpoint: str | None) -> None:
    """Print where every task stands, and the newest submissions."""
    table = table_of("task", "champion", "versions", "last run", "why")
    for row in rows:
        table.add_row(row.task, f"v{row.champion}" if row.champion else "none", str(row.num_versions), row.status, row.reason)
    print_rich(table)
    for row in rows:
        if row.search:
            print(f"{row.task}: {row.search}")
    for name, state in submissions:
        print(f"{name}: {state.status}{f' ({state.reason})' if state.reason else ''} since {_clock(state.since)}")
    print(f"endpoint: {endpoint or 'not running'}")


def show_event(event: Mapping[str, Any], progress: Progress) -> None:
    """Show one event of a submission."""
    if "plan" in event:
        progress.say(lambda: print_plan(PLANNED.validate_python(event["plan"])))
    elif "warning" in event:
        progress.say(lambda: print(f"warning: {event['warning']}", file=sys.stderr))
    else:
        progress.update(_update_of(event))


def print_log(submission: Submission, task: str, events: Iterable[Mapping[str, Any]]) -> None:
    """Print what happened to a task, and what its worker logged."""
    print(f"{submission.id} {submission.state.status}")
    groups = list[str]()
    for event in events:
        if "plan" in event:
            groups += [group["group_id"] for group in event["plan"]["plan"]["groups"] if task in group["members"]]
        elif "warning" in event:
            print(f"{_clock(event['time'])} warning: {event['warning']}")
        elif event["task"] == task:
            print(f"{_clock(event['time'])} {plain_line(_update_of(event))}", flush=True)
    for file in (submission.log_file, *map(submission.worker_log, groups)):
        if file.is_file() and (text := file.read_text(encoding="utf-8", errors="replace")):
            print(f"--- {file}\n{text}", end="")


def _update_of(event: Mapping[str, Any]) -> Update:
    return Update(**{name: value for name, value in event.items() if name != "time"})


def _clock(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def print_result(result: SubmitResult) -> None:
    """Print what a submission came to."""
    if result.report is not None and result.report_file is not None:
        print_report(result.report, result.report_file)
    else:
        champions = ", ".join(task.champion or f"{task.task}: no champion" for task in result.tasks)
        print(f"Nothing changed, nothing to do. Champions: {champions}")
        if result.outcome != "CLEAR":
            print(f"{result.outcome}: what did not pass before does not pass now; why: orchestrator history TASK")


def print_report(found: dict[str, Any], html: Path) -> None:
    """Print a report's table and sentence."""
    table = table_of(*(name.replace("_", "-") for name in SummaryRow._fields))
    for row in summary_rows(found):
        table.add_row(*row)
    print_rich(table)
    print(f"{found['outcome']}: {found['sentence']}")
    for row in found.get("live", ()):  # reports of older versions have none
        print(f"live: {row['sentence']}")
    print(f"report: {html}")


def print_live(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print two rows per pair, the flips of those in shadow, and a sentence each."""
    table = table_of("version", "role", "mode", "requests", "inputs", "mean probability", "abstained", "mean seconds")
    for row in rows:
        for role in ("champion", "challenger"):
            side = row[role]
            means = ["" if side[name] is None else f"{side[name]:.3f}" for name in ("mean_probability", "mean_s")]
            numbers = [str(side["num_requests"]), str(side["num_inputs"]), means[0], str(side["abstained"]["count"]), means[1]]
            table.add_row(side["system"], role, row["mode"], *numbers)
    print_rich(table)
    for row in rows:
        print(row["sentence"])
        for cell in [cell for cell in row["table"] if cell["champion"] != cell["challenger"]][:MAX_FLIPS]:
            print(f"    {cell['count']} x {cell['champion']} -> {cell['challenger']}")


def print_history(events: Sequence[tuple[PromotionEvent, Cell]], versions: Sequence[VersionRow]) -> None:
    """Print what answered after every event, and what became of every version."""
    table = table_of("when", "event", "by", "outcome", "answers", "metric", "state", "why")
    for event, cell in events:
        value = f"{cell.metric} {100 * cell.value:.1f} %" if cell.value is not None else ""
        when = event.created.replace("T", " ").removesuffix("+00:00")
        table.add_row(when, event.kind, event.who, event.outcome, cell.version or "nothing", value, cell.state, event.reason)
    print_rich(table)
    table = table_of("version", "alias", "verdict", "metric", "why", "decision")
    for row in versions:
        table.add_row(row.version, row.alias, row.verdict, row.value, row.reasons, row.decision)
    print_rich(table)


def print_matrix(matrix: CrossMatrix) -> None:
    """Print every adapter on every task in percent, each task's own adapter bold, and what follows."""
    table = table_of(matrix.base, *(f"{task}\n(n = {matrix.num_examples[task]})" for task in matrix.tasks))
    for row in (BASE, *matrix.adapters):
        cells = [(matrix.accuracy(row, task), row == matrix.own(task)) for task in matrix.tasks]
        table.add_row(row, *(Text("-" if cell is None else percent(cell), "bold" if is_own else "") for cell, is_own in cells))
    found = matrix.summary()
    table.add_section()
    table.add_row("best other", *(found["best_other"][task] or "-" for task in matrix.tasks))
    advantages = [found["own_advantage"][task] for task in matrix.tasks]
    table.add_row("own minus best other", *("-" if value is None else points(value) for value in advantages))
    print_rich(table)
    if found["num_pairs"]:
        pairs = f"{found['num_pairs']} pair{'' if found['num_pairs'] == 1 else 's'} of an adapter and another's task"
        print(f"forward transfer: {points(found['forward_transfer'])} points against the base, mean of {pairs}")


def print_ladder(ladder: Ladder) -> None:
    """Print one rung per row and what follows."""
    table = table_of("rung", "system", "right", "accuracy", "lost", "won", "changed", "largest difference", "owner")
    for rung in ladder.rungs:
        shown = ["" if value is None else str(value) for value in (rung.num_lost, rung.num_won, rung.num_changed)]
        accuracy = "" if rung.accuracy is None else percent(rung.accuracy)
        difference = "" if rung.max_difference is None else f"{rung.max_difference:.1e}"
        how = rung.how if rung.is_measured else "FAILED" if rung.is_fault else "skipped"
        right = "" if rung.num_right is None else str(rung.num_right)
        table.add_row(rung.name, how, right, accuracy, *shown, difference, rung.owner)
    print_rich(table)
    for rung in ladder.rungs:
        if not rung.is_measured:
            print(f"{rung.name}: {rung.skipped}")
    print(f"{ladder.system} on {ladder.num_examples} of {ladder.num_gate} gate examples: {ladder.conclusion}")


def print_router(router: str, card: RouterCard) -> None:
    """Print where every task's gate texts go, in percent, the right task bold, and the threshold that decided."""
    table = table_of(f"{router}, texts of", *(f"to {task}" for task in card.tasks), "abstained", "to a wrong task", "texts")
    for task in card.tasks:
        row, num_texts = card.gate.counts[task], card.gate.num_texts(task)
        cells = [Text(percent(row.get(to, 0) / num_texts), "bold" if to == task else "") for to in card.tasks]
        num_abstained = num_texts - sum(row.get(to, 0) for to in card.tasks)
        wrong = percent((num_texts - num_abstained - row.get(task, 0)) / num_texts)
        table.add_row(task, *cells, percent(num_abstained / num_texts), wrong, str(num_texts))
    print_rich(table)
    print(
        f"gate splits: {percent(card.gate.abstained)} abstained, {percent(card.gate.precision)} of the rest to their task "
        f"(threshold {card.threshold:.3f}, chosen on the select splits: {percent(card.select.abstained)} and "
        f"{percent(card.select.precision)})"
    )


def print_findings(findings: Sequence[Finding]) -> None:
    """Print what was found in a file of labelled data."""
    table = table_of("", "about", "found")
    for finding in findings:
        table.add_row(Text(finding.kind, FINDING_STYLES[finding.kind]), finding.about, finding.text)
    print_rich(table)


def table_of(*headings: str) -> Table:
    """An empty table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def print_rich(value: Table, pipe_width: int = 160) -> None:
    """Print a table as wide as the terminal."""
    # A pipe has no width; 80 columns would fold the tables.
    console = Console(width=None if sys.stdout.isatty() else pipe_width, markup=False, highlight=False)
    console.print(value)
