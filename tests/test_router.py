"""Routing: a task's champion answers; an unknown task is told which there are; a broken one is told why."""

import pytest

from multilora.errors import AdapterError, UnknownTaskError
from serve.router import route

KEYS = {"mood": "mood@3", "cards": "cards@1"}
BROKEN = {"mail@2": "wrong base", "mood@4": "no canaries"}


def test_task_goes_to_its_champion():
    assert route("cards", KEYS, {}) == "cards@1"


def test_task_goes_to_the_last_good_champion_while_the_new_one_is_broken():
    assert route("mood", KEYS, BROKEN) == "mood@3"


def test_task_without_a_good_champion_says_what_is_wrong():
    with pytest.raises(AdapterError, match="task mail cannot answer now: wrong base"):
        route("mail", KEYS, BROKEN)


@pytest.mark.parametrize("model", ["mai", "mail@2", "mood@3", "cards ", "Cards", ""])
def test_other_names_are_told_the_tasks(model):
    with pytest.raises(UnknownTaskError, match=f"there is no task {model!r}; tasks are cards, mood"):
        route(model, KEYS, BROKEN)


def test_empty_endpoint_says_so():
    with pytest.raises(UnknownTaskError, match="there is no task 'cards'; tasks are none yet"):
        route("cards", {}, {})
