"""An encoder's forward pass, recorded as a graph that runs without Python: other threads go on meanwhile.

An ordinary pass needs Python's lock between two products, and a thread that reads requests gives it away every 5 ms only:
measured on two cores, a pass beside a busy thread takes 1.8 times as long, a recorded one as long as alone. TorchScript's
tracer is deprecated in favour of torch.export, whose graphs run in Python again, or need a compiler on the machine.

Dims: B rows, T positions, H hidden.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multilora.base_model import FrozenBase
from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.routing import RowRouting
from multilora.segments import rank_class

logger = logging.getLogger(__name__)

RECORDING = threading.Lock()
"""The tracer belongs to the whole process."""
TOLERANCE = 1e-3
"""Largest difference of a state, relative to the largest state, to the pass that was recorded."""


class RecordedReader:
    """Reads rows of any adapters in `slots`, which may come and go: their weights are looked up anew in every pass."""

    def __init__(self, base: FrozenBase, slots: AdapterSlots) -> None:
        self._base, self._slots = base, slots
        self._graphs: dict[int, Any] = {}
        """By rank: that of the rows' adapters, up to the next power of two; 0 is the base alone."""

    def __call__(self, ids_BT: Tensor, mask_BT: Tensor, slots: Sequence[int | None]) -> Tensor:
        """Return the last hidden states [B, T, H]. Raises AdapterError where a row is routed to an empty slot."""
        ranks = self._slots.ranks
        empty = sorted({slot for slot in slots if slot is not None and not ranks[slot]})
        if empty:
            raise AdapterError(f"slot {empty[0]} is empty")
        largest = max((ranks[slot] for slot in slots if slot is not None), default=0)
        rank = min(2 ** rank_class(largest), self._slots.max_rank) if largest else 0
        slot_B = torch.tensor([slot or 0 for slot in slots])
        scaling_B = torch.tensor([0.0 if slot is None else self._slots.scalings[slot] for slot in slots])
        if rank not in self._graphs:
            self.record(rank)
        states_BTH: Tensor = self._graphs[rank](ids_BT, mask_BT, slot_B, scaling_B[:, None, None])
        return states_BTH

    def record(self, rank: int) -> None:
        """Record the passes of one rank, which takes a second."""
        with RECORDING:
            self._graphs[rank] = self._graphs.get(rank) or self._recorded(rank)

    def _recorded(self, rank: int) -> Any:
        whole = _Pass(self._base.model, self._slots, rank)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's, of deprecation and of shapes
            graph = torch.jit.trace(whole, self._example(2, 5), check_trace=False)  # type: ignore[no-untyped-call]
            other = self._example(3, 8)
            expected_BTH, states_BTH = whole(*other), graph(*other)
        error = float((states_BTH - expected_BTH).abs().max() / expected_BTH.abs().max())
        if not error <= TOLERANCE:
            raise AdapterError(f"the recorded pass of base {self._base.spec.model} differs by {error:.3g} at another length")
        return graph

    def _example(self, num_rows: int, num_positions: int) -> tuple[Tensor, ...]:
        """Rows of some length with padding."""
        ids_BT = torch.arange(num_rows * num_positions).view(num_rows, -1) % self._base.model.config.vocab_size
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[0, num_positions // 2 :] = 0
        slot_B = torch.arange(num_rows) % self._slots.num_slots
        return ids_BT, mask_BT, slot_B, torch.ones(num_rows, 1, 1)


def recorded_reader(base: FrozenBase, slots: AdapterSlots) -> RecordedReader | None:
    """Return a reader for an encoder on the CPU, or None where there is nothing to gain or the base cannot be recorded."""
    if base.family != "encoder" or base.device.type != "cpu" or base.spec.quantization != "none":
        return None
    reader = RecordedReader(base, slots)
    try:
        reader.record(0)
    except Exception:  # whatever a model of some kind has that the tracer cannot follow
        logger.warning("base %s cannot be recorded: answers take longer under load", base.spec.model, exc_info=True)
        return None
    return reader


class _Pass(nn.Module):
    """A forward pass with its routing as tensors, which the tracer needs."""

    def __init__(self, model: nn.Module, slots: AdapterSlots, rank: int) -> None:
        super().__init__()
        self.model, self._slots, self._rank = model, slots, rank

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, slot_B: Tensor, scaling_B11: Tensor) -> Tensor:
        with self._slots.using_rows(RowRouting(slot_B, scaling_B11, self._rank)):
            states_BTH: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        return states_BTH
