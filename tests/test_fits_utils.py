"""Cubes and label maps from FITS: exactness on real spectra, bad input, provenance, resuming."""

import hashlib
import io
import os
from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from conftest import LINES, N_WAVE, write_logcube, write_maps
from PIL import Image

import data_io
import fits_utils as fu
from catalogue import catalogue_row
from labels import CLASS_COLOURS
from utils import DataError

EDGES = 10 ** (3.5589 + 1e-4 * (np.arange(N_WAVE + 1) - 0.5))
CENTRES = np.sqrt(EDGES[:-1] * EDGES[1:])
TARGET = np.geomspace(5000, 8000, 2041)
OPTIONS = fu.CubeOptions()
REAL_MAPS = "manga-7815-3702-MAPS-HYB10-GAU-MILESHC.fits.gz"


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


def test_real_spectra_come_out_as_exact_step_integrals(shared_manga, tmp_path):
    with fits.open(shared_manga / "mangadap_MaNGA_test_spectra.fits.gz") as hdus:
        flux, ivar = (hdus[n].data.astype("f4") for n in ("FLUX", "IVAR"))
        bad, redshifts = hdus["MASK"].data > 0, hdus["Z"].data
    assert bad.any(axis=1).sum() >= 6, "the real spectra are expected to have masked pixels"
    assert bad.all(axis=1).any(), "one of them is masked throughout"
    n = len(flux)
    ivar = np.where(ivar > 0, ivar, 1)  # so that the mask alone says which pixels are bad
    poisoned = np.where(bad, 1e20, flux)
    mask = np.where(bad, 1 << 2, 1 << 7)  # FLUXINVALID; FITIGNORED does not concern the flux

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
        # 1e-6 of the flux in the bin; of the typical flux where positive and negative pixels cancel
        scale = np.abs(wanted[ok]) + 1e-3 * np.abs(flux[i][~bad[i]]).mean()
        assert (np.abs(got[ok] - wanted[ok]) / scale).max() < 1e-6
        np.testing.assert_allclose(cube.good_fraction[i, 0], good, atol=1e-3)
    assert np.nanmax(np.abs(cube.flux)) < 1e4
    assert np.isfinite(cube.ivar).all()
    assert (cube.ivar[np.isnan(cube.flux)] == 0).all()


def test_integral_of_a_line_survives_the_redshift(tmp_path):
    z, flux_in = 0.1, 12.0
    line = (
        flux_in * np.exp(-0.5 * ((CENTRES - 6564.6 * (1 + z)) / 4) ** 2) / (4 * np.sqrt(2 * np.pi))
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
    factor = np.interp(cube.wave * 1.03, CENTRES, red)
    np.testing.assert_allclose(
        cube.flux / dusty.flux, np.broadcast_to(factor, cube.flux.shape), rtol=1e-4
    )
    np.testing.assert_allclose(
        dusty.ivar / cube.ivar, np.broadcast_to(factor**2, cube.flux.shape), rtol=1e-4
    )
    assert dusty.recipe.options["deredden"] is False


def test_bad_pixels_of_every_kind_contribute_nothing(tmp_path, plain_arrays):
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
    at = 6564.6 * (1 + z) * (1 + velocity / fu.C_KMS)
    flux = np.exp(-0.5 * ((CENTRES[:, None, None] - at) / 3) ** 2)
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
    with pytest.raises(DataError, match="expected one for --remove-gas-velocity"):
        process(path, tmp_path, shifted, overwrite=True)


@pytest.mark.parametrize("kms", [-3000.0, 3000.0])
def test_gas_velocity_widens_the_range_of_pixels_read(tmp_path, monkeypatch, kms):
    """Pixels that only a shifted spaxel needs are read as well: every bin is complete."""
    ones = np.ones((N_WAVE, 1, 2))
    path = write_logcube(tmp_path / "8485-1901.fits", ones, ones, 0 * ones)
    stretch = np.array([[1.0, 1 + kms / fu.C_KMS]])
    monkeypatch.setattr(fu, "_gas_stretch", lambda *_: stretch)
    for z in np.linspace(0.02, 0.04, 30):
        options = replace(OPTIONS, remove_gas_velocity=True)
        _, cube = process(path, tmp_path, options, redshift=z, overwrite=True)
        assert cube.good_fraction.min() == 1


def test_attributes_record_the_source_of_a_cube(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, VERSDRP3="v3_1_1")
    _, cube = process(path, tmp_path)
    attrs = cube.attrs
    assert attrs["mangaid"] == "1-209232"
    assert attrs["redshift"] == pytest.approx(0.03)
    assert attrs["drp_version"] == "v3_1_1"
    assert cube.recipe.inputs == {"LOGCUBE": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert not attrs["critical"]


def test_existing_cube_is_kept_refused_or_replaced(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    assert process(path, tmp_path)[0] == "written"
    assert process(path, tmp_path)[0] == "up to date"
    other = replace(OPTIONS, n_band=100)
    with pytest.raises(DataError, match=r"made with n_band=2040 \(now 100\)\. Replace"):
        process(path, tmp_path, other)
    assert process(path, tmp_path, other, overwrite=True)[1].wave.size == 100
    write_logcube(path, *plain_arrays, EBVGAL=0.3)
    with pytest.raises(DataError, match="made with another LOGCUBE"):
        process(path, tmp_path, other)


def test_an_untouched_source_is_not_read_again(tmp_path, plain_arrays, monkeypatch):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    process(path, tmp_path)
    real, read = fu.file_digest, []
    monkeypatch.setattr(fu, "file_digest", lambda p: read.append(p) or real(p))
    assert process(path, tmp_path)[0] == "up to date"
    assert read == []
    os.utime(path, (1, 1))  # a copy, say
    assert process(path, tmp_path)[0] == "up to date"
    assert read == [path]


@pytest.mark.parametrize("name", ["IVAR", "MASK", "REDCORR"])
def test_missing_hdu_is_named_with_those_of_the_file(tmp_path, plain_arrays, name):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, drop=(name,))
    with pytest.raises(DataError, match=rf"no HDU {name}; it holds PRIMARY, .*MODEL"):
        process(path, tmp_path)


def test_output_may_have_any_name(tmp_path, plain_arrays):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays)
    assert fu.process_cube(path, tmp_path / "cube.h5", fu.CubeOptions()) == "written"
    assert data_io.read_cube_head(tmp_path / "cube.h5").attrs["plateifu"] == "8485-1901"


@pytest.mark.parametrize(
    ("spoil", "extra", "message"),
    [
        (lambda f, v, m: (f, v[:, :3], m), {}, r"IVAR has shape \(4563, 3, 5\)"),
        (lambda f, v, m: (f[:100], v[:100], m[:100]), {}, "FLUX has shape"),
        (lambda f, v, m: (f, v, m + 1), {}, r"every pixel .* is masked"),
        (
            None,
            {"wave": np.linspace(3621.6, 10353.8, N_WAVE)},
            "wrong wavelengths in WAVE",
        ),
        (None, {"PLATEIFU": "7443-12703"}, "holds galaxy 7443-12703, expected 8485-1901"),
        (None, {"SCINPVEL": None}, "redshift"),
        (None, {"SCINPVEL": -9999.0 * fu.C_KMS}, "redshift"),
        (None, {"SCINPVEL": 4 * fu.C_KMS}, "redshift"),
    ],
)
def test_unusable_cube_is_refused(tmp_path, plain_arrays, spoil, extra, message):
    arrays = spoil(*plain_arrays) if spoil else plain_arrays
    path = write_logcube(tmp_path / "8485-1901.fits", *arrays, **extra)
    with pytest.raises(DataError, match=message):
        process(path, tmp_path)


def test_maps_of_another_galaxy_are_refused(tmp_path, line_maps):
    maps = write_maps(tmp_path / "b.fits", *line_maps, PLATEIFU="7443-12703")
    with pytest.raises(DataError, match="holds galaxy 7443-12703, expected 8485-1901"):
        fu.process_map(maps, tmp_path / "8485-1901.npy", "BPT", fu.LabelOptions())


def test_critical_cube_is_recorded_and_can_be_skipped(tmp_path, plain_arrays, caplog):
    path = write_logcube(tmp_path / "8485-1901.fits", *plain_arrays, DRP3QUAL=1 << 30)
    assert process(path, tmp_path, skip_critical=True) == ("skipped: CRITICAL", None)
    word, cube = process(path, tmp_path)
    assert (word, bool(cube.attrs["critical"])) == ("written", True)
    assert "DRP3QUAL says CRITICAL" in caplog.text
    assert process(path, tmp_path)[0] == "up to date"
    assert process(path, tmp_path, skip_critical=True)[0] == "skipped: CRITICAL"


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
    assert catalogue_row(catalogue, "8485-1902")["redshift"] == 0.07
    assert process(path, tmp_path, catalogue=catalogue)[0] == "up to date"
    other = write_catalogue(tmp_path / "other.fits", [("8485-1901", "1-7", 0.03, 0.06)])
    with pytest.raises(DataError, match="made with another catalogue"):
        process(path, tmp_path, catalogue=other)
    path = write_logcube(tmp_path / "7-100.fits", *plain_arrays, SCINPVEL=None, PLATEIFU="7000-100")
    with pytest.raises(DataError, match="no galaxy 7000-100 in the catalogue"):
        fu.process_cube(path, tmp_path / "7000-100.h5", OPTIONS, catalogue=catalogue)


@pytest.mark.filterwarnings("ignore:::astropy")  # it warns, too
@pytest.mark.parametrize("kept", [0, 100, 6000])
def test_truncated_catalogue_is_reported_in_one_line(tmp_path, kept):
    rows = [("8485-1901", "1-7", 0.05, 0.06)] * 50
    catalogue = write_catalogue(tmp_path / "drpall.fits", rows)
    catalogue.write_bytes(catalogue.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"drpall\.fits: not a readable catalogue .* Fetch it"):
        catalogue_row(catalogue, "8485-1901")


def test_real_maps_give_the_known_bpt_map(shared_manga, tmp_path):
    source = shared_manga / REAL_MAPS
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


@pytest.mark.parametrize("diagnostic", ["O3N2-M13", "N2-M13", "O3N2-PP04", "N2O2-KD02"])
def test_real_maps_give_metallicities(shared_manga, tmp_path, diagnostic):
    source = shared_manga / REAL_MAPS
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


def test_missing_line_is_named_with_those_of_the_file(tmp_path, line_maps):
    path = write_maps(tmp_path / "manga-8485-1901-MAPS-X.fits", *line_maps, lines=LINES[2:])
    with pytest.raises(DataError, match=r"no channel OII-3727, OII-3729; it contains Hb-4862"):
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
    with pytest.raises(DataError, match=r"made with min_snr=3\.0 \(now 5\.0\)"):
        fu.process_map(path, target, "logOH", other)
    assert fu.process_map(path, target, "logOH", other, overwrite=True) == "written"


def test_a_damaged_label_map_is_reported(tmp_path, line_maps):
    source = write_maps(tmp_path / "manga-8485-1901-MAPS-X.fits", *line_maps)
    target = tmp_path / "8485-1901.npy"
    fu.process_map(source, target, "BPT", fu.LabelOptions())
    whole = target.read_bytes()
    target.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"8485-1901\.npy: not a readable .* --overwrite"):
        fu.process_map(source, target, "BPT", fu.LabelOptions())
    np.save(target, np.load(io.BytesIO(whole)) + 1)
    with pytest.raises(DataError, match=r"its values are not those that its \.json describes"):
        fu.process_map(source, target, "BPT", fu.LabelOptions())


@pytest.mark.parametrize("ending", [".json", ".png", "_err.npy"])
def test_a_label_map_without_its_companions_is_not_up_to_date(tmp_path, line_maps, ending):
    source = write_maps(tmp_path / "manga-8485-1901-MAPS-X.fits", *line_maps)
    target = tmp_path / "8485-1901.npy"
    fu.process_map(source, target, "BPT", fu.LabelOptions())
    (tmp_path / f"8485-1901{ending}").unlink()
    with pytest.raises(DataError, match=f"8485-1901{ending} beside it is missing.*--overwrite"):
        fu.process_map(source, target, "BPT", fu.LabelOptions())
    assert fu.process_map(source, target, "BPT", fu.LabelOptions(), overwrite=True) == "written"


def test_line_channels_are_found_by_name(tmp_path, line_maps):
    first = write_maps(tmp_path / "manga-8485-1901-MAPS-X.fits", *line_maps)
    other = write_maps(tmp_path / "manga-8485-1901-MAPS-Y.fits", *line_maps, lines=LINES[::-1])
    for path in (first, other):
        fu.process_map(path, path.with_suffix(".npy"), "logOH", fu.LabelOptions())
    a, b = (data_io.read_labels(p.with_suffix(".npy")) for p in (first, other))
    np.testing.assert_array_equal(a, b)
