"""The serving fingerprint: everything that decides a task's answers, by part, so that a change has a name.

Two systems with equal fingerprints give the same answers up to rounding; a task whose fingerprint did not change needs no
new evaluation, its canaries prove it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version as installed_version

from multilora.artifact import CONFIG, WEIGHTS, AdapterArtifact, TaskCard

ENGINE_VERSION = 1
"""Raise it when the serving engine gives other answers for the same weights."""


def fingerprint_of(artifact: AdapterArtifact) -> dict[str, str]:
    """Name what decides an adapter version's answers here and now, the installed engine included."""
    weights = [hashlib.sha256((artifact.folder / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS)]
    return {"adapter": _hash(weights), "calibration": f"{artifact.card.temperature:.6g}", **zero_shot_fingerprint(artifact.card)}


def zero_shot_fingerprint(card: TaskCard) -> dict[str, str]:
    """Name what decides the base's own answers to a task."""
    is_quantised = card.base.quantization != "none"
    libraries = ("torch", "transformers", *(("bitsandbytes",) if is_quantised else ()))
    return {
        "base": card.base_fingerprint[:16],
        "dtype": f"{card.base.dtype} {card.base.quantization}" if is_quantised else card.base.dtype,
        "prompt": _hash([card.instruction, card.text_column]),
        "labels": _hash([card.labels, card.label_score]),
        "max_length": str(card.max_length_tokens),
        "decoding": "labels are scored" if card.max_new_tokens is None else f"greedy, {card.max_new_tokens} tokens",
        "scorer": str(card.scorer_version),
        "engine": " ".join([str(ENGINE_VERSION), *(f"{name} {installed_version(name)}" for name in libraries)]),
    }


def digest_of(fingerprint: Mapping[str, str]) -> str:
    """One hash of all parts."""
    return _hash(sorted(fingerprint.items()))


def changed_parts(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the parts that differ."""
    return tuple(name for name in {**before, **after} if before.get(name) != after.get(name))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
