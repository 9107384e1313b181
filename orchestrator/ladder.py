"""Answer a champion's gate examples by plain transformers and PEFT, then by the serving engine alone and in a mixed batch.

The plain side is the oracle: it shares prompts with the engine and nothing else, neither the LoRA layer nor scoring nor
batching, so that a fault in any of these shows up as a difference between rungs.

Dims: T positions, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from multilora.artifact import AdapterArtifact, TaskCard, read_artifact
from multilora.base_files import Family, find_base
from multilora.base_model import load_base, quantization_config_of
from multilora.errors import AdapterError
from multilora.prompt import encode_prompt, label_wordings
from multilora.spec import BaseSpec
from orchestrator.dataset import Example
from orchestrator.eval_report import EvalItem
from orchestrator.plain_scoring import with_adapter
from orchestrator.rungs import Reply, RungAnswers
from serve.answer import Answer
from serve.engine import Engine, Work

AUTO_CLASS: dict[Family, Any] = {"seq2seq": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM, "encoder": AutoModel}
COSINE_SCALE = 20.0
NUM_SLOTS = 16


def climb(item: EvalItem, others: Sequence[EvalItem]) -> Iterator[RungAnswers]:
    """Give the rungs up to the mixed batch in turn; `others` are champions over the same base to mix in.

    Raises AdapterError where the champion's folder cannot be read.
    """
    artifact = read_artifact(Path(item.folder), item.digest)
    yield from offline_rungs(artifact, item.gate)
    engine = Engine(load_base(artifact.card.base), NUM_SLOTS, artifact.card.rank)
    try:
        key = engine.bind(artifact, item.version)
    except AdapterError as error:
        yield RungAnswers("engine alone", "serving engine", skipped=str(error), is_fault=True)
        yield RungAnswers("mixed batch", "serving engine", skipped="the engine does not bind the adapter")
        return
    yield engine_alone(engine, key, item.gate)
    yield mixed_batch(engine, key, item.gate, _bound(engine, others))


def offline_rungs(artifact: AdapterArtifact, gate: Sequence[Example]) -> Iterator[RungAnswers]:
    """The base without and with the adapter in float32, then with it in the dtype and quantisation that is served."""
    card, served = artifact.card, artifact.card.base
    exact = served.model_copy(update={"dtype": "float32", "quantization": "none"})
    lack = "" if exact == served else _lack_of_memory(find_base(exact).num_parameters * 4)
    first = served if lack else exact
    system = PlainSystem(first, card)
    yield RungAnswers("zero-shot base", f"transformers, {_format(first)}", system.replies(gate))
    if lack:
        yield RungAnswers("offline", f"PEFT, {_format(exact)}", skipped=lack)
    system.load_adapter(artifact.folder)
    yield RungAnswers("offline as served" if lack else "offline", f"PEFT, {_format(first)}", system.replies(gate))
    if exact == served:
        yield RungAnswers("offline as served", f"PEFT, {_format(served)}", skipped="the same: float32 is served")
    elif not lack:
        del system  # two bases at once may not fit
        system = PlainSystem(served, card)
        system.load_adapter(artifact.folder)
        yield RungAnswers("offline as served", f"PEFT, {_format(served)}", system.replies(gate))


def engine_alone(engine: Engine, key: str, gate: Sequence[Example]) -> RungAnswers:
    """Answers of the engine when nobody else asks: one request at a time."""
    try:
        answers = [engine.classify([Work(key, engine.prompt(key, example.columns))])[0] for example in gate]
    except AdapterError as error:
        return RungAnswers("engine alone", "serving engine", skipped=str(error), is_fault=True)
    return RungAnswers("engine alone", "serving engine, one request at a time", _replies(answers))


def mixed_batch(engine: Engine, key: str, gate: Sequence[Example], others: Mapping[str, Sequence[Example]]) -> RungAnswers:
    """Answers of the engine when for every request one comes for each other adapter too."""
    works = []
    for number, example in enumerate(gate):
        works.append(Work(key, engine.prompt(key, example.columns)))
        works += [Work(other, engine.prompt(other, rows[number % len(rows)].columns)) for other, rows in others.items()]
    try:
        answers = engine.classify(works)[:: 1 + len(others)]
    except AdapterError as error:
        return RungAnswers("mixed batch", "serving engine", skipped=str(error), is_fault=True)
    mixed_with = f"rows of {len(others)} other adapters between" if others else "its own rows only, no other champion here"
    return RungAnswers("mixed batch", f"serving engine, {mixed_with}", _replies(answers))


class PlainSystem:
    """transformers and PEFT as anybody would use them: one example and one label at a time, without padding."""

    def __init__(self, base: BaseSpec, card: TaskCard) -> None:
        """Load the base, and an encoder's label vectors, which the base alone gives."""
        folder = find_base(base).folder
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._card, self._temperature = card, 1.0
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model: Any = AUTO_CLASS[card.family].from_pretrained(
            folder,
            dtype=getattr(torch, base.dtype),
            quantization_config=quantization_config_of(base),
            device_map={"": self._device},
            use_safetensors=True,
            local_files_only=True,
        )
        self._model.eval()
        self._label_vectors: list[Tensor] = []
        if card.family == "encoder":
            with torch.inference_mode():
                wordings = label_wordings(card.labels)
                self._label_vectors = [self._pooled(self._tokenizer(wording)["input_ids"]) for wording in wordings]

    def load_adapter(self, folder: Path) -> None:
        """Put the adapter on, its weights in the base's dtype as they are when served."""
        self._model = with_adapter(self._model, folder)
        self._temperature = self._card.temperature

    @torch.inference_mode()
    def replies(self, gate: Sequence[Example]) -> tuple[Reply, ...]:
        """Answer every example."""
        return tuple(self._reply(example) for example in gate)

    def _reply(self, example: Example) -> Reply:
        card = self._card
        prompt = list(encode_prompt(card.prompt_format, example.columns, self._tokenizer).token_ids)
        if card.max_new_tokens:
            return Reply(self._written(prompt, card.max_new_tokens))
        if card.family == "encoder":
            text_H = self._pooled(prompt)
            scores = [COSINE_SCALE * torch.cosine_similarity(text_H, label_H, dim=0) for label_H in self._label_vectors]
        else:
            scores = [self._log_likelihood(prompt, self._answer_ids(label)) for label, _ in card.labels]
        best = max(range(len(scores)), key=lambda index: float(scores[index]))
        probabilities = torch.softmax(torch.stack(scores).double() / self._temperature, dim=0)
        return Reply(card.labels[best][0], tuple(probabilities.tolist()))

    def _pooled(self, token_ids: Sequence[int]) -> Tensor:
        """Mean of the last hidden states [H]."""
        hidden: Tensor = self._model(input_ids=self._tensor(token_ids)).last_hidden_state[0].float().mean(0)
        return hidden

    def _answer_ids(self, label: str) -> list[int]:
        end = self._tokenizer.eos_token_id
        if self._card.family == "causal":
            return [*self._tokenizer(f" {label}", add_special_tokens=False)["input_ids"], end]
        ids = list(self._tokenizer(label)["input_ids"])
        return ids if ids[-1] == end else [*ids, end]

    def _log_likelihood(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Of the answer after the prompt, its end token included; summed or averaged over tokens as the task wants."""
        if self._card.family == "seq2seq":
            logits_TV = self._model(input_ids=self._tensor(prompt), labels=self._tensor(answer)).logits[0]
        else:
            logits_TV = self._model(input_ids=self._tensor([*prompt, *answer])).logits[0, len(prompt) - 1 : -1]
        of_tokens: Tensor = logits_TV.float().log_softmax(-1)[range(len(answer)), list(answer)]
        return of_tokens.mean() if self._card.label_score == "mean" else of_tokens.sum()

    def _written(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        """Text by greedy `generate`, without the penalties that a base's generation_config may ask for."""
        configured = self._model.generation_config.eos_token_id
        ends = {self._tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
        ids = self._tensor(prompt)
        written = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else min(ends),
        )
        first = 1 if self._card.family == "seq2seq" else len(prompt)
        return str(self._tokenizer.decode(written[0, first:], skip_special_tokens=True)).strip()

    def _tensor(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(token_ids)], device=self._device)


def _bound(engine: Engine, others: Sequence[EvalItem]) -> dict[str, Sequence[Example]]:
    """Bind as many other champions as there are slots for; one that does not bind is its own task's affair."""
    found: dict[str, Sequence[Example]] = {}
    for other in others:
        if len(found) == NUM_SLOTS - 1:
            break
        try:
            found[engine.bind(read_artifact(Path(other.folder), other.digest), other.version)] = other.gate
        except AdapterError:
            continue
    return found


def _replies(answers: Sequence[Answer]) -> tuple[Reply, ...]:
    return tuple(Reply(answer.label, answer.probabilities) for answer in answers)


def _lack_of_memory(num_bytes: int) -> str:
    """What is missing to load so much, in words; empty where there is room."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return "" if num_bytes < free else f"needs {num_bytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"


def _format(base: BaseSpec) -> str:
    return base.dtype if base.quantization == "none" else f"{base.quantization} with {base.dtype}"
