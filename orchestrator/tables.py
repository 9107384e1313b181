"""What the command line prints for people: plan, result and report as tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from orchestrator.report_page import SummaryRow, summary_rows

if TYPE_CHECKING:
    from orchestrator.api import PlannedSubmission, SubmitResult
    from orchestrator.plan import Plan, TrainingGroup
    from orchestrator.status import TaskStatus


def print_plan(planned: PlannedSubmission, gpu_price: float | None = None) -> None:
    """Print groups, what they take, what is unchanged and what cannot run; `gpu_price` is that of one GPU for an hour."""
    if planned.unchanged:
        print(f"unchanged, nothing to train: {', '.join(planned.unchanged)}")
    sizes = {task.spec.name: len(task.dataset.train) for task in planned.prepared}
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
    for prepared in planned.prepared:
        for note in prepared.dataset.notes:
            print(f"note: {prepared.spec.name}: {note}")


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


def print_status(rows: Sequence[TaskStatus], endpoint: str | None) -> None:
    """Print where every task stands."""
    table = table_of("task", "champion", "versions", "last run", "why")
    for row in rows:
        table.add_row(row.task, f"v{row.champion}" if row.champion else "none", str(row.num_versions), row.status, row.reason)
    print_rich(table)
    print(f"endpoint: {endpoint or 'not running'}")


def print_result(result: SubmitResult) -> None:
    """Print what a submission came to."""
    if result.report is not None and result.report_file is not None:
        print_report(result.report, result.report_file)
    else:
        champions = ", ".join(task.champion or f"{task.task}: no champion" for task in result.tasks)
        print(f"Nothing changed, nothing to do. Champions: {champions}")


def print_report(found: dict[str, Any], html: Path) -> None:
    """Print a report's table and sentence."""
    table = table_of(*(name.replace("_", "-") for name in SummaryRow._fields))
    for row in summary_rows(found):
        table.add_row(*row)
    print_rich(table)
    print(f"{found['outcome']}: {found['sentence']}")
    print(f"report: {html}")


def table_of(*headings: str) -> Table:
    """An empty table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def print_rich(value: Table) -> None:
    """Print a table as wide as the terminal."""
    # A pipe has no width; 80 columns would fold the tables.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    console.print(value)
