"""Evaluate adapter versions through the serving engine, beside majority class, zero-shot base and a TF-IDF classifier."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from multilora.artifact import TaskCard, read_artifact
from multilora.base_model import load_base
from multilora.errors import AdapterError
from multilora.spec import BaseSpec
from orchestrator.calibration import expected_calibration_error
from orchestrator.dataset import Example
from orchestrator.metrics import METRICS, is_right, token_f1
from serve.engine import Answer, Engine, Work, softmax

NUM_SLOTS = 16


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

    @property
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
        if not all(graded.scores for graded in self.answers):
            return {}
        temperatures = {"ece": self.temperature, "ece_uncalibrated": 1.0}
        return {
            name: expected_calibration_error([max(softmax(g.scores, temperature)) for g in self.answers], self.correct)
            for name, temperature in temperatures.items()
        }

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
    """Keep every answer of a run's evaluation, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(".tmp")
    staging.write_text(json.dumps([report.to_json() for report in reports]), encoding="utf-8")
    staging.replace(file)


def load_reports(file: Path) -> dict[str, EvalReport]:
    """Stored reports by system; empty where there are none."""
    if not file.is_file():
        return {}
    reports = [EvalReport.from_json(text) for text in json.loads(file.read_text(encoding="utf-8"))]
    return {report.system: report for report in reports}


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


def evaluate(base: BaseSpec, items: Sequence[EvalItem], untouched: Sequence[EvalItem] = ()) -> EvalOutcome:
    """Evaluate `items` over one base; of `untouched` adapters only bind them, which checks base, tensors and canaries."""
    artifacts, errors = {}, {}
    for item in (*items, *untouched):
        try:
            artifacts[item.task, item.version] = read_artifact(Path(item.folder), item.digest)
        except AdapterError as error:
            errors[f"{item.task}@{item.version}"] = str(error)
    max_rank = max((artifact.card.rank for artifact in artifacts.values()), default=1)
    engine = Engine(load_base(base), NUM_SLOTS, max_rank)
    reports: dict[tuple[str, str], EvalReport] = {}
    for item in (*items, *untouched):
        artifact = artifacts.get((item.task, item.version))
        if artifact is None:
            continue
        try:
            key = engine.bind(artifact, item.version)
        except AdapterError as error:
            errors[f"{item.task}@{item.version}"] = str(error)
            continue
        if not item.gate:
            continue
        answers = engine.classify([Work(key, engine.prompt(key, example.columns)) for example in item.gate])
        reports[item.task, key] = _graded(item, key, artifact.digest, artifact.card.text_column, answers)
        if item.train:
            zero_shot = _zero_shot(engine, artifact.card, [example.columns for example in item.gate])
            reports[item.task, "zero-shot"] = _graded(
                item, "zero-shot", artifact.card.base_fingerprint, artifact.card.text_column, zero_shot
            )
            labels = tuple(label for label, _ in artifact.card.labels)
            # Nothing but the base can be a baseline for text that is written.
            for system, guesses in (("majority", _majority(item)), ("tf-idf", _tf_idf(item))) if labels else ():
                plain = [Answer(guess, labels, tuple(float(name == guess) for name in labels), False) for guess in guesses]
                reports[item.task, system] = _graded(item, system, "", artifact.card.text_column, plain)
    return EvalOutcome(reports, errors)


def _zero_shot(engine: Engine, card: TaskCard, items: Sequence[Mapping[str, str]]) -> list[Answer]:
    if card.max_new_tokens is None:
        return engine.classify_zero_shot(card.prompt_format, items)
    return engine.write_zero_shot(card.prompt_format, items, card.max_new_tokens)


def _graded(item: EvalItem, system: str, digest: str, text_column: str, answers: Sequence[Answer]) -> EvalReport:
    rows = tuple(
        Graded(
            example.id,
            example.columns[text_column],
            example.label,
            answer.label,
            max(answer.probabilities, default=None),
            answer.scores,
        )
        for example, answer in zip(item.gate, answers, strict=True)
    )
    return EvalReport(item.task, system, digest, item.gate_fingerprint, answers[0].labels, rows, answers[0].temperature)


def _majority(item: EvalItem) -> list[str]:
    return [Counter(example.label for example in item.train).most_common(1)[0][0]] * len(item.gate)


def _tf_idf(item: EvalItem) -> list[str]:
    """Word 1- and 2-grams, logistic regression with C = 10: a strong setting of what people run without a language model."""
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, max_iter=2000))
    model.fit([_text(example) for example in item.train], [example.label for example in item.train])
    return [str(answer) for answer in model.predict([_text(example) for example in item.gate])]


def _text(example: Example) -> str:
    return "\n".join(example.columns.values())
