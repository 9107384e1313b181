"""Texts that tiny random bases can tell apart by their words, and what a router is fitted on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from multilora.spec import BaseSpec
from orchestrator.dataset import Example
from orchestrator.router_fit import RouterData

WORDS: Mapping[str, Sequence[str]] = {
    "cards": ("card", "wallet", "bank", "account"),
    "mood": ("happy", "angry", "sad", "smile"),
    "mail": ("meeting", "project", "invoice", "report"),
    "trips": ("train", "flight", "hotel", "beach"),
}
MAX_LENGTH = 32
SIZES = {"train": 60, "select": 30, "gate": 30}


def texts_of(task: str, num: int, purpose: str) -> list[str]:
    """Distinct texts of the task's words; another purpose gives other texts."""
    rng = random.Random(f"{task} {purpose}")
    return [f"{' '.join(rng.choices(WORDS[task], k=6))} {purpose} {number}" for number in range(num)]


def examples_of(task: str, num: int, purpose: str) -> list[Example]:
    """The same as examples of one column."""
    return [Example(f"{task} {purpose} {i}", {"text": text}, "any") for i, text in enumerate(texts_of(task, num, purpose))]


def router_data(base: BaseSpec, tasks: Iterable[str], precision: float = 0.95) -> RouterData:
    """Sixty texts a task to train on, thirty to choose with, thirty to judge by."""
    splits = {purpose: {task: examples_of(task, num, purpose) for task in tasks} for purpose, num in SIZES.items()}
    return RouterData(base, MAX_LENGTH, precision, **splits)
