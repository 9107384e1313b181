"""The training state of one adapter and its checkpoint: resumable, and not an adapter version."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from multilora.base_model import FrozenBase
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat
from multilora.scoring import LabelSet, encode_answer
from multilora.spec import TaskSpec
from orchestrator.batching import num_steps_per_epoch
from orchestrator.dataset import Example
from orchestrator.group_task import Member
from orchestrator.metrics import METRICS
from orchestrator.schedule import learning_rate

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of each parameter beside the step."""


@dataclass
class AdapterRun:
    """The training state of one adapter."""

    member: Member
    slot: int
    prompt_format: PromptFormat
    labels: LabelSet
    """The task's labels; none for a free-text task, whose rows each have their gold answer as their only label."""
    module_names: list[str]
    optimizer: torch.optim.AdamW
    train_ids: list[list[tuple[int, ...]]]
    """The prompt of each training example in each wording of the instruction."""
    train_labels: list[LabelSet]
    train_gold: list[int]
    select_ids: list[tuple[int, ...]]
    select_labels: list[LabelSet]
    step: int = 0
    best_epoch: int = 0
    best_result: tuple[float, float] = (-math.inf, -math.inf)
    best_P: Tensor | None = None
    losses: list[float] = field(default_factory=list)

    @property
    def is_free_text(self) -> bool:
        """Whether answers are written and not chosen."""
        return not self.labels.names

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return num_steps_per_epoch(len(self.train_ids), self.member.spec.train.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimiser steps in all."""
        return self.steps_per_epoch * self.member.spec.train.epochs

    def optim_step(self) -> float:
        """Clip the adapter's gradient and take one optimiser step; returns the learning rate of the A matrices."""
        spec = self.member.spec
        group_a, group_b = self.optimizer.param_groups
        torch.nn.utils.clip_grad_norm_(_parameters(self), spec.train.max_grad_norm)
        rate = learning_rate(spec.train, self.step, self.num_steps)
        group_a["lr"], group_b["lr"] = rate, rate * spec.lora.plus_ratio
        self.optimizer.step()
        self.step += 1
        return rate

    def select_result(self, scores: Sequence[Tensor]) -> tuple[float, dict[str, float]]:
        """Mean loss on the select split of which `scores` are, and the gate's metric where the task has labels.

        Writing a free text for every example after every epoch would take longer than training.
        """
        gold = [example.label for example in self.member.select]
        if self.is_free_text:
            losses = [-float(score) / len(own.token_ids[0]) for score, own in zip(scores, self.select_labels, strict=True)]
            return sum(losses) / len(losses), {}
        losses = [-float(s.log_softmax(-1)[self.labels.names.index(label)]) for s, label in zip(scores, gold, strict=True)]
        answers = [self.labels.names[int(score.argmax())] for score in scores]
        metric = self.member.spec.gate.metric
        return sum(losses) / len(losses), {f"select/{metric}": METRICS[metric](gold, answers)}


def save_state(run: AdapterRun, slots: AdapterSlots) -> None:
    """Write one adapter's weights, optimiser and position into one file, atomically.

    Tensors are stored by module, not in this group's layout, so that any later group can take the adapter up.
    """
    vectors = {"weights": slots.flat_SP[run.slot]}
    states = [run.optimizer.state[parameter] for parameter in _parameters(run)]
    if all(states):
        vectors |= {name: torch.cat([state[name] for state in states]) for name in MOMENTS}
    if run.best_P is not None:
        vectors["best"] = run.best_P
    tensors = {
        f"{part}/{name}/{half}": tensor
        for part, vector_P in vectors.items()
        for name, pair in slots.split(run.slot, vector_P).items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    facts = {"step": run.step, "best_epoch": run.best_epoch, "best_result": run.best_result, "losses": run.losses}
    file = Path(run.member.checkpoint_file)
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(f".{os.getpid()}")
    save_file(tensors, staging, metadata={"facts": json.dumps(facts)})
    staging.replace(file)


def load_state(run: AdapterRun, slots: AdapterSlots) -> None:
    """Continue from the adapter's checkpoint where there is one."""
    file = Path(run.member.checkpoint_file)
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as stream:
        facts = json.loads(stream.metadata()["facts"])
        parts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for key in stream.keys():  # noqa: SIM118  safe_open is no mapping
            part, name, half = key.split("/")
            if half == "A":
                parts.setdefault(part, {})[name] = (stream.get_tensor(key), stream.get_tensor(f"{part}/{name}/B"))
    vectors = {part: slots.join(run.slot, tensors) for part, tensors in parts.items()}
    with torch.no_grad():
        slots.flat_SP[run.slot] = vectors["weights"]
    if "exp_avg" in vectors:
        moments = zip(*(slots.halves_of(vectors[name]) for name in MOMENTS), strict=True)
        for parameter, halves in zip(_parameters(run), moments, strict=True):
            state = dict(zip(MOMENTS, halves, strict=True))
            run.optimizer.state[parameter] = {"step": torch.tensor(float(facts["step"])), **state}
    run.step, run.best_epoch, run.losses = facts["step"], facts["best_epoch"], facts["losses"]
    run.best_result = (facts["best_result"][0], facts["best_result"][1])
    run.best_P = vectors.get("best")


def _parameters(run: AdapterRun) -> list[Tensor]:
    """The adapter's A matrices and its B matrices, one vector each."""
    return [parameter for group in run.optimizer.param_groups for parameter in group["params"]]


def now_ms() -> int:
    """Unix time in milliseconds."""
    return int(time.time() * 1000)


def label_sets_of(base: FrozenBase, spec: TaskSpec, labels: LabelSet, examples: Sequence[Example]) -> list[LabelSet]:
    """The labels that each example's loss is computed over; of a free text only the gold one is known."""
    if spec.max_new_tokens is None:
        return [labels] * len(examples)
    return [encode_answer(base, example.label, spec.max_new_tokens) for example in examples]
