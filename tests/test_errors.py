"""Errors name what is wrong and what to do, and survive the way between processes."""

import pickle

import pytest

from multilora import errors
from multilora.errors import MultiLoraError, Problem, RequestError, SpecError, UnknownTaskError

PROBLEM = Problem("tasks/spam.yaml", "lora.rank", "0", "must be at least 1", "write 8")
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MultiLoraError)]


def test_problem_says_where_what_and_what_to_do():
    assert str(PROBLEM) == "tasks/spam.yaml: lora.rank: must be at least 1 (got 0). Fix: write 8"


def test_problem_without_a_value_leaves_it_out():
    missing = Problem("spam.jsonl:3", "label", "", "column is missing", "add it")
    assert str(missing) == "spam.jsonl:3: label: column is missing. Fix: add it"


def test_error_of_problems_lists_each_on_its_line():
    other = Problem("tasks/topic.yaml", "name", "", "field required", "add the field")
    error = SpecError.of(problem for problem in (PROBLEM, other))
    assert type(error) is SpecError
    assert error.problems == (PROBLEM, other)
    assert str(error).splitlines() == [str(PROBLEM), str(other)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling_with_their_problems(kind):
    copy = pickle.loads(pickle.dumps(kind("does not fit", [PROBLEM])))
    assert type(copy) is kind
    assert str(copy) == "does not fit"
    assert copy.problems == (PROBLEM,)


def test_there_are_six_kinds_by_who_can_act():
    assert {kind.__name__ for kind in MultiLoraError.__subclasses__()} == {
        "SpecError", "DataError", "AdapterError", "RegistryError", "CapacityError", "RequestError",
    }  # fmt: skip
    assert issubclass(UnknownTaskError, RequestError)
