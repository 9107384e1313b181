"""An adapter's batches depend on its own seed and step alone; each epoch shows every example once."""

import random
from collections import Counter

import pytest

from orchestrator.batching import batch_indices, drawn_wording, dropout_key, num_steps_per_epoch


@pytest.mark.parametrize(("num_examples", "batch_size", "expected"), [(1, 16, 1), (16, 16, 1), (17, 16, 2), (173, 16, 11)])
def test_steps_per_epoch(num_examples, batch_size, expected):
    assert num_steps_per_epoch(num_examples, batch_size) == expected


@pytest.mark.parametrize("seed", range(50))
def test_every_epoch_is_a_permutation_cut_into_batches(seed):
    rng = random.Random(seed)
    num_examples, batch_size, epoch = rng.randint(1, 60), rng.randint(1, 20), rng.randint(0, 5)
    per_epoch = num_steps_per_epoch(num_examples, batch_size)
    batches = [batch_indices(num_examples, batch_size, seed, epoch * per_epoch + step) for step in range(per_epoch)]
    assert sorted(index for batch in batches for index in batch) == list(range(num_examples))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_epochs_seeds_and_nothing_else_change_the_order():
    first = batch_indices(30, 30, 0, 0)
    assert first != list(range(30))
    assert first == batch_indices(30, 30, 0, 0)
    assert first != batch_indices(30, 30, 0, 1)
    assert first != batch_indices(30, 30, 1, 0)
    # The order within an epoch does not depend on the batch size.
    assert first == [index for step in range(6) for index in batch_indices(30, 5, 0, step)]


def test_wordings_are_drawn_evenly_by_seed_epoch_and_example():
    assert {drawn_wording(1, seed, 0, 0) for seed in range(9)} == {0}
    draws = {(seed, epoch, i): drawn_wording(3, seed, epoch, i) for seed in (0, 1) for epoch in (0, 1) for i in range(600)}
    assert draws == {place: drawn_wording(3, *place) for place in draws}
    assert all(abs(count - 800) < 80 for count in Counter(draws.values()).values()), "2,400 draws of three"
    first = [draws[0, 0, i] for i in range(600)]
    for other in ((0, 1), (1, 0)):
        same = sum(draws[*other, i] == first[i] for i in range(600))
        assert abs(same - 200) < 60


def test_a_step_needs_no_earlier_step():
    assert batch_indices(10, 3, 7, 10**6) == batch_indices(10, 3, 7, 10**6)


def test_dropout_keys_are_31_bits_and_differ():
    keys = Counter(dropout_key(seed, step, row) for seed in range(5) for step in range(20) for row in range(20))
    assert max(keys.values()) == 1
    assert all(0 <= key < 2**31 for key in keys)
    assert dropout_key(1, 2, 3) == dropout_key(1, 2, 3)
