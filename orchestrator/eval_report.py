"""What an evaluation is asked for and gives: items, every answer, and the numbers that derive from them. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from orchestrator.calibration import expected_calibration_error
from orchestrator.dataset import Example
from orchestrator.files import write_whole
from orchestrator.metrics import METRICS, is_right, token_f1


@dataclass(frozen=True)
class Graded:
    """One example's answer beside its gold label; scores in label order."""

    id: str
    text: str
    gold: str
    answer: str
    probability: float | None
    """Of the answer; None for a free text."""
    scores: tuple[float, ...]
    is_truncated: bool = False
    """Whether the input was cut to fit max_length."""

    @cached_property
    def is_right(self) -> bool:
        """Whether the answer is the gold one."""
        return is_right(self.gold, self.answer)


@dataclass(frozen=True)
class EvalReport:
    """Every answer of one system on one gate split; all numbers derive from these."""

    task: str
    system: str
    """`task@version`, or `zero-shot`, `majority`, `tf-idf`."""
    digest: str
    gate_fingerprint: str
    labels: tuple[str, ...]
    answers: tuple[Graded, ...]
    temperature: float = 1.0
    """What the probabilities were computed with."""
    scorer_version: int = 0
    """Of the code that scored labels; answers of different versions are not compared. 0: nothing was scored."""
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    """Hashes of everything that decides the answers, by part (multilora/fingerprint.py); empty for a baseline without a model."""

    @property
    def correct(self) -> list[bool]:
        """Right or wrong per example, in gate order."""
        return [graded.is_right for graded in self.answers]

    def value(self, metric: str) -> float:
        """The named metric."""
        return METRICS[metric]([g.gold for g in self.answers], [g.answer for g in self.answers])

    @property
    def calibration_errors(self) -> dict[str, float]:
        """Expected calibration error with the temperature (`ece`) and without; empty for a system without scores."""
        if self._scores is None:
            return {}
        temperatures = {"ece": self.temperature, "ece_uncalibrated": 1.0}
        return {
            name: expected_calibration_error(self.confidences(temperature), self.correct)
            for name, temperature in temperatures.items()
        }

    def confidences(self, temperature: float) -> NDArray[np.float64]:
        """Probability of the best label per example, at a temperature; empty for a system without scores."""
        if self._scores is None:
            return np.empty(0)
        best: NDArray[np.float64] = softmax(self._scores / temperature, axis=1).max(axis=1)
        return best

    @cached_property
    def _scores(self) -> NDArray[np.float64] | None:
        """Examples x labels."""
        is_scored = bool(self.answers) and all(graded.scores for graded in self.answers)
        return np.array([graded.scores for graded in self.answers]) if is_scored else None

    @property
    def token_f1(self) -> float | None:
        """Mean word overlap of a free-text task's answers; shown and not judged. None for a task with labels."""
        return None if self.labels else token_f1([g.gold for g in self.answers], [g.answer for g in self.answers])

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EvalReport:
        """Undo `to_json`."""
        raw = json.loads(text)
        answers = tuple(Graded(**{**row, "scores": tuple(row["scores"])}) for row in raw.pop("answers"))
        return cls(**{**raw, "labels": tuple(raw["labels"])}, answers=answers)


def store_reports(file: Path, reports: Iterable[EvalReport]) -> None:
    """Keep every answer of a run's evaluations, atomically; an evaluation that was made again stands behind the older ones."""
    texts = dict.fromkeys((*_texts(file), *(report.to_json() for report in reports)))
    write_whole(file, json.dumps(list(texts)).encode())


def load_reports(file: Path) -> dict[str, EvalReport]:
    """The newest stored report of each system; empty where there are none."""
    reports = [EvalReport.from_json(text) for text in _texts(file)]
    return {report.system: report for report in reports}


def _texts(file: Path) -> list[str]:
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


@dataclass(frozen=True)
class EvalItem:
    """One adapter version to evaluate on a task's gate split."""

    task: str
    version: int
    digest: str
    folder: str
    gate: tuple[Example, ...]
    gate_fingerprint: str
    train: tuple[Example, ...] = ()
    """Give the training examples to have the baselines computed too."""


@dataclass(frozen=True)
class EvalOutcome:
    """Reports by (task, system), and why an adapter could not be bound, by task@version."""

    reports: dict[tuple[str, str], EvalReport]
    errors: dict[str, str]
