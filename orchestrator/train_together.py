"""Train many adapters of one task in one group over one base, then ask each of them all gate examples.

What is cut short goes on: adapters and checkpoints lie below the comparison's folder, named by what decides their weights.
Runs in the calling process; knows no Ray.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean

from multilora.artifact import read_artifact
from multilora.base_model import FrozenBase
from multilora.errors import AdapterError, DataError
from multilora.prompt import PromptFormat, encode_prompt
from multilora.spec import TaskSpec
from multilora.spec_hash import spec_hash
from orchestrator.batching import num_steps_per_epoch
from orchestrator.dataset import Example, fingerprint_of_rows
from orchestrator.files import write_whole
from orchestrator.group_task import Member, TrainEvent
from orchestrator.methods import Bench, MethodRow
from orchestrator.trainer import GroupTrainer
from serve.engine import BoundAdapter, Engine, Work

CHECKPOINT_EVERY_S = 30.0
OnEvent = Callable[[TrainEvent], None]


@dataclass(frozen=True)
class Entry:
    """One adapter of the group: the row that it becomes, and what trains it."""

    row: MethodRow
    """Part, method, seed and note; where `skipped` is set, nothing is trained."""
    spec: TaskSpec
    train: tuple[Example, ...]
    """Some of the task's training examples."""
    label_of: Mapping[str, str] = field(default_factory=dict)
    """What the spec's labels stand for where they are not the task's own: {A: spam, B: ham}."""
    asked: Mapping[str, str] = field(default_factory=dict)
    """Further instructions to ask the adapter with, each a row of its own: method -> template."""


def ignore(event: TrainEvent) -> None:
    """Listen to no event of the training."""


def train_together(
    bench: Bench,
    base: FrozenBase,
    entries: Sequence[Entry],
    on_event: OnEvent = ignore,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> Iterator[MethodRow]:
    """Train the entries, all of one part, in one group, then give their rows in order; `base` is left as it was found.

    An adapter that cannot be trained, bound or asked becomes a row with `skipped`. Equal entries share one adapter.
    """
    members = [_member(bench, base, entry) for entry in entries]
    wanted = {member.run_key: member for member, entry in zip(members, entries, strict=True) if not entry.row.skipped}
    clock = GroupClock(bench.folder / entries[0].row.part / "group.json", lambda key: _tokens_per_step(base, wanted[key]))
    failed = _train(base, wanted.values(), bench.max_slots, clock, on_event, checkpoint_every_s) if wanted else {}
    engine = Engine(base, num_slots=1, max_rank=1)
    try:
        for entry, member in zip(entries, members, strict=True):
            reason = entry.row.skipped or failed.get(member.run_key, "")
            for row in _rows(engine, entry, member, bench.dataset.gate, reason):
                yield replace(row, train_s=0.0 if reason else clock.share_s(member.run_key))
    finally:
        engine.detach()


class GroupClock:
    """The group's wall time, and the tokens that each adapter read in it; on disk, so that a restart goes on counting."""

    def __init__(self, file: Path, tokens_per_step: Callable[[str], float]) -> None:
        """`tokens_per_step` tells what one step of the adapter of a run key reads."""
        self._file, self._tokens_per_step = file, cache(tokens_per_step)
        self._wall_s, self._num_tokens = 0.0, dict[str, float]()
        if file.is_file():
            self._wall_s, self._num_tokens = json.loads(file.read_text("utf-8")).values()
        self._seen = time.perf_counter()

    def note(self, event: TrainEvent) -> None:
        """Count the time since the event before. What is lost by a kill is lost of time and of tokens."""
        now = time.perf_counter()
        self._wall_s, self._seen = self._wall_s + now - self._seen, now
        if event.kind == "progress":
            self._num_tokens[event.run_key] = self._num_tokens.get(event.run_key, 0.0) + self._tokens_per_step(event.run_key)
        else:
            write_whole(self._file, json.dumps({"wall_s": self._wall_s, "num_tokens": self._num_tokens}).encode())

    def share_s(self, run_key: str) -> float:
        """An adapter's share of the wall time: that of its tokens in all tokens."""
        return self._wall_s * self._num_tokens.get(run_key, 0.0) / max(sum(self._num_tokens.values()), 1.0)


def _member(bench: Bench, base: FrozenBase, entry: Entry) -> Member:
    name_of = {label: name for name, label in entry.label_of.items()}
    train, select = (
        tuple(replace(example, label=name_of.get(example.label, example.label)) for example in examples)
        for examples in (entry.train, bench.dataset.select)
    )
    data_fingerprint = fingerprint_of_rows([train, select])
    parts = [spec_hash(entry.spec), base.files.fingerprint, data_fingerprint]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    folder = bench.folder / entry.row.part / key
    return Member(
        entry.spec, key, train, select, data_fingerprint, str(folder / "adapter"), str(folder / "checkpoint.safetensors")
    )


def _train(
    base: FrozenBase,
    members: Iterable[Member],
    num_slots: int,
    clock: GroupClock,
    on_event: OnEvent,
    checkpoint_every_s: float,
) -> dict[str, str]:
    """Train all members; returns by run key why some failed."""
    failed: dict[str, str] = {}

    def note(event: TrainEvent) -> None:
        clock.note(event)
        if event.kind == "failed":
            failed[event.run_key] = event.message
        on_event(event)

    # The longest first, so that none runs on alone at the end.
    trainer = GroupTrainer(base, sorted(members, key=_num_steps, reverse=True), num_slots, note)
    try:
        trainer.train(lambda: (), checkpoint_every_s)
    finally:
        trainer.detach()
    return failed


def _num_steps(member: Member) -> int:
    return num_steps_per_epoch(len(member.train), member.spec.train.batch_size) * member.spec.train.epochs


def _tokens_per_step(base: FrozenBase, member: Member) -> float:
    formats = PromptFormat.all_of(member.spec, base.family)
    prompts = [encode_prompt(each, example.columns, base.tokenizer) for example in member.train for each in formats]
    return fmean(len(prompt.token_ids) for prompt in prompts) * min(member.spec.train.batch_size, len(member.train))


def _rows(engine: Engine, entry: Entry, member: Member, gate: Sequence[Example], reason: str) -> Iterator[MethodRow]:
    """The rows of one adapter: asked as it was trained, then with other instructions."""
    row = replace(entry.row, num_train=len(entry.train), skipped=reason)
    rows = [(row, entry.spec.instruction)]
    rows += [(replace(row, method=method, note=template), template) for method, template in entry.asked.items()]
    try:
        bound = None if reason else engine.bound(engine.bind(read_artifact(Path(member.adapter_dir)), version=1))
    except AdapterError as error:
        bound, reason = None, str(error)
    for asked, instruction in rows:
        yield _answered(engine, bound, asked, instruction, entry, gate) if bound else replace(asked, skipped=reason)


def _answered(
    engine: Engine, bound: BoundAdapter, row: MethodRow, instruction: str, entry: Entry, gate: Sequence[Example]
) -> MethodRow:
    prompt_format = replace(bound.prompt_format, instruction=instruction)
    start = time.perf_counter()
    try:
        prompts = [encode_prompt(prompt_format, example.columns, engine.base.tokenizer) for example in gate]
        answers = engine.classify([Work(bound.key, prompt) for prompt in prompts])
    except (AdapterError, DataError) as error:
        return replace(row, skipped=str(error))
    return replace(
        row,
        answers=tuple(entry.label_of.get(answer.label, answer.label) for answer in answers),
        ms_per_text=1000 * (time.perf_counter() - start) / len(gate),
        num_trained=sum(a_RI.numel() + b_OR.numel() for a_RI, b_OR in bound.tensors.values()),
        disk_bytes=sum(file.stat().st_size for file in bound.artifact.folder.iterdir()),
    )
