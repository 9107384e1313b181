"""Give a T5's encoder what a sentence encoder knows: each matrix is the least-squares solution of doing what the BERT's does.

A T5 cannot hold a BERT's weights as they are: it normalises before a layer instead of after it, has no biases, no absolute
positions and another vocabulary. But both are stacks of the same parts, so on some thousands of tokens of text one can fit,
from the first layer to the last, what every matrix must be so that the T5's states follow the BERT's, each dimension times a
factor that the next matrix undoes. Word order is left out; training on the teacher's states and vectors brings it in.

Dims: B rows, T positions, S positions with the [CLS], H hidden, V vocabulary, W the teacher's vocabulary, N tokens in all,
K inputs of a matrix, M its outputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BertModel, PreTrainedTokenizerFast, T5ForConditionalGeneration

from bases.corpus import teacher_piece
from bases.teacher import MAX_TOKENS, TEACHER
from multilora.base_model import load_base
from multilora.errors import DataError
from multilora.spec import BaseSpec

RIDGE = 1e-4
"""Of the mean square of the inputs: keeps a fit on few tokens from exploding."""
NUM_SENTENCES = 600
LEAST_WEIGHT = 0.2
"""Of a normalisation: few of the teacher's dimensions have none left."""


@dataclass(frozen=True)
class PieceTeacher:
    """The teacher as it reads a T5's own tokens."""

    bert: BertModel
    first_H: Tensor
    """Its word embedding of the [CLS] that it reads before every text."""
    words_VH: Tensor
    """That of each of the T5's pieces."""

    @classmethod
    def load(cls, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> PieceTeacher:
        """Load it for a tokenizer that is made of its pieces; raises DataError for another."""
        base = load_base(BaseSpec(model=TEACHER), device.type)
        pieces = [teacher_piece(piece, base.tokenizer) for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        if strange := set(pieces) - set(base.tokenizer.get_vocab()):
            rule = f"{TEACHER} has no {min(strange)!r} and {len(strange) - 1} more of the tokenizer's pieces"
            raise DataError(f"{rule}; --start takes a base that this recipe exported")
        words_WH = base.model.embeddings.word_embeddings.weight.data
        ids_V = base.tokenizer.convert_tokens_to_ids(pieces)
        return cls(base.model, words_WH[base.tokenizer.cls_token_id], words_WH[ids_V])

    @torch.no_grad()
    def states(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return its last states [B, T, H], word order and all."""
        words_BTH = self.words_VH[ids_BT]
        first_B1H = self.first_H.expand(len(ids_BT), 1, -1)
        mask_BS = torch.cat([mask_BT.new_ones(len(ids_BT), 1), mask_BT], 1)
        states_BSH: Tensor = self.bert(
            inputs_embeds=torch.cat([first_B1H, words_BTH], 1), attention_mask=mask_BS
        ).last_hidden_state
        return states_BSH[:, 1:]


def transplant_teacher(
    model: T5ForConditionalGeneration,
    teacher: PieceTeacher,
    tokenizer: PreTrainedTokenizerFast,
    sentences: Sequence[str],
    seed: int,
) -> None:
    """Fit `model` to the teacher on some of these sentences."""
    some = random.Random(seed).sample(sentences, min(NUM_SENTENCES, len(sentences)))
    encoded = tokenizer(some, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt").to(model.device)
    transplant(model, teacher.bert, teacher.words_VH, encoded["input_ids"], encoded["attention_mask"])


def fit(inputs_NK: Tensor, outputs_NM: Tensor) -> Tensor:
    """Return the matrix [M, K] that maps inputs to outputs with the least squared error; it has no bias."""
    gram_KK = (inputs_NK.T @ inputs_NK).double()
    gram_KK += torch.eye(len(gram_KK), device=gram_KK.device) * RIDGE * gram_KK.diagonal().mean()
    matrix_KM: Tensor = torch.linalg.solve(gram_KK, (inputs_NK.T @ outputs_NM).double())
    return matrix_KM.T.float()


@torch.no_grad()
def transplant(model: T5ForConditionalGeneration, bert: BertModel, words_VH: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> None:
    """Fit embeddings and encoder of `model` to the BERT, on rows of the T5's own tokens whose embeddings the BERT is given."""
    embeddings, encoder = bert.embeddings, model.get_encoder()
    position_H = embeddings.position_embeddings.weight[: ids_BT.shape[1]].mean(0)
    vectors_VH = embeddings.LayerNorm(words_VH + position_H + embeddings.token_type_embeddings.weight[0])
    factors_H = (1 / vectors_VH.pow(2).mean().sqrt()).expand(vectors_VH.shape[1])
    model.get_input_embeddings().weight.copy_(vectors_VH * factors_H)
    encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    is_real_BT = mask_BT.bool()
    attention_mask = torch.where(is_real_BT, 0.0, torch.finfo(torch.float32).min)[:, None, None]
    state_BTH = vectors_VH[ids_BT]
    stream_BTH = model.get_input_embeddings()(ids_BT)
    for theirs, block in zip(bert.encoder.layer, encoder.block, strict=False):  # the first layers of a deeper teacher
        layer, ours = block.layer[0], block.layer[0].SelfAttention
        normed_NH = layer.layer_norm(stream_BTH)[is_real_BT]
        for name in ("query", "key", "value"):
            wanted_NH = getattr(theirs.attention.self, name)(state_BTH)[is_real_BT]
            if name == "query":  # T5 does not divide scores by the root of the head's size
                wanted_NH = wanted_NH / theirs.attention.self.attention_head_size**0.5
            getattr(ours, name[0]).weight.copy_(fit(normed_NH, wanted_NH))
        context_BTH = _input_of(ours.o, lambda: layer(stream_BTH, attention_mask=attention_mask))  # noqa: B023  runs now
        before_BTH = _input_of(theirs.attention.output.LayerNorm, lambda: theirs.attention(state_BTH, attention_mask))  # noqa: B023
        state_BTH = theirs.attention.output.LayerNorm(before_BTH)
        factors_H = factors_H * _factors(before_BTH[is_real_BT], theirs.attention.output.LayerNorm)
        ours.o.weight.copy_(fit(context_BTH[is_real_BT], (factors_H * state_BTH - stream_BTH)[is_real_BT]))
        stream_BTH = stream_BTH + ours.o(context_BTH)

        layer, ours = block.layer[1], block.layer[1].DenseReluDense
        wanted_NM = theirs.intermediate.dense(state_BTH)[is_real_BT]
        ours.wi.weight.copy_(fit(layer.layer_norm(stream_BTH)[is_real_BT], wanted_NM))
        between_BTM = ours.act(ours.wi(layer.layer_norm(stream_BTH)))
        before_BTH = theirs.output.dense(theirs.intermediate(state_BTH)) + state_BTH
        state_BTH = theirs.output.LayerNorm(before_BTH)
        factors_H = factors_H * _factors(before_BTH[is_real_BT], theirs.output.LayerNorm)
        ours.wo.weight.copy_(fit(between_BTM[is_real_BT], (factors_H * state_BTH - stream_BTH)[is_real_BT]))
        stream_BTH = stream_BTH + ours.wo(between_BTM)
    encoder.final_layer_norm.weight.copy_(factors_H.mean() / factors_H)


def _factors(before_NH: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """What a normalisation divides each dimension by, on average: a stream that is not normalised is larger by so much."""
    return before_NH.std(dim=1).mean() / norm.weight.clamp_min(LEAST_WEIGHT)


def _input_of(target: torch.nn.Module, run: Callable[[], object]) -> Tensor:
    """Return what arrives at a module while `run` runs."""
    arrived: list[Tensor] = []
    hook = target.register_forward_pre_hook(lambda _, given: arrived.append(given[0]))
    try:
        run()
    finally:
        hook.remove()
    return arrived[0]
