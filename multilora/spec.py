"""The task spec: one YAML file = one task = one adapter. Its parts and their rules; knows no torch and no data."""

from __future__ import annotations

import math
import re
import string
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator, model_validator

RESERVED_NAMES = frozenset({"auto", "base", "latest", "regression-reports"})
LOCAL_SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

OTHER_METHODS = {
    "dora": "rescales every merged weight of the base",
    "ia3": "scales activations instead of adding a low-rank update",
    "prefix": "adds positions to every layer's input",
    "prompt": "adds positions to the input",
    "bitfit": "changes the base's biases",
    **dict.fromkeys(("pissa", "olora", "corda"), "rewrites the base's weights at initialisation"),
}
"""What stands against the other well-known ways to adapt a model."""
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LABEL_KEY = re.compile(rf"({_LABEL}(\.{_LABEL})*/)?{_LABEL}")
LABEL_RULE = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")
"""Names and wanted values of node labels. Source: Ray's label selectors (ray._private.label_utils)."""


class Part(BaseModel):
    """Settings that every part of a spec shares: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BaseSpec(Part):
    """The frozen base model that the task's adapter belongs to."""

    model: str = Field(min_length=1)
    """Hugging Face model id, `t5-mini` (which comes with this project), or a folder (./, ../ or /) with safetensors weights."""
    revision: str | None = None
    """Hub commit, tag or branch; omit for the default branch or a local folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the base's weights and activations; float16 is not offered because T5 overflows in it."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Store the base's linear layers in 8-bit (LLM.int8's weights) or 4-bit (nf4, double quantisation) by bitsandbytes."""


class HubSource(Part):
    """Examples from a data set on the Hugging Face hub."""

    hub: str = Field(min_length=1)
    """Data set id on the hub, such as `mteb/banking77`."""
    config: str | None = None
    """Configuration name, where the data set has several."""
    split: str = Field(min_length=1)
    """Split of the hub data set, such as `train` or `test[:500]`."""
    revision: str | None = None
    """Hub commit, tag or branch of the data set."""


class DataSpec(Part):
    """Where the task's labelled examples are."""

    train: str | HubSource
    """Examples to train on: a .jsonl, .json, .csv, .tsv or .parquet file relative to this spec, or a hub data set."""
    select: str | HubSource | None = None
    """Examples that choose checkpoints; omit to cut off 10 % of train (at most 200 rows)."""
    gate: str | HubSource | None = None
    """Examples that judge the adapter and are used for nothing else; omit to cut off 40 % of train (at most 1,000 rows)."""
    text: str = "text"
    """Column that a plain-string request fills; it must appear in the instruction as {column}."""
    label: str = "label"
    """Column that holds the answer."""


class LoraSpec(Part):
    """The low-rank adapter's shape."""

    method: Literal["lora"] = "lora"
    """How the base is adapted; only `lora` with its standard initialisation shares one frozen base in mixed batches."""
    rank: int = Field(default=8, ge=1, le=256)
    """Rank r of the update matrices."""
    alpha: float = Field(default=16.0, gt=0)
    """LoRA alpha; the update is scaled by alpha / rank."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones."""
    plus_ratio: float = Field(default=1.0, ge=1, le=1000)
    """LoRA+ (arXiv 2402.12354): learning rate of the B matrices divided by that of the A matrices."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training; one mask per row and feature, the same at every position."""
    target_modules: str | list[StrictStr] = "all-linear"
    """Linear layers that get an adapter: `all-linear`, a list of module names or name endings such as [q, v], or a regular
    expression that matches a module's whole name."""
    layers: Annotated[list[StrictInt], Field(min_length=1)] | None = None
    """Layers that get an adapter, from 0, or from -1 backwards, in both stacks of an encoder-decoder; omit for all."""

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return self.alpha / alpha_divisor(self.rank, self.rslora)

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, method: object) -> object:
        if isinstance(method, str) and method in OTHER_METHODS:
            rule = f"{method} {OTHER_METHODS[method]}, but here all adapters share one frozen base in mixed batches"
            raise ValueError(f"{rule}; write `method: lora`, or train this task with PEFT itself")
        return method

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, target_modules: str | list[str]) -> str | list[str]:
        if not target_modules:
            raise ValueError("target_modules is empty; write all-linear, or list module names: [q, v]")
        if isinstance(target_modules, str):
            try:
                re.compile(target_modules)
            except re.error as error:
                rule = f"{target_modules!r} is no regular expression ({error})"
                raise ValueError(f"{rule}; correct it, or list module names: [q, v]") from error
        return target_modules


class TrainSpec(Part):
    """How the adapter is trained."""

    epochs: int = Field(default=12, ge=1, le=1000)
    """Passes over the training examples."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak AdamW learning rate; with lora.plus_ratio, that of the A matrices."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after the warm-up: falls to zero in a line or half a cosine, or stays."""
    warmup_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of all steps in which the learning rate rises from zero to its peak."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    """AdamW's decoupled weight decay of the adapter's matrices."""
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Longer gradients of this adapter are scaled down to this norm."""
    batch_size: int = Field(default=16, ge=1, le=4096)
    """Examples per optimiser step of this adapter, those of all its workers together."""
    max_length: int = Field(default=128, ge=8, le=32768)
    """Longest prompt in tokens, at most the base's positions; longer inputs lose their end, never instruction or labels."""
    max_examples: int | None = Field(default=None, ge=2)
    """Use at most this many training examples (stratified by label); omit to use all."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, order, dropout and cut-off splits."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many epochs without a better result on the select split; omit to train all epochs."""


class SearchSpec(Part):
    """Settings that are tried together in one training group; the select split chooses one, which the gate judges."""

    learning_rate: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[], max_length=32)
    """Learning rates to try; where all three lists are omitted a third of, once and three times the spec's own."""
    rank: list[Annotated[int, Field(ge=1, le=256)]] = Field(default=[], max_length=32)
    """Ranks to try, alpha unchanged; where all three lists are omitted half of, once and twice the spec's own."""
    epochs: list[Annotated[int, Field(ge=1, le=1000)]] = Field(default=[], max_length=32)
    """Numbers of epochs to try."""
    num_candidates: int = Field(default=16, ge=2, le=256)
    """Most settings to try, the spec's own among them; of more combinations train.seed draws so many."""
    eta: Literal[1, 2, 3] = 2
    """Successive halving: of the candidates one in so many goes on after each round, and the spec's own; 1 ends none early."""


class GenerationSpec(Part):
    """How the answers of a free-text task are written."""

    max_new_tokens: int = Field(default=64, ge=1, le=4096)
    """Most tokens of an answer, its end token included; training answers are cut there too."""


class ResourceSpec(Part):
    """What training this task needs: how many workers, and what each of them."""

    gpus: float | None = Field(default=None, ge=0)
    """GPUs per worker, fractions allowed; omit for one GPU where the cluster has any, otherwise none."""
    cpus: float | None = Field(default=None, gt=0)
    """CPU cores per worker; omit for one beside a GPU, or the whole machine without one."""
    workers: int = Field(default=1, ge=1)
    """Data-parallel workers, which share the rows of every batch: the same adapter in less time; 1 unless the base is large."""
    accelerator: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Kind of GPU as Ray names it (A100, H100, L4, ...); omit to take any."""
    node_labels: dict[StrictStr, StrictStr] = {}
    """Labels that the workers' nodes must have, as Ray selects them: {zone: eu-1}, "!eu-1", "in(eu-1, eu-2)", "!in(...)"."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    """Tasks with a higher number are trained first."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of storing its insides: same adapter, less memory, more time."""

    @model_validator(mode="after")
    def _check(self) -> ResourceSpec:
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError("gpus above 1 must be a whole number; write 0.5, 1, 2, ...")
        if self.workers > 1 and self.gpus is not None and 0 < self.gpus < 1:
            raise ValueError("several workers cannot share a GPU (NCCL refuses); write a whole number of gpus, or workers: 1")
        if self.accelerator is not None and self.gpus == 0:
            raise ValueError("accelerator names a kind of GPU, and gpus is 0; omit one of the two")
        for key, rule in self.node_labels.items():
            if not LABEL_KEY.fullmatch(key) or not LABEL_RULE.fullmatch(rule):
                form = "letters, digits and inner - _ . (63 at most)"
                raise ValueError(f"node_labels {key}: {rule} is not of {form}; write {{zone: eu-1}}, !eu-1 or in(eu-1, eu-2)")
        return self


class GateSpec(Part):
    """The bar that an adapter version must pass to answer in production."""

    metric: Literal["accuracy", "macro_f1", "token_f1"] = "accuracy"
    """The number that is judged on the gate split; a free-text answer is right if equal to gold but for case and spaces."""
    min: float = Field(default=0.0, ge=0.0, le=1.0)
    """Lowest acceptable value of the metric."""
    margin: float = Field(default=0.02, gt=0.0, lt=1.0)
    """How much worse than the champion still counts as not worse (0.02 = two points)."""
    hard_drop: float = Field(default=0.05, gt=0.0, le=1.0)
    """A drop of accuracy that no margin excuses where it is certain (0.05 = five points)."""
    policy: Literal["balanced", "strict", "advisory"] = "balanced"
    """Inconclusive: balanced promotes what is not below the champion, strict nothing; advisory promotes all and only reports."""


class TaskSpec(Part):
    """One text task: data, instruction, labels, and how its adapter is trained and judged."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Task name: lower-case letters, digits and inner hyphens; also the registered model's name and the API's `model`."""
    description: str = ""
    """One line for people."""
    base: BaseSpec
    """The base model."""
    data: DataSpec
    """The examples."""
    instruction: str = Field(min_length=1)
    """Prompt template with {column} fields and, for a classification task, {labels}."""
    instructions: Annotated[list[StrictStr], Field(min_length=1)] | None = None
    """Further wordings of the instruction over the same columns: training shows an example in one of all wordings, drawn anew
    in each epoch, so that answers depend less on the wording. Everything else asks with `instruction`. Not for encoders."""
    labels: dict[StrictStr, StrictStr | None] | None = None
    """Every allowed answer and what it means; omit for a free-text task."""
    label_score: Literal["sum", "mean"] = "sum"
    """How a label is scored by a generative base: sum of its tokens' log-likelihoods, or mean, which spares long labels."""
    lora: LoraSpec = LoraSpec()
    """Adapter shape."""
    train: TrainSpec = TrainSpec()
    """Training settings."""
    search: SearchSpec | None = None
    """Settings to try beside the spec's own; `search: {}` tries the defaults, as `orchestrator submit --search` does."""
    generation: GenerationSpec | None = None
    """Settings of a free-text task's answers; omit for the defaults, and for a classification task."""
    resources: ResourceSpec = ResourceSpec()
    """Hardware needs."""
    gate: GateSpec = GateSpec()
    """Promotion bar."""

    @model_validator(mode="after")
    def _check(self) -> TaskSpec:
        if self.name in RESERVED_NAMES:
            raise ValueError(f"the name {self.name!r} has a meaning of its own in the API; choose another name")
        fields = template_fields(self.instruction)
        if self.data.text not in self.columns:
            raise ValueError(f"the instruction never shows the input: put {{{self.data.text}}} into it, or set data.text")
        if self.data.label in self.columns:
            raise ValueError(f"the instruction shows the answer: take {{{self.data.label}}} out of it")
        own = {"learning_rate": self.train.learning_rate, "rank": self.lora.rank, "epochs": self.train.epochs}
        listed = {name: {*getattr(self.search, name)} for name in own if self.search and getattr(self.search, name)}
        if listed and all(values == {own[name]} for name, values in listed.items()):
            raise ValueError("search lists nothing but the spec's own values; add others, or omit all three lists")
        if self.labels is None:
            if "labels" in fields:
                raise ValueError("the instruction has {labels} but the task lists none: add labels, or take the field out")
            if self.gate.metric == "macro_f1":
                raise ValueError("gate.metric macro_f1 needs labels; use accuracy or token_f1 for a free-text task")
            return self
        if self.gate.metric == "token_f1":
            raise ValueError("gate.metric token_f1 is for free texts; use accuracy or macro_f1 for a task with labels")
        if self.generation is not None:
            raise ValueError("generation is set, but a task with labels writes no text; remove it, or the labels")
        if len(self.labels) < 2:
            raise ValueError("a classification task needs at least two labels; omit labels for a free-text task")
        if any(label != label.strip() or not label for label in self.labels):
            raise ValueError("labels must not be empty or begin or end with a space")
        folded = {" ".join(label.casefold().split()) for label in self.labels}
        if len(folded) < len(self.labels):
            raise ValueError("two labels differ only in upper and lower case or in spaces; make them distinct words")
        return self

    @model_validator(mode="after")
    def _check_instructions(self) -> TaskSpec:
        for number, wording in enumerate(self.instructions or (), start=1):
            fields = template_fields(wording, f"instructions {number}")
            shown = set(fields) - {"labels"}
            if shown != set(self.columns):
                rule = f"instructions {number} shows the columns {', '.join(sorted(shown)) or 'none'}"
                raise ValueError(f"{rule}; show those of `instruction`: {', '.join(sorted(self.columns))}")
            if "labels" in fields and self.labels is None:
                raise ValueError(f"instructions {number} has {{labels}} but the task lists none; take the field out")
        if len(set(self.wordings)) < len(self.wordings):
            raise ValueError("instruction and instructions hold the same text twice; remove one, or word it otherwise")
        return self

    @property
    def wordings(self) -> tuple[str, ...]:
        """All wordings of the instruction that training mixes; the first is the one that everything else asks with."""
        return (self.instruction, *(self.instructions or ()))

    @property
    def max_new_tokens(self) -> int | None:
        """Token limit of a free-text task's answers; None for a classification task."""
        return (self.generation or GenerationSpec()).max_new_tokens if self.labels is None else None

    @property
    def columns(self) -> tuple[str, ...]:
        """Input columns in the order in which the instruction shows them."""
        return tuple(name for name in template_fields(self.instruction) if name != "labels")


def alpha_divisor(rank: int, rslora: bool) -> float:
    """What alpha is divided by to give the update's factor. Source of rsLoRA: arXiv 2312.03732."""
    return math.sqrt(rank) if rslora else rank


def template_fields(template: str, where: str = "instruction") -> tuple[str, ...]:
    """List a template's {field} names in order, each once. Raises ValueError for anything but plain names."""
    fields: dict[str, None] = {}
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{where}: {error}; write {{{{ and }}}} for literal braces") from error
    for _, field, format_spec, conversion in parts:
        if field is None:
            continue
        if not field.isidentifier() or format_spec or conversion:
            raise ValueError(f"{where}: {{{field}}} is not a plain column name; write {{{{ and }}}} for literal braces")
        fields[field] = None
    return tuple(fields)


def task_json_schema() -> dict[str, Any]:
    """JSON schema of a task file, for editors; tasks/schema.json is this."""
    schema = TaskSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
