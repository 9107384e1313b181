"""What the command line says of a plan's cost."""

import pytest
from test_plan import MIXED_GPUS, THREE_GPUS, TWO_CPUS, needs

from multilora.spec import ResourceSpec
from orchestrator.plan import Plan, plan_groups
from orchestrator.tables import cost_of, device_of


@pytest.mark.parametrize(
    ("plan", "price", "expected"),
    [
        (Plan((), (), 90.0), 2.0, "~1.5 min"),
        (plan_groups(needs(1), TWO_CPUS, 16), 2.0, "~1.1 min"),
        (plan_groups(needs(3, num_train=10_000_000), THREE_GPUS, 16), None, "~133.8 min, ~6.69 GPU-hours"),
        (plan_groups(needs(3, num_train=10_000_000), THREE_GPUS, 16), 2.0, "~133.8 min, ~6.69 GPU-hours, ~13.38 at 2 a GPU-hour"),
    ],
)
def test_cost_of_a_plan(plan, price, expected):
    assert cost_of(plan, price) == expected


@pytest.mark.parametrize(
    ("resources", "size", "expected"),
    [
        ({}, TWO_CPUS, "2 CPU"),
        ({"workers": 2, "cpus": 0.5}, TWO_CPUS, "2 x 0.5 CPU"),
        ({"gpus": 0.5}, THREE_GPUS, "0.5 GPU"),
        ({"workers": 2, "accelerator": "A100"}, MIXED_GPUS, "2 x 1 A100"),
    ],
)
def test_device_of_a_group(resources, size, expected):
    (group,) = plan_groups(needs(1, resources=ResourceSpec(**resources)), size, 16).groups
    assert device_of(group) == expected
