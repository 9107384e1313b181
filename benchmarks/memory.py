"""How many bytes does one more adapter cost over a base that is held once?

Each number is the difference between fresh processes with few and with many adapters, per further adapter. `tensors` counts every
tensor that the process holds, exactly; `resident` is the resident set of the process, what the allocator keeps back included.
Training is one row of 8 tokens an adapter, so that activations are small beside weights (4 bytes a parameter), gradients (4),
Adam's moments (8) and the best epoch's weights (4). Serving binds adapters in an Engine: an adapter's own size is its
tensors in float32. The oracle: answers of the engine are those that the adapters were written with (its canaries).

    python benchmarks/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # torch reads it when it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

import psutil
import torch

from benchmarks.shapes import ALPHA, RANK, build_model
from benchmarks.synthetic import Task, base_of, group_of, tasks_of
from benchmarks.timing import Report, Row, read_settings
from multilora.artifact import FORMAT_VERSION, Canary, TaskCard, card_fields, read_artifact, write_artifact
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import SCORER_VERSION, ScoringRow, encode_labels, score_labels
from multilora.target_modules import match_modules
from serve.engine import Engine, Work

SHAPE = "flan-t5-small"
NUM_TRAINED = {True: (1, 5), False: (1, 17)}
"""Few and many adapters; True: quick."""
NUM_SERVED = {True: (2, 10), False: (2, 34)}
NUM_STEPS, NUM_TOKENS = 2, 8
DEFAULT_SLOTS = 16
MIB = 2**20


class Held(NamedTuple):
    """What one process holds."""

    tensor_bytes: int
    resident_bytes: int
    error: float
    """Largest difference to the oracle."""


def main() -> int:
    """Measure training and serving and report."""
    settings = read_settings(__doc__ or "", quick_rounds=1, full_rounds=1, has_cuda=False)
    torch.set_grad_enabled(False)
    few, many = NUM_TRAINED[settings.is_quick]
    report = Report("memory", settings, {"shape": SHAPE, "rank": RANK, "num_trained": [few, many]})
    model = build_model(SHAPE, torch.float32, torch.device("cpu"))
    names = match_modules(model, "all-linear")
    num_parameters = sum(RANK * (m.in_features + m.out_features) for m in map(model.get_submodule, names))
    report.extra |= {"num_adapter_parameters": num_parameters, "adapter_bytes": 4 * num_parameters}
    trained = per_adapter(in_fresh_process(train, few), in_fresh_process(train, many), many - few)
    report.ratios["training_bytes_per_parameter"] = trained.tensor_bytes / num_parameters
    report.ratios["training_resident_bytes_per_parameter"] = trained.resident_bytes / num_parameters
    add(report, "training", "tensors", trained.tensor_bytes, num_parameters, "bytes a parameter", trained.error)
    add(report, "training", "resident", trained.resident_bytes, num_parameters, "bytes a parameter")
    few, many = NUM_SERVED[settings.is_quick]
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(write_adapters, folder, many)
        for name, slots_of in (("", lambda count: count), ("fixed_slots_", lambda count: DEFAULT_SLOTS)):
            held = [in_fresh_process(serve, folder, count, slots_of(count)) for count in (few, many)]
            served = per_adapter(*held, many - few)
            report.ratios[f"serving_{name}size_ratio"] = served.tensor_bytes / (4 * num_parameters)
            report.ratios[f"serving_{name}resident_size_ratio"] = served.resident_bytes / (4 * num_parameters)
            group = "serving, 16 slots" if name else "serving, a slot for each"
            add(report, group, "tensors", served.tensor_bytes, 4 * num_parameters, "times its size", served.error)
            add(report, group, "resident", served.resident_bytes, 4 * num_parameters, "times its size")
    return report.finish()


def add(report: Report, group: str, variant: str, size: int, unit: int, unit_name: str, error: float | None = None) -> None:
    """Note bytes per further adapter."""
    note = f"{unit_name}; {size / MIB:.2f} MiB per further adapter"
    report.add(Row(group, variant, None, size / unit, error, 1e-3, note))


def in_fresh_process(run: Callable[..., Held | None], *arguments: object) -> Held | None:
    """Run a function in a process that has done nothing before but import."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.synthetic", "serve.engine"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(run, *arguments).result()


def per_adapter(few: Held, many: Held, num_further: int) -> Held:
    """Share the difference out."""
    tensors, resident = ((b - a) // num_further for a, b in zip(few[:2], many[:2], strict=True))
    return Held(tensors, resident, max(few.error, many.error))


def held(error: float) -> Held:
    """Count this process's tensors, those that share a storage once, and its resident set."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # isinstance() would ask lazy modules for their class and import them.
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return Held(sum(storages.values()), psutil.Process().memory_info().rss, error)


def train(num_adapters: int) -> Held:
    """Train for some steps; in the first, fresh adapters must give the base's loss."""
    model = build_model(SHAPE, torch.float32, torch.device("cpu"))
    tasks = tasks_of(num_adapters, 1, NUM_TOKENS)
    ids_BT, labels_BT = (torch.tensor(rows) for rows in tasks[0].batch(0))
    with torch.no_grad():
        expected = model(input_ids=ids_BT, labels=labels_BT).loss.item()
    losses: list[float] = []
    trainer = group_of(model, tasks, NUM_STEPS, lambda event: losses.append(event.metrics.get("train/loss", 0.0)))
    first = next(loss for loss in losses if loss)
    counted = held(abs(first - expected))
    assert trainer.slots.num_slots == num_adapters
    return counted


def write_adapters(folder: str, count: int) -> None:
    """Write random adapters as training would, canaries included."""
    with torch.no_grad():
        base = base_of(build_model(SHAPE, torch.float32, torch.device("cpu")))
        slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), 1, RANK)
        for index, task in enumerate(tasks_of(count, 1, NUM_TOKENS)):
            generator = torch.Generator().manual_seed(index)
            slots.fresh(0, list(slots.layers), RANK, ALPHA / RANK, generator)
            tensors = {
                name: (a_RI, torch.randn(b_OR.shape, generator=generator) / 10) for name, (a_RI, b_OR) in slots.export(0).items()
            }
            slots.load(0, tensors, ALPHA / RANK)
            write_artifact(Path(folder) / task.member.spec.name, card_of(task, base, slots), tensors)


def card_of(task: Task, base, slots: AdapterSlots) -> TaskCard:  # type: ignore[no-untyped-def]
    """The task's card with one canary, scored by the adapter in slot 0."""
    prompt_format = PromptFormat.of(task.member.spec, base.family)
    columns = task.member.select[0].columns
    ids = encode_prompt(prompt_format, columns, base.tokenizer).token_ids
    (scores,) = score_labels(base, slots, [ScoringRow(ids, 0, encode_labels(base, slots, prompt_format))])
    return TaskCard(
        format_version=FORMAT_VERSION,
        task=task.member.spec.name,
        description="synthetic",
        base=base.spec,
        base_fingerprint=base.files.fingerprint,
        scorer_version=SCORER_VERSION,
        rank=RANK,
        scaling=ALPHA / RANK,
        num_modules=len(slots.layers),
        canaries=[Canary(columns=columns, scores=scores.tolist())],
        temperature=1.0,
        spec_hash="0" * 16,
        data_fingerprint="0" * 64,
        **card_fields(prompt_format),
    )


def serve(folder: str, count: int, num_slots: int) -> Held:
    """Bind `count` adapters and answer one request of each."""
    engine = Engine(base_of(build_model(SHAPE, torch.float32, torch.device("cpu"))), num_slots, RANK)
    keys, errors = [], []
    for index in range(count):
        artifact = read_artifact(Path(folder) / f"task-{index}")
        keys.append(engine.bind(artifact, version=1))
    works = [Work(key, engine.prompt(key, engine.bound(key).artifact.card.canaries[0].columns)) for key in keys]
    for key, answer in zip(keys, engine.classify(works), strict=True):
        canary = engine.bound(key).artifact.card.canaries[0]
        errors += [abs(a - b) for a, b in zip(answer.scores, canary.scores, strict=True)]
    return held(max(errors))


if __name__ == "__main__":
    raise SystemExit(main())
