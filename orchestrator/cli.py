"""The command line: a thin layer over orchestrator.api. Heavy imports sit inside the commands, so that --help is instant.

Exit codes: 0 done and clear, 1 failed, 2 bad usage or bad spec, 3 a task regressed, 4 inconclusive.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from multilora.errors import CapacityError, MultiLoraError, Problem, SpecError

if TYPE_CHECKING:
    from multilora.spec import TaskSpec
    from orchestrator.api import SubmitResult
    from orchestrator.config import OrchestratorConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train one LoRA adapter per task over one shared base model, judge, promote and serve it.\n\n"
    "Start with: orchestrator submit tasks/*.yaml",
)
Files = Annotated[list[Path], typer.Argument(help="Task spec files.", metavar="TASK.yaml...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Workspace = Annotated[
    Path | None, typer.Option("--workspace", help="Folder for all state; default ORCHESTRATOR_HOME, else .orchestrator.")
]
Force = Annotated[bool, typer.Option("--force", help="Train again what has not changed.")]
WATCH_EVERY_S = 2.0
Port = Annotated[int, typer.Option("--port", min=1, max=65535)]
Foreground = Annotated[bool, typer.Option("--foreground", help="Stay in this terminal instead of returning when ready.")]


@app.command(epilog="Example: orchestrator validate tasks/*.yaml")
def validate(files: Files, as_json: Json = False) -> None:
    """Check task specs without loading data or a model; every problem of every file at once."""
    from multilora.spec_files import try_load_task_specs

    loaded = try_load_task_specs(files)
    if as_json:
        _print_json({"tasks": [spec.name for spec in loaded.specs], "problems": [asdict(p) for p in loaded.problems]})
    else:
        _print_problems(loaded.problems)
        for spec in loaded.specs:
            kind = f"{len(spec.labels)} labels" if spec.labels else "free text"
            print(f"ok  {spec.name}: {kind}, base {spec.base.model}, gate {spec.gate.metric} >= {spec.gate.min:g}")
    raise typer.Exit(2 if loaded.problems else 0)


@app.command(epilog="Example: orchestrator plan tasks/*.yaml --json")
def plan(
    files: Files,
    as_json: Json = False,
    force: Force = False,
    workspace: Workspace = None,
    gpu_price: Annotated[
        float | None, typer.Option("--gpu-price", envvar="ORCHESTRATOR_GPU_PRICE", min=0, help="Price of one GPU for an hour.")
    ] = None,
) -> None:
    """Show what submit would train together, how long, in how much memory and at what price, and stop."""
    from orchestrator import api, tables

    specs, problems = _load(files)
    with _errors():
        planned = api.plan(specs, _config(workspace), force=force)
    problems += planned.problems
    if as_json:
        _print_json(
            {
                "groups": [{**asdict(group), "base": group.base.model_dump()} for group in planned.plan.groups],
                "refused": dict(planned.plan.refused),
                "unchanged": planned.unchanged,
                "makespan_s": planned.plan.makespan_s,
                "gpu_hours": planned.plan.gpu_hours,
                "cost": None if gpu_price is None else planned.plan.gpu_hours * gpu_price,
                "problems": [asdict(problem) for problem in problems],
            }
        )
    else:
        _print_problems(problems)
        tables.print_plan(planned, gpu_price)
    raise typer.Exit(2 if problems else 1 if planned.plan.refused else 0)


@app.command(epilog="Example: orchestrator submit tasks/*.yaml")
def submit(
    files: Files,
    as_json: Json = False,
    force: Force = False,
    workspace: Workspace = None,
    checkpoint_every: Annotated[float, typer.Option("--checkpoint-every", min=0.1, help="Seconds between checkpoints.")] = 30.0,
) -> None:
    """Train, register, evaluate, judge and promote what changed; the same command continues after any interruption."""
    from orchestrator import api, tables
    from orchestrator.progress import progress_of

    specs, problems = _load(files)
    if not as_json:
        _print_problems(problems)
    try:
        with _errors(), progress_of([spec.name for spec in specs], as_json=as_json) as progress:
            result = api.submit(
                specs,
                _config(workspace).model_copy(update={"checkpoint_every_s": checkpoint_every}),
                force=force,
                on_update=progress.update,
                on_plan=lambda planned: None if as_json else progress.say(lambda: tables.print_plan(planned)),
            )
    except KeyboardInterrupt:
        print("Stopped. Everything so far is saved; run the same command to continue.", file=sys.stderr)
        raise typer.Exit(1) from None
    problems += result.problems
    if as_json:
        tasks = [{"task": task.task, "state": task.state, "champion": task.champion} for task in result.tasks]
        summary = result.report or {"outcome": str(result.outcome), "tasks": tasks}
        _print_json({**summary, "problems": [asdict(problem) for problem in problems]})
    else:
        _print_problems(result.problems)
        tables.print_result(result)
    raise typer.Exit(_exit_code(result, problems))


@app.command(epilog="Example: orchestrator status client-talk --watch")
def status(
    tasks: Annotated[list[str] | None, typer.Argument(help="Task names; all when omitted.")] = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show every change until Ctrl-C.")] = False,
    workspace: Workspace = None,
) -> None:
    """Show champion, versions and run status of every task."""
    from orchestrator import background, tables
    from orchestrator.status import status as status_of

    config, shown = _config(workspace), None
    while True:  # typer ends quietly on Ctrl-C
        with _errors():
            rows = status_of(config, tasks or ())
        endpoint = background.find(config.serve_file)
        found = {"tasks": [asdict(row) for row in rows], "endpoint": endpoint.url if endpoint else None}
        if found != shown:
            shown = found
            if as_json:
                _print_json(found)
            else:
                tables.print_status(rows, endpoint.url if endpoint else None)
        if not watch:
            return
        sys.stdout.flush()
        time.sleep(WATCH_EVERY_S)


@app.command(epilog="Example: orchestrator report --json")
def report(as_json: Json = False, workspace: Workspace = None) -> None:
    """Show the newest cross-task report and where its HTML page is."""
    from orchestrator import tables
    from orchestrator.report_page import latest_report

    with _errors():
        found, html = latest_report(_config(workspace))
    if as_json:
        _print_json(found)
    else:
        tables.print_report(found, html)


@app.command(epilog="Example: orchestrator serve --port 8000")
def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on; this machine only.")] = "127.0.0.1",
    port: Port = 8000,
    replicas: Annotated[int, typer.Option("--replicas", min=1)] = 1,
    foreground: Foreground = False,
    workspace: Workspace = None,
) -> None:
    """Start the endpoint that answers for every task's champion, and return when it is ready."""
    config = _config(workspace)
    with _errors():
        if foreground:
            from orchestrator.deploy import run_endpoint

            run_endpoint(config, host, port, replicas)
            return
        from orchestrator.services import start_endpoint

        url = start_endpoint(config, host, port, replicas)
    print(f"serving at {url}  (try: curl {url}/v1/models ; log: {config.serve_file.with_suffix('.log')})")


@app.command(epilog='Example: orchestrator query client-talk "I have been thinking about cutting down."')
def query(
    task: Annotated[str, typer.Argument(help="Task name.")],
    texts: Annotated[list[str], typer.Argument(help="One or more texts.")],
    as_json: Json = False,
    url: Annotated[str | None, typer.Option("--url", help="Endpoint; default: the one this workspace started.")] = None,
    workspace: Workspace = None,
) -> None:
    """Ask the running endpoint for a task's answer to each text."""
    from orchestrator import services

    with _errors():
        answer = services.query(task, texts, _config(workspace), url)
    if as_json:
        _print_json(answer)
        return
    for text, result in zip(texts, answer["results"], strict=True):
        if "text" in result:
            print(f"{result['text']}\t({task}@{answer['version']})\t{text}")
            continue
        ranked = sorted(result["probabilities"].items(), key=lambda pair: -pair[1])
        shown = ", ".join(f"{label} {probability:.2f}" for label, probability in ranked[:3])
        print(f"{result['label']}\t({shown}; {task}@{answer['version']})\t{text}")


@app.command(epilog="Example: orchestrator ui --port 5000")
def ui(port: Port = 5000, workspace: Workspace = None) -> None:
    """Start the MLflow registry of this workspace as a web page on this machine, and return when it is ready."""
    from orchestrator.services import start_ui

    with _errors():
        url = start_ui(_config(workspace), port)
    print(f"MLflow at {url}  (registered adapters: {url}/#/models)")


@app.command(epilog="Example: orchestrator stop")
def stop(workspace: Workspace = None) -> None:
    """End the endpoint and the MLflow page that this workspace started."""
    from orchestrator import background

    config = _config(workspace)
    for name, state_file in (("endpoint", config.serve_file), ("MLflow page", config.ui_file)):
        print(f"{name}: {'stopped' if background.stop(state_file) else 'was not running'}")


@app.command(epilog="Example: orchestrator doctor tasks/*.yaml")
def doctor(
    files: Annotated[list[Path] | None, typer.Argument(help="Specs whose bases to look for.", metavar="TASK.yaml...")] = None,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Check what goes wrong first: disk, memory, MLflow, bases, and versions, storage and GPUs of every node."""
    from orchestrator.doctor import examine

    specs, problems = _load(files) if files else ([], [])
    checks = []
    for check in examine(_config(workspace), specs):
        checks.append(check)
        if not as_json:
            print(f"{'ok  ' if check.is_ok else 'FAIL'}  {check.name}: {check.finding}")
            if not check.is_ok:
                print(f"      Fix: {check.fix}")
    if as_json:
        _print_json({"checks": [asdict(check) for check in checks], "problems": [asdict(problem) for problem in problems]})
    else:
        _print_problems(problems)
    raise typer.Exit(2 if problems else 0 if all(check.is_ok for check in checks) else 1)


@app.command(epilog="Example: orchestrator schema > tasks/schema.json")
def schema() -> None:
    """Print the JSON schema of task specs, for editors."""
    from multilora.spec import task_json_schema

    _print_json(task_json_schema())


def _config(workspace: Path | None) -> OrchestratorConfig:
    from multilora.log import setup_logging
    from orchestrator.config import OrchestratorConfig

    setup_logging()
    return OrchestratorConfig.from_environment(workspace)


def _load(files: list[Path]) -> tuple[list[TaskSpec], list[Problem]]:
    """Load what is right and go on with it; nothing to go on with ends the command."""
    from multilora.spec_files import try_load_task_specs

    loaded = try_load_task_specs(files)
    if not loaded.specs:
        _print_problems(loaded.problems)
        raise typer.Exit(2)
    return list(loaded.specs), list(loaded.problems)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn an error that a person can act on into one line and an exit code."""
    try:
        yield
    except MultiLoraError as error:
        _end(error)


def _end(error: MultiLoraError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(1 if isinstance(error, CapacityError) or not isinstance(error, SpecError) else 2) from None


def _exit_code(result: SubmitResult, problems: list[Problem]) -> int:
    if problems:
        return 2
    return {"CLEAR": 0, "ERROR": 1, "BLOCK": 3, "HOLD": 4}[str(result.outcome)]


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def _print_problems(problems: Any) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
