"""From specs to prepared tasks: one task's bad data never stops another, and the run key is what decides the weights."""

import json
import shutil

import pytest
from conftest import FAMILIES

from multilora.base_files import find_base
from multilora.spec import BaseSpec, TaskSpec
from orchestrator.prepare import prepare

ROWS = [{"text": f"example number {i}", "label": ("good", "bad")[i % 2]} for i in range(40)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def raw(tmp_path, base_folder):
    """The plain values of a right spec."""
    return {
        "name": "mood",
        "base": {"model": str(base_folder("encoder"))},
        "data": {"train": str(write(tmp_path / "data.jsonl", ROWS))},
        "instruction": "Judge {text} as {labels}",
        "labels": {"good": "all is well", "bad": None},
    }


def prepared_of(raw, **changes):
    ((task,), problems) = prepare([TaskSpec.model_validate({**raw, **changes})])
    assert problems == []
    return task


def test_bad_tasks_do_not_stop_the_others(raw, tmp_path):
    train = write(tmp_path / "bad.jsonl", [*ROWS, {"text": "x", "label": "odd"}, {"text": "", "label": "bad"}])
    nowhere = str(tmp_path / "nowhere")
    changes = [
        {"name": "first"},
        {"name": "bad-data", "data": {"train": str(train)}},
        {"name": "no-file", "data": {"train": str(tmp_path / "gone.jsonl")}},
        {"name": "no-base", "base": {"model": nowhere}},
        {"name": "no-base-either", "base": {"model": nowhere}},
        {"name": "free-text", "labels": None, "instruction": "Rewrite {text}"},
        {"name": "too-few", "data": {"train": str(write(tmp_path / "few.jsonl", ROWS[:2]))}},
        {"name": "last", "gate": {"metric": "macro_f1"}},
    ]
    prepared, problems = prepare([TaskSpec.model_validate({**raw, **change}) for change in changes])
    assert [task.spec.name for task in prepared] == ["first", "last"]
    assert [(problem.where, problem.field) for problem in problems] == [
        ("bad-data: bad.jsonl: row 42", "text"),
        ("bad-data: bad.jsonl", "label"),
        ("no-file: gone.jsonl", "data.train"),
        ("no-base", "base.model"),
        ("no-base-either", "base.model"),
        ("free-text", "base.model"),
        ("too-few", "data"),
    ]
    assert all(problem.fix for problem in problems)
    assert str(problems[5]).startswith("free-text: base.model: an encoder writes no text (got '")
    assert str(problems[5]).endswith("Fix: name a seq2seq or causal base, or list the labels")
    assert str(problems[3]).startswith("no-base: base.model: config.json of the base cannot be read: ")


@pytest.mark.parametrize(
    ("kind", "fix"), [("bart", "300 or less"), ("roberta", "300 or less"), ("gpt2", "300 or less, with room for the answer")]
)
def test_prompts_that_are_longer_than_the_base_takes_are_refused(raw, base_folder, kind, fix):
    base = {"model": str(base_folder(kind))}
    specs = [TaskSpec.model_validate({**raw, "base": base, "train": {"max_length": length}}) for length in (301, 300)]
    prepared, (problem,) = prepare(specs)
    assert [task.spec.train.max_length for task in prepared] == [300]
    rule = f"base {base['model']} takes at most 300 tokens (got 301)"
    assert str(problem) == f"mood: train.max_length: {rule}. Fix: set it to {fix}"


def test_wordings_are_refused_for_an_encoder_which_reads_none(raw, base_folder):
    changes = {"instructions": ["Say {labels}: {text}"]}
    specs = [TaskSpec.model_validate({**raw, **changes, "base": {"model": str(base_folder(kind))}}) for kind in FAMILIES]
    prepared, (problem,) = prepare(specs)
    assert [task.base_files.family for task in prepared] == ["seq2seq", "causal"]
    rule = "an encoder reads the input alone, so wordings of the instruction would change nothing"
    assert str(problem) == f"mood: instructions: {rule}. Fix: remove them, or name a seq2seq or causal base"


def test_no_specs():
    assert prepare([]) == ([], [])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other-name"},
        {"instruction": "Rate {text} as {labels}"},
        {"labels": {"good": "all is very well", "bad": None}},
        {"labels": {"bad": None, "good": "all is well"}},
        {"lora": {"rank": 4}},
        {"lora": {"alpha": 8.0}},
        {"lora": {"dropout": 0.1}},
        {"lora": {"target_modules": ["query"]}},
        {"lora": {"layers": [1]}},
        {"lora": {"rslora": True}},
        {"lora": {"plus_ratio": 16}},
        {"train": {"schedule": "cosine"}},
        {"train": {"epochs": 3}},
        {"train": {"learning_rate": 0.01}},
        {"train": {"batch_size": 4}},
        {"train": {"max_length": 64}},
        {"train": {"seed": 1}},
        {"train": {"early_stopping": 2}},
        {"train": {"max_examples": 10}},
    ],
)
def test_the_run_key_changes_with_what_decides_the_weights(raw, changes):
    assert prepared_of(raw, **changes).run_key != prepared_of(raw).run_key


@pytest.mark.parametrize(
    "changes",
    [
        {"description": "Judges moods."},
        {"gate": {"min": 0.9, "margin": 0.05}},
        {"resources": {"gpus": 0, "cpus": 1, "gradient_checkpointing": True}},
        {"lora": {"rank": 8, "alpha": 16}},
    ],
)
def test_the_run_key_stays_with_everything_else(raw, changes):
    assert prepared_of(raw, **changes).run_key == prepared_of(raw).run_key


def test_params_show_every_option(raw):
    lora, train = {"plus_ratio": 16.0, "rslora": True, "layers": [-1]}, {"schedule": "cosine", "warmup_ratio": 0.1}
    params = prepared_of(raw, lora=lora, train=train).params
    assert {name: params[f"lora.{name}"] for name in lora} == lora
    assert {name: params[f"train.{name}"] for name in train} == train
    assert (params["train.weight_decay"], params["train.max_grad_norm"]) == (0.0, 1.0)


def test_the_run_key_follows_the_data_and_not_the_file(raw, tmp_path):
    key = prepared_of(raw).run_key
    for name, rows, is_same in (
        ("copy.jsonl", ROWS, True),
        ("more.jsonl", [*ROWS, {"text": "x", "label": "bad"}], False),
        ("relabelled.jsonl", [{**ROWS[0], "label": "bad"}, *ROWS[1:]], False),
    ):
        other = prepared_of(raw, data={"train": str(write(tmp_path / name, rows))})
        assert (other.run_key == key) == is_same


def test_the_run_key_follows_the_base_and_not_its_folder(raw, base_folder, tmp_path):
    key = prepared_of(raw).run_key
    copy = shutil.copytree(base_folder("encoder"), tmp_path / "copy")
    assert prepared_of(raw, base={"model": str(copy)}).run_key == key
    assert prepared_of(raw, base={"model": str(copy), "dtype": "bfloat16"}).run_key != key
    assert prepared_of(raw, base={"model": str(base_folder("causal"))}).run_key != key
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert prepared_of(raw, base={"model": str(copy)}).run_key != key


def test_the_gate_hash_follows_the_gate_alone(raw):
    first = prepared_of(raw).gate_hash
    assert prepared_of(raw, train={"epochs": 3}).gate_hash == first
    gates = ({"min": 0.5}, {"margin": 0.01}, {"metric": "macro_f1"})
    assert len({first, *(prepared_of(raw, gate=gate).gate_hash for gate in gates)}) == 4


@pytest.mark.parametrize("kind", ["encoder", "seq2seq"])
def test_the_need_counts_what_the_base_reads(raw, base_folder, kind):
    task = prepared_of(raw, base={"model": str(base_folder(kind))}, train={"epochs": 3, "batch_size": 8})
    need, files = task.need, find_base(BaseSpec(model=str(base_folder(kind))))
    assert (need.task, need.num_train, need.epochs, need.batch_size) == ("mood", len(task.dataset.train), 3, 8)
    assert (need.num_base_parameters, need.num_layers, need.hidden_size) == (files.num_parameters, 2, 64)
    assert need.num_adapter_parameters == task.spec.lora.rank * files.num_linear_features
    top = prepared_of(raw, base={"model": str(base_folder(kind))}, lora={"layers": [-1]}).need
    assert top.num_adapter_parameters == need.num_adapter_parameters / 2
    text = sum(len(example.columns["text"]) for example in task.dataset.train) / len(task.dataset.train)
    # A generative base reads instruction and labels too, an encoder the input alone.
    prompt = 0 if kind == "encoder" else len("Judge {text} as {labels}") + len("good: all is well") + len("bad")
    assert need.tokens_per_example == pytest.approx((text + prompt) / 4 + 2)
    assert prepared_of(raw, train={"max_length": 8}).need.tokens_per_example <= 8


def test_wordings_are_part_of_the_run_key_and_of_the_tokens(raw, base_folder):
    base = {"model": str(base_folder("causal"))}
    one, mixed = prepared_of(raw, base=base), prepared_of(raw, base=base, instructions=["Judge {text} as {labels}" + 400 * "!"])
    assert mixed.run_key != one.run_key
    assert mixed.need.tokens_per_example == pytest.approx(one.need.tokens_per_example + 400 / 2 / 4)
    assert prepared_of(raw, base=base, instructions=None).run_key == one.run_key


def test_a_search_is_planned_with_all_its_candidates(raw):
    train, lora = {"epochs": 4, "batch_size": 8}, {"rank": 4}
    plain, searched = (prepared_of(raw, train=train, lora=lora, **more) for more in ({}, {"search": {"rank": [2, 16], "eta": 1}}))
    assert plain.trainings == {plain.run_key: plain.spec}
    assert plain.num_flops == {plain.run_key: plain.need.num_flops}
    assert [spec.lora.rank for spec in searched.trainings.values()] == [4, 2, 16]
    # A changed search is another training, and its adapters are not those of a task that is not searched.
    other = prepared_of(raw, train=train, lora=lora, search={"rank": [2, 16]})
    assert len({plain.run_key, searched.run_key, *searched.trainings, other.run_key, *other.trainings}) == 9
    need = searched.need
    assert (need.num_candidates, need.epochs, need.num_steps) == (3, 12, 3 * plain.need.num_steps)
    assert need.num_adapter_parameters == 4 * plain.need.num_adapter_parameters
    assert list(searched.num_flops.values()) == pytest.approx([plain.need.num_flops] * 3)
    # Halving: two go on after half of the epochs, and the spec's own; of four, two after a quarter and one after half.
    assert other.need.epochs == 12
    assert prepared_of(raw, train=train, search={"rank": [2, 4, 16]}).need.epochs == 4 + 4 + 2 + 1
    assert searched.params["search.rank"] == [2, 16]
    assert not any(name.startswith("search") for name in plain.params)


def test_a_free_text_task_is_prepared_for_a_base_that_writes(raw, base_folder):
    changes = {"base": {"model": str(base_folder("causal"))}, "labels": None, "instruction": "Rewrite {text}"}
    task = prepared_of(raw, **changes)
    short = prepared_of(raw, **changes, generation={"max_new_tokens": 1})
    assert (task.params["max_new_tokens"], short.params["max_new_tokens"]) == (64, 1)
    assert short.run_key != task.run_key
    # "good" and "bad" are read too, cut at the limit.
    assert task.need.tokens_per_example - short.need.tokens_per_example == pytest.approx(3.5 / 4, abs=0.1)
