"""Routes that say what answers here: tasks with their versions, and bases under their own names; also for OpenAI's clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypedDict

from fastapi import FastAPI, Request

from multilora.registry import AdapterVersion
from serve.base_server import BaseServer
from serve.engine import BoundAdapter
from serve.error_table import RESPONSES
from serve.replica import Replica
from serve.router import task_of
from serve.schema import ModelInfo, ModelList


class Judgement(TypedDict):
    """What the gate found, as the version's tags tell it."""

    verdict: str | None
    accuracy: float | None
    num_gate_examples: int | None


def add_models_routes(app: FastAPI, replica: Replica) -> None:
    """Add the routes to a replica's application."""

    @app.get("/v1/models", responses=RESPONSES)
    async def models(request: Request) -> ModelList:
        """List tasks and bases that answer, and champions that could not be bound; of these, what the key opens."""
        opens = opens_of(request)
        tasks = [task_info(version, replica.bound(version)) for version in replica.served() if opens(version.task)]
        bases = [base_info(name, server) for name, server in replica.writing_bases().items() if opens(name)]
        broken = {key: reason for key, reason in replica.broken.items() if opens(key.partition("@")[0])}
        return ModelList(data=tasks + bases, broken=broken)

    @app.get("/v1/models/{model:path}", responses=RESPONSES)
    async def model_of(request: Request, model: str) -> ModelInfo:
        """Say what a task, one version of it, or a base is; an adapter that is in the registry alone is fetched for it."""
        if request.state.key is not None:
            request.state.key.check_task(task_of(model))
        async with replica.holding(model) as source:
            if source.version is None:
                return base_info(model, source.server)
            return task_info(source.version, replica.bound(source.version))


def opens_of(request: Request) -> Callable[[str], bool]:
    """Whether the request's key opens a task; without keys every task is open."""
    return request.state.key.opens if request.state.key else lambda task: True


def task_info(version: AdapterVersion, found: tuple[BoundAdapter, bool] | None) -> ModelInfo:
    """What is told of a task; `found` is its adapter where it is in host memory, and whether it has a device slot."""
    bound, is_resident = found or (None, False)
    return ModelInfo(
        id=version.task,
        owned_by="adapter",
        version=version.version,
        digest=version.digest,
        labels=list(bound.labels.names) if bound else None,
        columns=list(bound.prompt_format.columns) if bound else None,
        base=bound.artifact.card.base.model if bound else None,
        residency="device" if is_resident else "host" if bound else "registry",
        **judgement_of(version.tags),
    )


def base_info(name: str, server: BaseServer) -> ModelInfo:
    """What is told of a base by itself."""
    return ModelInfo(
        id=name,
        owned_by="base",
        version=None,
        digest=server.engine.base.files.fingerprint,
        labels=[],
        columns=["text"],
        base=name,
        residency="device",
    )


def judgement_of(tags: Mapping[str, str]) -> Judgement:
    """Read a version's tags; anybody may edit them in MLflow, so what is no number counts as missing."""
    num_examples = _number(tags.get("num_gate_examples", ""))
    return Judgement(
        verdict=tags.get("verdict"),
        accuracy=_number(tags.get("accuracy", "")),
        num_gate_examples=None if num_examples is None else int(num_examples),
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
