"""What a cluster may grow to, by the file that its autoscaler reads."""

from pathlib import Path

from orchestrator.cluster import nodes_to_come
from orchestrator.cluster_size import Node

CLUSTER_FILE = Path(__file__).parents[1] / "cluster.yaml"
L40S, L4 = Node(8.0, 1.0, "L40S"), Node(8.0, 1.0, "L4")


def test_nodes_that_are_there_are_not_still_to_come():
    head = Node(0.0, 0.0)
    assert nodes_to_come(CLUSTER_FILE, [head]) == [L40S] * 4 + [L4] * 2
    assert nodes_to_come(CLUSTER_FILE, [head, L40S, L40S, L4]) == [L40S] * 2 + [L4]
    assert nodes_to_come(CLUSTER_FILE, [head, *[L40S] * 5, L4, L4]) == []


def test_labels_of_a_type_are_those_of_its_nodes(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "available_node_types: {head: {resources: {CPU: 4}},"
        " gpu: {resources: {CPU: 8, GPU: 2}, max_workers: 1, labels: {zone: eu-1}}}"
    )
    assert nodes_to_come(file, []) == [Node(8.0, 2.0, None, (("zone", "eu-1"),))]


def test_without_a_file_nothing_is_to_come(tmp_path):
    assert nodes_to_come(tmp_path / "none.yaml", [L4]) == []
