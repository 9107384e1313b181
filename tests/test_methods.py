"""Rows of one method are summarised over seeds; none is left out."""

import pytest

from orchestrator.methods import MethodRow, summarise

GOLD = ("a", "b", "a", "b")


def test_seeds_are_put_together_in_order():
    rows = [
        MethodRow("curve", "adapter", ("a", "b", "a", "b"), 100, seed=0, train_s=2.0, ms_per_text=1.0, num_trained=7),
        MethodRow("curve", "adapter", ("a", "b", "a", "b"), 25, seed=0),
        MethodRow("curve", "adapter", ("a", "b", "b", "a"), 100, seed=1, train_s=4.0, ms_per_text=3.0, disk_bytes=9),
    ]
    first, second = summarise(rows, GOLD)
    assert (first.num_train, first.num_seeds, first.accuracy, first.lowest, first.highest) == (100, 2, 0.75, 0.5, 1.0)
    assert first.spread == pytest.approx(0.125**0.5)
    assert (first.train_s, first.ms_per_text, first.num_trained, first.disk_bytes) == (3.0, 2.0, 7, 9)
    assert first.interval[0] < 0.75 < first.interval[1]
    assert (second.num_train, second.num_seeds, second.spread) == (25, 1, 0.0)


def test_what_is_no_label_is_wrong_and_counted():
    (found,) = summarise([MethodRow("prompting", "zero-shot, generated", ("a", None, None, "b"))], GOLD)
    assert (found.accuracy, found.ill_formed) == (0.5, 0.5)


def test_what_could_not_run_stays_with_its_reason():
    (found,) = summarise([MethodRow("alone", "IA3", skipped="needs a generative base")], GOLD)
    assert (found.num_seeds, found.skipped) == (0, "needs a generative base")
    rows = [MethodRow("alone", "IA3", GOLD), MethodRow("alone", "IA3", seed=1, skipped="the loss is not finite")]
    (found,) = summarise(rows, GOLD)
    assert (found.num_seeds, found.accuracy, found.skipped) == (1, 1.0, "")
