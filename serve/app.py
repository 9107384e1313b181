"""HTTP routes, the error table, and the Ray Serve deployment whose replicas are themselves the HTTP ingress (one hop)."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve as ray_serve

from multilora.log import log_apart, setup_logging
from multilora.registry import ROUTER
from serve.auth import Doorkeeper
from serve.auto import RoutedAnswer
from serve.config import ServeConfig
from serve.engine import Answer
from serve.error_table import RESPONSES, answer_errors, refusal, route_of
from serve.guard import Guard, audit
from serve.models_api import add_models_routes, opens_of
from serve.openai_api import add_openai_routes
from serve.replica import Replica
from serve.router import task_of
from serve.schema import (
    AutoResponse,
    AutoResult,
    ClassifyRequest,
    ClassifyResponse,
    ClassifyResult,
    GenerateRequest,
    GenerateResponse,
    GenerateResult,
    Item,
    Readiness,
)

APP_NAME = "adapters"


def build_app(replica: Replica, door: Doorkeeper, config: ServeConfig) -> FastAPI:
    """Make the HTTP application of one replica."""
    # A redirect to the path without its last slash would name the host that the caller says it asked.
    app = FastAPI(title="Adapter orchestrator", description="Every task from one shared base model.", redirect_slashes=False)
    app.add_middleware(
        Guard, door=door, max_body_bytes=config.max_body_bytes, max_bytes_in_flight=config.max_bytes_in_flight, refusal=refusal
    )

    def admit(request: Request, body: ClassifyRequest | GenerateRequest, *, is_routed: bool = False) -> list[Item]:
        """The inputs of a request whose key opens the task and has not asked too often; not so a routed one's tasks."""
        items = body.input if isinstance(body.input, list) else [body.input]
        admit_inputs(request, body.model, len(items), is_routed=is_routed)
        return items

    def admit_inputs(request: Request, model: str, num_inputs: int, *, is_routed: bool = False) -> None:
        request.state.audit |= {"task": model, "num_inputs": num_inputs}
        if request.state.key is not None and not is_routed:
            request.state.key.check_task(task_of(model))
        door.count(request.state.key, num_inputs)

    @app.post("/v1/classify", responses=RESPONSES)
    async def classify(request: Request, body: ClassifyRequest) -> ClassifyResponse | AutoResponse:
        """Answer one or many inputs with a label of the task, or of the task that the router chooses for each."""
        if body.model == ROUTER:
            return await classify_auto(request, body)
        version, answers = await replica.classify(body.model, admit(request, body), may_truncate=body.truncate)
        request.state.audit |= {"version": version.version, "digest": version.digest}
        results = [_result(answer, body.abstain_below) for answer in answers]
        return ClassifyResponse(model=body.model, version=version.version, digest=version.digest, results=results)

    async def classify_auto(request: Request, body: ClassifyRequest) -> AutoResponse:
        items = admit(request, body, is_routed=True)
        router, routed = await replica.classify_auto(items, opens_of(request), may_truncate=body.truncate)
        tasks = sorted({found.version.task for found in routed})
        request.state.audit |= {"task": f"{ROUTER}:{','.join(tasks)}", "version": router.version, "digest": router.digest}
        results = [_auto_result(found, body.abstain_below) for found in routed]
        return AutoResponse(model=ROUTER, version=router.version, digest=router.digest, results=results)

    @app.post("/v1/generate", responses=RESPONSES)
    async def generate(request: Request, body: GenerateRequest) -> GenerateResponse:
        """Answer one or many inputs of a free-text task."""
        version, answers = await replica.generate(body.model, admit(request, body), may_truncate=body.truncate)
        request.state.audit |= {"version": version.version, "digest": version.digest}
        results = [GenerateResult(text=a.label, is_truncated=a.is_truncated, is_cut_off=a.is_cut_off) for a in answers]
        return GenerateResponse(model=body.model, version=version.version, digest=version.digest, results=results)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz() -> JSONResponse:
        """Say whether the champions are bound, canaries included."""
        return JSONResponse({"is_ready": replica.is_ready}, status_code=200 if replica.is_ready else 503)

    add_models_routes(app, replica)
    add_openai_routes(app, replica, admit_inputs)
    answer_errors(app)
    return app


@ray_serve.deployment(name="engine", max_ongoing_requests=1000)
@ray_serve.ingress()
class EngineReplica:
    """The deployment: builds the replica's parts and forwards to them."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        setup_logging("INFO")
        if config.audit_file:
            log_apart(audit.name, config.audit_file)
        self._config, self._replica = config, Replica(config)
        self._following = asyncio.create_task(self._replica.follow())
        # Requests come when this returns: not before the champions are bound.
        await self._replica.wait_until_ready()

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name that Ray Serve calls
        return build_app(self._replica, Doorkeeper(self._config.keys_file), self._config)

    async def check_health(self) -> None:
        """Let Ray replace a replica whose follower died."""
        if self._following.done():
            raise RuntimeError("the registry follower ended")


def serve_application(config: ServeConfig, num_replicas: tuple[int, int], num_cpus: float, num_gpus: float) -> Any:
    """Bind the deployment to its settings, ready for `ray.serve.run`.

    Where the most replicas are more than the least, Ray starts others while requests queue up; those that leave finish theirs.
    """
    least, most = num_replicas
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": config.target_requests_per_replica}
    options: dict[str, Any] = {"num_replicas": least} if most == least else {"autoscaling_config": scaling}
    deployment: Any = EngineReplica
    return deployment.options(**options, ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus}).bind(config)


def _result(answer: Answer, abstain_below: float | None) -> ClassifyResult:
    probabilities = dict(zip(answer.labels, answer.probabilities, strict=True))
    is_abstained = abstain_below is not None and probabilities[answer.label] < abstain_below
    return ClassifyResult(
        label=None if is_abstained else answer.label,
        probabilities=probabilities,
        is_truncated=answer.is_truncated,
        is_abstained=is_abstained,
    )


def _auto_result(found: RoutedAnswer, abstain_below: float | None) -> AutoResult:
    choice, version = found.choice, found.version
    route = route_of(True, choice.probability, choice.candidates)
    answer = _result(found.answer, abstain_below).model_dump()
    return AutoResult(**answer, task=version.task, version=version.version, digest=version.digest, route=route)
