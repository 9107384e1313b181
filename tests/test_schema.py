"""Bodies: texts, objects and lists of either come through as they are; everything else is refused with its place."""

import pytest
from pydantic import ValidationError

from serve.schema import ClassifyRequest


@pytest.mark.parametrize("given", ["a text", "", {"subject": "a", "body": "b"}, ["a", "b"], [{"body": "b"}, "a"], []])
def test_inputs_come_through_unchanged(given):
    assert ClassifyRequest.model_validate({"model": "cards", "input": given}).input == given


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"input": "a"}, "model"),
        ({"model": "cards"}, "input"),
        ({"model": "cards", "input": "a", "temperature": 1}, "temperature"),
        ({"model": 3, "input": "a"}, "model"),
        ({"model": "c" * 201, "input": "a"}, "model"),
        ({"model": "cards", "input": 3}, "input"),
        ({"model": "cards", "input": None}, "input"),
        ({"model": "cards", "input": [["a"]]}, "input"),
        ({"model": "cards", "input": {"body": 3}}, "input"),
        ({"model": "cards", "input": "a" * 100_001}, "input"),
        ({"model": "cards", "input": [{"body": "a" * 100_001}]}, "input"),
    ],
)
def test_other_bodies_are_refused_with_their_place(body, place):
    with pytest.raises(ValidationError) as refused:
        ClassifyRequest.model_validate(body)
    assert {error["loc"][0] for error in refused.value.errors()} == {place}
