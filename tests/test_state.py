"""Law 10: every (status, event) pair is listed or raises; killed at any point and started again, the end is the same."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

import pytest

from orchestrator.state import TRANSITIONS, Action, Event, RunFacts, Status, advance, next_action

TABLE = {
    "NEW": {"STARTED": "TRAINING"},
    "TRAINING": {"STARTED": "TRAINING", "FINISHED": "TRAINED", "FAILED": "FAILED", "CANCELLED": "CANCELLED"},
    "TRAINED": {"STARTED": "TRAINING", "REGISTERED": "REGISTERED", "FAILED": "FAILED"},
    "REGISTERED": {"EVALUATED": "EVALUATED", "FAILED": "FAILED"},
    "EVALUATED": {"PROMOTED": "PROMOTED", "REJECTED": "REJECTED", "FAILED": "FAILED"},
    "PROMOTED": {"REJECTED": "REJECTED", "RECONSIDERED": "EVALUATED", "FAILED": "FAILED"},
    "REJECTED": {"PROMOTED": "PROMOTED", "RECONSIDERED": "EVALUATED", "FAILED": "FAILED"},
    "FAILED": {"STARTED": "TRAINING"},
    "CANCELLED": {"STARTED": "TRAINING"},
}


@pytest.mark.parametrize(("status", "event"), product(Status, Event))
def test_every_pair_is_listed_or_raises(status, event):
    expected = TABLE[status].get(event)
    if expected:
        assert advance(status, event) == expected
    else:
        with pytest.raises(ValueError, match=f"a run that is {status} cannot become {event}"):
            advance(status, event)


def test_the_table_names_every_status():
    assert set(TABLE) == set(Status)
    assert set(TRANSITIONS) == {(status, event) for status, events in TABLE.items() for event in events}


def expected_action(status, has_artifact, is_champion, is_gate_changed):
    """The action of every combination, spelt out."""
    match status:
        case "PROMOTED":
            return Action.KEEP if is_champion and not is_gate_changed else Action.JUDGE
        case "REJECTED":
            return Action.JUDGE if is_gate_changed else Action.KEEP
        case "EVALUATED":
            return Action.JUDGE
        case "REGISTERED":
            return Action.EVALUATE
        case "TRAINING" | "TRAINED":
            return Action.REGISTER if has_artifact else Action.TRAIN
        case "NEW" | "FAILED" | "CANCELLED":
            return Action.TRAIN


@pytest.mark.parametrize("facts", list(product(Status, *[(False, True)] * 3)), ids=lambda facts: "-".join(map(str, facts)))
def test_next_action_of_every_combination(facts):
    assert next_action(RunFacts(*facts)) is expected_action(*facts)


@dataclass
class Store:
    """What outlives a crash: the registry's tags and aliases, and the files of one workspace."""

    status: Status = Status.NEW
    has_artifact: bool = False
    has_version: bool = False
    has_answers: bool = False
    is_challenger: bool = False
    is_champion: bool = False
    judged_gate: str = ""
    num_versions: int = 0


def controller(store: Store, gate: str, is_good: bool) -> Iterator[None]:
    """Observe, decide, act until the run is kept. Yields after every single write: a crash may come at each of them."""

    def move(event: Event) -> None:
        store.status = advance(store.status, event)

    for _ in range(10):
        is_gate_changed = bool(store.judged_gate) and store.judged_gate != gate
        action = next_action(RunFacts(store.status, store.has_artifact, store.is_champion, is_gate_changed))
        if action is Action.KEEP:
            return
        if action is Action.TRAIN:
            move(Event.STARTED)
            yield
            store.has_artifact = True
            yield
            move(Event.FINISHED)
            yield
        elif action is Action.REGISTER:
            if store.status is Status.TRAINING:
                move(Event.FINISHED)
                yield
            if not store.has_version:
                store.has_version, store.num_versions = True, store.num_versions + 1
                yield
            store.is_challenger = True
            yield
            move(Event.REGISTERED)
            yield
        elif action is Action.EVALUATE:
            store.has_answers = True
            yield
            move(Event.EVALUATED)
            yield
        elif action is Action.JUDGE:
            assert store.has_answers
            if store.status is not Status.EVALUATED:
                move(Event.RECONSIDERED)
                yield
            store.judged_gate = gate
            yield
            if is_good:
                store.is_champion = True
                yield
                store.is_challenger = False
                yield
            move(Event.PROMOTED if is_good else Event.REJECTED)
            yield
    raise AssertionError("the run is never kept")


def run_through(store: Store, **options: object) -> int:
    """Run undisturbed; returns the number of writes."""
    return sum(1 for _ in controller(store, **options))


BEFORE = {
    "new": Store(),
    "failed": Store(Status.FAILED),
    "cancelled": Store(Status.CANCELLED),
    "worker died": Store(Status.TRAINING),
    "worker died after writing": Store(Status.TRAINING, has_artifact=True),
    "adapter folder lost": Store(Status.TRAINED),
    "promoted by another gate": Store(Status.PROMOTED, True, True, True, False, True, "old gate", 1),
    "rejected by another gate": Store(Status.REJECTED, True, True, True, True, False, "old gate", 1),
    "no longer the champion": Store(Status.PROMOTED, True, True, True, False, False, "gate", 1),
}


@pytest.mark.parametrize("is_good", [True, False])
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_killed_anywhere_twice_and_resumed_ends_in_the_same_state(before, is_good):
    undisturbed = replace(before)
    num_writes = run_through(undisturbed, gate="gate", is_good=is_good)
    assert undisturbed.status == (Status.PROMOTED if is_good else Status.REJECTED)
    assert undisturbed.num_versions == 1
    for first, second in product(range(num_writes + 1), repeat=2):
        store = replace(before)
        for killed_after in (first, second):
            writes = controller(store, gate="gate", is_good=is_good)
            for _ in range(killed_after):
                next(writes, None)
            writes.close()
        run_through(store, gate="gate", is_good=is_good)
        assert asdict(store) == asdict(undisturbed)
        assert run_through(store, gate="gate", is_good=is_good) == 0
