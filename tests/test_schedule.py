"""The learning rate of every step, worked by hand and as transformers' schedulers give it."""

from itertools import product

import pytest
import torch
from transformers import get_scheduler

from multilora.spec import TrainSpec
from orchestrator.schedule import learning_rate

OF_TRANSFORMERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def rates(num_steps, **settings):
    return [learning_rate(TrainSpec(**settings), step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 0.75, 0.5, 0.25]),
        ({"warmup_ratio": 0.5}, [0, 0.5, 1, 0.5]),
        ({"warmup_ratio": 0.3}, [0, 0.5, 1, 0.5]),
        ({"warmup_ratio": 0.99}, [0, 0.25, 0.5, 0.75]),
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_ratio": 0.5}, [0, 0.5, 1, 1]),
        ({"schedule": "cosine"}, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ({"schedule": "cosine", "warmup_ratio": 0.5}, [0, 0.5, 1, 0.5]),
    ],
)
def test_four_steps_by_hand(settings, expected):
    assert rates(4, learning_rate=0.1, **settings) == pytest.approx([0.1 * rate for rate in expected])


@pytest.mark.parametrize("schedule", OF_TRANSFORMERS)
def test_rates_are_those_of_transformers(schedule):
    for num_steps, (num_warmup_steps, ratio) in product((1, 20), ((0, 0.0), (1, 0.01), (5, 0.25))):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        warmup = min(num_warmup_steps, num_steps)
        scheduler = get_scheduler(OF_TRANSFORMERS[schedule], optimizer, warmup, num_steps)
        expected = []
        for _ in range(num_steps):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates(num_steps, learning_rate=0.5, schedule=schedule, warmup_ratio=ratio) == pytest.approx(expected)


def test_a_run_of_one_step_without_warm_up_learns():
    assert [rates(1, learning_rate=0.1, schedule=schedule) for schedule in OF_TRANSFORMERS] == [[0.1]] * 3
