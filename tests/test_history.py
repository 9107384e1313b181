"""The history matrix: missing is never zero, other yardsticks are not compared, and each sum has its denominator."""

from dataclasses import replace

import pytest

from orchestrator.history import (
    Cell,
    CellState,
    PromotionEvent,
    append_event,
    best_ever,
    comparable,
    flip_rate,
    next_cells,
    num_consults,
    read_events,
    summary,
    values_of,
)

MEASURED, CANARY, CARRIED = CellState.MEASURED, CellState.CANARY, CellState.CARRIED
MISSING, NOT_COMPARABLE = CellState.MISSING, CellState.NOT_COMPARABLE


def cell(task, version, value, **changes):
    return replace(Cell(MEASURED, f"{task}@{version}", value=value, gate_fingerprint="gate", scorer_version=1), **changes)


def event(number, cells, **changes):
    defaults = {"kind": "submit", "created": "2026-01-01T00:00:00", "who": "me", "outcome": "CLEAR", "reason": ""}
    return PromotionEvent(id=f"2026-01-{number:02}", cells=cells, **{**defaults, **changes})


def states(cells):
    return {task: found.state for task, found in cells.items()}


def told(rows):
    return {metric.name: metric.value for metric in summary(rows)}


def test_events_come_back_as_they_were_written_oldest_first(tmp_path):
    second = event(2, {"a": cell("a", 2, 0.9), "b": Cell(MISSING, None)}, consulted={"a": "gate"}, flip_rates={"a": 0.04})
    first = event(1, {"a": cell("a", 1, 0.8, zero_shot=0.5)}, kind="rollback", outcome="FORCED", reason="it <b>broke</b>")
    for given in (second, first):
        append_event(tmp_path / "history", given)
    assert read_events(tmp_path / "history") == [first, second]
    assert read_events(tmp_path / "none") == []
    assert sorted(file.name for file in (tmp_path / "history").iterdir()) == ["2026-01-01.json", "2026-01-02.json"]


def test_a_half_written_event_is_not_read(tmp_path):
    append_event(tmp_path, event(1, {}))
    (tmp_path / ".2026-01-02.7.tmp").write_text("{")
    assert [found.id for found in read_events(tmp_path)] == ["2026-01-01"]


def test_a_cell_says_how_its_value_is_known():
    before = {task: cell(task, 1, 0.8) for task in ("again", "verified", "idle", "gone", "other", "unknown")}
    before["unknown"] = Cell(MISSING, "unknown@1")
    champions = {task: f"{task}@1" for task in before if task != "gone"} | {"other": "other@2", "new": "new@1"}
    found = next_cells(before, {"again": cell("again", 2, 0.9)}, {"verified", "other", "unknown"}, champions)
    assert states(found) == {
        "again": MEASURED, "verified": CANARY, "idle": CARRIED, "gone": MISSING, "other": MISSING, "unknown": MISSING,
        "new": MISSING,
    }  # fmt: skip
    assert list(found) == sorted(found)
    assert {task: found[task].value for task in found if found[task].state is MISSING} == dict.fromkeys(
        ("gone", "new", "other", "unknown")
    )
    assert (found["other"].version, found["gone"].version) == ("other@2", None)
    assert (found["idle"].value, found["verified"].value) == (0.8, 0.8)


@pytest.mark.parametrize("change", [{"gate_fingerprint": "other"}, {"metric": "macro_f1"}, {"scorer_version": 2}])
def test_what_was_measured_otherwise_is_not_compared_with_the_newest(change):
    events = [
        event(1, {"a": cell("a", 1, 0.99, **change)}),
        event(2, {"a": cell("a", 2, 0.8)}),
        event(3, {"a": cell("a", 3, 0.7)}),
    ]
    rows = comparable(events)
    assert [row["a"].state for row in rows] == [NOT_COMPARABLE, MEASURED, MEASURED]
    assert values_of(rows, "a") == [0.8, 0.7]
    assert best_ever(rows, "a") == 0.8
    assert told(rows)["backward transfer"] == pytest.approx(-0.1)


def test_summary_by_hand():
    """Three tasks: a was measured three times, b once and then carried, c has lost its champion."""
    rows = comparable(
        [
            event(1, {"a": cell("a", 1, 0.8), "c": cell("c", 1, 0.6)}),
            event(2, {"a": cell("a", 2, 0.9), "b": cell("b", 1, 0.5), "c": cell("c", 1, 0.6, state=CARRIED)}),
            event(3, {"a": cell("a", 3, 0.7), "b": cell("b", 1, 0.5, state=CARRIED), "c": Cell(MISSING, None)}),
        ]
    )
    assert told(rows) == {
        "average accuracy": pytest.approx((0.7 + 0.5) / 2),
        "learning accuracy": pytest.approx((0.8 + 0.5) / 2),
        "backward transfer": pytest.approx(0.7 - 0.8),
        "forgetting": pytest.approx(0.9 - 0.7),
    }
    assert {metric.name: metric.meaning for metric in summary(rows)} == {
        "average accuracy": "value now, mean over 2 tasks",
        "learning accuracy": "first value, mean over 2 tasks",
        "backward transfer": "value now - first value, mean over 1 tasks measured again",
        "forgetting": "best earlier value - value now, mean over 1 tasks measured again",
    }
    assert best_ever(rows, "c") == 0.6
    assert best_ever(rows, "d") is None


def test_accuracy_is_learning_accuracy_plus_what_came_later():
    """ACC = LA + BWT x (tasks measured again) / (tasks): forgetting.md 1.1."""
    rows = comparable(
        [
            event(1, {"a": cell("a", 1, 0.8)}),
            event(2, {"a": cell("a", 1, 0.75), "b": cell("b", 1, 0.6)}),
            event(3, {"a": cell("a", 1, 0.7), "b": cell("b", 1, 0.65), "c": cell("c", 1, 0.9)}),
        ]
    )
    found = told(rows)
    assert found["average accuracy"] == pytest.approx(found["learning accuracy"] + found["backward transfer"] * 2 / 3)
    assert found["forgetting"] >= -found["backward transfer"] - 1e-12


def test_after_a_roll_back_the_value_that_is_back_counts():
    rows = comparable(
        [
            event(1, {"a": cell("a", 1, 0.8)}),
            event(2, {"a": cell("a", 2, 0.9)}),
            event(3, {"a": cell("a", 1, 0.8, state=CARRIED)}, kind="rollback"),
        ]
    )
    found = told(rows)
    assert found["average accuracy"] == 0.8
    assert found["backward transfer"] == 0.0
    assert found["forgetting"] == pytest.approx(0.1)


def test_nothing_is_none_and_never_zero():
    assert set(told([]).values()) == {None}
    assert set(told(comparable([event(1, {"a": Cell(MISSING, None)})])).values()) == {None}
    one = told(comparable([event(1, {"a": cell("a", 1, 0.8)})]))
    assert (one["backward transfer"], one["forgetting"]) == (None, None)


def test_a_ratchet_shows_in_forgetting_alone():
    """Six promotions, each one point down, pass a margin of two; best-ever minus now says six."""
    rows = comparable([event(number, {"a": cell("a", number, 0.9 - number / 100)}) for number in range(1, 8)])
    assert told(rows)["forgetting"] == pytest.approx(0.06)


def test_consults_are_counted_by_gate_split():
    events = [event(1, {}, consulted={"a": "g1", "b": "g2"}), event(2, {}, consulted={"a": "g1"}), event(3, {})]
    assert [num_consults(events, gate) for gate in ("g1", "g2", "g3")] == [2, 1, 0]


def test_the_flip_rate_is_the_newest():
    events = [event(1, {}, flip_rates={"a": 0.1}), event(2, {}, flip_rates={"a": 0.04, "b": 0.2}), event(3, {})]
    assert (flip_rate(events, "a"), flip_rate(events, "b"), flip_rate(events, "c")) == (0.04, 0.2, None)
