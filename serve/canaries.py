"""The proof that an adapter is the one that was trained, and that it is applied: its stored reference scores. No queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from multilora.artifact import TaskCard
from multilora.base_model import FrozenBase
from multilora.errors import AdapterError, DataError, RequestError
from multilora.prompt import encode_prompt
from multilora.scoring import LabelSet, ScoringRow, encode_answer

CANARY_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}
"""Largest score difference between training and serving that rounding explains; quantised weights are exact in either dtype."""


def check_canaries(
    key: str,
    card: TaskCard,
    labels: LabelSet,
    slot: int,
    base: FrozenBase,
    scores_of: Callable[[Sequence[ScoringRow]], list[list[float]]],
) -> None:
    """Score the canaries of the adapter in `slot` and of the base alone.

    Raises AdapterError unless the adapter's scores are those after training, and other ones than the base's.
    """
    rows = canary_rows(key, card, labels, base)
    ours = [replace(row, slot=slot) for row in rows]
    # The base's score of the first mostly tells that they differ, and canaries are most of what a cold load takes. Scores are
    # held against each other within one pass: others round otherwise.
    *adapted, first = scores_of([*ours, rows[0]])
    check_scores(key, card, rows, adapted)
    if _are_equal(adapted[0], first):
        scores = scores_of([*ours, *rows])
        if all(map(_are_equal, scores[: len(rows)], scores[len(rows) :])):
            raise AdapterError(f"{key}: canary scores equal the base's, so the adapter has no effect")


def canary_rows(key: str, card: TaskCard, labels: LabelSet, base: FrozenBase) -> list[ScoringRow]:
    """The canaries as rows without a slot. Raises AdapterError where there are none, or one does not fit the prompt."""
    try:
        columns = [card.prompt_format.columns_of(canary.columns) for canary in card.canaries]
        prompts = [encode_prompt(card.prompt_format, given, base.tokenizer) for given in columns]
    except (RequestError, DataError) as misfit:
        raise AdapterError(f"{key}: a canary does not fit the prompt: {misfit}") from misfit
    if not prompts:
        raise AdapterError(f"{key} has no canaries, so nothing proves that it was applied")
    label_sets = [
        labels if canary.text is None else encode_answer(base, canary.text, card.max_new_tokens or 0) for canary in card.canaries
    ]
    return [ScoringRow(prompt.token_ids, None, asked) for prompt, asked in zip(prompts, label_sets, strict=True)]


def check_scores(key: str, card: TaskCard, rows: Sequence[ScoringRow], scores: Sequence[Sequence[float]]) -> None:
    """Raise AdapterError unless the scores of the canaries' rows are those after training."""
    tolerance = CANARY_TOLERANCE[card.base.dtype]
    # The log-likelihood of a long text gathers the rounding of all its tokens.
    error = max(
        _distance(seen, canary.scores) / (1 if canary.text is None else len(row.labels.token_ids[0]))
        for seen, canary, row in zip(scores, card.canaries, rows, strict=True)
    )
    if error > tolerance:
        raise AdapterError(f"{key}: canary scores differ by {error:.3g} from those after training (at most {tolerance})")


def _are_equal(first: Sequence[float], second: Sequence[float]) -> bool:
    return _distance(first, second) <= 1e-6


def _distance(first: Sequence[float], second: Sequence[float]) -> float:
    if len(first) != len(second):
        return math.inf
    distances = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return math.inf if any(map(math.isnan, distances)) else max(distances)
