"""How an adapter's learning rate goes over its steps. Depends on the step alone, so a resume needs no state."""

from __future__ import annotations

import math

from multilora.spec import TrainSpec


def learning_rate(settings: TrainSpec, step: int, num_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) of `num_steps`.

    Source: transformers get_scheduler: a warm-up begins at zero, and `linear` and `cosine` reach zero after the last step.
    """
    num_warmup_steps = math.ceil(settings.warmup_ratio * num_steps)
    if step < num_warmup_steps:
        return settings.learning_rate * step / num_warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * left
