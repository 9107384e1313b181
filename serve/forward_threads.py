"""Forward passes side by side on a CPU's cores: each on few threads, they wait for each other less than the threads of one do.

Of two cores that compute one product after another in common, each waits for the other thousands of times a batch, and
both for whatever else runs on either; measured on two cores: 40 % of the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")
WHOLE_PROCESS = threading.Lock()
"""torch's number of threads is one for all engines of a process: two that changed it at once would leave it changed."""
MAX_SIDE_BY_SIDE = 8
"""Between two products a pass holds Python's lock; more passes would wait for it."""


class ForwardThreads:
    """Runs the forward passes of one mixed batch, several at once where the device is the CPU."""

    def __init__(self, device: torch.device) -> None:
        with WHOLE_PROCESS:
            num_threads = torch.get_num_threads()
        self.number = min(num_threads, MAX_SIDE_BY_SIDE) if device.type == "cpu" else 1
        """How many passes run at once."""
        self._num_inner = max(1, num_threads // self.number)
        self._pool = ThreadPoolExecutor(self.number, "forward", initializer=torch.set_num_threads, initargs=(self._num_inner,))

    def map(self, forward: Callable[[A], B], batches: Sequence[A]) -> list[B]:
        """Call `forward` on each batch, without gradients; results in order. One call of a process after another."""
        if self.number == 1 or len(batches) == 1:
            return [forward(batch) for batch in batches]

        def run(batch: A) -> B:
            with torch.inference_mode():  # it is each thread's own
                return forward(batch)

        with WHOLE_PROCESS:
            before = torch.get_num_threads()
            torch.set_num_threads(self._num_inner)
            try:
                return list(self._pool.map(run, batches))
            finally:
                torch.set_num_threads(before)
