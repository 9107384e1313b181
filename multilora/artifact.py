"""An adapter on disk: a folder that plain PEFT loads, plus a task card with everything else that decides its answers.

adapter_config.json and adapter_model.safetensors are PEFT's format; task_card.json is ours (prompt, labels, base
fingerprint, canaries). Folders appear whole or not at all, and reading checks every part against the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from multilora.base_files import Family
from multilora.errors import AdapterError, OutdatedAdapterError
from multilora.lora import AdapterTensors
from multilora.prompt import PromptFormat
from multilora.spec import BaseSpec, Part, alpha_divisor

FORMAT_VERSION = 2
CARD, CONFIG, WEIGHTS = "task_card.json", "adapter_config.json", "adapter_model.safetensors"
PEFT_TASK_TYPE: dict[Family, str] = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}
PREFIX = "base_model.model."


class Canary(Part):
    """A prompt with the scores that the adapter gave it after training; every binding must reproduce them."""

    columns: dict[str, str]
    """Input columns."""
    scores: list[float]
    """Label scores in label order, before the temperature; of a free-text task the log-likelihood of `text`."""
    text: str | None = None
    """What the adapter wrote; None for a classification task."""


class TaskCard(Part):
    """What an adapter needs besides its tensors to answer its task."""

    format_version: int
    """Version of this card's layout."""
    task: str
    """Task name."""
    description: str
    """One line for people."""
    family: Family
    """Family of the base."""
    base: BaseSpec
    """The base it was trained on, as the spec named it."""
    base_fingerprint: str
    """Fingerprint of that base; binding to any other base is refused."""
    scorer_version: int
    """Version of the scoring code that the canaries were computed with."""
    instruction: str
    """Prompt template."""
    text_column: str
    """Column that a plain string fills."""
    labels: list[tuple[str, str]]
    """(label, meaning) in prompt order."""
    max_length_tokens: int
    """Longest prompt in tokens."""
    label_score: str = "sum"
    """Sum or mean of a label's token log-likelihoods."""
    max_new_tokens: int | None = None
    """Token limit of a free-text task's answers; None for a classification task."""
    rank: int
    """Largest rank of a module."""
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) with rslora."""
    rslora: bool = False
    """Which of the two."""
    num_modules: int
    """Modules that the adapter changes."""
    canaries: list[Canary]
    """Reference answers for binding."""
    temperature: float = Field(gt=0, allow_inf_nan=False)
    """Divides the scores before the softmax; fitted on the select split, so that probabilities mean what they say."""
    spec_hash: str
    """Hash of the spec that trained it."""
    data_fingerprint: str
    """Fingerprint of the examples that trained it."""

    @model_validator(mode="after")
    def _check(self) -> TaskCard:
        is_text = self.max_new_tokens is not None
        if is_text == bool(self.labels) or any((canary.text is not None) != is_text for canary in self.canaries):
            raise ValueError("a card has either labels, or max_new_tokens and a text in every canary")
        return self

    @property
    def prompt_format(self) -> PromptFormat:
        """The prompt's parts."""
        return PromptFormat(
            self.family, self.instruction, self.text_column, tuple(self.labels), self.max_length_tokens, self.label_score
        )


class _CardHead(BaseModel):
    """What every format of the card has."""

    format_version: int
    task: str


@dataclass(frozen=True)
class AdapterArtifact:
    """A checked adapter folder."""

    folder: Path
    card: TaskCard
    digest: str
    """sha256 over config, tensors and card."""


def write_artifact(folder: Path, card: TaskCard, tensors: AdapterTensors) -> AdapterArtifact:
    """Write an adapter folder atomically, replacing an older one."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    state = {}
    for name, (a_RI, b_OR) in tensors.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = a_RI.contiguous()
        state[f"{PREFIX}{name}.lora_B.weight"] = b_OR.contiguous()
    save_file(state, staging / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": PEFT_TASK_TYPE[card.family],
        "base_model_name_or_path": Path(card.base.model).name if card.base.model.startswith("/") else card.base.model,
        "revision": card.base.revision,
        "r": card.rank,
        "lora_alpha": card.scaling * alpha_divisor(card.rank, card.rslora),
        "use_rslora": card.rslora,
        "target_modules": sorted(tensors),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (staging / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    staging.replace(folder)
    return AdapterArtifact(folder, card, _digest(folder))


def read_artifact(folder: Path, digest: str | None = None) -> AdapterArtifact:
    """Read the card of an adapter folder. Raises AdapterError for a missing or broken part or another digest."""
    missing = [name for name in (CARD, CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"adapter folder {folder.name} lacks {', '.join(missing)}")
    card = _read_card(folder)
    seen = _digest(folder)
    if digest is not None and seen != digest:
        raise AdapterError(
            f"adapter of task {card.task} has digest {seen[:12]}, its registry entry says {digest[:12]}: files changed"
        )
    return AdapterArtifact(folder, card, seen)


def _read_card(folder: Path) -> TaskCard:
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        head = _CardHead.model_validate_json(text)
        # Another format has other fields, which must not read as a broken card.
        if head.format_version == FORMAT_VERSION:
            return TaskCard.model_validate_json(text)
    except (ValidationError, UnicodeDecodeError) as error:
        raise AdapterError(f"{CARD} of adapter folder {folder.name} is broken: {error}") from error
    raise OutdatedAdapterError(
        f"adapter of task {head.task} has card format {head.format_version}, this version reads {FORMAT_VERSION}: "
        f"train it again with `orchestrator submit --force`"
    )


def read_tensors(artifact: AdapterArtifact) -> dict[str, tuple[Tensor, Tensor]]:
    """Load the tensors of an adapter. Raises AdapterError where file, config and card disagree."""
    task = artifact.card.task
    try:
        # `load_file` maps the file: who writes to it later would change the adapter, and who cuts it would end this process.
        state = dict(sorted(load((artifact.folder / WEIGHTS).read_bytes()).items()))
        config = json.loads((artifact.folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no mapping")
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"adapter of task {task} cannot be read: {error}") from error
    tensors = _paired(task, state)
    expected = config.get("target_modules")
    if not isinstance(expected, list) or set(expected) != set(tensors):
        raise AdapterError(f"adapter of task {task}: tensors cover {len(tensors)} modules, {CONFIG} names others")
    if len(tensors) != artifact.card.num_modules:
        raise AdapterError(f"adapter of task {task} has {len(tensors)} modules, its card says {artifact.card.num_modules}")
    rank = max((a_RI.shape[0] for a_RI, _ in tensors.values()), default=0)
    if not rank == config.get("r") == artifact.card.rank:
        raise AdapterError(
            f"adapter of task {task} has rank {rank}, {CONFIG} says {config.get('r')}, its card says {artifact.card.rank}"
        )
    divisor = alpha_divisor(max(rank, 1), bool(config.get("use_rslora")))
    if abs(config.get("lora_alpha", 0) / divisor - artifact.card.scaling) > 1e-6:
        raise AdapterError(f"adapter of task {task}: alpha, r and use_rslora in {CONFIG} differ from the card's scaling")
    return tensors


def _paired(task: str, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, dot, half = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(PREFIX) or not dot or half not in ("lora_A", "lora_B") or tensor.dim() != 2:
            raise AdapterError(f"adapter of task {task} has an unexpected tensor {key}")
        halves.setdefault(name, {})[half] = tensor
    lonely = [name for name, pair in halves.items() if len(pair) != 2]
    if lonely:
        raise AdapterError(f"adapter of task {task} lacks one half of {', '.join(lonely[:3])}")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CARD, CONFIG, WEIGHTS):
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def card_fields(prompt_format: PromptFormat) -> dict[str, Any]:
    """The card's share of a prompt format."""
    fields = asdict(prompt_format)
    return {**fields, "labels": list(prompt_format.labels)}


def digest_in(folder: Path) -> str:
    """Digest of the whole adapter in a folder; empty where there is none."""
    try:
        return read_artifact(folder).digest
    except AdapterError:
        return ""
