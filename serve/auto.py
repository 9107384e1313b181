"""Follows the router's champion and says which task each text belongs to, or that it is not sure. No Ray, no HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from multilora.errors import AdapterError, CapacityError, UnknownTaskError, UnroutedError
from multilora.registry import CHAMPION, ROUTER, AdapterVersion, Registry
from multilora.task_router import TaskRouter, read_router, routed_to, text_of
from serve.adapter_store import reason_for_callers
from serve.answer import Answer
from serve.config import ServeConfig
from serve.engine import Engine

logger = logging.getLogger(__name__)

Item = str | Mapping[str, str]
NUM_SHOWN = 3
"""Inputs and candidates that a message names; the body has all."""
CanAnswer = Callable[[str, Item], bool]
"""Whether a task may answer an input: it is served, takes such an input, and the caller's key opens it."""


@dataclass(frozen=True)
class RouteChoice:
    """Where one input goes."""

    task: str | None
    """None where the router abstains."""
    candidates: Mapping[str, float]
    """Probability of every task that may answer, most probable first; of all tasks of the router they need not add up to 1."""

    @property
    def probability(self) -> float:
        """Of the most probable candidate; 0 where there is none."""
        return max(self.candidates.values(), default=0.0)


@dataclass(frozen=True)
class RoutedAnswer:
    """The answer to one input, and who gave it."""

    choice: RouteChoice
    version: AdapterVersion
    answer: Answer


@dataclass(frozen=True)
class BoundRouter:
    """A router that passed every check, over the engine whose base it reads."""

    version: AdapterVersion
    router: TaskRouter
    engine: Engine


class AutoRouter:
    """The router's champion, bound to a base that is loaded for some task anyway."""

    def __init__(self, config: ServeConfig, registry: Registry) -> None:
        self._config, self._registry = config, registry
        self._bound: BoundRouter | None = None
        self._broken, self._retry_at = "", -math.inf
        self._tried: AdapterVersion | None = None
        self._num_routing = 0

    async def refresh(self, engines: Sequence[Engine]) -> None:
        """Bring the bound router in line with the champion alias and the loaded bases; one that was good goes on meanwhile."""
        version = await asyncio.to_thread(self._registry.by_alias, ROUTER, CHAMPION)
        if self._bound and (version is None or all(self._bound.engine is not engine for engine in engines)):
            self._bound = None
        is_new, self._tried = version != self._tried, version
        now = asyncio.get_running_loop().time()
        if version is None or (self._bound and self._bound.version == version):
            self._broken = ""
        elif is_new or now >= self._retry_at:
            try:
                self._bound = await asyncio.to_thread(self._bind, version, engines)
            except Exception as error:  # noqa: BLE001  a router that cannot be bound must not keep the tasks from being followed
                self._retry_at = now + self._config.retry_s
                self._broken = reason_for_callers(error)
                logger.error("router not bound version=%s error=%r", version.key, error)
            else:
                self._broken = ""
                logger.info("router bound version=%s digest=%s", version.key, version.digest[:12])

    async def route(self, items: Sequence[Item], can_answer: CanAnswer) -> tuple[AdapterVersion, list[RouteChoice]]:
        """Choose a task for each input among those that may answer it.

        Probabilities are of all tasks of the router: where the most probable one may not answer, no other one does.
        Raises UnknownTaskError without a router, AdapterError for a broken one, CapacityError where too many inputs wait.
        """
        bound = self._bound
        if bound is None and self._broken:
            raise AdapterError(f"model {ROUTER} cannot answer now: {self._broken}")
        if bound is None:
            raise UnknownTaskError(
                f"there is no router yet, so model {ROUTER} answers nothing: orchestrator router train tasks/*.yaml"
            )
        if self._num_routing + len(items) > self._config.max_queue_inputs:
            raise CapacityError(f"{self._num_routing} inputs are waiting; retry in a second")
        self._num_routing += len(items)
        try:
            texts = [text_of(item) for item in items]
            rows = await asyncio.to_thread(bound.router.probabilities, texts, bound.engine.embed)
        finally:
            self._num_routing -= len(items)
        threshold = bound.router.card.threshold
        return bound.version, [_choice(item, row, threshold, can_answer) for item, row in zip(items, rows, strict=True)]

    def _bind(self, version: AdapterVersion, engines: Sequence[Engine]) -> BoundRouter:
        folder = self._registry.download(version, self._config.downloads_dir)
        router = read_router(folder, version.digest)
        fingerprint = router.card.base_fingerprint
        engine = next((engine for engine in engines if engine.base.files.fingerprint == fingerprint), None)
        if engine is None:
            raise AdapterError(
                f"the router reads base {router.card.base.model} with fingerprint {fingerprint[:12]}, which no served task has: "
                "promote a task over it, or train the router again"
            )
        router.check_base(fingerprint, engine.embed)
        return BoundRouter(version, router, engine)


def _choice(item: Item, probabilities: Mapping[str, float], threshold: float, can_answer: CanAnswer) -> RouteChoice:
    ranked = sorted(probabilities, key=lambda task: -probabilities[task])
    candidates = {task: probabilities[task] for task in ranked if can_answer(task, item)}
    best = routed_to(probabilities, threshold)
    return RouteChoice(best if best in candidates else None, candidates)


def routed_tasks(choices: Sequence[RouteChoice]) -> list[str]:
    """The task of each input. Raises UnroutedError, which lists every input's candidates, where any has none."""
    tasks = [choice.task for choice in choices if choice.task]
    if len(tasks) == len(choices):
        return tasks
    said: list[str] = []
    for number, choice in enumerate(choices, start=1):
        if choice.task is None and len(said) < NUM_SHOWN:
            shown = ", ".join(f"{task} {p:.2f}" for task, p in list(choice.candidates.items())[:NUM_SHOWN])
            said.append(f"input {number}: {shown or 'no task that may answer'}")
    error = UnroutedError(
        f"the router is not sure of {len(choices) - len(tasks)} of {len(choices)} inputs ({'; '.join(said)}); name a task"
    )
    error.routes = [(choice.task is not None, choice.probability, choice.candidates) for choice in choices]
    raise error
