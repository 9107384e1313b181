"""Waiting requests -> one mixed batch under a token budget, taking turns between adapters. Plain values, no torch, no clock."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Batcher(Generic[T]):
    """First come, first served within an adapter; between adapters, whoever had the fewest tokens so far is next.

    This is start-time fair queueing (Goyal, Vin and Cheng, 1996): no flood starves the others, and neither do long texts.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._queues: dict[str, deque[tuple[int, T]]] = {}
        self._turns: list[tuple[int, int, str]] = []
        """Heap of (tokens that the adapter had, order of joining, adapter) of those that wait."""
        self._tokens_had: dict[str, int] = {}
        self._now = 0
        """Tokens that the last one in turn had; who comes back after a pause starts there."""
        self._joined = itertools.count()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, key: str, num_tokens: int, work: T) -> None:
        """Queue one piece of work of `num_tokens` for an adapter."""
        if key not in self._queues:
            self._queues[key] = deque()
            self._take_turn(key, max(self._now, self._tokens_had.get(key, 0)))
        self._queues[key].append((num_tokens, work))
        self._num_waiting += 1

    def next_batch(self) -> list[T]:
        """Take work up to the token budget, one piece per turn; at least one piece while any waits."""
        batch: list[T] = []
        num_tokens = 0
        while self._turns:
            had, _, key = self._turns[0]
            queue = self._queues[key]
            if batch and num_tokens + queue[0][0] > self._max_tokens:
                break
            heapq.heappop(self._turns)
            size, work = queue.popleft()
            num_tokens += size
            batch.append(work)
            self._now, self._tokens_had[key] = had, had + size
            if queue:
                self._take_turn(key, had + size)
            else:
                del self._queues[key]
        self._num_waiting -= len(batch)
        if not self._queues:
            self._tokens_had.clear()  # nobody waits, so nobody is owed anything
            self._now = 0
        return batch

    def _take_turn(self, key: str, had: int) -> None:
        heapq.heappush(self._turns, (had, next(self._joined), key))
