"""A release is judged as a whole, whenever its driver is killed, and leaves event, report and metrics."""

import json
from dataclasses import replace
from itertools import chain, repeat

import pytest
from fake_registry import FakeRegistry, Killed

from multilora.registry import AdapterVersion
from multilora.spec import TaskSpec
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.eval_report import EvalReport, Graded, load_reports, store_reports
from orchestrator.evaluation import Checked
from orchestrator.history import CellState, read_events
from orchestrator.judge import Outcome, VerdictKind
from orchestrator.prepare import prepare
from orchestrator.release import ReleaseRecord, judge_release
from orchestrator.state import Action, Status

NUM_GATE = 100
FINGERPRINT = {"adapter": "one", "engine": "1"}


@pytest.fixture
def tasks(base_folder, tmp_path):
    """Two prepared tasks with a hundred gate examples each."""

    def spec(name):
        data = {}
        for split, count in {"train": 20, "select": 10, "gate": NUM_GATE}.items():
            rows = [{"text": f"{name} {split} {i}", "label": ("yes", "no")[i % 2]} for i in range(count)]
            file = tmp_path / f"{name}-{split}.jsonl"
            file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            data[split] = str(file)
        labels = {"yes": None, "no": None}
        base = {"model": str(base_folder("encoder"))}
        return TaskSpec(name=name, base=base, data=data, instruction="{text} {labels}", labels=labels)

    prepared, problems = prepare([spec("mood"), spec("mail")])
    assert not problems
    return prepared


def answers(task, system, num_losses=0, num_wins=0, fingerprint=FINGERPRINT):
    """A system that is right but for the first 30 examples, then loses and wins so many."""
    rights = [False] * 30 + [True] * (NUM_GATE - 30)
    rights[:num_wins] = [True] * num_wins
    rights[30 : 30 + num_losses] = [False] * num_losses
    other = {"yes": "no", "no": "yes"}
    gate = task.dataset.gate
    rows = (
        Graded(e.id, "", e.label, e.label if is_right else other[e.label], 0.9, ())
        for e, is_right in zip(gate, rights, strict=True)
    )
    return EvalReport(task.spec.name, system, f"digest {system}", task.dataset.gate_fingerprint, ("yes", "no"), tuple(rows),
                      scorer_version=1, fingerprint=fingerprint)  # fmt: skip


FLIPS = {"mood": (0, 5), "mail": (7, 1)}
"""(losses, wins) of the candidates: alone `mail` would be REGRESSED (p = .0195), beside another changed task it is not."""


class Workspace:
    """Two tasks whose candidates are evaluated and whose champions answer."""

    def __init__(self, tasks, folder):
        self.tasks, self.config, self.registry = tasks, OrchestratorConfig(workspace=folder), FakeRegistry()
        for number, task in enumerate(tasks, start=1):
            name, run_id = task.spec.name, f"{task.spec.name}-{task.run_key}"
            self.registry.runs[run_id] = {"status": "EVALUATED"}
            old = AdapterVersion(name, number, "old", "old-run", {"run_key": f"old-{name}"})
            new = AdapterVersion(name, number + 10, "new", run_id, {"run_key": task.run_key})
            self.registry.versions |= {old.version: old, new.version: new}
            self.registry.aliases |= {(name, "champion"): old.version, (name, "challenger"): new.version}
            fingerprint = {**FINGERPRINT, "adapter": "two"}
            reports = [answers(task, old.key), answers(task, new.key, *FLIPS[name], fingerprint), answers(task, "zero-shot", 30)]
            store_reports(self.config.answers_file(task.run_key), reports)

    def submit(self):
        """What a submission does from here on, Ray aside."""
        controller = Controller(self.config, self.registry, lambda update: None)
        works = [controller.observe(task) for task in self.tasks]
        release = judge_release(controller, [work for work in works if work.action is not Action.KEEP], Checked())
        return controller, works, release

    def state(self):
        return {**self.registry.state(), "versions": {n: dict(v.tags) for n, v in self.registry.versions.items()}}


def test_tasks_of_a_release_are_corrected_for_together(tasks, tmp_path):
    _, works, release = Workspace(tasks, tmp_path / "both").submit()
    assert {work.task: (work.status, work.verdict.kind) for work in works} == {
        "mood": (Status.PROMOTED, VerdictKind.NON_INFERIOR),
        "mail": (Status.REJECTED, VerdictKind.INCONCLUSIVE),
    }
    assert release.outcome is Outcome.HOLD
    _, (work,), alone = Workspace(tasks[1:], tmp_path / "alone").submit()
    assert (work.status, work.verdict.kind, alone.outcome) == (Status.REJECTED, VerdictKind.REGRESSED, Outcome.BLOCK)


def test_killed_anywhere_a_release_ends_with_the_same_verdicts(tasks, tmp_path):
    """Though the tasks that were done before the kill are not judged again, so that fewer are judged together."""
    undisturbed = Workspace(tasks, tmp_path / "undisturbed")
    undisturbed.submit()
    num_writes = undisturbed.registry.num_writes
    assert num_writes > 10
    for kill_at in range(1, num_writes + 1):
        workspace = Workspace(tasks, tmp_path / f"killed-{kill_at}")
        workspace.registry.kill_at = kill_at
        with pytest.raises(Killed):
            workspace.submit()
        workspace.submit()
        assert workspace.state() == undisturbed.state(), kill_at


def test_a_kept_verdict_is_not_used_against_another_champion(tasks, tmp_path):
    workspace = Workspace(tasks[1:], tmp_path)
    controller = Controller(workspace.config, workspace.registry, lambda update: None)
    work = controller.observe(tasks[1])
    controller.evidence_of(work)
    (verdict,) = judge_release(controller, [work], Checked()).verdicts.values()
    assert controller.stored_verdict(work) == verdict
    work.reference = replace(work.reference, system="mail@7")
    assert controller.stored_verdict(work) is None


def record(workspace, controller, works, release, checked=None, contamination=None):
    checked = checked or Checked()
    return ReleaseRecord(workspace.config, workspace.registry, contamination or {}).write(controller, works, checked, release, {})


def test_a_release_leaves_event_report_and_metrics(tasks, tmp_path):
    workspace = Workspace(tasks, tmp_path)
    result = record(workspace, *workspace.submit(), contamination={"mail": ("training examples are in the gate split of mood",)})
    (event,) = read_events(workspace.config.history_dir)
    assert (event.kind, event.outcome, result.outcome) == ("submit", "HOLD", "HOLD")
    assert event.consulted == {task.spec.name: task.dataset.gate_fingerprint for task in tasks}
    assert event.flip_rates == {"mood": 0.05, "mail": 0.08}
    cells = {task: (cell.state, cell.version, cell.value, cell.zero_shot) for task, cell in event.cells.items()}
    assert cells == {"mood": (CellState.MEASURED, "mood@11", 0.75, 0.4), "mail": (CellState.MEASURED, "mail@2", 0.7, 0.4)}
    ((files, metrics, tags),) = workspace.registry.reports.values()
    assert {"report.html", "report.json", "report.md", "junit.xml", "flips.jsonl"} <= set(files)
    assert (metrics["reg/mood/delta"], metrics["reg/mail/num_losses"]) == (pytest.approx(0.05), 7)
    assert tags["outcome"] == "HOLD"
    by_name = {task["task"]: task for task in result.report["tasks"]}
    assert by_name["mail"]["verdict"]["p_holm"] == pytest.approx(2 * (1 + 8 / 2) / 256)
    assert "gate split of mood" in json.dumps(by_name["mail"])


def test_an_event_that_a_kill_left_out_is_made_up_for_by_the_next(tasks, tmp_path):
    """The aliases moved and the driver died: the next event knows the new champion's answers all the same."""
    workspace = Workspace(tasks, tmp_path)
    workspace.submit()
    controller, works, release = workspace.submit()
    assert all(work.action is Action.KEEP for work in works)
    for task in tasks:  # as Evaluation keeps them
        version = workspace.registry.by_alias(task.spec.name, "champion")
        store_reports(workspace.config.answers_file(version.tags["run_key"]), [answers(task, version.key)])
    record(workspace, controller, works, release)
    (event,) = read_events(workspace.config.history_dir)
    states = {task: (cell.state, cell.version) for task, cell in event.cells.items()}
    assert states == {"mood": (CellState.CARRIED, "mood@11"), "mail": (CellState.CARRIED, "mail@2")}


@pytest.mark.parametrize(("num_losses", "outcome"), [(0, "CLEAR"), (2, "HOLD"), (12, "BLOCK")])
def test_a_champion_that_another_engine_makes_answer_otherwise_is_judged(tasks, tmp_path, num_losses, outcome):
    workspace = Workspace(tasks[:1], tmp_path)
    mood = tasks[0]
    version = workspace.registry.by_alias("mood", "champion")
    before, after = answers(mood, version.key), answers(mood, version.key, num_losses, fingerprint={**FINGERPRINT, "engine": "2"})
    checked = Checked(rechecked={"mood": (version, before, after)})
    controller = Controller(workspace.config, workspace.registry, lambda update: None)
    release = judge_release(controller, [], checked)
    result = record(workspace, controller, [], release, checked)
    assert (release.outcome, result.outcome) == (Outcome(outcome), outcome)
    assert workspace.registry.by_alias("mood", "champion") == version
    (event,) = read_events(workspace.config.history_dir)
    assert (event.cells["mood"].state, event.cells["mood"].value) == (CellState.MEASURED, pytest.approx(0.7 - num_losses / 100))
    (shown,) = result.report["tasks"]
    assert shown["changed"] == ["engine"]


def test_a_champion_of_the_submission_that_changed_or_failed_is_reported_once(tasks, tmp_path):
    """Its task was submitted, had nothing to train, and is still news."""
    workspace = Workspace(tasks, tmp_path)
    mood, mail = tasks
    controller, works, _ = workspace.submit()
    for work in works:
        work.verdict = None  # as in a later submission, which keeps both
    version = workspace.registry.by_alias("mood", "champion")
    before, after = answers(mood, version.key), answers(mood, version.key, 12, fingerprint={**FINGERPRINT, "engine": "2"})
    failed = {"mail": (workspace.registry.by_alias("mail", "champion"), "its base is another one")}
    checked = Checked(rechecked={"mood": (version, before, after)}, failed=failed)
    result = record(workspace, controller, works, judge_release(controller, [], checked), checked)
    states = {task["task"]: task["decision"] for task in result.report["tasks"]}
    assert states == {"mail": "failed", "mood": "regressed in production"}
    assert len(result.report["tasks"]) == 2
    (event,) = read_events(workspace.config.history_dir)
    assert (event.cells["mail"].state, event.cells["mail"].value) == (CellState.MISSING, None)
    # Once it can be bound again, its value is back.
    store_reports(workspace.config.answers_file("old-mail"), [answers(mail, "mail@2")])
    checked = Checked(verified={"mail": failed["mail"][0]})
    record(workspace, controller, works, judge_release(controller, [], checked), checked)
    assert read_events(workspace.config.history_dir)[-1].cells["mail"].state is CellState.CANARY


def test_a_consulted_gate_split_is_counted(tasks, tmp_path):
    workspace = Workspace(tasks[:1], tmp_path)
    counts = []
    for _ in range(3):
        workspace.registry.runs[f"mood-{tasks[0].run_key}"]["status"] = "EVALUATED"
        result = record(workspace, *workspace.submit())
        counts.append(result.report["tasks"][0]["num_consults"])
    assert counts == [1, 2, 3]


def test_every_evaluation_is_kept_and_the_newest_counts(tasks, tmp_path):
    file = tmp_path / "answers.json"
    first, second = answers(tasks[0], "mood@1"), answers(tasks[0], "mood@1", 3, fingerprint={"engine": "2"})
    for report in chain([first], repeat(second, 2)):
        store_reports(file, [report])
    assert len(json.loads(file.read_text(encoding="utf-8"))) == 2
    assert load_reports(file) == {"mood@1": second}
