"""The command line: a thin layer over the Python API. Heavy imports sit inside the commands, so that --help is instant.

Exit codes: 0 done and clear, 1 failed, 2 bad usage or bad spec, 3 a task regressed, 4 inconclusive.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli_aliases import aliases_app
from orchestrator.cli_batch import batch_app
from orchestrator.cli_compare import compare_app
from orchestrator.cli_endpoint import endpoint_app
from orchestrator.cli_evidence import evidence_app
from orchestrator.cli_export import export_app
from orchestrator.cli_init import init_app
from orchestrator.cli_keys import keys_app
from orchestrator.cli_options import (
    Base,
    Files,
    Force,
    Json,
    Search,
    Workspace,
    config_of,
    errors,
    load_specs,
    print_json,
    print_problems,
)
from orchestrator.cli_router import router_app
from orchestrator.cli_submit import submit_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train one LoRA adapter per task over one shared base model, judge, promote and serve it.\n\n"
    "Start with: orchestrator submit tasks/*.yaml",
)
app.add_typer(init_app)
app.add_typer(submit_app)
app.add_typer(aliases_app)
app.add_typer(evidence_app)
app.add_typer(compare_app)
app.add_typer(export_app)
app.add_typer(endpoint_app)
app.add_typer(batch_app)
app.add_typer(keys_app, name="key")
app.add_typer(router_app, name="router")
WATCH_EVERY_S = 2.0


@app.command(epilog="Example: orchestrator validate tasks/*.yaml")
def validate(files: Files, as_json: Json = False, workspace: Workspace = None) -> None:
    """Check task specs without loading data or a model; every problem of every file at once.

    Warns where the gate split is too small for the margin, at the flip rate that the workspace's history shows.
    """
    from multilora.spec_files import try_load_task_specs
    from orchestrator.history import flip_rate, read_events
    from orchestrator.power import power_warning

    loaded = try_load_task_specs(files)
    events = read_events(config_of(workspace).history_dir)
    found = {spec.name: power_warning(spec, flip_rate(events, spec.name)) for spec in loaded.specs}
    warnings = {name: warning for name, warning in found.items() if warning}
    if as_json:
        tasks = [spec.name for spec in loaded.specs]
        print_json({"tasks": tasks, "problems": [asdict(p) for p in loaded.problems], "warnings": warnings})
    else:
        print_problems(loaded.problems)
        for name, warning in warnings.items():
            print(f"warning: {name}: {warning}", file=sys.stderr)
        for spec in loaded.specs:
            kind = f"{len(spec.labels)} labels" if spec.labels else "free text"
            print(f"ok  {spec.name}: {kind}, base {spec.base.model}, gate {spec.gate.metric} >= {spec.gate.min:g}")
    raise typer.Exit(2 if loaded.problems else 0)


@app.command(epilog="Example: orchestrator plan tasks/*.yaml --json")
def plan(
    files: Files,
    as_json: Json = False,
    force: Force = False,
    search: Search = False,
    base: Base = None,
    workspace: Workspace = None,
    gpu_price: Annotated[
        float | None, typer.Option("--gpu-price", envvar="ORCHESTRATOR_GPU_PRICE", min=0, help="Price of one GPU for an hour.")
    ] = None,
) -> None:
    """Show what submit would train together, how long, in how much memory and at what price, and stop."""
    from orchestrator import api, tables

    specs, problems = load_specs(files, search=search, base=base)
    with errors():
        planned = api.plan(specs, config_of(workspace), force=force)
    problems += planned.problems
    if as_json:
        print_json(
            {
                "groups": [{**asdict(group), "base": group.base.model_dump()} for group in planned.plan.groups],
                "refused": dict(planned.plan.refused),
                "unchanged": planned.unchanged,
                "makespan_s": planned.plan.makespan_s,
                "gpu_hours": planned.plan.gpu_hours,
                "cost": None if gpu_price is None else planned.plan.gpu_hours * gpu_price,
                "notes": planned.notes,
                "problems": [asdict(problem) for problem in problems],
            }
        )
    else:
        print_problems(problems)
        tables.print_plan(planned, gpu_price)
    raise typer.Exit(2 if problems else 1 if planned.plan.refused else 0)


@app.command(epilog="Example: orchestrator status client-talk --watch")
def status(
    tasks: Annotated[list[str] | None, typer.Argument(help="Task names; all when omitted.")] = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show every change until Ctrl-C.")] = False,
    workspace: Workspace = None,
) -> None:
    """Show every task's champion, versions and last run, and the submissions under way."""
    from orchestrator import background, tables
    from orchestrator.status import status as status_of
    from orchestrator.submissions import Submissions

    config, shown = config_of(workspace), None
    while True:  # typer ends quietly on Ctrl-C
        with errors():
            rows = status_of(config, tasks or ())
        endpoint = background.find(config.serve_file)
        under_way = [(submission.id, state) for submission, state in Submissions(config.workspace).recent()]
        found = {
            "tasks": [asdict(row) for row in rows],
            "submissions": [{"submission": name, **asdict(state)} for name, state in under_way],
            "endpoint": endpoint.url if endpoint else None,
        }
        if found != shown:
            shown = found
            if as_json:
                print_json(found)
            else:
                tables.print_status(rows, under_way, endpoint.url if endpoint else None)
        if not watch:
            return
        sys.stdout.flush()
        time.sleep(WATCH_EVERY_S)


@app.command(epilog="Example: orchestrator report --json")
def report(as_json: Json = False, workspace: Workspace = None) -> None:
    """Show the newest cross-task report and where its HTML page is."""
    from orchestrator import tables
    from orchestrator.report_page import latest_report

    with errors():
        found, html = latest_report(config_of(workspace))
    if as_json:
        print_json(found)
    else:
        tables.print_report(found, html)


@app.command(epilog="Example: orchestrator doctor tasks/*.yaml")
def doctor(
    files: Annotated[list[Path] | None, typer.Argument(help="Specs whose bases to look for.", metavar="TASK.yaml...")] = None,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Check what goes wrong first: disk, memory, MLflow, bases, and versions, storage and GPUs of every node."""
    from orchestrator.doctor import examine

    specs, problems = load_specs(files) if files else ([], [])
    checks = []
    for check in examine(config_of(workspace), specs):
        checks.append(check)
        if not as_json:
            print(f"{'ok  ' if check.is_ok else 'FAIL'}  {check.name}: {check.finding}")
            if not check.is_ok:
                print(f"      Fix: {check.fix}")
    if as_json:
        print_json({"checks": [asdict(check) for check in checks], "problems": [asdict(problem) for problem in problems]})
    else:
        print_problems(problems)
    raise typer.Exit(2 if problems else 0 if all(check.is_ok for check in checks) else 1)


@app.command(epilog="Example: orchestrator schema > tasks/schema.json")
def schema() -> None:
    """Print the JSON schema of task specs, for editors."""
    from multilora.spec import task_json_schema

    print_json(task_json_schema())
