"""How the rows of a forward pass reach their slots: neighbours of like rank become one batched product.

Dims: G segments of a run, N rows x positions of one segment (or positions of a row), F features; as in lora.py: S slots,
R rank, I and O features, B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora.errors import AdapterError
from multilora.segments import Segment, product_runs


@dataclass(frozen=True)
class Run:
    """Neighbouring segments of equal length and like rank; a slot's rows may be several segments."""

    slots: tuple[int, ...]
    start: int
    """First row."""
    end: int
    """Row after the last."""
    rank: int
    """Largest rank of the slots; what is beyond a slot's own is zero."""
    index: slice | Tensor
    """Picks the slots out of stacked weights, as a view where they lie side by side."""
    scaling_G11: Tensor

    def rows(self, x_BTF: Tensor) -> Tensor:
        """View this run's rows of a contiguous tensor, one matrix per segment: [G, N, F]."""
        return x_BTF[self.start : self.end].view(len(self.slots), -1, x_BTF.shape[-1])

    def of(self, stacked: Tensor) -> Tensor:
        """Pick each segment's weights out of those of all slots: [S, ...] -> [G, ...]."""
        return stacked[self.index] if isinstance(self.index, slice) else stacked.index_select(0, self.index)

    def add_to(self, stacked: Tensor, values: Tensor) -> None:
        """Add one value per segment to its slot's place in stacked weights; a slot may have several segments."""
        if isinstance(self.index, slice):
            stacked[self.index] += values
        else:
            stacked.index_add_(0, self.index, values.to(stacked.dtype))


class Routing:
    """The segments of the forward passes inside one `AdapterSlots.using`, and the runs that they make for a module."""

    def __init__(self, segments: Sequence[Segment], dropout_keys: Sequence[int] | None) -> None:
        self.segments = tuple(segments)
        self.dropout_keys = None if dropout_keys is None else tuple(dropout_keys)
        self.num_rows = sum(segment.num_rows for segment in segments)
        self._spans: list[tuple[int, int, int]] = []
        row = 0
        for segment in segments:
            if segment.slot is not None:
                self._spans.append((segment.slot, row, row + segment.num_rows))
            row += segment.num_rows
        self._slots = frozenset(slot for slot, _, _ in self._spans)
        self._runs_of: dict[tuple[frozenset[int], bool], list[Run]] = {}

    def runs(
        self,
        bound_slots: AbstractSet[int],
        ranks: Sequence[int],
        scalings: Sequence[float],
        device: torch.device,
        num_positions: int,
    ) -> list[Run]:
        """The runs for a module that the adapters in `bound_slots` change, over rows of so many positions.

        They are laid out once for all modules alike. Raises AdapterError where rows are routed to an empty slot.
        """
        wanted = self._slots & bound_slots
        by_row = num_positions >= max((ranks[slot] for slot in wanted), default=0)
        if (wanted, by_row) not in self._runs_of:
            empty = sorted(slot for slot in self._slots if not ranks[slot])
            if empty:
                raise AdapterError(f"slot {empty[0]} is empty")
            spans = [span for span in self._spans if span[0] in wanted]
            runs = product_runs(spans, ranks, by_row=by_row)
            self._runs_of[wanted, by_row] = [_run(run, ranks, scalings, device) for run in runs]
        return self._runs_of[wanted, by_row]


@dataclass(frozen=True)
class RowRouting:
    """A slot for each row, as tensors: what a recorded pass is given anew each time. Every row is a product of its own."""

    slot_B: Tensor
    scaling_B11: Tensor
    """Zero for rows of the base alone."""
    rank: int
    """At least the largest of the slots' ranks; what is beyond a slot's own is zero."""

    def update(self, y_BTO: Tensor, x_BTI: Tensor, a_SRI: Tensor, b_SOR: Tensor) -> Tensor:
        """Add each row's update in place."""
        if not self.rank:
            return y_BTO
        a_BRI = a_SRI[:, : self.rank].index_select(0, self.slot_B)
        b_BOR = b_SOR[:, :, : self.rank].index_select(0, self.slot_B)
        num_rows = y_BTO.shape[0]
        h_BRN = torch.bmm(a_BRI, x_BTI.reshape(num_rows, -1, x_BTI.shape[-1]).mT).mul_(self.scaling_B11)
        y_BTO.view(num_rows, -1, y_BTO.shape[-1]).baddbmm_(h_BRN.mT, b_BOR.mT)
        return y_BTO


def _run(spans: Sequence[tuple[int, int, int]], ranks: Sequence[int], scalings: Sequence[float], device: torch.device) -> Run:
    slots = tuple(slot for slot, _, _ in spans)
    is_side_by_side = slots == tuple(range(slots[0], slots[0] + len(slots)))
    return Run(
        slots=slots,
        start=spans[0][1],
        end=spans[-1][2],
        rank=max(ranks[slot] for slot in slots),
        index=slice(slots[0], slots[-1] + 1) if is_side_by_side else torch.tensor(slots, device=device),
        # float32 also over a bfloat16 base: products with it are rounded once.
        scaling_G11=torch.tensor([scalings[slot] for slot in slots], device=device)[:, None, None],
    )
