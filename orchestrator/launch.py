"""A submission's driver as a process of its own: start it, follow it, end it. Light: imports no torch, no Ray."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

import psutil

from multilora.errors import CapacityError, RequestError
from orchestrator import background
from orchestrator.submissions import ALL, Submission, Submissions, SubmissionStatus

POLL_S = 0.2
CHECK_EVERY_S = 3.0
"""How often a driver that says nothing yet is looked at."""
CANCEL_TIMEOUT_S = 150.0
"""A driver that has not ended this long after it was asked to is ended by force."""
CANCELLED = "cancelled; submit again to continue"
TASK_IS_OVER = ("CANCELLED", "FAILED", "PROMOTED", "REJECTED")


class Runner(Protocol):
    """Runs drivers."""

    def start(self, submission: Submission) -> str:
        """Start the driver; returns the job's name."""

    def is_alive(self, job: str) -> bool:
        """Whether the driver lives, or will."""

    def kill(self, job: str) -> None:
        """End the driver and with it everything that it holds."""


class LocalRunner:
    """Runs drivers on this machine, apart from the terminal."""

    def start(self, submission: Submission) -> str:
        """Start the driver; the job's name is its pid and start time."""
        argv = [sys.executable, "-m", "orchestrator", "drive", str(submission.folder)]
        with submission.log_file.open("ab") as log:
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        return f"{child.pid} {psutil.Process(child.pid).create_time()}"

    def is_alive(self, job: str) -> bool:
        """Whether this very process lives; a driver inside another program has no job."""
        if not job:
            return False
        pid, created = job.split()
        return background.is_running(int(pid), float(created))

    def kill(self, job: str) -> None:
        """End the process, its Ray and its workers."""
        if self.is_alive(job):
            background.end_family(int(job.split()[0]))


def start(submission: Submission, runner: Runner) -> None:
    """Start a new or renewed submission's driver."""
    submission.set_job(runner.start(submission))


class Follower:
    """Yields a submission's events from the first on until it is over; iterated again after an interrupt, it goes on."""

    def __init__(self, submission: Submission, runner: Runner) -> None:
        self._submission, self._runner = submission, runner
        self._position, self._looked_at = 0, time.monotonic()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises CapacityError where the driver does not start."""
        while True:
            state = self._submission.state  # looked at before the events, so that none is missed
            found, self._position = self._submission.events(self._position)
            yield from found
            if state.status.is_over:
                return
            if state.status is SubmissionStatus.STARTING:
                self._check_start()
            time.sleep(POLL_S)

    def _check_start(self) -> None:
        if time.monotonic() - self._looked_at < CHECK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        submission = self._submission
        # Without a job somebody is about to start it; state tells when that takes too long.
        is_alive = not submission.job or self._runner.is_alive(submission.job)
        if is_alive or submission.state.status is not SubmissionStatus.STARTING:
            return
        end = background.tail(submission.log_file) if submission.log_file.is_file() else ""
        submission.set_state(SubmissionStatus.FAILED, "its driver ended while starting")
        raise CapacityError(f"the driver of {submission.id} ended while starting; end of {submission.log_file}:\n{end}")


def cancel(submissions: Submissions, name: str, runner: Runner, timeout_s: float = CANCEL_TIMEOUT_S) -> str:
    """End a submission, or one task of the submission that trains it, and wait until it is so; returns what happened.

    Workers save first, so that submitting again continues. Raises RequestError where nothing of that name is under way.
    """
    under_way = submissions.open()
    for submission, _ in under_way:
        if name == submission.id:
            return _cancel_all(submission, runner, timeout_s)
    for submission, _ in under_way:
        if name in submission.tasks:
            if len(submission.tasks) == 1:
                return _cancel_all(submission, runner, timeout_s)
            return _cancel_task(submission, name, timeout_s)
    known = ", ".join(submission.id for submission, _ in under_way) or "nothing"
    raise RequestError(f"no task or submission {name} is under way; under way: {known}")


def _cancel_all(submission: Submission, runner: Runner, timeout_s: float) -> str:
    submission.wish(ALL, CANCELLED)
    deadline = time.monotonic() + timeout_s
    while not submission.state.status.is_over:
        if submission.state.status is SubmissionStatus.STARTING and not runner.is_alive(submission.job):
            submission.set_state(SubmissionStatus.CANCELLED, CANCELLED)
        if time.monotonic() > deadline:
            runner.kill(submission.job)
            submission.set_state(SubmissionStatus.CANCELLED, f"{CANCELLED} (by force after {timeout_s:.0f} s)")
        time.sleep(POLL_S)
    # Its resources are free once the driver is gone, not once it says so.
    while runner.is_alive(submission.job) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    runner.kill(submission.job)
    return f"{submission.id}: {submission.state.status}"


def _cancel_task(submission: Submission, task: str, timeout_s: float) -> str:
    submission.wish(task, CANCELLED)
    deadline, position, status = time.monotonic() + timeout_s, 0, ""
    while status not in TASK_IS_OVER:
        found, position = submission.events(position)
        status = next((event["status"] for event in reversed(found) if event.get("task") == task), status)
        if submission.state.status.is_over:
            break
        if time.monotonic() > deadline:
            raise CapacityError(f"{submission.id} has not ended {task} within {timeout_s:.0f} s; cancel {submission.id} instead")
        time.sleep(POLL_S)
    return f"{task} in {submission.id}: {status or submission.state.status}"
