"""The router of `model: auto`: a linear softmax over the base's own mean states of a text says which task it belongs to.

A folder of two files: router_card.json (base, tasks, threshold, what was measured, canaries) and router.safetensors. It is
registered under a name that no task can have, and read with the care of an adapter: it fits its base, or it is refused.

Dims: B texts, H hidden, K tasks.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from multilora.errors import AdapterError, OutdatedAdapterError
from multilora.spec import BaseSpec, Part

FORMAT_VERSION = 1
"""Raise it when card, pooling or scores change."""
CARD, WEIGHTS = "router_card.json", "router.safetensors"
ABSTAINED = "(abstained)"
"""Where a text went that was not routed; no task can bear this name."""
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}
"""Largest difference of a canary's scores that rounding explains, as for adapters."""
Embed = Callable[[Sequence[str], int], Tensor]
"""Texts and their longest length in tokens -> the base's mean state of each, unit length [B, H]."""


class RouterCanary(Part):
    """A text with the scores that the router gave it after training."""

    text: str
    """The text."""
    scores: list[float]
    """In the order of the card's tasks, before the temperature."""


class Confusion(Part):
    """Where the texts of every task went."""

    counts: dict[str, dict[str, int]]
    """Task that a text belongs to -> task that it was routed to, or `(abstained)` -> number of texts."""

    def num_texts(self, task: str) -> int:
        """Texts of the task."""
        return sum(self.counts[task].values())

    def recall(self, task: str) -> float:
        """Share of the task's texts that were routed to it."""
        return self.counts[task].get(task, 0) / self.num_texts(task)

    @property
    def abstained(self) -> float:
        """Share of all texts that were routed nowhere."""
        return sum(row.get(ABSTAINED, 0) for row in self.counts.values()) / sum(map(self.num_texts, self.counts))

    @property
    def precision(self) -> float:
        """Share of the routed texts that went to their task; 1 where none was routed."""
        num_routed = sum(count for row in self.counts.values() for to, count in row.items() if to != ABSTAINED)
        return sum(row.get(task, 0) for task, row in self.counts.items()) / num_routed if num_routed else 1.0


class RouterCard(Part):
    """What a router needs besides its weights."""

    format_version: int
    """Version of this card's layout and of the code that scores."""
    base: BaseSpec
    """The base whose states are read."""
    base_fingerprint: str
    """Fingerprint of that base; any other is refused."""
    tasks: list[str] = Field(min_length=2)
    """Task names, in the order of the scores."""
    max_length_tokens: int = Field(ge=1)
    """Longest text in tokens; the end of a longer one is not read."""
    temperature: float = Field(gt=0, allow_inf_nan=False)
    """Divides the scores before the softmax; fitted on the select splits."""
    threshold: float = Field(ge=0, le=1)
    """A text whose best task is less probable is not routed."""
    select: Confusion
    """On the select splits, which chose temperature and threshold."""
    gate: Confusion
    """On the gate splits, which chose nothing."""
    canaries: list[RouterCanary] = Field(min_length=1)
    """Reference scores for binding."""
    data_fingerprint: str
    """Hash of the examples that trained it."""

    @model_validator(mode="after")
    def _check(self) -> RouterCard:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("a task is listed twice")
        if any(len(canary.scores) != len(self.tasks) for canary in self.canaries):
            raise ValueError("a canary has not one score per task")
        return self


class _CardHead(BaseModel):
    """What every format of the card has."""

    format_version: int


@dataclass(frozen=True)
class TaskRouter:
    """A checked router folder with its weights."""

    card: RouterCard
    digest: str
    """sha256 over card and weights."""
    weights_KH: Tensor
    bias_K: Tensor

    def probabilities(self, texts: Sequence[str], embed: Embed) -> list[dict[str, float]]:
        """How likely each text belongs to each task. Raises AdapterError for scores that are no numbers."""
        scores_BK = linear_scores(embed(texts, self.card.max_length_tokens), self.weights_KH, self.bias_K)
        if not bool(scores_BK.isfinite().all()):
            raise AdapterError("the router gives tasks scores that are no numbers")
        rows = torch.softmax(scores_BK / self.card.temperature, dim=-1).tolist()
        return [dict(zip(self.card.tasks, row, strict=True)) for row in rows]

    def check_base(self, base_fingerprint: str, embed: Embed) -> None:
        """Raise AdapterError unless this is the router's base and its canaries score as they did after training."""
        card = self.card
        if card.base_fingerprint != base_fingerprint:
            raise AdapterError(
                f"the router was trained on base {card.base.model} with fingerprint {card.base_fingerprint[:12]}; "
                f"this base has {base_fingerprint[:12]}: train it again with `orchestrator router train`"
            )
        vectors_BH = embed([canary.text for canary in card.canaries], card.max_length_tokens)
        if vectors_BH.shape[1] != self.weights_KH.shape[1]:
            raise AdapterError(
                f"the router reads {self.weights_KH.shape[1]} numbers a text, the base gives {vectors_BH.shape[1]}"
            )
        seen_BK = linear_scores(vectors_BH, self.weights_KH, self.bias_K)
        error = float((seen_BK - torch.tensor([canary.scores for canary in card.canaries])).abs().max())
        tolerance = TOLERANCE[card.base.dtype]
        if math.isnan(error) or error > tolerance:
            raise AdapterError(
                f"the router's canary scores differ by {error:.3g} from those after training (at most {tolerance})"
            )


def routed_to(probabilities: Mapping[str, float], threshold: float) -> str:
    """The most probable task, or ABSTAINED where it is not probable enough; the first of equals."""
    best = max(probabilities, key=probabilities.__getitem__)
    return best if probabilities[best] >= threshold else ABSTAINED


def text_of(item: str | Mapping[str, str]) -> str:
    """What the router reads of an input: the text, or all columns, whatever their order."""
    return item if isinstance(item, str) else "\n".join(item[name] for name in sorted(item))


def linear_scores(vectors_BH: Tensor, weights_KH: Tensor, bias_K: Tensor) -> Tensor:
    """Score every task for every text [B, K]."""
    return vectors_BH @ weights_KH.T + bias_K


def write_router(folder: Path, card: RouterCard, weights_KH: Tensor, bias_K: Tensor) -> TaskRouter:
    """Write a router folder atomically, replacing an older one."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_file({"weights": weights_KH.contiguous(), "bias": bias_K.contiguous()}, staging / WEIGHTS)
    (staging / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    staging.replace(folder)
    return TaskRouter(card, _digest(folder), weights_KH, bias_K)


def read_router(folder: Path, digest: str | None = None) -> TaskRouter:
    """Read a router folder. Raises AdapterError for a missing or broken part or another digest."""
    missing = [name for name in (CARD, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"router folder {folder.name} lacks {', '.join(missing)}")
    seen = _digest(folder)
    if digest is not None and seen != digest:
        raise AdapterError(f"the router has digest {seen[:12]}, its registry entry says {digest[:12]}: files changed")
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        head = _CardHead.model_validate_json(text)
        # Another format has other fields, which must not read as a broken card.
        if head.format_version != FORMAT_VERSION:
            raise OutdatedAdapterError(
                f"the router has card format {head.format_version}, this version reads {FORMAT_VERSION}: "
                "train it again with `orchestrator router train`"
            )
        card = RouterCard.model_validate_json(text)
        state = load((folder / WEIGHTS).read_bytes())  # not mapped: the file may change later
    except (ValidationError, UnicodeDecodeError, SafetensorError, OSError) as error:
        raise AdapterError(f"router folder {folder.name} is broken: {error}") from error
    if set(state) != {"weights", "bias"}:
        raise AdapterError(f"router {folder.name} must hold the tensors weights and bias, it holds {', '.join(sorted(state))}")
    weights_KH, bias_K = state["weights"], state["bias"]
    num_tasks = len(card.tasks)
    if weights_KH.dim() != 2 or len(weights_KH) != num_tasks or bias_K.shape != (num_tasks,):
        shapes = f"{list(weights_KH.shape)} and {list(bias_K.shape)}"
        raise AdapterError(f"the router's weights and bias have shapes {shapes}, its card lists {num_tasks} tasks")
    return TaskRouter(card, seen, weights_KH.float(), bias_K.float())


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CARD, WEIGHTS):
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()
