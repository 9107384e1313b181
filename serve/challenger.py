"""Challengers beside their champions: some answer a share of a task's requests, others answer in shadow, after the caller.

Whatever a challenger does, the caller gets an answer: where it is missing, broken or fails, the champion answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from multilora.errors import AdapterError, CapacityError
from multilora.registry import CHALLENGER, AdapterVersion, Registry
from serve.adapter_store import AdapterStore
from serve.answer import Answer
from serve.config import ServeConfig
from serve.live_counts import LiveCounts, Mode, Pair, PairCounts, SideCounts, table_key
from serve.router import is_in_share

logger = logging.getLogger(__name__)

MAX_SHADOW_INPUTS = 512
"""Inputs that may wait for a challenger in shadow; more are dropped."""
NUM_SHADOW_INPUTS_AT_ONCE = 16
"""So few that whoever comes meanwhile hardly waits."""

Item = str | Mapping[str, str]
Answered = tuple[AdapterVersion, list[Answer]]
Ask = Callable[[str, Sequence[Item]], Awaitable[Answered]]
"""Asks a task or `task@version`."""


@dataclass(frozen=True)
class Shadow:
    """A request that its champion has answered."""

    pair: Pair
    challenger: AdapterVersion
    items: Sequence[Item]
    answers: Sequence[Answer]
    """The champion's."""
    seconds: float
    """How long the champion took."""
    abstain_below: float | None
    ask: Ask


class Challengers:
    """The challengers of the tasks that are to have one. Belongs to one event loop."""

    def __init__(self, config: ServeConfig, registry: Registry, store: AdapterStore) -> None:
        self._config, self._registry, self._store = config, registry, store
        self._bound: dict[str, AdapterVersion] = {}
        """By task, those that may be asked."""
        self._wanted: dict[str, AdapterVersion] = {}
        """By task, what the alias points to."""
        self._counts = LiveCounts(config.live_dir)
        self._shadows: asyncio.Queue[Shadow] = asyncio.Queue()
        self._num_shadow_inputs = 0
        self._working: asyncio.Task[None] | None = None

    @property
    def keys(self) -> set[str]:
        """`task@version` of those that are followed."""
        return {version.key for version in self._wanted.values()}

    @property
    def missing(self) -> dict[str, str]:
        """Tasks that have no challenger to be compared with, as `task@challenger`, with the reason."""
        tasks = self._config.challengers.keys() - self._wanted.keys()
        return {f"{task}@{CHALLENGER}": "no version is the challenger; the champion answers everything" for task in sorted(tasks)}

    def version(self, task: str) -> AdapterVersion | None:
        """A task's challenger, where it may be asked."""
        return self._bound.get(task)

    async def follow(self) -> None:
        """Bring the challengers in line with the registry; each is bound before it is asked anything."""
        for task in self._config.challengers:
            version = await asyncio.to_thread(self._registry.by_alias, task, CHALLENGER)
            if version is None or version != self._bound.get(task):
                self._bound.pop(task, None)
            if version is None:
                self._wanted.pop(task, None)
                continue
            self._wanted[task] = version
            try:
                await self._store.bind(version)
            except AdapterError:  # the store says why
                self._bound.pop(task, None)
            else:
                self._bound[task] = version

    async def answer(
        self, champion: AdapterVersion | None, model: str, items: Sequence[Item], ask: Ask, abstain_below: float | None
    ) -> Answered:
        """Have a request answered by the task's champion or, where it is in its share, by the challenger; and count it.

        `champion` is None for a `model` that is no task, which is asked as it is.
        """
        challenger = self._bound.get(model)
        if champion is None or challenger is None or challenger.version == champion.version:
            return await ask(model, items)
        role, clock = self._config.challengers[model], asyncio.get_running_loop().time
        mode: Mode = "shadow" if role == "shadow" else "canary"
        failure: Exception | None = None
        started = clock()
        if role != "shadow" and is_in_share(model, items, role):
            try:
                answered = await ask(challenger.key, items)
            except CapacityError:
                raise
            except Exception as error:  # noqa: BLE001  whatever it is, the champion shall answer
                failure = error
            else:
                counts = self._counts.of(Pair(model, champion.version, challenger.version, mode))
                _count(counts.challenger, answered[1], clock() - started, abstain_below)
                return answered
        started = clock()
        version, answers = await ask(model, items)
        pair = Pair(model, version.version, challenger.version, mode)
        if mode == "shadow":
            self._add_shadow(Shadow(pair, challenger, items, answers, clock() - started, abstain_below, ask))
        else:
            _count(self._counts.of(pair).champion, answers, clock() - started, abstain_below)
        if failure:
            self._count_failure(pair, failure)
        return version, answers

    async def save(self) -> None:
        """Write the counts, every few seconds at most."""
        await self._counts.save()

    async def close(self) -> None:
        """Stop asking in shadow, and write the counts."""
        if self._working:
            self._working.cancel()
        await self._counts.save(at_once=True)

    def _add_shadow(self, shadow: Shadow) -> None:
        if self._num_shadow_inputs + len(shadow.items) > MAX_SHADOW_INPUTS:
            self._counts.of(shadow.pair).num_dropped += len(shadow.items)
            return
        self._num_shadow_inputs += len(shadow.items)
        self._shadows.put_nowait(shadow)
        if self._working is None:
            self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Ask challengers what their champions have answered, one request after another, for ever."""
        while True:
            shadow = await self._shadows.get()
            try:
                if self._bound.get(shadow.pair.task) == shadow.challenger:
                    await self._compare(shadow)
            except Exception as error:  # noqa: BLE001  one shadow's failure must not end the others
                self._count_failure(shadow.pair, error)
            finally:
                self._num_shadow_inputs -= len(shadow.items)

    async def _compare(self, shadow: Shadow) -> None:
        answers, seconds, clock = list[Answer](), 0.0, asyncio.get_running_loop().time
        for first in range(0, len(shadow.items), NUM_SHADOW_INPUTS_AT_ONCE):
            while busy := [server for server in self._store.servers() if server.is_busy]:
                await busy[0].wait_until_idle()
            started = clock()
            async with asyncio.timeout(self._config.deadline_s):
                _, found = await shadow.ask(shadow.challenger.key, shadow.items[first : first + NUM_SHADOW_INPUTS_AT_ONCE])
            answers += found
            seconds += clock() - started
        counts = self._counts.of(shadow.pair)
        _count(counts.champion, shadow.answers, shadow.seconds, shadow.abstain_below)
        _count(counts.challenger, answers, seconds, shadow.abstain_below)
        for old, new in zip(shadow.answers, answers, strict=True):
            _count_pair(counts, old, new)

    def _count_failure(self, pair: Pair, error: Exception) -> None:
        self._counts.of(pair).num_errors += 1
        logger.warning("challenger failed version=%s@%d error=%r", pair.task, pair.challenger, error)


def _count(side: SideCounts, answers: Sequence[Answer], seconds: float, abstain_below: float | None) -> None:
    side.num_requests += 1
    side.seconds += seconds
    for answer in answers:
        probability = _probability(answer, answer.label)
        is_abstained = abstain_below is not None and probability is not None and probability < abstain_below
        side.count_input(answer.label, probability, is_abstained=is_abstained)


def _count_pair(counts: PairCounts, old: Answer, new: Answer) -> None:
    counts.num_agreed += old.label == new.label
    before, now = _probability(old, old.label), _probability(new, old.label)
    if before is not None and now is not None:
        counts.difference += abs(before - now)
        counts.table[table_key(old.label, new.label)] += 1


def _probability(answer: Answer, label: str) -> float | None:
    """Of a label, 0 for one that the answer's version does not know; None of a free text."""
    return dict(zip(answer.labels, answer.probabilities, strict=True)).get(label, 0.0) if answer.labels else None
