"""Which error becomes which HTTP answer. Every error has the same body, OpenAI's: message, type, param, code."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from multilora.errors import (
    AdapterError,
    CapacityError,
    DataError,
    DeadlineError,
    ForbiddenError,
    MultiLoraError,
    RateLimitError,
    RegistryError,
    RequestError,
    TooLargeError,
    UnauthorizedError,
    UnknownTaskError,
    UnroutedError,
    WrongRouteError,
)
from serve.router import unknown_task
from serve.schema import ErrorBody, ErrorDetail, Route

logger = logging.getLogger(__name__)

TABLE: dict[type[MultiLoraError], tuple[int, str, str | None]] = {
    UnauthorizedError: (401, "invalid_api_key", None),
    ForbiddenError: (403, "task_not_allowed", "model"),
    TooLargeError: (413, "too_large", "input"),
    UnknownTaskError: (404, "model_not_found", "model"),
    UnroutedError: (422, "router_unsure", "model"),
    WrongRouteError: (422, "wrong_route", "model"),
    RequestError: (422, "invalid_request", "input"),
    DataError: (422, "invalid_request", "input"),
    RateLimitError: (429, "rate_limit_exceeded", None),
    DeadlineError: (504, "deadline_exceeded", None),
    CapacityError: (429, "overloaded", None),
    AdapterError: (503, "adapter_unavailable", "model"),
    RegistryError: (503, "registry_unavailable", None),
}
"""Status, code and wrong field; the first kind that an error is of counts."""
MAX_MESSAGE_CHARS = 4000
"""A message may quote what the caller sent, which may be megabytes."""
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in sorted({status for status, _, _ in TABLE.values()})
}
"""For the OpenAPI document."""


def refusal(error: MultiLoraError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers that tell a caller of an error."""
    found = next((row for kind, row in TABLE.items() if isinstance(error, kind)), (500, "internal_error", None))
    status, code, param = found
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status, {})
    if isinstance(error, RateLimitError):
        headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
    message = str(error)
    if isinstance(error, RegistryError):
        # Its words name the registry's address, with its password where it has one.
        logger.warning("registry failed error=%r", error)
        message = "the registry does not answer now, which this request needs; come again, or ask for a task without a version"
    body = error_body(message, type(error).__name__, code, param)
    if isinstance(error, UnroutedError):
        body["error"]["routes"] = [route_of(*found).model_dump() for found in error.routes]
    return status, body, headers


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    # A message may quote what the caller sent, also characters that UTF-8 cannot carry.
    shown = message.encode("utf-8", "backslashreplace").decode()
    if len(shown) > MAX_MESSAGE_CHARS:
        shown = f"{shown[: MAX_MESSAGE_CHARS - 4]} ..."
    return ErrorBody(error=ErrorDetail(message=shown, type=kind, param=param, code=code)).model_dump(
        exclude={"error": {"routes"}}
    )


def body_of(error: Exception) -> dict[str, Any]:
    """The body that tells of any error, also where there is no status to tell it with."""
    if isinstance(error, MultiLoraError):
        return refusal(error)[1]
    # The server logs the error itself; a caller can only be told that there was one.
    return error_body("the server failed; its log says why", "InternalError", "internal_error")


def route_of(is_routed: bool, probability: float, candidates: Mapping[str, float]) -> Route:
    """What the router made of one input, as a body."""
    return Route(is_routed=is_routed, probability=probability, candidates=dict(candidates))


def answer_errors(app: FastAPI) -> None:
    """Let the application answer all errors by the table."""

    @app.exception_handler(MultiLoraError)
    async def known(request: Request, error: MultiLoraError) -> JSONResponse:
        if isinstance(error, UnknownTaskError) and error.model and request.state.key:
            # A key is told of the tasks that it opens, and of no others.
            error = unknown_task(error.model, [task for task in error.tasks if request.state.key.opens(task)])
        status, body, headers = refusal(error)
        return JSONResponse(body, status_code=status, headers=headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's word for bytes that it cannot read at all
            body = error_body("the body is no JSON in UTF-8 of reasonable depth", "RequestError", "invalid_request")
            return JSONResponse(body, status_code=422)
        message = f"{request.method} {request.url.path}: {error.detail}; the routes are listed at /docs"
        body = error_body(message, "RequestError", "no_such_route")
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(body_of(error), status_code=500)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        details = error.errors()[:5]
        found = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details)
        fields = [str(part)[:100] for part in details[0]["loc"][1:2]] if details else []
        body = error_body(found, "RequestError", "invalid_request", "".join(fields) or None)
        return JSONResponse(body, status_code=422)
