"""What every HTTP request passes before any route: size, API key; and the audit line that it leaves. ASGI; knows no route."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from multilora.errors import CapacityError, MultiLoraError, TooLargeError
from serve.auth import Doorkeeper

audit = logging.getLogger("serve.audit")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Refusal = Callable[[MultiLoraError], tuple[int, dict[str, Any], dict[str, str]]]
"""(status, body, headers) of an error."""
Observe = Callable[[Scope, int, float], None]
"""(scope, status, seconds) of a request that ended; the scope's state says what is known of it."""
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/", "/page.css", "/page.js"})
"""What may be read without a key: what a load balancer asks, and the page's own files (web_page.py), which hold no data."""


class Guard:
    """ASGI middleware: everything but the health checks and the page's files is denied unless its key is known."""

    def __init__(
        self, app: App, door: Doorkeeper, max_body_bytes: int, max_bytes_in_flight: int, refusal: Refusal, observe: Observe
    ) -> None:
        """Limit the bytes of one request, and of all that are not answered yet; `observe` hears of every request's end."""
        self._app, self._door, self._refusal, self._observe = app, door, refusal, observe
        self._max_body_bytes, self._max_bytes_in_flight = max_body_bytes, max_bytes_in_flight
        self._bytes_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _is_open(scope)):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no route speaks anything else; the server closes the connection
        started, state = time.monotonic(), scope.setdefault("state", {})
        state |= {"key": None, "audit": {}}
        status, body = 0, b""

        async def counted_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            state["key"] = self._door.key_of(_header(scope, b"authorization"))  # who has none is not even read
            body = await self._read(scope, receive)
            await self._app(scope, _replay(body, receive), counted_send)
        except MultiLoraError as error:
            await _refuse(self._refusal(error), counted_send)
        finally:
            self._bytes_in_flight -= len(body)
            seconds = time.monotonic() - started
            _log(scope, status, seconds, body)
            self._observe(scope, status, seconds)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Read a body and count it as in flight. Raises TooLargeError as soon as it is known, CapacityError for want of room."""
        announced = _header(scope, b"content-length") or "0"
        if announced.isdecimal() and int(announced) > self._max_body_bytes:
            raise self._too_large()
        parts, more = [], True
        try:
            while more:
                message = await receive()
                parts.append(message.get("body", b""))
                self._bytes_in_flight += len(parts[-1])
                if sum(map(len, parts)) > self._max_body_bytes:
                    raise self._too_large()
                if self._bytes_in_flight > self._max_bytes_in_flight:
                    raise CapacityError(f"requests of {self._max_bytes_in_flight} bytes are waiting; retry in a second")
                more = message.get("more_body", False)
        except BaseException:
            self._bytes_in_flight -= sum(map(len, parts))
            raise
        return b"".join(parts)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"a request has at most {self._max_body_bytes} bytes; send fewer inputs at a time")


def _is_open(scope: Scope) -> bool:
    return scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN_PATHS


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read, then whatever comes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


async def _refuse(refusal: tuple[int, dict[str, Any], dict[str, str]], send: Send) -> None:
    status, body, headers = refusal
    content = json.dumps(body).encode()
    pairs = {"content-type": "application/json", "content-length": str(len(content)), **headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})


def _log(scope: Scope, status: int, seconds: float, body: bytes) -> None:
    """One line for every request that wanted a key: who asked what, never what was in it. Status 0: nothing was answered."""
    key, known = scope["state"]["key"], scope["state"]["audit"]
    audit.info(
        "%s %s status=%d ms=%.1f key=%s task=%s version=%s digest=%s inputs=%s body=%s",
        scope["method"],
        _on_one_line(scope["path"]),
        status,
        1000 * seconds,
        key.id if key else "-",
        _on_one_line(known.get("task", "-")),
        known.get("version", "-"),
        str(known.get("digest", "-"))[:12],
        known.get("num_inputs", "-"),
        hashlib.sha256(body).hexdigest()[:16] if body else "-",
    )


def _on_one_line(text: str) -> str:
    """What a caller sent must not look like another field or another line."""
    return text.encode("unicode_escape").decode().replace(" ", "\\x20")


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
