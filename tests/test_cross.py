"""X[a][t] is what adapter a alone, in plain PEFT, answers with task t's prompt and labels; the numbers worked by hand."""

import json
import math
import random
from dataclasses import replace

import pytest
from peft import PeftModel
from plain_peft import AUTO_CLASS, plain_probabilities
from test_engine import TASKS
from tiny_adapters import CARDS, MAIL, SHORTEN, TEXTS, item_of

from multilora.errors import RequestError, UnknownTaskError
from multilora.spec import BaseSpec
from orchestrator.cross import BASE, CrossColumn, CrossMatrix, load_matrices, store_matrices
from orchestrator.cross_evaluate import column_of, cross_columns
from orchestrator.dataset import Example
from orchestrator.eval_report import EvalItem
from orchestrator.gates import evenly_chosen
from serve.engine import Engine, Work

TOLERANCE = 1e-3


def gate_of(task, num_examples=24):
    """Examples whose labels are random, so that every adapter is right on some."""
    rng = random.Random(task.name)
    labels = [label for label, _ in task.labels]
    texts = [f"{rng.choice(TEXTS)} {rng.choice(TEXTS)} {number}" for number in range(num_examples)]
    return tuple(Example(f"{task.name}{n}", item_of(task, text), rng.choice(labels)) for n, text in enumerate(texts))


def items_of(tiny_adapter, kind):
    artifacts = [tiny_adapter(kind, task, seed) for seed, task in enumerate(TASKS)]
    return [
        EvalItem(task.name, seed + 1, artifact.digest, str(artifact.folder), gate_of(task), "")
        for seed, (task, artifact) in enumerate(zip(TASKS, artifacts, strict=True))
    ]


# The engine


@pytest.fixture
def rig(family, fresh_base, tiny_adapter):
    engine = Engine(fresh_base(family), 2, 8)  # fewer slots than adapters
    keys = [engine.bind(tiny_adapter(family, task, seed), 1) for seed, task in enumerate(TASKS)]
    pairs = [(own, key, task) for own, task in zip(keys, TASKS, strict=True) for key in keys]
    works = [Work(key, engine.prompt(own, item_of(task, text)), own) for text in TEXTS[:3] for own, key, task in pairs]
    return engine, keys, works


def test_an_adapter_asked_as_another_answers_with_that_ones_labels(rig, family, fresh_base, base_folder, tiny_adapter):
    engine, keys, works = rig
    plain = fresh_base(family)
    models = {
        key: PeftModel.from_pretrained(
            AUTO_CLASS[family].from_pretrained(base_folder(family)), tiny_adapter(family, task, seed).folder
        ).eval()
        for seed, (key, task) in enumerate(zip(keys, TASKS, strict=True))
    }
    answers = iter(engine.classify(works))
    temperatures = dict(zip(keys, (task.temperature for task in TASKS), strict=True))
    for text in TEXTS[:3]:
        for task in TASKS:
            for key in keys:
                answer = next(answers)
                assert answer.labels == tuple(label for label, _ in task.labels)
                expected = plain_probabilities(plain, models[key], task, text, temperatures[key])
                assert list(answer.probabilities) == pytest.approx(expected, abs=TOLERANCE)


def test_mixed_with_all_others_it_answers_as_alone(rig):
    engine, _, works = rig
    for work, mixed in zip(works, engine.classify(works), strict=True):
        (alone,) = engine.classify([work])
        assert mixed.labels == alone.labels
        assert mixed.probabilities == pytest.approx(alone.probabilities, abs=TOLERANCE)


def test_asked_as_itself_is_the_ordinary_answer(rig):
    engine, _, works = rig
    own = [work for work in works if work.key == work.asked_as]
    assert engine.classify(own) == engine.classify([replace(work, asked_as=None) for work in own])


def test_cost_counts_the_labels_that_are_asked(rig, family):
    engine, keys, _ = rig
    prompt = engine.prompt(keys[2], item_of(MAIL, "card"))
    as_mail, as_cards = (engine.num_tokens(Work(key, prompt, keys[2])) for key in (keys[0], keys[2]))
    assert as_mail == as_cards
    assert family == "encoder" or as_mail != engine.num_tokens(Work(keys[1], prompt))


def test_what_is_not_bound_or_has_no_labels_cannot_be_asked(fresh_base, tiny_adapter):
    engine = Engine(fresh_base("causal"), 4, 8)
    cards, shorten = engine.bind(tiny_adapter("causal", CARDS), 1), engine.bind(tiny_adapter("causal", SHORTEN), 1)
    prompt = engine.prompt(cards, "card")
    with pytest.raises(UnknownTaskError, match=r"^mood@1 is not bound here"):
        engine.classify([Work(cards, prompt, "mood@1")])
    for key, asked_as in ((cards, shorten), (shorten, cards)):
        with pytest.raises(RequestError, match="can be asked as another only where both have labels"):
            engine.classify([Work(cards, prompt), Work(key, prompt, asked_as)])


# Cells


def test_cells_count_what_plain_peft_has_right(family, base_folder, fresh_base, tiny_adapter):
    items = items_of(tiny_adapter, family)
    columns = list(cross_columns(BaseSpec(model=str(base_folder(family))), items))
    plain = fresh_base(family)
    models = {BASE: plain.model} | {
        f"{item.task}@{item.version}": PeftModel.from_pretrained(
            AUTO_CLASS[family].from_pretrained(base_folder(family)), item.folder
        ).eval()
        for item in items
    }
    assert [column.task for column in columns] == [task.name for task in TASKS]
    for column, item, task in zip(columns, items, TASKS, strict=True):
        assert column.num_examples == len(item.gate)
        assert list(column.num_right) == list(models)
        for row, model in models.items():
            num_right = num_close = 0
            for example in item.gate:
                probabilities = plain_probabilities(plain, model, task, example.columns[task.text_column], 1.0)
                best, second, *_ = sorted(probabilities, reverse=True)
                num_right += task.labels[probabilities.index(best)][0] == example.label
                num_close += best - second < TOLERANCE  # either answer is right
            assert abs(column.num_right[row] - num_right) <= num_close
    # Otherwise the counts would prove little.
    assert len({count for column in columns for count in column.num_right.values()}) > 3


def test_an_adapter_that_is_refused_has_neither_row_nor_column(base_folder, tiny_adapter):
    good, other, bad = items_of(tiny_adapter, "encoder")
    columns = list(cross_columns(BaseSpec(model=str(base_folder("encoder"))), [good, replace(bad, digest="0" * 64), other]))
    assert [(column.task, bool(column.error)) for column in columns] == [("mail", True), ("cards", False), ("mood", False)]
    assert "has digest" in columns[0].error
    matrix = CrossMatrix.of("b", {"cards": 1, "mood": 2, "mail": 3}, columns, "now")
    assert matrix.adapters == ("cards@1", "mood@2")
    assert list(matrix.num_right) == [BASE, "cards@1", "mood@2"]


def test_scores_that_are_no_numbers_cost_one_adapter_its_cells(fresh_base, tiny_adapter):
    engine = Engine(fresh_base("encoder"), 1, 8)
    items = items_of(tiny_adapter, "encoder")
    keys = {task.name: engine.bind(tiny_adapter("encoder", task, seed), seed + 1) for seed, task in enumerate(TASKS)}
    before = column_of(engine, items[0], keys)
    for a_RI, _ in engine.bound(keys["mood"]).tensors.values():
        a_RI.mul_(math.nan)
    assert column_of(engine, items[0], keys).num_right == before.num_right | {keys["mood"]: None}


# Numbers


MATRIX = CrossMatrix.of(
    "tiny",
    {"a": 1, "b": 2, "c": 3},
    [
        CrossColumn("a", 10, {BASE: 5, "a@1": 9, "b@2": 4, "c@3": 6}),
        CrossColumn("b", 20, {BASE: 10, "a@1": 10, "b@2": 16, "c@3": None}),
        CrossColumn("c", 4, {BASE: 1, "a@1": 3, "b@2": 3, "c@3": 2}),
        CrossColumn("d", 0, {}, "refused"),
    ],
    "2026-01-01T00:00:00+00:00",
)


def test_numbers_worked_by_hand():
    assert MATRIX.accuracy("a@1", "a") == 0.9
    assert MATRIX.accuracy("c@3", "b") is None
    assert [MATRIX.best_other(task) for task in "abc"] == ["c@3", "a@1", "a@1"]  # the first of equals
    assert [MATRIX.own_advantage(task) for task in "abc"] == pytest.approx([0.3, 0.3, -0.25])
    # Pairs: a on b 0, a on c 2/4, b on a -1/10, b on c 2/4, c on a 1/10; c on b is missing.
    transfer, num_pairs = MATRIX.forward_transfer()
    assert num_pairs == 5
    assert transfer == pytest.approx((0 + 0.5 - 0.1 + 0.5 + 0.1) / 5)


def test_one_adapter_has_no_others():
    alone = CrossMatrix.of("tiny", {"a": 1}, [CrossColumn("a", 10, {BASE: 5, "a@1": 9})], "")
    assert alone.forward_transfer() == (None, 0)
    assert alone.best_other("a") is None
    assert alone.own_advantage("a") is None
    assert alone.summary()["own_accuracy"] == {"a": 0.9}


def test_json_round_trip():
    assert CrossMatrix.from_json(MATRIX.to_json()) == MATRIX
    assert json.loads(MATRIX.to_json())["num_right"]["c@3"] == {"a": 6, "b": None, "c": 2}


def test_one_stored_matrix_per_base(tmp_path):
    file = tmp_path / "home" / "cross.json"
    assert load_matrices(file) == ()
    other, newer = replace(MATRIX, base="other"), replace(MATRIX, created="later")
    store_matrices(file, [MATRIX, other])
    store_matrices(file, [newer])
    assert load_matrices(file) == (newer, other)
    assert [found.name for found in file.parent.iterdir()] == ["cross.json"]


# Rows


def test_a_limit_picks_the_same_rows_and_keeps_the_shares_of_the_labels():
    alternating = tuple(Example(str(n), {"text": str(n)}, "ab"[n % 2]) for n in range(200))
    chosen = evenly_chosen(alternating, 100)
    assert chosen == evenly_chosen(alternating, 100)
    assert len(chosen) == 100
    assert sum(example.label == "a" for example in chosen) == 50
    assert [int(example.id) for example in chosen] == sorted(int(example.id) for example in chosen)
    rare = tuple(Example(str(n), {}, "rare" if n % 10 == 3 else "common") for n in range(100))
    assert sum(example.label == "rare" for example in evenly_chosen(rare, 20)) == 2
    assert evenly_chosen(rare, 100) == evenly_chosen(rare, None) == evenly_chosen(rare, 500) == rare
    assert len(evenly_chosen(rare, 1)) == 1
