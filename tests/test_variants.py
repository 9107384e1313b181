"""The variants of an adapter: what each changes, on every architecture, and that each has its rows."""

from dataclasses import replace

import pytest
from conftest import FAMILIES
from test_base_kinds import KINDS
from test_train_together import assert_same_rows, bench_of

from multilora.errors import AdapterError
from multilora.spec import TaskSpec
from multilora.spec_hash import spec_hash
from multilora.target_modules import match_modules
from orchestrator.methods import MethodRow
from orchestrator.train_together import Entry, train_together
from orchestrator.variants import ATTENTION, CLOZE, MLP, Q_AND_V, variant_rows, variants_of, with_seed

SHARED = ["rank 1", "rank 4", "rank 8", "rank 16", "rank 64", "all linear layers", "attention q and v", "attention", "MLP",
          "top half of the layers"]  # fmt: skip
WORDINGS = ["text alone", "options with meanings", "options, names alone", "no instruction, names alone", "cloze",
            "multiple choice by letter", "one wording", "mixed wordings"]  # fmt: skip
Q_AND_V_NAMES = {
    "seq2seq": {"q", "v"},
    "mt5": {"q", "v"},
    "bart": {"q_proj", "v_proj"},
    "encoder": {"query", "value"},
    "roberta": {"query", "value"},
    "causal": {"q_proj", "v_proj"},
    "qwen2": {"q_proj", "v_proj"},
}


def spec_of(**changes):
    values = {
        "name": "spam",
        "base": {"model": "org/model"},
        "data": {"train": "spam.jsonl"},
        "instruction": "Is this spam?\n{labels}\nMessage: {text}\nAnswer:",
        "labels": {"spam": "unwanted", "ham": None},
    }
    return TaskSpec.model_validate({**values, **changes})


def by_method(spec, family="causal", num_layers=6):
    return {variant.method: variant for variant in variants_of(spec, family, num_layers)}


def test_all_variants_of_a_generative_base_in_their_order():
    assert [*by_method(spec_of())] == [*SHARED, *WORDINGS]
    assert not any(variant.skipped for variant in by_method(spec_of()).values())


def test_what_is_the_task_files_own_adapter_says_so():
    spec = spec_of()
    own = {method for method, variant in by_method(spec).items() if variant.note == "as in the task file"}
    assert own == {"rank 8", "all linear layers", "options with meanings", "one wording"}
    assert {spec_hash(by_method(spec)[method].spec) for method in own} == {spec_hash(spec)}
    assert "rank 32" in by_method(spec_of(lora={"rank": 32}))


@pytest.mark.parametrize("lora", [{"rank": 8, "alpha": 12}, {"rank": 4, "alpha": 3, "rslora": True}])
def test_ranks_keep_the_scaling(lora):
    spec = spec_of(lora=lora)
    ranks = [variant.spec.lora for method, variant in by_method(spec).items() if method.startswith("rank ")]
    assert [each.rank for each in ranks] == [1, 4, 8, 16, 64]
    assert [each.scaling for each in ranks] == pytest.approx([spec.lora.scaling] * 5)
    assert {each.rslora for each in ranks} == {spec.lora.rslora}


def test_places_replace_the_specs_own_modules_and_layers():
    found = by_method(spec_of(lora={"target_modules": ["q"], "layers": [0]}), num_layers=5)
    assert {found[method].spec.lora.layers for method in ("all linear layers", "attention", "MLP")} == {None}
    top = found["top half of the layers"].spec.lora
    assert (top.target_modules, top.layers) == ("all-linear", [-2, -1])
    assert found["rank 1"].spec.lora.layers == [0]
    assert by_method(spec_of(), num_layers=1)["top half of the layers"].skipped == "the base has one layer"


@pytest.mark.parametrize("kind", [*FAMILIES, *KINDS])
def test_attention_and_the_rest_are_all_linear_layers(kind, fresh_base):
    model = fresh_base(kind).model
    every, attention, mlp = (match_modules(model, targets) for targets in ("all-linear", ATTENTION, MLP))
    assert sorted(attention + mlp) == sorted(every)
    if kind == "gpt2":
        with pytest.raises(AdapterError, match="match no linear layer; this base has c_attn, c_fc, c_proj"):
            match_modules(model, Q_AND_V)
        return
    q_and_v = match_modules(model, Q_AND_V)
    assert {name.rpartition(".")[2] for name in q_and_v} == Q_AND_V_NAMES[kind]
    # A layer of attention has four matrices.
    assert 2 * len(q_and_v) == len(attention)


def test_wordings_change_the_prompt_and_nothing_else():
    spec = spec_of(train={"epochs": 3}, lora={"rank": 4})
    found = by_method(spec)
    assert found["text alone"].spec.instruction == "{text}"
    assert found["options, names alone"].spec.labels == {"spam": None, "ham": None}
    bare = found["no instruction, names alone"].spec
    assert (bare.instruction, bare.labels) == ("{labels}\n{text}", {"spam": None, "ham": None})
    assert found["cloze"].spec.instruction == f"{{text}}\n{CLOZE}"
    letters = found["multiple choice by letter"]
    assert letters.spec.labels == {"A": "spam: unwanted", "B": "ham"}
    assert letters.label_of == {"A": "spam", "B": "ham"}
    mixed = found["mixed wordings"]
    assert (mixed.spec.instruction, len(mixed.spec.wordings), found["one wording"].spec.wordings) == (
        spec.instruction, 4, (spec.instruction,)
    )  # fmt: skip
    assert [*mixed.asked.values()] == [*found["one wording"].asked.values()] == mixed.spec.instructions
    assert [*mixed.asked] == [f"mixed wordings, asked: {name}" for name in ("options last", "options first", "cloze")]
    for method in WORDINGS:
        own = {"instruction": spec.instruction, "instructions": None, "labels": spec.labels}
        assert found[method].spec.model_copy(update=own) == spec


def test_an_instruction_without_options_gets_them_where_a_variant_needs_them():
    found = by_method(spec_of(instruction="Spam? {text}"))
    assert found["options with meanings"].spec.instruction == "{labels}\nSpam? {text}"
    assert found["one wording"].spec.instruction == "Spam? {text}"


def test_several_columns_are_shown_by_name():
    found = by_method(spec_of(instruction="{labels} {title} {text}"))
    assert found["text alone"].spec.instruction == "title: {title}\ntext: {text}"


def test_the_specs_own_wordings_are_the_ones_that_are_mixed():
    spec = spec_of(instructions=["{text}", "Spam? {text}"])
    found = by_method(spec)
    assert spec_hash(found["mixed wordings"].spec) == spec_hash(spec)
    assert found["one wording"].asked == {
        "one wording, asked: wording 2": "{text}",
        "one wording, asked: wording 3": "Spam? {text}",
    }
    assert found["one wording"].spec.instructions is None
    assert found["rank 1"].spec.instructions == spec.instructions
    # A wording that is the instruction itself would be there twice.
    assert "options first" not in found["mixed wordings"].note
    assert "one wording, asked: options first" not in by_method(spec_of(instruction="{labels}\n{text}"))["one wording"].asked


def test_what_makes_no_sense_is_named_and_not_trained():
    plain = by_method(spec_of(labels={"spam": None, "ham": None}))
    assert plain["options with meanings"].skipped == "no label of the task has a meaning"
    many = {f"label {number}": None for number in range(27)}
    assert by_method(spec_of(labels=many))["multiple choice by letter"].skipped == "27 labels are more than there are letters"
    encoder = by_method(spec_of(), family="encoder")
    assert [*encoder] == [*SHARED, "labels with meanings", "label names alone", "instruction wordings"]
    assert encoder["instruction wordings"].skipped == "an encoder reads the input alone: no instruction is in its prompt"
    assert encoder["label names alone"].spec.labels == {"spam": None, "ham": None}
    assert [v.method for v in encoder.values() if v.note == "as in the task file" and not v.skipped] == [
        "rank 8", "all linear layers", "labels with meanings"
    ]  # fmt: skip


def test_a_free_text_task_has_no_label_wordings():
    spec = spec_of(labels=None, instruction="Say it politely: {text}")
    assert [*by_method(spec)] == [*SHARED, "text alone"]
    assert [*by_method(spec, family="encoder")] == SHARED


@pytest.mark.parametrize("family", ["causal", "encoder"])
def test_every_variant_has_its_rows(family, fresh_base, tmp_path):
    base = fresh_base(family)
    train = {"epochs": 1, "batch_size": 4, "max_length": 128, "learning_rate": 3e-3}
    bench = replace(bench_of(tmp_path / "all", base, train=train), max_slots=16)
    rows = list(variant_rows(bench, base))
    variants = variants_of(bench.spec, family, 2)
    expected = [
        (method, seed)
        for variant in variants
        for seed in ([0] if variant.skipped else [0, 1])
        for method in (variant.method, *variant.asked)
    ]
    assert [(row.method, row.seed) for row in rows] == expected
    assert {row.part for row in rows} == {"variants"}
    skipped = {row.method: row.skipped for row in rows if row.skipped}
    assert set(skipped) == ({"instruction wordings"} if family == "encoder" else set())
    assert all(set(row.answers) <= {"yes", "no"} and len(row.answers) == 9 for row in rows if not row.skipped)
    sizes = {row.method: row.num_trained for row in rows}
    assert sizes["rank 64"] == 64 * sizes["rank 1"] == 16 * sizes["rank 4"]
    assert sizes["attention"] + sizes["MLP"] == sizes["all linear layers"] == 2 * sizes["top half of the layers"]
    # One of them, trained by itself.
    (attention,) = (variant for variant in variants if variant.method == "attention")
    entry = Entry(
        MethodRow("variants", "attention", seed=1, note=attention.note), with_seed(attention.spec, 1), bench.dataset.train
    )
    alone = train_together(replace(bench, folder=tmp_path / "alone"), base, [entry])
    assert_same_rows([row for row in rows if (row.method, row.seed) == ("attention", 1)], list(alone))
