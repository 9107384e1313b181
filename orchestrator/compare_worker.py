"""The parts of a comparison, on a worker: who runs each. A part has a worker task of its own, so a fresh base and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from multilora.base_model import FrozenBase, load_base
from multilora.errors import RequestError
from orchestrator.alone import alone_rows
from orchestrator.baselines import baseline_rows
from orchestrator.curve_rows import curve_rows
from orchestrator.merged_or_not import merged_rows
from orchestrator.methods import Bench, MethodRow, Part
from orchestrator.prompting import prompting_rows
from orchestrator.variants import variant_rows

RowsOf = Callable[[Bench], Iterator[MethodRow]]


def over_base(rows: Callable[[Bench, FrozenBase], Iterator[MethodRow]]) -> RowsOf:
    """Give a part the loaded base."""
    return lambda bench: rows(bench, load_base(bench.spec.base))


PARTS: Mapping[Part, RowsOf] = {
    "baselines": over_base(baseline_rows),
    "prompting": over_base(prompting_rows),
    "variants": over_base(variant_rows),
    "alone": alone_rows,
    "curve": over_base(curve_rows),
    "merged": merged_rows,
}
"""A part that must set up its own base is given the bench alone."""


def part_rows(part: Part, bench: Bench) -> Iterator[MethodRow]:
    """Give the rows of a part as it finds them. Raises whatever it raises, RequestError where nobody runs the part."""
    if part not in PARTS:
        raise RequestError(f"this version has no methods for the part {part}")
    yield from PARTS[part](bench)
