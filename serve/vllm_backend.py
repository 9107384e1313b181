"""Large causal bases through Ray Serve LLM and vLLM: the champions as folders, and the settings that serve them.

It needs a GPU and the extra `vllm`, and neither is needed to write the files. docs/vllm.md says what is the same and what is not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field

from multilora.artifact import CONFIG, WEIGHTS, AdapterArtifact, TaskCard, read_artifact
from multilora.errors import RequestError
from multilora.registry import Registry
from multilora.spec import BaseSpec, Part

Rank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
RANKS: tuple[Rank, ...] = get_args(Rank)
"""What vLLM's LoRAConfig takes as max_lora_rank."""
MAX_RESIDENT = 16
CLOUDS = ("s3://", "gs://", "abfss://", "azure://")
"""Where Ray loads adapters from."""
ADAPTERS, REQUEST, SETTINGS = "adapters", "request.json", "serve.yaml"


class ModelLoading(Part):
    """Which base, and what clients call it."""

    model_id: str = Field(pattern="^[^:]+$")
    """Its name in requests; a colon would begin the adapter's."""
    model_source: str
    """Hub id, or a folder that every node sees."""


class LoraLoading(Part):
    """Where the adapters are."""

    dynamic_lora_loading_path: str = Field(pattern=f"^({'|'.join(CLOUDS)}).*[^/]$")
    """Cloud folder with one folder per adapter; Ray takes nothing else."""
    max_num_adapters_per_replica: int = Field(ge=1)
    """Adapters that one replica remembers."""


class EngineSettings(Part):
    """vLLM's own settings."""

    enable_lora: Literal[True] = True
    """Without it every adapter is refused."""
    max_lora_rank: Rank
    """Room that each slot has; the smallest that fits the largest adapter."""
    max_loras: int = Field(ge=1)
    """Adapters in one batch."""
    dtype: Literal["bfloat16"] = "bfloat16"
    """vLLM's adapter kernels take 16 bits alone."""
    revision: str | None = None
    """Of the base, as the tasks name it."""


class LlmConfig(Part):
    """The part of ray.serve.llm.LLMConfig that is needed here; that class cannot be imported without vLLM."""

    model_loading_config: ModelLoading
    """The base."""
    lora_config: LoraLoading
    """Its adapters."""
    engine_kwargs: EngineSettings
    """The engine."""
    accelerator_type: str | None = None
    """Kind of GPU, such as L4 or A100; omit for any."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    config: LlmConfig
    adapters: Mapping[str, str]
    """Task -> `task@version`."""
    left_out: Mapping[str, str]
    """Task -> why it was not exported."""


def llm_config(base: BaseSpec, ranks: Sequence[int], adapters_path: str, accelerator: str | None = None) -> LlmConfig:
    """Settings that serve adapters of these ranks over one base."""
    num_resident = min(len(ranks), MAX_RESIDENT)
    rank = next(allowed for allowed in RANKS if allowed >= max(ranks))
    return LlmConfig(
        model_loading_config=ModelLoading(model_id=_model_id(base), model_source=base.model),
        lora_config=LoraLoading(dynamic_lora_loading_path=adapters_path.rstrip("/"), max_num_adapters_per_replica=num_resident),
        engine_kwargs=EngineSettings(max_lora_rank=rank, max_loras=num_resident, revision=base.revision),
        accelerator_type=accelerator,
    )


def request_of(card: TaskCard, version: int, digest: str) -> dict[str, Any]:
    """How to ask vLLM for a task's answer: the prompt with its columns in braces, and the rest of a /v1/completions body."""
    prompt_format = card.prompt_format
    body: dict[str, Any] = {"model": f"{_model_id(card.base)}:{card.task}", "temperature": 0, "max_tokens": card.max_new_tokens}
    if card.labels:
        # An answer begins with a space, as in training; a token has at least one byte, and the end token comes on top.
        choice = [f" {label}" for label, _ in card.labels]
        body |= {"max_tokens": 1 + max(len(text.encode()) for text in choice), "structured_outputs": {"choice": choice}}
    prompt = prompt_format.render({name: f"{{{name}}}" for name in prompt_format.columns})
    return {"version": version, "digest": digest, "columns": list(prompt_format.columns), "prompt": prompt, "body": body}


def export_adapter(artifact: AdapterArtifact, version: int, folder: Path) -> None:
    """Write one adapter as Ray Serve LLM reads it: PEFT's two files; beside them how to ask for it."""
    folder.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(artifact.folder / name, folder / name)
    content = json.dumps(request_of(artifact.card, version, artifact.digest), ensure_ascii=False, indent=2)
    (folder / REQUEST).write_text(content + "\n", encoding="utf-8")


def export_champions(
    registry: Registry,
    downloads_dir: Path,
    folder: Path,
    adapters_path: str,
    base: str | None = None,
    accelerator: str | None = None,
) -> Exported:
    """Write every champion over one causal base, and `serve run`'s settings, into an empty folder.

    Raises RequestError where the folder is not empty or the base is not clear, AdapterError for an adapter that is broken.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RequestError(f"{folder} is not empty; name another folder, so that no adapter of an earlier export stays in it")
    champions = registry.champions()
    artifacts = {task: read_artifact(registry.download(found, downloads_dir), found.digest) for task, found in champions.items()}
    left_out = {task: reason for task, artifact in artifacts.items() if (reason := unfit(artifact.card, base))}
    chosen = {task: artifact for task, artifact in artifacts.items() if task not in left_out}
    bases = {artifact.card.base.model_dump_json(exclude={"dtype"}): artifact.card.base for artifact in chosen.values()}
    if len(bases) != 1:
        said = f"champions over several causal bases: {', '.join(found.model for found in bases.values())}; choose with --base"
        none = "no champion is over such a causal base: " + "; ".join(f"{task} {reason}" for task, reason in left_out.items())
        raise RequestError(said if bases else none)
    ranks = [artifact.card.rank for artifact in chosen.values()]
    config = llm_config(next(iter(bases.values())), ranks, adapters_path, accelerator)
    for task, artifact in chosen.items():
        export_adapter(artifact, champions[task].version, folder / ADAPTERS / task)
    (folder / SETTINGS).write_text(serve_yaml(config), encoding="utf-8")
    return Exported(config, {task: champions[task].key for task in chosen}, left_out)


def serve_yaml(config: LlmConfig) -> str:
    """Settings for `serve run`."""
    args = {"llm_configs": [config.model_dump(exclude_none=True)]}
    application = {"name": "llm", "route_prefix": "/", "import_path": "ray.serve.llm:build_openai_app", "args": args}
    return yaml.safe_dump({"applications": [application]}, sort_keys=False)


def unfit(card: TaskCard, base: str | None) -> str:
    """Why an adapter is not exported; empty where it is."""
    if card.family != "causal":
        return f"is over a base of family {card.family}, which vLLM serves without adapters or not at all"
    if card.base.quantization != "none":
        return f"is over a base in {card.base.quantization}, which vLLM would quantise otherwise"
    if base is not None and card.base.model != base:
        return f"is over {card.base.model}"
    return ""


def _model_id(base: BaseSpec) -> str:
    """A hub id as it is; of a folder its name."""
    return Path(base.model).name if base.model.startswith(("/", "./", "../")) else base.model
