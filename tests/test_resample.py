"""Resampling against closed forms, an independent integration, and spectres."""

import numpy as np
import pytest
import spectres
from hypothesis import given, settings
from hypothesis import strategies as st

import resample


def integral_at(edges, flux, at):
    """Exact running integral of a step function: piecewise linear between its edges."""
    return np.interp(at, edges, np.concatenate([[0], np.cumsum(flux * np.diff(edges))]))


def random_spectra(n, count, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(1, 0.5, (n, count)), rng.uniform(1, 9, (n, count))


def resampled(source, target, flux, ivar, bad=None, factor=1.0):
    """Flux, ivar and good fraction of spectra (pixel, spectrum) on the target's bins."""
    bad = np.zeros(flux.shape, bool) if bad is None else bad
    matrix = resample.overlap_matrix(source, target)
    return resample.resample_spectra(flux, ivar, bad, matrix, np.diff(target), factor)


@given(
    first=st.floats(1000, 4000),
    step=st.floats(0.5, 5),
    bins=st.integers(1, 60),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_flux_equals_exact_integral_of_step_function(first, step, bins, seed):
    source = first + np.concatenate([[0], np.cumsum(np.full(200, step))])
    target = np.linspace(first + 3.3 * step, first + 180 * step, bins + 1)
    flux, ivar = random_spectra(200, 3, seed)
    got, _, good = resampled(source, target, flux, ivar)
    for i in range(3):
        expected = np.diff(integral_at(source, flux[:, i], target)) / np.diff(target)
        np.testing.assert_allclose(got[i], expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(good, 1, atol=1e-3)


def test_variance_agrees_with_spectres():
    source = resample.log_edges(3.69, 1e-4, 1500)
    wave, target = resample.target_grid(5000, 6500, 700)
    flux, ivar = random_spectra(1500, 1, 3)
    got, got_ivar, _ = resampled(source, target, flux, ivar)
    # spectres puts edges half-way between centres, so give it the arithmetic centres of our bins
    centres = (source[:-1] + source[1:]) / 2
    wanted = (target[:-1] + target[1:]) / 2
    f, e = spectres.spectres(wanted[5:-5], centres, flux[:, 0], 1 / np.sqrt(ivar[:, 0]))
    np.testing.assert_allclose(got[0, 5:-5], f, atol=5e-4)
    np.testing.assert_allclose(1 / np.sqrt(got_ivar[0, 5:-5]), e, rtol=2e-3)
    assert wave.size == 700


@pytest.mark.parametrize("value", [1e30, np.nan, -np.inf])
def test_values_of_bad_pixels_have_no_influence(value):
    source, target = np.arange(0.0, 101), np.arange(0.0, 100.5, 2.5)
    flux, ivar = random_spectra(100, 1, 0)
    bad = np.zeros((100, 1), bool)
    bad[[10, 11, 12, 50]] = True
    clean = resampled(source, target, flux, ivar, bad)
    flux[bad], ivar[bad] = value, value
    with np.errstate(invalid="ignore"):
        got = resampled(source, target, flux, ivar, bad)
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("bad", "factor", "expected"),
    [
        ([False, True], 1, (3, 4, 0.5)),  # the good half alone
        ([False, False], 1, (5, 8, 1)),  # two equal pixels: half the variance
        ([False, False], 4, (20, 8 / 16, 1)),
    ],
)
def test_two_pixels_in_one_bin_give_their_mean(bad, factor, expected):
    flux, ivar, bad = np.array([[3.0], [7.0]]), np.full((2, 1), 4.0), np.array(bad)[:, None]
    got = resampled(np.array([0.0, 1, 2]), np.array([0.0, 2]), flux, ivar, bad, factor)
    assert [a[0, 0] for a in got] == pytest.approx(expected)


def test_bins_beyond_the_edge_are_missing_not_zero_with_zero_error():
    one = np.ones((9, 1))
    got, got_ivar, good = resampled(np.arange(10.0, 20), np.arange(5.0, 30), one, one)
    inside = (np.arange(5, 29) >= 10) & (np.arange(5, 29) < 19)
    np.testing.assert_array_equal(np.isfinite(got[0]), inside)
    np.testing.assert_array_equal(got_ivar[0], inside.astype(float))
    np.testing.assert_array_equal(good[0], inside.astype(float))


def test_individual_redshifts_equal_one_common_redshift():
    source = resample.log_edges(3.69, 1e-4, 1500)
    _, target = resample.target_grid(5000, 6500, 700)
    flux, ivar = random_spectra(1500, 3, 5)
    bad = np.random.default_rng(0).random(flux.shape) < 0.02
    stretch = np.array([1.01, 1.03, 1e3])  # the last one lies outside of the bins
    each = resample.resample_shifted(flux, ivar, bad, source, target, stretch)
    for i, factor in enumerate(stretch):
        spectrum = (a[:, i : i + 1] for a in (flux, ivar, bad))
        one = resampled(source / factor, target, *spectrum, factor)
        for a, b in zip(each, one, strict=True):
            np.testing.assert_array_equal(a[i], b[0])


def test_target_grid_fills_the_range_and_used_pixels_are_those_with_weight():
    wave, edges = resample.target_grid(5000, 8000, 2040)
    assert (wave.size, edges[0], edges[-1]) == (2040, pytest.approx(5000), pytest.approx(8000))
    np.testing.assert_allclose(np.diff(np.log10(edges)), np.log10(1.6) / 2040, rtol=1e-9)
    matrix = resample.overlap_matrix(np.arange(0.0, 101), np.array([20.5, 21.5, 30.2]))
    assert resample.used_pixels(matrix) == slice(20, 31)
    nothing = resample.overlap_matrix(np.arange(0.0, 11), np.array([20.0, 21]))
    assert resample.used_pixels(nothing) == slice(0, 0)
