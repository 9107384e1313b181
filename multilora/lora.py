"""The layer that training and serving share: many LoRA adapters side by side in the slots of one frozen base model.

Rows of a mixed batch are sorted by slot, so an adapter's rows are one contiguous view and unused slots cost nothing.
All adapters' weights lie in one flat matrix, one row per slot, the A's of all modules before the B's: an optimiser, a
gradient norm or a checkpoint of one adapter works on two contiguous vectors. Ranks differ per slot and are padded with
zeros, which stay exactly zero.

Dims: S slots, R padded rank, I in features, O out features, P adapter parameters per slot, B rows, T positions,
G segments of equal size, N rows x positions of one segment.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from multilora.errors import AdapterError
from multilora.routing import Routing, RowRouting, Run
from multilora.segments import Segment
from multilora.target_modules import linear_of

Reader = Callable[[Tensor, Tensor, Sequence[int | None]], Tensor]
"""(ids [B, T], mask [B, T], each row's slot) -> last hidden states [B, T, H]."""
AdapterTensors = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> (A of shape [rank, I], B of shape [O, rank])."""


class _Now(threading.local):
    """What each thread's forward passes are routed by: several may run side by side."""

    routing = Routing((), None)
    row_routing: RowRouting | None = None


class AdapterSlots:
    """The adapters of one model: owns their weights, wraps the model's linear layers, and routes rows to slots."""

    def __init__(
        self, model: nn.Module, module_names: Sequence[str], num_slots: int, max_rank: int, *, is_trainable: bool = False
    ) -> None:
        """Wrap `module_names` of `model` in place. Weights are float32 when trainable, else in the base's dtype."""
        self.num_slots = num_slots
        self.max_rank = max_rank
        self._now = _Now()
        self.ranks = [0] * num_slots
        self.scalings = [0.0] * num_slots
        self.dropouts = [0.0] * num_slots
        modules = {name: linear_of(model, name) for name in module_names}
        floating = next(p for p in model.parameters() if p.is_floating_point())
        self.device = floating.device
        dtype = torch.float32 if is_trainable else floating.dtype
        self._num_a = sum(max_rank * linear.in_features for linear in modules.values())
        num_b = sum(max_rank * linear.out_features for linear in modules.values())
        self.flat_SP = torch.zeros(num_slots, self._num_a + num_b, dtype=dtype, device=self.device)
        self.flat_grad_SP = torch.zeros_like(self.flat_SP) if is_trainable else None
        self.layers: dict[str, MultiLoraLinear] = {}
        self.reader: Reader | None = None
        """What reads texts instead of the model's own pass where no gradients are wanted; see recorded.py."""
        self._model = model
        offset_a, offset_b = 0, self._num_a
        for name, linear in modules.items():
            layer = MultiLoraLinear(linear, self, offset_a, offset_b, dropout_key=zlib.crc32(name.encode()))
            offset_a, offset_b = offset_a + max_rank * linear.in_features, offset_b + max_rank * linear.out_features
            model.set_submodule(name, layer)
            self.layers[name] = layer

    @property
    def routing(self) -> Routing:
        """The routing of this thread's forward passes."""
        return self._now.routing

    def detach(self) -> None:
        """Give the model its own linear layers back; these slots are of no use afterwards."""
        for name, layer in self.layers.items():
            self._model.set_submodule(name, layer.base)

    @contextmanager
    def using(self, segments: Sequence[Segment], dropout_keys: Sequence[int] | None = None) -> Iterator[None]:
        """Route the forward passes inside to `segments`, whose row counts must add up to the batch's rows.

        `dropout_keys`, one per row, turns the slots' dropout on; equal keys give equal masks.
        """
        before = self.routing
        self._now.routing = Routing(segments, dropout_keys)
        try:
            yield
        finally:
            self._now.routing = before

    @property
    def row_routing(self) -> RowRouting | None:
        """What routes this thread's forward passes instead, inside `using_rows`."""
        return self._now.row_routing

    @contextmanager
    def using_rows(self, routing: RowRouting) -> Iterator[None]:
        """Route the forward passes inside row by row."""
        self._now.row_routing = routing
        try:
            yield
        finally:
            self._now.row_routing = None

    def fresh(self, slot: int, module_names: Sequence[str], rank: int, scaling: float, generator: torch.Generator) -> None:
        """Start a new adapter: A uniform in +-1/sqrt(I), B zero, so that its output equals the base exactly.

        Source: peft LoraLayer.reset_lora_parameters (kaiming_uniform with a = sqrt(5)).
        """
        tensors = {}
        for name in module_names:
            layer = self.layers[name]
            bound = layer.in_features**-0.5
            a_RI = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) * bound
            tensors[name] = (a_RI, torch.zeros(layer.out_features, rank))
        self.load(slot, tensors, scaling)

    def load(self, slot: int, tensors: AdapterTensors, scaling: float) -> None:
        """Put an adapter into a slot. Raises AdapterError, leaving the slot empty, where a tensor does not fit."""
        self.clear(slot)
        problems = [problem for name, pair in tensors.items() if (problem := self._misfit(name, *pair))]
        if problems or not tensors:
            raise AdapterError("adapter does not fit this base: " + ("; ".join(problems[:5]) or "it has no tensors"))
        with torch.no_grad():
            for name, (a_RI, b_OR) in tensors.items():
                layer, rank = self.layers[name], a_RI.shape[0]
                layer.a_SRI[slot, :rank] = a_RI
                layer.b_SOR[slot, :, :rank] = b_OR
                layer.bound_slots.add(slot)
                self.ranks[slot] = max(self.ranks[slot], rank)
        self.scalings[slot] = scaling

    def clear(self, slot: int) -> None:
        """Empty a slot; rows that name it fail until it is loaded again."""
        with torch.no_grad():
            self.flat_SP[slot].zero_()
            if self.flat_grad_SP is not None:
                self.flat_grad_SP[slot].zero_()
        self.ranks[slot], self.scalings[slot], self.dropouts[slot] = 0, 0.0, 0.0
        for layer in self.layers.values():
            layer.bound_slots.discard(slot)

    def export(self, slot: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Copy an adapter out of its slot, without rank padding, as float32 on the CPU."""
        return self.split(slot, self.flat_SP[slot])

    def split(self, slot: int, vector_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Cut a flat vector (weights, or an optimiser's moments) into the slot's modules; copies, float32, CPU."""
        rank = self.ranks[slot]
        return {
            name: (a_RI[:rank].float().cpu().clone(), b_OR[:, :rank].float().cpu().clone(memory_format=torch.contiguous_format))
            for name, (a_RI, b_OR) in self._views(slot, vector_P.detach()).items()
        }

    def join(self, slot: int, tensors: AdapterTensors) -> Tensor:
        """Undo `split`: lay module tensors out as this group's flat vector [P]."""
        vector_P = torch.zeros_like(self.flat_SP[slot])
        for name, (a_RI, b_OR) in self._views(slot, vector_P).items():
            a_RI[: self.ranks[slot]] = tensors[name][0]
            b_OR[:, : self.ranks[slot]] = tensors[name][1]
        return vector_P

    def num_modules(self, slot: int) -> int:
        """Count the modules that the slot's adapter changes."""
        return sum(slot in layer.bound_slots for layer in self.layers.values())

    def parameters(self, slot: int) -> list[nn.Parameter]:
        """View one adapter's A's and its B's as a vector each with its gradient, for an optimiser of its own."""
        assert self.flat_grad_SP is not None, "slots were built for serving"
        parameters = [nn.Parameter(half) for half in self.halves_of(self.flat_SP[slot])]
        for parameter, grad in zip(parameters, self.halves_of(self.flat_grad_SP[slot]), strict=True):
            parameter.grad = grad
        return parameters

    def halves_of(self, vector_P: Tensor) -> tuple[Tensor, Tensor]:
        """View the A's and the B's of a flat vector."""
        return vector_P[: self._num_a], vector_P[self._num_a :]

    def _views(self, slot: int, vector_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: layer.views(vector_P) for name, layer in self.layers.items() if slot in layer.bound_slots}

    def _misfit(self, name: str, a_RI: Tensor, b_OR: Tensor) -> str | None:
        layer = self.layers.get(name)
        if layer is None:
            return f"module {name} does not exist or takes no adapter"
        rank = a_RI.shape[0]
        if a_RI.shape[1:] != (layer.in_features,) or b_OR.shape != (layer.out_features, rank):
            return (
                f"module {name} maps {layer.in_features} to {layer.out_features} features, "
                f"the tensors are A {list(a_RI.shape)} and B {list(b_OR.shape)}"
            )
        if not 1 <= rank <= self.max_rank:
            return f"module {name} has rank {rank}, the slots hold 1 to {self.max_rank}"
        return None


class MultiLoraLinear(nn.Module):
    """A frozen linear layer plus, for each segment of rows, its slot's low-rank update.

    y = base(x) + scaling * (x A^T) B^T per segment. Source: LoRA (arXiv 2106.09685) section 4.1.
    """

    def __init__(self, base: nn.Linear, slots: AdapterSlots, offset_a: int, offset_b: int, dropout_key: int) -> None:
        super().__init__()
        self._dropout_key = dropout_key
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bound_slots: set[int] = set()
        self._slots = slots
        self._a_range = slice(offset_a, offset_a + slots.max_rank * self.in_features)
        self._b_range = slice(offset_b, offset_b + slots.max_rank * self.out_features)
        for name, columns in (("a_SRI", self._a_range), ("b_SOR", self._b_range)):
            shape = (slots.num_slots, *self._shape_of(name))
            weights = slots.flat_SP[:, columns].view(shape)
            if slots.flat_grad_SP is None:
                self.register_buffer(name, weights, persistent=False)
            else:
                parameter = nn.Parameter(weights)
                # Backward adds into an existing .grad in place, so all gradients land in the flat matrix.
                parameter.grad = slots.flat_grad_SP[:, columns].view(shape)
                self.register_parameter(name, parameter)
        self.a_SRI: Tensor
        self.b_SOR: Tensor

    def views(self, vector_P: Tensor) -> tuple[Tensor, Tensor]:
        """This module's A [R, I] and B [O, R] inside a flat vector of one adapter."""
        return vector_P[self._a_range].view(self._shape_of("a_SRI")), vector_P[self._b_range].view(self._shape_of("b_SOR"))

    def _shape_of(self, name: str) -> tuple[int, int]:
        rank = self._slots.max_rank
        return (rank, self.in_features) if name == "a_SRI" else (self.out_features, rank)

    @property
    def weight(self) -> Tensor:
        """The base's weight: T5 reads its dtype."""
        return self.base.weight

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Apply the base to all rows and each segment's adapter to its own. Shapes: [B, ..., I] -> [B, ..., O]."""
        y_BTO: Tensor = self.base(x_BTI)
        slots, routing = self._slots, self._slots.routing
        if slots.row_routing is not None:
            return slots.row_routing.update(y_BTO, x_BTI.to(y_BTO.dtype), self.a_SRI, self.b_SOR)
        # Gradients row by row would have to be added up again.
        num_positions = 0 if torch.is_grad_enabled() else x_BTI[0, ..., 0].numel()
        runs = routing.runs(self.bound_slots, slots.ranks, slots.scalings, slots.device, num_positions)
        assert routing.num_rows in (0, x_BTI.shape[0]), f"segments cover {routing.num_rows} rows, the batch has {x_BTI.shape[0]}"
        if not runs:
            return y_BTO
        if routing.dropout_keys is not None and any(slots.dropouts[slot] for run in runs for slot in run.slots):
            x_BTI = x_BTI * self._dropout_mask(x_BTI, routing.dropout_keys, runs)
        x_BTI = x_BTI.to(y_BTO.dtype).contiguous()
        if torch.is_grad_enabled() and type(self.base) is not nn.Linear:
            # A quantised layer may return a view that autograd lets nobody change in place.
            y_BTO = y_BTO.clone()
        updated: Tensor = _AddUpdates.apply(y_BTO, x_BTI, self.a_SRI, self, runs)  # type: ignore[no-untyped-call]
        return updated

    def halves(self, run: Run, like: Tensor) -> tuple[Tensor, Tensor]:
        """The A's [G, R, I] and B's [G, O, R] of a run's slots, at the largest of their ranks, in the dtype of `like`."""
        a_GRI, b_GOR = run.of(self.a_SRI[:, : run.rank]), run.of(self.b_SOR[:, :, : run.rank])
        return a_GRI.to(like.dtype), b_GOR.to(like.dtype)

    def add_gradients(self, run: Run, grad_a_GRI: Tensor, grad_b_GOR: Tensor) -> None:
        """Add to the gradients of a run's slots."""
        assert self.a_SRI.grad is not None
        assert self.b_SOR.grad is not None
        run.add_to(self.a_SRI.grad[:, : run.rank], grad_a_GRI)
        run.add_to(self.b_SOR.grad[:, :, : run.rank], grad_b_GOR)

    def _dropout_mask(self, x_BTI: Tensor, keys: Sequence[int], runs: Sequence[Run]) -> Tensor:
        """One mask per row and feature, hashed from the row's key and the module's name: nothing beside them changes it.

        Source: variational dropout (arXiv 1512.05287); integer hash lowbias32 (github.com/skeeto/hash-prospector).
        """
        keys_B1 = torch.tensor(keys, device=x_BTI.device)[:, None]
        p_B1 = torch.zeros(x_BTI.shape[0], 1, device=x_BTI.device)
        for run in runs:
            rates_G = torch.tensor([self._slots.dropouts[slot] for slot in run.slots], device=x_BTI.device)
            p_B1[run.start : run.end, 0] = rates_G.repeat_interleave((run.end - run.start) // len(run.slots))
        features_I = torch.arange(self.in_features, device=x_BTI.device)
        uniform_BI = _hash32(_hash32(keys_B1 ^ self._dropout_key) + features_I).float() / 2**32
        mask_BI = (uniform_BI >= p_B1).float() / (1 - p_B1)
        return mask_BI.view(x_BTI.shape[0], *[1] * (x_BTI.dim() - 2), self.in_features).to(x_BTI.dtype)


class _AddUpdates(torch.autograd.Function):
    """Add the updates in place, a run of like segments as one batched product, and the gradients straight into the
    flat matrix: few operations, however many adapters, and few bytes moved.

    Products have the rank as their first dimension (A x^T, not x A^T), which CPU libraries do faster.
    """

    @staticmethod
    def forward(ctx: Any, y_BTO: Tensor, x_BTI: Tensor, anchor: Tensor, layer: MultiLoraLinear, runs: list[Run]) -> Tensor:
        """`anchor` only makes the result require a gradient; the weights are read from `layer`."""
        ctx.mark_dirty(y_BTO)
        hidden: list[Tensor] = []
        for run in runs:
            a_GRI, b_GOR = layer.halves(run, y_BTO)
            h_GRN = torch.bmm(a_GRI, run.rows(x_BTI).mT).mul_(run.scaling_G11)
            run.rows(y_BTO).baddbmm_(h_GRN.mT, b_GOR.mT)
            hidden.append(h_GRN)
        if anchor.requires_grad:
            ctx.save_for_backward(x_BTI, *hidden)
            ctx.layer, ctx.runs = layer, runs
        return y_BTO

    @staticmethod
    def backward(ctx: Any, grad_y_BTO: Tensor) -> tuple[Tensor | None, ...]:
        """Pass y's gradient on, add A's and B's to the flat matrix, and give x its share."""
        x_BTI, *hidden = ctx.saved_tensors
        layer: MultiLoraLinear = ctx.layer
        grad_y_BTO = grad_y_BTO.contiguous()
        grad_x_BTI: Tensor | None = None
        if ctx.needs_input_grad[1]:
            has_all_rows = sum(run.end - run.start for run in ctx.runs) == len(x_BTI)
            grad_x_BTI = torch.empty_like(x_BTI) if has_all_rows else torch.zeros_like(x_BTI)
        for run, h_GRN in zip(ctx.runs, hidden, strict=True):
            a_GRI, b_GOR = layer.halves(run, x_BTI)
            grad_y_GNO = run.rows(grad_y_BTO)
            grad_h_GRN = torch.bmm(b_GOR.mT, grad_y_GNO.mT).mul_(run.scaling_G11)
            layer.add_gradients(run, torch.bmm(grad_h_GRN, run.rows(x_BTI)), torch.bmm(h_GRN, grad_y_GNO).mT)
            if grad_x_BTI is not None:
                torch.bmm(grad_h_GRN.mT, a_GRI, out=run.rows(grad_x_BTI))
        return grad_y_BTO, grad_x_BTI, None, None, None


def _hash32(x: Tensor) -> Tensor:
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
