"""Demonstrations go by their seed, are as balanced as they can be, are written as the instruction is, and fit."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tiny_bench import bench_of

from multilora.errors import DataError
from multilora.prompt import PromptFormat, encode_prompt
from multilora.spec import BaseSpec
from orchestrator.dataset import Example
from orchestrator.demonstrations import (
    CHOICES,
    PromptParts,
    ask_with,
    balanced_examples,
    examples_of_labels,
    nearest_examples,
    random_examples,
)

TRAIN = [Example(str(n), {"text": f"text {n}"}, "abbbbccccccc"[n]) for n in range(12)]


# Which ones


@pytest.mark.parametrize("choose", CHOICES.values())
def test_the_seed_decides(choose):
    first, again, other = (choose(TRAIN, 6, seed) for seed in (3, 3, 4))
    assert first == again != other
    assert len(set(first)) == 6
    assert sorted(first) != sorted(other)


def test_of_one_seed_fewer_are_the_beginning_of_more():
    assert random_examples(TRAIN, 8, 5)[:3] == random_examples(TRAIN, 3, 5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("num", "counts"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (6, [1, 2, 3]), (9, [1, 4, 4]), (12, [1, 4, 7])]
)
def test_labels_are_as_balanced_as_there_are_examples(num, counts, seed):
    assert sorted(Counter(TRAIN[index].label for index in balanced_examples(TRAIN, num, seed)).values()) == counts


def test_which_label_comes_twice_and_the_order_go_by_the_seed():
    alone = {TRAIN[balanced_examples(TRAIN, 1, seed)[0]].label for seed in range(20)}
    assert alone == {"a", "b", "c"}
    orders = {"".join(TRAIN[index].label for index in balanced_examples(TRAIN, 3, seed)) for seed in range(20)}
    assert len(orders) > 3


def test_the_most_alike_comes_last_and_of_equals_the_first_one_is_nearer():
    likeness = np.array([[0.1, 0.9, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert nearest_examples(likeness, 3) == [[3, 2, 1], [2, 1, 0]]
    assert nearest_examples(likeness, 9) == [[0, 3, 2, 1], [3, 2, 1, 0]]


def test_the_examples_of_every_label():
    found = examples_of_labels(TRAIN, 0)
    assert {label: sorted(indices) for label, indices in found.items()} == {"a": [0], "b": [1, 2, 3, 4], "c": [*range(5, 12)]}
    assert found != examples_of_labels(TRAIN, 1)


# How they are written

DEMONSTRATIONS = [Example("1", {"text": "see {you}"}, "bye"), Example("2", {"text": "hey"}, "hello")]
LABELS = (("hello", "a greeting"), ("bye", ""))
LISTED = "- hello: a greeting\n- bye"


def written(instruction, demonstrations=DEMONSTRATIONS, **columns):
    shown = PromptParts.of(instruction).with_demonstrations(demonstrations)
    return PromptFormat("causal", shown, "text", LABELS, 64).render(columns or {"text": "hi {there}"})


def test_labels_stand_once_at_the_top_and_the_input_part_repeats():
    assert written("Say it.\n{labels}\nText: {text}\nAnswer:") == (
        f"Say it.\n{LISTED}\n\nText: see {{you}}\nAnswer: bye\n\nText: hey\nAnswer: hello\n\nText: hi {{there}}\nAnswer:"
    )


@pytest.mark.parametrize(
    ("instruction", "head", "asked"),
    [
        ("Say the mood of: {text}\n{labels}", f"{LISTED}\n\n", "Say the mood of: {}\nAnswer:"),
        ("Say it.\nText: {text}\nOptions:\n{labels}\nAnswer: ", f"Say it.\nOptions:\n{LISTED}\n\n", "Text: {}\nAnswer:"),
        ("Which of {labels} is {text}?", f"{LISTED}\n\n", "Which of the labels above is {}?\nAnswer:"),
        ("{text}\n\nWhich is it?\n{labels}", f"{LISTED}\n\n", "{}\nWhich is it?"),
        ("{text}\nYes or {{no}}:", "", "{}\nYes or {{no}}:"),
    ],
)
def test_instructions_of_other_shapes(instruction, head, asked):
    texts = [asked.format(text) for text in ("see {you}", "hey", "hi {there}")]
    assert written(instruction) == f"{head}{texts[0]} bye\n\n{texts[1]} hello\n\n{texts[2]}"


def test_all_columns_are_shown():
    example = Example("1", {"subject": "win", "body": "a phone"}, "bye")
    asked = written("{labels}\nSubject: {subject}\n\nBody: {body}\nKind:", [example], subject="s", body="b")
    assert asked == f"{LISTED}\n\nSubject: win\n\nBody: a phone\nKind: bye\n\nSubject: s\n\nBody: b\nKind:"


def test_a_reason_stands_between_input_and_cue():
    parts = PromptParts.of("Say it.\n{labels}\nText: {text}\nAnswer:")
    assert parts.asking_for_reason() == "Say it.\n{labels}\nText: {text}\nLet's think step by step."
    assert parts.with_reason("It is {so}.").splitlines()[2:] == [
        "Text: {text}",
        "Let's think step by step. It is {{so}}.",
        "Answer:",
    ]
    assert parts.with_reason("").splitlines()[3] == "Let's think step by step."


# They fit


@pytest.fixture(scope="module")
def tokenizer(fresh_base):
    return fresh_base("causal").tokenizer


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return bench_of(BaseSpec(model="none"), tmp_path_factory.mktemp("bench"))


def asked_at(limit, bench, tokenizer, num=6, first=0):
    format_ = replace(PromptFormat.of(bench.spec, "causal"), max_length_tokens=limit)
    parts = PromptParts.of(bench.spec.instruction)
    return ask_with(bench.dataset.train[first:num], parts, format_, bench.dataset.gate[0].columns, tokenizer)


def test_the_farthest_go_until_the_prompt_fits(bench, tokenizer):
    asked_text = bench.dataset.gate[0]
    lengths = [len(asked_at(4096, bench, tokenizer, num).prompt.token_ids) for num in range(7)]
    assert lengths == sorted(set(lengths))
    for num, length in enumerate(lengths):
        # The last `num` of six take about as much room as the first; what is left over holds none of the others.
        for limit in (length, length + 2):
            asked = asked_at(limit, bench, tokenizer)
            assert len(asked.prompt.token_ids) <= limit
            assert abs(asked.num_shown - num) <= 1
            assert asked.prompt == encode_prompt(asked.prompt_format, asked_text.columns, tokenizer)
            text = asked.prompt_format.render(asked_text.columns)
            shown = [example for example in bench.dataset.train if example.text in text]
            assert shown == list(bench.dataset.train[6 - asked.num_shown : 6])
            assert text.endswith(f"Message: {asked_text.text}\nAnswer:")
            if asked.num_shown < 6:
                with_one_more = asked_at(4096, bench, tokenizer, first=5 - asked.num_shown)
                assert len(with_one_more.prompt.token_ids) > limit


def test_the_input_is_cut_where_none_fits_and_refused_where_the_instruction_does_not(bench, tokenizer):
    limit = len(asked_at(4096, bench, tokenizer, num=0).prompt.token_ids) - 3
    asked = asked_at(limit, bench, tokenizer)
    assert (asked.num_shown, asked.prompt.is_truncated) == (0, True)
    assert len(asked.prompt.token_ids) <= limit
    with pytest.raises(DataError, match="the instruction and labels alone take"):
        asked_at(10, bench, tokenizer)
