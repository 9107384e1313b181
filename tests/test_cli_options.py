"""What options of the commands do to task specs."""

from pathlib import Path

import pytest
import typer

from orchestrator.cli_options import load_specs

FILES = sorted((Path(__file__).parents[1] / "tasks").glob("*.yaml"))


def test_base_replaces_that_of_every_file_and_nothing_else():
    own, problems = load_specs(FILES)
    over, _ = load_specs(FILES, base="google/flan-t5-small")
    assert not problems
    assert len(over) == len(own) == 5
    for before, after in zip(own, over, strict=True):
        assert (after.base.model, after.base.revision) == ("google/flan-t5-small", None)
        assert after.model_copy(update={"base": before.base}) == before


def test_a_folder_is_relative_to_where_the_command_runs(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    specs, _ = load_specs(FILES[:1], base="./mine")
    assert specs[0].base.model == str(tmp_path / "mine")


def test_a_folder_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.BadParameter, match=r"\./mine: no such folder"):
        load_specs(FILES[:1], base="./mine")
