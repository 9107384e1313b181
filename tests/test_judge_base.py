"""bases/judge.py on tiny bases, two public tasks and few rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bases import judge
from bases.judging_table import bars
from bases.judging_tasks import JUDGING_TASKS

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
TASKS = ["snips", "sms_spam"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "tasks").is_dir(), reason="the judging tasks are not beside this checkout"),
]


def arguments(base, out, *more):
    settings = ["--sizes", "8", "16", "--seeds", "1", "--rows", "24", "--epochs", "2", "--min-steps", "3", "--device", "cpu"]
    return ["--base", str(base), "--data", str(SHARED), "--out", str(out), "--tasks", *TASKS, *settings, *more]


@pytest.fixture(scope="module")
def results(base_folder, tmp_path_factory):
    """Results files of a family, measured once."""
    files = {}

    def measured(family):
        if family not in files:
            out = files[family] = tmp_path_factory.mktemp(family) / "results.json"
            judge.main(arguments(base_folder(family), out, "--name", f"tiny-{family}"))
        return files[family]

    return measured


def test_a_file_has_every_number(family, results):
    whole = json.loads(results(family).read_text())
    assert list(whole["tasks"]) == TASKS
    assert whole["family"] == family
    assert whole["learning_rate"] == (2e-3 if family == "encoder" else 1e-3)
    for found in whole["tasks"].values():
        assert found["test_rows"] == 24
        assert found["failures"] == {}
        every = [[found[key]] for key in ("majority", "zero_shot", "zero_shot_calibrated")]
        every += [*found["tf_idf"].values(), *found["lora"].values()]
        assert [len(seeds) for seeds in every] == [1] * 7
        assert all(0 <= accuracy <= 1 for seeds in every for accuracy in seeds)


def test_a_second_run_does_nothing_anew_and_a_killed_one_goes_on(base_folder, results, tmp_path, monkeypatch):
    before = results("encoder").read_text()
    whole = json.loads(before)
    base = base_folder("encoder")
    monkeypatch.setattr(judge, "load_base", None)
    judge.main(arguments(base, results("encoder"), "--name", "tiny-encoder"))
    assert results("encoder").read_text() == before
    monkeypatch.undo()
    killed = tmp_path / "killed.json"
    killed.write_text(json.dumps({**whole, "tasks": {"snips": {**whole["tasks"]["snips"], "zero_shot": 2.0}}}))
    judge.main(arguments(base, killed, "--name", "tiny-encoder"))
    tasks = json.loads(killed.read_text())["tasks"]
    assert tasks["snips"]["zero_shot"] == 2.0, "measured again"
    assert {**tasks["sms_spam"], "seconds": 0} == {**whole["tasks"]["sms_spam"], "seconds": 0}


def test_a_file_of_other_settings_is_left_alone(base_folder, results):
    with pytest.raises(SystemExit, match="other settings"):
        judge.main(arguments(base_folder("encoder"), results("encoder"), "--name", "tiny-encoder", "--rows", "25"))


def test_tasks_trained_in_one_group_have_the_numbers_of_each_alone(base_folder, results, tmp_path):
    together = tmp_path / "together.json"
    judge.main(arguments(base_folder("encoder"), together, "--name", "tiny-encoder", "--tasks-at-once", "2"))
    for name, alone in json.loads(results("encoder").read_text())["tasks"].items():
        assert {**json.loads(together.read_text())["tasks"][name], "seconds": 0} == {**alone, "seconds": 0}


def test_word_counts_may_come_from_another_file(base_folder, results, tmp_path, capsys):
    without = tmp_path / "without.json"
    judge.main(arguments(base_folder("seq2seq"), without, "--name", "tiny-seq2seq", "--without-tf-idf"))
    capsys.readouterr()
    judge.main(["--table", str(results("encoder")), str(without)])
    shown = capsys.readouterr().out
    judge.main(["--table", str(results("encoder")), str(results("seq2seq"))])
    assert shown == capsys.readouterr().out


def test_the_table_says_the_bars(results, capsys):
    judge.main(["--table", str(results("encoder")), str(results("seq2seq"))])
    head, line, *rows = capsys.readouterr().out.splitlines()
    titles = "task, majority, tiny-encoder zero-shot, tiny-seq2seq zero-shot, tiny-encoder calibrated, tiny-seq2seq calibrated, "
    titles += "TF-IDF@8, TF-IDF@16, "
    titles += "tiny-encoder LoRA@8, tiny-encoder LoRA@16, tiny-seq2seq LoRA@8, tiny-seq2seq LoRA@16"
    assert head.strip("| ").split(" | ") == titles.split(", ")
    assert [row.split(" | ")[0] for row in rows[:3]] == ["| sms_spam", "| snips", "| mean of 2"]
    assert {row.count("|") for row in (head, line, *rows[:3])} == {13}
    assert [row.rpartition(": ")[2] for row in rows[4:]].count("not measured") == 4
    assert rows[5].startswith("- tiny-encoder: zero-shot less majority (bar: +5 points): ")


def test_bars_are_passed_and_missed():
    columns = {
        "majority": {"a": [0.5], "b": [0.5]},
        "new zero-shot": {"a": [0.62], "b": [0.5]},
        "new calibrated": {"a": [0.56], "b": [0.52]},
        "TF-IDF@200": {"a": [0.6, 0.8], "b": [0.7]},
        "new LoRA@200": {"a": [0.7, 0.8], "b": [None, 0.73]},
        "TF-IDF@1000": {"a": [0.8], "b": [0.8]},
        "new LoRA@1000": {"a": [0.9], "b": [0.8]},
    }
    assert [line.partition(" (bar: ")[2] for line in bars("new", columns)] == [
        "+3 points): +4.0 over 2 tasks, passed",
        "+5 points): +6.0 over 2 tasks, passed",
        "+5 points): +4.0 over 2 tasks, missed",
        "most tasks): 1 better over 2 tasks, missed",
    ]


def test_samples_are_nested_and_labels_are_words():
    for name in JUDGING_TASKS:
        task = judge.JudgedTask.read(SHARED, name, 500)
        small, large = task.sample(50, 1), task.sample(1000, 1)
        assert large[:50] == small
        assert task.sample(50, 2) != small
        assert {example.label for example in task.test} <= set(task.labels)
        assert not any("_" in label for label in task.labels)


@pytest.mark.long
def test_it_loads_neither_ray_nor_mlflow_nor_needs_datasets():
    # A finder that knows no `datasets` is what a machine without it has.
    code = """
import sys, importlib.machinery as machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.split(".")[0] in MISSING else find(name, *rest)
)
MISSING = ("ray", "mlflow", "datasets", "bitsandbytes")
from bases import judge
import transformers.trainer_utils
print(*(name for name in MISSING if name in sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
