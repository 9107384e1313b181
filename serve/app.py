"""HTTP routes, the error table, and the Ray Serve deployment whose replicas are themselves the HTTP ingress (one hop)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from ray import serve as ray_serve

from multilora.log import log_apart, setup_logging
from multilora.registry import ROUTER
from serve.answer import Answer
from serve.auth import ALL_TASKS, Doorkeeper
from serve.auto import RoutedAnswer
from serve.config import ServeConfig
from serve.error_table import RESPONSES, answer_errors, refusal, route_of
from serve.guard import Guard, Observe, Scope, audit
from serve.metrics import FOLDER_VARIABLE, OTHER
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
from serve.web_page import add_page

APP_NAME = "adapters"
REPLICA_ENV = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""One event loop in a replica: two would hand every request to each other, and take turns with the forward passes."""


def build_app(replica: Replica, door: Doorkeeper, config: ServeConfig) -> FastAPI:
    """Make the HTTP application of one replica."""
    title, description = "Adapter orchestrator", "Every task from one shared base model."
    # A redirect to the path without its last slash would name the host that the caller says it asked.
    app = FastAPI(title=title, description=description, lifespan=_closing(replica), redirect_slashes=False)

    app.add_middleware(
        Guard,
        door=door,
        max_body_bytes=config.max_body_bytes,
        max_bytes_in_flight=config.max_bytes_in_flight,
        refusal=refusal,
        observe=_observer(replica),
    )

    def admit_inputs(request: Request, model: str, num_inputs: int, *, is_routed: bool = False) -> None:
        request.state.audit |= {"task": model, "num_inputs": num_inputs}
        if request.state.key is not None and not is_routed:
            request.state.key.check_task(task_of(model))
        door.count(request.state.key, num_inputs)

    _add_task_routes(app, replica, admit_inputs)
    add_models_routes(app, replica)
    add_openai_routes(app, replica, admit_inputs)
    add_page(app, config)
    _add_operations_routes(app, replica)
    answer_errors(app)
    return app


def _observer(replica: Replica) -> Observe:
    def observe(scope: Scope, status: int, seconds: float) -> None:
        known, route = scope["state"]["audit"], getattr(scope.get("route"), "path", OTHER)
        task = replica.task_label(str(known.get("task", "")))
        replica.metrics.requests.labels(route, task, str(status)).inc()
        replica.metrics.request_s.labels(route, task).observe(seconds)
        replica.metrics.inputs.labels(task).inc(known.get("num_inputs", 0))
        replica.metrics.abstentions.labels(task).inc(known.get("num_abstained", 0))

    return observe


def _add_task_routes(app: FastAPI, replica: Replica, admit_inputs: Callable[..., None]) -> None:
    def admit(request: Request, body: ClassifyRequest | GenerateRequest, *, is_routed: bool = False) -> list[Item]:
        """The inputs of a request whose key opens the task and has not asked too often; not so a routed one's tasks."""
        items = body.input if isinstance(body.input, list) else [body.input]
        admit_inputs(request, body.model, len(items), is_routed=is_routed)
        return items

    @app.post("/v1/classify", responses=RESPONSES)
    async def classify(request: Request, body: ClassifyRequest) -> ClassifyResponse | AutoResponse:
        """Answer one or many inputs with a label of the task, or of the task that the router chooses for each."""
        if body.model == ROUTER:
            return await classify_auto(request, body)
        version, answers = await replica.classify(
            body.model, admit(request, body), may_truncate=body.truncate, abstain_below=body.abstain_below
        )
        request.state.audit |= {"version": version.version, "digest": version.digest}
        results = [_result(answer, body.abstain_below) for answer in answers]
        request.state.audit |= {"num_abstained": sum(result.is_abstained for result in results)}
        return ClassifyResponse(model=body.model, version=version.version, digest=version.digest, results=results)

    async def classify_auto(request: Request, body: ClassifyRequest) -> AutoResponse:
        items = admit(request, body, is_routed=True)
        router, routed = await replica.classify_auto(
            items, opens_of(request), may_truncate=body.truncate, abstain_below=body.abstain_below
        )
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


def _add_operations_routes(app: FastAPI, replica: Replica) -> None:
    @app.get("/metrics", responses={**RESPONSES, 200: {"content": {"text/plain": {}}}})
    async def metrics(request: Request) -> Response:
        """Say how much of everything there was, for Prometheus; all tasks are in it, so it wants a key that opens all."""
        if request.state.key is not None:
            request.state.key.check_task(ALL_TASKS)
        return Response(replica.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz() -> JSONResponse:
        """Say whether the champions are bound, canaries included."""
        return JSONResponse({"is_ready": replica.is_ready}, status_code=200 if replica.is_ready else 503)


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
    scaling = {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": config.target_requests_per_replica,
        "upscale_delay_s": config.upscale_delay_s,
        "downscale_delay_s": config.downscale_delay_s,
    }
    options: dict[str, Any] = {"num_replicas": least} if most == least else {"autoscaling_config": scaling}
    env = REPLICA_ENV | ({FOLDER_VARIABLE: str(config.metrics_dir)} if config.metrics_dir else {})
    actor = {"num_cpus": num_cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": env}}
    deployment: Any = EngineReplica
    return deployment.options(**options, ray_actor_options=actor).bind(config)


def _closing(replica: Replica) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Close the replica, which writes its last counts, when the application ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await replica.close()

    return lifespan


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
