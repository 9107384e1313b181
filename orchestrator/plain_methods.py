"""The well-known ways to adapt a base that train alone: which parameters each changes, and with which learning rates.

Those without a head have our adapters' objective, prompts and label scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, PromptTuningInit, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from torch import nn

from multilora.answer_tree import T5_KINDS
from multilora.artifact import PEFT_TASK_TYPE
from multilora.base_model import FrozenBase
from multilora.errors import AdapterError
from multilora.prompt import PromptFormat
from multilora.spec import TaskSpec
from multilora.target_modules import match_modules
from orchestrator.plain_heads import FrozenHeadLearner, HeadLearner
from orchestrator.plain_scoring import LabelScorer
from orchestrator.plain_training import Learner

NUM_VIRTUAL_TOKENS = 20
PREFIX_NOTE = (
    "the prefix stands in the decoder alone, and where its layers are even in number PEFT gives two of them the same part of it "
    "and uses half of the parameters"
)
"""Source: peft 0.21 PeftModel.get_prompt, which doubles the stack of all layers and then cuts it into fours."""


@dataclass(frozen=True)
class PlainMethod:
    """One way to adapt a base."""

    name: str
    learning_rates: tuple[float, ...]
    """Those that are tried; the select split chooses."""
    build: Callable[[FrozenBase, TaskSpec], Learner]
    """Prepare a fresh base. Raises AdapterError where the method does not exist for it."""
    trains_base: bool = False
    """It changes the base's own weights: those are float32 then, and the base's dropout is on."""
    seq2seq_note: str = ""
    """What a reader must know where the base is an encoder-decoder."""


def vanilla(base: FrozenBase, spec: TaskSpec) -> Learner:
    """A head, and everything below it."""
    learner = HeadLearner.of(base, spec)
    _unfreeze(learner.module)
    return learner


def frozen_head(base: FrozenBase, spec: TaskSpec) -> Learner:
    """A head over a base that stays as it is."""
    return FrozenHeadLearner.of(base, spec)


def lora_head(base: FrozenBase, spec: TaskSpec) -> Learner:
    """A head and PEFT's LoRA in the layers, and of the rank, that the spec gives its adapter."""
    learner, lora = HeadLearner.of(base, spec), spec.lora
    names = match_modules(learner.module.body, lora.target_modules, lora.layers)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=[f"body.{name}" for name in names],
    )
    get_peft_model(learner.module, config)  # changes the module in place
    return learner


def all_parameters(base: FrozenBase, spec: TaskSpec) -> Learner:
    """Instruction fine-tuning of the whole base."""
    scorer = _scorer(base, spec)
    _unfreeze(base.model)
    return scorer


def prefix_tuning(base: FrozenBase, spec: TaskSpec) -> Learner:
    """Keys and values in front of every layer's own; in a seq2seq base of the decoder alone."""
    scorer = _scorer(base, spec)
    _check_room(scorer, spec)
    shape = _decoder_shape(base.model.config) if base.family == "seq2seq" else {}
    return _around(scorer, PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL_TOKENS, **_task_type(base), **shape))


def prompt_tuning(base: FrozenBase, spec: TaskSpec) -> Learner:
    """Vectors in front of the embedded prompt, at first those of random tokens."""
    scorer = _scorer(base, spec)
    _check_room(scorer, spec)
    config = PromptTuningConfig(
        num_virtual_tokens=NUM_VIRTUAL_TOKENS,
        num_transformer_submodules=1,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        **_task_type(base),
    )
    return _around(scorer, config)


def ia3(base: FrozenBase, spec: TaskSpec) -> Learner:
    """Factors on keys, values and the inner states of feed-forward layers."""
    kind = base.model.config.model_type
    if kind not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise AdapterError(f"PEFT does not say which layers of a base of type {kind} IA3 scales")
    scorer = _scorer(base, spec)
    get_peft_model(base.model, IA3Config(**_task_type(base)))  # changes the model in place
    return scorer


def biases(base: FrozenBase, spec: TaskSpec) -> Learner:
    """The base's own biases. Source: BitFit (arXiv 2106.10199)."""
    scorer = _scorer(base, spec)
    _unfreeze(base.model, "bias")
    if not any(parameter.requires_grad for parameter in base.model.parameters()):
        raise AdapterError(f"a base of type {base.model.config.model_type} has no biases")
    return scorer


METHODS = (
    PlainMethod("vanilla fine-tuning with a head", (5e-5, 2e-4), vanilla, trains_base=True),
    PlainMethod("head over the frozen base", (3e-3, 3e-2), frozen_head),
    PlainMethod("LoRA with a head (PEFT)", (5e-4, 2e-3), lora_head),
    PlainMethod("instruction fine-tuning of all parameters", (5e-5, 2e-4), all_parameters, trains_base=True),
    PlainMethod("prefix tuning (PEFT)", (1e-2, 5e-2), prefix_tuning, seq2seq_note=PREFIX_NOTE),
    PlainMethod("prompt tuning (PEFT)", (1e-2, 3e-2), prompt_tuning),
    PlainMethod("IA3 (PEFT)", (1e-2, 3e-2), ia3),
    PlainMethod("biases only (BitFit)", (1e-3, 4e-3), biases, trains_base=True),
)
"""Rates: two around the best of a range on the select split of tasks/support-intent.yaml over MiniLM, which 64 steps train."""


def _scorer(base: FrozenBase, spec: TaskSpec) -> LabelScorer:
    return LabelScorer.of(base, PromptFormat.of(spec, base.family))


def _unfreeze(module: nn.Module, kind: str = "") -> None:
    """Let parameters train, or those of one kind; a pooler's states are not used."""
    for name, parameter in module.named_parameters():
        *parents, last = name.split(".")
        parameter.requires_grad_("pooler" not in parents and kind in ("", last))


def _around(scorer: LabelScorer, config: Any) -> LabelScorer:
    return replace(scorer, model=get_peft_model(scorer.base.model, config))


def _task_type(base: FrozenBase) -> dict[str, str]:
    return {"task_type": PEFT_TASK_TYPE[base.family]}


def _decoder_shape(config: Any) -> dict[str, int]:
    """What PEFT would take from the encoder, or compute: T5's heads together are not always as wide as its states."""
    if config.model_type in T5_KINDS:
        num_layers, num_heads, width = config.num_decoder_layers, config.num_heads, config.num_heads * config.d_kv
    else:
        num_layers, num_heads, width = config.decoder_layers, config.decoder_attention_heads, config.d_model
    return {"num_layers": num_layers, "num_attention_heads": num_heads, "token_dim": width}


def _check_room(scorer: LabelScorer, spec: TaskSpec) -> None:
    most = scorer.base.files.max_positions
    longest = NUM_VIRTUAL_TOKENS + spec.train.max_length + max(map(len, scorer.labels.token_ids), default=0)
    if most and longest > most:
        rule = f"{NUM_VIRTUAL_TOKENS} virtual tokens and the longest prompt take {longest} positions, the base has {most}"
        raise AdapterError(f"{rule}; lower train.max_length")
