"""The one loop for what trains alone: batches, learning rate, best epoch and early stop as our adapters have them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor, nn

from multilora.base_model import FrozenBase
from multilora.spec import TaskSpec
from orchestrator.batching import batch_indices, num_steps_per_epoch
from orchestrator.dataset import Example, TaskDataset
from orchestrator.metrics import METRICS
from orchestrator.plain_scoring import sorted_batches
from orchestrator.schedule import learning_rate

DIVERGED = (-math.inf, -math.inf)
NUM_WARM_UP = 4
Answering = Callable[[Sequence[Example]], Sequence[str]]


class Learner(Protocol):
    """What can be trained: it makes rows of examples once, and losses and scores of rows."""

    @property
    def base(self) -> FrozenBase:
        """What it is built on."""

    @property
    def module(self) -> nn.Module:
        """What holds the trained parameters, those that require a gradient."""

    @property
    def max_rows(self) -> int:
        """Most rows of a batch that is scored."""

    def rows(self, examples: Sequence[Example]) -> list[Any]:
        """Make rows of examples."""

    def scores(self, rows: Sequence[Any]) -> Tensor:
        """Score every label of every row [B, L]."""

    def losses(self, rows: Sequence[Any], gold: Sequence[int]) -> Tensor:
        """Training loss of each row [B]."""


@dataclass(frozen=True)
class Trained:
    """What one training found; the learner is left as it was after its best epoch."""

    result: tuple[float, float]
    """The gate's metric on the select split, and minus the loss there; DIVERGED where a loss was no number."""
    best_epoch: int
    epoch_losses: tuple[float, ...]
    """Mean training loss of each epoch."""
    train_s: float


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What training changes."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def train(learner: Learner, dataset: TaskDataset, spec: TaskSpec, *, has_dropout: bool = False) -> Trained:
    """Train by AdamW with the spec's settings and leave the learner at its best epoch on the select split.

    `has_dropout` turns the base's own dropout on, which is off where the base is frozen.
    """
    started, settings, names = time.perf_counter(), spec.train, list(spec.labels or ())
    parameters = trained_parameters(learner.module)
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    rows, select_rows = learner.rows(dataset.train), learner.rows(dataset.select)
    gold, select_gold = ([names.index(example.label) for example in split] for split in (dataset.train, dataset.select))
    per_epoch = num_steps_per_epoch(len(rows), settings.batch_size)
    best, best_epoch, best_state = DIVERGED, 0, list[Tensor]()
    epoch_losses = list[float]()
    for epoch in range(1, settings.epochs + 1):
        learner.module.train(has_dropout)
        losses = list[float]()
        for step in range((epoch - 1) * per_epoch, epoch * per_epoch):
            batch = batch_indices(len(rows), settings.batch_size, settings.seed, step)
            loss = learner.losses([rows[i] for i in batch], [gold[i] for i in batch]).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.param_groups[0]["lr"] = learning_rate(settings, step, per_epoch * settings.epochs)
            optimizer.step()
            losses.append(loss.item())
        epoch_losses.append(sum(losses) / len(losses))
        result = _judged(learner, select_rows, select_gold, spec)
        if not all(map(math.isfinite, (epoch_losses[-1], *result))):
            return Trained(DIVERGED, epoch, tuple(epoch_losses), time.perf_counter() - started)
        if result > best:
            best, best_epoch = result, epoch
            best_state = [parameter.detach().clone() for parameter in parameters]
        elif settings.early_stopping and epoch - best_epoch >= settings.early_stopping:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, best_state, strict=True):
            parameter.copy_(value)
    return Trained(best, best_epoch, tuple(epoch_losses), time.perf_counter() - started)


def _judged(learner: Learner, rows: Sequence[Any], gold: Sequence[int], spec: TaskSpec) -> tuple[float, float]:
    """The gate's metric and minus the mean loss."""
    scores = scores_of(learner, rows)
    names, metric = list(spec.labels or ()), METRICS[spec.gate.metric]
    value = metric([names[label] for label in gold], [names[label] for label in best_labels(scores)])
    return value, -F.cross_entropy(scores, torch.tensor(gold)).item()


@torch.no_grad()
def scores_of(learner: Learner, rows: Sequence[Any]) -> Tensor:
    """Score rows in sorted padded batches [B, L], in host memory."""
    learner.module.eval()
    found: dict[int, Tensor] = {}
    for batch in sorted_batches(rows, learner.max_rows):
        found |= zip(batch, learner.scores([rows[i] for i in batch]).float().cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(rows))])


def best_labels(scores: Tensor) -> list[int]:
    """Number of each row's best label; of equal ones the first."""
    return [row.index(max(row)) for row in scores.tolist()]


def answering(learner: Learner, names: Sequence[str]) -> Answering:
    """A function that answers examples."""
    return lambda examples: [names[label] for label in best_labels(scores_of(learner, learner.rows(examples)))]


def timed(answer: Answering, examples: Sequence[Example]) -> tuple[tuple[str, ...], float]:
    """Answer examples; the wall milliseconds of each, after a few that only warm up."""
    answer(examples[:NUM_WARM_UP])
    started = time.perf_counter()
    answers = tuple(answer(examples))
    return answers, 1000 * (time.perf_counter() - started) / len(examples)
