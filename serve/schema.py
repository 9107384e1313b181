"""Bodies of requests and responses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Item = Annotated[str, Field(max_length=100_000)] | dict[str, Annotated[str, Field(max_length=100_000)]]


class Body(BaseModel):
    """Unknown fields are errors; the sentence under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Request(Body):
    """One or many inputs for one task."""

    model: str = Field(max_length=200)
    """Task name, or `task@version` for a version that is not the champion."""
    input: Item | list[Item]
    """A text, or an object with the task's input columns, or a list of either."""
    truncate: bool = False
    """Whether the end of an input that is longer than the task's max_length may be left out; otherwise it is an error."""


class ClassifyRequest(Request):
    """One or many inputs to label; the model `auto` lets the router choose a task for each of them."""

    abstain_below: float | None = Field(default=None, ge=0, le=1)
    """An input whose most probable label is less probable than this gets the label null."""


class ClassifyResult(Body):
    """The answer to one input."""

    label: str | None
    """The most probable label, never anything outside the task's label set; null where it is below `abstain_below`."""
    probabilities: dict[str, float]
    """Probability of every label, calibrated on the task's select examples."""
    is_truncated: bool
    """True where the input was longer than the task's max_length and its end was not read."""
    is_abstained: bool
    """True where no label was probable enough."""


class ClassifyResponse(Body):
    """Answers in the order of the inputs, and which adapter version gave them."""

    model: str
    """The model that was asked."""
    version: int
    """Adapter version that answered."""
    digest: str
    """sha256 of that version."""
    results: list[ClassifyResult]
    """One per input."""


class Route(Body):
    """What the router made of one input."""

    is_routed: bool
    """Whether it was sure enough of one task."""
    probability: float
    """Of the most probable candidate."""
    candidates: dict[str, float]
    """Tasks that may answer, most probable first; tasks that may not have the rest of the probability."""


class AutoResult(ClassifyResult):
    """The answer to one input, and the task that it was routed to."""

    task: str
    """Task that answered."""
    version: int
    """Its adapter version."""
    digest: str
    """sha256 of that version."""
    route: Route
    """Why this task."""


class AutoResponse(Body):
    """Answers in the order of the inputs, and which router chose their tasks."""

    model: str
    """`auto`."""
    version: int
    """Version of the router."""
    digest: str
    """sha256 of that version."""
    results: list[AutoResult]
    """One per input."""


class GenerateRequest(Request):
    """One or many inputs for one free-text task."""


class GenerateResult(Body):
    """The text for one input."""

    text: str
    """What the adapter wrote; every step takes the most likely token, so the same input gives the same text."""
    is_truncated: bool
    """True where the input was longer than the task's max_length and its end was not read."""
    is_cut_off: bool
    """True where the text reached the task's token limit before its end."""


class GenerateResponse(Body):
    """Texts in the order of the inputs, and which adapter version wrote them."""

    model: str
    """The model that was asked."""
    version: int
    """Adapter version that answered."""
    digest: str
    """sha256 of that version."""
    results: list[GenerateResult]
    """One per input."""


class ModelInfo(Body):
    """What a request can name: a task, or a base that writes texts by itself; also as OpenAI's clients read it."""

    id: str
    """Task name or the base's own name, the `model` of a request."""
    object: Literal["model"] = "model"
    """OpenAI's field."""
    created: int = 0
    """OpenAI's field; when a version was made is in the registry."""
    owned_by: str = "adapter"
    """OpenAI's field: adapter, or base for a base by itself."""
    version: int | None
    """Champion version that answers; null for a base by itself."""
    digest: str
    """sha256 of that version; the fingerprint of a base."""
    labels: list[str] | None
    """The label set; empty where a text is written. This and what follows is null while the adapter is in the registry alone."""
    columns: list[str] | None
    """Input columns; a plain text fills the first of them that the task names as its text."""
    base: str | None
    """Base model."""
    residency: Literal["device", "host", "registry"]
    """Where this replica has the adapter now: in a device slot, in host memory, or not yet fetched or let go again."""
    verdict: str | None = None
    """What the regression gate said of that version; null where it was never judged."""
    accuracy: float | None = None
    """On the gate examples; null where the task is judged by another metric."""
    num_gate_examples: int | None = None
    """How many these were."""


class ModelList(Body):
    """Served tasks, and champions that could not be bound, with the reason."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]
    """Served tasks, then bases that write texts by themselves."""
    broken: dict[str, str]
    """`task@version` -> why it does not answer."""


class Readiness(Body):
    """Whether requests should come to this replica."""

    is_ready: bool
    """Whether the champions are bound, canaries included."""


class ErrorDetail(Body):
    """What went wrong."""

    message: str
    """What was expected, what was seen, what to do."""
    type: str
    """Kind of error."""
    param: str | None = None
    """The field of the request that is wrong, where it is one."""
    code: str
    """What a program should tell errors by."""
    routes: list[Route] | None = None
    """Where the router was not sure: what it made of every input."""


class ErrorBody(Body):
    """Every error's body."""

    error: ErrorDetail
    """The error."""
