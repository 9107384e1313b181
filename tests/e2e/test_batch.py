"""`batch` over a real registry and Ray: the engine's answers in the input's order, killed in the middle or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_adapters import CARDS, TEXTS

from e2e.conftest import CommandLine, wait_for
from e2e.test_evidence import crown
from orchestrator.batch_files import ROWS_PER_PART
from orchestrator.config import OrchestratorConfig
from serve.engine import Engine, Work

pytestmark = [pytest.mark.e2e, pytest.mark.long]
NUM_PARTS = 16
NUM_ROWS = NUM_PARTS * ROWS_PER_PART - 7
BAD = {3: "nonsense", 5000: "", 5001: '{"id": 5001}', NUM_ROWS - 1: '{"id": -1, "text": ""}'}


def write_rows(file: Path) -> list[str]:
    texts = [f"{TEXTS[number % 5]} {number}" for number in range(NUM_ROWS)]
    rows = [BAD.get(number) or json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)]
    rows[5000] = ""
    file.write_text("\n".join(rows), encoding="utf-8")
    return texts


def test_a_file_is_answered_in_order_and_goes_on_after_a_kill(cli: CommandLine, tiny_adapter, fresh_base, tmp_path) -> None:
    config = OrchestratorConfig(workspace=Path(cli.workspace))
    config.workspace.mkdir()
    artifact = tiny_adapter("encoder", CARDS, 0)
    crown(config, artifact, CARDS, ())
    source, output, again = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    texts = write_rows(source)

    done = cli.json("batch", "cards", source, output, code=2)
    assert (done["num_rows"], done["num_errors"], done["num_resumed"]) == (NUM_ROWS, len(BAD), 0)
    assert (done["task"], done["version"], done["digest"]) == ("cards", 1, artifact.digest)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [number for number, row in enumerate(rows) if "error" in row] == sorted(BAD)
    assert rows[5001] == {"id": 5001, "error": "line 5002: the row lacks text; it has id"}
    assert all(row["id"] == number for number, row in enumerate(rows) if number not in BAD)
    engine = Engine(fresh_base("encoder"), num_slots=1, max_rank=8)
    key = engine.bind(artifact, 1)
    some = [number for number in range(0, NUM_ROWS, 97) if number not in BAD]
    for number, answer in zip(some, engine.classify([Work(key, engine.prompt(key, texts[n])) for n in some]), strict=True):
        expected = dict(zip(answer.labels, answer.probabilities, strict=True))
        assert rows[number]["probabilities"] == pytest.approx(expected, abs=1e-4)
        assert (rows[number]["label"], rows[number]["digest"]) == (answer.label, artifact.digest)

    assert "replace it with --force" in cli.run("batch", "cards", source, output, code=1)

    killed = cli.start("batch", "cards", source, again)
    parts = tmp_path / "again.jsonl.parts"
    wait_for(lambda: len(list(parts.glob("0*.jsonl"))) >= 2, 180)
    cli.kill(killed)
    num_kept = len(list(parts.glob("0*.jsonl")))
    assert not again.exists()
    assert num_kept < NUM_PARTS, "it was killed too late to tell"
    resumed = cli.json("batch", "cards", source, again, code=2)
    assert resumed["num_resumed"] >= (num_kept - 1) * ROWS_PER_PART
    assert (resumed["num_rows"], resumed["num_errors"]) == (NUM_ROWS, len(BAD))
    assert again.read_bytes() == output.read_bytes()
    assert not parts.exists()
