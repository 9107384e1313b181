"""Laws 1 and 6 for free text: a mixed batch writes what each row writes alone, and what plain PEFT writes, token for token."""

import random

import pytest
import torch
from peft import PeftModel
from tiny_adapters import CARDS, MAIL, MOOD
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from multilora.artifact import read_tensors
from multilora.generate import answer_text, end_ids, generate
from multilora.lora import AdapterSlots
from multilora.scoring import LabelSet, ScoringRow
from multilora.target_modules import match_modules

KINDS = ("seq2seq", "causal", "qwen2")
TASKS = (CARDS, MOOD, MAIL)  # ranks 4, 2 and 8
TEXTS = ("x", "where is my new card", "I lost my wallet on the train and nobody at the counter could help me", "no, thanks")
NO_LABELS = LabelSet((), None, ())
LIMIT = 12


class Rig:
    """A base with three adapters in slots, and the same adapters in plain PEFT."""

    def __init__(self, kind, fresh_base, tiny_adapter, base_folder):
        self.base = fresh_base(kind)
        self.slots = AdapterSlots(self.base.model, match_modules(self.base.model, "all-linear"), 3, 8)
        auto_class = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
        self.plain = {None: auto_class.from_pretrained(base_folder(kind)).eval()}
        for slot, task in enumerate(TASKS):
            artifact = tiny_adapter(kind, task, slot)
            self.slots.load(slot, read_tensors(artifact), task.scaling)
            self.plain[slot] = PeftModel.from_pretrained(auto_class.from_pretrained(base_folder(kind)), artifact.folder).eval()
        if kind == "seq2seq":
            # A head that is tied to the embeddings says the same token for ever; this one has a token for every token.
            order = torch.randperm(len(self.base.tokenizer), generator=torch.Generator().manual_seed(0))
            for model in (self.base.model, *self.plain.values()):
                head = model.get_output_embeddings()
                head.weight = torch.nn.Parameter(head.weight.detach()[order], requires_grad=False)
        self.rows = [self.row(text, slot) for text in TEXTS for slot in (2, None, 0, 1)]
        # Random weights hardly ever choose the end token; a token that they do choose ends answers at different lengths.
        first_guesses = self.write(self.rows)
        token = max(
            {t for ids in first_guesses for t in ids}, key=lambda t: len({ids.index(t) for ids in first_guesses if t in ids})
        )
        for model in (self.base.model, *self.plain.values()):
            model.generation_config.eos_token_id = [self.base.tokenizer.eos_token_id, token]

    def row(self, text, slot):
        return ScoringRow(tuple(self.base.tokenizer(f"Say it shorter: {text}")["input_ids"]), slot, NO_LABELS)

    def write(self, rows, limit=LIMIT):
        return generate(self.base, self.slots, rows, [limit] * len(rows))

    def by_transformers(self, row, limit=LIMIT):
        ids = torch.tensor([row.token_ids])
        written = self.plain[row.slot].generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit,
            pad_token_id=self.base.pad_id,
        )  # fmt: skip
        return tuple(written[0, 1 if self.base.family == "seq2seq" else ids.shape[1] :].tolist())


@pytest.fixture(scope="module", params=KINDS)
def rig(request, fresh_base, tiny_adapter, base_folder):
    return Rig(request.param, fresh_base, tiny_adapter, base_folder)


def test_a_mixed_batch_writes_what_transformers_and_peft_write(rig):
    written = rig.write(rig.rows)
    assert written == [rig.by_transformers(row) for row in rig.rows]
    # Otherwise this would prove little: answers differ between slots and texts, and end at different lengths.
    assert len(set(written)) > len(rig.rows) / 2
    lengths = [len(ids) for ids in written]
    assert LIMIT in lengths
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_batch_writes_what_each_row_writes_alone_in_any_order(rig, seed):
    rows = random.Random(seed).sample(rig.rows, 9)
    assert rig.write(rows) == [rig.write([row])[0] for row in rows]


def test_every_row_has_its_own_limit(rig):
    whole = rig.write(rig.rows)
    limits = [1 + index % 5 for index in range(len(rig.rows))]
    assert generate(rig.base, rig.slots, rig.rows, limits) == [ids[:n] for ids, n in zip(whole, limits, strict=True)]


def test_an_answer_ends_with_an_end_token_or_at_its_limit(rig):
    ends = end_ids(rig.base)
    for ids in rig.write(rig.rows):
        assert len(ids) == LIMIT or ids[-1] in ends
        assert not ends & set(ids[:-1])


def test_no_rows(rig):
    assert generate(rig.base, rig.slots, [], []) == []


def test_text_is_read_without_special_tokens_and_outer_spaces(rig):
    tokenizer = rig.base.tokenizer
    ids = tokenizer(" lost my card ", add_special_tokens=False)["input_ids"]
    assert answer_text(rig.base, [*ids, tokenizer.eos_token_id]) == "lost my card"
    assert answer_text(rig.base, [tokenizer.eos_token_id]) == ""
