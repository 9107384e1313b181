"""Accuracy on held-out rows of the closed tasks, by label scores, beside what the commonest answer would get.

Dims: B rows, P (row, label) pairs, T input positions, U target positions.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from bases.batches import IGNORED, INPUT_LENGTHS, TARGET_LENGTHS, padded
from bases.mixture import UNSEEN, Drawn, plain_row, read_tasks
from multilora.errors import DataError
from multilora.prompt import encode_prompt

ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class HeldoutRow:
    """One row as it is judged."""

    task: str
    drawn: Drawn


@dataclass(frozen=True)
class Heldout:
    """The rows that are looked at while the base trains, and the accuracy of a guesser that knows each task's answers."""

    rows: Sequence[HeldoutRow]
    guesses: Mapping[str, float]

    @classmethod
    def read(cls, data: Path, max_rows: int) -> Heldout:
        """Read up to `max_rows` of each task that has options."""
        tasks = read_tasks(data)
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        with (data / "instructions" / "heldout.jsonl").open(encoding="utf-8") as stream:
            for row in map(json.loads, stream):
                if row["options"] and row["output"] in row["options"]:
                    found[row["task"]].append(row)
        guesses = {
            name: max(Counter(row["output"] for row in rows).values()) / len(rows)
            if tasks[name].kind == "closed"
            else mean(1 / len(row["options"]) for row in rows)
            for name, rows in found.items()
        }
        rows = [HeldoutRow(name, plain_row(tasks[name], row)) for name, rows in found.items() for row in rows[:max_rows]]
        return cls(rows, guesses)


@torch.no_grad()
def evaluate(model: T5ForConditionalGeneration, tokenizer: Any, heldout: Heldout) -> dict[str, Any]:
    """Score all rows: mean accuracy over the tasks that are trained on, over those that are not, and of each task."""
    encoded = []
    for row in heldout.rows:
        try:
            prompt = encode_prompt(row.drawn.prompt_format(INPUT_LENGTHS[-1]), {"text": row.drawn.text}, tokenizer)
        except DataError:  # its options alone are longer than the base reads
            continue
        encoded.append((row, prompt.token_ids, [tokenizer(label)["input_ids"] for label, _ in row.drawn.labels]))
    encoded.sort(key=lambda entry: len(entry[1]))
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(encoded), ROWS_AT_ONCE):
        part = encoded[start : start + ROWS_AT_ONCE]
        scores = label_scores(model, [prompt for _, prompt, _ in part], [answers for _, _, answers in part])
        for (row, _, _), scores_L in zip(part, scores, strict=True):
            hits[row.task].append(row.drawn.labels[int(scores_L.argmax())][0] == row.drawn.answer)
    accuracies = {name: mean(found) for name, found in hits.items()}
    seen, unseen = [name for name in accuracies if name not in UNSEEN], [name for name in accuracies if name in UNSEEN]
    return {
        "seen": round(mean(accuracies[name] for name in seen), 4),
        "seen_majority": round(mean(heldout.guesses[name] for name in seen), 4),
        "unseen": round(mean(accuracies[name] for name in unseen), 4),
        "unseen_majority": round(mean(heldout.guesses[name] for name in unseen), 4),
        "tasks": {name: [round(accuracies[name], 3), round(heldout.guesses[name], 3)] for name in sorted(accuracies)},
    }


def label_scores(
    model: T5ForConditionalGeneration, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
) -> list[Tensor]:
    """Log-likelihood of each row's labels [L]; every prompt is encoded once."""
    length = next(choice for choice in INPUT_LENGTHS if choice >= max(map(len, prompts)))
    ids_BT = padded("judged", [(prompt, ()) for prompt in prompts], len(prompts), length, 1).ids_BT.to(model.device).long()
    mask_BT = (ids_BT != model.config.pad_token_id).long()
    hidden_BTH = model.get_encoder()(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
    pairs = [((), answer) for row_answers in answers for answer in row_answers]
    width = next(choice for choice in TARGET_LENGTHS if choice >= max(len(answer) for _, answer in pairs))
    targets_PU = padded("judged", pairs, len(pairs), 1, width).targets_BU.to(model.device).long()
    counts = torch.tensor([len(row_answers) for row_answers in answers], device=model.device)
    of_row_P = torch.arange(len(answers), device=model.device).repeat_interleave(counts)
    logits_PUV = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden_BTH[of_row_P]),
        attention_mask=mask_BT[of_row_P],
        labels=targets_PU,
        use_cache=False,
    ).logits.float()
    losses_PU = F.cross_entropy(logits_PUV.transpose(1, 2), targets_PU, ignore_index=IGNORED, reduction="none")
    return list(torch.split(-losses_PU.sum(1), counts.tolist()))
