"""From task specs to tasks that can be planned: data loaded and checked, base found, run key computed. No torch, no Ray."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from multilora.base_files import BaseFiles, find_base
from multilora.errors import DataError, Problem, SpecError
from multilora.prompt import PromptFormat, label_wordings
from multilora.spec import BaseSpec, TaskSpec
from multilora.spec_hash import spec_hash
from orchestrator.dataset import TaskDataset, build_dataset
from orchestrator.plan import TaskNeed
from orchestrator.search import candidates, planned_epochs

CHARS_PER_TOKEN = 4.0


@dataclass(frozen=True)
class PreparedTask:
    """A task whose data and base are there."""

    spec: TaskSpec
    dataset: TaskDataset
    base_files: BaseFiles
    run_key: str
    """Hash of everything that decides the trained weights; equal keys mean there is nothing to train."""

    @cached_property
    def trainings(self) -> dict[str, TaskSpec]:
        """Run key -> spec of every adapter to train: the task's own, or the candidates of its search, the own setting first."""
        found = candidates(self.spec)
        return {_hash([self.run_key, spec_hash(spec)]): spec for spec in found} or {self.run_key: self.spec}

    @property
    def num_flops(self) -> dict[str, float]:
        """Operations of each of the trainings."""
        need = self.need
        return {key: need.num_flops * spec.train.epochs / need.epochs for key, spec in self.trainings.items()}

    @property
    def gate_hash(self) -> str:
        """Hash of the gate's settings."""
        return hashlib.sha256(self.spec.gate.model_dump_json().encode()).hexdigest()[:16]

    @property
    def params(self) -> dict[str, object]:
        """What MLflow shows as the run's parameters."""
        nested = self.spec.model_dump(mode="json", include={"base", "lora", "train", "gate"})
        params = {f"{part}.{name}": value for part, values in nested.items() for name, value in values.items()}
        sizes = {f"num_{split}": len(getattr(self.dataset, split)) for split in ("train", "select", "gate")}
        kind = {"num_labels": len(self.spec.labels)} if self.spec.labels else {"max_new_tokens": self.spec.max_new_tokens}
        search = self.spec.search.model_dump(mode="json", exclude_defaults=True) if self.spec.search else {}
        return {**params, **sizes, **kind, **{f"search.{name}": value for name, value in search.items()}}

    @cached_property
    def need(self) -> TaskNeed:
        """What the plan must know; tokens are estimated from characters."""
        spec, files = self.spec, self.base_files
        lengths = [sum(map(len, example.columns.values())) for example in self.dataset.train]
        num_tokens = sum(lengths) / len(lengths) / CHARS_PER_TOKEN + 2
        if files.family != "encoder":
            labels = PromptFormat.of(spec, files.family).labels
            num_tokens += (fmean(map(len, spec.wordings)) + sum(map(len, label_wordings(labels)))) / CHARS_PER_TOKEN
        num_tokens = min(num_tokens, spec.train.max_length)
        if spec.max_new_tokens is not None:
            num_chars = sum(len(example.label) for example in self.dataset.train) / len(self.dataset.train)
            num_tokens += min(num_chars / CHARS_PER_TOKEN + 1, spec.max_new_tokens)
        trained = list(self.trainings.values())
        share_of_layers = 1.0 if spec.lora.layers is None else min(1.0, len(spec.lora.layers) / files.num_layers)
        return TaskNeed(
            task=spec.name,
            base=spec.base,
            num_base_parameters=files.num_parameters,
            num_quantised_parameters=files.num_quantised,
            num_layers=files.num_layers,
            hidden_size=files.hidden_size,
            num_adapter_parameters=int(max(one.lora.rank for one in trained) * files.num_linear_features * share_of_layers),
            num_train=len(self.dataset.train),
            epochs=planned_epochs([one.train.epochs for one in trained], spec.search.eta if spec.search else 1),
            batch_size=spec.train.batch_size,
            tokens_per_example=num_tokens,
            resources=spec.resources,
            num_candidates=len(trained),
        )


def prepare(specs: Sequence[TaskSpec]) -> tuple[list[PreparedTask], list[Problem]]:
    """Prepare every task that can be; the problems of the others come back, and the others go on."""
    prepared: list[PreparedTask] = []
    problems: list[Problem] = []
    found: dict[BaseSpec, BaseFiles | tuple[Problem, ...]] = {}
    for spec in specs:
        if spec.base not in found:
            try:
                found[spec.base] = find_base(spec.base)
            except SpecError as error:
                found[spec.base] = error.problems
        files = found[spec.base]
        if isinstance(files, tuple):
            problems += [replace(problem, where=spec.name) for problem in files]
            continue
        if files.max_positions and spec.train.max_length > files.max_positions:
            rule = f"base {spec.base.model} takes at most {files.max_positions} tokens"
            fix = f"set it to {files.max_positions} or less" + (", with room for the answer" if files.family == "causal" else "")
            problems.append(Problem(spec.name, "train.max_length", str(spec.train.max_length), rule, fix))
            continue
        if spec.labels is None and files.family == "encoder":
            rule, fix = "an encoder writes no text", "name a seq2seq or causal base, or list the labels"
            problems.append(Problem(spec.name, "base.model", repr(spec.base.model), rule, fix))
            continue
        if spec.instructions and files.family == "encoder":
            rule = "an encoder reads the input alone, so wordings of the instruction would change nothing"
            problems.append(Problem(spec.name, "instructions", "", rule, "remove them, or name a seq2seq or causal base"))
            continue
        try:
            dataset = build_dataset(spec)
        except DataError as error:
            problems += [replace(problem, where=_prefixed(spec.name, problem.where)) for problem in error.problems]
            continue
        prepared.append(PreparedTask(spec, dataset, files, _run_key(spec, dataset, files)))
    return prepared, problems


def _prefixed(task: str, where: str) -> str:
    return where if where == task else f"{task}: {where}"


def _run_key(spec: TaskSpec, dataset: TaskDataset, files: BaseFiles) -> str:
    return _hash([spec.name, spec_hash(spec), dataset.fingerprint, files.fingerprint])


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def git_sha() -> str:
    """Commit of the folder that the command runs in; empty outside a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip()
