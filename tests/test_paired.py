"""Law 9: every statistic of the gate against tables by hand, published values, scipy, or its own definition solved otherwise."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, binomtest, bootstrap, norm

from orchestrator.metrics import macro_f1
from orchestrator.paired import (
    compare_f1,
    compare_means,
    f1_difference,
    fewest_losses,
    holm,
    mcnemar_midp,
    mean_difference,
    paired_bootstrap,
    tango_interval,
    tango_p,
    tango_z,
    wilson,
)
from orchestrator.power import detectable_drop, examples_needed

TABLES = [(0, 0, 50), (0, 1, 10), (1, 0, 10), (3, 1, 60), (1, 3, 60), (12, 5, 100), (40, 38, 345), (10, 0, 10), (0, 10, 10)]
"""(losses b, wins c, examples n)"""


@pytest.mark.parametrize(
    ("num_losses", "num_wins", "expected"),
    [
        (4, 0, 0.5 / 16),
        (3, 0, 0.5 / 8),
        (6, 1, (1 + 7 / 2) / 128),
        (5, 1, (1 + 6 / 2) / 64),
        (8, 2, (1 + 10 + 45 / 2) / 1024),
        (1, 1, (1 + 2 / 2) / 4),
        (0, 4, 1 - 0.5 / 16),
        (7, 1, 0.0391 / 2),  # airway hyper-responsiveness, Fagerland et al. 2013 (doi:10.1186/1471-2288-13-91), two-sided
        (0, 0, 1.0),  # nothing changed: no evidence at all
    ],
)
def test_midp_by_hand(num_losses, num_wins, expected):
    assert mcnemar_midp(num_losses, num_wins) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("num_losses", "num_wins"), [(1, 0), (7, 2), (14, 6), (2, 9), (30, 30), (300, 260), (0, 80)])
def test_midp_is_the_mean_of_the_two_exact_tests(num_losses, num_wins):
    total = num_losses + num_wins
    at_least = binomtest(num_losses, total, 0.5, alternative="greater").pvalue
    more = binomtest(num_losses + 1, total, 0.5, alternative="greater").pvalue if num_wins else 0.0
    assert mcnemar_midp(num_losses, num_wins) == pytest.approx((at_least + more) / 2, rel=1e-9)


@pytest.mark.parametrize(("num_losses", "num_wins"), [(4, 0), (6, 1), (8, 2), (14, 6)])
def test_fewest_losses_that_are_significant(num_losses, num_wins):
    """forgetting.md 1.2: at .05 the mid-p needs 4-0, 6-1, 8-2, 14-6."""
    assert mcnemar_midp(num_losses, num_wins) < 0.05 <= mcnemar_midp(num_losses - 1, num_wins)


def test_fewest_losses_without_a_win():
    assert (fewest_losses(0.05), fewest_losses(0.03), fewest_losses(0.005)) == (4, 5, 7)


@pytest.mark.parametrize("num_examples", [50, 200, 1000])
@pytest.mark.parametrize("flip_rate", [0.01, 0.04, 0.3])
def test_exact_size_of_midp_is_its_level(num_examples, flip_rate):
    """Sum the probability of every table that is called worse, when each flip goes either way with equal chance."""
    size = 0.0
    for num_flips in range(int(binom.ppf(1 - 1e-9, num_examples, flip_rate)) + 1):
        # The more losses, the worse: the tables called worse are those with `fewest` losses and more.
        fewest = next((b for b in range(num_flips + 1) if mcnemar_midp(b, num_flips - b) < 0.05), num_flips + 1)
        size += binom.pmf(num_flips, num_examples, flip_rate) * binom.sf(fewest - 1, num_flips, 0.5)
    assert size <= 0.0505  # forgetting.md 1.2: never above 5.0 %, rounded


def numeric_z(b, c, n, d):
    """Score statistic from the definition: maximise the multinomial likelihood under P(win) - P(loss) = d numerically."""

    def minus_log_likelihood(q):
        cells = ((b, q), (c, q + d), (n - b - c, 1 - 2 * q - d))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -d), (1 - d) / 2
    q = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    # wins - losses has mean n d and variance n (P(win) + P(loss) - d^2).
    return (c - b - n * d) / math.sqrt(n * (q + d + q - d**2))


@pytest.mark.parametrize("difference", [-0.3, -0.05, -0.02, 0.01, 0.2])
@pytest.mark.parametrize(("b", "c", "n"), TABLES)
def test_tango_z_equals_the_numeric_maximum_likelihood_solution(b, c, n, difference):
    assert tango_z(b, c, n, difference) == pytest.approx(numeric_z(b, c, n, difference), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("b", "c", "n"), [table for table in TABLES if table[0] + table[1]])
def test_tango_z_at_zero_is_mcnemars(b, c, n):
    assert tango_z(b, c, n, 0.0) == pytest.approx((c - b) / math.sqrt(b + c))


def test_tango_z_at_the_ends():
    assert tango_z(0, 0, 10, 0.0) == 0.0
    assert tango_z(10, 0, 10, -1.0) == 0.0
    assert tango_z(0, 0, 10, -1.0) == math.inf
    assert tango_z(0, 0, 10, 1.0) == -math.inf


@pytest.mark.parametrize(
    ("b", "c", "n", "level", "expected"),
    [
        # R's PropCIs::scoreci.mp(41, 48, 549, 0.90), as published by a user of it in percent: [-1.57, +4.14].
        (41, 48, 549, 0.90, (-0.0157, 0.0414)),
        # Airway hyper-responsiveness: Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850.
        (7, 1, 21, 0.95, (-0.517, -0.026)),
    ],
)
def test_published_tango_intervals(b, c, n, level, expected):
    assert tango_interval(b, c, n, level) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(("b", "c", "n"), [table for table in TABLES if abs(table[0] - table[1]) < table[2]])
@pytest.mark.parametrize("level", [0.90, 0.95])
def test_interval_ends_are_where_the_test_just_rejects(b, c, n, level):
    critical = norm.ppf(0.5 + level / 2)
    low, high = tango_interval(b, c, n, level)
    observed = (c - b) / n
    assert low <= observed <= high
    assert low == pytest.approx(brentq(lambda d: tango_z(b, c, n, d) - critical, -1 + 1e-9, observed - 1e-9), abs=1e-6)
    assert high == pytest.approx(brentq(lambda d: tango_z(b, c, n, d) + critical, observed + 1e-9, 1 - 1e-9), abs=1e-6)


def test_interval_without_any_flip():
    # With q = 0 the statistic is sqrt(n d / (1 - d)), which is z at d = z^2 / (n + z^2).
    square = norm.ppf(0.95) ** 2
    assert tango_interval(0, 0, 100) == pytest.approx((-square / (100 + square), square / (100 + square)))


def test_interval_mirrors_when_the_sides_are_swapped():
    low, high = tango_interval(12, 5, 100)
    assert tango_interval(5, 12, 100) == pytest.approx((-high, -low))


def test_margin_test_and_interval_agree():
    for b, c, n in TABLES:
        assert (tango_p(b, c, n, 0.02) < 0.05) == (tango_interval(b, c, n, 0.90)[0] > -0.02)


def test_more_wins_or_fewer_losses_never_raise_a_p():
    for n, b, c in product([20, 100, 400], range(0, 20, 2), range(0, 20, 2)):
        if b + c < n:
            for p_of in (lambda b, c, n=n: tango_p(b, c, n, 0.02), lambda b, c: 1 - mcnemar_midp(b, c) if b + c else 0.0):
                assert p_of(b, c + 1) <= p_of(b, c) + 1e-12 or p_of(b, c) == 0.0
                assert b == 0 or p_of(b - 1, c) <= p_of(b, c) + 1e-12


def test_holm_by_hand():
    # Sorted: .01 x 4, .02 x 3, .03 x 2, .9 x 1; none below the one before it.
    assert holm({"a": 0.03, "b": 0.01, "c": 0.9, "d": 0.02}) == pytest.approx({"b": 0.04, "d": 0.06, "a": 0.06, "c": 0.9})
    assert holm({"a": 0.6, "b": 0.5}) == {"b": 1.0, "a": 1.0}
    assert holm({"a": 0.2}) == {"a": 0.2}
    assert holm({}) == {}


def test_holms_example():
    """Aickin and Gensler 1996 (doi:10.2105/AJPH.86.5.726) adjust .01, .02, .03, .04, .05 to .05, .08, .09, .09, .09."""
    found = holm({str(p): p for p in (0.01, 0.02, 0.03, 0.04, 0.05)})
    assert list(found.values()) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])


def test_examples_needed():
    # (1.6449 + 0.8416)^2 = 6.1826; times 0.04 / 0.02^2.
    assert examples_needed(0.04, 0.02, 0.05) == math.ceil(6.18256 * 0.04 / 0.0004) == 619
    # forgetting.md 1.3: 15,460 x flip rate at 2 points; a third of a point more divides by 2.25, 5 points by 6.25.
    for flip_rate, needed in ((0.01, 155), (0.02, 309), (0.04, 618), (0.08, 1237), (0.15, 2319)):
        assert examples_needed(flip_rate, 0.02, 0.05) == pytest.approx(needed, rel=1e-2)
        assert examples_needed(flip_rate, 0.03, 0.05) == pytest.approx(needed / 2.25, rel=2e-2)
        assert examples_needed(flip_rate, 0.05, 0.05) == pytest.approx(needed / 6.25, rel=5e-2)


@pytest.mark.parametrize(
    ("num_examples", "expected"),
    [  # forgetting.md 1.3, points at flip rates of 2, 4 and 8 %; in brackets there: at .005
        (50, ((12.7, 20.7), (14.3, 23.1), (16.7, 26.5))),
        (100, ((7.2, 11.6), (8.4, 13.4), (10.2, 16.0))),
        (200, ((4.2, 6.7), (5.1, 8.0), (6.5, 9.9))),
        (500, ((2.2, 3.4), (2.9, 4.3), (3.8, 5.5))),
        (1000, ((1.4, 2.1), (1.9, 2.8), (2.5, 3.7))),
        (2000, ((0.9, 1.4), (1.3, 1.8), (1.7, 2.5))),
    ],
)
def test_detectable_drop_is_near_the_simulated_one(num_examples, expected):
    """The formula is a normal approximation: cautious by up to a quarter for few examples, by up to an eighth from 200 on."""
    tolerance = 0.25 if num_examples < 200 else 0.125
    for flip_rate, (at_5, at_05) in zip((0.02, 0.04, 0.08), expected, strict=True):
        assert 100 * detectable_drop(flip_rate, num_examples, 0.05) == pytest.approx(at_5, rel=tolerance)
        assert 100 * detectable_drop(flip_rate, num_examples, 0.005) == pytest.approx(at_05, rel=tolerance)


def test_detectable_drop_solves_its_equation():
    drop = detectable_drop(0.04, 300, 0.03)
    assert drop == pytest.approx((norm.ppf(0.97) + norm.ppf(0.8)) * math.sqrt((0.04 + drop) / 300))
    assert detectable_drop(0.5, 2, 0.001) == 1.0


def test_wilson_interval():
    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) for p = 0.8, n = 10, z = 1.96.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0
    z, p, n = norm.ppf(0.975), 137 / 138, 138
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(137, 138) == pytest.approx(((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)))


def test_bootstrap_of_an_accuracy_has_its_standard_error_and_scipys_interval():
    num_losses, num_wins, num_examples = 30, 18, 400
    kinds, counts = [-1.0, 1.0, 0.0], [num_losses, num_wins, num_examples - num_losses - num_wins]
    found = paired_bootstrap(counts, mean_difference(kinds), 0.02)
    drop = (num_losses - num_wins) / num_examples
    assert found.variance == pytest.approx((num_losses + num_wins) / num_examples - drop**2, rel=0.05)
    sample = (np.repeat(kinds, counts),)
    oracle = bootstrap(sample, np.mean, n_resamples=10_000, confidence_level=0.9, method="percentile", rng=1)
    # One example is 0.0025, and both intervals are drawn.
    assert found.interval == pytest.approx(oracle.confidence_interval, abs=0.003)
    assert found.p_worse == pytest.approx(mcnemar_midp(num_losses, num_wins), abs=0.015)
    assert found.p_margin == pytest.approx(tango_p(num_losses, num_wins, num_examples, 0.02), abs=0.03)


def test_bootstrap_is_pure_and_never_gives_zero():
    first, second = (paired_bootstrap([50, 50], mean_difference([-1.0, 0.0]), 0.02) for _ in range(2))
    assert first == second
    assert first.p_worse == pytest.approx(1 / 10_001)


def test_many_kinds_are_drawn_in_parts():
    rng = np.random.default_rng(0)
    differences = rng.normal(-0.02, 0.1, size=900)
    found = paired_bootstrap([1] * 900, mean_difference(differences), 0.03)
    assert found.variance == pytest.approx(differences.var(), rel=0.05)
    assert found.p_worse < 0.001
    assert found.p_margin == pytest.approx(norm.sf((differences.mean() + 0.03) / (differences.std() / 30)), abs=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_f1_difference_is_the_difference_of_macro_f1(seed):
    rng = np.random.default_rng(seed)
    # Answers may have labels that gold lacks, and the other way round.
    gold, candidate, reference = (rng.choice(list(labels), size=40).tolist() for labels in ("abc", "bcd", "abcd"))
    kinds = Counter(zip(gold, candidate, reference, strict=True))
    found = f1_difference(list(kinds))(np.array([list(kinds.values())], dtype=float))
    assert found == pytest.approx([macro_f1(gold, candidate) - macro_f1(gold, reference)])


def test_bootstrap_of_macro_f1():
    """Two labels of equal size, equally often confused: macro-F1 is then near accuracy, and so are its p values."""
    kinds = {
        ("a", "a", "a"): 230,
        ("b", "b", "b"): 230,
        ("a", "b", "a"): 8,
        ("b", "a", "b"): 8,
        ("a", "a", "b"): 3,
        ("b", "b", "a"): 3,
    }
    found = compare_f1(kinds, 0.02)
    assert found.p_worse == pytest.approx(mcnemar_midp(16, 6), abs=0.02)
    assert found.p_margin == pytest.approx(tango_p(16, 6, 482, 0.02), abs=0.05)
    assert found.interval == pytest.approx(tango_interval(16, 6, 482), abs=0.004)


@pytest.mark.parametrize("num_examples", [30, 100, 150, 400])
def test_without_losses_as_many_examples_prove_a_mean_as_prove_an_accuracy(num_examples):
    """The prior: resamples of examples without a loss have no loss, and would prove anything."""
    assert (compare_means([0.0] * num_examples, 0.02).p_margin < 0.05) == (num_examples >= 150)
    assert (compare_f1({("a", "a", "a"): num_examples // 2, ("b", "b", "b"): num_examples // 2}, 0.02).p_margin < 0.05) == (
        num_examples >= 150
    )
    assert (tango_p(0, 0, num_examples, 0.02) < 0.05) == (num_examples >= 150)


def test_macro_f1_with_a_single_label():
    assert compare_f1({("a", "a", "a"): 10}, 0.02).interval == (0.0, 0.0)
