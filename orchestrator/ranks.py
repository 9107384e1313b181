"""The workers (ranks) of a data-parallel training: each takes a share of the rows, and all of them decide alike.

A single rank talks to nobody and needs no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from multilora.errors import CapacityError

T = TypeVar("T")


class RankError(CapacityError):
    """What one rank had no room for, raised on all of them."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class Ranks:
    """This worker's place among the others. All ranks must call the methods in the same order."""

    rank: int = 0
    size: int = 1
    nccl: dist.ProcessGroup | None = None
    """Sums gradients between GPUs; everything else goes through the default process group, which is gloo's."""

    @classmethod
    def of_process_group(cls, device: torch.device) -> Ranks:
        """The ranks of the default process group, this one with its base on `device`."""
        ranks = cls(dist.get_rank(), dist.get_world_size())
        if ranks.size > 1 and all(ranks.gather(device.type == "cuda" and dist.is_nccl_available())):
            return replace(ranks, nccl=dist.new_group(backend="nccl"))
        return ranks

    def gather(self, value: T) -> list[T]:
        """The value of each rank, the same list on all."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, ask: Callable[[], T]) -> T:
        """What `ask` gives on rank 0, which alone is asked."""
        if self.size == 1:
            return ask()
        answer = [ask() if self.rank == 0 else None]
        dist.broadcast_object_list(answer)
        return answer[0]  # type: ignore[return-value]

    def together(self, attempt: Callable[[], T]) -> list[T]:
        """Gather what `attempt` gives on each rank; a CapacityError of one is raised on all, so that none waits for it."""
        try:
            outcome: T | CapacityError = attempt()
        except CapacityError as error:
            outcome = CapacityError(str(error))  # its traceback would keep the tensors that did not fit
        results: list[T] = []
        for rank, result in enumerate(self.gather(outcome)):
            if isinstance(result, CapacityError):
                raise RankError(str(result), rank)
            results.append(result)
        return results

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        if self.nccl is not None:
            dist.all_reduce(tensor, group=self.nccl)
        elif self.size > 1:
            host = tensor.cpu()
            dist.all_reduce(host)
            tensor.copy_(host)


ALONE = Ranks()
"""A worker that trains its group by itself."""


def balanced_shares(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Row indices of each rank's share, with about as many tokens in each: the longest row left goes to the emptiest share."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        load, rank = loads[0]
        shares[rank].append(row)
        heapreplace(loads, (load + lengths[row], rank))
    return [sorted(share) for share in shares]
