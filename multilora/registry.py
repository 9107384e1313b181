"""MLflow for everybody else: runs, metrics, adapter versions, aliases, downloads, reports.

One writer: the controller. A run is found again by its run key, a version by its run, so every write can be repeated.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import mlflow
import tenacity
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunData, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

from multilora.errors import RegistryAwayError
from multilora.mlflow_errors import named_errors, patiently

CHAMPION, CHALLENGER = "champion", "challenger"
TAG_OWNER, TAG_STATUS, TAG_RUN_KEY, TAG_REASON = "orchestrator", "status", "run_key", "end_reason"
TAG_ATTEMPT, TAG_PARENT = "attempt", "mlflow.parentRunId"
ADAPTER_PATH = "adapter"
REPORTS = "regression-reports"
"""Experiment of the cross-task reports; no task can bear this name."""
ROUTER = "auto"
"""Registered model of the router (task_router.py) and its experiment; no task can bear this name."""
MODELS_A_PAGE = 1000  # the most that MLflow gives
MAX_WAIT_S = 30.0  # between two attempts to reach MLflow

logging.getLogger("mlflow").setLevel(logging.ERROR)
# Its own seven attempts take four silent minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable registered adapter."""

    task: str
    version: int
    digest: str
    run_id: str
    tags: Mapping[str, str]

    @property
    def key(self) -> str:
        """`task@version`."""
        return f"{self.task}@{self.version}"


@dataclass(frozen=True)
class RunRecord:
    """Training of one adapter, as MLflow knows it."""

    run_id: str
    task: str
    run_key: str
    status: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


class Registry:
    """MLflow tracking and model registry behind one URI."""

    def __init__(
        self,
        tracking_uri: str,
        artifact_root: Path | None = None,
        patience_s: float = 0.0,
        on_away: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Connect, or raise RegistryError. `artifact_root` is where files go when the store is a database without a server.
        Where MLflow is away every call is repeated for `patience_s`; `on_away` hears of each failure, and may raise.
        """
        self.tracking_uri, self._artifact_root = tracking_uri, artifact_root
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RegistryAwayError),
            wait=tenacity.wait_exponential(max=MAX_WAIT_S),
            stop=tenacity.stop_after_delay(patience_s),
            before_sleep=lambda state: on_away(str(state.outcome and state.outcome.exception())),
            reraise=True)  # fmt: skip
        with named_errors(tracking_uri), _alone(tracking_uri):
            self._client = MlflowClient(tracking_uri, registry_uri=tracking_uri)

    @patiently
    def initialise(self) -> None:
        """Reach the store, or say that it is away."""
        self._client.search_experiments(max_results=1)

    def find_run(self, task: str, run_key: str) -> RunRecord | None:
        """Find the run of this exact training, if there was one."""
        runs = self._search_runs(task, f"tags.{TAG_RUN_KEY} = '{run_key}'")
        return runs[0] if runs else None

    def start_run(self, task: str, run_key: str, params: Mapping[str, object], tags: Mapping[str, str]) -> RunRecord:
        """Create the run of one adapter's training."""
        return self._start_run(task, run_key, params, {**tags, TAG_ATTEMPT: uuid.uuid4().hex})

    @patiently
    def _start_run(self, task: str, run_key: str, params: Mapping[str, object], tags: Mapping[str, str]) -> RunRecord:
        """Create the run, unless an attempt whose answer was lost created it."""
        experiment = self._client.get_experiment_by_name(task)
        files = (self._artifact_root / task).as_uri() if self._artifact_root else None
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(task, files, {TAG_OWNER: "1"})
        all_tags = {TAG_OWNER: "1", "task": task, TAG_RUN_KEY: run_key, **tags}
        found = self._client.search_runs([experiment_id], f"tags.{TAG_ATTEMPT} = '{tags[TAG_ATTEMPT]}'")
        name = f"{task}-{run_key[:8]}"
        run = found[0] if found else self._client.create_run(experiment_id, run_name=name, tags=all_tags)
        self.log_params(run.info.run_id, params)
        return RunRecord(run.info.run_id, task, run_key, all_tags.get(TAG_STATUS, ""), all_tags, {})

    @patiently
    def log_params(self, run_id: str, params: Mapping[str, object]) -> None:
        """Add parameters to a run; MLflow refuses another value of one that it has."""
        self._client.log_batch(run_id, params=[Param(name, str(value)[:6000]) for name, value in params.items()])

    @patiently
    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run in one request."""
        self._client.log_batch(run_id, tags=[RunTag(name, value[:5000]) for name, value in tags.items()])

    @patiently
    def end_run(self, run_id: str, is_ok: bool) -> None:
        """Close a run."""
        self._client.set_terminated(run_id, "FINISHED" if is_ok else "FAILED")

    @patiently
    def log_metrics(self, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Log (name, value, step, unix time in ms) points in batches of 1,000, MLflow's limit."""
        for first in range(0, len(points), 1000):
            batch = [Metric(name, value, at_ms, step) for name, value, step, at_ms in points[first : first + 1000]]
            self._client.log_batch(run_id, metrics=batch)

    @patiently
    def log_texts(self, run_id: str, texts: Mapping[str, str]) -> None:
        """Store small text artifacts, file name -> content."""
        for name, text in texts.items():
            self._client.log_text(run_id, text, name)

    @patiently
    def log_report(self, name: str, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Keep a cross-task report as a run of its own, once: the files of `folder`, and numbers to compare over time."""
        found = self._client.get_experiment_by_name(REPORTS)
        files = (self._artifact_root / REPORTS).as_uri() if self._artifact_root else None
        experiment_id = found.experiment_id if found else self._client.create_experiment(REPORTS, files)
        known = self._client.search_runs([experiment_id], f"tags.report = '{name}'")
        run = known[0] if known else self._client.create_run(experiment_id, run_name=name, tags={"report": name, **tags})
        self.log_metrics(run.info.run_id, [(metric, value, 0, run.info.start_time) for metric, value in metrics.items()])
        self._client.log_artifacts(run.info.run_id, str(folder))
        self._client.set_terminated(run.info.run_id, "FINISHED")

    @patiently
    def register(
        self, run: RunRecord, adapter_dir: Path, digest: str, model_code: Path, description: str, tags: Mapping[str, str]
    ) -> AdapterVersion:
        """Store the adapter with its run and make it the task's next version; a second call returns the first's version.

        The version is also a pyfunc model (`models:/task@champion` predicts) whose code is `model_code`, no pickle.
        """
        found = self.version_of_run(run)
        if found and found.digest == digest:
            return found
        with _process_default(self.tracking_uri), mlflow.start_run(run_id=run.run_id):
            info = mlflow.pyfunc.log_model(
                name=ADAPTER_PATH,
                python_model=str(model_code),
                artifacts={ADAPTER_PATH: str(adapter_dir)},
                signature=infer_signature(["a text"], ["a label"]),
                pip_requirements=["adapter-orchestrator"],
                metadata={"digest": digest},
            )
        self._ensure_model(run.task, description)
        all_tags = {TAG_OWNER: "1", "digest": digest, **tags}  # a server takes a `models:/` source only with the model's id
        version = self._client.create_model_version(run.task, info.model_uri, run.run_id, tags=all_tags, model_id=info.model_id)
        return _version(version)

    @patiently
    def version_of_run(self, run: RunRecord) -> AdapterVersion | None:
        """The newest version that a run registered, if it did."""
        found = self._client.search_model_versions(f"name = '{run.task}' and run_id = '{run.run_id}'")
        return max(map(_version, found), key=lambda version: version.version, default=None)

    @patiently
    def tag_version(self, version: AdapterVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version; the registry page shows them."""
        for name, value in tags.items():
            self._client.set_model_version_tag(version.task, str(version.version), name, value[:5000])

    @patiently
    def describe_version(self, version: AdapterVersion, description: str) -> None:
        """Set the text that the registry shows for a version."""
        self._client.update_model_version(version.task, str(version.version), description)

    @patiently
    def set_alias(self, version: AdapterVersion, alias: str) -> None:
        """Point an alias of the task to this version."""
        self._client.set_registered_model_alias(version.task, alias, str(version.version))

    @patiently
    def drop_alias(self, task: str, alias: str) -> None:
        """Remove an alias where it exists."""
        self._client.delete_registered_model_alias(task, alias)

    @patiently
    def by_alias(self, task: str, alias: str) -> AdapterVersion | None:
        """The version that an alias points to."""
        try:
            return _version(self._client.get_model_version_by_alias(task, alias))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None

    @patiently
    def champions(self, known: Mapping[str, AdapterVersion] | None = None) -> dict[str, AdapterVersion]:
        """Every task's champion. Versions never change, so those of `known` (by task) are not asked for again."""
        found = {}
        token = None
        while True:
            page = self._client.search_registered_models(f"tags.{TAG_OWNER} = '1'", max_results=MODELS_A_PAGE, page_token=token)
            for model in page:
                if CHAMPION in model.aliases and model.name != ROUTER:
                    number, before = model.aliases[CHAMPION], (known or {}).get(model.name)
                    if before is None or before.version != int(number):
                        before = _version(self._client.get_model_version(model.name, number))
                    found[model.name] = before
            token = page.token
            if not token:
                return dict(sorted(found.items()))

    @patiently
    def version(self, task: str, number: int) -> AdapterVersion | None:
        """A version by its number; None where there is none, or where another program registered it."""
        try:
            found = _version(self._client.get_model_version(task, str(number)))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return found if TAG_OWNER in found.tags else None

    @patiently
    def tasks(self) -> list[str]:
        """Names of all tasks that ever had a run."""
        found = self._client.search_experiments(filter_string=f"tags.{TAG_OWNER} = '1'")
        return sorted(experiment.name for experiment in found if experiment.name != ROUTER)

    @patiently
    def versions(self, task: str) -> list[AdapterVersion]:
        """All versions of a task, oldest first."""
        found = self._client.search_model_versions(f"name = '{task}'")
        return sorted(map(_version, found), key=lambda version: version.version)

    def runs(self, task: str) -> list[RunRecord]:
        """All runs of a task, newest first, without those of a search's candidates."""
        return [run for run in self._search_runs(task) if TAG_PARENT not in run.tags]

    @patiently
    def download(self, version: AdapterVersion, folder: Path) -> Path:
        """Fetch a version's adapter folder into `folder`/task, once; several threads and processes may share `folder`."""
        target = _download_folder(version, folder)
        if not target.is_dir():
            self._download_whole(version, target)
        return target / "artifacts" / ADAPTER_PATH

    def discard_download(self, version: AdapterVersion, folder: Path) -> None:
        """Throw away what `download` fetched, so that it fetches it again."""
        target = _download_folder(version, folder)
        if target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as parent:
                target.replace(Path(parent) / "discarded")  # at once, so that nobody takes half of it for a download

    def _download_whole(self, version: AdapterVersion, target: Path) -> None:
        """Fetch a version into `target`, which appears whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        # `models:/` would be looked up in the process-wide registry, which may be another one.
        address = self._client.get_model_version_download_uri(version.task, str(version.version))
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as parent:
            inside = str(Path(parent) / "model")  # `parent` itself only its owner may read
            staging = Path(mlflow.artifacts.download_artifacts(address, dst_path=inside, tracking_uri=self.tracking_uri))
            try:
                staging.replace(target)
            except OSError:  # another process was faster; its folder holds the same version
                if not target.is_dir():
                    raise

    def _ensure_model(self, task: str, description: str) -> None:
        try:
            self._client.create_registered_model(task, tags={TAG_OWNER: "1"}, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @patiently
    def _search_runs(self, task: str, query: str = "") -> list[RunRecord]:
        experiment = self._client.get_experiment_by_name(task)
        runs = self._client.search_runs([experiment.experiment_id], query) if experiment else []
        return [_run(task, run.info.run_id, run.data) for run in runs]


def _run(task: str, run_id: str, data: RunData) -> RunRecord:
    tags = dict(data.tags)
    return RunRecord(run_id, task, tags.get(TAG_RUN_KEY, ""), tags.get(TAG_STATUS, ""), tags, dict(data.metrics))


def _download_folder(version: AdapterVersion, folder: Path) -> Path:
    # The digest is part of the name because another registry gives the same version numbers to other adapters.
    return folder / version.task / f"{version.version}-{version.digest[:12]}"


def _version(version: ModelVersion) -> AdapterVersion:
    tags: dict[str, Any] = dict(version.tags)
    return AdapterVersion(version.name, int(version.version), tags.get("digest", ""), version.run_id or "", tags)


@contextmanager
def _process_default(tracking_uri: str) -> Iterator[None]:
    """Make a store the process-wide one for MLflow's fluent calls.

    MLflow writes it into the environment too, where it would look like the user's own wish to every later configuration.
    """
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    try:
        yield
    finally:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


@contextmanager
def _alone(tracking_uri: str) -> Iterator[None]:
    """Open a database file alone: processes that create its tables at once break it."""
    is_file = tracking_uri.startswith("sqlite:///")
    with filelock.FileLock(f"{tracking_uri[10:]}.lock", timeout=120) if is_file else nullcontext():
        yield
