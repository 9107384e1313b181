"""One copy of the server: follows the registry's champions, batches requests across tasks, and answers. No Ray, no HTTP.

An asyncio loop owns the queue; one thread per base owns the engine's forward passes; adapters load in other threads. A
promotion swaps the task's version at once: requests that came before it finish on the version they were queued for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from multilora.errors import AdapterError, CapacityError, DeadlineError, RequestError, TooLargeError, WrongRouteError
from multilora.prompt import Prompt
from multilora.registry import ROUTER, AdapterVersion, Registry
from serve.adapter_store import AdapterStore
from serve.auto import AutoRouter, RoutedAnswer, routed_tasks
from serve.base_server import BaseServer
from serve.challenger import Challengers
from serve.config import ServeConfig
from serve.engine import Answer, BoundAdapter, Engine, Work
from serve.metrics import OTHER, Metrics
from serve.router import pinned, task_of, unknown_task

logger = logging.getLogger(__name__)

LONG_CHARS = 10_000
"""A request with more text is tokenised off the event loop, which would stand still for more than 10 ms."""
NUM_PINS = 1024
"""Versions that were asked for by number and are remembered."""
SHARE_OF_TIME = 0.2
"""Most of the time that looking at the registry may take; it holds the interpreter, which answers need."""

Item = str | Mapping[str, str]


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
        self.metrics = Metrics()
        self._store = AdapterStore(config, self._registry, self.metrics)
        self._auto = AutoRouter(config, self._registry)
        self._challengers = Challengers(config, self._registry, self._store)
        self._champions: dict[str, AdapterVersion] = {}
        """Task -> version that answers new requests; a broken one only where the task has no good one."""
        self._pins: OrderedDict[str, AdapterVersion] = OrderedDict()
        """By `task@version`, least recently used first."""
        self._look_s = 0.0
        self._has_synced = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """True once the champions of the first look at the registry are bound, canaries included."""
        return self._has_synced.is_set()

    async def wait_until_ready(self) -> None:
        """Wait until the champions are bound."""
        await self._has_synced.wait()

    @property
    def broken(self) -> Mapping[str, str]:
        """`task@version` of champions and challengers that could not be bound, with the reason."""
        return {**self._store.failures, **self._challengers.missing}

    @property
    def deadline_s(self) -> float:
        """How long a request may take."""
        return self._config.deadline_s

    @property
    def max_base_tokens(self) -> int:
        """Most tokens of a text that a base writes by itself."""
        return self._config.max_base_tokens

    def task_label(self, model: str) -> str:
        """The name under which the metrics count a request: a task or base that is served, or OTHER."""
        name = task_of(model).partition(":")[0]  # the router's requests are `auto:TASK,TASK`
        return name if name in self._champions or name == ROUTER or name in self.bases() else OTHER

    def served(self) -> list[AdapterVersion]:
        """The version of every task that answers."""
        broken = self.broken
        return [version for _, version in sorted(self._champions.items()) if version.key not in broken]

    def bound(self, version: AdapterVersion) -> tuple[BoundAdapter, bool] | None:
        """A version's adapter, and whether it sits in a device slot; None where it is not in host memory."""
        return self._store.bound(version.key)

    def has_challenger(self, model: str) -> bool:
        """Whether a task's challenger may be asked."""
        return self._challengers.version(model) is not None

    def bases(self) -> dict[str, BaseServer]:
        """Bases that can be asked by their own name: what has no slash could be a task's, and is never taken for a base's."""
        specs = [(server.engine.base.spec.model, server) for server in self._store.servers()]
        return {name: server for name, server in reversed(specs) if "/" in name}

    def writing_bases(self) -> dict[str, BaseServer]:
        """Those that write texts by themselves."""
        return {name: server for name, server in self.bases().items() if server.engine.base.family != "encoder"}

    @asynccontextmanager
    async def holding(self, model: str) -> AsyncIterator[Source]:
        """Find who answers for a task, `task@version` or a base's own name, and keep it bound for as long as it is asked.

        Raises UnknownTaskError, AdapterError, RegistryError.
        """
        base = self.bases().get(model)
        if base is not None:
            yield Source(base, None)
            return
        version = await self._version(model)
        async with self._store.using(version) as server:
            yield Source(server, version)

    def check_room(self, server: BaseServer, num_inputs: int) -> None:
        """Raises RequestError for too many inputs in a request, CapacityError for too many that wait."""
        self._check_number(num_inputs)
        if server.num_waiting + num_inputs > self._config.max_queue_inputs:
            raise CapacityError(f"{server.num_waiting} inputs are waiting; retry in a second")

    async def classify(
        self, model: str, items: Sequence[Item], *, may_truncate: bool = False, abstain_below: float | None = None
    ) -> tuple[AdapterVersion, list[Answer]]:
        """Answer all items of one request with one of the task's labels each, by one adapter version.

        `model` is a task or `task@version`; `abstain_below` is for the counts alone. Raises UnknownTaskError, RequestError,
        DataError, CapacityError, AdapterError, DeadlineError, and TooLargeError for an item that does not fit unless it may
        be truncated.
        """
        return await self._answers(model, items, abstain_below, is_text=False, may_truncate=may_truncate)

    async def generate(
        self, model: str, items: Sequence[Item], *, may_truncate: bool = False
    ) -> tuple[AdapterVersion, list[Answer]]:
        """Answer all items of one request with a text each, by one adapter version. Raises as `classify` does."""
        return await self._answers(model, items, None, is_text=True, may_truncate=may_truncate)

    async def classify_auto(
        self,
        items: Sequence[Item],
        opens: Callable[[str], bool],
        *,
        may_truncate: bool = False,
        abstain_below: float | None = None,
    ) -> tuple[AdapterVersion, list[RoutedAnswer]]:
        """Let the router choose a task that `opens` for each item, and the task answer; the version is the router's.

        Raises UnroutedError where it abstains on any of them, and as `classify` does.
        """
        self._check_number(len(items))
        router, choices = await self._auto.route(items, lambda task, item: opens(task) and self._takes(task, item))
        places: dict[str, list[int]] = {}
        for place, task in enumerate(routed_tasks(choices)):
            places.setdefault(task, []).append(place)
        answered = await asyncio.gather(
            *(
                self.classify(task, [items[i] for i in some], may_truncate=may_truncate, abstain_below=abstain_below)
                for task, some in places.items()
            )
        )
        found: dict[int, RoutedAnswer] = {}
        for some, (version, answers) in zip(places.values(), answered, strict=True):
            found |= {i: RoutedAnswer(choices[i], version, answer) for i, answer in zip(some, answers, strict=True)}
        return router, [found[place] for place in range(len(items))]

    async def follow(self) -> None:
        """Follow the aliases for ever; a registry that is away changes nothing."""
        while True:
            await self._challengers.save()
            try:
                await self.sync()
            except Exception as error:  # noqa: BLE001  what is bound goes on answering, whatever the registry's client raises
                logger.warning("registry unreadable error=%r", error)
            await asyncio.sleep(max(self._config.poll_s, self._look_s * (1 / SHARE_OF_TIME - 1)))

    async def sync(self) -> None:
        """Bring what answers in line with the champions. A promoted version is bound before the task's requests go to it."""
        clock = asyncio.get_running_loop().time
        started = clock()
        champions = await asyncio.to_thread(self._registry.champions, dict(self._champions))
        self._look_s = clock() - started  # what is loaded after it does not count
        changed = [version for task, version in champions.items() if self._champions.get(task) != version]
        # More than host memory holds need not be bound before the first request; a promotion must prove itself now.
        num_eager = len(changed) if self.is_ready else self._config.num_host_adapters
        self._champions |= {version.task: version for version in changed[num_eager:]}
        await asyncio.gather(*(self._promote(version) for version in changed[:num_eager]))
        for task in set(self._champions) - set(champions):
            del self._champions[task]
        await self._challengers.follow()
        self._store.forget_failures({version.key for version in champions.values()} | self._challengers.keys)
        await self._auto.refresh([server.engine for server in self._store.servers()])
        self._store.tell()
        self._has_synced.set()

    async def close(self) -> None:
        """Stop all engines."""
        await self._challengers.close()
        await self._store.close()

    async def _promote(self, version: AdapterVersion) -> None:
        try:
            await self._store.bind(version)
        except AdapterError:
            before = self._champions.get(version.task)
            if before is not None and before.key not in self.broken:
                return  # the good version goes on answering
        self._champions[version.task] = version

    async def _answers(
        self, model: str, items: Sequence[Item], abstain_below: float | None, *, is_text: bool, may_truncate: bool
    ) -> tuple[AdapterVersion, list[Answer]]:
        self._check_number(len(items))

        async def ask(asked: str, some: Sequence[Item]) -> tuple[AdapterVersion, list[Answer]]:
            return await self._answers_of(asked, some, is_text=is_text, may_truncate=may_truncate)

        async with in_time(self.deadline_s):
            return await self._challengers.answer(self._champions.get(model), model, items, ask, abstain_below)

    async def _answers_of(
        self, model: str, items: Sequence[Item], *, is_text: bool, may_truncate: bool
    ) -> tuple[AdapterVersion, list[Answer]]:
        async with self.holding(model) as source:
            bound, version, server = source.bound, source.version, source.server
            if bound is None or version is None:
                raise WrongRouteError(f"{model} is a base, which has no task: ask POST /v1/completions")
            if is_text != bool(bound.max_new_tokens):
                answers_with, path = ("labels", "/v1/classify") if is_text else ("free text", "/v1/generate")
                raise WrongRouteError(f"task {version.task} answers with {answers_with}: ask POST {path}")
            self.check_room(server, len(items))
            prompts = await _prompts(server.engine, version.key, items)
            if not may_truncate:
                check_lengths(prompts, bound)
            futures = [server.submit(Work(version.key, prompt)) for prompt in prompts]
            try:
                return version, list(await asyncio.gather(*futures))
            finally:
                # Where one failed or the caller left, the rest need not be computed; done futures stay as they are.
                for future in futures:
                    future.cancel()

    async def _version(self, model: str) -> AdapterVersion:
        """The version that a model names. Raises UnknownTaskError."""
        if model in self._champions:
            return self._champions[model]
        pin = pinned(model)
        current = (self._champions.get(pin[0]), self._challengers.version(pin[0])) if pin else ()
        for known in current:
            if known and known.key == model:
                return known
        version = self._pins.get(model)
        if version is None and pin:
            version = await asyncio.to_thread(self._registry.version, *pin)
        if version is None:
            raise unknown_task(model, self._champions)
        self._pins[model] = version
        self._pins.move_to_end(model)
        if len(self._pins) > NUM_PINS:
            self._pins.popitem(last=False)
        return version

    def _takes(self, task: str, item: Item) -> bool:
        """Whether a task is served, answers with labels, and has the item's columns, as far as is known."""
        version = self._champions.get(task)
        if version is None or version.key in self.broken:
            return False
        known = self._store.bound(version.key)
        return known is None or (not known[0].max_new_tokens and known[0].prompt_format.takes(item))

    def _check_number(self, num_inputs: int) -> None:
        if not 1 <= num_inputs <= self._config.max_inputs_per_request:
            raise RequestError(f"a request takes 1 to {self._config.max_inputs_per_request} inputs, this one has {num_inputs}")


@asynccontextmanager
async def in_time(deadline_s: float) -> AsyncIterator[None]:
    """Raise DeadlineError where the block takes longer."""
    try:
        async with asyncio.timeout(deadline_s) as deadline:
            yield
    except TimeoutError as late:
        if not deadline.expired():
            raise
        raise DeadlineError(f"no answer within {deadline_s:g} s; send fewer inputs, or come again") from late


async def _prompts(engine: Engine, key: str, items: Sequence[Item]) -> list[Prompt]:
    num_chars = sum(len(item) if isinstance(item, str) else sum(map(len, item.values())) for item in items)
    if num_chars <= LONG_CHARS:
        return [engine.prompt(key, item) for item in items]
    return await asyncio.to_thread(lambda: [engine.prompt(key, item) for item in items])


def check_lengths(prompts: Sequence[Prompt], bound: BoundAdapter) -> None:
    """Raise TooLargeError where an input was cut to fit."""
    cut = [str(number) for number, prompt in enumerate(prompts, start=1) if prompt.is_truncated]
    if cut:
        what = f"input {', '.join(cut[:10])}" if len(prompts) > 1 else "the input"
        raise TooLargeError(
            f"{what} does not fit the task's max_length of {bound.prompt_format.max_length_tokens} tokens; "
            "shorten it, or send truncate: true to /v1/classify or /v1/generate to have its end left out"
        )
