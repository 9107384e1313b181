"""Reading, checking and splitting examples: nothing is guessed, nothing is in two splits, every message says what to do."""

import json
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest

from multilora.errors import DataError
from multilora.spec import HubSource, TaskSpec
from orchestrator.dataset import build_dataset

TRICKY = ["None", "NA", "null", "nan", "1.10", "007", "2020-01-31", "yes", 'say "hi", twice', "one\ntwo", "é \u2028 😀", "<b>"]
LABELS = ("good", "bad", "None")


def rows_of(count, labels=LABELS[:2], start=0):
    return [{"text": f"example number {i}", "label": labels[i % len(labels)]} for i in range(start, start + count)]


def write(file, rows):
    """Write rows in the format of the file's ending."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        separator = "\t" if suffix == ".tsv" else ","
        quoted = [[str(cell).replace('"', '""') for cell in row.values()] for row in rows]
        lines = [separator.join(rows[0]), *(separator.join(f'"{cell}"' for cell in row) for row in quoted)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def spec_of(train, *, labels=LABELS, instruction="Judge {text} as {labels}", data=(), train_settings=()):
    settings = {"max_examples": None, "seed": 0, **dict(train_settings)}
    return TaskSpec(
        name="mood", base={"model": "tiny"}, data={"train": str(train), **dict(data)}, instruction=instruction,
        labels=dict.fromkeys(labels), train=settings,
    )  # fmt: skip


def error_of(spec):
    with pytest.raises(DataError) as caught:
        build_dataset(spec)
    return [str(problem) for problem in caught.value.problems]


def all_examples(dataset):
    return [*dataset.train, *dataset.select, *dataset.gate]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "TSV", "parquet"])
def test_every_format_gives_the_text_as_it_stands(tmp_path, suffix):
    rows = [{"text": text, "label": LABELS[i % 3], "other": f"o{i}"} for i, text in enumerate(TRICKY)]
    dataset = build_dataset(spec_of(write(tmp_path / f"data.{suffix}", rows), instruction="Judge {text} and {other} as {labels}"))
    seen = {(example.columns["text"], example.columns["other"], example.label) for example in all_examples(dataset)}
    assert seen == {(row["text"], row["other"], row["label"]) for row in rows}
    assert dataset.notes == ()


def test_a_column_of_dates_stays_text(tmp_path):
    rows = [{"text": f"2020-01-{day:02}", "label": "good"} for day in range(1, 21)]
    dataset = build_dataset(spec_of(write(tmp_path / "data.jsonl", rows)))
    assert {example.columns["text"] for example in all_examples(dataset)} == {row["text"] for row in rows}


def test_json_values_that_are_no_strings_become_text(tmp_path):
    rows = [{"text": 100 + i, "label": i % 2} for i in range(20)]
    dataset = build_dataset(spec_of(write(tmp_path / "data.jsonl", rows), labels=("0", "1")))
    assert {(example.columns["text"], example.label) for example in all_examples(dataset)} >= {("100", "0"), ("101", "1")}


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for name, text in (
        ("data.csv", "text,label\n" + "".join(f"t{i},good\n" for i in range(9))),
        ("data.jsonl", "".join(json.dumps(row) + "\r\n" for row in rows_of(9))),
    ):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        assert len(all_examples(build_dataset(spec_of(tmp_path / name)))) == 9


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(345, (173, 34, 138)), (6, (3, 1, 2)), (100, (50, 10, 40)), (2500, (1300, 200, 1000)), (5000, (3800, 200, 1000))],
)
def test_split_sizes(tmp_path, count, sizes):
    dataset = build_dataset(spec_of(write(tmp_path / "data.jsonl", rows_of(count))))
    assert (len(dataset.train), len(dataset.select), len(dataset.gate)) == sizes


def test_given_splits_are_taken_whole_and_only_the_missing_are_cut_off(tmp_path):
    train, select, gate = (
        write(tmp_path / f"{name}.jsonl", rows_of(count, start=start))
        for name, count, start in (("train", 100, 0), ("select", 7, 1000), ("gate", 11, 2000))
    )
    for data, sizes in (
        ({}, (50, 10, 40)),
        ({"gate": str(gate)}, (90, 10, 11)),
        ({"select": str(select)}, (60, 7, 40)),
        ({"select": str(select), "gate": str(gate)}, (100, 7, 11)),
    ):
        dataset = build_dataset(spec_of(train, data=data))
        assert (len(dataset.train), len(dataset.select), len(dataset.gate)) == sizes


@pytest.mark.parametrize("seed", range(30))
def test_splits_are_disjoint_complete_stratified_and_repeatable(tmp_path, seed):
    rng = random.Random(seed)
    count, labels = rng.randint(6, 400), rng.sample("abcdefgh", k=rng.randint(2, 8))
    rows = [{"text": f"t{i}", "label": rng.choice(labels)} for i in range(count)]
    file = write(tmp_path / "data.jsonl", rows)
    spec = spec_of(file, labels=labels, train_settings={"seed": seed})
    dataset = build_dataset(spec)
    ids = [example.id for example in all_examples(dataset)]
    assert len(ids) == len(set(ids)) == count
    assert build_dataset(spec) == dataset
    total = Counter(row["label"] for row in rows)
    for split in (dataset.train, dataset.select, dataset.gate):
        seen = Counter(example.label for example in split)
        assert all(abs(seen[label] - total[label] * len(split) / count) <= 2 for label in labels)
        # Rows keep the file's order.
        numbers = [int(example.columns["text"][1:]) for example in split]
        assert numbers == sorted(numbers)


def test_splits_depend_on_the_rows_alone(tmp_path):
    """Not on the seed, the file's name or the order of its rows: the champion's training rows must stay out of the gate split."""
    rows = rows_of(60)
    first = build_dataset(spec_of(write(tmp_path / "a.jsonl", rows)))
    assert build_dataset(spec_of(write(tmp_path / "b.jsonl", rows))) == first
    assert build_dataset(spec_of(tmp_path / "a.jsonl", train_settings={"seed": 1})) == first
    turned = build_dataset(spec_of(write(tmp_path / "c.jsonl", rows[::-1])))
    for split in ("train", "select", "gate"):
        assert {example.id for example in getattr(turned, split)} == {example.id for example in getattr(first, split)}


def test_more_rows_move_hardly_any_row_into_the_gate_split(tmp_path):
    rows = rows_of(600)
    first = build_dataset(spec_of(write(tmp_path / "a.jsonl", rows[:500])))
    second = build_dataset(spec_of(write(tmp_path / "b.jsonl", rows)))
    moved = {example.id for example in first.train} & {example.id for example in second.gate}
    assert len(moved) <= 0.02 * len(second.gate)


def test_another_seed_takes_another_part_of_the_training_rows(tmp_path):
    write(tmp_path / "a.jsonl", rows_of(60))
    parts = [build_dataset(spec_of(tmp_path / "a.jsonl", train_settings={"seed": s, "max_examples": 10})) for s in (0, 0, 1)]
    assert parts[0] == parts[1]
    assert parts[0].train != parts[2].train
    assert parts[0].gate == parts[2].gate


def test_free_texts_are_split_at_random_however_often_they_repeat(tmp_path):
    rows = [{"text": f"example number {i}", "label": f"answer {i // 2 if i < 50 else i}"} for i in range(100)]
    spec = spec_of(write(tmp_path / "data.jsonl", rows)).model_copy(update={"labels": None, "instruction": "Rewrite {text}"})
    dataset = build_dataset(spec)
    assert len({example.id for example in all_examples(dataset)}) == len(rows)
    assert (len(dataset.train), len(dataset.select), len(dataset.gate)) == (50, 10, 40)
    # Spread over the answers as over labels, no answer would be twice in a split.
    assert max(Counter(example.label for example in dataset.gate).values()) == 2
    assert build_dataset(spec) == dataset


@pytest.mark.parametrize("most", [2, 9, 30, 31])
def test_max_examples_is_a_stratified_part_of_train(tmp_path, most):
    file = write(tmp_path / "data.jsonl", rows_of(100))
    whole = build_dataset(spec_of(file))
    part = build_dataset(spec_of(file, train_settings={"max_examples": most}))
    assert len(part.train) == most
    assert {example.id for example in part.train} <= {example.id for example in whole.train}
    assert (part.select, part.gate) == (whole.select, whole.gate)
    counts = Counter(example.label for example in part.train)
    assert abs(counts["good"] - counts["bad"]) <= 1
    assert build_dataset(spec_of(file, train_settings={"max_examples": 50})).train == whole.train


def test_fingerprints_change_with_a_row_and_with_a_label(tmp_path):
    rows = rows_of(30)
    train = write(tmp_path / "train.jsonl", rows)

    def with_gate(gate_rows):
        return build_dataset(spec_of(train, data={"gate": str(write(tmp_path / "gate.jsonl", gate_rows))}))

    gate = rows_of(5, start=100)
    first = with_gate(gate)
    relabelled = with_gate([{**gate[0], "label": "bad"}, *gate[1:]])
    reworded = with_gate([{**gate[0], "text": "new"}, *gate[1:]])
    assert len({data.gate_fingerprint for data in (first, relabelled, reworded)}) == 3
    assert len({data.fingerprint for data in (first, relabelled, reworded)}) == 3
    assert with_gate(gate) == first
    write(train, [*rows[:-1], {**rows[-1], "text": "new"}])
    changed = with_gate(gate)
    assert changed.gate_fingerprint == first.gate_fingerprint
    assert changed.fingerprint != first.fingerprint


def test_repeated_inputs_are_left_out_with_a_note(tmp_path):
    rows = [*rows_of(20), *rows_of(3), {"text": "example number 0", "label": "bad"}]
    dataset = build_dataset(spec_of(write(tmp_path / "data.jsonl", rows)))
    assert "train: 4 rows repeat an input and are left out" in dataset.notes
    (first,) = [example for example in all_examples(dataset) if example.columns["text"] == "example number 0"]
    assert first.label == "good"
    assert len(all_examples(dataset)) == 20


def test_the_same_text_with_another_column_is_another_example(tmp_path):
    rows = [{"text": "same", "topic": f"topic {i}", "label": "good"} for i in range(10)]
    dataset = build_dataset(spec_of(write(tmp_path / "data.jsonl", rows), instruction="On {topic}: {text} {labels}"))
    assert len(all_examples(dataset)) == 10


def test_labels_without_training_examples_are_noted(tmp_path):
    dataset = build_dataset(spec_of(write(tmp_path / "data.jsonl", rows_of(20)), labels=("good", "bad", "odd", "even")))
    assert dataset.notes == ("no training example has the label even, odd",)


COLUMNS_FIX = "Fix: the columns are words, label; name one of them in instruction or data.text"
ROWS = "with one row per example"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"words": "x", "label": "good"}\n', f"a.jsonl: text: column is missing, task mood needs it. {COLUMNS_FIX}"),
        (
            "a.csv",
            "text,topic\nx,y\n",
            "a.csv: label: column is missing, task mood needs it. "
            "Fix: the columns are text, topic; name one of them in data.label or data.text",
        ),
        (
            "a.jsonl",
            '{"text": "x", "label": "good"}\n{"text": "y", "label": "Good"}\n{"text": "z", "label": "Good"}\n',
            "a.jsonl: label: 2 rows have a label that the spec does not list, first in row 2 (got 'Good'). "
            "Fix: add it to labels, or correct the rows",
        ),
        ("a.csv", 'text,label\nx,good\n" ",bad\n', "a.csv: row 2: text: is empty. Fix: fill it in or remove the row"),
        ("a.jsonl", '{"text": "x"}\n{"label": "good"}', "a.jsonl: row 1: label: is empty. Fix: fill it in or remove the row"),
        ("a.jsonl", "", f"a.jsonl: data.train: has no rows. Fix: check that the file is jsonl {ROWS}"),
        ("a.json", "[]", f"a.json: data.train: has no rows. Fix: check that the file is json {ROWS}"),
        ("a.csv", "text,label\n", f"a.csv: data.train: has no rows. Fix: check that the file is csv {ROWS}"),
        (
            "a.jsonl",
            '{"text": "x", "label": "good"}\n\n{"text": \n',
            "a.jsonl: data.train: cannot be read (ValueError: line 3 is not valid JSON: Expecting value). "
            f"Fix: check that the file is jsonl {ROWS}",
        ),
        (
            "a.jsonl",
            '{"text": "x", "label": "good"}\n"text"\n',
            "a.jsonl: data.train: cannot be read (ValueError: row 2 is no object with the columns as keys). "
            f"Fix: check that the file is jsonl {ROWS}",
        ),
        (
            "a.json",
            '[{"text": oops}]',
            "a.json: data.train: cannot be read (JSONDecodeError: Expecting value: line 1 column 11 (char 10)). "
            f"Fix: check that the file is json {ROWS}",
        ),
        (
            "a.csv",
            "text,label\nwell, good,good\n",
            "a.csv: data.train: cannot be read "
            "(ValueError: row 1 has 3 cells, the header 2; put text with separators in quotes). "
            f"Fix: check that the file is csv {ROWS}",
        ),
        (
            "a.tsv",
            "text\ttext\tlabel\n",
            "a.tsv: data.train: cannot be read (ValueError: column 'text' appears twice). "
            f"Fix: check that the file is tsv {ROWS}",
        ),
        (
            "a.csv",
            b"text,label\ncaf\xe9,good\n",
            "a.csv: data.train: cannot be read (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 in position 14: "
            f"invalid continuation byte). Fix: check that the file is csv {ROWS}",
        ),
    ],
)
def test_each_message_names_file_field_value_and_fix(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in error_of(spec_of(tmp_path / name))


def test_no_more_than_three_bad_rows_and_labels_are_shown(tmp_path):
    rows = [{"text": "", "label": "good"}] * 5 + [{"text": f"t{i}", "label": f"odd{min(i, 4)}"} for i in range(10)]
    problems = error_of(spec_of(write(tmp_path / "data.jsonl", rows)))
    assert [problem.split(":")[1].strip() for problem in problems[:3]] == ["row 1", "row 2", "row 3"]
    assert "6 rows have a label that the spec does not list, first in row 10 (got 'odd4')" in problems[3]
    assert len(problems) == 6


def test_problems_of_all_splits_come_at_once(tmp_path):
    (tmp_path / "other").mkdir()
    train = write(tmp_path / "data.jsonl", [{"words": "x"}])
    select = write(tmp_path / "other" / "data.jsonl", [{"text": "x", "label": "odd"}])
    (tmp_path / "gate.jsonl").write_text("{")
    problems = error_of(spec_of(train, data={"select": str(select), "gate": str(tmp_path / "gate.jsonl")}))
    assert [problem.partition(": ")[0] for problem in problems] == ["data.jsonl", "data.jsonl", "data.jsonl", "gate.jsonl"]


def test_overlap_between_splits_shows_the_first_rows(tmp_path):
    train = write(tmp_path / "train.jsonl", rows_of(20))
    gate = write(tmp_path / "gate.jsonl", [*rows_of(3, start=90), *rows_of(5, start=7)])
    assert error_of(spec_of(train, data={"gate": str(gate)})) == [
        "mood: data.gate: 5 rows are in both train and gate: 'example number 7'; 'example number 8'; 'example number 9'. "
        "Fix: keep each row in one split only"
    ]
    problems = error_of(spec_of(train, data={"select": str(train), "gate": str(train)}))
    assert [problem.split(": ")[1] for problem in problems] == ["data.select", "data.gate", "data.gate"]


@pytest.mark.parametrize(("count", "empty"), [(1, "select, gate"), (2, "select"), (5, "select")])
def test_too_few_rows_for_three_splits(tmp_path, count, empty):
    assert error_of(spec_of(write(tmp_path / "data.jsonl", rows_of(count)))) == [
        f"mood: data: {count} rows leave the split {empty} empty. Fix: give more rows, or a file for that split"
    ]


def test_a_missing_file_and_one_that_is_no_parquet_are_named(tmp_path):
    (problem,) = error_of(spec_of(tmp_path / "gone.jsonl"))
    assert problem.startswith("gone.jsonl: data.train: cannot be read (FileNotFoundError: ")
    (tmp_path / "data.parquet").write_text("no parquet")
    (problem,) = error_of(spec_of(tmp_path / "data.parquet"))
    assert problem.startswith("data.parquet: data.train: cannot be read (ArrowInvalid: ")
    assert problem.endswith("Fix: check that the file is parquet with one row per example")


def test_a_hub_data_set_that_cannot_be_reached_is_named(tmp_path):
    (problem,) = error_of(spec_of("unused.jsonl", data={"train": HubSource(hub="nobody/nothing", split="train")}))
    assert problem.startswith("nobody/nothing train: data.train: cannot be read (ConnectionError: ")
    assert problem.endswith("Fix: check id, split and network, or point to a local file")
