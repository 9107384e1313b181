"""What runs on workers, imported where it runs: neither the driver nor Ray Train's processes load transformers for it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multilora.spec import BaseSpec
    from orchestrator.cross import CrossColumn
    from orchestrator.eval_report import EvalItem, EvalOutcome
    from orchestrator.methods import Bench, MethodRow, Part
    from orchestrator.rungs import RungAnswers


def train_group(config: dict[str, Any]) -> None:
    """Run `orchestrator.worker.train_group`."""
    importlib.import_module("orchestrator.worker").train_group(config)


def evaluate(base: BaseSpec, items: Sequence[EvalItem], untouched: Sequence[EvalItem]) -> EvalOutcome:
    """Run `orchestrator.evaluate.evaluate`."""
    outcome: EvalOutcome = importlib.import_module("orchestrator.evaluate").evaluate(base, items, untouched)
    return outcome


def find_overlaps(train: Mapping[str, Sequence[str]], gate: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Run `orchestrator.contamination.find_overlaps`; its findings in words, by the task that trains."""
    sentences: dict[str, tuple[str, ...]] = {}
    for overlap in importlib.import_module("orchestrator.contamination").find_overlaps(train, gate):
        sentences[overlap.train_task] = (*sentences.get(overlap.train_task, ()), overlap.sentence)
    return sentences


def cross_columns(base: BaseSpec, items: Sequence[EvalItem]) -> Iterator[CrossColumn]:
    """Run `orchestrator.cross_evaluate.cross_columns`."""
    yield from importlib.import_module("orchestrator.cross_evaluate").cross_columns(base, items)


def climb(item: EvalItem, others: Sequence[EvalItem]) -> Iterator[RungAnswers]:
    """Run `orchestrator.ladder.climb`."""
    yield from importlib.import_module("orchestrator.ladder").climb(item, others)


def compare_part(part: Part, bench: Bench) -> Iterator[MethodRow]:
    """Run `orchestrator.compare_worker.part_rows`."""
    yield from importlib.import_module("orchestrator.compare_worker").part_rows(part, bench)
