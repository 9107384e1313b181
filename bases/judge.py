"""How good is a base to adapt? Measures it on public classification tasks that no base of ours was trained on.

    python bases/judge.py --base sentence-transformers/all-MiniLM-L6-v2 --out minilm.json
    python bases/judge.py --table minilm.json t5-mini-1.json t5-mini-2.json

For each task: the commonest label, TF-IDF with logistic regression, the base untrained with the options in its prompt, as it
scores them and calibrated (each label's mean score over the test rows is taken off, which needs none of their labels), and one
adapter per number of training examples and seed. The adapters of a task (on a GPU of several) train as one group over the
frozen base with the project's own trainer, and their last weights are judged: no test row chooses anything. The training
rows of a seed are one random order of the task's, of which every size takes the beginning.

The same command goes on where it was killed. To use a GPU fully run several with other --tasks and --out; --table joins
the files of one base. TF-IDF is the same for every base and takes a CPU core more than a minute: the files of other bases
may be measured --without-tf-idf. Needs neither ray nor mlflow nor datasets.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script
if importlib.util.find_spec("datasets") is None:  # only hub data sets need it, and transformers must not see that it is there
    sys.modules["datasets"] = ModuleType("datasets")
    importlib.import_module("orchestrator.dataset")
    del sys.modules["datasets"]

from bases.judging_table import Results, one_line, table
from bases.judging_tasks import JUDGING_TASKS
from multilora.base_model import FrozenBase, load_base
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import LabelSet, ScoringRow, encode_labels, score_labels
from multilora.spec import BaseSpec, DataSpec, LoraSpec, TaskSpec, TrainSpec
from orchestrator.adapter_run import AdapterRun
from orchestrator.batching import num_steps_per_epoch
from orchestrator.dataset import Example
from orchestrator.group_task import Member, TrainEvent
from orchestrator.micro_batches import MicroBatches
from orchestrator.plain_baselines import fit_tf_idf, majority_label, tf_idf_answers
from orchestrator.trainer import GroupTrainer

LEARNING_RATES = {"encoder": 2e-3}
"""By family, as in the project's task files; the spec's default for the others."""
TASKS_AT_ONCE = {"cpu": 1, "cuda": 4}
"""A GPU is fastest with large groups; results are written group by group."""
SHOW_EVERY_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What decides the numbers; a results file holds those of one such setting."""

    name: str
    base: str
    dtype: Literal["float32", "bfloat16"]
    sizes: tuple[int, ...]
    num_seeds: int
    num_rows: int
    learning_rate: float | None
    epochs: int
    min_steps: int

    def train_spec(self, family: str, size: int, seed: int, max_length: int) -> TrainSpec:
        """A spec's training part: small sizes have more epochs, so that they take `min_steps` steps."""
        steps_per_epoch = num_steps_per_epoch(size, TrainSpec().batch_size)
        epochs = max(self.epochs, ceil(self.min_steps / steps_per_epoch))
        return TrainSpec(epochs=epochs, learning_rate=self.rate(family), seed=seed, max_length=max_length)

    def rate(self, family: str) -> float:
        """The learning rate of a base of some family."""
        return self.learning_rate or LEARNING_RATES.get(family, TrainSpec().learning_rate)


@dataclass(frozen=True)
class JudgedTask:
    """One task's rows, with readable labels."""

    name: str
    labels: tuple[str, ...]
    pool: tuple[Example, ...]
    test: tuple[Example, ...]

    @classmethod
    def read(cls, data: Path, name: str, num_rows: int) -> JudgedTask:
        """Read the training pool and the first rows of the shuffled test file."""
        pool, test = (_read_rows(data / "tasks" / name / f"{split}.jsonl", name) for split in ("train", "test"))
        random.Random("test").shuffle(test)
        labels = sorted({example.label for example in pool})
        return cls(name, tuple(labels), tuple(pool), tuple(test[:num_rows]))

    def sample(self, size: int, seed: int) -> tuple[Example, ...]:
        """Training rows: a seed's smaller samples are the beginnings of its larger ones."""
        if size > len(self.pool):
            raise SystemExit(f"{self.name} has {len(self.pool)} training rows, fewer than {size}")
        order = list(self.pool)
        random.Random(seed).shuffle(order)
        return tuple(order[:size])

    def spec(self, base: FrozenBase, settings: Settings, size: int, seed: int) -> TaskSpec:
        """What a person would write into a task file."""
        asked = JUDGING_TASKS[self.name]
        return TaskSpec(
            name=f"{self.name.replace('_', '-')}-{size}-{seed}",
            base=base.spec,
            data=DataSpec(train="train.jsonl"),
            instruction=asked.instruction(len(self.labels)),
            labels=dict.fromkeys(self.labels),
            train=settings.train_spec(base.family, size, seed, asked.max_length_tokens),
        )

    def member(self, base: FrozenBase, settings: Settings, size: int, seed: int) -> Member:
        """An adapter to train; nothing of it is kept on disk."""
        spec, nowhere = self.spec(base, settings, size, seed), os.devnull
        return Member(spec, spec.name, self.sample(size, seed), (), "", adapter_dir=nowhere, checkpoint_file=nowhere)

    def accuracy(self, answers: Sequence[str]) -> float:
        """Share of right answers to the test rows."""
        return mean(answer == example.label for answer, example in zip(answers, self.test, strict=True))


@dataclass(frozen=True)
class Exam:
    """A task's test rows as one base reads them."""

    task: JudgedTask
    prompts: list[tuple[int, ...]]
    labels: LabelSet
    micro_batches: MicroBatches

    @classmethod
    def of(cls, base: FrozenBase, task: JudgedTask, spec: TaskSpec) -> Exam:
        """Tokenise the test rows once for all adapters."""
        prompt_format = PromptFormat.of(spec, base.family)
        prompts = [encode_prompt(prompt_format, example.columns, base.tokenizer).token_ids for example in task.test]
        labels = encode_labels(base, no_adapters(base), prompt_format)
        return cls(task, prompts, labels, MicroBatches(base.device, lambda max_tokens: None))

    @torch.no_grad()
    def scores(self, base: FrozenBase, slots: AdapterSlots, slot: int | None) -> Tensor:
        """Score each label of all rows [N, L] with one slot's adapter, or with the base alone."""
        # An encoder has its labels' vectors already.
        num_label_tokens = 0 if base.family == "encoder" else self.labels.tree.num_nodes
        lengths = [len(prompt) + num_label_tokens for prompt in self.prompts]

        def attempt() -> dict[int, Tensor]:
            found: dict[int, Tensor] = {}
            for batch in self.micro_batches.cut(lengths):
                rows = [ScoringRow(self.prompts[i], slot, self.labels) for i in batch]
                found.update(zip(batch, score_labels(base, slots, rows), strict=True))
            return found

        found = self.micro_batches.within_memory(max(lengths), attempt)
        return torch.stack([found[i] for i in range(len(self.prompts))])

    def accuracy(self, scores_NL: Tensor) -> float:
        """Share of rows whose label has the best score."""
        return self.task.accuracy([self.labels.names[place] for place in scores_NL.argmax(1).tolist()])


class LastWeightsTrainer(GroupTrainer):
    """Judges each adapter's last weights on its task's test rows, instead of choosing an epoch by a select split."""

    def __init__(self, base: FrozenBase, members: Sequence[Member], exams: Mapping[str, Exam], say: Say) -> None:
        """`exams` by run key."""
        super().__init__(base, members, len(members), self._note)
        self.accuracies: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._exams, self._say, self._said_at = exams, say, time.monotonic()

    def _end_epoch(self, run: AdapterRun) -> None:
        if run.step >= run.num_steps:
            exam = self._exams[run.member.run_key]
            self.accuracies[run.member.run_key] = exam.accuracy(exam.scores(self.base, self.slots, run.slot))
            self._release(run)

    def _note(self, event: TrainEvent) -> None:
        if event.kind == "failed":
            self.failures[event.run_key] = event.message
        if event.kind == "progress" and time.monotonic() - self._said_at > SHOW_EVERY_S:
            self._said_at = time.monotonic()
            done = f"{len(self.accuracies)} of {len(self._exams)} adapters done"
            self._say(f"  {done}, {event.task} at step {event.step} of {event.num_steps}, loss {event.metrics['train/loss']:.3f}")


def no_adapters(base: FrozenBase) -> AdapterSlots:
    """Slots that change nothing."""
    return AdapterSlots(base.model, [], num_slots=1, max_rank=1)


def judge_group(
    base: FrozenBase, tasks: Sequence[JudgedTask], settings: Settings, say: Say, *, with_tf_idf: bool
) -> dict[str, Results]:
    """Measure some tasks, all their adapters in one group."""
    started = time.monotonic()
    seeds, members = range(settings.num_seeds), list[Member]()
    exams, results = dict[str, Exam](), dict[str, Results]()
    for task in tasks:
        exam = Exam.of(base, task, task.spec(base, settings, max(settings.sizes), 0))
        scores_NL = exam.scores(base, no_adapters(base), None)
        # Source: batch calibration (Zhou et al. 2024), which needs no label of any row.
        zero_shot = {"zero_shot": exam.accuracy(scores_NL), "zero_shot_calibrated": exam.accuracy(scores_NL - scores_NL.mean(0))}
        tf_idf = tf_idf_results(task, settings) if with_tf_idf else {}
        results[task.name] = {**plain_results(task, settings), "tf_idf": tf_idf, **zero_shot}
        ours = [task.member(base, settings, size, seed) for size in settings.sizes for seed in seeds]
        members += ours
        exams |= {member.run_key: exam for member in ours}
    say(f"{', '.join(task.name for task in tasks)}: training {len(members)} adapters")
    trainer = LastWeightsTrainer(base, members, exams, say)
    trainer.train(lambda: (), float("inf"))
    trainer.detach()
    for task in tasks:
        keys = {size: [task.spec(base, settings, size, seed).name for seed in seeds] for size in settings.sizes}
        results[task.name] |= {
            "lora": {str(size): [trainer.accuracies.get(key) for key in keys[size]] for size in settings.sizes},
            "failures": {key: trainer.failures[key] for size in keys for key in keys[size] if key in trainer.failures},
            "seconds": round((time.monotonic() - started) / len(tasks), 1),
        }
    return results


def plain_results(task: JudgedTask, settings: Settings) -> Results:
    """What the test rows are, and the accuracy of the commonest label of the largest samples."""
    samples = [task.sample(max(settings.sizes), seed) for seed in range(settings.num_seeds)]
    majority = mean(task.accuracy([majority_label(sample)] * len(task.test)) for sample in samples)
    return {"test_rows": len(task.test), "num_labels": len(task.labels), "majority": majority}


def tf_idf_results(task: JudgedTask, settings: Settings) -> dict[str, list[float]]:
    """Accuracy of word counts at each size, by seed."""
    seeds = range(settings.num_seeds)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes")  # small samples of many labels
        return {str(size): [tf_idf_accuracy(task, task.sample(size, seed)) for seed in seeds] for size in settings.sizes}


def tf_idf_accuracy(task: JudgedTask, train: Sequence[Example]) -> float:
    """Accuracy of logistic regression over word counts; a sample of one label alone teaches only that one."""
    if len({example.label for example in train}) == 1:
        return task.accuracy([train[0].label] * len(task.test))
    return task.accuracy(tf_idf_answers(fit_tf_idf(train), task.test))


def run(
    settings: Settings, tasks: Sequence[str], data: Path, out: Path, device: str, at_once: int, say: Say, *, with_tf_idf: bool
) -> None:
    """Judge the tasks that the file lacks, and write it after every group."""
    facts = {**asdict(settings), "sizes": list(settings.sizes), "rank": LoraSpec().rank, "alpha": LoraSpec().alpha}
    whole: Results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"settings": facts, "tasks": {}}
    if whole["settings"] != facts:
        raise SystemExit(f"{out} was measured with other settings: {whole['settings']}")
    missing = [name for name in tasks if name not in whole["tasks"]]
    if not missing:
        say(f"{out} has all {len(tasks)} tasks")
        return
    base = load_base(BaseSpec(model=settings.base, dtype=settings.dtype), device)
    whole |= {"family": base.family, "fingerprint": base.files.fingerprint, "num_parameters": base.files.num_parameters}
    whole["learning_rate"] = settings.rate(base.family)
    whole["device"] = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    for start in range(0, len(missing), at_once):
        group = [JudgedTask.read(data, name, settings.num_rows) for name in missing[start : start + at_once]]
        whole["tasks"] |= judge_group(base, group, settings, say, with_tf_idf=with_tf_idf)
        staging = out.with_suffix(f".{os.getpid()}")
        staging.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        staging.replace(out)
        for task in group:
            say(one_line(task.name, whole["tasks"][task.name]))


def _read_rows(file: Path, name: str) -> list[Example]:
    with file.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    name_of = JUDGING_TASKS[name].name_of
    return [Example(f"{file.stem}-{i}", {"text": row["text"]}, name_of(row["label"])) for i, row in enumerate(rows)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and judge or print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = Path(os.environ.get("PRETRAIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print these results instead of measuring")
    parser.add_argument("--base", help="folder in transformers format, or a name as in a task file")
    parser.add_argument("--name", help="what the table calls the base; default: the last part of --base")
    parser.add_argument("--out", type=Path, help="results file, which grows group by group")
    parser.add_argument("--data", type=Path, default=data, help="folder with tasks/NAME/{train,test}.jsonl")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--tasks", nargs="+", choices=JUDGING_TASKS, default=list(JUDGING_TASKS), metavar="NAME")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200, 1000], help="numbers of training examples")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=500, help="test rows of a task, at most")
    parser.add_argument("--learning-rate", type=float, help="default: 0.002 for encoders, 0.001 for the others")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--min-steps", type=int, default=120, help="small sizes train for more epochs, up to so many steps")
    parser.add_argument("--tasks-at-once", type=int, help="tasks whose adapters are one group; default: 1, on a GPU 4")
    parser.add_argument("--without-tf-idf", action="store_true", help="leave out what another file has")
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if given.table:
        console.print(table(given.table))
        return
    if not given.base or not given.out:
        parser.error("give --base and --out, or --table")
    folder = Path(given.base)
    settings = Settings(
        name=given.name or folder.name, base=str(folder.resolve()) if folder.is_dir() else given.base, dtype=given.dtype,
        sizes=tuple(sorted(given.sizes)), num_seeds=given.seeds, num_rows=given.rows, learning_rate=given.learning_rate,
        epochs=given.epochs, min_steps=given.min_steps,
    )  # fmt: skip
    at_once = given.tasks_at_once or TASKS_AT_ONCE[given.device]
    with_tf_idf = not given.without_tf_idf
    run(settings, given.tasks, given.data, given.out, given.device, at_once, console.print, with_tf_idf=with_tf_idf)


if __name__ == "__main__":
    main()
