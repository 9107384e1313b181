"""What training minimises beside the loss of a T5's own target tokens.

Dims: B rows, P pairs of a row and a wrong option, Q rows and pairs, O options, T input positions, U target positions,
V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from bases.batches import IGNORED, MAX_OTHERS, Others


def mean_states(model: T5ForConditionalGeneration, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean [B, H] of the encoder's last states."""
    states_BTH: Tensor = model.get_encoder()(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
    return (states_BTH * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)


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
    logits_QUV = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states_BTH[source_Q]), attention_mask=mask_BT[source_Q],
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=targets_QU), use_cache=False,
    ).logits.float()  # fmt: skip
    losses_QU = F.cross_entropy(logits_QUV.transpose(1, 2), targets_QU, ignore_index=IGNORED, reduction="none")
    of_tokens = losses_QU[:num_rows].sum() / (targets_BU != IGNORED).sum().clamp_min(1)
    # A row of its own takes what fills up; a place that no option has is never chosen.
    scores_BO = losses_QU.new_full((num_rows + 1, MAX_OTHERS + 1), -torch.inf)
    place_Q = torch.cat([torch.zeros(num_rows, dtype=torch.long, device=ids_BT.device), place_P])
    scores_BO = scores_BO.index_put((row_Q, place_Q), -losses_QU.sum(1))[:num_answers]
    of_choices = (scores_BO.logsumexp(1) - scores_BO[:, 0]).sum() / max(1, num_answers)
    return of_tokens + of_choices
