"""What the commands share: options, settings, and how errors end a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multilora.errors import MultiLoraError, Problem, SpecError

if TYPE_CHECKING:
    from multilora.spec import TaskSpec
    from orchestrator.config import OrchestratorConfig

Files = Annotated[list[Path], typer.Argument(help="Task spec files.", metavar="TASK.yaml...")]
Force = Annotated[bool, typer.Option("--force", help="Train again what has not changed.")]
Search = Annotated[
    bool, typer.Option("--search", help="Try several learning rates and ranks per task together, or what its `search:` lists.")
]
Base = Annotated[str | None, typer.Option("--base", help="Base of all tasks: t5-mini, a hub id or a folder (./, ../, /).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Workspace = Annotated[
    Path | None, typer.Option("--workspace", help="Folder for all state; default ORCHESTRATOR_HOME, else .orchestrator.")
]


def config_of(workspace: Path | None) -> OrchestratorConfig:
    """Settings from environment and flags; sets up logging."""
    from multilora.log import setup_logging
    from orchestrator.config import OrchestratorConfig

    setup_logging()
    return OrchestratorConfig.from_environment(workspace)


def load_specs(files: list[Path], *, search: bool = False, base: str | None = None) -> tuple[list[TaskSpec], list[Problem]]:
    """Load the specs that are right, and name what is wrong with the others; nothing right ends the command.

    With `search` those that ask for no search get the default one; with `base` all are over that one.
    """
    from multilora.spec_files import try_load_task_specs
    from orchestrator.search import searched

    loaded = try_load_task_specs(files)
    if not loaded.specs:
        print_problems(loaded.problems)
        raise typer.Exit(2)
    specs = [_over(spec, base) if base else spec for spec in loaded.specs]
    return [searched(spec) if search else spec for spec in specs], list(loaded.problems)


def _over(spec: TaskSpec, base: str) -> TaskSpec:
    """Return the spec over another base; a folder is relative to where the command runs."""
    if base.startswith(("./", "../", "/")):
        folder = Path(base).resolve()
        if not folder.is_dir():
            raise typer.BadParameter(f"{base}: no such folder; name one in transformers format, or a hub id", param_hint="--base")
        base = str(folder)
    return spec.model_copy(update={"base": spec.base.model_copy(update={"model": base, "revision": None})})


@contextmanager
def errors() -> Iterator[None]:
    """Turn an error that a person can act on into one line and an exit code."""
    try:
        yield
    except MultiLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, SpecError) else 1) from None


def print_json(value: Any) -> None:
    """Print for a person with a terminal, or for a program."""
    print(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def print_problems(problems: Any) -> None:
    """Print what is wrong with files and data."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
