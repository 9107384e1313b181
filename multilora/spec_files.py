"""Task files: load specs from YAML and say everything that is wrong with them.

Every problem of every file is found before anything is raised, each with file, field, value, rule and fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from multilora.errors import Problem, SpecError
from multilora.spec import LOCAL_SUFFIXES, TaskSpec
from multilora.yaml_loader import Yaml12Loader


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
_PEFT_NAMES = {
    "lora.r": "rank", "lora.lora_alpha": "alpha", "lora.lora_dropout": "dropout", "lora.use_rslora": "rslora",
    "lora.layers_to_transform": "layers", "lora.loraplus_lr_ratio": "plus_ratio", "lora.use_dora": "method",
    "lora.init_lora_weights": "method",
}  # fmt: skip


def _problem_of(where: str, detail: Any) -> Problem:
    field = ".".join(str(part) for part in detail["loc"] if part != "[key]") or "file"
    message = detail["msg"].removeprefix("Value error, ")
    rule, _, fix = message.partition("; ")
    if detail["type"] == "value_error" and not fix:
        rule, _, fix = message.partition(": ")
    fix = _FIXES.get(detail["type"], fix) or "change the value to fit the rule"
    if field in _PEFT_NAMES:
        fix = f"the field is called lora.{_PEFT_NAMES[field]} here"
    shown = "" if detail["type"] in ("missing", "value_error") else repr(detail["input"])[:80]
    return Problem(where, field, shown, rule[:1].lower() + rule[1:], fix)


def _without_union_noise(error: ValidationError) -> Sequence[Any]:
    """Keep one error per field, the deepest, where pydantic reports every branch of a union."""
    details: dict[tuple[Any, ...], Any] = {}
    for detail in error.errors():
        loc = tuple(
            part for part in detail["loc"] if part not in ("str", "HubSource") and not str(part).startswith(("literal[", "list["))
        )
        details.setdefault(loc, {**detail, "loc": loc})
    return [details[loc] for loc in details if not any(loc == other[: len(loc)] for other in details if other != loc)]
