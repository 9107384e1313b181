"""Metrics against scikit-learn and by hand."""

import random

import pytest
from sklearn.metrics import accuracy_score, f1_score

from multilora.spec import GateSpec
from orchestrator.metrics import METRICS, accuracy, macro_f1, token_f1


@pytest.mark.parametrize("seed", range(30))
def test_metrics_equal_scikit_learns(seed):
    rng = random.Random(seed)
    gold = rng.choices(["a", "b", "c"], k=rng.randint(1, 60))
    # Answers may have labels that gold lacks, and the other way round.
    answers = [g if rng.random() < 0.6 else rng.choice("bcd") for g in gold]
    assert accuracy(gold, answers) == pytest.approx(accuracy_score(gold, answers))
    assert macro_f1(gold, answers) == pytest.approx(f1_score(gold, answers, average="macro", zero_division=0.0))


def test_macro_f1_by_hand():
    # a: 2 of 3 right, no false a: 4/5. b: right once, one false b: 2/3.
    assert macro_f1(["a", "a", "a", "b"], ["a", "a", "b", "b"]) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert macro_f1(["a", "a"], ["b", "b"]) == 0.0
    assert macro_f1(["a", "b"], ["a", "b"]) == 1.0


def test_a_class_that_is_never_answered_shows_in_macro_f1_only():
    gold, answers = ["a"] * 9 + ["b"], ["a"] * 10
    assert accuracy(gold, answers) == 0.9
    assert macro_f1(gold, answers) == pytest.approx((18 / 19) / 2)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_different_lengths_are_an_error(metric):
    with pytest.raises(ValueError, match="zip"):
        metric(["a", "b"], ["a"])


def test_every_metric_of_the_spec_exists():
    assert set(METRICS) == set(GateSpec.model_fields["metric"].annotation.__args__)


def test_accuracy_of_texts_is_exact_match_but_for_case_and_spaces():
    assert accuracy(["Lost  card", "Straße", "a card", "yes"], [" lost card\n", "STRASSE", "card", "yes."]) == 0.5


def test_token_f1_by_hand():
    # 2 of 3 gold words and 2 of 4 answered words are shared: 4/7. The repeated word counts once, for gold has it once.
    assert token_f1(["lost my card"], ["Card  LOST yesterday card"]) == pytest.approx(4 / 7)
    assert token_f1(["a b", "a b", "a b"], ["b a", "", "c"]) == pytest.approx(1 / 3)
