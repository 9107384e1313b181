"""Start, refresh and stop the Ray Serve endpoint. A running endpoint follows the registry by itself: no refresh is needed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import psutil
import ray
from ray import serve as ray_serve

from multilora.errors import SpecError
from multilora.registry import Registry
from orchestrator import background
from orchestrator.cluster import ray_session
from orchestrator.config import OrchestratorConfig
from serve.app import APP_NAME, serve_application
from serve.config import ServeConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def start_endpoint(config: OrchestratorConfig, host: str, port: int, num_replicas: int) -> str:
    """Start the endpoint and return its URL once every champion is bound. Raises CapacityError, SpecError."""
    url = f"http://{host}:{port}"
    _check_host(host)
    argv = [sys.executable, "-m", "orchestrator", "serve", "--foreground", "--workspace", str(config.workspace),
            "--host", host, "--port", str(port), "--replicas", str(num_replicas)]  # fmt: skip
    return background.start(config.serve_file, argv, url, "/readyz").url


def run_endpoint(config: OrchestratorConfig, host: str, port: int, num_replicas: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    _check_host(host)
    os.environ["RAY_SERVE_LOG_TO_STDERR"] = "1"
    settings = ServeConfig(tracking_uri=config.registry_uri, downloads_dir=config.downloads_dir / "serve")
    # Several replicas opening a new store at once would break it.
    Registry(config.registry_uri, config.artifact_root).initialise()
    is_over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_over.set())
    with ray_session(config):
        num_gpus = 1.0 if ray.cluster_resources().get("GPU", 0.0) >= num_replicas else 0.0
        num_cpus = 1.0 if num_gpus else max(1.0, (psutil.cpu_count() or 1) / num_replicas)
        ray_serve.start(http_options={"host": host, "port": port})
        ray_serve.run(serve_application(settings, num_replicas, num_cpus, num_gpus), name=APP_NAME, route_prefix="/")
        is_over.wait()
        ray_serve.shutdown()


def stop_endpoint(config: OrchestratorConfig) -> bool:
    """End the endpoint; False where none ran."""
    return background.stop(config.serve_file)


def _check_host(host: str) -> None:
    if host not in LOOPBACK:
        raise SpecError(
            f"will not listen on {host}: this version has no API keys, so it serves this machine only; "
            "use --host 127.0.0.1 and put an authenticating proxy in front"
        )


def ui_argv(config: OrchestratorConfig, port: int) -> tuple[Path, list[str]]:
    """State file and command of the MLflow page over the workspace's store."""
    argv = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", config.registry_uri, "--host", "127.0.0.1",
            "--port", str(port), "--workers", "1"]  # fmt: skip
    return config.workspace / "ui.json", argv
