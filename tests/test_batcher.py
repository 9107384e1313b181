"""Batches: within the token budget, in order within an adapter, in turn between adapters; nothing is lost or doubled."""

import random

from serve.batcher import Batcher


def filled(max_tokens, *works):
    """Queue (key, number) pairs of 10 tokens each."""
    batcher = Batcher(max_tokens)
    for key, number in works:
        batcher.add(key, 10, (key, number))
    return batcher


def drained(batcher):
    batches = []
    while batch := batcher.next_batch():
        batches.append(batch)
    return batches


def test_empty_batcher_gives_an_empty_batch():
    assert Batcher(100).next_batch() == []


def test_adapters_take_turns_each_in_its_own_order():
    batcher = filled(100, *[("a", n) for n in range(4)], ("b", 0), ("b", 1), ("c", 0))
    assert batcher.next_batch() == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2), ("a", 3)]
    assert len(batcher) == 0


def test_batch_stops_at_the_budget_and_the_next_one_goes_on_with_whose_turn_it_is():
    batcher = filled(30, *[("a", n) for n in range(4)], ("b", 0), ("b", 1))
    assert drained(batcher) == [[("a", 0), ("b", 0), ("a", 1)], [("b", 1), ("a", 2), ("a", 3)]]


def test_work_over_the_budget_goes_alone():
    batcher = Batcher(30)
    batcher.add("a", 31, "long")
    batcher.add("b", 30, "full")
    batcher.add("c", 1, "short")
    assert drained(batcher) == [["long"], ["full"], ["short"]]


def test_flood_of_one_adapter_delays_another_by_one_batch_at_most():
    batcher = filled(50, *[("flood", n) for n in range(1000)])
    for round_ in range(20):
        batcher.next_batch()
        batcher.add("other", 10, ("other", round_))
        assert ("other", round_) in batcher.next_batch()


def test_new_adapter_gets_its_turn_among_many():
    keys = [f"task-{number}" for number in range(5)]
    batcher = filled(50, *[(key, n) for n in range(100) for key in keys])
    batcher.next_batch()
    batcher.add("new", 10, "late")
    assert "late" in [work for batch in (batcher.next_batch(), batcher.next_batch()) for work in batch]


def test_no_two_adapters_that_wait_differ_by_more_than_a_text_each():
    """The bound of start-time fair queueing, also while others come and go and come back."""
    for seed in range(100):
        rng = random.Random(seed)
        longest = 120
        batcher, had = Batcher(rng.randint(1, 300)), dict.fromkeys("abc", 0)
        for key, most in (("a", 5), ("b", 60), ("c", longest)):
            sizes = [rng.randint(1, most) for _ in range(40_000 // most)]
            for size in sizes:
                batcher.add(key, size, (key, size))
        for _ in range(30):
            for visitor in "xyz":
                if rng.random() < 0.3:
                    batcher.add(visitor, 50, (visitor, 50))
            for key, size in batcher.next_batch():
                had[key] = had.get(key, 0) + size
            waiting = [had[key] for key in "abc"]
            assert max(waiting) - min(waiting) <= 2 * longest


def test_who_asks_again_and_again_with_one_text_gets_no_more_than_who_waits():
    batcher = filled(20, *[("waits", n) for n in range(100)])
    taken = []
    for number in range(40):
        batcher.add("returns", 10, ("returns", number))
        taken += [key for key, _ in batcher.next_batch()]
    assert abs(taken.count("returns") - taken.count("waits")) <= 2


def test_random_traffic_loses_nothing_doubles_nothing_and_keeps_order():
    for seed in range(200):
        rng = random.Random(seed)
        max_tokens = rng.randint(1, 200)
        batcher, queued, taken = Batcher(max_tokens), [], []
        for number in range(80):
            work = (rng.choice("abcde"), rng.randint(1, 120), number)
            batcher.add(work[0], work[1], work)
            queued.append(work)
            assert len(batcher) == len(queued) - len(taken)
            if rng.random() < 0.2:
                taken += check_batch(batcher, queued, taken, max_tokens)
        while len(batcher):
            taken += check_batch(batcher, queued, taken, max_tokens)
        assert batcher.next_batch() == []
        assert sorted(taken, key=lambda work: work[2]) == queued
        for key in "abcde":
            assert [work for work in taken if work[0] == key] == [work for work in queued if work[0] == key]


def check_batch(batcher, queued, taken, max_tokens):
    """Take a batch; it keeps the budget."""
    num_waiting = {key: sum(work[0] == key for work in queued) - sum(work[0] == key for work in taken) for key in "abcde"}
    batch = batcher.next_batch()
    assert batch or not sum(num_waiting.values())
    assert len(batch) == 1 or sum(work[1] for work in batch) <= max_tokens
    return batch
