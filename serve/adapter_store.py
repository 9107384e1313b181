"""Adapters in host memory: fetched, checked and bound when first asked for, once however many ask. No HTTP.

Registry -> host memory -> device slots: at most `num_host_adapters` are bound, the least recently used leave, one with
requests in flight stays. What leaves costs its next request a load from this machine's disk, canaries included.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import filelock

from multilora.artifact import read_artifact
from multilora.base_model import load_base
from multilora.errors import AdapterError
from multilora.registry import AdapterVersion, Registry
from multilora.spec import BaseSpec
from serve.base_server import BaseServer
from serve.config import ServeConfig
from serve.engine import BoundAdapter, Engine
from serve.metrics import Metrics

logger = logging.getLogger(__name__)

NUM_LOADS_AT_ONCE = 8


@dataclass(frozen=True)
class Failure:
    """Why a version could not be bound, and the loop time from which on it is worth another try."""

    reason: str
    retry_at: float


def reason_for_callers(error: Exception) -> str:
    """Why an adapter or a router cannot be bound: in its own words where it is to blame; others name this machine's paths."""
    if isinstance(error, AdapterError):
        return str(error)
    return f"it could not be fetched or loaded ({type(error).__name__}); the endpoint's log says why"


class AdapterStore:
    """Bound adapters of all bases. Belongs to one event loop."""

    def __init__(self, config: ServeConfig, registry: Registry, metrics: Metrics) -> None:
        self._config, self._registry, self._metrics = config, registry, metrics
        self._servers: dict[BaseSpec, asyncio.Task[BaseServer]] = {}
        self._bound: OrderedDict[str, BaseServer] = OrderedDict()
        """By adapter key (`task@version`), least recently used first."""
        self._loads: dict[str, asyncio.Task[BaseServer]] = {}
        self._num_users: Counter[str] = Counter()
        self._failures: dict[str, Failure] = {}
        self._slot_loads_told: Counter[str] = Counter()
        self._turnstile = asyncio.Semaphore(NUM_LOADS_AT_ONCE)
        self._loading_base = asyncio.Lock()

    @property
    def failures(self) -> Mapping[str, str]:
        """Keys that could not be bound, with the reason."""
        return {key: failure.reason for key, failure in self._failures.items()}

    @property
    def num_in_use(self) -> int:
        """Uses that have not ended."""
        return self._num_users.total()

    def servers(self) -> Sequence[BaseServer]:
        """Of every base that is loaded."""
        return [load.result() for load in self._servers.values() if load.done() and not load.exception()]

    def bound(self, key: str) -> tuple[BoundAdapter, bool] | None:
        """A bound adapter, and whether it sits in a device slot."""
        server = self._bound.get(key)
        return (server.engine.bound(key), key in server.engine.residents) if server else None

    def forget_failures(self, but: Collection[str]) -> None:
        """Forget why keys could not be bound that nobody asks for any more."""
        self._failures = {key: failure for key, failure in self._failures.items() if key in but}

    @asynccontextmanager
    async def using(self, version: AdapterVersion) -> AsyncIterator[BaseServer]:
        """Keep a version bound while it is used, binding it where it is not. Raises AdapterError as `bind` does."""
        self._num_users[version.key] += 1
        try:
            yield await self.bind(version)
        finally:
            self._num_users[version.key] -= 1
            if not self._num_users[version.key]:
                del self._num_users[version.key]

    async def bind(self, version: AdapterVersion) -> BaseServer:
        """Make a version answerable; the load goes on where the caller leaves. Raises AdapterError for one that cannot be."""
        key = version.key
        if key in self._bound:
            self._bound.move_to_end(key)
            return self._bound[key]
        failure = self._failures.get(key)
        if failure and asyncio.get_running_loop().time() < failure.retry_at:
            raise AdapterError(f"task {version.task} cannot answer now: {failure.reason}")
        if key not in self._loads:
            self._loads[key] = asyncio.create_task(self._load(version))
            self._loads[key].add_done_callback(lambda load: self._end_load(version, load))
        return await asyncio.shield(self._loads[key])

    def tell(self) -> None:
        """Tell the metrics how things stand."""
        on_host = Counter(id(server) for server in self._bound.values())
        for server in self.servers():
            engine, name = server.engine, server.engine.base.spec.model
            self._metrics.slot_loads.labels(name).inc(engine.num_slot_loads - self._slot_loads_told[name])
            self._slot_loads_told[name] = engine.num_slot_loads
            self._metrics.waiting.labels(name).set(server.num_waiting)
            self._metrics.adapters.labels(name, "device").set(len(engine.residents))
            self._metrics.adapters.labels(name, "host").set(on_host[id(server)])

    async def close(self) -> None:
        """Stop all engines."""
        for load in self._loads.values():
            load.cancel()
        for server in self.servers():
            await server.close()

    async def _load(self, version: AdapterVersion) -> BaseServer:
        loads = self._metrics.loads
        async with self._turnstile:
            try:
                with self._metrics.load_s.time():
                    server = await self._fetch_and_bind(version)
            except Exception as error:
                loads.labels(version.task, "failed").inc()
                # Files that do not fit stay so; a download, a base or a full device may come right.
                delay_s = math.inf if isinstance(error, AdapterError) else self._config.retry_s
                reason = reason_for_callers(error)
                self._failures[version.key] = Failure(reason, asyncio.get_running_loop().time() + delay_s)
                logger.error("not bound version=%s error=%r", version.key, error)
                raise AdapterError(f"task {version.task} cannot answer now: {reason}") from error
        loads.labels(version.task, "ok").inc()
        self._failures.pop(version.key, None)
        self._bound[version.key] = server
        self._evict()
        logger.info("bound version=%s digest=%s", version.key, version.digest[:12])
        return server

    def _end_load(self, version: AdapterVersion, load: asyncio.Task[BaseServer]) -> None:
        del self._loads[version.key]
        if not load.cancelled():
            load.exception()  # seen, also where every caller left

    async def _fetch_and_bind(self, version: AdapterVersion) -> BaseServer:
        try:
            return await self._bind_copy(version)
        except (AdapterError, OSError) as error:
            # This machine's copy may be damaged or gone where the registry's is well.
            logger.warning("copy looked at again version=%s error=%r", version.key, error)
            await asyncio.to_thread(self._repair, version)
            return await self._bind_copy(version)

    def _repair(self, version: AdapterVersion) -> None:
        """Fetch a version again where its copy on disk is not what was registered. Replicas share the copies: one at a time."""
        folder = self._config.downloads_dir
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".repair.lock"):
            try:
                read_artifact(self._registry.download(version, folder), version.digest)
            except (AdapterError, OSError):
                self._registry.discard_download(version, folder)
                self._registry.download(version, folder)

    async def _bind_copy(self, version: AdapterVersion) -> BaseServer:
        folder = await asyncio.to_thread(self._registry.download, version, self._config.downloads_dir)
        artifact = await asyncio.to_thread(read_artifact, folder, version.digest)
        if artifact.card.task != version.task:
            raise AdapterError(f"{version.key} holds an adapter of task {artifact.card.task}: register it under that name")
        server = await self._server(artifact.card.base)
        await asyncio.to_thread(server.engine.bind, artifact, version.version)
        return server

    async def _server(self, spec: BaseSpec) -> BaseServer:
        """The server of a base, which is loaded once; a load that failed is tried again."""
        if spec not in self._servers:
            self._servers[spec] = asyncio.create_task(self._load_base(spec))
        try:
            return await asyncio.shield(self._servers[spec])
        except Exception:
            self._servers.pop(spec, None)
            raise

    async def _load_base(self, spec: BaseSpec) -> BaseServer:
        config = self._config
        async with self._loading_base:  # transformers builds a model under settings of the whole process
            base = await asyncio.to_thread(load_base, spec)
        engine = await asyncio.to_thread(Engine, base, config.num_slots, config.max_rank, config.max_batch_tokens)
        return BaseServer(engine, config.max_batch_tokens, config.max_wait_s, self._metrics)

    def _evict(self) -> None:
        """Let the least recently used go; not the newest, which somebody is about to use."""
        idle = [key for key in list(self._bound)[:-1] if key not in self._num_users]
        for key in idle[: max(0, len(self._bound) - self._config.num_host_adapters)]:
            self._bound.pop(key).engine.unbind(key)
