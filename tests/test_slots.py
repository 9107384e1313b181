"""Slots: an adapter keeps its slot while it is used, the least recently used one goes first, a pinned one never."""

import random

import pytest

from multilora.errors import CapacityError
from serve.slots import Placement, SlotTable


def test_first_adapters_fill_the_slots_in_order():
    table = SlotTable(3)
    assert [table.assign(key) for key in "abc"] == [Placement(slot, True, None) for slot in range(3)]
    assert table.residents == {"a": 0, "b": 1, "c": 2}


def test_resident_adapter_keeps_its_slot_and_is_not_loaded_again():
    table = SlotTable(2)
    table.assign("a")
    table.assign("b")
    assert table.assign("a") == Placement(0, must_load=False, evicted=None)


def test_least_recently_used_adapter_is_evicted():
    table = SlotTable(2)
    for key in "aba":
        table.assign(key)
    assert table.assign("c") == Placement(1, must_load=True, evicted="b")
    assert table.assign("b") == Placement(0, must_load=True, evicted="a")
    assert table.residents == {"c": 1, "b": 0}


def test_pinned_adapters_stay():
    table = SlotTable(2)
    table.assign("a")
    table.assign("b")
    assert table.assign("c", pinned=("a", "c")).evicted == "b"


def test_no_slot_left_says_what_to_do_and_changes_nothing():
    table = SlotTable(2)
    table.assign("a")
    table.assign("b")
    with pytest.raises(CapacityError, match="all 2 slots are in use; retry, or serve with more slots"):
        table.assign("c", pinned=("a", "b", "c"))
    assert table.residents == {"a": 0, "b": 1}
    assert not table.assign("a", pinned=("a", "b", "c")).must_load


def test_released_slot_is_used_before_anything_is_evicted():
    table = SlotTable(2)
    table.assign("a")
    table.assign("b")
    assert table.release("a") == 0
    assert table.release("a") is None
    assert table.assign("c") == Placement(0, must_load=True, evicted=None)


def test_random_histories_match_a_plain_list_of_keys():
    for seed in range(200):
        rng = random.Random(seed)
        num_slots = rng.randint(1, 5)
        table, used = SlotTable(num_slots), []  # keys, least recently used first
        for _ in range(60):
            key = rng.choice("abcdefgh")
            if rng.random() < 0.2:
                assert (table.release(key) is not None) == (key in used)
                used = [other for other in used if other != key]
            else:
                before, pinned = table.residents, rng.sample("abcdefgh", rng.randint(0, 2))
                victims = [other for other in used if other not in pinned]
                if key not in used and len(used) == num_slots and not victims:
                    with pytest.raises(CapacityError):
                        table.assign(key, pinned)
                    continue
                placement = table.assign(key, pinned)
                assert placement.must_load == (key not in used)
                assert placement.evicted == (victims[0] if key not in used and len(used) == num_slots else None)
                used = [other for other in used if other not in (key, placement.evicted)] + [key]
                assert all(table.residents[other] == before[other] for other in used if other in before)
            assert list(table.residents) == used
            assert len(set(table.residents.values())) == len(used) <= num_slots
            assert set(table.residents.values()) <= set(range(num_slots))
