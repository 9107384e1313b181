"""The report's banner in words: what happened, the evidence for the worst of it, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.judge import Outcome
from orchestrator.report_words import Decision, listed, p_value, percent, signed

QUIET = (Decision.PROMOTED, Decision.VERIFIED_AGAIN, Decision.UNCHANGED, Decision.VERIFIED)
"""Counted and not named."""
BEHIND = (Decision.FAILED, Decision.IN_PRODUCTION, Decision.REFUSED, Decision.HELD_BACK)
"""What still answers is said."""


def sentence_of(tasks: Sequence[dict[str, Any]], pooled: Mapping[str, Any] | None, errors: Mapping[str, str]) -> str:
    """Say in one plain sentence what happened, worst first, and what answers now; `errors` are of tasks not among `tasks`."""
    names: dict[str, list[str]] = {}
    for task in tasks:
        is_regressed = task["verdict"] and task["decision"] == Decision.REFUSED and not task["is_first_version"]
        word = "regressed" if is_regressed else task["decision"].replace(",", " but")
        names.setdefault(word, []).append(task["task"])
    parts = [f"{len(found)} {word}{'' if word in QUIET else f' ({listed(found)})'}" for word, found in names.items()]
    sentence = f"{len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}: {', '.join(parts) or 'nothing to judge'}"
    if pooled and pooled["is_drop"]:
        sentence += (
            f"; the {len(pooled['tasks'])} changed tasks together got worse "
            f"({pooled['num_losses']} lost, {pooled['num_wins']} won, {p_value(pooled['p'])})"
        )
    behind = [task for task in tasks if task["decision"] in BEHIND]
    if kept := [task["champion"] for task in behind if task["champion"]]:
        sentence += f"; {listed(kept)} still {'answers' if len(kept) == 1 else 'answer'}"
    if silent := [task["task"] for task in behind if not task["champion"]]:
        sentence += f"; nothing answers for {listed(silent)}"
    if errors:
        sentence += f"; no comparison for {listed(sorted(errors))}"
    return sentence + "."


def evidence_of(tasks: Sequence[dict[str, Any]]) -> str:
    """The numbers of the worst task that was judged and did not simply pass; empty where all did."""
    passed = (*QUIET, Decision.FAILED)
    task = next((task for task in tasks if task["verdict"] and task["decision"] not in passed), None)
    if task is None:
        return ""
    verdict, before, now = task["verdict"], task["reference_result"], task["candidate_result"]
    low, high = verdict["interval"]
    is_corrected = verdict["p_holm"] is not None
    p = f"Holm-corrected {p_value(verdict['p_holm'])}" if is_corrected else p_value(verdict["p_worse"])
    metric = "" if task["metric"] == "accuracy" else f"{task['metric']} "
    return (
        f"{task['task']}: {metric}{percent(before['value'])} → {percent(now['value'])}, {signed(verdict['difference'])} points "
        f"(90 % interval {signed(low)} to {signed(high)}); {verdict['num_losses']} lost, {verdict['num_wins']} won of "
        f"{task['num_examples']} gate examples; {p}."
    )


def next_step(outcome: Outcome, tasks: Sequence[dict[str, Any]], pooled: Mapping[str, Any] | None) -> str:
    """Say what to do, with numbers where there are some."""
    if outcome is Outcome.ERROR:
        return "What failed was not compared, so nothing is known about it: mend the error below and submit again."
    steps = []
    if outcome is Outcome.BLOCK:
        decisions = {task["decision"] for task in tasks if task["policy"] != "advisory"}
        if Decision.IN_PRODUCTION in decisions:
            steps.append("Undo what changed under the champion (engine or library versions), or train it again.")
        if Decision.REFUSED in decisions:
            steps.append("Read below what was lost, mend the examples, the instruction or the labels, and submit again.")
        if pooled and pooled["is_drop"]:
            steps.append(
                "The changed tasks lost a little each: look for what they have in common, such as base, prompt or engine."
            )
    if open_tasks := [task for task in tasks if task["verdict"] and task["verdict"]["num_more"]]:
        counts = {task["task"]: task["verdict"]["num_more"] for task in open_tasks}
        needs = [f"{name} needs {f'{count:,} ' if count > 1 else ''}more" for name, count in counts.items()]
        steps.append(f"Too few gate examples to tell better from worse: {listed(needs)}.")
    return " ".join(steps) or "Nothing has to be done."
