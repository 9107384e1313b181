"""The part "merged" of a comparison: one adapter in the multi-adapter engine, switched by PEFT, and merged into the base.

All three answer the same texts, once all together in batches and once one text at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from multilora.artifact import read_artifact
from multilora.base_model import load_base
from multilora.errors import MultiLoraError
from orchestrator.dataset import Example
from orchestrator.methods import ENGINE, MERGED, PACES, SWITCHED, Bench, MethodRow
from orchestrator.own_adapters import NEEDS_LABELS, OwnAdapter, engine_answering, megabytes, train_own, weight_bytes
from orchestrator.plain_scoring import LabelScorer, with_adapter
from orchestrator.plain_training import Answering, answering, timed
from serve.engine import Engine

PEFT_NAME = "task"


@dataclass(frozen=True)
class SwitchedScorer(LabelScorer):
    """PEFT's model of several adapters, which is told before every batch whose turn it is."""

    def scores(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Score every label of every row [B, L]."""
        self.model.set_adapter(PEFT_NAME)
        return super().scores(rows)


@dataclass(frozen=True)
class _System:
    """One way to run the adapter."""

    name: str
    answer: Answering
    disk_bytes: int
    weight_bytes: int
    """In memory, for one task."""
    bytes_per_task: int
    """In memory, for each further task."""
    note: str = ""


def merged_rows(bench: Bench, adapter: Path | None = None) -> Iterator[MethodRow]:
    """Give two rows of each way to run one adapter: `adapter`, or one that is trained here with the first seed."""
    seed = bench.seeds[0]
    row = MethodRow("merged", "", num_train=len(bench.dataset.train), seed=seed)
    own: OwnAdapter | str = NEEDS_LABELS
    done = list[str]()
    try:
        if bench.labels and adapter:
            own = OwnAdapter(read_artifact(adapter))
        elif bench.labels:
            own = train_own(bench, bench.spec.base, [seed], bench.folder / "merged")[seed]
        if isinstance(own, str):
            yield from _skipped(row, own, done)
            return
        row = replace(row, train_s=own.train_s, num_trained=own.num_parameters)
        engine_answers: tuple[str | None, ...] = ()
        for system in _systems(bench, own):
            for one in _rows_of(system, row, bench.dataset.gate):
                engine_answers = engine_answers or one.answers
                same = sum(a == b for a, b in zip(one.answers, engine_answers, strict=True))
                done.append(one.method)
                yield replace(one, note=f"{one.note}; {same} of {len(engine_answers)} answers are the batched engine's")
            del system  # the engine's base and PEFT's may not fit into memory together
    except (MultiLoraError, torch.OutOfMemoryError) as error:
        yield from _skipped(row, str(error), done)


def _systems(bench: Bench, own: OwnAdapter) -> Iterator[_System]:
    """Prepare each way in turn; those of PEFT share one base, into which the last one merges."""
    card = own.artifact.card
    yield _engine_system(bench, own)
    gc.collect()
    base = load_base(bench.spec.base.model_copy(update={"quantization": "none"}))
    base_bytes = weight_bytes(base.model)
    scorer = LabelScorer.of(base, card.prompt_format)
    names = [label for label, _ in card.labels]
    is_quantised = bench.spec.base.quantization != "none"
    note = "over the base in full precision, for nothing can be merged into rounded weights" if is_quantised else ""
    peft = with_adapter(base.model, own.artifact.folder, PEFT_NAME)
    switched = SwitchedScorer(base, peft, scorer.prompt_format, scorer.labels)
    both_bytes = weight_bytes(peft)
    yield _System(SWITCHED, answering(switched, names), own.disk_bytes, both_bytes, both_bytes - base_bytes, note)
    merged = replace(scorer, model=peft.merge_and_unload().eval())
    yield _System(MERGED, answering(merged, names), base_bytes, base_bytes, base_bytes, note)


def _engine_system(bench: Bench, own: OwnAdapter) -> _System:
    base = load_base(bench.spec.base)
    base_bytes = weight_bytes(base.model)
    engine = Engine(base, num_slots=1, max_rank=own.artifact.card.rank)
    key = engine.bind(own.artifact, version=1)
    both_bytes = weight_bytes(base.model)
    return _System(ENGINE, engine_answering(engine, key), own.disk_bytes, both_bytes, both_bytes - base_bytes)


def _rows_of(system: _System, row: MethodRow, gate: Sequence[Example]) -> Iterator[MethodRow]:
    memory = f"weights take {megabytes(system.weight_bytes)} of memory, a further task {megabytes(system.bytes_per_task)}"
    row = replace(row, disk_bytes=system.disk_bytes, note="; ".join(filter(None, [memory, system.note])))

    def one_by_one(examples: Sequence[Example]) -> Sequence[str]:
        return [system.answer([example])[0] for example in examples]

    for pace, answer in zip(PACES, (system.answer, one_by_one), strict=True):
        answers, ms_per_text = timed(answer, gate)
        yield replace(row, method=f"{system.name}, {pace}", answers=answers, ms_per_text=ms_per_text)


def _skipped(row: MethodRow, reason: str, done: Sequence[str]) -> Iterator[MethodRow]:
    methods = [f"{name}, {pace}" for name in (ENGINE, SWITCHED, MERGED) for pace in PACES]
    yield from (replace(row, method=method, skipped=reason) for method in methods if method not in done)
