"""Which examples an adapter sees in which step. Depends on its own seed alone, never on the tasks it trains beside."""

from __future__ import annotations

import random


def num_steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimiser steps in one pass over the examples; the last batch may be short."""
    return -(-num_examples // batch_size)


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Example indices of optimiser step `step` (0-based): each epoch is one seeded permutation, so a resume needs no state."""
    per_epoch = num_steps_per_epoch(num_examples, batch_size)
    epoch, position = divmod(step, per_epoch)
    order = list(range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[position * batch_size : (position + 1) * batch_size]


def drawn_wording(num_wordings: int, seed: int, epoch: int, example: int) -> int:
    """Which wording of the instruction an example is shown in: one draw per example and epoch."""
    return 0 if num_wordings == 1 else random.Random(f"{seed}/{epoch}/{example}/wording").randrange(num_wordings)


def dropout_key(seed: int, step: int, position: int) -> int:
    """Key of one row's dropout masks."""
    return random.Random(f"{seed}/{step}/{position}").getrandbits(31)
