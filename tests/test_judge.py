"""Law 9: hand-worked tables, false blocks at most 5 %, better never turns a pass into a block, swapped labels are caught."""

import math
import random
from itertools import product

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, binomtest, norm

from orchestrator.judge import (
    ALPHA,
    GateInput,
    VerdictKind,
    examples_needed,
    judge,
    mcnemar_midp,
    tango_interval,
    tango_p,
    tango_z,
    wilson,
)
from orchestrator.metrics import accuracy, macro_f1

REGRESSED, NON_INFERIOR, INCONCLUSIVE = VerdictKind.REGRESSED, VerdictKind.NON_INFERIOR, VerdictKind.INCONCLUSIVE
TABLES = [(0, 0, 50), (0, 1, 10), (1, 0, 10), (3, 1, 60), (1, 3, 60), (12, 5, 100), (40, 38, 345), (10, 0, 10), (0, 10, 10)]
"""(losses b, wins c, examples n)"""


def evidence(num_losses, num_wins, num_examples, num_both_right=None, **changes):
    """Accuracy evidence with the given counts; where both agree, both are right unless told otherwise."""
    num_both_right = num_examples - num_losses - num_wins if num_both_right is None else num_both_right
    num_both_wrong = num_examples - num_losses - num_wins - num_both_right
    candidate = [False] * num_losses + [True] * (num_wins + num_both_right) + [False] * num_both_wrong
    reference = [True] * num_losses + [False] * num_wins + [True] * num_both_right + [False] * num_both_wrong
    values = {"candidate_value": sum(candidate) / num_examples, "reference_value": sum(reference) / num_examples}
    return GateInput(candidate, reference, **{**values, "minimum": 0.0, "margin": 0.02, "is_first_version": False, **changes})


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
        (0, 0, 1.0),  # nothing changed: no evidence at all
    ],
)
def test_midp_by_hand(num_losses, num_wins, expected):
    assert mcnemar_midp(num_losses, num_wins) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("num_losses", "num_wins"), [(1, 0), (7, 2), (14, 6), (2, 9), (30, 30), (300, 260)])
def test_midp_is_the_mean_of_the_two_exact_tests(num_losses, num_wins):
    total = num_losses + num_wins
    at_least = binomtest(num_losses, total, 0.5, alternative="greater").pvalue
    more = binomtest(num_losses + 1, total, 0.5, alternative="greater").pvalue if num_wins else 0.0
    assert mcnemar_midp(num_losses, num_wins) == pytest.approx((at_least + more) / 2, rel=1e-9)


@pytest.mark.parametrize(("num_losses", "num_wins"), [(4, 0), (6, 1), (8, 2), (14, 6)])
def test_fewest_losses_that_are_significant(num_losses, num_wins):
    assert mcnemar_midp(num_losses, num_wins) < ALPHA <= mcnemar_midp(num_losses - 1, num_wins)


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


@pytest.mark.parametrize(
    ("num_losses", "num_wins", "num_examples", "kind", "is_promoted"),
    [
        (0, 0, 100, NON_INFERIOR, True),  # right and wrong on the same examples
        (0, 0, 1, NON_INFERIOR, True),
        (4, 0, 100, REGRESSED, False),
        (3, 0, 100, INCONCLUSIVE, False),
        (6, 1, 100, REGRESSED, False),
        (5, 1, 100, INCONCLUSIVE, False),
        (2, 2, 100, INCONCLUSIVE, True),  # not below the champion
        (0, 1, 50, INCONCLUSIVE, True),
        (0, 12, 100, NON_INFERIOR, True),
        (10, 10, 1000, NON_INFERIOR, True),
        (12, 4, 2000, NON_INFERIOR, True),  # a real drop of 0.4 points, inside the margin of 2
        (60, 20, 1000, REGRESSED, False),
        (100, 0, 100, REGRESSED, False),
    ],
)
def test_verdicts(num_losses, num_wins, num_examples, kind, is_promoted):
    verdict = judge(evidence(num_losses, num_wins, num_examples))
    assert (verdict.kind, verdict.is_promoted) == (kind, is_promoted)
    assert (verdict.num_losses, verdict.num_wins) == (num_losses, num_wins)
    assert verdict.difference == pytest.approx((num_wins - num_losses) / num_examples)
    assert verdict.p_worse == mcnemar_midp(num_losses, num_wins)
    assert verdict.p_margin == tango_p(num_losses, num_wins, num_examples, 0.02)
    assert verdict.interval == tango_interval(num_losses, num_wins, num_examples)
    assert verdict.reasons


@pytest.mark.parametrize(
    ("given", "reasons"),
    [
        (evidence(0, 0, 100), ("right and wrong on the same examples as the champion",)),
        (evidence(4, 0, 100), ("worse than the champion (4 lost, 0 won of 100, p = 0.0312)",)),
        (
            evidence(12, 4, 2000),
            ("not worse by 0.020 or more (12 lost, 4 won of 2000, p = 6.62e-07) (a real drop, but within the margin)",),
        ),
        (
            evidence(5, 1, 100),
            (
                "5 lost, 1 won of 100: too few examples to tell; about 928 would settle a margin of 0.020",
                "not promoted: below the champion",
            ),
        ),
        (
            evidence(2, 2, 100),
            (
                "2 lost, 2 won of 100: too few examples to tell; about 619 would settle a margin of 0.020",
                "promoted: not below the champion",
            ),
        ),
        (evidence(0, 0, 100, 70, minimum=0.8), ("0.700 is below gate.min 0.800",)),
    ],
)
def test_reasons_in_words(given, reasons):
    assert judge(given).reasons == reasons


@pytest.mark.parametrize(
    ("candidate_value", "minimum", "kind", "reason"),
    [
        (0.51, 0.0, NON_INFERIOR, "0.510 beats the zero-shot base's 0.500"),
        (0.50, 0.0, REGRESSED, "0.500 does not beat the zero-shot base's 0.500"),
        (0.40, 0.0, REGRESSED, "0.400 does not beat the zero-shot base's 0.500"),
        (0.51, 0.6, REGRESSED, "0.510 is below gate.min 0.600"),
        (0.60, 0.6, NON_INFERIOR, "0.600 beats the zero-shot base's 0.500"),
    ],
)
def test_a_first_version_must_beat_the_base_and_the_minimum(candidate_value, minimum, kind, reason):
    given = evidence(0, 0, 100, candidate_value=candidate_value, reference_value=0.5, minimum=minimum, is_first_version=True)
    verdict = judge(given)
    assert (verdict.kind, verdict.is_promoted) == (kind, kind is NON_INFERIOR)
    assert verdict.reasons[0].endswith(reason)


def test_below_the_minimum_blocks_even_a_better_candidate():
    assert judge(evidence(0, 30, 100, 40, minimum=0.7)).kind is NON_INFERIOR
    assert judge(evidence(0, 30, 100, 40, minimum=0.71)).kind is REGRESSED


def test_different_numbers_of_examples_are_no_comparison():
    with pytest.raises(ValueError, match="shorter"):
        judge(GateInput([True, True], [True], 1.0, 1.0, 0.0, 0.02, False))


def never_blocks_the_better(before, after):
    first, second = judge(before), judge(after)
    assert first.kind is not NON_INFERIOR or second.kind is not REGRESSED
    assert second.is_promoted or not first.is_promoted
    assert first.kind is REGRESSED or second.kind is not REGRESSED


@pytest.mark.parametrize("seed", range(60))
def test_a_better_candidate_never_turns_a_pass_into_a_block(seed):
    rng = random.Random(seed)
    num_examples, labels = rng.randint(1, 150), "abc"
    gold = rng.choices(labels, k=num_examples)
    reference = [g if rng.random() < 0.9 else rng.choice(labels) for g in gold]
    candidate = [r if rng.random() < rng.choice([0.8, 0.97]) else rng.choice(labels) for r in reference]
    metric = rng.choice([accuracy, macro_f1])
    settings = rng.choice([0.0, 0.7, 0.9]), rng.choice([0.005, 0.02, 0.2]), rng.random() < 0.2

    def given(answers):
        right = ([a == g for a, g in zip(side, gold, strict=True)] for side in (answers, reference))
        return GateInput(*right, metric(gold, answers), metric(gold, reference), *settings)

    wrong = [index for index, (answer, g) in enumerate(zip(candidate, gold, strict=True)) if answer != g]
    rng.shuffle(wrong)
    for index in wrong[:8]:
        better = [*candidate[:index], gold[index], *candidate[index + 1 :]]
        never_blocks_the_better(given(candidate), given(better))
        candidate = better


@pytest.mark.parametrize("margin", [0.01, 0.05, 0.3])
def test_a_better_candidate_in_every_small_table(margin):
    for n, b, c in product([1, 2, 5, 9], range(10), range(10)):
        if b + c <= n:
            for both_right in range(n - b - c + 1):
                before = evidence(b, c, n, both_right, margin=margin)
                if b:
                    never_blocks_the_better(before, evidence(b - 1, c, n, both_right + 1, margin=margin))
                if b + c + both_right < n:
                    never_blocks_the_better(before, evidence(b, c + 1, n, both_right, margin=margin))


def test_more_wins_or_fewer_losses_never_raise_the_margin_p():
    for n, b, c in product([20, 100, 400], range(0, 20, 2), range(0, 20, 2)):
        if b + c < n:
            p = tango_p(b, c, n, 0.02)
            assert tango_p(b, c + 1, n, 0.02) <= p + 1e-12
            assert b == 0 or tango_p(b - 1, c, n, 0.02) <= p + 1e-12


@pytest.mark.parametrize(("num_examples", "flip_rate"), [(50, 0.1), (100, 0.04), (100, 0.3), (138, 0.15), (500, 0.08)])
def test_exact_false_block_rate_is_at_most_five_percent(num_examples, flip_rate):
    """Sum the probability of every table that blocks, when each flip goes either way with equal chance."""
    most = int(binom.ppf(1 - 1e-7, num_examples, flip_rate))
    rate = 0.0
    for num_flips in range(most + 1):
        chance = binom.pmf(num_flips, num_examples, flip_rate)
        # The more losses, the worse: the blocking tables are those from the first one on.
        for num_losses in range(num_flips, -1, -1):
            if judge(evidence(num_losses, num_flips - num_losses, num_examples)).kind is not REGRESSED:
                break
            rate += chance * binom.pmf(num_losses, num_flips, 0.5)
    assert rate <= 0.05


def verdict_shares(num_examples, flip_rate, drop, num_runs=2000):
    """Simulate candidates whose accuracy is `drop` below the champion's; shares of REGRESSED, INCONCLUSIVE, NON_INFERIOR."""
    rng = np.random.default_rng(0)
    chances = [flip_rate / 2 + drop, flip_rate / 2, 1 - flip_rate - drop]
    tables, counts = np.unique(rng.multinomial(num_examples, chances, size=num_runs)[:, :2], axis=0, return_counts=True)
    shares = dict.fromkeys(VerdictKind, 0.0)
    for (num_losses, num_wins), count in zip(tables.tolist(), counts.tolist(), strict=True):
        shares[judge(evidence(num_losses, num_wins, num_examples)).kind] += count / num_runs
    return [shares[kind] for kind in (REGRESSED, INCONCLUSIVE, NON_INFERIOR)]


@pytest.mark.parametrize(
    ("num_examples", "flip_rate", "drop", "expected"),
    [
        # forgetting.md 1.3, "single task", in percent; simulated there with 20,000 runs, here with 2,000 (error 2 points).
        (200, 0.04, 0.0, (4, 60, 37)),
        (500, 0.04, 0.0, (5, 26, 69)),
        (500, 0.04, 0.02, (58, 37, 5)),
        (200, 0.08, 0.05, (63, 37, 0)),
        (500, 0.08, 0.03, (65, 34, 1)),
        (200, 0.04, 0.10, (99, 1, 0)),
    ],
)
def test_simulated_operating_characteristics(num_examples, flip_rate, drop, expected):
    shares = verdict_shares(num_examples, flip_rate, drop)
    assert [100 * share for share in shares] == pytest.approx(expected, abs=3)


@pytest.mark.parametrize("metric", [accuracy, macro_f1])
def test_swapped_labels_are_caught(metric):
    rng = random.Random(0)
    gold = ["yes", "no", "other"] * 30
    champion = [g if rng.random() < 0.9 else rng.choice(["yes", "no", "other"]) for g in gold]
    candidate = [{"yes": "no", "no": "yes"}.get(answer, answer) for answer in champion]
    right = ([a == g for a, g in zip(side, gold, strict=True)] for side in (candidate, champion))
    verdict = judge(GateInput(*right, metric(gold, candidate), metric(gold, champion), 0.0, 0.02, False))
    assert (verdict.kind, verdict.is_promoted) == (REGRESSED, False)


def test_examples_needed_by_hand():
    # (1.6449 + 0.8416)^2 = 6.1826; times 0.04 / 0.02^2.
    assert examples_needed(20, 500, 0.02) == math.ceil(6.18256 * 0.04 / 0.0004) == 619
    assert examples_needed(0, 500, 0.02) == examples_needed(1, 500, 0.02)
    assert examples_needed(20, 500, 0.04) < examples_needed(20, 500, 0.02)


def test_wilson_interval_of_a_known_case():
    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) for p = 0.8, n = 10, z = 1.96.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0
