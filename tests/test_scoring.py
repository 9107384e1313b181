"""Law 6: scores equal a plain forward of the unwrapped model, one label at a time, without batching and padding.

float32 log-likelihoods and cosines may differ by 1e-4 of the largest score.
Dims: B rows, T positions, H hidden, V vocabulary, L labels.
"""

import random
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES

from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import COSINE_SCALE, ScoringRow, answer_losses, encode_labels, score_labels
from multilora.target_modules import match_modules

TOLERANCE = 1e-4
SCALINGS = (1.5, 0.5)
RANKS = (4, 7)
TASKS = {
    "spam": (("spam", "unwanted advertising"), ("ham", "")),
    "intent": (("refund", "wants money back"), ("cancel the whole order", ""), ("x", "anything else at all")),
    "talk": (("sustain", ""), ("neutral", ""), ("change", ""), ("not sure what this person means", "")),
    "cards": (("card lost", ""), ("card late", ""), ("card", ""), ("card late again", ""), ("lost card", "")),
}
TEXTS = (
    "win money", "Where is my refund? I wrote three times and nobody answers me.", "x", "Pigeons nest in the vent again.",
    "I'll stop tomorrow, or maybe the day after.", "é日本 😀 unknown signs",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2,
)  # fmt: skip


class Rig:
    """A base with two adapters in slots, and unwrapped models: the plain base, and one with each adapter merged by hand."""

    def __init__(self, fresh_base, random_adapter, family):
        self.base = fresh_base(family)
        self.slots = AdapterSlots(self.base.model, match_modules(self.base.model, "all-linear"), 3, 8)
        self.plain = fresh_base(family).model
        self.merged = {None: self.plain}
        for slot, (rank, scaling) in enumerate(zip(RANKS, SCALINGS, strict=True)):
            adapter = random_adapter(self.slots, rank, seed=slot)
            self.slots.load(slot, adapter, scaling)
            self.merged[slot] = fresh_base(family).model
            for name, (a_RI, b_OR) in adapter.items():
                self.merged[slot].get_submodule(name).weight.data += scaling * b_OR @ a_RI
        self.formats = {
            task: PromptFormat(family, "Options:\n{labels}\nText: {text}\nAnswer:", "text", labels, 128)
            for task, labels in TASKS.items()
        }
        self.labels = {task: encode_labels(self.base, self.slots, format_) for task, format_ in self.formats.items()}

    def row(self, task, text, slot, **changes):
        prompt = encode_prompt(self.formats[task], {"text": text}, self.base.tokenizer)
        return ScoringRow(prompt.token_ids, slot, self.labels[task], **changes)

    def random_rows(self, seed, num_rows=6):
        rng = random.Random(seed)
        return [self.row(rng.choice(list(TASKS)), rng.choice(TEXTS), rng.choice([None, 0, 1])) for _ in range(num_rows)]


@pytest.fixture(scope="module", params=FAMILIES)
def rig(request, fresh_base, random_adapter):
    return Rig(fresh_base, random_adapter, request.param)


@torch.no_grad()
def scores_by_definition(rig, task, text, slot):
    """Score each label by itself with an unwrapped model."""
    format_, tokenizer, model = rig.formats[task], rig.base.tokenizer, rig.merged[slot]
    prompt = tokenizer(format_.render({"text": text}))["input_ids"]
    scores = []
    for name, meaning in format_.labels:
        if rig.base.family == "encoder":
            wording = tokenizer(f"{name}: {meaning}" if meaning else name)["input_ids"]
            text_H = model(input_ids=torch.tensor([prompt])).last_hidden_state[0].mean(0)
            label_H = rig.plain(input_ids=torch.tensor([wording])).last_hidden_state[0].mean(0)
            scores.append(COSINE_SCALE * (text_H @ label_H) / (text_H.norm() * label_H.norm()))
            continue
        space = " " if rig.base.family == "causal" else ""
        answer = [*tokenizer(space + name, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if rig.base.family == "seq2seq":
            inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[0, *answer[:-1]]])}
            logits_TV = model(**inputs, use_cache=False).logits[0]
        else:
            logits_TV = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs_TV = logits_TV.log_softmax(-1)
        scores.append(sum(logprobs_TV[position, token] for position, token in enumerate(answer)))
    return torch.stack(scores)


def assert_close(scores, expected):
    for mine, theirs in zip(scores, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


# Law 6


@pytest.mark.parametrize("has_grad", [True, False])
def test_scores_equal_a_plain_forward_one_label_at_a_time(rig, has_grad):
    items = [(task, text, slot) for task in TASKS for text in TEXTS[:3] for slot in (1, None, 0)]
    random.Random(0).shuffle(items)
    with torch.set_grad_enabled(has_grad):
        scores = score_labels(rig.base, rig.slots, [rig.row(*item) for item in items])
    assert_close(scores, [scores_by_definition(rig, *item) for item in items])
    assert all(
        score.dtype == torch.float32 and score.shape == (len(TASKS[task]),)
        for score, (task, _, _) in zip(scores, items, strict=True)
    )


def test_mean_scores_are_sums_over_the_number_of_tokens(rig):
    means = encode_labels(rig.base, rig.slots, replace(rig.formats["talk"], label_score="mean"))
    row = rig.row("talk", TEXTS[1], 0)
    with torch.no_grad():
        summed, averaged = (score_labels(rig.base, rig.slots, [replace(row, labels=own)])[0] for own in (row.labels, means))
    num_tokens = torch.tensor([len(ids) for ids in row.labels.token_ids] or [1])  # an encoder's scores are no sums
    assert_close([averaged * num_tokens], [summed])


def test_what_labels_share_is_read_once(rig):
    if rig.base.family != "encoder":
        tree = rig.labels["cards"].tree
        assert not tree.is_chain
        assert tree.num_nodes < sum(map(len, rig.labels["cards"].token_ids)) - 3


def test_labels_have_different_lengths_and_scores_differ(rig):
    # Otherwise the tests of this file would prove little.
    if rig.base.family != "encoder":
        assert len({len(ids) for ids in rig.labels["talk"].token_ids}) > 1
    of_slots = [score_labels(rig.base, rig.slots, [rig.row("talk", TEXTS[1], slot)])[0] for slot in (None, 0, 1)]
    of_texts = [score_labels(rig.base, rig.slots, [rig.row("talk", text, 0)])[0] for text in TEXTS[:3]]
    for results in (of_slots, of_texts):
        assert min((x - y).abs().max() for x in results for y in results if x is not y) > 0.02


@pytest.mark.parametrize("seed", range(5))
def test_mixed_batch_scores_as_each_row_alone_in_any_order(rig, seed):
    rows = rig.random_rows(seed)
    with torch.no_grad():
        alone = [score_labels(rig.base, rig.slots, [row])[0] for row in rows]
        assert_close(score_labels(rig.base, rig.slots, rows), alone)
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        assert_close(score_labels(rig.base, rig.slots, [rows[index] for index in order]), [alone[index] for index in order])


def test_equal_batches_score_exactly_equal(rig):
    rows = rig.random_rows(0)
    with torch.no_grad():
        first, second = (score_labels(rig.base, rig.slots, rows) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_ties_are_decided_the_same_way_every_time(rig):
    # encode_labels refuses labels that are equal to the base; two names for one label are as close as labels can come.
    labels = rig.labels["intent"]
    vectors_LH = None if labels.vectors_LH is None else labels.vectors_LH.repeat(2, 1)
    twice = replace(labels, names=labels.names * 2, vectors_LH=vectors_LH, token_ids=labels.token_ids * 2)
    rows = [replace(rig.row("intent", text, 0), labels=twice) for text in TEXTS]
    with torch.no_grad():
        first, second = (torch.stack(score_labels(rig.base, rig.slots, rows)) for _ in range(2))
    assert_close(first[:, 3:], first[:, :3])
    assert torch.equal(first.argmax(1), second.argmax(1))


def test_single_row_and_single_token_prompt(rig):
    row = replace(rig.row("spam", "x", 0), token_ids=rig.row("spam", "x", 0).token_ids[-1:])
    with torch.no_grad():
        (alone,) = score_labels(rig.base, rig.slots, [row])
        padded = score_labels(rig.base, rig.slots, [row, rig.row("spam", TEXTS[6], 0)])[0]
    assert alone.isfinite().all()
    assert_close([padded], [alone])


# Labels


def test_answer_is_the_label_and_the_end_token(fresh_base):
    for family in ("seq2seq", "causal", "qwen2"):
        base = fresh_base(family)
        format_ = PromptFormat(base.family, "{text} {labels}", "text", TASKS["talk"], 64)
        labels = encode_labels(base, AdapterSlots(base.model, [], 1, 1), format_)
        assert labels.names == ("sustain", "neutral", "change", "not sure what this person means")
        for name, ids in zip(labels.names, labels.token_ids, strict=True):
            assert ids[-1] == base.tokenizer.eos_token_id
            assert base.tokenizer.decode(ids[:-1]).strip() == name


def test_label_vectors_are_unit_vectors_of_the_base_alone(fresh_base, random_adapter):
    rig = Rig(fresh_base, random_adapter, "encoder")
    before = rig.labels["intent"].vectors_LH
    assert before.shape == (3, 64)
    assert not before.requires_grad
    assert before.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    rig.slots.load(0, random_adapter(rig.slots, 8, seed=9), 4.0)
    assert torch.equal(encode_labels(rig.base, rig.slots, rig.formats["intent"]).vectors_LH, before)


@pytest.mark.parametrize(("family", "labels"), [("seq2seq", ("日", "本")), ("encoder", ("résumé", "Resume"))])
def test_labels_that_this_base_cannot_tell_apart_are_refused(fresh_base, family, labels):
    base = fresh_base(family)
    format_ = PromptFormat(family, "{text} {labels}", "text", tuple((label, "") for label in labels), 64)
    with pytest.raises(AdapterError, match=f"two of the labels {', '.join(labels)} are the same tokens to base .*; reword one"):
        encode_labels(base, AdapterSlots(base.model, [], 1, 1), format_)


# Training loss


def test_loss_is_the_cross_entropy_or_the_mean_over_the_gold_answers_tokens(rig):
    rows = rig.random_rows(1)
    gold = [index % len(row.labels.names) for index, row in enumerate(rows)]
    with torch.no_grad():
        losses_B = answer_losses(rig.base, rig.slots, rows, gold)
        scores = score_labels(rig.base, rig.slots, rows)
    if rig.base.family == "encoder":
        expected = [-score.log_softmax(-1)[label] for score, label in zip(scores, gold, strict=True)]
    else:
        expected = [
            -score[label] / len(row.labels.token_ids[label]) for row, score, label in zip(rows, scores, gold, strict=True)
        ]
    assert losses_B.shape == (len(rows),)
    assert_close([losses_B], [torch.stack(expected)])


def test_gradients_reach_the_adapters_of_the_rows_and_no_others(fresh_base, random_adapter, family):
    rig = Rig(fresh_base, random_adapter, family)
    base = fresh_base(family)
    slots = AdapterSlots(base.model, list(rig.slots.layers), 3, 8, is_trainable=True)
    for slot in (0, 1, 2):
        slots.load(slot, random_adapter(slots, 4, seed=slot), 1.0)
    rows = [rig.row("spam", TEXTS[0], 2), rig.row("spam", TEXTS[1], 0), rig.row("spam", TEXTS[2], None)]
    answer_losses(base, slots, rows, [0, 1, 0]).sum().backward()
    assert slots.flat_grad_SP[0].any()
    assert slots.flat_grad_SP[2].any()
    assert not slots.flat_grad_SP[1].any()


def test_dropout_follows_the_rows_key_whatever_the_batch(fresh_base, random_adapter, family):
    rig = Rig(fresh_base, random_adapter, family)
    row = rig.row("talk", TEXTS[1], 0, dropout_key=7)
    others = [
        rig.row("spam", TEXTS[6], 1, dropout_key=1),
        rig.row("talk", TEXTS[0], None, dropout_key=2),
        rig.row("spam", "x", 0, dropout_key=3),
    ]

    def loss(rows):
        return answer_losses(rig.base, rig.slots, rows, [0] * len(rows))[rows.index(row)].item()

    with torch.no_grad():
        off = loss([row])
        rig.slots.dropouts[0] = 0.4
        alone = loss([row])
        batches = ([row, row, *others], [*others, row], [*others[:1], row, *others[1:]], [row, others[2]])
        assert [loss(batch) for batch in batches] == pytest.approx([alone] * 4, rel=TOLERANCE)
        assert abs(alone - off) > 0.01
        keyless = replace(row, dropout_key=None)
        assert answer_losses(rig.base, rig.slots, [keyless], [0]).item() == pytest.approx(off, rel=TOLERANCE)
        assert abs(answer_losses(rig.base, rig.slots, [replace(row, dropout_key=8)], [0]).item() - alone) > 0.01
