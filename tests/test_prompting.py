"""What the base answers without training: scored, calibrated, reasoned and written; no gate example is shown."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_bench import LABELS, SIZES, bench_of

from multilora.errors import AdapterError
from multilora.generate import answer_text
from multilora.prompt import PromptFormat
from orchestrator.base_alone import BaseAlone
from orchestrator.demonstrations import REASON_CUE, PromptParts, balanced_examples, random_examples
from orchestrator.methods import summarise
from orchestrator.prompting import (
    CONTENT_FREE,
    NUM_SHOWN,
    REASON_TOKENS,
    Gate,
    Prompter,
    content_free_log_prior,
    label_of,
    prompt_limit,
    prompting_rows,
)
from orchestrator.prototypes import prototypes_of
from serve.engine import Engine

GENERATIVE = ("seq2seq", "causal")
TOLERANCE = 1e-3


class Recorder(BaseAlone):
    """The base alone, which remembers the prompts that it was given."""

    def __init__(self, base):
        super().__init__(base)
        self.read = []

    def scores(self, prompts, labels):
        self.read += prompts
        return super().scores(prompts, labels)

    def write(self, prompts, max_new_tokens):
        self.read += prompts
        return super().write(prompts, max_new_tokens)

    def texts(self):
        """What was read, as text."""
        return [self.base.tokenizer.decode(prompt.token_ids, skip_special_tokens=True) for prompt in self.read]


@pytest.fixture(scope="module")
def bench(tmp_path_factory, fresh_base):
    return bench_of(fresh_base("seq2seq").spec, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def rows_of(fresh_base, bench):
    """All rows of a family, made once."""
    made = {}

    def rows(family):
        if family not in made:
            made[family] = list(prompting_rows(bench, fresh_base(family)))
        return made[family]

    return rows


# Every row


@pytest.mark.parametrize("family", GENERATIVE)
def test_a_generative_base_is_asked_in_every_way(rows_of, bench, family):
    shown = [
        name
        for num, examples in zip(NUM_SHOWN, ("1 example", "4 examples", "8 examples", "16 examples"), strict=True)
        for choice in ("random", "balanced")
        for name in (f"{examples}, {choice}", f"{examples}, {choice}, calibrated")
    ]
    rows = rows_of(family)
    summaries = summarise(rows, bench.gold)
    assert [summary.method for summary in summaries] == [
        "zero-shot", "zero-shot, calibrated", "zero-shot, generated", "chain of thought", *shown,
        "4 examples, balanced, generated",
        *(f"{n} example{'s' * (n > 1)}, nearest {how}" for how in ("by TF-IDF", "by the base's states") for n in NUM_SHOWN),
    ]  # fmt: skip
    assert {s.method: s.num_seeds for s in summaries if s.method in shown} == dict.fromkeys(shown, len(bench.seeds))
    assert all(row.part == "prompting" and not row.skipped and row.ms_per_text > 0 for row in rows)
    assert all(len(row.answers) == SIZES["gate"] for row in rows)
    of_labels = [row for row in rows if "generated" not in row.method]
    assert all(set(row.answers) <= set(LABELS) for row in of_labels)
    assert all(row.num_trained == 0 for row in rows)
    # A prompt keeps what it shows; one that chooses for every text keeps all there is.
    by_method = {row.method: row for row in rows}
    assert by_method["8 examples, random"].num_train == 8
    assert by_method["8 examples, nearest by TF-IDF"].num_train == SIZES["train"]
    assert 0 < by_method["1 example, random"].disk_bytes < by_method["16 examples, random"].disk_bytes
    assert by_method["16 examples, random"].note == "16.0 examples fit on average"
    assert by_method["zero-shot"].disk_bytes == 0


def test_an_encoder_has_wordings_and_prototypes_and_says_what_it_has_not(rows_of, bench):
    rows = rows_of("encoder")
    wordings = [f"zero-shot, {wording}" for wording in ("label name", "meaning", "name: meaning")]
    asked = [row for row in rows if not row.skipped]
    assert list(dict.fromkeys(row.method for row in asked)) == [
        *(name + end for name in wordings for end in ("", ", calibrated")),
        *(f"prototypes, {num} per label" for num in (1, 4, 8)),
    ]
    assert [(row.method, row.num_train) for row in rows if row.skipped] == [
        ("prototypes, 16 per label", 24), ("prototypes, 16 per label", 24),
        ("1 example, any choice", 1), ("4 examples, any choice", 4),
        ("8 examples, any choice", 8), ("16 examples, any choice", 16),
        ("chain of thought", 0), ("zero-shot, generated", 0), ("4 examples, balanced, generated", 0),
    ]  # fmt: skip
    reasons = {row.skipped for row in rows if row.skipped}
    assert reasons == {
        "no label has 16 training examples",
        "an encoder writes no text and reads no examples beside its input; `prototypes` are what examples are to it",
    }
    assert all(set(row.answers) <= set(LABELS) and len(row.answers) == SIZES["gate"] for row in asked)
    first, *_, last = [row for row in asked if row.method.startswith("prototypes")]
    assert (first.num_train, last.num_train) == (3, 24)
    assert first.disk_bytes == 3 * 64 * 4
    assert "what examples in the prompt are" in first.note


def test_zero_shot_is_what_the_engine_answers(rows_of, bench, family, fresh_base):
    engine = Engine(fresh_base(family), 1, 1)
    answers = engine.classify_zero_shot(PromptFormat.of(bench.spec, family), [e.columns for e in bench.dataset.gate])
    name = "zero-shot, name: meaning" if family == "encoder" else "zero-shot"
    (row,) = [row for row in rows_of(family) if row.method == name]
    assert row.answers == tuple(answer.label for answer in answers)


def test_the_seed_decides_again(rows_of, bench, family, fresh_base):
    again = list(prompting_rows(replace(bench, seeds=(1,)), fresh_base(family)))
    of_first = {(row.method, row.seed): row.answers for row in rows_of(family)}
    assert all(of_first[row.method, row.seed] == row.answers for row in again)
    pairs = [(of_first[method, 0], of_first[method, 1]) for method, seed in of_first if seed == 1 and of_first[method, 1]]
    assert any(first != second for first, second in pairs)


def test_without_meanings_there_is_one_wording(fresh_base, tmp_path):
    base = fresh_base("encoder")
    bench = replace(bench_of(base.spec, tmp_path, labels=dict.fromkeys(LABELS)), seeds=(0,))
    skipped = {row.method: row.skipped for row in prompting_rows(bench, base) if row.method.startswith("zero-shot, ")}
    assert skipped["zero-shot, label name"] == skipped["zero-shot, label name, calibrated"] == ""
    assert skipped["zero-shot, meaning"] == skipped["zero-shot, name: meaning"] == "no label has a meaning"


# The prompts


@pytest.mark.parametrize("family", GENERATIVE)
def test_no_gate_or_select_example_is_ever_shown(bench, family, fresh_base):
    alone = Recorder(fresh_base(family))
    prompter = Prompter(Gate(bench, alone))
    alone.read.clear()
    tokenizer = alone.base.tokenizer
    train = bench.dataset.train
    prompter.shown(8, "balanced", balanced_examples(train, 8, 0), 0)
    prompter.shown_generated(balanced_examples(train, 4, 0), 0)
    list(prompter.nearest("by states", prompter.state_likeness))
    num_asked = 0
    for text in alone.texts():
        # Tokenizers change case and spaces, so texts are compared as they come back.
        held_out = [example for example in (*bench.dataset.gate, *bench.dataset.select) if _back(tokenizer, example.text) in text]
        assert len(held_out) <= 1  # the text that is asked; none where the input says nothing
        assert not held_out or text.rstrip().endswith("Answer:")
        num_asked += len(held_out)
        assert sum(_back(tokenizer, f"- {label}") in text for label in LABELS) == 3
        assert text.count(_back(tokenizer, "the card is gone")) == 1
        assert text.count("Answer: ") in (1, 4, 8, 16)
    assert num_asked == (1 + 1 + len(NUM_SHOWN)) * SIZES["gate"]


def _back(tokenizer, text):
    return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", GENERATIVE)
def test_scores_after_demonstrations_equal_a_plain_forward(bench, family, fresh_base):
    base, plain = fresh_base(family), fresh_base(family)
    alone = Recorder(base)
    prompter = Prompter(Gate(bench, alone))
    alone.read.clear()
    (row, _) = prompter.shown(4, "random", random_examples(bench.dataset.train, 4, 0), 0)
    prompts = alone.read[: SIZES["gate"]]
    labels = alone.label_set(PromptFormat.of(bench.spec, family))
    scores_BL = alone.scores(prompts, labels)
    expected_BL = np.array([[_plain_score(plain, prompt.token_ids, label) for label in LABELS] for prompt in prompts])
    assert np.abs(scores_BL - expected_BL).max() <= TOLERANCE * np.abs(expected_BL).max()
    assert row.answers == tuple(list(LABELS)[index] for index in expected_BL.argmax(1))
    parts, shown = PromptParts.of(bench.spec.instruction), random_examples(bench.dataset.train, 4, 0)
    instruction = parts.with_demonstrations([bench.dataset.train[index] for index in shown])
    text = replace(PromptFormat.of(bench.spec, family), instruction=instruction).render(bench.dataset.gate[0].columns)
    assert list(prompts[0].token_ids) == plain.tokenizer(text)["input_ids"]


@torch.no_grad()
def _plain_score(base, prompt_ids, label):
    space = " " if base.family == "causal" else ""
    answer = [*base.tokenizer(space + label, add_special_tokens=False)["input_ids"], base.tokenizer.eos_token_id]
    if base.family == "seq2seq":
        inputs = {"input_ids": torch.tensor([prompt_ids]), "decoder_input_ids": torch.tensor([[0, *answer[:-1]]])}
        logits_TV = base.model(**inputs, use_cache=False).logits[0]
    else:
        logits_TV = base.model(input_ids=torch.tensor([[*prompt_ids, *answer]]), use_cache=False).logits[0]
        logits_TV = logits_TV[len(prompt_ids) - 1 : -1]
    return logits_TV.log_softmax(-1)[range(len(answer)), answer].sum().item()


@pytest.mark.parametrize(("kind", "too_many"), [("gpt2", (8, 16)), ("bart", (16,))])
def test_prompts_fit_a_base_of_few_positions(kind, too_many, fresh_base, tmp_path):
    base = fresh_base(kind)
    alone = Recorder(base)
    bench = bench_of(base.spec, tmp_path)
    prompter = Prompter(Gate(bench, alone))
    num_after = REASON_TOKENS if kind == "gpt2" else 0
    limit = prompt_limit(base, REASON_TOKENS)
    assert limit == 300 - num_after
    rows = [*prompter.chain_of_thought()]
    for num in NUM_SHOWN:
        rows += prompter.shown(num, "random", random_examples(bench.dataset.train, num, 0), 0)
    assert max(len(prompt.token_ids) for prompt in alone.read) <= limit
    skipped = [row for row in rows if row.skipped]
    assert [row.method for row in skipped] == [f"{num} examples, random{end}" for num in too_many for end in ("", ", calibrated")]
    assert skipped[-1].skipped.startswith(f"16 examples fit beside no text into {limit} tokens, ")
    assert all(len(row.answers) == SIZES["gate"] for row in rows if not row.skipped)


def test_how_many_fit_and_how_many_texts_are_cut_is_noted(fresh_base, tmp_path):
    base = fresh_base("gpt2")
    bench = bench_of(base.spec, tmp_path)
    long = replace(bench.dataset.gate[0], columns={"text": "where is my new card " * 40})
    bench = replace(bench, dataset=replace(bench.dataset, gate=(long, *bench.dataset.gate[1:])))
    prompter = Prompter(Gate(bench, BaseAlone(base)))
    row, _ = prompter.shown(4, "random", random_examples(bench.dataset.train, 4, 0), 0)
    assert row.note == f"{4 * 17 / 18:.1f} examples fit on average; 1 of 18 texts are cut off"


@pytest.mark.parametrize("family", GENERATIVE)
def test_too_few_training_examples(family, fresh_base, tmp_path):
    base = fresh_base(family)
    bench = replace(bench_of(base.spec, tmp_path, sizes={"train": 6, "select": 3, "gate": 3}), seeds=(0,))
    skipped = {row.method: row.skipped for row in prompting_rows(bench, base) if row.skipped}
    assert set(skipped.values()) == {"the train split has 6 examples"}
    assert "8 examples, random, calibrated" in skipped
    assert "4 examples, random" not in skipped


@pytest.mark.parametrize("family", GENERATIVE)
def test_an_instruction_that_does_not_fit_is_a_reason_and_not_the_end(family, fresh_base, tmp_path):
    base = fresh_base(family)
    bench = replace(bench_of(base.spec, tmp_path, max_length=8), seeds=(0,))
    rows = {row.method: row for row in prompting_rows(bench, base)}
    for method in ("zero-shot", "zero-shot, calibrated", "zero-shot, generated"):
        assert "the instruction and labels alone take" in rows[method].skipped
    assert not rows["4 examples, random"].skipped


def test_labels_that_the_base_cannot_tell_apart_are_refused(fresh_base, tmp_path):
    base = fresh_base("seq2seq")
    bench = bench_of(base.spec, tmp_path, labels={"日": None, "本": None})
    with pytest.raises(AdapterError, match="are the same tokens to base"):
        list(prompting_rows(bench, base))


# Calibration


def test_calibration_worked_by_hand():
    # Two inputs that say nothing, with probabilities (.9, .1) and (.5, .5): mean (.7, .3).
    constants_C1 = np.array([[3.0], [-2.0]])  # scores are no probabilities
    scores_CL = np.log([[0.9, 0.1], [0.5, 0.5]]) + constants_C1
    assert np.exp(content_free_log_prior(scores_CL)) == pytest.approx([0.7, 0.3])
    # (.6, .4) becomes (.857, 1.333): the other label.
    calibrated_L = np.log([0.6, 0.4]) - content_free_log_prior(scores_CL)
    assert np.exp(calibrated_L) == pytest.approx([0.6 / 0.7, 0.4 / 0.3])
    assert calibrated_L.argmax() == 1


def test_calibrated_answers_divide_by_what_inputs_that_say_nothing_get(rows_of, bench, family, fresh_base):
    engine, format_ = Engine(fresh_base(family), 1, 1), PromptFormat.of(bench.spec, family)
    empty = engine.classify_zero_shot(format_, [{"text": text} for text in CONTENT_FREE])
    prior_L = np.mean([answer.probabilities for answer in empty], axis=0)
    answers = engine.classify_zero_shot(format_, [example.columns for example in bench.dataset.gate])
    expected = tuple(list(LABELS)[np.argmax(np.array(answer.probabilities) / prior_L)] for answer in answers)
    name = "zero-shot, name: meaning, calibrated" if family == "encoder" else "zero-shot, calibrated"
    by_method = {row.method: row for row in rows_of(family)}
    assert by_method[name].answers == expected
    assert by_method[name].train_s > 0
    plain = by_method[name.removesuffix(", calibrated")]
    assert (plain.train_s, plain.ms_per_text) == (0.0, by_method[name].ms_per_text)


# Reasons and generated answers


@pytest.mark.parametrize("family", GENERATIVE)
def test_labels_are_scored_after_the_reason_that_the_base_writes(rows_of, bench, family, fresh_base):
    alone = Recorder(fresh_base(family))
    prompter = Prompter(Gate(bench, alone))
    alone.read.clear()
    (row,) = prompter.chain_of_thought()
    num = SIZES["gate"]
    asked, answered = alone.read[:num], alone.read[num:]
    reasons = alone.write(asked, REASON_TOKENS)
    plain = fresh_base(family)
    example, tokenizer = bench.dataset.gate[0], plain.tokenizer
    ids = torch.tensor([asked[0].token_ids])
    written = plain.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=REASON_TOKENS,
        pad_token_id=plain.pad_id,
    )  # fmt: skip
    assert answer_text(plain, written[0, 1 if family == "seq2seq" else ids.shape[1] :].tolist()) == reasons[0]
    head = PromptFormat.of(bench.spec, family).render(example.columns).removesuffix("Answer:")
    assert list(asked[0].token_ids) == tokenizer(head + REASON_CUE)["input_ids"]
    text = f"{head}{REASON_CUE} {' '.join(reasons[0].split())}".rstrip() + "\nAnswer:"
    assert list(answered[0].token_ids) == tokenizer(text)["input_ids"]
    scores_BL = alone.scores(answered, alone.label_set(PromptFormat.of(bench.spec, family)))
    assert row.answers == tuple(list(LABELS)[index] for index in scores_BL.argmax(1))
    assert row.note == "a reason of at most 64 tokens is written first"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("card lost", "card lost"), (" Card Lost. ", "card lost"), ("'C++'", None), ("c++", "C++"), ("C", "c"), ("(c)", None),
        ("card  lost", None), ("card lost or not", None), ("", None), ("...", None), ("?", "?"), ("!", None),
    ],
)  # fmt: skip
def test_what_counts_as_a_label(text, label):
    assert label_of(text, ("card lost", "C++", "c", "?")) == label


class Writer(BaseAlone):
    """A base whose written answers are known."""

    def write(self, prompts, max_new_tokens):
        assert max_new_tokens >= 8
        known = ["Card lost.", "card lost\n\nMessage: next", "no idea", "", "office"]
        return [known[index % len(known)] for index in range(len(prompts))]


def test_the_share_of_generated_answers_that_are_no_label(fresh_base, tmp_path):
    base = fresh_base("causal")
    bench = bench_of(base.spec, tmp_path, sizes={"train": 12, "select": 3, "gate": 10})
    prompter = Prompter(Gate(bench, Writer(base)))
    rows = [prompter.zero_shot()[2], *prompter.shown_generated(balanced_examples(bench.dataset.train, 4, 0), 0)]
    for row in rows:
        assert row.answers == ("card lost", "card lost", None, None, "office") * 2
        (summary,) = summarise([row], bench.gold)
        assert (summary.ill_formed, row.num_ill_formed) == (0.4, 4)
        assert summary.accuracy == sum(a == b for a, b in zip(row.answers, bench.gold, strict=True)) / 10


# Prototypes


def test_a_prototype_is_the_mean_of_label_and_examples_by_hand():
    labels_LH = np.array([[1.0, 0.0], [0.0, 1.0]])
    found_LH = prototypes_of(labels_LH, [np.array([[0.0, 1.0]]), np.empty((0, 2))])
    assert found_LH.ravel().tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0.0, 1.0])


def test_prototypes_learn_the_words_of_their_labels(rows_of, bench):
    rows = [row for row in rows_of("encoder") if row.method == "prototypes, 8 per label"]
    assert min(row.accuracy(bench.gold) for row in rows) > 0.5
    # Eight are all there are: the seed has nothing to choose.
    assert rows[0].answers == rows[1].answers
