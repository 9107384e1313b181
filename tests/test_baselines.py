"""Baselines learn what can be learned, choose on the select split, and say why they could not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_bench import LABELS, bench_of

from multilora.errors import AdapterError
from multilora.prompt import PromptFormat, encode_prompt
from orchestrator.base_alone import BaseAlone
from orchestrator.baselines import LEARNED, NUM_NEIGHBOURS, baseline_rows
from orchestrator.dataset import Example
from orchestrator.plain_baselines import fit_tf_idf, majority_label, tf_idf_answers, tf_idf_likeness
from serve.engine import Engine


@pytest.fixture
def bench(family, fresh_base, tmp_path):
    return bench_of(fresh_base(family).spec, tmp_path)


def test_every_baseline_answers_every_gate_example(bench, family, fresh_base):
    rows = list(baseline_rows(bench, fresh_base(family)))
    assert [row.method for row in rows] == ["majority class", *LEARNED]
    for row in rows:
        assert (row.part, row.num_train, row.seed, row.skipped) == ("baselines", 24, 0, "")
        assert len(row.answers) == len(bench.gold)
        assert set(row.answers) <= set(LABELS)
        assert row.disk_bytes > 0
    majority, tf_idf, neighbours, linear = rows
    assert len(set(majority.answers)) == 1
    # Words of the labels do not overlap, so whoever reads words knows; random states know less, but more than chance.
    assert tf_idf.accuracy(bench.gold) == 1.0
    assert min(neighbours.accuracy(bench.gold), linear.accuracy(bench.gold)) > 0.5
    assert all(row.ms_per_text > 0 and row.train_s > 0 for row in (tf_idf, neighbours, linear))
    assert (majority.num_trained, neighbours.num_trained) == (0, 0)
    assert linear.num_trained == 3 * 64 + 3
    assert "by accuracy on the select split" in neighbours.note
    assert int(neighbours.note.partition("k = ")[2].split()[0]) in NUM_NEIGHBOURS


def test_neighbours_are_those_of_the_engines_states(bench, family, fresh_base):
    # One example a label leaves k = 1 alone, whose answers are worked out here.
    few = replace(bench, dataset=replace(bench.dataset, train=bench.dataset.train[:2]))
    (row,) = [row for row in baseline_rows(few, fresh_base(family)) if row.method.startswith("nearest")]
    engine = Engine(fresh_base(family), 1, 1)
    train_BH, gate_BH = (engine.embed([e.text for e in split], 64) for split in (few.dataset.train, few.dataset.gate))
    nearest = (gate_BH @ train_BH.T).argmax(1).tolist()
    assert row.answers == tuple(few.dataset.train[index].label for index in nearest)
    assert "k = 1 by" in row.note
    assert len(set(row.answers)) == 2


def test_one_label_in_training_leaves_the_majority_class(bench, family, fresh_base):
    train = tuple(replace(example, label="office") for example in bench.dataset.train)
    majority, *others = baseline_rows(replace(bench, dataset=replace(bench.dataset, train=train)), fresh_base(family))
    assert set(majority.answers) == {"office"}
    assert [row.skipped for row in others] == ["every training example has the label office"] * 3


def test_the_base_is_given_back_as_it_was(bench, family, fresh_base):
    base = fresh_base(family)
    before = {name: type(module) for name, module in base.model.named_modules()}
    list(baseline_rows(bench, base))
    assert {name: type(module) for name, module in base.model.named_modules()} == before


# The base alone


def test_states_are_the_engines_whatever_the_length(bench, family, fresh_base):
    examples = [Example("e", {"text": text}, "office") for text in ("x", "where is my new card " * 30, "no, thanks")]
    alone, engine = BaseAlone(fresh_base(family)), Engine(fresh_base(family), 1, 1)
    expected_BH = engine.embed([example.text for example in examples], 64)
    assert torch.allclose(torch.tensor(alone.states(bench.spec, examples)).float(), expected_BH, atol=1e-5)


def test_many_prompts_side_by_side_score_as_alone(bench, family, fresh_base):
    base, prompt_format = fresh_base(family), PromptFormat.of(bench.spec, family)
    examples = [Example("e", {"text": "card " * (number % 40)}, "office") for number in range(120)]  # more than one batch holds
    prompts = [encode_prompt(prompt_format, example.columns, base.tokenizer) for example in examples]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = BaseAlone(base)
        together_BL = alone.scores(prompts, alone.label_set(prompt_format))
    finally:
        torch.set_num_threads(before)
    alone = BaseAlone(base)
    labels = alone.label_set(prompt_format)
    one_by_one_BL = np.concatenate([alone.scores([prompt], labels) for prompt in prompts])
    assert np.allclose(together_BL, one_by_one_BL, rtol=1e-4)


def test_scores_that_are_no_numbers_are_refused(bench, family, fresh_base):
    base = fresh_base(family)
    alone, prompt_format = BaseAlone(base), PromptFormat.of(bench.spec, family)
    with torch.no_grad():
        next(base.model.parameters()).fill_(math.nan)
    prompt = encode_prompt(prompt_format, bench.dataset.gate[0].columns, base.tokenizer)
    with pytest.raises(AdapterError, match=r"base .* gives labels scores that are no numbers"):
        alone.scores([prompt], alone.label_set(prompt_format))


# Without a language model


def test_majority_and_words():
    train = [Example(text, {"text": text}, label) for text, label in (("red", "b"), ("red apple", "a"), ("blue sky", "a"))]
    assert majority_label(train) == "a"
    assert majority_label(train[:2]) == "b"  # the first of equals
    assert tf_idf_answers(fit_tf_idf(train), train[2:]) == ["a"]
    likeness_BT = tf_idf_likeness(train)([Example("q", {"text": "the red apple"}, ""), Example("r", {"text": "?"}, "")])
    assert likeness_BT.shape == (2, 3)
    assert np.argmax(likeness_BT[0]) == 1
    assert likeness_BT[1].tolist() == [0.0, 0.0, 0.0]
    assert (likeness_BT[0] > 0).tolist() == [True, True, False]
