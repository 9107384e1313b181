"""The instruction mixture: rows of the instruction files and tasks made from plain text, worded anew each time they are drawn.

Every example goes through this project's own `PromptFormat`, so the base learns the very prompts that it will be given.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bases.teacher import Matches
from bases.wordings import (
    ANY_QUESTIONS,
    BARE_FRAMES,
    BLAME,
    CUES,
    FIELDS,
    FRAMES,
    NEGATIONS,
    OPINIONS,
    OTHER_FIELDS,
    PRAISE,
    QUESTIONS,
    STYLES,
    SYNONYMS,
)
from multilora.prompt import PromptFormat

Label = tuple[str, str]
"""A label and its meaning, which may be empty."""

UNSEEN = ("comparative_type", "factbook_section", "jnlpba_entity_type", "multidogo_media", "sgd_intent_hotels")
"""Tasks that are never trained on: their held-out rows watch how well new tasks go."""
FAMILY_WEIGHTS = {"super-ni": 0.4, "grammar": 0.1, "bbh": 0.1, "reading": 0.3, "exam": 0.05, "commonsense": 0.5, "nli": 1.5,
                  "dialogue": 1.5, "intent": 2.0, "lexical": 1.0, "sentiment": 4.0, "linguistic": 1.0, "topic": 2.0,
                  "science": 1.0, "discourse": 0.5}  # fmt: skip
"""How often a family's tasks are drawn, times the square root of their rows: grammar and puzzles have many tasks."""
LABELLING = ("intent", "dialogue", "topic", "sentiment", "science", "discourse")
OPEN_ENDED_WEIGHT = 0.25
MAX_QUESTION_CHARACTERS = 240
MAX_ANSWER_CHARACTERS = 160
SHARE_OF_KIND = {"rows": 0.3, "gloss": 0.08, "blank": 0.04, "opinion": 0.08, "match": 0.5}
SHARE_WITHOUT_LABELS, SHARE_OF_MATCHES_WITHOUT_LABELS = 0.15, 0.4
"""Without a list the base learns which words a text calls for: prompts are short, and what it knows of texts is enough."""
SHARE_RENAMED, SHARE_MEANT, SHARE_SYNONYMS, SHARE_RESTYLED = 0.15, 0.15, 0.5, 0.2
MAX_LABELS = 20
NUM_COMMON, NUM_WORDS, NUM_KNOWN = 150, 6000, 15_000
"""Words by frequency: the commonest say little; the next ones fill blanks; glosses are of known ones."""
GLOSS = re.compile(r"^(?P<words>[^()]+?) \((?P<part>noun|verb|adjective|adverb)\): (?P<meaning>.+)$")
OPINIONATED = ("movie_reviews", "pros_cons", "reddit_goemotions_rest", "dialogue_self")
"""Corpus files whose sentences often praise or blame something."""
WORD = re.compile(r"\b[a-z]{4,}\b")
NAMED_START = re.compile(r"^[A-Za-z][\w ]{0,20}:")
ENUMERATED = re.compile(r"^\(?[A-Za-z0-9]\)?$")


@dataclass(frozen=True)
class Drawn:
    """One example as it was worded: an instruction with {text} and perhaps {labels}, and what belongs into it."""

    instruction: str
    text: str
    labels: tuple[Label, ...]
    answer: str
    wrong: tuple[str, ...] = ()
    """Options that are not the answer, also where the prompt does not list them."""

    def prompt_format(self, max_length_tokens: int) -> PromptFormat:
        """Return the format that a task with this instruction and these labels would have."""
        return PromptFormat("seq2seq", self.instruction, "text", self.labels, max_length_tokens)


@dataclass(frozen=True)
class Task:
    """One task of the instruction files."""

    name: str
    family: str
    questions: tuple[str, ...]
    kind: str
    """closed (all rows have the same options), choice (each row has its own) or open-ended."""
    weight: float


@dataclass(frozen=True)
class Gloss:
    """One meaning of the WordNet file."""

    words: tuple[str, ...]
    part: str
    meaning: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Mixture:
    """Everything that examples are drawn from."""

    tasks: Sequence[Task]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    glosses: Sequence[Gloss]
    sentences: Sequence[str]
    praises: Sequence[str]
    """Sentences with words of praise and none of blame: labels by rule, with errors."""
    blames: Sequence[str]
    words: Sequence[str]
    """Frequent words with content, which fill blanks and name labels."""
    matches: Matches = field(default_factory=Matches)
    """Sentences and the phrases that fit them; without any, the other kinds share their part."""

    def draw(self, rng: random.Random) -> Drawn:
        """Draw and word one example."""
        kind = _weighted(rng, tuple(share for share in SHARE_OF_KIND.items() if share[0] != "match" or self.matches.rows))
        if kind == "match":
            return draw_match(self.matches, self.words, rng)
        if kind == "gloss":
            return draw_gloss(self.glosses, self.words, rng)
        if kind == "blank":
            return draw_blank(self.sentences, rng)
        if kind == "opinion":
            return draw_opinion(self.praises, self.blames, self.words, rng)
        task = rng.choices(self.tasks, [task.weight for task in self.tasks])[0]
        return word_row(task, rng.choice(rng.choice(self.rows_by_answer[task.name])), self.words, rng)

    @cached_property
    def rows_by_answer(self) -> Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]:
        """Rows in groups that are drawn equally often: each answer of a closed task, so that none is likelier than another."""
        groups: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for task in self.tasks:
            for row in self.rows[task.name]:
                groups[task.name][row["output"] if task.kind == "closed" else ""].append(row)
        return {name: list(found.values()) for name, found in groups.items()}


def draw_gloss(glosses: Sequence[Gloss], words: Sequence[str], rng: random.Random) -> Drawn:
    """Ask for the word of a definition, a synonym, the word that an example lacks, or the meaning of a word."""
    gold = rng.choice(glosses)
    others = [rng.choice(glosses) for _ in range(rng.randint(1, 7))]
    names = {gloss.words[0]: gloss for gloss in others if not set(gloss.words) & set(gold.words)} | {gold.words[0]: gold}
    word, form = gold.words[0], rng.random()
    few = list(names)[-4:]
    if form < 0.2 and len(gold.words) > 1:
        return _worded(rng, "synonym", gold.words[1], [(name, "") for name in names], word)
    if form < 0.4 and gold.examples:
        blanked = re.sub(rf"\b{re.escape(word)}\w*", "___", rng.choice(gold.examples), flags=re.IGNORECASE)
        if "___" in blanked:
            labels = [(name, names[name].meaning) for name in few] if form < 0.3 else [(name, "") for name in names]
            return _worded(rng, "blank", blanked, labels, word)
    if form < 0.65:  # the label says nothing, only its meaning does
        tags = _names_without_meaning(rng, len(few), words)
        text = word if not gold.examples else f"{word} ({rng.choice(gold.examples)})"
        labels = [(tag, names[name].meaning) for tag, name in zip(tags, few, strict=True)]
        return _worded(rng, "meaning", text, labels, tags[-1])
    return _worded(rng, "definition", gold.meaning, [(name, "") for name in names], word)


def draw_blank(sentences: Sequence[str], rng: random.Random) -> Drawn:
    """Blank one word of a sentence; the options are this word and words of other sentences."""
    sentence = rng.choice(sentences)
    start, end = rng.choice([match.span() for match in WORD.finditer(sentence)])
    gold = sentence[start:end]
    others = {rng.choice(WORD.findall(rng.choice(sentences))) for _ in range(rng.randint(1, 6))} - {gold}
    labels = [(word, "") for word in (*sorted(others), gold)]
    return _worded(rng, "blank", f"{sentence[:start]}___{sentence[end:]}", labels, gold)


def draw_opinion(praises: Sequence[str], blames: Sequence[str], words: Sequence[str], rng: random.Random) -> Drawn:
    """Ask whether a sentence praises or blames."""
    index = rng.randint(0, 1)
    names = rng.choice(OPINIONS)
    labels = [(name, "") for name in names]
    if rng.random() < SHARE_MEANT:
        labels = list(zip(_names_without_meaning(rng, 2, words), names, strict=True))
    return _worded(rng, "sentiment", rng.choice((praises, blames)[index]), labels, labels[index][0])


def draw_match(matches: Matches, words: Sequence[str], rng: random.Random) -> Drawn:
    """Ask which phrase fits a sentence; the others fit other sentences, or are near but worse."""
    row = rng.choice(matches.rows)
    # Phrases are wrong as often as they are right: else the base learns which ones are mostly right, whatever the text.
    others = {*rng.sample(row.near, min(len(row.near), rng.randint(0, 3))),
              *(rng.choice(rng.choice(matches.rows).fitting) for _ in range(rng.randint(1, 12)))}  # fmt: skip
    gold = matches.phrases[rng.choice(row.fitting)]
    phrases = [*(matches.phrases[place] for place in sorted(others - set(row.fitting))), gold]
    if rng.random() < SHARE_OF_MATCHES_WITHOUT_LABELS:
        labels = [(phrase, "") for phrase in dict.fromkeys(phrases)]
        return _framed(rng, BARE_FRAMES, rng.choice(QUESTIONS["match"]), "match", row.text, labels, gold)
    if rng.random() < SHARE_RENAMED:  # the label says nothing, only its meaning does
        phrases = phrases[-6:]
        tags = _names_without_meaning(rng, len(phrases), words)
        return _worded(rng, "match", row.text, list(zip(tags, phrases, strict=True)), tags[-1])
    style = rng.choice(STYLES) if rng.random() < SHARE_RESTYLED else str
    return _worded(rng, "match", row.text, [(label, "") for label in dict.fromkeys(map(style, phrases))], style(gold))


def word_row(task: Task, row: Mapping[str, Any], words: Sequence[str], rng: random.Random) -> Drawn:
    """Word one row of the instruction files."""
    text, answer, options = row["input"].strip(), row["output"].strip(), row["options"]
    question = _question(task, rng)
    if not options:
        return _framed(rng, BARE_FRAMES, question, task.family, text, (), answer)
    labels = [(option, "") for option in dict.fromkeys(options)]
    if (task.kind == "closed" or all(option in text for option in options)) and rng.random() < SHARE_WITHOUT_LABELS:
        return _framed(rng, BARE_FRAMES, question, task.family, text, labels, answer)
    if all(ENUMERATED.match(option) for option in options):  # the input says what A and B are
        rng.shuffle(labels)
        return _framed(rng, FRAMES, question, task.family, text, labels, answer)
    if len(labels) > 2 and task.family != "nli":
        others = [label for label in labels if label[0] != answer]
        most = min(len(others), MAX_LABELS - 1)
        labels = [*rng.sample(others, rng.randint(1, most)), (answer, "")]
    labels, answer = _reworded(labels, answer, question, words, rng)
    if task.family in QUESTIONS and rng.random() < 0.6:
        question = rng.choice(QUESTIONS[task.family])
    rng.shuffle(labels)
    return _framed(rng, FRAMES, question, task.family, text, labels, answer)


def plain_row(task: Task, row: Mapping[str, Any]) -> Drawn:
    """Word one row as it is judged: the task's first question, all options in their order, no surprise."""
    question = _sentence_limited(task.questions[0])
    instruction = f"{_literal(question)}\n{{labels}}\nText: {{text}}\nAnswer:"
    return Drawn(instruction, row["input"].strip(), tuple((option, "") for option in row["options"]), row["output"].strip())


def read_mixture(data: Path, texts: Mapping[str, Sequence[str]], is_clean: Callable[[str], bool], max_characters: int) -> Mixture:
    """Read the instruction rows that are clean, and find in the corpus (file name -> lines) what its own tasks need."""
    tasks = read_tasks(data)
    rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    with lzma.open(data / "instructions" / "open.jsonl.xz", "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            is_short = len(row["input"]) <= max_characters and len(row["output"]) <= MAX_ANSWER_CHARACTERS
            if row["task"] not in UNSEEN and is_short and is_clean(row["input"]):
                rows[row["task"]].append(row)
    words = _frequent_words([line for lines in texts.values() for line in lines[:6000]])
    sentences = [sentence for name, lines in texts.items() for line in lines[:12_000] if name != "wordnet_glosses"
                 for sentence in split_sentences(line)]  # fmt: skip
    opinions = [
        (sentence, _polarity(sentence))
        for name in OPINIONATED
        for line in texts.get(name, ())
        for sentence in split_sentences(line)
    ]
    return Mixture(
        tasks=[_with_weight(tasks[name], len(rows[name])) for name in sorted(rows)],
        rows=rows,
        glosses=_glosses(texts["wordnet_glosses"], frozenset(words)),
        sentences=[sentence for sentence in sentences if WORD.search(sentence)],
        praises=[sentence for sentence, is_praise in opinions if is_praise],
        blames=[sentence for sentence, is_praise in opinions if is_praise is False],
        words=[word for word in words[NUM_COMMON:NUM_WORDS] if WORD.fullmatch(word)],
    )


def read_tasks(data: Path) -> dict[str, Task]:
    """Read all tasks, those that are never trained on included."""
    found = json.loads((data / "instructions" / "tasks.json").read_text(encoding="utf-8"))
    return {name: Task(name, task["family"], tuple(task["instructions"]), task["kind"], 0.0) for name, task in found.items()}


def label_counts(mixture: Mixture) -> Counter[str]:
    """Count the options of the tasks whose options name what a text is about."""
    families = {task.name: task.family for task in mixture.tasks if task.family in LABELLING}
    return Counter(option for name in families for row in mixture.rows[name] for option in row["options"] or ())


def _with_weight(task: Task, num_rows: int) -> Task:
    weight = FAMILY_WEIGHTS[task.family] * num_rows**0.5 * (OPEN_ENDED_WEIGHT if task.kind == "open-ended" else 1.0)
    return replace(task, weight=weight)


def _reworded(
    labels: Sequence[Label], answer: str, question: str, words: Sequence[str], rng: random.Random
) -> tuple[list[Label], str]:
    """Rename labels: by synonyms, by letters or words that only their meanings explain, or in another style."""
    names = [label for label, _ in labels]
    draw = rng.random()
    if draw < SHARE_RENAMED:
        tags = _names_without_meaning(rng, len(names), words)
        return list(zip(tags, names, strict=True)), tags[names.index(answer)]
    ordered = sorted(names, key=str.lower)
    sets = SYNONYMS.get(tuple(name.lower() for name in ordered))
    # A question that names the old labels would contradict new ones, unless these carry the old ones as meanings.
    is_named = any(re.search(rf"\b{re.escape(name)}\b", question, re.IGNORECASE) for name in names)
    if sets and draw < SHARE_RENAMED + SHARE_SYNONYMS:
        synonyms = dict(zip(ordered, rng.choice(sets), strict=True))
        with_meaning = is_named or draw < SHARE_RENAMED + SHARE_MEANT
        return [(synonyms[name], name if with_meaning else "") for name in names], synonyms[answer]
    if not sets and draw > 1 - SHARE_RESTYLED:
        style = rng.choice(STYLES)
        restyled = [style(name) for name in names]
        if len(set(restyled)) == len(restyled):
            return [(name, "") for name in restyled], style(answer)
    return list(labels), answer


def _names_without_meaning(rng: random.Random, number: int, words: Sequence[str]) -> list[str]:
    style = rng.random()
    if style < 0.35:
        return [chr(ord("A") + index) for index in range(number)]
    if style < 0.55:
        return [str(index + 1) for index in range(number)]
    return rng.sample(words, number)


def _worded(rng: random.Random, family: str, text: str, labels: Sequence[Label], answer: str) -> Drawn:
    shuffled = list(labels)
    rng.shuffle(shuffled)
    return _framed(rng, FRAMES, rng.choice(QUESTIONS[family]), family, text, shuffled, answer)


def _framed(
    rng: random.Random,
    frames: Sequence[tuple[str, int]],
    question: str,
    family: str,
    text: str,
    labels: Sequence[Label],
    answer: str,
) -> Drawn:
    name = "" if NAMED_START.match(text) else rng.choice(FIELDS.get(family, OTHER_FIELDS))
    frame = _weighted(rng, frames)
    instruction = (
        frame.replace("{question}", _literal(question)).replace("{field}", name).replace("{cue}", _weighted(rng, CUES)).strip()
    )
    wrong = tuple(label for label, _ in labels if label != answer)
    return Drawn(instruction, text, tuple(labels) if frames is FRAMES else (), answer, wrong)


def _question(task: Task, rng: random.Random) -> str:
    if rng.random() < 0.05 and task.family in QUESTIONS:
        return rng.choice(ANY_QUESTIONS)
    return _sentence_limited(rng.choice(task.questions))


def _sentence_limited(question: str) -> str:
    """Keep whole sentences of a long definition, the first at least."""
    if len(question) <= MAX_QUESTION_CHARACTERS:
        return question
    kept = ""
    for sentence in re.split(r"(?<=[.?!:]) |\n", question):
        if kept and len(kept) + len(sentence) > MAX_QUESTION_CHARACTERS:
            break
        kept = f"{kept} {sentence}".strip()
    return kept[: 2 * MAX_QUESTION_CHARACTERS]


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _weighted(rng: random.Random, choices: Sequence[tuple[str, float]]) -> str:
    return rng.choices([choice for choice, _ in choices], [weight for _, weight in choices])[0]


def _glosses(lines: Sequence[str], known: Container[str]) -> list[Gloss]:
    """Parse the meanings of words that are known: rare ones cannot be learned from a few hours of reading."""
    glosses = []
    for line in lines:
        if match := GLOSS.match(line):
            meaning, *examples = match["meaning"].split(". ")
            words = tuple(word.strip() for word in match["words"].split(","))
            if all(word in known for word in re.findall(r"\w+", words[0])):
                glosses.append(Gloss(words, match["part"], meaning.rstrip(".")[:120], tuple(text for text in examples if text)))
    return glosses


def _frequent_words(lines: Sequence[str]) -> list[str]:
    counts = Counter(word for line in lines for word in re.findall(r"\b[a-z]{2,}\b", line))
    return [word for word, _ in counts.most_common(NUM_KNOWN)]


def split_sentences(line: str) -> list[str]:
    """Cut a line of the corpus at the ends of sentences; too short and too long ones are dropped."""
    return [part for part in re.split(r"(?<=[.?!]) +", line) if 25 <= len(part) <= 220 and not GLOSS.match(part)]


def _polarity(sentence: str) -> bool | None:
    words = set(re.findall(r"[a-z']+", sentence.lower()))
    if words & NEGATIONS:
        return None
    good, bad = len(words & PRAISE), len(words & BLAME)
    if good + bad < 1 or (good and bad):
        return None
    return good > 0
