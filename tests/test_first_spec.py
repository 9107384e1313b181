"""A first task file loads, its data split and its base takes the prompts, whatever labels, columns and lengths the file has."""

import json

import pytest
import yaml

from multilora.errors import SpecError
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import encode_labels
from multilora.spec import BaseSpec
from multilora.spec_files import load_task_specs
from orchestrator.choose_columns import choose_columns
from orchestrator.first_spec import Yaml12Dumper, first_spec, task_name
from orchestrator.inspect_data import inspect_rows
from orchestrator.power import power_warning
from orchestrator.prepare import prepare
from orchestrator.token_lengths import know_base, lengths_of, rounded_limit

AWKWARD = (
    "yes", "no", "on", "Off", "true", "null", "~", "1", "08", "010", "2e-4", "12:30", "1.10", "0x1F", ".5", "-", "=", "- item",
    "a: b", "key:", "#tag", "text # comment", "'single'", '"double"', "{braces}", "[list]", "@at", "`tick`", "%percent", "!bang",
    "&anchor", "*star", "?", "|", ">", "back\\slash", "tab\there", "two\nlines", "ünï", "👍", "line\u2028end", "x" * 200,
    "2024-01-01",
)  # fmt: skip


def table_of(answers, length=12):
    """Texts of one length that are all different."""
    return {"text": [f"row {i} {'word ' * length}".strip() for i in range(len(answers))], "label": list(answers)}


@pytest.fixture
def make(tmp_path, base_folder):
    """Write a first spec as `init` does: make(table, kind) -> (first spec, loaded spec)."""

    def make_one(table, kind="encoder", **chosen):
        (tmp_path / "data.json").write_text(
            json.dumps([dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)])
        )
        inspection = inspect_rows(table, choose_columns(table, **chosen))
        model = kind if "/" in kind else str(base_folder(kind))
        train = "corrected.jsonl" if inspection.is_corrected else "data.json"
        made = first_spec("some-task", inspection, know_base(BaseSpec(model=model)), model, train)
        made.check(tmp_path / "data.json")
        (tmp_path / "corrected.jsonl").write_text(made.corrected, encoding="utf-8")
        (tmp_path / "task.yaml").write_text(made.text, encoding="utf-8")
        (spec,) = load_task_specs([tmp_path / "task.yaml"])
        return made, spec

    return make_one


def about(made, topic):
    return [finding.text for finding in made.findings if finding.about == topic]


def test_awkward_labels_come_through(make):
    made, spec = make(table_of(AWKWARD * 12))
    assert list(spec.labels) == list(AWKWARD)
    assert set(spec.labels.values()) == {None}
    assert made.corrected == ""
    (task,), problems = prepare([spec])
    assert problems == []
    assert {example.label for example in task.dataset.train} == set(AWKWARD)


@pytest.mark.parametrize("label", AWKWARD)
def test_every_loader_reads_a_label_as_the_text_it_is(label):
    text = yaml.dump({label: label}, Dumper=Yaml12Dumper, allow_unicode=True)
    assert yaml.safe_load(text) == {label: label}


def test_a_file_that_cannot_be_used_as_it_is_gets_a_corrected_copy(make):
    table = table_of(["Spam", "spam", "spam", "ham ", ""] * 20)
    table["The text"] = table.pop("text")
    made, spec = make(table)
    assert spec.data.train.endswith("corrected.jsonl")
    assert (spec.columns, spec.data.label, list(spec.labels)) == (("the_text",), "label", ["spam", "ham"])
    assert [json.loads(line) for line in made.corrected.splitlines()][:2] == [
        {"the_text": table["The text"][0], "label": "spam"},
        {"the_text": table["The text"][1], "label": "spam"},
    ]
    (task,), _ = prepare([spec])
    assert len(task.dataset.train) + len(task.dataset.select) + len(task.dataset.gate) == 80


@pytest.mark.parametrize("kind", ["encoder", "roberta", "seq2seq", "bart", "causal", "gpt2"])
@pytest.mark.parametrize("length", [3, 40, 700])
def test_the_base_takes_prompts_and_labels(make, fresh_base, kind, length):
    made, spec = make(table_of(["card lost", "card late", "exchange rate"] * 20, length), kind)
    (task,), problems = prepare([spec])
    assert problems == []
    base = fresh_base(kind)
    prompt_format = PromptFormat.of(spec, base.family)
    encode_labels(base, AdapterSlots(base.model, [], 1, 1), prompt_format)  # raises where positions do not suffice
    prompts = [encode_prompt(prompt_format, example.columns, base.tokenizer) for example in task.dataset.train]
    is_cut = any(prompt.is_truncated for prompt in prompts)
    assert is_cut == bool(about(made, "long texts"))
    assert is_cut == (length == 700 and kind not in ("seq2seq", "causal"))  # Llama has 2,048 positions, T5 no limit
    assert spec.train.max_length % 16 == 0
    if not is_cut:
        assert max(len(prompt.token_ids) for prompt in prompts) < spec.train.max_length


def test_lengths_are_counted_in_the_tokens_of_the_base(make, base_folder):
    table = table_of(["a", "b"] * 30)
    base = know_base(BaseSpec(model=str(base_folder("encoder"))))
    expected = sorted(len(ids) for ids in base.tokenizer(table["text"])["input_ids"])
    lengths = lengths_of(base, table["text"])
    assert (lengths.longest, lengths.p99) == (expected[-1], expected[-1])
    assert lengths.median in expected[29:31]
    (said,) = about(make(table)[0], "lengths")
    assert f"99 % {lengths.p99}, the longest has {lengths.longest} tokens of " in said


def test_a_base_that_is_not_here_is_not_downloaded(make):
    made, spec = make(table_of(["a", "b"] * 30), "nobody/has-this-model")
    (said,) = about(made, "lengths")
    assert "tokens, estimated as characters / 4, for nobody/has-this-model is not on this machine" in said
    assert spec.base.model == "nobody/has-this-model"
    with pytest.raises(SpecError, match=r"config\.json of the base cannot be read"):
        know_base(BaseSpec(model="/no/such/folder"))


def test_labels_that_are_the_same_tokens_are_named(make):
    labels = ["👍", "👎", "good"] * 20  # no emoji is in the vocabulary
    (said,) = about(make(table_of(labels))[0], "labels alike")
    assert said.startswith("'👍', '👎' are the same tokens to ")
    assert said.endswith(": give them meanings that differ")
    assert about(make(table_of(labels), "seq2seq")[0], "labels alike")[0].endswith(": reword them in the file")
    assert about(make(table_of(["up", "down"] * 20))[0], "labels alike") == []


ANSWERS = [f"the answer to question {i} is {i * i} in words" for i in range(60)]


@pytest.mark.parametrize("kind", ["seq2seq", "causal", "gpt2"])
def test_many_long_answers_become_a_free_text_task(make, base_folder, kind):
    _, spec = make(table_of(ANSWERS), kind)
    assert spec.labels is None
    tokenizer = know_base(BaseSpec(model=str(base_folder(kind)))).tokenizer
    longest = max(len(tokenizer(answer)["input_ids"]) for answer in ANSWERS)
    assert longest < spec.generation.max_new_tokens <= longest + longest // 8 + 17
    (task,), problems = prepare([spec])
    assert problems == []
    if task.base_files.max_positions:
        assert spec.train.max_length + spec.max_new_tokens <= task.base_files.max_positions


def test_free_text_over_an_encoder_is_explained(make):
    with pytest.raises(SpecError) as refused:
        make(table_of(ANSWERS))
    said = str(refused.value)
    assert said.startswith("column 'label' has 60 different answers in 60 rows, 9.0 words on average: looks like texts to write")
    assert "is an encoder, which writes no text: name a seq2seq or causal base" in said
    made, spec = make(table_of(ANSWERS), "nobody/has-this-model")
    assert spec.labels is None
    assert about(made, "base") == [
        "whether nobody/has-this-model writes text is not known here; if it is an encoder, submit refuses it"
    ]


@pytest.mark.parametrize("num_rows", [20, 120, 1500, 2600])
def test_the_gate_asks_for_what_the_examples_can_prove(make, num_rows):
    made, spec = make(table_of((["a", "a", "b"] * num_rows)[:num_rows]))
    assert power_warning(spec, None) == ""
    assert 0.6 < spec.gate.min < 2 / 3 + 0.04
    assert (about(made, "few examples") == []) == (spec.gate.margin == 0.02) == (num_rows == 2600)
    if num_rows == 120:
        assert about(made, "few examples") == [
            "120 examples leave 48 for the gate, which prove a margin of 0.09 (gate.margin); 0.02 takes 928"
        ]


def test_what_a_person_must_write_is_marked(make):
    made, _ = make(table_of(["a", "b"] * 10))
    todos = [line for line in made.text.splitlines() if "TODO" in line]
    assert len(todos) == 4  # the first says what the word means
    assert "  a: null  # 10 rows" in made.text


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("data", "data"),
        ("My Data (v2)", "my-data-v2"),
        ("-", "task"),
        ("auto", "auto-task"),
        ("a" * 80, "a" * 63),
        ("数据", "task"),
    ],
)
def test_names(stem, name):
    assert task_name(stem) == name


@pytest.mark.parametrize(
    ("num_tokens", "most", "limit"),
    [(1, None, 16), (16, 512, 16), (17, 512, 32), (500, 300, 288), (40, 9, 16), (99999, None, 32768)],
)
def test_limits(num_tokens, most, limit):
    assert rounded_limit(num_tokens, most) == limit
