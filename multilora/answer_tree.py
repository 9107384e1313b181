"""The answers that a row may give, as one tree of tokens: what several answers share is read once.

The root stands for what comes before every answer; every inner node is a token that another one follows; an edge is a
token after a node, and its log-probability is what counts. An answer's score is the sum over the edges of its path.

Dims: L answers, N inner nodes with the root first, E edges.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor, nn
from transformers import PreTrainedModel

from multilora.errors import AdapterError

T5_KINDS = ("t5", "mt5")
"""Positions are a bias on the attention of the first layer, which all layers share."""
BART_KINDS = ("bart", "mbart")
"""Positions are embeddings."""


@dataclass(frozen=True)
class AnswerTree:
    """Answers of any number of tokens, each ending with the end token."""

    token_ids: tuple[int, ...]
    """Input tokens of the inner nodes after the root; a node stands behind its parent."""
    depths_N: Tensor
    """Tokens between the root and each node; what a token's position depends on."""
    reaches_NN: Tensor
    """Whether node n reads node m: itself and the nodes on its way to the root."""
    edge_nodes_E: Tensor
    edge_tokens_E: Tensor
    paths_LE: Tensor
    """Weight of each edge in each answer's score, float32."""

    @classmethod
    def of(cls, answers: Sequence[tuple[int, ...]], *, is_mean: bool = False) -> AnswerTree:
        """Build the tree of some answers; `is_mean` scores an answer by the mean over its tokens instead of their sum."""
        node_of: dict[tuple[int, ...], int] = {}
        edge_of: dict[tuple[int, ...], int] = {}
        for answer in answers:
            for length in range(len(answer)):
                node_of.setdefault(answer[:length], len(node_of))
                edge_of.setdefault(answer[: length + 1], len(edge_of))
        reaches_NN = torch.zeros(len(node_of), len(node_of), dtype=torch.bool)
        for prefix, node in node_of.items():
            reaches_NN[node, [node_of[prefix[:length]] for length in range(len(prefix) + 1)]] = True
        paths_LE = torch.zeros(len(answers), len(edge_of))
        for row, answer in enumerate(answers):
            edges = [edge_of[answer[: length + 1]] for length in range(len(answer))]
            paths_LE[row, edges] = 1.0 / len(answer) if is_mean else 1.0
        return cls(
            token_ids=tuple(prefix[-1] for prefix in node_of if prefix),
            depths_N=torch.tensor([len(prefix) for prefix in node_of]),
            reaches_NN=reaches_NN,
            edge_nodes_E=torch.tensor([node_of[path[:-1]] for path in edge_of]),
            edge_tokens_E=torch.tensor([path[-1] for path in edge_of]),
            paths_LE=paths_LE,
        )

    @property
    def num_nodes(self) -> int:
        """Inner nodes, the root included."""
        return len(self.token_ids) + 1

    @property
    def is_chain(self) -> bool:
        """Whether no token has two followers among the nodes, so that the tree is an ordinary text."""
        return int(self.depths_N[-1]) == len(self.token_ids)


def check_scorable(model: PreTrainedModel) -> None:
    """Raise AdapterError for a model that cannot be given the positions of a tree's tokens."""
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        if kind not in (*T5_KINDS, *BART_KINDS):
            raise AdapterError(f"encoder-decoders of type {kind} cannot be scored; use {', '.join((*T5_KINDS, *BART_KINDS))}")
    elif not {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters):
        raise AdapterError(f"models of type {kind} cannot be scored: they take no position_ids; use Llama, Qwen or GPT-2")


def laid_out(trees: Sequence[AnswerTree], width: int) -> tuple[Tensor, Tensor]:
    """Pad trees to `width` nodes: who reads whom [B, N, N], padding only itself, and depths [B, N]."""
    reads_BNN = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    depths_BN = torch.zeros(len(trees), width, dtype=torch.long)
    for row, tree in enumerate(trees):
        reads_BNN[row, : tree.num_nodes, : tree.num_nodes] = tree.reaches_NN
        depths_BN[row, : tree.num_nodes] = tree.depths_N
    return reads_BNN, depths_BN


@contextmanager
def decoder_positions(model: Any, depths_BN: Tensor) -> Iterator[None]:
    """Make an encoder-decoder's decoder take positions from `depths_BN`; transformers offers no argument for that.

    In this thread alone: others may run passes of the same model side by side, each with a hook of its own.
    """
    decoder, own = model.get_decoder(), threading.get_ident()
    if model.config.model_type in T5_KINDS:
        attention = decoder.block[0].layer[0].SelfAttention  # computes the bias that all layers share
        bias_BHNN = _t5_bias(attention, depths_BN)

        def with_bias(_: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Any, Any] | None:
            return (args, {**options, "position_bias": bias_BHNN}) if threading.get_ident() == own else None

        hook = attention.register_forward_pre_hook(with_bias, with_kwargs=True)
    else:
        embedding = decoder.embed_positions
        embedded_BNH = F.embedding(depths_BN + embedding.offset, embedding.weight)
        hook = embedding.register_forward_hook(
            lambda module, args, output: embedded_BNH if threading.get_ident() == own else None
        )
    try:
        yield
    finally:
        hook.remove()


def _t5_bias(attention: Any, depths_BN: Tensor) -> Tensor:
    """Relative position bias [B, heads, N, N] by depth. Source: transformers T5Attention.compute_bias."""
    buckets_BNN = attention._relative_position_bucket(
        depths_BN[:, None, :] - depths_BN[:, :, None],
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    bias_BHNN: Tensor = attention.relative_attention_bias(buckets_BNN).permute(0, 3, 1, 2)
    return bias_BHNN
