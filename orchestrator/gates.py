"""Gate splits on disk, one file per gate fingerprint: what a champion was judged on can be asked again without its spec."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from multilora.errors import DataError
from orchestrator.dataset import Example, gate_fingerprint_of
from orchestrator.files import write_whole


def store_gate(folder: Path, fingerprint: str, examples: Sequence[Example]) -> None:
    """Keep a gate split, atomically; a split that is there already stays as it is, for its name says what is in it."""
    file = _file_of(folder, fingerprint)
    if file.is_file():
        return
    write_whole(file, "".join(json.dumps(asdict(example)) + "\n" for example in examples).encode())


def load_gate(folder: Path, fingerprint: str) -> tuple[Example, ...] | None:
    """The examples of a gate split, in order; None where it was never stored. Raises DataError for other ids or labels."""
    file = _file_of(folder, fingerprint)
    if not file.is_file():
        return None
    try:
        # Not splitlines(): it also ends lines at characters that a text may hold.
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        examples = tuple(Example(**json.loads(line)) for line in lines)
        seen = gate_fingerprint_of(examples)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"stored gate split {file.name} is broken: {error}; delete it and submit its task again") from error
    if seen != fingerprint:
        raise DataError(f"stored gate split {file.name} has fingerprint {seen[:12]}: it was changed; delete it and submit again")
    return examples


def evenly_chosen(gate: Sequence[Example], limit: int | None) -> tuple[Example, ...]:
    """At most `limit` examples, each label's share kept, in gate order; the same ones every time.

    Every n-th of the examples sorted by label: of a file that alternates between labels, every second row has one label only.
    """
    if limit is None or len(gate) <= limit:
        return tuple(gate)
    by_label = sorted(range(len(gate)), key=lambda index: gate[index].label)  # a stable sort: gate order within a label
    return tuple(gate[index] for index in sorted(by_label[number * len(gate) // limit] for number in range(limit)))


def _file_of(folder: Path, fingerprint: str) -> Path:
    return folder / f"{fingerprint}.jsonl"
