"""Each part of the serving fingerprint changes when its cause does, and no other part with it."""

from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import CARDS, SHORTEN

from multilora.artifact import CONFIG, WEIGHTS, read_artifact, write_artifact
from multilora.artifact import read_tensors as tensors_of
from multilora.fingerprint import (
    ENGINE_VERSION,
    changed_parts,
    digest_of,
    fingerprint_of,
    zero_shot_fingerprint,
)

PARTS = {"adapter", "calibration", "base", "dtype", "prompt", "labels", "max_length", "decoding", "scorer", "engine"}


@pytest.fixture(scope="module")
def artifact(tiny_adapter):
    return tiny_adapter("encoder", CARDS, seed=1)


def base_of(card, **changes):
    return card.base.model_copy(update=changes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda card: {"instruction": card.instruction + " "}, "prompt"),
        (lambda card: {"text_column": "message"}, "prompt"),
        (lambda card: {"labels": [(card.labels[0][0], "another meaning"), *card.labels[1:]]}, "labels"),
        (lambda card: {"labels": card.labels[::-1]}, "labels"),
        (lambda card: {"label_score": "mean"}, "labels"),
        (lambda card: {"max_length_tokens": 64}, "max_length"),
        (lambda card: {"temperature": 1.5}, "calibration"),
        (lambda card: {"max_new_tokens": 8}, "decoding"),
        (lambda card: {"scorer_version": card.scorer_version + 1}, "scorer"),
        (lambda card: {"base_fingerprint": "0" * 64}, "base"),
        # A base's own fingerprint covers its dtype as well, so the two change together.
        (lambda card: {"base": base_of(card, dtype="bfloat16"), "base_fingerprint": "0" * 64}, "base dtype"),
        (lambda card: {"base": base_of(card, quantization="8bit"), "base_fingerprint": "0" * 64}, "base dtype engine"),
    ],
)
def test_a_part_changes_with_its_cause(artifact, tmp_path, change, expected):
    card = artifact.card.model_copy(update=change(artifact.card))
    changed = write_artifact(tmp_path / "adapter", card, tensors_of(artifact))
    before, after = fingerprint_of(artifact), fingerprint_of(changed)
    assert set(before) == set(after) == PARTS
    assert set(changed_parts(before, after)) == set(expected.split())
    assert digest_of(before) != digest_of(after)


@pytest.mark.parametrize("key", ["description", "spec_hash", "data_fingerprint"])
def test_what_decides_no_answer_is_not_in_it(artifact, tmp_path, key):
    changed = write_artifact(tmp_path / "adapter", artifact.card.model_copy(update={key: "other"}), tensors_of(artifact))
    assert changed.digest != artifact.digest
    assert fingerprint_of(changed) == fingerprint_of(artifact)


def test_weights_and_their_scaling_are_the_adapter(artifact, tmp_path):
    moved = write_artifact(tmp_path / "same", artifact.card, tensors_of(artifact))
    assert fingerprint_of(moved) == fingerprint_of(artifact)
    state = load_file(moved.folder / WEIGHTS)
    name = next(iter(state))
    state[name] = state[name].clone()
    state[name][0, 0] = torch.nextafter(state[name][0, 0], torch.tensor(torch.inf))
    save_file(state, moved.folder / WEIGHTS, metadata={"format": "pt"})
    assert changed_parts(fingerprint_of(artifact), fingerprint_of(read_artifact(moved.folder))) == ("adapter",)
    stronger = artifact.card.model_copy(update={"scaling": 2 * artifact.card.scaling})
    scaled = write_artifact(tmp_path / "scaled", stronger, tensors_of(artifact))
    assert (scaled.folder / WEIGHTS).read_bytes() == (artifact.folder / WEIGHTS).read_bytes()
    assert (scaled.folder / CONFIG).read_bytes() != (artifact.folder / CONFIG).read_bytes()
    assert changed_parts(fingerprint_of(artifact), fingerprint_of(scaled)) == ("adapter",)


def test_another_seed_is_another_adapter_and_nothing_else(artifact, tiny_adapter):
    other = tiny_adapter("encoder", CARDS, seed=2)
    assert changed_parts(fingerprint_of(artifact), fingerprint_of(other)) == ("adapter",)
    assert zero_shot_fingerprint(other.card) == zero_shot_fingerprint(artifact.card)


def test_another_base_changes_the_base(artifact, tiny_adapter):
    other = tiny_adapter("causal", CARDS, seed=1)
    assert {"base", "adapter"} == set(changed_parts(fingerprint_of(artifact), fingerprint_of(other)))


def test_the_base_alone_has_all_parts_but_the_adapters(artifact):
    alone = zero_shot_fingerprint(artifact.card)
    assert set(alone) == PARTS - {"adapter", "calibration"}
    assert set(changed_parts(fingerprint_of(artifact), alone)) == {"adapter", "calibration"}


def test_the_engine_is_named_by_its_version_and_its_libraries(artifact):
    """These are installed once; that another version is another part's value follows from the names."""
    card = artifact.card
    libraries = [f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes")]
    assert zero_shot_fingerprint(card)["engine"] == " ".join([str(ENGINE_VERSION), *libraries[:2]])
    quantised = card.model_copy(update={"base": base_of(card, quantization="4bit")})
    assert zero_shot_fingerprint(quantised)["engine"] == " ".join([str(ENGINE_VERSION), *libraries])
    assert zero_shot_fingerprint(quantised)["dtype"] == "float32 4bit"
    assert zero_shot_fingerprint(card)["dtype"] == "float32"


def test_decoding_says_how_answers_come_about(artifact, tiny_adapter):
    assert fingerprint_of(artifact)["decoding"] == "labels are scored"
    assert fingerprint_of(tiny_adapter("causal", SHORTEN, seed=1))["decoding"] == "greedy, 6 tokens"


def test_parts_that_one_side_lacks_differ():
    assert changed_parts({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == ("a", "c")
    assert changed_parts({}, {}) == ()
    assert digest_of({"a": "1", "b": "2"}) == digest_of({"b": "2", "a": "1"}) != digest_of({"a": "1"})
