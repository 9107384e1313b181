"""Tasks of random words whose prompts have exactly as many tokens as asked for, and a GroupTrainer that trains them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, T5Tokenizer

from benchmarks.shapes import ALPHA, RANK
from multilora.base_files import BaseFiles
from multilora.base_model import FrozenBase
from multilora.spec import BaseSpec, TaskSpec
from orchestrator.batching import batch_indices
from orchestrator.dataset import Example
from orchestrator.group_task import Member, TrainEvent
from orchestrator.trainer import GroupTrainer

LABELS = ("yes", "no")
WORDS = [a + b + c for a in "bdfgklmn" for b in "aeiou" for c in "bdfgklmnprstvz"]
PIECES = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in ("-", *LABELS, *WORDS))]
TOKEN_IDS = {piece.removeprefix("▁"): index for index, piece in enumerate(PIECES)}
END = TOKEN_IDS["</s>"]
NEVER_S = 1e9
LEARNING_RATE = 1e-3
NUM_EPOCHS = 1000


@dataclass(frozen=True)
class Task:
    """A synthetic task; an epoch is one step."""

    member: Member
    token_rows: list[list[int]]
    answers: list[list[int]]

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return NUM_EPOCHS

    def batch(self, step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and answers of a step, in the trainer's order."""
        indices = batch_indices(len(self.token_rows), len(self.token_rows), 0, step)
        return [self.token_rows[i] for i in indices], [self.answers[i] for i in indices]


def tasks_of(count: int, num_rows: int, num_tokens: int) -> list[Task]:
    """Make tasks whose every prompt has `num_tokens` tokens: four for the labels, one for the end, the rest random words."""
    return [_task(f"task-{index}", num_rows, num_tokens) for index in range(count)]


def base_of(model: PreTrainedModel) -> FrozenBase:
    """Give a model a tokenizer to which every word is one token."""
    tokenizer = T5Tokenizer(vocab=[(piece, -1.0) for piece in PIECES], extra_ids=0)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    files = BaseFiles(Path(), "seq2seq", "synthetic", num_parameters, model.config.num_layers, model.config.d_model, 0, 0, None)
    return FrozenBase(BaseSpec(model="/synthetic"), files, model, tokenizer, model.device)


def group_of(
    model: PreTrainedModel, tasks: list[Task], num_steps: int = 0, on_event: Callable[[TrainEvent], None] = lambda event: None
) -> GroupTrainer:
    """Start a group's training, stop it after `num_steps` steps, and leave all its members in their slots."""
    with tempfile.TemporaryDirectory() as folder:
        members = [
            replace(task.member, adapter_dir=f"{folder}/{name}", checkpoint_file=f"{folder}/{name}.safetensors")
            for task in tasks
            if (name := task.member.run_key)
        ]
        trainer = GroupTrainer(base_of(model), members, len(members), on_event)
        trainer.admit()
        steps = iter(range(num_steps))

        def stopped() -> Collection[str]:
            if next(steps, None) is None:
                raise _Enough  # asked to stop, the trainer would empty their slots
            return ()

        with suppress(_Enough):
            trainer.train(stopped, NEVER_S)
    return trainer


class _Enough(Exception):  # noqa: N818  nothing went wrong
    pass


def _task(name: str, num_rows: int, num_tokens: int) -> Task:
    rng = random.Random(name)
    texts = [" ".join(rng.choices(WORDS, k=num_tokens - 5)) for _ in range(num_rows)]
    examples = tuple(Example(f"{name}-{i}", {"text": text}, rng.choice(LABELS)) for i, text in enumerate(texts))
    spec = TaskSpec(
        name=name,
        base=BaseSpec(model="/synthetic"),
        data={"train": "synthetic.jsonl"},
        instruction="{labels}\n{text}",
        labels=dict.fromkeys(LABELS),
        lora={"rank": RANK, "alpha": ALPHA},
        train={"epochs": NUM_EPOCHS, "batch_size": num_rows, "max_length": num_tokens, "learning_rate": LEARNING_RATE},
    )
    member = Member(spec, name, examples, examples[:1], name, "", "")
    rows = [[*(TOKEN_IDS[word] for word in f"- yes - no {text}".split()), END] for text in texts]
    return Task(member, rows, [[TOKEN_IDS[example.label], END] for example in examples])
