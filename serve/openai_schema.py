"""Bodies of the routes that OpenAI's clients speak: https://platform.openai.com/docs/api-reference (completions, chat).

Answers are always the most likely ones, so what shapes a random choice (temperature, top_p, seed) is taken and changes
nothing. What would change an answer and is not there is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from serve.schema import Body

MAX_ALTERNATIVES = 20
Text = Annotated[str, Field(max_length=100_000)]
FinishReason = Literal["stop", "length"]


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False
    """Send the number of tokens in a last chunk without choices."""
    include_obfuscation: bool = False
    """Taken and changes nothing: chunks are not padded."""


class _Request(Body):
    """What both routes take."""

    model: str = Field(max_length=200)
    """Task name, or the base's own name for the base alone."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens to write; a task's own limit is the most. A label is one token."""
    stream: bool = False
    """Send the answer piece by piece as server-sent events."""
    stream_options: StreamOptions | None = None
    """How to stream."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Changes nothing: the answer is always the most likely one."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Changes nothing."""
    seed: int | None = None
    """Changes nothing."""
    user: str | None = None
    """Changes nothing and is not stored."""
    n: int | None = None
    """1: another answer would be the same."""
    stop: str | list[str] | None = None
    """Not there: a text ends where the model ends it, or at max_tokens."""
    frequency_penalty: float | None = None
    """0."""
    presence_penalty: float | None = None
    """0."""
    logit_bias: dict[str, float] | None = None
    """Empty."""

    @field_validator("n")
    @classmethod
    def _check_n(cls, n: int | None) -> int | None:
        if n not in (None, 1):
            raise ValueError("answers are always the most likely ones, so n answers would be the same: use n=1")
        return n

    @field_validator("stop", "frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def _check_absent(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported and would change the answer: leave it out")
        return value


class CompletionRequest(_Request):
    """A prompt or several, each answered by itself."""

    prompt: Text | list[Text]
    """The task's input, or a JSON object where it has several columns; for a base the whole prompt."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """How many of the most likely tokens to return at each place, with log-probabilities."""
    echo: bool = False
    """False."""
    best_of: int | None = None
    """1."""
    suffix: str | None = None
    """None."""

    @field_validator("echo", "suffix")
    @classmethod
    def _check_completion(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported: leave it out")
        return value

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, value: int | None) -> int | None:
        return cls._check_n(value)


class ContentPart(Body):
    """A part of a message."""

    type: Literal["text"]
    """Only text is read."""
    text: Text
    """The text."""


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who says it."""
    content: Text | list[ContentPart]
    """What."""
    name: str | None = None
    """Changes nothing."""

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """A conversation; of a task one message of the user, which is its input."""

    messages: list[Message] = Field(min_length=1)
    """One user message; a base with a chat template takes whole conversations."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """Return every token's log-probability."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """How many of the most likely tokens to return at each place."""
    response_format: dict[str, Any] | None = None
    """`{"type": "text"}`."""
    tools: list[dict[str, Any]] | None = None
    """None."""
    tool_choice: Literal["none", "auto"] | None = None
    """Changes nothing: there are no tools."""
    parallel_tool_calls: bool | None = None
    """Changes nothing: there are no tools."""
    modalities: list[Literal["text"]] | None = None
    """Text."""
    metadata: dict[str, str] | None = None
    """Changes nothing and is not stored."""
    store: Literal[False] | None = None
    """Answers are not stored."""

    @field_validator("response_format")
    @classmethod
    def _check_format(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value not in (None, {"type": "text"}):
            raise ValueError("answers are a label of the task or a text: leave response_format out")
        return value

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        if value:
            raise ValueError("no tools are called here: leave tools out")
        return value


class Usage(Body):
    """Tokens read and written; a label is one token."""

    prompt_tokens: int
    """Read, the task's instruction included."""
    completion_tokens: int
    """Written, the end token included."""
    total_tokens: int
    """Both."""


class CompletionLogprobs(Body):
    """What the tokens of a completion are; a token that adds nothing that can be shown has its name."""

    tokens: list[str]
    """Tokens."""
    token_logprobs: list[float]
    """Their log-probabilities; a label's is calibrated."""
    top_logprobs: list[dict[str, float]]
    """The most likely ones at each place."""
    text_offset: list[int]
    """Where in the text each token stands, in characters."""


class CompletionChoice(Body):
    """The answer to one prompt, or a piece of it."""

    index: int
    """Number of the prompt."""
    text: str
    """A label of the task, or a text."""
    logprobs: CompletionLogprobs | None
    """Where they were asked for."""
    finish_reason: FinishReason | None
    """`length` where it reached max_tokens before its end; null where more follows."""


class ResponseHead(Body):
    """What every response and chunk begins with."""

    id: str
    """Of this response."""
    created: int
    """Unix time in seconds."""
    model: str
    """As it was asked for."""
    system_fingerprint: str
    """First 12 digits of the adapter's digest, or of the base's fingerprint: equal ones give equal answers."""
    usage: Usage | None
    """Null in every chunk but the last."""


class Completion(ResponseHead):
    """Answers in the order of the prompts, or a chunk of them."""

    object: Literal["text_completion"] = "text_completion"
    """OpenAI's field."""
    choices: list[CompletionChoice]
    """Answers."""


class ChatTopLogprob(Body):
    """A token that could have stood here."""

    token: str
    """The token."""
    logprob: float
    """Its log-probability."""
    bytes: list[int]
    """Its characters in UTF-8."""


class ChatLogprob(ChatTopLogprob):
    """A token of the answer."""

    top_logprobs: list[ChatTopLogprob]
    """The most likely ones at its place."""


class ChatLogprobs(Body):
    """What the tokens of an answer are."""

    content: list[ChatLogprob]
    """Tokens."""
    refusal: None = None
    """OpenAI's field."""


class ChatMessage(Body):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    """OpenAI's field."""
    content: str
    """A label of the task, or a text."""
    refusal: None = None
    """OpenAI's field."""


class ChatChoice(Body):
    """The answer to a conversation."""

    index: Literal[0] = 0
    """There is one."""
    message: ChatMessage
    """The answer."""
    logprobs: ChatLogprobs | None
    """Where they were asked for."""
    finish_reason: FinishReason
    """`length` where it reached max_tokens before its end."""


class ChatCompletion(ResponseHead):
    """The answer to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    """OpenAI's field."""
    choices: list[ChatChoice]
    """One answer."""


class ChatChunkChoice(Body):
    """A piece of an answer."""

    index: Literal[0] = 0
    """There is one."""
    delta: dict[str, str]
    """`role` in the first chunk, and the `content` that comes on."""
    logprobs: ChatLogprobs | None
    """Of the tokens that were written since the chunk before."""
    finish_reason: FinishReason | None
    """Null where more follows."""


class ChatCompletionChunk(ResponseHead):
    """A piece of the answer to a conversation."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    """OpenAI's field."""
    choices: list[ChatChunkChoice]
    """One piece; none in the last chunk, which has the usage."""
