"""The part "alone" of a comparison: what trains by itself through transformers and PEFT, and adapters over quantised bases."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from multilora.base_model import load_base
from multilora.errors import AdapterError, MultiLoraError
from multilora.spec import TaskSpec
from orchestrator.methods import Bench, MethodRow
from orchestrator.own_adapters import NEEDS_LABELS, OwnAdapter, engine_answering, megabytes, train_own, weight_bytes
from orchestrator.plain_methods import METHODS, PlainMethod
from orchestrator.plain_training import DIVERGED, Learner, Trained, answering, timed, train, trained_parameters
from serve.engine import Engine

QUANTISED: dict[Literal["none", "8bit", "4bit"], str] = {
    "none": "our adapter, base in full precision",
    "8bit": "our adapter, 8-bit base",
    "4bit": "our adapter, 4-bit base",
}


@dataclass(frozen=True)
class _Attempt:
    """One training with one learning rate, and what came of it."""

    rate: float
    trained: Trained
    answers: tuple[str, ...]
    ms_per_text: float
    num_trained: int
    disk_bytes: int
    is_seq2seq: bool


def alone_rows(bench: Bench) -> Iterator[MethodRow]:
    """Give a row of each method and seed as it is measured; what cannot run says why."""
    for method in METHODS:
        yield from method_rows(bench, method)
    yield from quantised_rows(bench)


def method_rows(bench: Bench, method: PlainMethod) -> Iterator[MethodRow]:
    """Train with every seed; the first one chooses among the method's learning rates by the select split."""
    rates, note = method.learning_rates, ""
    for seed in bench.seeds:
        row = MethodRow("alone", method.name, num_train=len(bench.dataset.train), seed=seed)
        if not bench.labels:
            yield replace(row, skipped=NEEDS_LABELS)
            continue
        try:
            attempts = [_attempt(bench, method, seed, rate) for rate in rates]
        except (MultiLoraError, torch.OutOfMemoryError) as error:
            yield replace(row, skipped=str(error))
            continue
        best = max(attempts, key=lambda attempt: attempt.trained.result)
        if best.trained.result == DIVERGED:
            yield replace(row, skipped=f"the loss is no number at learning rates {', '.join(f'{rate:g}' for rate in rates)}")
            continue
        if not note:
            note = _note(method, attempts, best)
            rates = (best.rate,)
        yield replace(
            row,
            answers=best.answers,
            train_s=best.trained.train_s,
            ms_per_text=best.ms_per_text,
            num_trained=best.num_trained,
            disk_bytes=best.disk_bytes,
            note=note,
        )


def _note(method: PlainMethod, attempts: Sequence[_Attempt], best: _Attempt) -> str:
    note = f"learning rate {best.rate:g}"
    if len(attempts) > 1:
        rates = ", ".join(f"{attempt.rate:g}" for attempt in attempts)
        others_s = sum(attempt.trained.train_s for attempt in attempts if attempt is not best)
        note += f", chosen from {rates} on the select split, which took {others_s:.3g} s more"
    return f"{note}; {method.seq2seq_note}" if method.seq2seq_note and best.is_seq2seq else note


def quantised_rows(bench: Bench) -> Iterator[MethodRow]:
    """Our adapters over the base in full precision, 8 and 4 bits, asked through the serving engine."""
    for quantization, name in QUANTISED.items():
        rows = [MethodRow("alone", name, num_train=len(bench.dataset.train), seed=seed) for seed in bench.seeds]
        if not bench.labels:
            yield from (replace(row, skipped=NEEDS_LABELS) for row in rows)
            continue
        base_spec = bench.spec.base.model_copy(update={"quantization": quantization})
        try:
            gc.collect()
            adapters = train_own(bench, base_spec, bench.seeds, bench.folder / "alone" / quantization)
            base = load_base(base_spec)
            note = f"the base's weights take {megabytes(weight_bytes(base.model))} of memory"
            engine = Engine(base, bench.max_slots, bench.spec.lora.rank)
        except (MultiLoraError, ImportError, torch.OutOfMemoryError) as error:  # bitsandbytes is not there on every platform
            yield from (replace(row, skipped=str(error)) for row in rows)
            continue
        yield from (replace(_asked(bench, engine, row, adapters[row.seed]), note=note) for row in rows)


def _asked(bench: Bench, engine: Engine, row: MethodRow, own: OwnAdapter | str) -> MethodRow:
    if isinstance(own, str):
        return replace(row, skipped=own)
    try:
        key = engine.bind(own.artifact, version=row.seed)
    except AdapterError as error:
        return replace(row, skipped=str(error))
    answers, ms_per_text = timed(engine_answering(engine, key), bench.dataset.gate)
    return replace(
        row,
        answers=answers,
        train_s=own.train_s,
        ms_per_text=ms_per_text,
        num_trained=own.num_parameters,
        disk_bytes=own.disk_bytes,
    )


def train_plain(bench: Bench, method: PlainMethod, seed: int, rate: float) -> tuple[Learner, Trained]:
    """Train one method over a base of its own. Raises AdapterError where the method does not exist for the base."""
    spec = _spec_for(bench, method, seed, rate)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        learner = method.build(load_base(spec.base), spec)
        return learner, train(learner, bench.dataset, spec, has_dropout=method.trains_base)


def _attempt(bench: Bench, method: PlainMethod, seed: int, rate: float) -> _Attempt:
    gc.collect()  # models refer to themselves, and the next base needs their memory
    learner, trained = train_plain(bench, method, seed, rate)
    parameters, answers, ms_per_text = trained_parameters(learner.module), tuple[str, ...](), 0.0
    if trained.result != DIVERGED:
        answers, ms_per_text = timed(answering(learner, bench.labels), bench.dataset.gate)
    return _Attempt(
        rate=rate,
        trained=trained,
        answers=answers,
        ms_per_text=ms_per_text,
        num_trained=sum(parameter.numel() for parameter in parameters),
        disk_bytes=sum(parameter.nbytes for parameter in parameters),
        is_seq2seq=learner.base.family == "seq2seq",
    )


def _spec_for(bench: Bench, method: PlainMethod, seed: int, rate: float) -> TaskSpec:
    """The spec with this seed and rate, over the base as it is without quantisation, whose weights cannot be trained."""
    precise = {"quantization": "none"} | ({"dtype": "float32"} if method.trains_base else {})
    return bench.spec.model_copy(
        update={
            "base": bench.spec.base.model_copy(update=precise),
            "train": bench.spec.train.model_copy(update={"learning_rate": rate, "seed": seed}),
        }
    )
