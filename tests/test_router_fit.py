"""The fit recovers tasks that can be told apart, chooses its threshold as an exhaustive search does, and uses no gate text."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from tiny_routers import SIZES, WORDS, examples_of, router_data

from multilora.task_router import ABSTAINED, linear_scores, read_router, routed_to, text_of
from orchestrator.router_fit import MIN_THRESHOLD, fit_router, fit_weights, lowest_threshold, routes_of
from serve.engine import Engine

TASKS = list(WORDS)


@pytest.fixture(scope="module")
def engine_of(fresh_base):
    """An engine over the tiny base of a family."""
    engines = {family: Engine(fresh_base(family), 1, 1) for family in FAMILIES}
    return engines.__getitem__


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_tasks", [2, 4])
def test_tasks_of_different_words_are_told_apart(engine_of, tmp_path, family, num_tasks):
    engine = engine_of(family)
    data = router_data(engine.base.spec, TASKS[:num_tasks])
    router = fit_router(data, engine, tmp_path / "router")
    card = router.card
    assert card.tasks == TASKS[:num_tasks]
    assert min(card.gate.recall(task) for task in card.tasks) > 0.7
    assert card.gate.precision > 0.9
    assert card.select.precision >= data.precision
    assert [card.gate.num_texts(task) for task in card.tasks] == [SIZES["gate"]] * num_tasks
    for task, examples in data.gate.items():
        went = [routed_to(row, card.threshold) for row in router.probabilities(list(map(_text, examples)), engine.embed)]
        assert {to: went.count(to) for to in went} == card.gate.counts[task]


def _text(example):
    return text_of(example.columns)


def test_what_was_fitted_is_what_is_read_back_and_binds(engine_of, tmp_path):
    engine = engine_of("encoder")
    router = fit_router(router_data(engine.base.spec, TASKS), engine, tmp_path / "router")
    again = read_router(tmp_path / "router", router.digest)
    again.check_base(engine.base.files.fingerprint, engine.embed)
    examples = [example for task in TASKS for example in examples_of(task, 5, "other")]
    assert routes_of(again, examples, engine) == routes_of(router, examples, engine)
    assert [canary.text for canary in router.card.canaries] == [_text(examples_of(task, 1, "train")[0]) for task in TASKS]


def test_the_same_data_gives_the_same_router(engine_of, tmp_path):
    engine = engine_of("encoder")
    first, second = (fit_router(router_data(engine.base.spec, TASKS), engine, tmp_path / name) for name in ("a", "b"))
    assert first.digest == second.digest


def test_gate_texts_choose_nothing(engine_of, tmp_path):
    engine = engine_of("encoder")
    data = router_data(engine.base.spec, TASKS)
    # All gate texts of a task belong to another one: what is measured changes, and nothing else.
    turned = replace(data, gate=dict(zip(TASKS, [*list(data.gate.values())[1:], data.gate[TASKS[0]]], strict=True)))
    honest, other = fit_router(data, engine, tmp_path / "a"), fit_router(turned, engine, tmp_path / "b")
    assert torch.equal(honest.weights_KH, other.weights_KH)
    assert torch.equal(honest.bias_K, other.bias_K)
    assert honest.card.model_dump(exclude={"gate"}) == other.card.model_dump(exclude={"gate"})
    assert other.card.gate.precision < 0.1 < honest.card.gate.precision
    assert data.fingerprint == turned.fingerprint


def test_the_fingerprint_covers_what_decides(engine_of):
    data = router_data(engine_of("encoder").base.spec, TASKS)
    fewer = {task: examples[1:] for task, examples in data.train.items()}
    others = [
        replace(data, train=fewer),
        replace(data, select={task: examples[1:] for task, examples in data.select.items()}),
        replace(data, precision=0.9),
        replace(data, max_length_tokens=16),
        # The same examples, between other tasks.
        replace(data, train=dict(zip(TASKS, [*list(data.train.values())[1:], data.train[TASKS[0]]], strict=True))),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_a_threshold_that_nothing_reaches_routes_nothing(engine_of, tmp_path):
    """Two tasks with the same texts cannot be told apart, and the router says so."""
    engine = engine_of("encoder")
    data = router_data(engine.base.spec, ["cards", "mood"])
    same = {name: dict.fromkeys(("cards", "mood"), getattr(data, name)["cards"]) for name in ("train", "select", "gate")}
    router = fit_router(replace(data, **same), engine, tmp_path / "router")
    assert router.card.gate.counts == {"cards": {ABSTAINED: SIZES["gate"]}, "mood": {ABSTAINED: SIZES["gate"]}}
    assert router.card.gate.precision == router.card.gate.abstained == 1


# Weights


def clouds(sizes, seed=0, num_dims=8, distance=1.5):
    """Overlapping clouds of points, one per task, and which task each belongs to."""
    rng = np.random.default_rng(seed)
    points = [rng.normal(size=(size, num_dims)) + distance * np.eye(num_dims)[task] for task, size in enumerate(sizes)]
    return np.concatenate(points).astype(np.float32), [task for task, size in enumerate(sizes) for _ in range(size)]


def recalls(weights_KH, bias_K, states_BH, gold):
    found = linear_scores(torch.tensor(states_BH), weights_KH, bias_K).argmax(-1).numpy()
    return [float((found == task)[np.array(gold) == task].mean()) for task in range(len(bias_K))]


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_a_small_task_counts_as_much_as_a_large_one(num_tasks):
    states_BH, gold = clouds([2000, *[100] * (num_tasks - 1)])
    found = recalls(*fit_weights(states_BH, gold), *clouds([1000] * num_tasks, seed=1))
    assert max(found) - min(found) < 0.1
    assert min(found) > 0.7


def test_weights_do_not_depend_on_the_scale_of_the_states():
    """The states of most bases are nearly parallel: their differences are small beside their mean."""
    states_BH, gold = clouds([200, 100, 50])
    other_BH, other_gold = clouds([100, 100, 100], seed=1)
    expected = recalls(*fit_weights(states_BH, gold), other_BH, other_gold)

    def parallel(points_BH):
        return (1 + 1e-3 * points_BH).astype(np.float32)

    found = recalls(*fit_weights(parallel(states_BH), gold), parallel(other_BH), other_gold)
    assert found == pytest.approx(expected, abs=0.02)


def test_of_two_tasks_the_first_scores_zero_and_the_second_its_log_odds():
    states_BH, gold = clouds([100, 100])
    weights_KH, bias_K = fit_weights(states_BH, gold)
    assert torch.equal(weights_KH[0], torch.zeros(8))
    assert bias_K[0] == 0
    assert min(recalls(weights_KH, bias_K, states_BH, gold)) > 0.7


# Threshold


def exhaustive(confidences, is_right, precision):
    """Try every threshold that makes a difference, from the lowest."""
    for threshold in sorted({MIN_THRESHOLD, *confidences}):
        routed = [right for confidence, right in zip(confidences, is_right, strict=True) if confidence >= threshold]
        if threshold >= MIN_THRESHOLD and routed and sum(routed) / len(routed) >= precision:
            return threshold
    return 1.0


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.95, 1.0])
def test_the_threshold_is_the_lowest_that_is_precise_enough(precision):
    rng = random.Random(0)
    for _ in range(500):
        # Few values, so that many are equal.
        confidences = [rng.choice([0.3, 0.45, 0.5, 0.55, 0.7, 0.8, 0.9, 0.99]) for _ in range(rng.randint(1, 12))]
        is_right = [rng.random() < confidence for confidence in confidences]
        seen = lowest_threshold(confidences, is_right, precision)
        assert seen == exhaustive(confidences, is_right, precision), (confidences, is_right)


@pytest.mark.parametrize(
    ("confidences", "is_right", "threshold"),
    [
        ([0.9, 0.8, 0.6], [True, True, True], MIN_THRESHOLD),
        ([0.9, 0.8, 0.6], [True, True, False], 0.8),
        ([0.9, 0.8, 0.6], [False, True, True], 1.0),
        ([0.9, 0.9, 0.6], [True, False, True], 1.0),
        # What is below a half must not make up for what is above.
        ([0.6, 0.4, 0.4, 0.4], [False, True, True, True], 1.0),
        ([0.4], [True], 1.0),
        ([], [], 1.0),
    ],
)
def test_thresholds_worked_by_hand(confidences, is_right, threshold):
    assert lowest_threshold(confidences, is_right, 0.7) == threshold
