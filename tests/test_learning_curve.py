"""A fitted curve gives back the law that made its points, and says no more than its seeds can carry."""

import numpy as np
import pytest

from orchestrator.learning_curve import PowerLaw, fit_learning_curve, fit_power_law

SIZES = (25, 50, 100, 200, 500)


def points_of(law, seeds=(0, 1, 2), noise=0.0, sizes=SIZES):
    rng = np.random.default_rng(0)
    return [(size, seed, law.at(size) + noise * float(rng.standard_normal())) for seed in seeds for size in sizes]


@pytest.mark.parametrize(("top", "drop", "rate"), [(0.9, 0.4, 0.7), (0.97, 0.2, 1.5), (0.8, 0.3, 0.3)])
def test_exact_points_give_their_law_back(top, drop, rate):
    law = PowerLaw(top, drop, rate, 25)
    found = fit_power_law([(size, law.at(size)) for size in reversed(SIZES)])
    assert [found.at(size) for size in (25, 100, 500, 1000)] == pytest.approx(
        [law.at(size) for size in (25, 100, 500, 1000)], abs=1e-4
    )
    curve = fit_learning_curve(points_of(law))
    assert curve.gain == pytest.approx(law.at(1000) - law.at(500), abs=1e-4)
    assert curve.gain_interval == pytest.approx((curve.gain, curve.gain), abs=1e-6), "three equal seeds have no spread"
    assert curve.error < 1e-4
    assert curve.law.flat_from == pytest.approx(law.flat_from, rel=0.02)


def test_flat_is_where_a_doubling_buys_less_than_a_point():
    law = PowerLaw(0.9, 0.4, 1.0, 25)
    # drop * (n / 25)^-1 / 2 = 0.01 at n = 500.
    assert law.flat_from == 500
    assert (law.gain(500), law.gain(499) > 0.01) == (pytest.approx(0.01), True)
    assert PowerLaw(0.9, 0.0, 1.0, 25).flat_from == 25
    assert fit_learning_curve(points_of(law, sizes=(25, 50, 100, 200))).flat_from is None
    flat = fit_learning_curve(points_of(law, sizes=(25, 50, 100, 200, 1000)))
    assert flat.flat_from == pytest.approx(500, abs=5)


def test_the_interval_is_students_over_the_seeds():
    laws = [PowerLaw(0.9, drop, 1.0, 25) for drop in (0.2, 0.3, 0.4)]
    points = [point for seed, law in enumerate(laws) for point in points_of(law, seeds=(seed,))]
    curve = fit_learning_curve(points)
    gains = [law.gain(500) for law in laws]
    half = 4.302653 * np.std(gains, ddof=1) / 3**0.5
    assert curve.num_seeds == 3
    assert curve.gain == pytest.approx(np.mean(gains), abs=1e-4)
    assert curve.gain_interval == pytest.approx((np.mean(gains) - half, np.mean(gains) + half), abs=1e-4)
    assert curve.flat_by_seed == tuple(pytest.approx(law.flat_from, abs=5) for law in laws)


def test_noise_widens_the_interval_and_is_named():
    law = PowerLaw(0.9, 0.4, 0.7, 25)
    quiet, noisy = (fit_learning_curve(points_of(law, noise=noise)) for noise in (0.002, 0.02))
    assert noisy.error == pytest.approx(0.02, rel=0.5)
    widths = [curve.gain_interval[1] - curve.gain_interval[0] for curve in (quiet, noisy)]
    assert widths[0] < widths[1]
    low, high = noisy.gain_interval
    assert low < law.gain(500) < high


def test_a_curve_that_falls_or_stays_is_flat_from_the_start():
    for accuracies in ((0.8, 0.79, 0.77, 0.76, 0.75), (0.8,) * 5, (1.0,) * 5):
        curve = fit_learning_curve([(size, 0, value) for size, value in zip(SIZES, accuracies, strict=True)])
        assert curve.flat_from == 25
        assert curve.gain == pytest.approx(0.0, abs=1e-3)
        assert curve.law.at(100) == pytest.approx(np.mean(accuracies), abs=1e-2)


def test_sentences_say_what_a_person_should_know():
    law = PowerLaw(0.9, 0.4, 1.0, 25)
    rising = fit_learning_curve(points_of(law, sizes=(25, 50, 100, 200)))
    assert rising.sentence == (
        "From 25 to 200 examples the fitted accuracy goes from 0.500 to 0.850 (points lie 0.000 off). It has not flattened at "
        "200 (by seed: beyond 200, beyond 200, beyond 200). Twice 200 would buy +2.5 points, +2.5 to +2.5 over 3 seeds."
    )
    flat = fit_learning_curve([(size, 7, 0.75) for size in SIZES])
    assert flat.sentence == (
        "From 25 to 500 examples the fitted accuracy goes from 0.750 to 0.750 (points lie 0.000 off). From 25 on, twice as many "
        "buy less than 1 point. Twice 500 would buy +0.0 points; how sure that is, takes more seeds to say."
    )


def test_three_sizes_are_too_few():
    curve = fit_learning_curve(points_of(PowerLaw(0.9, 0.4, 1.0, 25), sizes=SIZES[:3]))
    assert (curve.law, curve.flat_from, curve.gain_interval) == (None, None, None)
    assert curve.sentence == "No learning curve: it needs 4 sizes, and 3 were measured."
    assert fit_learning_curve([]).why_not == "it needs 4 sizes, and 0 were measured"


def test_seeds_that_lack_sizes_have_no_curve_of_their_own():
    law = PowerLaw(0.9, 0.4, 1.0, 25)
    points = [*points_of(law, seeds=(0,)), *points_of(law, seeds=(1,), sizes=(25, 50))]
    curve = fit_learning_curve(points)
    assert (curve.num_seeds, curve.gain_interval, len(curve.flat_by_seed)) == (1, None, 1)
    assert curve.gain == pytest.approx(law.gain(500), abs=1e-4)
    scattered = fit_learning_curve([(size, seed, law.at(size)) for seed, size in enumerate(SIZES)])
    assert (scattered.num_seeds, scattered.gain_interval) == (0, None)
    assert scattered.gain == pytest.approx(law.gain(500), abs=1e-4)
