"""Whose turn it is: order across submissions, no place given twice, none kept by the dead."""

import random
from dataclasses import replace

import pytest
from test_submissions import driver, order_of, submissions  # noqa: F401  fixtures

from multilora.spec import BaseSpec
from orchestrator.cluster_size import ClusterSize, Node
from orchestrator.room import Room, TrainingGroup
from orchestrator.submissions import SubmissionStatus
from orchestrator.turns import Claim, Turns, startable

BASE = BaseSpec(model="/base")
FOUR_GPUS = ClusterSize((Node(8.0, 3.0, "L4"), Node(8.0, 1.0, "H100")), 1 << 40, 1 << 40)


def group(name, gpus=1.0, priority=0, seconds=10.0, accelerator=None):
    return TrainingGroup(name, BASE, (name,), 1, gpus, 1.0, 0, 1, seconds, accelerator, priority)


def waiting(name, submission=0, **fields):
    return Claim(group(name, **fields), is_running=False, submission=submission)


def running(name, **fields):
    return Claim(group(name, **fields), is_running=True)


def names(groups):
    return [group.group_id for group in groups]


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ([waiting("short"), waiting("long", seconds=99)], ["long", "short"]),
        ([waiting("second", 2, seconds=99), waiting("first", 1)], ["first", "second"]),
        ([waiting("first", 1), waiting("urgent", 2, priority=5)], ["urgent", "first"]),
        ([running("a", gpus=2.0), waiting("large", 1, gpus=4.0), waiting("small", 2)], []),
        ([running("a", gpus=2.0), waiting("large", 1, gpus=3.0), waiting("small", 2)], []),
        ([running("a"), waiting("two", 1, gpus=2.0), waiting("one", 2)], ["two", "one"]),
        ([running("a", accelerator="H100"), waiting("b", 1, accelerator="H100"), waiting("c", 2, accelerator="L4")], ["c"]),
        ([running("a", accelerator="H100"), *(waiting(f"b{i}", accelerator="H100") for i in range(9)), waiting("c", 2)], ["c"]),
    ],
    ids=["longest first", "earlier first", "priority first", "large one keeps its place", "so does one that nearly fits",
         "beside it where both fit", "another kind of GPU", "a queue for one kind does not hold back the others"],
)  # fmt: skip
def test_who_may_start(claims, expected):
    assert names(startable(claims, FOUR_GPUS)) == expected
    assert names(startable(claims[::-1], FOUR_GPUS)) == expected


def test_random_claims_never_take_more_than_there_is_and_the_first_is_never_overtaken():
    draw = random.Random(0)
    for _ in range(300):
        claims = [
            Claim(
                group(str(i), draw.choice([0.25, 0.5, 1, 2, 4]), draw.choice([0, 5]), draw.random(), draw.choice([None, "L4"])),
                False,
                draw.randrange(3),
            )
            for i in range(draw.randrange(1, 8))
        ]
        busy = list[TrainingGroup]()
        while claims:
            started = startable([*(Claim(one, True) for one in busy), *claims], FOUR_GPUS)
            first = min(claims, key=lambda claim: (-claim.group.priority, claim.submission, -claim.group.seconds)).group
            assert (first in started) == Room(FOUR_GPUS, busy).fits(first) or first.gpus > 3
            if not started and not busy:
                break  # asks for more than there is; plan_groups refuses it
            for one in started:
                busy.append(one)
                claims = [claim for claim in claims if claim.group != one]
            assert sum(one.gpus for one in busy) <= 4
            assert sum(one.gpus for one in busy if one.accelerator == "L4") <= 3
            busy = busy[1:]


def test_submissions_share_and_the_dead_keep_nothing(submissions, tmp_path, driver):  # noqa: F811
    first, second = (submissions.create(order_of(tmp_path, task)) for task in ("a", "b"))
    process = driver(first)
    mine = Turns(submissions, first, FOUR_GPUS, FOUR_GPUS)
    groups = [group(f"first {i}", seconds=10 - i) for i in range(3)]
    assert mine.next(groups, []) == groups
    yours = Turns(submissions, second, FOUR_GPUS, FOUR_GPUS)
    others = [group(f"second {i}", seconds=10 - i) for i in range(3)]
    second.set_state(SubmissionStatus.RUNNING)
    with second.driven():
        assert names(yours.next(others, [])) == ["second 0"]
        assert yours.next(others[1:], others[:1]) == []
        assert mine.next([], groups[1:]) == []  # one of the first submission's groups ended
        assert names(yours.next(others[1:], others[:1])) == ["second 1"]
        process.kill()
        process.wait()
        assert names(yours.next(others[2:], others[:2])) == ["second 2"]


def test_a_submission_uses_no_more_than_its_share(submissions, tmp_path):  # noqa: F811
    submission = submissions.create(order_of(tmp_path, "a"))
    turns = Turns(submissions, submission, FOUR_GPUS, replace(FOUR_GPUS, max_gpus=2.0))
    groups = [group(str(i), seconds=10 - i) for i in range(3)]
    assert turns.next(groups, []) == groups[:2]
    assert turns.next(groups[2:], groups[:2]) == []
    assert turns.next(groups[2:], groups[1:2]) == groups[2:]
