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
    """Task name."""
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


class ErrorBody(Body):
    """Every error's body."""

    error: ErrorDetail
    """The error."""
