"""One base's engine with its queues and its thread: waiting requests of all tasks -> mixed batches -> answers. No Ray, no HTTP.

Texts are written a step at a time, and between two steps a batch of labels is answered: a request for a label never waits
for a text to come to its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from multilora.base_model import FrozenBase
from multilora.generate import Reader, Token
from serve.answer import Answer, written
from serve.batcher import Batcher
from serve.engine import Engine, Work
from serve.metrics import Metrics
from serve.router import task_of
from serve.writer import TextWork, Writer

logger = logging.getLogger(__name__)

T = TypeVar("T")
GATHER_SHARE = 0.3
"""Of the last batch's time, for which requests that come one after the other may hold up the next batch."""
MAX_WRITERS = 8
"""Batches of texts that take turns; further texts wait, so that they are written together."""


@dataclass(frozen=True)
class Pending:
    """Work with the future that its answer goes to."""

    work: Work
    future: asyncio.Future[Answer]
    since: float
    """Loop time of its arrival."""


@dataclass(frozen=True)
class SpelledToken:
    """A token as a person reads it."""

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...]
    """The most likely tokens at its place with their log-probabilities, best first."""


@dataclass(frozen=True)
class Piece:
    """What a text grew by: its tokens, and the text that they settle, which never ends within a character."""

    text: str
    tokens: tuple[SpelledToken, ...]
    end: Literal["stop", "length"] | None
    """How the text ended; None where more follows."""


class TextStream:
    """A text that is being written: await its `answer`, or read it piece by piece."""

    def __init__(self, work: TextWork, base: FrozenBase) -> None:
        self.work = work
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._base = base
        self._tokens: asyncio.Queue[tuple[Token, bool] | None] = asyncio.Queue()
        # Wakes a reader also where the text fails or is closed.
        self.answer.add_done_callback(lambda _: self._tokens.put_nowait(None))

    def put(self, token: Token, *, is_last: bool) -> None:
        """Add what was written."""
        self._tokens.put_nowait((token, is_last))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Read the text, once. Raises what ended it early; whoever stops reading closes it."""
        reader, held = Reader(self._base), list[SpelledToken]()
        try:
            while (item := await self._tokens.get()) is not None:
                token, is_last = item
                shown = token.alternatives[: self.work.num_alternatives]
                alternatives = tuple((reader.spell(other), logprob) for other, logprob in shown)
                held.append(SpelledToken(reader.spell(token.id), token.logprob, alternatives))
                text = reader.read(token.id, is_last=is_last)
                if is_last:
                    answer = await self.answer
                    yield Piece(text, tuple(held), "length" if answer.is_cut_off else "stop")
                elif text:
                    yield Piece(text, tuple(held), None)
                    held = []
            await self.answer
        finally:
            self.close()

    def close(self) -> None:
        """Let its row leave before the next step; nothing where it is done."""
        self.answer.cancel()


class BaseServer:
    """One base's engine with its queues and its thread."""

    def __init__(self, engine: Engine, max_batch_tokens: int, max_wait_s: float, metrics: Metrics) -> None:
        self.engine, self._max_wait_s, self._metrics = engine, max_wait_s, metrics
        self._labels: Batcher[Pending] = Batcher(max_batch_tokens)
        self._texts: Batcher[TextStream] = Batcher(max_batch_tokens)
        self._writing: deque[tuple[Writer, Sequence[TextStream]]] = deque()
        """Writers in turn, with the streams of their rows."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._last_batch_s = 0.0
        """What the last batch of labels took."""
        self._is_awake, self._is_idle = asyncio.Event(), asyncio.Event()
        self._is_idle.set()
        self._loop_task = asyncio.create_task(self._run())

    @property
    def num_waiting(self) -> int:
        """Inputs in the queues."""
        return len(self._labels) + len(self._texts)

    @property
    def num_writing(self) -> int:
        """Texts that are being written."""
        return sum(len(writer.alive) for writer, _ in self._writing)

    @property
    def is_busy(self) -> bool:
        """Whether anything waits or is computed."""
        return not self._is_idle.is_set()

    async def wait_until_idle(self) -> None:
        """Wait until everything that was asked is answered."""
        await self._is_idle.wait()

    def submit(self, work: Work) -> asyncio.Future[Answer]:
        """Queue work; the future gets its answer, a label or a whole text."""
        limit = self.engine.bound(work.key).max_new_tokens
        if limit:
            return self.write(TextWork(work.key, work.prompt, limit)).answer
        loop = asyncio.get_running_loop()
        pending = Pending(work, loop.create_future(), loop.time())
        self._labels.add(work.key, self.engine.num_tokens(work), pending)
        self._wake()
        return pending.future

    def write(self, work: TextWork) -> TextStream:
        """Queue a text."""
        stream = TextStream(work, self.engine.base)
        turn = self.engine.base.spec.model if work.key is None else work.key
        self._texts.add(turn, len(work.prompt.token_ids) + work.max_new_tokens, stream)
        self._wake()
        return stream

    async def close(self) -> None:
        """Stop the loop and the thread."""
        self._loop_task.cancel()
        self._thread.shutdown(wait=True)

    def _wake(self) -> None:
        self._is_awake.set()
        self._is_idle.clear()

    async def _run(self) -> None:
        while True:
            await self._is_awake.wait()
            # Others that come in the next moment share the first batch; later ones gather while it is computed.
            await asyncio.sleep(self._max_wait_s)
            self._is_awake.clear()
            while self.num_waiting or self._writing:
                # A caller that left needs no answer, and its adapter may be unbound by now.
                await self._answer([pending for pending in self._labels.next_batch() if not pending.future.done()])
                if len(self._writing) < MAX_WRITERS:
                    self._begin([stream for stream in self._texts.next_batch() if not stream.answer.done()])
                if self._writing:
                    writer, streams = self._writing[0]
                    goes_on = await self._step(writer, streams)
                    self._writing.popleft()
                    if goes_on:
                        self._writing.append((writer, streams))
                else:
                    await self._gather()
            self._is_idle.set()

    async def _gather(self) -> None:
        """Wait while requests come one after the other, a share of the last batch's time at most.

        Sending answers and reading requests hold Python's lock, which a forward pass needs between two products: a batch
        that begins among them took twice as long.
        """
        clock, seen = asyncio.get_running_loop().time, -1
        deadline = clock() + GATHER_SHARE * self._last_batch_s
        while seen != len(self._labels) and clock() + self._max_wait_s < deadline:
            seen = len(self._labels)
            await asyncio.sleep(self._max_wait_s)

    async def _answer(self, batch: Sequence[Pending]) -> None:
        works = [pending.work for pending in batch]
        if not works:
            return
        self._observe(batch)
        clock = asyncio.get_running_loop().time
        try:
            started = clock()
            answers = await self._in_thread(lambda: self.engine.classify(works))
            self._last_batch_s = clock() - started
            self._metrics.batch_s.labels(self.engine.base.spec.model).observe(self._last_batch_s)
        except Exception as error:  # every caller must hear of it, and the loop must go on
            keys = dict.fromkeys(work.key for work in works)
            if len(keys) > 1:
                # One adapter's failure is not the others': each is tried alone.
                for key in keys:
                    await self._answer([pending for pending in batch if pending.work.key == key])
                return
            logger.exception("batch failed version=%s size=%d", works[0].key, len(works))
            for pending in batch:
                _fail(pending.future, error)
            return
        for pending, answer in zip(batch, answers, strict=True):
            if not pending.future.done():
                pending.future.set_result(answer)

    def _observe(self, batch: Sequence[Pending]) -> None:
        base, now = self.engine.base.spec.model, asyncio.get_running_loop().time()
        self._metrics.batch_inputs.labels(base).observe(len(batch))
        self._metrics.batch_tasks.labels(base).observe(len({pending.work.key for pending in batch}))
        for pending in batch:
            self._metrics.queue_s.labels(task_of(pending.work.key)).observe(now - pending.since)

    def _begin(self, streams: Sequence[TextStream]) -> None:
        for writer, indices in self.engine.writers([stream.work for stream in streams]):
            self._writing.append((writer, [streams[index] for index in indices]))

    async def _step(self, writer: Writer, streams: Sequence[TextStream]) -> bool:
        """Write one token of each of a writer's texts; False where none of them goes on."""
        left = [row for row in writer.alive if streams[row].answer.done()]
        try:
            progress = await self._in_thread(lambda: self.engine.step(writer, left))
        except Exception as error:  # every caller must hear of it, and the loop must go on
            keys = dict.fromkeys(writer.works[row].key for row in writer.alive)
            if len(keys) > 1 and not writer.has_begun:
                # Too much for one forward pass, perhaps: each adapter's texts are tried alone.
                for key in keys:
                    self._begin([streams[row] for row in writer.alive if writer.works[row].key == key])
                return False
            logger.exception("texts failed versions=%s size=%d", ",".join(map(str, keys)), len(writer.alive))
            for row in writer.alive:
                _fail(streams[row].answer, error)
            return False
        for row, token in progress.tokens.items():
            streams[row].put(token, is_last=row in progress.texts)
        for row, text in progress.texts.items():
            if not streams[row].answer.done():
                streams[row].answer.set_result(written(text, streams[row].work.prompt))
        for row, failure in progress.errors.items():
            logger.error("text failed version=%s error=%r", writer.works[row].key, failure)
            _fail(streams[row].answer, failure)
        return bool(writer.alive)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def _fail(future: asyncio.Future[Answer], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
