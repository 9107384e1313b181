"""How many tokens one forward and backward may take, found out by running out of memory. Results do not depend on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from multilora.errors import CapacityError
from multilora.scoring import PAD_MULTIPLE
from multilora.segments import length_batches

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 8192}
"""What one forward and backward costs beside its tokens, in tokens."""


class MicroBatches:
    """Cuts rows into micro-batches under a token budget, which is halved for good when memory does not suffice."""

    def __init__(self, device: torch.device, on_halved: Callable[[int], None]) -> None:
        """`on_halved` is told every new budget in tokens."""
        self.max_tokens = MAX_BATCH_TOKENS[device.type]
        self._overhead_tokens, self._multiple = OVERHEAD_TOKENS[device.type], PAD_MULTIPLE[device.type]
        self._on_halved = on_halved

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Row indices of each micro-batch; rows of like length share one, so little is spent on padding."""
        return length_batches(lengths, self.max_tokens, self._overhead_tokens, self._multiple)

    def within_memory(self, longest: int, attempt: Callable[[], T]) -> T:
        """Run `attempt` over rows of at most `longest` tokens, from its start again with half the budget where memory ends.

        Raises CapacityError where not even one row fits.
        """
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError as error:
                if self.max_tokens < longest:  # every row was alone already
                    raise CapacityError(
                        f"one example of {longest} tokens does not fit into the GPU's memory: lower train.max_length, set "
                        "resources.gradient_checkpointing, or use base.quantization"
                    ) from error
            self.max_tokens //= 2
            torch.cuda.empty_cache()
            logger.warning("out of memory, going on with micro-batches of %d tokens", self.max_tokens)
            self._on_halved(self.max_tokens)
