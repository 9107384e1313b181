"""A group whose nodes are gone for good ends with a reason, and waits for nodes that come back."""

import pytest

from multilora.spec import BaseSpec
from orchestrator.cluster_size import ClusterSize, Node
from orchestrator.room import GRACE_S, LOOK_EVERY_S, Homes, TrainingGroup

BASE = BaseSpec(model="a/b")
SMALL, LARGE = Node(8.0, 1.0), Node(8.0, 2.0, "A100", (("zone", "x"),))


def group(name, gpus=1.0, workers=1, accelerator=None, node_labels=()):
    return TrainingGroup(
        name, BASE, (f"{name}-1", f"{name}-2"), 1, gpus, 1.0, 0, 1, 1.0, accelerator, workers=workers, node_labels=node_labels
    )


class Cluster:
    """Nodes that come and go, and a clock."""

    def __init__(self, *groups):
        self.now, self.num_looks, self.nodes = 0.0, 0, (SMALL, LARGE)
        self.homes = Homes(groups, lambda: self.now)

    def size(self):
        self.num_looks += 1
        return ClusterSize(self.nodes, 0, 0)

    def lost_after(self, seconds):
        self.now += seconds
        return self.homes.lost(self.size)


@pytest.mark.parametrize(
    "wanted",
    [{"gpus": 2.0}, {"workers": 3}, {"accelerator": "A100"}, {"node_labels": (("zone", "x"),)}],
    ids=["GPUs of one node", "workers", "kind of GPU", "label"],
)
def test_what_only_a_lost_node_could_hold_is_lost_after_the_grace_time(wanted):
    cluster = Cluster(group("asks", **wanted), group("modest", gpus=0.5))
    assert cluster.lost_after(GRACE_S) == {}
    cluster.nodes = (SMALL,)
    assert cluster.lost_after(LOOK_EVERY_S) == {}
    assert cluster.lost_after(GRACE_S - 1) == {}
    lost = cluster.lost_after(1)
    assert sorted(lost) == ["asks-1", "asks-2"]
    assert "no node has had room for" in lost["asks-1"]
    assert "for 10 minutes: add nodes or change resources, then submit again" in lost["asks-1"]


def test_a_node_that_comes_back_in_time_is_waited_for():
    cluster = Cluster(group("asks", gpus=2.0))
    for _ in range(5):
        cluster.nodes = (SMALL,)
        assert cluster.lost_after(GRACE_S - LOOK_EVERY_S - 1) == {}
        cluster.nodes = (SMALL, LARGE)
        assert cluster.lost_after(LOOK_EVERY_S) == {}


def test_the_cluster_is_not_asked_all_the_time():
    cluster = Cluster(group("asks"))
    for _ in range(100):
        cluster.lost_after(0.3)
    assert cluster.num_looks == 1
    cluster.lost_after(LOOK_EVERY_S)
    assert cluster.num_looks == 2
