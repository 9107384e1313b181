"""Which columns of a user's file hold the texts and which the answer, guessed from names and values, and why. Pure."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from multilora.errors import DataError

LABEL_WORDS = re.compile(
    "(?<![a-z])(labels?|class|classes|category|categories|intent|sentiment|topic|tag|target|gold|answer|output|completion|"
    "response)(?![a-z])"
)
TEXT_WORDS = re.compile(
    "(?<![a-z])(texts?|sentence|utterance|message|review|question|query|input|prompt|body|content|comment|title|subject|"
    "description|passage|context|premise|hypothesis|tweet|post|email|document|dialogue)(?![a-z])"
)
"""A column is taken for what one of its name's words says."""
REPEATS = 3
"""Rows that a value has on average in a column that could be the label, or that could give the label away."""
MIN_WORDS = 3
"""Words that a row has on average in a column that is taken for a text whatever its name."""
MOST_EMPTY = 0.01
"""Share of empty rows up to which a column is used beside the main text."""


@dataclass(frozen=True)
class Column:
    """One column and what its values look like."""

    name: str
    cells: Sequence[str]

    @cached_property
    def filled(self) -> list[str]:
        """Values that are not blank."""
        return [cell for cell in self.cells if cell.strip()]

    @cached_property
    def num_distinct(self) -> int:
        """Different values that are not blank."""
        return len(set(self.filled))

    @property
    def share_empty(self) -> float:
        """Rows without a value."""
        return 1 - len(self.filled) / len(self.cells)

    @cached_property
    def is_numeric(self) -> bool:
        """Whether every value is a number."""
        return all(map(is_number, self.filled))

    @cached_property
    def mean_words(self) -> float:
        """Words of a value."""
        return statistics.fmean(len(cell.split()) for cell in self.filled) if self.filled else 0.0

    @cached_property
    def mean_chars(self) -> float:
        """Characters of a value."""
        return statistics.fmean(map(len, self.filled)) if self.filled else 0.0

    def is_called(self, words: re.Pattern[str]) -> bool:
        """Whether one of the words of its name is among `words`."""
        return words.search(self.name.casefold()) is not None


@dataclass(frozen=True)
class ChosenColumns:
    """What each column is taken for, by the names in the file."""

    texts: tuple[str, ...]
    """Inputs, in the order of the file."""
    main: str
    """The input that a plain-string request fills."""
    label: str
    why: Mapping[str, str]
    """Of each text and the label."""
    left_out: Mapping[str, str]
    """Column -> why it is not used."""


def choose_columns(table: Mapping[str, Sequence[str]], texts: Sequence[str] = (), label: str | None = None) -> ChosenColumns:
    """Choose what a person did not name. Raises DataError where a name is not in the file, or nothing looks like a text."""
    columns = {name: Column(name, cells) for name, cells in table.items()}
    unknown = [name for name in (*texts, *filter(None, [label])) if name not in columns]
    if unknown:
        raise DataError(f"the file has no column {unknown[0]!r}; its columns are {', '.join(columns)}")
    if len(columns) < 2:
        raise DataError(f"the file has the column {', '.join(columns)} alone; a text and its answer take two")
    if label in texts:
        raise DataError(f"column {label!r} cannot be both a text and the label; name two columns")
    others = [column for column in columns.values() if column.name not in texts]
    answer, why_label = (columns[label], "you named it") if label else _choose_label(others)
    if texts:
        chosen, why = [columns[name] for name in columns if name in texts], dict.fromkeys(texts, "you named it")
        left_out = {name: "you named others" for name in columns if name not in texts and name != answer.name}
    else:
        chosen, why, left_out = _choose_texts([column for column in others if column is not answer], answer)
    main = _main(chosen)
    return ChosenColumns(
        tuple(column.name for column in chosen), main.name, answer.name, {**why, answer.name: why_label}, left_out
    )


def is_number(text: str) -> bool:
    """Whether a cell reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _choose_label(columns: Sequence[Column]) -> tuple[Column, str]:
    useful = [column for column in columns if column.num_distinct > 1]
    if not useful:
        raise DataError("no column has two different values that could be labels; name the right one with --label")

    def rank(column: Column) -> tuple[bool, int]:
        return column.is_numeric, column.num_distinct  # where numbers and words say the same, words say it better

    if named := [column for column in useful if column.is_called(LABEL_WORDS)]:
        return min(named, key=rank), "its name says so"
    if few := [column for column in useful if column.num_distinct * REPEATS <= len(column.filled)]:
        best = min(few, key=rank)
        return best, f"it has only {best.num_distinct} different values in {len(best.filled)} rows"
    return useful[-1], "no column has few different values, so the last one is taken for the answer"


def _choose_texts(columns: Sequence[Column], answer: Column) -> tuple[list[Column], dict[str, str], dict[str, str]]:
    """Columns that are inputs, why each is, and why each of the others is not."""
    left_out = {column.name: reason for column in columns if (reason := _unfit(column, answer))}
    fit = [column for column in columns if column.name not in left_out]
    if not fit:
        reasons = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise DataError(f"no column looks like a text ({reasons}); name one with --text")
    texts = [column for column in fit if column.is_called(TEXT_WORDS) or column.mean_words >= MIN_WORDS]
    texts = texts or [max(fit, key=lambda column: column.mean_chars)]
    main = _main(texts)
    for column in fit:
        if column not in texts:
            left_out[column.name] = f"has {column.mean_words:.1f} words a row and no name of a text"
        elif column is not main and column.share_empty > MOST_EMPTY:
            left_out[column.name] = f"is empty in {100 * column.share_empty:.0f} % of the rows"
    kept = [column for column in texts if column.name not in left_out]
    why = {
        column.name: ("its name says so, " if column.is_called(TEXT_WORDS) else "") + f"{column.mean_words:.1f} words a row"
        for column in kept
    }
    return kept, why, left_out


def _main(texts: Sequence[Column]) -> Column:
    """The longest of those that hardly ever are empty."""
    return max(texts, key=lambda column: (column.share_empty <= MOST_EMPTY, column.mean_chars))


def _unfit(column: Column, answer: Column) -> str:
    """Why a column can be no input; empty where it can."""
    if column.num_distinct < 2:
        return "has no two different values"
    if column.is_numeric:
        return "holds numbers"
    pairs = {pair for pair in zip(column.cells, answer.cells, strict=True) if all(map(str.strip, pair))}
    if len(pairs) <= column.num_distinct and column.num_distinct * REPEATS <= len(column.filled):
        return f"gives {answer.name} away: each value always comes with the same one"
    return ""
