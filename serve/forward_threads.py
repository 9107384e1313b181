"""Forward passes side by side on a CPU's cores: each on few threads, they wait for each other less than the threads of one do.

Of two cores that compute one product after another in common, each waits for the other thousands of times a batch, and
both for whatever else runs on either; measured on two cores: 40 % of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from serve.fair_lock import FairLock

A = TypeVar("A")
B = TypeVar("B")
WHOLE_PROCESS = FairLock()
"""torch's number of threads is one for all engines of a process: two that changed it at once would leave it changed."""
MAX_SIDE_BY_SIDE = 8
"""Between two products a pass holds Python's lock; more passes would wait for it."""


class ForwardThreads:
    """Runs forward passes, several at once where the device is the CPU."""

    def __init__(self, device: torch.device) -> None:
        with WHOLE_PROCESS:
            num_threads = torch.get_num_threads()
        self.number = min(num_threads, MAX_SIDE_BY_SIDE) if device.type == "cpu" else 1
        """How many passes run at once."""
        self._num_inner = max(1, num_threads // self.number)
        self._pool = ThreadPoolExecutor(self.number, "forward", initializer=torch.set_num_threads, initargs=(self._num_inner,))

    @property
    def is_wanted(self) -> bool:
        """Whether another engine of the process waits for its turn."""
        return self.number > 1 and WHOLE_PROCESS.is_wanted

    def map(self, forward: Callable[[A], B], batches: Sequence[A]) -> list[B]:
        """Call `forward` on each batch, without gradients; results in order. One call of a process after another."""
        if self.number == 1 or len(batches) == 1:
            return [forward(batch) for batch in batches]

        def run(batch: A) -> B:
            with torch.inference_mode():  # it is each thread's own
                return forward(batch)

        with self._few_threads_each():
            return list(self._pool.map(run, batches))

    def run(self, worker: Callable[[], None], number: int) -> None:
        """Call `worker` on so many threads at once, and wait until all have returned. One call of a process after another."""
        if number == 1:
            worker()
            return
        with self._few_threads_each():
            for running in [self._pool.submit(worker) for _ in range(number)]:
                running.result()

    @contextmanager
    def _few_threads_each(self) -> Iterator[None]:
        with WHOLE_PROCESS:
            before = torch.get_num_threads()
            torch.set_num_threads(self._num_inner)
            try:
                yield
            finally:
                torch.set_num_threads(before)
