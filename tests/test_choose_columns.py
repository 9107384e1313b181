"""Which column is the text and which the label: by name, else by values; a column that gives the label away is neither."""

import pytest

from multilora.errors import DataError
from orchestrator.choose_columns import choose_columns

SENTENCES = [f"this is sentence number {i} of the file" for i in range(30)]
OTHERS = [f"and something else that belongs to row {i}" for i in range(30)]
LABELS = [("good", "bad", "plain")[i % 3] for i in range(30)]
NUMBERS = [str(i % 3) for i in range(30)]
IDS = [f"row-{i}" for i in range(30)]


@pytest.mark.parametrize(
    ("table", "texts", "label"),
    [
        ({"text": SENTENCES, "label": LABELS}, ("text",), "label"),
        ({"label": LABELS, "id": IDS, "text": SENTENCES}, ("text",), "label"),
        ({"text": SENTENCES, "label": NUMBERS, "label_text": LABELS}, ("text",), "label_text"),
        ({"a": IDS, "b": LABELS, "c": SENTENCES}, ("c",), "b"),
        ({"question": SENTENCES, "passage": OTHERS, "answer": LABELS}, ("question", "passage"), "answer"),
        ({"Customer Message": SENTENCES, "kind": LABELS, "stars": NUMBERS}, ("Customer Message",), "kind"),
        ({"word": IDS, "class": LABELS}, ("word",), "class"),
        ({"in": SENTENCES, "out": OTHERS}, ("in",), "out"),
        ({"input_text": SENTENCES, "target_text": OTHERS}, ("input_text",), "target_text"),
        ({"text": SENTENCES, "title": ["", *OTHERS[1:]], "label": LABELS}, ("text",), "label"),
        ({"": NUMBERS, "context": SENTENCES, "relabelled": LABELS}, ("context",), "relabelled"),
    ],
    ids=["named", "any order", "words before numbers", "few values", "two texts", "spaces", "short texts", "last", "both named",
         "empty cells", "part of a word"],
)  # fmt: skip
def test_the_columns_are_found(table, texts, label):
    chosen = choose_columns(table)
    assert (chosen.texts, chosen.label) == (texts, label)
    assert chosen.main in texts
    assert set(chosen.why) == {*texts, label}
    assert set(chosen.left_out) == set(table) - set(chosen.why)


def test_every_choice_has_its_reason():
    chosen = choose_columns(
        {
            "id": NUMBERS,
            "text": SENTENCES,
            "code": [label.upper() for label in LABELS],
            "author": IDS,
            "source": ["web"] * 30,
            "note": ["", "", *OTHERS[2:]],
            "kind": LABELS,
        },
        label="kind",
    )
    assert chosen.why == {"text": "its name says so, 8.0 words a row", "kind": "you named it"}
    assert chosen.left_out == {
        "id": "holds numbers",
        "code": "gives kind away: each value always comes with the same one",
        "author": "has 1.0 words a row and no name of a text",
        "source": "has no two different values",
        "note": "is empty in 7 % of the rows",
    }
    assert choose_columns({"a": SENTENCES, "b": LABELS}).why["b"] == "it has only 3 different values in 30 rows"
    assert choose_columns({"a": SENTENCES, "b": OTHERS}).why["b"].startswith("no column has few different values")


def test_the_longest_text_is_what_a_plain_string_fills():
    longer = [f"{text} {text}" for text in OTHERS]
    assert choose_columns({"title": SENTENCES, "body": longer, "label": LABELS}).main == "body"


def test_what_a_person_names_counts():
    table = {"id": IDS, "text": SENTENCES, "other": OTHERS, "label": LABELS}
    chosen = choose_columns(table, ["other", "id"], "text")
    assert (chosen.texts, chosen.label) == (("id", "other"), "text")
    assert chosen.left_out == {"label": "you named others"}


@pytest.mark.parametrize(
    ("table", "named", "message"),
    [
        ({"text": SENTENCES, "label": LABELS}, {"label": "lable"}, "no column 'lable'; its columns are text, label"),
        ({"text": SENTENCES, "label": LABELS}, {"texts": ["txt"]}, "no column 'txt'"),
        ({"text": SENTENCES}, {}, "has the column text alone"),
        ({"text": SENTENCES, "b": OTHERS}, {"texts": ["text"], "label": "text"}, "cannot be both a text and the label"),
        ({"a": ["x"] * 9, "b": ["y"] * 9}, {}, "no column has two different values that could be labels"),
        ({"a": NUMBERS, "label": LABELS}, {}, r"no column looks like a text \(a holds numbers\); name one with --text"),
    ],
)
def test_what_cannot_be_is_named(table, named, message):
    with pytest.raises(DataError, match=message):
        choose_columns(table, **named)
