"""What is found in a file: every kind of finding has a table that shows it and one that does not."""

import pytest

from multilora.errors import DataError
from orchestrator.choose_columns import choose_columns
from orchestrator.inspect_data import Finding, inspect_rows

WORDS = "apple river engine winter doctor yellow garden music sailor bridge copper island letter forest candle".split()  # noqa: SIM905


def texts(number):
    """Texts that are not nearly the same."""
    return [f"{WORDS[i % 15]} {WORDS[i * 7 % 11]} {WORDS[i // 15 % 15]} {i * 7919 % 100003}" for i in range(number)]


def inspect(answers, inputs=None, **others):
    table = {"text": inputs or texts(len(answers)), **others, "label": answers}
    return inspect_rows(table, choose_columns(table, label="label"))


def about(inspection, topic):
    return [finding.text for finding in inspection.findings if finding.about == topic]


def test_a_good_file_has_nothing_to_look_at():
    found = inspect(["good", "bad", "plain"] * 20)
    assert [finding.kind for finding in found.findings] == ["fact"] * 3
    assert found.findings[2] == Finding("fact", "labels", "3 in 60 rows: good 20 (33 %), bad 20 (33 %), plain 20 (33 %)")
    assert (found.labels, found.num_inputs, found.is_corrected) == ({"good": 20, "bad": 20, "plain": 20}, 60, False)
    assert found.rows[1] == ({"text": texts(60)[1]}, "bad")


def test_empty_rows_are_left_out():
    inputs = ["", *texts(40)[1:]]
    found = inspect(["a", "b", "a", " "] + ["a", "b"] * 18, inputs)
    assert about(found, "empty rows") == ["2 rows with an empty text or answer (1, 4): left out"]
    assert found.is_corrected
    assert [row.columns["text"] for row in found.rows] == [inputs[1], inputs[2], *inputs[4:]]


def test_labels_that_differ_in_case_and_spaces_become_one():
    found = inspect(["Spam", "spam", "spam", " spam ", "card  lost", "ham ", "ham "] * 10)
    assert found.labels == {"spam": 40, "ham": 20, "card  lost": 10}
    assert about(found, "label spelling") == [
        "'spam', 'Spam', ' spam ' differ in case and spaces alone: written 'spam'",
        "'ham ': written 'ham'",
    ]
    assert [row.answer for row in found.rows[:4]] == ["spam"] * 4


@pytest.mark.parametrize(
    ("answers", "topic", "text"),
    [
        (["e-mail", "email", "post"] * 10, "like labels", "'e-mail', 'email' differ in case, spaces and punctuation alone: if"),
        (["a"] * 30 + ["b"] * 9, "rare labels", "fewer than 10 rows: b (9); collect more"),
        (["a"] * 80 + ["b"] * 20, "class balance", "the largest label has 80 rows, the smallest 20: accuracy says little"),
        (["0", "1", "-1.5"] * 10, "numeric labels", "0, 1, -1.5 say nothing to a base model; write what each means"),
        (["a", "the card is gone and she wants a new one"] * 10, "long labels", "1 label of more than 8 words or 60 letters"),
        (["a", "b", "a, b"] * 10, "several labels", "a, b look like several labels in one cell"),
        ([f"label {'abcdefghijklmnop'[i % 16]}" for i in range(160)], "labels", "16 in 160 rows: label a 10 (6 %), "),
    ],
)  # fmt: skip
def test_what_is_odd_about_labels_is_said(answers, topic, text):
    (found,) = about(inspect(answers), topic)
    assert found.startswith(text)


def test_what_is_not_odd_is_not_said():
    found = inspect(["a", "b", "New York, NY", "two or three words"] * 20)
    assert {finding.about for finding in found.findings} == {"text column", "label column", "labels"}
    assert not about(inspect(["a"] * 79 + ["b"] * 21), "class balance")


def test_many_labels_are_not_all_listed():
    (found,) = about(inspect([f"label {'abcdefghijklmnop'[i % 16]}" for i in range(160)]), "labels")
    assert found.endswith("label l 10 (6 %) and 4 others")


def test_repeated_inputs_are_told_apart_from_contradictions():
    inputs = texts(40)
    answers = ["a", "b"] * 20
    inputs[2], inputs[4], inputs[7] = inputs[0], inputs[0], inputs[6]
    found = inspect(answers, inputs)
    assert about(found, "duplicates") == [
        f"2 rows repeating an input with its answer, such as {inputs[0]!r}: training leaves them out"
    ]
    (torn,) = about(found, "contradictions")
    assert torn.startswith(f"1 input with different answers, such as {inputs[6]!r}: a, b; the first row counts")
    assert found.num_inputs == 37
    assert not found.is_corrected


def test_near_duplicates_are_shown_where_they_contradict_each_other():
    long = "The delivery came two days late and nobody at the shop answered the telephone when I called them about "
    inputs = [*texts(30), f"{long}it.", f"{long}that."]
    answers = ["a", "b"] * 16
    (found,) = about(inspect(answers, inputs), "near-duplicates")
    assert found.startswith("2 texts are nearly the same as another, 2 of them as one with another label, such as 'The delivery")
    (found,) = about(inspect([*answers[:-2], "a", "a"], inputs), "near-duplicates")
    assert found.startswith("2 texts are nearly the same as another, such as 'The delivery")


def test_columns_get_names_that_can_stand_in_braces():
    table = {"Customer Message": texts(20), "labels": [f"{text} again" for text in texts(20)], "label": ["a", "b"] * 10}
    found = inspect_rows(table, choose_columns(table, ["Customer Message", "labels"], "label"))
    assert found.fields == {"Customer Message": "customer_message", "labels": "text_labels"}
    assert about(found, "column name") == [
        "'Customer Message' cannot stand in braces: it is called customer_message in the copy",
        "'labels' cannot stand in braces: it is called text_labels in the copy",
    ]
    assert list(found.rows[0].columns) == ["customer_message", "text_labels"]
    table = {"a b": texts(20), "a_b": ["a", "b"] * 10, "1st": texts(20)}
    assert inspect_rows(table, choose_columns(table, ["a b", "1st"], "a_b")).fields == {"a b": "a_b_", "1st": "text_1st"}


@pytest.mark.parametrize(
    "answers",
    [
        [f"the answer to question {i} is long" for i in range(10)],
        [f"answer {i}" for i in range(30)],
        [f"answer{i}" for i in range(60)],
    ],
)
def test_many_different_answers_are_texts(answers):
    found = inspect(answers)
    assert found.labels is None
    (said,) = about(found, "free text")
    assert said.startswith(f"{len(answers)} different answers in {len(answers)} rows, ")
    assert inspect(answers[:10] * 2).labels is not None  # each comes twice


def test_few_rows_of_short_answers_are_labels():
    assert inspect(["card lost", "card late", "rate"]).labels == {"card lost": 1, "card late": 1, "rate": 1}


@pytest.mark.parametrize(
    ("answers", "inputs", "message"),
    [
        ([str(i / 7) for i in range(40)], None, "column 'label' holds 40 different numbers in 40 rows, and a task answers with"),
        (["a", "A", " a"], None, "column 'label' holds 'a' alone; a task has at least two labels"),
        (["a", "", "b"], ["", "x", " "], "no row has both a text and a label"),
    ],
)
def test_what_no_task_can_be_made_of_is_refused(answers, inputs, message):
    table = {"text": inputs or texts(len(answers)), "label": answers}
    with pytest.raises(DataError, match=message):
        inspect_rows(table, choose_columns(table, ["text"], "label"))
