"""What a model's name means: a task, or a version of it; an unknown one is told which tasks there are."""

import pytest

from serve.router import pinned, task_of, unknown_task


def test_a_version_is_pinned_by_its_number():
    assert pinned("mood@3") == ("mood", 3)
    assert task_of("mood@3") == task_of("mood") == "mood"


@pytest.mark.parametrize(
    "model", ["mood", "mood@", "mood@0", "mood@03", "mood@x", "mood@1@2", "Mood@1", "../mood@1", "@1", "", "mood@1\n"]
)
def test_other_names_pin_nothing(model):
    assert pinned(model) is None
    assert task_of(model) == model


def test_unknown_task_lists_the_tasks():
    assert str(unknown_task("mod", {"mood", "cards"})) == "there is no task 'mod'; tasks are cards, mood"
    assert str(unknown_task("mod", ())) == "there is no task 'mod'; tasks are none yet"
    many = [f"task-{number:03}" for number in range(1000)]
    assert str(unknown_task("mod", many)).endswith("task-048, task-049 and 950 more: GET /v1/models")
