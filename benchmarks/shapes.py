"""Bases of known shapes with seeded random weights, and the same adapters in PEFT's layers and in ours.

The copies of a base share its weights, so every variant of a benchmark runs over the same memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from multilora.lora import AdapterSlots

T5 = {"d_kv": 64, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0}
SHAPES: dict[str, PretrainedConfig] = {
    # 7.7M parameters: what two cores train in seconds.
    "tiny-t5": T5Config(
        vocab_size=8192, d_model=256, d_ff=768, num_layers=4, num_decoder_layers=2, num_heads=4, tie_word_embeddings=True, **T5
    ),
    "flan-t5-small": T5Config(
        vocab_size=32128, d_model=512, d_ff=1024, num_layers=8, num_heads=6, tie_word_embeddings=False, **T5
    ),
    "flan-t5-base": T5Config(
        vocab_size=32128, d_model=768, d_ff=2048, num_layers=12, num_heads=12, tie_word_embeddings=False, **T5
    ),
    "minilm": BertConfig(
        vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    ),
}  # fmt: skip
QV = {"t5": ["q", "v"], "bert": ["query", "value"]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# alpha / rank is no power of two: scaling rounds, as it does in general.
RANK, ALPHA = 8, 3


def build_model(shape: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build a frozen base in eval mode; equal arguments give equal weights."""
    config = SHAPES[shape]
    torch.manual_seed(0)
    model = (T5ForConditionalGeneration if config.model_type == "t5" else BertModel)(copy.deepcopy(config))
    return model.to(device, dtype).requires_grad_(False).eval()


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules, not the weights."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def peft_copy(model: PreTrainedModel, module_names: list[str], num_adapters: int, *, is_trainable: bool = False) -> PeftModel:
    """Put `num_adapters` random PEFT adapters, named 0, 1, 2 ..., on a copy of the base.

    For serving their tensors have the base's dtype, as ours have; for training PEFT keeps them in float32, as we do.
    """
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=module_names, lora_dropout=0.0, init_lora_weights=is_trainable)
    adapted = get_peft_model(shared_copy(model), config, adapter_name="0", autocast_adapter_dtype=is_trainable)
    for adapter in range(1, num_adapters):
        adapted.add_adapter(str(adapter), config, autocast_adapter_dtype=is_trainable)
    return adapted.eval()


def peft_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """PEFT's layers by the names that their modules have in the base."""
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def peft_tensors(layers: Mapping[str, LoraLayer], adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """One adapter's tensors, as AdapterSlots.load takes them."""
    return {name: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for name, layer in layers.items()}


def slots_like(model: PreTrainedModel, adapted: PeftModel, num_slots: int) -> AdapterSlots:
    """Wrap `model` and load PEFT's adapters into the slots of the same numbers, from the first again where slots are left."""
    layers = peft_layers(adapted)
    slots = AdapterSlots(model, list(layers), num_slots, RANK)
    for slot in range(num_slots):
        slots.load(slot, peft_tensors(layers, str(slot % len(adapted.peft_config))), ALPHA / RANK)
    return slots
