"""Stored gate splits come back as they were, or not at all."""

import json
from dataclasses import replace

import pytest

from multilora.errors import DataError
from orchestrator.dataset import Example, gate_fingerprint_of
from orchestrator.gates import load_gate, store_gate

GATE = (
    Example("a1", {"text": "where is my card"}, "card lost"),
    Example("b2", {"text": 'line\u2028separator\nand "quotes" é日本 😀'}, "rate"),
    Example("c3", {"subject": "", "body": "\x85 next line\r\n"}, "card lost"),
)
FINGERPRINT = gate_fingerprint_of(GATE)


def test_round_trip_whatever_the_text(tmp_path):
    store_gate(tmp_path / "gates", FINGERPRINT, GATE)
    assert load_gate(tmp_path / "gates", FINGERPRINT) == GATE
    rows = (tmp_path / "gates" / f"{FINGERPRINT}.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(rows[0]) == {"id": "a1", "columns": {"text": "where is my card"}, "label": "card lost"}
    assert [file.name for file in (tmp_path / "gates").iterdir()] == [f"{FINGERPRINT}.jsonl"]


def test_storing_again_changes_nothing(tmp_path):
    store_gate(tmp_path, FINGERPRINT, GATE)
    before = (tmp_path / f"{FINGERPRINT}.jsonl").stat()
    store_gate(tmp_path, FINGERPRINT, GATE)
    assert (tmp_path / f"{FINGERPRINT}.jsonl").stat() == before


def test_what_was_never_stored_is_none(tmp_path):
    assert load_gate(tmp_path / "nowhere", FINGERPRINT) is None
    store_gate(tmp_path, FINGERPRINT, GATE)
    assert load_gate(tmp_path, "0" * 64) is None


@pytest.mark.parametrize("other", [GATE[:2], GATE[::-1], (replace(GATE[0], label="rate"), *GATE[1:])])
def test_other_examples_under_the_same_name_are_refused(tmp_path, other):
    store_gate(tmp_path, FINGERPRINT, other)
    with pytest.raises(DataError, match=f"has fingerprint {gate_fingerprint_of(other)[:12]}: it was changed"):
        load_gate(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', '{"id": "a"}', '{"id": "a", "columns": {}, "label": "x", "more": 1}'])
def test_broken_file_is_named(tmp_path, text):
    (tmp_path / f"{FINGERPRINT}.jsonl").write_text(text)
    with pytest.raises(DataError, match=f"stored gate split {FINGERPRINT}.jsonl is broken"):
        load_gate(tmp_path, FINGERPRINT)
