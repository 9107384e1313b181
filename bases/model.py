"""The T5 that is made: its sizes, its optimisers, and what of it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention, T5LayerFF, T5LayerSelfAttention

from bases.batches import EOS, PAD
from bases.corpus import VOCAB_SIZE

RATE_OF_KNOWN = 0.5
"""Of the learning rate, for what came from the teacher."""
MIN_SCALE, MAX_SCALE, VECTOR_SCALE = 0.02, 0.5, 0.1


@dataclass(frozen=True)
class Size:
    """How large the base is. A shallow decoder scores labels cheaply, and labels need no more."""

    d_model: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    vocab_size: int


MINI = Size(d_model=384, d_ff=1536, num_layers=6, num_decoder_layers=2, num_heads=12, vocab_size=VOCAB_SIZE)
SMALL = Size(d_model=384, d_ff=1536, num_layers=2, num_decoder_layers=1, num_heads=12, vocab_size=4096)


def build_model(size: Size, seed: int) -> T5ForConditionalGeneration:
    """Build a T5 with GELU, like the teacher, whose head shares the embeddings: they are a fifth of so small a model."""
    config = T5Config(
        vocab_size=size.vocab_size, d_model=size.d_model, d_ff=size.d_ff, d_kv=size.d_model // size.num_heads,
        num_layers=size.num_layers, num_decoder_layers=size.num_decoder_layers, num_heads=size.num_heads,
        feed_forward_proj="gelu", dropout_rate=0.0, tie_word_embeddings=True,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(config)


def build_optimizers(model: T5ForConditionalGeneration, learning_rate: float, matrix_rate: float) -> list[torch.optim.Optimizer]:
    """AdamW, each tensor's peak rate going by its first values; on a GPU, Muon for the matrices of the layers.

    On a CPU Muon's orthogonalisation takes longer than the passes. Embeddings start 16 times larger than matrices. What came
    from the teacher learns more slowly. Each group notes its highest rate as `peak`.
    """
    known = {id(parameter) for parameter in model.get_encoder().parameters()}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    muons: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for parameter in model.parameters():
        part = RATE_OF_KNOWN if id(parameter) in known else 1.0
        if parameter.is_cuda and parameter.ndim == 2 and id(parameter) not in embeddings:
            muons.append({"params": [parameter], "peak": matrix_rate * part})
        else:
            scale = float(parameter.detach().pow(2).mean().sqrt())
            scale = VECTOR_SCALE if parameter.ndim == 1 else min(max(scale, MIN_SCALE), MAX_SCALE)
            others.append({"params": [parameter], "peak": learning_rate * part * scale})
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [adamw, torch.optim.Muon(muons, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")] if muons else [adamw]


def compile_layers(model: T5ForConditionalGeneration) -> None:
    """Compile what all layers share, once for all shapes: compiling the whole model for each takes longer than it saves."""
    torch._dynamo.config.recompile_limit = 64  # the layers with and without position bias, and batches with T = B
    for module in model.modules():
        if isinstance(module, T5LayerFF | T5LayerSelfAttention | T5LayerCrossAttention):
            module.compile(dynamic=True)
