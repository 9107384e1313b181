"""What the serving benchmark asks: tasks with random adapters over a base, a registry that holds them, and real short texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mlflow import MlflowClient
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from benchmarks.shapes import build_model
from multilora.artifact import FORMAT_VERSION, AdapterArtifact, Canary, TaskCard, card_fields, read_artifact, write_artifact
from multilora.base_files import EMBEDDED, Family, find_base
from multilora.base_model import FrozenBase
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.registry import ADAPTER_PATH, CHAMPION, TAG_OWNER
from multilora.scoring import SCORER_VERSION, ScoringRow, encode_labels, score_labels
from multilora.spec import BaseSpec
from multilora.target_modules import match_modules
from orchestrator.trainer import NUM_CANARIES

ROOT = Path(__file__).parents[1]
RANK = 8
LABELS = (("complaint", ""), ("question", ""), ("praise", ""), ("something else", ""))
INSTRUCTIONS: dict[Family, str] = {
    "encoder": "{text}",
    "seq2seq": "What does a customer write?\n{labels}\nMessage: {text}\nAnswer:",
}
BASES = ("minilm", "flan-t5-small")
"""MiniLM with its weights; the shape of Flan-T5 small with random ones and MiniLM's vocabulary."""
MINILM = BaseSpec(model=next(iter(EMBEDDED)))


@dataclass(frozen=True)
class Asked:
    """One text for one task."""

    task: str
    text: str


def base_spec(name: str, folder: Path) -> BaseSpec:
    """The base of that name, written into `folder` where no package has it."""
    if name == "minilm":
        return MINILM
    tokenizer = AutoTokenizer.from_pretrained(find_base(MINILM).folder, eos_token="[SEP]")
    # As T5's: an end, and no beginning.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", tokenizer.eos_token_id)]
    )
    model = build_model(name, torch.float32, torch.device("cpu"))
    model.lm_head.weight.data.mul_(0.1)  # random weights make logits of hundreds, where float32 is coarse
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return BaseSpec(model=str(folder))


def real_texts() -> list[str]:
    """The texts of the shipped tasks: people's short sentences."""
    files = sorted((ROOT / "tasks" / "data").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [next(value for name, value in row.items() if name != "label") for row in rows]


def traffic(tasks: Sequence[str], num: int, *, is_zipf: bool, seed: int = 0) -> list[Asked]:
    """Random texts for random tasks; Zipf: the n-th task is asked 1/n as often as the first."""
    rng = random.Random(seed)
    weights = [1 / (rank if is_zipf else 1) for rank in range(1, len(tasks) + 1)]
    chosen = zip(rng.choices(tasks, weights, k=num), rng.choices(real_texts(), k=num), strict=True)
    return [Asked(task, text) for task, text in chosen]


class AdapterMaker:
    """Writes adapters of random tensors, strong enough to turn answers around, with true canaries."""

    def __init__(self, base: FrozenBase) -> None:
        self.base = base
        self.prompt_format = PromptFormat(base.family, INSTRUCTIONS[base.family], "text", LABELS, max_length_tokens=128)
        self._slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), 1, RANK)

    def write(self, folder: Path, task: str, seed: int, canaries_of: AdapterArtifact | None = None) -> AdapterArtifact:
        """Write a task's adapter; `canaries_of` has the same tensors under another name."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, layer in self._slots.layers.items():
            a_RI = torch.randn(RANK, layer.in_features, generator=generator) * layer.in_features**-0.5
            tensors[name] = (a_RI, torch.randn(layer.out_features, RANK, generator=generator) * (0.6 / RANK))
        card = TaskCard(
            format_version=FORMAT_VERSION,
            task=task,
            description="random tensors",
            base=self.base.spec,
            base_fingerprint=self.base.files.fingerprint,
            scorer_version=SCORER_VERSION,
            rank=RANK,
            scaling=2.0,
            num_modules=len(tensors),
            canaries=canaries_of.card.canaries if canaries_of else self._canaries(tensors),
            temperature=1.0,
            max_new_tokens=None,
            spec_hash="0" * 16,
            data_fingerprint="0" * 64,
            **card_fields(self.prompt_format),
        )
        return write_artifact(folder, card, tensors)

    def _canaries(self, tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list[Canary]:
        with torch.no_grad():
            self._slots.load(0, tensors, 2.0)
            labels = encode_labels(self.base, self._slots, self.prompt_format)
            columns = [{"text": text} for text in real_texts()[:NUM_CANARIES]]
            prompts = [encode_prompt(self.prompt_format, item, self.base.tokenizer) for item in columns]
            rows = [ScoringRow(prompt.token_ids, 0, labels) for prompt in prompts]
            scores = score_labels(self.base, self._slots, rows)
        return [Canary(columns=item, scores=row.tolist()) for item, row in zip(columns, scores, strict=True)]


def crown(client: MlflowClient, artifact: AdapterArtifact) -> None:
    """Make an adapter its task's newest version and champion, without the run that a training would leave."""
    task = artifact.card.task
    if not client.search_registered_models(f"name = '{task}'"):
        client.create_registered_model(task, tags={TAG_OWNER: "1"})
    source = artifact.folder.parents[1].as_uri()  # holds artifacts/adapter
    version = client.create_model_version(task, source, tags={TAG_OWNER: "1", "digest": artifact.digest})
    client.set_registered_model_alias(task, CHAMPION, version.version)


def write_and_crown(maker: AdapterMaker, client: MlflowClient, root: Path, task: str, seed: int) -> AdapterArtifact:
    """Do both."""
    folder = root / f"{task}-{seed}" / "artifacts" / ADAPTER_PATH
    folder.parent.mkdir(parents=True)
    maker.write(folder, task, seed)
    artifact = read_artifact(folder)
    crown(client, artifact)
    return artifact
