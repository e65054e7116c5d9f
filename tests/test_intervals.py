"""Intervals: how many labels they hold, and where their width comes from."""

import numpy as np
import pytest

from intervals import LEVEL, LEVELS, Calibration, calibrate


def galaxies_with(errors_of, n: int = 30_000, galaxies: int = 50, seed: int = 0):
    """Predictions, labels, scales (0.01 dex) and galaxies; the errors are errors_of(values)."""
    rng = np.random.default_rng(seed)
    value = rng.uniform(8.2, 8.8, n)
    label = value + 0.01 * errors_of(value) * rng.laplace(size=n)
    return value, label, np.full(n, 0.01), rng.integers(galaxies, size=n)


def calibrated(value, label, scale, galaxy, **options) -> Calibration:
    return calibrate(value, label, scale, None, galaxy, np.ones(galaxy.size, bool), **options)


def held(made: Calibration, value, label, scale, level: float = LEVEL) -> np.ndarray:
    lower, upper = made.interval(value, scale, level)
    return (lower <= label) & (label <= upper)


@pytest.mark.parametrize("level", LEVELS)
def test_intervals_hold_as_many_new_labels_as_they_say(level):
    made = calibrated(*galaxies_with(lambda v: 3))  # the network takes its error for a third
    assert made.factor(8.5, level) == pytest.approx(-3 * np.log(1 - level), rel=0.05)
    new = galaxies_with(lambda v: 3, seed=1)[:3]
    assert held(made, *new, level).mean() == pytest.approx(level, abs=0.01)


def test_intervals_hold_at_every_value_although_the_scale_is_wrong_at_some():
    def errors(value):
        return np.where(value > 8.65, 2, 1)

    value, label, scale, galaxy = galaxies_with(errors)
    new = galaxies_with(errors, seed=1)[:3]
    one, four = (calibrated(value, label, scale, galaxy, bins=bins) for bins in (1, 4))
    high = new[0] > 8.7
    assert held(one, *new)[high].mean() < 0.85
    for low in (8.2, 8.35, 8.5, 8.7):
        part = (new[0] > low) & (new[0] < low + 0.1)
        assert held(four, *new)[part].mean() == pytest.approx(0.9, abs=0.03)


def test_the_factor_changes_smoothly_with_the_value_and_is_constant_beyond_the_bins():
    made = Calibration(20, 100, [8.3, 8.5], {"0.9": [2.0, 3.0]})
    np.testing.assert_allclose(made.factor(np.array([8, 8.3, 8.4, 8.5, 9])), [2, 2, 2.5, 3, 3])
    lower, upper = made.interval(np.float32([8.4]), np.float32([0.02]))
    assert (lower.dtype, upper.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose((lower[0], upper[0]), (8.35, 8.45), rtol=1e-6)
    laplace = -np.log(0.1)
    np.testing.assert_allclose(made.widening(np.array([8.3, np.nan])), [2 / laplace, 1])


def test_few_galaxies_share_one_factor_and_one_observed_twice_is_one():
    value, label, scale, galaxy = galaxies_with(lambda v: 1, galaxies=20)
    names = np.array([f"1-{k}" for k in range(20)])
    made = calibrated(value, label, scale, names[galaxy])
    assert (made.galaxies, made.spaxels, len(made.values)) == (20, value.size, 4)
    names[1] = names[0]
    names[3] = names[2]
    made = calibrated(value, label, scale, names[galaxy])
    assert (made.galaxies, len(made.values)) == (18, 1)


def test_galaxies_that_were_learned_from_do_not_count():
    value, label, scale, galaxy = galaxies_with(lambda v: 1)
    known = galaxy < 25
    label[known] = value[known]
    made = calibrate(value, label, scale, None, galaxy, ~known)
    assert made.galaxies == 25
    assert made.factor(8.5) == pytest.approx(-np.log(0.1), rel=0.1)
    assert calibrate(value, label, scale, None, galaxy, known & ~known) == Calibration()


def test_without_a_calibration_there_is_no_interval():
    assert np.isnan(Calibration().interval(np.ones(3), np.ones(3))).all()
    assert (Calibration().widening(np.ones(3)) == 1).all()
