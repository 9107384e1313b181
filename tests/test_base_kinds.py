"""The laws over the architectures that the other tests leave out: each brings layers, positions or tokens of its own kind.

float32 results of differently shaped products may differ by 1e-4 of the largest.
"""

from functools import cache

import pytest
import torch
from peft import PeftModel
from test_trainer import Trained, assert_same_losses, assert_same_weights, member_of
from tiny_adapters import CARDS, MAIL, TEXTS, item_of, tiny_prompt_format, write_tiny_adapter
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from multilora.artifact import read_artifact
from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import ScoringRow, encode_labels, score_labels
from multilora.segments import Segment
from multilora.target_modules import match_modules
from serve.engine import Engine, Work

pytestmark = pytest.mark.slow

KINDS = ("mt5", "bart", "gpt2", "qwen2", "roberta")
AUTO_CLASS = {"seq2seq": AutoModelForSeq2SeqLM, "encoder": AutoModel, "causal": AutoModelForCausalLM}
TOLERANCE = 1e-4


def outputs(family, model, tokens_BT):
    """Hidden states of an encoder, otherwise logits."""
    if family == "encoder":
        return model(input_ids=tokens_BT).last_hidden_state
    decoder = {"decoder_input_ids": tokens_BT[:, :3]} if family == "seq2seq" else {}
    return model(input_ids=tokens_BT, use_cache=False, **decoder).logits


def random_tokens(num_rows):
    return torch.randint(5, 900, (num_rows, 7), generator=torch.Generator().manual_seed(0))


def assert_close(seen, expected):
    assert (seen - expected).abs().max() <= TOLERANCE * expected.abs().max()


class Rig:
    """A base with two adapters in slots, and the same base as transformers loads it."""

    def __init__(self, kind, fresh_base, random_adapter, base_folder):
        self.base = fresh_base(kind)
        self.family = self.base.family
        self.names = match_modules(self.base.model, "all-linear")
        self.slots = AdapterSlots(self.base.model, self.names, 2, 16)
        self.adapters = [random_adapter(self.slots, rank, seed=rank) for rank in (4, 7)]
        for slot, adapter in enumerate(self.adapters):
            self.slots.load(slot, adapter, 1.5)
        self.load_plain = lambda: AUTO_CLASS[self.family].from_pretrained(base_folder(kind)).eval()
        self.plain = self.load_plain()


@pytest.fixture(scope="module")
def rig(fresh_base, random_adapter, base_folder):
    return cache(lambda kind: Rig(kind, fresh_base, random_adapter, base_folder))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_mixed_batch_equals_each_adapter_alone_and_off_is_the_base_bit_for_bit(rig, kind):
    rig = rig(kind)
    tokens_BT = random_tokens(6)
    plain = outputs(rig.family, rig.plain, tokens_BT)
    with rig.slots.using([Segment(None, 6)]):
        assert torch.equal(outputs(rig.family, rig.base.model, tokens_BT), plain)
    with rig.slots.using([Segment(1, 2), Segment(None, 1), Segment(0, 3)]):
        mixed = outputs(rig.family, rig.base.model, tokens_BT)
    assert torch.equal(mixed[2], plain[2])
    for slot, rows in ((1, slice(0, 2)), (0, slice(3, 6))):
        with rig.slots.using([Segment(slot, rows.stop - rows.start)]):
            alone = outputs(rig.family, rig.base.model, tokens_BT[rows])
        assert_close(mixed[rows], alone)
        assert (alone - plain[rows]).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_plain_peft_gives_the_same_results(rig, kind, tmp_path):
    rig = rig(kind)
    artifact = write_tiny_adapter(tmp_path / "adapter", rig.base, rig.slots, rig.adapters[0], CARDS)
    tokens_BT = random_tokens(3)
    with rig.slots.using([Segment(0, 3)]):
        ours = outputs(rig.family, rig.base.model, tokens_BT)
    peft_model = PeftModel.from_pretrained(rig.load_plain(), artifact.folder).eval()
    assert_close(ours, outputs(rig.family, peft_model, tokens_BT))
    assert_close(ours, outputs(rig.family, peft_model.merge_and_unload(), tokens_BT))


@torch.no_grad()
def scores_by_definition(rig, task, text):
    """Score each label by itself with the model and tokenizer as transformers loads them."""
    format_, tokenizer, model = tiny_prompt_format(task, rig.family), rig.base.tokenizer, rig.plain
    prompt = tokenizer(format_.render(item_of(task, text)))["input_ids"]
    scores = []
    for name, meaning in format_.labels:
        if rig.family == "encoder":
            vectors = [
                model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
                for ids in (prompt, tokenizer(f"{name}: {meaning}" if meaning else name)["input_ids"])
            ]
            scores.append(20 * nn.functional.cosine_similarity(*vectors, dim=0))
        elif rig.family == "causal":
            answer = [*tokenizer(" " + name, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            gold = [*[-100] * len(prompt), *answer]
            loss = model(input_ids=torch.tensor([prompt + answer]), labels=torch.tensor([gold])).loss
            scores.append(-loss * len(answer))
        else:
            # transformers itself shifts the labels behind the decoder's start token.
            answer = tokenizer(text_target=name)["input_ids"]
            loss = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss
            scores.append(-loss * len(answer))
    return torch.stack(scores)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_equal_a_plain_forward_one_label_at_a_time(rig, kind):
    rig = rig(kind)
    rows, expected = [], []
    for task in (CARDS, MAIL):
        format_ = tiny_prompt_format(task, rig.family)
        labels = encode_labels(rig.base, rig.slots, format_)
        for text in TEXTS[:3]:
            rows.append(ScoringRow(encode_prompt(format_, item_of(task, text), rig.base.tokenizer).token_ids, None, labels))
            expected.append(scores_by_definition(rig, task, text))
    for seen, by_definition in zip(score_labels(rig.base, rig.slots, rows), expected, strict=True):
        assert_close(seen, by_definition)


@pytest.mark.parametrize("kind", KINDS)
def test_group_trains_as_solo_changes_no_base_weight_and_answers_in_the_engine(kind, fresh_base, tmp_path):
    base = fresh_base(kind)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    settings = [{"name": "plain", "learning_rate": 3e-3}, {"name": "small", "lora": {"rank": 2}, "labels": "good bad odd"}]
    members = [member_of(tmp_path, base, **one, num_train=8) for one in settings]
    group = Trained(base, members)
    assert group.is_complete
    now = {name.replace(".base.", "."): tensor for name, tensor in base.model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    solo = Trained(fresh_base(kind), [member_of(tmp_path / "solo", base, **settings[0], num_train=8)])
    assert_same_losses(group.losses("plain"), solo.losses("plain"))
    assert_same_weights(group.weights("plain"), solo.weights("plain"))
    assert any(tensor.any() for name, tensor in group.weights("plain").items() if name.endswith(" B"))
    engine = Engine(fresh_base(kind), num_slots=1, max_rank=8)
    for member in members:
        artifact = read_artifact(group.folders[member.spec.name])
        key = engine.bind(artifact, version=1)
        answers = engine.classify([Work(key, engine.prompt(key, canary.columns)) for canary in artifact.card.canaries])
        for answer, canary in zip(answers, artifact.card.canaries, strict=True):
            assert answer.scores == pytest.approx(canary.scores, rel=TOLERANCE, abs=TOLERANCE)


def test_all_linear_is_every_layer_but_head_and_pooler(rig):
    left_out = {"mt5": {"lm_head"}, "bart": {"lm_head"}, "gpt2": {"lm_head"}, "qwen2": {"lm_head"}, "roberta": {"pooler.dense"}}
    for kind in KINDS:
        layers = {name for name, module in rig(kind).plain.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        assert set(rig(kind).names) == layers - left_out[kind], kind
        assert left_out[kind] <= layers


def test_bart_answers_begin_and_end_as_its_training_wrote_them(rig):
    labels = encode_labels(rig("bart").base, rig("bart").slots, tiny_prompt_format(CARDS, "seq2seq"))
    assert {(ids[0], ids[-1]) for ids in labels.token_ids} == {(0, 2)}


# Positions. The tiny bases have 300 of them, which is no multiple of the padding's step.


@pytest.mark.parametrize("kind", ["bart", "gpt2", "roberta"])
@torch.no_grad()
def test_the_longest_input_that_the_base_takes_is_scored(rig, kind):
    rig = rig(kind)
    long_text = " ".join(["card"] * 400)

    def prepare(max_length):
        format_ = PromptFormat(rig.family, "{text} {labels}", "text", (("yes", ""), ("no", "")), max_length)
        return encode_prompt(format_, {"text": long_text}, rig.base.tokenizer), encode_labels(rig.base, rig.slots, format_)

    num_positions = rig.base.files.max_positions
    assert num_positions == 300
    # A causal base reads prompt and answer in one row.
    num_answer = max(len(rig.base.tokenizer(" " + name)["input_ids"]) + 1 for name in ("yes", "no"))
    room = num_positions - num_answer if kind == "gpt2" else num_positions
    prompt, labels = prepare(room)
    assert len(prompt.token_ids) == room
    (scores,) = score_labels(rig.base, rig.slots, [ScoringRow(prompt.token_ids, 0, labels)])
    assert scores.isfinite().all()
    if kind == "gpt2":
        with pytest.raises(AdapterError, match=r"label needs 301 tokens, base .* takes at most 300; shorten the label or"):
            prepare(room + 1)


@pytest.mark.parametrize("kind", ["bart", "roberta"])
def test_a_label_that_is_longer_than_the_base_takes_is_refused(rig, kind):
    rig = rig(kind)
    format_ = PromptFormat(rig.family, "{text} {labels}", "text", (("yes", ""), ("so " * 400 + "no", "")), 64)
    with pytest.raises(AdapterError, match=r"longest label needs \d+ tokens, base .* takes at most 300; shorten the label$"):
        encode_labels(rig.base, rig.slots, format_)
