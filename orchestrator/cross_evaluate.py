"""Score every adapter on every task's examples, all adapters in one mixed batch of the serving engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from multilora.artifact import read_artifact
from multilora.base_model import load_base
from multilora.errors import AdapterError
from multilora.prompt import Prompt
from multilora.spec import BaseSpec
from orchestrator.cross import BASE, CrossColumn
from orchestrator.eval_report import EvalItem
from orchestrator.metrics import is_right
from serve.answer import Answer
from serve.engine import Engine, Work

MAX_SLOTS = 32
"""More adapters than this take turns in the slots."""


def cross_columns(base: BaseSpec, items: Sequence[EvalItem]) -> Iterator[CrossColumn]:
    """Give the column of each task in turn; first those whose adapter cannot be bound. All tasks must have labels."""
    artifacts, errors = {}, {}
    for item in items:
        try:
            artifacts[item.task] = read_artifact(Path(item.folder), item.digest)
        except AdapterError as error:
            errors[item.task] = str(error)
    max_rank = max((artifact.card.rank for artifact in artifacts.values()), default=1)
    engine = Engine(load_base(base), min(len(items), MAX_SLOTS), max_rank)
    keys = {}
    for item in items:
        if item.task in artifacts:
            try:
                keys[item.task] = engine.bind(artifacts[item.task], item.version)
            except AdapterError as error:
                errors[item.task] = str(error)
    yield from (CrossColumn(task, 0, {}, error) for task, error in errors.items())
    for item in items:
        if item.task in keys:
            yield column_of(engine, item, keys)


def column_of(engine: Engine, item: EvalItem, keys: Mapping[str, str]) -> CrossColumn:
    """Ask the base and all bound adapters, task -> key, the examples of one task."""
    own = keys[item.task]
    prompts = [engine.prompt(own, example.columns) for example in item.gate]
    zero_shot = engine.classify_zero_shot(engine.bound(own).prompt_format, [example.columns for example in item.gate])
    answers = {BASE: zero_shot, **_answers(engine, prompts, list(keys.values()), own)}
    num_right = {row: None if given is None else _num_right(item, given) for row, given in answers.items()}
    return CrossColumn(item.task, len(item.gate), num_right)


def _answers(engine: Engine, prompts: Sequence[Prompt], keys: Sequence[str], asked_as: str) -> dict[str, list[Answer] | None]:
    """Answers by adapter; None of one whose scores are no numbers, which must not cost the others' cells."""
    works = [Work(key, prompt, asked_as) for key in keys for prompt in prompts]
    try:
        answers = engine.classify(works)
    except AdapterError:
        if len(keys) == 1:
            return {keys[0]: None}
        return {key: given for one in keys for key, given in _answers(engine, prompts, [one], asked_as).items()}
    size = len(prompts)
    return {key: answers[number * size : (number + 1) * size] for number, key in enumerate(keys)}


def _num_right(item: EvalItem, answers: Sequence[Answer]) -> int:
    return sum(is_right(example.label, answer.label) for example, answer in zip(item.gate, answers, strict=True))
