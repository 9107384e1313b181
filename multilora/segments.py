"""Which run of rows of a mixed batch uses which adapter slot. Plain integers, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """`num_rows` consecutive rows that use one slot; slot None is the base model alone."""

    slot: int | None
    num_rows: int


def segments_of(slots: Sequence[int | None]) -> tuple[Segment, ...]:
    """Join neighbouring rows of equal slot into segments."""
    segments: list[Segment] = []
    for slot in slots:
        if segments and segments[-1].slot == slot:
            segments[-1] = Segment(slot, segments[-1].num_rows + 1)
        else:
            segments.append(Segment(slot, 1))
    return tuple(segments)


def order_by_slot(slots: Sequence[int | None], ranks: Sequence[int]) -> list[int]:
    """Row order that puts equal slots side by side, base rows first, and slots beside each other that make one product.

    Those have ranks of one class (`ranks` by slot), and among them equally many rows.
    """
    num_rows = Counter(slots)

    def place(row: int) -> tuple[int, int, int]:
        slot = slots[row]
        return (-1, 0, 0) if slot is None else (rank_class(ranks[slot]), num_rows[slot], slot)

    return sorted(range(len(slots)), key=place)


def rank_class(rank: int) -> int:
    """Ranks above one power of two and up to the next: padded to the largest of them they take at most twice the arithmetic."""
    return (rank - 1).bit_length() if rank else 0


Span = tuple[int, int, int]
"""Slot, first row, row after the last."""


def product_runs(spans: Sequence[Span], ranks: Sequence[int], *, by_row: bool) -> Iterator[list[Span]]:
    """Cut spans into runs that touch each other and are one product: of ranks of one class, and equally long.

    By row, neighbours of unequal length are cut into single rows, so that a class is one product: each row then reads its
    slot's weights again, which costs less than several small products while a row has no fewer positions than the rank.
    """
    for neighbours in _cut(spans, lambda span: rank_class(ranks[span[0]])):
        equal = list(_cut(neighbours, lambda span: span[2] - span[1]))
        if by_row and len(equal) > 1:
            yield [(slot, row, row + 1) for slot, start, end in neighbours for row in range(start, end)]
        else:
            yield from equal


def _cut(spans: Sequence[Span], kind: Callable[[Span], int]) -> Iterator[list[Span]]:
    run: list[Span] = []
    for span in spans:
        if run and (span[1] != run[-1][2] or kind(span) != kind(run[-1])):
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def length_batches(lengths: Sequence[int], max_tokens: int, overhead_tokens: int, multiple: int) -> list[list[int]]:
    """Cut row indices, shortest first, into batches that cost least, each within `max_tokens` after padding.

    A batch costs its padded tokens (width rounded up to `multiple`) plus `overhead_tokens` for the forward pass itself.
    One row always fits. Exact: dynamic programming over the batches that end with their width's last row or are full;
    from a batch that ends elsewhere with room left, the next row can move in at no cost.
    """
    width_of = [-(-length // multiple) * multiple for length in lengths]
    order = sorted(range(len(lengths)), key=width_of.__getitem__)
    widths = [width_of[row] for row in order]
    run_ends = [end for end in range(1, len(widths) + 1) if widths[end - 1 : end] != widths[end : end + 1]]
    best = {0: (0, 0)}  # end of a batch -> (lowest cost of the rows up to there, where that batch starts)
    for start in range(len(order)):
        for run_end in run_ends if start in best else ():
            width = widths[run_end - 1]
            end = min(run_end, start + max(1, max_tokens // width))
            if end > start and widths[end - 1] == width:
                option = (best[start][0] + (end - start) * width + overhead_tokens, start)
                best[end] = min(option, best.get(end, option))
    batches: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        batches.append(order[start:end])
        end = start
    return batches[::-1]
