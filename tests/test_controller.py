"""Law 10 with the real controller: killed after any write to the registry and started again, it ends in the same state.

The registry is a fake that forgets nothing; training and evaluation, which need Ray, are their results.
"""

import json
import math
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from fake_registry import FakeRegistry, Killed

from multilora.registry import AdapterVersion
from multilora.spec import TaskSpec
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.curves import Curves
from orchestrator.eval_report import EvalReport, Graded, store_reports
from orchestrator.evaluation import Checked, Evaluation
from orchestrator.group_task import TrainEvent
from orchestrator.prepare import prepare
from orchestrator.release import judge_release
from orchestrator.state import Action, Event, Status
from orchestrator.trainer import GroupTrainer
from orchestrator.training import Training, members_of

OTHER = AdapterVersion("mood", 1, "digest", "other-run", {"run_key": "other-key"})


@pytest.fixture
def task(base_folder, tmp_path):
    """A prepared task over a tiny base."""
    rows = [{"text": f"example {i}", "label": ("yes", "no")[i % 2]} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    spec = TaskSpec(
        name="mood",
        base={"model": str(base_folder("encoder"))},
        data={"train": str(tmp_path / "data.jsonl")},
        instruction="{text} {labels}",
        labels={"yes": None, "no": None},
        train={"epochs": 1},
    )
    ((prepared,), _) = prepare([spec])
    return prepared


@pytest.fixture
def adapter_dir(task, fresh_base, tmp_path):
    """The adapter folder that training this task gives."""
    (member,) = members_of(task, OrchestratorConfig(workspace=tmp_path / "elsewhere"))
    GroupTrainer(fresh_base("encoder"), [member], 1, lambda event: None).train(lambda: (), 1e9)
    return Path(member.adapter_dir)


class Submission:
    """What a submission does with one task, Ray aside: observe, then act until the run is judged."""

    def __init__(self, task, adapter_dir, workspace, registry, num_right):
        self.task, self.trained, self.registry, self.num_right = task, adapter_dir, registry, num_right
        self.config = OrchestratorConfig(workspace=workspace)

    def run(self):
        controller = Controller(self.config, self.registry, lambda update: None)
        work = controller.observe(self.task)
        if work.action is Action.KEEP:
            return work
        if work.action is Action.TRAIN:
            self.handle(controller, self.train(), work)
        if work.action is Action.REGISTER:
            controller.register(work)
        if self.evaluation(controller).is_needed(work):
            systems = {OTHER.key: "champion", "zero-shot": "zero-shot", work.version.key: "candidate"}
            work.reports = {system: self.report(system, self.num_right[kind]) for system, kind in systems.items()}
            store_reports(self.config.answers_file(self.task.run_key), work.reports.values())
            if work.status is Status.REGISTERED:
                controller.move(work, Event.EVALUATED)
        judge_release(controller, [work], Checked())
        return work

    def training(self, controller):
        curves = Curves(self.config.workspace / "curves", self.registry, self.registry)
        return Training(self.config, controller, curves, lambda update: None)

    def handle(self, controller, events, work):
        self.training(controller).handle(events, {self.task.run_key: work})

    def evaluation(self, controller):
        return Evaluation(self.config, self.registry, controller, lambda update: None)

    def train(self):
        """Events of a worker; one that starts again after the adapter was written only says that it is finished."""
        folder = self.config.adapter_dir(self.task.run_key)
        kinds = ["finished"] if folder.exists() else ["started", "progress", "finished"]
        shutil.copytree(self.trained, folder, dirs_exist_ok=True)
        return [TrainEvent(kind, "mood", self.task.run_key, 0, 1, 0) for kind in kinds]

    def report(self, system, num_right):
        rows = enumerate(self.task.dataset.gate)
        other = {"yes": "no", "no": "yes"}
        graded = (Graded(e.id, "", e.label, e.label if row < num_right else other[e.label], 1.0, ()) for row, e in rows)
        return EvalReport("mood", system, "", self.task.dataset.gate_fingerprint, ("yes", "no"), tuple(graded))


def registry_with(champion):
    registry = FakeRegistry()
    if champion:
        registry.versions[OTHER.version], registry.aliases["mood", "champion"] = deepcopy(OTHER), OTHER.version
    return registry


SCENARIOS = {
    "first version": ({"candidate": 20, "zero-shot": 12, "champion": 0}, False, Status.PROMOTED),
    "as good as the champion and as the base": ({"candidate": 20, "zero-shot": 20, "champion": 20}, True, Status.PROMOTED),
    "better than the champion": ({"candidate": 24, "zero-shot": 12, "champion": 10}, True, Status.PROMOTED),
    "worse than the champion": ({"candidate": 10, "zero-shot": 5, "champion": 24}, True, Status.REJECTED),
}


@pytest.mark.parametrize(("num_right", "has_champion", "status"), SCENARIOS.values(), ids=SCENARIOS)
def test_a_submission_ends_with_the_right_aliases(num_right, has_champion, status, task, adapter_dir, tmp_path):
    registry = registry_with(has_champion)
    submission = Submission(task, adapter_dir, tmp_path / "work", registry, num_right)
    work = submission.run()
    assert work.status is status
    candidate = 2 if has_champion else 1
    aliases = {"champion": candidate} if status is Status.PROMOTED else {"champion": 1, "challenger": 2}
    assert registry.aliases == {("mood", alias): version for alias, version in aliases.items()}
    if status is Status.PROMOTED:
        assert registry.versions[candidate].tags["previous_champion"] == ("1" if has_champion else "")
    num_writes = registry.num_writes
    assert submission.run().action is Action.KEEP
    assert registry.num_writes == num_writes


@pytest.mark.parametrize(("num_right", "has_champion", "status"), SCENARIOS.values(), ids=SCENARIOS)
def test_killed_after_any_write_and_started_again_ends_in_the_same_state(
    num_right, has_champion, status, task, adapter_dir, tmp_path
):
    undisturbed = registry_with(has_champion)
    Submission(task, adapter_dir, tmp_path / "undisturbed", undisturbed, num_right).run()
    assert undisturbed.num_writes > 8
    different = []
    for kill_at in range(1, undisturbed.num_writes + 1):
        registry = registry_with(has_champion)
        registry.kill_at = kill_at
        submission = Submission(task, adapter_dir, tmp_path / f"killed-{kill_at}", registry, num_right)
        with pytest.raises(Killed):
            submission.run()
        submission.run()
        if registry.state() != undisturbed.state():
            different.append((kill_at, registry.aliases, registry.runs))
    assert not different


def test_events_that_a_restarted_worker_sends_again_change_nothing(task, adapter_dir, tmp_path):
    registry = registry_with(champion=False)
    submission = Submission(task, adapter_dir, tmp_path / "work", registry, {})
    controller = Controller(submission.config, registry, lambda update: None)
    work = controller.observe(task)
    training = submission.training(controller)
    training.handle(submission.train(), {task.run_key: work})
    assert work.status is Status.REGISTERED
    state = deepcopy(registry.state())
    # Another member of the group killed the worker; Ray Train starts it again with all members.
    training.handle(submission.train(), {task.run_key: work})
    assert (work.status, work.error) == (Status.REGISTERED, "")
    assert registry.state() == state


def test_calibration_errors_are_logged_beside_the_gates_metric(task, adapter_dir, tmp_path):
    registry = registry_with(champion=False)
    submission = Submission(task, adapter_dir, tmp_path / "work", registry, {})
    controller = Controller(submission.config, registry, lambda update: None)
    work = controller.observe(task)
    submission.handle(controller, submission.train(), work)
    # Confidence 0.9 at temperature 1 and 0.75 at temperature 2, always right.
    rows = tuple(Graded(e.id, "", e.label, e.label, 0.75, (math.log(9), 0.0)) for e in task.dataset.gate)
    candidate = EvalReport("mood", work.version.key, "", "gate", ("yes", "no"), rows, temperature=2.0)
    work.reports = {work.version.key: candidate, "zero-shot": replace(candidate, system="zero-shot", temperature=1.0)}
    submission.evaluation(controller)._log_evaluation(work)
    expected = {"gate/accuracy": 1.0, "gate/zero-shot_accuracy": 1.0, "gate/ece": 0.25, "gate/ece_uncalibrated": 0.1}
    assert registry.metrics == pytest.approx(expected)


def test_a_failure_that_a_restarted_worker_reports_again_is_one_failure(task, adapter_dir, tmp_path):
    registry = registry_with(champion=False)
    submission = Submission(task, None, tmp_path / "work", registry, {})
    controller = Controller(submission.config, registry, lambda update: None)
    work = controller.observe(task)
    training = submission.training(controller)
    for _ in range(2):
        events = [TrainEvent(kind, "mood", task.run_key, 0, 1, 0, message="loss is not finite") for kind in ("started", "failed")]
        training.handle(events, {task.run_key: work})
        assert (work.status, work.error) == (Status.FAILED, "loss is not finite")


@pytest.mark.parametrize(
    ("spoil", "champion", "error"),
    [
        (lambda card: card.update(format_version=1), None, ""),
        (lambda card: card.update(family="no family"), OTHER.key, "champion mood@1 cannot be compared: task_card.json .*broken"),
    ],
    ids=["of an older version", "broken"],
)
def test_a_champion_that_cannot_be_read_ends_nobodys_submission(task, adapter_dir, tmp_path, spoil, champion, error):
    """One that no server of this version can serve does not stand in the way; one that is broken is an error of its task."""
    registry = registry_with(champion=True)
    folders = {1: tmp_path / "champion", 2: adapter_dir}
    shutil.copytree(adapter_dir, folders[1])
    card_file = folders[1] / "task_card.json"
    card = json.loads(card_file.read_text(encoding="utf-8"))
    spoil(card)
    card_file.write_text(json.dumps(card), encoding="utf-8")
    registry.download = lambda version, folder: folders[version.version]
    config = OrchestratorConfig(workspace=tmp_path / "workspace")
    controller = Controller(config, registry, lambda update: None)
    work = controller.observe(task)
    work.version = AdapterVersion("mood", 2, "digest", "run", {})
    items = [item for _, item in Evaluation(config, registry, controller, lambda update: None)._items_of(work)]
    assert [item.version for item in items] == [2]
    assert (work.champion and work.champion.key) == champion
    assert bool(work.error) == bool(error)
    assert re.match(error, work.error)
