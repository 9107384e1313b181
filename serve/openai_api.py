"""Routes for OpenAI's clients: completions, chat completions, and the models that they list.

The `model` is a task, whose adapter answers, or a base's own name. A label is one token; a text comes as it is written.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from multilora.errors import MultiLoraError
from serve.base_server import SpelledToken
from serve.error_table import RESPONSES, body_of
from serve.openai_ask import Chunk, Question, ask
from serve.openai_schema import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatTopLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    ResponseHead,
    Usage,
)
from serve.replica import Replica, in_time

logger = logging.getLogger(__name__)

T = TypeVar("T")
EVENT = {
    "type": "object",
    "description": "One event: its data is a chunk as JSON, at the end [DONE]; or an error as JSON, and nothing after it.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
STREAMED: dict[int | str, dict[str, Any]] = {**RESPONSES, 200: {"content": {"text/event-stream": {"schema": EVENT}}}}
"""For the OpenAPI document."""
CLIENT_LEFT = 499
"""Status of what nobody reads, for the audit line."""
Admit = Callable[[Request, str, int], None]
"""Checks that the request's key opens a model and may send so many inputs more; raises where not."""


def add_openai_routes(app: FastAPI, replica: Replica, admit: Admit) -> None:
    """Add the routes to a replica's application."""

    @app.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Answer a prompt, or each of several, with a label of the task or a text."""
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        admit(request, body.model, len(prompts))
        question = Question(body.model, prompts, body.max_tokens, body.logprobs or 0)
        face = _CompletionFace(has_logprobs=body.logprobs is not None)
        return await _respond(request, body, ask(replica, question), face, replica.deadline_s)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a user's message with a label of the task or a text."""
        admit(request, body.model, 1)
        limit = body.max_completion_tokens or body.max_tokens
        question = Question(body.model, [body.messages], limit, body.top_logprobs or 0)
        return await _respond(request, body, ask(replica, question), _ChatFace(bool(body.logprobs)), replica.deadline_s)


class _Face(Protocol):
    """How one of the two routes shows chunks."""

    def whole(self, head: dict[str, Any], chunks: Sequence[Chunk]) -> ResponseHead: ...

    def part(self, head: dict[str, Any], chunk: Chunk | None, *, is_first: bool, offset: int) -> ResponseHead:
        """A streamed chunk; None for the last one, which has the usage alone. `offset`: characters sent before."""


async def _respond(
    request: Request, body: CompletionRequest | ChatRequest, chunks: AsyncIterator[Chunk], face: _Face, deadline_s: float
) -> Response:
    # What goes wrong before the first piece is an ordinary error with its status.
    begun = await _unless_left(request, _taken(chunks, 1 if body.stream else None, deadline_s))
    if begun is None:
        return Response(status_code=CLIENT_LEFT)
    source = begun[0].source
    version = str(source.version.version) if source.version else "base"
    request.state.audit |= {"version": version, "digest": source.digest}
    headers = {"x-adapter-version": version, "x-adapter-digest": source.digest}
    head = {
        "id": f"{'chatcmpl' if isinstance(body, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": source.digest[:12],
        "usage": None,
    }
    if body.stream:
        has_usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(head, _chained(begun, chunks), face, has_usage=has_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})
    return JSONResponse(face.whole({**head, "usage": _usage(begun)}, begun).model_dump(), headers=headers)


async def _taken(chunks: AsyncIterator[Chunk], most: int | None, deadline_s: float) -> list[Chunk]:
    """The first chunks; None for all. Raises DeadlineError."""
    taken: list[Chunk] = []
    async with in_time(deadline_s):
        async for chunk in chunks:
            taken.append(chunk)
            if len(taken) == most:
                break
    return taken


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Await work; where the caller leaves first, end it and return None."""
    working = asyncio.create_task(work)
    # The body was read, so what comes next is that the caller left.
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _events(head: dict[str, Any], chunks: AsyncIterator[Chunk], face: _Face, *, has_usage: bool) -> AsyncIterator[str]:
    """Server-sent events; an error on the way is the last of them."""
    sent: list[Chunk] = []
    num_chars: dict[int, int] = {}
    try:
        async for chunk in chunks:
            offset = num_chars.get(chunk.index, 0)
            yield _event(face.part(head, chunk, is_first=not sent, offset=offset).model_dump())
            sent.append(chunk)
            num_chars[chunk.index] = offset + len(chunk.piece.text)
    except Exception as error:  # the status is sent, so this is where the caller can still be told
        if not isinstance(error, MultiLoraError):
            logger.exception("stream failed model=%s", head["model"])
        yield _event(body_of(error))
        return
    if has_usage:
        yield _event(face.part({**head, "usage": _usage(sent)}, None, is_first=False, offset=0).model_dump())
    yield "data: [DONE]\n\n"


async def _chained(begun: Sequence[Chunk], rest: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in begun:
        yield chunk
    async for chunk in rest:
        yield chunk


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(chunks: Sequence[Chunk]) -> Usage:
    read, wrote = chunks[0].num_prompt_tokens, sum(len(chunk.piece.tokens) for chunk in chunks)
    return Usage(prompt_tokens=read, completion_tokens=wrote, total_tokens=read + wrote)


@dataclass(frozen=True)
class _CompletionFace:
    has_logprobs: bool

    def whole(self, head: dict[str, Any], chunks: Sequence[Chunk]) -> Completion:
        by_index: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            by_index.setdefault(chunk.index, []).append(chunk)
        return Completion(**head, choices=[self._choice(index, some, 0) for index, some in by_index.items()])

    def part(self, head: dict[str, Any], chunk: Chunk | None, *, is_first: bool, offset: int) -> Completion:
        return Completion(**head, choices=[self._choice(chunk.index, [chunk], offset)] if chunk else [])

    def _choice(self, index: int, chunks: Sequence[Chunk], offset: int) -> CompletionChoice:
        pieces = [chunk.piece for chunk in chunks]
        starts = accumulate((len(piece.text) for piece in pieces), initial=offset)
        logprobs = CompletionLogprobs(
            tokens=[token.text for piece in pieces for token in piece.tokens],
            token_logprobs=[token.logprob for piece in pieces for token in piece.tokens],
            top_logprobs=[dict(token.alternatives) for piece in pieces for token in piece.tokens],
            text_offset=[start for piece, start in zip(pieces, starts, strict=False) for _ in piece.tokens],
        )
        text = "".join(piece.text for piece in pieces)
        shown = logprobs if self.has_logprobs else None
        return CompletionChoice(index=index, text=text, logprobs=shown, finish_reason=pieces[-1].end)


@dataclass(frozen=True)
class _ChatFace:
    has_logprobs: bool

    def whole(self, head: dict[str, Any], chunks: Sequence[Chunk]) -> ChatCompletion:
        message = ChatMessage(content="".join(chunk.piece.text for chunk in chunks))
        end = chunks[-1].piece.end
        assert end is not None, "the last piece of a text says how it ended"
        return ChatCompletion(**head, choices=[ChatChoice(message=message, logprobs=self._logprobs(chunks), finish_reason=end)])

    def part(self, head: dict[str, Any], chunk: Chunk | None, *, is_first: bool, offset: int) -> ChatCompletionChunk:
        if chunk is None:
            return ChatCompletionChunk(**head, choices=[])
        delta = {**({"role": "assistant"} if is_first else {}), "content": chunk.piece.text}
        choice = ChatChunkChoice(delta=delta, logprobs=self._logprobs([chunk]), finish_reason=chunk.piece.end)
        return ChatCompletionChunk(**head, choices=[choice])

    def _logprobs(self, chunks: Sequence[Chunk]) -> ChatLogprobs | None:
        tokens = [token for chunk in chunks for token in chunk.piece.tokens]
        return ChatLogprobs(content=list(map(_chat_logprob, tokens))) if self.has_logprobs else None


def _chat_logprob(token: SpelledToken) -> ChatLogprob:
    top = [ChatTopLogprob(token=text, logprob=logprob, bytes=_bytes(text)) for text, logprob in token.alternatives]
    return ChatLogprob(token=token.text, logprob=token.logprob, bytes=_bytes(token.text), top_logprobs=top)


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8", "replace"))
