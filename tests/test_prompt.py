"""Law 5: a prompt that is too long loses the end of its longest input, never the instruction or the labels."""

import random

import pytest

from multilora.errors import DataError, RequestError
from multilora.prompt import PromptFormat, encode_prompt, label_wordings
from multilora.spec import TaskSpec

LABELS = (("spam", "unwanted advertising"), ("ham", ""), ("not sure", "neither"))
ONE_COLUMN = "Is this spam?\n{labels}\nMessage: {text}\nAnswer:"
TWICE = "Read {text} and again {text}\nOptions:\n{labels}"
COLUMNS = "Title: {title}\nBody: {body}\nOptions:\n{labels}\nFrom {sender}. Answer:"
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz      ",
    "aé ñ…½ﬁ日本語 한국 \u0301\u200d😀👍🏽 \t\n ",
    "{}%<>&\"'\\_-/ {labels} ▁ </s> [SEP] ",
]


@pytest.fixture(scope="module", params=["seq2seq", "encoder", "causal", "qwen2", "roberta"])
def tokenizer(request, fresh_base):
    """The tokenizer of each kind of base."""
    return fresh_base(request.param).tokenizer


def prompt_format(instruction, max_length_tokens=64, family="seq2seq", text_column="text"):
    return PromptFormat(family, instruction, text_column, LABELS, max_length_tokens)


def random_text(rng, longest=400):
    alphabet = rng.choice(ALPHABETS)
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(0, longest)))


def ids_of(tokenizer, text):
    return tuple(tokenizer(text)["input_ids"])


def ids_of_prefixes(tokenizer, format_, columns, name):
    """Token ids of the prompt for every beginning of one column, one batch call because there are hundreds."""
    texts = [format_.render({**columns, name: columns[name][:end]}) for end in range(len(columns[name]) + 1)]
    return {tuple(ids) for ids in tokenizer(texts)["input_ids"]}


# Rendering


def test_prompt_shows_instruction_columns_and_wordings():
    rendered = prompt_format(ONE_COLUMN).render({"text": "win {money} {labels}"})
    assert rendered == (
        "Is this spam?\n- spam: unwanted advertising\n- ham\n- not sure: neither\nMessage: win {money} {labels}\nAnswer:"
    )


def test_every_wording_has_a_format_of_its_own():
    values = {"name": "a", "base": {"model": "b"}, "data": {"train": "c.csv"}, "labels": {"x": None, "y": "why"}}
    spec = TaskSpec.model_validate({**values, "instruction": "{labels} {text}", "instructions": ["{text}?", "{text}"]})
    first, *others = PromptFormat.all_of(spec, "causal")
    assert first == PromptFormat.of(spec, "causal")
    assert [each.render({"text": "hm"}) for each in (first, *others)] == ["- x\n- y: why hm", "hm?", "hm"]
    assert {each.labels for each in others} == {first.labels}


def test_encoder_reads_the_columns_alone_in_instruction_order():
    columns = {"body": "B", "sender": "S", "title": "T"}
    assert prompt_format(COLUMNS, family="encoder").render(columns) == "T\nB\nS"


def test_wording_is_the_label_and_its_meaning():
    assert label_wordings(LABELS) == ["spam: unwanted advertising", "ham", "not sure: neither"]


def test_format_is_taken_from_the_spec():
    spec = TaskSpec.model_validate(
        {"name": "t", "base": {"model": "m"}, "data": {"train": "t.jsonl", "text": "body"}, "instruction": COLUMNS,
         "labels": {"b": "first", "a": None}, "train": {"max_length": 99}}
    )  # fmt: skip
    taken = PromptFormat.of(spec, "causal")
    assert taken == PromptFormat("causal", COLUMNS, "body", (("b", "first"), ("a", "")), 99)
    assert taken.columns == ("title", "body", "sender")


# Request items


def test_string_fills_the_text_column_and_mapping_names_every_column():
    assert prompt_format(ONE_COLUMN).columns_of("hello") == {"text": "hello"}
    columns = {"title": "a", "body": "b", "sender": "c"}
    assert prompt_format(COLUMNS, text_column="body").columns_of(columns) == columns


@pytest.mark.parametrize(
    ("item", "seen"),
    [("hello", "body"), ({}, "none"), ({"title": "a", "body": "b"}, "body, title"),
     ({"title": "a", "body": "b", "sender": "c", "label": "d"}, "body, label, sender, title")],
)  # fmt: skip
def test_wrong_columns_are_refused_with_the_right_ones(item, seen):
    with pytest.raises(RequestError, match=f"input must give the columns title, body, sender; it gives {seen}$"):
        prompt_format(COLUMNS, text_column="body").columns_of(item)


# Truncation


def test_prompt_that_fits_is_left_alone(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        columns = {"text": random_text(rng)}
        whole = ids_of(tokenizer, prompt_format(ONE_COLUMN).render(columns))
        prompt = encode_prompt(prompt_format(ONE_COLUMN, len(whole)), columns, tokenizer)
        assert (prompt.token_ids, prompt.is_truncated) == (whole, False)


@pytest.mark.parametrize("instruction", [ONE_COLUMN, TWICE])
def test_long_input_loses_its_end_and_nothing_else(tokenizer, instruction):
    rng = random.Random(1)
    num_truncated = 0
    for _ in range(10):
        text = random_text(rng, 300)
        format_ = prompt_format(instruction, rng.randint(70, 130))
        columns = {"text": text}
        prompt = encode_prompt(format_, columns, tokenizer)
        assert len(prompt.token_ids) <= format_.max_length_tokens
        assert columns == {"text": text}, "the caller's input is not changed"
        # Token for token the rendered prompt of some beginning of the text, however the tokenizer merges at the cut.
        prefixes = ids_of_prefixes(tokenizer, format_, columns, "text")
        assert prompt.token_ids in prefixes
        if prompt.is_truncated:
            num_truncated += 1
            # It may cut a few tokens more than it must: merges at the cut, characters of several tokens.
            assert len(prompt.token_ids) >= max(len(ids) for ids in prefixes if len(ids) <= format_.max_length_tokens) - 12
    assert num_truncated > 4


def test_only_the_longest_column_is_cut(tokenizer):
    rng = random.Random(2)
    for _ in range(3):
        long, short = rng.sample(["title", "body", "sender"], 2)
        columns = dict.fromkeys(["title", "body", "sender"], "six small words are in here")
        columns[long] = random_text(rng, 50) + "word " * 100
        columns[short] = "short"
        format_ = prompt_format(COLUMNS, 140)
        prompt = encode_prompt(format_, columns, tokenizer)
        assert prompt.is_truncated
        assert prompt.token_ids in ids_of_prefixes(tokenizer, format_, columns, long)


def test_several_long_columns_share_the_cut_and_the_frame_stays(tokenizer):
    # Words that no tokenizer here changes, so that the prompt can be read back but for spaces and capitals.
    rng = random.Random(3)
    for _ in range(30):
        columns = {name: " ".join([name] * rng.randint(0, 120)) for name in ("title", "body", "sender")}
        format_ = prompt_format(COLUMNS, rng.randint(110, 160))
        prompt = encode_prompt(format_, columns, tokenizer)
        assert len(prompt.token_ids) <= format_.max_length_tokens
        seen = "".join(tokenizer.decode(prompt.token_ids, skip_special_tokens=True).lower().split())
        head, middle, tail = "title:", "body:", "options:-spam:unwantedadvertising-ham-notsure:neitherfrom"
        assert seen.startswith(head)
        assert seen.endswith(".answer:")
        title, rest = seen.removeprefix(head).split(middle)
        body, rest = rest.split(tail)
        sender = rest.removesuffix(".answer:")
        for name, kept in {"title": title, "body": body, "sender": sender}.items():
            assert "".join(columns[name].split()).startswith(kept)


def test_encoder_prompt_is_cut_too(fresh_base):
    tokenizer = fresh_base("encoder").tokenizer
    prompt = encode_prompt(
        prompt_format(COLUMNS, 16, family="encoder"), {"title": "a", "body": "b " * 99, "sender": "c"}, tokenizer
    )
    assert prompt.is_truncated
    assert tokenizer.decode(prompt.token_ids) == f"[CLS] a{' b' * 12} c [SEP]"


@pytest.mark.parametrize("text", ["", "word " * 50, " \n "])
def test_prompt_that_cannot_fit_is_refused(tokenizer, text):
    needed = len(ids_of(tokenizer, prompt_format(ONE_COLUMN).render({"text": ""})))
    with pytest.raises(DataError, match=f"the instruction and labels alone take {needed} tokens, more than train.max_length 8"):
        encode_prompt(prompt_format(ONE_COLUMN, 8), {"text": text}, tokenizer)


def test_empty_input_fits_exactly(tokenizer):
    needed = len(ids_of(tokenizer, prompt_format(ONE_COLUMN).render({"text": ""})))
    prompt = encode_prompt(prompt_format(ONE_COLUMN, needed), {"text": "long " * 50}, tokenizer)
    assert len(prompt.token_ids) <= needed
    assert prompt.is_truncated
