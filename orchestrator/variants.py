"""Variants of a task's LoRA adapter: rank, target modules, layers, and the wording of instruction and labels.

The list itself is made of plain values; all variants with all seeds train together.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from multilora.base_files import Family
from multilora.base_model import FrozenBase
from multilora.prompt import PromptFormat, label_wordings
from multilora.spec import TaskSpec, alpha_divisor, template_fields
from multilora.spec_hash import spec_hash
from orchestrator.methods import AS_IN_FILE, Bench, MethodRow
from orchestrator.train_together import Entry, OnEvent, ignore, train_together

RANKS = (1, 4, 8, 16, 64)
ATTENTION = r".*(?i:attn|attention)\w*\..*"
Q_AND_V = r".*(?i:attn|attention)\w*\.(.*\.)?(q|v|query|value)(_proj|_lin)?"
MLP = r"(?!.*(?i:attn|attention)\w*\.).*\.\d+\..*"
"""Regular expressions for whole names of modules, as architectures have them: self_attn.q_proj, SelfAttention.q,
attention.self.query. GPT-2 and others hold q, k and v in one layer; there nothing matches, and the row says so."""
CLOZE = "This is best described as"


@dataclass(frozen=True)
class Variant:
    """One way to make the task's adapter."""

    method: str
    spec: TaskSpec
    note: str = ""
    label_of: Mapping[str, str] = field(default_factory=dict)
    """See `Entry`; so is `asked`."""
    asked: Mapping[str, str] = field(default_factory=dict)
    skipped: str = ""
    """Why it cannot be trained."""


def variant_rows(bench: Bench, base: FrozenBase, on_event: OnEvent = ignore) -> Iterator[MethodRow]:
    """Train every variant with every seed in one group; rows in the order of `variants_of`, seeds side by side."""
    entries = []
    for variant in variants_of(bench.spec, base.family, base.files.num_layers):
        for seed in bench.seeds[:1] if variant.skipped else bench.seeds:
            row = MethodRow("variants", variant.method, seed=seed, note=variant.note, skipped=variant.skipped)
            spec = with_seed(variant.spec, seed)
            entries.append(Entry(row, spec, bench.dataset.train, variant.label_of, variant.asked))
    yield from train_together(bench, base, entries, on_event)


def with_seed(spec: TaskSpec, seed: int) -> TaskSpec:
    """The same spec with another seed of initialisation, order and dropout; splits are already cut."""
    return spec.model_copy(update={"train": spec.train.model_copy(update={"seed": seed})})


def variants_of(spec: TaskSpec, family: Family, num_layers: int) -> list[Variant]:
    """List all variants; those that are the task file's own adapter say so in their note."""
    wordings = _label_variants(spec) if family == "encoder" else _wording_variants(spec)
    own = spec_hash(spec)
    return [
        Variant(v.method, v.spec, AS_IN_FILE if spec_hash(v.spec) == own else v.note, v.label_of, v.asked, v.skipped)
        for v in (*_rank_variants(spec), *_place_variants(spec, num_layers), *wordings)
    ]


def _rank_variants(spec: TaskSpec) -> Iterator[Variant]:
    lora = spec.lora
    for rank in sorted({*RANKS, lora.rank}):
        # The product stays exact where the rank is the spec's own.
        alpha = lora.alpha * (alpha_divisor(rank, lora.rslora) / alpha_divisor(lora.rank, lora.rslora))
        yield Variant(f"rank {rank}", _with_lora(spec, rank=rank, alpha=alpha), f"alpha {alpha:g}, which keeps the scaling")


def _place_variants(spec: TaskSpec, num_layers: int) -> Iterator[Variant]:
    for method, targets in {
        "all linear layers": "all-linear",
        "attention q and v": Q_AND_V,
        "attention": ATTENTION,
        "MLP": MLP,
    }.items():
        yield Variant(method, _with_lora(spec, target_modules=targets, layers=None), f"target_modules: {targets}")
    top = list(range(-(num_layers // 2), 0))
    yield Variant(
        "top half of the layers",
        _with_lora(spec, target_modules="all-linear", layers=top or None),
        f"layers: {top}",
        skipped="" if top else "the base has one layer",
    )


def _label_variants(spec: TaskSpec) -> Iterator[Variant]:
    """Of an encoder, which compares the text with each label's wording."""
    if spec.labels is None:
        return
    yield Variant("labels with meanings", spec, "label: meaning", skipped=_lack_of_meanings(spec))
    yield Variant("label names alone", _worded(spec, spec.instruction, names_of(spec)), "label")
    yield Variant("instruction wordings", spec, skipped="an encoder reads the input alone: no instruction is in its prompt")


def _wording_variants(spec: TaskSpec) -> Iterator[Variant]:
    """Of a generative base, whose prompt is the instruction."""
    shown = _shown_columns(spec)
    yield Variant("text alone", _worded(spec, shown, spec.labels), shown)
    if spec.labels is None:
        return
    options = spec.instruction if "labels" in template_fields(spec.instruction) else "{labels}\n" + spec.instruction
    others = other_wordings(spec)
    names, bare = names_of(spec), f"{{labels}}\n{shown}"
    yield Variant("options with meanings", _worded(spec, options, spec.labels), options, skipped=_lack_of_meanings(spec))
    yield Variant("options, names alone", _worded(spec, options, names), "{labels} without meanings")
    yield Variant("no instruction, names alone", _worded(spec, bare, names), bare)
    yield Variant("cloze", _worded(spec, f"{shown}\n{CLOZE}", spec.labels), f"{shown}\n{CLOZE}")
    letters = dict(zip(string.ascii_uppercase, spec.labels, strict=False))
    wordings = label_wordings(PromptFormat.of(spec, "causal").labels)
    yield Variant(
        "multiple choice by letter",
        _worded(spec, options, dict(zip(letters, wordings, strict=False))),
        "the answer is the option's letter",
        label_of=letters,
        skipped="" if len(letters) == len(spec.labels) else f"{len(spec.labels)} labels are more than there are letters",
    )
    for method, mixed in (("one wording", None), ("mixed wordings", list(others.values()))):
        yield Variant(
            method,
            _worded(spec, spec.instruction, spec.labels, mixed),
            f"trained with: {', '.join(('instruction', *(others if mixed else ())))}",
            asked={f"{method}, asked: {name}": wording for name, wording in others.items()},
        )


def other_wordings(spec: TaskSpec) -> dict[str, str]:
    """Wordings beside the instruction by name: the spec's own where it has any."""
    if spec.instructions:
        return {f"wording {number}": wording for number, wording in enumerate(spec.instructions, start=2)}
    shown = _shown_columns(spec)
    wordings = {
        "options last": f"{shown}\nWhich of these fits?\n{{labels}}\nAnswer:",
        "options first": f"{{labels}}\n{shown}",
        "cloze": f"{shown}\n{CLOZE}",
    }
    return {name: wording for name, wording in wordings.items() if wording != spec.instruction}


def names_of(spec: TaskSpec) -> dict[str, str | None]:
    """The labels without their meanings."""
    return dict.fromkeys(spec.labels or ())


def _shown_columns(spec: TaskSpec) -> str:
    if len(spec.columns) == 1:
        return f"{{{spec.columns[0]}}}"
    return "\n".join(f"{name}: {{{name}}}" for name in spec.columns)


def _lack_of_meanings(spec: TaskSpec) -> str:
    return "" if any((spec.labels or {}).values()) else "no label of the task has a meaning"


def _with_lora(spec: TaskSpec, **settings: object) -> TaskSpec:
    return spec.model_copy(update={"lora": spec.lora.model_copy(update=settings)})


def _worded(
    spec: TaskSpec, instruction: str, labels: Mapping[str, str | None] | None, instructions: list[str] | None = None
) -> TaskSpec:
    """The spec with other wordings, checked again."""
    wordings = {"instruction": instruction, "instructions": instructions, "labels": labels}
    return TaskSpec.model_validate({**spec.model_dump(), **wordings})
