"""Temperatures against scores whose true temperature is known, and the calibration error by hand."""

import math

import numpy as np
import pytest
from tiny_adapters import MAIL, TEXTS, item_of

from orchestrator.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, expected_calibration_error, fit_temperature
from orchestrator.dataset import Example
from orchestrator.eval_report import EvalItem
from orchestrator.evaluate import evaluate
from serve.answer import softmax


def labelled_scores(temperature, num_examples=4000, num_labels=4):
    """Scores, and gold labels drawn with the probabilities softmax(scores / temperature)."""
    rng = np.random.default_rng(7)
    scores_BL = rng.normal(0.0, 2.0 * temperature, (num_examples, num_labels))
    gold = [int(rng.choice(num_labels, p=softmax(row, temperature))) for row in scores_BL.tolist()]
    return scores_BL.tolist(), gold


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_gave_the_labels_is_found(temperature):
    assert fit_temperature(*labelled_scores(temperature)) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("num_examples", [1, 2, 30])
def test_a_split_that_is_answered_right_throughout_leaves_doubt(num_examples):
    scores, gold = [[0.5, 2.5], [2.5, 0.5]] * num_examples, [1, 0] * num_examples
    # 2n examples make p / (1 - p) = 2n + 1, and the scores are 2 apart, so exp(2 / temperature) = 2n + 1.
    assert fit_temperature(scores, gold) == pytest.approx(2 / math.log(2 * num_examples + 1), rel=1e-4)


def test_doubt_is_shared_by_the_other_labels():
    # One example: the gold label gets 2/3 and the two others 1/6 each, which exp(1 / temperature) = 4 gives exactly.
    assert fit_temperature([[0.0, 1.0, 0.0]], [1]) == pytest.approx(1 / math.log(4), rel=1e-4)


EXTREMES = {
    "all right, close together": ([[1e-9, 0.0], [0.0, 1e-9]], [0, 1], MIN_TEMPERATURE),
    "all right, far apart": ([[1e4, -1e4], [-1e4, 1e4]], [0, 1], MAX_TEMPERATURE),
    "all wrong": ([[0.1, 0.0], [0.0, 0.1]], [1, 0], MAX_TEMPERATURE),
    "all wrong, far apart": ([[1e4, -1e4], [-1e4, 1e4]], [1, 0], MAX_TEMPERATURE),
}


@pytest.mark.parametrize(("scores", "gold", "bound"), EXTREMES.values(), ids=EXTREMES)
def test_the_temperature_stays_within_its_bounds(scores, gold, bound):
    temperature = fit_temperature(scores, gold)
    assert MIN_TEMPERATURE < temperature < MAX_TEMPERATURE
    assert temperature == pytest.approx(bound, rel=1e-3)
    assert all(math.isfinite(p) for row in scores for p in softmax(row, temperature))


def test_equal_scores_say_nothing_and_break_nothing():
    assert MIN_TEMPERATURE < fit_temperature([[2.0, 2.0], [2.0, 2.0]], [0, 1]) < MAX_TEMPERATURE


def test_calibration_lowers_the_error_on_other_examples_and_changes_no_answer():
    scores, gold = labelled_scores(3.0)
    temperature = fit_temperature(scores[:500], gold[:500])
    errors = {}
    for name, divisor in (("before", 1.0), ("after", temperature)):
        rows = [softmax(row, divisor) for row in scores[500:]]
        correct = [row.index(max(row)) == label for row, label in zip(rows, gold[500:], strict=True)]
        assert correct == [row.index(max(row)) == label for row, label in zip(scores[500:], gold[500:], strict=True)]
        errors[name] = expected_calibration_error([max(row) for row in rows], correct)
    assert errors["before"] > 0.15
    assert errors["after"] < 0.03


def test_calibration_error_by_hand():
    # Bins are 1/15 wide. (13/15, 14/15]: 0.90 wrong, 0.92 right; (8/15, 9/15]: 0.58 and 0.60 right; the last bin: 1.0 right.
    confidences, correct = [0.90, 0.58, 1.0, 0.92, 0.60], [False, True, True, True, True]
    by_hand = 2 / 5 * abs(0.91 - 0.5) + 2 / 5 * abs(0.59 - 1.0) + 1 / 5 * 0.0
    assert expected_calibration_error(confidences, correct) == pytest.approx(by_hand)


def test_calibration_error_of_the_best_and_the_worst():
    assert expected_calibration_error([1.0] * 3, [True] * 3) == 0.0
    assert expected_calibration_error([1.0] * 3, [False] * 3) == 1.0
    # Right as often as it says: 0.75 in three of four cases.
    assert expected_calibration_error([0.75] * 4, [True, False, True, True]) == 0.0


def test_a_confidence_for_every_verdict():
    with pytest.raises(ValueError, match="zip"):
        expected_calibration_error([0.5, 0.6], [True])


def test_evaluation_takes_the_temperature_from_the_card_and_the_base_has_none(tiny_adapter):
    artifact = tiny_adapter("encoder", MAIL)
    labels = [name for name, _ in MAIL.labels]
    rows = tuple(Example(f"{i}", item_of(MAIL, text), labels[i % 4]) for i, text in enumerate(TEXTS))
    item = EvalItem("mail", 1, artifact.digest, str(artifact.folder), rows, "gate", rows)
    outcome = evaluate(artifact.card.base, [item])
    assert outcome.errors == {}
    for system, temperature in (("mail@1", MAIL.temperature), ("zero-shot", 1.0)):
        report = outcome.reports["mail", system]
        assert report.temperature == temperature
        confidences = [max(softmax(graded.scores, temperature)) for graded in report.answers]
        assert [graded.probability for graded in report.answers] == confidences
        assert report.calibration_errors["ece"] == pytest.approx(expected_calibration_error(confidences, report.correct))
        uncalibrated = [max(softmax(graded.scores, 1.0)) for graded in report.answers]
        assert report.calibration_errors["ece_uncalibrated"] == pytest.approx(
            expected_calibration_error(uncalibrated, report.correct)
        )
