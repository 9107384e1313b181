"""What champion and challenger answered to live requests: numbers and labels, no text. One file per replica; readers sum all."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import TypeAdapter

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 5.0
Mode = Literal["canary", "shadow"]
S = TypeVar("S", bound="Sum")


class Sum:
    """Counts that add up field by field."""

    def __add__(self: S, other: S) -> S:
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pair:
    """Who is compared, and how."""

    task: str
    champion: int
    challenger: int
    mode: Mode


@dataclass
class SideCounts(Sum):
    """Answers of one of the two; in shadow, those that were compared."""

    num_requests: int = 0
    num_inputs: int = 0
    num_abstained: int = 0
    """Inputs whose label was not probable enough for the caller."""
    seconds: float = 0.0
    """Sum over requests. Of a shadow: while nobody else waited."""
    confidence: float = 0.0
    """Sum over inputs of the given label's probability; nothing of a free text."""
    labels: Counter[str] = field(default_factory=Counter)

    def count_input(self, label: str, probability: float | None, *, is_abstained: bool) -> None:
        """Count one answer; a free text has no probability, and is not kept."""
        self.num_inputs += 1
        self.num_abstained += is_abstained
        if probability is not None:
            self.labels[label] += 1
            self.confidence += probability


@dataclass
class PairCounts(Sum):
    """What became of the requests to one pair."""

    champion: SideCounts = field(default_factory=SideCounts)
    challenger: SideCounts = field(default_factory=SideCounts)
    num_errors: int = 0
    """Requests that the champion answered and the challenger could not."""
    num_dropped: int = 0
    """Inputs that the challenger was not asked in shadow, because too many waited."""
    num_agreed: int = 0
    """Inputs in shadow to which both gave the same label or text."""
    difference: float = 0.0
    """Sum over inputs in shadow of how far apart both see the probability of the champion's label."""
    table: Counter[str] = field(default_factory=Counter)
    """Inputs in shadow by `table_key`; none of a free-text task."""


def table_key(champion: str, challenger: str) -> str:
    """Both labels as one key of JSON."""
    return json.dumps([champion, challenger])


COUNTS = TypeAdapter(list[tuple[Pair, PairCounts]])
"""Content of a file."""


class LiveCounts:
    """The counts of one replica, and its file, which nobody else writes."""

    def __init__(self, folder: Path | None) -> None:
        """Count in memory alone where there is no folder."""
        name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.json"  # a pid comes again, on other nodes too
        self._file = folder / name if folder else None
        self._counts: defaultdict[Pair, PairCounts] = defaultdict(PairCounts)
        self._is_saved, self._saved_at = True, -SAVE_EVERY_S
        self._saving = asyncio.Lock()

    def of(self, pair: Pair) -> PairCounts:
        """The counts of a pair, to be added to."""
        self._is_saved = False
        return self._counts[pair]

    async def save(self, *, at_once: bool = False) -> None:
        """Write what is new, every few seconds at most; a full disk costs no answers."""
        async with self._saving:
            now = asyncio.get_running_loop().time()
            if self._file is None or self._is_saved or (not at_once and now < self._saved_at + SAVE_EVERY_S):
                return
            self._is_saved, self._saved_at = True, now
            try:
                content = COUNTS.dump_json(list(self._counts.items()))
                await asyncio.to_thread(_write, self._file, content)
            except (OSError, ValueError) as error:
                self._is_saved = False
                logger.warning("live counts not written file=%s error=%r", self._file, error)


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(".part")
    staging.write_bytes(content)
    staging.replace(file)
