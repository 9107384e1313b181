"""The README of an exported folder: what it is, how to load it, and code that answers as the engine does."""

from __future__ import annotations

import textwrap
from string import Template
from typing import TYPE_CHECKING, Literal

from multilora.prompt import PromptFormat, label_wordings
from multilora.spec import BaseSpec

if TYPE_CHECKING:
    from multilora.artifact import TaskCard

Kind = Literal["adapter", "merged", "vllm"]
LABEL_VECTORS = "label_vectors.npy"
"""Beside a merged encoder: a row per label, in the card's order."""
AUTO_CLASS = {"seq2seq": "AutoModelForSeq2SeqLM", "causal": "AutoModelForCausalLM", "encoder": "AutoModel"}
QUANTIZED = {
    "none": "",
    "8bit": ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "4bit": ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True)",
}

ADAPTER = """\
import torch
from peft import PeftModel
from transformers import $auto_class, AutoTokenizer$config_class

FOLDER = "."  # where this README lies
BASE = $base
tokenizer = AutoTokenizer.from_pretrained(BASE$revision)
base = $auto_class.from_pretrained(BASE$revision, dtype=torch.$dtype$quantized)
model = PeftModel.from_pretrained(base, FOLDER).eval()
"""
MERGED = """\
${numpy}import torch
from transformers import $auto_class, AutoTokenizer

FOLDER = "."  # where this README lies
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = $auto_class.from_pretrained(FOLDER, dtype=torch.$dtype).eval()
"""
LABELS = """\

# Of each label how the base reads it.
LABELS = $labels
TEMPERATURE = $temperature
"""
VECTOR = """\


@torch.inference_mode()
def vector(text, **cut):
    tokens = tokenizer(text, return_tensors="pt", **cut)
    return model(input_ids=tokens["input_ids"]).last_hidden_state[0].float().mean(0)


"""
VECTORS_BY_THE_BASE = """\
with model.disable_adapter():
    label_vectors = torch.stack([vector(wording) for wording in LABELS.values()])
"""
VECTORS_IN_FILE = """\
label_vectors = torch.from_numpy(numpy.load(f"{FOLDER}/$label_vectors"))  # by the base, before the adapter was merged in
"""
ENCODER = """\


def scores(columns):
    text = vector("\\n".join(columns[name] for name in $columns), truncation=True, max_length=$max_length)
    return 20.0 * torch.cosine_similarity(text, label_vectors, dim=-1)
"""
INSTRUCTION = """\
INSTRUCTION = $instruction
"""
CAUSAL = """\


@torch.inference_mode()
def score(prompt, label):
    answer = [*tokenizer(" " + label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)[range(len(answer)), answer].$reduce()
"""
SEQ2SEQ = """\


@torch.inference_mode()
def score(prompt, label):
    answer = tokenizer(label)["input_ids"]
    logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0]
    return logits.float().log_softmax(-1)[range(len(answer)), answer].$reduce()
"""
GENERATIVE = """\


def scores(columns):
    options = "\\n".join(f"- {wording}" for wording in LABELS.values())
    prompt = tokenizer(INSTRUCTION.format(labels=options, **columns))["input_ids"]
    return torch.stack([score(prompt, label) for label in LABELS])
"""
PROBABILITIES = """\


def probabilities(columns):
    return dict(zip(LABELS, torch.softmax(scores(columns) / TEMPERATURE, 0).tolist(), strict=True))


print(probabilities($example))
"""
TEXT = """\


def write(columns):
    prompt = tokenizer(INSTRUCTION.format(**columns), return_tensors="pt")["input_ids"]
    tokens = model.generate(input_ids=prompt, max_new_tokens=$max_new_tokens, do_sample=False)[0]
    return tokenizer.decode(tokens$after, skip_special_tokens=True).strip()


print(write($example))
"""
VLLM = """\
import json
import httpx

asked = json.load(open("request.json"))
prompt = asked["prompt"].replace("{$text_column}", "a text")  # likewise every other column
body = {**asked["body"], "prompt": prompt}
print(httpx.post("http://127.0.0.1:8000/v1/completions", json=body).json()["choices"][0]["text"].strip())
"""
ABOUT = {
    "adapter": "A LoRA adapter of rank $rank in PEFT's format. It answers over its base model, which is not in this folder.",
    "merged": "The base model with a LoRA adapter of rank $rank added to its weights: a plain transformers model of one task.",
    "vllm": "A LoRA adapter of rank $rank in PEFT's format, which vLLM loads (`--enable-lora`); its base model is not in this "
    "folder. `request.json` is how to ask for an answer; the `model` in it is the name that Ray Serve LLM gives.",
}
SCORED = {
    "encoder": "The score of a label is 20 x the cosine of two vectors, each the mean of the last hidden states over all tokens: "
    "that of the text **with** the adapter, and that of the label's wording (`label: meaning`) by the base **without** it. The "
    "instruction is not read.",
    "generative": "The score of a label is the $reduce of the log-likelihoods of its tokens after the prompt, the end token "
    "included.",
}


def readme_of(card: TaskCard, key: str, digest: str, kind: Kind, judged: str) -> str:
    """Write the README; `judged` is what the gate said of the version, if it said anything."""
    facts = [
        f"task: {card.task}" + (f", {card.description}" if card.description else ""),
        f"version: {key}, digest {digest[:12]}",
        f"base: {_base_name(card.base)}",
        f"gate: {judged or 'never judged'}",
    ]
    parts = [
        f"# {key}",
        Template(ABOUT[kind]).substitute(rank=card.rank),
        "\n".join(f"* {fact}" for fact in facts),
        f"## Load and ask\n\n```python\n{code_of(card, kind)}```",
        f"## Prompt\n\n{textwrap.indent(_prompt(card.prompt_format), '    ')}\n\n{_on_length(card)}",
    ]
    if card.labels:
        listed = "\n".join(f"* `{label}`" + (f": {meaning}" if meaning else "") for label, meaning in card.labels)
        parts.append(f"## Labels\n\n{listed}\n\n{_on_scores(card)}")
    return "\n\n".join(parts) + "\n"


def code_of(card: TaskCard, kind: Kind) -> str:
    """Python that loads the folder and answers."""
    columns = card.prompt_format.columns
    wordings = zip((label for label, _ in card.labels), label_wordings(card.labels), strict=True)
    values = {
        "auto_class": AUTO_CLASS[card.family],
        "base": repr(_model(card.base)) + ("  # the folder of the base model" if card.base.model.startswith("/") else ""),
        "revision": f", revision={card.base.revision!r}" if card.base.revision else "",
        "dtype": card.base.dtype,
        "numpy": "import numpy\n" if card.family == "encoder" else "",
        "config_class": ", BitsAndBytesConfig" if card.base.quantization != "none" else "",
        "quantized": QUANTIZED[card.base.quantization],
        "labels": "{\n" + "".join(f"    {label!r}: {wording!r},\n" for label, wording in wordings) + "}",
        "temperature": repr(card.temperature),
        "instruction": "(\n" + "".join(f"    {line!r}\n" for line in card.instruction.splitlines(keepends=True)) + ")",
        "max_length": card.max_length_tokens,
        "label_vectors": LABEL_VECTORS,
        "columns": list(columns),
        "example": {name: f"a {name}" for name in columns},
        "reduce": card.label_score,
        "max_new_tokens": card.max_new_tokens,
        "after": "[prompt.shape[1] :]" if card.family == "causal" else "",
        "text_column": card.text_column,
    }
    return "".join(Template(part).substitute(values) for part in _code_parts(card, kind))


def _code_parts(card: TaskCard, kind: Kind) -> list[str]:
    if kind == "vllm":
        return [VLLM]
    head = ADAPTER if kind == "adapter" else MERGED
    if not card.labels:
        return [head, INSTRUCTION, TEXT]
    if card.family == "encoder":
        return [head, LABELS, VECTOR, VECTORS_BY_THE_BASE if kind == "adapter" else VECTORS_IN_FILE, ENCODER, PROBABILITIES]
    return [head, LABELS, INSTRUCTION, CAUSAL if card.family == "causal" else SEQ2SEQ, GENERATIVE, PROBABILITIES]


def _prompt(prompt_format: PromptFormat) -> str:
    """The prompt with its columns in braces."""
    return prompt_format.render({name: f"{{{name}}}" for name in prompt_format.columns})


def _on_length(card: TaskCard) -> str:
    limit = f"The adapter was trained on prompts of at most {card.max_length_tokens} tokens"
    if card.family == "encoder":
        return f"{limit}; longer texts lose their end."
    return f"{limit}. Longer ones must lose the end of their longest column, never the instruction; the code above does not cut."


def _on_scores(card: TaskCard) -> str:
    how = Template(SCORED["encoder" if card.family == "encoder" else "generative"]).substitute(reduce=card.label_score)
    return f"{how} The softmax of the scores, divided by {card.temperature:.4g}, gives the probabilities of the labels."


def _base_name(base: BaseSpec) -> str:
    parts = [_model(base), f"revision {base.revision}" if base.revision else "", base.dtype]
    return ", ".join(filter(None, [*parts, base.quantization if base.quantization != "none" else ""]))


def _model(base: BaseSpec) -> str:
    """A hub id as it is; of a folder its name, for elsewhere it lies somewhere else."""
    return base.model.rstrip("/").rpartition("/")[2] if base.model.startswith("/") else base.model
