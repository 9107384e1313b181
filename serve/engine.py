"""Answer mixed batches for many tasks over one base: schedule -> score labels or write text -> answer. Knows no Ray and no HTTP.

Fail closed: an adapter is bound only when its base fingerprint matches, every tensor found its module, and its canary
prompts score as they did after training and differently from the base. A key that is not bound is never answered.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora.artifact import AdapterArtifact, read_tensors
from multilora.base_files import Family
from multilora.base_model import FrozenBase
from multilora.errors import AdapterError, DataError, RequestError, UnknownTaskError
from multilora.generate import answer_text, end_ids, generate
from multilora.lora import AdapterSlots
from multilora.prompt import Prompt, PromptFormat, encode_prompt
from multilora.scoring import (
    PAD_MULTIPLE,
    SCORER_VERSION,
    LabelSet,
    ScoringRow,
    encode_answer,
    encode_labels,
    pooled,
    score_labels,
)
from multilora.segments import length_batches
from multilora.target_modules import match_modules
from serve.slots import SlotTable

OVERHEAD_TOKENS = {"cpu": 32, "cuda": 8192}
"""What one forward pass costs beside its tokens, in tokens."""
CANARY_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}
"""Largest score difference between training and serving that rounding explains; quantised weights are exact in either dtype."""


NO_LABELS = LabelSet((), None, ())
"""Of rows whose answer is written."""


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
class Answer:
    """The answer to one request; scores and probabilities in label order, none for a free text."""

    label: str
    """One of `labels`; of a free-text task the text."""
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    is_truncated: bool
    is_cut_off: bool = False
    """True where a free text reached the task's token limit before its end."""
    temperature: float = 1.0
    """The adapter's; the base alone has 1."""

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Calibrated probabilities; none of a free text."""
        return softmax(self.scores, self.temperature)


def softmax(scores: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Turn label scores into probabilities."""
    top = max(scores, default=0.0)
    weights = [math.exp((score - top) / temperature) for score in scores]
    return tuple(weight / sum(weights) for weight in weights)


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
        self._num_slots = num_slots
        self._slots, self._table = self._new_slots(max_rank)
        self._bound: dict[str, BoundAdapter] = {}
        self._lock = threading.Lock()

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
            labels = encode_labels(self.base, self._slots, card.prompt_format)
            bound = BoundAdapter(key, artifact, card.prompt_format, labels, tensors)
            if card.rank > self._slots.max_rank:
                self._slots.detach()
                self._slots, self._table = self._new_slots(card.rank)
            # The canaries must judge these tensors, not those that an earlier binding of the key left in a slot.
            self._empty_slot(key)
            slot = self._resident_slot(bound, pinned=())
            try:
                self._check_canaries(bound, slot)
            except BaseException:
                self._empty_slot(key)
                raise
            self._bound[key] = bound
        return key

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
        answers: dict[int, Answer] = {}
        with self._lock, torch.inference_mode():
            bound_of = {work.key: self.bound(work.key) for work in works}
            labels_of = {key: self.bound(key).labels for key in {work.asked for work in works}}
            if any(work.asked_as and not (labels_of[work.asked].names and bound_of[work.key].labels.names) for work in works):
                raise RequestError("an adapter can be asked as another only where both have labels")
            keys = list(bound_of)
            for first in range(0, len(keys), self._num_slots):
                wave = keys[first : first + self._num_slots]
                slot_of = {key: self._resident_slot(bound_of[key], pinned=wave) for key in wave}
                texts = [i for i, work in enumerate(works) if work.key in slot_of and bound_of[work.key].max_new_tokens]
                asked = [(works[i].prompt, slot_of[works[i].key], bound_of[works[i].key].max_new_tokens) for i in texts]
                answers |= dict(zip(texts, self._write(asked), strict=True))
                indices = [index for index, work in enumerate(works) if work.key in slot_of and index not in answers]
                chosen = [(works[index], labels_of[works[index].asked]) for index in indices]
                rows = [ScoringRow(work.prompt.token_ids, slot_of[work.key], labels) for work, labels in chosen]
                for index, (work, labels), scores in zip(indices, chosen, self._scores(rows), strict=True):
                    answers[index] = _answer(work.key, labels, scores, work.prompt, bound_of[work.key].artifact.card.temperature)
        return [answers[index] for index in range(len(works))]

    def classify_zero_shot(self, prompt_format: PromptFormat, items: Sequence[Mapping[str, str]]) -> list[Answer]:
        """Let the base itself answer a task, as the baseline that an adapter must beat."""
        prompts = [encode_prompt(prompt_format, item, self.base.tokenizer) for item in items]
        with self._lock, torch.inference_mode():
            labels = encode_labels(self.base, self._slots, prompt_format)
            scores = self._scores([ScoringRow(prompt.token_ids, None, labels) for prompt in prompts])
        return [_answer("the base", labels, score, prompt, 1.0) for score, prompt in zip(scores, prompts, strict=True)]

    def write_zero_shot(
        self, prompt_format: PromptFormat, items: Sequence[Mapping[str, str]], max_new_tokens: int
    ) -> list[Answer]:
        """Let the base itself answer a free-text task."""
        prompts = [encode_prompt(prompt_format, item, self.base.tokenizer) for item in items]
        with self._lock, torch.inference_mode():
            return self._write([(prompt, None, max_new_tokens) for prompt in prompts])

    def embed(self, texts: Sequence[str], max_length_tokens: int) -> Tensor:
        """What the base itself makes of each text, no adapter on: its mean state, unit length, [B, H] in host memory."""
        text_alone = PromptFormat("encoder", "{text}", "text", (), max_length_tokens)
        ids = [encode_prompt(text_alone, {"text": text}, self.base.tokenizer).token_ids for text in texts]
        # Some tokenizers make nothing of an empty text, which has no mean.
        rows = [ScoringRow(token_ids or (self.base.pad_id,), None, NO_LABELS) for token_ids in ids]
        vectors_BH = torch.empty(len(rows), self.base.files.hidden_size)
        with self._lock, torch.inference_mode():
            for batch in self._batches([len(row.token_ids) for row in rows]):
                vectors_BH[batch] = pooled(self.base, self._slots, [rows[i] for i in batch]).cpu()
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
        return AdapterSlots(self.base.model, names, self._num_slots, max_rank), SlotTable(self._num_slots)

    def _resident_slot(self, bound: BoundAdapter, pinned: Sequence[str]) -> int:
        placement = self._table.assign(bound.key, pinned)
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
        return placement.slot

    def _empty_slot(self, key: str) -> None:
        slot = self._table.release(key)
        if slot is not None:
            self._slots.clear(slot)

    def _scores(self, rows: Sequence[ScoringRow]) -> list[list[float]]:
        scores: list[list[float]] = [[]] * len(rows)
        for batch in self._batches([_num_tokens(self.base.family, row) for row in rows]):
            for index, row_scores in zip(batch, score_labels(self.base, self._slots, [rows[i] for i in batch]), strict=True):
                scores[index] = row_scores.tolist()
        return scores

    def _write(self, asked: Sequence[tuple[Prompt, int | None, int]]) -> list[Answer]:
        """Write a text for each (prompt, slot, token limit)."""
        answers: dict[int, Answer] = {}
        ends = end_ids(self.base) if asked else ()
        for batch in self._batches([len(prompt.token_ids) + limit for prompt, _, limit in asked]):
            rows = [ScoringRow(prompt.token_ids, slot, NO_LABELS) for prompt, slot, _ in (asked[i] for i in batch)]
            limits = [asked[i][2] for i in batch]
            for index, ids in zip(batch, generate(self.base, self._slots, rows, limits), strict=True):
                text, is_cut_off = answer_text(self.base, ids), ids[-1] not in ends
                answers[index] = Answer(text, (), (), asked[index][0].is_truncated, is_cut_off)
        return [answers[index] for index in range(len(asked))]

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        device = self.base.device.type
        return length_batches(lengths, self._max_batch_tokens, OVERHEAD_TOKENS[device], PAD_MULTIPLE[device])

    def _check_canaries(self, bound: BoundAdapter, slot: int) -> None:
        card = bound.artifact.card
        if self._slots.num_modules(slot) != card.num_modules:
            raise AdapterError(f"{bound.key} changes {self._slots.num_modules(slot)} modules, its card says {card.num_modules}")
        try:
            columns = [bound.prompt_format.columns_of(canary.columns) for canary in card.canaries]
            prompts = [encode_prompt(bound.prompt_format, given, self.base.tokenizer) for given in columns]
        except (RequestError, DataError) as misfit:
            raise AdapterError(f"{bound.key}: a canary does not fit the prompt: {misfit}") from misfit
        if not prompts:
            raise AdapterError(f"{bound.key} has no canaries, so nothing proves that it was applied")
        label_sets = [
            bound.labels if canary.text is None else encode_answer(self.base, canary.text, bound.max_new_tokens)
            for canary in card.canaries
        ]
        with torch.inference_mode():
            adapted, plain = (
                self._scores([ScoringRow(p.token_ids, which, labels) for p, labels in zip(prompts, label_sets, strict=True)])
                for which in (slot, None)
            )
        tolerance = CANARY_TOLERANCE[card.base.dtype]
        # The log-likelihood of a long text gathers the rounding of all its tokens.
        error = max(
            _distance(seen, canary.scores) / (1 if canary.text is None else len(labels.token_ids[0]))
            for seen, canary, labels in zip(adapted, card.canaries, label_sets, strict=True)
        )
        if error > tolerance:
            raise AdapterError(
                f"{bound.key}: canary scores differ by {error:.3g} from those after training (at most {tolerance})"
            )
        if max(_distance(a, b) for a, b in zip(adapted, plain, strict=True)) <= 1e-6:
            raise AdapterError(f"{bound.key}: canary scores equal the base's, so the adapter has no effect")


def _num_tokens(family: Family, row: ScoringRow) -> int:
    # An encoder's label vectors cost nothing.
    return len(row.token_ids) + (0 if family == "encoder" else row.labels.tree.num_nodes)


def _answer(name: str, labels: LabelSet, scores: Sequence[float], prompt: Prompt, temperature: float) -> Answer:
    if not all(map(math.isfinite, scores)):
        raise AdapterError(f"{name} gives its labels scores that are no numbers")
    # index() takes the first of equal scores, so ties go to the label that the spec lists first.
    label = labels.names[scores.index(max(scores))]
    return Answer(label, labels.names, tuple(scores), prompt.is_truncated, temperature=temperature)


def _distance(first: Sequence[float], second: Sequence[float]) -> float:
    if len(first) != len(second):
        return math.inf
    distances = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return math.inf if any(map(math.isnan, distances)) else max(distances)
