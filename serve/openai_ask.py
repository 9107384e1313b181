"""A question in OpenAI's terms -> pieces of answers, by a task's adapter or by the base that it names. Knows no HTTP."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from multilora.base_model import FrozenBase
from multilora.errors import RequestError
from multilora.prompt import Prompt
from serve.answer import Answer
from serve.base_server import Piece, SpelledToken
from serve.engine import BoundAdapter, Work
from serve.openai_schema import Message
from serve.replica import LONG_CHARS, Replica, Source, check_lengths
from serve.writer import TextWork

DEFAULT_BASE_TOKENS = 128
"""Length of a base's text where the request names none."""
MAX_BASE_PROMPT_TOKENS = 4096
"""Longest prompt of a base that has no limit of its own; longer ones are refused, not cut."""

Input = str | Sequence[Message]
"""A prompt, or a conversation."""


@dataclass(frozen=True)
class Question:
    """What one request asks."""

    model: str
    inputs: Sequence[Input]
    max_tokens: int | None
    num_alternatives: int
    """Most likely tokens to return at each place."""


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer to one input."""

    source: Source
    num_prompt_tokens: int
    """Of all inputs."""
    index: int
    """Number of the input."""
    piece: Piece


async def ask(replica: Replica, question: Question) -> AsyncIterator[Chunk]:
    """Answer all inputs at once; yield the pieces input by input. Whoever stops reading frees what is not answered.

    Raises UnknownTaskError, RequestError, DataError, CapacityError, AdapterError.
    """
    async with replica.holding(question.model) as source:
        if source.bound is not None and not source.bound.max_new_tokens and replica.has_challenger(question.model):
            async for chunk in _challenged(replica, question, source.bound):
                yield chunk
            return
        replica.check_room(source.server, len(question.inputs))
        prompts = await _all_prompts(source, question)
        if source.bound is not None:
            check_lengths(prompts, source.bound)
        answers, readers = _begin(replica, source, question, prompts)
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        try:
            for index, reader in enumerate(readers):
                async for piece in reader:
                    yield Chunk(source, num_prompt_tokens, index, piece)
        finally:
            for answer in answers:
                answer.cancel()


async def _challenged(replica: Replica, question: Question, champion: BoundAdapter) -> AsyncIterator[Chunk]:
    """Labels by the task's champion or its challenger, counted as those of /v1/classify are."""
    items = [_item(champion, question.model, given) for given in question.inputs]
    version, answers = await replica.classify(question.model, items)
    async with replica.holding(version.key) as source:
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in await _all_prompts(source, question))
        for index, answer in enumerate(answers):
            yield Chunk(source, num_prompt_tokens, index, _label_piece(answer, question.num_alternatives))


def _begin(
    replica: Replica, source: Source, question: Question, prompts: Sequence[Prompt]
) -> tuple[list[asyncio.Future[Answer]], list[AsyncIterator[Piece]]]:
    """Queue every prompt: the answers, and how to read them by the piece."""
    server, bound, num_alternatives = source.server, source.bound, question.num_alternatives
    if bound is not None and not bound.max_new_tokens:
        answers = [server.submit(Work(bound.key, prompt)) for prompt in prompts]
        return answers, [_label(answer, num_alternatives) for answer in answers]
    if bound is not None:
        limits = [min(question.max_tokens or bound.max_new_tokens, bound.max_new_tokens)] * len(prompts)
    else:
        wanted = min(question.max_tokens or DEFAULT_BASE_TOKENS, replica.max_base_tokens)
        limits = [min(wanted, _room(server.engine.base, prompt)) for prompt in prompts]
    key = bound.key if bound else None
    works = [TextWork(key, prompt, limit, num_alternatives) for prompt, limit in zip(prompts, limits, strict=True)]
    streams = [server.write(work) for work in works]
    return [stream.answer for stream in streams], [stream.pieces() for stream in streams]


async def _label(future: asyncio.Future[Answer], num_alternatives: int) -> AsyncIterator[Piece]:
    yield _label_piece(await future, num_alternatives)


def _label_piece(answer: Answer, num_alternatives: int) -> Piece:
    """A label as a text of one token, whose probability is the calibrated one."""
    scaled = [score / answer.temperature for score in answer.scores]
    total = max(scaled) + math.log(sum(math.exp(score - max(scaled)) for score in scaled))
    logprobs = {label: score - total for label, score in zip(answer.labels, scaled, strict=True)}
    ranked = sorted(logprobs.items(), key=lambda entry: -entry[1])
    return Piece(answer.label, (SpelledToken(answer.label, logprobs[answer.label], tuple(ranked[:num_alternatives])),), "stop")


async def _all_prompts(source: Source, question: Question) -> list[Prompt]:
    if sum(map(_num_chars, question.inputs)) <= LONG_CHARS:
        return _prompts(source, question)
    return await asyncio.to_thread(_prompts, source, question)


def _prompts(source: Source, question: Question) -> list[Prompt]:
    engine, bound = source.server.engine, source.bound
    if bound is None:
        return [_base_prompt(engine.base, question.model, given) for given in question.inputs]
    items = [_item(bound, question.model, given) for given in question.inputs]
    return [engine.prompt(bound.key, item) for item in items]


def _item(bound: BoundAdapter, model: str, given: Input) -> str | dict[str, str]:
    """The task's input: the text itself, or the columns that it holds as JSON."""
    text = given if isinstance(given, str) else _only_message(model, given)
    if bound.prompt_format.takes(text):
        return text
    try:
        item = json.loads(text)
    except (ValueError, RecursionError):
        item = None
    if not isinstance(item, dict) or not all(isinstance(value, str) for value in item.values()):
        columns = bound.prompt_format.columns
        example = json.dumps(dict.fromkeys(columns, "..."))
        raise RequestError(f"task {model} has the columns {', '.join(columns)}: send them as one JSON object, {example}")
    return item


def _only_message(model: str, messages: Sequence[Message]) -> str:
    if [message.role for message in messages] != ["user"]:
        raise RequestError(
            f"{model} reads one message: send its input as the only user message; a task has its own instruction, which "
            "no system message replaces, and does not read earlier turns"
        )
    return messages[0].text


def _base_prompt(base: FrozenBase, model: str, given: Input) -> Prompt:
    """The prompt as it is; a conversation as the base's chat template writes it."""
    if base.family == "encoder":
        raise RequestError(f"base {model} is an encoder, which writes no text: ask one of its tasks")
    if isinstance(given, str) or not base.tokenizer.chat_template:
        token_ids = base.tokenizer(given if isinstance(given, str) else _only_message(model, given))["input_ids"]
    else:
        turns = [{"role": message.role.replace("developer", "system"), "content": message.text} for message in given]
        try:
            text = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise RequestError(f"the chat template of base {model} refuses this conversation: {error}") from error
        token_ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not token_ids:
        raise RequestError(f"the prompt has no tokens to base {model}: send some text")
    prompt = Prompt(tuple(token_ids), is_truncated=False)
    most = base.files.max_positions or MAX_BASE_PROMPT_TOKENS
    if len(token_ids) > most or _room(base, prompt) < 1:
        raise RequestError(f"the prompt has {len(token_ids)} tokens, base {model} has room for {most}, its answer included")
    return prompt


def _room(base: FrozenBase, prompt: Prompt) -> int:
    """Tokens that fit after a prompt."""
    most = base.files.max_positions or MAX_BASE_PROMPT_TOKENS
    return most if base.family == "seq2seq" else most - len(prompt.token_ids)


def _num_chars(given: Input) -> int:
    return len(given) if isinstance(given, str) else sum(len(message.text) for message in given)
