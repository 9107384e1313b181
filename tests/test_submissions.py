"""Submissions on disk: what is written is read back, a dead driver is noticed, and whose turn it is."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from multilora.errors import CapacityError, Problem, RequestError
from multilora.spec import TaskSpec
from orchestrator import submissions as module
from orchestrator.config import OrchestratorConfig
from orchestrator.plan import Plan
from orchestrator.submissions import (
    ALL,
    PLANNED,
    Order,
    PlannedSubmission,
    Submissions,
    SubmissionStatus,
    SubmitResult,
    TaskResult,
)


def order_of(workspace, *tasks):
    specs = [
        TaskSpec(
            name=task,
            base={"model": "/base"},
            data={"train": {"hub": "x", "split": "train"}},
            instruction="{labels} {text}",
            labels={"yes": "good", "no": None},
            lora={"layers": [0, -1], "target_modules": ["q", "v"]},
            resources={"gpus": 0.5, "priority": 3},
        )
        for task in tasks
    ]
    return Order(tuple(specs), OrchestratorConfig(workspace=workspace, max_gpus=2.0), force=True)


@pytest.fixture
def submissions(tmp_path):
    return Submissions(tmp_path)


@pytest.fixture
def driver():
    """Starts processes that drive a submission until they are told to end."""
    started = []

    def start(submission):
        code = (
            "import sys, time; from pathlib import Path; from orchestrator.submissions import Submission, SubmissionStatus\n"
            "submission = Submission(Path(sys.argv[1]))\n"
            "with submission.driven():\n"
            "    submission.set_state(SubmissionStatus.RUNNING); print('ready', flush=True); time.sleep(600)"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(submission.folder)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_is_written_is_read_back(submissions, tmp_path):
    order = order_of(tmp_path, "mood", "tone")
    submission = submissions.create(order)
    assert submission.order == order
    assert (submission.id, submission.number, submission.tasks) == ("submission-1", 1, ("mood", "tone"))
    assert submission.result is None
    problems = (Problem("mood.yaml", "data", "1", "rule", "fix"),)
    result = SubmitResult((TaskResult("mood", "judged", "mood@1"),), problems, "CLEAR", tmp_path / "report.html")
    submission.set_result(result)
    assert submission.result == result
    planned = PlannedSubmission(Plan((), (("mood", "too large"),), 3.0), ("tone",), problems, {"mood": 7}, ("mood: short",))
    assert PLANNED.validate_json(PLANNED.dump_json(planned)) == planned


def test_submissions_are_numbered_as_they_come_and_found_by_name_and_task(submissions, tmp_path):
    first, second, third = (submissions.create(order_of(tmp_path, *tasks)) for tasks in (["a", "b"], ["b"], ["c"]))
    assert submissions.all() == [first, second, third]
    assert submissions.find() == third
    assert submissions.find("submission-1") == first
    assert submissions.with_task("b") == [second, first]
    with pytest.raises(RequestError, match="no submission-9 in"):
        submissions.find("submission-9")


def test_events_are_read_from_where_one_was_and_never_half(submissions, tmp_path):
    submission = submissions.create(order_of(tmp_path, "a"))
    submission.events_file.write_text('{"task": "a"}\n{"task": ')
    found, position = submission.events()
    assert found == [{"task": "a"}]
    assert submission.events(position) == ([], position)
    with submission.events_file.open("a") as stream:
        stream.write('"b"}\n')
    assert submission.events(position)[0] == [{"task": "b"}]


def test_a_driver_that_is_killed_is_noticed_at_once(submissions, tmp_path, driver):
    submission = submissions.create(order_of(tmp_path, "a"))
    assert submission.state.status is SubmissionStatus.STARTING
    process = driver(submission)
    assert submission.state.status is SubmissionStatus.RUNNING
    with pytest.raises(CapacityError, match="driven by another process"), submission.driven():
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert submission.state.status is SubmissionStatus.LOST
    assert submission.state.reason == "its driver died while RUNNING"
    with submission.driven():
        submission.set_state(SubmissionStatus.DONE, "CLEAR")
    assert (submission.state.status, submission.state.reason) == (SubmissionStatus.DONE, "CLEAR")


def test_a_driver_that_never_comes_to_life_is_lost_after_a_while(submissions, tmp_path, monkeypatch):
    submission = submissions.create(order_of(tmp_path, "a"))
    monkeypatch.setattr(module, "START_TIMEOUT_S", -1.0)
    assert submission.state.status is SubmissionStatus.LOST


def test_wishes_are_heard_until_the_submission_is_renewed(submissions, tmp_path):
    submission = submissions.create(order_of(tmp_path, "a", "b"))
    submission.wish("a", "cancelled")
    submission.wish(ALL, "interrupted")
    assert submission.wishes() == {"a": "cancelled", ALL: "interrupted"}
    submission.set_state(SubmissionStatus.CANCELLED)
    submission.renew()
    assert submission.wishes() == {}
    assert submission.state.status is SubmissionStatus.STARTING


@pytest.mark.parametrize(
    ("is_shared", "tasks", "is_in_the_way"),
    [(False, ["other"], True), (True, ["other"], False), (True, ["other", "b"], True)],
    ids=["one machine", "a cluster", "a cluster and a task in common"],
)
def test_what_a_submission_waits_for(is_shared, tasks, is_in_the_way, submissions, tmp_path, driver):
    first, second, third = (submissions.create(order_of(tmp_path, *names)) for names in (["a", "b"], tasks, ["a"]))
    driver(first)
    waits_for = submissions.in_the_way(second, is_shared)
    assert waits_for == ([first] if is_in_the_way else [])
    # A later one that waits is not waited for, one that runs is: this one may have been resumed.
    assert third not in waits_for
    driver(third)
    assert (third in submissions.in_the_way(first, is_shared=True)) is True
    assert first in submissions.in_the_way(third, is_shared=True)


def test_what_is_over_or_lost_is_in_nobodys_way(submissions, tmp_path, driver):
    first, second = (submissions.create(order_of(tmp_path, "a")) for _ in range(2))
    process = driver(first)
    process.kill()
    process.wait()
    assert submissions.in_the_way(second, is_shared=False) == []
    assert [submission.id for submission, _ in submissions.open()] == ["submission-2"]
    assert [submission.id for submission, _ in submissions.recent()] == ["submission-1", "submission-2"]


def test_what_is_over_is_not_looked_at_until_it_is_renewed(submissions, tmp_path):
    first, second = (submissions.create(order_of(tmp_path, "a")) for _ in range(2))
    first.set_state(SubmissionStatus.DONE)
    (first.folder / "state.json").rename(first.folder / "hidden")  # reading it would raise
    assert [submission for submission, _ in submissions.open()] == [second]
    (first.folder / "hidden").rename(first.folder / "state.json")
    first.renew()
    assert [submission for submission, _ in submissions.open()] == [first, second]


def test_submissions_created_at_once_have_numbers_of_their_own(submissions, tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from test_submissions import order_of, Submissions\n"
        "root = Path(sys.argv[1])\n"
        "for _ in range(5): print(Submissions(root).create(order_of(root, 'a')).id)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = [name for process in processes for name in process.communicate(timeout=60)[0].split()]
    assert sorted(names) == sorted(f"submission-{number}" for number in range(1, 16))


def test_since_is_when_the_state_changed(submissions, tmp_path):
    submission = submissions.create(order_of(tmp_path, "a"))
    before = time.time()
    submission.set_state(SubmissionStatus.FAILED, "no room")
    state = submission.state
    assert before <= state.since <= time.time()
    assert replace(state, since=0.0) == module.State(SubmissionStatus.FAILED, "no room")
