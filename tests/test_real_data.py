"""Cuts of real files in tests/data, bins of real MAPS, and the summary of what is not tested."""

import os
import subprocess
import sys
from pathlib import Path

from utils import DataError

import numpy as np
import pytest
from astropy.io import fits
from conftest import write_maps
from cut_real_files import BY_LINE, KEPT, LINES, MAPS, MAPS_CUT, PLAIN, SPECTRA, SPECTRA_CUT

import data_io
import fits_utils


def test_cuts_hold_the_numbers_of_the_whole_files(shared_manga):
    with fits.open(shared_manga / MAPS) as whole, fits.open(MAPS_CUT) as cut:
        assert [hdu.name for hdu in cut] == ["PRIMARY", *PLAIN, *BY_LINE]
        free = {"CHECKSUM", "DATASUM", "HISTORY", "NAXIS3"} | {f"C{i:02d}" for i in range(1, 23)}
        for hdu in cut:
            cards, wanted = hdu.header, whole[hdu.name].header
            for key in {*cards, *wanted} - free:
                assert cards[key] == wanted[key], (hdu.name, key)
        for name in PLAIN:
            np.testing.assert_array_equal(cut[name].data, whole[name].data)
        for name in BY_LINE:
            assert list(cut[name].header["C??"].values()) == list(LINES)
            of_whole = list(whole[name].header["C??"].values())
            for line, values in zip(LINES, cut[name].data, strict=True):
                np.testing.assert_array_equal(values, whole[name].data[of_whole.index(line)])
    with fits.open(shared_manga / SPECTRA) as whole, fits.open(SPECTRA_CUT) as cut:
        for hdu in cut[1:]:
            np.testing.assert_array_equal(hdu.data, whole[hdu.name].data[KEPT])


def test_cuts_are_small():
    assert sum(path.stat().st_size for path in MAPS_CUT.parent.iterdir()) < 300_000


@pytest.mark.parametrize(
    ("task", "counts"),
    [("BPT", (671, 671, 490)), ("logOH", (575, 575, 469))],
)
def test_hybrid_binning_fits_lines_by_spaxel_and_stars_by_bin(
    real_maps, tmp_path, caplog, task, counts
):
    caplog.set_level("INFO")
    target = tmp_path / "7815-3702.npy"
    fits_utils.process_map(real_maps, target, task, fits_utils.LabelOptions())
    meta = data_io.read_label_meta(target)
    assert tuple(meta[key] for key in ("n_labelled", "n_bins", "n_stellar_bins")) == counts
    assert meta["bins"] is None
    assert "{} spaxels have a {task} label;".format(*counts, task=task) in caplog.text
    assert "their lines to {1} spectra, their stars to {2} ".format(*counts) in caplog.text
    bins = data_io.read_label_bins(target)
    assert np.unique(bins).size == bins.size


@pytest.fixture(params=["one map", "five maps"])
def voronoi_labels(request, real_maps, tmp_path):
    """Metallicities from the real maps with the mean fluxes of each Voronoi bin, and its ids."""
    source, target = tmp_path / "maps.fits", tmp_path / "7815-3702.npy"
    with fits.open(real_maps) as maps:
        ids = maps["BINID"].data[0].copy()
        for name in ("EMLINE_GFLUX", "EMLINE_GFLUX_IVAR", "EMLINE_GFLUX_MASK"):
            for i in np.unique(ids[ids >= 0]):
                mean = maps[name].data[:, ids == i].mean(axis=1, keepdims=True)
                maps[name].data[:, ids == i] = mean
        maps["BINID"].data[3] = ids
        if request.param == "one map":
            maps["BINID"].data = ids
        maps.writeto(source)
    fits_utils.process_map(source, target, "logOH", fits_utils.LabelOptions())
    return target, ids


def test_spaxels_of_one_voronoi_bin_are_counted_and_known(voronoi_labels):
    target, ids = voronoi_labels
    labels, meta = data_io.read_labels(target), data_io.read_label_meta(target)
    has = np.isfinite(labels)
    assert meta["n_labelled"] == has.sum() > meta["n_bins"] == len(set(ids[has])) > 300
    assert meta["n_stellar_bins"] == meta["n_bins"]
    bins = data_io.read_label_bins(target)
    np.testing.assert_array_equal(bins[has], ids[has])
    assert (bins[~has] < 0).all()
    for i in np.unique(bins[has]):
        assert len(set(labels[bins == i])) == 1


def make_labels(maps, folder, bins=None):
    """Path of BPT classes from MAPS with a BINID of stellar continua and lines."""
    source, target = write_maps(folder / "8485-1901.fits", *maps), folder / "8485-1901.npy"
    if bins is not None:
        with fits.open(source, mode="update") as hdus:
            hdu = fits.ImageHDU(np.asarray(bins, ">i4"), name="BINID")
            hdu.header.update({"C1": "Stellar continua", "C2": "Em. line models"})
            hdus.insert(1, hdu)
    fits_utils.process_map(source, target, "BPT", fits_utils.LabelOptions())
    return target


def test_bins_of_another_size_are_refused_and_none_are_unknown(line_maps, tmp_path):
    with pytest.raises(DataError, match=r"BINID has maps of \(3, 5\) spaxels, expected \(4, 5\)"):
        make_labels(line_maps, tmp_path, np.zeros((2, 3, 5)))
    assert not list(tmp_path.glob("*.npy"))
    target = make_labels(line_maps, tmp_path)
    assert "n_bins" not in data_io.read_label_meta(target)
    assert (data_io.read_label_bins(target) < 0).all()


def test_masked_spaxels_of_a_bin_are_not_listed(line_maps, tmp_path):
    flux, ivar, mask = line_maps
    mask["Ha-6564"][0, :2] = 1 << 30
    stars, lines = np.zeros((4, 5), int), np.arange(20).reshape(4, 5) // 3
    target = make_labels((flux, ivar, mask), tmp_path, [stars, lines])
    meta = data_io.read_label_meta(target)
    assert (meta["n_labelled"], meta["n_bins"], meta["n_stellar_bins"]) == (18, 7, 1)
    assert meta["bins"] == [0, *[i for i in range(1, 6) for _ in range(3)], 6, 6]


SOME_SKIPPED = """
import pytest

@pytest.mark.parametrize("i", range(3))
def test_a(i):
    pytest.skip("no such thing")

@pytest.mark.gpu
def test_b():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "1"])
def test_what_is_not_tested_is_said_in_one_line_per_cause(tmp_path, processes):
    path, here = tmp_path / "test_some.py", Path(__file__).parent
    path.write_text(SOME_SKIPPED)
    settings = here.parent / "pyproject.toml"
    words = ["-p", "conftest", "-c", settings, "-n", processes, "-p", "no:cacheprovider", path]
    env = os.environ | {"PYTHONPATH": str(here), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert "3 tests: no such thing\n1 test: no CUDA device\n=" in done.stdout, done.stdout
    assert "3 skipped" in done.stdout.splitlines()[-1]
