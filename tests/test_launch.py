"""Drivers in processes of their own: followed from the first event on, and ended, however far they are."""

import json
import sys
import threading
import time

import pytest
from test_submissions import order_of, submissions  # noqa: F401  fixture
from typer.testing import CliRunner

from multilora.errors import CapacityError, RequestError
from orchestrator import launch
from orchestrator.cli import app
from orchestrator.submissions import ALL, Submissions, SubmissionStatus


class ThreadRunner:
    """Drives in a thread, by a function of the submission."""

    def __init__(self, drive):
        self.drive, self.thread, self.killed = drive, None, []

    def start(self, submission):
        def run():
            with submission.driven():
                self.drive(submission)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        return "job"

    def is_alive(self, job):
        return bool(job) and job not in self.killed and self.thread.is_alive()

    def kill(self, job):
        self.killed.append(job)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(launch, "POLL_S", 0.01)
    monkeypatch.setattr(launch, "CHECK_EVERY_S", 0.05)


def write(submission, **event):
    with submission.events_file.open("a") as stream:
        stream.write(json.dumps(event) + "\n")


def obedient(submission):
    """Runs until it is asked to stop; ends single tasks on the way."""
    submission.set_state(SubmissionStatus.RUNNING)
    ended = set()
    while True:
        wishes = submission.wishes()
        if ALL in wishes:
            return submission.set_state(SubmissionStatus.CANCELLED, wishes[ALL])
        for task in wishes.keys() - ended:
            ended.add(task)
            write(submission, task=task, status="CANCELLED")
        time.sleep(0.01)


def deaf(submission):
    submission.set_state(SubmissionStatus.RUNNING)
    time.sleep(600)


def test_events_are_followed_from_the_first_to_the_last(submissions, tmp_path):  # noqa: F811
    submission = submissions.create(order_of(tmp_path, "a"))

    def drive(driven):
        driven.set_state(SubmissionStatus.RUNNING)
        for step in range(50):
            write(driven, task="a", step=step)
        driven.set_state(SubmissionStatus.DONE)

    runner = ThreadRunner(drive)
    launch.start(submission, runner)
    assert [event["step"] for event in launch.Follower(submission, runner)] == list(range(50))


def test_a_driver_that_does_not_start_is_named_with_the_end_of_its_log(submissions, tmp_path):  # noqa: F811
    submission = submissions.create(order_of(tmp_path, "a"))
    submission.log_file.write_text("ImportError: no module named so")
    runner = ThreadRunner(lambda driven: None)
    launch.start(submission, runner)
    runner.thread.join()
    with pytest.raises(CapacityError, match=r"(?s)submission-1 ended while starting.*no module named so"):
        list(launch.Follower(submission, runner))
    assert submission.state.status is SubmissionStatus.FAILED


@pytest.mark.parametrize("name", ["submission-1", "a"], ids=["by id", "by its only task"])
def test_a_submission_is_cancelled(name, submissions, tmp_path):  # noqa: F811
    submission, runner = submissions.create(order_of(tmp_path, "a")), ThreadRunner(obedient)
    launch.start(submission, runner)
    assert launch.cancel(submissions, name, runner) == "submission-1: CANCELLED"
    assert submission.state.reason == "cancelled; submit again to continue"
    with pytest.raises(RequestError, match="under way: nothing"):
        launch.cancel(submissions, name, runner)


def test_one_task_is_cancelled_and_the_others_go_on(submissions, tmp_path):  # noqa: F811
    submission, runner = submissions.create(order_of(tmp_path, "a", "b")), ThreadRunner(obedient)
    launch.start(submission, runner)
    assert launch.cancel(submissions, "b", runner) == "b in submission-1: CANCELLED"
    assert submission.wishes() == {"b": "cancelled; submit again to continue"}
    assert submission.state.status is SubmissionStatus.RUNNING
    launch.cancel(submissions, "submission-1", runner)


def test_a_driver_that_does_not_hear_is_ended_by_force(submissions, tmp_path):  # noqa: F811
    submission, runner = submissions.create(order_of(tmp_path, "a")), ThreadRunner(deaf)
    launch.start(submission, runner)
    while submission.state.status is not SubmissionStatus.RUNNING:
        time.sleep(0.01)
    assert launch.cancel(submissions, "submission-1", runner, timeout_s=0.1) == "submission-1: CANCELLED"
    assert "job" in runner.killed
    assert submission.state.reason.endswith("(by force after 0 s)")


def test_a_task_that_does_not_end_says_so(submissions, tmp_path):  # noqa: F811
    submission, runner = submissions.create(order_of(tmp_path, "a", "b")), ThreadRunner(deaf)
    launch.start(submission, runner)
    with pytest.raises(CapacityError, match="has not ended b within 0 s; cancel submission-1 instead"):
        launch.cancel(submissions, "b", runner, timeout_s=0.1)


def test_a_submission_whose_driver_never_came_is_cancelled_at_once(submissions, tmp_path):  # noqa: F811
    submission = submissions.create(order_of(tmp_path, "a"))
    assert launch.cancel(submissions, "submission-1", ThreadRunner(obedient)) == "submission-1: CANCELLED"
    assert submission.state.status is SubmissionStatus.CANCELLED


def test_a_submission_inside_another_program_is_cancelled_and_followed_too(submissions, tmp_path):  # noqa: F811
    submission, runner = submissions.create(order_of(tmp_path, "a")), launch.LocalRunner()
    driver = ThreadRunner(obedient)
    driver.start(submission)  # and no job is written
    assert launch.cancel(submissions, "submission-1", runner) == "submission-1: CANCELLED"
    assert list(launch.Follower(submission, runner)) == []


def test_a_submission_that_somebody_is_about_to_start_is_waited_for(submissions, tmp_path):  # noqa: F811
    submission = submissions.create(order_of(tmp_path, "a"))
    late = ThreadRunner(lambda driven: driven.set_state(SubmissionStatus.DONE))
    threading.Timer(0.5, lambda: late.start(submission)).start()
    assert list(launch.Follower(submission, launch.LocalRunner())) == []
    assert submission.state.status is SubmissionStatus.DONE


def test_a_local_driver_lives_apart_and_is_killed_with_its_children(submissions, tmp_path, monkeypatch):  # noqa: F811
    """The real process, with a driver that sleeps in the place of the real one."""
    submission = submissions.create(order_of(tmp_path, "a"))
    sleeper = tmp_path / "python"
    sleeper.write_text(f"#!/bin/sh\n{sys.executable} -c 'import time; time.sleep(600)'\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    runner = launch.LocalRunner()
    launch.start(submission, runner)
    assert runner.is_alive(submission.job)
    runner.kill(submission.job)
    assert not runner.is_alive(submission.job)
    runner.kill(submission.job)
    assert not runner.is_alive(f"{submission.job.split()[0]} 1.0"), "another process with a reused pid"


def test_logs_and_cancel_speak_json(tmp_path):
    submission = Submissions(tmp_path).create(order_of(tmp_path, "mood", "mail"))
    events = [{"plan": {}}, {"task": "mood", "status": "TRAINING"}, {"task": "mail", "status": "TRAINING"}, {"warning": "away"}]
    submission.events_file.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    shown = CliRunner().invoke(app, ["logs", "mood", "--json", "--workspace", str(tmp_path)])
    assert [json.loads(line) for line in shown.output.splitlines()] == [events[0], events[1], events[3]]
    gone = CliRunner().invoke(app, ["cancel", submission.id, "--json", "--workspace", str(tmp_path)])
    assert json.loads(gone.output)["cancelled"] == submission.id
    assert submission.state.status is SubmissionStatus.CANCELLED
