"""The oracle: the same adapters in plain PEFT over plain transformers, one label at a time; none of our layer's code."""

import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftModel
from tiny_adapters import item_of, tiny_prompt_format
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from multilora.prompt import encode_prompt, label_wordings

AUTO_CLASS = {"seq2seq": AutoModelForSeq2SeqLM, "encoder": AutoModel, "causal": AutoModelForCausalLM}


def plain_probabilities(base, model, task, text, temperature):
    """The same labels scored by plain forward passes, one label at a time, without our layer and without padding.

    `model` is a PeftModel, or the base itself.
    """
    prompt_format = tiny_prompt_format(task, base.family)
    prompt = list(encode_prompt(prompt_format, item_of(task, text), base.tokenizer).token_ids)
    scores = []
    with torch.inference_mode():
        for (name, _), wording in zip(task.labels, label_wordings(task.labels), strict=True):
            if base.family == "encoder":
                label_1H = base.model(**base.tokenizer(wording, return_tensors="pt")).last_hidden_state.mean(1)
                text_1H = model(input_ids=torch.tensor([prompt])).last_hidden_state.mean(1)
                scores.append(20 * F.cosine_similarity(text_1H, label_1H).item())
                continue
            space = " " if base.family == "causal" else ""
            answer = [*base.tokenizer(space + name, add_special_tokens=False)["input_ids"], base.tokenizer.eos_token_id]
            if base.family == "seq2seq":
                logits_TV = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0]
            else:
                logits_TV = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            scores.append(logits_TV.log_softmax(-1)[range(len(answer)), answer].sum().item())
    return (torch.tensor(scores) / temperature).softmax(0).tolist()


def plain_peft(folder, family, artifact):
    return PeftModel.from_pretrained(AUTO_CLASS[family].from_pretrained(folder), artifact.folder).eval()
