"""What runs on workers, imported where it runs: neither the driver nor Ray Train's processes load transformers for it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
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
