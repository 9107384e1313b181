"""Law 12: specs -> adapters -> gate -> champion -> HTTP answer; a worse candidate is refused; the good version still answers."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import peft
import pytest
import torch
import transformers
import yaml

from e2e.conftest import DATA, CommandLine, demo_task, needs_minilm, wait_for
from e2e.endpoint import free_port
from multilora.base_files import find_base
from multilora.spec import BaseSpec

pytestmark = [pytest.mark.e2e, needs_minilm()]


def test_from_spec_to_answer_and_a_worse_candidate_is_refused(cli: CommandLine, tmp_path: Path) -> None:
    specs = [demo_task(tmp_path, name, epochs=2, learning_rate=2e-3) for name in ("question-type", "message-urgency")]
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: broken\nbase: {model: x}\n", encoding="utf-8")

    # One bad file is named, with what to do, and the others go on. A second submit of the same waits for its turn.
    first = cli.start("submit", *specs, broken, "--json")
    wait_for(lambda: cli.json("status")["submissions"], 60)
    second = cli.start("submit", *specs)
    out, err = first.communicate(timeout=600)
    assert first.returncode == 2, err
    report = json.loads(out)
    assert "Nothing changed" in second.communicate(timeout=120)[0]
    assert second.returncode == 0
    assert {p["field"] for p in report["problems"]} == {"data", "instruction"}
    assert report["outcome"] == "CLEAR"
    by_task = {task["task"]: task for task in report["tasks"]}
    for name in ("question-type", "message-urgency"):
        task = by_task[name]
        baselines = {result["system"]: result["value"] for result in task["baselines"]}
        assert task["champion"] == f"{name}@1"
        assert task["candidate_result"]["value"] > max(baselines.values())
    html = next(cli.workspace.glob("reports/*/report.html")).read_text(encoding="utf-8")
    assert "question-type@1" in html

    # It trained nothing.
    assert [row["num_versions"] for row in cli.json("status")["tasks"]] == [1, 1]

    # The endpoint answers as plain PEFT does.
    port = free_port()
    cli.run("serve", "--port", port)
    url = f"http://127.0.0.1:{port}"
    texts = ["Whose idea was the weekend?", "How many legs has a crab?", "Why is the sea salty?", "Which street is it in?"]
    answer = httpx.post(f"{url}/v1/classify", json={"model": "question-type", "input": texts}, timeout=60).json()
    assert answer["version"] == 1
    assert answer["digest"] == by_task["question-type"]["candidate_result"]["digest"]
    expected = _plain_peft(next(cli.workspace.glob("downloads/question-type/1-*/artifacts/adapter")), specs[0], texts)
    for result, probabilities in zip(answer["results"], expected, strict=True):
        assert list(result["probabilities"].values()) == pytest.approx(probabilities, abs=1e-3)
        assert result["label"] in yaml.safe_load(specs[0].read_text())["labels"]

    # Nothing answers in the name of a task that does not exist; the list helps.
    missing = httpx.post(f"{url}/v1/classify", json={"model": "question-typ", "input": "x"}, timeout=60)
    assert missing.status_code == 404
    assert "question-type" in missing.json()["error"]["message"]

    # A candidate trained on swapped labels is refused, and version 1 still answers, for this task and the other.
    spoiled = _with_rotated_train_labels(tmp_path, specs[0])
    report = cli.json("submit", spoiled, code=3)
    refused = {task["task"]: task for task in report["tasks"]}
    assert refused["question-type"]["verdict"]["kind"] == "REGRESSED"
    assert refused["question-type"]["champion"] == "question-type@1"
    assert refused["message-urgency"]["state"] == "verified"
    again = httpx.post(f"{url}/v1/classify", json={"model": "question-type", "input": texts}, timeout=60).json()
    assert again == answer
    assert cli.run("query", "message-urgency", "The stairs are on fire.").split()[0] == "high"

    _a_person_decides_otherwise(cli, url, texts, spoiled)


def _a_person_decides_otherwise(cli: CommandLine, url: str, texts: list[str], spoiled: Path) -> None:
    """Past the gate and back: the running endpoint follows, and the next submission does not undo it."""
    # Both events are in the history and, with every face of the report, in MLflow.
    events = cli.json("history", "question-type")["events"]
    assert [(event["version"], event["state"]) for event in events] == [("question-type@1", "measured")] * 2
    assert [event["outcome"] for event in events] == ["CLEAR", "BLOCK"]
    logged = [
        {file.name for file in page.parent.iterdir()}
        for page in cli.workspace.glob("artifacts/regression-reports/*/artifacts/report.html")
    ]
    assert logged == [{"report.html", "report.json", "report.md", "junit.xml", "flips.jsonl"}] * 2

    def version_now() -> int:
        return int(
            httpx.post(f"{url}/v1/classify", json={"model": "question-type", "input": texts}, timeout=60).json()["version"]
        )

    cli.run("promote", "question-type@2", "--force", "--reason", "the labels were rotated on purpose")
    wait_for(lambda: version_now() == 2, 30)
    assert cli.json("rollback", "question-type")["after"] == "question-type@1"
    wait_for(lambda: version_now() == 1, 30)
    assert "Nothing changed" in cli.run("submit", spoiled, code=3)  # the rolled-back version is not promoted again
    assert version_now() == 1


def _plain_peft(adapter: Path, spec_file: Path, texts: list[str]) -> list[list[float]]:
    """Label probabilities by transformers, PEFT and the card's temperature alone, one text at a time."""
    spec = yaml.safe_load(spec_file.read_text(encoding="utf-8"))
    folder = find_base(BaseSpec(**spec["base"])).folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def pooled(model: torch.nn.Module, text: str) -> torch.Tensor:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(states.mean(1), dim=-1)[0]

    base = transformers.AutoModel.from_pretrained(folder).eval()
    labels = torch.stack([pooled(base, f"{name}: {meaning}") for name, meaning in spec["labels"].items()])
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    temperature = json.loads((adapter / "task_card.json").read_text(encoding="utf-8"))["temperature"]
    return [torch.softmax(20 * labels @ pooled(model, text) / temperature, dim=-1).tolist() for text in texts]


def _with_rotated_train_labels(folder: Path, spec_file: Path) -> Path:
    """The same task with its own gate rows right and every training label moved on by one."""
    from multilora.spec_files import load_task_specs
    from orchestrator.dataset import build_dataset

    dataset = build_dataset(load_task_specs([spec_file])[0])
    spec = yaml.safe_load(spec_file.read_text(encoding="utf-8"))
    names = list(spec["labels"])
    for split in ("train", "select", "gate"):
        moved = split == "train"
        rows = [
            {"text": e.columns["text"], "label": names[(names.index(e.label) + 1) % len(names)] if moved else e.label}
            for e in getattr(dataset, split)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        spec["data"][split] = f"{split}.jsonl"
    file = folder / "spoiled.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return file


def test_the_shipped_tasks_are_disjoint_from_one_another() -> None:
    texts = [json.loads(line)["text"] for file in DATA.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(texts) >= 1500
    assert len(texts) == len(set(texts))


@pytest.mark.long
def test_the_python_example_of_the_readme(cli: CommandLine, tmp_path: Path) -> None:
    quick = demo_task(tmp_path, "client-talk", epochs=3, learning_rate=2e-3)
    readme = (DATA.parents[1] / "README.md").read_text(encoding="utf-8")
    block = readme.partition("```python\n")[2].partition("```")[0].replace("tasks/client-talk.yaml", str(quick))
    before, marker, _ = block.partition("# after `orchestrator serve`:")
    assert marker
    outcome, report_file = cli.python(before).split()
    assert outcome == "CLEAR"
    assert Path(report_file).is_file()
    cli.run("serve", "--port", free_port())
    asked = cli.python(block)
    assert asked.split()[-1] == "change"
