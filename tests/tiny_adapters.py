"""Adapter folders for the tiny bases, written as the trainer writes them: random tensors, true canaries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from multilora.artifact import FORMAT_VERSION, AdapterArtifact, Canary, TaskCard, card_fields, write_artifact
from multilora.base_model import FrozenBase
from multilora.generate import answer_text, generate
from multilora.lora import AdapterSlots, AdapterTensors
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import SCORER_VERSION, ScoringRow, encode_answer, encode_labels, score_labels

TEXTS = (
    "where is my new card", "I lost my wallet on the train", "what is the exchange rate today", "please close my account",
    "the transfer did not arrive", "", "thank you, that was quick", "WIN a free phone!!! call now",
)  # fmt: skip


@dataclass(frozen=True)
class TinyTask:
    """What a task's adapter is made of."""

    name: str
    labels: tuple[tuple[str, str], ...]
    instruction: str = "Which one is it?\n{labels}\nMessage: {text}"
    text_column: str = "text"
    rank: int = 4
    scaling: float = 2.0
    temperature: float = 1.0
    max_new_tokens: int | None = None


CARDS = TinyTask("cards", (("card lost", "the card is gone"), ("card late", ""), ("rate", "asks for an exchange rate")))
MOOD = TinyTask(
    "mood",
    (("glad", ""), ("angry", "")),
    instruction="Say the mood of: {text}\n{labels}",
    rank=2,
    scaling=1.0,
    temperature=0.5,
)
MAIL = TinyTask(
    "mail",
    (("spam", "unwanted advertising"), ("work", ""), ("family", ""), ("other", "none of these")),
    instruction="Sort this mail.\nSubject: {subject}\nBody: {body}\n{labels}",
    text_column="body",
    rank=8,
    scaling=0.5,
    temperature=2.0,
)

SHORTEN = TinyTask("shorten", (), instruction="Say it shorter: {text}", rank=3, max_new_tokens=6)


def tiny_prompt_format(task: TinyTask, family: str) -> PromptFormat:
    """The task's prompt over a base of `family`."""
    return PromptFormat(family, task.instruction, task.text_column, task.labels, max_length_tokens=128)


def item_of(task: TinyTask, text: str) -> dict[str, str]:
    """A request item of the task that carries `text` in every column."""
    return dict.fromkeys(tiny_prompt_format(task, "causal").columns, text)


def write_tiny_adapter(
    folder: Path, base: FrozenBase, slots: AdapterSlots, tensors: AdapterTensors, task: TinyTask
) -> AdapterArtifact:
    """Write `tensors` as the task's adapter; slot 0 of `slots` is used to score its canaries."""
    prompt_format = tiny_prompt_format(task, base.family)
    slots.load(0, tensors, task.scaling)
    labels = encode_labels(base, slots, prompt_format)
    columns = [item_of(task, text) for text in TEXTS[:4]]
    prompts = [encode_prompt(prompt_format, item, base.tokenizer) for item in columns]
    rows = [ScoringRow(prompt.token_ids, 0, labels) for prompt in prompts]
    texts: list[str | None] = [None] * len(rows)
    if task.max_new_tokens:
        written = [answer_text(base, ids) for ids in generate(base, slots, rows, [task.max_new_tokens] * len(rows))]
        answers = [encode_answer(base, text, task.max_new_tokens) for text in written]
        rows = [replace(row, labels=answer) for row, answer in zip(rows, answers, strict=True)]
        texts = [*written]
    scores = score_labels(base, slots, rows)
    card = TaskCard(
        format_version=FORMAT_VERSION,
        task=task.name,
        description="a tiny task",
        base=base.spec,
        base_fingerprint=base.files.fingerprint,
        scorer_version=SCORER_VERSION,
        rank=task.rank,
        scaling=task.scaling,
        num_modules=len(tensors),
        canaries=[
            Canary(columns=item, scores=row.tolist(), text=text) for item, row, text in zip(columns, scores, texts, strict=True)
        ],
        temperature=task.temperature,
        max_new_tokens=task.max_new_tokens,
        spec_hash="0" * 16,
        data_fingerprint="0" * 64,
        **card_fields(prompt_format),
    )
    return write_artifact(folder, card, tensors)
