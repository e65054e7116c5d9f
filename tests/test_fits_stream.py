"""The FITS reader: plain and gzipped files, checksums, damaged files, how far it reads."""

import gzip
import os
from pathlib import Path

from utils import DataError

import numpy as np
import pytest
from astropy.io import fits
from conftest import write_logcube

import fits_utils
from fits_stream import _Checksum, iterate_hdus, read_hdus

NEEDED = ("FLUX", "IVAR", "MASK", "REDCORR")
"""HDUs that processing a LOGCUBE reads."""


@pytest.fixture
def logcube(tmp_path, plain_arrays):
    return write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)


def gzipped(path):
    out = path.with_name(path.name + ".gz")
    out.write_bytes(gzip.compress(path.read_bytes(), 1))
    return out


def zeros_in(path):
    content = bytearray(path.read_bytes())
    content[5000:6000] = bytes(1000)
    path.write_bytes(content)


def test_plain_and_gzipped_files_give_what_astropy_reads(logcube):
    plain, zipped = read_hdus(logcube, NEEDED), read_hdus(gzipped(logcube), NEEDED)
    with fits.open(logcube) as hdus:
        for name in NEEDED:
            np.testing.assert_array_equal(plain[name].data, hdus[name].data)
            np.testing.assert_array_equal(zipped[name].data, hdus[name].data)
            assert plain[name].data.dtype.isnative
            assert plain[name].header["EXTNAME"] == name


def test_planes_are_cut_from_arrays_of_three_axes_only(logcube):
    whole = read_hdus(logcube, NEEDED)
    part = dict(iterate_hdus(logcube, NEEDED, slice(1000, 2000)))
    np.testing.assert_array_equal(part["FLUX"].data, whole["FLUX"].data[1000:2000])
    np.testing.assert_array_equal(part["REDCORR"].data, whole["REDCORR"].data)
    with pytest.raises(DataError, match=r"no HDU NOTHING; it holds PRIMARY, FLUX, .*MODEL"):
        read_hdus(logcube, ("FLUX", "NOTHING"))


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        (gzipped, Path.unlink, "no such file"),
        (Path, lambda path: path.write_bytes(b""), "zero bytes"),
        (gzipped, lambda path: os.truncate(path, path.stat().st_size // 2), "cut short"),
        (gzipped, zeros_in, "damaged"),
        (Path, lambda path: os.truncate(path, 400_000), "cut short inside IVAR"),
        (Path, lambda path: path.write_bytes(b"this is a text file" * 1000), "not a FITS file"),
    ],
)
def test_damaged_file_is_reported_in_one_line_and_nothing_is_written(
    tmp_path, logcube, kind, damage, message
):
    bad, target = kind(logcube), tmp_path / "out" / "8485-1901.h5"
    damage(bad)
    for read, words in (
        (read_hdus, (bad, NEEDED)),
        (fits_utils.process_cube, (bad, target, fits_utils.CubeOptions(remove_gas_velocity=False))),
    ):
        with pytest.raises(DataError, match=message) as error:
            read(*words)
        assert str(bad) in str(error.value)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/*"))


def flip(path, position, bit):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["FLUX", "IVAR", "MASK"])
def test_a_flipped_bit_is_noticed_wherever_it_is(logcube, name):
    with fits.open(logcube) as hdus:
        hdus.writeto(logcube, overwrite=True, checksum=True)
    with fits.open(logcube) as hdus:
        info, size = hdus[name].fileinfo(), hdus[name].data.nbytes

    def read():
        return dict(iterate_hdus(logcube, NEEDED, slice(1500, 3500)))

    good = read()[name].data
    damages = [(info["hdrLoc"], "no header where one should be")]
    damages += [  # before, among and after the planes that are kept
        (info["datLoc"] + int(part * size), f"{name} is damaged.*Fetch it again")
        for part in (0.01, 0.5, 0.99)
    ]
    for position, message in damages:
        flip(logcube, position, 3)
        with pytest.raises(DataError, match=message):
            read()
        flip(logcube, position, 3)
    np.testing.assert_array_equal(read()[name].data, good)


@pytest.mark.parametrize("n_bytes", [1, 2, 3, 4, 5, 4000, 262_147])
@pytest.mark.parametrize("step", [1, 3, 4, 1000])
def test_checksum_is_that_of_astropy(n_bytes, step):
    rng = np.random.default_rng(n_bytes)
    content = rng.integers(200, 256, n_bytes, np.uint8)  # large values: the sum overflows
    hdu = fits.ImageHDU(content)
    hdu.add_datasum()
    checksum, step = _Checksum(), step if n_bytes < 9999 else 99_999
    for start in range(0, n_bytes, step):
        checksum.add(content[start : start + step].tobytes())
    checksum.check(hdu.header, Path("x"), "X")
    hdu.header["DATASUM"] = str(int(hdu.header["DATASUM"]) ^ 1)
    with pytest.raises(DataError, match="damaged"):
        checksum.check(hdu.header, Path("x"), "X")


def test_reader_stops_after_the_last_wanted_hdu(logcube):
    noise = np.random.default_rng(0).random((1000, 1000))
    fits.append(logcube, noise, fits.Header({"EXTNAME": "LATER"}))  # many read-ahead blocks
    path = gzipped(logcube)
    path.write_bytes(path.read_bytes()[:-2000])  # damaged behind the wanted HDUs
    assert set(read_hdus(path, ("FLUX", "REDCORR"))) == {"FLUX", "REDCORR"}
