"""The command that answers a whole file. Heavy imports sit inside it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli_options import Json, Workspace, config_of, errors, print_json

batch_app = typer.Typer(rich_markup_mode="rich")


@batch_app.command(epilog="Example: orchestrator batch client-talk talks.jsonl answers.jsonl")
def batch(
    task: Annotated[str, typer.Argument(help="Task name, or TASK@VERSION; default: the champion of this moment.")],
    source: Annotated[Path, typer.Argument(help='Rows as lines of JSON: {"text": ...}, or the task\'s columns.')],
    output: Annotated[Path, typer.Argument(help="Where the answers go, in the same order.")],
    version: Annotated[int | None, typer.Option("--version", min=1, help="Adapter version instead of the champion.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Copies of the base; default: one per GPU, else per two cores.")
    ] = None,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Answer every row of a file, however large; a batch that was killed goes on where it stopped when it is called again.

    Every row keeps its fields and gets label, probabilities (or text), version, digest and is_truncated. A row that cannot be
    asked gets an error instead, and the command ends with 2.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from orchestrator.batch import run_batch

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with errors(), Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(task, total=None)

        def start(num_rows: int, num_done: int, note: str) -> None:
            if note:
                print(f"starting over: {note}", file=sys.stderr)
            if num_done:
                print(f"going on: {num_done} of {num_rows} rows are answered already", file=sys.stderr)
            progress.update(bar, total=num_rows, completed=num_done)

        done = run_batch(
            config_of(workspace),
            task,
            source,
            output,
            version=version,
            is_forced=force,
            num_workers=workers,
            on_start=start,
            on_rows=lambda num_rows: progress.advance(bar, num_rows),
        )
    speed = (done.num_rows - done.num_resumed) / done.seconds
    if as_json:
        print_json({**asdict(done), "rows_per_s": speed})
    else:
        print(f"{done.task}@{done.version}: {done.num_rows} rows in {done.seconds:.0f} s ({speed:.0f} rows/s) -> {done.output}")
    _end(done.num_errors, done.num_rows)


def _end(num_errors: int, num_rows: int) -> None:
    if num_errors:
        print(f"error: {num_errors} of {num_rows} rows have no answer; their field `error` says why", file=sys.stderr)
        raise typer.Exit(2)
