"""Loading a frozen base: nothing of it trains, quantised bases take adapters, and incomplete ones are refused."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from multilora.base_model import load_base
from multilora.errors import AdapterError, SpecError
from multilora.lora import AdapterSlots
from multilora.segments import Segment
from multilora.spec import BaseSpec
from multilora.target_modules import match_modules


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
    ("kind", "token"), [("seq2seq", "<pad>"), ("encoder", "[PAD]"), ("causal", "</s>"), ("qwen2", "<|endoftext|>")]
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


# Quantised bases. 4-bit weights are rounded, activations are not: rows are independent up to float32 sums. LLM.int8 keeps
# every feature in float16 that is above 6 in any row of the batch, so neighbours move a row by its rounding error.


@pytest.mark.parametrize(("quantization", "tolerance"), [("8bit", 0.03), ("4bit", 1e-5)])
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_quantised_base_takes_adapters(fresh_base, random_adapter, kind, quantization, tolerance):
    base = fresh_base(kind, quantization=quantization)
    names = match_modules(base.model, "all-linear")
    slots = AdapterSlots(base.model, names, 2, 8)
    for slot, rank in enumerate((8, 3)):
        slots.load(slot, random_adapter(slots, rank, seed=slot), 1.0)
    assert any(layer.base.weight.dtype in (torch.int8, torch.uint8) for layer in slots.layers.values())
    tokens_BT = torch.randint(5, 900, (6, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens_BT, **({"decoder_input_ids": tokens_BT[:, :3]} if kind == "seq2seq" else {})}
    spans = [(0, 3), (3, 4), (4, 6)]
    with torch.no_grad():
        with slots.using([Segment(0, 3), Segment(None, 1), Segment(1, 2)]):
            mixed = base.model(**inputs).logits
        plain = base.model(**inputs).logits
        for slot, (start, end) in zip((0, None, 1), spans, strict=True):
            with slots.using([Segment(slot, end - start)]):
                alone = base.model(**{name: ids[start:end] for name, ids in inputs.items()}).logits
            assert (mixed[start:end] - alone).abs().max() <= tolerance * alone.abs().max()
            if slot is not None:
                assert (alone - plain[start:end]).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_adapter_on_a_quantised_base_trains(fresh_base, quantization):
    base = fresh_base("causal", quantization=quantization)
    slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), 2, 4, is_trainable=True)
    slots.fresh(1, list(slots.layers), 4, 2.0, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(slots.parameters(1), lr=0.01)
    tokens_BT = torch.randint(5, 900, (4, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        slots.flat_grad_SP.zero_()
        with slots.using([Segment(1, 4)]):
            logits_BTV = base.model(input_ids=tokens_BT, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in pairwise(losses))
