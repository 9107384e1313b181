"""A small task that can be learnt, over a tiny base, as a comparison is given it."""

import random
from pathlib import Path

from multilora.spec import TaskSpec
from orchestrator.dataset import Example, TaskDataset
from orchestrator.methods import Bench

LABELS = ("card lost", "card late", "rate")
WORDS = {"card lost": ("lost", "gone", "stolen"), "card late": ("late", "waiting", "when"), "rate": ("rate", "exchange", "euro")}
FILLERS = ("my", "the", "card", "is", "please", "and", "not", "today", "help", "a")


def tiny_bench(
    folder: Path, base: Path, *, labels=LABELS, train=(), lora=(), seeds=(0,), quantization="none", num_train=24
) -> Bench:
    """Three labels that words of their own give away; `train` and `lora` are settings of the spec."""
    spec = TaskSpec(
        name="cards",
        base={"model": str(base), "quantization": quantization},
        data={"train": "data.jsonl"},
        instruction="Which one is it?\n{labels}\nMessage: {text}" if labels else "Shorten: {text}",
        labels=dict.fromkeys(labels) if labels else None,
        lora=dict(lora),
        train={"epochs": 3, "batch_size": 8, "max_length": 96, "learning_rate": 3e-3, **dict(train)},
    )
    splits = [tiny_examples(count, name) for count, name in ((num_train, "train"), (9, "select"), (11, "gate"))]
    return Bench(spec, TaskDataset("cards", *splits, fingerprint="0" * 64, notes=()), folder, seeds=seeds)


def tiny_examples(count: int, prefix: str) -> tuple[Example, ...]:
    """Texts of different lengths, the labels in turn."""
    rng = random.Random(prefix)
    examples = []
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        words = [rng.choice(WORDS[label]), *rng.choices(FILLERS, k=rng.randint(1, 12))]
        rng.shuffle(words)
        examples.append(Example(f"{prefix}-{number}", {"text": " ".join(words)}, label))
    return tuple(examples)
