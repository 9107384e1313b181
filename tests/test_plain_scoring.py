"""Plain transformers and PEFT in padded batches score labels as multilora.scoring does, and give the same losses and gradients.

float32 results of differently shaped products may differ by 1e-5 of the largest.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from tiny_adapters import CARDS, TEXTS, tiny_prompt_format

from multilora.artifact import WEIGHTS
from multilora.lora import AdapterSlots
from multilora.scoring import ScoringRow, answer_losses, score_labels
from orchestrator.dataset import Example
from orchestrator.plain_scoring import LabelScorer, mean_pooled, sorted_batches, with_adapter

KINDS = (*FAMILIES, "bart", "gpt2", "roberta")
TOLERANCE = 1e-5
EXAMPLES = [Example(str(number), {"text": text}, "rate") for number, text in enumerate(TEXTS)]


def assert_close(seen, expected):
    assert (seen - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture(params=KINDS)
def scorer(request, fresh_base):
    base = fresh_base(request.param)
    return LabelScorer.of(base, tiny_prompt_format(CARDS, base.family))


def ours(scorer, rows):
    """The slots and rows with which multilora.scoring scores the base alone."""
    return AdapterSlots(scorer.base.model, (), 0, 1), [ScoringRow(row, None, scorer.labels) for row in rows]


@torch.no_grad()
def test_scores_are_those_of_our_own_scoring(scorer):
    rows = scorer.rows(EXAMPLES)
    expected = torch.stack(score_labels(scorer.base, *ours(scorer, rows)))
    assert_close(scorer.scores(rows), expected)
    assert_close(scorer.scores(rows[2:3]), expected[2:3])


def test_losses_and_gradients_are_those_of_our_own_scoring(scorer):
    rows, gold = scorer.rows(EXAMPLES), [0, 1, 2, 0, 1, 2, 0, 1]
    model = scorer.base.model
    model.requires_grad_(True)
    found = []
    for losses in (scorer.losses(rows, gold), answer_losses(scorer.base, *ours(scorer, rows), gold)):
        model.zero_grad()
        losses.mean().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((losses.detach(), torch.cat(gradients)))
    assert_close(found[0][0], found[1][0])
    assert found[1][1].any()
    assert (found[0][1] - found[1][1]).norm() <= 1e-3 * found[1][1].norm()  # over two layers of large random weights


@torch.no_grad()
def test_mean_over_tokens_is_scored_too(fresh_base):
    base = fresh_base("seq2seq")
    scorer = LabelScorer.of(base, replace(tiny_prompt_format(CARDS, "seq2seq"), label_score="mean"))
    rows = scorer.rows(EXAMPLES)
    assert_close(scorer.scores(rows), torch.stack(score_labels(base, *ours(scorer, rows))))


@torch.no_grad()
def test_an_adapter_by_peft_and_merged_scores_as_in_our_slots(fresh_base, tiny_adapter, family):
    artifact = tiny_adapter(family, CARDS)
    base = fresh_base(family)
    scorer = LabelScorer.of(base, artifact.card.prompt_format)
    canaries = artifact.card.canaries
    rows = scorer.rows([Example("", canary.columns, "") for canary in canaries])
    expected = torch.tensor([canary.scores for canary in canaries])
    plain = scorer.scores(rows)
    assert (plain - expected).abs().max() > 0.01 * expected.abs().max()
    peft = with_adapter(base.model, artifact.folder)
    assert_close(replace(scorer, model=peft).scores(rows), expected)
    assert_close(replace(scorer, model=peft.merge_and_unload()).scores(rows), expected)


def test_an_adapter_with_a_missing_tensor_is_no_adapter(fresh_base, tiny_adapter, tmp_path):
    """PEFT only warns about it and would answer as the base."""
    folder = shutil.copytree(tiny_adapter("encoder", CARDS).folder, tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserWarning, match="Found missing adapter keys"):
        with_adapter(fresh_base("encoder").model, folder)


def test_batches_hold_rows_of_like_length():
    assert sorted_batches([(1, 2, 3), (1,), (1, 2), (1, 2, 3, 4), (5,)], 2) == [[1, 4], [2, 0], [3]]


def test_padding_does_not_count_in_the_mean():
    hidden_BTH = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    assert mean_pooled(hidden_BTH, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


def test_many_labels_make_small_batches(fresh_base):
    labels = tuple((f"label number {number}", "") for number in range(300))
    base = fresh_base("causal")
    assert LabelScorer.of(base, replace(tiny_prompt_format(CARDS, "causal"), labels=labels)).max_rows == 1
    assert LabelScorer.of(base, tiny_prompt_format(CARDS, "causal")).max_rows == 32
