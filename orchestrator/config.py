"""Program settings and where files live. Task settings are in the task specs; cluster.yaml is Ray's alone."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from multilora.spec import Part

MLFLOW_PATIENCE_S, GPU_MEMORY_GIB = 1800.0, 24.0


class OrchestratorConfig(Part):
    """Settings of one workspace; the command line fills them from flags and environment."""

    workspace: Path
    """Folder for the MLflow store, adapters, checkpoints, evaluations and reports."""
    tracking_uri: str | None = None
    """MLflow server; omit for sqlite and files in the workspace."""
    ray_address: str | None = None
    """Ray cluster; omit for a local Ray."""
    max_slots: int = Field(default=16, ge=1)
    """Most adapters that train together in one group."""
    gpu_memory_gib: float = Field(default=GPU_MEMORY_GIB, gt=0)
    """Memory of one GPU, for the plan's estimates; Ray does not tell it."""
    checkpoint_every_s: float = Field(default=30.0, gt=0)
    """Seconds between checkpoints."""
    cluster_file: Path = Path("~/ray_bootstrap_config.yaml")
    """Says which nodes an autoscaler may add (`available_node_types`, as in cluster.yaml); `ray up` puts it on the head."""
    max_failures: int = Field(default=3, ge=0)
    """How often a group is started again after its worker died."""
    max_gpus: float | None = Field(default=None, gt=0)
    """Most GPUs that one submission uses at once; omit for all."""
    max_cpus: float | None = Field(default=None, gt=0)
    """Most CPU cores that the workers of one submission use at once; omit for all."""
    mlflow_patience_s: float = Field(default=MLFLOW_PATIENCE_S, ge=0)
    """How long a submission waits for an MLflow that is away; its workers train on meanwhile."""

    @classmethod
    def from_environment(cls, workspace: Path | None = None) -> OrchestratorConfig:
        """Read ORCHESTRATOR_HOME (default .orchestrator), MLFLOW_TRACKING_URI, RAY_ADDRESS, and settings of ours."""
        root = workspace or Path(os.environ.get("ORCHESTRATOR_HOME", ".orchestrator"))
        return cls(
            workspace=root.resolve(),
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or None,
            ray_address=os.environ.get("RAY_ADDRESS") or None,
            cluster_file=Path(os.environ.get("ORCHESTRATOR_CLUSTER_FILE", "~/ray_bootstrap_config.yaml")).expanduser(),
            gpu_memory_gib=float(os.environ.get("ORCHESTRATOR_GPU_MEMORY_GIB", GPU_MEMORY_GIB)),
            mlflow_patience_s=float(os.environ.get("ORCHESTRATOR_MLFLOW_PATIENCE_S", MLFLOW_PATIENCE_S)),
        )

    @property
    def registry_uri(self) -> str:
        """Absolute MLflow URI: workers change directory, so a relative sqlite path would be another database."""
        return self.tracking_uri or f"sqlite:///{self.workspace / 'mlflow.db'}"

    @property
    def artifact_root(self) -> Path | None:
        """Where MLflow's files go without a server; a server decides for itself."""
        return None if self.tracking_uri else self.workspace / "artifacts"

    @property
    def reports_dir(self) -> Path:
        """One folder per report, named by time."""
        return self.workspace / "reports"

    @property
    def history_dir(self) -> Path:
        """One file per promotion event."""
        return self.workspace / "history"

    @property
    def downloads_dir(self) -> Path:
        """Adapter versions fetched from the registry."""
        return self.workspace / "downloads"

    @property
    def metrics_dir(self) -> Path:
        """Where the replicas of this machine count together."""
        return self.workspace / "metrics"

    @property
    def gates_dir(self) -> Path:
        """Gate splits that champions were judged on, one file per fingerprint."""
        return self.workspace / "gates"

    @property
    def router_dir(self) -> Path:
        """Routers that were trained here, one folder each."""
        return self.workspace / "router"

    @property
    def cross_file(self) -> Path:
        """Newest cross-adapter matrix of every base."""
        return self.workspace / "cross.json"

    @property
    def compare_dir(self) -> Path:
        """Methods compared, one folder per task and per what decides the answers."""
        return self.workspace / "compare"

    @property
    def pace_file(self) -> Path:
        """How fast earlier submissions trained."""
        return self.workspace / "pace.json"

    @property
    def keys_file(self) -> Path:
        """API keys of the endpoint, hashed."""
        return self.workspace / "api_keys.json"

    @property
    def audit_file(self) -> Path:
        """Every request to the endpoint, without its text."""
        return self.workspace / "audit.log"

    @property
    def live_dir(self) -> Path:
        """What champions and challengers answered to requests, one file per replica."""
        return self.workspace / "live"

    @property
    def serve_file(self) -> Path:
        """Address and process of the running endpoint."""
        return self.workspace / "serve.json"

    @property
    def ui_file(self) -> Path:
        """Address and process of the MLflow page."""
        return self.workspace / "ui.json"

    def adapter_dir(self, run_key: str) -> Path:
        """Where a run's finished adapter is written."""
        return self.workspace / "adapters" / run_key / "adapter"

    def answers_file(self, run_key: str) -> Path:
        """Per-example answers of a run's evaluation."""
        return self.workspace / "answers" / f"{run_key}.json"

    def verdict_file(self, run_key: str) -> Path:
        """The verdict on a run's version, kept before anybody acts on it."""
        return self.workspace / "verdicts" / f"{run_key}.json"

    def checkpoint_file(self, run_key: str) -> Path:
        """Where a run's training state is kept while it trains."""
        return self.workspace / "checkpoints" / f"{run_key}.safetensors"

    def trails_file(self, run_key: str) -> Path:
        """How the candidates of a run's search did on the select split."""
        return self.workspace / "searches" / f"{run_key}.json"
