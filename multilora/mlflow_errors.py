"""MLflow's errors by name, and patience where MLflow is away."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import requests
from alembic.util.exc import CommandError
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from multilora.errors import RegistryAwayError, RegistryError

P = ParamSpec("P")
T = TypeVar("T")


def patiently(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Make a method name its errors, and try again as long as the registry's patience lasts where MLflow is away."""

    @functools.wraps(method)
    def attempts(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        def attempt() -> T:
            with named_errors(self.tracking_uri):
                return method(self, *args, **kwargs)

        result: T = self._retrying.copy()(attempt)
        return result

    return attempts


@contextmanager
def named_errors(tracking_uri: str) -> Iterator[None]:
    """Turn what MLflow raises into RegistryError, or RegistryAwayError where the same call may succeed later."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, CommandError, OSError) as error:  # a local store lets its own errors through
        kind = RegistryAwayError if _is_away(error, tracking_uri) else RegistryError
        raise kind(f"MLflow at {tracking_uri} failed: {error}; check MLFLOW_TRACKING_URI and that it is reachable") from error


def _is_away(error: Exception, tracking_uri: str) -> bool:
    """Whether the same call may succeed later: no connection, an overloaded or restarting server, a locked or full database."""
    if isinstance(error, requests.RequestException):
        return error.response is None or error.response.status_code >= 500
    if not isinstance(error, MlflowException):
        return False
    is_server = tracking_uri.startswith("http")
    return error.error_code in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", *(["INTERNAL_ERROR"] if is_server else ()))
