"""HTTP routes, the error table, and the Ray Serve deployment whose replicas are themselves the HTTP ingress (one hop)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve as ray_serve
from starlette.exceptions import HTTPException

from multilora.errors import (
    AdapterError,
    CapacityError,
    DataError,
    ForbiddenError,
    MultiLoraError,
    RateLimitError,
    RegistryError,
    RequestError,
    TooLargeError,
    UnauthorizedError,
    UnknownTaskError,
    UnroutedError,
)
from multilora.log import log_apart, setup_logging
from multilora.registry import ROUTER
from serve.auth import Doorkeeper
from serve.auto import RoutedAnswer
from serve.config import ServeConfig
from serve.engine import Answer
from serve.guard import Guard, audit
from serve.replica import Replica
from serve.schema import (
    AutoResponse,
    AutoResult,
    ClassifyRequest,
    ClassifyResponse,
    ClassifyResult,
    ErrorBody,
    ErrorDetail,
    GenerateRequest,
    GenerateResponse,
    GenerateResult,
    Item,
    ModelInfo,
    ModelList,
    Route,
)
from serve.web_page import add_page, judgement_of

STATUS_OF: dict[type[MultiLoraError], int] = {
    UnauthorizedError: 401,
    ForbiddenError: 403,
    TooLargeError: 413,
    UnknownTaskError: 404,
    RequestError: 422,
    DataError: 422,
    CapacityError: 429,
    AdapterError: 503,
    RegistryError: 503,
}
APP_NAME = "adapters"
ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorBody} for code in (401, 403, 404, 413, 422, 429, 503)}


def build_app(replica: Replica, door: Doorkeeper, config: ServeConfig) -> FastAPI:
    """Make the HTTP application of one replica."""
    app = FastAPI(title="Adapter orchestrator", description="Every task from one shared base model.")
    app.add_middleware(Guard, door=door, max_body_bytes=config.max_body_bytes, refusal=_refusal)

    def admit(request: Request, body: ClassifyRequest, *, is_routed: bool = False) -> list[Item]:
        """The inputs of a request whose key opens the task and has not asked too often; not so a routed one's tasks."""
        items = body.input if isinstance(body.input, list) else [body.input]
        request.state.audit |= {"task": body.model, "num_inputs": len(items)}
        if request.state.key is not None and not is_routed:
            request.state.key.check_task(body.model)
        door.count(request.state.key, len(items))
        return items

    @app.post("/v1/classify", responses=ERRORS)
    async def classify(request: Request, body: ClassifyRequest) -> ClassifyResponse | AutoResponse:
        """Answer one or many inputs with a label of the task, or of the task that the router chooses for each."""
        if body.model == ROUTER:
            return await classify_auto(request, body)
        version, answers = await replica.classify(body.model, admit(request, body))
        request.state.audit |= {"version": version.version, "digest": version.digest}
        results = [_result(answer) for answer in answers]
        return ClassifyResponse(model=body.model, version=version.version, digest=version.digest, results=results)

    async def classify_auto(request: Request, body: ClassifyRequest) -> AutoResponse:
        router, routed = await replica.classify_auto(admit(request, body, is_routed=True), opens_of(request))
        tasks = sorted({found.version.task for found in routed})
        request.state.audit |= {"task": f"{ROUTER}:{','.join(tasks)}", "version": router.version, "digest": router.digest}
        results = [_auto_result(found) for found in routed]
        return AutoResponse(model=ROUTER, version=router.version, digest=router.digest, results=results)

    @app.post("/v1/generate", responses=ERRORS)
    async def generate(request: Request, body: GenerateRequest) -> GenerateResponse:
        """Answer one or many inputs of a free-text task."""
        version, answers = await replica.generate(body.model, admit(request, body))
        request.state.audit |= {"version": version.version, "digest": version.digest}
        results = [GenerateResult(text=a.label, is_truncated=a.is_truncated, is_cut_off=a.is_cut_off) for a in answers]
        return GenerateResponse(model=body.model, version=version.version, digest=version.digest, results=results)

    @app.get("/v1/models")
    async def models(request: Request) -> ModelList:
        """List the tasks that answer, and champions that could not be bound; of these, what the key opens."""
        opens = opens_of(request)
        rows = [
            ModelInfo(
                id=version.task,
                version=version.version,
                digest=version.digest,
                labels=list(bound.labels.names),
                columns=list(bound.prompt_format.columns),
                base=bound.artifact.card.base.model,
                is_resident=is_resident,
                **judgement_of(version.tags),
            )
            for version, bound, is_resident in replica.served()
            if opens(version.task)
        ]
        broken = {key: reason for key, reason in replica.broken.items() if opens(key.partition("@")[0])}
        return ModelList(data=rows, broken=broken)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Say whether the champions are bound, canaries included."""
        return JSONResponse({"is_ready": replica.is_ready}, status_code=200 if replica.is_ready else 503)

    add_page(app, config)
    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """The error table: every error has the same body."""

    @app.exception_handler(MultiLoraError)
    async def known(request: Request, error: MultiLoraError) -> JSONResponse:
        status, body, headers = _refusal(error)
        return JSONResponse(body, status_code=status, headers=headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}; the routes are listed at /docs"
        return JSONResponse(_error_body(message, "RequestError"), status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        # The server logs the error itself; a caller can only be told that there was one.
        return JSONResponse(_error_body("the server failed; its log says why", "InternalError"), status_code=500)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()[:5])
        return JSONResponse(_error_body(found, "RequestError"), status_code=422)


@ray_serve.deployment(name="engine", max_ongoing_requests=1000)
@ray_serve.ingress()
class EngineReplica:
    """The deployment: builds the replica's parts and forwards to them."""

    def __init__(self, config: ServeConfig) -> None:
        setup_logging("INFO")
        if config.audit_file:
            log_apart(audit.name, config.audit_file)
        self._config, self._replica = config, Replica(config)
        self._following: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name that Ray Serve calls
        self._following = asyncio.get_running_loop().create_task(self._replica.follow())
        return build_app(self._replica, Doorkeeper(self._config.keys_file), self._config)

    async def check_health(self) -> None:
        """Let Ray replace a replica whose follower died."""
        if self._following is not None and self._following.done():
            raise RuntimeError("the registry follower ended")


def serve_application(config: ServeConfig, num_replicas: int, num_cpus: float, num_gpus: float) -> Any:
    """Bind the deployment to its settings, ready for `ray.serve.run`."""
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    deployment: Any = EngineReplica
    return deployment.options(num_replicas=num_replicas, ray_actor_options=options).bind(config)


def opens_of(request: Request) -> Callable[[str], bool]:
    """Whether the request's key opens a task; without keys every task is open."""
    return request.state.key.opens if request.state.key else lambda task: True


def _result(answer: Answer) -> ClassifyResult:
    probabilities = dict(zip(answer.labels, answer.probabilities, strict=True))
    return ClassifyResult(label=answer.label, probabilities=probabilities, is_truncated=answer.is_truncated)


def _auto_result(found: RoutedAnswer) -> AutoResult:
    choice, version = found.choice, found.version
    route = _route(True, choice.probability, choice.candidates)
    answer = _result(found.answer).model_dump()
    return AutoResult(**answer, task=version.task, version=version.version, digest=version.digest, route=route)


def _route(is_routed: bool, probability: float, candidates: Mapping[str, float]) -> Route:
    return Route(is_routed=is_routed, probability=probability, candidates=dict(candidates))


def _refusal(error: MultiLoraError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers that tell a caller of an error."""
    status = next((code for kind, code in STATUS_OF.items() if isinstance(error, kind)), 500)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status, {})
    if isinstance(error, RateLimitError):
        headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
    routes = [_route(*found) for found in error.routes] if isinstance(error, UnroutedError) else None
    return status, _error_body(str(error), type(error).__name__, routes), headers


def _error_body(message: str, kind: str, routes: list[Route] | None = None) -> dict[str, Any]:
    # A message may quote what the caller sent, also characters that UTF-8 cannot carry.
    shown = message.encode("utf-8", "backslashreplace").decode()
    return ErrorBody(error=ErrorDetail(message=shown, type=kind, routes=routes)).model_dump(exclude_none=True)
