"""Task specs: what loads, YAML's traps, and one test per message that an author of a spec can get."""

import json
import pickle
import re
from pathlib import Path

import pytest
import yaml

from multilora.errors import SpecError
from multilora.spec import task_json_schema
from multilora.spec_files import load_task_specs, try_load_task_specs
from multilora.spec_hash import spec_hash

ROOT = Path(__file__).parents[1]
SPEC = """\
name: spam
base: {model: org/model}
data: {train: spam.jsonl}
instruction: "Is this spam? {text} {labels}"
labels: {spam: unwanted, ham: wanted}
"""


@pytest.fixture
def write(tmp_path):
    """Write a spec file beside one data file and one base folder."""
    (tmp_path / "spam.jsonl").write_text('{"text": "win money", "label": "spam"}\n', encoding="utf-8")
    (tmp_path / "base").mkdir()

    def write_spec(text, name="task.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_spec


@pytest.fixture
def load(write):
    """Load one spec from its text."""
    return lambda text: load_task_specs([write(text)])[0]


# What loads


def test_spec_loads_with_absolute_paths_and_defaults(load, tmp_path):
    spec = load(SPEC.replace("org/model", "./base"))
    assert spec.data.train == str(tmp_path / "spam.jsonl")
    assert spec.base.model == str(tmp_path / "base")
    assert spec.labels == {"spam": "unwanted", "ham": "wanted"}
    assert spec.columns == ("text",)
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.target_modules) == (8, 16.0, "all-linear")


def test_specs_load_in_the_order_given(write):
    paths = [write(SPEC.replace("name: spam", f"name: {name}"), f"{name}.yaml") for name in ("zeta", "alpha", "mid")]
    assert [spec.name for spec in load_task_specs(paths)] == ["zeta", "alpha", "mid"]


def test_hub_source_list_of_targets_and_free_text_load(load):
    spec = load(
        """\
name: rewrite
base: {model: org/model, dtype: bfloat16, quantization: 4bit}
data: {train: {hub: org/set, split: "train[:100]"}, text: body, label: answer}
instruction: "Rewrite politely, {{as is}} if it is: {title} {body}"
lora: {target_modules: [q, v]}
"""
    )
    assert spec.data.train.split == "train[:100]"
    assert spec.columns == ("title", "body")
    assert spec.labels is None
    assert spec.lora.target_modules == ["q", "v"]


@pytest.mark.parametrize(("settings", "scaling"), [("alpha: 8", 0.5), ("alpha: 8, rslora: true", 2.0)])
def test_scaling_is_alpha_over_rank_or_its_root(load, settings, scaling):
    assert load(SPEC + f"lora: {{rank: 16, {settings}}}\n").lora.scaling == scaling


def test_answer_column_may_be_called_labels(load):
    assert load(SPEC.replace("spam.jsonl", "spam.jsonl, label: labels")).columns == ("text",)


def test_specs_are_frozen_and_survive_pickling(load):
    spec = load(SPEC)
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(ValueError, match="frozen"):
        spec.lora.rank = 4


# YAML's traps


def test_words_times_dates_and_versions_stay_strings(load):
    labels = load(SPEC.replace("{spam: unwanted, ham: wanted}", "{yes: on, no: off, 12:30: 2024-01-01, 0x1F: 1_000}")).labels
    assert labels == {"yes": "on", "no": "off", "12:30": "2024-01-01", "0x1F": "1_000"}


@pytest.mark.parametrize(("written", "rate"), [("2e-4", 2e-4), ("2E-4", 2e-4), ("0.0002", 2e-4), (".5", 0.5), ("1", 1.0)])
def test_learning_rate_is_a_number_however_it_is_written(load, written, rate):
    assert load(SPEC + f"train: {{learning_rate: {written}}}\n").train.learning_rate == rate


@pytest.mark.parametrize(("written", "rank"), [("8", 8), ("08", 8), ("010", 10), ("+4", 4)])
def test_whole_numbers_are_decimal(load, written, rank):
    assert load(SPEC + f"lora: {{rank: {written}}}\n").lora.rank == rank


def test_null_and_missing_meaning_are_the_same(load):
    assert load(SPEC.replace("{spam: unwanted, ham: wanted}", "{spam: , ham: ~}")).labels == {"spam": None, "ham": None}


@pytest.mark.parametrize("key", ["1", "1.10", "true", "null", "-2e3"])
def test_label_that_yaml_reads_as_something_else_must_be_quoted(write, key):
    with pytest.raises(SpecError, match=r"labels\..*valid string .*Fix: put the value in quotes"):
        load_task_specs([write(SPEC.replace("spam: unwanted", f"{key}: unwanted"))])
    assert key in load_task_specs([write(SPEC.replace("spam: unwanted", f'"{key}": unwanted'))])[0].labels


# Messages: what is changed in the spec, the field that is named, the rule and the fix

PROBLEMS = {
    "not yaml": ("lora: {", "line 7", "is not valid YAML: expected", "check indentation and quotes"),
    "tab": ("\tlora: 1", "line 6", "is not valid YAML: found character '.t'", "check indentation and quotes"),
    "duplicate key": ("name: other", "line 6", "the key 'name' appears twice", "check"),
    "duplicate label": (("ham: wanted", "spam: wanted"), "line 5", "the key 'spam' appears twice", "check"),
    "unquoted double braces": (('"Is this spam? {text} {labels}"', "{{text}}"), "line 4", "found unhashable key", "quotes"),
    "python object": ("train: !!python/object:os.system {}", "line 6", "could not determine a constructor", "check"),
    "two documents": ("---\nname: b", "line 6", "found another document", "check"),
    "unknown field": ("lorra: {rank: 4}", "lorra", "extra inputs are not permitted", "remove it or correct the spelling"),
    "unknown inner field": ("lora: {rnk: 4}", "lora.rnk", "extra inputs are not permitted", "tasks/schema.json"),
    "missing field": (("instruction:", "#"), "instruction", "field required", "add the field"),
    "missing inner field": (("{train: spam.jsonl}", "{text: body}"), "data.train", "field required", "add the field"),
    "name with capitals": (("name: spam", "name: Spam_1"), "name", "should match pattern", "lower-case letters, digits"),
    "name too long": (("name: spam", f"name: {'a' * 64}"), "name", "should match pattern", "at most 63 characters"),
    "name ends with hyphen": (("name: spam", "name: spam-"), "name", "should match pattern", "inner hyphens"),
    "number as name": (("name: spam", "name: 123"), "name", "valid string", "put the value in quotes"),
    "reserved name": (("name: spam", "name: base"), "file", "the name 'base' has a meaning of its own", "choose another name"),
    "one label": ((", ham: wanted", ""), "file", "needs at least two labels", "omit labels for a free-text task"),
    "list of labels": (("{spam: unwanted, ham: wanted}", "[a, b]"), "labels", "valid dictionary", "change the value"),
    "empty label": (("ham: wanted", "'': wanted"), "file", "labels must not be empty", "change the value"),
    "label with a space": (("ham: wanted", "'ham ': wanted"), "file", "begin or end with a space", "change the value"),
    "labels equal but for spaces": (("ham: wanted", "sp  am: a, sp am: b"), "file", "or in spaces", "distinct"),
    "text settings beside labels": ("generation: {}", "file", "generation is set, but a task with labels", "remove it"),
    "no room for a text": ("generation: {max_new_tokens: 0}", "generation.max_new_tokens", "greater than or equal", "change"),
    "labels equal but for case": (("ham: wanted", "SPAM: wanted"), "file", "differ only in upper and lower case", "distinct"),
    "number as meaning": (("ham: wanted", "ham: 1"), "labels.ham", "valid string", "put the value in quotes"),
    "input not shown": (("{text}", "text"), "file", "the instruction never shows the input", r"put \{text\} into it"),
    "answer shown": (("{text}", "{text} {label}"), "file", "the instruction shows the answer", r"take \{label\} out"),
    "input column called labels": (("spam.jsonl", "spam.jsonl, text: labels"), "file", "never shows the input", "set data.text"),
    "labels not listed": (("labels: {spam: unwanted, ham: wanted}", ""), "file", "but the task lists none", "add labels"),
    "open brace": (("{text}", "{text} {"), "file", "instruction: .*", r"write \{\{ and \}\} for literal braces"),
    "lone close brace": (("{text}", "{text} }"), "file", "instruction: Single '}'", r"write \{\{ and \}\}"),
    "empty braces": (("{text}", "{text} {}"), "file", r"instruction: \{\} is not a plain column name", r"write \{\{ and \}\}"),
    "attribute of a column": (("{text}", "{text} {text.upper}"), "file", r"\{text.upper\} is not a plain column name", "write"),
    "conversion": (("{text}", "{text!r}"), "file", r"\{text\} is not a plain column name", "write"),
    "empty instruction": (('"Is this spam? {text} {labels}"', '""'), "instruction", "at least 1 character", "change the value"),
    "unquoted braces": (('"Is this spam? {text} {labels}"', "{text}"), "instruction", "valid string", "put the value in quotes"),
    "wording without the input": ("instructions: ['Spam?']", "file", "instructions 1 shows the columns none", "show .*: text"),
    "wording with the answer": (
        "instructions: ['{text}', '{text} {label}']", "file", "instructions 2 shows the columns label, text", "show those"),
    "wording with an open brace": ("instructions: ['{text} {']", "file", "instructions 1: .*", r"write \{\{ and"),
    "the same wording": ("instructions: ['Is this spam? {text} {labels}']", "file", "hold the same text twice", "remove one"),
    "no wordings": ("instructions: []", "instructions", "at least 1 item", "change the value"),
    "a wording that is no list": ("instructions: '{text}'", "instructions", "valid list", "change the value"),
    "number as wording": ("instructions: [1]", "instructions.0", "valid string", "quotes"),
    "file type": (("spam.jsonl", "spam.txt"), "data.train", "no file type that can be read", r"use \.jsonl, .*hub"),
    "missing data file": (("spam.jsonl", "ham.jsonl"), "data.train", "file does not exist", "relative to the spec's folder /"),
    "missing gate file": (("spam.jsonl", "spam.jsonl, gate: g.csv"), "data.gate", "file does not exist", "relative to"),
    "hub source without split": (("spam.jsonl", "{hub: a/b}"), "data.train.split", "field required", "add the field"),
    "hub source with a typo": (("spam.jsonl", "{hub: a/b, split: s, rev: x}"), "data.train.rev", "not permitted", "remove"),
    "number as data": (("spam.jsonl", "5"), "data.train", "valid string", "quotes"),
    "missing base folder": (("org/model", "./nope"), "base.model", "folder does not exist", "name a folder in transformers"),
    "unknown dtype": (("org/model", "a/b, dtype: float16"), "base.dtype", "should be 'float32' or 'bfloat16'", "change"),
    "rank zero": ("lora: {rank: 0}", "lora.rank", "greater than or equal to 1", "change the value"),
    "number as target": ("lora: {target_modules: [q, 1]}", "lora.target_modules.1", "valid string", "put the value in quotes"),
    "broken pattern": ('lora: {target_modules: "(q|v"}', "lora.target_modules", "no regular expression .missing", "list module"),
    "no targets": ("lora: {target_modules: []}", "lora.target_modules", "target_modules is empty", "write all-linear"),
    "word as layer": ("lora: {layers: [last]}", "lora.layers.0", "valid integer", "change the value"),
    "no layers": ("lora: {layers: []}", "lora.layers", "at least 1 item", "change the value"),
    "unknown method": ("lora: {method: vera}", "lora.method", "should be 'lora'", "change the value"),
    "PEFT's name": ("lora: {use_dora: true}", "lora.use_dora", "not permitted", "the field is called lora.method here"),
    "LoRA+ backwards": ("lora: {plus_ratio: 0.5}", "lora.plus_ratio", "greater than or equal to 1", "change the value"),
    "unknown schedule": ("train: {schedule: step}", "train.schedule", "'linear', 'cosine' or 'constant'", "change the value"),
    "only warm-up": ("train: {warmup_ratio: 1}", "train.warmup_ratio", "less than 1", "change the value"),
    "endless norm": ("train: {max_grad_norm: inf}", "train.max_grad_norm", "finite number", "change the value"),
    "word as number": ("train: {learning_rate: fast}", "train.learning_rate", "valid number", "change the value"),
    "half a worker": ("resources: {workers: 0.5}", "resources.workers", "valid integer", "change the value"),
    "fraction of several gpus": ("resources: {gpus: 1.5}", "resources", "gpus above 1 must be a whole number", "write 0.5, 1, 2"),
    "part of a gpu for two": ("resources: {gpus: 0.5, workers: 2}", "resources", "cannot share a GPU", "write a whole number"),
    "label of nothing": ('resources: {node_labels: {zone: ""}}', "resources", "zone:  is not of letters", "write .zone"),
    "unknown rule": ('resources: {node_labels: {zone: "not(a)"}}', "resources", r"node_labels zone: not\(a\)", "write .zone"),
    "number as label": ("resources: {node_labels: {zone: 1}}", "resources.node_labels.zone", "valid string", "quotes"),
    "kind of gpu without one": ("resources: {gpus: 0, accelerator: L4}", "resources", "accelerator names a kind", "omit one"),
    "rate to try": ("search: {learning_rate: [0.001, 2]}", "search.learning_rate.1", "less than or equal to 1", "change"),
    "rank to try": ("search: {rank: [0]}", "search.rank.0", "greater than or equal to 1", "change the value"),
    "rank that is no list": ("search: {rank: 4}", "search.rank", "valid list", "change the value"),
    "epochs to try": ("search: {epochs: [4, 1001]}", "search.epochs.1", "less than or equal to 1000", "change the value"),
    "search of one": ("search: {num_candidates: 1}", "search.num_candidates", "greater than or equal to 2", "change the value"),
    "unknown halving": ("search: {eta: 4}", "search.eta", "1, 2 or 3", "change the value"),
    "search of nothing else": ("search: {rank: [8], epochs: [12, 12]}", "file", "nothing but the spec's own", "add others"),
    "unknown setting to try": ("search: {alpha: [8]}", "search.alpha", "not permitted", "correct the spelling"),
    "margin of zero": ("gate: {margin: 0}", "gate.margin", "greater than 0", "change the value"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_problem_names_file_field_rule_and_fix(write, case):
    change, field, rule, fix = PROBLEMS[case]
    text = SPEC + change + "\n" if isinstance(change, str) else SPEC.replace(*change)
    assert text != SPEC
    path = write(text)
    with pytest.raises(SpecError) as caught:
        load_task_specs([path])
    problem, *others = caught.value.problems
    assert not others, "one mistake, one message"
    assert (problem.where, problem.field) == (str(path), field)
    assert re.search(rule, problem.rule)
    assert re.search(fix, problem.fix)


@pytest.mark.parametrize("method", ["dora", "ia3", "prefix", "prompt", "bitfit", "pissa", "olora", "corda"])
def test_other_methods_are_refused_with_the_reason(write, method):
    with pytest.raises(SpecError) as caught:
        load_task_specs([write(SPEC + f"lora: {{method: {method}}}\n")])
    (problem,) = caught.value.problems
    assert problem.field == "lora.method"
    assert re.fullmatch(f"{method} [a-z' -]+, but here all adapters share one frozen base in mixed batches", problem.rule)
    assert problem.fix == "write `method: lora`, or train this task with PEFT itself"


def test_missing_file_folder_and_binary_file_are_named(write, tmp_path):
    binary = write(b"name: \xff\xfe", "binary.yaml")
    problems = try_load_task_specs([tmp_path / "nope.yaml", tmp_path, binary]).problems
    assert [problem.where for problem in problems] == [str(tmp_path / "nope.yaml"), str(tmp_path), str(binary)]
    assert [problem.rule for problem in problems] == ["No such file or directory", "Is a directory", "is not UTF-8 text"]
    assert [problem.fix for problem in problems] == ["check the path", "check the path", "save the file as UTF-8"]


@pytest.mark.parametrize(("text", "seen"), [("", "NoneType"), ("- name: spam", "list"), ("spam", "str")])
def test_file_must_hold_a_mapping(write, text, seen):
    with pytest.raises(SpecError, match=rf"must hold a mapping of fields \(got {seen}\). Fix: start with `name: my-task`"):
        load_task_specs([write(text)])


def test_two_tasks_of_one_name_are_refused(write):
    paths = [write(SPEC, "first.yaml"), write(SPEC, "second.yaml")]
    with pytest.raises(SpecError) as caught:
        load_task_specs(paths)
    (problem,) = caught.value.problems
    assert (problem.where, problem.field, problem.value) == (str(paths[1]), "name", "spam")
    assert problem.rule == f"task name is already used by {paths[0]}"
    assert problem.fix == "give each task its own name"


def test_all_problems_of_all_files_are_found_at_once(write):
    first = write(SPEC.replace("name: spam", "name: SPAM") + "lora: {rank: 0, dropout: 2}\nlorra: 1\n", "first.yaml")
    second = write(SPEC.replace("spam.jsonl", "a.jsonl, gate: b.txt").replace("org/model", "../nope"), "second.yaml")
    good = write(SPEC, "good.yaml")
    loaded = try_load_task_specs([first, good, second])
    assert [spec.name for spec in loaded.specs] == ["spam"]
    assert sorted((problem.where, problem.field) for problem in loaded.problems) == sorted(
        [(str(first), field) for field in ("name", "lora.rank", "lora.dropout", "lorra")]
        + [(str(second), field) for field in ("data.train", "data.gate", "base.model")]
    )
    with pytest.raises(SpecError) as caught:
        load_task_specs([first, good, second])
    assert caught.value.problems == loaded.problems
    assert len(str(caught.value).splitlines()) == 7


# Hash and schema


@pytest.mark.parametrize(
    "change",
    [("Is this spam?", "Spam?"), ("ham: wanted", "ham: good"), ("spam: unwanted, ham: wanted", "ham: wanted, spam: unwanted"),
     ("spam.jsonl", "spam.jsonl, label: answer"), ("org/model", "org/model, dtype: bfloat16"),
     ("labels:", "lora: {rank: 4}\nlabels:"), ("labels:", "train: {seed: 1}\nlabels:"),
     ("labels:", "instructions: ['{text}']\nlabels:"),
     ("labels:", "search: {}\nlabels:"), ("labels:", "search: {rank: [4]}\nlabels:"),
     *(("labels:", f"lora: {{{change}}}\nlabels:") for change in ("rslora: true", "plus_ratio: 4", "layers: [0]")),
     *(("labels:", f"train: {{{change}}}\nlabels:") for change in (
         "schedule: cosine", "warmup_ratio: 0.1", "weight_decay: 0.1", "max_grad_norm: 2"))],
)  # fmt: skip
def test_hash_changes_with_what_decides_the_weights(load, change):
    assert spec_hash(load(SPEC)) != spec_hash(load(SPEC.replace(*change)))


@pytest.mark.parametrize(
    "change",
    [("name: spam", "name: other"), ("labels:", "description: for people\nlabels:"), ("labels:", "gate: {min: 0.5}\nlabels:"),
     ("labels:", "resources: {cpus: 1}\nlabels:"), ("labels:", "lora: {rank: 8}\nlabels:"),
     ("labels:", "resources: {gradient_checkpointing: true}\nlabels:"),
     ("labels:", "lora: {method: lora, rslora: false, plus_ratio: 1}\ntrain: {schedule: linear, max_grad_norm: 1}\nlabels:")],
)  # fmt: skip
def test_hash_stays_where_the_weights_stay(load, change):
    assert spec_hash(load(SPEC)) == spec_hash(load(SPEC.replace(*change)))


def test_hash_is_that_of_the_releases_before(load):
    """Adapters that earlier versions trained must not be trained again because the spec got new fields."""
    assert spec_hash(load(SPEC)) == "be2e665171e70738"
    settings = "lora: {rank: 4, target_modules: [q, v]}\ntrain: {seed: 3, early_stopping: 2}\n"
    assert spec_hash(load(SPEC + settings)) == "37646d42ce6857f0"


def test_schema_lists_every_field_with_its_sentence():
    schema = task_json_schema()
    assert schema["additionalProperties"] is False
    parts = [schema, *schema["$defs"].values()]
    undocumented = [name for part in parts for name, field in part["properties"].items() if "description" not in field]
    assert undocumented == []
    assert set(yaml.safe_load(SPEC)) <= set(schema["properties"])


def test_every_spec_of_the_project_loads():
    paths = [*sorted((ROOT / "tasks").glob("*.yaml")), *sorted((ROOT / "examples").glob("*.yaml"))]
    assert len(load_task_specs(paths)) == len(paths) > 0


FREE_TEXT = SPEC.replace("labels: {spam: unwanted, ham: wanted}", "").replace(" {labels}", "")


def test_a_free_text_task_has_a_token_limit_that_decides_its_hash(load):
    assert load(SPEC).max_new_tokens is None
    assert load(FREE_TEXT).max_new_tokens == load(FREE_TEXT + "generation: {}\n").max_new_tokens == 64
    short = load(FREE_TEXT + "generation: {max_new_tokens: 8}\n")
    assert short.max_new_tokens == 8
    assert spec_hash(short) != spec_hash(load(FREE_TEXT)) == spec_hash(load(FREE_TEXT + "generation: {}\n"))


def test_wordings_are_the_instruction_and_what_is_mixed_in(load):
    spec = load(SPEC + "instructions: ['{labels}: {text}', '{text}']\n")
    assert spec.wordings == ("Is this spam? {text} {labels}", "{labels}: {text}", "{text}")
    assert load(SPEC).wordings == (spec.instruction,)
    other_order = load(SPEC + "instructions: ['{text}', '{labels}: {text}']\n")
    assert spec_hash(other_order) != spec_hash(spec), "the seed draws by place"


def test_a_wording_of_a_free_text_task_has_no_labels(write, load):
    assert load(FREE_TEXT + "instructions: ['{text}']\n").wordings[1] == "{text}"
    with pytest.raises(SpecError, match=r"instructions 1 has {labels} but the task lists none.*Fix: take the field out"):
        load_task_specs([write(FREE_TEXT + "instructions: ['{text} {labels}']\n")])


def test_a_metric_over_labels_is_refused_for_a_free_text_task(write):
    with pytest.raises(SpecError, match=r"gate.metric macro_f1 needs labels.*Fix: use accuracy or token_f1 for a free-text task"):
        load_task_specs([write(FREE_TEXT + "gate: {metric: macro_f1}\n")])


def test_a_metric_over_words_is_for_free_texts_alone(write, load):
    assert load(FREE_TEXT + "gate: {metric: token_f1}\n").gate.metric == "token_f1"
    with pytest.raises(SpecError, match=r"gate.metric token_f1 is for free texts.*Fix: use accuracy or macro_f1"):
        load_task_specs([write(SPEC + "gate: {metric: token_f1}\n")])


def test_schema_file_is_fresh():
    assert json.loads((ROOT / "tasks" / "schema.json").read_text(encoding="utf-8")) == task_json_schema()
