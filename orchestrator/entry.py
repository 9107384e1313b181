"""What runs on workers, imported where it runs: neither the driver nor Ray Train's processes load transformers for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multilora.spec import BaseSpec
    from orchestrator.eval_report import EvalItem, EvalOutcome


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
