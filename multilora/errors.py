"""One base error and six kinds, by who can act. A regression gate's "no" is a value (a verdict), never one of these."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a user's input: where it is, what was seen, the rule, and what to do."""

    where: str
    """File, or file and row."""
    field: str
    """Dotted path of the field, or the column."""
    value: str
    """What was found there, shortened."""
    rule: str
    fix: str

    def __str__(self) -> str:
        got = f" (got {self.value})" if self.value else ""
        return f"{self.where}: {self.field}: {self.rule}{got}. Fix: {self.fix}"


class MultiLoraError(Exception):
    """Base of every error that a person can act on."""

    def __init__(self, message: str, problems: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> MultiLoraError:
        """Build the error that lists `problems`, one per line."""
        listed = tuple(problems)
        return cls("\n".join(str(problem) for problem in listed), listed)

    def __reduce__(self) -> tuple[type[MultiLoraError], tuple[str, tuple[Problem, ...]]]:
        # Errors cross process borders (Ray pickles them); the default would lose `problems`.
        return type(self), (str(self), self.problems)


class SpecError(MultiLoraError):
    """The author of a task spec must change it."""


class DataError(MultiLoraError):
    """The owner of the data must change it: missing file or column, empty split, overlap."""


class AdapterError(MultiLoraError):
    """An adapter artifact does not fit: wrong base, rank, modules, digest, or canary answers."""


class OutdatedAdapterError(AdapterError):
    """An adapter was written by a version of this software whose adapters this one does not read."""


class RegistryError(MultiLoraError):
    """MLflow cannot be reached or does not hold what was asked for."""


class RegistryAwayError(RegistryError):
    """MLflow cannot be reached now; the same call may succeed later."""


class CapacityError(MultiLoraError):
    """There is no room now: no GPU, no slot, no memory; or none that could ever fit."""


class RequestError(MultiLoraError):
    """The caller of the API must change the request."""


class UnknownTaskError(RequestError):
    """The request names a task that is not served."""

    model = ""
    """What the request names; empty where the message says all there is."""
    tasks: Collection[str] = ()
    """What is served instead."""


class WrongRouteError(RequestError):
    """The task answers with labels and was asked for a text, or the other way round."""


class UnroutedError(RequestError):
    """The router is not sure which task an input belongs to."""

    routes: Sequence[tuple[bool, float, Mapping[str, float]]] = ()
    """Of every input: whether it was routed, the probability of its best candidate, and that of all candidates."""


class UnauthorizedError(RequestError):
    """The request has no API key, or one that is not known."""


class ForbiddenError(RequestError):
    """The API key does not open what was asked for."""


class TooLargeError(RequestError):
    """The request has more bytes than are read, or an input more tokens."""


class DeadlineError(CapacityError):
    """The answer was not there in time."""


class RateLimitError(CapacityError):
    """The API key asks more often than it may."""

    retry_after_s = 1.0
    """When the same request would be answered."""
