"""From what was found in a file to a first task file: YAML that `orchestrator validate` takes, with TODOs for a person."""

from __future__ import annotations

import json
import math
import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from multilora.errors import SpecError
from multilora.prompt import PromptFormat
from multilora.spec import RESERVED_NAMES, GateSpec, TaskSpec
from multilora.yaml_loader import Yaml12Loader
from orchestrator.dataset import build_dataset
from orchestrator.inspect_data import Finding, Inspection
from orchestrator.power import FLIP_RATE, GATE_MOST, GATE_SHARE, examples_needed, provable_margin
from orchestrator.token_lengths import MOST_TOKENS, KnownBase, Lengths, lengths_of, rounded_limit

ROOM_SHARE, ROOM_TOKENS = 8, 8
"""Texts to come may be longer: an eighth, and some tokens more."""
MEANING_TOKENS = 16
"""What the meaning of a label will take in a generative base's prompt."""
MOST_NEW_TOKENS = 4096
MEANING_HINT = """\
# TODO: write what each label means in place of null, so that somebody who never saw the data could decide: not "cancel order"
# again, but "wants an order, or a part of it, called off before it arrives". The base reads it with the label.
"""


class Yaml12Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than text: yes, 08, 12:30, 2e-4. A text takes one line."""


def _represent(dumper: Yaml12Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if len(text.splitlines()) > 1 else None)


Yaml12Dumper.add_representer(str, _represent)

for _first, _resolvers in Yaml12Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        Yaml12Dumper.add_implicit_resolver(_tag, _pattern, [_first])


@dataclass(frozen=True)
class FirstSpec:
    """A task file to be, and what a person should know before it is written."""

    text: str
    """YAML."""
    findings: tuple[Finding, ...]
    corrected: str
    """The rows as JSON lines where the file itself cannot be used, else empty."""

    def check(self, data_file: Path) -> None:
        """Load the spec and split the data, as training would. Raises DataError, such as for too few rows."""
        spec = TaskSpec.model_validate(yaml.load(self.text, Loader=Yaml12Loader))  # a SafeLoader
        with tempfile.TemporaryDirectory() as folder:
            source = data_file
            if self.corrected:
                source = Path(folder) / "corrected.jsonl"
                source.write_text(self.corrected, encoding="utf-8")
            data = spec.data.model_copy(update={"train": str(source)})
            build_dataset(spec.model_copy(update={"data": data}))


@dataclass(frozen=True)
class _Limits:
    """What the lengths of prompts and answers lead to."""

    prompt: Lengths
    max_length: int
    max_new_tokens: int | None
    """None of a task with labels."""


def task_name(stem: str) -> str:
    """A name that a task may have, made of a file's."""
    name = re.sub(r"[^a-z0-9]+", "-", stem.casefold()).strip("-")[:63].strip("-") or "task"
    return f"{name}-task" if name in RESERVED_NAMES else name


def first_spec(name: str, inspection: Inspection, base: KnownBase, base_field: str, train_field: str) -> FirstSpec:
    """Write a task file; the fields are what it calls base and data. Raises SpecError for free text over an encoder."""
    if inspection.labels is None and base.family == "encoder":
        (seen,) = (finding.text for finding in inspection.findings if finding.about == "free text")
        raise SpecError(
            f"column {inspection.columns.label!r} has {seen}. Base {base.spec.model} is an encoder, which writes no text: "
            "name a seq2seq or causal base, such as --base google/flan-t5-base, or the column of the labels with --label"
        )
    instruction = _instruction(inspection)
    limits = _limits(inspection, base, instruction)
    num_gate = max(1, round(min(GATE_SHARE * inspection.num_inputs, GATE_MOST)))
    parts = [
        "# A first task file by `orchestrator init`; what is marked TODO wants a person who knows the task.\n",
        _dump({"name": name}),
        'description: ""  # TODO: one line for people\n',
        _dump({"base": {"model": base_field}}),
        _dump({"data": {"train": train_field, "text": _main(inspection), "label": inspection.columns.label}}),
        "# TODO: say in one sentence what is to be decided or written; columns of the file stand in braces.\n",
        f"instruction: |-\n{textwrap.indent(instruction, '  ')}\n",
        _labels(inspection.labels),
        _settings(inspection, limits, num_gate),
    ]
    findings = [*inspection.findings, *_about_tokens(inspection, base, limits), *_about_size(inspection.num_inputs, num_gate)]
    label = inspection.columns.label
    rows = [{**row.columns, label: row.answer} for row in inspection.rows] if inspection.is_corrected else []
    corrected = "".join(json.dumps(row) + "\n" for row in rows)
    return FirstSpec("".join(parts), tuple(findings), corrected)


def _main(inspection: Inspection) -> str:
    return inspection.fields[inspection.columns.main]


def _instruction(inspection: Inspection) -> str:
    fields = inspection.fields.values()
    inputs = [f"{field.replace('_', ' ').strip().capitalize()}: {{{field}}}" for field in fields]
    what = ["Which label fits this best?", "{labels}"] if inspection.labels else ["Write the answer to this."]
    return "\n".join([*what, *inputs, "Answer:"])


def _limits(inspection: Inspection, base: KnownBase, instruction: str) -> _Limits:
    names = list(inspection.labels or ())
    # A base that is not here may be generative, whose prompts are the longer ones.
    pairs = tuple((name, "") for name in names)
    prompt_format = PromptFormat(base.family or "seq2seq", instruction, _main(inspection), pairs, MOST_TOKENS)
    prompt = lengths_of(base, [prompt_format.render(row.columns) for row in inspection.rows])
    if names:
        max_new_tokens, num_answer = None, 1 + max(len(base.token_ids(name)) for name in names)
    else:
        answer = lengths_of(base, [row.answer for row in inspection.rows])
        max_new_tokens = rounded_limit(answer.p99 + answer.p99 // ROOM_SHARE + 1, MOST_NEW_TOKENS)
        num_answer = max_new_tokens
    # A causal base has prompt and answer in one row of positions.
    most = base.max_positions and base.max_positions - (num_answer if base.family == "causal" else 0)
    room = prompt.p99 // ROOM_SHARE + ROOM_TOKENS + (0 if base.family == "encoder" else MEANING_TOKENS * len(names))
    return _Limits(prompt, rounded_limit(prompt.p99 + room, most), max_new_tokens)


def _labels(labels: Mapping[str, int] | None) -> str:
    if not labels:
        return ""
    lines = [
        textwrap.indent(_dump({label: None}).rstrip("\n"), "  ") + f"  # {count} row{'' if count == 1 else 's'}\n"
        for label, count in labels.items()
    ]
    return f"{MEANING_HINT}labels:\n{''.join(lines)}"


def _settings(inspection: Inspection, limits: _Limits, num_gate: int) -> str:
    parts = [f"train:\n  max_length: {limits.max_length}  # 99 % of the prompts have at most {limits.prompt.p99} tokens\n"]
    if limits.max_new_tokens is not None:
        parts.append(f"generation:\n  max_new_tokens: {limits.max_new_tokens}\n")
    parts.append("gate:\n")
    if inspection.labels:
        share = max(inspection.labels.values()) / len(inspection.rows)
        parts.append(f"  min: {math.floor(100 * share) / 100:g}  # what always giving the largest label comes to\n")
    parts.append(f"  margin: {_margin(num_gate):g}  # what {num_gate} gate examples can prove\n")
    return "".join(parts)


def _margin(num_gate: int) -> float:
    return max(GateSpec().margin, provable_margin(num_gate))


def _about_tokens(inspection: Inspection, base: KnownBase, limits: _Limits) -> Iterator[Finding]:
    model, prompt = base.spec.model, limits.prompt
    unit = f"tokens of {model}" if base.files else f"tokens, estimated as characters / 4, for {model} is not on this machine"
    numbers = f"half of the prompts have at most {prompt.median}, 90 % {prompt.p90}, 99 % {prompt.p99}, the longest has"
    yield Finding("fact", "lengths", f"{numbers} {prompt.longest} {unit}: train.max_length {limits.max_length}")
    if base.files is None and inspection.labels is None:
        yield Finding("look", "base", f"whether {model} writes text is not known here; if it is an encoder, submit refuses it")
    if limits.max_length < prompt.p99:
        yield Finding("look", "long texts", f"{model} takes no more than {limits.max_length} tokens: longer texts lose their end")
    alike: dict[tuple[int, ...], list[str]] = {}
    for label in inspection.labels or ():
        alike.setdefault(base.token_ids(label), []).append(label)
    for group in alike.values():
        if len(group) > 1:
            fix = "give them meanings that differ" if base.family == "encoder" else "reword them in the file"
            yield Finding("look", "labels alike", f"{', '.join(map(repr, group))} are the same tokens to {model}: {fix}")


def _about_size(num_inputs: int, num_gate: int) -> Iterator[Finding]:
    default = GateSpec().margin
    needed = examples_needed(FLIP_RATE, default)
    if num_gate < needed:
        said = f"{num_inputs} examples leave {num_gate} for the gate, which prove a margin of {_margin(num_gate):g}"
        yield Finding("look", "few examples", f"{said} (gate.margin); {default:g} takes {needed}")


def _dump(value: object) -> str:
    text: str = yaml.dump(value, Dumper=Yaml12Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text
