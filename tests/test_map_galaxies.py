"""Maps of galaxies: their content, their place on the sky, and when they are made again."""

import logging

import utils

import mock_cubes
import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from safetensors.torch import load_file, save_file

import data_io
import eval_fns
import map_galaxies
import run_folder
from labels import LABEL_NONE, class_middles, class_names

TEST_GALAXY = mock_cubes.PLATEIFUS[-1]


def map_them(run, root, *plateifus):
    config = map_galaxies.Config(run_dir=run, data_dir=root, plateifu=plateifus, device="cpu")
    return map_galaxies.main(config)


def table_of(run):
    return pd.read_csv(run / "maps" / "galaxies.csv", keep_default_na=False).set_index("plateifu")


def test_map_holds_the_prediction(root, own_run):
    assert map_them(own_run, root, TEST_GALAXY) == 0
    expected = eval_fns.predict_cube(own_run, utils.cube_path(root, TEST_GALAXY))
    usable = expected.classes != LABEL_NONE
    with fits.open(own_run / "maps" / f"{TEST_GALAXY}.fits") as hdus:
        np.testing.assert_array_equal(hdus["CLASS"].data, expected.classes)
        probabilities = hdus["PROBABILITY"].data
        np.testing.assert_array_equal(probabilities, np.moveaxis(expected.probabilities, 2, 0))
        header = hdus[0].header
        values = list(header["VALUE*"].values())
        by_hand = sum(p * v for p, v in zip(probabilities, values, strict=True))
        np.testing.assert_allclose(hdus["LOGOH"].data, by_hand, rtol=1e-6)
        assert np.isnan(hdus["LOGOH"].data[~usable]).all()
    assert (header["PLATEIFU"], header["TASK"], header["PART"]) == (TEST_GALAXY, "logOH", "test")
    assert header["SPAXELS"] == usable.sum() == sum(header["COUNT*"].values())
    assert header["MEDIAN"] == pytest.approx(np.median(by_hand[usable]), rel=1e-6)


def test_map_lies_where_the_galaxy_does(own_run, tmp_path):
    sky = WCS(naxis=2)
    sky.wcs.ctype = "RA---TAN", "DEC--TAN"
    sky.wcs.crval, sky.wcs.crpix, sky.wcs.cdelt = (150.0, 2.0), (4, 5), (-0.5 / 3600, 0.5 / 3600)
    cards = {"wcs_header": sky.to_header().tostring(sep="\n", endcard=False, padding=False)}
    probabilities = np.zeros((7, 8, 6), np.float32)
    probabilities[..., [1, 3]] = 0.25, 0.75
    classes = probabilities.argmax(2).astype(np.int16)
    names, values = class_names("logOH", 6), class_middles(6)
    shown = eval_fns.CubePrediction(
        "1-1", classes, probabilities, names, classes > 0, cards, values
    )
    map_galaxies.write_map(tmp_path / "x.fits", shown, eval_fns.load_model(own_run, "cpu"), {})
    with fits.open(tmp_path / "x.fits") as hdus:
        there = WCS(hdus["LOGOH"].header).pixel_to_world(3, 4)
        assert (there.ra.deg, there.dec.deg) == pytest.approx((150, 2))
        low, high = values[[1, 3]]
        assert hdus["LOGOH"].data[0, 0] == pytest.approx(0.25 * low + 0.75 * high)
        spread = np.sqrt(0.25 * 0.75) * (high - low)  # of a two-valued variable
        assert hdus["LOGOH_SPREAD"].data[0, 0] == pytest.approx(spread, rel=1e-5)


def test_every_cube_is_mapped_once_and_tabulated(root, own_run, caplog):
    caplog.set_level(logging.INFO)
    parts, _ = data_io.read_split(own_run / "split")
    part_of = {p: part for part, table in parts.items() for p in table["plateifu"]}
    assert map_them(own_run, root) == 0
    assert f"{sum(p == 'train' for p in part_of.values())} of these galaxies" in caplog.text
    table = table_of(own_run)
    assert set(table.index) == set(mock_cubes.PLATEIFUS)
    assert table["part"].to_dict() == {p: part_of.get(p, "") for p in table.index}
    assert (table[list(class_names("logOH", 6))].sum(axis=1) == table["spaxels"]).all()
    assert table["median_logoh"].astype(float).between(8.3, 8.7).all()
    assert (table["cube"] == "").all()
    before = {p: p.stat().st_mtime_ns for p in (own_run / "maps").glob("*.fits")}
    caplog.clear()
    assert map_them(own_run, root) == 0
    assert f"{len(before)} up to date" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_bad_cube_stops_no_other_and_the_map_of_one_that_is_gone_is_marked(
    own_data, own_run, caplog
):
    bad, gone, left = mock_cubes.PLATEIFUS[-3:]
    utils.cube_path(own_data, bad).write_bytes(b"no HDF5")
    assert map_them(own_run, own_data, bad, gone, left) == utils.EXIT_DATA
    assert {p.stem for p in (own_run / "maps").glob("*.fits")} == {gone, left}
    failed = pd.read_csv(own_run / "maps" / "failed.csv")
    assert failed["plateifu"].tolist() == [bad]
    assert "not a readable HDF5 file" in failed["reason"][0]
    assert "no longer exist" not in caplog.text
    utils.cube_path(own_data, gone).unlink()
    assert map_them(own_run, own_data, left) == 0
    assert f"1 of the maps ({gone}, ...) are of cubes that no longer exist" in caplog.text
    assert table_of(own_run)["cube"].to_dict() == {gone: "gone", left: ""}


def test_map_of_another_cube_or_model_is_made_again(own_data, own_run):
    made = own_run / "maps" / f"{TEST_GALAXY}.fits"

    def recipe():
        assert map_them(own_run, own_data, TEST_GALAXY) == 0
        return fits.getheader(made)["RECIPE"]

    first = recipe()
    mock_cubes.rebuild_cube(own_data, TEST_GALAXY, "another LOGCUBE")
    second = recipe()
    weights = load_file(own_run / run_folder.WEIGHTS_FILE)
    next(iter(weights.values())).add_(1)
    save_file(weights, own_run / run_folder.WEIGHTS_FILE)
    third = recipe()
    assert len({first, second, third}) == 3
    made.write_bytes(b"")  # not a FITS file any more
    assert recipe() == third
