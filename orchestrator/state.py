"""What the state of a task's run is and what has to happen next. Pure functions of plain values; knows no Ray, no MLflow.

A run's status lives in its MLflow tag `status`; why it ended is a separate tag. After a crash the controller observes,
asks `next_action`, and acts, so a restart is nothing special.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Status(StrEnum):
    """How far a run has come."""

    NEW = "NEW"
    TRAINING = "TRAINING"
    TRAINED = "TRAINED"
    REGISTERED = "REGISTERED"
    EVALUATED = "EVALUATED"
    PROMOTED = "PROMOTED"
    REJECTED = "REJECTED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Event(StrEnum):
    """What can happen to a run."""

    STARTED = "STARTED"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    REGISTERED = "REGISTERED"
    EVALUATED = "EVALUATED"
    PROMOTED = "PROMOTED"
    REJECTED = "REJECTED"
    RECONSIDERED = "RECONSIDERED"


class Action(StrEnum):
    """What the controller does next for a run."""

    TRAIN = "TRAIN"
    REGISTER = "REGISTER"
    EVALUATE = "EVALUATE"
    JUDGE = "JUDGE"
    KEEP = "KEEP"


@dataclass(frozen=True)
class RunFacts:
    """What is known of a task's run for its present spec, data and base."""

    status: Status
    has_artifact: bool
    """A complete adapter folder is on disk."""
    is_champion: bool
    """The run's version is the task's champion."""
    is_gate_changed: bool
    """The spec's gate differs from the one that judged the run."""


@dataclass(frozen=True)
class Update:
    """One thing to show a person or a script: a new status, or progress inside TRAINING."""

    task: str
    status: str
    step: int = 0
    num_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    message: str = ""
    batch_size: int = 0
    """Examples of one step."""


TRANSITIONS: dict[tuple[Status, Event], Status] = {
    (Status.NEW, Event.STARTED): Status.TRAINING,
    (Status.TRAINING, Event.STARTED): Status.TRAINING,
    # A TRAINED run starts again where its adapter folder was lost.
    (Status.TRAINED, Event.STARTED): Status.TRAINING,
    (Status.FAILED, Event.STARTED): Status.TRAINING,
    (Status.CANCELLED, Event.STARTED): Status.TRAINING,
    # A run found TRAINING with a complete adapter folder died between writing it and saying so.
    (Status.TRAINING, Event.FINISHED): Status.TRAINED,
    (Status.TRAINING, Event.FAILED): Status.FAILED,
    (Status.TRAINING, Event.CANCELLED): Status.CANCELLED,
    (Status.TRAINED, Event.REGISTERED): Status.REGISTERED,
    (Status.TRAINED, Event.FAILED): Status.FAILED,
    (Status.REGISTERED, Event.EVALUATED): Status.EVALUATED,
    (Status.REGISTERED, Event.FAILED): Status.FAILED,
    # A version that was good and cannot be bound any more: its files or its base changed.
    (Status.EVALUATED, Event.FAILED): Status.FAILED,
    (Status.PROMOTED, Event.FAILED): Status.FAILED,
    (Status.REJECTED, Event.FAILED): Status.FAILED,
    (Status.EVALUATED, Event.PROMOTED): Status.PROMOTED,
    (Status.EVALUATED, Event.REJECTED): Status.REJECTED,
    # A person decided: rolled back, or promoted by force.
    (Status.PROMOTED, Event.REJECTED): Status.REJECTED,
    (Status.REJECTED, Event.PROMOTED): Status.PROMOTED,
    (Status.PROMOTED, Event.RECONSIDERED): Status.EVALUATED,
    (Status.REJECTED, Event.RECONSIDERED): Status.EVALUATED,
}


def advance(status: Status, event: Event) -> Status:
    """Apply an event. Raises ValueError for a pair that the table does not list."""
    try:
        return TRANSITIONS[status, event]
    except KeyError:
        raise ValueError(f"a run that is {status} cannot become {event}") from None


def next_action(facts: RunFacts) -> Action:
    """Decide what a run needs, in this order of priority:

    1. a judged run is kept, unless its gate changed or its promoted version is no longer the champion: judge again;
    2. an evaluated run is judged;
    3. a registered run is evaluated;
    4. a run in training, or trained, with a complete adapter folder is registered;
    5. everything else is trained, from its checkpoint where there is one.
    """
    if facts.status in (Status.PROMOTED, Status.REJECTED):
        is_stale = facts.is_gate_changed or (facts.status is Status.PROMOTED and not facts.is_champion)
        return Action.JUDGE if is_stale else Action.KEEP
    if facts.status is Status.EVALUATED:
        return Action.JUDGE
    if facts.status is Status.REGISTERED:
        return Action.EVALUATE
    if facts.status is Status.TRAINED or (facts.status is Status.TRAINING and facts.has_artifact):
        return Action.REGISTER if facts.has_artifact else Action.TRAIN
    return Action.TRAIN
