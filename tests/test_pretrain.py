"""The recipe of t5-mini on a tiny model: seconds, real data where they lie beside this checkout."""

from __future__ import annotations

import json
import lzma
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, T5Tokenizer

from bases.batches import EOS, IGNORED, INPUT_LENGTHS, PAD, TARGET_LENGTHS, InstructionChunks, SpanChunks, encode
from bases.corpus import corrupt_spans, sentinel_id, target_length, teacher_piece, text_length
from bases.heldout import Heldout, evaluate, label_scores
from bases.losses import mean_states, options_loss
from bases.mixture import UNSEEN, draw_match, plain_row, read_tasks
from bases.model import Size, build_model
from bases.overlap import JudgingTexts
from bases.pretrain import export, prepare
from bases.readout import give_readout
from bases.teacher import TEACHER, Match, Matches, choose_phrases, embed, is_said, label_sentences
from bases.training import Prepared, Settings, Training, rate_factor
from bases.transplant import PieceTeacher, transplant, transplant_teacher
from multilora.base_model import load_base
from multilora.errors import DataError
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import ScoringRow, encode_labels, score_labels
from multilora.spec import BaseSpec

SHARED = Path(__file__).parents[2] / "shared" / "data"
CORPUS = ("pros_cons", "wiki_sentences_clinc", "wordnet_glosses", "dialogue_multidogo")
"""Small files of the corpus."""
TINY = Size(d_model=384, d_ff=1536, num_layers=1, num_decoder_layers=1, num_heads=12, vocab_size=2048)
"""As wide as the teacher, whose first layer it takes over."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "corpus").is_dir(), reason="the pretraining data are not beside this checkout"),
]


def say(text: str) -> None:
    """Take what the recipe would print."""


def show(progress: float, line: str) -> None:
    """Take the progress that it would show."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Twelve steps on four small files, and one task's test texts to keep out."""
    data = tmp_path_factory.mktemp("data")
    (data / "corpus").mkdir()
    for name in CORPUS:
        (data / "corpus" / f"{name}.txt.xz").symlink_to(SHARED / "corpus" / f"{name}.txt.xz")
    (data / "instructions").mkdir()
    heldout = (SHARED / "instructions" / "heldout.jsonl").read_text(encoding="utf-8")  # small, and has rows of every task
    (data / "instructions" / "tasks.json").symlink_to(SHARED / "instructions" / "tasks.json")
    (data / "instructions" / "heldout.jsonl").write_text(heldout, encoding="utf-8")
    (data / "instructions" / "open.jsonl.xz").write_bytes(lzma.compress(heldout.encode(), preset=0))
    (data / "tasks" / "leaky").mkdir(parents=True)
    row = json.loads(heldout.split("\n")[0])
    (data / "tasks" / "leaky" / "test.jsonl").write_text(json.dumps({"text": row["input"], "label": "x"}) + "\n")
    return Settings(
        data=data, out=tmp_path_factory.mktemp("out"), size=TINY, minutes=1, corpus_part=0.05, steps=12, instructions_from=0.3,
        batch_tokens=512, checkpoint_steps=4, heldout_rows=1, log_s=0, num_matches=60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(settings: Settings) -> Prepared:
    """Tokenizer, tokens and mixture, made once."""
    return prepare(settings, say, show)


def test_tokenizer_has_the_teachers_pieces_and_loads_as_any(settings: Settings, prepared: Prepared) -> None:
    tokenizer, teacher = AutoTokenizer.from_pretrained(settings.out / "tokenizer"), load_base(BaseSpec(model=TEACHER)).tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (PAD, EOS, 2)
    assert len(tokenizer) == TINY.vocab_size
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [TINY.vocab_size - 1, TINY.vocab_size - 100]
    for text in ("The battery life is good, but the screen isn't.", "Wait<extra_id_3> there", "Naïve (xylophone)!"):
        ids = tokenizer(text)["input_ids"]
        assert ids == prepared.tokenizer(text)["input_ids"]
        assert ids[-1] == EOS
        assert tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(ids, skip_special_tokens="extra" not in text).removesuffix("</s>")
        assert decoded.replace(" ", "") == text.lower().replace(" ", "").replace("ï", "i")
    common = "the service was good, but they did not come on time."
    pieces = [teacher_piece(piece, teacher) for piece in tokenizer.tokenize(common)]
    assert pieces == teacher.tokenize(common)
    assert all(teacher_piece(piece, teacher) in teacher.get_vocab() for piece in tokenizer.get_vocab())


def test_corrupted_input_and_target_hold_the_text_once() -> None:
    ids = np.arange(200, 200 + text_length(128))
    source, target = corrupt_spans(ids, 1999, EOS, np.random.default_rng(0))
    assert len(source) == 128
    assert len(target) == target_length(len(ids))
    spans = np.split(target[:-1], np.flatnonzero(target[:-1] > 1000))[1:]
    hidden = {int(span[0]): list(span[1:]) for span in spans}
    assert [token for shown in source[:-1] for token in hidden.get(int(shown), [shown])] == list(ids)


def test_batches_repeat_have_few_shapes_and_mask_padding(prepared: Prepared) -> None:
    spans = SpanChunks(prepared.tokens, sentinel_id(prepared.tokenizer), 512, 0)
    instructions = InstructionChunks(prepared.mixture, prepared.tokenizer, 512, 0)
    for chunks in (spans, instructions):
        for one, same in zip(chunks[3], chunks[3], strict=True):
            assert torch.equal(one.ids_BT, same.ids_BT)
            assert torch.equal(one.targets_BU, same.targets_BU)
    assert not torch.equal(spans[0][0].ids_BT, spans[1][0].ids_BT)
    for batch in (*spans[0], *instructions[0]):
        assert batch.ids_BT.shape[1] in INPUT_LENGTHS
        assert batch.targets_BU.shape[1] in TARGET_LENGTHS
        assert len(batch.ids_BT) == 512 // batch.ids_BT.shape[1]
        for targets_U in batch.targets_BU:  # what counts comes first and ends with </s>; a row that fills up has nothing
            counted = targets_U[targets_U != IGNORED]
            assert torch.equal(counted, targets_U[: len(counted)])
            assert not len(counted) or counted[-1] == EOS
            assert not (counted == PAD).any()


def test_options_stand_in_the_prompt_and_the_answer_is_one(prepared: Prepared) -> None:
    rng = random.Random(0)
    drawn = [prepared.mixture.draw(rng) for _ in range(500)]
    with_labels = [one for one in drawn if one.labels]
    assert 250 < len(with_labels) < 450
    for one in with_labels:
        prompt = one.prompt_format(256).render({"text": one.text})
        assert one.answer in [label for label, _ in one.labels]
        assert len({label for label, _ in one.labels}) == len(one.labels) > 1
        assert {one.answer, *one.wrong} == {label for label, _ in one.labels}
        for label, meaning in one.labels:
            assert f"- {label}: {meaning}" in prompt if meaning else f"- {label}" in prompt
    assert any(meaning for one in with_labels for _, meaning in one.labels)
    for one in drawn:  # what a prompt does not list is held against the answer all the same
        assert one.answer not in one.wrong
        assert one.labels or one.instruction.count("{labels}") == 0
    assert any(one.wrong for one in drawn if not one.labels)
    places = {[label for label, _ in one.labels].index(one.answer) for one in with_labels}
    assert {0, 1, 2} <= places


def test_the_teacher_matches_sentences_with_phrases_that_they_do_not_say(settings: Settings, prepared: Prepared) -> None:
    matches = prepared.mixture.matches
    assert matches == Matches.read(settings.out / "matches.json.xz")
    assert 30 < len(matches.rows) <= 60
    for row in matches.rows:
        assert row.fitting
        assert not set(row.fitting) & set(row.near)
        assert not any(is_said(matches.phrases[place], row.text) for place in (*row.fitting, *row.near))
    rng = random.Random(0)
    for drawn in (draw_match(matches, prepared.mixture.words, rng) for _ in range(100)):
        assert drawn.wrong
        assert drawn.answer not in drawn.wrong
        assert not drawn.labels or {drawn.answer, *drawn.wrong} == {label for label, _ in drawn.labels}


def test_teacher_finds_the_phrase_that_a_sentence_is_about() -> None:
    texts = ["My suitcase did not arrive with the plane.", "The soup was cold."]
    matches, vectors_NH = label_sentences(texts, ["baggage", "food"], 0, show)
    assert torch.allclose(vectors_NH, embed(load_base(BaseSpec(model=TEACHER)), [row.text for row in matches.rows]), atol=1e-5)
    assert [matches.phrases[row.fitting[0]] for row in matches.rows] == ["baggage", "food"]


def test_phrases_are_labels_words_and_what_is_often_said_in_several_words() -> None:
    sentences = ["Driver: please add money to the account", "They add money to the box.", "Hi driver, add money"] * 2
    phrases = choose_phrases(Counter({"book a table": 2, "a b c d e": 3}), ["money", "account", "driver", "please"], sentences)
    assert phrases == ["book a table", "money", "account", "driver", "please", "please add money", "money to the account"]


def test_a_transplanted_encoder_computes_what_the_bert_does() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    bert = BertModel(config).eval()
    for name, parameter in bert.named_parameters():  # as after training: weights that matter, biases, uneven norms
        parameter.data += torch.randn_like(parameter) * (0.1 if "LayerNorm" in name or "bias" in name else 0.06)
    bert.embeddings.position_embeddings.weight.data[:] = bert.embeddings.position_embeddings.weight[0].clone()  # no order
    model = build_model(Size(d_model=64, d_ff=128, num_layers=2, num_decoder_layers=1, num_heads=4, vocab_size=200), 0)
    ids_BT = torch.randint(3, 200, (300, 12))
    ids_BT[::3, 8:] = PAD
    mask_BT = (ids_BT != PAD).long()
    seen, unseen = slice(0, 200), slice(200, 300)

    def similarity() -> float:
        with torch.no_grad():
            ours = mean_states(model, ids_BT[unseen], mask_BT[unseen])
            states_BTH = bert(input_ids=ids_BT[unseen], attention_mask=mask_BT[unseen]).last_hidden_state
            theirs = (states_BTH * mask_BT[unseen, :, None]).sum(1) / mask_BT[unseen].sum(1, keepdim=True)
        return float(torch.nn.functional.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0)).mean())

    assert similarity() < 0.5
    transplant(model, bert, bert.embeddings.word_embeddings.weight.detach(), ids_BT[seen], mask_BT[seen])
    assert similarity() > 0.95


def test_the_piece_teacher_is_the_teacher_where_the_pieces_are_the_same(prepared: Prepared) -> None:
    base = load_base(BaseSpec(model=TEACHER))
    teacher = PieceTeacher.load(prepared.tokenizer, torch.device("cpu"))
    texts = ["the service was good, but they did not come on time.", "what do you want?"]
    ours = prepared.tokenizer(texts, padding=True, return_tensors="pt")
    theirs = base.tokenizer(texts, padding=True, return_tensors="pt")
    states_BTH = teacher.states(ours["input_ids"], ours["attention_mask"])
    with torch.no_grad():
        expected_BSH = base.model(**theirs).last_hidden_state
    real_BT = ours["attention_mask"].bool()
    assert torch.allclose(states_BTH[real_BT], expected_BSH[:, 1:][real_BT], atol=1e-4)


def test_a_base_of_other_pieces_is_not_trained_further() -> None:
    other = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁Cased", -1.0)], extra_ids=0)
    with pytest.raises(DataError, match=r"has no 'Cased' .*; --start takes a base"):
        PieceTeacher.load(other, torch.device("cpu"))


def test_a_fitted_decoder_says_the_phrase_that_a_sentence_calls_for(prepared: Prepared) -> None:
    texts = [
        f"{start} {end}" for start in ("The soup", "My pasta", "This bread") for end in ("was cold.", "is good.", "came late.")
    ]
    texts += [
        f"{start} {end}" for start in ("My suitcase", "Her bag", "The trunk") for end in ("is lost.", "broke.", "is heavy.")
    ]
    matches = Matches(["food", "luggage"], [Match(text, (int(index > 8),), ()) for index, text in enumerate(texts)])
    model = build_model(TINY, 0)
    teacher = PieceTeacher.load(prepared.tokenizer, model.device)
    transplant_teacher(model, teacher, prepared.tokenizer, prepared.mixture.sentences, 0)
    encoded = prepared.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors_NH = mean_states(model, encoded["input_ids"], encoded["attention_mask"])
    words = [ids[0] for ids in prepared.tokenizer(list(matches.phrases))["input_ids"]]

    def hits() -> int:
        with torch.no_grad():
            logits_NV = model(**encoded, decoder_input_ids=torch.full((len(texts), 1), PAD)).logits[:, 0]
        return sum(int(scores.argmax()) == row.fitting[0] for scores, row in zip(logits_NV[:, words], matches.rows, strict=True))

    assert hits() < 15
    give_readout(model, prepared.tokenizer, torch.nn.functional.normalize(vectors_NH, dim=1), matches, 0)
    assert hits() == len(texts)


def test_training_prompt_is_the_serving_prompt(prepared: Prepared) -> None:
    rng = random.Random(1)
    one = next(drawn for _ in range(100) if (drawn := prepared.mixture.draw(rng)).labels)
    served = PromptFormat("seq2seq", one.instruction, "text", one.labels, INPUT_LENGTHS[-1])
    encoded = encode(one, prepared.tokenizer, rng)
    assert encoded is not None
    assert encoded[0] == encode_prompt(served, {"text": one.text}, prepared.tokenizer).token_ids


def test_overlap_is_dropped_and_unseen_tasks_stay_out(settings: Settings, prepared: Prepared) -> None:
    text = json.loads((settings.data / "tasks" / "leaky" / "test.jsonl").read_text())["text"]
    texts = JudgingTexts.read(settings.data)
    assert texts.num_texts == 1
    assert not texts.has_none_of(text.upper())
    assert texts.has_none_of("The battery life is good, but the screen is not.")
    assert all(texts.has_none_of(row["input"]) for rows in prepared.mixture.rows.values() for row in rows)
    assert not set(prepared.mixture.rows) & set(UNSEEN)


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_weights(settings: Settings, prepared: Prepared, tmp_path: Path) -> None:
    whole = Training(replace(settings, out=tmp_path / "whole"), prepared, say, show)
    killed = replace(settings, out=tmp_path / "killed")
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        folder.mkdir()
    whole.run()
    Training(killed, prepared, say, show).run(stop_at=6)
    resumed = Training(killed, prepared, say, show)
    assert resumed.position.step == 4
    resumed.run()
    assert resumed.position.num_tokens == whole.position.num_tokens
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_loss_falls_and_the_export_scores_like_the_recipe(settings: Settings, prepared: Prepared, tmp_path: Path) -> None:
    training = Training(replace(settings, out=tmp_path, steps=60, checkpoint_steps=None), prepared, say, show)
    training.run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for kind in ("spans", "sentences", "instructions"):
        losses = [record[f"loss_{kind}"] for record in log if f"loss_{kind}" in record]
        half = len(losses) // 2  # one batch is much harder than another
        assert np.mean(losses[half:]) < np.mean(losses[:half]), kind
    export(training, tmp_path / "model")
    base = load_base(BaseSpec(model=str(tmp_path / "model"), dtype="bfloat16"), "cpu")
    row = json.loads((SHARED / "instructions" / "heldout.jsonl").read_text(encoding="utf-8").strip().split("\n")[-1])
    drawn = plain_row(read_tasks(SHARED)[row["task"]], row)
    prompt_format = drawn.prompt_format(256)
    prompt = encode_prompt(prompt_format, {"text": drawn.text}, base.tokenizer).token_ids
    slots = AdapterSlots(base.model, [], num_slots=1, max_rank=1)
    labels = encode_labels(base, slots, prompt_format)
    (served,) = score_labels(base, slots, [ScoringRow(prompt, None, labels)])
    (mine,) = label_scores(training.model, [prompt], [[prepared.tokenizer(name)["input_ids"] for name in labels.names]])
    assert torch.allclose(served, mine, atol=0.3)


def test_the_loss_of_a_choice_is_that_of_the_scores_one_by_one(prepared: Prepared) -> None:
    model = build_model(TINY, 0).eval()
    batch = max(
        InstructionChunks(prepared.mixture, prepared.tokenizer, 512, 0)[0], key=lambda batch: int(batch.others.place_P.max())
    )
    assert batch.others is not None
    targets_BU = batch.targets_BU.long()
    answers = [row[row != IGNORED].tolist() for row in targets_BU if (row != IGNORED).any()]
    options = [[answer] for answer in answers]
    for row, targets_U in zip(batch.others.row_P.tolist(), batch.others.targets_PU, strict=True):
        if (targets_U != IGNORED).any():
            options[row].append(targets_U[targets_U != IGNORED].tolist())
    assert max(map(len, options)) > 3
    prompts = [ids[ids != PAD].tolist() for ids in batch.ids_BT[: len(answers)]]
    scores = label_scores(model, prompts, options)
    num_tokens = sum(map(len, answers))
    expected = sum(-scores_L[0] for scores_L in scores) / num_tokens + sum(
        scores_L.logsumexp(0) - scores_L[0] for scores_L in scores
    ) / len(scores)
    ids_BT = batch.ids_BT.long()
    with torch.no_grad():
        loss = options_loss(model, ids_BT, (ids_BT != PAD).long(), targets_BU, batch.others)
    assert torch.allclose(loss, torch.as_tensor(expected), rtol=1e-4)


@pytest.mark.long
def test_evaluation_names_every_closed_task(prepared: Prepared, settings: Settings, tmp_path: Path) -> None:
    training = Training(replace(settings, out=tmp_path), prepared, say, show)
    result = evaluate(training.model, prepared.tokenizer, Heldout.read(SHARED, 1))
    assert set(UNSEEN) <= set(result["tasks"])
    assert 0 <= result["unseen"] <= 1


def test_the_learning_rate_rises_stays_and_ends_at_zero() -> None:
    assert rate_factor(0) < 0.01
    assert rate_factor(0.1) == rate_factor(0.25) == 1
    assert rate_factor(1) == 0
