"""Make label probabilities mean what they say: one temperature per adapter, and how far off its confidence is. No torch.

Dims: B examples, L labels of one task.
The probabilities of a text are softmax(scores / temperature); a temperature above zero never changes which label wins.
Source: Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Where the fit ends when nothing holds it, for instance because every example is answered wrong."""
NUM_BINS = 15
"""Bins of the calibration error, as in Guo et al."""


def fit_temperature(scores: Sequence[Sequence[float]], gold: Sequence[int]) -> float:
    """Find the temperature with the lowest negative log-likelihood of the gold labels; rows are examples, in label order.

    As in Platt scaling, n examples count as if the gold label were right in n + 1 of n + 2 cases. Without this doubt a small
    split that is answered right throughout would make every answer certain. Source: Platt 1999, Probabilistic Outputs for
    Support Vector Machines, section 2.2.
    """
    rows_BL = np.asarray(scores, dtype=float)
    num_examples, num_labels = rows_BL.shape
    doubt = 1 / (num_examples + 2)
    targets_BL = np.full_like(rows_BL, doubt / (num_labels - 1))
    targets_BL[np.arange(num_examples), gold] = 1 - doubt

    def loss(log_temperature: float) -> float:
        return -float((targets_BL * log_softmax(rows_BL / math.exp(log_temperature), axis=1)).sum())

    bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def expected_calibration_error(confidences: Sequence[float] | NDArray[np.float64], correct: Sequence[bool]) -> float:
    """Average the distance between confidence and accuracy over equal-width bins of confidence, weighted by their examples.

    Bin m of M holds the confidences in ((m - 1) / M, m / M]. Source: equation 3 of Guo et al. 2017, after Naeini et al. 2015.
    """
    surplus = [confidence - is_right for confidence, is_right in zip(confidences, correct, strict=True)]
    return float(np.abs(np.bincount(bins_of(confidences), weights=surplus)).sum() / len(surplus))


def bins_of(confidences: Sequence[float] | NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers of the confidences' bins, from 1."""
    numbers: NDArray[np.int64] = np.ceil(np.multiply(confidences, NUM_BINS)).astype(np.int64)
    return numbers
