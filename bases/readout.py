"""Give a T5's decoder a first idea of what it is for: to say the words that a text calls for.

A decoder of random weights needs millions of tokens before its answers depend on the text at all. But the mean state of an
encoder that follows the teacher says what a text is about, and one matrix turns it into the words of the phrases that fit:
with the teacher's vectors of sentences that it was not fitted to, it chooses the one of seven phrases that fits in 95 %. So the
first cross-attention begins as that matrix, applied to the mean of all states, and everything else of the decoder begins small.

Dims: N sentences, P phrases, S of a batch, H hidden.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from bases.losses import mean_states
from bases.teacher import MAX_TOKENS, Matches

NUM_EPOCHS, LEAST_STEPS, SENTENCES_AT_ONCE, LEARNING_RATE = 5, 30, 256, 0.06
LOUDNESS = 3.0
"""Of what the text says, relative to the token that the decoder has just read."""
START_SCALE = 0.1


@torch.enable_grad()
def fit_readout(words_PH: Tensor, vectors_NH: Tensor, matches: Matches, seed: int) -> Tensor:
    """Return the matrix [H, H] by whose images of the sentences' vectors the fitting phrases are the likeliest.

    `words_PH` holds the mean embedding of each phrase's tokens; scores are scaled as in a T5 with shared embeddings.
    """
    rng = random.Random(seed)
    num_steps = max(LEAST_STEPS, NUM_EPOCHS * len(matches.rows) // SENTENCES_AT_ONCE)
    scaled_PH = words_PH / words_PH.shape[1] ** 0.5
    matrix_HH = torch.zeros(words_PH.shape[1], words_PH.shape[1], device=words_PH.device, requires_grad=True)
    optimizer = torch.optim.Adam([matrix_HH], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
    for _ in range(num_steps):
        chosen = [rng.randrange(len(matches.rows)) for _ in range(SENTENCES_AT_ONCE)]
        fitting_S = torch.tensor([rng.choice(matches.rows[index].fitting) for index in chosen], device=words_PH.device)
        scores_SP = vectors_NH[chosen].to(words_PH) @ matrix_HH.T @ scaled_PH.T
        torch.autograd.backward(F.cross_entropy(scores_SP, fitting_S))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return matrix_HH.detach()


@torch.no_grad()
def give_readout(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, vectors_NH: Tensor, matches: Matches, seed: int
) -> None:
    """Fit the matrix to the sentences' vectors [N, H], and let the decoder of `model` begin with it."""
    embedding_VH = model.get_input_embeddings().weight
    phrases = tokenizer(list(matches.phrases), add_special_tokens=False)["input_ids"]
    words_PH = torch.stack([embedding_VH[torch.tensor(ids, device=embedding_VH.device)].mean(0) for ids in phrases])
    matrix_HH = fit_readout(words_PH, vectors_NH, matches, seed)
    some_NH = vectors_NH[:1000].to(embedding_VH)
    loudness = (some_NH @ matrix_HH.T).pow(2).mean().sqrt()
    size = _mean_norm(model, tokenizer, [row.text for row in matches.rows[:200]])
    for block in model.decoder.block:
        for module in (block.layer[0].SelfAttention.o, block.layer[1].EncDecAttention.o, block.layer[2].DenseReluDense.wo):
            module.weight.mul_(START_SCALE)
    attention = model.decoder.block[0].layer[1].EncDecAttention
    attention.q.weight.mul_(START_SCALE)  # it looks at all positions nearly alike
    attention.v.weight.copy_(torch.eye(len(matrix_HH)))
    attention.o.weight.copy_(matrix_HH * LOUDNESS / loudness / size)
    model.decoder.final_layer_norm.weight.fill_(float(loudness))


def _mean_norm(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return the mean length of the texts' mean states."""
    encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt").to(model.device)
    norm: Tensor = mean_states(model, encoded["input_ids"], encoded["attention_mask"]).norm(dim=1).mean()
    return norm
