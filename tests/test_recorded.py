"""A recorded pass gives the states of an ordinary one, whatever is in the slots by then; what cannot be recorded is not used."""

import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.recorded import recorded_reader
from multilora.scoring import LabelSet, ScoringRow, pooled
from multilora.target_modules import match_modules

NO_LABELS = LabelSet((), None, ())
TOLERANCE = 1e-5
ROUTINGS = {
    "base alone": [None] * 5,
    "one adapter": [0] * 5,
    "ranks of several classes": [None, None, 0, 1, 1],
    "every row its own": [2, 1, 0, 2, None],
}


@pytest.fixture
def rig(fresh_base, random_adapter):
    """An encoder with slots of ranks 3, 8 and 1 (the last over two modules alone), and its reader."""
    base = fresh_base("encoder")
    slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), num_slots=4, max_rank=8)
    for slot, rank in enumerate((3, 8, 1)):
        slots.load(slot, random_adapter(slots, rank, seed=slot, names=list(slots.layers)[:2] if rank == 1 else None), 0.5 + slot)
    return SimpleNamespace(base=base, slots=slots, reader=recorded_reader(base, slots))


def rows_of(routing, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (len(routing),), generator=generator).tolist()
    ids = [tuple(torch.randint(5, 60, (length,), generator=generator).tolist()) for length in lengths]
    return [ScoringRow(tokens, slot, NO_LABELS) for tokens, slot in zip(ids, routing, strict=True)]


@torch.no_grad()
def both(rig, rows):
    """What ordinary passes make of each row, and what a recorded one makes of all."""
    rig.slots.reader = None
    one_by_one = torch.cat([pooled(rig.base, rig.slots, [row]) for row in rows])
    rig.slots.reader = rig.reader
    return one_by_one, pooled(rig.base, rig.slots, rows)


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_recorded_states_are_those_of_ordinary_passes(rig, routing):
    for seed in range(3):
        ordinary, recorded = both(rig, rows_of(routing, seed))
        assert torch.allclose(ordinary, recorded, atol=TOLERANCE)


def test_adapters_differ_so_that_the_comparison_means_something(rig):
    states = [both(rig, rows_of([slot]))[1] for slot in (None, 0, 1, 2)]
    assert all((a - b).abs().max() > 100 * TOLERANCE for i, a in enumerate(states) for b in states[:i])


def test_what_is_loaded_later_is_read_and_what_is_cleared_is_refused(rig, random_adapter):
    rows = rows_of([0, 0, 1])
    _, before = both(rig, rows)
    rig.slots.load(0, random_adapter(rig.slots, 4, seed=9), 2.0)
    ordinary, recorded = both(rig, rows)
    assert torch.allclose(ordinary, recorded, atol=TOLERANCE)
    assert not torch.allclose(before[:2], recorded[:2], atol=100 * TOLERANCE)
    assert torch.allclose(before[2], recorded[2], atol=TOLERANCE)
    rig.slots.clear(0)
    with pytest.raises(AdapterError, match="slot 0 is empty"):
        rig.reader(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long), [0])


def test_threads_share_a_recording(rig):
    batches = [rows_of(routing, seed) for seed, routing in enumerate([*ROUTINGS.values()] * 4)]
    expected = [both(rig, rows)[0] for rows in batches]

    def read(rows):
        with torch.inference_mode():
            return pooled(rig.base, rig.slots, rows)

    with ThreadPoolExecutor(4) as pool:
        for states, wanted in zip(pool.map(read, batches), expected, strict=True):
            assert torch.allclose(states, wanted, atol=TOLERANCE)


def test_training_takes_ordinary_passes(rig):
    rig.slots.reader = lambda *_: pytest.fail("a recorded pass has no gradients")
    assert pooled(rig.base, rig.slots, rows_of([0, 1])).shape == (2, rig.base.files.hidden_size)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_other_families_are_not_recorded(fresh_base, kind):
    base = fresh_base(kind)
    assert recorded_reader(base, AdapterSlots(base.model, match_modules(base.model, "all-linear"), 1, 4)) is None


def refuses_tracers(forward, ids, **given):
    if torch.jit.is_tracing():
        raise RuntimeError("data-dependent")
    return forward(ids, **given)


def bakes_its_length_in(forward, ids, **given):
    found = forward(ids, **given)
    found.last_hidden_state = found.last_hidden_state * float(ids.shape[1])
    return found


@pytest.mark.parametrize("change", [refuses_tracers, bakes_its_length_in])
def test_a_base_that_cannot_be_recorded_is_said_and_not_used(fresh_base, monkeypatch, caplog, change):
    base = fresh_base("encoder")
    slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), 1, 4)
    forward = base.model.forward
    monkeypatch.setattr(base.model, "forward", lambda input_ids, **given: change(forward, input_ids, **given))
    with caplog.at_level(logging.WARNING):
        assert recorded_reader(base, slots) is None
    assert "cannot be recorded" in caplog.text
