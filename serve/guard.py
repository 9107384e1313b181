"""What every HTTP request passes before any route: size, API key; and the audit line that it leaves. ASGI; knows no route."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from multilora.errors import MultiLoraError, TooLargeError
from serve.auth import Doorkeeper

audit = logging.getLogger("serve.audit")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Refusal = Callable[[MultiLoraError], tuple[int, dict[str, Any], dict[str, str]]]
"""(status, body, headers) of an error."""
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/", "/page.css", "/page.js"})
"""What may be read without a key: what a load balancer asks, and the page's own files (web_page.py), which hold no data."""


class Guard:
    """ASGI middleware: everything but the health checks and the page's files is denied unless its key is known."""

    def __init__(self, app: App, door: Doorkeeper, max_body_bytes: int, refusal: Refusal) -> None:
        self._app, self._door, self._max_body_bytes, self._refusal = app, door, max_body_bytes, refusal

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
            body = await _read(scope, receive, self._max_body_bytes)
            await self._app(scope, _replay(body, receive), counted_send)
        except MultiLoraError as error:
            await _refuse(self._refusal(error), counted_send)
        finally:
            _log(scope, status, time.monotonic() - started, body)


def _is_open(scope: Scope) -> bool:
    return scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN_PATHS


async def _read(scope: Scope, receive: Receive, most: int) -> bytes:
    """Read a body of at most so many bytes. Raises TooLargeError as soon as it is known."""
    announced = _header(scope, b"content-length") or "0"
    parts, size = [], int(announced) if announced.isdecimal() else 0
    more = size <= most
    size = size if not more else 0
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = size <= most and message.get("more_body", False)
    if size > most:
        raise TooLargeError(f"a request has at most {most} bytes; send fewer inputs at a time")
    return b"".join(parts)


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
