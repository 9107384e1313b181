"""The endpoint and the MLflow page as processes that outlive the command: start, ask, stop. Light: imports no torch, no Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from multilora.errors import CapacityError, RequestError, SpecError, UnknownTaskError
from orchestrator import background
from orchestrator.config import OrchestratorConfig
from orchestrator.ingress import TASK_HEADER
from serve.auth import read_keys

KEY_VARIABLE = "ORCHESTRATOR_API_KEY"
"""The key that `query` sends."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def start_endpoint(config: OrchestratorConfig, host: str, port: int, options: Mapping[str, object]) -> str:
    """Start the endpoint and return its URL once every champion is bound. Raises CapacityError, SpecError.

    `options` are those of the command `serve`, by their names; None leaves one out, "" is a flag, a list repeats it.
    """
    url = f"http://{host}:{port}"
    check_host(host, bool(read_keys(config.keys_file)))
    argv = [sys.executable, "-m", "orchestrator", "serve", "--foreground", "--workspace", str(config.workspace),
            "--host", host, "--port", str(port)]  # fmt: skip
    given = [(name, one) for name, value in options.items() for one in (value if isinstance(value, list) else [value])]
    for name, value in given:
        argv += [] if value is None else [f"--{name}", str(value)] if value != "" else [f"--{name}"]
    return background.start(config.serve_file, argv, url, "/readyz").url


def start_ui(config: OrchestratorConfig, port: int) -> str:
    """Start the MLflow page over the workspace's store and return its URL; a configured server is returned as it is."""
    if config.tracking_uri:
        return config.tracking_uri
    argv = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", config.registry_uri, "--host", "127.0.0.1",
            "--port", str(port), "--workers", "1"]  # fmt: skip
    return background.start(config.ui_file, argv, f"http://127.0.0.1:{port}", "/health").url


def mlflow_url(config: OrchestratorConfig, host: str) -> str | None:
    """Where a person who reads the endpoint's page at `host` finds MLflow; None where nobody knows."""
    if config.tracking_uri is None:
        running = background.find(config.ui_file)
        return running.url if running and host in LOOPBACK else None  # the page that `ui` starts is this machine's alone
    address = httpx.URL(config.tracking_uri)
    # A name and password in the address are not for everybody who reads the page.
    return str(address.copy_with(userinfo=b"")) if address.scheme in ("http", "https") else None


def query(
    task: str,
    item: str | Mapping[str, str] | Sequence[str | Mapping[str, str]],
    config: OrchestratorConfig | None = None,
    url: str | None = None,
    *,
    truncate: bool = False,
) -> dict[str, Any]:
    """Ask the running endpoint; an input that is too long is an error unless it may be truncated.

    Raises UnknownTaskError, RequestError, CapacityError with the endpoint's own words.
    """
    config = config or OrchestratorConfig.from_environment()
    running = background.find(config.serve_file)
    address = url or (running.url if running else None)
    if address is None:
        raise CapacityError(f"no endpoint runs for {config.workspace}; start it with: orchestrator serve")
    question = {"model": task, "input": item, "truncate": truncate}
    try:
        with httpx.Client(base_url=address, headers={**_key_header(), TASK_HEADER: task}, timeout=60.0) as client:
            response = client.post("/v1/classify", json=question)
            if response.status_code == 422 and response.json()["error"]["code"] == "wrong_route":
                response = client.post("/v1/generate", json=question)
    except httpx.HTTPError as error:
        raise CapacityError(f"the endpoint at {address} does not answer: {error}") from error
    body: dict[str, Any] = response.json()
    if response.status_code == 404:
        raise UnknownTaskError(body["error"]["message"])
    if response.status_code != 200:
        raise (CapacityError if response.status_code in (429, 503, 504) else RequestError)(body["error"]["message"])
    return body


def _key_header() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def check_host(host: str, has_keys: bool) -> None:
    """Refuse to listen for other machines without API keys. Raises SpecError."""
    if host not in LOOPBACK and not has_keys:
        raise SpecError(
            f"will not listen on {host} without API keys, for anybody could ask it; "
            "create one: orchestrator key create NAME --tasks TASK,TASK"
        )
