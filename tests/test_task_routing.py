"""A router is trained, judged against the one that answers, promoted or held back, moved by people, and told of.

Everything is real but the champions' training: a sqlite MLflow registry, tiny adapters, specs and rows on disk.
"""

import json
import logging
import shutil
from dataclasses import replace

import mlflow
import pytest
import yaml
from tiny_adapters import MOOD
from tiny_routers import SIZES, WORDS, examples_of, texts_of
from typer.testing import CliRunner

from multilora.errors import DataError, RequestError, SpecError
from multilora.registry import CHALLENGER, CHAMPION, ROUTER, Registry
from multilora.spec_files import load_task_specs
from multilora.task_router import ABSTAINED, CARD, read_router, routed_to, text_of
from orchestrator.cli import app
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import PYFUNC_CODE
from orchestrator.dataset import gate_fingerprint_of
from orchestrator.gates import store_gate
from orchestrator.history import Cell, CellState, PromotionEvent, append_event, read_events
from orchestrator.judge import Outcome, VerdictKind
from orchestrator.task_routing import MIN_RECALL, champion_router, judge_router, train_router
from serve.engine import Engine

pytestmark = pytest.mark.slow
KIND = "seq2seq"
THREE = ["cards", "mood", "mail"]


@pytest.fixture(scope="module")
def store(tiny_adapter, tmp_path_factory):
    """A workspace with one adapter version of every task: (settings, registry, version by task)."""
    config = OrchestratorConfig(workspace=tmp_path_factory.mktemp("workspace"))
    registry = Registry(config.registry_uri, config.artifact_root)
    versions = {}
    for task in WORDS:
        artifact = tiny_adapter(KIND, replace(MOOD, name=task))
        run = registry.start_run(task, "key", {}, {"status": "PROMOTED"})
        versions[task] = registry.register(run, artifact.folder, artifact.digest, PYFUNC_CODE, "", {"run_key": "key"})
    return config, registry, versions


@pytest.fixture
def workspace(store):
    """The workspace with THREE as champions and no router that answers; `crown` makes more champions."""
    config, registry, versions = store

    def crown(*tasks):
        for task in tasks:
            registry.set_alias(versions[task], CHAMPION)

    crown(*THREE)
    yield config, registry, crown
    for task in WORDS:
        registry.drop_alias(task, CHAMPION)
    for alias in (CHAMPION, CHALLENGER):
        registry.drop_alias(ROUTER, alias)
    for folder in (config.history_dir, config.gates_dir, config.downloads_dir):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def files(base_folder, tmp_path):
    """Write task files: files(["cards", "mood"], mood={"train": texts}) -> their paths."""

    def write(tasks, **changed):
        paths = []
        for task in tasks:
            texts = {purpose: texts_of(task, num, purpose) for purpose, num in SIZES.items()} | changed.get(task, {})
            data = {}
            for split, found in texts.items():
                rows = [json.dumps({"text": text, "label": ("glad", "angry")[i % 2]}) + "\n" for i, text in enumerate(found)]
                (tmp_path / f"{task}-{split}.jsonl").write_text("".join(rows), encoding="utf-8")
                data[split] = f"{task}-{split}.jsonl"
            spec = {
                "name": task,
                "base": {"model": str(base_folder(KIND))},
                "data": data,
                "instruction": "{text} {labels}",
                "labels": {"glad": None, "angry": None},
            }
            paths.append(tmp_path / f"{task}.yaml")
            paths[-1].write_text(yaml.safe_dump(spec), encoding="utf-8")
        return paths

    return write


@pytest.fixture
def train(workspace, files):
    """Train a router: train(["cards", "mood"], mood={"train": texts})."""
    return lambda tasks=THREE, **changed: train_router(load_task_specs(files(tasks, **changed)), workspace[0])


def orchestrator(config, *words):
    return CliRunner().invoke(app, [*map(str, words), "--workspace", str(config.workspace)])


# Train, judge, promote


def test_the_first_router_answers_and_its_run_says_how_well(workspace, train):
    config, registry, crown = workspace
    crown("trips")
    result = train()
    assert (result.is_promoted, result.release.outcome) == (True, Outcome.CLEAR)
    assert {task: verdict.kind for task, verdict in result.release.verdicts.items()} == dict.fromkeys(
        THREE, VerdictKind.NON_INFERIOR
    )
    for task, verdict in result.release.verdicts.items():
        assert verdict.reasons == (f"new to the router: recall {result.card.gate.recall(task):.3f}, at least {MIN_RECALL}",)
    assert result.left_out == {"trips": "its spec was not given"}
    assert registry.by_alias(ROUTER, CHAMPION).version == result.version.version
    assert registry.by_alias(ROUTER, CHALLENGER) is None
    run = registry.runs(ROUTER)[0]
    assert run.status == "PROMOTED"
    assert run.metrics["gate/mood_recall"] == result.card.gate.recall("mood")
    assert run.metrics["gate/precision"] == result.card.gate.precision
    version, card, unknown = champion_router(config)
    assert (version.key, card, unknown) == (result.version.key, result.card, ("trips",))
    # Neither a task nor a champion to whoever asks for those.
    assert ROUTER not in registry.tasks()
    assert set(registry.champions()) == set(WORDS)


def test_the_same_data_is_the_same_version_and_answers_on(workspace, train):
    registry = workspace[1]
    first, second = train(), train()
    assert second.version.version == first.version.version
    assert (second.is_promoted, second.release.outcome) == (True, Outcome.CLEAR)
    assert {verdict.reasons for verdict in second.release.verdicts.values()} == {("the same answers as the champion",)}
    assert registry.by_alias(ROUTER, CHAMPION).tags.get("previous_champion") is None


def test_a_task_without_a_champion_is_left_out(train):
    result = train([*THREE, "trips"])
    assert result.card.tasks == THREE
    assert result.left_out == {"trips": "it has no champion: submit it first"}


def test_a_router_that_loses_a_task_is_blocked_and_the_old_one_answers(workspace, train):
    _, registry, _ = workspace
    first = train()
    # From now on its training texts look like another task's.
    wrong = {split: texts_of("mail", SIZES[split], f"{split} again") for split in ("train", "select")}
    second = train(mood=wrong)
    assert (second.is_promoted, second.release.outcome) == (False, Outcome.BLOCK)
    assert second.release.verdicts["mood"].kind is VerdictKind.REGRESSED
    assert second.release.verdicts["cards"].kind is VerdictKind.NON_INFERIOR
    assert registry.by_alias(ROUTER, CHAMPION).version == first.version.version
    assert registry.by_alias(ROUTER, CHALLENGER).version == second.version.version
    tags = registry.by_alias(ROUTER, CHALLENGER).tags
    assert tags["verdict"] == "BLOCK"
    assert "mood: REGRESSED" in tags["reasons"]
    # The repaired data gives the first router again, and nobody is a challenger any more.
    third = train()
    assert (third.is_promoted, third.version.version) == (True, first.version.version)
    assert registry.by_alias(ROUTER, CHALLENGER) is None


def test_a_new_task_needs_a_recall_of_its_own_and_harms_no_old_one(workspace, train):
    _, registry, crown = workspace
    first = train()
    crown("trips")
    bad = train([*THREE, "trips"], trips={"gate": texts_of("mail", 30, "of another task")})
    assert (bad.is_promoted, bad.release.outcome) == (False, Outcome.BLOCK)
    assert bad.release.verdicts["trips"].kind is VerdictKind.REGRESSED
    assert any(f"below gate.min {MIN_RECALL:.3f}" in reason for reason in bad.release.verdicts["trips"].reasons)
    assert all(bad.release.verdicts[task].is_promoted for task in THREE)
    good = train([*THREE, "trips"])
    assert (good.is_promoted, good.release.outcome) == (True, Outcome.CLEAR)
    assert good.card.tasks == [*THREE, "trips"]
    assert registry.by_alias(ROUTER, CHAMPION).tags["previous_champion"] == str(first.version.version)


def test_one_lost_text_of_thirty_holds_a_router_back(workspace, train, fresh_base):
    config, registry, _ = workspace
    result = train()
    before = read_router(registry.download(result.version, config.downloads_dir), result.version.digest)
    engine = Engine(fresh_base(KIND), 1, 1)
    gate = {task: examples_of(task, SIZES["gate"], "gate") for task in THREE}
    sure = sorted(row["mood"] for row in before.probabilities(list(map(_text, gate["mood"])), engine.embed))
    least = next(p for p in sure if p >= before.card.threshold)
    card = before.card.model_copy(update={"threshold": least + 1e-6})
    release = judge_router({"mood": gate["mood"]}, replace(before, card=card, digest="other"), before, lambda base: engine)
    verdict = release.verdicts["mood"]
    assert (verdict.num_losses, verdict.num_wins, verdict.kind) == (1, 0, VerdictKind.INCONCLUSIVE)
    assert (release.outcome, verdict.is_promoted) == (Outcome.HOLD, False)


def _text(example):
    return text_of(example.columns)


# What trains and what judges


def test_a_gate_text_of_any_task_trains_and_chooses_nothing(train):
    clean = train()
    gate = [*texts_of("cards", SIZES["gate"], "gate"), *texts_of("mail", SIZES["gate"], "gate")]
    spoilt = {split: [*texts_of("mood", SIZES[split], split), *gate] for split in ("train", "select")}
    assert train(mood={"train": spoilt["train"]}).version.digest == clean.version.digest
    assert train(mood={"select": spoilt["select"]}).version.digest == clean.version.digest


def test_the_gate_split_that_the_champion_was_judged_on_judges(workspace, train):
    config, _, _ = workspace
    stored = examples_of("mood", 20, "earlier")
    store_gate(config.gates_dir, gate_fingerprint_of(stored), stored)
    cell = Cell(CellState.MEASURED, "mood@1", gate_fingerprint=gate_fingerprint_of(stored))
    append_event(config.history_dir, PromotionEvent("1", "submit", "", "", "CLEAR", "", {"mood": cell}))
    # Since then its rows were moved into the training file.
    moved = {"train": [*texts_of("mood", SIZES["train"], "train"), *texts_of("mood", 20, "earlier")]}
    result = train(mood=moved)
    assert {task: result.card.gate.num_texts(task) for task in THREE} == {"cards": 30, "mood": 20, "mail": 30}
    shutil.rmtree(config.history_dir)
    assert train().card.data_fingerprint == result.card.data_fingerprint


def test_a_task_with_nothing_but_gate_texts_is_named(train):
    with pytest.raises(DataError, match="all train or select texts of mood are gate texts, too"):
        train(mood={"select": texts_of("cards", SIZES["gate"], "gate")})


# Refused


def test_fewer_than_two_champions_are_no_router(workspace, train):
    with pytest.raises(RequestError, match="a router needs two tasks with champions, there is cards: submit them first"):
        train(["cards", "trips"])
    assert workspace[1].by_alias(ROUTER, CHAMPION) is None


def test_a_task_that_the_router_knows_must_be_given(workspace, train):
    _, registry, _ = workspace
    train()
    with pytest.raises(RequestError, match="the router that answers now knows mail: give their specs, too"):
        train(["cards", "mood"])
    # A task that nothing answers for any more is forgotten without a word.
    registry.drop_alias("mail", CHAMPION)
    result = train(["cards", "mood"])
    assert (result.card.tasks, result.is_promoted) == (["cards", "mood"], True)


def test_a_task_whose_data_broke_is_named_with_the_problem(workspace, train, files):
    config, _, _ = workspace
    train()
    specs = load_task_specs(files(THREE, mood={"train": []}))
    with pytest.raises(RequestError, match=r"knows mood: give their specs, too \(mood: mood-train.jsonl.*has no rows"):
        train_router(specs, config)


def test_a_router_that_nothing_can_read_any_more_protects_nothing(workspace, train, caplog):
    config, registry, _ = workspace
    first = train()
    folder = registry.download(first.version, config.downloads_dir)
    (folder / CARD).write_text((folder / CARD).read_text(encoding="utf-8") + " ", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        second = train(["cards", "mood"])
    assert "router unusable" in caplog.text
    assert "files changed" in caplog.text
    assert second.is_promoted
    assert second.release.verdicts["mood"].reasons[0].startswith("new to the router")


@pytest.mark.parametrize("name", ["auto", "regression-reports", "base", "latest"])
def test_no_task_can_bear_a_name_that_the_registry_or_the_api_uses(files, name):
    (file,) = files(["cards"])
    file.write_text(file.read_text(encoding="utf-8").replace("name: cards", f"name: {name}"), encoding="utf-8")
    with pytest.raises(SpecError, match=f"the name '{name}' has a meaning of its own"):
        load_task_specs([file])


def test_no_task_can_be_called_abstained(files):
    (file,) = files(["cards"])
    file.write_text(file.read_text(encoding="utf-8").replace("name: cards", f"name: {ABSTAINED}"), encoding="utf-8")
    with pytest.raises(SpecError, match="name"):
        load_task_specs([file])


# What people decide


def test_people_promote_and_roll_back_the_router(workspace, train):
    config, registry, _ = workspace
    first = train()
    second = train(mood={split: texts_of("mail", SIZES[split], f"{split} again") for split in ("train", "select")})
    done = orchestrator(config, "promote", ROUTER, "--force", "--reason", "mood is mail now")
    assert (done.exit_code, done.output) == (0, f"{second.version.key} answers for auto now (was {first.version.key})\n")
    assert registry.by_alias(ROUTER, CHAMPION).version == second.version.version
    assert registry.by_alias(ROUTER, CHALLENGER) is None
    assert _status(registry, second) == "PROMOTED"
    done = orchestrator(config, "rollback", ROUTER, "--reason", "complaints")
    assert (done.exit_code, done.output) == (0, f"{first.version.key} answers for auto now (was {second.version.key})\n")
    assert registry.by_alias(ROUTER, CHAMPION).version == first.version.version
    assert _status(registry, second) == "REJECTED"
    done = orchestrator(config, "promote", second.version.key, "--force", "--reason", "it is", "--json")
    assert json.loads(done.output) == {"task": ROUTER, "before": first.version.key, "after": second.version.key}
    assert [(event.kind, ROUTER in event.cells) for event in read_events(config.history_dir)] == [
        ("promote", False),
        ("rollback", False),
        ("promote", False),
    ]
    rows = json.loads(orchestrator(config, "history", ROUTER, "--json").output)["versions"]
    decisions = {row["version"]: row["decision"] for row in rows}
    assert decisions[second.version.key].startswith("promoted by force by ")
    assert decisions[first.version.key].startswith(f"rolled back to from {second.version.key} by ")


def _status(registry, result):
    return next(run.status for run in registry.runs(ROUTER) if run.run_id == result.version.run_id)


def test_a_router_whose_files_changed_is_not_promoted(workspace, train):
    config, registry, _ = workspace
    train()
    second = train(mood={split: texts_of("mail", SIZES[split], f"{split} again") for split in ("train", "select")})
    folder = registry.download(second.version, config.downloads_dir)
    (folder / CARD).write_text((folder / CARD).read_text(encoding="utf-8") + " ", encoding="utf-8")
    done = orchestrator(config, "promote", ROUTER, "--force", "--reason", "it is")
    assert done.exit_code == 1
    assert "files changed" in done.output


# What it tells


def test_mlflow_alone_routes_texts(workspace, train, fresh_base):
    _, registry, _ = workspace
    result = train()
    mlflow.set_tracking_uri(registry.tracking_uri)
    model = mlflow.pyfunc.load_model(f"models:/{ROUTER}@{CHAMPION}")
    texts = [*(text for task in THREE for text in texts_of(task, 3, "new")), ""]
    router = read_router(registry.download(result.version, workspace[0].downloads_dir))
    rows = router.probabilities(texts, Engine(fresh_base(KIND), 1, 1).embed)
    found = list(model.predict(texts))
    assert found == [routed_to(row, router.card.threshold) for row in rows]
    assert found[:3].count("cards") >= 2


def test_commands_print_what_came_of_it(workspace, files):
    config, _, crown = workspace
    shown = orchestrator(config, "router", "show")
    assert (shown.exit_code, shown.output) == (1, "error: there is no router yet: orchestrator router train tasks/*.yaml\n")
    refused = orchestrator(config, "router", "train", *files(["cards"]))
    assert refused.exit_code == 1
    assert "a router needs two tasks with champions, there is cards" in refused.output

    trained = orchestrator(config, "router", "train", *files(THREE))
    assert trained.exit_code == 0, trained.output
    assert "mood: NON_INFERIOR: new to the router: recall" in trained.output
    assert trained.stdout.endswith("answers for auto now\n")
    crown("trips")
    shown = orchestrator(config, "router", "show")
    assert shown.exit_code == 0
    assert "the router does not know trips: orchestrator router train tasks/*.yaml" in shown.output
    seen = json.loads(orchestrator(config, "router", "show", "--json").stdout)
    assert (seen["tasks"], seen["unknown"]) == (THREE, ["trips"])
    assert seen["gate"]["recall"]["cards"] == seen["gate"]["confusion"]["cards"]["cards"] / SIZES["gate"]
    assert 0.5 <= seen["threshold"] <= 1

    wrong = {split: texts_of("mail", SIZES[split], f"{split} again") for split in ("train", "select")}
    blocked = orchestrator(config, "router", "train", *files(THREE, mood=wrong))
    assert blocked.exit_code == 3
    assert "left out: trips: its spec was not given" in blocked.output
    assert "was not promoted; past the gate: orchestrator promote auto@" in blocked.output
    again = orchestrator(config, "router", "train", *files(THREE, mood=wrong), "--json")
    found = json.loads(again.stdout)
    assert (again.exit_code, found["outcome"], found["is_promoted"], found["problems"]) == (3, "BLOCK", False, [])
    assert found["verdicts"]["mood"].startswith("REGRESSED")


def test_a_bad_spec_is_named_and_the_others_go_on(workspace, files, tmp_path):
    config, _, _ = workspace
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [", encoding="utf-8")
    trained = orchestrator(config, "router", "train", *files(THREE), bad)
    assert trained.exit_code == 2
    assert "bad.yaml" in trained.output
    assert trained.stdout.endswith("answers for auto now\n")
    found = json.loads(orchestrator(config, "router", "train", *files(THREE), bad, "--json").stdout)
    assert (found["is_promoted"], len(found["problems"])) == (True, 1)
    refused = orchestrator(config, "router", "train", files(["cards"])[0], bad)
    assert refused.exit_code == 1
    assert "bad.yaml" in refused.output
    assert orchestrator(config, "router", "train", bad).exit_code == 2
    assert orchestrator(config, "router", "train", *files(THREE), "--precision", "0.2").exit_code == 2
