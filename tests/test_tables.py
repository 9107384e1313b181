"""What the command line says of a plan's cost."""

import pytest
from test_plan import THREE_GPUS, TWO_CPUS, needs

from orchestrator.plan import Plan, plan_groups
from orchestrator.tables import cost_of


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
