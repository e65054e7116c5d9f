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
    matrix = resample.overlap_matrix(source, target)
    none = np.zeros(flux.shape, bool)
    got, _, good = resample.resample_spectra(flux, ivar, none, matrix, np.diff(target))
    for i in range(3):
        expected = np.diff(integral_at(source, flux[:, i], target)) / np.diff(target)
        np.testing.assert_allclose(got[i], expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(good, 1, atol=1e-3)


def test_variance_agrees_with_spectres():
    source = resample.log_edges(3.69, 1e-4, 1500)
    wave, target = resample.target_grid(5000, 6500, 700)
    flux, ivar = random_spectra(1500, 1, 3)
    matrix = resample.overlap_matrix(source, target)
    got, got_ivar, _ = resample.resample_spectra(
        flux, ivar, np.zeros(flux.shape, bool), matrix, np.diff(target)
    )
    # spectres places edges half-way between centres, so give it centres of our edges' grid
    centres = (source[:-1] + source[1:]) / 2
    wanted = (target[:-1] + target[1:]) / 2
    f, e = spectres.spectres(wanted[5:-5], centres, flux[:, 0], 1 / np.sqrt(ivar[:, 0]))
    np.testing.assert_allclose(got[0, 5:-5], f, atol=5e-4)
    np.testing.assert_allclose(1 / np.sqrt(got_ivar[0, 5:-5]), e, rtol=2e-3)
    assert wave.size == 700


def test_bad_pixels_leave_no_trace():
    source, target = np.arange(0.0, 101), np.arange(0.0, 100.5, 2.5)
    flux, ivar = random_spectra(100, 1, 0)
    bad = np.zeros((100, 1), bool)
    bad[[10, 11, 12, 50]] = True
    matrix, widths = resample.overlap_matrix(source, target), np.diff(target)
    clean = resample.resample_spectra(flux, ivar, bad, matrix, widths)
    for poison in (1e30, np.nan, -np.inf):
        spoilt, spoilt_ivar = flux.copy(), ivar.copy()
        spoilt[bad], spoilt_ivar[bad] = poison, poison
        with np.errstate(invalid="ignore"):
            got = resample.resample_spectra(spoilt, spoilt_ivar, bad, matrix, widths)
        for a, b in zip(got, clean, strict=True):
            np.testing.assert_array_equal(a, b)


def test_bin_with_bad_half_is_mean_of_good_half():
    matrix = resample.overlap_matrix(np.array([0.0, 1, 2]), np.array([0.0, 2]))
    flux, ivar = np.array([[3.0], [99.0]]), np.array([[4.0], [1.0]])
    bad = np.array([[False], [True]])
    got, got_ivar, good = resample.resample_spectra(flux, ivar, bad, matrix, np.array([2.0]))
    assert (got[0, 0], got_ivar[0, 0], good[0, 0]) == (3, 4, 0.5)


def test_bins_beyond_the_edge_are_missing_not_zero_with_zero_error():
    matrix = resample.overlap_matrix(np.arange(10.0, 20), np.arange(5.0, 30))
    flux, ivar = np.ones((9, 1)), np.ones((9, 1))
    got, got_ivar, good = resample.resample_spectra(
        flux, ivar, np.zeros((9, 1), bool), matrix, np.ones(24)
    )
    inside = (np.arange(5, 29) >= 10) & (np.arange(5, 29) < 19)
    np.testing.assert_array_equal(np.isfinite(got[0]), inside)
    np.testing.assert_array_equal(got_ivar[0], inside.astype(float))
    np.testing.assert_array_equal(good[0], inside.astype(float))


def test_variance_of_two_equal_pixels_in_one_bin_halves():
    matrix = resample.overlap_matrix(np.array([0.0, 1, 2]), np.array([0.0, 2]))
    _, ivar, _ = resample.resample_spectra(
        np.ones((2, 1)), np.full((2, 1), 5.0), np.zeros((2, 1), bool), matrix, np.array([2.0])
    )
    assert ivar[0, 0] == pytest.approx(10)


def test_factor_scales_flux_and_inverse_variance():
    source, target = np.arange(0.0, 51), np.arange(0.0, 50, 1.5)
    flux, ivar = random_spectra(50, 2, 1)
    matrix, widths, none = resample.overlap_matrix(source, target), np.diff(target), flux < -99
    plain = resample.resample_spectra(flux, ivar, none, matrix, widths)
    scaled = resample.resample_spectra(flux, ivar, none, matrix, widths, 4.0)
    np.testing.assert_allclose(scaled[0], 4 * plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[1], plain[1] / 16, rtol=1e-6)


def test_own_redshifts_equal_one_common_redshift():
    source = resample.log_edges(3.69, 1e-4, 1500)
    _, target = resample.target_grid(5000, 6500, 700)
    flux, ivar = random_spectra(1500, 2, 5)
    bad = np.random.default_rng(0).random(flux.shape) < 0.02
    z = np.array([0.01, 0.03])
    each = resample.resample_shifted(flux, ivar, bad, source, target, 1 + z)
    for i in range(2):
        matrix = resample.overlap_matrix(source / (1 + z[i]), target)
        column = slice(i, i + 1)
        one = resample.resample_spectra(
            flux[:, column], ivar[:, column], bad[:, column], matrix, np.diff(target), 1 + z[i]
        )
        for a, b in zip(each, one, strict=True):
            np.testing.assert_array_equal(a[i], b[0])


def test_used_pixels_are_those_with_weight():
    matrix = resample.overlap_matrix(np.arange(0.0, 101), np.array([20.5, 21.5, 30.2]))
    assert resample.used_pixels(matrix) == slice(20, 31)
    nothing = resample.overlap_matrix(np.arange(0.0, 11), np.array([20.0, 21]))
    assert resample.used_pixels(nothing) == slice(0, 0)
