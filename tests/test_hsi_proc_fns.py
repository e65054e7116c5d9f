"""Normalisation and patches: where the label sits, and what masked spaxels may not do."""

from utils import DataError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

import hsi_proc_fns as hsi
from recipe import Recipe

MIN_MAX_NORMS = ("global", "spatial", "spectral")


@pytest.fixture
def flux():
    """(6, 7, 50) positive cube whose first row is outside the field."""
    cube = np.random.default_rng(0).uniform(1, 5, (6, 7, 50)).astype("f4")
    cube[0] = np.nan
    return cube


@given(
    ny=st.integers(1, 9),
    nx=st.integers(1, 9),
    patch_size=st.integers(1, 11),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_patch_holds_the_neighbourhood_of_its_central_spaxel_and_zeros_beyond(
    ny, nx, patch_size, seed
):
    rng = np.random.default_rng(seed)
    y, x, cube = rng.integers(ny), rng.integers(nx), rng.random((ny, nx, 3), np.float32)
    patch = hsi.extract_patches(cube, np.array([y]), np.array([x]), patch_size)[0]
    assert patch.shape == (patch_size, patch_size, 3)
    for i, j in np.ndindex(patch_size, patch_size):
        at = y + i - patch_size // 2, x + j - patch_size // 2
        inside = 0 <= at[0] < ny and 0 <= at[1] < nx
        np.testing.assert_array_equal(patch[i, j], cube[at] if inside else 0)
    with pytest.raises(DataError, match="--patch-size 0: expected 1 or more"):
        hsi.extract_patches(cube, np.array([y]), np.array([x]), 0)


@pytest.mark.parametrize("norm", MIN_MAX_NORMS)
def test_masked_spaxels_set_no_minimum_and_no_maximum_and_constants_give_zeros(flux, norm):
    poisoned = flux.copy()
    poisoned[0, :, :30] = 1e9  # 60 % measured: below MIN_MEASURED, so unusable
    np.testing.assert_array_equal(hsi.normalise(poisoned, norm), hsi.normalise(flux, norm))
    for value in (2.0, np.nan):
        out = hsi.normalise(np.full((3, 4, 8), value, "f4"), norm)
        np.testing.assert_array_equal(out, np.zeros((3, 4, 8)))


@pytest.mark.parametrize(("norm", "axes"), [("global", None), ("spatial", 0), ("spectral", 1)])
def test_range_is_zero_to_one_along_the_norms_axis(flux, norm, axes):
    values = hsi.normalise(flux, norm)[1:].reshape(-1, 50)
    np.testing.assert_allclose(values.min(axis=axes), 0, atol=1e-6)
    np.testing.assert_allclose(values.max(axis=axes), 1, atol=1e-6)
    brighter = hsi.normalise(40 * flux, norm)[1:].reshape(-1, 50)
    np.testing.assert_allclose(brighter, values, atol=1e-5)


def stats_of(spectra, k):
    pca = PCA(k, svd_solver="full").fit(spectra)
    variance = pca.explained_variance_, pca.explained_variance_ratio_
    arrays = (np.arange(pca.n_features_in_), pca.mean_, spectra.std(0), pca.components_, *variance)
    return hsi.Stats(*arrays, Recipe("statistics", 0))


def test_pca_norm_equals_sklearns_whitened_transform(flux):
    spectra = hsi.unit_mean(flux[1:].reshape(-1, 50)).astype(float)
    got = hsi.normalise(flux, "PCA", stats_of(spectra, 5))
    expected = PCA(5, whiten=True, svd_solver="full").fit(spectra).transform(spectra)
    np.testing.assert_allclose(got[1:].reshape(-1, 5), expected, atol=2e-4)
    np.testing.assert_array_equal(got[0], 0)


@pytest.mark.parametrize(
    ("norm", "bands", "message"),
    [
        ("PCA", None, "no statistics given.*calc_data_stats"),
        ("PCA", 20, "cube of 50 bands, statistics of 20"),
        ("minmax", None, "'minmax'.*global"),
    ],
)
def test_norms_that_cannot_be_applied_are_refused(flux, norm, bands, message):
    stats = bands and stats_of(np.random.default_rng(0).random((30, bands)), 3)
    with pytest.raises(DataError, match=message):
        hsi.normalise(flux, norm, stats)


def test_gaps_are_bridged_linearly_and_ends_held_and_do_not_spread(flux):
    spectrum = np.array([[np.nan, 1, np.nan, np.nan, 4, np.nan]], "f4")
    np.testing.assert_allclose(hsi.fill_gaps(spectrum), [[1, 1, 2, 3, 4, 4]])
    assert np.isnan(hsi.fill_gaps(np.full((1, 4), np.nan, "f4"))).all()
    gap, others = flux.copy(), np.ones((6, 7), bool)
    gap[3, 3, 20:25], others[3, 3] = np.nan, False
    out = hsi.normalise(gap, "spectral")
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[others], hsi.normalise(flux, "spectral")[others])


def test_usable_needs_enough_bins_and_light(flux):
    flux[2, 2, :11] = np.nan  # 78 % measured
    flux[3, 3, :9] = np.nan  # 82 %
    flux[4, 4] = 0
    expected = np.isfinite(flux).all(axis=2)
    expected[3, 3], expected[4, 4] = True, False
    np.testing.assert_array_equal(hsi.usable_spaxels(flux), expected)


@pytest.mark.parametrize("seed", range(30))
def test_field_is_the_hull_of_what_was_measured(seed):
    """From a spaxel within it, measured ones are seen in every half of the sky."""
    rng = np.random.default_rng(seed)
    inside = rng.random(rng.integers(2, 25, 2)) < rng.choice([0.02, 0.1, 0.7])
    inside[:2, :2] = True  # some area
    wanted = inside.copy()
    for spaxel in np.argwhere(~inside):
        angles = np.sort(np.arctan2(*(np.argwhere(inside) - spaxel).T))
        gaps = np.diff(angles, append=angles[0] + 2 * np.pi)
        wanted[tuple(spaxel)] = gaps.max() < np.pi + 1e-9
    np.testing.assert_array_equal(hsi.field_of_view(inside), wanted)


@pytest.mark.parametrize(
    ("spaxels", "between"),
    [
        ([], []),
        ([(2, 3)], []),
        ([(2, 0), (2, 2)], [(2, 1)]),
        ([(1, 1), (2, 2), (4, 4)], [(3, 3)]),
        ([(1, 3), (4, 3)], [(2, 3), (3, 3)]),
        ([(0, 0), (5, 6)], []),  # no centre lies on that line
    ],
)
def test_a_field_without_area_is_a_line(spaxels, between):
    inside = np.zeros((6, 7), bool)
    for y, x in spaxels:
        inside[y, x] = True
    found = np.argwhere(hsi.field_of_view(inside))
    assert {*map(tuple, found.tolist())} == {*spaxels, *between}
