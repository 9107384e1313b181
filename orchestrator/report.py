"""The cross-task report: everything that a submission found out and decided, as one JSON-able object."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

from orchestrator.eval_report import EvalReport
from orchestrator.history import PromotionEvent
from orchestrator.judge import ALPHA_HARD, ALPHA_POOLED, ALPHA_TASKS, Outcome, Release, Verdict, VerdictKind
from orchestrator.paired import fewest_losses
from orchestrator.power import ALPHA_MARGIN
from orchestrator.report_history import cross, history
from orchestrator.report_parts import (
    MAX_TEXT,
    anatomy,
    confusions,
    flips,
    label_rows,
    label_tests,
    reliability,
    result,
    shown_flip,
)
from orchestrator.report_sentence import evidence_of, next_step, sentence_of
from orchestrator.report_words import Decision, percent, signed
from orchestrator.search import Found

SCHEMA_VERSION = 2
State = Literal["judged", "rechecked", "unchanged", "verified", "failed"]

MAX_FLIPS = 50
"""Flips shown per task; flips.jsonl has all."""
MAX_FLIPS_TOTAL = 1500
"""Flips shown in one report, so that a report of 200 tasks still opens at once."""
FEW_TASKS = 50
"""Up to so many judged tasks, texts are shown at length."""
MANY_CONSULTS = 5
"""From so many judged candidates on, a gate split flatters the one that it chose (docs/gate.md)."""
SUSPECT = 0.1
"""Corrected p below which a label is listed as a suspect."""
AXIS_STEPS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class TaskOutcome:
    """What one submission found out about one task.

    judged: a candidate was evaluated and got a verdict. rechecked: no candidate, but what the champion runs on changed, so it
    was evaluated again and compared with its own earlier answers. unchanged: spec, data and base are as they were, nothing
    was trained. verified: not part of this submission; its champion was bound again and passed its canaries. failed: see error.
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
    search: Found | None = None
    """What the search for the candidate's settings found."""


_OUTCOME_OF = {
    Decision.FAILED: Outcome.ERROR,
    Decision.IN_PRODUCTION: Outcome.BLOCK,
    Decision.REFUSED: Outcome.BLOCK,
    Decision.HELD_BACK: Outcome.HOLD,
    Decision.IN_DOUBT: Outcome.HOLD,
    Decision.UNPROVEN: Outcome.HOLD,
}


def build_report(
    outcomes: Sequence[TaskOutcome],
    created: datetime,
    facts: Mapping[str, str],
    release: Release | None = None,
    events: Sequence[PromotionEvent] = (),
    matrices: Sequence[Mapping[str, Any]] = (),
    live: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Gather every number of a submission into one JSON-able object. Shares are fractions 0..1; worst tasks first.

    `events` are all promotion events, this one last; `matrices` hold answers of every adapter on every task,
    `live` those of champions and challengers to requests (live.py). The key `flips` has every flip whole, and is written to
    flips.jsonl alone.
    """
    labels = {outcome.task: _labels_of(outcome) for outcome in outcomes}
    errors = dict(release.errors) if release else {}
    tasks = [_task(o, _elsewhere(labels, o.task), errors.pop(o.task, "")) for o in outcomes]
    tasks.sort(
        key=lambda task: (list(Decision).index(task["decision"]), task["verdict"]["difference"] if task["verdict"] else 0.0)
    )
    suspects, all_flips = _suspects(tasks), _cut_flips(tasks)
    cells = events[-1].cells if events else {}
    for task in tasks:
        task["cell_state"] = str(cells[task["task"]].state) if task["task"] in cells else None
    pooled = _pooled(release)
    outcome = _outcome(tasks, pooled, is_error=bool(errors))
    report = {
        "schema_version": SCHEMA_VERSION,
        "outcome": outcome,
        "sentence": sentence_of(tasks, pooled, errors),
        "evidence": evidence_of(tasks),
        "next_step": next_step(outcome, tasks, pooled),
        "created": created.isoformat(timespec="seconds"),
        "who": events[-1].who if events else "",
        "event": events[-1].id if events else "",
        "facts": dict(facts),
        "alpha": {"tasks": ALPHA_TASKS, "pooled": ALPHA_POOLED, "margin": ALPHA_MARGIN, "hard": ALPHA_HARD},
        "fewest_losses": fewest_losses(ALPHA_TASKS),
        "pooled": pooled,
        "axis": _axis(tasks),
        "tasks": tasks,
        "suspects": suspects,
        "history": history([*events[:-1], *(replace(event, outcome=outcome) for event in events[-1:])]),
        "live": list(live),
        "cross": [cross(matrix) for matrix in matrices],
        "flips": all_flips,
    }
    return dict(json.loads(json.dumps(report, allow_nan=False)))


def _task(outcome: TaskOutcome, labels_elsewhere: Set[str], release_error: str) -> dict[str, Any]:
    error = outcome.error or release_error or _problem(outcome)
    candidate, reference, verdict = outcome.candidate_report, outcome.reference_report, outcome.verdict
    if error:
        candidate = reference = verdict = None
    task: dict[str, Any] = {
        "task": outcome.task,
        "description": outcome.description,
        "state": outcome.state,
        "decision": _decision(outcome, verdict, error),
        "error": error,
        "policy": outcome.policy,
        "metric": outcome.metric,
        "minimum": outcome.minimum,
        "margin": outcome.margin,
        "champion": outcome.champion,
        "candidate": outcome.candidate,
        "reference": outcome.reference,
        "is_first_version": outcome.reference == "zero-shot",
        "run_id": outcome.run_id,
        "search": {**asdict(outcome.search), "sentence": outcome.search.sentence} if outcome.search else None,
        "changed": sorted(outcome.changed),
        "num_consults": outcome.num_consults,
        "contamination": list(outcome.contamination),
        "num_examples": len(candidate.answers) if candidate else 0,
        "gate_fingerprint": candidate.gate_fingerprint if candidate else "",
        "label_names": list(candidate.labels) if candidate else [],
        "verdict": _numbers(verdict, candidate) if verdict and candidate else None,
        "best_ever": outcome.best_ever,
        "candidate_result": result(candidate, outcome.metric) if candidate else None,
        "reference_result": result(reference, outcome.metric) if reference else None,
        "baselines": [result(report, outcome.metric) for report in outcome.baselines] if candidate else [],
        "flips": flips(candidate, reference) if candidate and reference else [],
        "errors": anatomy(candidate, reference, labels_elsewhere) if candidate and reference else [],
        "confusions": confusions(candidate, reference) if candidate and reference else [],
        "labels": label_rows(candidate, reference) if candidate and reference else [],
        "calibration": reliability(candidate) if candidate else None,
        "reference_calibration": reliability(reference) if reference else None,
    }
    return {**task, "warnings": _warnings(task)}


def _numbers(verdict: Verdict, candidate: EvalReport) -> dict[str, Any]:
    num_examples = len(candidate.answers)
    return {
        **asdict(verdict),
        "accuracy_difference": (verdict.num_wins - verdict.num_losses) / num_examples,
        "num_more": verdict.examples_needed and verdict.examples_needed - num_examples,
    }


def _problem(outcome: TaskOutcome) -> str:
    """Say why the comparison is not valid; an invalid comparison never passes."""
    if outcome.state == "failed":
        return "failed without a message; see the log"
    candidate, reference, verdict = outcome.candidate_report, outcome.reference_report, outcome.verdict
    if (verdict or outcome.state in ("judged", "rechecked")) and not (candidate and reference and verdict):
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
    if verdict and outcome.state == "rechecked":
        found = {VerdictKind.REGRESSED: Decision.IN_PRODUCTION, VerdictKind.INCONCLUSIVE: Decision.IN_DOUBT}
        return found.get(verdict.kind, Decision.VERIFIED_AGAIN)
    if verdict and not verdict.is_promoted:
        return Decision.REFUSED if verdict.kind is VerdictKind.REGRESSED else Decision.HELD_BACK
    if verdict and outcome.policy == "advisory" and _is_against_advice(verdict):
        return Decision.AGAINST_ADVICE
    if verdict:
        return Decision.UNPROVEN if verdict.kind is VerdictKind.INCONCLUSIVE else Decision.PROMOTED
    if outcome.state == "verified":
        return Decision.VERIFIED
    # Submitting a refused version once more does not make it pass.
    return Decision.REFUSED if outcome.candidate not in (None, outcome.champion) else Decision.UNCHANGED


def _is_against_advice(verdict: Verdict) -> bool:
    """Whether a balanced gate would not have promoted it."""
    return verdict.kind is VerdictKind.REGRESSED or (verdict.kind is VerdictKind.INCONCLUSIVE and verdict.difference < 0)


def _pooled(release: Release | None) -> dict[str, Any] | None:
    """The test of all changed tasks together."""
    if release is None:
        return None
    return {
        "tasks": sorted(release.pooled),
        "num_losses": release.pooled_losses,
        "num_wins": release.pooled_wins,
        "p": release.pooled_p,
        "is_drop": release.is_pooled_drop,
    }


def _outcome(tasks: Sequence[dict[str, Any]], pooled: Mapping[str, Any] | None, is_error: bool) -> Outcome:
    """The worst of what counts; of a task under an advisory gate only a failure does."""
    counted = [task["decision"] for task in tasks if task["policy"] != "advisory" or task["decision"] == Decision.FAILED]
    found = [_OUTCOME_OF.get(decision, Outcome.CLEAR) for decision in counted]
    if pooled and pooled["is_drop"]:
        found.append(Outcome.BLOCK)
    if is_error:
        found.append(Outcome.ERROR)
    return min(found, key=list(Outcome).index, default=Outcome.CLEAR)


def _labels_of(outcome: TaskOutcome) -> frozenset[str]:
    report = outcome.candidate_report or outcome.reference_report
    return frozenset(report.labels if report else ())


def _elsewhere(labels: Mapping[str, Set[str]], task: str) -> Set[str]:
    return frozenset().union(*(found for name, found in labels.items() if name != task))


def _suspects(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Test the recall of every label with a flip, note both p values in the tasks' rows, and list what looks suspicious."""
    compared = [task for task in tasks if task["verdict"] and not task["is_first_version"]]
    rows = {
        (task["task"], row["label"]): row for task in compared for row in task["labels"] if row["num_losses"] + row["num_wins"]
    }
    found = label_tests({key: (row["num_losses"], row["num_wins"]) for key, row in rows.items()})
    for key, (p_worse, p_corrected) in found.items():
        rows[key].update(p_worse=p_worse, p_corrected=p_corrected)
    suspects = sorted(
        (key for key, (_, p_corrected) in found.items() if p_corrected < SUSPECT), key=lambda key: (found[key], key)
    )
    return [{"task": task, **rows[task, label]} for task, label in suspects]


def _cut_flips(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave each task the flips that are shown, and return all of them."""
    num_judged = max(sum(task["verdict"] is not None for task in tasks), 1)
    most, most_text = min(MAX_FLIPS, MAX_FLIPS_TOTAL // num_judged), MAX_TEXT if num_judged <= FEW_TASKS else MAX_TEXT // 2
    found = []
    for task in tasks:
        names = {name: task[f"{name}_result"]["system"] for name in ("reference", "candidate") if task["flips"]}
        found += [{"task": task["task"], **names, **flip} for flip in task["flips"]]
        task["num_flips_hidden"] = max(len(task["flips"]) - most, 0)
        task["flips"] = [shown_flip(flip, most_text) for flip in task["flips"][:most]]
    return found


def _warnings(task: dict[str, Any]) -> list[str]:
    """Name what the verdict does not look at, such as a baseline that does better or a gate split that chose too often."""
    found = []
    if task["decision"] == Decision.REFUSED and not task["verdict"]:
        found.append(f"{task['candidate']} did not pass before, and nothing has changed since")
    candidate = task["candidate_result"]
    value = candidate["value"] if candidate else 1.0
    for base in task["baselines"]:
        if base["value"] > value and base["system"] != task["reference"]:
            found.append(f"{base['system']} is better: {percent(base['value'])} against {percent(value)}")
    if candidate and task["best_ever"] is not None and value < task["best_ever"] - task["margin"]:
        change = signed(value - task["best_ever"])
        found.append(f"{change} points against the best it ever had on these examples ({percent(task['best_ever'])})")
    if task["num_consults"] >= MANY_CONSULTS:
        found.append(
            f"its gate split has judged {task['num_consults']} candidates and flatters the one it chose: use new examples"
        )
    if candidate and candidate["num_truncated"]:
        found.append(f"{candidate['num_truncated']} of {task['num_examples']} inputs were cut to fit max_length")
    if task["search"]:
        found.append(task["search"]["sentence"])
    return [*found, *task["contamination"]]


def _axis(tasks: Sequence[dict[str, Any]]) -> float:
    """Choose the half-width of the difference axis; a first version's leap over zero-shot must not squeeze the rest."""
    judged = [task for task in tasks if task["verdict"]]
    shown = [task for task in judged if not task["is_first_version"]] or judged
    reach = max((abs(edge) for task in shown for edge in (*task["verdict"]["interval"], task["margin"])), default=0.0)
    return next(step for step in AXIS_STEPS if step >= min(reach, 1.0))
