"""The learning curve's rows: the task's adapter by number of training examples, all sizes and seeds trained together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from multilora.base_model import FrozenBase
from multilora.spec import TaskSpec, TrainSpec
from orchestrator.batching import num_steps_per_epoch
from orchestrator.dataset import Example, stratified_order
from orchestrator.methods import Bench, MethodRow
from orchestrator.train_together import Entry, OnEvent, ignore, train_together
from orchestrator.variants import with_seed

ENOUGH_STEPS = 60
"""Few examples are read so often that they take as many optimiser steps, or as many as all examples take if those are fewer."""


def curve_rows(bench: Bench, base: FrozenBase, on_event: OnEvent = ignore) -> Iterator[MethodRow]:
    """Train the task's adapter at every size with every seed in one group; rows by size, seeds side by side."""
    train, num_select = bench.dataset.train, len(bench.dataset.select)
    entries = []
    for size in [*sorted(size for size in bench.sizes if size < len(train)), len(train)]:
        spec = bench.spec.model_copy(update={"train": settings_for(bench.spec.train, size, len(train))})
        note = f"{spec.train.epochs} epochs; the best epoch is chosen on {num_select} examples more"
        for seed in bench.seeds:
            row = MethodRow("curve", "adapter", seed=seed, note=note)
            entries.append(Entry(row, with_seed(spec, seed), nested_subset(bench.spec, train, size, seed)))
    yield from train_together(bench, base, entries, on_event)


def settings_for(settings: TrainSpec, size: int, num_all: int) -> TrainSpec:
    """Training settings for `size` of `num_all` examples: epochs, and patience with them; for all the spec's own."""
    wanted = min(ENOUGH_STEPS, num_steps_per_epoch(num_all, settings.batch_size) * settings.epochs)
    epochs = max(settings.epochs, math.ceil(wanted / num_steps_per_epoch(size, settings.batch_size)))
    patience = settings.early_stopping and math.ceil(settings.early_stopping * epochs / settings.epochs)
    return settings.model_copy(update={"epochs": epochs, "early_stopping": patience})


def nested_subset(spec: TaskSpec, examples: Sequence[Example], size: int, seed: int) -> tuple[Example, ...]:
    """Draw `size` examples, of every label in proportion, in their own order; a smaller draw of a seed is inside a larger one."""
    taken = set(stratified_order(examples, f"curve {seed}", by_label=bool(spec.labels))[:size])
    return tuple(example for index, example in enumerate(examples) if index in taken)
