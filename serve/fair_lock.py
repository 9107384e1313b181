"""A lock that goes to whoever has waited longest, and that tells its holder whether anybody waits."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """`with lock:`, first come, first served: `threading.Lock` may go back again and again to whoever just released it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._is_held = False
        self._waiting: deque[threading.Event] = deque()

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits for it."""
        return bool(self._waiting)

    def __enter__(self) -> None:
        with self._mutex:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()  # handed over: it stays held
            else:
                self._is_held = False
