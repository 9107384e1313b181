"""The registry over a real MLflow: writes can be repeated, only champions are served, a version is fetched whole and once."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from tiny_adapters import CARDS, TEXTS

import multilora.registry as registry_module
import serve.pyfunc_model as pyfunc_model
from multilora.artifact import read_artifact
from multilora.errors import RegistryAwayError, RegistryError
from multilora.registry import CHALLENGER, CHAMPION, TAG_PARENT, Registry
from serve.engine import Engine, Work

CODE = Path(pyfunc_model.__file__)


@pytest.fixture
def register(registry, tmp_path):
    """Register a folder with one small file as a task's next version."""

    def make(task, digest="d" * 64, run_key="", **tags):
        folder = tmp_path / digest[:12] / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "content.txt").write_text(digest)
        run = registry.find_run(task, run_key or digest) or registry.start_run(task, run_key or digest, {}, {})
        return registry.register(run, folder, digest, CODE, f"about {task}", tags)

    return make


@pytest.fixture(scope="module")
def other_registry(tmp_path_factory):
    """A second registry in the same process."""
    folder = tmp_path_factory.mktemp("other")
    return Registry(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts")


# Runs


def test_a_candidates_run_is_found_by_its_key_and_is_none_of_the_tasks_runs(registry):
    parent = registry.start_run("searched", "k", {"train.epochs": 3}, {})
    child = registry.start_run("searched", "k-1", {}, {TAG_PARENT: parent.run_id})
    assert registry.find_run("searched", "k-1").run_id == child.run_id
    assert [run.run_id for run in registry.runs("searched")] == [parent.run_id]
    for _ in range(2):
        registry.log_params(parent.run_id, {"chosen.rank": 8})
    assert registry._client.get_run(parent.run_id).data.params == {"train.epochs": "3", "chosen.rank": "8"}
    with pytest.raises(RegistryError, match=r"chosen\.rank"):
        registry.log_params(parent.run_id, {"chosen.rank": 4})


def test_registering_leaves_no_store_in_the_environment(register):
    before = os.environ.get("MLFLOW_TRACKING_URI")
    register("env")
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


def test_run_is_found_again_by_its_key(registry):
    run = registry.start_run("run-key", "k1", {"lora.rank": 8}, {"status": "PLANNED", "git": "abc"})
    found = registry.find_run("run-key", "k1")
    assert found.run_id == run.run_id
    assert (found.task, found.run_key, found.status, found.tags["git"]) == ("run-key", "k1", "PLANNED", "abc")
    assert registry.find_run("run-key", "k2") is None
    assert registry.find_run("no-such-task", "k1") is None


def test_runs_of_a_task_are_listed_newest_first(registry):
    made = [registry.start_run("run-list", f"k{number}", {}, {}).run_id for number in range(3)]
    assert sorted(run.run_id for run in registry.runs("run-list")) == sorted(made)
    assert registry.runs("no-such-task") == []
    assert "run-list" in registry.tasks()


def test_run_keeps_tags_metrics_params_and_texts(registry):
    run = registry.start_run("run-log", "k", {"train.epochs": 3, "long": "x" * 7000}, {"status": "PLANNED"})
    registry.set_tags(run.run_id, {"status": "TRAINING", "end_reason": "y" * 6000})
    registry.log_metrics(run.run_id, [("train/loss", 1 / (step + 1), step, 1_000 + step) for step in range(1500)])
    registry.log_texts(run.run_id, {"spec.json": '{"name": "run-log"}'})
    registry.end_run(run.run_id, is_ok=True)
    found = registry.find_run("run-log", "k")
    assert found.status == "TRAINING"
    assert len(found.tags["end_reason"]) == 5000
    assert found.metrics["train/loss"] == pytest.approx(1 / 1500)
    stored = MlflowClient(registry.tracking_uri).get_run(run.run_id)
    assert stored.data.params["train.epochs"] == "3"
    assert stored.info.status == "FINISHED"
    assert json.loads(mlflow.artifacts.load_text(f"{stored.info.artifact_uri}/spec.json")) == {"name": "run-log"}


def test_failed_run_is_closed_as_failed(registry):
    run = registry.start_run("run-fail", "k", {}, {})
    registry.end_run(run.run_id, is_ok=False)
    assert MlflowClient(registry.tracking_uri).get_run(run.run_id).info.status == "FAILED"


# Versions


def test_registering_again_gives_the_same_version(registry, register):
    first = register("same", base="tiny")
    assert (first.task, first.version, first.digest, first.key) == ("same", 1, "d" * 64, "same@1")
    assert first.tags["base"] == "tiny"
    assert register("same", base="tiny") == first
    assert [version.version for version in registry.versions("same")] == [1]


def test_retrained_adapter_of_a_run_is_a_new_version(registry, register):
    register("retrained", "a" * 64, run_key="k")
    second = register("retrained", "b" * 64, run_key="k")
    assert (second.version, second.digest) == (2, "b" * 64)
    run = registry.find_run("retrained", "k")
    assert registry.version_of_run(run) == second
    assert registry.version_of_run(replace(run, run_id="0" * 32)) is None
    assert [version.digest[0] for version in registry.versions("retrained")] == ["a", "b"]


def test_version_shows_tags_and_description(registry, register):
    version = register("described")
    registry.tag_version(version, {"verdict": "NON_INFERIOR", "reasons": "z" * 6000})
    registry.describe_version(version, "**NON_INFERIOR**")
    (found,) = registry.versions("described")
    assert found.tags["verdict"] == "NON_INFERIOR"
    assert len(found.tags["reasons"]) == 5000
    client = MlflowClient(registry.tracking_uri)
    assert client.get_model_version("described", "1").description == "**NON_INFERIOR**"
    assert client.get_registered_model("described").description == "about described"


# Aliases


def test_alias_moves_and_can_be_dropped(registry, register):
    first, second = register("alias", "a" * 64), register("alias", "b" * 64)
    assert registry.by_alias("alias", CHAMPION) is None
    registry.set_alias(first, CHAMPION)
    registry.set_alias(second, CHALLENGER)
    assert registry.by_alias("alias", CHAMPION) == first
    registry.set_alias(second, CHAMPION)
    assert registry.by_alias("alias", CHAMPION) == second
    for _ in range(2):  # dropping what is not there is no error
        registry.drop_alias("alias", CHAMPION)
    assert registry.by_alias("alias", CHAMPION) is None
    assert registry.by_alias("alias", CHALLENGER) == second


def test_task_without_versions_has_no_champion(registry):
    assert registry.by_alias("no-such-task", CHAMPION) is None
    assert registry.versions("no-such-task") == []


def test_champions_are_this_programs_models_with_that_alias(registry, register):
    crowned, waiting = register("crowned"), register("waiting")
    registry.set_alias(crowned, CHAMPION)
    registry.set_alias(waiting, CHALLENGER)
    client = MlflowClient(registry.tracking_uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", "file:///nowhere")
    client.set_registered_model_alias("foreign", CHAMPION, "1")
    champions = registry.champions()
    assert champions["crowned"] == crowned
    assert not {"waiting", "foreign"} & set(champions)
    registry.drop_alias("crowned", CHAMPION)
    assert "crowned" not in registry.champions()


def test_champions_that_are_known_are_not_looked_up_again(registry, register, monkeypatch):
    first = register("followed")
    registry.set_alias(first, CHAMPION)
    known = registry.champions()
    get, asked = registry._client.get_model_version, []
    monkeypatch.setattr(registry._client, "get_model_version", lambda *of: asked.append(of) or get(*of))
    assert registry.champions(known) == known
    assert asked == []
    second = register("followed", "e")
    registry.set_alias(second, CHAMPION)
    assert registry.champions(known) == known | {"followed": second}
    assert asked == [("followed", second.version)]
    registry.drop_alias("followed", CHAMPION)


def test_version_by_its_number(registry, register):
    version = register("numbered")
    assert registry.version("numbered", version.version) == version
    assert registry.version("numbered", 99) is None
    assert registry.version("no-such-task", 1) is None
    client = MlflowClient(registry.tracking_uri)
    client.create_registered_model("another-program")
    client.create_model_version("another-program", "file:///nowhere")
    assert registry.version("another-program", 1) is None


@pytest.mark.slow
def test_more_champions_than_a_page_holds(other_registry, monkeypatch):
    monkeypatch.setattr(registry_module, "MODELS_A_PAGE", 50)
    client = MlflowClient(other_registry.tracking_uri, registry_uri=other_registry.tracking_uri)
    names = [f"task-{number:03}" for number in range(105)]
    for name in names:
        client.create_registered_model(name, tags={"orchestrator": "1"})
        client.create_model_version(name, "file:///nowhere", tags={"digest": name})
        client.set_registered_model_alias(name, CHAMPION, "1")
    assert [(task, version.digest) for task, version in other_registry.champions().items()] == [(name, name) for name in names]


# Download


def test_version_is_fetched_whole_and_once(registry, register, tmp_path):
    version = register("fetched")
    folder = registry.download(version, tmp_path / "downloads")
    assert (folder / "content.txt").read_text() == version.digest
    (folder / "mark").touch()
    assert registry.download(version, tmp_path / "downloads") == folder
    assert (folder / "mark").exists()


def test_many_processes_may_share_the_folder(registry, register, tmp_path):
    version = register("shared")
    others = [Registry(registry.tracking_uri) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(lambda other: other.download(version, tmp_path / "downloads"), others))
    assert len(folders) == 1
    assert [path.name for path in folders.pop().iterdir()] == ["content.txt"]
    (only,) = (tmp_path / "downloads" / "shared").iterdir()
    assert only.name == f"1-{'d' * 12}"
    assert only.stat().st_mode == (tmp_path / "downloads").stat().st_mode, "replicas of another user may read it too"


def test_same_version_number_of_another_registry_is_fetched_apart(registry, register, tmp_path):
    version = register("twofold")
    other = replace(version, digest="e" * 64)
    assert registry.download(version, tmp_path / "downloads") != registry.download(other, tmp_path / "downloads")


def test_registries_of_one_process_do_not_mix(registry, other_registry, register, tmp_path):
    version = register("apart")
    (tmp_path / "adapter").mkdir()
    other_registry.register(other_registry.start_run("apart", "k", {}, {}), tmp_path / "adapter", "e" * 64, CODE, "", {})
    assert (registry.download(version, tmp_path / "downloads") / "content.txt").read_text() == version.digest
    assert registry.versions("apart") == [version]


def test_failed_download_leaves_nothing(registry, register, tmp_path):
    missing = replace(register("partial"), version=7)
    with pytest.raises(RegistryError, match=registry.tracking_uri):
        registry.download(missing, tmp_path / "downloads")
    assert list((tmp_path / "downloads" / "partial").iterdir()) == []


def test_folder_that_cannot_be_written_is_a_registry_error(registry, register, tmp_path):
    (tmp_path / "downloads").touch()
    with pytest.raises(RegistryError, match="downloads"):
        registry.download(register("unwritable"), tmp_path / "downloads")


# Failure


def test_server_that_is_away_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = Registry("http://127.0.0.1:9")
    calls = (registry.initialise, registry.champions, registry.tasks, lambda: registry.by_alias("cards", CHAMPION))
    for call in calls:
        with pytest.raises(RegistryError, match=r"MLflow at http://127.0.0.1:9 failed: .*check MLFLOW_TRACKING_URI"):
            call()


# The registered version as an MLflow model


def test_pyfunc_model_predicts_what_the_engine_answers(registry, tiny_adapter, fresh_base):
    artifact = tiny_adapter("encoder", CARDS)
    run = registry.start_run("pyfunc", "k", {}, {})
    version = registry.register(run, artifact.folder, artifact.digest, CODE, "", {})
    registry.set_alias(version, CHAMPION)
    mlflow.set_tracking_uri(registry.tracking_uri)
    model = mlflow.pyfunc.load_model(f"models:/pyfunc@{CHAMPION}")
    registry.drop_alias("pyfunc", CHAMPION)
    engine = Engine(fresh_base("encoder"), num_slots=1, max_rank=4)
    key = engine.bind(artifact, 1)
    answers = engine.classify([Work(key, engine.prompt(key, text)) for text in TEXTS])
    assert list(model.predict(list(TEXTS))) == [answer.label for answer in answers]
    assert list(model.predict([TEXTS[0]])) == [answers[0].label]


def test_downloaded_adapter_is_the_registered_one(registry, tiny_adapter, tmp_path):
    artifact = tiny_adapter("causal", CARDS)
    version = registry.register(registry.start_run("whole", "k", {}, {}), artifact.folder, artifact.digest, CODE, "", {})
    assert read_artifact(registry.download(version, tmp_path), version.digest).card == artifact.card


# Patience


class Flaky:
    """An MLflow server of real HTTP that answers 503 for a while."""

    def __init__(self, num_failures):
        outer = self
        self.num_left = num_failures

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.num_left -= 1
                body = b"{}" if outer.num_left < 0 else b"starting"
                self.send_response(200 if outer.num_left < 0 else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def flaky(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    made = []

    def make(num_failures):
        made.append(Flaky(num_failures))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def test_a_patient_registry_waits_for_a_server_that_is_away(flaky):
    server, heard = flaky(2), []
    registry = Registry(server.url, patience_s=60, on_away=heard.append)
    assert registry.tasks() == []
    assert len(heard) == 2
    assert all(server.url in message for message in heard)


def test_patience_ends_and_a_listener_may_end_it_sooner(flaky):
    with pytest.raises(RegistryAwayError, match="check MLFLOW_TRACKING_URI"):
        Registry(flaky(99).url, patience_s=0.5).tasks()

    def stop(message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Registry(flaky(99).url, patience_s=60, on_away=stop).tasks()


def test_what_mlflow_refuses_is_not_tried_again(registry):
    heard = []
    patient = Registry(registry.tracking_uri, patience_s=60, on_away=heard.append)
    with pytest.raises(RegistryError, match="no-such-run"):
        patient.set_tags("no-such-run", {"a": "b"})
    assert heard == []


def test_a_run_whose_creation_was_answered_too_late_is_not_created_twice(registry, monkeypatch):
    """The first attempt creates the run and loses the answer."""
    create, calls = registry._client.create_run, []

    def lose(*args, **kwargs):
        calls.append(create(*args, **kwargs))
        raise MlflowException("connection lost", error_code=TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(registry, "_retrying", Registry(registry.tracking_uri, patience_s=60)._retrying)
    monkeypatch.setattr(registry._client, "create_run", lose)
    run = registry.start_run("answered-late", "key", {"rank": 8}, {})
    assert [call.info.run_id for call in calls] == [run.run_id]
    assert len(registry.runs("answered-late")) == 1
