"""Prototypes: what labelled examples are to an encoder that is not trained. A label's vector is averaged with theirs.

Source: Snell et al. 2017, Prototypical Networks for Few-shot Learning, arXiv 1703.05175, with the label's wording as one
more example. Dims: B texts, L labels, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from multilora.prompt import PromptFormat
from orchestrator.base_alone import BaseAlone
from orchestrator.demonstrations import examples_of_labels
from orchestrator.methods import Bench, MethodRow

NOTE = "each label's vector averaged with those of its examples: for an encoder, what examples in the prompt are"


def prototype_rows(bench: Bench, alone: BaseAlone, prompt_format: PromptFormat, nums: Sequence[int]) -> Iterator[MethodRow]:
    """Answer by the nearest prototype of so many examples a label, fewer where a label has fewer, for every seed.

    Reading the training examples is charged by those that are used.
    """
    train = bench.dataset.train
    vectors_LH = alone.label_set(prompt_format).vectors_LH
    assert vectors_LH is not None, "prototypes need an encoder"
    labels_LH = vectors_LH.cpu().double().numpy()
    start = time.perf_counter()
    train_BH = alone.states(bench.spec, train)
    read_s = (time.perf_counter() - start) / len(train)
    start = time.perf_counter()
    gate_BH = alone.states(bench.spec, bench.dataset.gate)
    ms_per_text = (time.perf_counter() - start) * 1000 / len(gate_BH)
    for num in nums:
        for seed in bench.seeds:
            chosen = {label: indices[:num] for label, indices in examples_of_labels(train, seed).items()}
            num_used = sum(map(len, chosen.values()))
            blank = MethodRow("prompting", f"prototypes, {num} per label", num_train=num_used, seed=seed, note=NOTE)
            if max(map(len, chosen.values())) < num:
                yield replace(blank, skipped=f"no label has {num} training examples")
                continue
            prototypes_LH = prototypes_of(labels_LH, [train_BH[chosen.get(label, [])] for label in bench.labels])
            answers = tuple(bench.labels[index] for index in (gate_BH @ prototypes_LH.T).argmax(axis=1))
            yield replace(
                blank,
                answers=answers,
                train_s=read_s * num_used,
                ms_per_text=ms_per_text,
                disk_bytes=prototypes_LH.size * 4,
            )


def prototypes_of(labels_LH: NDArray[np.float64], examples: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mean of a label's unit vector and those of its examples (an array [n, H] per label, n may be 0), unit length [L, H]."""
    means_LH = np.stack([np.vstack([label_H, own_BH]).mean(axis=0) for label_H, own_BH in zip(labels_LH, examples, strict=True)])
    unit_LH: NDArray[np.float64] = means_LH / np.linalg.norm(means_LH, axis=1, keepdims=True)
    return unit_LH
