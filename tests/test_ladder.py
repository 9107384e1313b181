"""The ladder: systems that do the same show no flips, and a planted fault shows at its own rung under its owner's name."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES
from plain_peft import plain_peft, plain_probabilities
from test_cross import gate_of, items_of
from tiny_adapters import CARDS, MAIL, MOOD, SHORTEN, write_tiny_adapter

from multilora.artifact import CARD, read_artifact
from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.target_modules import match_modules
from orchestrator.dataset import Example
from orchestrator.eval_report import EvalItem
from orchestrator.ladder import PlainSystem, climb, engine_alone, mixed_batch, offline_rungs
from orchestrator.rungs import OWNERS, Ladder, Reply, RungAnswers, build_rungs
from serve.engine import Engine, Work

TOLERANCE = 1e-3
GATE = tuple(Example(str(number), {"text": ""}, label) for number, label in enumerate("aabb"))


def ladder_of(found, gate):
    return Ladder("cards", "cards@1", "tiny", len(gate), len(gate), build_rungs(found, gate), "now")


def by_owner(ladder):
    return {rung.owner: rung for rung in ladder.rungs if rung.is_measured}


def text_item(tiny_adapter, kind, seed=0):
    artifact = tiny_adapter(kind, SHORTEN, seed)
    texts = [canary.text for canary in artifact.card.canaries]  # what the adapter writes is gold here
    gate = tuple(
        Example(str(n), canary.columns, text) for n, (canary, text) in enumerate(zip(artifact.card.canaries, texts, strict=True))
    )
    return EvalItem("shorten", 1, artifact.digest, str(artifact.folder), gate, "")


# The same function all the way up


def test_without_a_fault_nothing_flips_above_training(family, tiny_adapter):
    item, *others = items_of(tiny_adapter, family)
    found = list(climb(item, others))
    assert [answers.name for answers in found] == list(OWNERS)[:5]
    ladder = ladder_of(found, item.gate)
    rungs = by_owner(ladder)
    assert list(rungs) == ["base", "training", "engine", "batching"]
    assert rungs["training"].max_difference > 0.1
    for owner in ("engine", "batching"):
        assert rungs[owner].num_changed == rungs[owner].num_lost == rungs[owner].num_won == 0
        assert rungs[owner].max_difference < TOLERANCE
        assert rungs[owner].num_right == rungs["training"].num_right
    assert ladder.rungs[2].skipped == "the same: float32 is served"
    assert ladder.conclusion.endswith("; serving loses nothing: 0 flips on 24 examples from offline to mixed batch.")
    assert "rows of 2 other adapters between" in found[-1].how


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_free_text_climbs_too(kind, tiny_adapter):
    item = text_item(tiny_adapter, kind)
    ladder = ladder_of(list(climb(item, [replace(text_item(tiny_adapter, kind, 1), version=2)])), item.gate)
    rungs = by_owner(ladder)
    assert list(rungs) == ["base", "training", "engine", "batching"]
    assert rungs["training"].num_right == rungs["batching"].num_right == len(item.gate)
    assert rungs["base"].num_right < len(item.gate)
    assert rungs["engine"].num_changed == rungs["batching"].num_changed == 0
    assert rungs["engine"].max_difference is None


@pytest.mark.parametrize("kind", [*FAMILIES, "bart", "gpt2"])
def test_the_plain_side_is_plain_peft(kind, fresh_base, base_folder, tiny_adapter):
    base = fresh_base(kind)
    for task in (CARDS, MAIL):
        artifact, gate = tiny_adapter(kind, task), gate_of(task, 5)
        system = PlainSystem(artifact.card.base, artifact.card)
        for model, temperature in ((base.model, 1.0), (plain_peft(base_folder(kind), base.family, artifact), task.temperature)):
            if model is not base.model:
                system.load_adapter(artifact.folder)
            for example, reply in zip(gate, system.replies(gate), strict=True):
                expected = plain_probabilities(base, model, task, example.columns[task.text_column], temperature)
                if kind != "bart":  # whose answers begin with a special token that the other oracle leaves out
                    assert list(reply.probabilities) == pytest.approx(expected, abs=1e-5)
                assert reply.answer == task.labels[reply.probabilities.index(max(reply.probabilities))][0]


def test_mean_scores_are_means_on_both_sides(tiny_adapter, fresh_base, tmp_path):
    folder = shutil.copytree(tiny_adapter("causal", CARDS).folder, tmp_path / "adapter")
    card = json.loads((folder / CARD).read_text())
    card["label_score"] = "mean"
    card["canaries"] = [{**canary, "scores": scores} for canary, scores in zip(card["canaries"], mean_scores(card), strict=True)]
    (folder / CARD).write_text(json.dumps(card))
    item = replace(items_of(tiny_adapter, "causal")[0], folder=str(folder), digest=read_artifact(folder).digest)
    rungs = by_owner(ladder_of(list(climb(item, [])), item.gate))
    assert rungs["engine"].max_difference < TOLERANCE


def mean_scores(card):
    """Scores of the canaries if the labels' token counts were divided out; the tiny Llama's labels are words of this many."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{card['base']['model']}/tokenizer.json")
    counts = [len(tokenizer.encode(f" {label}", add_special_tokens=False).ids) + 1 for label, _ in card["labels"]]
    return [[score / count for score, count in zip(canary["scores"], counts, strict=True)] for canary in card["canaries"]]


# Planted faults


@pytest.fixture
def rig(tiny_adapter, fresh_base):
    """An engine with one slot and two adapters, so that whoever asked last has the slot; and the rungs below it."""
    item, other, _ = items_of(tiny_adapter, "encoder")
    engine = Engine(fresh_base("encoder"), 1, 8)
    key, other_key = (engine.bind(tiny_adapter("encoder", task, seed), seed + 1) for seed, task in enumerate((CARDS, MOOD)))
    return engine, key, {other_key: other.gate}, item, list(offline_rungs(tiny_adapter("encoder", CARDS), item.gate))


def damage(engine, key):
    """Scale the host copy of an adapter, which the next loading puts into the slot."""
    for _, b_OR in engine.bound(key).tensors.values():
        b_OR.mul_(-3)


def test_a_fault_in_the_engines_copy_is_the_engines(rig):
    engine, key, others, item, below = rig
    damage(engine, key)
    ladder = ladder_of([*below, engine_alone(engine, key, item.gate), mixed_batch(engine, key, item.gate, others)], item.gate)
    rungs = by_owner(ladder)
    assert rungs["engine"].num_changed > 5
    assert rungs["engine"].max_difference > 0.1
    assert rungs["batching"].num_changed == 0
    assert "on 24 examples from offline to mixed batch, by engine (" in ladder.conclusion
    assert "batching (" not in ladder.conclusion


def test_a_fault_beside_others_is_the_batchings(rig):
    engine, key, others, item, below = rig
    alone = engine_alone(engine, key, item.gate)
    engine.classify([Work(next(iter(others)), engine.prompt(next(iter(others)), "card"))])  # takes the slot
    damage(engine, key)
    rungs = by_owner(ladder_of([*below, alone, mixed_batch(engine, key, item.gate, others)], item.gate))
    assert rungs["engine"].num_changed == 0
    assert rungs["batching"].num_changed > 5


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "least_changed"), [({"dtype": "bfloat16"}, 0), ({"quantization": "4bit"}, 1)])
def test_rounding_of_the_base_is_the_dtypes(spec, least_changed, fresh_base, random_adapter, tmp_path):
    base = fresh_base("encoder", **spec)
    slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), 1, 4)
    with torch.no_grad():
        artifact = write_tiny_adapter(tmp_path / "adapter", base, slots, random_adapter(slots, 4, seed=0), CARDS)
    gate = gate_of(CARDS, 60)
    item = EvalItem("cards", 1, artifact.digest, str(artifact.folder), gate, "")
    rungs = by_owner(ladder_of(list(climb(item, [])), gate))
    assert list(rungs) == ["base", "training", "dtype", "engine", "batching"]
    assert rungs["dtype"].max_difference > 0.01
    assert rungs["dtype"].num_changed >= least_changed
    for owner in ("engine", "batching"):
        assert rungs[owner].max_difference < rungs["dtype"].max_difference


def test_an_adapter_that_the_engine_refuses_is_the_engines(tiny_adapter, tmp_path):
    folder = shutil.copytree(tiny_adapter("encoder", CARDS).folder, tmp_path / "adapter")
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**card, "base_fingerprint": "0" * 64}))
    item = replace(items_of(tiny_adapter, "encoder")[0], folder=str(folder), digest=read_artifact(folder).digest)
    ladder = ladder_of(list(climb(item, [])), item.gate)
    assert list(by_owner(ladder)) == ["base", "training"]
    assert [rung.is_fault for rung in ladder.rungs] == [False, False, False, True, False]
    assert "; engine alone gives no answer: cards@1 was trained on base" in ladder.conclusion
    with pytest.raises(AdapterError, match="files changed"):
        list(climb(replace(item, digest="0" * 64), []))


def test_another_champion_that_does_not_bind_is_left_out(tiny_adapter):
    item, *others = items_of(tiny_adapter, "encoder")
    *_, mixed = climb(item, [replace(others[0], digest="0" * 64), others[1]])
    assert "rows of 1 other adapters between" in mixed.how


# Numbers


def answers(name, letters, *probabilities):
    replies = tuple(Reply(letter, own) for letter, own in zip(letters, probabilities or [()] * len(letters), strict=True))
    return RungAnswers(name, f"system of {name}", replies)


def test_numbers_worked_by_hand():
    found = [
        answers("zero-shot base", "abab", (0.6, 0.4), (0.5, 0.5), (0.9, 0.1), (0.2, 0.8)),
        answers("offline", "aabb", (0.7, 0.3), (0.6, 0.4), (0.1, 0.9), (0.2, 0.8)),
        RungAnswers("offline as served", "PEFT", skipped="the same"),
        answers("engine alone", "aabc", (0.7, 0.3), (0.6, 0.4), (0.4, 0.6), (0.2, 0.8)),
        answers("mixed batch", "aabd", (0.7, 0.3), (0.6, 0.4), (0.4, 0.6), (0.2, 0.8)),
        answers("endpoint", "aabb", (0.7, 0.3), (0.6, 0.4), (0.4, 0.6), (0.2, 0.8)),
    ]
    ladder = ladder_of(found, GATE)
    zero, offline, skipped, alone, mixed, endpoint = ladder.rungs
    assert (zero.num_right, zero.accuracy, zero.num_lost, zero.max_difference) == (2, 0.5, None, None)
    assert (offline.num_right, offline.num_lost, offline.num_won, offline.num_changed) == (4, 0, 2, 2)
    assert offline.max_difference == pytest.approx(0.8)
    assert (skipped.num_right, skipped.skipped, skipped.owner) == (None, "the same", "dtype")
    assert (alone.num_lost, alone.num_won, alone.num_changed) == (1, 0, 1)
    assert alone.max_difference == pytest.approx(0.3)
    assert (mixed.num_lost, mixed.num_won, mixed.num_changed) == (0, 0, 1)  # from one wrong answer to another
    assert (endpoint.num_lost, endpoint.num_won, endpoint.num_changed) == (0, 1, 1)
    assert ladder.conclusion == (
        "training changes +50.0 points against the zero-shot base (2 -> 4 of 4 right); "
        "serving changes 0 points on 4 examples from offline to endpoint, by engine (1 lost, 0 won), "
        "batching (0 lost, 0 won; 1 from one wrong answer to another), endpoint (0 lost, 1 won)."
    )


def test_where_float32_has_no_room_the_first_rung_with_the_adapter_is_trainings():
    no_room = RungAnswers("offline", "PEFT", skipped="no memory")
    found = [answers("zero-shot base", "aaaa"), no_room, answers("offline as served", "aabb")]
    ladder = ladder_of([*found, answers("engine alone", "aabb")], GATE)
    assert [rung.owner for rung in ladder.rungs] == ["base", "training", "training", "engine"]
    assert ladder.conclusion == (
        "training changes +50.0 points against the zero-shot base (2 -> 4 of 4 right); "
        "serving loses nothing: 0 flips on 4 examples from offline as served to engine alone."
    )
