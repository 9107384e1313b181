"""The commands about which version answers: history, promote, rollback. Heavy imports sit inside them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli_options import Json, Workspace, config_of, errors, print_json

if TYPE_CHECKING:
    from orchestrator.aliases import Moved

aliases_app = typer.Typer(rich_markup_mode="rich")


@aliases_app.command(epilog="Example: orchestrator history client-talk")
def history(task: Annotated[str, typer.Argument(help="Task name.")], as_json: Json = False, workspace: Workspace = None) -> None:
    """Show what answered for a task after every promotion event, how well, and the verdict on each version."""
    from orchestrator import tables
    from orchestrator.aliases import Aliases

    with errors():
        events, versions = Aliases(config_of(workspace)).history(task)
    if as_json:
        rows = [{"event": event.id, "kind": event.kind, "who": event.who, "created": event.created, "outcome": event.outcome,
                 "reason": event.reason, **asdict(cell)} for event, cell in events]  # fmt: skip
        print_json({"task": task, "events": rows, "versions": [asdict(row) for row in versions]})
    else:
        tables.print_history(events, versions)


@aliases_app.command(epilog='Example: orchestrator promote client-talk@3 --force --reason "gate split has wrong labels, see #12"')
def promote(
    version: Annotated[str, typer.Argument(help="TASK@N, or TASK for its challenger.", metavar="TASK[@N]")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the version and in the history.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Needed: it goes past the gate.")] = False,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Make a version the champion that the gate did not promote; who, when and why are recorded.

    What passes the gate is promoted by `submit` itself.
    """
    from orchestrator.aliases import Aliases

    if not force or not reason.strip():
        raise typer.BadParameter("submit promotes what passes the gate; past it only: --force --reason TEXT")
    task, number = _parsed(version)
    with errors():
        moved = Aliases(config_of(workspace)).promote(task, number, reason.strip())
    _say(moved, as_json)


@aliases_app.command(epilog="Example: orchestrator rollback client-talk")
def rollback(
    task: Annotated[str, typer.Argument(help="Task name.")],
    to: Annotated[int | None, typer.Option("--to", min=1, help="Version to go back to; default the champion before.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the version and in the history.")] = "",
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Let the champion before answer again; a running endpoint follows within seconds."""
    from orchestrator.aliases import Aliases

    with errors():
        moved = Aliases(config_of(workspace)).roll_back(task, to, reason.strip() or "no reason given")
    _say(moved, as_json)


def _parsed(version: str) -> tuple[str, int | None]:
    task, at, number = version.partition("@")
    if at and not number.isdecimal():
        raise typer.BadParameter(f"{version!r}: a version is TASK@N with a number N")
    return task, int(number) if at else None


def _say(moved: Moved, as_json: bool) -> None:
    if as_json:
        print_json(asdict(moved))
    else:
        print(f"{moved.after} answers for {moved.task} now (was {moved.before or 'nothing'})")
