"""One base's engine with its queue and its thread: waiting requests of all tasks -> mixed batches -> answers. No Ray, no HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serve.batcher import Batcher
from serve.engine import Answer, Engine, Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """Work with the future that its answer goes to."""

    work: Work
    future: asyncio.Future[Answer]


class BaseServer:
    """One base's engine with its queue and its thread."""

    def __init__(self, engine: Engine, max_batch_tokens: int) -> None:
        self.engine = engine
        self._batcher: Batcher[Pending] = Batcher(max_batch_tokens)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._is_awake = asyncio.Event()
        self._loop_task = asyncio.create_task(self._run())

    @property
    def num_waiting(self) -> int:
        """Inputs in the queue."""
        return len(self._batcher)

    def submit(self, work: Work) -> asyncio.Future[Answer]:
        """Queue work; the future gets its answer."""
        pending = Pending(work, asyncio.get_running_loop().create_future())
        self._batcher.add(work.key, self.engine.num_tokens(work), pending)
        self._is_awake.set()
        return pending.future

    async def close(self) -> None:
        """Stop the loop and the thread."""
        self._loop_task.cancel()
        self._thread.shutdown(wait=True)

    async def _run(self) -> None:
        while True:
            await self._is_awake.wait()
            self._is_awake.clear()
            while batch := self._batcher.next_batch():
                # A caller that left needs no answer, and its adapter may be unbound by now.
                await self._answer([pending for pending in batch if not pending.future.done()])

    async def _answer(self, batch: Sequence[Pending]) -> None:
        works = [pending.work for pending in batch]
        if not works:
            return
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self.engine.classify, works)
        except Exception as error:  # every caller must hear of it, and the loop must go on
            keys = dict.fromkeys(work.key for work in works)
            if len(keys) > 1:
                # One adapter's failure is not the others': each is tried alone.
                for key in keys:
                    await self._answer([pending for pending in batch if pending.work.key == key])
                return
            logger.exception("batch failed version=%s size=%d", works[0].key, len(works))
            for pending in batch:
                if not pending.future.done():
                    pending.future.set_exception(error)
            return
        for pending, answer in zip(batch, answers, strict=True):
            if not pending.future.done():
                pending.future.set_result(answer)
