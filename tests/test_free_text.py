"""A free-text task from training to the report: it trains as plain models compute, and what was trained is what answers.

float32 products of other shapes round otherwise: losses and log-likelihoods may differ by 1e-4 of their size.
"""

import json
import random
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import Trained, member_of
from tiny_adapters import CARDS, MOOD, SHORTEN, TEXTS, item_of, tiny_prompt_format

from multilora.artifact import CARD, WEIGHTS, read_artifact
from multilora.errors import AdapterError
from multilora.generate import answer_text, generate
from multilora.prompt import encode_prompt
from multilora.scoring import encode_answer
from multilora.spec import GateSpec
from orchestrator.comparison import Evidence
from orchestrator.dataset import Example
from orchestrator.eval_report import EvalItem, EvalReport
from orchestrator.evaluate import evaluate
from orchestrator.group_task import Member
from orchestrator.judge import judge
from orchestrator.report import TaskOutcome, build_report
from orchestrator.report_page import summary_rows, write_report
from orchestrator.trainer import GroupTrainer
from serve.engine import NO_LABELS, Engine, ScoringRow, Work

pytestmark = pytest.mark.slow

KINDS = ("seq2seq", "causal")
ANSWERS = ("card lost", "rate please", "Thank you very much indeed for the help with the new card")


def text_member(folder, base, name, *, limit=8, num_train=6, **train) -> Member:
    """A member whose answers are free texts, some longer than the limit."""
    made = member_of(folder, base, name, num_train=num_train, instruction="Shorten: {text}", **train)
    spec = made.spec.model_validate({**made.spec.model_dump(), "labels": None, "generation": {"max_new_tokens": limit}})

    def told(examples):
        return tuple(replace(example, label=ANSWERS[i % len(ANSWERS)]) for i, example in enumerate(examples))

    return replace(made, spec=spec, train=told(made.train), select=told(made.select))


# Gold answers


@pytest.mark.parametrize("kind", [*KINDS, "qwen2"])
def test_a_gold_text_ends_with_the_end_token_unless_it_is_cut(kind, fresh_base):
    base = fresh_base(kind)
    (whole,) = encode_answer(base, ANSWERS[2], 1000).token_ids
    assert whole[-1] == base.tokenizer.eos_token_id
    assert answer_text(base, whole) == ANSWERS[2]
    (cut,) = encode_answer(base, ANSWERS[2], 5).token_ids
    assert cut == whole[:5]
    (just,) = encode_answer(base, ANSWERS[2], len(whole)).token_ids
    assert just == whole


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_the_bases_mean_over_the_gold_tokens(kind, fresh_base, tmp_path):
    base, plain = fresh_base(kind), fresh_base(kind)
    member = text_member(tmp_path, base, "shorten", batch_size=99)
    trainer = GroupTrainer(base, [member], 1, lambda event: None)
    trainer.admit()
    (loss,) = trainer.forward_backward(trainer.next_batch()).values()
    expected = []
    with torch.no_grad():
        for example in member.train:
            prompt = list(plain.tokenizer(f"Shorten: {example.columns['text']}")["input_ids"])
            (gold,) = map(list, encode_answer(plain, example.label, 8).token_ids)
            if kind == "seq2seq":
                loss_of = plain.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([gold])).loss
            else:
                ids = torch.tensor([prompt + gold])
                loss_of = plain.model(input_ids=ids, labels=torch.tensor([[-100] * len(prompt) + gold])).loss
            expected.append(float(loss_of))
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_classification_task_it_trains_as_alone(kind, fresh_base, tmp_path):
    base = fresh_base(kind)
    members = [text_member(tmp_path / "both", base, "shorten"), member_of(tmp_path / "both", base, "mood")]
    both = Trained(base, members)
    alone = Trained(fresh_base(kind), [text_member(tmp_path / "alone", base, "shorten")])
    assert [both.last(name).kind for name in ("shorten", "mood")] == ["finished", "finished"]
    assert list(both.losses("shorten").values()) == pytest.approx(list(alone.losses("shorten").values()), rel=1e-4)


def test_it_learns_to_write_and_keeps_the_epoch_of_the_lowest_select_loss(fresh_base, tmp_path):
    base = fresh_base("causal")
    member = text_member(tmp_path, base, "shorten", num_train=3, epochs=30, learning_rate=1e-2, limit=24)
    member = replace(member, select=member.train)
    trained = Trained(base, [member])
    epochs = [event for event in trained.events if event.kind == "epoch"]
    assert not any("accuracy" in name for event in epochs for name in event.metrics)
    losses = [event.metrics["select/loss"] for event in epochs]
    last = trained.last("shorten").metrics
    assert last == {"select/best": min(losses), "train/best_epoch": 1.0 + losses.index(min(losses))}
    engine = Engine(fresh_base("causal"), 1, 8)
    key = engine.bind(read_artifact(trained.folders["shorten"]), 1)
    answers = engine.classify([Work(key, engine.prompt(key, example.columns)) for example in member.train])
    assert [(answer.label, answer.is_cut_off) for answer in answers] == [(example.label, False) for example in member.train]


# Engine


@pytest.fixture(params=KINDS)
def bound(request, fresh_base, tiny_adapter):
    """An engine with a free-text adapter between two classification adapters: (kind, engine, keys by task)."""
    engine = Engine(fresh_base(request.param), num_slots=2, max_rank=8)
    tasks = (CARDS, SHORTEN, MOOD)
    return request.param, engine, {task: engine.bind(tiny_adapter(request.param, task, i), 1) for i, task in enumerate(tasks)}


def test_texts_and_labels_are_answered_in_one_mixed_batch(bound):
    _, engine, keys = bound
    works = [Work(key, engine.prompt(key, item_of(task, text))) for text in TEXTS for task, key in keys.items()]
    random.Random(0).shuffle(works)
    answers = engine.classify(works)
    for work, answer in zip(works, answers, strict=True):
        (alone,) = engine.classify([work])
        assert (answer.label, answer.is_cut_off, answer.labels) == (alone.label, alone.is_cut_off, alone.labels)
        is_text = work.key == keys[SHORTEN]
        assert (answer.probabilities == ()) == is_text
        if is_text:
            slot = engine.residents[work.key]
            (ids,) = generate(engine.base, engine._slots, [ScoringRow(work.prompt.token_ids, slot, NO_LABELS)], [6])
            assert answer.label == answer_text(engine.base, ids)
    assert len({answer.label for work, answer in zip(works, answers, strict=True) if work.key == keys[SHORTEN]}) > 3


def test_a_text_costs_its_prompt_and_its_limit(bound):
    _, engine, keys = bound
    prompt = engine.prompt(keys[SHORTEN], "a card")
    assert engine.num_tokens(Work(keys[SHORTEN], prompt)) == len(prompt.token_ids) + 6


def test_zero_shot_is_what_the_base_writes(bound):
    kind, engine, _ = bound
    prompt_format = tiny_prompt_format(SHORTEN, kind)
    answers = engine.write_zero_shot(prompt_format, [item_of(SHORTEN, text) for text in TEXTS], 5)
    prompts = [encode_prompt(prompt_format, item_of(SHORTEN, text), engine.base.tokenizer) for text in TEXTS]
    for answer, prompt in zip(answers, prompts, strict=True):
        (ids,) = generate(engine.base, engine._slots, [ScoringRow(prompt.token_ids, None, NO_LABELS)], [5])
        assert answer.label == answer_text(engine.base, ids)


# Canaries


def broken(artifact, folder, change):
    """A copy of the adapter whose card is changed."""
    folder.mkdir()
    for file in artifact.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    card = json.loads((folder / CARD).read_text())
    change(card)
    (folder / CARD).write_text(json.dumps(card))
    return folder


def test_canaries_hold_the_text_and_its_log_likelihood(tiny_adapter, fresh_base, tmp_path):
    artifact = tiny_adapter("causal", SHORTEN, 1)
    engine = Engine(fresh_base("causal"), 1, 8)
    key = engine.bind(artifact, 1)
    works = [Work(key, engine.prompt(key, canary.columns)) for canary in artifact.card.canaries]
    assert [answer.label for answer in engine.classify(works)] == [canary.text for canary in artifact.card.canaries]
    assert all(len(canary.scores) == 1 for canary in artifact.card.canaries)

    def other_text(card):
        card["canaries"][2]["text"] = "quite another text"

    with pytest.raises(AdapterError, match="canary scores differ by"):
        engine.bind(read_artifact(broken(artifact, tmp_path / "text", other_text)), 2)
    folder = broken(artifact, tmp_path / "zero", lambda card: None)
    tensors = {name: tensor * ("lora_A" in name) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="canary scores differ by"):
        engine.bind(read_artifact(folder), 2)


CHANGES = {
    "labels and a limit": lambda card: card.update(labels=[["a", ""], ["b", ""]]),
    "no limit": lambda card: card.update(max_new_tokens=None),
    "a canary without text": lambda card: card["canaries"][1].update(text=None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_card_that_is_neither_of_text_nor_of_labels_is_refused(change, tiny_adapter, tmp_path):
    folder = broken(tiny_adapter("causal", SHORTEN, 1), tmp_path / "adapter", change)
    with pytest.raises(AdapterError, match="a card has either labels, or max_new_tokens and a text in every canary"):
        read_artifact(folder)


# Evaluation and report


def test_evaluation_has_the_base_alone_as_baseline_and_the_report_shows_both_metrics(tiny_adapter, fresh_base, tmp_path):
    artifact = tiny_adapter("causal", SHORTEN, 1)
    engine = Engine(fresh_base("causal"), 1, 8)
    key = engine.bind(artifact, 1)
    texts = [answer.label for answer in engine.classify([Work(key, engine.prompt(key, text)) for text in TEXTS])]
    gold = [f"  {text.upper()} " if i % 2 else f"{text} more" for i, text in enumerate(texts)]
    gate = tuple(Example(f"id-{i}", {"text": text}, label) for i, (text, label) in enumerate(zip(TEXTS, gold, strict=True)))
    item = EvalItem("shorten", 1, artifact.digest, str(artifact.folder), gate, "gate", gate)
    outcome = evaluate(artifact.card.base, [item])
    assert outcome.errors == {}
    assert set(outcome.reports) == {("shorten", "shorten@1"), ("shorten", "zero-shot")}
    candidate, base = outcome.reports["shorten", "shorten@1"], outcome.reports["shorten", "zero-shot"]
    assert [graded.answer for graded in candidate.answers] == texts
    assert candidate.correct == [i % 2 == 1 for i in range(len(TEXTS))]
    assert candidate.value("accuracy") == 0.5
    assert candidate.token_f1 is not None
    assert 0.5 < candidate.token_f1 < 1
    assert EvalReport.from_json(candidate.to_json()) == candidate
    evidence = Evidence("shorten", GateSpec(min=0.1), candidate, base, is_first_version=True)
    verdict = judge([evidence]).verdicts["shorten"]
    told = TaskOutcome("shorten", "", "judged", "accuracy", 0.1, 0.02, "shorten@1", "shorten@1", "zero-shot", verdict,
                       candidate, base, (base,))  # fmt: skip
    report = build_report([told], datetime(2026, 1, 1, tzinfo=UTC), {})
    (task,) = report["tasks"]
    assert task["candidate_result"]["token_f1"] == candidate.token_f1
    assert task["flips"]
    assert task["flips"][0]["candidate_probability"] is None
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert "Token F1" in page
    assert "Exact match" in page
    assert summary_rows(report)[0].baselines.startswith("zero-shot ")
