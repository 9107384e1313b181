"""Segments, row order, and batches of rows of similar length."""

import random
from functools import cache

import pytest

from multilora.segments import Segment, length_batches, order_by_slot, product_runs, segments_of


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([], ()),
        ([None, None], (Segment(None, 2),)),
        ([0, 0, None, 2, 0], (Segment(0, 2), Segment(None, 1), Segment(2, 1), Segment(0, 1))),
    ],
)
def test_segments_join_neighbours_of_equal_slot(slots, expected):
    assert segments_of(slots) == expected


def test_runs_touch_and_have_equal_lengths():
    spans = [(0, 0, 2), (3, 2, 4), (1, 4, 5), (2, 6, 7), (4, 7, 8)]
    assert list(product_runs(spans, [8] * 5, by_row=False)) == [spans[:2], spans[2:3], spans[3:]]
    assert list(product_runs([], [], by_row=True)) == []


def test_by_row_unequal_neighbours_of_like_rank_are_one_product_and_equal_ones_stay_whole():
    unequal, apart, other = [(0, 0, 2), (3, 2, 5)], [(1, 6, 8), (2, 8, 10)], [(4, 10, 13), (5, 13, 14)]
    rows = [[(0, 0, 1), (0, 1, 2), (3, 2, 3), (3, 3, 4), (3, 4, 5)], apart, [(4, 10, 11), (4, 11, 12), (4, 12, 13), (5, 13, 14)]]
    assert list(product_runs(unequal + apart + other, [8, 8, 8, 8, 64, 64], by_row=True)) == rows


def test_runs_have_ranks_that_padding_at_most_doubles():
    spans = [(slot, slot, slot + 1) for slot in range(6)]
    assert list(product_runs(spans, [5, 8, 9, 16, 256, 1], by_row=False)) == [spans[:2], spans[2:4], spans[4:5], spans[5:]]


def test_order_puts_like_ranks_side_by_side():
    assert order_by_slot([0, 1, 2, 3, 3], [256, 8, 200, 8]) == [1, 3, 4, 0, 2]


def test_order_puts_equally_many_rows_side_by_side_among_like_ranks():
    assert order_by_slot([0, 1, 1, 2, 3, 3, 4], [8, 8, 8, 8, 64]) == [0, 3, 1, 2, 4, 5, 6]


def test_order_puts_base_rows_first_and_is_stable_within_a_slot():
    assert order_by_slot([2, None, 0, 2, None, 0], [8, 0, 8]) == [1, 4, 2, 5, 0, 3]


def test_ordered_rows_have_one_segment_per_slot():
    rng = random.Random(0)
    for _ in range(50):
        slots = [rng.choice([None, 0, 1, 2, 3]) for _ in range(rng.randint(0, 20))]
        ranks = [rng.choice([1, 2, 8]) for _ in range(4)]
        order = order_by_slot(slots, ranks)
        assert sorted(order) == list(range(len(slots)))
        segments = segments_of([slots[row] for row in order])
        assert {segment.slot: segment.num_rows for segment in segments} == {slot: slots.count(slot) for slot in slots}
        assert len(segments) == len(set(slots))


def padded_width(length, multiple):
    return -(-length // multiple) * multiple


def cost_of(batches, lengths, overhead_tokens, multiple):
    """Padded tokens plus overhead of each batch, by definition."""
    return sum(len(rows) * padded_width(max(lengths[row] for row in rows), multiple) + overhead_tokens for rows in batches)


def cheapest(lengths, max_tokens, overhead_tokens, multiple):
    """Lowest cost over every way to split the rows into batches (all set partitions)."""

    @cache
    def lowest(rows):
        if not rows:
            return 0
        first, rest = rows[0], rows[1:]
        costs = []
        for chosen in range(2 ** len(rest)):
            batch = [first, *(row for bit, row in enumerate(rest) if chosen >> bit & 1)]
            if len(batch) == 1 or len(batch) * padded_width(max(lengths[row] for row in batch), multiple) <= max_tokens:
                others = tuple(row for row in rest if row not in batch)
                costs.append(cost_of([batch], lengths, overhead_tokens, multiple) + lowest(others))
        return min(costs)

    return lowest(tuple(range(len(lengths))))


@pytest.mark.parametrize("seed", range(150))
def test_length_batches_cost_least(seed):
    # Few distinct widths and budgets of a few rows: there cuts inside a width and half-empty batches matter.
    rng = random.Random(seed)
    multiple = rng.choice([1, 4, 8])
    choices = [rng.randint(1, 40) for _ in range(rng.randint(1, 3))]
    lengths = [rng.choice(choices) for _ in range(rng.randint(1, 8))]
    max_tokens, overhead_tokens = rng.randint(8, 120), rng.choice([0, 5, 16, 60])
    batches = length_batches(lengths, max_tokens, overhead_tokens, multiple)
    assert cost_of(batches, lengths, overhead_tokens, multiple) == cheapest(lengths, max_tokens, overhead_tokens, multiple)


@pytest.mark.parametrize("seed", range(20))
def test_length_batches_cover_each_row_once_within_the_budget(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 200) for _ in range(rng.randint(1, 300))]
    max_tokens = rng.choice([64, 500, 4096])
    batches = length_batches(lengths, max_tokens, rng.choice([0, 100]), 8)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * padded_width(max(lengths[row] for row in rows), 8) <= max_tokens
    widest = [padded_width(max(lengths[row] for row in rows), 8) for rows in batches]
    assert widest == sorted(widest), "short rows first"


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "overhead_tokens", "expected"),
    [
        ([], 64, 0, []),
        ([500], 64, 0, [[0]]),
        ([3, 9, 2], 64, 0, [[0, 2], [1]]),
        ([3, 9, 2], 64, 100, [[0, 2, 1]]),
        ([5] * 5, 20, 0, [[0, 1], [2, 3], [4]]),
        ([8] * 5 + [16], 32, 16, [[0, 1, 2, 3], [4, 5]]),
    ],
)
def test_length_batches_by_hand(lengths, max_tokens, overhead_tokens, expected):
    assert length_batches(lengths, max_tokens, overhead_tokens, 8) == expected
