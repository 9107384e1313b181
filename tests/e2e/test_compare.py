"""`compare` over real Ray and MLflow: killed in the middle nothing is lost, a part that raises costs its own rows alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.conftest import CommandLine, wait_for, write_spec
from multilora.registry import Registry
from orchestrator.config import OrchestratorConfig

pytestmark = [pytest.mark.e2e, pytest.mark.long]
OWN = """
import os, sys, time
from pathlib import Path
from orchestrator.compare import compare
from orchestrator.config import OrchestratorConfig
from orchestrator.methods import MethodRow

# Ray takes functions of this script along to its worker.
def rows_of(part, bench):
    for number in range(3):
        if number == 2 and part == "variants":
            raise ValueError("no such layer")
        while number == 2 and part == "prompting" and not (bench.folder / "go").exists():
            time.sleep(0.05)
        yield from [MethodRow(part, f"method {number}", bench.gold, number, train_s=float(os.getpid()), ms_per_text=1.0)]

config = OrchestratorConfig.from_environment()
parts = ("baselines", "prompting", "variants", "curve")
compare(config, Path(sys.argv[1]), parts=parts, seeds=(0,), sizes=(5,), on_progress=print, rows_of=rows_of)
"""


def start(cli: CommandLine, spec: Path) -> subprocess.Popen[str]:
    """Compare by the parts of OWN, in a process of its own."""
    file = cli.workspace.parent / "own_parts.py"
    file.write_text(OWN, encoding="utf-8")
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, file, spec], env=cli.env, text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )


def test_killed_in_the_middle_nothing_is_lost_and_one_part_fails_alone(cli: CommandLine, base_folder, tmp_path) -> None:
    rows = [{"text": f"text {number}", "label": "good" if number % 2 else "bad"} for number in range(40)]
    spec = write_spec(tmp_path, "compared", rows, str(base_folder("encoder")), {"good": None, "bad": None})

    def stored(part: str) -> dict:
        files = list((cli.workspace / "compare" / "compared").glob(f"*/rows/{part}.json"))
        return json.loads(files[0].read_text(encoding="utf-8")) if files else {"rows": [], "is_finished": False}

    killed = start(cli, spec)
    wait_for(lambda: len(stored("prompting")["rows"]) == 2 or killed.poll() is not None, 300)
    assert killed.poll() is None, killed.communicate()
    cli.kill(killed)
    finished, begun = stored("baselines"), stored("prompting")
    assert (finished["is_finished"], len(finished["rows"])) == (True, 3)
    assert (begun["is_finished"], len(begun["rows"])) == (False, 2)
    shown = cli.run("compare", "--show", "compared")
    assert "method 1" in shown
    assert "Not complete: prompting was cut off; the same command goes on." in " ".join(shown.split())

    (folder,) = (cli.workspace / "compare" / "compared").glob("*/")
    (folder / "go").touch()
    again = start(cli, spec)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, out + err
    assert out.startswith("compared: prompting, variants, curve to do, 16 gate examples")
    assert stored("baselines") == finished, "what was finished is not run again"
    assert (stored("prompting")["is_finished"], len(stored("prompting")["rows"])) == (True, 3)
    assert len({row["train_s"] for row in stored("prompting")["rows"]}) == 1, "all of one run"

    found = cli.json("compare", "--show", "compared")
    assert found["failed"] == {"variants": "ValueError: no such layer"}
    assert [method["skipped"] for method in found["methods"] if method["part"] == "variants"] == [
        "",
        "",
        "ValueError: no such layer",
    ]
    assert set(found["finished"]) == {"baselines", "prompting", "curve"}
    config = OrchestratorConfig(workspace=cli.workspace)
    registry = Registry(config.registry_uri, config.artifact_root)
    (run,) = registry.runs("compared")
    assert run.run_key == found["key"] == folder.name
    assert len(run.metrics) == 11
    assert set(run.metrics.values()) == {1.0}
    kept = {file.name for file in (cli.workspace / "artifacts").rglob("*.*") if file.is_file()}
    assert {"compare.html", "compare.json", "compare.md", "examples.svg", "training.svg", "answering.svg"} <= kept

    # The command itself: a part that is finished is not run again, and needs no worker.
    assert "there is no part 'curves'" in cli.run("compare", spec, "--parts", "curves", code=2)
    again_found = cli.json("compare", spec, "--parts", "curve,baselines", "--seeds", 1, "--sizes", 5)
    assert again_found["methods"] == found["methods"]
    assert len(registry.runs("compared")) == 1


def test_the_command_runs_real_parts_and_goes_on_after_a_kill(cli: CommandLine, base_folder, tmp_path) -> None:
    rows = [{"text": f"a text of number {number}", "label": "good" if number % 2 else "bad"} for number in range(40)]
    spec = write_spec(tmp_path, "real", rows, str(base_folder("encoder")), {"good": "odd", "bad": None})
    words = ("compare", spec, "--parts", "baselines,prompting", "--quick")

    def stored(part: str) -> bytes:
        return b"".join(file.read_bytes() for file in (cli.workspace / "compare" / "real").glob(f"*/rows/{part}.json"))

    killed = cli.start(*words)
    wait_for(lambda: b'"is_finished":true' in stored("baselines") or killed.poll() is not None, 300)
    assert killed.poll() is None, killed.communicate()
    cli.kill(killed)
    kept = stored("baselines")

    found = cli.json(*words)
    assert stored("baselines") == kept
    assert found["finished"] == ["baselines", "prompting"]
    by_method = {method["method"]: method for method in found["methods"]}
    assert by_method["majority class"]["accuracy"] == 0.5
    assert by_method["chain of thought"]["skipped"]
    assert by_method["zero-shot, label name"]["ms_per_text"] > 0
    assert found["advice"]["headline"].startswith("The adapter was not tried: the best ")
    assert (Path(found["folder"]) / "compare.html").is_file()
