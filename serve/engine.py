"""Answer mixed batches for many tasks over one base: schedule -> score labels or write text -> answer. Knows no Ray and no HTTP.

Fail closed: an adapter is bound only when its base fingerprint matches, every tensor found its module, and its canary
prompts score as they did after training and differently from the base. A key that is not bound is never answered.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from multilora.artifact import AdapterArtifact, read_tensors
from multilora.base_files import Family
from multilora.base_model import FrozenBase
from multilora.errors import AdapterError, RequestError, UnknownTaskError
from multilora.lora import AdapterSlots
from multilora.prompt import Prompt, PromptFormat, encode_prompt
from multilora.recorded import recorded_reader
from multilora.scoring import (
    PAD_MULTIPLE,
    SCORER_VERSION,
    LabelSet,
    ScoringRow,
    encode_labels,
    pooled,
    score_labels,
)
from multilora.segments import length_batches
from multilora.target_modules import match_modules
from serve.answer import Answer, answer_of, written
from serve.canaries import check_canaries
from serve.forward_threads import ForwardThreads
from serve.slots import SlotTable
from serve.writer import Progress, TextWork, Writer

OVERHEAD_TOKENS = {"cpu": 32, "cuda": 8192}
"""What one forward pass costs beside its tokens, in tokens."""
MIN_SHARE_TOKENS = 64
"""Less is not worth a forward pass of its own."""
MAX_LABEL_SETS = 1024
NO_LABELS = LabelSet((), None, ())
"""Of rows that are only read."""


@dataclass(frozen=True)
class Work:
    """One tokenised request for one adapter key."""

    key: str
    prompt: Prompt
    asked_as: str | None = None
    """Key whose labels are scored instead of the adapter's own, to see how it does on another task; the prompt is that key's."""

    @property
    def asked(self) -> str:
        """Key of the task that is asked."""
        return self.asked_as or self.key


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter that passed every check; its tensors stay in host memory when its slot is taken."""

    key: str
    artifact: AdapterArtifact
    prompt_format: PromptFormat
    labels: LabelSet
    tensors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def max_new_tokens(self) -> int:
        """Token limit of a free-text task's answers; 0 where one of the labels is the answer."""
        return self.artifact.card.max_new_tokens or 0


class Engine:
    """One base, its slots, and the adapters bound to them. Thread-safe: one forward pass at a time."""

    def __init__(self, base: FrozenBase, num_slots: int, max_rank: int, max_batch_tokens: int = 4096) -> None:
        """Wrap the base. Slots have room for `max_rank` at first; binding a larger adapter makes them grow."""
        self.base = base
        self._max_batch_tokens = max_batch_tokens
        self._threads = ForwardThreads(base.device)
        self._num_slots = num_slots
        self.num_slot_loads = 0
        """How often an adapter was copied into a slot."""
        self._slots, self._table = self._new_slots(max_rank)
        self._bound: dict[str, BoundAdapter] = {}
        # Versions of a task mostly have the same labels.
        self._labels = lru_cache(MAX_LABEL_SETS)(lambda prompt_format: encode_labels(self.base, self._slots, prompt_format))
        self._lock = threading.Lock()
        self._writers: weakref.WeakSet[Writer] = weakref.WeakSet()
        """Whose adapters are the last to be evicted."""

    @property
    def residents(self) -> dict[str, int]:
        """Bound adapters in slots now."""
        return {key: slot for key, slot in self._table.residents.items() if key in self._bound}

    def bind(self, artifact: AdapterArtifact, version: int) -> str:
        """Check an adapter and make it answerable under the key it returns. Raises AdapterError, binding nothing."""
        card = artifact.card
        key = f"{card.task}@{version}"
        if card.base_fingerprint != self.base.files.fingerprint:
            raise AdapterError(
                f"{key} was trained on base {card.base.model} with fingerprint {card.base_fingerprint[:12]}; "
                f"this base has {self.base.files.fingerprint[:12]}"
            )
        if card.scorer_version != SCORER_VERSION:
            raise AdapterError(
                f"{key} was trained for scorer version {card.scorer_version}, this is {SCORER_VERSION}: train it again"
            )
        tensors = read_tensors(artifact)
        with self._lock, torch.no_grad():
            labels = self._labels(card.prompt_format)
            bound = BoundAdapter(key, artifact, card.prompt_format, labels, tensors)
            if card.rank > self._slots.max_rank:
                self._slots.detach()
                self._slots, self._table = self._new_slots(card.rank)
            # The canaries must judge these tensors, not those that an earlier binding of the key left in a slot.
            self._empty_slot(key)
            slot = self._resident_slot(bound, pinned=())
            try:
                if self._slots.num_modules(slot) != card.num_modules:
                    raise AdapterError(f"{key} changes {self._slots.num_modules(slot)} modules, its card says {card.num_modules}")
                with torch.inference_mode():
                    check_canaries(key, card, labels, slot, self.base, self._scores)
            except BaseException:
                self._empty_slot(key)
                raise
            self._bound[key] = bound
        return key

    def detach(self) -> None:
        """Give the base its own layers back; this engine is of no use afterwards."""
        with self._lock:
            self._slots.detach()

    def unbind(self, key: str) -> None:
        """Forget an adapter: name and host copy. Waits for no forward pass; its slot goes to the next one that needs it."""
        self._bound.pop(key, None)

    def prompt(self, key: str, item: str | Mapping[str, str]) -> Prompt:
        """Tokenise a request item as the adapter's training did. Raises UnknownTaskError, RequestError, DataError."""
        prompt_format = self.bound(key).prompt_format
        return encode_prompt(prompt_format, prompt_format.columns_of(item), self.base.tokenizer)

    def num_tokens(self, work: Work) -> int:
        """What a request costs in a forward pass, its labels or the longest text that it may get included."""
        bound = self.bound(work.asked)
        if bound.max_new_tokens:
            return len(work.prompt.token_ids) + bound.max_new_tokens
        return _num_tokens(self.base.family, ScoringRow(work.prompt.token_ids, None, bound.labels))

    def classify(self, works: Sequence[Work]) -> list[Answer]:
        """Answer requests of any mix of adapters, also free-text ones, in order; all or nothing.

        Raises UnknownTaskError for a key that is not bound, AdapterError for an adapter whose scores are no numbers.
        An adapter asked as another one needs that one bound, but not in a slot. RequestError unless both have labels.
        """
        with self._lock, torch.inference_mode():
            bound_of = {work.key: self.bound(work.key) for work in works}
            labels_of = {key: self.bound(key).labels for key in {work.asked for work in works}}
            if any(work.asked_as and not (labels_of[work.asked].names and bound_of[work.key].labels.names) for work in works):
                raise RequestError("an adapter can be asked as another only where both have labels")
            texts = [index for index, work in enumerate(works) if bound_of[work.key].max_new_tokens]
            asked = [TextWork(works[i].key, works[i].prompt, bound_of[works[i].key].max_new_tokens) for i in texts]
            answers = dict(zip(texts, self._write(asked), strict=True))
            for wave in self._waves({index: work.key for index, work in enumerate(works) if index not in answers}):
                keys = list(dict.fromkeys(works[index].key for index in wave))
                slot_of = {key: self._resident_slot(bound_of[key], pinned=keys) for key in keys}
                chosen = [(works[index], labels_of[works[index].asked]) for index in wave]
                rows = [ScoringRow(work.prompt.token_ids, slot_of[work.key], labels) for work, labels in chosen]
                for index, (work, labels), scores in zip(wave, chosen, self._scores(rows), strict=True):
                    answers[index] = answer_of(
                        work.key, labels, scores, work.prompt, bound_of[work.key].artifact.card.temperature
                    )
        return [answers[index] for index in range(len(works))]

    def classify_zero_shot(self, prompt_format: PromptFormat, items: Sequence[Mapping[str, str]]) -> list[Answer]:
        """Let the base itself answer a task, as the baseline that an adapter must beat."""
        prompts = [encode_prompt(prompt_format, item, self.base.tokenizer) for item in items]
        with self._lock, torch.inference_mode():
            labels = self._labels(prompt_format)
            scores = self._scores([ScoringRow(prompt.token_ids, None, labels) for prompt in prompts])
        return [answer_of("the base", labels, score, prompt, 1.0) for score, prompt in zip(scores, prompts, strict=True)]

    def write_zero_shot(
        self, prompt_format: PromptFormat, items: Sequence[Mapping[str, str]], max_new_tokens: int
    ) -> list[Answer]:
        """Let the base itself answer a free-text task."""
        prompts = [encode_prompt(prompt_format, item, self.base.tokenizer) for item in items]
        with self._lock, torch.inference_mode():
            return self._write([TextWork(None, prompt, max_new_tokens) for prompt in prompts])

    def writers(self, works: Sequence[TextWork]) -> list[tuple[Writer, list[int]]]:
        """Make writers for texts, each of texts of like length, with the indices of its works."""
        made = []
        for wave in self._waves({index: work.key for index, work in enumerate(works)}):
            for batch in self._batches(
                [len(works[i].prompt.token_ids) + works[i].max_new_tokens for i in wave], self._max_batch_tokens
            ):
                indices = [wave[position] for position in batch]
                made.append((Writer(self.base, [works[i] for i in indices]), indices))
        return made

    def step(self, writer: Writer, left: Collection[int] = ()) -> Progress:
        """Write one token of each of a writer's rows; those that `left` leave first. An adapter's failure ends its rows alone."""
        with self._lock, torch.inference_mode():
            return self._step(writer, left)

    def embed(self, texts: Sequence[str], max_length_tokens: int) -> Tensor:
        """What the base itself makes of each text, no adapter on: its mean state, unit length, [B, H] in host memory."""
        text_alone = PromptFormat("encoder", "{text}", "text", (), max_length_tokens)
        ids = [encode_prompt(text_alone, {"text": text}, self.base.tokenizer).token_ids for text in texts]
        # Some tokenizers make nothing of an empty text, which has no mean.
        rows = [ScoringRow(token_ids or (self.base.pad_id,), None, NO_LABELS) for token_ids in ids]
        vectors_BH = torch.empty(len(rows), self.base.files.hidden_size)
        with self._lock, torch.inference_mode():
            batches = self._shares([len(row.token_ids) for row in rows])
            found = self._threads.map(lambda batch: pooled(self.base, self._slots, [rows[i] for i in batch]).cpu(), batches)
            for batch, own_BH in zip(batches, found, strict=True):
                vectors_BH[batch] = own_BH
        return vectors_BH

    def bound(self, key: str) -> BoundAdapter:
        """The adapter of a key. Raises UnknownTaskError."""
        bound = self._bound.get(key)
        if bound is None:
            raise UnknownTaskError(f"{key} is not bound here; bound are {', '.join(sorted(self._bound)) or 'none'}")
        return bound

    def _new_slots(self, max_rank: int) -> tuple[AdapterSlots, SlotTable]:
        """Empty slots; bound adapters come back from host memory when they are next asked for."""
        names = match_modules(self.base.model, "all-linear")
        slots = AdapterSlots(self.base.model, names, self._num_slots, max_rank)
        slots.reader = recorded_reader(self.base, slots)
        return slots, SlotTable(self._num_slots)

    def _resident_slot(self, bound: BoundAdapter, pinned: Sequence[str]) -> int:
        writing = {key for writer in self._writers for key in writer.keys}
        placement = self._table.assign(bound.key, pinned, spared=writing)
        if placement.must_load:
            try:
                self._slots.load(placement.slot, bound.tensors, bound.artifact.card.scaling)
            except AdapterError as error:
                self._empty_slot(bound.key)
                raise AdapterError(f"{bound.key}: {error}") from error
            except BaseException:
                # Half an adapter must not count as resident.
                self._empty_slot(bound.key)
                raise
            self.num_slot_loads += 1
        return placement.slot

    def _empty_slot(self, key: str) -> None:
        slot = self._table.release(key)
        if slot is not None:
            self._slots.clear(slot)

    def _scores(self, rows: Sequence[ScoringRow]) -> list[list[float]]:
        scores: list[list[float]] = [[]] * len(rows)
        batches = self._shares([_num_tokens(self.base.family, row) for row in rows])
        found = self._threads.map(lambda batch: score_labels(self.base, self._slots, [rows[i] for i in batch]), batches)
        for batch, batch_scores in zip(batches, found, strict=True):
            for index, row_scores in zip(batch, batch_scores, strict=True):
                scores[index] = row_scores.tolist()
        return scores

    def _write(self, works: Sequence[TextWork]) -> list[Answer]:
        """Write texts to their end."""
        answers: dict[int, Answer] = {}
        for writer, indices in self.writers(works):
            while writer.alive:
                progress = self._step(writer)
                for error in progress.errors.values():
                    raise error
                answers |= {indices[row]: written(text, writer.works[row].prompt) for row, text in progress.texts.items()}
        return [answers[index] for index in range(len(works))]

    def _step(self, writer: Writer, left: Collection[int] = ()) -> Progress:
        writer.drop(left)
        self._writers.add(writer)
        progress = writer.step(self._slots, lambda key: self._resident_slot(self.bound(key), pinned=writer.keys))
        if not writer.alive:
            self._writers.discard(writer)
        return progress

    def _waves(self, key_of: Mapping[int, str | None]) -> list[list[int]]:
        """Cut works (index -> key) into groups of no more adapters than there are slots."""
        number_of = {key: number for number, key in enumerate(dict.fromkeys(key_of.values()))}
        waves: list[list[int]] = [[] for _ in range(-(-len(number_of) // self._num_slots))]
        for index, key in key_of.items():
            waves[number_of[key] // self._num_slots].append(index)
        return waves

    def _batches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        device = self.base.device.type
        return length_batches(lengths, max_tokens, OVERHEAD_TOKENS[device], PAD_MULTIPLE[device])

    def _shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """Batches for passes side by side, the most work first."""
        share = max(MIN_SHARE_TOKENS, -(-sum(lengths) // self._threads.number))
        batches = self._batches(lengths, min(self._max_batch_tokens, share))
        return sorted(batches, key=lambda batch: -len(batch) * max(lengths[row] for row in batch))


def _num_tokens(family: Family, row: ScoringRow) -> int:
    # An encoder's label vectors cost nothing.
    return len(row.token_ids) + (0 if family == "encoder" else row.labels.tree.num_nodes)
