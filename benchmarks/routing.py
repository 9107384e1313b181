"""How well does the router of `model: auto` find the task of a text, against TF-IDF + logistic regression on the same texts?

The five shipped tasks and eleven public data sets beside this checkout (`--quick`, or without them: the shipped ones alone) are
one task each; what a text is labelled with does not matter, only which task it came from. Several overlap: intents of two banks
and an assistant, three kinds of reviews. Both sides train on the same texts, and choose temperature and threshold on the same
select texts by the same code; neither sees a gate text. `recall` is the mean over tasks of the share of gate texts that were
routed to their task, `precision` the share of routed gate texts that went there, `best` the share of all whose most probable
task is the right one, whatever the threshold. `out_of_scope_routed` is the share of questions that belong to no task (of
CLINC150) and were routed all the same.

Correct is: no gate text was trained on or chose anything; the router that is read back from disk routes every gate text as it was
measured; precision is at most 3 points below what was asked for; and the most probable task is right no less often than TF-IDF's.
Recall decides nothing: it hangs on a threshold that a few select texts chose, and of two sides the more precise one has less.

    python benchmarks/routing.py [--quick] [--json FILE] [--rounds N]     a round times 64 texts at once and 16 one by one
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

import numpy as np
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from benchmarks.timing import ROOT, Report, Row, interleave, median, read_settings
from multilora.base_model import load_base
from multilora.spec import BaseSpec
from multilora.task_router import ABSTAINED, Confusion, TaskRouter, read_router, routed_to
from orchestrator.calibration import fit_temperature
from orchestrator.dataset import Example
from orchestrator.router_fit import PRECISION, RouterData, fit_router, lowest_threshold, routes_of
from serve.engine import Engine

BASE = BaseSpec(model="sentence-transformers/all-MiniLM-L6-v2")
SHARED = ROOT.parent / "shared" / "data" / "tasks"
SIZES = {True: {"train": 60, "select": 30, "gate": 30}, False: {"train": 200, "select": 50, "gate": 100}}
"""Most texts of a task by `--quick`; a smaller data set is cut in the same proportions."""
MAX_LENGTH_TOKENS = 128
MAX_SHORTFALL = 0.03
"""Of precision on the gate texts: it was chosen on a few hundred select texts."""
NUM_TIMED, NUM_ALONE, NUM_SHOWN = 64, 16, 3


@dataclass(frozen=True)
class Side:
    """What one of the two routers makes of texts."""

    threshold: float
    fit_s: float
    gate: Confusion
    best: float
    """Share of gate texts whose most probable task is the right one."""


@dataclass(frozen=True)
class TfIdfRouter:
    """What one would run otherwise: the same decision over other scores."""

    model: Pipeline
    tasks: Sequence[str]
    temperature: float
    threshold: float

    def probabilities(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """How likely each text belongs to each task."""
        rows = softmax(self.model.decision_function(list(texts)) / self.temperature, axis=1).tolist()
        return [dict(zip(self.tasks, row, strict=True)) for row in rows]


def main() -> int:
    """Fit both, measure both on the gate texts, time both, and report."""
    settings = read_settings(__doc__ or "", quick_rounds=2, full_rounds=5, has_cuda=False)
    sizes = SIZES[settings.is_quick]
    config = {"base": BASE.model, "max_length_tokens": MAX_LENGTH_TOKENS, "precision": PRECISION, "most_texts": sizes}
    report = Report("routing", settings, config)
    data = read_data(sizes, with_public=not settings.is_quick)
    report.extra["num_texts"] = {name: {task: len(examples) for task, examples in getattr(data, name).items()} for name in sizes}
    used = {text for split in (data.train, data.select) for text in texts_of(split)}
    report.add(Row("data", "gate texts that were used", difference=len(used & set(texts_of(data.gate))), tolerance=0))
    engine = Engine(load_base(BASE), num_slots=1, max_rank=1)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        router = fit_router(data, engine, Path(folder) / "router")
        seconds = time.perf_counter() - started
        again = read_router(Path(folder) / "router", router.digest)
    again.check_base(engine.base.files.fingerprint, engine.embed)
    rows = again.probabilities(texts_of(data.gate), engine.embed)
    ours = Side(router.card.threshold, seconds, router.card.gate, share_best(rows, data))
    routes = [routed_to(row, router.card.threshold) for row in rows]
    num_other = Counter((task, to) for task, to in zip(gold_of(data.gate), routes, strict=True))
    num_other.subtract({(task, to): n for task, row in router.card.gate.counts.items() for to, n in row.items()})
    report.add(Row("router", "routed otherwise when read back", difference=sum(map(abs, num_other.values())), tolerance=0))
    started = time.perf_counter()
    rival = fit_tf_idf(data)
    seconds = time.perf_counter() - started
    rows = rival.probabilities(texts_of(data.gate))
    theirs = Side(rival.threshold, seconds, confusion_of(rows, rival.threshold, data), share_best(rows, data))
    compare(report, ours, theirs)
    time_both(report, router, engine, rival, texts_of(data.gate))
    add_out_of_scope(report, router, engine, rival)
    return report.finish()


def read_data(sizes: dict[str, int], *, with_public: bool) -> RouterData:
    """Texts of every task, each in one split of one task only."""
    files = {file.stem: (file,) for file in sorted((ROOT / "tasks" / "data").glob("*.jsonl"))}
    if with_public and SHARED.is_dir():
        files |= {folder.name: (folder / "train.jsonl", folder / "test.jsonl") for folder in sorted(SHARED.iterdir())}
    splits: dict[str, dict[str, list[Example]]] = {name: {} for name in sizes}
    seen: set[str] = set()
    for task, parts in files.items():
        texts = [text for file in parts for text in dict.fromkeys(read_texts(file)) if text not in seen]
        texts = list(dict.fromkeys(texts))
        seen |= set(texts)
        random.Random(0).shuffle(texts)
        share = min(1.0, len(texts) / sum(sizes.values()))
        for name, size in sizes.items():
            taken, texts = texts[: int(share * size)], texts[int(share * size) :]
            splits[name][task] = [Example(f"{task} {name} {i}", {"text": text}, task) for i, text in enumerate(taken)]
    return RouterData(BASE, MAX_LENGTH_TOKENS, PRECISION, **splits)


def read_texts(file: Path) -> list[str]:
    """The texts of a data set, in file order."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def texts_of(split: dict[str, list[Example]]) -> list[str]:
    """All texts of a split, task by task."""
    return [example.columns["text"] for examples in split.values() for example in examples]


def gold_of(split: dict[str, list[Example]]) -> list[str]:
    """The task of each of these texts."""
    return [task for task, examples in split.items() for _ in examples]


def fit_tf_idf(data: RouterData) -> TfIdfRouter:
    """Fit the baseline that `submit` reports, temperature and threshold as the router's."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000)
    )
    model.fit(texts_of(data.train), gold_of(data.train))
    tasks = [str(task) for task in model.classes_]
    scores = model.decision_function(texts_of(data.select))
    gold = [tasks.index(task) for task in gold_of(data.select)]
    temperature = fit_temperature(scores, gold)
    probabilities = softmax(scores / temperature, axis=1)
    is_right = probabilities.argmax(1) == np.array(gold)
    return TfIdfRouter(model, tasks, temperature, lowest_threshold(probabilities.max(1).tolist(), is_right.tolist(), PRECISION))


def confusion_of(rows: Sequence[dict[str, float]], threshold: float, data: RouterData) -> Confusion:
    """Where the gate texts of every task went."""
    counts: dict[str, Counter[str]] = {task: Counter() for task in data.tasks}
    for task, row in zip(gold_of(data.gate), rows, strict=True):
        counts[task][routed_to(row, threshold)] += 1
    return Confusion(counts={task: dict(row) for task, row in counts.items()})


def share_best(rows: Sequence[dict[str, float]], data: RouterData) -> float:
    """Share of gate texts whose most probable task is the right one."""
    return float(np.mean([routed_to(row, 0.0) == task for task, row in zip(gold_of(data.gate), rows, strict=True)]))


def compare(report: Report, ours: Side, theirs: Side) -> None:
    """Say what both made of every task, and of all."""
    for task in ours.gate.counts:
        wrong = Counter(ours.gate.counts[task])
        wrong.pop(task, None)
        went = ", ".join(f"{to} {count}" for to, count in wrong.most_common(NUM_SHOWN))
        note = f"recall {ours.gate.recall(task):.3f}, TF-IDF {theirs.gate.recall(task):.3f} of {ours.gate.num_texts(task)}"
        report.add(Row(task, "routed", note=f"{note}; else to: {went}"))
    for name, side in (("router", ours), ("tf-idf", theirs)):
        recall = float(np.mean([side.gate.recall(task) for task in side.gate.counts]))
        numbers = {
            "recall": recall, "precision": side.gate.precision, "best": side.best, "abstained": side.gate.abstained,
        }  # fmt: skip
        prefix = "" if name == "router" else "tfidf_"
        report.ratios |= {f"{prefix}{number}": value for number, value in numbers.items()}
        shown = ", ".join(f"{number} {value:.3f}" for number, value in numbers.items())
        report.add(Row("all tasks", name, side.fit_s, note=f"{shown}, threshold {side.threshold:.3f}"))
        report.extra[f"{name} confusion"] = side.gate.counts
        report.extra[f"{name} recall"] = {task: side.gate.recall(task) for task in side.gate.counts}
    shortfall = max(0.0, PRECISION - ours.gate.precision)
    report.add(Row("all tasks", "precision below what was asked", difference=shortfall, tolerance=MAX_SHORTFALL))
    lost = max(0.0, theirs.best - ours.best)
    report.add(Row("all tasks", "best below TF-IDF's", difference=lost, tolerance=0))


def time_both(report: Report, router: TaskRouter, engine: Engine, rival: TfIdfRouter, texts: Sequence[str]) -> None:
    """Time texts of all lengths, many at once and one by one."""
    many = random.Random(0).sample(list(texts), NUM_TIMED)
    variants = {
        "router at once": lambda: router.probabilities(many, engine.embed),
        "tf-idf at once": lambda: rival.probabilities(many),
        "router alone": lambda: [router.probabilities([text], engine.embed) for text in many[:NUM_ALONE]],
        "tf-idf alone": lambda: [rival.probabilities([text]) for text in many[:NUM_ALONE]],
    }
    for run in variants.values():
        run()
    times = interleave(variants, report.settings)
    for name in variants:
        num_texts = NUM_TIMED if name.endswith("at once") else NUM_ALONE
        key = name.replace("router ", "").replace("tf-idf", "tfidf").replace(" ", "_")
        report.ratios[f"{key}_ms"] = 1000 * median(times, name) / num_texts
        report.add(Row("time a text", name, median(times, name) / num_texts, note=f"{num_texts} texts"))


def add_out_of_scope(report: Report, router: TaskRouter, engine: Engine, rival: TfIdfRouter) -> None:
    """Ask both what belongs to no task; a softmax over the tasks cannot know that."""
    file = SHARED / "clinc150" / "oos_test.jsonl"
    if report.settings.is_quick or not file.is_file():
        return
    texts = read_texts(file)[:300]
    routes = {
        "router": routes_of(router, [Example("", {"text": text}, "") for text in texts], engine),
        "tf-idf": [routed_to(row, rival.threshold) for row in rival.probabilities(texts)],
    }
    for name, found in routes.items():
        counts = Counter(found)
        share = 1 - counts.pop(ABSTAINED, 0) / len(texts)
        report.ratios[f"{'' if name == 'router' else 'tfidf_'}out_of_scope_routed"] = share
        went = ", ".join(f"{to} {count}" for to, count in counts.most_common(NUM_SHOWN))
        report.add(Row("of no task", name, note=f"{share:.3f} of {len(texts)} routed: {went}"))


if __name__ == "__main__":
    raise SystemExit(main())
