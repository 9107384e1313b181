"""Estimates learn from what earlier trainings took."""

import json
from dataclasses import replace

import pytest
from test_plan import SMALL, TWO_CPUS, need

from multilora.spec import BaseSpec
from orchestrator.group_task import TrainEvent
from orchestrator.pace import Pace
from orchestrator.plan import START_UP_S, plan_groups, rate_key

TASKS = [need("a"), need("b")]
NUM_FLOPS = {f"key-{task.task}": task.num_flops for task in TASKS}


def groups_of(tasks):
    return plan_groups(tasks, TWO_CPUS, 16).groups


def trained(file, seconds, *, first_step=1, tasks=("a", "b"), num_steps=70):
    """A submission in which `tasks` train together from one step to their last in some seconds."""
    pace = Pace(file)
    for task in tasks:
        for step, unix_ms in ((first_step, 1000), (num_steps, 1000 + int(1000 * seconds))):
            pace.note(TrainEvent("progress", task, f"key-{task}", step, num_steps, unix_ms))
    pace.learn(groups_of(TASKS), NUM_FLOPS)
    return pace


def test_the_next_plan_expects_what_the_last_training_took(tmp_path):
    file = tmp_path / "folder" / "pace.json"
    pace = trained(file, 138.0)
    # 69 of 70 steps of two tasks in 138 s: a training of all 70 takes 140.
    assert plan_groups(TASKS, TWO_CPUS, 16, pace.rates).groups[0].seconds == pytest.approx(START_UP_S + 140)
    assert Pace(file).rates == pace.rates == json.loads(file.read_text())
    twice = trained(file, 69.0)
    assert twice.rates[rate_key(SMALL, 0.0)] == pytest.approx(1.5 * pace.rates[rate_key(SMALL, 0.0)])


def test_workers_share_the_pace(tmp_path):
    pace, alone = Pace(tmp_path / "pair.json"), trained(tmp_path / "alone.json", 138.0)
    for step, unix_ms in ((1, 0), (70, 138_000)):
        pace.note(TrainEvent("progress", "a", "key-a", step, 70, unix_ms))
        pace.note(TrainEvent("progress", "b", "key-b", step, 70, unix_ms))
    pace.learn([replace(group, workers=2) for group in groups_of(TASKS)], NUM_FLOPS)
    assert pace.rates == pytest.approx({key: rate / 2 for key, rate in alone.rates.items()})


def test_a_resumed_training_counts_for_the_steps_it_did(tmp_path):
    rate = trained(tmp_path / "a.json", 138.0).rates
    assert trained(tmp_path / "b.json", 60.0, first_step=40).rates == pytest.approx(rate)


def test_other_bases_and_devices_keep_their_rates(tmp_path):
    rates = trained(tmp_path / "pace.json", 138.0).rates
    assert list(rates) == [rate_key(SMALL, 0.0)]
    other = [need("c", base=BaseSpec(model="other"))]
    assert plan_groups(other, TWO_CPUS, 16, rates) == plan_groups(other, TWO_CPUS, 16)
    assert rate_key(SMALL, 0.5) == rate_key(SMALL, 2) != rate_key(SMALL, 0)


@pytest.mark.parametrize("settings", [{"seconds": 4.9}, {"seconds": 60.0, "tasks": ()}])
def test_what_was_too_short_or_never_started_teaches_nothing(tmp_path, settings):
    assert trained(tmp_path / "pace.json", **settings).rates == {}
