"""Load the frozen base model in its dtype and quantisation, with its tokenizer. Knows nothing of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from multilora.base_files import BaseFiles, Family, find_base
from multilora.base_layers import make_layers_alike
from multilora.errors import AdapterError, SpecError
from multilora.spec import BaseSpec

AUTO_CLASS: dict[Family, Any] = {
    "seq2seq": AutoModelForSeq2SeqLM,
    "causal": AutoModelForCausalLM,
    "encoder": AutoModel,
}


@dataclass(frozen=True)
class FrozenBase:
    """A loaded base: no parameter of it ever changes."""

    spec: BaseSpec
    files: BaseFiles
    model: PreTrainedModel
    tokenizer: Any
    device: torch.device

    @property
    def family(self) -> Family:
        """Which of the three scoring ways applies."""
        return self.files.family

    @property
    def pad_id(self) -> int:
        """Token id that fills up short rows."""
        return int(self.tokenizer.pad_token_id)


def load_base(spec: BaseSpec, device: str | None = None) -> FrozenBase:
    """Load a base for training or serving on `device` (default: the first GPU, else the CPU).

    Raises SpecError where files or weights are missing, AdapterError where the tokenizer cannot be used.
    """
    files = find_base(spec)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    model, loading = AUTO_CLASS[files.family].from_pretrained(
        files.folder,
        dtype=getattr(torch, spec.dtype),
        quantization_config=quantization_config_of(spec),
        device_map={"": chosen} if spec.quantization != "none" else None,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    # transformers fills missing weights with random numbers; a pooler's are never used.
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise SpecError(f"base {spec.model} lacks {len(missing)} weights such as {missing[0]}; save or download it again")
    if spec.quantization == "none":
        model.to(chosen)
    make_layers_alike(model)
    model.requires_grad_(False)
    # Dropout inside the base would make an adapter's gradient depend on a random stream that tasks share.
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise AdapterError(f"base {spec.model} has no fast tokenizer (tokenizer.json), which truncation needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return FrozenBase(spec, files, model, tokenizer, chosen)


def quantization_config_of(spec: BaseSpec) -> BitsAndBytesConfig | None:
    """What transformers is told about a base's quantisation; None without one."""
    if spec.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if spec.quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        )
    return None
