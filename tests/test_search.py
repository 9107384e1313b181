"""Which settings a search tries, which candidates end early, which one wins: worked by hand, and laws over random searches."""

import random
from dataclasses import replace

import pytest

from multilora.spec import SearchSpec, TaskSpec
from multilora.spec_hash import spec_hash
from orchestrator.search import (
    FOUND,
    Fate,
    Found,
    Result,
    Trail,
    candidates,
    fates,
    found_of,
    load_trails,
    planned_epochs,
    searched,
    setting_of,
    store_trails,
    winner,
)

SPEC = TaskSpec(
    name="mood", base={"model": "org/model"}, data={"train": "a.jsonl"}, instruction="{text} {labels}",
    labels={"good": None, "bad": None}, lora={"rank": 8}, train={"learning_rate": 1e-3, "epochs": 4},
)  # fmt: skip
OWN = (1e-3, 8, 4)


def settings_of(spec=SPEC, **search):
    return [tuple(setting_of(one).values()) for one in candidates(spec.model_copy(update={"search": SearchSpec(**search)}))]


def trail(*values, epochs=4, end="", losses=None):
    """A candidate with these values after its first epochs, all with loss 1 where `losses` does not say otherwise."""
    losses = losses or [1.0] * len(values)
    pairs = enumerate(zip(values, losses, strict=True), start=1)
    return Trail(epochs, tuple(Result(epoch, value, loss, 0) for epoch, (value, loss) in pairs), end)


# Candidates


def test_without_a_search_there_is_no_candidate():
    assert candidates(SPEC) == ()


def test_the_default_search_tries_rates_and_ranks_around_the_specs_own():
    found = settings_of()
    assert found[0] == OWN
    assert sorted(found) == [(rate, rank, 4) for rate in (0.000333, 1e-3, 3e-3) for rank in (4, 8, 16)]
    assert candidates(searched(SPEC)) == candidates(SPEC.model_copy(update={"search": SearchSpec()}))
    listed = SPEC.model_copy(update={"search": SearchSpec(rank=[4])})
    assert searched(listed) is listed


def test_a_default_search_stays_within_the_ranges():
    spec = SPEC.model_copy(
        update={"lora": SPEC.lora.model_copy(update={"rank": 1}), "train": SPEC.train.model_copy(update={"learning_rate": 0.9})}
    )
    assert sorted(settings_of(spec)) == [(rate, rank, 4) for rate in (0.3, 0.9, 1.0) for rank in (1, 2)]


@pytest.mark.parametrize(
    ("search", "others"),
    [
        ({"rank": [4, 16]}, [(1e-3, 4, 4), (1e-3, 16, 4)]),
        ({"rank": [4, 8, 4]}, [(1e-3, 4, 4)]),
        ({"learning_rate": [0.01], "epochs": [2, 4]}, [(0.01, 8, 2), (0.01, 8, 4)]),
    ],
)
def test_a_list_is_combined_with_the_specs_own_values_of_what_is_not_listed(search, others):
    assert settings_of(**search) == [OWN, *others]


def test_candidates_differ_in_their_settings_alone():
    spec = SPEC.model_copy(update={"search": SearchSpec(rank=[2])})
    own, other = candidates(spec)
    assert own == SPEC
    assert other == SPEC.model_copy(update={"lora": SPEC.lora.model_copy(update={"rank": 2})})
    assert spec_hash(own) != spec_hash(other) != spec_hash(spec) != spec_hash(own)


def test_of_a_large_grid_the_seed_draws_and_the_specs_own_setting_is_always_there():
    search = {"learning_rate": [1e-4, 1e-3, 1e-2], "rank": [2, 4, 8, 16], "epochs": [1, 2, 4, 8], "num_candidates": 10}
    found = settings_of(**search)
    assert found == settings_of(**search)
    assert found[0] == OWN
    assert len(set(found)) == 10
    assert found[1:] == sorted(found[1:])
    other_seed = SPEC.model_copy(update={"train": SPEC.train.model_copy(update={"seed": 1})})
    assert settings_of(other_seed, **search) != found
    assert len(settings_of(**{**search, "num_candidates": 48})) == 48
    assert len(settings_of(**{**search, "num_candidates": 47})) == 47


# Fates. Four candidates of four epochs meet after the first (two go on) and the second (one goes on), beside the first of them.

T, W, D, O = Fate.TRAIN, Fate.WAIT, Fate.DROPPED, Fate.OVER  # noqa: E741


@pytest.mark.parametrize(
    ("trails", "expected"),
    [
        ([trail(), trail(), trail(), trail()], [T, T, T, T]),
        ([trail(0.5), trail(0.6), trail(0.7), trail()], [W, W, W, T]),
        ([trail(0.5), trail(0.6), trail(0.7), trail(0.4)], [T, T, T, D]),
        ([trail(0.4), trail(0.6), trail(0.7), trail(0.5)], [T, T, T, D]),
        ([trail(0.9), trail(0.6), trail(0.7), trail(0.5)], [T, D, T, D]),
        ([trail(0.5), trail(0.6), trail(0.6, losses=[0.9]), trail(0.6, losses=[0.8])], [T, D, T, T]),
        ([trail(0.5), trail(0.6), trail(0.6), trail(0.6)], [T, T, T, D]),
        ([trail(0.4, 0.5), trail(0.6, 0.6), trail(0.7, 0.1), trail(0.5)], [T, D, T, D]),
        ([trail(0.4, 0.5), trail(0.6, 0.8), trail(0.7, 0.1), trail(0.5)], [T, T, D, D]),
        ([trail(0.4, 0.5), trail(0.6, 0.8), trail(0.7), trail(0.5)], [W, W, T, D]),
        ([trail(0.4, 0.5, 0.6, 0.6, end="finished"), trail(0.6, 0.8), trail(0.7, 0.1), trail(0.5)], [O, T, D, D]),
    ],
    ids=[
        "nothing is known", "wait for the last one", "the worst one ends", "the spec's own goes on though it is the worst",
        "the spec's own is among the best", "ties go by loss", "then by order", "the best so far counts", "overtaken at a rung",
        "the next rung needs all that are left", "the end of one is no news for the others",
    ],
)  # fmt: skip
def test_fates_by_hand(trails, expected):
    assert fates(trails, 2) == expected


def test_one_that_fails_is_out_and_counts_at_the_rungs_before():
    failed = trail(end="failed")
    assert fates([trail(0.5), failed, trail(0.7), trail(0.6)], 2) == [T, O, T, T]
    assert fates([trail(0.5), failed, trail(0.7), trail()], 2) == [W, O, W, T]
    # It was among the best at the first rung: nobody takes its place there.
    assert fates([trail(0.5), trail(0.8, end="failed"), trail(0.7), trail(0.6)], 2) == [T, O, T, D]
    assert fates([trail(0.5, end="failed"), trail(0.8), trail(0.7), trail(0.6)], 2) == [O, T, T, D]


def test_a_rung_is_a_share_of_the_candidates_own_epochs():
    short, long = trail(0.6, epochs=2), trail(0.5, 0.5, epochs=8)
    # The short one is at its next rung already.
    assert fates([trail(0.3), short, long, trail(0.4)], 2) == [T, W, T, D]
    assert fates([trail(0.3), short, replace(long, results=long.results[:1]), trail(0.4)], 2) == [W, W, T, W]


@pytest.mark.parametrize(("epochs", "eta", "kept"), [(1, 2, 9), (4, 1, 9), (2, 2, 6), (3, 3, 4)])
def test_rungs_are_as_many_as_candidates_and_epochs_can_be_divided(epochs, eta, kept):
    """After one epoch of nine candidates: all go on, or the better half or third, and the spec's own, which is the worst."""
    trails = [trail(0.1 * number, epochs=epochs) for number in range(9)]
    assert fates(trails, eta).count(T) == kept


def random_search(seed):
    """Yields the trails of a search over and over until it is over, each time after one more event; some candidates fail."""
    rng = random.Random(seed)
    trails = [Trail(rng.choice([4, 4, 6, 12, 1])) for _ in range(rng.randint(2, 20))]
    eta = rng.choice([1, 2, 3])
    yield trails, eta
    while (can := [i for i, fate in enumerate(fates(trails, eta)) if fate is T]) or W in fates(trails, eta):
        assert can, "all wait for each other"
        i = rng.choice(can)
        epoch = len(trails[i].results) + 1
        if rng.random() < 0.04:
            trails[i] = replace(trails[i], end="failed")
        else:
            result = Result(epoch, rng.choice([0.1, 0.2, 0.3]), rng.choice([1.0, 2.0]), 0)
            is_last = epoch == trails[i].epochs or rng.random() < 0.02  # early_stopping
            trails[i] = replace(trails[i], results=(*trails[i].results, result), end="finished" if is_last else "")
        yield trails, eta


@pytest.mark.parametrize("seed", range(60))
def test_laws_of_random_searches(seed):
    dropped = set()
    for trails, eta in random_search(seed):
        now = {i for i, fate in enumerate(fates(trails, eta)) if fate is D}
        assert now >= dropped, "what was decided is decided"
        assert 0 not in now
        for i in now - dropped:
            others = [one.best() for number, one in enumerate(trails) if number not in now]
            assert max(others) >= trails[i].best(), "the best so far goes on"
        dropped = now
    assert sum(len(one.results) for one in trails) <= planned_epochs([one.epochs for one in trails], eta)
    best = winner(trails)
    if not any(one.end == "failed" for one in trails):
        assert trails[best].best()[0] == max(one.best()[0] for one in trails)


def test_the_winner_is_the_best_of_those_that_finished():
    done = {"end": "finished"}
    assert winner([trail(0.5, **done), trail(0.9), trail(0.7, **done), trail(0.8, end="failed")]) == 2
    assert winner([trail(0.4, **done), trail(0.5, **done), trail(0.5, losses=[0.9], **done)]) == 2
    assert winner([trail(0.5, **done), trail(0.5, **done)]) == 0
    assert winner([trail(0.3, 0.9, 0.2, **done), trail(0.8, **done)]) == 0
    assert winner([trail(0.5, end="failed"), trail(0.9)]) is None


def test_the_specs_own_setting_yields_only_to_a_better_value():
    done = {"end": "finished"}
    assert winner([trail(0.5, **done), trail(0.5, losses=[0.1], **done)]) == 0
    assert winner([trail(0.5, end="failed"), trail(0.5, losses=[0.1], **done), trail(0.5, **done)]) == 1
    # Of a free-text task the loss is the value.
    assert winner([trail(None, losses=[0.4], **done), trail(None, losses=[0.1], **done)]) == 1
    assert trail(None, losses=[0.4]).metrics == {"select/best": 0.4, "train/best_epoch": 1.0}


def test_planned_epochs_by_hand():
    # Nine of twelve epochs meet after 2 (five go on), 3 (three) and 6 (two), and the spec's own to its end.
    assert planned_epochs([12] * 9, 2) == 3 * 12 + 1 * 6 + 2 * 3 + 3 * 2
    assert planned_epochs([12] * 9, 3) == 2 * 12 + 2 * 4 + 5 * 2
    assert planned_epochs([12] * 9, 1) == 9 * 12
    assert planned_epochs([7], 1) == 7
    # The longest go on, and the spec's own: two others beyond a quarter of their epochs, one beyond half.
    assert planned_epochs([2, 8, 4, 6], 2) == 2 + 8 + 1 + 3


# What was found

FINISHED = [trail(0.7, 0.81, 0.8, end="finished"), trail(0.84, end="finished"), trail(0.5), trail(end="failed")]


def specs_of(count, **changes):
    spec = SPEC.model_copy(update={"search": SearchSpec(rank=list(range(16, 16 + count))), **changes})
    return candidates(spec)[:count]


@pytest.mark.parametrize(
    ("trails", "said"),
    [
        (FINISHED, "4 candidates (1 ended early, 1 failed), chosen learning_rate 0.001, rank 16, epochs 4 on select "
         "accuracy 0.840; spec's own 0.810."),
        (FINISHED[:1] + FINISHED[2:3], "2 candidates (1 ended early), chosen learning_rate 0.001, rank 8, epochs 4 on select "
         "accuracy 0.810, the spec's own setting."),
        ([trail(end="failed"), FINISHED[1]], "2 candidates (1 failed), chosen learning_rate 0.001, rank 16, epochs 4 on select "
         "accuracy 0.840; the spec's own setting failed."),
    ],
)  # fmt: skip
def test_what_was_found_is_said_with_the_reason_not_to_trust_it(trails, said):
    found = found_of(specs_of(len(trails)), trails, 38)
    optimism = "The best of several on 38 select examples is an optimistic number; the gate judges."
    assert found.sentence == f"search: {said} {optimism}"
    assert FOUND.validate_json(FOUND.dump_json(found)) == found


def test_a_free_text_search_is_decided_by_loss():
    changes = {"labels": None, "instruction": "{text}"}
    trails = [trail(None, losses=[0.9], end="finished"), trail(None, losses=[0.4], end="finished")]
    found = found_of(specs_of(2, **changes), trails, 5)
    assert (found.metric, found.select, found.own_select, found.chosen["rank"]) == ("loss", 0.4, 0.9, 16)


def test_a_search_without_an_end_found_nothing():
    assert found_of(specs_of(2), [trail(0.9), trail(end="failed")], 5) is None
    assert isinstance(found_of(specs_of(4), FINISHED, 5), Found)


def test_trails_are_kept_on_disk(tmp_path):
    file = tmp_path / "searches" / "a.json"
    new = {"a": Trail(3), "b": Trail(5)}
    assert load_trails(file, {"a": 3, "b": 5}) == new
    kept = {"a": trail(0.5, 0.6, epochs=3, end="finished"), "b": replace(trail(epochs=5, end="failed"), reason="not finite")}
    store_trails(file, kept)
    assert load_trails(file, {"a": 3, "b": 5}) == kept
    assert trail(0.3, 0.9, 0.2).metrics == {"select/best": 0.9, "train/best_epoch": 2.0}
    assert trail().metrics == {}
