"""Law 4: an adapter folder loads in plain PEFT with the same results, and comes back as it was written; broken ones are refused.

float32 results of PEFT and of the slots may differ by 1e-4.
"""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from multilora.artifact import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    WEIGHTS,
    Canary,
    TaskCard,
    card_fields,
    read_artifact,
    read_tensors,
    write_artifact,
)
from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import SCORER_VERSION, ScoringRow, encode_labels, score_labels
from multilora.segments import Segment
from multilora.target_modules import match_modules

AUTO_CLASS = {"seq2seq": AutoModelForSeq2SeqLM, "encoder": AutoModel, "causal": AutoModelForCausalLM}
ATTENTION = {"seq2seq": ["q", "v"], "encoder": ["query", "value"], "causal": ["q_proj", "v_proj"]}
RANK, SCALING = 4, 1.5
TOLERANCE = 1e-4


def prompt_format(family):
    labels = (("spam", "unwanted advertising"), ("ham", ""), ("not sure at all", "neither"))
    return PromptFormat(family, "Is this spam?\n{labels}\nMessage: {text}", "text", labels, 96)


def card_of(base, tensors, **changes):
    fields = {
        "format_version": FORMAT_VERSION, "task": "spam", "description": "", "base": base.spec,
        "base_fingerprint": base.files.fingerprint, "scorer_version": SCORER_VERSION, "rank": RANK, "scaling": SCALING,
        "num_modules": len(tensors), "canaries": [Canary(columns={"text": "hi"}, scores=[0.5, -1.25e-7, 3.0])],
        "temperature": 1.37, "spec_hash": "abc", "data_fingerprint": "def", **card_fields(prompt_format(base.family)),
    }  # fmt: skip
    return TaskCard(**{**fields, **changes})


@pytest.fixture
def make(fresh_base, random_adapter):
    """Make a base with slots and a random adapter in slot 1: (base, slots, adapter)."""

    def make_one(kind, targets="all-linear"):
        base = fresh_base(kind)
        slots = AdapterSlots(base.model, match_modules(base.model, targets), 2, 8)
        adapter = random_adapter(slots, RANK, seed=3)
        slots.load(1, adapter, SCALING)
        return base, slots, adapter

    return make_one


@pytest.fixture
def written(make, tmp_path):
    """A good adapter folder of the tiny encoder."""
    base, slots, _ = make("encoder", ATTENTION["encoder"])
    tensors = slots.export(1)
    return write_artifact(tmp_path / "adapter", card_of(base, tensors), tensors)


def outputs(family, model, tokens_BT):
    if family == "encoder":
        return model(input_ids=tokens_BT).last_hidden_state
    decoder = {"decoder_input_ids": tokens_BT[:, :3]} if family == "seq2seq" else {}
    return model(input_ids=tokens_BT, use_cache=False, **decoder).logits


# Law 4


@pytest.mark.parametrize("is_all_linear", [True, False])
@torch.no_grad()
def test_plain_peft_gives_the_same_results(make, base_folder, tmp_path, family, is_all_linear):
    base, slots, _ = make(family, "all-linear" if is_all_linear else ATTENTION[family])
    tensors = slots.export(1)
    artifact = write_artifact(tmp_path / "adapter", card_of(base, tensors), tensors)
    tokens_BT = torch.randint(5, 900, (3, 7), generator=torch.Generator().manual_seed(0))
    with slots.using([Segment(1, 3)]):
        ours = outputs(family, base.model, tokens_BT)
    plain = AUTO_CLASS[family].from_pretrained(base_folder(family)).eval()
    of_base = outputs(family, plain, tokens_BT)
    assert (ours - of_base).abs().max() > 0.1, "the adapter must change the base, or this test proves nothing"
    peft_model = PeftModel.from_pretrained(plain, artifact.folder).eval()
    assert (ours - outputs(family, peft_model, tokens_BT)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("targets", "layers", "is_rslora"), [(r".*\.1\..*", None, True), ("all-linear", [0], False), ("some", [-1], True)]
)
@torch.no_grad()
def test_plain_peft_gives_the_same_results_for_every_choice(
    fresh_base, base_folder, random_adapter, tmp_path, family, targets, layers, is_rslora
):
    base = fresh_base(family)
    names = match_modules(base.model, ATTENTION[family] if targets == "some" else targets, layers)
    slots = AdapterSlots(base.model, names, 1, 8)
    slots.load(0, random_adapter(slots, RANK, seed=3), SCALING)
    card = card_of(base, slots.export(0), rslora=is_rslora)
    artifact = write_artifact(tmp_path / "adapter", card, slots.export(0))
    assert read_artifact(artifact.folder, artifact.digest).card == card
    assert set(read_tensors(artifact)) == set(names)
    config = json.loads((artifact.folder / CONFIG).read_text(encoding="utf-8"))
    assert (config["use_rslora"], config["lora_alpha"]) == ((True, 3.0) if is_rslora else (False, 6.0))
    tokens_BT = torch.randint(5, 900, (3, 7), generator=torch.Generator().manual_seed(0))
    with slots.using([Segment(0, 3)]):
        ours = outputs(family, base.model, tokens_BT)
    plain = AUTO_CLASS[family].from_pretrained(base_folder(family)).eval()
    of_base = outputs(family, plain, tokens_BT)
    peft_model = PeftModel.from_pretrained(plain, artifact.folder).eval()
    assert peft_model.base_model.targeted_module_names == names
    assert (ours - outputs(family, peft_model, tokens_BT)).abs().max() <= TOLERANCE
    assert (ours - of_base).abs().max() > 0.05


@torch.no_grad()
def test_merged_peft_model_gives_the_same_scores(make, fresh_base, tmp_path, family):
    base, slots, _ = make(family)
    tensors = slots.export(1)
    artifact = write_artifact(tmp_path / "adapter", card_of(base, tensors), tensors)
    other = fresh_base(family)
    format_ = artifact.card.prompt_format
    row = encode_prompt(format_, {"text": "win money now"}, base.tokenizer).token_ids
    ours, of_base = score_labels(base, slots, [ScoringRow(row, slot, encode_labels(base, slots, format_)) for slot in (1, None)])
    labels = encode_labels(other, AdapterSlots(other.model, [], 1, 1), format_)
    PeftModel.from_pretrained(other.model, artifact.folder).merge_and_unload()
    (theirs,) = score_labels(other, AdapterSlots(other.model, [], 1, 1), [ScoringRow(row, None, labels)])
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    assert (ours - of_base).abs().max() > 0.1


def test_what_is_written_comes_back_exactly(make, tmp_path, family):
    base, slots, adapter = make(family)
    card = card_of(base, adapter)
    folder = tmp_path / "adapter"
    artifact = read_artifact(write_artifact(folder, card, slots.export(1)).folder)
    assert artifact.card == card
    tensors = read_tensors(artifact)
    slots.load(0, tensors, artifact.card.scaling)
    for result in (tensors, slots.export(0)):
        assert result.keys() == adapter.keys()
        assert all(torch.equal(x, y) for name, pair in adapter.items() for x, y in zip(result[name], pair, strict=True))


def test_tensor_names_are_those_that_peft_writes(make, base_folder, tmp_path, family):
    base, slots, _ = make(family, ATTENTION[family])
    ours = write_artifact(tmp_path / "ours", card_of(base, slots.export(1)), slots.export(1))
    plain = AUTO_CLASS[family].from_pretrained(base_folder(family))
    get_peft_model(plain, LoraConfig(r=RANK, target_modules=ATTENTION[family])).save_pretrained(tmp_path / "theirs")
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / WEIGHTS).items()}
        for folder in (ours.folder, tmp_path / "theirs")
    ]
    assert shapes[0] == shapes[1]


def test_card_gives_back_the_prompt_of_training(make, family):
    base, _, adapter = make(family)
    trained = prompt_format(family)
    served = TaskCard.model_validate_json(card_of(base, adapter).model_dump_json()).prompt_format
    assert served == trained
    columns = {"text": "free money " * 40}
    assert encode_prompt(served, columns, base.tokenizer) == encode_prompt(trained, columns, base.tokenizer)


# The folder


def test_folder_is_replaced_whole_and_nothing_is_left_beside_it(written, make):
    base, slots, _ = make("encoder", ATTENTION["encoder"])
    (written.folder / "stray.txt").write_text("of the version before", encoding="utf-8")
    again = write_artifact(written.folder, card_of(base, slots.export(1), description="new"), slots.export(1))
    assert {file.name for file in written.folder.iterdir()} == {CARD, CONFIG, WEIGHTS}
    assert [file.name for file in written.folder.parent.iterdir()] == ["adapter"]
    assert again.digest != written.digest
    assert read_artifact(again.folder, again.digest) == again


def test_digest_depends_on_the_contents_alone(written, make, tmp_path):
    base, slots, _ = make("encoder", ATTENTION["encoder"])
    elsewhere = write_artifact(tmp_path / "other" / "name", card_of(base, slots.export(1)), slots.export(1))
    assert elsewhere.digest == written.digest


@pytest.mark.parametrize("name", [CARD, CONFIG, WEIGHTS])
def test_changed_file_is_refused_by_its_digest(written, name):
    content = bytearray((written.folder / name).read_bytes())
    place = content.index(b"0.5") if name == CARD else len(content) - 3
    content[place] ^= 1
    (written.folder / name).write_bytes(content)
    with pytest.raises(
        AdapterError, match=f"adapter of task spam has digest .*registry entry says {written.digest[:12]}: files changed"
    ):
        read_artifact(written.folder, written.digest)


# What can be wrong. Each case changes a good folder; the message names the task or the folder, and what disagrees.

MODULE = "encoder.layer.0.attention.self.query"
KEY_A, KEY_B = (f"base_model.model.{MODULE}.lora_{half}.weight" for half in "AB")


def delete(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def change_json(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content.update(changes)
        content = {key: value for key, value in content.items() if value != "REMOVED"}
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return change


def change_tensors(change):
    def change_file(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})

    return change_file


def cut_short(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64])


def pickle_tensors(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def double_rank(state):
    for name, tensor in state.items():
        state[name] = torch.cat([tensor, tensor], dim=0 if "lora_A" in name else 1)


BROKEN_WHEN_OPENED = {
    "no folder": (shutil.rmtree, f"adapter folder adapter lacks {CARD}, {CONFIG}, {WEIGHTS}"),
    "no card": (delete(CARD), f"adapter folder adapter lacks {CARD}$"),
    "no config": (delete(CONFIG), f"adapter folder adapter lacks {CONFIG}$"),
    "no tensors": (delete(WEIGHTS), f"adapter folder adapter lacks {WEIGHTS}$"),
    "pickled tensors": (pickle_tensors, f"adapter folder adapter lacks {WEIGHTS}$"),
    "card is not JSON": (write(CARD, b"{"), f"{CARD} of adapter folder adapter is broken"),
    "card is binary": (write(CARD, b"\xff\xfe"), f"{CARD} of adapter folder adapter is broken"),
    "card lacks a field": (change_json(CARD, labels="REMOVED"), "is broken: (?s:.*)labels(?s:.*)Field required"),
    "card has another field": (change_json(CARD, lables=[]), "is broken: (?s:.*)lables(?s:.*)not permitted"),
    "card of the future": (
        change_json(CARD, format_version=99),
        f"task spam has card format 99, this version reads {FORMAT_VERSION}: train it again with `orchestrator submit --force`",
    ),
    "card of the past": (
        change_json(CARD, format_version=1, temperature="REMOVED"),
        f"task spam has card format 1, this version reads {FORMAT_VERSION}: train it again",
    ),
    "card without a temperature": (change_json(CARD, temperature="REMOVED"), "is broken: (?s:.*)temperature(?s:.*)required"),
    "temperature of nothing": (change_json(CARD, temperature=0), "is broken: (?s:.*)temperature(?s:.*)greater than 0"),
    "temperature without end": (change_json(CARD, temperature=math.inf), "is broken: (?s:.*)temperature"),
}

BROKEN_WHEN_READ = {
    "garbage": (write(WEIGHTS, b"no tensors"), "cannot be read: Error while deserializing"),
    "empty": (write(WEIGHTS, b""), "cannot be read: Error while deserializing"),
    "cut short": (cut_short, "cannot be read: Error while deserializing"),
    "config is not JSON": (write(CONFIG, b"{"), "cannot be read: Expecting property name"),
    "config is a list": (write(CONFIG, b"[]"), f"cannot be read: {CONFIG} holds no mapping"),
    "renamed key": (change_tensors(lambda s: s.update({f"model.{KEY_A}": s.pop(KEY_A)})), f"unexpected tensor model.{KEY_A}"),
    "renamed module": (
        change_tensors(lambda s: s.update({key.replace("query", "q"): s.pop(key) for key in (KEY_A, KEY_B)})),
        f"tensors cover 4 modules, {CONFIG} names others",
    ),
    "unknown tensor": (
        change_tensors(lambda s: s.update({"base_model.model.head.bias": torch.ones(2)})),
        "unexpected tensor .*head.bias",
    ),
    "DoRA's tensor": (
        change_tensors(lambda s: s.update({KEY_A.replace("lora_A", "lora_magnitude_vector"): torch.ones(2, 2)})),
        "unexpected tensor .*lora_magnitude_vector",
    ),
    "vector for a matrix": (change_tensors(lambda s: s.update({KEY_A: s[KEY_A][0]})), f"unexpected tensor {KEY_A}"),
    "missing half": (change_tensors(lambda s: s.pop(KEY_B)), f"lacks one half of {MODULE}"),
    "missing module": (change_tensors(lambda s: (s.pop(KEY_A), s.pop(KEY_B))), f"tensors cover 3 modules, {CONFIG} names others"),
    "other targets": (change_json(CONFIG, target_modules=["query"]), f"{CONFIG} names others"),
    "targets are a word": (change_json(CONFIG, target_modules="all-linear"), f"{CONFIG} names others"),
    "fewer modules on the card": (change_json(CARD, num_modules=3), "has 4 modules, its card says 3"),
    "rank of the tensors": (change_tensors(double_rank), f"has rank 8, {CONFIG} says 4, its card says 4"),
    "rank of the config": (change_json(CONFIG, r=2), f"has rank 4, {CONFIG} says 2, its card says 4"),
    "rank of the card": (change_json(CARD, rank=8), f"has rank 4, {CONFIG} says 4, its card says 8"),
    "other scaling": (change_json(CONFIG, lora_alpha=99.0), f"alpha, r and use_rslora in {CONFIG} differ from the card"),
    "other kind of scaling": (change_json(CONFIG, use_rslora=True), f"alpha, r and use_rslora in {CONFIG} differ from the card"),
}


@pytest.mark.parametrize("case", BROKEN_WHEN_OPENED)
def test_broken_folder_is_refused_when_it_is_opened(written, case):
    break_it, message = BROKEN_WHEN_OPENED[case]
    break_it(written.folder)
    with pytest.raises(AdapterError, match=message):
        read_artifact(written.folder)


@pytest.mark.parametrize("case", BROKEN_WHEN_READ)
def test_broken_tensors_are_refused_when_they_are_read(written, case):
    break_it, message = BROKEN_WHEN_READ[case]
    break_it(written.folder)
    artifact = read_artifact(written.folder)
    with pytest.raises(AdapterError, match=f"adapter of task spam.*{message}"):
        read_tensors(artifact)


def test_tensors_that_were_read_outlive_their_file(written):
    tensors = read_tensors(written)
    before = {name: (a_RI.clone(), b_OR.clone()) for name, (a_RI, b_OR) in tensors.items()}
    with (written.folder / WEIGHTS).open("r+b") as file:
        file.write(b"\0" * (written.folder / WEIGHTS).stat().st_size)
    assert all(torch.equal(x, y) for name, pair in before.items() for x, y in zip(tensors[name], pair, strict=True))


def test_adapter_of_another_base_does_not_load_into_this_one(written, make):
    _, slots, _ = make("causal")
    with pytest.raises(AdapterError, match=f"adapter does not fit this base: module {MODULE} does not exist"):
        slots.load(0, read_tensors(written), written.card.scaling)
