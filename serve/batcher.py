"""Waiting requests -> one mixed batch under a token budget, taking turns between adapters. Plain values, no torch, no clock."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Batcher(Generic[T]):
    """First come, first served within an adapter; round robin between adapters, so that no flood starves the others."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._queues: OrderedDict[str, deque[tuple[int, T]]] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, key: str, num_tokens: int, work: T) -> None:
        """Queue one piece of work of `num_tokens` for an adapter."""
        self._queues.setdefault(key, deque()).append((num_tokens, work))
        self._num_waiting += 1

    def next_batch(self) -> list[T]:
        """Take work up to the token budget, one piece per adapter in turn; at least one piece while any waits."""
        batch: list[T] = []
        num_tokens = 0
        while self._queues:
            key, queue = next(iter(self._queues.items()))
            if batch and num_tokens + queue[0][0] > self._max_tokens:
                break
            size, work = queue.popleft()
            num_tokens += size
            batch.append(work)
            if queue:
                self._queues.move_to_end(key)
            else:
                del self._queues[key]
        self._num_waiting -= len(batch)
        return batch
