"""Curves wait on disk while MLflow is away, in order and whole; what was cut short by a kill is left out."""

import pytest

from multilora.errors import RegistryAwayError, RegistryError
from orchestrator import curves as module
from orchestrator.curves import Curves
from orchestrator.group_task import TrainEvent


class Away:
    """A registry that takes points only while it is there."""

    def __init__(self):
        self.points, self.error = [], None

    def log_metrics(self, run_id, points):
        if self.error:
            raise self.error
        self.points += [(run_id, *point) for point in points]


def event(step):
    return TrainEvent("progress", "mood", "key", step, 10, 1000 + step, {"train/loss": 1 / step})


@pytest.fixture(autouse=True)
def _retry_at_once(monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.0)


def test_points_wait_on_disk_until_mlflow_is_back(tmp_path):
    registry = Away()
    curves = Curves(tmp_path / "curves", registry, registry)
    curves.add("run", event(1))
    curves.try_flush()
    registry.error = RegistryAwayError("away")
    for step in (2, 3):
        curves.add("run", event(step))
        curves.try_flush()
    # The driver is killed in the middle of a line; another one goes on.
    with (tmp_path / "curves" / "run.jsonl").open("a") as stream:
        stream.write('["train/loss", 0.')
    registry.error = None
    Curves(tmp_path / "curves", registry, registry).flush()
    assert registry.points == [("run", "train/loss", 1 / step, step, 1000 + step) for step in (1, 2, 3)]
    assert not list((tmp_path / "curves").iterdir())


def test_the_end_waits_for_mlflow_and_a_refused_curve_ends_nobody(tmp_path):
    impatient, patient = Away(), Away()
    impatient.error = RegistryAwayError("away")
    curves = Curves(tmp_path / "curves", impatient, patient)
    curves.add("run", event(1))
    curves.flush()
    assert len(patient.points) == 1
    curves.add("deleted", event(1))
    curves.add("other", event(1))
    patient.error = RegistryError("no such run")
    curves.flush()
    assert not list((tmp_path / "curves").iterdir())


def test_events_without_numbers_leave_nothing(tmp_path):
    registry = Away()
    curves = Curves(tmp_path / "curves", registry, registry)
    curves.add("run", TrainEvent("started", "mood", "key", 0, 10, 1000))
    curves.flush()
    assert registry.points == []
