"""Streaming moments and PCA against numpy and scikit-learn on all spectra at once."""

from dataclasses import replace

import utils
from utils import DataError

import mock_cubes
import numpy as np
import pytest
from mock_cubes import rebuild_cube
from sklearn.decomposition import PCA

import calc_data_stats as cs
import cube_patch_processing as patching
import data_io
import pack_cubes

TRAIN, TEST = mock_cubes.PLATEIFUS[:4], mock_cubes.PLATEIFUS[6:]


@pytest.fixture
def spectra():
    rng = np.random.default_rng(0)
    shapes = rng.normal(size=(4, 40))
    return rng.normal(size=(300, 4)) @ shapes + 0.1 * rng.normal(size=(300, 40)) + 5


@pytest.mark.parametrize("sizes", [(300,), (1, 299), (100, 0, 150, 50)])
def test_moments_do_not_depend_on_how_the_spectra_arrive(spectra, sizes):
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


@pytest.fixture
def config(own_data):
    """Options that the statistics of the hard split were computed with."""
    return cs.Config("hard", data_dir=own_data, n_components=6, min_snr=0)


def stats_of(root):
    return data_io.read_split_stats(root, "hard")


def test_command_uses_the_training_part_only_and_draws(own_data, config):
    path = utils.stats_path(own_data, "hard")
    path.unlink()
    assert cs.main(config) == 0
    flux = [data_io.read_cube(utils.cube_path(own_data, name)).flux for name in TRAIN]
    rows = np.stack(flux).reshape(-1, mock_cubes.N_BAND).astype(float)
    rows = rows[np.isfinite(rows).mean(axis=1) > 0.8]
    gap = np.isnan(rows[:, 5])  # of three bins, bridged
    rows[gap, 5:8] = np.linspace(rows[gap, 4], rows[gap, 8], 5, axis=1)[:, 1:4]
    rows /= np.abs(rows).mean(axis=1, keepdims=True)
    stats = stats_of(own_data)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.std, rows.std(0, ddof=1), rtol=1e-3)
    assert stats.attrs["n_spaxels"] == len(rows) == 4 * (11 * 12 - 7)
    for name in ("stats_components.png", "stats_variance.png"):
        assert (path.parent / name).stat().st_size > 5000
    before = path.stat().st_mtime_ns
    assert cs.main(config) == 0
    assert path.stat().st_mtime_ns == before


def test_noise_alone_is_left_out():
    flux = np.full((3, 3, 40), 1.0, "f4")
    wave, recipe = mock_cubes.wave_grid(), mock_cubes.cube_recipe()
    cube = data_io.Cube(flux, wave, recipe, np.ones_like(flux))  # S/N 1
    assert len(cs.usable_spectra(cube, 2.0)) == 0
    assert len(cs.usable_spectra(cube, 0.5)) == 9


@pytest.mark.parametrize(
    ("options", "wave_min", "message"),
    [
        ({"n_components": 0}, 5000, "--n-components 0: expected 1 to 40"),
        ({"n_components": 41}, 5000, "--n-components 41: expected 1 to 40"),
        ({"min_snr": 1e6}, 5000, "0 usable spectra in 4 galaxies"),
        ({}, 5001, rf"{TRAIN[1]}.h5: made with wave_min=5001 \(that .*5000"),
    ],
)
def test_impossible_statistics_are_refused(config, options, wave_min, message):
    rebuild_cube(config.data_dir, TRAIN[1], wave_min=wave_min)
    with pytest.raises(DataError, match=message):
        cs.main(replace(config, overwrite=True, **options))


def test_statistics_are_not_replaced_unasked(own_data, config):
    with pytest.raises(DataError, match=r"n_components=6 \(now 3\)"):
        cs.main(replace(config, n_components=3))
    for name in TRAIN:
        rebuild_cube(own_data, name, deredden=False)
    with pytest.raises(DataError, match=r"stats\.h5: made with cube\.deredden=True \(now False\)"):
        cs.main(config)
    assert cs.main(replace(config, overwrite=True)) == 0
    assert stats_of(own_data).recipe.options["cube"]["deredden"] is False


def test_statistics_of_rebuilt_cubes_or_other_galaxies_are_refused(own_data):
    remedy = r"Re-run calc_data_stats\.py --split-dir hard --overwrite"
    rebuild_cube(own_data, TEST[0], "another LOGCUBE")  # not a training galaxy
    assert stats_of(own_data).attrs["n_galaxies"] == 4
    rebuild_cube(own_data, TRAIN[0], "another LOGCUBE")
    with pytest.raises(DataError, match=rf"made with another set of cubes\. {remedy}"):
        stats_of(own_data)
    utils.cube_path(own_data, TRAIN[0]).unlink()
    stats_of(own_data)  # a cube that is gone contradicts nothing
    parts = data_io.read_split(utils.split_path(own_data, "hard"))[0]
    parts["train"], parts["val"] = parts["val"], parts["train"]
    mock_cubes.write_split(own_data, "hard", parts)
    with pytest.raises(DataError, match=rf"another list of training galaxies.*\. {remedy}"):
        stats_of(own_data)


@pytest.mark.parametrize(("name", "value"), [("wave_min", 4600), ("deredden", False)])
def test_cubes_of_other_options_than_the_statistics_are_refused(own_data, name, value):
    """As many bands and another range, or another treatment: the components do not fit."""
    stats, path = stats_of(own_data), utils.cube_path(own_data, TRAIN[0])
    assert pack_cubes.read_normalised(path, "PCA", stats).values.shape[2] == 6
    rebuild_cube(own_data, TRAIN[0], **{name: value})
    options = patching.PatchOptions(("PCA",), 3, "hard")
    for function, words in (
        (pack_cubes.read_normalised, (path, "PCA", stats)),
        (patching.patch_galaxy, (own_data, TRAIN[0], "logOH", options, stats)),
    ):
        with pytest.raises(DataError, match=rf"made with {name}={value} .*the statistics: "):
            function(*words)
