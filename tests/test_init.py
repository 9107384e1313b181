"""`orchestrator init`: a file of every kind becomes a task file that validates; it asks, and never writes over anything."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from multilora.spec_files import load_task_specs
from orchestrator.cli import app
from orchestrator.dataset import build_dataset

ROWS = [
    {
        "id": str(i),
        "message": f"message {i} says: {'please send it again, ' * (i % 5)}thanks",
        "kind": ("yes", "no", "12:30")[i % 3],
    }
    for i in range(60)
]


def write(file, rows):
    """Write rows in the format of the file's name."""
    separator = {".csv": ",", ".tsv": "\t"}.get(file.suffix)
    if separator:
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        file.write_text("".join(separator.join(f'"{cell}"' for cell in line) + "\n" for line in cells), encoding="utf-8")
    elif file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def flat(done):
    """What was printed, without boxes and line ends."""
    return " ".join(done.output.replace("│", " ").split())


@pytest.fixture
def init(tmp_path, base_folder):
    """Run init on rows: init(rows, "data.csv", "--yes")."""

    def run(rows, name, *options, answer=None):
        file = write(tmp_path / name, rows)
        out = [] if "--out" in options else ["--out", str(tmp_path / "tasks" / "message-kind.yaml")]
        base = [] if "--base" in options else ["--base", str(base_folder("encoder"))]
        return CliRunner().invoke(app, ["init", str(file), *out, *base, *options], input=answer)

    return run


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_what_is_written_validates_and_its_data_split(init, tmp_path, suffix):
    done = init(ROWS, f"data{suffix}", "--yes")
    assert done.exit_code == 0, done.output
    out = tmp_path / "tasks" / "message-kind.yaml"
    assert f"wrote {out}; next: write what is marked TODO" in done.output
    (spec,) = load_task_specs([out])
    assert (spec.name, spec.columns, spec.data.text, spec.data.label) == ("message-kind", ("message",), "message", "kind")
    assert list(spec.labels) == ["yes", "no", "12:30"]
    assert len(build_dataset(spec).gate) == 24
    validated = CliRunner().invoke(app, ["validate", str(out), "--json", "--workspace", str(tmp_path)])
    assert json.loads(validated.stdout) == {"tasks": ["message-kind"], "problems": [], "warnings": {}}


def test_it_shows_what_it_found_and_asks(init, tmp_path):
    refused = init([*ROWS, ROWS[0]], "data.csv", answer="n\n")
    assert refused.exit_code == 1
    shown = flat(refused)
    for text in (
        "label column",
        "yes 21 (34 %)",
        "not used",
        "id: holds numbers",
        "1 row repeating an input",
        "instruction: |-",
        "Write ",
    ):
        assert text in shown
    assert not (tmp_path / "tasks").exists()
    done = init(ROWS, "data.csv", answer="y\n")
    assert done.exit_code == 0
    assert (tmp_path / "tasks" / "message-kind.yaml").is_file()


def test_json_writes_only_when_told_to(init, tmp_path):
    asked = json.loads(init(ROWS, "data.csv", "--json").stdout)
    assert (asked["is_written"], asked["text_columns"], asked["label_column"]) == (False, ["message"], "kind")
    assert asked["labels"] == {"yes": 20, "no": 20, "12:30": 20}
    assert {finding["kind"] for finding in asked["findings"]} <= {"fact", "look", "corrected"}
    (out,) = map(Path, asked["files"])
    assert not out.exists()
    told = json.loads(init(ROWS, "data.csv", "--json", "--yes").stdout)
    assert told["is_written"]
    assert out.read_text(encoding="utf-8") == told["spec"] == asked["spec"]


def test_nothing_is_written_over(init, tmp_path):
    out = tmp_path / "tasks" / "message-kind.yaml"
    out.parent.mkdir()
    out.write_text("mine", encoding="utf-8")
    refused = init(ROWS, "data.csv", "--yes")
    assert refused.exit_code == 2
    assert "is there already; name another, or replace it: --force" in flat(refused)
    assert out.read_text(encoding="utf-8") == "mine"
    assert init(ROWS, "data.csv", "--yes", "--force").exit_code == 0
    assert load_task_specs([out])[0].name == "message-kind"
    copy = tmp_path / "tasks" / "other-corrected.jsonl"
    copy.write_text("mine", encoding="utf-8")
    wrong = [{**ROWS[0], "message": ""}, *ROWS]
    assert init(wrong, "data.csv", "--yes", "--out", str(tmp_path / "tasks" / "other.yaml")).exit_code == 2
    assert copy.read_text(encoding="utf-8") == "mine"


def test_a_corrected_copy_lies_beside_the_task_file(init, tmp_path):
    wrong = [{"message": "", "kind": "no"}, *({"message": row["message"], "kind": f" {row['kind']}"} for row in ROWS)]
    done = init(wrong, "data.csv", "--yes")
    assert done.exit_code == 0, done.output
    (spec,) = load_task_specs([tmp_path / "tasks" / "message-kind.yaml"])
    assert Path(spec.data.train) == tmp_path / "tasks" / "message-kind-corrected.jsonl"
    dataset = build_dataset(spec)
    assert len(dataset.train) + len(dataset.select) + len(dataset.gate) == 60


def test_base_and_data_are_named_as_the_task_file_sees_them(init, tmp_path, base_folder, monkeypatch):
    monkeypatch.chdir(base_folder("encoder").parent)
    done = init(ROWS, "data.csv", "--yes", "--base", "./encoder")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "tasks" / "message-kind.yaml").read_text(encoding="utf-8")
    assert "train: ../data.csv" in text
    assert f"model: {tmp_path}" not in text
    assert load_task_specs([tmp_path / "tasks" / "message-kind.yaml"])[0].base.model == str(base_folder("encoder"))
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init", "data.csv", "--yes"]).exit_code == 0
    assert load_task_specs([tmp_path / "tasks" / "data.yaml"])[0].name == "data"


def test_columns_can_be_named(init, tmp_path):
    rows = [
        {**row, "note": f"another text of row {i}, {'again ' * (i % 4)}", "urgent": "ab"[i % 2]} for i, row in enumerate(ROWS)
    ]
    done = init(rows, "data.csv", "--yes", "--text", "note", "--text", "message", "--label", "urgent")
    assert done.exit_code == 0, done.output
    (spec,) = load_task_specs([tmp_path / "tasks" / "message-kind.yaml"])
    assert (spec.columns, list(spec.labels)) == (("message", "note"), ["a", "b"])


@pytest.mark.parametrize(
    ("rows", "name", "options", "code", "message"),
    [
        (ROWS, "data.txt", [], 1, "data.txt is no file type that can be read; use .jsonl, .json, .csv, .tsv, .parquet"),
        (ROWS[:4], "data.csv", [], 1, "leave the split select empty. Fix: give more rows"),
        (ROWS, "data.csv", ["--label", "x"], 1, "the file has no column 'x'; its columns are id, message, kind"),
        (ROWS, "data.csv", ["--base", "/no/such/base"], 2, "config.json of the base cannot be read"),
        (ROWS, "data.csv", ["--label", "message"], 2, "is an encoder, which writes no text"),
    ],
)
def test_what_cannot_be_done_is_said(init, tmp_path, rows, name, options, code, message):
    done = init(rows, name, "--yes", *options)
    assert done.exit_code == code
    assert message in flat(done)
    assert not (tmp_path / "tasks").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    done = CliRunner().invoke(app, ["init", str(tmp_path / "gone.csv")])
    assert done.exit_code == 1
    assert "gone.csv: data.train: cannot be read (FileNotFoundError" in flat(done)
