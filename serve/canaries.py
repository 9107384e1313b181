"""The proof that an adapter is the one that was trained, and that it is applied: its stored reference scores. No queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    rows = [ScoringRow(p.token_ids, which, asked) for which in (slot, None) for p, asked in zip(prompts, label_sets, strict=True)]
    scores = scores_of(rows)  # one forward pass
    adapted, plain = scores[: len(prompts)], scores[len(prompts) :]
    tolerance = CANARY_TOLERANCE[card.base.dtype]
    # The log-likelihood of a long text gathers the rounding of all its tokens.
    error = max(
        _distance(seen, canary.scores) / (1 if canary.text is None else len(asked.token_ids[0]))
        for seen, canary, asked in zip(adapted, card.canaries, label_sets, strict=True)
    )
    if error > tolerance:
        raise AdapterError(f"{key}: canary scores differ by {error:.3g} from those after training (at most {tolerance})")
    if max(_distance(a, b) for a, b in zip(adapted, plain, strict=True)) <= 1e-6:
        raise AdapterError(f"{key}: canary scores equal the base's, so the adapter has no effect")


def _distance(first: Sequence[float], second: Sequence[float]) -> float:
    if len(first) != len(second):
        return math.inf
    distances = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return math.inf if any(map(math.isnan, distances)) else max(distances)
