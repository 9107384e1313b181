"""What a search leaves in the registry, killed after any write or not, and that nothing of it ever sees a gate example."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from fake_registry import FakeRegistry, Killed
from test_controller import Submission

from multilora.artifact import read_artifact
from multilora.registry import TAG_PARENT
from multilora.spec import TaskSpec
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.group_task import TrainEvent
from orchestrator.prepare import prepare
from orchestrator.search import load_trails, winner
from orchestrator.search_record import found_in
from orchestrator.search_run import SearchRun
from orchestrator.state import Action, Status
from orchestrator.trainer import GroupTrainer
from orchestrator.training import members_of, search_of

NUM_RIGHT = {"candidate": 20, "zero-shot": 12, "champion": 0}


@pytest.fixture
def task(base_folder, tmp_path):
    """A prepared task with a search over five settings, of which one or two end early."""
    rows = [{"text": f"example {i}", "label": ("yes", "no")[i % 2]} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    spec = TaskSpec(
        name="mood",
        base={"model": str(base_folder("encoder"))},
        data={"train": str(tmp_path / "data.jsonl")},
        instruction="{text} {labels}",
        labels={"yes": None, "no": None},
        train={"epochs": 2},
        search={"learning_rate": [0.01, 0.05], "rank": [2, 4]},
    )
    ((prepared,), _) = prepare([spec])
    return prepared


class Trained:
    """What a worker told and wrote, once; copied into the workspace of a submission."""

    def __init__(self, task, base, workspace):
        self.config, self.events = OrchestratorConfig(workspace=workspace), []
        self.task = task
        members = members_of(task, self.config)
        run = SearchRun([search_of(task, self.config)], members, self.events.append)
        run.begin()
        GroupTrainer(base, members, 16, run.hear).train(run.stopped, 1e9, run.held)
        epochs = {key: spec.train.epochs for key, spec in task.trainings.items()}
        self.trails = load_trails(self.config.trails_file(task.run_key), epochs)

    def copy_to(self, config):
        key = self.task.run_key
        for file in (config.adapter_dir(key), config.trails_file(key)):
            file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.config.adapter_dir(key), config.adapter_dir(key))
        shutil.copy(self.config.trails_file(key), config.trails_file(key))


@pytest.fixture
def trained(task, fresh_base, tmp_path):
    return Trained(task, fresh_base("encoder"), tmp_path / "elsewhere")


class SearchSubmission(Submission):
    """As `Submission`, of a task that is searched."""

    def handle(self, controller, events, work):
        self.training(controller).handle(events, dict.fromkeys((self.task.run_key, *self.task.trainings), work))

    def train(self):
        if self.config.adapter_dir(self.task.run_key).exists():
            return [TrainEvent("finished", "mood", self.task.run_key, 0, 0, 0)]
        self.trained.copy_to(self.config)
        return self.trained.events


def test_every_candidate_is_a_child_run_with_its_setting_and_the_chosen_one_is_said(task, trained, tmp_path):
    registry = FakeRegistry()
    work = SearchSubmission(task, trained, tmp_path / "work", registry, NUM_RIGHT).run()
    assert work.status is Status.PROMOTED
    parent = work.run.run_id
    children = {key: registry.runs[f"mood-{key}"] for key in task.trainings}
    assert {tags[TAG_PARENT] for tags in children.values()} == {parent}
    assert set(registry.runs) == {parent, *(f"mood-{key}" for key in task.trainings)}
    best = winner(list(trained.trails.values()))
    expected = ["chosen" if i == best else trail.end or "ended early" for i, trail in enumerate(trained.trails.values())]
    assert [tags["candidate"] for tags in children.values()] == expected
    assert {"chosen", "ended early"} <= set(expected)
    for key, spec in task.trainings.items():
        params = registry.params[f"mood-{key}"]
        assert (params["train.learning_rate"], params["lora.rank"]) == (spec.train.learning_rate, spec.lora.rank)
        curve = [(epoch, value) for name, value, epoch, _ in registry.points[f"mood-{key}"] if name == "search/value"]
        assert curve == [(result.epoch, result.value) for result in trained.trails[key].results] != []

    chosen = list(task.trainings.values())[best]
    found = found_in(registry.runs[parent])
    assert found == work.found
    assert (found.chosen["rank"], found.chosen["learning_rate"]) == (chosen.lora.rank, chosen.train.learning_rate)
    assert registry.params[parent]["chosen.rank"] == chosen.lora.rank
    assert found.num_select == len(task.dataset.select)
    # Only the winner's adapter is registered, and it says what it is.
    (version,) = registry.versions.values()
    assert (version.tags["rank"], version.tags["search"]) == (str(chosen.lora.rank), found.sentence)
    assert version.digest == read_artifact(trained.config.adapter_dir(task.run_key)).digest


def test_a_second_submission_of_a_search_trains_nothing_and_knows_what_was_found(task, trained, tmp_path):
    registry = FakeRegistry()
    submission = SearchSubmission(task, trained, tmp_path / "work", registry, NUM_RIGHT)
    first = submission.run()
    num_writes = registry.num_writes
    again = submission.run()
    assert (again.action, again.found) == (Action.KEEP, first.found)
    assert registry.num_writes == num_writes


def test_killed_after_any_write_a_search_ends_in_the_same_state(task, trained, tmp_path):
    undisturbed = FakeRegistry()
    SearchSubmission(task, trained, tmp_path / "undisturbed", undisturbed, NUM_RIGHT).run()
    assert undisturbed.num_writes > 20
    different = []
    for kill_at in range(1, undisturbed.num_writes + 1):
        registry = FakeRegistry()
        registry.kill_at = kill_at
        submission = SearchSubmission(task, trained, tmp_path / f"killed-{kill_at}", registry, NUM_RIGHT)
        with pytest.raises(Killed):
            submission.run()
        submission.run()
        if (registry.state(), registry.params) != (undisturbed.state(), undisturbed.params):
            different.append((kill_at, registry.runs))
    assert not different


def test_progress_counts_the_steps_of_all_candidates(task, trained, tmp_path):
    updates = []
    controller = Controller(OrchestratorConfig(workspace=tmp_path / "work"), FakeRegistry(), updates.append)
    submission = SearchSubmission(task, trained, tmp_path / "work", controller._registry, NUM_RIGHT)
    training, work = submission.training(controller), controller.observe(task)
    training._on_update = updates.append
    by_key = dict.fromkeys((task.run_key, *task.trainings), work)
    shown = []
    for event in trained.events[:-1]:
        updates.clear()
        training.handle([event], by_key)
        shown.append(updates[-1])
    steps = [update.step for update in shown]
    assert steps == sorted(steps)
    assert steps[-1] == sum(event.kind == "progress" for event in trained.events)
    assert {update.num_steps for update in shown} == {task.need.num_steps}
    assert any("select/accuracy" in update.metrics for update in shown)
    assert f"search: candidate {len(task.trainings)} of {len(task.trainings)}" in {update.message for update in shown}


def test_a_search_that_fails_ends_the_runs_of_its_candidates(task, tmp_path):
    registry = FakeRegistry()
    submission = SearchSubmission(task, None, tmp_path / "work", registry, {})
    controller = Controller(submission.config, registry, lambda update: None)
    work = controller.observe(task)
    key, *_ = task.trainings
    submission.handle(controller, [TrainEvent("started", "mood", key, 0, 1, 0)], work)
    controller.fail(work, "worker ended: no result")
    assert work.status is Status.FAILED
    assert registry.runs[f"mood-{key}"]["candidate"] == "not finished"
    assert set(registry.runs) == {work.run.run_id, f"mood-{key}"}
    assert registry.ended == {f"mood-{key}": False, work.run.run_id: False}


def test_force_searches_again(task, trained, tmp_path):
    config = OrchestratorConfig(workspace=tmp_path / "work")
    trained.copy_to(config)
    for key in task.trainings:
        config.checkpoint_file(key).parent.mkdir(parents=True, exist_ok=True)
        config.checkpoint_file(key).touch()
    work = Controller(config, FakeRegistry(), lambda update: None).observe(task, force=True)
    assert work.action is Action.TRAIN
    assert [file for file in config.workspace.rglob("*") if file.is_file()] == []


def test_no_gate_example_reaches_a_worker(task, tmp_path):
    """All that a search can look at is what its worker is given."""
    config = OrchestratorConfig(workspace=tmp_path)
    given = pickle.dumps((members_of(task, config), search_of(task, config)))
    dataset = task.dataset
    assert all(example.columns["text"].encode() + b"\x94" in given for example in (*dataset.train, *dataset.select))
    assert not any(example.columns["text"].encode() + b"\x94" in given for example in dataset.gate)
    assert Path(members_of(task, config)[0].adapter_dir).is_relative_to(tmp_path)
