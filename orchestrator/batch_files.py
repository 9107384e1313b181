"""What a batch reads and writes: lines of JSON in parts, each kept as a file of its own until all are there.

A part that is on disk is whole; its name says how many of its rows are errors. No torch, no Ray.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from multilora.errors import DataError
from multilora.prompt import PromptFormat
from orchestrator.files import write_whole

ROWS_PER_PART, MAX_PARTS = 1024, 16384
MAX_LINE_BYTES = 16 * 2**20
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Part:
    """A run of lines of the input."""

    number: int
    first_line: int
    """Counted from 1."""
    start: int
    """Its first byte."""
    end: int
    """The byte after its last."""


@dataclass(frozen=True)
class BatchInput:
    """An input file, looked through once."""

    file: Path
    sha256: str
    num_rows: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Origin:
    """What a part's content depends on; parts of another origin are of no use."""

    input_sha256: str
    num_parts: int
    adapter: str
    """`task@version`."""
    digest: str


def look_through(file: Path, rows_per_part: int = ROWS_PER_PART, max_parts: int = MAX_PARTS) -> BatchInput:
    """Find where the parts of a file begin, in memory that does not grow with it. Raises DataError."""
    digest, starts, num_rows, at = hashlib.sha256(), [], 0, 0
    try:
        with file.open("rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{file}: line {num_rows + 1} has more than {MAX_LINE_BYTES} bytes; is it one row per line?")
                if num_rows % rows_per_part == 0:
                    starts.append(at)
                digest.update(line)
                num_rows, at = num_rows + 1, at + len(line)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if not starts:
        raise DataError(f"{file} has no rows")
    # Of a long file several pieces make one part, so that their number stays small.
    step = math.ceil(len(starts) / max_parts)
    ends = [*starts[step::step], at]
    parts = [
        Part(number, 1 + number * step * rows_per_part, start, end)
        for number, (start, end) in enumerate(zip(starts[::step], ends, strict=True))
    ]
    return BatchInput(file, digest.hexdigest(), num_rows, tuple(parts))


def lines_of(file: Path, start: int, end: int) -> list[bytes]:
    """The lines of one part."""
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(end - start).removesuffix(b"\n").split(b"\n")


def read_row(line: bytes) -> dict[str, Any]:
    """Read one line. Raises DataError for what is no JSON object."""
    if not line.strip():
        raise DataError("the line is empty")
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the line is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError('the line is no JSON object like {"text": "..."}')
    return row


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def item_of(row: Mapping[str, Any], prompt_format: PromptFormat) -> dict[str, str]:
    """The task's input columns out of a row; `text` fills a task's only column. Raises DataError."""
    columns = prompt_format.columns
    if len(columns) == 1 and columns[0] not in row and "text" in row:
        row = {columns[0]: row["text"]}
    missing = [name for name in columns if name not in row]
    if missing:
        raise DataError(f"the row lacks {', '.join(missing)}; it has {', '.join(sorted(row)) or 'nothing'}")
    item: dict[str, str] = {}
    for name in columns:
        if not isinstance(row[name], str):
            raise DataError(f"{name} is no text: {json.dumps(row[name])[:40]}")
        item[name] = row[name]
    if not any(text.strip() for text in item.values()):
        raise DataError(f"{' and '.join(columns)} {'is' if len(columns) == 1 else 'are'} empty")
    with suppress(UnicodeEncodeError):
        "".join(item.values()).encode()
        return item
    raise DataError("the text has half a surrogate pair, which is no character")


def beside(row: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its answer; a field of the row that bears the name of one of the answer's becomes `input_NAME`."""
    kept = dict(row)
    for name in answer:
        if name in kept:
            other = f"input_{name}"
            while other in kept:
                other = f"input_{other}"
            kept[other] = kept.pop(name)
    return kept | dict(answer)


class PartsFolder:
    """The finished parts of one output, in a folder beside it."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output.with_name(f"{output.name}.parts")

    def open(self, origin: Origin) -> str:
        """Keep the finished parts of the same origin, and delete others; returns why there was something to delete."""
        manifest, wanted = self.folder / MANIFEST, asdict(origin)
        try:
            found = json.loads(manifest.read_bytes())
        except (OSError, ValueError):
            found = None
        reason = ""
        if found != wanted:
            if isinstance(found, dict):
                changed = [name for name in wanted if found.get(name) != wanted[name]]
                reason = f"an earlier batch into {self.output.name} had another {' and '.join(changed)}"
            shutil.rmtree(self.folder, ignore_errors=True)
            write_whole(manifest, json.dumps(wanted).encode())
        for draft in self.folder.glob(".*.jsonl.*"):  # of a writer that was killed
            draft.unlink()
        return reason

    def finished(self) -> dict[int, tuple[int, int, Path]]:
        """Part number -> (rows, rows with an error, file)."""
        found = {}
        for file in self.folder.glob("[0-9]*.jsonl"):
            number, num_rows, num_errors = map(int, file.stem.split("-"))
            found[number] = num_rows, num_errors, file
        return found

    def join(self) -> None:
        """Make the output out of all parts, whole or not at all, and delete the parts."""
        parts = self.finished()
        draft = self.output.with_name(f".{self.output.name}.{os.getpid()}")
        with draft.open("wb") as stream:
            for number in sorted(parts):
                with parts[number][2].open("rb") as part:
                    shutil.copyfileobj(part, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(self.output)
        shutil.rmtree(self.folder)


def write_part(folder: Path, number: int, rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Write a finished part; returns how many rows it has, and how many of them are errors."""
    num_errors = sum("error" in row for row in rows)
    write_whole(folder / f"{number:06d}-{len(rows)}-{num_errors}.jsonl", b"".join(map(_encoded, rows)))
    return len(rows), num_errors


def _encoded(row: Mapping[str, Any]) -> bytes:
    with suppress(UnicodeEncodeError):
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    return json.dumps(row).encode() + b"\n"  # a field has half a surrogate pair, which UTF-8 cannot carry
