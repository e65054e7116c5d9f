"""Cubes and label maps from FITS: exactness on real spectra, bad input, provenance, resuming."""

import hashlib
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import utils
from utils import DataError

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from conftest import LINES, N_WAVE, write_logcube, write_maps
from cut_real_files import SPECTRA_CUT
from PIL import Image
from scipy.stats import norm

import archive_files
import data_io
import fits_utils as fu
from archive_files import C_KMS, catalogue_row
from labels import CLASS_COLOURS

EDGES = 10 ** (3.5589 + 1e-4 * (np.arange(N_WAVE + 1) - 0.5))
CENTRES = np.sqrt(EDGES[:-1] * EDGES[1:])
TARGET = np.geomspace(5000, 8000, 2041)
OPTIONS = fu.CubeOptions(remove_gas_velocity=False)
FIT_BITS = 0b1111100000
"""Bits of the LOGCUBE's mask about the fit of the spectrum, not its flux."""


GRID = 10 ** (3.5589 + 1e-4 * np.arange(N_WAVE))


def factor_of(value):
    """REDCORR of ones, but for one value that is used."""
    return np.where(np.arange(N_WAVE) == 2000, value, 1.0)


def exact_mean(edges, flux, good, bins):
    """Mean flux over the good part of each bin (NaN without one), and the good fraction.

    By running integrals: an independent way to the result of `resample`.
    """
    widths = np.diff(edges) * good
    running = [
        np.concatenate([[0], np.cumsum(v)]) for v in (np.where(good, flux, 0) * widths, widths)
    ]
    total, covered = (np.diff(np.interp(bins, edges, r)) for r in running)
    covered[covered < 1e-6 * np.diff(bins)] = 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / covered, covered / np.diff(bins)


def process(path, tmp_path, options=OPTIONS, **kwargs):
    target = tmp_path / "out" / "8485-1901.h5"
    word = fu.process_cube(path, target, options, **kwargs)
    return word, data_io.read_cube(target) if target.exists() else None


def test_real_spectra_come_out_as_exact_step_integrals(tmp_path):
    with fits.open(SPECTRA_CUT) as hdus:
        flux, ivar = (hdus[n].data[[0, 1, 2, 0]].astype("f4") for n in ("FLUX", "IVAR"))
        bad, redshifts = hdus["MASK"].data[[0, 1, 2, 0]] > 0, hdus["Z"].data
    assert bad.sum(axis=1).tolist() == [6, 7, 1, 6]
    bad[3] = True  # the first one again, masked throughout
    n = len(flux)
    ivar = np.where(ivar > 0, ivar, 1)  # so that the mask alone says which pixels are bad
    poisoned = np.where(bad, 1e20, flux)
    mask = np.where(bad, 1 << 2, 1 << 7)  # FLUXINVALID; FITIGNORED does not concern the flux

    def shaped(a):
        return a.T.reshape(N_WAVE, n, 1)

    z = float(redshifts[0])
    path = write_logcube(
        tmp_path / "8485-1901.fits", shaped(poisoned), shaped(ivar), shaped(mask),
        SCINPVEL=z * C_KMS,
    )  # fmt: skip
    _, cube = process(path, tmp_path)
    for i in range(n):
        wanted, good = exact_mean(EDGES / (1 + z), flux[i].astype(float) * (1 + z), ~bad[i], TARGET)
        got = cube.flux[i, 0]
        if bad[i].all():
            assert np.isnan(got).all()
            continue
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(wanted))
        ok = np.isfinite(wanted)
        # 1e-6 of the flux in the bin; of the typical flux where positive and negative pixels cancel
        scale = np.abs(wanted[ok]) + 1e-3 * np.abs(flux[i][~bad[i]]).mean()
        assert (np.abs(got[ok] - wanted[ok]) / scale).max() < 1e-6
        np.testing.assert_allclose(cube.good_fraction[i, 0], good, atol=1e-3)
    assert np.nanmax(np.abs(cube.flux)) < 1e4
    assert np.isfinite(cube.ivar).all()
    assert (cube.ivar[np.isnan(cube.flux)] == 0).all()


def test_integral_of_a_line_survives_the_redshift(tmp_path):
    z, flux_in = 0.1, 12.0
    line = flux_in * norm.pdf(CENTRES, 6564.6 * (1 + z), 4)
    flux = np.broadcast_to(line[:, None, None], (N_WAVE, 2, 2))
    ones = np.ones_like(flux)
    path = write_logcube(tmp_path / "8485-1901.fits", flux, ones, 0 * ones, SCINPVEL=z * C_KMS)
    _, cube = process(path, tmp_path)
    integral = (cube.flux[0, 0] * np.diff(TARGET)).sum()
    assert integral == pytest.approx(flux_in, rel=1e-4)
    assert cube.wave[cube.flux[0, 0].argmax()] == pytest.approx(6564.6, abs=1)


def test_reddening_is_undone_in_flux_and_error(tmp_path, plain_arrays):
    red = np.linspace(1.4, 1.1, N_WAVE)
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, redcorr=red)
    _, cube = process(path, tmp_path)
    _, dusty = process(path, tmp_path, replace(OPTIONS, deredden=False), overwrite=True)
    factor = np.broadcast_to(np.interp(cube.wave * 1.03, CENTRES, red), cube.flux.shape)
    np.testing.assert_allclose(cube.flux / dusty.flux, factor, rtol=1e-4)
    np.testing.assert_allclose(dusty.ivar / cube.ivar, factor**2, rtol=1e-4)
    assert dusty.recipe.options["deredden"] is False


def test_bad_pixels_of_every_kind_contribute_nothing_and_bits_of_the_fit_mask_none(
    tmp_path, plain_arrays
):
    flux, ivar, mask = plain_arrays
    path = write_logcube(tmp_path / "a-8485-1901.fits", flux, ivar, mask + FIT_BITS)
    _, clean = process(path, tmp_path)
    assert np.isfinite(clean.flux).all()
    flux, ivar, mask = flux.copy(), ivar.copy(), mask.copy()
    bad = (np.nan, 1, 0), (np.inf, 1, 0), (1e30, 0, 0), (1e30, np.inf, 0), (1e30, 1, 1 << 4)
    at = slice(2100, 2105), 1, 1
    flux[at], ivar[at], mask[at] = np.transpose(bad)
    path = write_logcube(tmp_path / "b-8485-1901.fits", flux, ivar, mask)
    _, cube = process(path, tmp_path, overwrite=True)
    others = np.ones((4, 5), bool)
    others[1, 1] = False
    np.testing.assert_array_equal(cube.flux[others], clean.flux[others])
    touched = cube.good_fraction[1, 1] < 1
    assert 5 <= touched.sum() <= 7
    np.testing.assert_array_equal(cube.flux[1, 1][~touched], clean.flux[1, 1][~touched])
    assert np.isfinite(cube.ivar).all()
    assert np.nanmax(cube.flux) < 2


def test_drp_cube_gives_the_same_as_a_dap_cube(tmp_path, plain_arrays):
    flux, ivar, mask = plain_arrays
    dap = write_logcube(tmp_path / "a" / "8485-1901.fits", flux, ivar, mask)
    _, expected = process(dap, tmp_path / "a", replace(OPTIONS, deredden=False))
    mask = mask.astype("i4")
    mask[2100:2110, 0, 0] = 1 << 10
    mask[2200:2210, 0, 0] = 1 << 1  # LOWCOV alone does not exclude a pixel
    primary = fits.PrimaryHDU()
    primary.header.update(PLATEIFU="8485-1901", MANGAID="1-2", EBVGAL=0.1, DRP3QUAL=0)
    primary.header["MASKNAME"] = "MANGA_DRP3PIXMASK"  # the archive's DRP cubes have it here only
    wave = 10 ** (3.5589 + 1e-4 * np.arange(N_WAVE))
    arrays = {"FLUX": flux, "IVAR": ivar, "MASK": mask, "WAVE": wave}
    path = tmp_path / "8485-1901.fits"
    fits.HDUList([primary, *(fits.ImageHDU(a, name=n) for n, a in arrays.items())]).writeto(path)
    with pytest.raises(DataError, match="no redshift"):
        process(path, tmp_path)
    _, cube = process(path, tmp_path, replace(OPTIONS, deredden=False), redshift=0.03)
    others = np.ones((4, 5), bool)
    others[0, 0] = False
    np.testing.assert_array_equal(cube.flux[others], expected.flux[others])
    assert 9 <= np.isnan(cube.flux[0, 0]).sum() <= 10
    _, clean = process(path, tmp_path, redshift=0.03, overwrite=True)
    ratio = np.nanmean(clean.flux / cube.flux, axis=(0, 1))
    # A(5500 A) = R_V E(B-V) to a few per cent, whatever the law
    at = np.abs(clean.wave * 1.03 - 5500).argmin()
    assert ratio[at] == pytest.approx(10 ** (0.4 * 3.1 * 0.1), rel=0.02)


def test_gas_velocity_is_removed_spaxel_by_spaxel(tmp_path):
    z, velocity = 0.03, np.array([[-200.0, 0.0], [150.0, 300.0]])
    at = 6564.6 * (1 + z) * (1 + velocity / C_KMS)
    flux = np.exp(-0.5 * ((CENTRES[:, None, None] - at) / 3) ** 2)
    ones = np.ones_like(flux)
    path = write_logcube(tmp_path / "8485-1901.fits", flux, ones, 0 * ones)
    mask = np.zeros((1, 2, 2), "i4")
    mask[0, 0, 1] = 1 << 30
    gvel = fits.ImageHDU(np.where(mask == 0, velocity, -999.0), name="EMLINE_GVEL")
    gvel.header["C1"] = "Ha-6564"
    hdus = fits.HDUList([fits.PrimaryHDU(), gvel, fits.ImageHDU(mask, name="EMLINE_GVEL_MASK")])
    hdus.writeto(maps := tmp_path / "manga-8485-1901-MAPS-X.fits")
    shifted = replace(OPTIONS, remove_gas_velocity=True)
    _, cube = process(path, tmp_path, shifted, maps=maps)
    peaks = (cube.flux * cube.wave).sum(axis=2) / cube.flux.sum(axis=2)
    np.testing.assert_allclose(peaks, 6564.6, atol=0.05)
    with pytest.raises(DataError, match="expected one with its gas velocities"):
        process(path, tmp_path, shifted, overwrite=True)


@pytest.mark.parametrize("kms", [-3000.0, 3000.0])
def test_gas_velocity_widens_the_range_of_pixels_read(tmp_path, monkeypatch, kms):
    """Pixels that only a shifted spaxel needs are read as well: every bin is complete."""
    ones = np.ones((N_WAVE, 1, 2))
    path = write_logcube(tmp_path / "8485-1901.fits", ones, ones, 0 * ones)
    stretch = np.array([[1.0, 1 + kms / C_KMS]])
    monkeypatch.setattr(archive_files, "gas_stretch", lambda *_: stretch)
    for z in np.linspace(0.02, 0.04, 30):
        options = replace(OPTIONS, remove_gas_velocity=True)
        _, cube = process(path, tmp_path, options, redshift=z, overwrite=True)
        assert cube.good_fraction.min() == 1


def test_cube_of_any_name_records_its_source(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, VERSDRP3="v3_1_1")
    assert fu.process_cube(path, tmp_path / "cube.h5", OPTIONS) == "written"
    head = data_io.read_cube_head(tmp_path / "cube.h5")
    expected = {"plateifu": "8485-1901", "mangaid": "1-209232", "drp_version": "v3_1_1"}
    assert expected.items() <= head.attrs.items()
    assert head.attrs["redshift"] == pytest.approx(0.03)
    assert head.recipe.inputs == {"LOGCUBE": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert not head.attrs["critical"]


def test_existing_cube_is_kept_refused_or_replaced(tmp_path, plain_arrays, monkeypatch):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    assert process(path, tmp_path)[0] == "written"
    real, read = utils.file_digest, []
    with monkeypatch.context() as patch:
        patch.setattr(utils, "file_digest", lambda p: read.append(p) or real(p))
        assert process(path, tmp_path)[0] == "up to date"
        assert read == []  # an untouched source is not read again
        os.utime(path, (1, 1))  # a copy, say
        assert process(path, tmp_path)[0] == "up to date"
        assert read == [path]
    other = replace(OPTIONS, n_band=100)
    with pytest.raises(DataError, match=r"made with n_band=2040 \(now 100\)\. Replace"):
        process(path, tmp_path, other)
    assert process(path, tmp_path, other, overwrite=True)[1].wave.size == 100
    write_logcube(path, *plain_arrays, EBVGAL=0.3)
    with pytest.raises(DataError, match="made with another LOGCUBE"):
        process(path, tmp_path, other)
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(DataError, match=r"8485-1901\.fits: cut short inside IVAR"):
        process(path, tmp_path, other)


@pytest.mark.parametrize(
    ("spoil", "extra", "message"),
    [
        (lambda f, v, m: (f, v[:, :3], m), {}, r"IVAR has shape \(4563, 3, 5\)"),
        (lambda f, v, m: (f[:100], v[:100], m[:100]), {}, "FLUX has shape"),
        (lambda f, v, m: (f, v, m + 1), {}, r"every pixel .* is masked"),
        (None, {"wave": np.linspace(3621.6, 10353.8, N_WAVE)}, "wrong wavelengths in WAVE"),
        (None, {"wave": np.where(np.arange(N_WAVE) == 9, np.nan, GRID)}, "wrong wavelengths in W"),
        (None, {"wave": GRID[::-1]}, "wrong wavelengths in WAVE"),
        (None, {"redcorr": factor_of(np.nan)}, r"REDCORR, .* from nan .* expected positive"),
        (None, {"redcorr": factor_of(0)}, "from 0 to 1, expected positive"),
        (None, {"redcorr": factor_of(-1)}, "from -1 to 1, expected positive"),
        (None, {"redcorr": factor_of(np.inf)}, "from 1 to inf, expected positive"),
        (None, {"redcorr": np.ones(99)}, r"REDCORR has shape \(99,\) .* \(4563,\)"),
        (None, {"SCINPVEL": "x"}, "not readable .*expected the header of a LOGCUBE"),
        (lambda f, v, m: (f[:, 0], v[:, 0], m[:, 0]), {}, r"FLUX has shape \(4563, 5\)"),
        (None, {"drop": ("IVAR",)}, r"no HDU IVAR; it holds PRIMARY, .*MODEL"),
        (None, {"drop": ("REDCORR",)}, r"no HDU REDCORR; it holds PRIMARY, .*MODEL"),
        (None, {"PLATEIFU": "7443-12703"}, "a file of galaxy 7443-12703, expected 8485-1901"),
        (None, {"SCINPVEL": None}, "redshift"),
        (None, {"SCINPVEL": -9999.0 * C_KMS}, "redshift"),
        (None, {"SCINPVEL": 4 * C_KMS}, "redshift"),
    ],
)
def test_unusable_cube_is_refused(tmp_path, plain_arrays, spoil, extra, message):
    arrays = spoil(*plain_arrays) if spoil else plain_arrays
    path = write_logcube(tmp_path / "8485-1901.fits", *arrays, **extra)
    with pytest.raises(DataError, match=message):
        process(path, tmp_path)


def change(path, act):
    """Change a FITS file in memory, and write it again."""
    with fits.open(path, mode="update") as hdus:
        act(hdus)
    return path


def scaled(hdus):
    hdus["FLUX"].header["BSCALE"] = 2.0


def float_mask(hdus):
    hdus["MASK"] = fits.ImageHDU(hdus["MASK"].data.astype("f4"), name="MASK")


def huge(hdus):
    hdus["FLUX"].header.update({"NAXIS2": 40_000, "NAXIS1": 40_000})


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (float_mask, "MASK has shape .* of float32, expected .* of integers"),
        (lambda hdus: hdus["WAVE"].header.set("NAXIS1", 10**9), "WAVE: .*array of at most 512 MB"),
        (huge, "FLUX: .*array of at most 512 MB"),
        (scaled, "scaled values"),
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(
    tmp_path, plain_arrays, act, message
):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    with fits.open(path, disable_image_compression=True, do_not_scale_image_data=True) as hdus:
        headers = [(hdu.fileinfo()["hdrLoc"], hdu.header.copy()) for hdu in hdus]
        act(hdus)
        changed = [hdu.header for hdu in hdus]
        if act is float_mask:
            hdus.writeto(path, overwrite=True)
    if act is not float_mask:  # astropy would write what is right
        content = bytearray(path.read_bytes())
        for (start, old), new in zip(headers, changed, strict=True):
            text = new.tostring().encode()
            assert len(text) == len(old.tostring())
            content[start : start + len(text)] = text
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        process(path, tmp_path)


def test_critical_cube_is_recorded_and_can_be_skipped(tmp_path, plain_arrays, caplog):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, DRP3QUAL=1 << 30)
    assert process(path, tmp_path, skip_critical=True) == ("skipped: CRITICAL", None)
    word, cube = process(path, tmp_path)
    assert (word, bool(cube.attrs["critical"])) == ("written", True)
    assert "DRP3QUAL says CRITICAL" in caplog.text
    assert process(path, tmp_path)[0] == "up to date"
    assert process(path, tmp_path, skip_critical=True)[0] == "skipped: CRITICAL"


def write_catalogue(path, *rows):
    Table(rows=rows, names=("plateifu", "mangaid", "nsa_z", "z")).write(path)
    return path


@pytest.mark.filterwarnings("ignore:::astropy")  # it warns of truncated files, too
def test_redshift_from_the_catalogue(tmp_path, plain_arrays):
    rows = ("8485-1901", "1-7", 0.05, 0.06), ("8485-1902", "1-8", -9999.0, 0.07)
    catalogue = write_catalogue(tmp_path / "drpall.fits", *rows, ("1-100", "1-9", -9999.0, -9999.0))
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, SCINPVEL=None, MANGAID=None)
    _, cube = process(path, tmp_path, catalogue=catalogue)
    assert (cube.attrs["redshift"], cube.attrs["mangaid"]) == (0.05, "1-7")
    assert catalogue_row(catalogue, "8485-1902")["redshift"] == 0.07
    assert process(path, tmp_path, catalogue=catalogue)[0] == "up to date"
    other = write_catalogue(tmp_path / "other.fits", ("8485-1901", "1-7", 0.03, 0.06))
    with pytest.raises(DataError, match="made with another catalogue"):
        process(path, tmp_path, catalogue=other)
    path = write_logcube(tmp_path / "7-100.fits", *plain_arrays, SCINPVEL=None, PLATEIFU="7000-100")
    with pytest.raises(DataError, match="no galaxy 7000-100 in the catalogue"):
        fu.process_cube(path, tmp_path / "7000-100.h5", OPTIONS, catalogue=catalogue)
    for n_bytes in (5800, 100, 0):
        os.truncate(catalogue, n_bytes)
        with pytest.raises(DataError, match=r"drpall\.fits: .* Fetch it"):
            catalogue_row(catalogue, "8485-1901")


@pytest.mark.parametrize(
    ("given", "cards", "said"),
    [
        (0.0349, {}, ""),
        (0.036, {}, r"--redshift 0\.036 differs from the 0\.0300 of its header \(SCINPVEL\)"),
        (0.036, {"SCINPVEL": -9999 * C_KMS}, ""),  # unknown
        (0.0549, {"SCINPVEL": None}, ""),
        (0.03, {"SCINPVEL": None}, r"--redshift 0\.03 differs from the 0\.0500 of .*drpall\.fits"),
        (0.03, {"SCINPVEL": None, "PLATEIFU": "7000-1901"}, ""),  # not in the catalogue
    ],
)
def test_redshift_far_from_the_surveys_is_used_with_a_warning(
    tmp_path, plain_arrays, caplog, given, cards, said
):
    catalogue = write_catalogue(tmp_path / "drpall.fits", ("8485-1901", "1-7", 0.05, 0.06))
    path = write_logcube(tmp_path / "cube.fits", *plain_arrays, **cards)
    target = tmp_path / f"{cards.get('PLATEIFU', '8485-1901')}.h5"
    fu.process_cube(path, target, OPTIONS, given, catalogue=catalogue)
    assert data_io.read_cube_head(target).attrs["redshift"] == given
    assert bool(caplog.text) == bool(said)
    assert re.search(said, caplog.text)


def test_real_maps_give_the_known_bpt_map(real_maps, tmp_path):
    target = tmp_path / "7815-3702.npy"
    assert fu.process_map(real_maps, target, "BPT", fu.LabelOptions()) == "written"
    labels, p_wrong = data_io.read_labels(target), data_io.read_label_error(target)
    assert np.bincount(labels[labels >= 0], minlength=3).tolist() == [575, 96, 0]
    assert np.isfinite(p_wrong).sum() == 671
    assert 0 < p_wrong[labels >= 0].mean() < 0.5
    with Image.open(target.with_suffix(".png")) as picture:
        colours = {c for _, c in picture.convert("RGB").getcolors(1 << 20)}
    assert {tuple(bytes.fromhex(c[1:])) for c in CLASS_COLOURS["BPT", 3]} <= colours
    meta = data_io.read_label_meta(target)
    assert meta["counts"] == {"star-forming": 575, "composite": 96, "AGN": 0}
    assert meta["mangaid"] == "1-113540"


@pytest.mark.parametrize("diagnostic", ["O3N2-M13", "N2-M13", "O3N2-PP04", "N2O2-KD02"])
def test_real_maps_give_metallicities(real_maps, tmp_path, diagnostic):
    target = tmp_path / "7815-3702.npy"
    fu.process_map(real_maps, target, "logOH", fu.LabelOptions(diagnostic=diagnostic))
    labels, error = data_io.read_labels(target), data_io.read_label_error(target)
    has = np.isfinite(labels)
    assert 300 < has.sum() <= 575
    assert 8.2 < np.median(labels[has]) < 9.2
    assert (error[has] > 0).all()
    assert (np.isfinite(error) == has).all()
    if diagnostic == "O3N2-M13":  # the equation, spelled out on the archive's own arrays
        with fits.open(real_maps) as hdus:
            names = list(hdus["EMLINE_GFLUX"].header["C??"].values())
            y, x = np.argwhere(has)[100]
            f = dict(zip(names, hdus["EMLINE_GFLUX"].data[:, y, x].astype(float), strict=True))
        o3n2 = np.log10(f["OIII-5008"] / f["Hb-4862"] / (f["NII-6585"] / f["Ha-6564"]))
        assert labels[y, x] == pytest.approx(8.533 - 0.214 * o3n2, abs=1e-4)


@pytest.fixture
def make_labels(tmp_path, line_maps):
    """Function that makes the label map 8485-1901.npy from MAPS."""
    source = write_maps(tmp_path / "raw" / "manga-8485-1901-MAPS-X.fits", *line_maps)

    def make(task="BPT", overwrite=False, **options):
        chosen = fu.LabelOptions(**options)
        return fu.process_map(source, tmp_path / "8485-1901.npy", task, chosen, overwrite=overwrite)

    return make


@pytest.mark.parametrize(
    ("given", "diagnostic", "message"),
    [
        ({"lines": LINES[2:]}, "N2O2-KD02", r"no channel OII-3727, OII-3729; it contains Hb-4862"),
        ({"PLATEIFU": "7443-12703"}, "O3N2-M13", "a file of galaxy 7443-12703, expected 8485-1901"),
    ],
)
def test_maps_without_a_line_or_of_another_galaxy_are_refused(
    tmp_path, line_maps, given, diagnostic, message
):
    path = write_maps(tmp_path / "manga-MAPS-X.fits", *line_maps, **given)
    options = fu.LabelOptions(diagnostic=diagnostic)
    with pytest.raises(DataError, match=message):
        fu.process_map(path, tmp_path / "8485-1901.npy", "logOH", options)
    assert list(tmp_path.iterdir()) == [path]


def renamed(**cards):
    return lambda hdus: [hdu.header.update(cards) for hdu in hdus[1:]]


def flat(name):
    def act(hdus):
        hdus[name].data = hdus[name].data[0]

    return act


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (renamed(C01="Ha-6564"), "channels .*C1 Ha-6564.*, expected one name each for 6 channels"),
        (renamed(C07="SII-6718"), "C7 SII-6718, expected one name each for 6"),
        (flat("EMLINE_GFLUX"), r"EMLINE_GFLUX has shape \(4, 5\)"),
        (flat("EMLINE_GFLUX_MASK"), r"EMLINE_GFLUX_MASK has shape \(4, 5\)"),
    ],
)
def test_maps_with_wrong_channels_or_axes_are_refused(tmp_path, line_maps, act, message):
    path = change(write_maps(tmp_path / "manga-MAPS-X.fits", *line_maps), act)
    with pytest.raises(DataError, match=message):
        fu.process_map(path, tmp_path / "8485-1901.npy", "BPT", fu.LabelOptions())
    assert list(tmp_path.iterdir()) == [path]


def test_maps_of_another_size_than_the_cube_are_refused(tmp_path, plain_arrays, line_maps):
    """4 x 5 spaxels each; then a cube of 3 x 5, and velocities of one axis too few."""
    flux, ivar, mask = plain_arrays
    maps = write_maps(tmp_path / "raw/manga-8485-1901-MAPS-X.fits", *line_maps)
    cube = tmp_path / "processed/cubes/8485/8485-1901.h5"
    target = tmp_path / "processed/labels/BPT/8485-1901.npy"
    for n, message in ((4, None), (3, r"maps of \(4, 5\) spaxels, expected \(3, 5\) as in")):
        path = write_logcube(tmp_path / "8485-1901.fits", flux[:, :n], ivar[:, :n], mask[:, :n])
        fu.process_cube(path, cube, OPTIONS, overwrite=True)
        with pytest.raises(DataError, match=message) if message else nullcontext():
            fu.process_map(maps, target, "BPT", fu.LabelOptions(), overwrite=True, cube=cube)
    velocities = np.zeros((6, 4, 5), "f4")
    with fits.open(maps, mode="append") as hdus:
        cards = fits.Header({f"C{i:02d}": line for i, line in enumerate(LINES, 1)})
        hdus.append(fits.ImageHDU(velocities[0], cards, name="EMLINE_GVEL"))
        hdus.append(fits.ImageHDU(velocities.astype("i4"), name="EMLINE_GVEL_MASK"))
    shifted = replace(OPTIONS, remove_gas_velocity=True)
    with pytest.raises(DataError, match=r"EMLINE_GVEL has shape \(4, 5\)"):
        fu.process_cube(path, cube, shifted, maps=maps, overwrite=True)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("8485-1901.json", Path.unlink, r"8485-1901\.json beside it is missing"),
        ("8485-1901.png", Path.unlink, r"8485-1901\.png beside it is missing"),
        ("8485-1901_err.npy", Path.unlink, r"8485-1901_err\.npy beside it is missing"),
        ("8485-1901.npy", lambda path: os.truncate(path, 100), r"8485-1901\.npy: not readable"),
        ("8485-1901.npy", lambda path: np.save(path, np.load(path) + 1), "its values are not th"),
        ("8485-1901.npy", None, r"made with min_snr=5\.0 \(now 3\.0\)"),
    ],
)
def test_labels_are_kept_if_they_are_whole_and_made_alike(
    tmp_path, make_labels, name, damage, message
):
    options = {} if damage else {"min_snr": 5.0}
    assert make_labels(**options) == "written"
    assert make_labels(**options) == "up to date"
    if damage:
        damage(tmp_path / name)
    with pytest.raises(DataError, match=f"{message}.*--overwrite"):
        make_labels()
    assert make_labels(overwrite=True) == "written"


def test_line_channels_are_found_by_name(tmp_path, line_maps):
    found = []
    for name, lines in (("X", LINES), ("Y", LINES[::-1])):
        path = write_maps(tmp_path / f"8485-1901-{name}.fits", *line_maps, lines=lines)
        fu.process_map(path, path.with_suffix(".npy"), "logOH", fu.LabelOptions())
        found.append(data_io.read_labels(path.with_suffix(".npy")))
    np.testing.assert_array_equal(*found)
