"""The command that makes a first task file of a user's data: init. Heavy imports sit inside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli_options import Json, errors, print_json

if TYPE_CHECKING:
    from orchestrator.first_spec import FirstSpec

init_app = typer.Typer(rich_markup_mode="rich")
BASE = "sentence-transformers/all-MiniLM-L6-v2"


@init_app.command(epilog="Example: orchestrator init messages.csv --out tasks/message-topic.yaml")
def init(
    file: Annotated[Path, typer.Argument(help="Labelled examples: .jsonl .json .csv .tsv .parquet.", metavar="DATA")],
    out: Annotated[Path | None, typer.Option("--out", help="Task file to write; default tasks/NAME.yaml, as the data.")] = None,
    base: Annotated[str, typer.Option("--base", help="Base model: hub id, or a folder (./, ../ or /).")] = BASE,
    text: Annotated[list[str] | None, typer.Option("--text", help="Column with a text; may be given often.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Column with the answer.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Write without asking; --json writes nothing without it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a task file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Look at labelled data, say what is in it, and write a first task file to go on from."""
    from multilora.spec import BaseSpec
    from orchestrator.choose_columns import choose_columns
    from orchestrator.dataset import read_columns
    from orchestrator.first_spec import first_spec, task_name
    from orchestrator.inspect_data import inspect_rows
    from orchestrator.token_lengths import know_base

    out = out or Path("tasks") / f"{task_name(file.stem)}.yaml"
    copy = out.with_name(f"{out.stem}-corrected.jsonl")
    is_folder = base.startswith(("./", "../", "/"))
    with errors():
        table = read_columns(file)
        found = inspect_rows(table, choose_columns(table, text or (), label))
        targets = [out, copy] if found.is_corrected else [out]
        if not force and (there := [target for target in targets if target.exists()]):
            raise typer.BadParameter(f"{there[0]} is there already; name another, or replace it: --force", param_hint="--out")
        known = know_base(BaseSpec(model=str(Path(base).resolve()) if is_folder else base))
        base_field = _seen_from(out, Path(base)) if is_folder and not base.startswith("/") else base
        made = first_spec(task_name(out.stem), found, known, base_field, _seen_from(out, copy if found.is_corrected else file))
        made.check(file)
    if not as_json:
        _show(made, targets, is_asked=not yes)
    if yes or not as_json:
        _write(made, targets)
    if as_json:
        print_json(
            {
                "files": list(map(str, targets)),
                "is_written": yes,
                "text_columns": found.columns.texts,
                "label_column": found.columns.label,
                "labels": found.labels,
                "findings": [finding._asdict() for finding in made.findings],
                "spec": made.text,
            }
        )
    else:
        print(f"wrote {' and '.join(map(str, targets))}; next: write what is marked TODO, then: orchestrator validate {out}")


def _show(made: FirstSpec, targets: list[Path], *, is_asked: bool) -> None:
    """Show findings and task file, and end where a person does not want it."""
    from orchestrator import tables

    tables.print_findings(made.findings)
    print(made.text)
    if is_asked:
        typer.confirm(f"Write {' and '.join(map(str, targets))}?", abort=True)


def _write(made: FirstSpec, targets: list[Path]) -> None:
    from orchestrator.files import write_whole

    if made.corrected:  # first, for a task file must not name what is not there
        write_whole(targets[1], made.corrected.encode())
    write_whole(targets[0], made.text.encode())


def _seen_from(out: Path, path: Path) -> str:
    """A path as a task file names it, so that both can move together."""
    relative = Path(os.path.relpath(path.resolve(), out.resolve().parent)).as_posix()
    return relative if relative.startswith("../") else f"./{relative}"
