"""What a person should know of a labelled file before a task is made of it: labels, repeated inputs, what is wrong. Pure.

Rows come out as a task can use them: without the empty ones, each label in one spelling, columns by names that an instruction
can have in braces.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from multilora.errors import DataError
from orchestrator.choose_columns import ChosenColumns, is_number
from orchestrator.contamination import near_texts

LONG_ANSWER_WORDS = 5
"""From here on answers are texts, where more than every second row has one of its own."""
MANY_ANSWERS = {"words": 50, "phrases": 20, "numbers": 20}
"""Shorter answers are likewise no labels beyond so many different ones; a phrase has two words on average."""
FEW_ROWS = 10
"""A label with fewer rows has no five to train on once select and gate are cut off."""
LONG_LABEL_WORDS, LONG_LABEL_CHARS = 8, 60
LARGE_SHARE, LARGE_RATIO = 0.8, 20
"""From here on one label is so much larger than the others that accuracy says little."""
MOST_COMPARED = 5000
"""Texts that are searched for near-duplicates."""
NUM_SHOWN = 3
NUM_LABELS_SHOWN = 12


class Row(NamedTuple):
    """One example."""

    columns: dict[str, str]
    """By the names in the instruction."""
    answer: str

    @property
    def text(self) -> str:
        """All inputs in one."""
        return "\n".join(self.columns.values())


class Finding(NamedTuple):
    """One thing that a person should know."""

    kind: Literal["fact", "look", "corrected"]
    """Just so; worth a look; differs from the file in the corrected copy."""
    about: str
    text: str


@dataclass(frozen=True)
class Inspection:
    """What is in a file."""

    columns: ChosenColumns
    fields: Mapping[str, str]
    """Column of the file -> its name in the instruction."""
    rows: tuple[Row, ...]
    labels: Mapping[str, int] | None
    """Rows of each label, the largest first; None of a free-text task."""
    num_inputs: int
    """Different inputs, which are the examples that training gets."""
    findings: tuple[Finding, ...]

    @property
    def is_corrected(self) -> bool:
        """Whether a task can use the rows only as they are here, not as they are in the file."""
        return any(finding.kind == "corrected" for finding in self.findings)


def inspect_rows(table: Mapping[str, Sequence[str]], columns: ChosenColumns) -> Inspection:
    """Look at every row. Raises DataError where no task can be made of them."""
    fields = _fields(columns)
    rows, findings = _filled(table, columns, fields)
    findings += [
        Finding("corrected", "column name", f"{name!r} cannot stand in braces: it is called {field} in the copy")
        for name, field in fields.items()
        if name != field
    ]
    labels = None
    if _are_texts(columns.label, [row.answer for row in rows]):
        findings.append(_free_text(rows))
    else:
        spelling = _spellings([row.answer for row in rows])
        findings += _respelled(spelling)
        rows = [row._replace(answer=spelling[row.answer]) for row in rows]
        labels = dict(Counter(row.answer for row in rows).most_common())
        if len(labels) < 2:
            raise DataError(f"column {columns.label!r} holds {next(iter(labels))!r} alone; a task has at least two labels")
        findings += [*_balance(labels), *_odd_labels(labels)]
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.text, row)
    findings += [*_repeated(rows), *_nearly_repeated([*first.values()], has_labels=labels is not None)]
    return Inspection(columns, fields, tuple(rows), labels, len(first), (*_chosen(columns), *findings))


def _chosen(columns: ChosenColumns) -> Iterator[Finding]:
    for name in columns.texts:
        main = ", what a plain string fills" if name == columns.main and len(columns.texts) > 1 else ""
        yield Finding("fact", "text column", f"{name}{main}: {columns.why[name]}")
    yield Finding("fact", "label column", f"{columns.label}: {columns.why[columns.label]}")
    for name, reason in columns.left_out.items():
        yield Finding("fact", "not used", f"{name}: {reason}")


def _fields(columns: ChosenColumns) -> dict[str, str]:
    """Names that an instruction can have in braces; `labels` means something else there."""
    fields: dict[str, str] = {}
    for name in columns.texts:
        field = name
        if not name.isidentifier() or name == "labels":
            field = re.sub(r"\W+", "_", name.casefold()).strip("_")
            field = field if field.isidentifier() and field != "labels" else f"text_{field}".rstrip("_")
        while field in (*fields.values(), columns.label) or (field != name and field in columns.texts):
            field += "_"
        fields[name] = field
    return fields


def _filled(
    table: Mapping[str, Sequence[str]], columns: ChosenColumns, fields: Mapping[str, str]
) -> tuple[list[Row], list[Finding]]:
    """Rows without the empty ones, and which those are."""
    rows, empty = [], []
    for number, (answer, *texts) in enumerate(
        zip(table[columns.label], *(table[name] for name in columns.texts), strict=True), start=1
    ):
        if all(map(str.strip, (answer, *texts))):
            rows.append(Row(dict(zip(fields.values(), texts, strict=True)), answer))
        else:
            empty.append(number)
    if not rows:
        raise DataError(f"no row has both a {' and a '.join(columns.texts)} and a {columns.label}")
    said = f"{_num(len(empty), 'row')} with an empty text or answer ({_some(empty)}): left out"
    return rows, [Finding("corrected", "empty rows", said)] if empty else []


def _are_texts(column: str, answers: Sequence[str]) -> bool:
    """Whether answers are free texts rather than labels. Raises DataError for numbers that are no labels either."""
    distinct = set(answers)
    if len(distinct) * 2 <= len(answers):
        return False
    if len(distinct) > MANY_ANSWERS["numbers"] and all(map(is_number, distinct)):
        rule = f"column {column!r} holds {len(distinct)} different numbers in {len(answers)} rows, and a task answers with labels"
        raise DataError(f"{rule} or text; put the numbers into classes, or name another column with --label")
    num_words = statistics.fmean(len(answer.split()) for answer in distinct)
    return num_words >= LONG_ANSWER_WORDS or len(distinct) > MANY_ANSWERS["phrases" if num_words >= 2 else "words"]


def _free_text(rows: Sequence[Row]) -> Finding:
    num_words = statistics.fmean(len(row.answer.split()) for row in rows)
    said = f"{len({row.answer for row in rows})} different answers in {len(rows)} rows, {num_words:.1f} words on average"
    return Finding("fact", "free text", f"{said}: looks like texts to write, not like labels")


def _spellings(answers: Sequence[str]) -> dict[str, str]:
    """How each answer is written where some differ in case and spaces alone, which no task may have: as most rows write it."""
    together: dict[str, list[str]] = {}
    for answer, _ in Counter(answers).most_common():
        together.setdefault(" ".join(answer.casefold().split()), []).append(answer)
    return {answer: group[0].strip() for group in together.values() for answer in group}


def _respelled(spelling: Mapping[str, str]) -> Iterator[Finding]:
    for label in dict.fromkeys(spelling.values()):
        before = [answer for answer, after in spelling.items() if after == label]
        if before != [label]:
            said = f"{', '.join(map(repr, before))} differ in case and spaces alone" if len(before) > 1 else f"{before[0]!r}"
            yield Finding("corrected", "label spelling", f"{said}: written {label!r}")


def _balance(labels: Mapping[str, int]) -> Iterator[Finding]:
    num_rows, shown = sum(labels.values()), list(labels.items())[:NUM_LABELS_SHOWN]
    counts = ", ".join(f"{label} {count} ({100 * count / num_rows:.0f} %)" for label, count in shown)
    others = f" and {len(labels) - len(shown)} others" if len(labels) > len(shown) else ""
    yield Finding("fact", "labels", f"{len(labels)} in {_num(num_rows, 'row')}: {counts}{others}")
    most, least = max(labels.values()), min(labels.values())
    if most >= LARGE_SHARE * num_rows or most >= LARGE_RATIO * least:
        said = f"the largest label has {most} rows, the smallest {least}: accuracy says little of the small ones"
        yield Finding("look", "class balance", f"{said}; gate.metric: macro_f1 counts all labels alike")
    if rare := [f"{label} ({count})" for label, count in labels.items() if count < FEW_ROWS]:
        yield Finding("look", "rare labels", f"fewer than {FEW_ROWS} rows: {_some(rare)}; collect more, or merge them")


def _odd_labels(labels: Mapping[str, int]) -> Iterator[Finding]:
    together: dict[str, list[str]] = {}
    for label in labels:
        together.setdefault(re.sub(r"[\W_]+", "", label.casefold()) or label, []).append(label)
    for group in together.values():
        if len(group) > 1:
            said = f"{', '.join(map(repr, group))} differ in case, spaces and punctuation alone"
            yield Finding("look", "like labels", f"{said}: if they are one, give them one spelling in the file")
    if numbers := [label for label in labels if is_number(label)]:
        said = f"{_some(numbers)} say nothing to a base model; write what each means, or put words into the file"
        yield Finding("look", "numeric labels", said)
    if long := [label for label in labels if len(label.split()) > LONG_LABEL_WORDS or len(label) > LONG_LABEL_CHARS]:
        limits = f"more than {LONG_LABEL_WORDS} words or {LONG_LABEL_CHARS} letters"
        said = f"{_num(len(long), 'label')} of {limits}, such as {_cut(long[0])!r}: looks like free text"
        yield Finding("look", "long labels", f"{said}; a short name with a meaning does better")
    several = [
        label
        for label in labels
        if len(parts := {part.strip() for part in re.split(r"[,;|]", label)}) > 1 and parts & set(labels)
    ]
    if several:
        said = f"{_some(several)} look like several labels in one cell; a task answers with one"
        yield Finding("look", "several labels", f"{said}: make a task of each, or choose one")


def _repeated(rows: Sequence[Row]) -> Iterator[Finding]:
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row.text, []).append(row.answer)
    num_again = sum(len(given) - len(set(given)) for given in answers.values())
    if num_again:
        said = f"{_num(num_again, 'row')} repeating an input with its answer, such as {_cut(_first_repeated(answers))!r}"
        yield Finding("look", "duplicates", f"{said}: training leaves them out")
    torn = {text: dict.fromkeys(given) for text, given in answers.items() if len(set(given)) > 1}
    if torn:
        text, given = next(iter(torn.items()))
        said = f"{_num(len(torn), 'input')} with different answers, such as {_cut(text)!r}: {_some([*map(_cut, given)])}"
        yield Finding("look", "contradictions", f"{said}; the first row counts and the others are left out: correct them")


def _first_repeated(answers: Mapping[str, Sequence[str]]) -> str:
    return next(text for text, given in answers.items() if len(set(given)) < len(given))


def _nearly_repeated(rows: Sequence[Row], *, has_labels: bool) -> Iterator[Finding]:
    """Of different inputs those that are nearly the same."""
    compared = rows[:MOST_COMPARED]
    pairs = [(compared[a], compared[b]) for a, b in near_texts([row.text for row in compared]).items()]
    if not pairs:
        return
    torn = [pair for pair in pairs if pair[0].answer != pair[1].answer] if has_labels else []
    among = f" of the first {MOST_COMPARED}" if len(rows) > MOST_COMPARED else ""
    labels = f", {len(torn)} of them as one with another label" if torn else ""
    first, second = (repr(_cut(row.text)) for row in (torn or pairs)[0])
    said = f"{len(pairs)} texts{among} are nearly the same as another{labels}, such as {first} and {second}"
    yield Finding("look", "near-duplicates", f"{said}; those that fall on both sides make the gate flatter")


def _num(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _some(values: Sequence[object]) -> str:
    """The first few."""
    others = f" and {len(values) - NUM_SHOWN} others" if len(values) > NUM_SHOWN else ""
    return ", ".join(map(str, values[:NUM_SHOWN])) + others


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
