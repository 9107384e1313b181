"""Which linear layers of a base get an adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from multilora.errors import AdapterError

if TYPE_CHECKING:  # transformers takes seconds to import, and what only reads an adapter does not need it.
    from transformers import PreTrainedModel


def match_modules(model: PreTrainedModel, target_modules: str | Sequence[str], layers: Sequence[int] | None = None) -> list[str]:
    """Name the linear layers that get an adapter. Raises AdapterError for a target or a layer that matches nothing.

    `target_modules` is `all-linear`, a list of names or name endings, or a regular expression for the whole name.
    `all-linear` leaves out the output head and poolers, whose outputs are not used or shared with the embeddings.
    """
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "pooler" not in name.split(".")
    ]
    if not names:
        raise AdapterError("the base has no linear layer that can take an adapter")
    if layers is not None:
        names = _in_layers(names, layers)
    if target_modules == "all-linear":
        return names
    if isinstance(target_modules, str):
        chosen = [name for name in names if re.fullmatch(target_modules, name)]
        lost = [] if chosen else [target_modules]
    else:
        chosen = [name for name in names if any(_ends_with(name, target) for target in target_modules)]
        lost = [target for target in target_modules if not any(_ends_with(name, target) for name in names)]
    if lost:
        endings = sorted({name.rpartition(".")[2] for name in names})
        rule = ", of which a regular expression must match the whole name" if isinstance(target_modules, str) else ""
        raise AdapterError(
            f"target_modules {lost} match no linear layer; this base has {', '.join(endings)} (such as {names[0]}{rule})"
        )
    return chosen


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name. Raises AdapterError where it is none."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise AdapterError(f"module {name} is a {type(module).__name__}, not a linear layer")
    return module


def _in_layers(names: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Keep the modules of the given layers: the first number in a name, counted by each stack (what stands before it)."""
    places = [(name, match[1], int(match[2])) for name in names if (match := re.match(r"(.*?)\.?\b(\d+)\.", name))]
    num_layers: dict[str, int] = {}
    for _, stack, layer in places:
        num_layers[stack] = max(num_layers.get(stack, 0), layer + 1)
    lost = [layer for layer in layers if not any(-count <= layer < count for count in num_layers.values())]
    if lost:
        stacks = " and ".join(f"{count} layers in {stack}" for stack, count in num_layers.items()) or "no numbered layers"
        raise AdapterError(f"layers {lost} do not exist; this base has {stacks}")
    return [name for name, stack, layer in places if layer in layers or layer - num_layers[stack] in layers]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
