"""Adapters of one task in one group: each row is what training and asking its adapter alone gives, also after a kill."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import FAMILIES
from test_trainer import assert_same_weights, examples_of

from multilora.artifact import read_artifact, read_tensors
from multilora.prompt import encode_prompt
from multilora.spec import TaskSpec
from orchestrator.dataset import TaskDataset
from orchestrator.methods import Bench, MethodRow
from orchestrator.train_together import Entry, train_together
from orchestrator.variants import with_seed
from serve.engine import Engine, Work

LABELS = {"yes": "agrees", "no": "refuses"}


def bench_of(folder, base, num_train=11, **spec):
    """A task of two labels over a tiny base."""
    values = {
        "name": "mood",
        "base": base.spec,
        "data": {"train": "data.jsonl"},
        "instruction": "{labels} {text}",
        "labels": LABELS,
        "label_score": "mean",
        "lora": {"rank": 4, "alpha": 8},
        "train": {"epochs": 2, "batch_size": 4, "max_length": 64, "learning_rate": 3e-3},
    }
    names = [*LABELS]
    train, select, gate = (
        examples_of(count, names, split) for count, split in ((num_train, "train"), (5, "select"), (9, "gate"))
    )
    dataset = TaskDataset("mood", train, select, gate, "f" * 64, ())
    return Bench(TaskSpec.model_validate({**values, **spec}), dataset, folder, seeds=(0, 1), sizes=(4, 8, 500), max_slots=3)


def entry_of(bench, method, seed=0, num_train=None, **lora):
    spec = with_seed(bench.spec, seed)
    spec = spec.model_copy(update={"lora": spec.lora.model_copy(update=lora)})
    return Entry(MethodRow("variants", method, seed=seed), spec, bench.dataset.train[:num_train])


def unlike_entries(bench):
    return [
        entry_of(bench, "own"),
        entry_of(bench, "own", seed=1),
        entry_of(bench, "rank 1", rank=1),
        entry_of(bench, "top", layers=[-1]),
        entry_of(bench, "few", num_train=5),
    ]


def weights_below(folder):
    """The tensors of all adapters below a folder, by the key of what decides them, and module."""
    adapters = {path.parent.name: read_tensors(read_artifact(path)) for path in folder.glob("variants/*/adapter")}
    return {
        (key, name): torch.cat([half.flatten() for half in pair]) for key, own in adapters.items() for name, pair in own.items()
    }


def assert_same_rows(seen, expected):
    """Everything but times, and bytes: canary scores are written with as many digits as they happen to have."""
    measured = {"train_s": 0.0, "ms_per_text": 0.0, "disk_bytes": 0}
    assert [replace(row, **measured) for row in seen] == [replace(row, **measured) for row in expected]


class Kill(Exception):  # noqa: N818  what ends a process is no error
    """Ends a training as a kill would."""


def killed_at(number, kind):
    """A listener that ends the training at the given event of a kind."""
    left = iter(range(number))

    def listen(event):
        if event.kind == kind and next(left, None) is None:
            raise Kill

    return listen


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_adapters_that_train_alone(family, fresh_base, tmp_path):
    base = fresh_base(family)
    bench = bench_of(tmp_path / "group", base)
    entries = unlike_entries(bench)
    rows = list(train_together(bench, base, entries))
    assert [(row.method, row.seed, row.num_train) for row in rows] == [
        ("own", 0, 11), ("own", 1, 11), ("rank 1", 0, 11), ("top", 0, 11), ("few", 0, 5)
    ]  # fmt: skip
    # The base that this group has given back trains the adapters one by one.
    alone = [row for entry in entries for row in train_together(replace(bench, folder=tmp_path / "alone"), base, [entry])]
    assert_same_rows(rows, alone)
    seen, expected = weights_below(tmp_path / "group"), weights_below(tmp_path / "alone")
    assert len({key for key, _ in expected}) == 5
    assert_same_weights(seen, expected)
    assert len({row.answers for row in rows}) > 1, "adapters that all answer alike would prove nothing"


def test_rows_say_what_an_adapter_costs(fresh_base, tmp_path):
    base = fresh_base("encoder")
    bench = bench_of(tmp_path, base)
    own, other, small, top, few = train_together(bench, base, unlike_entries(bench))
    assert own.num_trained == 4 * small.num_trained == 2 * top.num_trained
    assert own.num_trained * 4 < own.disk_bytes < own.num_trained * 4 + 40_000
    assert all(row.ms_per_text > 0 for row in (own, other, small, top, few))
    wall_s = json.loads((tmp_path / "variants" / "group.json").read_text("utf-8"))["wall_s"]
    assert sum(row.train_s for row in (own, other, small, top, few)) == pytest.approx(wall_s)
    # Its 5 examples are two steps an epoch, of which the clock counts four rows each; the others have three.
    assert few.train_s == pytest.approx(own.train_s * 2 / 3, rel=0.4)


def test_what_fails_becomes_a_row_with_its_reason(fresh_base, tmp_path):
    base = fresh_base("encoder")
    bench = bench_of(tmp_path, base)
    idle = entry_of(bench, "idle")
    idle = replace(idle, spec=idle.spec.model_copy(update={"train": idle.spec.train.model_copy(update={"learning_rate": 1e-12})}))
    entries = [
        replace(entry_of(bench, "deep", layers=[99]), asked={"deep, asked: otherwise": "{text}"}),
        Entry(MethodRow("variants", "impossible", skipped="it has no meaning here"), bench.spec, bench.dataset.train),
        idle,
        entry_of(bench, "own"),
    ]
    deep, otherwise, impossible, idle_row, own = train_together(bench, base, entries)
    assert deep.skipped.startswith("layers [99] do not exist; this base has 2 layers")
    assert (otherwise.method, otherwise.skipped) == ("deep, asked: otherwise", deep.skipped)
    assert (impossible.skipped, impossible.train_s) == ("it has no meaning here", 0.0)
    assert idle_row.skipped == "mood@1: canary scores equal the base's, so the adapter has no effect"
    assert (own.skipped, len(own.answers)) == ("", 9)


def test_nothing_to_train_is_no_group(fresh_base, tmp_path):
    base = fresh_base("encoder")
    bench = bench_of(tmp_path, base)
    entry = Entry(MethodRow("variants", "impossible", skipped="no"), bench.spec, bench.dataset.train)
    (row,) = train_together(bench, base, [entry])
    assert (row.skipped, row.num_train) == ("no", 11)


@pytest.mark.parametrize(("number", "kind"), [(10, "progress"), (2, "epoch"), (3, "finished")])
def test_a_training_that_was_killed_goes_on_to_the_same_answers(number, kind, fresh_base, tmp_path):
    base = fresh_base("encoder")
    bench = bench_of(tmp_path / "undisturbed", base)
    entries = unlike_entries(bench)
    undisturbed = list(train_together(bench, base, entries))
    bench = replace(bench, folder=tmp_path / "killed")
    with pytest.raises(Kill):
        list(train_together(bench, base, entries, killed_at(number, kind), checkpoint_every_s=-1.0))
    events = []
    # The same base goes on, and so does one that a new process loads.
    resumed = list(train_together(bench, base, entries, events.append))
    assert_same_rows(resumed, undisturbed)
    num_steps = Counter(event.kind for event in events)["progress"]
    assert num_steps < 4 * 6 + 4, "what was done is not done again"
    seen, expected = weights_below(tmp_path / "killed"), weights_below(tmp_path / "undisturbed")
    assert_same_weights(seen, expected)


def test_a_restart_loses_no_training_time(fresh_base, tmp_path):
    base = fresh_base("encoder")
    bench = bench_of(tmp_path, base)
    file = tmp_path / "variants" / "group.json"
    with pytest.raises(Kill):
        list(train_together(bench, base, unlike_entries(bench), killed_at(0, "finished")))
    walls = [json.loads(file.read_text("utf-8"))["wall_s"]]
    events = []
    for listen in (lambda event: None, events.append):
        rows = list(train_together(bench, base, unlike_entries(bench), listen))
        walls.append(json.loads(file.read_text("utf-8"))["wall_s"])
        assert sum(row.train_s for row in rows) == pytest.approx(walls[-1])
        assert all(row.train_s > 0 for row in rows)
    assert all(before < after for before, after in pairwise(walls))
    assert {event.kind for event in events} == {"finished"}, "nothing is trained a third time"


def test_equal_entries_share_an_adapter_and_another_spec_has_its_own(fresh_base, tmp_path):
    base = fresh_base("encoder")
    bench = bench_of(tmp_path, base)
    events = []
    first, second = train_together(bench, base, [entry_of(bench, "own"), entry_of(bench, "rank 4")], events.append)
    assert (first.method, second.method) == ("own", "rank 4")
    assert first.answers == second.answers
    assert [event.kind for event in events].count("started") == 1
    # A folder that holds an adapter of another spec or other examples does not take it for this one.
    relabelled = tuple(replace(example, label="yes") for example in bench.dataset.train)
    others = [entry_of(bench, "own", rank=2), replace(entry_of(bench, "own"), train=relabelled)]
    list(train_together(bench, base, others, events.append))
    assert [event.kind for event in events].count("started") == 3


def test_labels_under_other_names_come_back_as_the_tasks_own(fresh_base, tmp_path):
    base = fresh_base("causal")
    bench = bench_of(tmp_path, base)
    letters = bench.spec.model_copy(update={"labels": {"A": "yes: agrees", "B": "no: refuses"}})
    entry = Entry(MethodRow("variants", "letters"), letters, bench.dataset.train, label_of={"A": "yes", "B": "no"})
    (row,) = train_together(bench, base, [entry])
    engine = Engine(base, 1, 4)
    key = engine.bind(read_artifact(next(tmp_path.glob("variants/*/adapter"))), 1)
    answers = engine.classify([Work(key, engine.prompt(key, example.columns)) for example in bench.dataset.gate])
    assert {answer.labels for answer in answers} == {("A", "B")}
    assert row.answers == tuple({"A": "yes", "B": "no"}[answer.label] for answer in answers)


def test_an_adapter_is_asked_with_further_instructions(fresh_base, tmp_path):
    base = fresh_base("causal")
    bench = bench_of(tmp_path, base)
    too_long = f"{'very ' * 80}{{text}}"
    asked = {"own, asked: bare": "{text}", "own, asked: long": too_long}
    own, bare, long = train_together(bench, base, [replace(entry_of(bench, "own"), asked=asked)])
    engine = Engine(base, 1, 4)
    key = engine.bind(read_artifact(next(tmp_path.glob("variants/*/adapter"))), 1)
    for row, template in ((own, bench.spec.instruction), (bare, "{text}")):
        prompt_format = replace(engine.bound(key).prompt_format, instruction=template)
        prompts = [encode_prompt(prompt_format, example.columns, base.tokenizer) for example in bench.dataset.gate]
        assert row.answers == tuple(answer.label for answer in engine.classify([Work(key, prompt) for prompt in prompts]))
    assert (bare.method, bare.note, bare.num_train) == ("own, asked: bare", "{text}", 11)
    assert bare.answers != own.answers
    assert long.skipped.endswith("more than train.max_length 64: raise max_length or shorten them")
