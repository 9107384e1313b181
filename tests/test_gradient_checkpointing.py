"""Gradient checkpointing changes memory and time, and nothing else: same losses, same gradients, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.scoring import LabelSet, ScoringRow, answer_losses, score_labels
from multilora.segments import Segment
from multilora.target_modules import match_modules
from orchestrator.gradient_checkpointing import checkpoint_layers


class Training:
    """Two adapters of different rank over a base of its own, one with dropout."""

    def __init__(self, base, random_adapter, is_checkpointed):
        self.base, self.num_products = base, 0
        names = match_modules(base.model, "all-linear")
        self.slots = AdapterSlots(base.model, names, 2, 8, is_trainable=True)
        for slot, rank in enumerate((4, 2)):
            self.slots.load(slot, random_adapter(self.slots, rank, seed=slot), 2.0)
        self.slots.dropouts[1] = 0.3
        self.slots.layers[names[0]].register_forward_hook(self._count)
        if is_checkpointed:
            checkpoint_layers(base.model, self.slots)

    def _count(self, *_):
        self.num_products += 1

    def step(self):
        """Losses and gradients of a mixed batch, and how often the first module was computed."""
        width = self.base.model.config.hidden_size
        vectors_LH = torch.randn(3, width, generator=torch.Generator().manual_seed(1)) if self.base.family == "encoder" else None
        labels = LabelSet(("a", "b", "c"), vectors_LH, ((17, 5), (21, 5), (23, 29, 5)))
        prompts = [tuple(range(30 + row, 40 + 2 * row)) for row in range(5)]
        slot_of_row = (1, 0, 1, None, 0)
        rows = [ScoringRow(ids, slot, labels, 7 * row) for row, (ids, slot) in enumerate(zip(prompts, slot_of_row, strict=True))]
        self.slots.flat_grad_SP.zero_()
        self.num_products = 0
        losses_B = answer_losses(self.base, self.slots, rows, [0, 1, 2, 1, 0])
        losses_B.sum().backward()
        with torch.no_grad():
            scores = score_labels(self.base, self.slots, [replace(row, dropout_key=None) for row in rows])
        return losses_B.detach(), self.slots.flat_grad_SP.clone(), torch.cat(scores), self.num_products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_gives_the_same_gradients(family, dtype, fresh_base, random_adapter):
    plain, checkpointed = (Training(fresh_base(family, dtype=dtype), random_adapter, is_on) for is_on in (False, True))
    for expected, seen in zip(plain.step()[:3], checkpointed.step()[:3], strict=True):
        assert torch.equal(seen, expected)
        assert expected.abs().max() > 1e-3


def test_layers_are_computed_again_and_stay_in_evaluation_mode(family, fresh_base, random_adapter):
    plain, checkpointed = (Training(fresh_base(family), random_adapter, is_on) for is_on in (False, True))
    # Forward and scoring; with checkpointing the backward pass computes the layer once more.
    assert (plain.step()[3], checkpointed.step()[3]) == (2, 3)
    assert not any(module.training for module in checkpointed.base.model.modules() if not hasattr(module, "a_SRI"))


def test_a_step_stores_less(family, fresh_base, random_adapter):
    """Count what autograd keeps for the backward pass outside of the layers."""
    kept = []
    for is_on in (False, True):
        training, sizes = Training(fresh_base(family), random_adapter, is_on), {}

        def note(tensor, sizes=sizes):
            if not isinstance(tensor, torch.nn.Parameter):  # weights are there anyway
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            training.step()
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.6 * kept[0]


def test_routing_of_the_backward_pass_is_that_of_the_forward_pass(fresh_base, random_adapter):
    training = Training(fresh_base("encoder"), random_adapter, is_checkpointed=True)
    with training.slots.using([Segment(0, 2)]):
        training.step()
        assert training.slots.routing.segments == (Segment(0, 2),)
    assert training.slots.routing.segments == ()


def test_model_without_such_layers_is_refused():
    model = BertModel(BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=0, num_attention_heads=1, intermediate_size=4))
    slots = AdapterSlots(model, [], 1, 1)
    with pytest.raises(AdapterError, match=r"BertModel has no layers for gradient .* resources.gradient_checkpointing to false"):
        checkpoint_layers(model, slots)
    assert isinstance(model.embeddings, nn.Module)
