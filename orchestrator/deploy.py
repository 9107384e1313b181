"""Run the Ray Serve endpoint. It follows the registry by itself: a promotion needs no deployment."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Mapping

import psutil
import ray
from ray import serve as ray_serve

from multilora.registry import Registry
from orchestrator.config import OrchestratorConfig
from orchestrator.services import check_host, mlflow_url
from orchestrator.session import ray_session
from serve.app import APP_NAME, serve_application
from serve.auth import read_keys
from serve.config import ServeConfig


def run_endpoint(
    config: OrchestratorConfig, host: str, port: int, num_replicas: tuple[int, int], settings: Mapping[str, object]
) -> None:
    """Serve until SIGTERM or SIGINT: the least and the most replicas, and settings of ServeConfig."""
    has_keys = bool(read_keys(config.keys_file))
    check_host(host, has_keys)
    os.environ["RAY_SERVE_LOG_TO_STDERR"] = "1"
    serve_config = ServeConfig.model_validate(
        {
            "tracking_uri": config.registry_uri,
            "downloads_dir": config.downloads_dir / "serve",
            "keys_file": config.keys_file if has_keys else None,
            "audit_file": config.audit_file,
            "live_dir": config.live_dir,
            "metrics_dir": config.metrics_dir,
            "reports_dir": config.reports_dir,
            "mlflow_url": mlflow_url(config, host),
            **settings,
        }
    )
    shutil.rmtree(config.metrics_dir, ignore_errors=True)  # counters start anew with the endpoint
    config.metrics_dir.mkdir(parents=True)
    # An MLflow that is away is named here, and not by every replica.
    Registry(config.registry_uri, config.artifact_root).initialise()
    is_over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_over.set())
    with ray_session(config):
        num_gpus = 1.0 if ray.cluster_resources().get("GPU", 0.0) >= num_replicas[1] else 0.0
        num_cpus = 1.0 if num_gpus else max(1.0, (psutil.cpu_count() or 1) / num_replicas[1])
        ray_serve.start(http_options={"host": host, "port": port})
        application = serve_application(serve_config, num_replicas, num_cpus, num_gpus)
        # The audit log has a line per request already.
        ray_serve.run(application, name=APP_NAME, route_prefix="/", logging_config={"enable_access_log": False})
        is_over.wait()
        ray_serve.shutdown()
