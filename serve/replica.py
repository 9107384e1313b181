"""One copy of the server: follows the registry's champions, batches requests across tasks, and answers. No Ray, no HTTP.

An asyncio loop owns the queue; one thread per base owns the engine's forward passes; adapters load in other threads. A
promotion swaps the task's key at once: requests that came before it finish on the version they were queued for.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from multilora.artifact import read_artifact
from multilora.base_model import load_base
from multilora.errors import AdapterError, CapacityError, RequestError
from multilora.prompt import Prompt
from multilora.registry import AdapterVersion, Registry
from multilora.spec import BaseSpec
from serve.auto import AutoRouter, RoutedAnswer, routed_tasks
from serve.base_server import BaseServer
from serve.config import ServeConfig
from serve.engine import Answer, BoundAdapter, Engine, Work
from serve.router import route

logger = logging.getLogger(__name__)

LONG_CHARS = 10_000
"""A request with more text is tokenised off the event loop, which would stand still for more than 10 ms."""


@dataclass(frozen=True)
class Source:
    """Who answers a request: an adapter version, or the base alone where it was asked for by its own name."""

    server: BaseServer
    version: AdapterVersion | None
    """None is the base."""

    @property
    def bound(self) -> BoundAdapter | None:
        """The version's adapter."""
        return self.server.engine.bound(self.version.key) if self.version else None

    @property
    def digest(self) -> str:
        """sha256 of the adapter, or the base's fingerprint."""
        return self.version.digest if self.version else self.server.engine.base.files.fingerprint


class Replica:
    """Every task's champion, one engine per base."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._registry = Registry(config.tracking_uri)
        self._auto = AutoRouter(config, self._registry)
        self._servers: dict[BaseSpec, BaseServer] = {}
        self._server_of: dict[str, BaseServer] = {}
        """By adapter key."""
        self._keys: dict[str, str] = {}
        """Task -> adapter key that answers new requests."""
        self._versions: dict[str, AdapterVersion] = {}
        """By adapter key."""
        self._broken: dict[str, str] = {}
        self._retry_at: dict[str, float] = {}
        """Broken key -> loop time of the next try."""
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

    def sources(self) -> dict[str, Source]:
        """Who answers, by name: every task, then the bases that write texts by themselves."""
        tasks = {task: Source(self._server_of[key], self._versions[key]) for task, key in sorted(self._keys.items())}
        bases = {name: Source(server, None) for name, server in self.bases().items()}
        return tasks | {name: source for name, source in bases.items() if source.server.engine.base.family != "encoder"}

    async def classify(self, task: str, items: Sequence[str | Mapping[str, str]]) -> tuple[AdapterVersion, list[Answer]]:
        """Answer all items of one request with one of the task's labels each, by one adapter version.

        Raises UnknownTaskError, RequestError, DataError, CapacityError, AdapterError.
        """
        return await self._answers(task, items, is_text=False)

    async def generate(self, task: str, items: Sequence[str | Mapping[str, str]]) -> tuple[AdapterVersion, list[Answer]]:
        """Answer all items of one request with a text each, by one adapter version. Raises as `classify` does."""
        return await self._answers(task, items, is_text=True)

    async def classify_auto(
        self, items: Sequence[str | Mapping[str, str]], opens: Callable[[str], bool]
    ) -> tuple[AdapterVersion, list[RoutedAnswer]]:
        """Let the router choose a task that `opens` for each item, and the task answer; the version is the router's.

        Raises UnroutedError where it abstains on any of them, and as `classify` does.
        """
        self._check_number(items)
        router, choices = await self._auto.route(items, lambda task, item: opens(task) and self._takes(task, item))
        places: dict[str, list[int]] = {}
        for place, task in enumerate(routed_tasks(choices)):
            places.setdefault(task, []).append(place)
        answered = await asyncio.gather(*(self.classify(task, [items[i] for i in some]) for task, some in places.items()))
        found: dict[int, RoutedAnswer] = {}
        for some, (version, answers) in zip(places.values(), answered, strict=True):
            found |= {i: RoutedAnswer(choices[i], version, answer) for i, answer in zip(some, answers, strict=True)}
        return router, [found[place] for place in range(len(items))]

    def _takes(self, task: str, item: str | Mapping[str, str]) -> bool:
        """Whether a task is served, answers with labels, and has the item's columns."""
        key = self._keys.get(task)
        bound = self._server_of[key].engine.bound(key) if key else None
        return bound is not None and not bound.max_new_tokens and bound.prompt_format.takes(item)

    def _check_number(self, items: Sequence[object]) -> None:
        if not 1 <= len(items) <= self._config.max_inputs_per_request:
            raise RequestError(f"a request takes 1 to {self._config.max_inputs_per_request} inputs, this one has {len(items)}")

    async def _answers(
        self, task: str, items: Sequence[str | Mapping[str, str]], *, is_text: bool
    ) -> tuple[AdapterVersion, list[Answer]]:
        self._check_number(items)
        key = route(task, self._keys, self._broken)
        server, version = self._server_of[key], self._versions[key]
        if is_text != bool(server.engine.bound(key).max_new_tokens):
            answers_with, path = ("labels", "/v1/classify") if is_text else ("free text", "/v1/generate")
            raise RequestError(f"task {task} answers with {answers_with}: ask POST {path}")
        futures: list[asyncio.Future[Answer]] = []
        # Counted from here on, so that the version stays bound until the last answer.
        self._in_flight[key] += 1
        try:
            prompts = await _prompts(server.engine, key, items)
            if server.num_waiting + len(items) > self._config.max_queue_inputs:
                raise CapacityError(f"{server.num_waiting} inputs are waiting; retry in a second")
            futures = [server.submit(Work(key, prompt)) for prompt in prompts]
            return version, list(await asyncio.gather(*futures))
        finally:
            self._in_flight[key] -= 1
            # Where one failed or the caller left, the rest need not be computed; done futures stay as they are.
            for future in futures:
                future.cancel()

    @asynccontextmanager
    async def holding(self, model: str) -> AsyncIterator[Source]:
        """Find who answers new requests of a task, or of a base's own name, and keep it bound for as long as it is asked.

        Raises UnknownTaskError, AdapterError.
        """
        base = self.bases().get(model)
        if base is not None:
            yield Source(base, None)
            return
        key = route(model, self._keys, self._broken)
        self._in_flight[key] += 1
        try:
            yield Source(self._server_of[key], self._versions[key])
        finally:
            self._in_flight[key] -= 1

    def bases(self) -> dict[str, BaseServer]:
        """Bases that can be asked by their own name: what has no slash could be a task's, and is never taken for a base's."""
        return {spec.model: server for spec, server in reversed(self._servers.items()) if "/" in spec.model}

    def check_room(self, server: BaseServer, num_inputs: int) -> None:
        """Raises RequestError for too many inputs in a request, CapacityError for too many that wait."""
        if not 1 <= num_inputs <= self._config.max_inputs_per_request:
            raise RequestError(f"a request takes 1 to {self._config.max_inputs_per_request} inputs, this one has {num_inputs}")
        if server.num_waiting + num_inputs > self._config.max_queue_inputs:
            raise CapacityError(f"{server.num_waiting} inputs are waiting; retry in a second")

    @property
    def max_base_tokens(self) -> int:
        """Most tokens of a text that a base writes by itself."""
        return self._config.max_base_tokens

    async def follow(self) -> None:
        """Follow the champion aliases for ever; a registry that is away changes nothing."""
        while True:
            try:
                await self.sync()
            except Exception as error:  # noqa: BLE001  what is bound goes on answering, whatever the registry's client raises
                logger.warning("registry unreadable error=%r", error)
            await asyncio.sleep(self._config.poll_s)

    async def sync(self) -> None:
        """Bring the served keys in line with the champions: bind new ones, swap, then let go of old ones."""
        champions = await asyncio.to_thread(self._registry.champions)
        wanted = {version.key: version for version in champions.values()}
        self._broken = {key: reason for key, reason in self._broken.items() if key in wanted}
        self._retry_at = {key: at for key, at in self._retry_at.items() if key in wanted}
        for key, version in wanted.items():
            if key in self._versions:
                # Also a roll back to a version that still has requests to finish.
                self._keys[version.task] = key
            elif asyncio.get_running_loop().time() >= self._retry_at.get(key, -math.inf):
                await self._try_to_bind(version)
        for task in set(self._keys) - set(champions):
            del self._keys[task]
        await self._auto.refresh([server.engine for server in self._servers.values()])
        self._has_synced = True
        for key in [key for key in self._versions if key not in self._keys.values() and not self._in_flight[key]]:
            del self._versions[key], self._in_flight[key]
            # Waits for the running forward pass, which the event loop must not.
            await asyncio.to_thread(self._server_of.pop(key).engine.unbind, key)

    async def close(self) -> None:
        """Stop all engines."""
        for server in self._servers.values():
            await server.close()

    async def _try_to_bind(self, version: AdapterVersion) -> None:
        key = version.key
        try:
            await self._bind(version)
        except Exception as error:  # noqa: BLE001  one champion that cannot be bound must not keep the others from being bound
            # Files that do not fit stay so; a download, a base or a full device may come right.
            delay_s = math.inf if isinstance(error, AdapterError) else self._config.retry_s
            self._retry_at[key] = asyncio.get_running_loop().time() + delay_s
            self._broken[key] = str(error) or type(error).__name__
            logger.error("champion not bound version=%s error=%r", key, error)
        else:
            self._broken.pop(key, None)
            self._retry_at.pop(key, None)

    async def _bind(self, version: AdapterVersion) -> None:
        folder = await asyncio.to_thread(self._registry.download, version, self._config.downloads_dir)
        artifact = await asyncio.to_thread(read_artifact, folder, version.digest)
        if artifact.card.task != version.task:
            raise AdapterError(f"{version.key} holds an adapter of task {artifact.card.task}: register it under that name")
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


async def _prompts(engine: Engine, key: str, items: Sequence[str | Mapping[str, str]]) -> list[Prompt]:
    num_chars = sum(len(item) if isinstance(item, str) else sum(map(len, item.values())) for item in items)
    if num_chars <= LONG_CHARS:
        return [engine.prompt(key, item) for item in items]
    return await asyncio.to_thread(lambda: [engine.prompt(key, item) for item in items])
