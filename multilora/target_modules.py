"""Which linear layers of a base get an adapter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from multilora.errors import AdapterError


def match_modules(model: PreTrainedModel, target_modules: str | Sequence[str]) -> list[str]:
    """Name the linear layers that get an adapter. Raises AdapterError for a target that matches nothing.

    `all-linear` leaves out the output head and poolers, whose outputs are not used or shared with the embeddings.
    """
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "pooler" not in name.split(".")
    ]
    if target_modules == "all-linear":
        chosen = names
    else:
        chosen = [name for name in names if any(_ends_with(name, target) for target in target_modules)]
        lost = [target for target in target_modules if not any(_ends_with(name, target) for name in names)]
        if lost:
            endings = sorted({name.rpartition(".")[2] for name in names})
            raise AdapterError(f"target_modules {lost} match no linear layer; this base has {', '.join(endings)}")
    if not chosen:
        raise AdapterError("the base has no linear layer that can take an adapter")
    return chosen


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name. Raises AdapterError where it is none."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise AdapterError(f"module {name} is a {type(module).__name__}, not a linear layer")
    return module


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
