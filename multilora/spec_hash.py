"""Hash of what a task spec decides of the trained weights."""

from __future__ import annotations

import hashlib
import json

from multilora.spec import LoraSpec, TaskSpec, TrainSpec

LATER_FIELDS = {
    "lora": ("method", "rslora", "plus_ratio", "layers"),
    "train": ("schedule", "warmup_ratio", "weight_decay", "max_grad_norm"),
}
"""Fields that the hash leaves out at their default, so that adapters trained before a field came stay up to date."""


def spec_hash(spec: TaskSpec) -> str:
    """Hash what decides the trained weights, 16 hex digits; data and base content are hashed by their owners."""
    decisive = spec.model_dump(mode="json", include={"instruction", "labels", "lora", "train"})
    for part, default in (("lora", LoraSpec()), ("train", TrainSpec())):
        for name in LATER_FIELDS[part]:
            if decisive[part][name] == getattr(default, name):
                del decisive[part][name]
    if spec.instructions:
        decisive["instructions"] = spec.instructions
    decisive["columns"] = [spec.data.text, spec.data.label]
    decisive["base"] = [spec.base.dtype, spec.base.quantization]
    decisive["metric"] = spec.gate.metric  # it chooses the epoch
    if spec.labels is None:
        decisive["max_new_tokens"] = spec.max_new_tokens
    if spec.label_score != "sum":
        decisive["label_score"] = spec.label_score
    if spec.search is not None:
        decisive["search"] = spec.search.model_dump(mode="json")
    # Label order is part of the prompt, so keys stay in the user's order.
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
