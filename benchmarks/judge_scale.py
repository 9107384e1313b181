"""How long does it take to judge and report 200 tasks of 1,000 gate examples each from stored answers?

Synthetic answers of champions, candidates and three baselines over ten labels are stored as evaluations are; timed are reading
them, judging the release, building the report and writing its five files, all from fresh objects, and judging by the other
metrics. Four in a hundred answers differ between champion and candidate; five candidates have their labels shifted by one.

Correct is: the five, and they alone, are REGRESSED; the release is blocked; what was read is what was stored; the page is below
5 MB. The bar: judging and reporting 200 tasks x 1,000 examples by accuracy takes less than 10 s (`judge_and_report_s`).

    python benchmarks/judge_scale.py [--quick] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

from benchmarks.timing import Report, Row, Settings, interleave, median, read_settings
from multilora.spec import GateSpec
from orchestrator.comparison import Evidence
from orchestrator.eval_report import EvalReport, Graded, load_reports, store_reports
from orchestrator.judge import Outcome, Release, VerdictKind, judge
from orchestrator.report import TaskOutcome, build_report
from orchestrator.report_page import write_report

SIZES = {True: (200, 100), False: (200, 1000)}
"""(tasks, examples) by `--quick`."""
LABELS = tuple(f"label {index}" for index in range(10))
ACCURACY, FLIP_RATE, NUM_SPOILT = 0.85, 0.04, 5
MAX_PAGE_MB = 5.0
METRICS = {"accuracy": 1, "macro_f1": 10, "token_f1": 10}
"""One task in so many is judged by the metric; the bootstraps of the last two take longer."""
WORDS = ("the", "card", "lost", "late", "rate", "of", "exchange", "please", "close", "my", "account", "transfer", "did", "not")


def main() -> int:
    """Store, read, judge, check and report."""
    settings = read_settings(__doc__ or "", quick_rounds=2, full_rounds=5, has_cuda=False)
    num_tasks, num_examples = SIZES[settings.is_quick]
    config = {"num_tasks": num_tasks, "num_examples": num_examples, "flip_rate": FLIP_RATE, "num_labels": len(LABELS)}
    report = Report("judge_scale", settings, config)
    stored = [label_reports(index, num_examples) for index in range(num_tasks)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"task-{index}.json" for index in range(num_tasks)]
        for file, reports in zip(files, stored, strict=True):
            store_reports(file, reports)
        times = interleave({"read": lambda: [load_reports(file) for file in files]}, settings)
        read = [tuple(load_reports(file).values()) for file in files]
        size = f"{num_tasks} x {num_examples}"
        num_wrong = sum(before != after for before, after in zip(stored, read, strict=True))
        report.add(Row(size, "read stored answers", median(times, "read"), None, num_wrong, 0))
        report_all(report, settings, files, Path(folder) / "report")
    pairs = [reports[:2] for reports in stored]
    release, report.ratios["judge_s"] = judge_by(report, settings, "accuracy", pairs)
    report.extra["pooled_p"] = release.pooled_p
    for metric, one_in in METRICS.items():
        if metric == "macro_f1":
            judge_by(report, settings, metric, pairs[::one_in])
        if metric == "token_f1":
            judge_by(report, settings, metric, [text_reports(index, num_examples) for index in range(num_tasks // one_in)])
    return report.finish()


def report_all(report: Report, settings: Settings, files: Sequence[Path], folder: Path) -> None:
    """Judge and report from stored answers, in seconds; what was cached in one round must not help the next."""
    seconds: dict[str, list[float]] = {"judge": [], "build the report": [], "write its files": []}
    page = folder / "report.html"
    for _ in range(settings.num_rounds):
        found = [tuple(load_reports(file).values()) for file in files]
        started = time.perf_counter()
        release = judge([Evidence(new.task, GateSpec(), new, old) for new, old, *_ in found])
        seconds["judge"].append(time.perf_counter() - started)
        started = time.perf_counter()
        outcomes = [
            TaskOutcome(new.task, "synthetic", "judged", "accuracy", 0.0, 0.02, old.system, new.system, old.system,
                        release.verdicts[new.task], new, old, tuple(baselines))
            for new, old, *baselines in found
        ]  # fmt: skip
        built = build_report(outcomes, datetime(2026, 1, 1, tzinfo=UTC), {}, release)
        seconds["build the report"].append(time.perf_counter() - started)
        started = time.perf_counter()
        page = write_report(built, folder)
        seconds["write its files"].append(time.perf_counter() - started)
    size_mb = page.stat().st_size / 1e6
    for name, measured in seconds.items():
        report.add(Row(f"{len(files)} tasks", name, statistics.median(measured), None, 0, 0))
    report.add(Row(f"{len(files)} tasks", "size of the page in MB", None, None, size_mb, MAX_PAGE_MB))
    report.ratios["judge_and_report_s"] = sum(map(statistics.median, seconds.values()))
    report.ratios["page_mb"] = size_mb


def judge_by(report: Report, settings: Settings, metric: str, pairs: Sequence[tuple[EvalReport, ...]]) -> tuple[Release, float]:
    """Judge by a metric, in seconds; candidates with shifted labels must be found, and no others."""
    gate = GateSpec.model_validate({"metric": metric})
    evidences = [Evidence(candidate.task, gate, candidate, reference) for candidate, reference in pairs]
    release = judge(evidences)
    times = interleave({metric: lambda: judge(evidences)}, settings)
    found = {task for task, verdict in release.verdicts.items() if verdict.kind is VerdictKind.REGRESSED}
    planted = {candidate.task for candidate, _ in pairs if candidate.system.endswith("spoilt")}
    num_wrong = len(found ^ planted) + (release.outcome is not Outcome.BLOCK)
    seconds = median(times, metric)
    note = f"{1000 * seconds / len(pairs):.1f} ms a task, {len(planted)} planted"
    report.add(Row(f"{len(pairs)} x {len(pairs[0][0].answers)}", f"judge by {metric}", seconds, None, num_wrong, 0, note))
    return release, seconds


def label_reports(index: int, num_examples: int) -> tuple[EvalReport, ...]:
    """Candidate, champion and three baselines of a classification task."""
    rng = random.Random(index)
    gold = rng.choices(LABELS, k=num_examples)
    truth = [label if rng.random() < ACCURACY else rng.choice(LABELS) for label in gold]
    champion, candidate = ([rng.choice(LABELS) if rng.random() < FLIP_RATE / 2 else label for label in truth] for _ in range(2))
    if is_spoilt := is_planted(index):
        following = dict(zip(LABELS, LABELS[1:] + LABELS[:1], strict=True))
        candidate = [following[label] for label in champion]
    texts = [" ".join(rng.choices(WORDS, k=12)) for _ in gold]
    system = "candidate, spoilt" if is_spoilt else "candidate"
    baselines = {name: rng.sample(truth, num_examples) for name in ("zero-shot", "majority", "tf-idf")}
    systems = {system: candidate, "champion": champion, **baselines}
    return tuple(one_report(index, name, texts, gold, answers, LABELS) for name, answers in systems.items())


def text_reports(index: int, num_examples: int) -> tuple[EvalReport, EvalReport]:
    """Candidate and champion of a free-text task; instead of shifted labels a planted candidate has lost half of its words."""
    rng = random.Random(index)
    gold = [" ".join(rng.choices(WORDS, k=12)) for _ in range(num_examples)]
    truth = [text if rng.random() < ACCURACY else text.partition(" ")[2] for text in gold]
    champion, candidate = ([text[:20] if rng.random() < FLIP_RATE / 2 else text for text in truth] for _ in range(2))
    if is_spoilt := is_planted(index):
        candidate = [text[: len(text) // 2] for text in champion]
    system = "candidate, spoilt" if is_spoilt else "candidate"
    return one_report(index, system, gold, gold, candidate, ()), one_report(index, "champion", gold, gold, champion, ())


def is_planted(index: int) -> bool:
    """Whether a task's candidate is bad: spread such that every metric's selection of tasks has one."""
    return index % 40 == 0 and index // 40 < NUM_SPOILT


def one_report(
    index: int, system: str, texts: Sequence[str], gold: Sequence[str], answers: Sequence[str], labels: tuple[str, ...]
) -> EvalReport:
    """An evaluation as it is stored."""
    scores = tuple(-0.5 * number for number in range(len(labels)))
    rows = zip(texts, gold, answers, strict=True)
    graded = tuple(Graded(f"e{number}", *row, 0.5 if labels else None, scores) for number, row in enumerate(rows))
    return EvalReport(f"task-{index:03}", system, "", "gate", labels, graded, scorer_version=1)


if __name__ == "__main__":
    raise SystemExit(main())
