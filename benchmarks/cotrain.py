"""How much faster do N adapters train in one group than one after another with plain PEFT?

A step is forward, backward and optimiser step of all N adapters over a tiny T5; `short` is 4 rows of 32 tokens an adapter,
`long` 8 of 128 (GPU: Flan-T5-base, 8 of 64). Ratios are PEFT's time over ours: larger is better; `short_8_vs_peft` is N = 8 in
bf16. PEFT's side is the loop of the transformers Trainer (fused AdamW, clipping, linear rate, autocast for bf16), with one model
per adapter over shared base weights, so that it never has to switch; `processes` (full runs) are such loops in processes with one
thread each. The oracle is PEFT with the same initial adapters and data, and solo training for the group.

Arithmetic is not shared: every token costs 4 FLOPs a base parameter, forward and backward, whoever its adapter is. `share of
ceiling` is the time that these FLOPs take at the rate of a large product, over our time. Where the CPU has no bfloat16 products,
bf16 runs with 1 row of 8 tokens and its ratios say little: see `has_fast_bf16` under `machine`.

    python benchmarks/cotrain.py [--quick] [--json FILE] [--rounds N] [--device cuda]
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # torch reads it when it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.shapes import DTYPES, RANK, build_model, peft_copy, peft_layers, peft_tensors, shared_copy
from benchmarks.synthetic import LEARNING_RATE, Task, group_of, tasks_of
from benchmarks.timing import Report, Row, gemm_flops, has_fast_bf16, interleave, median, ratio, read_settings, seconds_of
from multilora.spec import TrainSpec
from multilora.target_modules import match_modules
from orchestrator.trainer import GroupTrainer

SIZES = {"cpu": {"short": (4, 32), "long": (8, 128)}, "cuda": {"short": (8, 64)}}
"""(rows, tokens) of one adapter's batch."""
SLOW_SIZE = (1, 8)
SHAPE = {"cpu": "tiny-t5", "cuda": "flan-t5-base"}
COUNTS = {"cpu": [1, 2, 4, 8, 16], "cuda": [1, 2, 4, 8, 16, 32]}
QUICK = [(size, count, dtype) for size, count in (("short", 8), ("short", 1), ("long", 8)) for dtype in ("bf16", "fp32")]
LOSS_TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
"""Share of the loss by which training may differ from the oracle's; bfloat16 has 8 bits of mantissa."""
WEIGHT_TOLERANCE = 1e-3
"""Between group and solo training in float32: length of an adapter's difference as a share of how far training moved it.

Adam's first steps are as long for a gradient that is all rounding as for any other, so single weights differ by up to a step:
on some CPUs, whose products of one and of eight matrices round differently.
"""
NUM_SOLO_STEPS = 3
NUM_PROCESS_STEPS = 20
build_once = cache(build_model)


@dataclass
class PeftLoop:
    """Trains one adapter as the transformers Trainer does."""

    model: PeftModel
    task: Task
    dtype: str
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self) -> None:
        """Take one optimiser step."""
        device = self.parameters[0].device
        step = len(self.losses)
        rows, answers = self.task.batch(step)
        ids_BT = torch.tensor(rows).to(device)
        labels_BT = torch.tensor(answers).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            loss = self.model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, TrainSpec().max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / self.task.num_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


@dataclass
class Group:
    """Trains adapters together with GroupTrainer."""

    trainer: GroupTrainer
    losses: list[dict[int, float]] = field(default_factory=list)

    def step(self) -> None:
        """Take one optimiser step of every adapter."""
        batch = self.trainer.next_batch()
        self.losses.append(self.trainer.forward_backward(batch))
        self.trainer.optim_step(self.losses[-1])


def main() -> int:
    """Run every group and report."""
    settings = read_settings(__doc__ or "", quick_rounds=3, full_rounds=9)
    device = settings.device
    config = {"shape": SHAPE[device.type], "sizes": SIZES[device.type], "rank": RANK, "loss_tolerances": LOSS_TOLERANCES}
    config |= {"weight_tolerance": WEIGHT_TOLERANCE, "bf16_size": None if has_fast_bf16(device) else SLOW_SIZE}
    report = Report("cotrain", settings, config)
    rates = {name: gemm_flops(dtype, device, 256 if is_slow(name, device) else 2048) for name, dtype in DTYPES.items()}
    report.extra["gemm_flops_per_s"] = rates
    models = {name: build_model(SHAPE[device.type], dtype, device) for name, dtype in DTYPES.items()}
    plan = [(size, count, dtype) for size in SIZES[device.type] for count in COUNTS[device.type] for dtype in ("bf16", "fp32")]
    for size, count, dtype in [entry for entry in QUICK if entry in plan] if settings.is_quick else plan:
        measure(models[dtype], size, count, dtype, rates[dtype], report)
    compare_with_solo(models["fp32"], report)
    return report.finish()


def is_slow(dtype: str, device: torch.device) -> bool:
    """Whether this machine has no fast products for a dtype."""
    return dtype == "bf16" and not has_fast_bf16(device)


def size_of(size: str, dtype: str, device: torch.device) -> tuple[int, int]:
    """(rows, tokens) of one adapter's batch."""
    return SLOW_SIZE if is_slow(dtype, device) else SIZES[device.type][size]


def measure(model: PreTrainedModel, size: str, count: int, dtype: str, rate: float, report: Report) -> None:
    """Train N adapters both ways side by side."""
    settings = report.settings
    num_rows, num_tokens = size_of(size, dtype, settings.device)
    tasks = tasks_of(count, num_rows, num_tokens)
    loops = peft_loops(model, tasks, dtype)
    group = group_like(model, tasks, loops)
    variants = {"ours": group.step, "peft": lambda: [loop.step() for loop in loops]}
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    variants["ours"]()
    peak = peak_memory(settings.device)
    variants["peft"]()
    times = interleave(variants, settings)
    difference = max(abs(losses[slot] - loops[slot].losses[step]) for step, losses in enumerate(group.losses) for slot in losses)
    tolerance = LOSS_TOLERANCES[dtype] * max(max(loop.losses) for loop in loops)
    name = f"{size}_{count}_vs_peft" + ("" if dtype == "bf16" else f"_{dtype}")
    speedup = report.ratios[name] = ratio(times, "peft", "ours")
    flops = num_flops(model, count * num_rows, num_tokens)
    share = report.ratios[name.replace("vs_peft", "share_of_ceiling")] = flops / rate / median(times, "ours")
    label = f"{size}_{count}_{dtype}"
    note = f"{num_rows} x {num_tokens} tokens each, {len(times['peft'])} rounds"
    report.add(Row(label, "PEFT, one after another", median(times, "peft"), 1.0, note=note))
    note = f"{share:.0%} of ceiling" + peak
    report.add(Row(label, "ours, one group", median(times, "ours"), speedup, difference, tolerance, note))
    if not settings.is_quick and settings.device.type == "cpu":
        seconds = seconds_in_processes(dtype, count, num_rows, num_tokens)
        report.ratios[name.replace("vs_peft", "vs_processes")] = seconds / median(times, "ours")
        report.add(Row(label, "PEFT, one process each", seconds, median(times, "peft") / seconds))


def peft_loops(model: PreTrainedModel, tasks: list[Task], dtype: str) -> list[PeftLoop]:
    """One plain PEFT training per task, with weights of its own seed."""
    names = match_modules(model, "all-linear")
    loops = []
    for seed, task in enumerate(tasks):
        torch.manual_seed(seed)
        loops.append(PeftLoop(peft_copy(model, names, 1, is_trainable=True), task, dtype))
    return loops


def group_like(model: PreTrainedModel, tasks: list[Task], loops: list[PeftLoop]) -> Group:
    """The same trainings as one group: same tasks, same initial adapters."""
    trainer = group_of(shared_copy(model), tasks)
    for slot, loop in enumerate(loops):
        tensors = peft_tensors(peft_layers(loop.model), "0")
        with torch.no_grad():
            trainer.slots.flat_SP[slot] = trainer.slots.join(slot, tensors)
    return Group(trainer)


def compare_with_solo(model: PreTrainedModel, report: Report) -> None:
    """Train a group, and some of its members alone."""
    tasks = tasks_of(8, *SIZES[report.settings.device.type]["short"])
    loops = peft_loops(model, tasks, "fp32")
    group = group_like(model, tasks, loops)
    before_SP = group.trainer.slots.flat_SP.clone()
    for _ in range(NUM_SOLO_STEPS):
        group.step()
    moved_S = (group.trainer.slots.flat_SP - before_SP).norm(dim=1)
    assert moved_S.min() > 0, "training must move weights"
    losses, weights = 0.0, 0.0
    for slot in (0, 7):
        alone = group_like(model, [tasks[slot]], [loops[slot]])
        for _ in range(NUM_SOLO_STEPS):
            alone.step()
        pairs = zip(group.losses, alone.losses, strict=True)
        losses = max(losses, *(abs(together[slot] - solo[0]) for together, solo in pairs))
        difference_P: Tensor = group.trainer.slots.flat_SP[slot] - alone.trainer.slots.flat_SP[0]
        weights = max(weights, (difference_P.norm() / moved_S[slot]).item())
    tolerance = LOSS_TOLERANCES["fp32"] * max(group.losses[0].values())
    report.add(Row("short_8_fp32", "group against solo: losses", difference=losses, tolerance=tolerance))
    report.add(Row("short_8_fp32", "group against solo: weights", difference=weights, tolerance=WEIGHT_TOLERANCE))


def num_flops(model: PreTrainedModel, num_rows: int, num_tokens: int) -> float:
    """What no way of training can save: 4 FLOPs a base parameter and token, forward and backward to the activations."""
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    in_encoder = sum(size for name, size in sizes.items() if name.startswith("encoder."))
    # Keys and values of the cross-attention read the encoder's tokens; an answer has two tokens.
    crossing = sum(size for name, size in sizes.items() if name.endswith(("EncDecAttention.k", "EncDecAttention.v")))
    in_decoder = sum(sizes.values()) - in_encoder - crossing
    return 4.0 * num_rows * ((in_encoder + crossing) * num_tokens + in_decoder * 2)


def seconds_in_processes(dtype: str, count: int, num_rows: int, num_tokens: int) -> float:
    """Seconds a step of N adapters takes in processes of one thread each, as many at a time as there are cores."""
    num_processes = min(count, torch.get_num_threads())
    arguments = [(dtype, seed, num_rows, num_tokens) for seed in range(count)]
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        list(pool.map(train_in_process, arguments[:num_processes], [1] * num_processes))
        run = partial(pool.map, train_in_process, arguments, [NUM_PROCESS_STEPS] * count)
        return seconds_of(lambda: list(run()), torch.device("cpu")) / NUM_PROCESS_STEPS


def train_in_process(argument: tuple[str, int, int, int], num_steps: int) -> None:
    """Train one adapter in a process of its own."""
    dtype, seed, num_rows, num_tokens = argument
    torch.set_num_threads(1)
    model = build_once(SHAPE["cpu"], DTYPES[dtype], torch.device("cpu"))
    task = tasks_of(seed + 1, num_rows, num_tokens)[seed]
    (loop,) = peft_loops(model, [task], dtype)
    for _ in range(num_steps):
        loop.step()


def peak_memory(device: torch.device) -> str:
    """Largest memory on a GPU since the last reset."""
    return f", peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if device.type == "cuda" else ""


if __name__ == "__main__":
    raise SystemExit(main())
