"""The command that holds prompting, fine-tuning and their cost side by side. Heavy imports sit inside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli_options import Json, Workspace, config_of, errors, print_json

if TYPE_CHECKING:
    from orchestrator.compare_result import MethodComparison
    from orchestrator.methods import Part

compare_app = typer.Typer(rich_markup_mode="rich")
NUM_SEEDS, SIZES = 3, "25,50,100,200,500"
QUICK_SEEDS, QUICK_SIZES = 1, "25,100"
EXIT_INTERRUPTED = 130


@compare_app.command(epilog="Example: orchestrator compare tasks/client-talk.yaml --parts prompting,curve --sizes 25,50,100")
def compare(
    task: Annotated[str, typer.Argument(help="Task spec file; with --show its name will do.", metavar="TASK.yaml")],
    parts: Annotated[
        str | None, typer.Option("--parts", help="Some of baselines, prompting, variants, alone, curve, merged; default: all.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help=f"Runs of each method; default {NUM_SEEDS}.")] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help=f"Examples of the learning curve; default {SIZES}.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_SEEDS} seed, sizes {QUICK_SIZES}.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the newest stored comparison of the task and run nothing.")] = False,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table as Markdown into this file, too.")] = None,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Compare prompts, baselines and adapters on the task's own gate examples, with what each costs, and say what to do.

    Every row is stored as it comes: the same command goes on after a kill, and runs only the parts that are missing.
    """
    config = config_of(workspace)
    if show:
        from multilora.spec_files import load_task_specs
        from orchestrator.compare_store import newest

        with errors():
            name = load_task_specs([task])[0].name if task.endswith((".yaml", ".yml")) else task
            store = newest(config.compare_dir, name)
            _report(store.load(), store.folder, markdown, as_json)
        return

    chosen = chosen_parts(parts)
    wanted = chosen_sizes(sizes if sizes is not None else QUICK_SIZES if quick else SIZES)
    num_seeds = seeds or (QUICK_SEEDS if quick else NUM_SEEDS)
    from orchestrator.compare import compare as run

    if quick:
        say(f"quick: {num_seeds} seed{'' if num_seeds == 1 else 's'}, sizes {', '.join(map(str, wanted))}: a first look")
    with errors():
        try:
            found = run(config, Path(task), parts=chosen, seeds=range(num_seeds), sizes=wanted, on_progress=say)
        except KeyboardInterrupt:
            say("interrupted: every row so far is stored, the same command goes on")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        _report(found, config.compare_dir / found.order.task / found.order.key, markdown, as_json)
    raise typer.Exit(1 if any(part in found.failed for part in chosen) else 0)


def chosen_parts(text: str | None) -> list[Part]:
    """Parts by name; all where nothing is said."""
    from orchestrator.compare_result import PARTS

    names = [name.strip() for name in text.split(",")] if text is not None else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}", param_hint="--parts")
    return [part for part in PARTS if part in names]


def chosen_sizes(text: str) -> list[int]:
    """Numbers of examples."""
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if not name.isdecimal() or int(name) < 1]:
        raise typer.BadParameter(f"{wrong[0]!r} is no number of examples; give such as {SIZES}", param_hint="--sizes")
    return sorted({int(name) for name in names})


def say(message: str) -> None:
    """Progress."""
    print(message, file=sys.stderr, flush=True)


def _report(found: MethodComparison, folder: Path, markdown: Path | None, as_json: bool) -> None:
    from orchestrator import compare_page, compare_table
    from orchestrator.files import write_whole
    from orchestrator.report_page import encoded

    if markdown:
        write_whole(markdown, encoded(compare_page.markdown(found)))
    if as_json:
        print_json({**compare_page.as_json(found), "folder": str(folder)})
    else:
        compare_table.print_comparison(found)
        page = folder / compare_page.PAGE
        print(f"page: {page}" if page.is_file() else f"rows: {folder}")
