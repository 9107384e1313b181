"""`submit --base t5-mini`: the embedded T5 goes from a task file to HTTP answers, and they are those of plain PEFT."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

from e2e.conftest import CommandLine, demo_task
from e2e.endpoint import free_port
from multilora.artifact import read_artifact
from multilora.base_files import find_base
from multilora.base_model import load_base
from multilora.prompt import encode_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.long]

TEXTS = ["The soup was cold and nobody said sorry.", "We will be back next week!", "There are twelve tables and a bar."]


def test_a_demo_task_over_the_embedded_t5(cli: CommandLine, tmp_path: Path) -> None:
    file = demo_task(tmp_path, "restaurant-reviews", epochs=2, learning_rate=2e-3, max_length=192)
    spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    spec["gate"] = {"min": 0.0}  # how good the base is is not asked here
    file.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")

    report = cli.json("submit", file, "--base", "t5-mini")
    assert report["outcome"] == "CLEAR"
    (task,) = report["tasks"]
    assert task["champion"] == "restaurant-reviews@1"

    port = free_port()
    cli.run("serve", "--port", port)
    asked = {"model": "restaurant-reviews", "input": TEXTS}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/classify", json=asked, timeout=60).json()
    assert answer["digest"] == task["candidate_result"]["digest"]
    adapter = next(cli.workspace.glob("downloads/restaurant-reviews/1-*/artifacts/adapter"))
    for text, result in zip(TEXTS, answer["results"], strict=True):
        assert result["probabilities"] == pytest.approx(_plain_peft(adapter, text), abs=1e-3)


def _plain_peft(adapter: Path, text: str) -> dict[str, float]:
    """Label probabilities by transformers and PEFT, one label at a time."""
    card = read_artifact(adapter).card
    tokenizer = load_base(card.base, "cpu").tokenizer
    plain = AutoModelForSeq2SeqLM.from_pretrained(find_base(card.base).folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    prompt = torch.tensor([encode_prompt(card.prompt_format, {"text": text}, tokenizer).token_ids])
    names = [name for name, _ in card.prompt_format.labels]
    scores = []
    for name in names:
        label = tokenizer(name, return_tensors="pt").input_ids
        with torch.no_grad():
            logits_TV = model(input_ids=prompt, labels=label).logits[0]
        scores.append(logits_TV.log_softmax(-1)[range(label.shape[1]), label[0]].sum())
    return dict(zip(names, (torch.stack(scores) / card.temperature).softmax(0).tolist(), strict=True))
