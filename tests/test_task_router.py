"""A router comes back as it was written, is refused by name where it does not fit, and reads states that nothing else changes.

Embeddings are held against plain transformers: one text at a time, no padding, no adapter.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from tiny_adapters import CARDS, MOOD, TEXTS, item_of
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from multilora.errors import AdapterError, OutdatedAdapterError
from multilora.task_router import (
    ABSTAINED,
    CARD,
    FORMAT_VERSION,
    WEIGHTS,
    Confusion,
    RouterCanary,
    RouterCard,
    linear_scores,
    read_router,
    routed_to,
    text_of,
    write_router,
)
from serve.engine import Engine, Work

TASKS = ["cards", "mood", "mail"]
MAX_LENGTH = 32
AUTO_CLASS = {"seq2seq": AutoModelForSeq2SeqLM, "encoder": AutoModel, "causal": AutoModelForCausalLM}
TOLERANCE = 1e-5


@pytest.fixture
def engine(fresh_base):
    """An engine over a tiny encoder."""
    return Engine(fresh_base("encoder"), num_slots=2, max_rank=8)


@pytest.fixture
def written(engine, tmp_path):
    """A router over the tiny encoder with random weights and true canaries."""
    generator = torch.Generator().manual_seed(0)
    weights_KH = torch.randn(len(TASKS), engine.base.files.hidden_size, generator=generator)
    bias_K = torch.randn(len(TASKS), generator=generator)
    texts = list(TEXTS[:3])
    scores_BK = linear_scores(engine.embed(texts, MAX_LENGTH), weights_KH, bias_K)
    confusion = Confusion(counts={task: {task: 3, ABSTAINED: 1} for task in TASKS})
    card = RouterCard(
        format_version=FORMAT_VERSION,
        base=engine.base.spec,
        base_fingerprint=engine.base.files.fingerprint,
        tasks=TASKS,
        max_length_tokens=MAX_LENGTH,
        temperature=0.7,
        threshold=0.6,
        select=confusion,
        gate=confusion,
        canaries=[RouterCanary(text=text, scores=row) for text, row in zip(texts, scores_BK.tolist(), strict=True)],
        data_fingerprint="f" * 64,
    )
    return write_router(tmp_path / "router", card, weights_KH, bias_K), tmp_path / "router"


def change_card(folder, **values):
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    (folder / CARD).write_text(json.dumps(card | values), encoding="utf-8")


def change_weights(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


# On disk


def test_a_router_comes_back_as_it_was_written(written, engine):
    router, folder = written
    again = read_router(folder, router.digest)
    assert (again.card, again.digest) == (router.card, router.digest)
    assert torch.equal(again.weights_KH, router.weights_KH)
    assert torch.equal(again.bias_K, router.bias_K)
    assert again.probabilities(TEXTS, engine.embed) == router.probabilities(TEXTS, engine.embed)
    again.check_base(engine.base.files.fingerprint, engine.embed)


def test_writing_again_replaces_the_folder_and_leaves_nothing_beside_it(written):
    router, folder = written
    (folder / "left-over").touch()
    other = write_router(folder, router.card.model_copy(update={"threshold": 0.9}), router.weights_KH, router.bias_K)
    assert other.digest != router.digest
    assert read_router(folder, other.digest).card.threshold == 0.9
    assert sorted(file.name for file in folder.parent.iterdir()) == ["router"]
    assert sorted(file.name for file in folder.iterdir()) == sorted([CARD, WEIGHTS])


BROKEN = {
    "no card": (lambda folder: (folder / CARD).unlink(), "lacks router_card.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "lacks router.safetensors"),
    "card is no JSON": (lambda folder: (folder / CARD).write_text("{"), "is broken: .*Invalid JSON"),
    "card is no text": (lambda folder: (folder / CARD).write_bytes(b"\xff"), "is broken: .*utf-8"),
    "unknown field": (lambda folder: change_card(folder, thresholds=1), "is broken: .*thresholds"),
    "a task twice": (lambda folder: change_card(folder, tasks=["cards", "mood", "mood"]), "a task is listed twice"),
    "a task too few": (lambda folder: change_card(folder, tasks=["cards", "mood"]), "a canary has not one score per task"),
    "no canaries": (lambda folder: change_card(folder, canaries=[]), "is broken: .*canaries"),
    "temperature": (lambda folder: change_card(folder, temperature=0), "is broken: .*temperature"),
    "threshold": (lambda folder: change_card(folder, threshold=1.5), "is broken: .*threshold"),
    "corrupt weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"\0" * 20), "is broken: "),
    "cut weights": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8]), "is broken: "),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is broken: "),
    "other tensors": (
        lambda folder: change_weights(folder, lambda state: {"weights": state["weights"]}),
        "must hold the tensors weights and bias, it holds weights",
    ),
    "weights of two tasks": (
        lambda folder: change_weights(folder, lambda state: state | {"weights": state["weights"][:2].clone()}),
        r"have shapes \[2, 64\] and \[3\], its card lists 3 tasks",
    ),
    "bias of two dimensions": (
        lambda folder: change_weights(folder, lambda state: state | {"bias": state["bias"][None].clone()}),
        r"have shapes \[3, 64\] and \[1, 3\]",
    ),
    "flat weights": (lambda folder: change_weights(folder, lambda state: state | {"weights": torch.zeros(3)}), r"shapes \[3\]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_by_name(written, name):
    _, folder = written
    breaks, message = BROKEN[name]
    breaks(folder)
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        read_router(folder)


def test_files_that_changed_after_registration_are_refused(written):
    router, folder = written
    change_card(folder, threshold=0.5)
    assert read_router(folder).card.threshold == 0.5
    with pytest.raises(AdapterError, match=f"its registry entry says {router.digest[:12]}: files changed"):
        read_router(folder, router.digest)


@pytest.mark.parametrize("fields", [{}, {"pooling": "max"}], ids=["same fields", "other fields"])
def test_another_card_format_is_outdated_not_broken(written, fields):
    _, folder = written
    change_card(folder, format_version=FORMAT_VERSION + 1, **fields)
    message = f"card format {FORMAT_VERSION + 1}, this version reads {FORMAT_VERSION}: train it again with `orchestrator router"
    with pytest.raises(OutdatedAdapterError, match=message):
        read_router(folder)


# Against its base


def test_another_base_is_refused(written, fresh_base):
    router, _ = written
    other = Engine(fresh_base("roberta"), 1, 1)
    seen, expected = other.base.files.fingerprint[:12], router.card.base_fingerprint[:12]
    with pytest.raises(AdapterError, match=f"with fingerprint {expected}; this base has {seen}: train it again"):
        router.check_base(other.base.files.fingerprint, other.embed)


def test_states_of_another_size_are_refused(written, engine):
    _, folder = written
    change_weights(folder, lambda state: state | {"weights": state["weights"][:, :60].clone()})
    with pytest.raises(AdapterError, match="the router reads 60 numbers a text, the base gives 64"):
        read_router(folder).check_base(engine.base.files.fingerprint, engine.embed)


@pytest.mark.parametrize("factor", [math.nan, 1.2], ids=["NaN", "other weights"])
def test_canaries_that_score_otherwise_are_refused(written, engine, factor):
    _, folder = written
    change_weights(folder, lambda state: {name: tensor * factor for name, tensor in state.items()})
    router = read_router(folder)
    with pytest.raises(AdapterError, match=r"canary scores differ by \S+ from those after training \(at most 0.01\)"):
        router.check_base(engine.base.files.fingerprint, engine.embed)


def test_scores_that_are_no_numbers_choose_nothing(written, engine):
    _, folder = written
    change_weights(folder, lambda state: state | {"bias": torch.tensor([0.0, math.nan, 0.0])})
    with pytest.raises(AdapterError, match="scores that are no numbers"):
        read_router(folder).probabilities(TEXTS, engine.embed)


# What it says


def test_probabilities_are_a_softmax_over_the_tasks(written, engine):
    router, _ = written
    rows = router.probabilities(TEXTS, engine.embed)
    scores_BK = linear_scores(engine.embed(TEXTS, MAX_LENGTH), router.weights_KH, router.bias_K)
    for row, scores_K in zip(rows, scores_BK.tolist(), strict=True):
        assert list(row) == TASKS
        assert sum(row.values()) == pytest.approx(1)
        weights = [math.exp(score / router.card.temperature) for score in scores_K]
        assert list(row.values()) == pytest.approx([weight / sum(weights) for weight in weights])


def test_the_most_probable_task_is_chosen_from_the_threshold_on():
    row = {"cards": 0.2, "mood": 0.5, "mail": 0.3}
    assert [routed_to(row, threshold) for threshold in (0.0, 0.5, 0.5000001, 1.0)] == ["mood", "mood", ABSTAINED, ABSTAINED]
    assert routed_to({"mood": 0.4, "cards": 0.4, "mail": 0.2}, 0.4) == "mood", "the first of equals"
    assert routed_to({"cards": 1.0, "mood": 0.0}, 1.0) == "cards"


def test_a_text_is_read_the_same_however_it_is_given():
    assert text_of("a") == text_of({"text": "a"}) == "a"
    assert text_of({"subject": "s", "body": "b"}) == text_of({"body": "b", "subject": "s"}) == "b\ns"


def test_confusion_counts():
    counts = {"cards": {"cards": 6, "mood": 1, ABSTAINED: 3}, "mood": {"cards": 1, "mood": 4}, "mail": {ABSTAINED: 5}}
    confusion = Confusion(counts=counts)
    assert [confusion.num_texts(task) for task in TASKS] == [10, 5, 5]
    assert [confusion.recall(task) for task in TASKS] == [0.6, 0.8, 0.0]
    assert confusion.abstained == 8 / 20
    assert confusion.precision == 10 / 12
    assert Confusion(counts={"mail": {ABSTAINED: 5}}).precision == 1


# The base's states


def plain_state(base_folder, family, engine, text):
    """Mean of the last hidden states of one text, by transformers alone."""
    model = AUTO_CLASS[family].from_pretrained(base_folder(family)).eval()
    reader = {"seq2seq": lambda: model.encoder, "encoder": lambda: model, "causal": lambda: model.model}[family]()
    ids = engine.base.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return F.normalize(reader(input_ids=ids).last_hidden_state.mean(1), dim=-1)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_is_plain_mean_pooling(fresh_base, base_folder, family):
    engine = Engine(fresh_base(family), 1, 1)
    texts = [text for text in TEXTS if text]
    vectors_BH = engine.embed(texts, 128)
    assert vectors_BH.shape == (len(texts), engine.base.files.hidden_size)
    for text, vector_H in zip(texts, vectors_BH, strict=True):
        assert vector_H.norm().item() == pytest.approx(1)
        assert torch.allclose(vector_H, plain_state(base_folder, family, engine, text), atol=TOLERANCE), text


@pytest.mark.parametrize("kind", [*FAMILIES, "qwen2", "mt5", "bart", "gpt2", "roberta"])
def test_an_embedding_does_not_depend_on_the_texts_beside_it(fresh_base, kind):
    """Also of a base whose tokenizer makes nothing of an empty text, and in batches of one text each."""
    texts = [*TEXTS, "card " * 40, " ", "ü \U0001f600"]
    together = Engine(fresh_base(kind), 1, 1).embed(texts, MAX_LENGTH)
    small = Engine(fresh_base(kind), 1, 1, max_batch_tokens=64)
    assert torch.isfinite(together).all()
    assert torch.allclose(small.embed(texts, MAX_LENGTH), together, atol=TOLERANCE)
    alone = torch.cat([small.embed([text], MAX_LENGTH) for text in texts])
    assert torch.allclose(alone, together, atol=TOLERANCE)
    assert torch.allclose(small.embed(texts[::-1], MAX_LENGTH).flip(0), together, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_does_not_depend_on_adapters(fresh_base, tiny_adapter, family):
    engine = Engine(fresh_base(family), num_slots=2, max_rank=8)
    before = engine.embed(TEXTS, MAX_LENGTH)
    keys = [engine.bind(tiny_adapter(family, task), 1) for task in (CARDS, MOOD)]
    assert torch.equal(engine.embed(TEXTS, MAX_LENGTH), before)
    answers = engine.classify([Work(keys[0], engine.prompt(keys[0], item_of(CARDS, text))) for text in TEXTS])
    assert torch.equal(engine.embed(TEXTS, MAX_LENGTH), before)
    again = engine.classify([Work(keys[0], engine.prompt(keys[0], item_of(CARDS, text))) for text in TEXTS])
    assert [answer.scores for answer in again] == [answer.scores for answer in answers]


def test_the_end_of_a_long_text_is_not_read(engine):
    start = "card lost " * MAX_LENGTH
    assert torch.equal(*engine.embed([start + "wallet", start + "rate rate rate"], MAX_LENGTH))
    assert engine.embed([], MAX_LENGTH).shape == (0, 64)
