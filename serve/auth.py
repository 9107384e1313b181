"""API keys: who may ask which tasks, how often. Keys are stored hashed; every route but the health checks wants one.

A key is `ak-ID-SECRET`. The secret is 256 random bits, so a plain sha256 of it cannot be reversed, and the id says which hash to
compare with, in constant time. Without a keys file nobody is asked, and the endpoint listens on this machine only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
from pydantic import TypeAdapter

from multilora.errors import ForbiddenError, RateLimitError, RequestError, UnauthorizedError

logger = logging.getLogger(__name__)

ALL_TASKS = "*"
PREFIX = "ak"


@dataclass(frozen=True)
class ApiKey:
    """What is stored of a key."""

    id: str
    name: str
    """Who has it."""
    sha256: str
    """Of the whole key."""
    tasks: tuple[str, ...]
    """Task names, or `*` alone for all."""
    max_inputs_per_minute: int | None
    created: str
    """ISO time."""

    def opens(self, task: str) -> bool:
        """Whether the key is for the task."""
        return ALL_TASKS in self.tasks or task in self.tasks

    def check_task(self, task: str) -> None:
        """Raises ForbiddenError for a task that the key does not open, whether or not there is such a task."""
        if not self.opens(task):
            raise ForbiddenError(f"key {self.id} does not open task {task}; it opens {', '.join(self.tasks)}")


_KEYS = TypeAdapter(tuple[ApiKey, ...])


def create_key(
    file: Path, name: str, tasks: Sequence[str], max_inputs_per_minute: int | None, created: str
) -> tuple[ApiKey, str]:
    """Add a key to the file; what is returned beside it is the key itself, which nobody can read again."""
    key_id = secrets.token_hex(4)
    secret = f"{PREFIX}-{key_id}-{secrets.token_urlsafe(32)}"
    key = ApiKey(key_id, name, _hash(secret), tuple(tasks) or (ALL_TASKS,), max_inputs_per_minute, created)
    with _alone(file):
        _write(file, (*read_keys(file), key))
    return key, secret


def revoke_key(file: Path, key_id: str) -> ApiKey:
    """Take a key out of the file; running endpoints notice within a second. Raises RequestError where there is none."""
    with _alone(file):
        keys = read_keys(file)
        found = next((key for key in keys if key.id == key_id), None)
        if found is None:
            raise RequestError(f"there is no key {key_id}; keys are {', '.join(key.id for key in keys) or 'none yet'}")
        _write(file, tuple(key for key in keys if key != found))
    return found


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """All keys of a file; none where there is no file. Raises RequestError for a broken one."""
    try:
        return _KEYS.validate_python(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return ()
    except ValueError as error:
        raise RequestError(f"{file} is broken: {error}; restore it, or delete it and create the keys again") from error


class Doorkeeper:
    """Lets requests in: finds their key, checks it, counts what it asks."""

    def __init__(self, file: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`file` is looked at again whenever it changed; None lets everybody in."""
        self._file, self._clock = file, clock
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, ApiKey] = {}
        self._buckets: dict[str, _Bucket] = {}

    def key_of(self, authorization: str | None) -> ApiKey | None:
        """The key of an `Authorization: Bearer ...` header; None where no keys are asked for. Raises UnauthorizedError."""
        if self._file is None:
            return None
        self._refresh(self._file)
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise UnauthorizedError("send your API key as the header Authorization: Bearer ak-...")
        key = self._keys.get(secret.split("-")[1] if secret.count("-") >= 2 else "")
        # An unknown id costs a comparison too, so that time does not tell which ids exist.
        if not hmac.compare_digest(key.sha256 if key else "0" * 64, _hash(secret)) or key is None:
            raise UnauthorizedError("this API key is not known here; it may have been revoked")
        return key

    def count(self, key: ApiKey | None, num_inputs: int) -> None:
        """Count inputs against a key's limit. Raises RateLimitError that says when to come again."""
        if key is None or key.max_inputs_per_minute is None:
            return
        bucket = self._buckets.setdefault(key.id, _Bucket(float(key.max_inputs_per_minute), self._clock()))
        wait_s = bucket.take(num_inputs, key.max_inputs_per_minute, self._clock())
        if wait_s > 0:
            limit = f"key {key.id} may ask {key.max_inputs_per_minute} inputs a minute"
            error = RateLimitError(f"{limit}; come again in {math.ceil(wait_s)} s")
            error.retry_after_s = wait_s
            raise error

    def _refresh(self, file: Path) -> None:
        try:
            status = file.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, {}  # fail closed: without its file nobody has a key
            return
        if (stamp := (status.st_mtime_ns, status.st_ino)) != self._stamp:
            try:
                self._keys = {key.id: key for key in read_keys(file)}
            except RequestError as error:  # its words quote the file, which is no caller's business
                logger.error("nobody has a key: %s", error)
                self._keys = {}
            self._stamp = stamp


@dataclass
class _Bucket:
    """A minute's worth of inputs that refills steadily; a larger request than that waits for a full bucket and empties it."""

    level: float
    at: float

    def take(self, num_inputs: int, per_minute: int, now: float) -> float:
        """Take inputs, or say how many seconds are missing until there are enough."""
        self.level = min(float(per_minute), self.level + (now - self.at) * per_minute / 60)
        self.at = now
        wanted = min(num_inputs, per_minute)
        if self.level >= wanted:
            self.level -= wanted
            return 0.0
        return (wanted - self.level) * 60 / per_minute


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _alone(file: Path) -> filelock.BaseFileLock:
    """Change the file alone: of two keys that are created at once none may be lost."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(file.with_suffix(".lock"), timeout=30)


def _write(file: Path, keys: Sequence[ApiKey]) -> None:
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(_KEYS.dump_json(tuple(keys), indent=1))
    staging.replace(file)
