"""A task whose texts tiny random bases can tell apart by their words, as a comparison's parts are given it."""

from __future__ import annotations

import random
from pathlib import Path

from tiny_routers import WORDS

from multilora.spec import BaseSpec, DataSpec, TaskSpec, TrainSpec
from orchestrator.dataset import Example, TaskDataset
from orchestrator.methods import Bench

INSTRUCTION = "Read a message. What is it about?\n{labels}\nMessage: {text}\nAnswer:"
LABELS = {"card lost": "the card is gone", "glad mood": None, "office": "work and its papers"}
SIZES = {"train": 24, "select": 12, "gate": 18}


def bench_of(base: BaseSpec, folder: Path, *, sizes=SIZES, labels=LABELS, instruction=INSTRUCTION, max_length=64) -> Bench:
    """Texts of a few of their label's words; a third of each label in every split."""
    spec = TaskSpec(
        name="tiny", base=base, data=DataSpec(train="tiny.jsonl"), instruction=instruction, labels=labels,
        train=TrainSpec(max_length=max_length),
    )  # fmt: skip
    splits = {split: tuple(_examples(split, num, list(labels))) for split, num in sizes.items()}
    return Bench(spec, TaskDataset("tiny", **splits, fingerprint="f", notes=()), folder, seeds=(0, 1))


def _examples(split: str, num: int, labels: list[str]) -> list[Example]:
    """Texts of the words of their label, which is the next one in turn."""
    rng = random.Random(split)
    words_of = dict(zip(labels, WORDS.values(), strict=False))
    examples = []
    for number in range(num):
        label = labels[number % len(labels)]
        text = f"{' '.join(rng.choices(words_of[label], k=3))} {split} {number}"
        examples.append(Example(text, {"text": text}, label))
    return examples
