"""The cross-task report: one object, written as JSON and as one HTML file that needs no network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.judge import ALPHA_TASKS, Outcome, Verdict, VerdictKind
from orchestrator.paired import wilson
from orchestrator.report_page import percent

if TYPE_CHECKING:  # evaluate imports torch, which takes seconds; a report only reads what it is given.
    from orchestrator.eval_report import EvalReport

State = Literal["judged", "unchanged", "verified", "rechecked", "failed"]

MAX_FLIPS = 50
"""Flips shown per task."""
MAX_FLIPS_TOTAL = 2000
"""Flips shown in one report, so that a report of 200 tasks still opens at once."""
MAX_TEXT = 400
"""Characters of an input or answer that are shown."""
MIN_CLASS_EXAMPLES = 10
"""Gate examples that a label needs before losing all of them is a warning."""
AXIS_STEPS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class TaskOutcome:
    """What one submission found out about one task.

    judged: a candidate was evaluated and got a verdict. unchanged: spec, data and base are as they were, nothing was
    trained. verified: not part of this submission; its champion was bound again and passed its canaries. failed: see error.
    """

    task: str
    description: str
    state: State
    metric: str
    minimum: float
    margin: float
    champion: str | None
    """`task@version` that answers after this submission."""
    candidate: str | None = None
    """`task@version` on trial."""
    reference: str | None = None
    """What the candidate was compared with: the champion before, or `zero-shot` for a first version."""
    verdict: Verdict | None = None
    candidate_report: EvalReport | None = None
    reference_report: EvalReport | None = None
    baselines: tuple[EvalReport, ...] = ()
    """zero-shot, majority and tf-idf on the same gate examples."""
    error: str = ""
    policy: str = "balanced"
    """gate.policy."""
    changed: tuple[str, ...] = ()
    """Parts of the serving fingerprint that differ between reference and candidate."""
    num_consults: int = 0
    """How often candidates were judged on this gate split, this time included."""
    best_ever: float | None = None
    """Best value that the task ever had on these gate examples, this time included."""
    contamination: tuple[str, ...] = ()
    """Sentences about training examples that are (nearly) gate examples of some task."""
    run_id: str = ""
    """MLflow run of the candidate's training."""


class Decision(StrEnum):
    """What became of one task, worst first."""

    FAILED = "failed"
    REFUSED = "refused"
    HELD_BACK = "held back"
    UNPROVEN = "promoted, not proven"
    PROMOTED = "promoted"
    UNCHANGED = "unchanged"
    VERIFIED = "verified"


_OUTCOME_OF = {
    Decision.FAILED: Outcome.ERROR,
    Decision.REFUSED: Outcome.BLOCK,
    Decision.HELD_BACK: Outcome.HOLD,
    Decision.UNPROVEN: Outcome.HOLD,
}
_SPOKEN_ORDER = (*list(Decision)[4:], *reversed(list(Decision)[:4]))
"""Promoted, unchanged and verified tasks are counted first; the others follow with their names."""
_NEXT_STEP = {
    Outcome.ERROR: "What failed was not compared, so nothing is known about it: mend the error below and submit again.",
    Outcome.BLOCK: "Read below what was lost, mend the examples, the instruction or the labels, and submit again.",
    Outcome.HOLD: "There are too few gate examples to tell better from worse; the reasons below say how many would do.",
    Outcome.CLEAR: "Nothing has to be done.",
}


def build_report(outcomes: Sequence[TaskOutcome], created: datetime, facts: Mapping[str, str]) -> dict[str, Any]:
    """Gather every number of a submission into one JSON-able object. Shares are fractions 0..1; worst tasks first."""
    max_flips = min(MAX_FLIPS, MAX_FLIPS_TOTAL // max(sum(outcome.verdict is not None for outcome in outcomes), 1))
    tasks = sorted((_task(outcome, max_flips) for outcome in outcomes), key=lambda task: list(Decision).index(task["decision"]))
    outcome = _OUTCOME_OF.get(tasks[0]["decision"], Outcome.CLEAR) if tasks else Outcome.CLEAR
    report = {
        "schema_version": 1,
        "outcome": outcome,
        "sentence": _sentence(tasks),
        "next_step": _NEXT_STEP[outcome],
        "created": created.isoformat(timespec="seconds"),
        "facts": dict(facts),
        "alpha": ALPHA_TASKS,
        "axis": _axis(tasks),
        "tasks": tasks,
    }
    return dict(json.loads(json.dumps(report, allow_nan=False)))


def _task(outcome: TaskOutcome, max_flips: int) -> dict[str, Any]:
    error = outcome.error or _problem(outcome)
    candidate, reference, verdict = outcome.candidate_report, outcome.reference_report, outcome.verdict
    if error:
        candidate = reference = verdict = None
    num_examples = len(candidate.answers) if candidate else 0
    change = (verdict.num_wins - verdict.num_losses) / num_examples if verdict else None
    flips = _flips(candidate, reference) if candidate and reference else []
    task: dict[str, Any] = {
        "task": outcome.task,
        "description": outcome.description,
        "state": outcome.state,
        "decision": _decision(outcome, verdict, error),
        "error": error,
        "metric": outcome.metric,
        "minimum": outcome.minimum,
        "margin": outcome.margin,
        "champion": outcome.champion,
        "candidate": outcome.candidate,
        "reference": outcome.reference,
        "is_first_version": outcome.reference == "zero-shot",
        "verdict": {**asdict(verdict), "accuracy_difference": change} if verdict else None,
        "num_examples": num_examples,
        "gate_fingerprint": candidate.gate_fingerprint if candidate else "",
        "candidate_result": _result(candidate, outcome.metric) if candidate else None,
        "reference_result": _result(reference, outcome.metric) if reference else None,
        "baselines": [_result(report, outcome.metric) for report in outcome.baselines] if candidate else [],
        "calibration": _calibration(candidate) if candidate else None,
        "labels": _labels(candidate, reference) if candidate and reference else [],
        "flips": flips[:max_flips],
        "num_flips_hidden": max(len(flips) - max_flips, 0),
    }
    return {**task, "warnings": _warnings(task)}


def _problem(outcome: TaskOutcome) -> str:
    """Say why the comparison is not valid; an invalid comparison never passes."""
    if outcome.state == "failed":
        return "failed without a message; see the log"
    candidate, reference, verdict = outcome.candidate_report, outcome.reference_report, outcome.verdict
    if (verdict or outcome.state == "judged") and not (candidate and reference and verdict):
        return "judged, but its verdict or an eval report is missing"
    reports = [report for report in (candidate, reference, *outcome.baselines) if report]
    gates = {(report.gate_fingerprint, *(graded.id for graded in report.answers)) for report in reports}
    if len(gates) > 1:
        return "the compared systems were not measured on the same gate examples, so nothing can be said"
    if reports and not reports[0].answers:
        return "there are no gate examples, so nothing can be said"
    if candidate and reference and verdict:
        pairs = Counter(zip(candidate.correct, reference.correct, strict=True))
        if (pairs[False, True], pairs[True, False]) != (verdict.num_losses, verdict.num_wins):
            return "the verdict does not belong to these answers: it counted other losses and wins"
    return ""


def _decision(outcome: TaskOutcome, verdict: Verdict | None, error: str) -> Decision:
    if error:
        return Decision.FAILED
    if verdict and not verdict.is_promoted:
        return Decision.REFUSED if verdict.kind is VerdictKind.REGRESSED else Decision.HELD_BACK
    if verdict:
        return Decision.UNPROVEN if verdict.kind is VerdictKind.INCONCLUSIVE else Decision.PROMOTED
    if outcome.state == "verified":
        return Decision.VERIFIED
    # Submitting a refused version once more does not make it pass.
    return Decision.REFUSED if outcome.candidate not in (None, outcome.champion) else Decision.UNCHANGED


def _result(report: EvalReport, metric: str) -> dict[str, Any]:
    num_correct = sum(report.correct)
    return {
        "system": report.system,
        "digest": report.digest,
        "value": report.value(metric),
        "token_f1": report.token_f1,
        "num_correct": num_correct,
        "accuracy": num_correct / len(report.answers),
        "accuracy_interval": list(wilson(num_correct, len(report.answers))),
    }


def _calibration(report: EvalReport) -> dict[str, float] | None:
    errors = report.calibration_errors
    return {"temperature": report.temperature, **errors} if errors else None


def _flips(candidate: EvalReport, reference: EvalReport) -> list[dict[str, Any]]:
    """List the examples that only one side gets right: losses first, in each kind the surest candidate answer first."""
    both = zip(candidate.answers, reference.answers, strict=True)
    pairs = [(new, old) for new, old in both if new.is_right != old.is_right]
    pairs.sort(key=lambda pair: (pair[0].is_right, -(pair[0].probability or 0.0)))
    return [
        {
            "id": new.id,
            "kind": "win" if new.is_right else "loss",
            "text": _cut(new.text),
            "gold": _cut(new.gold),
            "reference_answer": _cut(old.answer),
            "reference_probability": old.probability,
            "candidate_answer": _cut(new.answer),
            "candidate_probability": new.probability,
        }
        for new, old in pairs
    ]


def _labels(candidate: EvalReport, reference: EvalReport) -> list[dict[str, Any]]:
    """Per label, worst first: its gate examples, how many each side gets right, what the candidate takes them for."""
    gold = Counter(graded.gold for graded in candidate.answers)
    right, before = (Counter(g.gold for g in side.answers if g.answer == g.gold) for side in (candidate, reference))
    wrong = Counter((g.gold, g.answer) for g in candidate.answers if g.answer != g.gold).most_common()
    rows = [
        {
            "label": label,
            "num_examples": gold[label],
            "num_correct": right[label],
            "reference_num_correct": before[label],
            "recall": right[label] / gold[label] if gold[label] else None,
            "reference_recall": before[label] / gold[label] if gold[label] else None,
            "mistaken_for": [{"answer": answer, "count": count} for (name, answer), count in wrong if name == label][:3],
        }
        for label in candidate.labels
    ]
    return sorted(rows, key=lambda row: (row["num_correct"] - row["reference_num_correct"], row["recall"] or 0.0))


def _warnings(task: dict[str, Any]) -> list[str]:
    """Name what the verdict does not look at, such as a baseline that does better or a label that is never right now."""
    found = []
    if task["decision"] == Decision.REFUSED and not task["verdict"]:
        found.append(f"{task['candidate']} did not pass before, and nothing has changed since")
    value = task["candidate_result"]["value"] if task["candidate_result"] else 1.0
    for base in task["baselines"]:
        if base["value"] > value and base["system"] != task["reference"]:
            found.append(f"{base['system']} is better: {percent(base['value'])} against {percent(value)}")
    for row in task["labels"]:
        if row["num_examples"] >= MIN_CLASS_EXAMPLES and row["reference_num_correct"] and not row["num_correct"]:
            found.append(f"none of the {row['num_examples']} `{row['label']}` examples is right any more")
    return found


def _sentence(tasks: Sequence[dict[str, Any]]) -> str:
    """Say in one plain sentence what happened and what answers now."""
    names: dict[str, list[str]] = {}
    for task in sorted(tasks, key=lambda task: _SPOKEN_ORDER.index(task["decision"])):
        is_regressed = task["verdict"] and task["decision"] == Decision.REFUSED and not task["is_first_version"]
        word = "regressed" if is_regressed else task["decision"].replace(",", " but")
        names.setdefault(word, []).append(task["task"])
    parts = [f"{len(found)} {word}{'' if word in _SPOKEN_ORDER[:3] else f' ({_listed(found)})'}" for word, found in names.items()]
    sentence = f"{len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}: {', '.join(parts) or 'nothing to judge'}"
    behind = [task for task in tasks if task["decision"] in (Decision.FAILED, Decision.REFUSED, Decision.HELD_BACK)]
    if kept := [task["champion"] for task in behind if task["champion"]]:
        sentence += f"; {_listed(kept)} still {'answers' if len(kept) == 1 else 'answer'}"
    if silent := [task["task"] for task in behind if not task["champion"]]:
        sentence += f"; nothing answers for {_listed(silent)}"
    return sentence + "."


def _listed(names: Sequence[str]) -> str:
    shown = list(names) if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _axis(tasks: Sequence[dict[str, Any]]) -> float:
    """Choose the half-width of the difference axis; a first version's leap over zero-shot must not squeeze the rest."""
    judged = [task for task in tasks if task["verdict"]]
    shown = [task for task in judged if not task["is_first_version"]] or judged
    reach = max((abs(edge) for task in shown for edge in (*task["verdict"]["interval"], task["margin"])), default=0.0)
    return next(step for step in AXIS_STEPS if step >= min(reach, 1.0))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"
