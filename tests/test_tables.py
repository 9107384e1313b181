"""What the command line says of plans, events, logs and status."""

import json
import re

import pytest
from test_plan import MIXED_GPUS, THREE_GPUS, TWO_CPUS, needs

from multilora.spec import ResourceSpec
from orchestrator.config import OrchestratorConfig
from orchestrator.cross import CrossColumn, CrossMatrix
from orchestrator.dataset import Example
from orchestrator.plan import Plan, plan_groups
from orchestrator.rungs import Ladder, Reply, RungAnswers, build_rungs
from orchestrator.state import Update
from orchestrator.status import TaskStatus
from orchestrator.submissions import PLANNED, Order, PlannedSubmission, State, Submissions, SubmissionStatus
from orchestrator.tables import cost_of, device_of, print_ladder, print_log, print_matrix, print_status, show_event


@pytest.mark.parametrize(
    ("plan", "price", "expected"),
    [
        (Plan((), (), 90.0), 2.0, "~1.5 min"),
        (plan_groups(needs(1), TWO_CPUS, 16), 2.0, "~1.1 min"),
        (plan_groups(needs(3, num_train=10_000_000), THREE_GPUS, 16), None, "~133.8 min, ~6.69 GPU-hours"),
        (plan_groups(needs(3, num_train=10_000_000), THREE_GPUS, 16), 2.0, "~133.8 min, ~6.69 GPU-hours, ~13.38 at 2 a GPU-hour"),
    ],
)
def test_cost_of_a_plan(plan, price, expected):
    assert cost_of(plan, price) == expected


@pytest.mark.parametrize(
    ("resources", "size", "expected"),
    [
        ({}, TWO_CPUS, "2 CPU"),
        ({"workers": 2, "cpus": 0.5}, TWO_CPUS, "2 x 0.5 CPU"),
        ({"gpus": 0.5}, THREE_GPUS, "0.5 GPU"),
        ({"workers": 2, "accelerator": "A100"}, MIXED_GPUS, "2 x 1 A100"),
    ],
)
def test_device_of_a_group(resources, size, expected):
    (group,) = plan_groups(needs(1, resources=ResourceSpec(**resources)), size, 16).groups
    assert device_of(group) == expected


def test_status_says_what_a_search_found(capsys):
    rows = [TaskStatus("mood", 1, 1, "PROMOTED", "", "search: 9 candidates"), TaskStatus("plain", 1, 1, "PROMOTED", "")]
    print_status(rows, [], None)
    assert "\nmood: search: 9 candidates\nendpoint: not running" in capsys.readouterr().out


class Shown:
    """A progress that keeps what it is told."""

    def __init__(self):
        self.updates = []

    def update(self, update):
        self.updates.append(update)

    def say(self, show):
        show()


def test_events_become_a_plan_a_warning_or_an_update(capsys):
    planned = PlannedSubmission(Plan((), (("mood", "needs a GPU"),)), ("tone",), notes=("tone: 3 rows are twice in it",))
    shown = Shown()
    show_event({"time": 1.0, "plan": json.loads(PLANNED.dump_json(planned))}, shown)
    show_event({"time": 2.0, "warning": "MLflow is away"}, shown)
    show_event({"time": 3.0, "task": "tone", "status": "TRAINING", "step": 2, "num_steps": 4, "metrics": {}}, shown)
    out, err = capsys.readouterr()
    assert "unchanged, nothing to train: tone" in out
    assert "note: tone: 3 rows are twice in it" in out
    assert err.splitlines() == ["cannot run here: mood: needs a GPU", "warning: MLflow is away"]
    assert shown.updates == [Update("tone", "TRAINING", 2, 4)]


def test_the_log_of_a_task_has_its_events_and_its_workers_log_and_no_others(tmp_path, capsys):
    submissions = Submissions(tmp_path)
    submission = submissions.create(Order((), OrchestratorConfig(workspace=tmp_path)))
    submission.set_state(SubmissionStatus.DONE, "CLEAR")
    groups = [{"group_id": "aa", "members": ["mood", "tone"]}, {"group_id": "bb", "members": ["other"]}]
    submission.worker_log("aa").write_text("out of memory, going on\n")
    submission.worker_log("bb").write_text("not this one\n")
    events = [
        {"time": 0.0, "plan": {"plan": {"groups": groups}}},
        {"time": 1.0, "task": "mood", "status": "TRAINING", "step": 8, "num_steps": 9, "metrics": {"train/loss": 0.5}},
        {"time": 2.0, "task": "other", "status": "FAILED"},
        {"time": 3.0, "warning": "MLflow is away"},
        {"time": 4.0, "task": "mood", "status": "PROMOTED", "message": "first version"},
    ]
    print_log(submission, "mood", events)
    out = capsys.readouterr().out
    lines = [line.partition(" ")[2].partition(" ")[2] for line in out.splitlines()[1:4]]
    assert out.startswith("submission-1 DONE\n")
    assert lines == ["mood: TRAINING step 8/9 train/loss=0.5", "warning: MLflow is away", "mood: PROMOTED  first version"]
    assert out.endswith("worker-aa.log\nout of memory, going on\n")


def test_status_says_what_runs_and_since_when(capsys):
    running = ("submission-7", State(SubmissionStatus.RUNNING, "", 0.0))
    print_status([TaskStatus("mood", 3, 4, "PROMOTED", "better")], [running], None)
    out = capsys.readouterr().out
    assert re.search(r"mood +v3 +4 +PROMOTED +better", out)
    assert re.search(r"submission-7: RUNNING since 19\d\d-\d\d-\d\d \d\d:\d\d:\d\d", out)
    assert "endpoint: not running" in out


def test_a_matrix_shows_every_adapter_on_every_task_and_what_follows(capsys):
    right = {"base": 5, "a@1": 9, "b@2": None}
    columns = [CrossColumn("a", 10, right), CrossColumn("b", 20, {"base": 10, "a@1": 12, "b@2": 16})]
    print_matrix(CrossMatrix.of("tiny base", {"a": 1, "b": 2}, columns, ""))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["base", "50.0", "%", "50.0", "%"] in lines
    assert ["a@1", "90.0", "%", "60.0", "%"] in lines
    assert ["b@2", "-", "80.0", "%"] in lines
    assert ["best", "other", "-", "a@1"] in lines
    assert ["own", "minus", "best", "other", "-", "+20.0"] in lines
    assert "forward transfer: +10.0 points against the base, mean of 1 pair" in " ".join(lines[-1])


def test_a_ladder_shows_every_rung_and_why_one_is_missing(capsys):
    gate = [Example("1", {"text": "x"}, "yes"), Example("2", {"text": "y"}, "no")]
    found = [
        RungAnswers("zero-shot base", "transformers", (Reply("yes", (0.9, 0.1)), Reply("yes", (0.6, 0.4)))),
        RungAnswers("offline", "PEFT", (Reply("yes", (0.9, 0.1)), Reply("no", (0.2, 0.8)))),
        RungAnswers("engine alone", "engine", skipped="wrong base", is_fault=True),
        RungAnswers("endpoint", "HTTP", skipped="start it with: orchestrator serve"),
    ]
    print_ladder(Ladder("a", "a@1", "tiny", 2, 9, build_rungs(found, gate), ""))
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["offline", "PEFT", "2", "100.0", "%", "0", "1", "1", "4.0e-01", "training"] in lines
    assert ["engine", "alone", "FAILED", "engine"] in lines
    assert "endpoint: start it with: orchestrator serve\n" in shown
    assert "a@1 on 2 of 9 gate examples: training changes +50.0 points" in shown
