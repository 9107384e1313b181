"""The part `prompting` of a comparison: the base with other prompts and no training; what an adapter must beat.

Answers are the labels that score highest after a prompt, as everywhere; what is marked `generated` is written freely and
counts where it is a label. Prompts with demonstrations may be longer than train.max_length, up to what the base reads.

Dims: B texts, L labels, C content-free inputs.
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from multilora.base_model import FrozenBase
from multilora.errors import AdapterError, CapacityError, DataError
from multilora.prompt import Prompt, PromptFormat, encode_prompt
from multilora.scoring import LabelSet
from orchestrator.base_alone import BaseAlone
from orchestrator.demonstrations import CHOICES, Asked, PromptParts, ask, ask_with, balanced_examples, nearest_examples
from orchestrator.methods import Bench, MethodRow
from orchestrator.plain_baselines import Likeness, tf_idf_likeness
from orchestrator.prototypes import prototype_rows

NUM_SHOWN = (1, 4, 8, 16)
NUM_SHOWN_GENERATED = 4
PROMPT_TOKENS = 2048
"""Longest prompt, where the base has positions for it."""
REASON_TOKENS = 64
SPARE_TOKENS = 8
"""How much longer than the longest label a generated answer may be, so that no text passes for a label by being cut off."""
CONTENT_FREE = ("N/A", "", "[MASK]")
"""Inputs that say nothing. Source: Zhao et al. 2021, Calibrate Before Use, arXiv 2102.09690."""
CALIBRATED = ", calibrated"
NOT_FOR_ENCODERS = "an encoder writes no text and reads no examples beside its input; `prototypes` are what examples are to it"


def prompting_rows(bench: Bench, base: FrozenBase) -> Iterator[MethodRow]:
    """Answer the gate split by every way to ask the base; what cannot be asked keeps its row, with the reason.

    Milliseconds per text hold making the prompts and choosing their demonstrations; seconds of training are what is done
    once before: content-free inputs, or words or states of the training examples.
    Raises AdapterError for labels that the base cannot tell apart or read.
    """
    gate = Gate(bench, BaseAlone(base))
    yield from encoder_rows(gate) if base.family == "encoder" else generative_rows(gate)


def encoder_rows(gate: Gate) -> Iterator[MethodRow]:
    """Zero-shot with every wording of the labels, then prototypes."""
    own = gate.own_format
    wordings = {
        "label name": tuple((label, "") for label, _ in own.labels),
        "meaning": tuple((meaning or label, "") for label, meaning in own.labels),
        "name: meaning": own.labels,
    }
    has_meanings = wordings["label name"] != own.labels
    for wording, labels in wordings.items():
        blank = _row(f"zero-shot, {wording}")
        if has_meanings or wording == "label name":
            worded = replace(own, labels=labels)
            yield from gate.scored(blank, worded, partial(gate.asked, worded))
        else:
            yield replace(blank, skipped="no label has a meaning")
    yield from prototype_rows(gate.bench, gate.alone, own, NUM_SHOWN)
    for num in NUM_SHOWN:
        yield replace(_row(f"{_examples(num)}, any choice"), num_train=num, skipped=NOT_FOR_ENCODERS)
    for method in ("chain of thought", "zero-shot, generated", f"{_examples(NUM_SHOWN_GENERATED)}, balanced, generated"):
        yield replace(_row(method), skipped=NOT_FOR_ENCODERS)


def generative_rows(gate: Gate) -> Iterator[MethodRow]:
    """Zero-shot, chain of thought, then demonstrations by number, choice and seed."""
    prompter = Prompter(gate)
    train, seeds = gate.bench.dataset.train, gate.bench.seeds
    yield from prompter.zero_shot()
    yield from prompter.chain_of_thought()
    for num in NUM_SHOWN:
        for choice, choose in CHOICES.items():
            for seed in seeds:
                yield from prompter.shown(num, choice, choose(train, num, seed), seed)
    for seed in seeds:
        yield from prompter.shown_generated(balanced_examples(train, NUM_SHOWN_GENERATED, seed), seed)
    yield from prompter.nearest("by TF-IDF", partial(tf_idf_likeness, train))
    yield from prompter.nearest("by the base's states", prompter.state_likeness)


class Prompter:
    """Writes the prompts for a generative base."""

    def __init__(self, gate: Gate) -> None:
        self._gate, self._bench = gate, gate.bench
        own, base = gate.own_format, gate.alone.base
        longest = max(map(len, gate.alone.label_set(own).token_ids))
        self._num_answer_tokens = longest + SPARE_TOKENS
        limit = prompt_limit(base, max(REASON_TOKENS, self._num_answer_tokens))
        self._short = replace(own, max_length_tokens=min(own.max_length_tokens, limit))
        """The task's own prompt."""
        self._long = replace(own, max_length_tokens=limit)
        self._parts = PromptParts.of(own.instruction)

    def zero_shot(self) -> list[MethodRow]:
        """The prompt that adapters are trained with."""
        make = partial(self._gate.asked, self._short)
        generated = self._gate.generated(_row("zero-shot, generated"), make, self._num_answer_tokens)
        return [*self._gate.scored(_row("zero-shot"), self._short, make), *generated]

    def chain_of_thought(self) -> list[MethodRow]:
        """The base first writes a reason; the labels are scored after it, so that no answer has to be found in a text."""
        note = f"a reason of at most {REASON_TOKENS} tokens is written first"
        return self._gate.scored(replace(_row("chain of thought"), note=note), self._long, self._reasoned, is_calibrated=False)

    def shown(self, num: int, choice: str, indices: Sequence[int], seed: int) -> list[MethodRow]:
        """The same demonstrations for every text."""
        blank = self._showing(f"{_examples(num)}, {choice}", num, indices, seed)
        return self._gate.scored(blank, self._long, partial(self._with_same, num, indices))

    def shown_generated(self, indices: Sequence[int], seed: int) -> list[MethodRow]:
        """The same demonstrations for every text, answered freely."""
        num = NUM_SHOWN_GENERATED
        blank = self._showing(f"{_examples(num)}, balanced, generated", num, indices, seed)
        return self._gate.generated(blank, partial(self._with_same, num, indices), self._num_answer_tokens)

    def nearest(self, how: str, prepare: Callable[[], Likeness]) -> Iterator[MethodRow]:
        """Demonstrations of each text's own; not calibrated, which would take four passes a text instead of one."""
        train = self._bench.dataset.train
        start = time.perf_counter()
        likeness = prepare()
        train_s = time.perf_counter() - start
        note = f"chosen for every text among all {len(train)} training examples"
        for num in NUM_SHOWN:
            blank = self._showing(f"{_examples(num)}, nearest {how}", len(train), range(len(train)), seed=0)
            make = partial(self._with_nearest, num, likeness)
            yield from self._gate.scored(replace(blank, note=note, train_s=train_s), self._long, make, is_calibrated=False)

    def state_likeness(self) -> Likeness:
        """Cosine of the base's states."""
        alone, bench = self._gate.alone, self._bench
        train_TH = alone.states(bench.spec, bench.dataset.train)
        return lambda examples: alone.states(bench.spec, examples) @ train_TH.T

    def _reasoned(self) -> list[Asked]:
        asking = self._gate.asked(replace(self._long, instruction=self._parts.asking_for_reason()))
        reasons = self._gate.alone.write([one.prompt for one in asking], REASON_TOKENS)
        tokenizer = self._gate.alone.base.tokenizer
        return [
            ask(replace(self._long, instruction=self._parts.with_reason(" ".join(reason.split()))), example.columns, tokenizer)
            for example, reason in zip(self._bench.dataset.gate, reasons, strict=True)
        ]

    def _with_same(self, num: int, indices: Sequence[int]) -> list[Asked]:
        return self._with(num, [indices] * len(self._bench.gold))

    def _with_nearest(self, num: int, likeness: Likeness) -> list[Asked]:
        return self._with(num, nearest_examples(likeness(self._bench.dataset.gate), num))

    def _with(self, num: int, chosen: Sequence[Sequence[int]]) -> list[Asked]:
        """Show every gate text its examples, of which there are `num`. Raises DataError where that can never be."""
        train, tokenizer = self._bench.dataset.train, self._gate.alone.base.tokenizer
        if len(train) < num:
            raise DataError(f"the train split has {len(train)} examples")
        asked = [
            ask_with([train[index] for index in indices], self._parts, self._long, example.columns, tokenizer)
            for example, indices in zip(self._bench.dataset.gate, chosen, strict=True)
        ]
        most = max(one.num_shown for one in asked)
        if most < num:
            limit = self._long.max_length_tokens
            raise DataError(f"{_examples(num)} fit beside no text into {limit} tokens, {most} at most")
        return asked

    def _showing(self, method: str, num_train: int, indices: Sequence[int], seed: int) -> MethodRow:
        examples = [self._bench.dataset.train[index] for index in indices]
        num_bytes = sum(len(f"{example.text}{example.label}".encode()) for example in examples)
        return replace(_row(method), num_train=num_train, seed=seed, disk_bytes=num_bytes)


class Gate:
    """The gate examples of one task, asked of one base."""

    def __init__(self, bench: Bench, alone: BaseAlone) -> None:
        self.bench, self.alone = bench, alone
        own = PromptFormat.of(bench.spec, alone.base.family)
        most = alone.base.files.max_positions or own.max_length_tokens
        self.own_format = replace(own, max_length_tokens=min(own.max_length_tokens, most))
        # The first forward pass takes longer than any other, and no method should pay for that.
        alone.scores([Prompt((), is_truncated=False)], alone.label_set(self.own_format))

    def asked(self, prompt_format: PromptFormat) -> list[Asked]:
        """Every gate example's prompt, without demonstrations."""
        return [ask(prompt_format, example.columns, self.alone.base.tokenizer) for example in self.bench.dataset.gate]

    def scored(
        self, blank: MethodRow, label_format: PromptFormat, make: Callable[[], list[Asked]], *, is_calibrated: bool = True
    ) -> list[MethodRow]:
        """Fill a row with the labels that score highest after the prompts; and a second one, calibrated, where wanted."""

        def answered() -> list[MethodRow]:
            labels = self.alone.label_set(label_format)
            start = time.perf_counter()
            asked = make()
            scores_BL = self.alone.scores([one.prompt for one in asked], labels)
            row = self._filled(blank, asked, self._best(scores_BL), start)
            if not is_calibrated:
                return [row]
            start = time.perf_counter()
            calibrated_BL = scores_BL - self._log_priors(asked, labels)
            train_s = row.train_s + time.perf_counter() - start
            return [row, replace(row, method=row.method + CALIBRATED, answers=self._best(calibrated_BL), train_s=train_s)]

        blanks = [blank, replace(blank, method=blank.method + CALIBRATED)]
        return _or_reason(blanks[: 1 + is_calibrated], answered)

    def generated(self, blank: MethodRow, make: Callable[[], list[Asked]], max_new_tokens: int) -> list[MethodRow]:
        """Fill a row with what the base writes after the prompts, up to the end of the line, where that is a label."""

        def answered() -> list[MethodRow]:
            start = time.perf_counter()
            asked = make()
            texts = self.alone.write([one.prompt for one in asked], max_new_tokens)
            answers = tuple(label_of(text.partition("\n")[0], self.bench.labels) for text in texts)
            return [self._filled(blank, asked, answers, start)]

        return _or_reason([blank], answered)

    def _filled(self, blank: MethodRow, asked: Sequence[Asked], answers: tuple[str | None, ...], start: float) -> MethodRow:
        ms_per_text = (time.perf_counter() - start) * 1000 / len(asked)
        num_shown = fmean(one.num_shown for one in asked)
        num_cut = sum(one.prompt.is_truncated for one in asked)
        notes = (
            blank.note,
            f"{num_shown:.1f} examples fit on average" if num_shown else "",
            f"{num_cut} of {len(asked)} texts are cut off" if num_cut else "",
        )
        return replace(blank, answers=answers, ms_per_text=ms_per_text, note="; ".join(filter(None, notes)))

    def _best(self, scores_BL: NDArray[np.float64]) -> tuple[str, ...]:
        """The label with the highest score; of equals the one that the spec lists first."""
        return tuple(self.bench.labels[index] for index in scores_BL.argmax(axis=1))

    def _log_priors(self, asked: Sequence[Asked], labels: LabelSet) -> NDArray[np.float64]:
        """What each prompt makes of the labels when its input says nothing [B, L]; prompts that show the same share it."""
        columns, tokenizer = self.own_format.columns, self.alone.base.tokenizer
        prior_of = {}
        for prompt_format in dict.fromkeys(one.prompt_format for one in asked):
            empty = [encode_prompt(prompt_format, dict.fromkeys(columns, text), tokenizer) for text in CONTENT_FREE]
            prior_of[prompt_format] = content_free_log_prior(self.alone.scores(empty, labels))
        return np.stack([prior_of[one.prompt_format] for one in asked])


def content_free_log_prior(scores_CL: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the mean probability of each label over content-free inputs [L].

    Dividing a text's label probabilities by this mean is the paper's W = diag(p_cf)^-1, b = 0.
    """
    log_priors: NDArray[np.float64] = logsumexp(log_softmax(scores_CL, axis=1), axis=0) - np.log(len(scores_CL))
    return log_priors


def label_of(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text is, but for case and outer spaces and punctuation; None where it is none, or could be two."""
    for bare in (str.strip, _without_punctuation):
        found = [label for label in labels if bare(label).casefold() == bare(text).casefold() != ""]
        if len(found) == 1:
            return found[0]
    return None


def prompt_limit(base: FrozenBase, num_after: int) -> int:
    """Most tokens of a prompt, where `num_after` more follow it; an encoder-decoder writes them elsewhere."""
    positions = base.files.max_positions or PROMPT_TOKENS
    return min(PROMPT_TOKENS, positions - (num_after if base.family == "causal" else 0))


def _without_punctuation(text: str) -> str:
    return text.strip(string.whitespace + string.punctuation)


def _examples(num: int) -> str:
    return f"{num} example{'s' if num > 1 else ''}"


def _row(method: str) -> MethodRow:
    return MethodRow("prompting", method)


def _or_reason(blanks: Sequence[MethodRow], answered: Callable[[], list[MethodRow]]) -> list[MethodRow]:
    """The rows, or the blanks with the reason why there are none."""
    try:
        return answered()
    except (AdapterError, CapacityError, DataError) as error:
        return [replace(blank, skipped=str(error)) for blank in blanks]
