"""Laws 1 and 3 of the layer: rows do not touch each other, nor do slots; what is off or fresh is the base, bit for bit.

float32 results of differently shaped products may differ by 1e-4; results of equal shapes must be equal.
Dims: B rows, T positions, P adapter parameters per slot.
"""

import random
import re
from dataclasses import dataclass

import pytest
import torch
from conftest import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from multilora.base_model import FrozenBase
from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.segments import Segment, segments_of
from multilora.target_modules import match_modules

TOLERANCE = 1e-4
RANKS = (1, 4, 8, 3)
SCALINGS = (2.0, 1.0, 0.5, 1.5)


@dataclass(frozen=True)
class Mixed:
    """One base with four adapters, and the same adapters each on a base of its own."""

    base: FrozenBase
    slots: AdapterSlots
    alone: tuple[tuple[FrozenBase, AdapterSlots], ...]
    plain: FrozenBase


def wrapped(fresh_base, kind, num_slots=4, max_rank=8, is_trainable=False, **spec):
    """Load a base and give all its linear layers slots."""
    base = fresh_base(kind, **spec)
    return base, AdapterSlots(base.model, match_modules(base.model, "all-linear"), num_slots, max_rank, is_trainable=is_trainable)


def four_adapters(fresh_base, random_adapter, kind, **options):
    base, slots = wrapped(fresh_base, kind, **options)
    alone = [wrapped(fresh_base, kind, num_slots=1, **options) for _ in RANKS]
    for slot, (rank, scaling) in enumerate(zip(RANKS, SCALINGS, strict=True)):
        names = list(slots.layers)[1::2] if slot == 3 else None  # adapters of different target modules share a batch
        adapter = random_adapter(slots, rank, seed=slot, names=names)
        slots.load(slot, adapter, scaling)
        alone[slot][1].load(0, adapter, scaling)
    return Mixed(base, slots, tuple(alone), fresh_base(kind))


@pytest.fixture(scope="module", params=FAMILIES)
def mixed(request, fresh_base, random_adapter):
    """Four adapters of different ranks and scalings, for serving; tests must leave them as they are."""
    return four_adapters(fresh_base, random_adapter, request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def mixed_training(request, fresh_base, random_adapter):
    """The same with trainable slots."""
    return four_adapters(fresh_base, random_adapter, request.param, is_trainable=True)


def outputs(base, tokens_BT):
    """Run the base's plain forward: hidden states of an encoder, otherwise logits."""
    if base.family == "encoder":
        return base.model(input_ids=tokens_BT).last_hidden_state
    if base.family == "seq2seq":
        return base.model(input_ids=tokens_BT, decoder_input_ids=tokens_BT[:, :3], use_cache=False).logits
    return base.model(input_ids=tokens_BT, use_cache=False).logits


def random_tokens(num_rows, seed, num_positions=6):
    return torch.randint(5, 900, (num_rows, num_positions), generator=torch.Generator().manual_seed(seed))


def random_layout(seed):
    """Segments in any slot order, of equal or different sizes, with base rows between them."""
    rng = random.Random(seed)
    size = rng.choice([None, 1, 2])
    return [Segment(rng.choice([None, 0, 1, 2, 3]), size or rng.randint(1, 3)) for _ in range(rng.randint(2, 6))]


def rows_of(segments):
    return [segment.slot for segment in segments for _ in range(segment.num_rows)]


def farthest(x, y):
    return (x - y).abs().max().item()


# Law 1


@pytest.mark.parametrize("has_grad", [True, False])
def test_mixed_batch_equals_each_adapter_alone(mixed, has_grad):
    with torch.set_grad_enabled(has_grad):
        for seed in range(12):
            segments = random_layout(seed)
            tokens_BT = random_tokens(len(rows_of(segments)), seed)
            with mixed.slots.using(segments):
                together = outputs(mixed.base, tokens_BT)
            plain = outputs(mixed.plain, tokens_BT)
            for slot in set(rows_of(segments)):
                rows = [row for row, other in enumerate(rows_of(segments)) if other == slot]
                if slot is None:
                    assert farthest(together[rows], plain[rows]) <= TOLERANCE
                    continue
                base, slots = mixed.alone[slot]
                with slots.using([Segment(0, len(rows))]):
                    alone = outputs(base, tokens_BT[rows])
                assert farthest(together[rows], alone) <= TOLERANCE, (seed, slot)
                assert farthest(alone, plain[rows]) > 0.1, "the adapter must change the base, or this test proves nothing"


@pytest.mark.parametrize("has_grad", [True, False])
def test_permuting_rows_permutes_results(mixed, has_grad):
    slot_of_row = [0, 0, 1, None, 3, 2, 2, None]
    tokens_BT = random_tokens(len(slot_of_row), 0)
    with torch.set_grad_enabled(has_grad):
        with mixed.slots.using(segments_of(slot_of_row)):
            expected = outputs(mixed.base, tokens_BT)
        for seed in range(5):
            order = random.Random(seed).sample(range(len(slot_of_row)), len(slot_of_row))
            with mixed.slots.using(segments_of([slot_of_row[row] for row in order])):
                permuted = outputs(mixed.base, tokens_BT[order])
            assert farthest(permuted, expected[order]) <= TOLERANCE


def gradients(base, slots, segments, tokens_BT, weight_of_row):
    """Gradient [slots, P] of a weighted sum of the outputs."""
    slots.flat_grad_SP.zero_()
    with slots.using(segments):
        y = outputs(base, tokens_BT).tanh()
    (y.flatten(1).mean(1) * weight_of_row).sum().backward()
    return slots.flat_grad_SP.clone()


@pytest.mark.parametrize("seed", range(4))
def test_mixed_gradients_equal_each_adapters_own(mixed_training, seed):
    segments = random_layout(seed)
    slot_of_row = rows_of(segments)
    tokens_BT = random_tokens(len(slot_of_row), seed)
    together_SP = gradients(mixed_training.base, mixed_training.slots, segments, tokens_BT, 1 + torch.arange(len(slot_of_row)))
    for slot, (base, slots) in enumerate(mixed_training.alone):
        rows = [row for row, other in enumerate(slot_of_row) if other == slot]
        if not rows:
            assert not together_SP[slot].any(), "a slot without rows gets no gradient"
            continue
        alone_P = gradients(base, slots, [Segment(0, len(rows))], tokens_BT[rows], 1 + torch.tensor(rows))[0]
        assert alone_P.any()
        assert farthest(together_SP[slot], alone_P) <= TOLERANCE * alone_P.abs().max()


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("has_grad", [True, False])
def test_mixed_batch_equals_alone_in_bfloat16(fresh_base, random_adapter, family, is_trainable, has_grad):
    # bfloat16 has 8 bits of mantissa; the random bases amplify its rounding to a few percent of the largest output.
    options = {"dtype": "bfloat16", "is_trainable": is_trainable}
    base, slots = wrapped(fresh_base, family, **options)
    other, alone_slots = wrapped(fresh_base, family, num_slots=1, **options)
    for slot, rank in enumerate(RANKS[:3]):
        slots.load(slot, random_adapter(slots, rank, seed=slot), 1.0)
    alone_slots.load(0, slots.export(1), 1.0)
    tokens_BT = random_tokens(6, 0)
    with torch.set_grad_enabled(has_grad):
        with slots.using([Segment(0, 1), Segment(None, 1), Segment(1, 3), Segment(2, 1)]):
            together = outputs(base, tokens_BT)
        with alone_slots.using([Segment(0, 3)]):
            alone = outputs(other, tokens_BT[2:5])
        plain = outputs(other, tokens_BT[2:5])
    assert together.dtype == torch.bfloat16
    assert farthest(together[2:5], alone) <= 0.05 * alone.abs().max()
    assert farthest(alone, plain) > 0.2 * plain.abs().max()


@pytest.mark.parametrize("seed", range(8))
def test_forward_and_gradients_are_those_of_the_formula(random_adapter, seed):
    """y = W x + scaling B A x row by row, in float64 by autograd: results, and gradients of adapters and input."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"linear": nn.Linear(6, 10)}).requires_grad_(False)
    slots = AdapterSlots(model, ["linear"], 4, 8, is_trainable=True)
    adapters = {slot: random_adapter(slots, rank, seed=slot)["linear"] for slot, rank in enumerate(RANKS)}
    for slot, halves in adapters.items():
        slots.load(slot, {"linear": halves}, SCALINGS[slot])
    segments = random_layout(seed)
    layer, slot_of_row = slots.layers["linear"], rows_of(segments)
    x_BTI, y_gradient = torch.randn(len(slot_of_row), 3, 6).requires_grad_(), torch.randn(len(slot_of_row), 3, 10)
    with slots.using(segments):
        y_BTO = layer(x_BTI)
    y_BTO.backward(y_gradient)

    exact_BTI = x_BTI.detach().double().requires_grad_()
    halves_of = {slot: [half.double().requires_grad_() for half in halves] for slot, halves in adapters.items()}
    weight_OI, bias_O = layer.base.weight.double(), layer.base.bias.double()
    rows = []
    for x_TI, slot in zip(exact_BTI, slot_of_row, strict=True):
        y_TO = x_TI @ weight_OI.T + bias_O
        rows.append(y_TO if slot is None else y_TO + SCALINGS[slot] * x_TI @ halves_of[slot][0].T @ halves_of[slot][1].T)
    exact_BTO = torch.stack(rows)
    exact_BTO.backward(y_gradient.double())
    assert farthest(y_BTO.detach(), exact_BTO.detach()) <= TOLERANCE
    assert farthest(x_BTI.grad, exact_BTI.grad) <= TOLERANCE
    for slot, halves in halves_of.items():
        for mine, exact in zip(layer.views(slots.flat_grad_SP[slot]), halves, strict=True):
            expected = torch.zeros_like(mine)
            if exact.grad is not None:
                expected[: exact.shape[0], : exact.shape[1]] = exact.grad
            assert farthest(mine, expected) <= TOLERANCE
    assert slots.flat_grad_SP.any() == any(slot is not None for slot in slot_of_row)


# Law 3


@pytest.mark.parametrize("has_grad", [True, False])
def test_changing_a_slot_leaves_the_others_exactly_unchanged(fresh_base, random_adapter, family, has_grad):
    base, slots = wrapped(fresh_base, family)
    slots.load(0, random_adapter(slots, 4, seed=0), 1.0)
    slots.load(2, random_adapter(slots, 8, seed=2), 2.0)
    tokens_BT = random_tokens(7, 0)
    layout = [Segment(None, 1), Segment(0, 2), Segment(1, 2), Segment(2, 1), Segment(None, 1)]
    others = [0, 1, 2, 5, 6]
    results = []
    with torch.set_grad_enabled(has_grad):
        for rank in (8, 2):
            slots.load(1, random_adapter(slots, rank, seed=rank), rank / 4)
            with slots.using(layout):
                results.append(outputs(base, tokens_BT))
    assert torch.equal(results[0][others], results[1][others])
    assert farthest(results[0][3:5], results[1][3:5]) > 0.1


def test_training_a_slot_leaves_the_others_gradients_exactly_unchanged(fresh_base, random_adapter, family):
    base, slots = wrapped(fresh_base, family, is_trainable=True)
    for slot in (0, 1):
        slots.load(slot, random_adapter(slots, 4, seed=slot), 1.0)
    segments, tokens_BT, weights = [Segment(0, 2), Segment(1, 2)], random_tokens(4, 0), torch.ones(4)
    before_SP = gradients(base, slots, segments, tokens_BT, weights)
    weights_of_0 = slots.export(0)
    parameters = slots.parameters(1)
    assert torch.equal(torch.cat([parameter.grad for parameter in parameters]), before_SP[1])
    torch.optim.AdamW(parameters, lr=0.1).step()
    after_SP = gradients(base, slots, segments, tokens_BT, weights)
    assert torch.equal(after_SP[0], before_SP[0])
    assert not torch.equal(after_SP[1], before_SP[1]), "the optimiser's vector is the layer's own weights"
    assert all(torch.equal(x, y) for name, pair in slots.export(0).items() for x, y in zip(pair, weights_of_0[name], strict=True))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_fresh_slot_gives_the_base_exactly(fresh_base, family, is_trainable):
    base, slots = wrapped(fresh_base, family, is_trainable=is_trainable)
    slots.fresh(1, list(slots.layers), rank=4, scaling=2.0, generator=torch.Generator().manual_seed(0))
    tokens_BT = random_tokens(3, 0)
    with slots.using([Segment(1, 3)]):
        assert torch.equal(outputs(base, tokens_BT), outputs(fresh_base(family), tokens_BT))


def test_fresh_slot_is_initialised_as_peft_does(fresh_base, family):
    _, slots = wrapped(fresh_base, family)
    slots.fresh(0, list(slots.layers), rank=8, scaling=2.0, generator=torch.Generator().manual_seed(0))
    for a_RI, b_OR in slots.export(0).values():
        bound = a_RI.shape[1] ** -0.5
        assert a_RI.shape[0] == 8
        assert a_RI.abs().max() <= bound
        assert a_RI.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not b_OR.any()


@pytest.mark.parametrize("has_grad", [True, False])
def test_adapter_that_is_off_gives_the_base_bit_for_bit(mixed, has_grad):
    tokens_BT = random_tokens(5, 0)
    with torch.set_grad_enabled(has_grad):
        plain = outputs(mixed.plain, tokens_BT)
        assert torch.equal(outputs(mixed.base, tokens_BT), plain)
        with mixed.slots.using([Segment(None, 5)]):
            assert torch.equal(outputs(mixed.base, tokens_BT), plain)
        with mixed.slots.using([Segment(1, 2), Segment(None, 1), Segment(2, 1), Segment(None, 1)]):
            mixed_rows = outputs(mixed.base, tokens_BT)
    assert torch.equal(mixed_rows[[2, 4]], plain[[2, 4]])
    assert farthest(mixed_rows[[0, 1, 3]], plain[[0, 1, 3]]) > 0.1


def test_trained_padding_stays_zero_and_gradients_land_in_the_flat_matrix(fresh_base, random_adapter, family):
    base, slots = wrapped(fresh_base, family, is_trainable=True)
    slots.load(0, random_adapter(slots, 3, seed=0), 1.0)
    parameters = slots.parameters(0)
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for seed in range(2):
        gradients(base, slots, [Segment(0, 2)], random_tokens(2, seed), torch.ones(2))
        optimizer.step()
    for layer in slots.layers.values():
        assert layer.a_SRI.grad.untyped_storage().data_ptr() == slots.flat_grad_SP.untyped_storage().data_ptr()
        assert layer.a_SRI.grad[0, :3].any()
        assert not layer.a_SRI[0, 3:].any()
        assert not layer.b_SOR[0, :, 3:].any()
        for weights, parameter in zip((layer.a_SRI, layer.b_SOR), parameters, strict=True):
            assert parameter.data_ptr() <= weights[0].data_ptr() < parameter.data_ptr() + 4 * parameter.numel()
    assert all(parameter.grad is None for parameter in base.model.parameters() if not parameter.requires_grad)


# Slots


@pytest.mark.parametrize("is_trainable", [False, True])
def test_export_returns_what_was_loaded(fresh_base, random_adapter, family, is_trainable):
    _, slots = wrapped(fresh_base, family, is_trainable=is_trainable)
    names = list(slots.layers)[1::2]
    adapters = {0: random_adapter(slots, 8, seed=0), 2: random_adapter(slots, 3, seed=1, names=names)}
    for slot, adapter in adapters.items():
        slots.load(slot, adapter, 1.0)
    for slot, adapter in adapters.items():
        exported = slots.export(slot)
        assert slots.num_modules(slot) == len(exported) == len(adapter)
        for name, pair in adapter.items():
            assert all(torch.equal(x, y) for x, y in zip(exported[name], pair, strict=True))
    assert slots.export(1) == {}


def test_split_and_join_undo_each_other(fresh_base, random_adapter, family):
    _, slots = wrapped(fresh_base, family)
    slots.load(1, random_adapter(slots, 3, seed=0, names=list(slots.layers)[1::2]), 1.0)
    assert torch.equal(slots.join(1, slots.export(1)), slots.flat_SP[1])
    moments_P = slots.flat_SP[1] ** 2
    split = slots.split(1, moments_P)
    assert all(torch.equal(x, y**2) for name, pair in slots.export(1).items() for x, y in zip(split[name], pair, strict=True))
    assert torch.equal(slots.join(1, split), moments_P)
    split[next(iter(split))][0].zero_()
    assert not torch.equal(slots.join(1, split), moments_P), "split gives copies"


def test_loading_again_leaves_nothing_of_the_adapter_before(fresh_base, random_adapter, family):
    base, slots = wrapped(fresh_base, family)
    small = random_adapter(slots, 2, seed=1, names=list(slots.layers)[:3])
    tokens_BT = random_tokens(2, 0)
    results = []
    for adapter in (small, random_adapter(slots, 8, seed=0), small):
        slots.load(0, adapter, 2.0)
        slots.dropouts[0] = 0.5
        with slots.using([Segment(0, 2)]):
            results.append(outputs(base, tokens_BT))
    assert torch.equal(results[0], results[2])
    assert farthest(results[0], results[1]) > 0.1
    slots.load(0, small, 2.0)
    assert slots.dropouts[0] == 0.0


def test_using_restores_the_routing_before_it(fresh_base):
    _, slots = wrapped(fresh_base, "encoder")
    with slots.using([Segment(None, 2)], [1, 2]):
        with pytest.raises(KeyError), slots.using([Segment(None, 3)]):
            raise KeyError
        assert (slots.routing.num_rows, slots.routing.dropout_keys) == (2, (1, 2))
    assert (slots.routing.num_rows, slots.routing.dropout_keys) == (0, None)


@pytest.mark.parametrize("empty", [0, 1, 3])
def test_rows_of_an_empty_slot_fail_instead_of_getting_the_base(fresh_base, random_adapter, family, empty):
    base, slots = wrapped(fresh_base, family)
    for slot in (1, 2):
        slots.load(slot, random_adapter(slots, 2, seed=0), 1.0)
    slots.clear(1)
    with (
        slots.using([Segment(None, 1), Segment(empty, 1), Segment(2, 1)]),
        pytest.raises(AdapterError, match=f"slot {empty} is empty"),
    ):
        outputs(base, random_tokens(3, 0))


def test_segments_must_cover_the_batch(fresh_base):
    base, slots = wrapped(fresh_base, "encoder")
    with slots.using([Segment(None, 2)]), pytest.raises(AssertionError, match="segments cover 2 rows, the batch has 3"):
        outputs(base, random_tokens(3, 0))


# Errors that a person can get


def misfits(adapter):
    """Adapters that do not fit the encoder base with slots of rank 4, and what the error must say."""
    name = "encoder.layer.0.attention.self.query"
    a_RI, b_OR = adapter[name]
    return {
        "no tensors": ({}, "it has no tensors"),
        "renamed module": ({"encoder.layer.9.query": (a_RI, b_OR)}, "module encoder.layer.9.query does not exist"),
        "other base": ({name: (a_RI[:, :48], b_OR)}, r"maps 64 to 64 features, the tensors are A \[4, 48\] and B \[64, 4\]"),
        "halves of different rank": ({name: (a_RI, b_OR[:, :2])}, r"A \[4, 64\] and B \[64, 2\]"),
        "rank too large": ({name: (a_RI.repeat(2, 1), b_OR.repeat(1, 2))}, "has rank 8, the slots hold 1 to 4"),
        "rank zero": ({name: (a_RI[:0], b_OR[:, :0])}, "has rank 0"),
    }


@pytest.mark.parametrize("case", misfits({"encoder.layer.0.attention.self.query": (torch.zeros(4, 64), torch.zeros(64, 4))}))
def test_adapter_that_does_not_fit_is_refused_and_the_others_keep_answering(fresh_base, random_adapter, case):
    base, slots = wrapped(fresh_base, "encoder", max_rank=4)
    good = random_adapter(slots, 4, seed=0)
    slots.load(0, good, 1.0)
    slots.load(1, good, 1.0)
    tokens_BT = random_tokens(2, 0)
    with slots.using([Segment(0, 2)]):
        before = outputs(base, tokens_BT)
    tensors, message = misfits(good)[case]
    with pytest.raises(AdapterError, match=message):
        slots.load(1, tensors, 1.0)
    with slots.using([Segment(0, 1), Segment(1, 1)]), pytest.raises(AdapterError, match="slot 1 is empty"):
        outputs(base, tokens_BT)
    with slots.using([Segment(0, 2)]):
        assert torch.equal(outputs(base, tokens_BT), before)


def test_all_linear_leaves_out_head_and_pooler(fresh_base):
    for kind, left_out in (("seq2seq", "lm_head"), ("encoder", "pooler.dense"), ("causal", "lm_head"), ("qwen2", "lm_head")):
        model = fresh_base(kind).model
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert set(match_modules(model, "all-linear")) == linear - {left_out}
        assert left_out in linear


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]),
        (["self.key"], [f"encoder.layer.{i}.attention.self.key" for i in (0, 1)]),
        (["encoder.layer.1.output.dense"], ["encoder.layer.1.output.dense"]),
        (["layer.0.output.dense", "value"], ["encoder.layer.0.attention.self.value", "encoder.layer.0.output.dense",
                                             "encoder.layer.1.attention.self.value"]),
    ],
)  # fmt: skip
def test_target_modules_match_names_and_endings(fresh_base, targets, expected):
    assert match_modules(fresh_base("encoder").model, targets) == expected


@pytest.mark.parametrize("target", ["q", "uery", "pooler.dense", "embeddings"])
def test_target_that_matches_nothing_is_refused_with_the_choices(fresh_base, target):
    with pytest.raises(AdapterError, match=rf"target_modules \['{target}'\] match no .* this base has dense, key, query, value"):
        match_modules(fresh_base("encoder").model, ["query", target])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r".*\.1\..*\.(query|value)", [f"encoder.layer.1.attention.self.{name}" for name in ("query", "value")]),
        (r"encoder\.layer\.\d\.output\.dense", [f"encoder.layer.{i}.output.dense" for i in (0, 1)]),
    ],
)
def test_a_string_is_a_regular_expression_for_the_whole_name_as_in_peft(fresh_base, pattern, expected):
    model = fresh_base("encoder").model
    assert match_modules(model, pattern) == expected
    of_peft = get_peft_model(model, LoraConfig(target_modules=pattern)).base_model.targeted_module_names
    assert of_peft == expected


@pytest.mark.parametrize("pattern", ["query", r"self\.query", r".*\.q", ""])
def test_pattern_that_matches_no_whole_name_is_refused_with_an_example(fresh_base, pattern):
    rule = "has dense, key, query, value (such as encoder.layer.0.attention.self.query, of which a regular expression must"
    with pytest.raises(AdapterError, match=re.escape(rule)):
        match_modules(fresh_base("encoder").model, pattern)


@pytest.mark.parametrize("kind", ["encoder", "causal", "qwen2"])
@pytest.mark.parametrize(("layers", "kept"), [([0], {0}), ([-1], {1}), ([1, 0], {0, 1}), ([-2, 0], {0})])
def test_layers_are_those_of_peft(fresh_base, kind, layers, kept):
    model = fresh_base(kind).model
    every = match_modules(model, "all-linear")
    chosen = match_modules(model, "all-linear", layers)
    assert chosen == [name for name in every if any(f".{layer}." in name for layer in kept)]
    # PEFT takes a whole name whatever the layer.
    endings = sorted({name.rpartition(".")[2] for name in every})
    config = LoraConfig(target_modules=endings, layers_to_transform=sorted(kept))
    assert chosen == get_peft_model(model, config).base_model.targeted_module_names


def test_layers_are_blocks_of_both_stacks_which_may_differ_in_depth():
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_decoder_layers=2, num_heads=1)
    model = T5ForConditionalGeneration(config)
    assert match_modules(model, ["q"], [-1]) == [
        "encoder.block.2.layer.0.SelfAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
    ]
    assert match_modules(model, ["q"], [2]) == ["encoder.block.2.layer.0.SelfAttention.q"]
    with pytest.raises(AdapterError, match=r"layers \[3, -4\] do not exist; .* 3 layers in encoder.block and 2 layers in"):
        match_modules(model, "all-linear", [0, 3, -4])
    with pytest.raises(AdapterError, match=r"target_modules \['EncDecAttention.q'\] match no linear layer"):
        match_modules(model, ["q", "EncDecAttention.q"], [2])


def test_model_without_linear_layers_is_refused():
    model = BertModel(BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=0, num_attention_heads=1, intermediate_size=4))
    with pytest.raises(AdapterError, match="no linear layer that can take an adapter"):
        match_modules(model, "all-linear")


def test_wrapping_something_else_than_a_linear_layer_is_refused(fresh_base):
    with pytest.raises(AdapterError, match=r"module embeddings\.LayerNorm is a LayerNorm, not a linear layer"):
        AdapterSlots(fresh_base("encoder").model, ["embeddings.LayerNorm"], 1, 1)


# Dropout. Two layers that map x to 0 with adapters that map x to x, so that outputs show the masks.

WIDTH = 32


def mask_model(rate):
    model = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("first", "second")})
    for linear in model.values():
        nn.init.zeros_(linear.weight)
    slots = AdapterSlots(model, ["first", "second"], 2, WIDTH)
    for slot in (0, 1):
        slots.load(slot, {name: (torch.eye(WIDTH), torch.eye(WIDTH)) for name in model}, 1.0)
    slots.dropouts[0] = rate
    return model, slots


def masks(model, slots, slot_of_row, keys, num_positions=3, layer="first"):
    with slots.using(segments_of(slot_of_row), keys):
        return model[layer](torch.ones(len(slot_of_row), num_positions, WIDTH))


def test_dropout_depends_on_the_rows_key_alone():
    model, slots = mask_model(0.3)
    alone = masks(model, slots, [0], [7])
    for slot_of_row, keys in (([0, 0, 0], [7, 8, 9]), ([None, 1, 0], [3, 4, 7]), ([1, 1, None, 0, 1], [7, 1, 2, 7, 5])):
        row = max(row for row, key in enumerate(keys) if key == 7)
        for num_positions in (1, 3, 9):
            y_BTO = masks(model, slots, slot_of_row, keys, num_positions)
            assert torch.equal(y_BTO[row], alone[0, :1].expand(num_positions, -1)), "one mask at every position"
    assert not torch.equal(masks(model, slots, [0], [8]), alone)
    assert not torch.equal(masks(model, slots, [0], [7], layer="second"), alone)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_rate_and_scale_are_right(rate):
    model, slots = mask_model(rate)
    y_BTO = masks(model, slots, [0] * 1000, range(1000))[:, 0]
    kept = torch.tensor(1 / (1 - rate))
    assert ((y_BTO == 0) | (y_BTO == kept)).all()
    dropped = (y_BTO == 0).float()
    # 4.5 standard deviations of a binomial, over all masks, over the rows of a feature, and over pairs of features.
    assert dropped.mean().item() == pytest.approx(rate, abs=4.5 * (rate * (1 - rate) / dropped.numel()) ** 0.5)
    assert (dropped.mean(0) - rate).abs().max() <= 4.5 * (rate * (1 - rate) / 1000) ** 0.5
    correlation = torch.corrcoef(dropped.T) - torch.eye(WIDTH)
    assert correlation.abs().max() <= 4.5 / 1000**0.5


def test_dropout_is_off_without_keys_and_for_slots_and_base_rows_without_it():
    model, slots = mask_model(0.5)
    ones = torch.ones(3, WIDTH)
    assert torch.equal(masks(model, slots, [0, 0], None), torch.stack([ones, ones]))
    y_BTO = masks(model, slots, [None, 0, 1], [1, 2, 3])
    assert torch.equal(y_BTO[0], 0 * ones)
    assert (y_BTO[1] == 0).any()
    assert torch.equal(y_BTO[2], ones)
