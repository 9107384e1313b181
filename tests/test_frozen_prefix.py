"""Layers below the lowest adapter are computed once per text; what is trained does not depend on it."""

import pytest
import torch
from test_trainer import Trained, assert_same_losses, assert_same_weights, member_of
from transformers import DebertaV2Config, DebertaV2Model
from transformers.modeling_layers import GradientCheckpointingLayer

from multilora.target_modules import match_modules
from orchestrator.frozen_prefix import FrozenPrefix

KINDS = ("seq2seq", "encoder", "causal", "bart", "gpt2", "mt5")


def prompt_stack(model):
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def count_layer(model, index):
    """Note how many rows the given layer's attention computes in each of its forward passes."""
    layers = [m for m in prompt_stack(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = next(module for module in layers[index].modules() if not list(module.children()) and hasattr(module, "weight"))
    counts = []
    inner.register_forward_hook(lambda module, args, output: counts.append(len(output)))
    return counts


def train(base, folder):
    members = [
        member_of(folder, base, "plain", lora={"layers": [-1]}, epochs=5),
        member_of(folder, base, "other", lora={"layers": [-1], "dropout": 0.3}, epochs=4, num_train=7, seed=1),
    ]
    return Trained(base, members, 2)


@pytest.fixture
def no_memory(monkeypatch):
    """Leave no memory for hidden states: what a machine with little memory does."""
    return lambda: monkeypatch.setattr("orchestrator.frozen_prefix.MEMORY_SHARE", 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_same_adapters_with_and_without(kind, fresh_base, tmp_path, no_memory):
    base = fresh_base(kind)
    rows = count_layer(base.model, 0)
    with_prefix = train(base, tmp_path / "with")
    base = fresh_base(kind)
    rows_without = count_layer(base.model, 0)
    no_memory()
    without = train(base, tmp_path / "without")
    assert 0 < sum(rows) < 0.7 * sum(rows_without)
    for task in ("plain", "other"):
        assert_same_losses(with_prefix.losses(task), without.losses(task))
        assert_same_weights(with_prefix.weights(task), without.weights(task))


def test_each_text_is_computed_once(fresh_base, tmp_path):
    base = fresh_base("encoder")
    rows = count_layer(base.model, 0)
    member = member_of(tmp_path, base, "alone", lora={"layers": [-1]}, epochs=5, num_train=11)
    assert Trained(base, [member]).is_complete
    num_texts, num_labels = 11 + 5, 2
    assert sum(rows) == num_texts + num_labels


def test_an_adapter_in_the_lowest_layer_leaves_no_prefix(family, fresh_base):
    base = fresh_base(family)
    assert FrozenPrefix(base.model, match_modules(base.model, "all-linear")).num_layers == 0
    assert not any("forward" in vars(module) for module in base.model.modules())


def test_an_encoder_without_adapters_is_prefix_as_a_whole(fresh_base):
    base = fresh_base("seq2seq")
    names = match_modules(base.model, r"decoder\..*")
    assert FrozenPrefix(base.model, names).num_layers == base.model.config.num_layers


def test_too_many_texts_turn_it_off_and_ended_runs_free_memory(fresh_base):
    base = fresh_base("encoder")
    prefix = FrozenPrefix(base.model, match_modules(base.model, "all-linear", [-1]), max_bytes=100 * 64 * 4)
    prefix.reserve(0, 60)
    assert prefix.is_on
    prefix.reserve(1, 60)
    assert not prefix.is_on
    prefix.release(0)
    assert prefix.is_on


def test_a_cache_of_keys_and_values_is_filled_by_all_layers(fresh_base):
    base = fresh_base("causal")
    prefix = FrozenPrefix(base.model, match_modules(base.model, "all-linear", [-1]))
    prefix.reserve(0, 8)
    ids_BT = torch.arange(20, 28)[None]
    mask_BT = torch.ones_like(ids_BT)
    with torch.no_grad():
        first, again = (base.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits for _ in range(2))
        cached = base.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True)
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(cached.logits, first)
    assert cached.past_key_values.layers[0].keys.shape[2] == 8


def test_layers_that_hand_on_more_than_hidden_states_are_left_alone():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = DebertaV2Model(DebertaV2Config(vocab_size=50, relative_attention=True, **sizes)).eval()
    ids_BT = torch.arange(5, 15)[None]
    mask_BT = torch.ones_like(ids_BT)
    with torch.no_grad():
        expected = model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        prefix = FrozenPrefix(model, match_modules(model, "all-linear", [-1]))
        prefix.reserve(0, 10)
        assert (prefix.num_layers, prefix.is_on) == (2, True)
        for _ in range(2):
            assert torch.equal(model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state, expected)
    assert not prefix.is_on
