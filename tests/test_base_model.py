"""Loading a frozen base: nothing of it trains, and incomplete ones are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from multilora.base_model import load_base
from multilora.errors import AdapterError, SpecError
from multilora.spec import BaseSpec


@pytest.fixture
def copied(base_folder, tmp_path):
    """Copy a tiny base that the test may break."""
    return lambda kind: shutil.copytree(base_folder(kind), tmp_path / kind)


def test_base_is_frozen_and_deterministic(fresh_base, family):
    base = fresh_base(family)
    assert base.family == family
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in base.model.parameters()} == {"cpu"}


def test_base_loads_in_bfloat16(fresh_base, family):
    # transformers keeps some of T5's feed-forward weights in float32.
    model = fresh_base(family, dtype="bfloat16").model
    assert {parameter.dtype for name, parameter in model.named_parameters() if ".wo." not in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "token"), [("seq2seq", "<pad>"), ("encoder", "[PAD]"), ("causal", "</s>"), ("gpt2", "<|endoftext|>")]
)
def test_padding_uses_the_end_token_where_the_tokenizer_has_no_own(fresh_base, kind, token):
    base = fresh_base(kind)
    assert base.tokenizer.convert_ids_to_tokens(base.pad_id) == token


def test_missing_weights_are_refused_instead_of_filled_with_random_numbers(copied, family):
    folder = copied(family)
    state = load_file(folder / "model.safetensors")
    lost = next(name for name in state if name.endswith("norm.weight") or name.endswith("LayerNorm.weight"))
    save_file(
        {name: tensor for name, tensor in state.items() if name != lost}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(SpecError, match=f"lacks 1 weights such as {lost}; save or download it again"):
        load_base(BaseSpec(model=str(folder)), "cpu")


def test_encoder_without_a_pooler_loads(copied):
    folder = copied("encoder")
    state = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_base(BaseSpec(model=str(folder)), "cpu").family == "encoder"


def test_tokenizer_that_is_not_fast_is_refused(copied):
    folder = copied("encoder")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"a": 0, "<unk>": 1}', encoding="utf-8")
    config = {"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}
    (folder / "merges.txt").write_text("#version\n\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"has no fast tokenizer \(tokenizer.json\), which truncation needs"):
        load_base(BaseSpec(model=str(folder)), "cpu")
