"""The commands around the router of `model: auto`: train, show. Heavy imports sit inside them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from orchestrator.cli_options import Files, Json, Workspace, config_of, errors, load_specs, print_json, print_problems

router_app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, help="The router: which task a text of `auto` goes to.")
EXIT_CODES = {"CLEAR": 0, "ERROR": 1, "BLOCK": 3, "HOLD": 4}


@router_app.command(epilog="Example: orchestrator router train tasks/*.yaml")
def train(
    files: Files,
    precision: Annotated[
        float, typer.Option("--precision", min=0.5, max=1.0, help="Share of routed texts that must go to the right task.")
    ] = 0.95,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Train a router over all tasks that have a champion; it answers if no task that the one before knew lost recall."""
    from orchestrator import tables
    from orchestrator.task_routing import train_router

    specs, problems = load_specs(files)
    if not as_json:
        print_problems(problems)
    with errors():
        result = train_router(specs, config_of(workspace), precision)
    problems += result.problems
    verdicts = {task: f"{verdict.kind}: {'; '.join(verdict.reasons)}" for task, verdict in result.release.verdicts.items()}
    outcome = str(result.release.outcome)
    if as_json:
        print_json(
            {
                "outcome": outcome,
                "is_promoted": result.is_promoted,
                "router": result.version.key,
                "verdicts": verdicts,
                "errors": dict(result.release.errors),
                "left_out": dict(result.left_out),
                "problems": [asdict(problem) for problem in problems],
                **shown(result.card),
            }
        )
    else:
        print_problems(result.problems)
        tables.print_router(result.version.key, result.card)
        for task, words in (verdicts | dict(result.release.errors)).items():
            print(f"{task}: {words}")
        for task, reason in result.left_out.items():
            print(f"left out: {task}: {reason}", file=sys.stderr)
        refused = f"was not promoted; past the gate: orchestrator promote {result.version.key} --force --reason TEXT"
        print(f"{outcome}: {result.version.key} {'answers for auto now' if result.is_promoted else refused}")
    raise typer.Exit(2 if problems else EXIT_CODES[outcome])


@router_app.command(epilog="Example: orchestrator router show --json")
def show(as_json: Json = False, workspace: Workspace = None) -> None:
    """Show where the texts of every task go, measured on the gate splits, and which tasks the router does not know."""
    from orchestrator import tables
    from orchestrator.task_routing import champion_router

    with errors():
        version, card, unknown = champion_router(config_of(workspace))
    if as_json:
        print_json({"router": version.key, "digest": version.digest, "unknown": list(unknown), **shown(card)})
        return
    tables.print_router(version.key, card)
    for task in unknown:
        print(f"the router does not know {task}: orchestrator router train tasks/*.yaml")


def shown(card: Any) -> dict[str, Any]:
    """A router's card for scripts."""
    splits = {"select": card.select, "gate": card.gate}
    return {
        "tasks": card.tasks,
        "base": card.base.model,
        "threshold": card.threshold,
        "temperature": card.temperature,
        **{
            name: {
                "confusion": split.counts,
                "recall": {task: split.recall(task) for task in card.tasks},
                "abstained": split.abstained,
                "precision": split.precision,
            }
            for name, split in splits.items()
        },
    }
