"""Public data as a person would bring it: 400 labelled examples a task, against the base and a baseline that costs nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from e2e.conftest import MINILM, SHARED, CommandLine, needs_minilm, write_spec

TASKS = ("snips", "banking77", "scicite")
NUM_TRAIN, NUM_GATE = 400, 200


def rows_of(name: str, split: str) -> list[dict[str, str]]:
    """Unique rows of a public data set, shuffled with a fixed seed."""
    rows = [json.loads(line) for line in (SHARED / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    unique = list({row["text"]: row for row in rows}.values())
    random.Random(0).shuffle(unique)
    return unique


@pytest.mark.e2e
@pytest.mark.slow
@needs_minilm()
@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not beside this checkout")
def test_three_public_tasks_beat_the_base_and_on_average_tf_idf(cli: CommandLine, tmp_path: Path) -> None:
    specs = []
    for name in TASKS:
        train = rows_of(name, "train")
        seen = {row["text"] for row in train}
        gate = [row for row in rows_of(name, "test") if row["text"] not in seen][:NUM_GATE]
        labels = sorted({row["label"] for row in train})
        file = write_spec(
            tmp_path, name, train, MINILM, dict.fromkeys(labels), epochs=5, learning_rate=2e-3, max_examples=NUM_TRAIN
        )
        (tmp_path / f"{name}-gate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gate), encoding="utf-8")
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
        spec["data"]["gate"] = f"{name}-gate.jsonl"
        file.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        specs.append(file)

    report = cli.json("submit", *specs)

    adapters, tf_idf = [], []
    for task in report["tasks"]:
        baselines = {result["system"]: result["value"] for result in task["baselines"]}
        accuracy = task["candidate_result"]["value"]
        assert task["num_examples"] == NUM_GATE
        assert accuracy > baselines["zero-shot"], f"{task['task']}: {accuracy} against {baselines}"
        assert task["decision"] == "promoted"
        adapters.append(accuracy)
        tf_idf.append(baselines["tf-idf"])
    assert sum(adapters) > sum(tf_idf), f"{adapters} against {tf_idf}"
