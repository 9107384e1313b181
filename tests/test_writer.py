"""Texts written a step at a time are the texts written at once, whatever the engine does between the steps."""

import math
import random
from dataclasses import replace

import pytest
from tiny_adapters import CARDS, MOOD, SHORTEN, TEXTS, item_of

from multilora.errors import AdapterError, UnknownTaskError
from multilora.generate import Reader, answer_text, generate
from multilora.prompt import Prompt
from multilora.scoring import ScoringRow
from serve.engine import NO_LABELS, Engine, Work
from serve.writer import TextWork

KINDS = ("seq2seq", "causal", "qwen2")
SHORTER = replace(SHORTEN, name="shorter", rank=5)
LIMIT = 12


@pytest.fixture
def bound(fresh_base, tiny_adapter):
    """Make an engine with two free-text adapters and two with labels: (engine, keys by task)."""

    def make(kind, num_slots):
        engine = Engine(fresh_base(kind), num_slots, max_rank=8)
        tasks = (SHORTEN, SHORTER, CARDS, MOOD)
        return engine, {task: engine.bind(tiny_adapter(kind, task, seed), 1) for seed, task in enumerate(tasks, start=1)}

    return make


def works_of(engine, keys, texts=TEXTS[:3]):
    """Texts of both adapters and of the base alone."""
    made = [TextWork(keys[task], engine.prompt(keys[task], text), LIMIT) for text in texts for task in (SHORTEN, SHORTER)]
    ids = engine.base.tokenizer(texts[0])["input_ids"]
    return [*made, TextWork(None, Prompt(tuple(ids), is_truncated=False), LIMIT)]


def written(engine, works, between=lambda: None):
    """Write works to their end, one step after the other: their texts."""
    texts = {}
    for writer, indices in engine.writers(works):
        while writer.alive:
            progress = engine.step(writer)
            assert not progress.errors
            texts |= {indices[row]: text for row, text in progress.texts.items()}
            between()
    return [texts[index] for index in range(len(works))]


def tokens_of(texts):
    return [[token.id for token in text.tokens] for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_write_what_each_adapter_writes_at_once(bound, kind):
    engine, keys = bound(kind, 4)
    works = works_of(engine, keys)
    texts = written(engine, works)
    for work, text in zip(works, texts, strict=True):
        slot = engine.residents[work.key] if work.key else None
        (ids,) = generate(engine.base, engine._slots, [ScoringRow(work.prompt.token_ids, slot, NO_LABELS)], [LIMIT])
        assert tuple(token.id for token in text.tokens) == ids
        assert text.text == answer_text(engine.base, ids)
    assert len({text.text for text in texts}) > 3


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_other_answers_between_the_steps_change_no_text(bound, num_slots):
    engine, keys = bound("causal", num_slots)
    works = works_of(engine, keys)
    expected = tokens_of(written(engine, works))
    labels = [Work(keys[task], engine.prompt(keys[task], item_of(task, "a card"))) for task in (CARDS, MOOD)]
    before = engine.classify(labels)
    assert tokens_of(written(engine, works, lambda: engine.classify(labels))) == expected
    assert [answer.label for answer in engine.classify(labels)] == [answer.label for answer in before]


def test_an_adapter_that_makes_the_slots_grow_changes_no_text(bound, tiny_adapter):
    engine, keys = bound("causal", 2)
    works = works_of(engine, keys)
    expected = tokens_of(written(engine, works))
    ranks = iter(range(9, 9 + 2 * LIMIT))
    large = [tiny_adapter("causal", replace(CARDS, name="large", rank=rank), 1) for rank in (9, 12, 16)]

    def grow():
        if (rank := next(ranks)) in (9, 12, 16):
            engine.bind(large[(9, 12, 16).index(rank)], rank)

    assert tokens_of(written(engine, works, grow)) == expected


def test_the_slot_of_a_text_is_the_last_to_be_given_away(bound):
    engine, keys = bound("causal", 2)
    writer, _ = engine.writers([TextWork(keys[SHORTEN], engine.prompt(keys[SHORTEN], "a"), LIMIT)])[0]
    engine.step(writer)
    slot = engine.residents[keys[SHORTEN]]
    for task in (CARDS, MOOD, CARDS, MOOD):
        engine.classify([Work(keys[task], engine.prompt(keys[task], "a card"))])
        assert engine.residents[keys[SHORTEN]] == slot
    engine.step(writer, left=writer.alive)
    for task in (CARDS, MOOD):
        engine.classify([Work(keys[task], engine.prompt(keys[task], "a card"))])
    assert keys[SHORTEN] not in engine.residents


def test_rows_that_leave_change_no_other(bound):
    engine, keys = bound("seq2seq", 4)
    works = works_of(engine, keys)
    expected = tokens_of(written(engine, works))
    rng = random.Random(0)
    texts = {}
    for writer, indices in engine.writers(works):
        gone = rng.sample(range(len(indices)), len(indices) // 2)
        while writer.alive:
            progress = engine.step(writer, left=gone if writer.has_begun else ())
            texts |= {indices[row]: text for row, text in progress.texts.items()}
    assert 0 < len(texts) < len(works)
    for index, text in texts.items():
        assert [token.id for token in text.tokens] == expected[index]


def go_bad(engine, key):
    engine._slots.flat_SP[engine.residents[key]].fill_(math.nan)


FAILURES = {
    AdapterError: (go_bad, "shorten@1 gives its tokens scores that are no numbers"),
    UnknownTaskError: (Engine.unbind, "shorten@1 is not bound here"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_an_adapter_that_fails_ends_its_own_texts_alone(bound, kind):
    spoil, message = FAILURES[kind]
    engine, keys = bound("seq2seq", 3)
    works = works_of(engine, keys)
    expected = tokens_of(written(engine, works))
    errors, texts = {}, {}
    is_spoilt = False
    for writer, indices in engine.writers(works):
        while writer.alive:
            progress = engine.step(writer)
            errors |= {indices[row]: error for row, error in progress.errors.items()}
            texts |= {indices[row]: text for row, text in progress.texts.items()}
            if not is_spoilt:
                assert len(writer.keys) == 2
                spoil(engine, keys[SHORTEN])
                is_spoilt = True
    assert errors
    for index, error in errors.items():
        assert isinstance(error, kind)
        assert message in str(error)
        assert works[index].key == keys[SHORTEN]
    for index, work in enumerate(works):
        if work.key != keys[SHORTEN]:
            assert [token.id for token in texts[index].tokens] == expected[index]


def test_alternatives_are_the_most_likely_tokens_and_the_first_is_the_one_taken(bound):
    engine, keys = bound("causal", 1)
    (work, *_) = works_of(engine, keys)
    (text,) = written(engine, [replace(work, num_alternatives=3)])
    for token in text.tokens:
        (first, *rest) = token.alternatives
        assert first == (token.id, pytest.approx(token.logprob))
        assert len(rest) == 2
        assert first[1] >= rest[0][1] >= rest[1][1]
        assert sum(math.exp(logprob) for _, logprob in token.alternatives) <= 1 + 1e-6


# Reading


WORDS = ("Grüße, Zoë!", "日本語の文", "a😀b 👩‍👩‍👧 c", "é", "x\u3000y", "  two  spaces ", "")


def pieces_of(base, ids):
    reader = Reader(base)
    return [reader.read(token_id, is_last=number == len(ids)) for number, token_id in enumerate(ids, start=1)]


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "bart"])
@pytest.mark.parametrize("text", WORDS)
def test_pieces_never_split_a_character_and_make_the_text(fresh_base, kind, text):
    base = fresh_base(kind)
    ids = [*base.tokenizer(text, add_special_tokens=False)["input_ids"], base.tokenizer.eos_token_id]
    pieces = pieces_of(base, ids)
    assert "".join(pieces) == answer_text(base, ids)
    if kind != "seq2seq":  # whose tokenizer has no token for most of these
        assert "".join(pieces) == text.strip()
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "bart"])
def test_pieces_of_any_tokens_make_what_is_read_at_once(fresh_base, kind):
    base = fresh_base(kind)
    rng = random.Random(kind)
    for length in [*range(1, 12), 60]:
        for _ in range(30):
            ids = [rng.randrange(len(base.tokenizer)) for _ in range(length)]
            assert "".join(pieces_of(base, ids)) == answer_text(base, ids)


def test_a_token_is_spelled_as_it_reads_in_its_place(fresh_base):
    base = fresh_base("causal")
    reader = Reader(base)
    ids = base.tokenizer("my card is lost", add_special_tokens=False)["input_ids"]
    spelled = []
    for token_id in ids:
        spelled.append(reader.spell(token_id))
        reader.read(token_id, is_last=False)
    assert "".join(spelled).strip() == "my card is lost"
    assert reader.spell(base.tokenizer.eos_token_id) == base.tokenizer.eos_token
