"""Every method that trains alone learns, changes only what is its own, and answers with labels of the task, or says why not."""

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES
from tiny_cards_bench import LABELS, tiny_bench

from multilora.base_model import load_base
from multilora.errors import AdapterError
from orchestrator.alone import QUANTISED, alone_rows, method_rows, quantised_rows, train_plain
from orchestrator.own_adapters import OwnAdapter, train_own
from orchestrator.plain_methods import METHODS, PlainMethod, biases, ia3, prefix_tuning, prompt_tuning, vanilla
from orchestrator.plain_training import DIVERGED, answering, scores_of, timed, trained_parameters

BY_NAME = {method.build.__name__: method for method in METHODS}
CHANGE_NOTHING = ("frozen_head", "lora_head", "prefix_tuning", "prompt_tuning", "ia3")
"""Methods that leave the base's own weights as they are."""
UNCHANGED_RATE = 1e-12


@pytest.fixture
def bench(tmp_path, base_folder):
    return lambda kind="encoder", **options: tiny_bench(tmp_path, base_folder(kind), **options)


def only_row(bench, method):
    """The row of one seed."""
    (row,) = method_rows(replace(bench, seeds=(0,)), method)
    return row


def watched(method):
    """The method, and a list that gets the base's parameters with their values before training."""
    seen = []

    def build(base, spec):
        seen.extend((name, parameter, parameter.detach().clone()) for name, parameter in base.model.named_parameters())
        return method.build(base, spec)

    return replace(method, build=build), seen


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_method_learns_and_changes_only_what_is_its_own(bench, name, kind):
    if name == "biases" and kind != "encoder":
        pytest.skip("see test_a_base_without_biases_is_named")
    method, seen = watched(BY_NAME[name])
    one = bench(kind, train={"epochs": 6})
    learner, trained = train_plain(one, method, seed=0, rate=method.learning_rates[-1])
    assert trained.epoch_losses[-1] < trained.epoch_losses[0]
    changed = {name for name, parameter, before in seen if not torch.equal(parameter, before)}
    if name in CHANGE_NOTHING:
        assert not changed
    elif name == "biases":
        assert changed
        assert all(one.endswith(".bias") for one in changed)
    else:
        assert len(changed) > 15
        assert name == "all_parameters" or not [one for one in changed if one.startswith(("decoder", "lm_head"))]
    assert not [one for one in changed if "pooler" in one]
    assert len(trained_parameters(learner.module)) > 0
    answers = answering(learner, LABELS)(one.dataset.gate)
    assert set(answers) <= set(LABELS)
    assert len(answers) == len(one.dataset.gate)


@pytest.mark.parametrize("name", ["vanilla", "frozen_head", "lora_head", "prompt_tuning"])
def test_same_seed_same_result_and_another_seed_another(bench, name):
    method = BY_NAME[name]
    found = [train_plain(bench(), method, seed, 1e-3) for seed in (3, 3, 4)]
    vectors = [torch.cat([p.detach().flatten() for p in trained_parameters(learner.module)]) for learner, _ in found]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    assert found[0][1].epoch_losses == found[1][1].epoch_losses


def test_training_leaves_the_random_numbers_of_others_alone(bench):
    before = torch.random.get_rng_state()
    train_plain(bench(), BY_NAME["vanilla"], 0, 1e-3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_best_epoch_is_what_remains(bench):
    one = bench(train={"epochs": 6, "schedule": "constant"})
    learner, trained = train_plain(one, BY_NAME["lora_head"], 0, 5e-2)
    scores = scores_of(learner, learner.rows(one.dataset.select))
    gold = torch.tensor([LABELS.index(example.label) for example in one.dataset.select])
    assert trained.result[1] == pytest.approx(-torch.nn.functional.cross_entropy(scores, gold).item())
    assert trained.result[0] == pytest.approx((scores.argmax(1) == gold).float().mean().item())
    assert 1 <= trained.best_epoch <= 6


def test_it_stops_early_as_the_spec_says(bench):
    _, trained = train_plain(bench(train={"epochs": 9, "early_stopping": 2}), BY_NAME["frozen_head"], 0, UNCHANGED_RATE)
    assert (len(trained.epoch_losses), trained.best_epoch) == (3, 1)


@pytest.mark.parametrize("rates", [(1e-3, 1e-1), (1e-1, 1e-3)])
def test_the_first_seed_chooses_the_learning_rate_on_the_select_split_for_all(bench, rates):
    one, method = bench(seeds=(2, 0)), replace(BY_NAME["frozen_head"], learning_rates=rates)
    results = {rate: train_plain(one, method, 2, rate)[1].result for rate in rates}
    best = max(results, key=results.get)
    assert len(set(results.values())) == 2
    rows = list(method_rows(one, method))
    alone = list(method_rows(one, replace(method, learning_rates=(best,))))
    assert [(row.part, row.method, row.num_train, row.skipped) for row in rows] == [("alone", method.name, 24, "")] * 2
    assert [(row.seed, row.answers) for row in rows] == [(row.seed, row.answers) for row in alone]
    chosen = f"learning rate {best:g}, chosen from {rates[0]:g}, {rates[1]:g} on the select split, which took "
    assert {row.note[: len(chosen)] for row in rows} == {chosen}
    assert {row.note for row in alone} == {f"learning rate {best:g}"}
    for row in rows:
        assert row.train_s > 0
        assert row.num_trained == 64 * 3 + 3
        assert row.disk_bytes == 4 * row.num_trained
        assert row.ms_per_text > 0


def test_a_loss_that_is_no_number_is_the_reason(bench):
    def poisoned(base, spec):
        next(base.model.parameters()).data.fill_(float("nan"))
        return vanilla(base, spec)

    method = PlainMethod("poisoned", (1e-4, 1e-3), poisoned)
    assert train_plain(bench(), method, 0, 1e-3)[1].result == DIVERGED
    row = only_row(bench(), method)
    assert row.skipped == "the loss is no number at learning rates 0.0001, 0.001"
    assert not row.answers


def test_one_rate_that_diverges_does_not_cost_the_other(bench):
    calls = []

    def poisoned_first(base, spec):
        calls.append(spec.train.learning_rate)
        if len(calls) == 1:
            next(base.model.parameters()).data.fill_(float("nan"))
        return vanilla(base, spec)

    row = only_row(bench(), PlainMethod("half poisoned", (1e-3, 1e-4), poisoned_first))
    assert not row.skipped
    assert row.note.startswith("learning rate 0.0001")


def test_a_prefix_of_an_encoder_decoder_has_a_note_that_is_true(bench):
    method = BY_NAME["prefix_tuning"]
    assert "uses half of the parameters" not in only_row(bench(), method).note
    assert only_row(bench("seq2seq"), method).note.endswith("same part of it and uses half of the parameters")
    learner, _ = train_plain(bench("seq2seq"), method, 0, 1e-2)
    (prefix,) = trained_parameters(learner.module)
    learner.losses(learner.rows(bench().dataset.train[:2]), [0, 1]).mean().backward()
    assert (prefix.grad != 0).float().mean() == 0.5


# What does not exist for a base


@pytest.mark.parametrize(("kind", "model_type"), [("seq2seq", "t5"), ("causal", "llama")])
def test_a_base_without_biases_is_named(bench, kind, model_type):
    assert only_row(bench(kind), BY_NAME["biases"]).skipped == f"a base of type {model_type} has no biases"


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "bart", "roberta", "mt5"])
@pytest.mark.parametrize("build", [prefix_tuning, prompt_tuning, ia3, biases])
@pytest.mark.slow
def test_other_architectures_learn_too(bench, kind, build):
    if (kind, build) == ("mt5", biases):
        pytest.skip("no biases")
    method = BY_NAME[build.__name__]
    _, trained = train_plain(bench(kind, train={"epochs": 6}), method, 0, method.learning_rates[-1])
    assert trained.epoch_losses[-1] < trained.epoch_losses[0]


def test_a_base_that_peft_does_not_know_has_no_ia3(fresh_base, bench):
    base = fresh_base("encoder")
    base.model.config.model_type = "novel"
    with pytest.raises(AdapterError, match="PEFT does not say which layers of a base of type novel IA3 scales"):
        ia3(base, bench().spec)


@pytest.mark.parametrize("build", [prefix_tuning, prompt_tuning])
def test_virtual_tokens_need_room(bench, build):
    row = only_row(bench(train={"max_length": 500}), BY_NAME[build.__name__])
    assert row.skipped == (
        "20 virtual tokens and the longest prompt take 520 positions, the base has 512; lower train.max_length"
    )


def test_an_adapter_of_the_decoder_alone_has_nothing_below_an_encoders_head(bench):
    row = only_row(bench("seq2seq", lora={"target_modules": ["EncDecAttention.q"]}), BY_NAME["lora_head"])
    assert "match no linear layer" in row.skipped


def test_a_free_text_task_has_a_reason_in_every_row(bench):
    rows = list(alone_rows(bench(labels=(), seeds=(0, 1))))
    assert {row.skipped for row in rows} == {"a free-text task has no labels to choose from"}
    assert [row.method for row in rows[::2]] == [*(method.name for method in METHODS), *QUANTISED.values()]
    assert len(rows) == 2 * (len(METHODS) + len(QUANTISED))


# Our adapters


@pytest.mark.slow
@pytest.mark.long
def test_adapters_over_quantised_bases_are_trained_and_asked(bench, family):
    one = bench(family, seeds=(0, 5))
    rows = list(quantised_rows(one))
    assert [(row.method, row.seed) for row in rows] == [(name, seed) for name in QUANTISED.values() for seed in (0, 5)]
    assert not [row.skipped for row in rows if row.skipped]
    assert all(len(row.answers) == len(one.dataset.gate) and set(row.answers) <= set(LABELS) for row in rows)
    assert len({row.num_trained for row in rows}) == 1
    assert all(row.train_s > 0 and row.disk_bytes > 4 * row.num_trained for row in rows)
    full, in_8_bit, in_4_bit = (float(row.note.removeprefix("the base's weights take ").split()[0]) for row in rows[::2])
    assert full > in_8_bit > in_4_bit


def test_an_adapter_that_cannot_be_trained_says_why_in_its_rows(bench):
    rows = list(quantised_rows(bench(lora={"target_modules": ["nowhere"]})))
    assert len(rows) == 3
    assert all("match no linear layer" in row.skipped for row in rows)


def test_a_base_that_is_not_there_says_why_in_its_rows(tmp_path):
    one = tiny_bench(tmp_path, tmp_path / "nowhere")
    assert all("config.json of the base cannot be read" in row.skipped for row in quantised_rows(one))
    assert "config.json of the base cannot be read" in only_row(one, METHODS[0]).skipped


def test_own_adapters_are_trained_anew_each_time(bench, tmp_path):
    one = bench(seeds=(0, 1))
    first, again = (train_own(one, one.spec.base, one.seeds, tmp_path / "own") for _ in range(2))
    for seed in one.seeds:
        assert isinstance(again[seed], OwnAdapter)
        assert again[seed].train_s > 0.01
        assert again[seed].artifact.digest == first[seed].artifact.digest
    assert first[0].artifact.digest != first[1].artifact.digest


def test_time_is_measured_after_a_few_texts_that_warm_up(bench):
    asked = []

    def answer(examples):
        asked.append(len(examples))
        return ["rate"] * len(examples)

    gate = bench().dataset.gate
    answers, ms_per_text = timed(answer, gate)
    assert asked == [4, len(gate)]
    assert answers == ("rate",) * len(gate)
    assert 0 < ms_per_text < 1000


def test_a_bfloat16_base_is_float32_where_its_own_weights_train(bench):
    one = bench(train={"epochs": 1})
    one = replace(one, spec=one.spec.model_copy(update={"base": one.spec.base.model_copy(update={"dtype": "bfloat16"})}))
    dtypes = []
    for name in ("vanilla", "lora_head", "prefix_tuning"):
        learner, _ = train_plain(one, BY_NAME[name], 0, 1e-3)
        dtypes.append(learner.base.model.dtype)
        assert {p.dtype for p in trained_parameters(learner.module)} == {torch.float32}
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert load_base(one.spec.base).model.dtype == torch.bfloat16
