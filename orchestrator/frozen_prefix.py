"""The layers below the lowest adapter: computed once per text and kept in host memory, for no step of training changes them.

Dims: B rows, T positions, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from multilora.answer_tree import T5_KINDS

logger = logging.getLogger(__name__)
MEMORY_SHARE = 0.25
"""How much of the memory that is free at the start may hold hidden states."""


class FrozenPrefix:
    """Lets the prompt's stack of layers (an encoder-decoder's encoder) start from the hidden states of the texts it has seen.

    It is off while the runs' texts would take more than `max_bytes`. Results do not depend on it, but for rounding.
    """

    def __init__(
        self, model: PreTrainedModel, adapted: Iterable[str], max_bytes: float | None = None, num_workers: int = 1
    ) -> None:
        """Wrap the layers of `model` below those that hold the modules `adapted`; there may be none.

        `num_workers`, each with a prefix of its own, may share the memory.
        """
        stack = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        self._is_t5 = model.config.model_type in T5_KINDS
        self._max_bytes = MEMORY_SHARE * psutil.virtual_memory().available / num_workers if max_bytes is None else max_bytes
        self._bytes_per_token = model.config.hidden_size * model.dtype.itemsize
        self._num_tokens: dict[int, int] = {}
        self._seen: dict[bytes, Tensor] = {}
        self._num_seen_tokens = 0
        self._is_real_BT: Tensor | None = None
        self._keys: list[bytes] = []
        layers = _layers_below(stack, {model.get_submodule(name) for name in adapted})
        self.num_layers = len(layers)
        self._wrapped = ExitStack()
        if layers:
            self._wrapped.callback(stack.register_forward_pre_hook(self._look_up, with_kwargs=True).remove)
        for layer in layers:
            self._wrapped.callback(setattr, layer, "forward", layer.forward)
            layer.forward = partial(self._run, layer.forward, layer, layer is layers[-1])

    def detach(self) -> None:
        """Give the layers their own forward pass back."""
        self._wrapped.close()

    @property
    def is_on(self) -> bool:
        """Whether there is a prefix, and the texts of all runs fit."""
        return self.num_layers > 0 and sum(self._num_tokens.values()) * self._bytes_per_token <= self._max_bytes

    def reserve(self, slot: int, num_tokens: int) -> None:
        """Count the tokens of the texts of a run that starts."""
        self._num_tokens[slot] = num_tokens
        if self.num_layers and not self.is_on:
            logger.info("the hidden states of all texts would take too much memory, so frozen layers are computed in every step")

    def release(self, slot: int) -> None:
        """Count a run's texts no longer."""
        del self._num_tokens[slot]

    def _look_up(self, stack: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Name this forward pass's rows, or None where it must run in full: a key-value cache or a mask for a tree is at work."""
        mask_BT = options["attention_mask"]
        self._is_real_BT = None
        if self.is_on and mask_BT.dim() == 2 and not options.get("use_cache"):
            self._is_real_BT = mask_BT.bool().cpu()
            ids_BT = options["input_ids"] if "input_ids" in options else args[0]
            rows = zip(ids_BT.cpu(), self._is_real_BT, strict=True)
            self._keys = [ids_T[is_real_T].numpy().tobytes() for ids_T, is_real_T in rows]

    def _run(
        self, forward: Callable[..., Any], layer: nn.Module, is_last: bool, hidden_BTH: Tensor, *args: Any, **options: Any
    ) -> Any:
        """A frozen layer's forward pass: none where all rows are known, and the last layer gives what is known of them."""
        is_real_BT = self._is_real_BT
        if is_real_BT is None:
            return forward(hidden_BTH, *args, **options)
        if all(key in self._seen for key in self._keys):
            known_BTH = self._known(is_real_BT, hidden_BTH) if is_last else hidden_BTH
            return (known_BTH, self._t5_bias(layer, hidden_BTH, *args), None) if self._is_t5 else known_BTH
        output = forward(hidden_BTH, *args, **options)
        if not self._is_t5 and not isinstance(output, Tensor):  # DeBERTa's layers hand on more than hidden states
            self.num_layers, self._is_real_BT = 0, None
        elif is_last:
            self._keep(output[0] if self._is_t5 else output, is_real_BT)
        return output

    def _known(self, is_real_BT: Tensor, like_BTH: Tensor) -> Tensor:
        known_BTH = torch.zeros(like_BTH.shape, dtype=like_BTH.dtype)
        known_BTH[is_real_BT] = torch.cat([self._seen[key] for key in self._keys])
        return known_BTH.to(like_BTH.device)

    def _keep(self, output_BTH: Tensor, is_real_BT: Tensor) -> None:
        if self._num_seen_tokens * self._bytes_per_token > self._max_bytes:  # by the texts of runs that ended
            self._seen.clear()
            self._num_seen_tokens = 0
        for key, row_TH, is_real_T in zip(self._keys, output_BTH.detach().cpu(), is_real_BT, strict=True):
            if key not in self._seen:
                self._seen[key] = row_TH[is_real_T]
                self._num_seen_tokens += len(self._seen[key])

    def _t5_bias(self, layer: Any, hidden_BTH: Tensor, mask: Tensor | None, bias: Tensor | None, *_: Any) -> Tensor:
        """The position bias that T5's first layer computes and hands on to the others."""
        if bias is not None:
            return bias
        num_positions = hidden_BTH.shape[1]
        bias = layer.layer[0].SelfAttention.compute_bias(num_positions, num_positions)
        return bias


def _layers_below(stack: nn.Module, adapted: set[nn.Module]) -> list[nn.Module]:
    """The layers of a stack before the first one that has an adapter."""
    inside = [module for module in stack.modules() if isinstance(module, GradientCheckpointingLayer)]
    in_layers = {module for layer in inside for module in layer.modules()}
    if any(module in adapted and module not in in_layers for module in stack.modules()):
        return []
    below: list[nn.Module] = []
    for layer in inside:
        if any(module in adapted for module in layer.modules()):
            break
        below.append(layer)
    return below
