"""Cubes and label maps from FITS: exactness on real spectra, bad input, provenance, resuming."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from conftest import LINES, N_WAVE, write_logcube, write_maps
from PIL import Image

import data_io
import fits_stream
import fits_utils as fu
import label_picture
import resample
import utils
from labels import CLASS_COLOURS, LABEL_NONE, label_classes
from utils import DataError

EDGES = 10 ** (3.5589 + 1e-4 * (np.arange(N_WAVE + 1) - 0.5))
TARGET = np.geomspace(5000, 8000, 2041)
OPTIONS = fu.CubeOptions()


def exact_mean(edges, flux, good, bins):
    """Mean over the good part of each bin, through running integrals; nan where there is none."""
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


def test_real_spectra_come_out_as_exact_step_integrals(shared_manga, tmp_path):
    with fits.open(shared_manga / "mangadap_MaNGA_test_spectra.fits.gz") as hdus:
        flux, ivar = (hdus[n].data.astype("f4") for n in ("FLUX", "IVAR"))
        bad, redshifts = hdus["MASK"].data > 0, hdus["Z"].data
    assert bad.any(axis=1).sum() >= 6, "the real spectra are expected to have masked pixels"
    assert bad.all(axis=1).any(), "one of them is masked throughout"
    n = len(flux)
    ivar = np.where(ivar > 0, ivar, 1)  # masked pixels only by their mask here
    poisoned = np.where(bad, 1e20, flux)
    mask = np.where(bad, 1 << 2, 1 << 7)  # FLUXINVALID; FITIGNORED alone is no verdict

    def shaped(a):
        return a.T.reshape(N_WAVE, n, 1)

    z = float(redshifts[0])
    path = write_logcube(
        tmp_path / "8485-1901.fits", shaped(poisoned), shaped(ivar), shaped(mask),
        SCINPVEL=z * fu.C_KMS,
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
        # 1e-6 of the flux in the bin; where neighbours nearly cancel, of their size
        scale = np.abs(wanted[ok]) + 1e-3 * np.abs(flux[i][~bad[i]]).mean()
        assert (np.abs(got[ok] - wanted[ok]) / scale).max() < 1e-6
        np.testing.assert_allclose(cube.good_fraction[i, 0], good, atol=1e-3)
    assert np.nanmax(np.abs(cube.flux)) < 1e4
    assert np.isfinite(cube.ivar).all()
    assert (cube.ivar[np.isnan(cube.flux)] == 0).all()


def test_integral_of_a_line_survives_the_redshift(tmp_path):
    z, flux_in = 0.1, 12.0
    centres = np.sqrt(EDGES[:-1] * EDGES[1:])
    line = (
        flux_in * np.exp(-0.5 * ((centres - 6564.6 * (1 + z)) / 4) ** 2) / (4 * np.sqrt(2 * np.pi))
    )
    flux = np.broadcast_to(line[:, None, None], (N_WAVE, 2, 2))
    ones = np.ones_like(flux)
    path = write_logcube(tmp_path / "8485-1901.fits", flux, ones, 0 * ones, SCINPVEL=z * fu.C_KMS)
    _, cube = process(path, tmp_path)
    integral = (cube.flux[0, 0] * np.diff(TARGET)).sum()
    assert integral == pytest.approx(flux_in, rel=1e-4)
    assert cube.wave[cube.flux[0, 0].argmax()] == pytest.approx(6564.6, abs=1)


def test_reddening_is_undone_in_flux_and_error(tmp_path, plain_arrays):
    red = np.linspace(1.4, 1.1, N_WAVE)
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, redcorr=red)
    _, cube = process(path, tmp_path)
    _, dusty = process(path, tmp_path, replace(OPTIONS, deredden=False), overwrite=True)
    factor = np.interp(cube.wave * 1.03, np.sqrt(EDGES[:-1] * EDGES[1:]), red)
    np.testing.assert_allclose(
        cube.flux / dusty.flux, np.broadcast_to(factor, cube.flux.shape), rtol=1e-4
    )
    np.testing.assert_allclose(
        dusty.ivar / cube.ivar, np.broadcast_to(factor**2, cube.flux.shape), rtol=1e-4
    )
    assert json.loads(dusty.attrs["config_json"])["deredden"] is False


def test_bad_pixels_of_every_sort_contribute_nothing(tmp_path, plain_arrays):
    flux, ivar, mask = plain_arrays
    _, clean = process(write_logcube(tmp_path / "a-8485-1901.fits", *plain_arrays), tmp_path)
    flux, ivar, mask = flux.copy(), ivar.copy(), mask.copy()
    at = 2100, 2101, 2102, 2103, 2104
    for i, (f, v, m) in enumerate(
        [(np.nan, 1, 0), (np.inf, 1, 0), (1e30, 0, 0), (1e30, np.inf, 0), (1e30, 1, 1 << 4)]
    ):
        flux[at[i], 1, 1], ivar[at[i], 1, 1], mask[at[i], 1, 1] = f, v, m
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


def test_fit_bits_do_not_mask_flux(tmp_path, plain_arrays):
    flux, ivar, mask = plain_arrays
    path = write_logcube(tmp_path / "8485-1901.fits", flux, ivar, mask + 0b1111100000)
    _, cube = process(path, tmp_path)
    assert np.isfinite(cube.flux).all()


def test_drp_cube_reads_alike(tmp_path, plain_arrays):
    flux, ivar, mask = plain_arrays
    dap = write_logcube(tmp_path / "a" / "8485-1901.fits", flux, ivar, mask)
    _, expected = process(dap, tmp_path / "a", replace(OPTIONS, deredden=False))
    mask = mask.astype("i4")
    mask[2100:2110, 0, 0] = 1 << 10
    mask[2200:2210, 0, 0] = 1 << 1  # LOWCOV alone is a note
    primary = fits.PrimaryHDU()
    primary.header.update(PLATEIFU="8485-1901", MANGAID="1-2", EBVGAL=0.1, DRP3QUAL=0)
    primary.header["MASKNAME"] = "MANGA_DRP3PIXMASK"  # as in the archive's: not in MASK's header
    wave = 10 ** (3.5589 + 1e-4 * np.arange(N_WAVE))
    hdus = fits.HDUList(
        [
            primary,
            fits.ImageHDU(flux, name="FLUX"),
            fits.ImageHDU(ivar, name="IVAR"),
            fits.ImageHDU(mask, name="MASK"),
            fits.ImageHDU(wave, name="WAVE"),
        ]
    )
    hdus.writeto(tmp_path / "8485-1901.fits")
    path = tmp_path / "8485-1901.fits"
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
    z = 0.03
    velocity = np.array([[-200.0, 0.0], [150.0, 300.0]])
    centres = np.sqrt(EDGES[:-1] * EDGES[1:])
    at = 6564.6 * (1 + z) * (1 + velocity / fu.C_KMS)
    flux = np.exp(-0.5 * ((centres[:, None, None] - at) / 3) ** 2)
    ones = np.ones_like(flux)
    path = write_logcube(tmp_path / "8485-1901.fits", flux, ones, 0 * ones)
    maps = tmp_path / "manga-8485-1901-MAPS-X.fits"
    mask = np.zeros((1, 2, 2), "i4")
    mask[0, 0, 1] = 1 << 30
    gvel = fits.ImageHDU(np.where(mask == 0, velocity, -999.0), name="EMLINE_GVEL")
    gvel.header["C1"] = "Ha-6564"
    fits.HDUList([fits.PrimaryHDU(), gvel, fits.ImageHDU(mask, name="EMLINE_GVEL_MASK")]).writeto(
        maps
    )
    shifted = replace(OPTIONS, remove_gas_velocity=True)
    _, cube = process(path, tmp_path, shifted, maps=maps)
    peaks = (cube.flux * cube.wave).sum(axis=2) / cube.flux.sum(axis=2)
    np.testing.assert_allclose(peaks, 6564.6, atol=0.05)
    with pytest.raises(DataError, match="needs the galaxy's MAPS"):
        process(path, tmp_path, shifted, overwrite=True)


@pytest.mark.parametrize("kms", [-3000.0, 3000.0])
def test_gas_velocity_leaves_no_bin_half_read(tmp_path, monkeypatch, kms):
    """The first and last pixels that any spaxel's shift needs are read."""
    ones = np.ones((N_WAVE, 1, 2))
    path = write_logcube(tmp_path / "8485-1901.fits", ones, ones, 0 * ones)
    stretch = np.array([[1.0, 1 + kms / fu.C_KMS]])
    monkeypatch.setattr(fu, "_gas_stretch", lambda *_: stretch)
    for z in np.linspace(0.02, 0.04, 30):
        options = replace(OPTIONS, remove_gas_velocity=True)
        _, cube = process(path, tmp_path, options, redshift=z, overwrite=True)
        assert cube.good_fraction.min() == 1


def test_attributes_say_where_a_cube_came_from(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, VERSDRP3="v3_1_1")
    _, cube = process(path, tmp_path)
    attrs = cube.attrs
    assert attrs["mangaid"] == "1-209232"
    assert attrs["redshift"] == pytest.approx(0.03)
    assert attrs["drp_version"] == "v3_1_1"
    assert attrs["source_sha256"] == utils.sha256_of(path)
    assert not attrs["critical"]


def test_existing_cube_is_kept_refused_or_replaced(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    assert process(path, tmp_path)[0] == "written"
    assert process(path, tmp_path)[0] == "up to date"
    other = replace(OPTIONS, n_band=100)
    with pytest.raises(DataError, match="another n_band"):
        process(path, tmp_path, other)
    assert process(path, tmp_path, other, overwrite=True)[1].wave.size == 100
    write_logcube(path, *plain_arrays, EBVGAL=0.3)
    with pytest.raises(DataError, match="another source_sha256"):
        process(path, tmp_path, other)


def test_an_untouched_source_is_not_read_again(tmp_path, plain_arrays, monkeypatch):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    process(path, tmp_path)
    real, read = utils.sha256_of, []
    monkeypatch.setattr(utils, "sha256_of", lambda p: read.append(p) or real(p))
    assert process(path, tmp_path)[0] == "up to date"
    assert read == []
    os.utime(path, (1, 1))  # a copy, say
    assert process(path, tmp_path)[0] == "up to date"
    assert read == [path]


def gzipped(path):
    out = path.with_name(path.name + ".gz")
    out.write_bytes(gzip.compress(path.read_bytes(), 1))
    return out


def test_gzipped_and_plain_files_give_the_same_cube(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    _, plain = process(path, tmp_path)
    _, zipped = process(gzipped(path), tmp_path, overwrite=True)
    np.testing.assert_array_equal(plain.flux, zipped.flux)


def spoil_missing(path, tmp_path):
    return tmp_path / "absent-8485-1901.fits.gz"


def spoil_zero(path, tmp_path):
    path.write_bytes(b"")
    return path


def spoil_truncated(path, tmp_path):
    whole = gzipped(path)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return whole


def spoil_corrupt(path, tmp_path):
    whole = gzipped(path)
    content = bytearray(whole.read_bytes())
    content[5000:6000] = b"\0" * 1000
    whole.write_bytes(content)
    return whole


def spoil_plain_truncated(path, tmp_path):
    path.write_bytes(path.read_bytes()[:400_000])
    return path


def spoil_foreign(path, tmp_path):
    path.write_bytes(b"this is a text file" * 1000)
    return path


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (spoil_missing, "no such file"),
        (spoil_zero, "zero bytes"),
        (spoil_truncated, "cut short"),
        (spoil_corrupt, "damaged"),
        (spoil_plain_truncated, "cut short inside IVAR"),
        (spoil_foreign, "not a FITS file"),
    ],
)
def test_damaged_file_is_one_clear_line_and_no_output(tmp_path, plain_arrays, spoil, expected):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    bad = spoil(path, tmp_path)
    with pytest.raises(DataError, match=expected) as error:
        process(bad, tmp_path)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("name", ["IVAR", "MASK", "REDCORR"])
def test_missing_hdu_is_named_with_those_there(tmp_path, plain_arrays, name):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, drop=(name,))
    with pytest.raises(DataError, match=rf"no HDU {name}; it holds PRIMARY, .*MODEL"):
        process(path, tmp_path)


def test_output_may_have_any_name(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    assert fu.process_cube(path, tmp_path / "cube.h5", fu.CubeOptions()) == "written"
    assert data_io.read_cube_attrs(tmp_path / "cube.h5")["plateifu"] == "8485-1901"


def test_file_of_another_galaxy_is_refused(tmp_path, plain_arrays, line_maps):
    path = write_logcube(tmp_path / "a.fits", *plain_arrays, PLATEIFU="7443-12703")
    with pytest.raises(DataError, match="holds galaxy 7443-12703, not 8485-1901"):
        process(path, tmp_path)
    maps = write_maps(tmp_path / "b.fits", *line_maps, PLATEIFU="7443-12703")
    with pytest.raises(DataError, match="holds galaxy 7443-12703, not 8485-1901"):
        fu.process_map(maps, tmp_path / "8485-1901.npy", "BPT", fu.LabelOptions())


def test_wrong_shapes_are_refused(tmp_path, plain_arrays):
    flux, ivar, mask = plain_arrays
    path = write_logcube(tmp_path / "8485-1901.fits", flux, ivar[:, :3], mask)
    with pytest.raises(DataError, match=r"IVAR has shape \(4563, 3, 5\)"):
        process(path, tmp_path)
    path = write_logcube(tmp_path / "8485-1901.fits", flux[:100], ivar[:100], mask[:100])
    with pytest.raises(DataError, match="FLUX has shape"):
        process(path, tmp_path)


def test_other_wavelength_grid_is_refused(tmp_path, plain_arrays):
    linear = np.linspace(3621.6, 10353.8, N_WAVE)
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, wave=linear)
    with pytest.raises(DataError, match="WAVE is not the LOGCUBE grid"):
        process(path, tmp_path)


def test_all_masked_cube_is_refused(tmp_path, plain_arrays):
    flux, ivar, mask = plain_arrays
    path = write_logcube(tmp_path / "8485-1901.fits", flux, ivar, mask + 1)
    with pytest.raises(DataError, match=r"every pixel .* is masked"):
        process(path, tmp_path)


@pytest.mark.parametrize("cz", [None, -9999.0 * fu.C_KMS, np.float64(4 * fu.C_KMS)])
def test_no_or_absurd_redshift_is_refused(tmp_path, plain_arrays, cz):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, SCINPVEL=cz)
    with pytest.raises(DataError, match="redshift"):
        process(path, tmp_path)


def test_critical_cube_is_warned_of_recorded_and_skippable(tmp_path, plain_arrays, caplog):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, DRP3QUAL=1 << 30)
    assert process(path, tmp_path, skip_critical=True) == ("skipped: CRITICAL", None)
    word, cube = process(path, tmp_path)
    assert (word, bool(cube.attrs["critical"])) == ("written", True)
    assert "DRP3QUAL says CRITICAL" in caplog.text
    assert process(path, tmp_path)[0] == "up to date"
    assert process(path, tmp_path, skip_critical=True)[0] == "skipped: CRITICAL"


def flip(path, position, bit):
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["FLUX", "IVAR", "MASK"])
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path, plain_arrays, name):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    with fits.open(path) as hdus:
        hdus.writeto(path, overwrite=True, checksum=True)
    with fits.open(path) as hdus:
        where = hdus[name].fileinfo()
        size = hdus[name].data.nbytes
    assert process(path, tmp_path)[0] == "written"
    for part in (0.01, 0.5, 0.99):  # before, among and after the planes that are kept
        position = where["datLoc"] + int(part * size)
        flip(path, position, 3)
        with pytest.raises(DataError, match=f"{name} is damaged.*Fetch it again"):
            process(path, tmp_path, overwrite=True)
        flip(path, position, 3)
    assert process(path, tmp_path, overwrite=True)[0] == "written"


def test_damaged_header_is_no_endless_search(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    with fits.open(path) as hdus:
        where = hdus["IVAR"].fileinfo()["hdrLoc"]
    flip(path, where, 0)
    with pytest.raises(DataError, match="no header where one should be"):
        process(path, tmp_path)


@pytest.mark.parametrize("n_bytes", [1, 2, 3, 4, 5, 4000, 262_147])
@pytest.mark.parametrize("step", [1, 3, 4, 1000])
def test_sum_of_a_data_unit_is_astropys(n_bytes, step):
    rng = np.random.default_rng(n_bytes)
    content = rng.integers(200, 256, n_bytes, np.uint8)  # large: the sum overflows
    hdu = fits.ImageHDU(content)
    hdu.add_datasum()
    tally = fits_stream._Tally()
    for start in range(0, n_bytes, step if n_bytes < 9999 else 99_999):
        tally.add(content[start : start + (step if n_bytes < 9999 else 99_999)].tobytes())
    tally.check(hdu.header, Path("x"), "X")
    hdu.header["DATASUM"] = str(int(hdu.header["DATASUM"]) ^ 1)
    with pytest.raises(DataError, match="damaged"):
        tally.check(hdu.header, Path("x"), "X")


def write_catalogue(path, rows):
    columns = [
        fits.Column("plateifu", "20A", array=[r[0] for r in rows]),
        fits.Column("mangaid", "20A", array=[r[1] for r in rows]),
        fits.Column("nsa_z", "D", array=[r[2] for r in rows]),
        fits.Column("z", "D", array=[r[3] for r in rows]),
    ]
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns)]).writeto(path)
    return path


def test_redshift_from_the_catalogue(tmp_path, plain_arrays):
    rows = [("8485-1901", "1-7", 0.05, 0.06), ("8485-1902", "1-8", -9999, 0.07)]
    catalogue = write_catalogue(tmp_path / "drpall.fits", [*rows, ("1-100", "1-9", -9999, -9999)])
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, SCINPVEL=None, MANGAID=None)
    _, cube = process(path, tmp_path, catalogue=catalogue)
    assert (cube.attrs["redshift"], cube.attrs["mangaid"]) == (0.05, "1-7")
    assert fu.catalogue_row(catalogue, "8485-1902")["redshift"] == 0.07
    assert process(path, tmp_path, catalogue=catalogue)[0] == "up to date"
    other = write_catalogue(tmp_path / "other.fits", [("8485-1901", "1-7", 0.03, 0.06)])
    with pytest.raises(DataError, match="another catalogue_sha256"):
        process(path, tmp_path, catalogue=other)
    path = write_logcube(tmp_path / "7-100.fits", *plain_arrays, SCINPVEL=None, PLATEIFU="7000-100")
    with pytest.raises(DataError, match="no galaxy 7000-100 in the catalogue"):
        fu.process_cube(path, tmp_path / "7000-100.h5", OPTIONS, catalogue=catalogue)


@pytest.mark.filterwarnings("ignore:::astropy")  # it warns, too
@pytest.mark.parametrize("kept", [0, 100, 6000])
def test_catalogue_cut_short_is_one_clear_line(tmp_path, kept):
    rows = [("8485-1901", "1-7", 0.05, 0.06)] * 50
    catalogue = write_catalogue(tmp_path / "drpall.fits", rows)
    catalogue.write_bytes(catalogue.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"drpall\.fits: not a readable catalogue .* Fetch it"):
        fu.catalogue_row(catalogue, "8485-1901")


def test_real_maps_give_the_known_bpt_map(shared_manga, tmp_path):
    source = shared_manga / "manga-7815-3702-MAPS-HYB10-GAU-MILESHC.fits.gz"
    target = tmp_path / "7815-3702.npy"
    assert fu.process_map(source, target, "BPT", fu.LabelOptions()) == "written"
    labels = data_io.read_labels(target)
    assert np.bincount(labels[labels >= 0], minlength=3).tolist() == [575, 96, 0]
    p_wrong = data_io.read_label_error(target)
    assert np.isfinite(p_wrong).sum() == 671
    assert 0 < p_wrong[labels >= 0].mean() < 0.5
    with Image.open(target.with_suffix(".png")) as picture:
        colours = {c for _, c in picture.convert("RGB").getcolors(1 << 20)}
    wanted = {tuple(bytes.fromhex(c[1:])) for c in CLASS_COLOURS["BPT", 3]}
    assert wanted <= colours
    meta = data_io.read_label_meta(target)
    assert meta["counts"] == {"star-forming": 575, "composite": 96, "AGN": 0}
    assert meta["mangaid"] == "1-113540"


def test_label_picture_hatches_unlabelled_spaxels_and_greys_holes(tmp_path):
    labels = np.full((40, 42), np.nan, np.float32)
    labels[30:35, 5:12] = 8.5
    covered = np.zeros(labels.shape, bool)
    covered[2:38, 2:40] = True
    covered[10:14, 20:25] = False  # a star
    path = tmp_path / "1-1.png"
    label_picture.write_label_png(path, labels, "logOH", covered, "O3N2-M13, S/N > 3")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    zoom, left, top = 10, 12, 56
    spaxels = pixels[top : top + 40 * zoom, left : left + 42 * zoom]
    spaxels = spaxels.reshape(40, zoom, 42, zoom, 3).swapaxes(1, 2)[::-1]  # north is up
    colour = tuple(bytes.fromhex(CLASS_COLOURS["logOH", 6][3][1:]))
    assert (spaxels[30:35, 5:12] == colour).all()
    assert (spaxels[10:14, 20:25] == 0xBD).all()
    assert (spaxels[~(covered | (label_classes(labels, "logOH") >= 0))][0] == 255).all()
    unlabelled = spaxels[20, 10]
    assert (unlabelled == 255).any()
    assert (unlabelled != 255).any()
    assert (unlabelled != 0xBD).all()  # lines, of another grey than masked spaxels
    bar = (pixels[-14, : left + 42 * zoom // 2] == 0).all(axis=-1)
    assert bar.sum() == pytest.approx(10 * zoom, abs=2)  # 5 arcsec
    label_picture.write_label_png(path, labels, "logOH", covered)
    with Image.open(path) as picture:
        without = np.asarray(picture.convert("RGB")).astype(int)
    changed = np.argwhere((without != pixels).any(axis=-1))
    assert changed.size
    assert changed[:, 0].max() < top  # the note stands above the map


def test_label_picture_greys_a_dead_fibre_at_the_edge_and_leaves_the_sky_white(tmp_path):
    y, x = np.indices((33, 33))
    hexagon = (np.abs(x - 16) + np.abs(y - 16) / 2 <= 15) & (np.abs(y - 16) <= 12)
    covered = hexagon & (np.hypot(y - 22, x - 28) > 4)  # a bite off a slanted edge
    labels = np.where(covered, 0, LABEL_NONE)
    label_picture.write_label_png(tmp_path / "1-1.png", labels, "BPT", covered)
    with Image.open(tmp_path / "1-1.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    centres = 12 * np.arange(33) + 6  # 12 pixels a spaxel
    spaxels = pixels[56 + centres[::-1, None], 12 + centres]
    assert (spaxels[hexagon & ~covered] == 0xBD).all()
    assert (spaxels[~hexagon] == 255).all()


@pytest.mark.parametrize("task", ["BPT", "logOH"])
def test_label_picture_of_an_empty_map_can_be_drawn(tmp_path, task):
    labels = np.full((1, 1), LABEL_NONE if task == "BPT" else np.nan)
    label_picture.write_label_png(tmp_path / "1-1.png", labels, task, np.zeros((1, 1), bool))
    with Image.open(tmp_path / "1-1.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize("diagnostic", ["O3N2-M13", "N2-M13", "O3N2-PP04", "N2O2-KD02"])
def test_real_maps_give_metallicities(shared_manga, tmp_path, diagnostic):
    source = shared_manga / "manga-7815-3702-MAPS-HYB10-GAU-MILESHC.fits.gz"
    target = tmp_path / "7815-3702.npy"
    options = fu.LabelOptions(diagnostic=diagnostic)
    fu.process_map(source, target, "logOH", options)
    labels, error = data_io.read_labels(target), data_io.read_label_error(target)
    has = np.isfinite(labels)
    assert 300 < has.sum() <= 575
    assert 8.2 < np.median(labels[has]) < 9.2
    assert (error[has] > 0).all()
    assert (np.isfinite(error) == has).all()
    if diagnostic == "O3N2-M13":  # the equation, spelled out on the archive's own arrays
        with fits.open(source) as hdus:
            names = [c for c in hdus["EMLINE_GFLUX"].header["C??"].values()]
            f = dict(zip(names, hdus["EMLINE_GFLUX"].data.astype(float), strict=True))
        y, x = np.argwhere(has)[100]
        o3n2 = np.log10(f["OIII-5008"][y, x] / f["Hb-4862"][y, x]) - np.log10(
            f["NII-6585"][y, x] / f["Ha-6564"][y, x]
        )
        assert labels[y, x] == pytest.approx(8.533 - 0.214 * o3n2, abs=1e-4)


def test_unknown_line_is_named_with_those_there(tmp_path, line_maps):
    path = write_maps(tmp_path / "manga-8485-1901-MAPS-X.fits", *line_maps, lines=LINES[2:])
    with pytest.raises(DataError, match=r"no channel OII-3727, OII-3729; it holds Hb-4862"):
        fu.process_map(
            path, tmp_path / "8485-1901.npy", "logOH", fu.LabelOptions(diagnostic="N2O2-KD02")
        )
    assert list(tmp_path.iterdir()) == [path]


def test_map_labels_are_kept_refused_or_replaced(tmp_path, line_maps):
    path = write_maps(tmp_path / "manga-8485-1901-MAPS-X.fits", *line_maps)
    target = tmp_path / "8485-1901.npy"
    options = fu.LabelOptions()
    assert fu.process_map(path, target, "logOH", options) == "written"
    assert fu.process_map(path, target, "logOH", options) == "up to date"
    other = replace(options, min_snr=5.0)
    with pytest.raises(DataError, match="another min_snr"):
        fu.process_map(path, target, "logOH", other)
    assert fu.process_map(path, target, "logOH", other, overwrite=True) == "written"


def test_a_damaged_label_map_is_not_up_to_date(tmp_path, line_maps):
    source = write_maps(tmp_path / "manga-8485-1901-MAPS-X.fits", *line_maps)
    target = tmp_path / "8485-1901.npy"
    fu.process_map(source, target, "BPT", fu.LabelOptions())
    whole = target.read_bytes()
    target.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"8485-1901\.npy: not a readable .* --overwrite"):
        fu.process_map(source, target, "BPT", fu.LabelOptions())
    target.write_bytes(whole)
    target.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"its \.json is missing"):
        fu.process_map(source, target, "BPT", fu.LabelOptions())


def test_line_channels_ignore_their_numbers(tmp_path, line_maps):
    first = write_maps(tmp_path / "manga-8485-1901-MAPS-X.fits", *line_maps)
    other = write_maps(tmp_path / "manga-8485-1901-MAPS-Y.fits", *line_maps, lines=LINES[::-1])
    for path in (first, other):
        fu.process_map(path, path.with_suffix(".npy"), "logOH", fu.LabelOptions())
    a, b = (data_io.read_labels(p.with_suffix(".npy")) for p in (first, other))
    np.testing.assert_array_equal(a, b)


def test_reader_stops_after_the_last_wanted_hdu(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    noise = np.random.default_rng(0).random((1000, 1000))
    fits.append(path, noise, fits.Header({"EXTNAME": "LATER"}))  # many read-ahead blocks
    path = gzipped(path)
    path.write_bytes(path.read_bytes()[:-2000])  # damaged there, where nobody reads
    assert set(fits_stream.read_hdus(path, ("FLUX", "REDCORR"))) == {"FLUX", "REDCORR"}


def test_target_grid_fills_the_range():
    wave, edges = resample.target_grid(5000, 8000, 2040)
    assert (wave.size, edges[0], edges[-1]) == (2040, pytest.approx(5000), pytest.approx(8000))
    np.testing.assert_allclose(np.diff(np.log10(edges)), np.log10(1.6) / 2040, rtol=1e-9)
