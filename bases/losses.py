"""What training minimises beside the loss of a T5's own target tokens.

Dims: B rows, R of them whose vectors are known, P pairs of a row and a wrong option, Q rows and pairs, N their target
tokens, O options, T input positions, U target positions, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor
from transformers import T5ForConditionalGeneration

from bases.batches import IGNORED, MAX_OTHERS, Others
from bases.transplant import PieceTeacher


def mean_states(model: T5ForConditionalGeneration, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean [B, H] of the encoder's last states."""
    return mean_of(model.get_encoder()(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state, mask_BT)


def mean_of(states_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean [B, H] over the positions that are no padding."""
    return (states_BTH * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)


def sentence_loss(
    model: T5ForConditionalGeneration, teacher: PieceTeacher, ids_BT: Tensor, mask_BT: Tensor, vectors_RH: Tensor
) -> Tensor:
    """Return how far the encoder is from the teacher: of the first R rows' vectors, and of every token's last state.

    A state for each token teaches much faster than one vector for each sentence.
    """
    states_BTH: Tensor = model.get_encoder()(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
    num_rows = len(vectors_RH)  # the others only fill up
    pooled_RH = mean_of(states_BTH, mask_BT)[:num_rows]
    of_tokens_RT = F.cosine_similarity(states_BTH, teacher.states(ids_BT, mask_BT), dim=-1)[:num_rows]
    return 2 - F.cosine_similarity(pooled_RH, vectors_RH).mean() - of_tokens_RT[mask_BT[:num_rows].bool()].mean()


def options_loss(
    model: T5ForConditionalGeneration, ids_BT: Tensor, mask_BT: Tensor, targets_BU: Tensor, others: Others
) -> Tensor:
    """Return the loss of the answers' tokens, plus that of choosing the answer among the options by its likelihood.

    Tokens alone teach what answers look like long before they teach to choose. Source: T-Few (Liu et al. 2022), whose
    losses beside that of the answer have the same end.
    """
    row_P, place_P = others.row_P.to(ids_BT.device), others.place_P.to(ids_BT.device)
    targets_QU = torch.cat([targets_BU, others.targets_PU.to(ids_BT.device).long()])
    num_rows, num_answers = len(ids_BT), int((targets_BU != IGNORED).any(1).sum())
    row_Q = torch.cat([torch.arange(num_rows, device=ids_BT.device), row_P])
    source_Q = row_Q.clamp_max(num_rows - 1)
    states_BTH = model.get_encoder()(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
    decoded_QUH = model.get_decoder()(
        input_ids=model.prepare_decoder_input_ids_from_labels(labels=targets_QU), use_cache=False,
        encoder_hidden_states=states_BTH[source_Q], encoder_attention_mask=mask_BT[source_Q],
    ).last_hidden_state  # fmt: skip
    is_target_QU = targets_QU != IGNORED  # most positions only fill up, and a position's scores of all pieces cost the most
    logits_NV = model.lm_head(decoded_QUH[is_target_QU] * model.model_dim**-0.5).float()
    losses_N = F.cross_entropy(logits_NV, targets_QU[is_target_QU], reduction="none")
    losses_QU = losses_N.new_zeros(targets_QU.shape).masked_scatter(is_target_QU, losses_N)
    of_tokens = losses_QU[:num_rows].sum() / (targets_BU != IGNORED).sum().clamp_min(1)
    # A row of its own takes what fills up; a place that no option has is never chosen.
    scores_BO = losses_QU.new_full((num_rows + 1, MAX_OTHERS + 1), -torch.inf)
    place_Q = torch.cat([torch.zeros(num_rows, dtype=torch.long, device=ids_BT.device), place_P])
    scores_BO = scores_BO.index_put((row_Q, place_Q), -losses_QU.sum(1))[:num_answers]
    of_choices = (scores_BO.logsumexp(1) - scores_BO[:, 0]).sum() / max(1, num_answers)
    return of_tokens + of_choices
