"""What people decide about versions moves the alias, keeps who, when and why, and is not undone by the next submission."""

import getpass
import json

import pytest
from tiny_adapters import CARDS
from typer.testing import CliRunner

from multilora.errors import RequestError
from multilora.registry import CHALLENGER, CHAMPION, Registry
from multilora.spec import TaskSpec
from orchestrator.aliases import Aliases
from orchestrator.cli import app
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import PYFUNC_CODE
from orchestrator.eval_report import EvalReport, Graded, store_reports
from orchestrator.history import CellState, read_events
from orchestrator.state import Status
from orchestrator.submissions import Order, Submissions, SubmissionStatus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tiny_adapter, tmp_path_factory):
    """A workspace with three versions of a task: 1 was champion, 2 is, 3 was refused; accuracies .6, .8, .5."""
    config = OrchestratorConfig(workspace=tmp_path_factory.mktemp("workspace"))
    registry = Registry(config.registry_uri, config.artifact_root)
    states = {1: ("PROMOTED", 6), 2: ("PROMOTED", 8), 3: ("REJECTED", 5)}
    for number, (status, num_right) in states.items():
        artifact = tiny_adapter("encoder", CARDS, seed=number)
        run = registry.start_run("cards", f"key-{number}", {}, {"status": status})
        tags = {"run_key": f"key-{number}", "gate": '{"metric": "accuracy"}', "previous_champion": "1" if number == 2 else ""}
        version = registry.register(run, artifact.folder, artifact.digest, PYFUNC_CODE, "cards", tags)
        rows = tuple(Graded(str(i), "", "rate", "rate" if i < num_right else "card lost", 0.9, ()) for i in range(10))
        report = EvalReport(
            "cards", version.key, artifact.digest, "gate", ("card lost", "rate"), rows, fingerprint={"adapter": "a"}
        )
        store_reports(config.answers_file(f"key-{number}"), [report])
        registry.tag_version(
            version, {"verdict": "REGRESSED" if number == 3 else "NON_INFERIOR", "accuracy": f"{num_right / 10}"}
        )
        registry.set_alias(version, CHALLENGER if number == 3 else CHAMPION)
    return config, registry


def status_of(registry, number):
    return next(run.status for run in registry.runs("cards") if run.run_key == f"key-{number}")


def orchestrator(config, *arguments):
    return CliRunner().invoke(app, [*arguments, "--workspace", str(config.workspace)])


def test_what_people_decide_in_order(workspace):
    """Roll back, promote by force, roll back to a named version: aliases, run states, tags and history say the same."""
    config, registry = workspace
    done = orchestrator(config, "rollback", "cards", "--reason", "complaints")
    assert (done.exit_code, done.output) == (0, "cards@1 answers for cards now (was cards@2)\n")
    assert registry.by_alias("cards", CHAMPION).version == 1
    # A run that counts as promoted and is not champion would be judged, and promoted, by the next submission.
    assert [status_of(registry, number) for number in (1, 2)] == [Status.PROMOTED, Status.REJECTED]

    refused = orchestrator(config, "promote", "cards@3")
    assert refused.exit_code == 2
    assert "submit promotes what passes the gate" in refused.output
    done = orchestrator(config, "promote", "cards", "--force", "--reason", "the gate split has wrong labels", "--json")
    assert json.loads(done.output) == {"task": "cards", "before": "cards@1", "after": "cards@3"}
    assert registry.by_alias("cards", CHALLENGER) is None
    assert status_of(registry, 3) == Status.PROMOTED
    decision = registry.by_alias("cards", CHAMPION).tags["decision"]
    assert decision.startswith(f"promoted by force by {getpass.getuser()} at 20")
    assert decision.endswith(": the gate split has wrong labels")

    assert Aliases(config).roll_back("cards", None, "enough").after == "cards@1"
    assert Aliases(config).roll_back("cards", 2, "the better one").after == "cards@2"
    assert [status_of(registry, number) for number in (1, 2, 3)] == [Status.REJECTED, Status.PROMOTED, Status.REJECTED]

    events = read_events(config.history_dir)
    assert [(event.kind, event.outcome, event.who) for event in events] == [
        (kind, "FORCED", getpass.getuser()) for kind in ("rollback", "promote", "rollback", "rollback")
    ]
    cells = [event.cells["cards"] for event in events]
    assert [(cell.version, cell.value, cell.state) for cell in cells] == [
        (f"cards@{number}", value, CellState.CARRIED) for number, value in ((1, 0.6), (3, 0.5), (1, 0.6), (2, 0.8))
    ]

    shown = orchestrator(config, "history", "cards")
    assert shown.exit_code == 0
    for text in ("rollback", "FORCED", "complaints", "cards@3", "REGRESSED", "champion", "60.0 %"):
        assert text in " ".join(shown.output.split())
    found = json.loads(orchestrator(config, "history", "cards", "--json").output)
    assert [row["version"] for row in found["versions"]] == ["cards@3", "cards@2", "cards@1"]
    assert [row["version"] for row in found["events"]] == ["cards@1", "cards@3", "cards@1", "cards@2"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda aliases: aliases.promote("cards", 9, "why"), "cards has no version 9; its versions: 1, 2, 3"),
        (lambda aliases: aliases.promote("cards", 2, "why"), "cards@2 is the champion already"),
        (lambda aliases: aliases.promote("moods", None, "why"), "moods has no challenger; name a version: moods@N"),
        (lambda aliases: aliases.roll_back("moods", None, "why"), "moods has no champion to roll back"),
        (lambda aliases: aliases.history("moods"), "there is no task moods; tasks are cards"),
    ],
    ids=["version", "champion", "challenger", "nothing to roll back", "task"],
)
def test_what_cannot_be_is_named(workspace, act, message):
    config, registry = workspace
    before = registry.by_alias("cards", CHAMPION)
    if before.version != 2:
        Aliases(config).roll_back("cards", 2, "for this test")
    with pytest.raises(RequestError, match=f"^{message}"):
        act(Aliases(config))
    assert registry.by_alias("cards", CHAMPION).version == 2


def test_a_version_that_was_never_judged_does_not_answer(workspace, tiny_adapter):
    config, registry = workspace
    artifact = tiny_adapter("encoder", CARDS, seed=4)
    run = registry.start_run("cards", "key-4", {}, {"status": "REGISTERED"})
    version = registry.register(run, artifact.folder, artifact.digest, PYFUNC_CODE, "cards", {"run_key": "key-4"})
    with pytest.raises(RequestError, match=f"the run of {version.key} is REGISTERED: only what was evaluated can answer"):
        Aliases(config).promote("cards", version.version, "why")


def test_a_submission_that_works_on_the_task_goes_first(workspace, tmp_path):
    config, _ = workspace
    spec = TaskSpec(
        name="cards",
        base={"model": "a/b"},
        data={"train": str(tmp_path / "rows.jsonl")},
        instruction="{text} {labels}",
        labels={"a": None, "b": None},
    )
    submission = Submissions(config.workspace).create(Order((spec,), config))
    with pytest.raises(RequestError, match=f"{submission.id} works on cards; wait for it, or: orchestrator cancel"):
        Aliases(config).roll_back("cards", 1, "why")
    submission.set_state(SubmissionStatus.CANCELLED, "over")
    assert orchestrator(config, "rollback", "cards", "--to", "x").exit_code == 2
    assert orchestrator(config, "promote", "cards@x", "--force", "--reason", "why").exit_code == 2
