"""What does a mixed batch of many adapters cost over the base's own forward pass?

32 rows of 64 tokens (T5: and one decoder step), rows shared out evenly among the adapters; 64 adapters have one row each of 64.
Ratios are time over the base's forward: `all_linear_16_fp32` is ours with 16 adapters, `peft_...` PEFT's mixed batch
(`adapter_names`), `peft_one_...` PEFT with one adapter, `split_...` our layer with one forward pass per adapter;
`growth_1_to_32` is our time with 32 adapters over our time with one. The oracle is PEFT with the same tensors. Where the CPU has
no bfloat16 products, rows have 2 tokens in bf16 and its ratios say little: see `has_fast_bf16` under `machine`.

    python benchmarks/mixed_batch.py [--quick] [--json FILE] [--rounds N] [--device cuda]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # torch reads it when it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from benchmarks.shapes import ALPHA, DTYPES, QV, RANK, SHAPES, build_model, peft_copy, shared_copy, slots_like
from benchmarks.timing import Report, Row, has_fast_bf16, interleave, median, ratio, read_settings
from multilora.lora import AdapterSlots
from multilora.segments import Segment, order_by_slot, segments_of
from multilora.target_modules import match_modules

NUM_ROWS = {"cpu": 32, "cuda": 64}
NUM_TOKENS, NUM_TOKENS_SLOW = 64, 2
PREFIXES = {"cpu": {"flan-t5-small": "", "minilm": "minilm_"}, "cuda": {"flan-t5-base": "", "minilm": "minilm_"}}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
"""Share of the largest output by which equal results may differ; bfloat16 has 8 bits of mantissa."""
QUICK = {
    "all_linear_fp32": [1, 16, 32],
    "qv_fp32": [16],
    "all_linear_bf16": [16],
}
"""Groups of a quick run, all over T5, with their numbers of adapters."""
COUNTED = (1, 4, 16)
"""Numbers of adapters whose operations are counted."""


@dataclass(frozen=True)
class Bench:
    """One base, target and dtype: the base alone, PEFT's adapters on it, and the same adapters in our slots."""

    prefix: str
    target: str
    dtype: str
    model: PreTrainedModel
    adapted: PeftModel
    ours: PreTrainedModel
    slots: AdapterSlots
    vocab_size: int
    num_tokens: int

    @property
    def group(self) -> str:
        """Name in the table."""
        return f"{self.prefix}{self.target}_{self.dtype}"

    def tokens(self, num_rows: int, num_tokens: int = 0) -> Tensor:
        """Random token ids [rows, tokens]."""
        shape = (num_rows, num_tokens or self.num_tokens)
        return torch.randint(5, self.vocab_size, shape, generator=torch.Generator().manual_seed(num_rows)).to(self.slots.device)

    def run_base(self, ids_BT: Tensor) -> Tensor:
        """The base alone."""
        with torch.inference_mode():
            return outputs(self.model, ids_BT)

    def run_peft(self, ids_BT: Tensor, names: list[str] | None) -> Tensor:
        """PEFT: its active adapter, or one adapter name a row."""
        with torch.inference_mode():
            return outputs(self.adapted, ids_BT, **({"adapter_names": names} if names else {}))

    def run_ours(self, ids_BT: Tensor, segments: list[Segment]) -> Tensor:
        """Our layer."""
        with torch.inference_mode(), self.slots.using(segments):
            return outputs(self.ours, ids_BT)

    def run_split(self, ids_BT: Tensor, segments: list[Segment]) -> Tensor:
        """Our layer, one forward pass per adapter."""
        parts = torch.split(ids_BT, [segment.num_rows for segment in segments])
        return torch.cat([self.run_ours(part, [segment]) for part, segment in zip(parts, segments, strict=True)])


class CountOperations(TorchDispatchMode):
    """Counts the aten operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def main() -> int:
    """Run every group and report."""
    settings = read_settings(__doc__ or "", quick_rounds=3, full_rounds=9)
    num_rows = NUM_ROWS[settings.device.type]
    config = {"rank": RANK, "alpha": ALPHA, "num_rows": num_rows, "num_tokens": NUM_TOKENS, "tolerances": TOLERANCES}
    config["num_tokens_bf16"] = NUM_TOKENS if has_fast_bf16(settings.device) else NUM_TOKENS_SLOW
    report = Report("mixed_batch", settings, config)
    for shape, prefix in PREFIXES[settings.device.type].items():
        if settings.is_quick and prefix:
            continue
        model = build_model(shape, torch.float32, settings.device)
        # PEFT takes longer for every adapter that it adds, so each target's are built once.
        num_adapters = 16 if settings.is_quick else 64
        adapted = {
            target: peft_copy(model, match_modules(model, modules), num_adapters)
            for target, modules in (("all_linear", "all-linear"), ("qv", QV[SHAPES[shape].model_type]))
        }
        for dtype in DTYPES:
            model.to(DTYPES[dtype])
            for target in adapted:
                group = f"{prefix}{target}_{dtype}"
                if settings.is_quick and group not in QUICK:
                    continue
                bench = prepare(prefix, target, dtype, model, adapted[target].to(DTYPES[dtype]))
                measure(bench, report, QUICK[group] if settings.is_quick else [1, 4, 16, 32, 64], num_rows)
                if group == "all_linear_fp32":
                    count_operations(bench, report)
    return report.finish()


def prepare(prefix: str, target: str, dtype: str, model: PreTrainedModel, adapted: PeftModel) -> Bench:
    """Put PEFT's adapters into our slots on another copy of the base; more slots than adapters hold the first ones again."""
    ours = shared_copy(model)
    slots = slots_like(ours, adapted, max(32, len(adapted.peft_config)))
    num_tokens = NUM_TOKENS if dtype == "fp32" or has_fast_bf16(model.device) else NUM_TOKENS_SLOW
    return Bench(prefix, target, dtype, model, adapted, ours, slots, model.config.vocab_size, num_tokens)


def outputs(model: nn.Module, ids_BT: Tensor, **options: object) -> Tensor:
    """Logits after one decoder step of a T5 [B, V], hidden states of an encoder [B, T, H]."""
    if model.config.is_encoder_decoder:
        start_B1 = torch.zeros_like(ids_BT[:, :1])
        return model(input_ids=ids_BT, decoder_input_ids=start_B1, use_cache=False, **options).logits[:, 0]
    return model(input_ids=ids_BT, **options).last_hidden_state


def measure(bench: Bench, report: Report, counts: list[int], num_rows: int) -> None:
    """Check the results of all variants of one group, then time them side by side."""
    is_quick = report.settings.is_quick
    ids_of = {f"base_{rows}": bench.tokens(rows) for rows in sorted({max(num_rows, count) for count in counts})}
    variants: dict[str, Callable[[], Tensor]] = {name: partial(bench.run_base, ids_BT) for name, ids_BT in ids_of.items()}
    base_outputs = {name: run() for name, run in variants.items()}
    off = bench.run_ours(ids_of[f"base_{num_rows}"], [Segment(None, num_rows)])
    difference = farthest(off, base_outputs[f"base_{num_rows}"])
    report.add(Row(bench.group, "slot None against base", difference=difference, tolerance=0.0))
    base_of, differences = {}, {}
    if not is_quick:
        variants["peft_one"] = partial(bench.run_peft, ids_of[f"base_{num_rows}"], None)
        base_of["peft_one"] = f"base_{num_rows}"
        variants["peft_one"]()
    for count in counts:
        base = f"base_{max(num_rows, count)}"
        ids_BT, segments = ids_of[base], even_segments(max(num_rows, count), count)
        calls = {f"ours_{count}": partial(bench.run_ours, ids_BT, segments)}
        if count > 1 and not is_quick:
            calls[f"split_{count}"] = partial(bench.run_split, ids_BT, segments)
        results = {name: run() for name, run in calls.items()}
        if count == 16 or not is_quick:
            calls[f"peft_{count}"] = partial(bench.run_peft, ids_BT, names_of(segments))
            expected = calls[f"peft_{count}"]()
            tolerance = allowed(bench, expected, base_outputs[base])
            differences |= {name: (farthest(result, expected), tolerance) for name, result in results.items()}
        variants |= calls
        base_of |= dict.fromkeys(calls, base)
    times = interleave(variants, report.settings)
    for name in variants:
        over_base = ratio(times, name, base_of[name]) if name in base_of else None
        note = f"{bench.num_tokens} tokens a row, {len(times[name])} rounds"
        report.add(Row(bench.group, name, median(times, name), over_base, *differences.get(name, (None, None)), note))
        if over_base:
            report.ratios[ratio_name(bench, name)] = over_base
    if {"ours_1", "ours_32"} <= set(times) and (bench.target, bench.dtype) == ("all_linear", "fp32"):
        report.ratios[f"{bench.prefix}growth_1_to_32"] = ratio(times, "ours_32", "ours_1")


def ratio_name(bench: Bench, variant: str) -> str:
    """ours_16 -> all_linear_16_fp32, peft_16 -> peft_all_linear_16_fp32, peft_one -> peft_one_all_linear_fp32."""
    if variant == "peft_one":
        return f"{bench.prefix}peft_one_{bench.target}_{bench.dtype}"
    kind, count = variant.split("_")
    return f"{bench.prefix}{'' if kind == 'ours' else kind + '_'}{bench.target}_{count}_{bench.dtype}"


def count_operations(bench: Bench, report: Report) -> None:
    """Count aten operations of a forward pass: on a GPU each is a launch, so they must not grow with the adapters.

    Segments of equal length are one product: evenly shared rows are one, unevenly shared ones here are two.
    """
    ids_BT = bench.tokens(32, 2)
    counts: dict[str, dict[int, int]] = {"base": {}, "ours": {}, "ours, uneven rows": {}, "peft": {}}
    counted_adapters = COUNTED[1:] if report.settings.is_quick else COUNTED
    for num_adapters in counted_adapters:
        with torch.inference_mode():
            for name, segments in (("ours", even_segments(32, num_adapters)), ("ours, uneven rows", uneven(32, num_adapters))):
                counts[name][num_adapters], seen = counted(partial(bench.run_ours, ids_BT, segments))
                expected = bench.run_peft(ids_BT, names_of(segments))
                tolerance = allowed(bench, expected, bench.run_base(ids_BT))
                difference = farthest(seen, expected)
                report.add(Row(f"{bench.prefix}operations", f"{name}, {num_adapters}", None, None, difference, tolerance))
            counts["base"][num_adapters], _ = counted(partial(bench.run_base, ids_BT))
            names = names_of(even_segments(32, num_adapters))
            counts["peft"][num_adapters], _ = counted(partial(bench.run_peft, ids_BT, names))
    report.extra.setdefault("operations", {})[bench.prefix or "t5"] = counts  # type: ignore[index]
    for name, of in counts.items():
        growth = max(0, of[COUNTED[-1]] - of[COUNTED[1]]) if name.startswith("ours") else None
        note = "operations with " + ", ".join(f"{num_adapters}: {count:,}" for num_adapters, count in of.items())
        report.add(Row(f"{bench.prefix}operations", name, difference=growth, tolerance=0.0, note=note))


def counted(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Number of operations, and the result."""
    with CountOperations() as mode:
        result = run()
    return mode.count, result


def even_segments(num_rows: int, num_adapters: int) -> list[Segment]:
    """Share the rows out evenly."""
    return [Segment(slot, num_rows // num_adapters) for slot in range(num_adapters)]


def uneven(num_rows: int, num_adapters: int) -> list[Segment]:
    """Share the rows out so that half of the adapters have three times as many as the others, in the order of `order_by_slot`."""
    mean = num_rows // num_adapters
    shift = 0 if num_adapters == 1 else mean // 2
    slots = [slot for slot in range(num_adapters) for _ in range(mean + (shift if slot % 2 else -shift))]
    return list(segments_of([slots[row] for row in order_by_slot(slots, [RANK] * num_adapters)]))


def names_of(segments: list[Segment]) -> list[str]:
    """PEFT's adapter name of every row."""
    return [str(segment.slot) for segment in segments for _ in range(segment.num_rows)]


def farthest(x: Tensor, y: Tensor) -> float:
    """Largest absolute difference."""
    return (x.float() - y.float()).abs().max().item()


def allowed(bench: Bench, expected: Tensor, base: Tensor) -> float:
    """Tolerance for these outputs; adapters that change the base by less would prove nothing."""
    tolerance = TOLERANCES[bench.dtype] * expected.abs().max().item()
    assert farthest(expected, base) > 2 * tolerance, "the adapters hardly change the base"
    return tolerance


if __name__ == "__main__":
    raise SystemExit(main())
