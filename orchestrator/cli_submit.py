"""The commands around a submission: submit, logs, cancel, and the driver that they start. Heavy imports sit inside them."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from multilora.errors import Problem, RequestError
from orchestrator.cli_options import (
    Base,
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

if TYPE_CHECKING:
    from orchestrator.config import OrchestratorConfig
    from orchestrator.launch import Runner
    from orchestrator.submissions import Submission

submit_app = typer.Typer(rich_markup_mode="rich")
EXIT_INTERRUPTED = 130


@submit_app.command(
    epilog="Examples: orchestrator submit tasks/*.yaml; orchestrator submit tasks/client-talk.yaml --search; "
    "orchestrator submit tasks/*.yaml --base t5-mini"
)
def submit(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Task spec files; with --resume a submission.", metavar="TASK.yaml...")
    ] = None,
    as_json: Json = False,
    force: Force = False,
    search: Search = False,
    base: Base = None,
    workspace: Workspace = None,
    checkpoint_every: Annotated[float, typer.Option("--checkpoint-every", min=0.1, help="Seconds between checkpoints.")] = 30.0,
    max_gpus: Annotated[float | None, typer.Option("--max-gpus", min=0.01, help="Most GPUs that it uses at once.")] = None,
    max_cpus: Annotated[float | None, typer.Option("--max-cpus", min=0.01, help="Most CPU cores likewise.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once; it goes on.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest submission, or the one named; follow it where it runs.")
    ] = False,
) -> None:
    """Train, register, evaluate, judge and promote what changed; the same command continues after any interruption.

    Ctrl-C saves and ends a submission on this machine; on a cluster it leaves it running.
    """
    from orchestrator import launch
    from orchestrator.submissions import Order, Submissions, SubmissionStatus

    if not files and not resume:
        raise typer.BadParameter("name task files, or go on with the newest submission: --resume")
    config = config_of(workspace)
    submissions = Submissions(config.workspace)
    problems: list[Problem] = []
    with errors():
        runner = _runner(config)
        if resume:
            submission = submissions.find(str(files[0]) if files else None)
            if submission.state.status.is_over and submission.state.status is not SubmissionStatus.DONE:
                submission.renew()
                launch.start(submission, runner)
        else:
            specs, problems = load_specs(files or [], search=search, base=base)
            if not as_json:
                print_problems(problems)
            limits = {"checkpoint_every_s": checkpoint_every, "max_gpus": max_gpus, "max_cpus": max_cpus}
            submission = submissions.create(Order(tuple(specs), config.model_copy(update=limits), force))
            launch.start(submission, runner)
        if detach:
            _say_detached(submission, as_json)
            raise typer.Exit(2 if problems else 0)
        _follow(submission, runner, problems, as_json=as_json, is_local=config.ray_address is None)


def _follow(submission: Submission, runner: Runner, problems: list[Problem], *, as_json: bool, is_local: bool) -> NoReturn:
    """Show a submission until it is over, and end as it ends."""
    from orchestrator import launch, tables
    from orchestrator.progress import progress_of
    from orchestrator.submissions import ALL

    events = launch.Follower(submission, runner)
    with nullcontext() if as_json else progress_of(submission.tasks) as progress:
        while True:
            try:
                for event in events:
                    if progress is None:
                        print(json.dumps(event), file=sys.stderr, flush=True)
                    else:
                        tables.show_event(event, progress)
                break
            except KeyboardInterrupt:
                if not is_local:
                    _say_detached(submission, as_json)
                    raise typer.Exit(EXIT_INTERRUPTED) from None
                if submission.wishes():  # the second Ctrl-C
                    raise typer.Exit(EXIT_INTERRUPTED) from None
                submission.wish(ALL, "interrupted; submit again to continue")
                print("stopping: workers save first (Ctrl-C again: do not wait for them)", file=sys.stderr)
    _end_like(submission, problems, as_json=as_json)


def _end_like(submission: Submission, problems: list[Problem], *, as_json: bool) -> NoReturn:
    """Show what a submission came to, and end with the exit code of it."""
    from orchestrator import tables
    from orchestrator.submissions import SubmissionStatus

    state, result = submission.state, submission.result
    if state.status is SubmissionStatus.CANCELLED:
        print("Stopped. Everything so far is saved; run the same command to continue.", file=sys.stderr)
        raise typer.Exit(1)
    if state.status is not SubmissionStatus.DONE or result is None:
        print(f"error: {submission.id} {state.status}: {state.reason}", file=sys.stderr)
        print(f"       log: {submission.log_file}; go on with: orchestrator submit --resume {submission.id}", file=sys.stderr)
        raise typer.Exit(1)
    problems = [*problems, *result.problems]
    if as_json:
        summary = result.report or {"outcome": result.outcome, "tasks": [asdict(task) for task in result.tasks]}
        print_json({**summary, "problems": [asdict(problem) for problem in problems]})
    else:
        print_problems(result.problems)
        tables.print_result(result)
    raise typer.Exit(2 if problems else {"CLEAR": 0, "ERROR": 1, "BLOCK": 3, "HOLD": 4}[result.outcome])


def _say_detached(submission: Submission, as_json: bool) -> None:
    if as_json:
        print_json({"submission": submission.id, "tasks": submission.tasks})
        return
    print(f"{submission.id} goes on by itself. Follow it: orchestrator submit --resume {submission.id}")
    print(f"Look: orchestrator status --watch; orchestrator logs TASK. End it: orchestrator cancel {submission.id}")


def _runner(config: OrchestratorConfig) -> Runner:
    """Drivers run on the cluster where there is one, else here."""
    if config.ray_address is None:
        from orchestrator.launch import LocalRunner

        return LocalRunner()
    from orchestrator.jobs import RayJobs

    return RayJobs(config)


@submit_app.command(hidden=True)
def drive(folder: Path) -> None:
    """Be the driver of a submission; `submit` starts it."""
    from multilora.log import setup_logging
    from orchestrator.session import RaySession
    from orchestrator.submissions import Submission, Submissions

    setup_logging()
    submission = Submission(folder)
    config = submission.order.config
    with RaySession(config) as session:
        if not Submissions(config.workspace).in_the_way(submission, is_shared=config.ray_address is not None):
            session.start()  # while the driver's libraries load

        from orchestrator.driver import Driver

        with errors():
            try:
                Driver(submission, session).run()
            except KeyboardInterrupt:
                raise typer.Exit(1) from None


@submit_app.command(epilog="Example: orchestrator logs client-talk")
def logs(
    task: Annotated[str, typer.Argument(help="Task name.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the submission is over.")] = False,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Show what happened to a task in its newest submission, and what its worker logged (with --json the events alone)."""
    from orchestrator import launch, tables
    from orchestrator.submissions import Submissions

    config = config_of(workspace)
    with errors():
        found = Submissions(config.workspace).with_task(task)
        if not found:
            raise RequestError(f"no submission in {config.workspace} has a task {task}; see: orchestrator status")
        submission = found[0]
        events = launch.Follower(submission, _runner(config)) if follow else submission.events()[0]
        if as_json:
            for event in events:
                if event.get("task") in (task, None):  # None: it concerns every task
                    print(json.dumps(event), flush=True)
        else:
            tables.print_log(submission, task, events)


@submit_app.command(epilog="Example: orchestrator cancel client-talk")
def cancel(
    name: Annotated[str, typer.Argument(help="Task name, or submission-N.")],
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """End a task or a whole submission: workers save, GPUs come back; submitting again continues."""
    from orchestrator import launch
    from orchestrator.submissions import Submissions

    config = config_of(workspace)
    with errors():
        happened = launch.cancel(Submissions(config.workspace), name, _runner(config))
    if as_json:
        print_json({"cancelled": name, "message": happened})
    else:
        print(happened)
