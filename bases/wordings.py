"""How the instruction mixture words its tasks: questions, frames, synonyms of labels, words that praise or blame."""

from __future__ import annotations

from collections.abc import Callable

FRAMES = (
    ("{question}\n{labels}\n{field}{text}\n{cue}", 10),
    ("{question}\nOptions:\n{labels}\n{field}{text}\n{cue}", 2),
    ("{question}\n{field}{text}\n{labels}\n{cue}", 2),
    ("{field}{text}\n{question}\n{labels}\n{cue}", 2),
    ("{question} Choose one of:\n{labels}\n\n{field}{text}", 1),
    ("{question} Answer with one label.\n{labels}\n{field}{text}\n{cue}", 1),
    ("{labels}\n{question}\n{field}{text}\n{cue}", 1),
    ("{labels}\n{field}{text}\n{cue}", 1),
)
"""Instructions with a place for question, labels, what the text is and the text; and how often each is used."""
BARE_FRAMES = (
    ("{question}\n{field}{text}\n{cue}", 3),
    ("{field}{text}\n{question}\n{cue}", 1),
    ("{question}\n\n{field}{text}", 1),
)
"""The same without the labels."""
CUES = (("Answer:", 7), ("Label:", 1), ("Category:", 1), ("The answer is", 1), ("", 1))
FIELDS = {
    "intent": ("Message: ", "User: ", "Customer: ", "Request: ", "Utterance: ", "Text: ", "Client: ", ""),
    "dialogue": ("Utterance: ", "Text: ", "Message: ", "Speaker: ", ""),
    "sentiment": ("Review: ", "Text: ", "Comment: ", "Sentence: ", "Opinion: ", ""),
    "topic": ("Text: ", "Passage: ", "Article: ", "Paragraph: ", ""),
}
OTHER_FIELDS = ("Text: ", "Input: ", "Sentence: ", "")

QUESTIONS = {
    "intent": (
        "What does the user want?",
        "What is the intent of the message?",
        "Read a message to customer service. What is it about?",
        "Which intent does the utterance have?",
        "Classify the request.",
        "What does the person ask for?",
        "Sort the message into one of these groups.",
        "Which of these does the customer mean?",
    ),
    "dialogue": (
        "What is the speaker doing?",
        "Which kind of utterance is it?",
        "Classify the utterance.",
        "Which label fits what is said?",
    ),
    "sentiment": (
        "What does the reviewer think?",
        "Is the opinion good or bad?",
        "Which sentiment does the text have?",
        "Read a review. What does the writer think of it on the whole?",
        "Classify the sentiment.",
        "How does the writer feel about it?",
    ),
    "topic": (
        "What is the text about?",
        "Which topic does the passage have?",
        "Classify the text by topic.",
        "Sort the text into one of these groups.",
        "What kind of text is it?",
    ),
    "lexical": ("Which option fits?", "Choose the right option.", "Which kind is it?"),
    "definition": (
        "Which word has this meaning?",
        "Which word does the definition describe?",
        "Choose the word that is defined.",
        "What is described?",
        "Which option fits the description?",
    ),
    "meaning": ("What does it mean?", "Which option describes it?", "Choose the right description.", "What kind of thing is it?"),
    "synonym": ("Which word means the same?", "Choose the synonym.", "Which option is closest in meaning?"),
    "match": (
        "What is the text about?",
        "Which label fits the text?",
        "Choose the label that fits best.",
        "Classify the text.",
        "What is meant?",
        "What does it deal with?",
        "Which of these describes it best?",
        "Sort the text into one of these groups.",
    ),
    "blank": (
        "Which word fills the blank?",
        "Which word is missing?",
        "Choose the word that fits.",
        "Complete the sentence.",
        "What belongs in the gap?",
    ),
}
"""Further questions by task family; a family without any keeps the questions of its tasks."""
ANY_QUESTIONS = ("Which label fits the text?", "Choose the right option.", "Classify the text.", "Pick one of the options.")

SYNONYMS: dict[tuple[str, ...], tuple[tuple[str, ...], ...]] = {
    ("no", "yes"): (("false", "true"), ("incorrect", "correct"), ("wrong", "right"), ("negative", "affirmative")),
    ("false", "true"): (("no", "yes"), ("incorrect", "correct"), ("wrong", "right")),
    ("acceptable", "unacceptable"): (
        ("grammatical", "ungrammatical"),
        ("correct", "incorrect"),
        ("well formed", "badly formed"),
        ("good English", "bad English"),
        ("fine", "broken"),
    ),
    ("advantage", "drawback"): (
        ("positive", "negative"),
        ("good", "bad"),
        ("praise", "complaint"),
        ("pro", "con"),
        ("liked it", "disliked it"),
        ("strength", "weakness"),
        ("satisfied", "dissatisfied"),
        ("happy", "unhappy"),
    ),
    ("contradiction", "entailment", "neutral"): (
        ("contradicts", "follows", "unrelated"),
        ("false", "true", "unknown"),
        ("no", "yes", "maybe"),
        ("impossible", "certain", "possible"),
    ),
    ("entails", "neutral"): (("yes", "no"), ("follows", "does not follow"), ("true", "unknown")),
    ("support", "undermine"): (("for", "against"), ("agree", "disagree"), ("pro", "con"), ("in favour", "opposed")),
    ("female", "male"): (("woman", "man"), ("girl", "boy"), ("feminine", "masculine")),
    ("invalid", "valid"): (("wrong", "right"), ("does not follow", "follows")),
    ("right order", "wrong order"): (("correct", "incorrect"), ("ordered", "swapped"), ("yes", "no")),
    ("assistant", "user"): (("agent", "customer"), ("system", "human"), ("bot", "person")),
    ("cause", "effect"): (("reason", "result"), ("why it happened", "what happened next")),
}
"""Other wordings of a whole label set, in the order of its lower-cased, sorted labels."""

STYLES: tuple[Callable[[str], str], ...] = (
    str.title,
    str.upper,
    str.lower,
    lambda name: name.lower().replace(" ", "_"),
    lambda name: name.lower().replace(" ", "-"),
)
"""Ways of writing a label."""

PRAISE = frozenset(
    "amazing awesome beautiful beautifully best brilliant brilliantly captivating charming clever compelling delightful easy "
    "effective enjoyable enjoyed entertaining excellent exceptional fantastic fascinating fine flawless fresh fun funny glad "
    "good gorgeous great happy heartwarming helpful hilarious impressive incredible inspired interesting love loved lovely "
    "magnificent masterpiece moving nice outstanding perfect perfectly pleasant pleased powerful recommend refreshing "
    "reliable remarkable satisfied smart solid splendid strong stunning superb sweet terrific thank thanks thrilling touching "
    "wonderful wonderfully worth".split()
)
BLAME = frozenset(
    "annoying awful awkward bad badly bland boring broken cheap cheesy clumsy confusing contrived crap cringe defective "
    "disappointed disappointing disappointment disaster dreadful dull embarrassing fail failed fails failure flat flawed "
    "forgettable frustrating garbage hate hated horrible horribly idiotic incoherent inept insulting lacks lame lazy lousy "
    "mediocre mess miserable mistake pathetic pointless poor poorly predictable pretentious problem ridiculous rubbish sad "
    "shallow silly slow stupid sucks tedious terrible terribly tired trash ugly unfortunately unfunny uninteresting "
    "unreliable useless waste wasted weak weakest worse worst wrong".split()
)
NEGATIONS = frozenset("not no never nothing neither nor without hardly n't don't didn't isn't wasn't can't but although".split())
OPINIONS = (
    ("positive", "negative"),
    ("good", "bad"),
    ("praise", "complaint"),
    ("liked it", "disliked it"),
    ("favourable", "unfavourable"),
    ("recommended", "not recommended"),
    ("happy", "unhappy"),
    ("thumbs up", "thumbs down"),
)
