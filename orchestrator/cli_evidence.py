"""The commands that look behind a champion: cross, explain, live. Heavy imports sit inside them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from orchestrator.cli_options import Json, Workspace, config_of, errors, print_json

evidence_app = typer.Typer(rich_markup_mode="rich")
Limit = typer.Option("--limit", min=1, help="Most gate examples of a task.")


@evidence_app.command(epilog="Example: orchestrator cross --limit 50")
def cross(
    tasks: Annotated[list[str] | None, typer.Argument(help="Task names; all when omitted.")] = None,
    limit: Annotated[int, Limit] = 100,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Score every champion on every other task over its base, and the base itself: who knows what, what a wrong adapter costs."""
    from orchestrator import api, tables

    config = config_of(workspace)
    with errors():
        found = api.cross(config, tasks or (), limit=limit, on_progress=_say)
    if as_json:
        print_json({"matrices": [{**asdict(m), **m.summary()} for m in found.matrices], "left_out": dict(found.left_out)})
        return
    for matrix in found.matrices:
        tables.print_matrix(matrix)
    for task, reason in found.left_out.items():
        print(f"left out: {task}: {reason}")
    print(f"stored: {config.cross_file}")


@evidence_app.command(epilog="Example: orchestrator explain client-talk")
def explain(
    task: Annotated[str, typer.Argument(help="Task name.")],
    limit: Annotated[int, Limit] = 300,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Ask a champion its gate examples from the zero-shot base to the running endpoint, and name who owns each lost point."""
    from orchestrator import api, tables

    with errors():
        ladder = api.explain(task, config_of(workspace), limit=limit, on_progress=_say)
    if as_json:
        print_json({**asdict(ladder), "conclusion": ladder.conclusion})
    else:
        tables.print_ladder(ladder)


@evidence_app.command(epilog="Example: orchestrator live --json")
def live(as_json: Json = False, workspace: Workspace = None) -> None:
    """Show what champions and challengers answered to requests: agreement, for nobody knows what was right.

    Challengers are asked where the endpoint is started with: orchestrator serve --challenger TASK=5% (or TASK=shadow)
    """
    from orchestrator import tables
    from orchestrator.live import live_rows

    rows = live_rows(config_of(workspace).live_dir)
    if as_json:
        print_json(rows)
    elif rows:
        tables.print_live(rows)
    else:
        print("no challenger was asked yet; start with: orchestrator serve --challenger TASK=5% (or TASK=shadow)")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
