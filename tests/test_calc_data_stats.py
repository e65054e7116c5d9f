"""Streaming moments and PCA against numpy and scikit-learn on all spectra at once."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

import calc_data_stats as cs
import cube_patch_processing as patching
import data_fns
import data_io
import utils
from utils import DataError

WAVE = np.linspace(5000, 8000, 40)


@pytest.fixture
def spectra():
    rng = np.random.default_rng(0)
    shapes = rng.normal(size=(4, 40))
    return rng.normal(size=(300, 4)) @ shapes + 0.1 * rng.normal(size=(300, 40)) + 5


def test_moments_do_not_depend_on_how_the_spectra_arrive(spectra):
    for sizes in ([300], [1, 299], [100, 0, 150, 50]):
        moments = cs.Moments(40)
        for block in np.split(spectra, np.cumsum(sizes)[:-1]):
            moments.add(block)
        np.testing.assert_allclose(moments.mean, spectra.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.scatter / 299, np.cov(spectra.T), rtol=1e-9, atol=1e-10)


def test_components_equal_sklearns_pca(spectra):
    moments = cs.Moments(40)
    moments.add(spectra[:120])
    moments.add(spectra[120:])
    components, variance, ratio = cs.principal_components(moments, 6)
    pca = PCA(6, svd_solver="full").fit(spectra)
    np.testing.assert_allclose(variance, pca.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(ratio, pca.explained_variance_ratio_, rtol=1e-9)
    signs = np.sign((components * pca.components_).sum(axis=1))
    np.testing.assert_allclose(components * signs[:, None], pca.components_, atol=1e-7)


def write_galaxy(root, name, seed, wave=WAVE, noise=0.1, **options):
    rng = np.random.default_rng(seed)
    flux = (5 + rng.normal(size=(6, 6, 40)) * noise).astype("f4")
    flux[0] = np.nan
    flux[1, 1, 3] = np.nan
    ivar = np.where(np.isfinite(flux), noise**-2, 0).astype("f4")
    attrs = {"source_sha256": name, "config_json": json.dumps(options)}
    data_io.write_cube(utils.cube_path(root, name), data_io.Cube(flux, wave, ivar, attrs=attrs))
    return flux


@pytest.fixture
def survey(tmp_path):
    names = [f"{8000 + i}-1901" for i in range(6)]
    fluxes = {n: write_galaxy(tmp_path, n, i) for i, n in enumerate(names)}
    table = pd.DataFrame({"plateifu": names, "mangaid": [f"1-{i}" for i in range(6)]})
    parts = {"train": table[:4], "val": table[4:5], "test": table[5:]}
    data_io.write_split(utils.split_path(tmp_path, "hard"), parts, {"kind": "hard"})
    return tmp_path, fluxes


def test_command_uses_the_training_part_only_and_draws(survey):
    root, fluxes = survey
    config = cs.Config("hard", root, n_components=5)
    assert cs.main(config) == 0
    stats = data_io.read_stats(utils.stats_path(root, "hard"))
    rows = [f[1:].reshape(-1, 40).astype(float) for f in list(fluxes.values())[:4]]
    for block in rows:
        block[1, 3] = (block[1, 2] + block[1, 4]) / 2  # the gap, bridged
    stacked = np.concatenate(rows)
    stacked /= np.abs(stacked).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(stats.mean, stacked.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.std, stacked.std(0, ddof=1), rtol=1e-3)
    assert stats.attrs["n_spaxels"] == 4 * 30
    folder = utils.split_path(root, "hard")
    for name in ("stats_components.png", "stats_variance.png"):
        assert (folder / name).stat().st_size > 5000
    assert cs.main(config) == 0
    with pytest.raises(DataError, match="another n_components"):
        cs.main(cs.Config("hard", root, n_components=3))


def test_noise_alone_is_left_out():
    flux = np.full((3, 3, 40), 1.0, "f4")
    cube = data_io.Cube(flux, WAVE, np.full_like(flux, 1.0))  # S/N 1
    assert len(cs.usable_spectra(cube, 2.0)) == 0
    assert len(cs.usable_spectra(cube, 0.5)) == 9


def test_other_wavelength_grid_is_refused(survey):
    root, _ = survey
    write_galaxy(root, "8001-1901", 1, wave=WAVE + 1)
    with pytest.raises(DataError, match=r"8001-1901\.h5: 40 bands of .* on one grid"):
        cs.main(cs.Config("hard", root, n_components=5))


def test_statistics_of_cubes_since_made_anew_are_refused(survey):
    root, _ = survey
    config = cs.Config("hard", root, n_components=5)
    cs.main(config)
    for i in range(6):
        write_galaxy(root, f"{8000 + i}-1901", i, deredden=False)
    with pytest.raises(DataError, match=r"stats\.h5: exists, made with another cubes"):
        cs.main(config)
    assert cs.main(replace(config, overwrite=True)) == 0
    assert data_io.read_stats(utils.stats_path(root, "hard")).kind.deredden is False


@pytest.mark.parametrize("n_components", [0, 41])
def test_impossible_numbers_of_components_are_refused(survey, n_components):
    with pytest.raises(DataError, match="choose 1 to 40"):
        cs.main(cs.Config("hard", survey[0], n_components=n_components))


def test_cubes_of_another_kind_than_the_statistics_are_refused(survey):
    """As many bands and another range, or another treatment: the components do not fit."""
    root, _ = survey
    cs.main(cs.Config("hard", root, n_components=5))
    stats = data_io.read_stats(utils.stats_path(root, "hard"))
    path = utils.cube_path(root, "8000-1901")
    spec = data_fns.PatchSpec("logOH", patch_norm="PCA")
    assert data_fns.load_normed(path, spec, stats).values.shape[2] == 5
    labels = np.full((6, 6), 8.45, "f4")
    data_io.write_labels(utils.label_path(root, "logOH", "8000-1901"), labels, labels, {})
    options = patching.PatchOptions(("PCA",), 3, "hard")
    write_galaxy(root, "8000-1901", 0, wave=WAVE - 400)
    for work in (
        lambda: data_fns.load_normed(path, spec, stats),
        lambda: patching.patch_galaxy(root, "8000-1901", "logOH", options),
    ):
        with pytest.raises(DataError, match=r"40 bands of 4600.*the statistics have"):
            work()


def test_too_few_spectra_are_refused(survey):
    root, _ = survey
    with pytest.raises(DataError, match="0 usable spectra in 4 galaxies"):
        cs.main(cs.Config("hard", root, n_components=5, min_snr=1e6))
