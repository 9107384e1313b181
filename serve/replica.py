"""One copy of the server: follows the registry's champions, batches requests across tasks, and answers. No Ray, no HTTP.

An asyncio loop owns the queue; one thread per base owns the engine's forward passes; adapters load in other threads. A
promotion swaps the task's key at once: requests that came before it finish on the version they were queued for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from multilora.artifact import read_artifact
from multilora.base_model import load_base
from multilora.errors import CapacityError, MultiLoraError, RequestError
from multilora.registry import AdapterVersion, Registry
from multilora.spec import BaseSpec
from serve.batcher import Batcher
from serve.config import ServeConfig
from serve.engine import Answer, BoundAdapter, Engine, Work
from serve.router import route

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
        self._batcher.add(work.key, len(work.prompt.token_ids), pending)
        self._is_awake.set()
        return pending.future

    async def close(self) -> None:
        """Stop the loop and the thread."""
        self._loop_task.cancel()
        self._thread.shutdown(wait=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._is_awake.wait()
            self._is_awake.clear()
            while batch := self._batcher.next_batch():
                works = [pending.work for pending in batch]
                try:
                    answers = await loop.run_in_executor(self._thread, self.engine.classify, works)
                except Exception as error:  # every caller must hear of it, and the loop must go on
                    logger.exception("batch failed size=%d", len(works))
                    for pending in batch:
                        if not pending.future.done():
                            pending.future.set_exception(error)
                    continue
                for pending, answer in zip(batch, answers, strict=True):
                    if not pending.future.done():
                        pending.future.set_result(answer)


class Replica:
    """Every task's champion, one engine per base."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._registry = Registry(config.tracking_uri)
        self._servers: dict[BaseSpec, BaseServer] = {}
        self._server_of: dict[str, BaseServer] = {}
        """By adapter key."""
        self._keys: dict[str, str] = {}
        """Task -> adapter key that answers new requests."""
        self._versions: dict[str, AdapterVersion] = {}
        """By adapter key."""
        self._broken: dict[str, str] = {}
        self._in_flight: Counter[str] = Counter()
        self._has_synced = False

    @property
    def is_ready(self) -> bool:
        """True once the champions of the first look at the registry are bound, canaries included."""
        return self._has_synced

    @property
    def broken(self) -> Mapping[str, str]:
        """`task@version` of champions that could not be bound, with the reason."""
        return self._broken

    def served(self) -> list[tuple[AdapterVersion, BoundAdapter, bool]]:
        """Version, adapter and residency of every task that answers."""
        rows = []
        for task in sorted(self._keys):
            key = self._keys[task]
            engine = self._server_of[key].engine
            rows.append((self._versions[key], engine.bound(key), key in engine.residents))
        return rows

    async def classify(
        self, task: str, items: Sequence[str | Mapping[str, str]]
    ) -> tuple[AdapterVersion, list[Answer]]:
        """Answer all items of one request with one adapter version.

        Raises UnknownTaskError, RequestError, DataError, CapacityError, AdapterError.
        """
        if not 1 <= len(items) <= self._config.max_inputs_per_request:
            raise RequestError(f"a request takes 1 to {self._config.max_inputs_per_request} inputs, this one has {len(items)}")
        key = route(task, self._keys, self._broken)
        server = self._server_of[key]
        if server.num_waiting + len(items) > self._config.max_queue_inputs:
            raise CapacityError(f"{server.num_waiting} inputs are waiting; retry in a second")
        version = self._versions[key]
        prompts = [server.engine.prompt(key, item) for item in items]
        self._in_flight[key] += 1
        try:
            answers = await asyncio.gather(*(server.submit(Work(key, prompt)) for prompt in prompts))
        finally:
            self._in_flight[key] -= 1
        return version, list(answers)

    async def follow(self) -> None:
        """Follow the champion aliases for ever; a registry that is away changes nothing."""
        while True:
            try:
                await self.sync()
            except MultiLoraError as error:
                logger.warning("registry unreadable error=%s", error)
            await asyncio.sleep(self._config.poll_s)

    async def sync(self) -> None:
        """Bring the served keys in line with the champions: bind new ones, swap, then let go of old ones."""
        champions = await asyncio.to_thread(self._registry.champions)
        wanted = {version.key: version for version in champions.values()}
        new = [version for key, version in wanted.items() if key not in self._versions and key not in self._broken]
        self._broken = {key: reason for key, reason in self._broken.items() if key in wanted}
        for version in new:
            try:
                await self._bind(version)
            except MultiLoraError as error:
                self._broken[version.key] = str(error)
                logger.error("champion not bound version=%s error=%s", version.key, error)
        for task in set(self._keys) - set(champions):
            del self._keys[task]
        self._has_synced = True
        for key in [key for key in self._versions if key not in self._keys.values() and not self._in_flight[key]]:
            self._server_of.pop(key).engine.unbind(key)
            del self._versions[key]

    async def close(self) -> None:
        """Stop all engines."""
        for server in self._servers.values():
            await server.close()

    async def _bind(self, version: AdapterVersion) -> None:
        folder = await asyncio.to_thread(self._registry.download, version, self._config.downloads_dir)
        artifact = await asyncio.to_thread(read_artifact, folder, version.digest)
        spec = artifact.card.base
        if spec not in self._servers:
            base = await asyncio.to_thread(load_base, spec)
            engine = await asyncio.to_thread(
                Engine, base, self._config.num_slots, self._config.max_rank, self._config.max_batch_tokens
            )
            self._servers[spec] = BaseServer(engine, self._config.max_batch_tokens)
        server = self._servers[spec]
        key = await asyncio.to_thread(server.engine.bind, artifact, version.version)
        self._server_of[key] = server
        self._versions[key] = version
        # From here on new requests of the task use the new version.
        self._keys[version.task] = key
        logger.info("champion bound version=%s digest=%s", key, version.digest[:12])
