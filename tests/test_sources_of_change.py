"""Every source of a changed answer is planted once, in the real engine and judge, and must be caught; an A/A run must not.

The champion's own answers are the gold labels here, so it is always right and everything else can only be worse.
"""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import CARDS, MOOD, item_of
from tiny_bases import TEXTS

from multilora.artifact import read_artifact
from multilora.fingerprint import changed_parts
from multilora.spec import GateSpec
from orchestrator import evaluate as evaluation
from orchestrator.comparison import Evidence
from orchestrator.dataset import Example
from orchestrator.eval_report import EvalItem
from orchestrator.evaluate import evaluate
from orchestrator.judge import Outcome, VerdictKind, judge
from serve.engine import Engine

FAMILIES = ("seq2seq", "encoder", "causal")
GATE = "fingerprint of the gate split"
LINES = sorted(TEXTS.read_text(encoding="utf-8").splitlines(), key=len)[::33]


def examples(task=CARDS, gold=None):
    golds = gold or [task.labels[0][0]] * len(LINES)
    return tuple(Example(f"id{i}", item_of(task, text), label) for i, (text, label) in enumerate(zip(LINES, golds, strict=True)))


def item(artifact, version=1, gate=None, task=CARDS):
    return EvalItem(task.name, version, artifact.digest, str(artifact.folder), gate or examples(task), GATE)


def answers_of(artifact, version=1, gate=None, base=None, task=CARDS):
    outcome = evaluate(base or artifact.card.base, [item(artifact, version, gate, task)])
    return outcome.reports.get((task.name, f"{task.name}@{version}")), outcome.errors


@pytest.fixture(params=FAMILIES, scope="module")
def champion(request, tiny_adapter):
    """A champion that gives two answers at least ten times, its report, and the gate examples whose gold labels they are."""
    for seed in range(1, 30):
        artifact = tiny_adapter(request.param, CARDS, seed=seed)
        report, errors = answers_of(artifact)
        assert not errors
        gold = [graded.answer for graded in report.answers]
        if len(Counter(gold)) > 1 and Counter(gold).most_common(2)[1][1] >= 10:
            break
    gate = examples(gold=gold)
    return artifact, replace(report, answers=tuple(replace(graded, gold=graded.answer) for graded in report.answers)), gate


def verdict_of(candidate, reference, **changes):
    is_changed = candidate.fingerprint != reference.fingerprint
    release = judge([Evidence("cards", GateSpec(), candidate, reference, **{"is_changed": is_changed, **changes})])
    return release, release.verdicts.get("cards")


def copy_of(artifact, folder, change_card=lambda card: None, change_tensors=lambda tensors: tensors):
    """Another adapter folder, written anew: only what is changed differs."""
    shutil.copytree(artifact.folder, folder)
    card = json.loads((folder / "task_card.json").read_text(encoding="utf-8"))
    change_card(card)
    (folder / "task_card.json").write_text(json.dumps(card), encoding="utf-8")
    tensors = change_tensors(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return read_artifact(folder)


def test_an_adapter_that_learned_swapped_labels(champion):
    """What it learned: the first label's texts are the second's."""
    _, report, _ = champion
    (first, _), (second, _) = Counter(graded.answer for graded in report.answers).most_common(2)
    swap = {first: second, second: first}
    swapped = replace(report, answers=tuple(replace(g, answer=swap.get(g.answer, g.answer)) for g in report.answers),
                      fingerprint={**report.fingerprint, "adapter": "swapped"})  # fmt: skip
    release, verdict = verdict_of(swapped, report)
    assert (release.outcome, verdict.kind, verdict.is_promoted) == (Outcome.BLOCK, VerdictKind.REGRESSED, False)


def test_an_adapter_that_was_trained_on_for_another_task(champion, tiny_adapter):
    """The weights serve the other task now; this one's answers are lost."""
    artifact, report, gate = champion
    for seed in range(40, 60):
        candidate, errors = answers_of(tiny_adapter(artifact.card.family, CARDS, seed=seed), 2, gate)
        assert not errors
        if sum(candidate.correct) < 0.8 * len(gate):
            break
    assert changed_parts(report.fingerprint, candidate.fingerprint) == ("adapter",)
    release, verdict = verdict_of(candidate, report)
    assert (release.outcome, verdict.kind) == (Outcome.BLOCK, VerdictKind.REGRESSED)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda card: card.update(instruction="Never mind what follows.\n{labels}\nIt says: {text}"), "prompt"),
        (lambda card: card.update(labels=[[name, "of a green colour"] for name, _ in card["labels"]]), "labels"),
        (lambda card: card.update(label_score="mean"), "labels"),
    ],
    ids=["prompt", "label wording", "label score"],
)
def test_another_wording_under_the_same_weights(champion, tmp_path, change, part):
    """Its name is in the fingerprint, and the canaries of the weights refuse to be bound under it."""
    artifact, report, gate = champion
    changed = copy_of(artifact, tmp_path / "changed", change)
    candidate, errors = answers_of(changed, 2, gate)
    if candidate is None:
        assert "canary" in errors["cards@2"]
    else:  # an encoder reads no instruction, and scores no tokens of labels
        assert artifact.card.family == "encoder"
        assert part in changed_parts(report.fingerprint, candidate.fingerprint)
        assert verdict_of(candidate, report)[1].kind is VerdictKind.NON_INFERIOR


def test_inputs_that_are_cut(champion, tmp_path):
    """A shorter max_length has its name, and the answers say whose input was cut; canaries that fit do not notice."""
    artifact, report, gate = champion
    for max_length in range(8, 128, 4):
        shortened = copy_of(
            artifact, tmp_path / str(max_length), lambda card, most=max_length: card.update(max_length_tokens=most)
        )
        candidate, errors = answers_of(shortened, 2, gate)
        if not errors:
            break
    assert changed_parts(report.fingerprint, candidate.fingerprint) == ("max_length",)
    cut = [graded.is_truncated for graded in candidate.answers]
    assert 0 < sum(cut) < len(cut)
    assert not any(graded.is_truncated for graded in report.answers)
    lost = [new.answer != old.answer for new, old in zip(candidate.answers, report.answers, strict=True)]
    assert not any(is_lost and not is_cut for is_lost, is_cut in zip(lost, cut, strict=True))
    assert verdict_of(candidate, report)[1].num_losses == sum(lost)


def test_another_base_or_revision_or_dtype_is_refused_and_named(champion, base_folder, tmp_path):
    artifact, _, gate = champion
    folder = tmp_path / "revised"
    shutil.copytree(base_folder(artifact.card.family), folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, weights, metadata={"format": "pt"})
    revised = artifact.card.base.model_copy(update={"model": str(folder)})
    coarser = artifact.card.base.model_copy(update={"dtype": "bfloat16"})
    quantised = artifact.card.base.model_copy(update={"quantization": "8bit"})
    for base in (revised, coarser, quantised):
        report, errors = answers_of(artifact, gate=gate, base=base)
        assert report is None
        assert "fingerprint" in errors["cards@1"]


def test_an_adapter_that_is_not_applied(champion, tmp_path):
    artifact, _, gate = champion
    idle = copy_of(artifact, tmp_path / "idle", change_tensors=lambda tensors: {
        name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()
    })  # fmt: skip
    report, errors = answers_of(idle, 2, gate)
    assert report is None
    assert "canary" in errors["cards@2"]


def test_a_wrong_or_stale_adapter(champion, tiny_adapter):
    """Its files are another version's than the registry says."""
    artifact, _, gate = champion
    other = tiny_adapter(artifact.card.family, CARDS, seed=7)
    stale = replace(item(other, 2, gate), digest=artifact.digest)
    outcome = evaluate(artifact.card.base, [stale])
    assert not outcome.reports
    assert "files changed" in outcome.errors["cards@2"]


def test_another_scorer_version_is_never_compared(champion, tmp_path):
    artifact, report, gate = champion
    later = copy_of(artifact, tmp_path / "later", lambda card: card.update(scorer_version=card["scorer_version"] + 1))
    candidate, errors = answers_of(later, 2, gate)
    assert candidate is None
    assert "scorer version" in errors["cards@2"]
    release, verdict = verdict_of(replace(report, scorer_version=report.scorer_version + 1), report)
    assert (release.outcome, verdict) == (Outcome.ERROR, None)
    assert "scorer versions" in release.errors["cards"]


def test_a_champion_against_itself_in_other_batches_is_clear(champion, tiny_adapter, monkeypatch):
    """A/A: other batch shapes, and other adapters in the same batches, flip no answer."""
    artifact, report, gate = champion
    monkeypatch.setattr(evaluation, "Engine", lambda base, slots, rank: Engine(base, slots, rank, max_batch_tokens=300))
    mood = tiny_adapter(artifact.card.family, MOOD, seed=3)
    outcome = evaluate(artifact.card.base, [item(artifact, 1, gate), item(mood, task=MOOD)])
    again = outcome.reports["cards", "cards@1"]
    assert again.fingerprint == report.fingerprint
    release, verdict = verdict_of(again, report)
    assert (release.outcome, release.family, verdict.kind) == (Outcome.CLEAR, (), VerdictKind.NON_INFERIOR)
    assert (verdict.num_losses, verdict.num_wins) == (0, 0)


def test_the_same_fingerprint_with_other_answers_is_caught(champion):
    """What no fingerprint explains, for instance a slot that holds something else, is above the A/A floor."""
    _, report, _ = champion
    labels = report.labels
    wrong = [
        replace(graded, answer=next(label for label in labels if label != graded.answer)) if row < 4 else graded
        for row, graded in enumerate(report.answers)
    ]
    release, verdict = verdict_of(replace(report, answers=tuple(wrong)), report)
    assert (release.outcome, verdict.kind) == (Outcome.BLOCK, VerdictKind.REGRESSED)
    assert "nothing that decides the answers changed" in verdict.reasons[0]
