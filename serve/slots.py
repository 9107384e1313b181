"""Which adapter sits in which slot: least recently used goes first, an adapter in use is pinned. Plain values, no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from multilora.errors import CapacityError


@dataclass(frozen=True)
class Placement:
    """Where an adapter sits, and what has to happen before it answers."""

    slot: int
    must_load: bool
    evicted: str | None


class SlotTable:
    """Slot occupancy by adapter key (`task@version`)."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))[::-1]
        self._slot_of: OrderedDict[str, int] = OrderedDict()

    @property
    def residents(self) -> dict[str, int]:
        """Resident adapters and their slots, least recently used first."""
        return dict(self._slot_of)

    def assign(self, key: str, pinned: Collection[str] = (), spared: Collection[str] = ()) -> Placement:
        """Give `key` a slot, evicting the least recently used adapter that is not pinned; a spared one only for want of others.

        Raises CapacityError when every slot is pinned.
        """
        if key in self._slot_of:
            self._slot_of.move_to_end(key)
            return Placement(self._slot_of[key], must_load=False, evicted=None)
        evicted = None
        if not self._free:
            evictable = [other for other in self._slot_of if other not in pinned]
            evicted = min(evictable, key=lambda other: other in spared, default=None)
            if evicted is None:
                raise CapacityError(f"all {len(self._slot_of)} slots are in use; retry, or serve with more slots")
            self.release(evicted)
        slot = self._free.pop()
        self._slot_of[key] = slot
        return Placement(slot, must_load=True, evicted=evicted)

    def release(self, key: str) -> int | None:
        """Free the slot of `key`; returns it, or None where it had none."""
        slot = self._slot_of.pop(key, None)
        if slot is not None:
            self._free.append(slot)
        return slot
