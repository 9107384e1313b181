"""What needs no language model: the majority class, and word counts with logistic regression. No torch.

Dims: B texts, T training examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from orchestrator.dataset import Example

Likeness = Callable[[Sequence[Example]], NDArray[np.float64]]
"""Examples -> how alike the input of each is to that of every training example [B, T]; the larger the more."""


def majority_label(train: Sequence[Example]) -> str:
    """The label that most examples have; of equals the one that comes first."""
    return Counter(example.label for example in train).most_common(1)[0][0]


def fit_tf_idf(train: Sequence[Example]) -> Pipeline:
    """Logistic regression with C = 10 over word 1- and 2-grams: a strong setting of what people run without a language model."""
    model = make_pipeline(_vectorizer(), LogisticRegression(C=10.0, max_iter=2000))
    return model.fit([example.text for example in train], [example.label for example in train])


def tf_idf_answers(model: Pipeline, examples: Sequence[Example]) -> list[str]:
    """What `fit_tf_idf` made answers."""
    return [str(answer) for answer in model.predict([example.text for example in examples])]


def tf_idf_likeness(train: Sequence[Example]) -> Likeness:
    """Cosine of the same word counts."""
    vectorizer = _vectorizer()
    known = vectorizer.fit_transform([example.text for example in train])

    def likeness(examples: Sequence[Example]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (vectorizer.transform([example.text for example in examples]) @ known.T).toarray()
        return found

    return likeness


def _vectorizer() -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
