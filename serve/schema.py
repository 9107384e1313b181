"""Bodies of requests and responses."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Item = Annotated[str, Field(max_length=100_000)] | dict[str, Annotated[str, Field(max_length=100_000)]]


class Body(BaseModel):
    """Unknown fields are errors; the sentence under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ClassifyRequest(Body):
    """One or many inputs for one task."""

    model: str = Field(max_length=200)
    """Task name; to /v1/classify also `auto`, which lets the router choose a task for each input."""
    input: Item | list[Item]
    """A text, or an object with the task's input columns, or a list of either."""


class ClassifyResult(Body):
    """The answer to one input."""

    label: str
    """The most probable label; never anything outside the task's label set."""
    probabilities: dict[str, float]
    """Probability of every label, calibrated on the task's select examples."""
    is_truncated: bool
    """True where the input was longer than the task's max_length and its end was not read."""


class ClassifyResponse(Body):
    """Answers in the order of the inputs, and which adapter version gave them."""

    model: str
    """Task name."""
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


class GenerateRequest(ClassifyRequest):
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
    """Task name."""
    version: int
    """Adapter version that answered."""
    digest: str
    """sha256 of that version."""
    results: list[GenerateResult]
    """One per input."""


class ModelInfo(Body):
    """One served task."""

    id: str
    """Task name, the `model` of a request."""
    version: int
    """Champion version that answers."""
    digest: str
    """sha256 of that version."""
    labels: list[str]
    """The label set; empty for a free-text task."""
    columns: list[str]
    """Input columns; a plain text fills the first of them that the task names as its text."""
    base: str
    """Base model."""
    verdict: str | None = None
    """What the regression gate said of that version; null where it was never judged."""
    accuracy: float | None = None
    """On the gate examples; null where the task is judged by another metric."""
    num_gate_examples: int | None = None
    """How many these were."""
    is_resident: bool
    """Whether the adapter sits in a device slot of this replica now."""


class ModelList(Body):
    """Served tasks, and champions that could not be bound, with the reason."""

    data: list[ModelInfo]
    """Served tasks."""
    broken: dict[str, str]
    """`task@version` -> why it does not answer."""


class ErrorDetail(Body):
    """What went wrong."""

    message: str
    """What was expected, what was seen, what to do."""
    type: str
    """Kind of error."""
    routes: list[Route] | None = None
    """Where the router was not sure: what it made of every input."""


class ErrorBody(Body):
    """Every error's body."""

    error: ErrorDetail
    """The error."""
