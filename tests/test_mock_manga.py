"""Simulated galaxies against the archive's structure, closed forms, other libraries, real files."""

import gzip
import hashlib
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import utils
from utils import DataError

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from cut_real_files import SPECTRA_CUT
from scipy import optimize, stats

import mock.dr17_files as dr17
import mock.physics as physics
import mock_manga
from h5_files import new_h5
from labels import demarcate, label_classes
from mock.from_maps import resynthesise
from mock.galaxy import BUNDLES, DAPTYPE, build_scene, draw_params, simulate_galaxy
from mock.survey import DAPALL, DAPTYPES
from mock.truth import TRUTH_SCHEMA, TRUTH_VERSION, read_truth, truth_path
from recipe import Recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BPT = ("Hb-4862", "OIII-5008", "Ha-6564", "NII-6585")
DONOTUSE = 1 << 30
C_KMS = 299792.458
KINDS = {"cube": "LOGCUBE", "maps": "MAPS"}
EDGES = 10 ** (3.5589 + 1e-4 * (np.arange(4564) - 0.5))
"""Edges of the LOGCUBE's pixels, vacuum Angstrom, observed."""


def run(folder: Path, **settings) -> dict[str, str]:
    return mock_manga.simulate_survey(
        mock_manga.MockConfig(data_dir=folder, **({"n_galaxies": 3, "bundles": (19,)} | settings))
    )


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> Path:
    """Data folder with three small galaxies."""
    folder = tmp_path_factory.mktemp("mock")
    assert set(run(folder).values()) == {"written"}
    return folder


@pytest.fixture(scope="module")
def galaxies(survey, tmp_path_factory) -> list[dict]:
    """LOGCUBE, MAPS, truth maps and parameters of the survey's galaxies."""
    plain = tmp_path_factory.mktemp("plain")

    def unpacked(plateifu: str, kind: str) -> fits.HDUList:
        path = plain / f"{plateifu}-{kind}.fits"  # memory-mapped: seeking in a gzip file is slow
        path.write_bytes(gzip.decompress(utils.find_raw(survey, plateifu, kind).read_bytes()))
        return fits.open(path)

    def opened(path: Path) -> dict:
        truth, attrs = read_truth(path)
        files = {kind: unpacked(path.stem, name) for kind, name in KINDS.items()}
        params = json.loads(attrs["recipe"])["options"]["params"]
        return {**files, "truth": truth, "params": params}

    return [opened(path) for path in sorted((survey / "truth").glob("*.h5"))]


@pytest.fixture(scope="module")
def resynthesised(real_maps, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    resynthesise(folder, real_maps, seed=1)
    return folder


def channels(maps) -> dict[str, int]:
    """Line name -> channel, from the header cards."""
    return {name: i for i, name in enumerate(maps["EMLINE_GFLUX"].header["C??"].values())}


def line_pulls(cube, maps) -> np.ndarray:
    """(H beta summed over a box in a LOGCUBE, without stars - its flux in MAPS) / sigma."""
    centre = np.sqrt(EDGES[1:] * EDGES[:-1]) / (1 + cube[0].header["SCINPVEL"] / C_KMS)
    box, i = np.abs(centre - 4862.691) < 16, channels(maps)["Hb-4862"]
    scale = cube["REDCORR"].data[box, None, None].astype(float) * np.diff(EDGES)[box, None, None]
    flux = ((cube["FLUX"].data[box] - cube["STELLAR"].data[box]) * scale).sum(axis=0)
    ivar = cube["IVAR"].data[box]
    used = (maps["EMLINE_GFLUX_MASK"].data[i] == 0) & (ivar > 0).all(axis=0)
    sigma = np.sqrt((scale**2 / np.where(ivar > 0, ivar, 1)).sum(axis=0))
    return ((flux - maps["EMLINE_GFLUX"].data[i]) / sigma)[used]


def test_every_hdu_has_the_cards_of_the_archive(galaxies, shared_manga):
    pages = []
    for page in ("mangaModelCube_DR17.json", "mangaMaps_DR17.json"):
        content = json.loads((shared_manga / page).read_text())
        pages += content["releases"]["DR17"]["hdus"].values()
    assert len(pages) == 13 + 64
    files = [*galaxies[0]["cube"], *galaxies[0]["maps"]]
    free = {"CHECKSUM", "DATASUM", "CRVAL1", "CRVAL2", "LATPOLE"}
    for page_hdu, hdu in zip(pages, files, strict=True):
        cards = page_hdu["header"]
        assert hdu.name == page_hdu["name"]
        assert [c["key"] for c in cards] == [c.keyword for c in hdu.header.cards], hdu.name
        for card in cards:
            key, value = card["key"], hdu.header[card["key"]]
            if key not in free | {"SIMPLE", "BITPIX", "NAXIS", "EXTEND"}:
                assert hdu.header.comments[key] == card["comment"], (hdu.name, key)
            if hdu.name != "PRIMARY" and key not in free:
                same = str(value) == card["value"]
                assert same or float(card["value"]) == value, (hdu.name, key, value)


def test_primary_cards_have_the_types_of_a_real_file(galaxies, real_maps):
    real, ours = fits.getheader(real_maps), galaxies[0]["maps"][0].header
    for key in set(real) & set(ours) - {"BINSNR", "STCKCRPR"}:
        assert type(real[key]) is type(ours[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_checksums_are_right(galaxies, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(galaxies[0][kind].filename(), checksum=True) as f:
            f.verify("exception")
            assert all("DATASUM" in hdu.header for hdu in f)


def test_arrays_have_the_types_of_the_archive_and_finite_values(galaxies):
    for g in galaxies:
        for hdu in (*g["cube"][1:], *g["maps"][1:]):
            assert np.isfinite(hdu.data).all(), hdu.name
    cube, maps = galaxies[0]["cube"], galaxies[0]["maps"]
    hdus = cube["FLUX"], cube["MASK"], cube["BINID"], maps["EMLINE_GFLUX_MASK"]
    assert [hdu.data.dtype for hdu in hdus] == [">f4", ">i2", ">i4", ">i4"]
    assert cube["FLUX"].shape == (4563, 34, 34)
    assert cube["WAVE"].data == pytest.approx(10 ** (3.5589 + 1e-4 * np.arange(4563)), abs=6e-4)


def test_sky_coordinates_agree_with_the_wcs(galaxies):
    maps, (y, x) = galaxies[0]["maps"], np.mgrid[:34, :34]
    header = maps["SPX_MFLUX"].header
    ra, dec = WCS(header).all_pix2world(x, y, 0)
    east = (ra - header["CRVAL1"]) * np.cos(np.deg2rad(header["CRVAL2"])) * 3600
    assert maps["SPX_SKYCOO"].data[0] == pytest.approx(east, abs=0.01)
    assert maps["SPX_SKYCOO"].data[1] == pytest.approx((dec - header["CRVAL2"]) * 3600, abs=0.01)


def test_catalogue_has_one_table_per_analysis_with_every_galaxy(survey, galaxies):
    with fits.open(survey / "raw" / "dapall-v3_1_1-3.1.0.fits") as f:
        assert [hdu.name for hdu in f[1:]] == list(DAPTYPES)
        table = f[DAPTYPE].data
        assert [s.strip() for s in table["PLATEIFU"]] == [g["params"]["plateifu"] for g in galaxies]
        assert table["DAPDONE"].all()
        assert table["NSA_Z"] == pytest.approx([g["params"]["z"] for g in galaxies])
        assert not f[DAPTYPES[0]].data["DAPDONE"].any()


def test_masked_spaxels_are_zero_in_maps_and_cube_and_unmasked_ones_measured(galaxies):
    for g in galaxies:
        cube, maps, binned = g["cube"], g["maps"], g["maps"]["BINID"].data[0] >= 0
        mask = maps["EMLINE_GFLUX_MASK"].data
        flux, ivar = maps["EMLINE_GFLUX"].data, maps["EMLINE_GFLUX_IVAR"].data
        assert (ivar[mask == 0] > 0).all()
        never = (mask & (1 | 2 | 16)) > 0  # NOCOV, LOWCOV, NOVALUE
        assert (flux[never] == 0).all()
        assert (ivar[never] == 0).all()
        assert ((mask[never] & DONOTUSE) > 0).all()
        assert ((mask > 0) == ((mask & DONOTUSE) > 0)).all()
        assert (mask[:, 0, 0] & 1).all()  # the corner is outside of the hexagon
        star, bad = (mask[0] & 8) > 0, (cube["MASK"].data & 0b11111) > 0
        assert ((cube["IVAR"].data == 0) | ~bad | star).all()
        assert (cube["FLUX"].data[:, ~binned & ~star] == 0).all()
        assert bad[:, binned].mean() == pytest.approx(1.05e-3, rel=0.3)
        assert (cube["BINID"].data == maps["BINID"].data).all()


def test_stars_and_dead_fibres_are_flagged():
    params = draw_params(1, 0, (19,))
    both = ({"foreground_star": is_bad, "dead_fibre": is_bad} for is_bad in (False, True))
    plain, scene = (build_scene(replace(params, **flags)) for flags in both)
    star, dead = (scene.bits & 8) > 0, (scene.bits & 4) > 0
    assert star.sum() > 20
    assert 10 < dead.sum() < 40
    assert ((scene.bits[star | dead] & DONOTUSE) > 0).all()
    light = (scene.stellar - plain.stellar).sum(axis=0)
    assert star[scene.ys[light.argmax()], scene.xs[light.argmax()]]
    assert (scene.coverage[dead[scene.ys, scene.xs]] <= 0.3).all()


def test_reddening_follows_odonnell_and_redcorr_the_header(galaxies):
    x = np.array([1.2, 1.5, 1.82, 2.1, 2.4, 2.7])  # 1/micron
    a = np.polyval([-0.505, 1.647, -0.827, -1.718, 1.137, 0.701, -0.609, 0.104, 1.0], x - 1.82)
    b = np.polyval([3.347, -10.805, 5.491, 11.102, -7.985, -3.989, 2.908, 1.952, 0.0], x - 1.82)
    assert physics.extinction_curve(1e4 / x) == pytest.approx(3.1 * (a + b / 3.1), rel=1e-6)
    cube, curve = galaxies[0]["cube"], physics.extinction_curve(physics.wave_grid())
    wanted = 10 ** (0.4 * cube[0].header["EBVGAL"] * curve)
    assert cube["REDCORR"].data == pytest.approx(wanted, rel=1e-6)


def test_hii_regions_lie_on_the_calibrations():
    logoh, zero = np.linspace(8.2, 8.7, 6), np.zeros(6)
    r = physics.hii_ratios(logoh, zero, zero)
    n2 = np.log10(r["NII-6585"] / r["Ha-6564"])
    o3n2 = np.log10(r["OIII-5008"] / r["Hb-4862"]) - n2
    for found in (
        8.533 - 0.214 * o3n2,
        8.743 + 0.462 * n2,
        physics.logoh_o3n2(r),
        physics.logoh_n2(r),
    ):
        assert found == pytest.approx(logoh)
    assert r["Ha-6564"] / r["Hb-4862"] == pytest.approx(2.86)
    assert set(r) == set(physics.EMLINES)
    assert all((v > 0).all() for v in r.values())


def test_bpt_classes_are_those_of_the_labels():
    x, y = np.random.default_rng(0).uniform((-1.2, -9), (0.9, 1.2), (999, 2)).T
    one = np.ones_like(x)
    flux = {"NII-6585": 10**x, "Ha-6564": one, "OIII-5008": 10**y, "Hb-4862": one}
    np.testing.assert_array_equal(physics.bpt_class(flux), demarcate(x, y))
    assert (physics.bpt_class({k: -one for k in BPT}) == -1).all()


def test_balmer_decrement_returns_the_dust(galaxies):
    k = physics.extinction_curve(np.array([4862.69, 6564.63]))
    for g in galaxies:
        t = g["truth"]
        ratio = t["line_flux/Ha-6564"] / t["line_flux/Hb-4862"]
        ebv = 2.5 / (k[0] - k[1]) * np.log10(ratio / 2.86)
        seen = np.isfinite(ebv)
        assert ebv[seen] == pytest.approx(t["gas_ebv"][seen], abs=0.03)


def test_stars_strengthen_with_age_and_metallicity():
    wave = physics.wave_grid()
    spectra = physics.at_shift(physics.stellar_templates(0.0, 50.0), 0)  # (age, metal, band)

    def width(spectrum: np.ndarray, centre: float, half: float = 12) -> float:
        side = (np.abs(wave - centre) > half) & (np.abs(wave - centre) < 2 * half)
        box = np.abs(wave - centre) < half
        level = np.polyval(np.polyfit(wave[side], spectrum[side], 1), wave[box])
        return float(np.sum((1 - spectrum[box] / level) * np.gradient(wave[box])))

    for centre in (5176.0, 5270.0, 5894.0, 8544.0):  # Mgb, Fe, NaD, CaT
        by_age = [width(s, centre) for s in spectra[:, 1]]
        assert np.all(np.diff(by_age) > 0), centre
        assert width(spectra[4, 2], centre) > width(spectra[4, 0], centre)
    assert np.argmax([width(s, 4102.9, 25) for s in spectra[:, 1]]) == 1
    above, below = ((wave > lo) & (wave < lo + 100) for lo in (4000, 3850))
    d4000 = [s[above].mean() / s[below].mean() for s in spectra[:, 1]]
    assert np.all(np.diff(d4000[1:]) > 0)
    assert 1.5 < d4000[4] < 2.2


def test_seeing_mixes_spectra_as_a_sum_over_neighbours():
    rng = np.random.default_rng(1)
    size, pad, psf = 7, 5, 1.6
    n = size + 2 * pad
    v = rng.uniform(-200, 200, (n, n))
    light = rng.random((n, n))
    templates = physics.stellar_templates(0.02, 60.0)
    weights = np.zeros((*templates.shape[:2], n, n))
    weights[2, 1] = light
    matrix = physics.blur_matrix(size, pad, psf)
    ys, xs = np.array([3]), np.array([2])
    got = physics.mix_templates(templates, weights, v, matrix, ys, xs)[:, 0]

    y, x = np.mgrid[:n, :n]
    psf_map = np.exp(-0.5 * ((y - 3 - pad) ** 2 + (x - 2 - pad) ** 2) / psf**2)
    far = np.exp(-0.5 * (np.arange(-30, 31) / psf) ** 2).sum() ** 2
    half = np.arange(-60, 2 * 4563 + 60) / 2  # in pixels
    want = np.zeros(4563)
    for share, v_kms in zip((psf_map * light / far).ravel(), v.ravel(), strict=True):
        shift = np.log10(1 + v_kms / C_KMS) / 1e-4
        want += share * np.interp(np.arange(4563) - shift, half, templates[2, 1])
    assert got == pytest.approx(want, rel=3e-3)


def test_noise_is_correlated_as_westfall_et_al_found():
    noise = physics.correlated_noise(np.random.default_rng(3), 34)
    assert noise.std() == pytest.approx(1, abs=0.01)
    for d in (1, 2, 3):
        got = np.mean(noise[:, 5:-5, 5 : -5 - d] * noise[:, 5:-5, 5 + d : -5])
        assert got == pytest.approx(np.exp(-((d / 1.92) ** 2) / 2), abs=0.02)
    for d, want in ((1, 0.15), (2, -0.17), (3, 0), (4, 0)):  # as in faint real spectra
        assert np.mean(noise[d:] * noise[:-d]) == pytest.approx(want, abs=0.03)


def test_noise_is_as_large_as_in_real_spectra():
    with fits.open(SPECTRA_CUT) as f:
        flux, ivar = (f[k].data.astype(float) for k in ("FLUX", "IVAR"))
    wave = physics.wave_grid()
    for i in range(len(flux)):
        var = physics.sky_sigma() ** 2 + physics.photon_variance() * np.maximum(flux[i], 0)
        ratio = np.sqrt(var * ivar[i])
        for lo in range(3700, 10000, 700):
            here = (wave > lo) & (wave < lo + 700) & (ivar[i] > 0)
            assert 0.6 < np.median(ratio[here]) < 1.7, (i, lo)


@pytest.mark.parametrize("line", [*BPT, "OII-3729", "SII-6718"])
def test_map_fluxes_scatter_by_their_stated_error(galaxies, line):
    pulls = []
    for g in galaxies:
        i, maps = channels(g["maps"])[line], g["maps"]
        good = maps["EMLINE_GFLUX_MASK"].data[i] == 0
        off = maps["EMLINE_GFLUX"].data[i] - g["truth"][f"line_flux/{line}"]
        pulls.append((off * np.sqrt(maps["EMLINE_GFLUX_IVAR"].data[i]))[good])
    pulls = np.concatenate(pulls)
    # neighbouring spaxels and pixels are correlated, which the stated errors neglect
    assert np.std(pulls) == pytest.approx(1, abs=0.2)
    # the error of the continuum is common to all spaxels of a galaxy: 0.3 sigma, three galaxies
    assert np.mean(pulls) == pytest.approx(0, abs=0.5)


def test_map_fluxes_are_what_a_fit_to_the_cube_finds(galaxies):
    cube, maps, truth = (galaxies[1][k] for k in ("cube", "maps", "truth"))
    z, i = cube[0].header["SCINPVEL"] / C_KMS, channels(maps)["Hb-4862"]
    good = (maps["EMLINE_GFLUX_MASK"].data[i] == 0) & (maps["SPX_SNR"].data > 3)
    # the fit below has a free velocity, which runs away where the line is weak
    good &= maps["EMLINE_GFLUX"].data[i] ** 2 * maps["EMLINE_GFLUX_IVAR"].data[i] > 25
    band = slice(*np.searchsorted(EDGES, np.array([4835, 4890]) * (1 + z)))
    lo, hi, red = EDGES[:-1][band], EDGES[1:][band], cube["REDCORR"].data[band].astype(float)
    found = []
    for y, x in np.argwhere(good)[np.linspace(0, good.sum() - 1, 40).astype(int)]:
        centre = 4862.691 * (1 + z) * (1 + truth["gas_velocity"][y, x] / C_KMS)
        width = np.hypot(truth["gas_sigma"][y, x], maps["EMLINE_INSTSIGMA"].data[i, y, x])

        def model(_, flux, shift, centre=centre, sigma=centre * width / C_KMS):
            cdf = stats.norm(centre * (1 + shift / C_KMS), sigma).cdf
            return flux * (cdf(hi) - cdf(lo)) / (hi - lo)

        data = (cube["FLUX"].data - cube["STELLAR"].data)[band, y, x] * red
        ivar = cube["IVAR"].data[band, y, x] / red**2
        err = np.where(ivar > 0, 1 / np.sqrt(np.where(ivar > 0, ivar, 1)), 1e9)
        start = truth["line_flux/Hb-4862"][y, x], 5  # km/s: at 0 the fit may see no slope
        best, cov = optimize.curve_fit(model, lo, data, start, err, absolute_sigma=True)
        ours = maps["EMLINE_GFLUX"].data[i, y, x], maps["EMLINE_GFLUX_IVAR"].data[i, y, x] ** -0.5
        found.append((*ours, *best, *np.sqrt(np.diag(cov))))
    flux, error, fitted, shift, fitted_error, shift_error = np.transpose(found)
    assert error == pytest.approx(fitted_error, rel=0.05)
    assert np.std((flux - fitted) / error) < 0.15  # on the same noise
    assert np.std(shift / shift_error) < 1.6


def test_catalogue_quantities_carry_no_metallicity():
    drawn = [draw_params(5, i) for i in range(720)]
    drawn = [p for p in drawn if p.index == p.twin_of]
    logoh = [p.logoh_re for p in drawn]
    for cue in ("z", "bundle", "r_eff", "flux_re", "ebv_gal", "axis_ratio", "v_max", "ew_ha", "ra"):
        r, _ = stats.spearmanr(logoh, [getattr(p, cue) for p in drawn])
        assert abs(r) < 3.3 / np.sqrt(len(drawn)), cue


def test_bundles_and_redshifts_are_distributed_as_in_dr17(shared_manga):
    import pandas as pd

    table = pd.read_csv(shared_manga / "capivara_manga_drpall_v3_1_1_redshifts.csv.gz")
    table = table[table.redshift > 0.005]
    drawn = [draw_params(7, i) for i in range(1000)]
    for bundle in BUNDLES:
        real = table.redshift[table.ifudsgn // 100 == bundle]
        ours = [p.z for p in drawn if p.bundle == bundle]
        assert len(ours) / 1000 == pytest.approx(len(real) / len(table), abs=0.05)
        assert stats.ks_2samp(real, ours).statistic < 0.15, bundle


def test_labels_spread_over_all_classes():
    row = {name: i for i, name in enumerate(physics.EMLINES)}
    metals, bpt, share = [], [], []
    for k in range(24):
        galaxy = simulate_galaxy(draw_params(1, k, (19,)))
        flux = {n: galaxy.fit["gflux"][row[n]] for n in BPT}
        snr = [flux[n] / np.sqrt(galaxy.fit["gflux_var"][row[n]]) for n in BPT]
        good = galaxy.binned & (np.min(snr, axis=0) > 3)
        classes = physics.bpt_class(flux)
        metals.append(physics.logoh_o3n2(flux)[good & (classes == 0)])
        bpt.append(classes[good])
        share.append(good.mean())
    metals, bpt = np.concatenate(metals), np.concatenate(bpt)
    by_class = np.bincount(label_classes(metals, "logOH"), minlength=6) / metals.size
    by_bpt = np.bincount(bpt, minlength=3) / bpt.size
    assert 0.04 < by_class.min() <= by_class.max() < 0.35
    assert 0.05 < by_bpt.min() <= by_bpt.max() < 0.8
    assert 0.06 < metals.std() < 0.11
    assert 0.4 < np.mean(share) < 0.7


def test_the_twelfth_galaxy_repeats_an_earlier_one():
    once, again = draw_params(1, 4, (19,)), draw_params(1, 11, (19,))
    assert once.mangaid == again.mangaid
    assert once.plateifu != again.plateifu
    assert (once.logoh_re, once.z, once.kind) == (again.logoh_re, again.z, again.kind)
    others = {draw_params(1, i, (19,)).mangaid for i in range(11)}
    assert len(others) == 11
    a, b = build_scene(once), build_scene(again)
    assert a.truth["logoh_physical"] == pytest.approx(b.truth["logoh_physical"])


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_gives_identical_files_with_any_number_of_processes(survey, tmp_path):
    run(tmp_path, jobs=2)
    assert digests(tmp_path) == digests(survey)


def test_second_run_makes_only_what_is_missing_and_refuses_other_options(survey, tmp_path, caplog):
    run(tmp_path, n_galaxies=2)
    first, second = (utils.find_raw(tmp_path, f"13001-190{i}", "MAPS") for i in (1, 2))
    before, old = digests(tmp_path), first.read_bytes()
    assert old == utils.find_raw(survey, "13001-1901", "MAPS").read_bytes()  # of three galaxies
    second.unlink()
    assert run(tmp_path, n_galaxies=2) == {"13001-1901": "up to date", "13001-1902": "written"}
    assert digests(tmp_path) == before
    assert run(tmp_path, n_galaxies=1, depth=0.5) == {"13001-1901": "failed"}
    assert "depth=1.0 (now 0.5)" in caplog.text
    assert run(tmp_path, n_galaxies=1, depth=0.5, overwrite=True) == {"13001-1901": "written"}
    assert first.read_bytes() != old


def test_galaxies_of_another_seed_are_other_galaxies():
    ours, theirs = ([draw_params(seed, i) for i in range(40)] for seed in (1, 2))
    for name in ("plateifu", "mangaid"):
        assert not {getattr(p, name) for p in ours} & {getattr(p, name) for p in theirs}
    assert all(utils.split_plateifu(draw_params(s, 0).plateifu) for s in (0, 3, 10**6))


def test_catalogue_lists_all_simulated_galaxies_and_replaces_no_real_one(survey, tmp_path):
    shutil.copytree(survey, tmp_path, dirs_exist_ok=True)

    def listed():
        return fits.getdata(tmp_path / "raw" / DAPALL, 1)["PLATEIFU"].tolist()

    run(tmp_path, n_galaxies=1)
    assert listed() == ["13001-1901", "13001-1902", "13002-1901"]
    with pytest.raises(DataError, match=r"another size, expected 13001-3701"):
        run(tmp_path, n_galaxies=1, bundles=(37,))
    real = Table({"PLATEIFU": ["8485-1901"], "MANGAID": ["1-1"], "Z": [0.04]})
    real.write(tmp_path / "raw" / DAPALL, overwrite=True)
    with pytest.raises(DataError, match=r"lists real galaxies \(8485-1901"):
        run(tmp_path, n_galaxies=1, overwrite=True)
    assert listed() == ["8485-1901"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"bundles": (20,)}, "--bundles 20: .* 19, 37, 61, 91, 127"),
        ({"n_galaxies": 0}, "--n-galaxies 0: expected"),
        ({"depth": 0.0}, "--depth 0: expected"),
        ({"metallicity_relation": 1.5}, "--metallicity-relation 1.5: expected"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, words, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path, **words)
    assert not list(tmp_path.iterdir())


def test_cube_of_real_maps_holds_their_lines_light_and_noise(resynthesised, real_maps):
    with (
        fits.open(utils.find_raw(resynthesised, "7815-3702", "LOGCUBE")) as cube,
        fits.open(real_maps) as maps,
    ):
        assert cube["FLUX"].shape == (4563, 42, 42)
        assert cube[0].header["SCINPVEL"] == maps[0].header["SCINPVEL"]
        assert (cube["BINID"].data == maps["BINID"].data).all()
        assert np.std(line_pulls(cube, maps)) == pytest.approx(1, abs=0.15)
        binned = maps["BINID"].data[0] >= 0
        wave = 10 ** (3.5589 + 1e-4 * np.arange(4563))
        g_band = (wave > 4200) & (wave < 5200)
        mean = cube["FLUX"].data[g_band].mean(axis=0)
        assert mean[binned] / maps["SPX_MFLUX"].data[binned] == pytest.approx(1, abs=0.35)
        snr = np.median(cube["FLUX"].data[g_band] * np.sqrt(cube["IVAR"].data[g_band]), axis=0)
        ratio = snr[binned] / maps["SPX_SNR"].data[binned]
        assert np.median(ratio) == pytest.approx(1, abs=0.1)

        row = channels(maps)
        flux, ivar = maps["EMLINE_GFLUX"].data, maps["EMLINE_GFLUX_IVAR"].data
        snr = np.where(maps["EMLINE_GFLUX_MASK"].data & DONOTUSE, 0, flux * np.sqrt(ivar))
        good = np.all([snr[row[k]] > 3 for k in BPT], axis=0)
    truth, _ = read_truth(truth_path(resynthesised, "7815-3702"))
    assert np.bincount(truth["bpt"][good]).tolist() == [575, 96]
    copy = utils.find_raw(resynthesised, "7815-3702", "MAPS")
    assert copy.read_bytes() == real_maps.read_bytes()


def test_a_resynthesised_cube_can_be_shallower(resynthesised, real_maps, tmp_path):
    config = mock_manga.MockConfig(data_dir=tmp_path, from_maps=real_maps, seed=1, depth=0.25)
    mock_manga.main(config)
    deep, shallow = (
        fits.getdata(utils.find_raw(folder, "7815-3702", "LOGCUBE"), "IVAR")
        for folder in (resynthesised, tmp_path)
    )
    assert shallow[deep > 0] / deep[deep > 0] == pytest.approx(0.25, rel=1e-5)


def test_maps_with_35_channels_give_back_their_lines(survey, galaxies, tmp_path):
    resynthesise(tmp_path, utils.find_raw(survey, "13001-1902", "MAPS"), seed=3)
    with fits.open(utils.find_raw(tmp_path, "13001-1902", "LOGCUBE")) as cube:
        assert np.std(line_pulls(cube, galaxies[1]["maps"])) == pytest.approx(1, abs=0.2)


def test_a_cube_made_from_other_maps_is_not_overwritten(resynthesised, real_maps):
    before = digests(resynthesised)
    resynthesise(resynthesised, real_maps, seed=1)
    with pytest.raises(DataError, match=r"made with seed=1 \(now 2\)"):
        resynthesise(resynthesised, real_maps, seed=2)
    assert digests(resynthesised) == before


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("MAPS", lambda path: os.truncate(path, path.stat().st_size // 3), "cut short"),
        ("LOGCUBE", Path.touch, r"no HDU .*SPX_MFLUX"),
    ],
)
def test_what_is_not_a_maps_file_is_refused_and_nothing_written(
    survey, tmp_path, kind, change, message
):
    path = Path(shutil.copy(utils.find_raw(survey, "13001-1901", kind), tmp_path))
    change(path)
    with pytest.raises(DataError, match=message):
        mock_manga.main(mock_manga.MockConfig(data_dir=tmp_path / "out", from_maps=path))
    assert not (tmp_path / "out").exists()


def test_cards_that_the_archive_does_not_have_are_refused():
    with pytest.raises(KeyError, match="PLATEIFOO"):
        dr17.primary_hdu("MAPS", {"PLATEIFOO": "1-1"})


def test_a_truth_file_with_a_dataset_for_its_group_of_lines_is_refused(tmp_path):
    path = tmp_path / "truth.h5"
    with new_h5(path, TRUTH_SCHEMA, TRUTH_VERSION, Recipe("simulated galaxy", 1), {}, 0) as f:
        f["line_flux"] = np.zeros(3)
    with pytest.raises(DataError, match="not readable"):
        read_truth(path)
