"""The part `baselines` of a comparison: the base is left out, or only read and never asked.

Over the base's states (mean over the input, no instruction) stand what people do with a frozen encoder: nearest
neighbours, and logistic regression.

Dims: B texts, H hidden.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from multilora.base_files import Family
from multilora.base_model import FrozenBase
from orchestrator.base_alone import BaseAlone
from orchestrator.dataset import Example
from orchestrator.methods import Bench, MethodRow
from orchestrator.plain_baselines import fit_tf_idf, majority_label, tf_idf_answers

LEARNED = ("TF-IDF + logistic regression", "nearest neighbours over states", "logistic regression over states")
NUM_NEIGHBOURS = (1, 3, 5, 9)
REGULARISATIONS = (0.01, 0.1, 1.0, 10.0)
"""C of the logistic regression over standardised states."""
STATES: Mapping[Family, str] = {
    "encoder": "mean of the last hidden states",
    "seq2seq": "mean of the encoder's last hidden states",
    "causal": "mean of the last hidden states before the head",
}


def baseline_rows(bench: Bench, base: FrozenBase) -> Iterator[MethodRow]:
    """Answer the gate split without asking the base; nothing here depends on a seed.

    Over states, milliseconds per text hold reading the gate texts, and seconds of training the train and select texts.
    """
    train = bench.dataset.train
    majority = majority_label(train)
    answers = (majority,) * len(bench.gold)
    yield MethodRow("baselines", "majority class", answers, len(train), disk_bytes=len(majority.encode()))
    tf_idf, *over_states = (MethodRow("baselines", name, num_train=len(train)) for name in LEARNED)
    if {example.label for example in train} == {majority}:
        for blank in (tf_idf, *over_states):
            yield replace(blank, skipped=f"every training example has the label {majority}")
        return
    start = time.perf_counter()
    model = fit_tf_idf(train)
    fitted = replace(tf_idf, train_s=time.perf_counter() - start)
    yield _answered(fitted, bench, model, partial(tf_idf_answers, model))
    yield from _rows_over_states(over_states, bench, BaseAlone(base))


def _rows_over_states(blanks: Sequence[MethodRow], bench: Bench, alone: BaseAlone) -> Iterator[MethodRow]:
    """Nearest neighbours and logistic regression; accuracy on the select split chooses the one setting that each has."""
    train, select = bench.dataset.train, bench.dataset.select
    start = time.perf_counter()
    train_BH, select_BH = (alone.states(bench.spec, split) for split in (train, select))
    reading_s = time.perf_counter() - start
    settings: list[dict[str, Any]] = [
        {f"k = {k}": KNeighborsClassifier(k, metric="cosine") for k in NUM_NEIGHBOURS if k <= len(train)},
        {f"C = {c:g}": make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)) for c in REGULARISATIONS},
    ]
    for blank, models in zip(blanks, settings, strict=True):
        start = time.perf_counter()
        accuracy = {}
        for name, model in models.items():
            model.fit(train_BH, [example.label for example in train])
            accuracy[name] = model.score(select_BH, [example.label for example in select])
        best = max(accuracy, key=accuracy.__getitem__)  # the first of equals
        note = f"{STATES[alone.base.family]}; {best} by accuracy on the select split"
        fitted = replace(blank, train_s=reading_s + time.perf_counter() - start, note=note)

        def answer(gate: Sequence[Example], model: Any = models[best]) -> list[str]:
            return [str(label) for label in model.predict(alone.states(bench.spec, gate))]

        yield _answered(fitted, bench, models[best], answer)


def _answered(fitted: MethodRow, bench: Bench, model: Any, answer: Callable[[Sequence[Example]], list[str]]) -> MethodRow:
    """Answer the gate split and measure it; nearest neighbours have no parameters, but examples to keep."""
    start = time.perf_counter()
    answers = tuple(answer(bench.dataset.gate))
    seconds = time.perf_counter() - start
    linear = model[-1] if isinstance(model, Pipeline) else None
    return replace(
        fitted,
        answers=answers,
        ms_per_text=seconds * 1000 / len(answers),
        num_trained=linear.coef_.size + linear.intercept_.size if linear else 0,
        disk_bytes=len(pickle.dumps(model)),
    )
