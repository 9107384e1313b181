"""Compute each layer of a frozen base again in the backward pass instead of storing its insides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from multilora.errors import AdapterError
from multilora.lora import AdapterSlots


def checkpoint_layers(model: PreTrainedModel, slots: AdapterSlots) -> Callable[[], None]:
    """Make every layer of `model` keep only its input for the backward pass; returns what undoes it.

    Raises AdapterError where none can. transformers' own switch needs modules in training mode, which turns on the dropout of
    layers that apply it themselves.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # The backward pass comes when the routing of the forward pass has ended.
        return nullcontext(), slots.using(slots.routing.segments, slots.routing.dropout_keys)

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        name = type(model).__name__
        raise AdapterError(f"{name} has no layers for gradient checkpointing; set resources.gradient_checkpointing to false")
    wrapped = ExitStack()
    for layer in layers:
        wrapped.callback(setattr, layer, "forward", layer.forward)
        # Nothing in a frozen base draws random numbers, and an adapter's dropout depends on its rows' keys alone.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return wrapped.close
