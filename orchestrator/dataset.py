"""A task's examples: load, check, split and fingerprint. Every problem is found before anything is raised."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from multilora.errors import DataError, Problem
from multilora.spec import LOCAL_SUFFIXES, HubSource, TaskSpec
from orchestrator.power import GATE_MOST, GATE_SHARE

SELECT_SHARE, SELECT_MOST = 0.1, 200
NUM_SHOWN = 3


@dataclass(frozen=True)
class Example:
    """One labelled row; `id` is a hash of its input, so the same row has the same id in every run."""

    id: str
    columns: dict[str, str]
    label: str

    @property
    def text(self) -> str:
        """All input columns, one below the other."""
        return "\n".join(self.columns.values())


@dataclass(frozen=True)
class TaskDataset:
    """The three disjoint splits of a task."""

    task: str
    train: tuple[Example, ...]
    select: tuple[Example, ...]
    gate: tuple[Example, ...]
    fingerprint: str
    """sha256 over all rows of all splits, in order."""
    notes: tuple[str, ...]
    """What a person should know: duplicates dropped, labels without examples."""

    @property
    def gate_fingerprint(self) -> str:
        """sha256 over the gate rows; two evaluations are comparable only where it is equal."""
        return gate_fingerprint_of(self.gate)


def build_dataset(spec: TaskSpec) -> TaskDataset:
    """Load a task's splits, cutting off missing ones by label. Raises DataError with all problems."""
    problems: list[Problem] = []
    notes: list[str] = []
    rows = {
        split: _read_examples(spec, split, source, problems, notes)
        for split in ("train", "select", "gate")
        if (source := getattr(spec.data, split)) is not None
    }
    if problems:
        raise DataError.of(problems)
    _check_overlap(spec, rows)
    train = rows["train"]
    if "gate" not in rows:
        rows["gate"], train = _cut_off(spec, train, min(GATE_SHARE, GATE_MOST / len(train)), "gate")
    if "select" not in rows:
        share = min(SELECT_SHARE, SELECT_MOST / len(rows["train"])) * len(rows["train"]) / len(train)
        rows["select"], train = _cut_off(spec, train, share, "select")
    if spec.train.max_examples and spec.train.max_examples < len(train):
        most = spec.train.max_examples
        train, _ = _cut_off(spec, train, most / len(train), f"train {spec.train.seed}", most)
    splits = {"train": train, "select": rows["select"], "gate": rows["gate"]}
    empty = [name for name, examples in splits.items() if not examples]
    if empty:
        rule = f"{len(rows['train'])} rows leave the split {', '.join(empty)} empty"
        raise DataError.of([Problem(spec.name, "data", "", rule, "give more rows, or a file for that split")])
    unseen = sorted(set(spec.labels or ()) - {example.label for example in train})
    if unseen:
        notes.append(f"no training example has the label {', '.join(unseen)}")
    ordered = [tuple(examples) for examples in splits.values()]
    return TaskDataset(spec.name, ordered[0], ordered[1], ordered[2], _fingerprint(ordered), tuple(notes))


def read_columns(file: Path) -> dict[str, list[str]]:
    """Read the columns of a local file as `build_dataset` reads them, every cell as text. Raises DataError."""
    if file.suffix.lower() not in LOCAL_SUFFIXES:
        raise DataError(f"{file.name} is no file type that can be read; use {', '.join(LOCAL_SUFFIXES)}")
    problems: list[Problem] = []
    table = _load_table(file.name, "train", str(file), problems)
    if problems:
        raise DataError.of(problems)
    return {name: list(map(_as_text, cells)) for name, cells in table.items()}


def _read_examples(
    spec: TaskSpec, split: str, source: str | HubSource, problems: list[Problem], notes: list[str]
) -> list[Example]:
    where = Path(source).name if isinstance(source, str) else f"{source.hub} {source.split}"
    table = _load_table(where, split, source, problems)
    needed = [*spec.columns, spec.data.label]
    missing = [column for column in needed if column not in table] if table else []
    for column in missing:
        field = "data.label" if column == spec.data.label else "instruction"
        fix = f"the columns are {', '.join(table)}; name one of them in {field} or data.text"
        problems.append(Problem(where, column, "", f"column is missing, task {spec.name} needs it", fix))
    if missing or not table:
        return []
    examples: dict[str, Example] = {}
    bad_labels: Counter[str] = Counter()
    first_row: dict[str, int] = {}
    num_duplicates = num_blank = 0
    for number, cells in enumerate(zip(*(table[name] for name in needed), strict=True), start=1):
        values = dict(zip(needed, map(_as_text, cells), strict=True))
        blank = [name for name, value in values.items() if not value.strip()]
        if blank:
            num_blank += 1
            if num_blank <= NUM_SHOWN:
                problems.append(Problem(f"{where}: row {number}", blank[0], "", "is empty", "fill it in or remove the row"))
            continue
        label = values.pop(spec.data.label)
        if spec.labels is not None and label not in spec.labels:
            bad_labels[label] += 1
            first_row.setdefault(label, number)
            continue
        example = Example(hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16], values, label)
        num_duplicates += example.id in examples
        examples.setdefault(example.id, example)
    for label, count in bad_labels.most_common(NUM_SHOWN):
        rule = f"{count} rows have a label that the spec does not list, first in row {first_row[label]}"
        problems.append(Problem(where, spec.data.label, repr(label), rule, "add it to labels, or correct the rows"))
    if num_duplicates:
        notes.append(f"{split}: {num_duplicates} rows repeat an input and are left out")
    return list(examples.values())


def _load_table(where: str, split: str, source: str | HubSource, problems: list[Problem]) -> dict[str, Sequence[Any]]:
    """Load columns by name; empty, with a problem noted, where the source cannot be read or has no rows."""
    if isinstance(source, HubSource):
        fix = "check id, split and network, or point to a local file"
    else:
        fix = f"check that the file is {Path(source).suffix.lower()[1:]} with one row per example"
    try:
        table = _read_source(source)
    except Exception as error:  # noqa: BLE001  `datasets` raises whatever its readers, pyarrow or the hub raise
        cause = error.__cause__ or error
        rule = f"cannot be read ({type(cause).__name__}: {str(cause)[:200]})"
        problems.append(Problem(where, f"data.{split}", "", rule, fix))
        return {}
    if not any(table.values()):
        problems.append(Problem(where, f"data.{split}", "", "has no rows", fix))
        return {}
    return table


def _read_source(source: str | HubSource) -> dict[str, Sequence[Any]]:
    """Read text files here: `datasets` guesses types, so that a column of dates would come back as other text."""
    if isinstance(source, HubSource):
        options: dict[str, Any] = {"path": source.hub, "name": source.config, "revision": source.revision, "split": source.split}
    else:
        file = Path(source)
        kind = LOCAL_SUFFIXES[file.suffix.lower()]
        if kind == "csv":
            return _read_csv(file)
        if kind == "json":
            return _read_json(file)
        options = {"path": kind, "data_files": source, "split": "train"}
    datasets.disable_progress_bars()
    table = datasets.load_dataset(**options)
    return {name: table[name] for name in table.column_names}


def _read_csv(file: Path) -> dict[str, Sequence[Any]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = [row for row in csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True) if row]
    header = rows[0] if rows else []
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise ValueError(f"column {twice[0]!r} appears twice")
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}; put text with separators in quotes")
    return {name: [row[i] for row in rows[1:]] for i, name in enumerate(header)}


def _read_json(file: Path) -> dict[str, Sequence[Any]]:
    """One object per line, or one list of objects."""
    text = file.read_text(encoding="utf-8-sig")
    rows: list[Any] = []
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        # Not splitlines(), which also splits at the U+2028 that a JSON string may hold.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not valid JSON: {error.msg}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object with the columns as keys")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _as_text(value: object) -> str:
    return "" if value is None else str(value)


def _check_overlap(spec: TaskSpec, rows: dict[str, list[Example]]) -> None:
    problems = []
    names = list(rows)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            ids = {example.id for example in rows[first]}
            shared = [example for example in rows[second] if example.id in ids]
            if shared:
                shown = "; ".join(repr(example.columns[spec.data.text][:60]) for example in shared[:NUM_SHOWN])
                rule = f"{len(shared)} rows are in both {first} and {second}: {shown}"
                problems.append(Problem(spec.name, f"data.{second}", "", rule, "keep each row in one split only"))
    if problems:
        raise DataError.of(problems)


def _cut_off(
    spec: TaskSpec, examples: Sequence[Example], share: float, purpose: str, exactly: int | None = None
) -> tuple[list[Example], list[Example]]:
    """Take `share` of the rows of every label (or `exactly` so many in all), keeping the rows' order in both parts.

    Rows of a free-text task have no label to spread over. The draw goes by the rows' hashes: another seed, another order of
    rows or more of them must not move a row that trained the champion into the gate split (near the edge a few may move).
    """
    hashes = [hashlib.sha256(f"{purpose} {example.id}".encode()).digest() for example in examples]
    shuffled = sorted(range(len(examples)), key=lambda index: hashes[index])
    rank_in_label: Counter[str] = Counter()
    label_of = [example.label if spec.labels else "" for example in examples]
    size_of_label = Counter(label_of)
    quantile = {}
    for index in shuffled:
        label = label_of[index]
        quantile[index] = (rank_in_label[label] + 0.5) / size_of_label[label]
        rank_in_label[label] += 1
    # Rows of every label spread evenly over (0, 1); the lowest quantiles are a stratified sample of any size.
    wanted = exactly if exactly is not None else round(share * len(examples))
    taken = set(sorted(shuffled, key=lambda index: quantile[index])[:wanted])
    return [e for i, e in enumerate(examples) if i in taken], [e for i, e in enumerate(examples) if i not in taken]


def gate_fingerprint_of(gate: Sequence[Example]) -> str:
    """sha256 over ids and labels of gate rows, in order."""
    return _fingerprint([gate])


def _fingerprint(splits: Iterable[Sequence[Example]]) -> str:
    rows = [[[example.id, example.label] for example in split] for split in splits]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
