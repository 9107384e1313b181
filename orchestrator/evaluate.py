"""Evaluate adapter versions through the serving engine, beside majority class, zero-shot base and a TF-IDF classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from multilora.artifact import AdapterArtifact, TaskCard, read_artifact
from multilora.base_model import load_base
from multilora.errors import AdapterError
from multilora.fingerprint import fingerprint_of, zero_shot_fingerprint
from multilora.scoring import SCORER_VERSION
from multilora.spec import BaseSpec
from orchestrator.eval_report import EvalItem, EvalOutcome, EvalReport, Graded
from orchestrator.plain_baselines import fit_tf_idf, majority_label, tf_idf_answers
from serve.engine import Answer, Engine, Work

NUM_SLOTS = 16


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
        reports[item.task, key] = _graded(item, key, artifact, answers, fingerprint_of(artifact))
        if item.train:
            zero_shot = _zero_shot(engine, artifact.card, [example.columns for example in item.gate])
            reports[item.task, "zero-shot"] = _graded(
                item, "zero-shot", artifact, zero_shot, zero_shot_fingerprint(artifact.card)
            )
            labels = tuple(label for label, _ in artifact.card.labels)
            # Nothing but the base can be a baseline for text that is written.
            for system, guesses in _plain_baselines(item).items() if labels else ():
                plain = [Answer(guess, labels, tuple(float(name == guess) for name in labels), False) for guess in guesses]
                reports[item.task, system] = _graded(item, system, artifact, plain, {})
    return EvalOutcome(reports, errors)


def _zero_shot(engine: Engine, card: TaskCard, items: Sequence[Mapping[str, str]]) -> list[Answer]:
    if card.max_new_tokens is None:
        return engine.classify_zero_shot(card.prompt_format, items)
    return engine.write_zero_shot(card.prompt_format, items, card.max_new_tokens)


def _graded(
    item: EvalItem, system: str, artifact: AdapterArtifact, answers: Sequence[Answer], fingerprint: Mapping[str, str]
) -> EvalReport:
    rows = tuple(
        Graded(
            example.id,
            example.columns[artifact.card.text_column],
            example.label,
            answer.label,
            max(answer.probabilities, default=None),
            answer.scores,
            answer.is_truncated,
        )
        for example, answer in zip(item.gate, answers, strict=True)
    )
    return EvalReport(
        task=item.task,
        system=system,
        digest=artifact.digest if "adapter" in fingerprint else fingerprint.get("base", ""),
        gate_fingerprint=item.gate_fingerprint,
        labels=answers[0].labels,
        answers=rows,
        temperature=answers[0].temperature,
        scorer_version=SCORER_VERSION,
        fingerprint=fingerprint,
    )


def _plain_baselines(item: EvalItem) -> dict[str, list[str]]:
    return {
        "majority": [majority_label(item.train)] * len(item.gate),
        "tf-idf": tf_idf_answers(fit_tf_idf(item.train), item.gate),
    }
