"""Benchmarks run, say that their results are correct, and name their ratios; their values are a quiet machine's business.

submit.py, serve.py and soak.py, minutes of real Ray and real scripts, are run by hand.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MIXED = "all_linear_16_fp32 peft_all_linear_16_fp32 all_linear_16_bf16 peft_all_linear_16_bf16 qv_16_fp32 peft_qv_16_fp32"
RATIOS = {
    "mixed_batch": [*MIXED.split(), "growth_1_to_32"],
    "cotrain": ["short_8_vs_peft", "short_8_vs_peft_fp32", "short_1_vs_peft", "long_8_vs_peft", "long_8_vs_peft_fp32"],
    "memory": ["training_bytes_per_parameter", "serving_size_ratio"],
    "cluster_scale": ["plan_1000_s", "makespan_undisturbed", "makespan_disturbed", "events_per_s_disturbed"],
    "gate_power": ["max_false_block_percent", "max_points_from_notes", "max_naive_false_alarm_percent"],
    "judge_scale": ["judge_s", "judge_and_report_s"],
    "routing": ["recall", "precision", "best", "tfidf_recall", "tfidf_precision", "at_once_ms", "alone_ms"],
}
FAST = ("cluster_scale",)


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) for name in RATIOS if name not in FAST)]
)
def test_benchmark_runs_and_is_correct(name, tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--rounds", "1", "--json", str(file)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    result = json.loads(file.read_text(encoding="utf-8"))
    assert set(RATIOS[name]) <= set(result["ratios"])
    assert all(value > 0 for value in result["ratios"].values())
    assert result["is_correct"] is True
    checked = [row for row in result["rows"] if row["difference"] is not None]
    assert checked
    assert all(row["is_correct"] for row in checked)
    assert {"machine", "commit", "versions", "config"} <= set(result)
    assert "correct" in found.stdout
