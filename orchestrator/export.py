"""One adapter version as a folder that loads elsewhere: PEFT's two files, or a plain transformers model with it merged in."""

from __future__ import annotations

import fnmatch
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers.utils import logging as transformers_logging

from multilora.artifact import CONFIG, WEIGHTS, AdapterArtifact, TaskCard, read_artifact, read_tensors
from multilora.base_files import BaseFiles, find_base
from multilora.base_model import AUTO_CLASS, FrozenBase, load_base
from multilora.errors import AdapterError, RequestError, UnknownTaskError
from multilora.lora import AdapterSlots
from multilora.registry import CHAMPION, ROUTER, AdapterVersion, Registry
from multilora.scoring import LabelSet, ScoringRow, encode_labels, score_labels
from multilora.spec import BaseSpec, GateSpec
from orchestrator.config import OrchestratorConfig
from orchestrator.export_readme import LABEL_VECTORS, Kind, readme_of
from orchestrator.files import whole_folder
from serve.canaries import canary_rows, check_scores
from serve.vllm_backend import export_adapter, unfit

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "spiece.model", "*.jinja")
README = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    version: str
    """`task@version`."""
    digest: str
    kind: Kind
    folder: str
    files: Sequence[str]
    num_bytes: int
    """Of all files."""


def export(config: OrchestratorConfig, task: str, number: int | None, kind: Kind, folder: Path) -> Exported:
    """Write a version, the champion if `number` is None, into a folder that is not there yet or is empty.

    Raises RequestError for what cannot be exported, UnknownTaskError without a champion, AdapterError where files do not fit.
    """
    registry = Registry(config.registry_uri, config.artifact_root)
    version = _find(registry, task, number)
    artifact = read_artifact(registry.download(version, config.downloads_dir), version.digest)
    read_tensors(artifact)  # config, tensors and card must agree
    with whole_folder(folder) as staging:
        if kind == "vllm":
            if reason := unfit(artifact.card, None):
                raise RequestError(f"{version.key} {reason}; leave out --format vllm")
            export_adapter(artifact, version.version, staging)
        elif kind == "adapter":
            staging.mkdir()
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(artifact.folder / name, staging / name)
        else:
            write_merged(version.key, artifact, staging)
        text = readme_of(artifact.card, version.key, artifact.digest, kind, _judged(version))
        (staging / README).write_text(text, encoding="utf-8")
        files = {str(file.relative_to(staging)): file.stat().st_size for file in sorted(staging.rglob("*")) if file.is_file()}
    return Exported(version.key, artifact.digest, kind, str(folder), tuple(files), sum(files.values()))


def write_merged(key: str, artifact: AdapterArtifact, folder: Path) -> None:
    """Merge an adapter into its base and write what transformers loads; of an encoder its labels' vectors, too.

    They come from the base without the adapter, which the merged model no longer has. The folder must then give the canaries
    their scores. Raises RequestError for a quantised base, AdapterError for another base or other scores.
    """
    card = artifact.card
    if card.base.quantization != "none":
        rule = f"{key} is over a base in {card.base.quantization}, whose rounded weights would swallow the adapter"
        raise RequestError(f"{rule}; export it alone: --adapter")
    files = find_base(card.base)
    if files.fingerprint != card.base_fingerprint:
        seen = f"this machine's has {files.fingerprint[:12]}"
        raise AdapterError(f"{key} belongs to base {card.base.model} with fingerprint {card.base_fingerprint[:12]}; {seen}")
    transformers_logging.disable_progress_bar()
    labels = _labels_of_the_base(card) if card.family == "encoder" else None
    _merged(card, artifact.folder, files).save_pretrained(folder)
    for file in files.folder.iterdir():
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in TOKENIZER_FILES):
            shutil.copyfile(file, folder / file.name)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # they are written for their owner alone
    if labels is not None:
        assert labels.vectors_LH is not None
        np.save(folder / LABEL_VECTORS, labels.vectors_LH.numpy())
    _prove(key, card, labels, folder)


def _find(registry: Registry, task: str, number: int | None) -> AdapterVersion:
    if task == ROUTER:
        raise RequestError(f"{ROUTER} is the router, which has no adapter; name a task")
    found = registry.by_alias(task, CHAMPION) if number is None else registry.version(task, number)
    if found is not None:
        return found
    known = ", ".join(str(version.version) for version in registry.versions(task))
    if number is not None:
        raise RequestError(f"{task} has no version {number}; its versions: {known or 'none'}")
    fix = f"choose one of its versions: --version {known}" if known else "see: orchestrator status"
    raise UnknownTaskError(f"{task} has no champion; {fix}")


def _judged(version: AdapterVersion) -> str:
    """What the gate said of a version; empty where it was never asked."""
    metric = GateSpec.model_validate_json(version.tags.get("gate", "{}")).metric
    if metric not in version.tags:
        return ""
    number = version.tags.get("num_gate_examples")
    examples = f"{number} gate examples" if number else "the gate examples"
    return f"{metric} {float(version.tags[metric]):.3f} on {examples}, verdict {version.tags.get('verdict', 'unknown')}"


def _labels_of_the_base(card: TaskCard) -> LabelSet:
    base = load_base(card.base, "cpu")
    return encode_labels(base, _no_slots(base), card.prompt_format)


def _merged(card: TaskCard, adapter: Path, files: BaseFiles) -> Any:
    """The base as transformers alone loads it, in its dtype, with the adapter added to its weights."""
    model = AUTO_CLASS[card.family].from_pretrained(
        files.folder, dtype=getattr(torch, card.base.dtype), use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    with warnings.catch_warnings():
        # PEFT only warns, and would merge nothing.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def _prove(key: str, card: TaskCard, labels: LabelSet | None, folder: Path) -> None:
    """Load a merged folder and let it score the adapter's canaries."""
    merged = load_base(BaseSpec(model=str(folder), dtype=card.base.dtype), "cpu")
    slots = _no_slots(merged)
    rows = canary_rows(key, card, labels or encode_labels(merged, slots, card.prompt_format), merged)
    with torch.inference_mode():
        check_scores(key, card, rows, [_score(merged, slots, row) for row in rows])


def _score(base: FrozenBase, slots: AdapterSlots, row: ScoringRow) -> list[float]:
    (scores,) = score_labels(base, slots, [row])
    return [float(score) for score in scores]


def _no_slots(base: FrozenBase) -> AdapterSlots:
    """What the scoring code wants of a base that has no adapters."""
    return AdapterSlots(base.model, [], 1, 1)
