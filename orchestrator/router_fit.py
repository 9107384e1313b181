"""Fits the router of `model: auto`: weights on the tasks' train texts, temperature and threshold on their select texts.

Dims: B texts, H hidden, K tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from multilora.spec import BaseSpec
from multilora.task_router import (
    FORMAT_VERSION,
    Confusion,
    RouterCanary,
    RouterCard,
    TaskRouter,
    linear_scores,
    routed_to,
    text_of,
    write_router,
)
from orchestrator.calibration import fit_temperature
from orchestrator.dataset import Example
from serve.engine import Engine

PRECISION = 0.95
"""Share of the routed select texts that must go to their task; the threshold is the lowest that reaches it."""
MIN_THRESHOLD = 0.5
"""A text that more likely belongs elsewhere is never routed."""
REGULARISATION = 0.01
"""C of the logistic regression over standardised states: what five-fold cross-validation chose on the shipped tasks."""
NUM_CANARIES = 16
Splits = Mapping[str, Sequence[Example]]
"""Task -> examples."""


@dataclass(frozen=True)
class RouterData:
    """The texts of the tasks that a router is to know, and how it shall read and route them."""

    base: BaseSpec
    max_length_tokens: int
    precision: float
    """See PRECISION."""
    train: Splits
    select: Splits
    gate: Splits

    @property
    def tasks(self) -> list[str]:
        """Task names."""
        return list(self.train)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the router, but for the base."""
        ids = [[task, *(example.id for example in split[task])] for split in (self.train, self.select) for task in split]
        settings = [FORMAT_VERSION, self.precision, MIN_THRESHOLD, REGULARISATION, self.max_length_tokens]
        return hashlib.sha256(json.dumps([settings, ids]).encode()).hexdigest()


def fit_router(data: RouterData, engine: Engine, folder: Path) -> TaskRouter:
    """Fit weights on train, temperature and threshold on select, and measure; the router is written into `folder`."""
    index = {task: number for number, task in enumerate(data.tasks)}

    def states(split: Splits) -> tuple[Tensor, list[int]]:
        texts = [text_of(example.columns) for task in data.tasks for example in split[task]]
        return engine.embed(texts, data.max_length_tokens), [index[task] for task in data.tasks for _ in split[task]]

    train_BH, train_gold = states(data.train)
    weights_KH, bias_K = fit_weights(train_BH.numpy(), train_gold)
    select_BH, select_gold = states(data.select)
    scores_BK = linear_scores(select_BH, weights_KH, bias_K)
    temperature = fit_temperature(scores_BK.tolist(), select_gold)
    probabilities_BK = torch.softmax(scores_BK / temperature, dim=-1)
    is_right = probabilities_BK.argmax(-1) == torch.tensor(select_gold)
    threshold = lowest_threshold(probabilities_BK.max(-1).values.tolist(), is_right.tolist(), data.precision)
    card = RouterCard(
        format_version=FORMAT_VERSION,
        base=data.base,
        base_fingerprint=engine.base.files.fingerprint,
        tasks=data.tasks,
        max_length_tokens=data.max_length_tokens,
        temperature=temperature,
        threshold=threshold,
        select=Confusion(counts={}),
        gate=Confusion(counts={}),
        canaries=_canaries(data, train_BH, train_gold, weights_KH, bias_K),
        data_fingerprint=data.fingerprint,
    )
    unmeasured = TaskRouter(card, "", weights_KH, bias_K)
    measured = {name: _confusion(unmeasured, split, engine) for name, split in (("select", data.select), ("gate", data.gate))}
    return write_router(folder, card.model_copy(update=measured), weights_KH, bias_K)


def fit_weights(states_BH: NDArray[np.float32], gold: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Fit a softmax over the states; a task with few texts counts as much as one with many.

    The states are standardised, because those of most bases are nearly parallel; the weights take this in.
    """
    scaler = StandardScaler().fit(states_BH)
    model = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=5000)
    model.fit(scaler.transform(states_BH), gold)
    weights_KH, bias_K = model.coef_ / scaler.scale_, model.intercept_
    bias_K = bias_K - weights_KH @ scaler.mean_
    if len(bias_K) == 1:  # of two classes scikit-learn keeps the second one's log odds
        weights_KH, bias_K = np.concatenate([0 * weights_KH, weights_KH]), np.concatenate([[0.0], bias_K])
    return torch.tensor(weights_KH, dtype=torch.float32), torch.tensor(bias_K, dtype=torch.float32)


def lowest_threshold(confidences: Sequence[float], is_right: Sequence[bool], precision: float) -> float:
    """The lowest threshold, MIN_THRESHOLD or above, of which so large a share is right; 1 where there is none."""
    pairs = zip(confidences, is_right, strict=True)
    ranked = sorted((pair for pair in pairs if pair[0] >= MIN_THRESHOLD), reverse=True)
    num_right, found = 0, 1.0
    for number, (confidence, right) in enumerate(ranked, start=1):
        num_right += right
        is_all = number == len(ranked)
        is_last = is_all or ranked[number][0] < confidence  # equal confidences pass or fail together
        if is_last and num_right / number >= precision:
            found = MIN_THRESHOLD if is_all else confidence
    return found


def _canaries(
    data: RouterData, train_BH: Tensor, train_gold: Sequence[int], weights_KH: Tensor, bias_K: Tensor
) -> list[RouterCanary]:
    """The first training text of each task, of some tasks where there are many."""
    texts = [text_of(example.columns) for task in data.tasks for example in data.train[task]]
    rows = [train_gold.index(number) for number in range(min(len(data.tasks), NUM_CANARIES))]
    scores_BK = linear_scores(train_BH[rows], weights_KH, bias_K)
    return [RouterCanary(text=texts[row], scores=scores) for row, scores in zip(rows, scores_BK.tolist(), strict=True)]


def routes_of(router: TaskRouter, examples: Sequence[Example], engine: Engine) -> list[str]:
    """The task that each example is routed to, or ABSTAINED."""
    rows = router.probabilities([text_of(example.columns) for example in examples], engine.embed)
    return [routed_to(row, router.card.threshold) for row in rows]


def _confusion(router: TaskRouter, split: Splits, engine: Engine) -> Confusion:
    return Confusion(counts={task: dict(Counter(routes_of(router, examples, engine))) for task, examples in split.items()})
