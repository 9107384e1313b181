"""A task's own adapters, trained in this process and asked through the serving engine: what the others are held against."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from multilora.artifact import AdapterArtifact, read_artifact, read_tensors
from multilora.base_model import load_base
from multilora.spec import BaseSpec
from orchestrator.group_task import Member, TrainEvent
from orchestrator.methods import Bench
from orchestrator.plain_training import Answering
from orchestrator.trainer import GroupTrainer
from serve.engine import Engine, Work

NEVER_S = 1e9
NEEDS_LABELS = "a free-text task has no labels to choose from"


@dataclass(frozen=True)
class OwnAdapter:
    """An adapter and what it cost."""

    artifact: AdapterArtifact
    train_s: float = 0.0
    """Its share of its group's time."""

    @property
    def num_parameters(self) -> int:
        """Numbers in its matrices."""
        return sum(a_RI.numel() + b_OR.numel() for a_RI, b_OR in read_tensors(self.artifact).values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of its folder."""
        return sum(file.stat().st_size for file in self.artifact.folder.iterdir())


def train_own(bench: Bench, base: BaseSpec, seeds: Sequence[int], folder: Path) -> dict[int, OwnAdapter | str]:
    """Train one adapter a seed, all in one group: seed -> adapter, or why there is none.

    Raises SpecError or AdapterError where the base cannot be loaded.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what is trained already would seem to take no time
    members = [_member(bench, base, seed, folder / str(seed)) for seed in seeds]
    errors: dict[str, str] = {}

    def note(event: TrainEvent) -> None:
        if event.kind == "failed":
            errors[event.run_key] = event.message

    trainer = GroupTrainer(load_base(base), members, bench.max_slots, note)
    started = time.perf_counter()
    trainer.train(lambda: (), NEVER_S)
    train_s = (time.perf_counter() - started) / len(members)
    return {
        seed: errors.get(member.run_key) or OwnAdapter(read_artifact(Path(member.adapter_dir)), train_s)
        for seed, member in zip(seeds, members, strict=True)
    }


def engine_answering(engine: Engine, key: str) -> Answering:
    """A function that answers examples with a bound adapter."""
    return lambda examples: [
        answer.label for answer in engine.classify([Work(key, engine.prompt(key, example.columns)) for example in examples])
    ]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in memory; what is tied counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())


def megabytes(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e6:.2f} MB"


def _member(bench: Bench, base: BaseSpec, seed: int, folder: Path) -> Member:
    settings = bench.spec.train.model_copy(update={"seed": seed})
    return Member(
        spec=bench.spec.model_copy(update={"base": base, "train": settings}),
        run_key=f"{bench.spec.name}-{seed}",
        train=bench.dataset.train,
        select=bench.dataset.select,
        data_fingerprint=bench.dataset.fingerprint,
        adapter_dir=str(folder / "adapter"),
        checkpoint_file=str(folder / "checkpoint.safetensors"),
    )
