"""The task spec: one YAML file = one task = one adapter. Loads, checks and hashes specs; knows no torch and no data.

Every problem of every file is found before anything is raised, each with file, field, value, rule and fix.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from multilora.errors import Problem, SpecError
from multilora.yaml_loader import Yaml12Loader

RESERVED_NAMES = frozenset({"auto", "base", "latest"})
LOCAL_SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


class Part(BaseModel):
    """Settings that every part of a spec shares: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BaseSpec(Part):
    """The frozen base model that the task's adapter belongs to."""

    model: str = Field(min_length=1)
    """Hugging Face model id, or a folder (starting with ./, ../ or /) in transformers format with safetensors weights."""
    revision: str | None = None
    """Hub commit, tag or branch; omit for the default branch or a local folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the base's weights and activations; float16 is not offered because T5 overflows in it."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Store the base's linear layers in 8-bit (LLM.int8) or 4-bit (nf4, double quantisation) through bitsandbytes."""


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

    rank: int = Field(default=8, ge=1, le=256)
    """Rank r of the update matrices."""
    alpha: float = Field(default=16.0, gt=0)
    """LoRA alpha; the update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training; one mask per row and feature, the same at every position."""
    target_modules: Literal["all-linear"] | Annotated[list[StrictStr], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter: `all-linear`, or a list of module names or name endings such as [q, v]."""


class TrainSpec(Part):
    """How the adapter is trained."""

    epochs: int = Field(default=12, ge=1, le=1000)
    """Passes over the training examples."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak AdamW learning rate; it falls linearly to zero."""
    batch_size: int = Field(default=16, ge=1, le=4096)
    """Examples per optimiser step of this adapter."""
    max_length: int = Field(default=128, ge=8, le=32768)
    """Longest prompt in tokens; longer inputs lose their end, never the instruction or the labels."""
    max_examples: int | None = Field(default=None, ge=2)
    """Use at most this many training examples (stratified by label); omit to use all."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, order, dropout and cut-off splits."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many epochs without a better result on the select split; omit to train all epochs."""


class GenerationSpec(Part):
    """How the answers of a free-text task are written."""

    max_new_tokens: int = Field(default=64, ge=1, le=4096)
    """Most tokens of an answer, its end token included; training answers are cut there too."""


class ResourceSpec(Part):
    """What one training worker of this task needs."""

    gpus: float | None = Field(default=None, ge=0)
    """GPUs per worker, fractions allowed; omit for one GPU where the cluster has any, otherwise none."""
    cpus: float | None = Field(default=None, gt=0)
    """CPU cores per worker; omit for one beside a GPU, or the whole machine without one."""
    workers: int = Field(default=1, ge=1)
    """Data-parallel workers; 1 unless the base is large."""

    @model_validator(mode="after")
    def _check(self) -> ResourceSpec:
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError("gpus above 1 must be a whole number; write 0.5, 1, 2, ...")
        return self


class GateSpec(Part):
    """The bar that an adapter version must pass to answer in production."""

    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    """The number that is judged on the gate split; a free-text answer is right if equal to gold but for case and spaces."""
    min: float = Field(default=0.0, ge=0.0, le=1.0)
    """Lowest acceptable value of the metric."""
    margin: float = Field(default=0.02, gt=0.0, lt=1.0)
    """How much worse than the champion still counts as not worse (0.02 = two points)."""


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
    labels: dict[StrictStr, StrictStr | None] | None = None
    """Every allowed answer and what it means; omit for a free-text task."""
    lora: LoraSpec = LoraSpec()
    """Adapter shape."""
    train: TrainSpec = TrainSpec()
    """Training settings."""
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
        if self.labels is None:
            if "labels" in fields:
                raise ValueError("the instruction has {labels} but the task lists none: add labels, or take the field out")
            if self.gate.metric != "accuracy":
                raise ValueError(f"gate.metric {self.gate.metric} needs labels; use accuracy for a free-text task")
            return self
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

    @property
    def max_new_tokens(self) -> int | None:
        """Token limit of a free-text task's answers; None for a classification task."""
        return (self.generation or GenerationSpec()).max_new_tokens if self.labels is None else None

    @property
    def columns(self) -> tuple[str, ...]:
        """Input columns in the order in which the instruction shows them."""
        return tuple(name for name in template_fields(self.instruction) if name != "labels")


def template_fields(template: str) -> tuple[str, ...]:
    """List a template's {field} names in order, each once. Raises ValueError for anything but plain names."""
    fields: dict[str, None] = {}
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"instruction: {error}; write {{{{ and }}}} for literal braces") from error
    for _, field, format_spec, conversion in parts:
        if field is None:
            continue
        if not field.isidentifier() or format_spec or conversion:
            raise ValueError(f"instruction: {{{field}}} is not a plain column name; write {{{{ and }}}} for literal braces")
        fields[field] = None
    return tuple(fields)


@dataclass(frozen=True)
class LoadedSpecs:
    """Specs that are right, in the order given, and the problems of those that are not."""

    specs: tuple[TaskSpec, ...]
    problems: tuple[Problem, ...]


def load_task_specs(paths: Iterable[str | Path]) -> tuple[TaskSpec, ...]:
    """Load every spec. Raises SpecError with all problems of all files."""
    loaded = try_load_task_specs(paths)
    if loaded.problems:
        raise SpecError.of(loaded.problems)
    return loaded.specs


def try_load_task_specs(paths: Iterable[str | Path]) -> LoadedSpecs:
    """Load every spec that is right; collect the problems of the others. Paths in a spec become absolute."""
    specs: dict[str, TaskSpec] = {}
    problems: list[Problem] = []
    file_of: dict[str, Path] = {}
    for path in map(Path, paths):
        found = _load_one(path)
        if isinstance(found, list):
            problems += found
        elif found.name in specs:
            rule = f"task name is already used by {file_of[found.name]}"
            problems.append(Problem(str(path), "name", found.name, rule, "give each task its own name"))
        else:
            specs[found.name], file_of[found.name] = found, path
    return LoadedSpecs(tuple(specs.values()), tuple(problems))


def spec_hash(spec: TaskSpec) -> str:
    """Hash what decides the trained weights, 16 hex digits; data and base content are hashed by their owners."""
    decisive = spec.model_dump(mode="json", include={"instruction", "labels", "lora", "train"})
    decisive["columns"] = [spec.data.text, spec.data.label]
    decisive["base"] = [spec.base.dtype, spec.base.quantization]
    decisive["metric"] = spec.gate.metric  # it chooses the epoch
    if spec.labels is None:
        decisive["max_new_tokens"] = spec.max_new_tokens
    # Label order is part of the prompt, so keys stay in the user's order.
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def task_json_schema() -> dict[str, Any]:
    """JSON schema of a task file, for editors; tasks/schema.json is this."""
    schema = TaskSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _load_one(path: Path) -> TaskSpec | list[Problem]:
    where = str(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=Yaml12Loader)  # a SafeLoader
    except OSError as error:
        return [Problem(where, "file", "", error.strerror or str(error), "check the path")]
    except UnicodeDecodeError:
        return [Problem(where, "file", "", "is not UTF-8 text", "save the file as UTF-8")]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else "file"
        rule = f"is not valid YAML: {getattr(error, 'problem', error)}"
        return [Problem(where, line, "", rule, "check indentation and quotes")]
    if not isinstance(raw, dict):
        return [Problem(where, "file", type(raw).__name__, "must hold a mapping of fields", "start with `name: my-task`")]
    try:
        spec = TaskSpec.model_validate(raw)
    except ValidationError as error:
        return [_problem_of(where, detail) for detail in _without_union_noise(error)]
    return _resolve_paths(spec, path)


def _resolve_paths(spec: TaskSpec, path: Path) -> TaskSpec | list[Problem]:
    folder = path.resolve().parent
    problems: list[Problem] = []
    data: dict[str, Any] = {}
    for field in ("train", "select", "gate"):
        source = getattr(spec.data, field)
        if not isinstance(source, str):
            continue
        file = folder / source
        if file.suffix.lower() not in LOCAL_SUFFIXES:
            rule, fix = "is no file type that can be read", f"use {', '.join(LOCAL_SUFFIXES)} or {{hub: ..., split: ...}}"
            problems.append(Problem(str(path), f"data.{field}", repr(source), rule, fix))
        elif not file.is_file():
            fix = f"paths are relative to the spec's folder {folder}"
            problems.append(Problem(str(path), f"data.{field}", repr(source), "file does not exist", fix))
        data[field] = str(file)
    base = spec.base
    if base.model.startswith(("./", "../", "/")):
        base = base.model_copy(update={"model": str((folder / base.model).resolve())})
        if not Path(base.model).is_dir():
            fix = "name a folder in transformers format, or a hub id"
            problems.append(Problem(str(path), "base.model", repr(spec.base.model), "folder does not exist", fix))
    if problems:
        return problems
    return spec.model_copy(update={"data": spec.data.model_copy(update=data), "base": base})


_FIXES = {
    "extra_forbidden": "remove it or correct the spelling; the fields are listed in tasks/schema.json",
    "missing": "add the field",
    "string_type": "put the value in quotes",
    "string_pattern_mismatch": "use lower-case letters, digits and inner hyphens, at most 63 characters",
}


def _problem_of(where: str, detail: Any) -> Problem:
    field = ".".join(str(part) for part in detail["loc"] if part != "[key]") or "file"
    message = detail["msg"].removeprefix("Value error, ")
    rule, _, fix = message.partition("; ")
    if detail["type"] == "value_error" and not fix:
        rule, _, fix = message.partition(": ")
    fix = _FIXES.get(detail["type"], fix) or "change the value to fit the rule"
    shown = "" if detail["type"] in ("missing", "value_error") else repr(detail["input"])[:80]
    return Problem(where, field, shown, rule[:1].lower() + rule[1:], fix)


def _without_union_noise(error: ValidationError) -> Sequence[Any]:
    """Keep one error per field, the deepest, where pydantic reports every branch of a union."""
    details: dict[tuple[Any, ...], Any] = {}
    for detail in error.errors():
        loc = tuple(part for part in detail["loc"] if part not in ("str", "HubSource", "list[constrained-str]") and
                    not str(part).startswith(("literal[", "list[")))
        details.setdefault(loc, {**detail, "loc": loc})
    return [details[loc] for loc in details if not any(loc == other[: len(loc)] for other in details if other != loc)]
