"""Streaming moments and PCA against numpy and scikit-learn on all spectra at once."""

from dataclasses import replace

import utils
from utils import DataError

import mock_cubes
import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

import calc_data_stats as cs
import cube_patch_processing as patching
import data_io
import pack_cubes

WAVE = np.linspace(5000, 8000, 40)
NAMES = tuple(f"{8000 + i}-1901" for i in range(6))


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


def write_galaxy(root, name, seed, **options):
    """A cube on the grid WAVE; an option `wave_min` moves the grid."""
    rng = np.random.default_rng(seed)
    flux = (5 + rng.normal(size=(6, 6, 40)) * 0.1).astype("f4")
    flux[0] = np.nan
    flux[1, 1, 3] = np.nan
    ivar = np.where(np.isfinite(flux), 100, 0).astype("f4")
    recipe = mock_cubes.cube_recipe(40, f"{name} {seed}", **options)
    wave = WAVE + options.get("wave_min", 5000) - 5000
    data_io.write_cube(utils.cube_path(root, name), data_io.Cube(flux, wave, recipe, ivar))
    return flux


@pytest.fixture
def survey(tmp_path):
    fluxes = {name: write_galaxy(tmp_path, name, i) for i, name in enumerate(NAMES)}
    table = pd.DataFrame({"plateifu": NAMES, "mangaid": [f"1-{i}" for i in range(6)]})
    parts = {"train": table[:4], "val": table[4:5], "test": table[5:]}
    mock_cubes.write_split(tmp_path, "hard", parts)
    return tmp_path, fluxes, parts


@pytest.fixture
def config(survey):
    return cs.Config("hard", data_dir=survey[0], n_components=5)


@pytest.fixture
def root(survey, config):
    """Data folder whose split has statistics."""
    assert cs.main(config) == 0
    return survey[0]


def test_command_uses_the_training_part_only_and_draws(survey, root, config):
    stats = data_io.read_stats(utils.stats_path(root, "hard"))
    rows = [f[1:].reshape(-1, 40).astype(float) for f in list(survey[1].values())[:4]]
    for block in rows:
        block[1, 3] = (block[1, 2] + block[1, 4]) / 2  # the gap, bridged
    stacked = np.concatenate(rows)
    stacked /= np.abs(stacked).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(stats.mean, stacked.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.std, stacked.std(0, ddof=1), rtol=1e-3)
    assert stats.attrs["n_spaxels"] == 4 * 30
    for name in ("stats_components.png", "stats_variance.png"):
        assert (utils.split_path(root, "hard") / name).stat().st_size > 5000
    before = utils.stats_path(root, "hard").stat().st_mtime_ns
    assert cs.main(config) == 0
    assert utils.stats_path(root, "hard").stat().st_mtime_ns == before


def test_noise_alone_is_left_out():
    flux = np.full((3, 3, 40), 1.0, "f4")
    cube = data_io.Cube(flux, WAVE, mock_cubes.cube_recipe(40), np.ones_like(flux))  # S/N 1
    assert len(cs.usable_spectra(cube, 2.0)) == 0
    assert len(cs.usable_spectra(cube, 0.5)) == 9


@pytest.mark.parametrize(
    ("options", "wave_min", "message"),
    [
        ({"n_components": 0}, 5000, "--n-components 0: expected 1 to 40"),
        ({"n_components": 41}, 5000, "--n-components 41: expected 1 to 40"),
        ({"min_snr": 1e6}, 5000, "0 usable spectra in 4 galaxies"),
        ({}, 5001, rf"{NAMES[1]}.h5: made with wave_min=5001 \(that .*5000"),
    ],
)
def test_impossible_statistics_are_refused(config, options, wave_min, message):
    write_galaxy(config.data_dir, NAMES[1], 1, wave_min=wave_min)
    with pytest.raises(DataError, match=message):
        cs.main(replace(config, **options))


def test_statistics_are_not_replaced_unasked(root, config):
    with pytest.raises(DataError, match=r"n_components=5 \(now 3\)"):
        cs.main(replace(config, n_components=3))
    for i, name in enumerate(NAMES):
        write_galaxy(root, name, i, deredden=False)
    with pytest.raises(DataError, match=r"stats\.h5: made with cube\.deredden=True \(now False\)"):
        cs.main(config)
    assert cs.main(replace(config, overwrite=True)) == 0
    made = data_io.read_split_stats(root, "hard").recipe
    assert made.options["cube"]["deredden"] is False


def test_statistics_of_rebuilt_cubes_or_other_galaxies_are_refused(survey, root):
    remedy = r"Re-run calc_data_stats\.py --split-dir hard --overwrite"
    write_galaxy(root, NAMES[5], 99)  # not a training galaxy
    assert data_io.read_split_stats(root, "hard").attrs["n_galaxies"] == 4
    write_galaxy(root, NAMES[0], 99)
    with pytest.raises(DataError, match=rf"made with another set of cubes\. {remedy}"):
        data_io.read_split_stats(root, "hard")
    utils.cube_path(root, NAMES[0]).unlink()
    data_io.read_split_stats(root, "hard")  # a cube that is gone contradicts nothing
    parts = survey[2]
    mock_cubes.write_split(root, "hard", {**parts, "train": parts["val"], "val": parts["train"]})
    with pytest.raises(DataError, match=rf"another list of training galaxies.*\. {remedy}"):
        data_io.read_split_stats(root, "hard")


@pytest.mark.parametrize(("name", "value"), [("wave_min", 4600), ("deredden", False)])
def test_cubes_of_other_options_than_the_statistics_are_refused(root, name, value):
    """As many bands and another range, or another treatment: the components do not fit."""
    stats = data_io.read_stats(utils.stats_path(root, "hard"))
    path, label_path = utils.cube_path(root, NAMES[0]), utils.label_path(root, "logOH", NAMES[0])
    assert pack_cubes.read_normalised(path, "PCA", stats).values.shape[2] == 5
    label_path.parent.mkdir(parents=True)
    np.save(label_path, np.full((6, 6), 8.45, "f4"))
    write_galaxy(root, NAMES[0], 0, **{name: value})
    options = patching.PatchOptions(("PCA",), 3, "hard")
    for function, words in (
        (pack_cubes.read_normalised, (path, "PCA", stats)),
        (patching.patch_galaxy, (root, NAMES[0], "logOH", options, stats)),
    ):
        with pytest.raises(DataError, match=rf"made with {name}={value} .*the statistics: "):
            function(*words)
