"""Maps of galaxies: their content, their place on the sky, and when they are made again."""

import logging
import warnings
from dataclasses import replace

import utils
from utils import DataError

import mock_cubes
import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from conftest import train

import data_io
import inference
import map_galaxies
import process_single_cube
import run_folder
from labels import LABEL_NONE, SF, class_middles, class_names

TEST_GALAXY = mock_cubes.PLATEIFUS[-1]


def map_them(run, root, *plateifus):
    config = map_galaxies.Config(run_dir=run, data_dir=root, plateifu=plateifus, device="cpu")
    return map_galaxies.main(config)


def table_of(run):
    return pd.read_csv(run / "maps" / "galaxies.csv", keep_default_na=False).set_index("plateifu")


def sky_of(ra: float = 150, dec: float = 2) -> WCS:
    sky = WCS(naxis=2)
    sky.wcs.ctype = "RA---TAN", "DEC--TAN"
    sky.wcs.crval, sky.wcs.crpix, sky.wcs.cdelt = (ra, dec), (4, 5), (-0.5 / 3600, 0.5 / 3600)
    return sky


@pytest.fixture
def own_map(own_run, tmp_path):
    """Function that writes a 7 x 8 map for metallicities; returns its path and the prediction."""

    def write(bpt=None, part="", gap=True):
        header = sky_of().to_header().tostring(sep="\n", endcard=False, padding=False)
        probabilities = np.zeros((7, 8, 6), np.float32)
        probabilities[..., [1, 3]] = 0.25, 0.75
        classes, inside = probabilities.argmax(2).astype(np.int16), np.ones((7, 8), bool)
        if gap:
            inside[0], classes[:2], probabilities[:2] = False, LABEL_NONE, np.nan
        names, values = list(class_names("logOH", 6)), class_middles(6)
        logoh = (probabilities @ values).astype(np.float32)
        ends = logoh - np.float32(0.02), logoh + np.float32(0.02)
        attrs, unlike = {"wcs_header": header}, np.zeros((7, 8), bool)
        unlike[6, 7] = True
        shown = inference.CubePrediction(
            "1-1", classes, probabilities, names, inside, attrs, values, part, logoh, *ends, unlike
        )
        model = inference.load_model(own_run, "cpu")
        map_galaxies.write_map(tmp_path / "x.fits", shown, model, {}, bpt)
        return tmp_path / "x.fits", shown

    return write


def bpt_labels(root, plateifu):
    return data_io.read_labels(utils.label_path(root, "BPT", plateifu))


def test_map_holds_the_prediction(root, own_run):
    assert map_them(own_run, root, TEST_GALAXY) == 0
    expected = inference.predict_cube(own_run, utils.cube_path(root, TEST_GALAXY))
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
    trusted = usable & (bpt_labels(root, TEST_GALAXY) == SF)
    assert header["TRUSTED"] == trusted.sum() < usable.sum()
    assert header["MEDTRUST"] == pytest.approx(np.median(by_hand[trusted]), rel=1e-6)
    assert table_of(own_run)["trusted"].tolist() == [trusted.sum()]


def test_every_plane_lies_where_the_galaxy_does(own_map):
    path, shown = own_map(gap=False)
    low, high = shown.class_values[[1, 3]]
    y, x = np.indices((7, 8)).reshape(2, -1)
    there = sky_of().pixel_to_world_values(x, y)
    with fits.open(path) as hdus:
        assert hdus["LOGOH"].data[0, 0] == pytest.approx(0.25 * low + 0.75 * high)
        for hdu in hdus[1:]:
            wcs = WCS(hdu.header)
            assert wcs.naxis == hdu.header["NAXIS"]
            for k in range(6 if wcs.naxis == 3 else 1):
                channel = (np.full(x.size, k),) * (wcs.naxis - 2)
                world = wcs.pixel_to_world_values(x, y, *channel)
                np.testing.assert_allclose(world[:2], there, rtol=0, atol=1e-9)
                np.testing.assert_array_equal(world[2:], channel)  # the world's is the class
                back = wcs.world_to_pixel_values(*world)
                np.testing.assert_allclose(back, (x, y, *channel), atol=1e-6)


def test_map_is_a_standard_file_that_describes_itself(own_map):
    path, _ = own_map()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(path, checksum=True) as hdus:
            hdus.verify("exception")
            ends = ["LOGOH_LOWER", "LOGOH_UPPER"]
            names = ["CLASS", "PROBABILITY", "LOGOH", *ends, "MASK"]
            assert [hdu.name for hdu in hdus[1:]] == names
            for hdu in hdus:
                assert hdu.verify_checksum() == hdu.verify_datasum() == 1  # 2: has none
                assert not {"EPOCH", "BLOCKED"} & {*hdu.header}  # words that FITS deprecates
            cards = hdus[0].header
            assert all(cards[k] for k in ("ORIGIN", "CREATOR", "DATE", "PLATEIFU"))
            for hdu in hdus[1:]:
                header, is_cube = hdu.header, hdu.name == "PROBABILITY"
                kind = "QUALITY" if hdu.name == "MASK" else "DATA"
                assert header["HDUCLAS1"] == ("CUBE" if is_cube else "IMAGE")
                assert (header["HDUCLASS"], header["HDUCLAS2"]) == ("SDSS", kind)
                assert header["QUALDATA" if kind == "DATA" else "SCIDATA"] in hdus
                assert header.get("BUNIT", "") == ("dex" if "LOGOH" in hdu.name else "")
            cube = hdus["PROBABILITY"].header
            assert (cube["CTYPE3"], cube["CUNIT3"]) == ("CLASS", "")
            channels = [cube[f"C{k}"] for k in range(1, cube["NAXIS3"] + 1)]
            assert channels == list(cards["CLASS*"].values()) == list(class_names("logOH", 6))


def test_damaged_map_is_noticed_by_its_checksum(own_map):
    path, _ = own_map()
    whole = bytearray(path.read_bytes())
    with fits.open(path) as hdus:
        whole[hdus.fileinfo("LOGOH")["datLoc"] + 300] ^= 1
    path.write_bytes(whole)
    with (
        pytest.warns(UserWarning, match="Datasum verification failed"),
        pytest.warns(UserWarning, match="Checksum verification failed"),
        fits.open(path, checksum=True) as hdus,
    ):
        assert [hdu.verify_datasum() for hdu in hdus] == [1, 1, 1, 0, 1, 1, 1]


def test_damaged_map_is_left_out_of_the_table_and_made_again(root, own_run, caplog):
    other = mock_cubes.PLATEIFUS[0]
    assert map_them(own_run, root, TEST_GALAXY, other) == 0
    path = own_run / "maps" / f"{TEST_GALAXY}.fits"
    sound, table = path.read_bytes(), table_of(own_run)
    at = sound.index(b"MEDTRUST") + 20
    path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    assert map_them(own_run, root, other) == 0
    assert table_of(own_run).index.tolist() == [other]
    assert f"{TEST_GALAXY}.fits: the CHECKSUM of a header differs" in caplog.text
    assert map_them(own_run, root, TEST_GALAXY) == 0
    pd.testing.assert_frame_equal(table_of(own_run), table)


@pytest.mark.parametrize("part", ["train", "test"])
def test_mask_bits_are_those_that_its_header_names(own_map, part):
    bpt = np.zeros((7, 8), np.int16)
    bpt[3], bpt[4], bpt[5] = 1, 2, LABEL_NONE
    with fits.open(own_map(bpt, part)[0]) as hdus:
        mask, header, primary = hdus["MASK"].data, hdus["MASK"].header, hdus[0].header
    bit = {header[card]: 1 << int(card[4:]) for card in header["FLAG*"]}
    assert all(header.comments[card] for card in header["FLAG*"])
    expected = np.zeros((7, 8), np.int32)
    expected[0], expected[1] = bit["NOSPEC"], bit["FEWBINS"]
    expected[3], expected[4], expected[5] = bit["NOTSF"], bit["NOTSF"], bit["NOBPT"]
    expected += bit["TRAINED"] if part == "train" else 0
    expected[6, 7] += bit["UNLIKE"]
    np.testing.assert_array_equal(mask, expected)
    trusted = (mask & header["DISTRUST"]) == 0
    np.testing.assert_array_equal(np.flatnonzero(trusted[:, :7].all(axis=1)), [2, 6])
    assert primary["TRUSTED"] == trusted.sum() == 15


def test_without_bpt_labels_no_metallicity_is_trusted(own_data, own_run, caplog):
    def trusted():
        assert map_them(own_run, own_data, TEST_GALAXY) == 0
        row = table_of(own_run).loc[TEST_GALAXY]
        return row["trusted"], row["median_logoh"]

    usable = inference.predict_cube(own_run, utils.cube_path(own_data, TEST_GALAXY)).usable
    expected = (usable & (bpt_labels(own_data, TEST_GALAXY) == SF)).sum()
    count, median = trusted()
    assert (count, float(median) > 8.3) == (expected, True)
    assert "do not trust" not in caplog.text
    utils.label_path(own_data, "BPT", TEST_GALAXY).unlink()
    count, median = trusted()  # made again, since the labels are gone
    assert (count, median) == (0, "")
    assert f"1 of the maps ({TEST_GALAXY}) have no spaxel that a BPT" in caplog.text


def test_bpt_labels_of_another_shape_are_refused(own_data, own_run):
    labels = bpt_labels(own_data, TEST_GALAXY)
    mock_cubes.write_labels(own_data, "BPT", TEST_GALAXY, labels[:-1])
    assert map_them(own_run, own_data, TEST_GALAXY) == utils.EXIT_DATA
    assert "label map of (10, 12)" in pd.read_csv(own_run / "maps" / "failed.csv")["reason"][0]


def test_bpt_map_needs_no_bpt_labels(own_data, tmp_path, caplog):
    run = train(own_data, tmp_path / "bpt", label_task="BPT", epochs=1)
    utils.label_path(own_data, "BPT", TEST_GALAXY).unlink()
    assert map_them(run, own_data, TEST_GALAXY) == 0
    with fits.open(run / "maps" / f"{TEST_GALAXY}.fits") as hdus:
        names, header, mask = [hdu.name for hdu in hdus], hdus[0].header, hdus["MASK"]
        assert names == ["PRIMARY", "CLASS", "PROBABILITY", "MASK"]
        usable = hdus["CLASS"].data != LABEL_NONE
        np.testing.assert_array_equal((mask.data & mask.header["DISTRUST"]) == 0, usable)
        assert header["TRUSTED"] == header["SPAXELS"] == usable.sum()
        assert "MEDTRUST" not in header
    assert "do not trust" not in caplog.text
    assert "trusted" not in table_of(run)


def test_probabilities_open_in_specutils_and_ndcube(own_map):
    """A class axis is no spectral one: specutils reads it as plain numbers, ndcube with the sky."""
    specutils = pytest.importorskip("specutils", reason="pip install specutils==2.4.0")
    import ndcube  # comes with it
    from astropy import units as u

    path, shown = own_map()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(path) as hdus:
            flux, header = hdus["PROBABILITY"].data.astype(float), hdus["PROBABILITY"].header
        unit = u.Unit(header["BUNIT"])
        cube = ndcube.NDCube(flux, wcs=WCS(header), unit=unit)
        channels = np.arange(len(flux)) * u.pix
        spectrum = specutils.Spectrum(flux * unit, spectral_axis=channels, spectral_axis_index=0)
    np.testing.assert_allclose(spectrum[:, 3, 4].flux, shown.probabilities[3, 4])
    sky = cube[3].wcs.pixel_to_world(3, 4)
    assert (sky.ra.deg, sky.dec.deg) == pytest.approx((150, 2))


def test_every_cube_is_mapped_once_and_tabulated(root, own_run, caplog):
    caplog.set_level(logging.INFO)
    parts, _ = data_io.read_split(own_run / "split")
    part_of = {p: part for part, table in parts.items() for p in table["plateifu"]}
    assert map_them(own_run, root) == 0
    assert f"{sum(p == 'train' for p in part_of.values())} of the maps" in caplog.text
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
    assert "expected an HDF5 file" in failed["reason"][0]
    assert "(any more)" not in caplog.text
    utils.cube_path(own_data, gone).unlink()
    assert map_them(own_run, own_data, left) == 0
    assert f"1 of the maps ({gone}) are of cubes that are not in" in caplog.text
    assert table_of(own_run)["cube"].to_dict() == {gone: "gone", left: ""}
    assert f"Results: {own_run / 'maps' / left}.fits" in caplog.text
    assert map_them(own_run, own_data, gone) == utils.EXIT_DATA
    assert map_them(own_run, own_data) == utils.EXIT_DATA
    failed = pd.read_csv(own_run / "maps" / "failed.csv")
    assert failed["plateifu"].tolist() == [bad]  # no longer the one that is gone


def test_options_against_those_of_the_run_to_be_processed_for_are_refused(own_run):
    config = process_single_cube.Config(like_run=own_run)
    same = process_single_cube.vetted(config)
    assert same.n_band == mock_cubes.N_BAND
    assert process_single_cube.vetted(replace(config, n_band=same.n_band)) == same
    with pytest.raises(DataError, match=rf"--n-band: 7, but --like-run {own_run} .*{same.n_band}"):
        process_single_cube.vetted(replace(config, n_band=7))


def test_map_of_another_cube_or_model_is_made_again(own_data, own_run):
    made = own_run / "maps" / f"{TEST_GALAXY}.fits"

    def recipe():
        assert map_them(own_run, own_data, TEST_GALAXY) == 0
        return fits.getheader(made)["RECIPE"]

    first = recipe()
    mock_cubes.rebuild_cube(own_data, TEST_GALAXY, "another LOGCUBE")
    second = recipe()
    weights, about = run_folder.read_tensors(own_run / run_folder.WEIGHTS_FILE)
    next(iter(weights.values())).add_(1)
    run_folder.write_tensors(own_run / run_folder.WEIGHTS_FILE, weights, about)
    third = recipe()
    assert len({first, second, third}) == 3
    made.write_bytes(b"")  # not a FITS file any more
    assert recipe() == third
