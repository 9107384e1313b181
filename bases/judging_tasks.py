"""How each of the public tasks that judge a base is asked: a question, the labels as people write them, a prompt's length.

The questions and names follow the data sets' own READMEs and were written before any base was judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_LISTED_LABELS = 30
"""The options of more labels alone would be longer than a small base reads."""


@dataclass(frozen=True)
class Asked:
    """How one task is asked."""

    question: str
    max_length_tokens: int = 128
    names: Mapping[str, str] = field(default_factory=dict)
    """Label in the data -> what it is called, where the label is no plain words."""

    def name_of(self, label: str) -> str:
        """What a label is called."""
        return self.names.get(label, label.replace("_", " "))

    def instruction(self, num_labels: int) -> str:
        """The prompt's template."""
        options = "{labels}\n" if num_labels <= MAX_LISTED_LABELS else ""
        return f"{self.question}\n{options}Text: {{text}}\nAnswer:"


SPOKEN = "Read what somebody says to an assistant. What does the speaker want?"
JUDGING_TASKS = {
    "banking77": Asked("Read what a customer writes to a bank. What is it about?"),
    "boolq": Asked("Read a question and a passage. Does the passage answer the question with yes or no?", 256),
    "clinc150": Asked(SPOKEN),
    "customer_reviews": Asked("Read a sentence of a review of a product. What does the customer think of the product?"),
    "dbpedia14": Asked("Read the beginning of an article of an encyclopedia. What is the article about?", 192),
    "goemotions": Asked("Read a comment. Which emotion does it express?", 256),  # its 28 options take more than 100 tokens
    "query_wellformedness": Asked("Read a query to a search engine. Is it a well-formed question?"),
    "rotten_tomatoes": Asked("Read a sentence of a film review. What does the critic think of the film?"),
    "scicite": Asked(
        "Read a sentence of a paper that cites another work. Why does it cite it?",
        names={"background": "background information", "method": "use of a method", "result": "comparison of results"},
    ),
    "sms_spam": Asked("Read a text message. Is it legitimate or spam?", names={"ham": "legitimate"}),
    "snips": Asked(SPOKEN),
}
