"""Answer mixed batches for many tasks over one base: schedule -> score labels or write text -> answer. Knows no Ray and no HTTP.

Fail closed: an adapter is bound only when its base fingerprint matches, every tensor found its module, and its canary
prompts score as they did after training and differently from the base. A key that is not bound is never answered.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from multilora.artifact import AdapterArtifact, read_tensors
from multilora.base_model import FrozenBase
from multilora.errors import AdapterError, RequestError, UnknownTaskError
from multilora.lora import AdapterSlots
from multilora.prompt import Prompt, PromptFormat, encode_prompt
from multilora.scoring import (
    SCORER_VERSION,
    LabelSet,
    ScoringRow,
    encode_labels,
)
from multilora.target_modules import match_modules
from serve.answer import Answer, answer_of, written
from serve.canaries import check_canaries
from serve.fair_lock import FairLock
from serve.passes import Passes, num_tokens
from serve.slots import SlotTable
from serve.writer import Progress, TextWork, Writer

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


Score = Callable[[AdapterSlots, Sequence[ScoringRow]], list[list[float]]]
Classify = Callable[[Sequence[Work]], list["Answer"]]


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
    """One base, its slots, and the adapters bound to them. Thread-safe: one call at a time."""

    def __init__(self, base: FrozenBase, num_slots: int, max_rank: int, max_batch_tokens: int = 4096) -> None:
        """Wrap the base. Slots have room for `max_rank` at first; binding a larger adapter makes them grow."""
        self.base = base
        self._passes = Passes(base, max_batch_tokens)
        self._num_slots = num_slots
        self.num_slot_loads = 0
        """How often an adapter was copied into a slot."""
        self._slots, self._table = self._new_slots(max_rank)
        self._bound: dict[str, BoundAdapter] = {}
        # Versions of a task mostly have the same labels.
        self._labels = lru_cache(MAX_LABEL_SETS)(lambda prompt_format: encode_labels(self.base, self._slots, prompt_format))
        self._lock = FairLock()
        self._slot_lock, self._in_use = threading.Lock(), Counter[str]()
        """Adapters that passes side by side use now: their slots stay theirs."""
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
                    check_canaries(key, card, labels, slot, self.base, lambda rows: self._passes.scores(self._slots, rows))
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
        return num_tokens(self.base.family, ScoringRow(work.prompt.token_ids, None, bound.labels))

    def classify(self, works: Sequence[Work]) -> list[Answer]:
        """Answer requests of any mix of adapters, also free-text ones, in order; all or nothing.

        Raises UnknownTaskError for a key that is not bound, AdapterError for an adapter whose scores are no numbers.
        An adapter asked as another one needs that one bound, but not in a slot. RequestError unless both have labels.
        """
        with self._lock, torch.inference_mode():
            limits = {key: self.bound(key).max_new_tokens for key in {work.key for work in works}}
            texts = [index for index, work in enumerate(works) if limits[work.key]]
            asked = [TextWork(works[i].key, works[i].prompt, limits[works[i].key]) for i in texts]
            answers = dict(zip(texts, self._write(asked), strict=True))
            labelled = [index for index in range(len(works)) if index not in answers]
            found = self._choose([works[index] for index in labelled], self._num_slots, self._passes.scores)
            answers |= zip(labelled, found, strict=True)
        return [answers[index] for index in range(len(works))]

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for what runs now to end."""
        return self._lock.is_wanted or self._passes.threads.is_wanted

    def side_by_side(self, worker: Callable[[Classify, int], None]) -> None:
        """Call `worker` on several threads at once until all have returned, with how to answer batches and how many they are.

        Each answers batches of its own, of labels only and as `classify` does, on its share of the cores: none waits for
        another. On a GPU it is one. Workers should return where the engine `is_wanted`.
        """
        number = min(self._passes.threads.number, self._num_slots)

        def classify(works: Sequence[Work]) -> list[Answer]:
            with torch.inference_mode():  # it is each thread's own
                return self._choose(works, self._num_slots // number, self._passes.scores_here)

        with self._lock:
            self._passes.threads.run(lambda: worker(classify, number), number)

    def classify_zero_shot(self, prompt_format: PromptFormat, items: Sequence[Mapping[str, str]]) -> list[Answer]:
        """Let the base itself answer a task, as the baseline that an adapter must beat."""
        prompts = [encode_prompt(prompt_format, item, self.base.tokenizer) for item in items]
        with self._lock, torch.inference_mode():
            labels = self._labels(prompt_format)
            scores = self._passes.scores(self._slots, [ScoringRow(prompt.token_ids, None, labels) for prompt in prompts])
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
        for wave in self._waves({index: work.key for index, work in enumerate(works)}, self._num_slots):
            for batch in self._passes.batches([len(works[i].prompt.token_ids) + works[i].max_new_tokens for i in wave]):
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
        with self._lock, torch.inference_mode():
            return self._passes.embed(self._slots, rows)

    def bound(self, key: str) -> BoundAdapter:
        """The adapter of a key. Raises UnknownTaskError."""
        bound = self._bound.get(key)
        if bound is None:
            raise UnknownTaskError(f"{key} is not bound here; bound are {', '.join(sorted(self._bound)) or 'none'}")
        return bound

    def _new_slots(self, max_rank: int) -> tuple[AdapterSlots, SlotTable]:
        """Empty slots; bound adapters come back from host memory when they are next asked for."""
        names = match_modules(self.base.model, "all-linear")
        return AdapterSlots(self.base.model, names, self._num_slots, max_rank), SlotTable(self._num_slots)

    def _resident_slot(self, bound: BoundAdapter, pinned: Collection[str]) -> int:
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

    def _choose(self, works: Sequence[Work], max_adapters: int, scores_of: Score) -> list[Answer]:
        """Answer works with labels, in passes of so many adapters at most."""
        bound_of = {work.key: self.bound(work.key) for work in works}
        labels_of = {key: self.bound(key).labels for key in {work.asked for work in works}}
        if any(work.asked_as and not (labels_of[work.asked].names and bound_of[work.key].labels.names) for work in works):
            raise RequestError("an adapter can be asked as another only where both have labels")
        answers: dict[int, Answer] = {}
        for wave in self._waves({index: work.key for index, work in enumerate(works)}, max_adapters):
            chosen = [(works[index], labels_of[works[index].asked]) for index in wave]
            with self._holding([bound_of[key] for key in dict.fromkeys(work.key for work, _ in chosen)]) as slot_of:
                rows = [ScoringRow(work.prompt.token_ids, slot_of[work.key], labels) for work, labels in chosen]
                scores = scores_of(self._slots, rows)
            for index, (work, labels), own in zip(wave, chosen, scores, strict=True):
                answers[index] = answer_of(work.key, labels, own, work.prompt, bound_of[work.key].artifact.card.temperature)
        return [answers[index] for index in range(len(works))]

    @contextmanager
    def _holding(self, adapters: Sequence[BoundAdapter]) -> Iterator[dict[str, int]]:
        """Put adapters into slots, which stay theirs for as long as the block lasts."""
        keys = [bound.key for bound in adapters]
        with self._slot_lock:
            slot_of = {bound.key: self._resident_slot(bound, pinned={*keys, *self._in_use}) for bound in adapters}
            self._in_use.update(keys)
        try:
            yield slot_of
        finally:
            with self._slot_lock:
                self._in_use -= Counter(keys)

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

    def _waves(self, key_of: Mapping[int, str | None], max_adapters: int) -> list[list[int]]:
        """Cut works (index -> key) into groups of no more than so many adapters."""
        number_of = {key: number for number, key in enumerate(dict.fromkeys(key_of.values()))}
        waves: list[list[int]] = [[] for _ in range(-(-len(number_of) // max_adapters))]
        for index, key in key_of.items():
            waves[number_of[key] // max_adapters].append(index)
        return waves
