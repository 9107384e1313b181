"""Live answers of champions and challengers: the counts of all replicas added up, with intervals and a sentence for each pair.

Nobody knows the right answers to live requests, so this tells agreement and never accuracy.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.paired import wilson
from orchestrator.report_words import percent
from serve.live_counts import COUNTS, Pair, PairCounts, SideCounts

logger = logging.getLogger(__name__)


def live_rows(folder: Path, *, is_newest_only: bool = False) -> list[dict[str, Any]]:
    """Every pair that was compared, JSON-able, by task and newest challenger first; or each task's newest challenger alone."""
    found = read_counts(folder)
    newest = {pair.task: max(other.challenger for other in found if other.task == pair.task) for pair in found}
    pairs = [pair for pair in found if not is_newest_only or pair.challenger == newest[pair.task]]
    pairs.sort(key=lambda pair: (pair.task, -pair.challenger, -pair.champion, pair.mode))
    return [_row(pair, found[pair]) for pair in pairs]


def read_counts(folder: Path) -> dict[Pair, PairCounts]:
    """Add up the files of all replicas; one that cannot be read is named in the log and left out."""
    found: defaultdict[Pair, PairCounts] = defaultdict(PairCounts)
    for file in sorted(folder.glob("*.json")):
        try:
            entries = COUNTS.validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            logger.warning("live counts left out file=%s error=%r", file, error)
            continue
        for pair, counts in entries:
            found[pair] += counts
    return dict(found)


def _row(pair: Pair, counts: PairCounts) -> dict[str, Any]:
    champion, challenger = f"{pair.task}@{pair.champion}", f"{pair.task}@{pair.challenger}"
    labels = sorted({*counts.champion.labels, *counts.challenger.labels})
    num_asked = counts.challenger.num_requests + counts.num_errors
    row: dict[str, Any] = {
        "task": pair.task,
        "mode": pair.mode,
        "champion": _side(champion, counts.champion, labels),
        "challenger": _side(challenger, counts.challenger, labels),
        "errors": _share(counts.num_errors, num_asked),
        "num_dropped": counts.num_dropped,
        "agreement": None,
        "mean_difference": None,
        "table": [],
    }
    if pair.mode == "shadow":
        num_compared = counts.champion.num_inputs
        row["agreement"] = _share(counts.num_agreed, num_compared)
        row["mean_difference"] = _mean(counts.difference, counts.table.total())
        row["table"] = _table(counts.table)
    return {**row, "sentence": _sentence(row)}


def _side(system: str, side: SideCounts, labels: list[str]) -> dict[str, Any]:
    num_labelled = side.labels.total()
    return {
        "system": system,
        "num_requests": side.num_requests,
        "num_inputs": side.num_inputs,
        "mean_probability": _mean(side.confidence, num_labelled),
        "mean_s": _mean(side.seconds, side.num_requests),
        "abstained": _share(side.num_abstained, side.num_inputs),
        "labels": [{"label": label, **_share(side.labels[label], num_labelled)} for label in labels],
    }


def _share(count: int, total: int) -> dict[str, Any]:
    """A count with its share and the share's 95 % Wilson interval; none of nothing."""
    return {
        "count": count,
        "of": total,
        "share": count / total if total else None,
        "interval": list(wilson(count, total)) if total else None,
    }


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _table(table: Counter[str]) -> list[dict[str, Any]]:
    """Champion's label, challenger's label, inputs: flips first, the most frequent ones first."""
    cells = [(*json.loads(key), count) for key, count in table.items()]
    cells.sort(key=lambda cell: (cell[0] == cell[1], -cell[2], cell))
    return [{"champion": old, "challenger": new, "count": count} for old, new, count in cells]


def _sentence(row: dict[str, Any]) -> str:
    """What a person should know of a pair."""
    champion, challenger = row["champion"], row["challenger"]
    said = _shadow_sentence(row) if row["mode"] == "shadow" else _canary_sentence(champion, challenger)
    if row["errors"]["count"]:
        requests = f"{row['errors']['count']:,} of {row['errors']['of']:,} requests{_between(row['errors'])}"
        said += f" {challenger['system']} failed {requests}, which the champion answered."
    if row["num_dropped"]:
        said += f" {row['num_dropped']:,} inputs were not compared, for want of idle time."
    return said


def _shadow_sentence(row: dict[str, Any]) -> str:
    champion, challenger, agreed = row["champion"]["system"], row["challenger"]["system"], row["agreement"]
    if not agreed["of"]:
        return f"In shadow, {champion} and challenger {challenger} were not compared yet."
    inputs = f"{agreed['count']:,} of {agreed['of']:,} inputs{_between(agreed)}"
    return f"In shadow, {champion} and challenger {challenger} agreed on {inputs}."


def _canary_sentence(champion: dict[str, Any], challenger: dict[str, Any]) -> str:
    num_requests = champion["num_requests"] + challenger["num_requests"]
    said = f"As a canary, {challenger['system']} answered {challenger['num_requests']:,} of {num_requests:,} requests, "
    said += f"champion {champion['system']} the others"
    pairs = [(new, old) for new, old in zip(challenger["labels"], champion["labels"], strict=True) if new["of"] and old["of"]]
    if not pairs:
        return f"{said}."
    new, old = max(pairs, key=lambda pair: abs(pair[0]["share"] - pair[1]["share"]))
    shares = f"{percent(new['share'])}{_between(new)} of its inputs, {percent(old['share'])}{_between(old)} of the champion's"
    return f"{said}; they differ most in {new['label']}: {shares}."


def _between(share: dict[str, Any]) -> str:
    low, high = share["interval"]
    return f" ({100 * low:.1f}-{100 * high:.1f} %)"
