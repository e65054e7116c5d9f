"""Simulated galaxies against real ones, closed forms, and what the options promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import utils

import mock_realism
import numpy as np
import pytest
from astropy.io import fits

import mock.physics as physics
import mock_manga
from mock.galaxy import build_scene, draw_params, simulate_galaxy
from mock.truth import read_truth, truth_path

PARAMS = draw_params(1, 1, (19,))


# Noise


def test_depth_scales_the_variance_and_the_noise():
    scene = build_scene(PARAMS)
    deep, shallow = (
        physics.observe(scene, np.random.default_rng(1), depth) for depth in (1.0, 0.04)
    )
    good = (deep.ivar > 0) & (shallow.ivar > 0)
    assert shallow.ivar[good] / deep.ivar[good] == pytest.approx(0.04, rel=1e-5)
    noiseless = (scene.stellar + deep.emline) / deep.redcorr[:, None]
    off = [(g.flux - noiseless)[good] for g in (deep, shallow)]
    assert np.std(off[1]) / np.std(off[0]) == pytest.approx(5, rel=1e-3)
    assert np.corrcoef(off)[0, 1] == pytest.approx(1, abs=1e-4)  # the same seed


def test_shallow_noise_is_that_of_some_of_the_deep_exposures():
    scene = build_scene(PARAMS)
    rng = np.random.default_rng(1)
    deep = physics.observe(scene, rng)
    shallow = physics.observe(scene, rng, 0.25, within=deep)
    noiseless = (scene.stellar + deep.emline) / deep.redcorr[:, None]
    good = deep.ivar > 0
    chi = [((g.flux - noiseless) * np.sqrt(g.ivar))[good] for g in (deep, shallow)]
    assert np.std(chi[1]) == pytest.approx(np.std(chi[0]), rel=0.03)
    # cov(deep, shallow) = var(deep), so the correlation is sqrt(depth)
    assert np.corrcoef(chi)[0, 1] == pytest.approx(0.5, abs=0.03)
    assert (shallow.binned == deep.binned).all()


def test_sky_residuals_are_where_bright_lines_are():
    wave = physics.wave_grid()
    excess = np.array([physics.sky_excess(np.random.default_rng(i)) for i in range(50)])
    assert (excess >= 1).all()
    quiet = (wave < 5560) | ((wave > 5600) & (wave < 5870)) | ((wave > 6330) & (wave < 6980))
    assert excess[:, quiet] == pytest.approx(1, abs=1e-3)
    at = np.searchsorted(wave, 8830.8)
    assert np.median(excess[:, at]) > 1.3
    assert np.percentile(excess[:, at], 95) > 2
    assert excess[:, np.searchsorted(wave, 5578.3)].max() > 3


# Gas


def test_doublets_have_their_limits_of_low_and_high_density():
    # of collisional excitation alone, 3/2 for both pairs by statistical weight, less a few per cent
    low = physics.doublet_ratios(0.1)
    assert low == pytest.approx((1.45, 1.46), abs=0.01)
    sii, oii = physics.doublet_ratios(np.array([1, 10, 100, 1000, 1e5]))
    assert np.all(np.diff(sii) < 0)
    assert np.all(np.diff(oii) < 0)
    lines = physics.hii_ratios(np.array([8.5]), 0, 0, 0, 300.0)
    assert lines["SII-6718"] / lines["SII-6732"] == pytest.approx(physics.doublet_ratios(300.0)[0])
    assert lines["OII-3729"] / lines["OII-3727"] == pytest.approx(physics.doublet_ratios(300.0)[1])


def test_diffuse_gas_raises_the_forbidden_lines_and_leaves_hydrogen():
    logoh = np.array([8.3, 8.6])
    plain, mixed = (physics.hii_ratios(logoh, 0, 0, d) for d in (0.0, 0.2))
    for line, slope in {
        "OIII-5008": 1, "NII-6585": 0.7, "SII-6718": 0.49, "OI-6302": 1.04, "OII-3727": 1.09,
        "Ha-6564": 0,
    }.items():  # fmt: skip
        assert np.log10(mixed[line] / plain[line]) == pytest.approx(0.2 * slope), line


def noiseless_scatter(index: int) -> tuple[float, float]:
    """Scatter of O3N2 metallicity about its linear N2 relation, and its correlation at 3 spaxels.

    Of the brighter spaxels inside the field of a star-forming galaxy; NaN if there are few.
    """
    scene = build_scene(draw_params(1, index, (37,)))
    flux = {k: physics.to_image(scene, v, np.nan) for k, v in scene.line_flux.items()}
    n2, logoh = np.log10(flux["NII-6585"] / flux["Ha-6564"]), physics.logoh_o3n2(flux)
    used = (scene.bits == 0) & (flux["Hb-4862"] > 0.4) & (physics.bpt_class(flux) == 0)
    if used.sum() < 50:
        return np.nan, np.nan
    off = np.full(n2.shape, np.nan)
    off[used] = logoh[used] - np.polyval(np.polyfit(n2[used], logoh[used], 1), n2[used])
    pairs = np.concatenate([(off[3:] * off[:-3]).ravel(), (off[:, 3:] * off[:, :-3]).ravel()])
    return float(np.nanstd(off)), float(np.nanmean(pairs) / np.nanmean(off**2))


@pytest.mark.slow
def test_line_ratios_scatter_as_in_real_galaxies_and_smoothly():
    drawn = (draw_params(1, i, (37,)) for i in range(24))
    found = [noiseless_scatter(p.index) for p in drawn if p.kind == "star-forming"]
    scatter, lag = np.transpose(found)
    assert np.isfinite(scatter).sum() > 8
    assert 0.02 < np.nanmedian(scatter) < 0.03
    assert np.nanmin(scatter) > 0.003
    assert np.nanmedian(lag) > 0.4


# Stars


def test_continuum_fit_absorbs_a_smooth_curve_and_nothing_else():
    wave = physics.wave_grid()
    mean = np.ones((4563, 3), np.float32) * [1, 2, 3]
    x = np.linspace(-1, 1, 4563)[:, None]
    smooth = mean * (1 + 0.2 * x - 0.1 * x**3)
    assert physics.fit_continuum(smooth, mean) == pytest.approx(smooth, rel=1e-5)
    dip = smooth * (1 - 0.1 * np.exp(-0.5 * ((wave[:, None] - 6564) / 4) ** 2))
    left = 1 - dip / physics.fit_continuum(dip, mean)
    assert left[np.argmin(np.abs(wave - 6564))] == pytest.approx(0.1, abs=0.01)


def test_a_fit_of_the_continuum_errs_by_about_one_per_cent():
    off = []
    for index in range(6):
        scene = build_scene(draw_params(1, index, (19,)))
        rest = physics.wave_grid() / (1 + scene.z)
        used = (rest > 3800) & (rest < 7400)
        clear = scene.bits[scene.ys, scene.xs] == 0
        ratio = scene.fitted[used][:, clear] / scene.stellar[used][:, clear] - 1
        off.append(np.sqrt(np.mean(ratio**2)))
    assert 0.005 < np.median(off) < 0.02


def test_galaxies_differ_in_their_stars_and_repeats_do_not():
    one, other = (physics.draw_stars(np.random.default_rng(i)) for i in (1, 2))
    same = physics.draw_stars(np.random.default_rng(1))
    assert (one.features == same.features).all()
    a, b, c = (physics.stellar_templates(0.03, 60.0, s)[2, 1] for s in (one, other, None))
    assert 0.003 < np.std(a / b) < 0.2
    assert 0.003 < np.std(a / c) < 0.2


# Options


def survey(folder: Path, **settings) -> dict[str, str]:
    config = mock_manga.MockConfig(data_dir=folder, n_galaxies=1, bundles=(19,), **settings)
    return mock_manga.simulate_survey(config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Data folder with one galaxy; what it holds may not be changed."""
    folder = tmp_path_factory.mktemp("plain")
    assert survey(folder) == {"13001-1901": "written"}
    return folder


def test_deep_labels_are_the_maps_of_the_survey_with_shallower_cubes(plain, tmp_path):
    assert survey(tmp_path, depth=0.04, deep_labels=True) == {"13001-1901": "written"}
    maps, cubes = (
        [utils.find_raw(folder, "13001-1901", form) for folder in (plain, tmp_path)]
        for form in ("MAPS", "LOGCUBE")
    )
    assert maps[0].read_bytes() == maps[1].read_bytes()
    deep, shallow = (fits.getdata(path, "IVAR") for path in cubes)
    seen = deep > 0
    assert (seen == (shallow > 0)).all()
    assert shallow[seen] / deep[seen] == pytest.approx(0.04, rel=1e-5)
    a, b = (read_truth(truth_path(folder, "13001-1901"))[0] for folder in (plain, tmp_path))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)
    assert survey(plain, depth=0.04) == {"13001-1901": "failed"}


def test_without_deep_labels_a_shallow_galaxy_has_larger_errors():
    deep, shallow = (simulate_galaxy(replace(PARAMS, depth=d)) for d in (1.0, 0.25))
    i = list(physics.EMLINES).index("Ha-6564")
    good = np.isfinite(deep.fit["gflux_var"][i]) & np.isfinite(shallow.fit["gflux_var"][i])
    ratio = shallow.fit["gflux_var"][i][good] / deep.fit["gflux_var"][i][good]
    assert ratio == pytest.approx(4, rel=1e-3)
    assert shallow.binned.sum() < deep.binned.sum()


def test_truth_covers_every_spaxel_of_the_field(plain):
    truth, attrs = read_truth(truth_path(plain, "13001-1901"))
    seen = np.isfinite(truth["continuum_5500"])
    assert 500 < seen.sum() < 34 * 34
    for name, values in truth.items():
        assert (np.isfinite(values) == seen).all() or name == "bpt", name
    assert ((truth["bpt"] >= 0) == seen).all()
    assert {"logoh_physical", "ionisation", "nitrogen", "diffuse", "density"} <= truth.keys()
    assert attrs["schema_version"] == 4


def test_metallicity_relation_has_the_correlation_asked_for():
    def drawn(relation: float) -> tuple[np.ndarray, ...]:
        found = [draw_params(3, i, (19,), relation) for i in range(400)]
        found = [p for p in found if p.index == p.twin_of]
        return tuple(
            np.array([getattr(p, k) for p in found])
            for k in ("logoh_re", "flux_re", "z", "v_max", "axis_ratio")
        )

    logoh, flux, z, v_max, axis_ratio = drawn(0.8)
    speed = v_max / np.sqrt(1 - (axis_ratio**2 - 0.04) / 0.96)
    assert np.corrcoef(logoh, np.log10(flux))[0, 1] == pytest.approx(0.8, abs=0.06)
    assert np.corrcoef(logoh, speed)[0, 1] == pytest.approx(0.8, abs=0.06)
    plain = drawn(0.0)
    assert (plain[0] == logoh).all()
    assert (plain[2] == z).all()
    assert abs(np.corrcoef(plain[0], np.log10(plain[1]))[0, 1]) < 0.15


# The comparison


def test_real_maps_give_the_values_that_the_mocks_are_set_to(real_maps):
    values = mock_realism.maps_values(real_maps)
    assert values["scatter about N2"] == pytest.approx(0.0236, abs=5e-4)
    assert values["[SII] 6718/6732"] == pytest.approx(1.43, abs=0.02)
    assert values["gas dispersion"] == pytest.approx(42, abs=1)
    assert values["misfit of the continuum"] == pytest.approx(0.011, abs=0.001)


def test_planted_scatter_is_measured_without_the_noise_of_the_lines(plain, tmp_path):
    path = utils.find_raw(plain, "13001-1901", "MAPS")
    rng = np.random.default_rng(5)
    with fits.open(path) as f:
        header = f["EMLINE_GFLUX"].header
        row = {header[f"C{i:02d}"]: i - 1 for i in range(1, 36)}
        shape = f["EMLINE_GFLUX"].data.shape[1:]
        f["EMLINE_GFLUX_MASK"].data[:] = 0
        n2 = rng.uniform(-0.8, -0.5, shape)
        logoh = 8.743 + 0.462 * n2 + 0.025 * rng.standard_normal(shape)
        o3 = (8.533 - logoh) / 0.214 + n2
        flux = {"Hb-4862": 1.0, "OIII-5008": 10**o3, "Ha-6564": 3.0, "NII-6585": 3 * 10**n2}
        for line, value in flux.items():
            error = 0.04 * value * np.ones(shape)
            f["EMLINE_GFLUX"].data[row[line]] = value + error * rng.standard_normal(shape)
            f["EMLINE_GFLUX_IVAR"].data[row[line]] = error**-2
        f.writeto(tmp_path / "planted-MAPS.fits")
    values = mock_realism.maps_values(tmp_path / "planted-MAPS.fits")
    assert values["scatter about N2"] == pytest.approx(0.025, abs=0.002)


def test_white_noise_with_exact_errors_has_chi_one_and_no_correlation():
    rng = np.random.default_rng(2)
    sigma = rng.uniform(0.5, 2, 4563)
    flux, ivar = sigma * rng.standard_normal(4563), sigma**-2
    ivar[1000:1003] = 0
    chi = mock_realism.second_differences(flux, ivar)
    assert np.isnan(chi[999:1004]).all()
    assert np.nanstd(chi) == pytest.approx(1, abs=0.04)
    values = mock_realism.noise_values(flux, ivar)
    assert values["chi below 8500"] == pytest.approx(1, abs=0.06)
    assert values["beyond 4 sigma above 8500"] < 0.3
    pixels = mock_realism.pixel_correlation(flux, np.ones(4563))
    assert pixels["correlation at 1 pixel(s)"] == pytest.approx(0, abs=0.06)


def test_bands_of_a_planted_spectrum_are_measured():
    z, wave = 0.03, mock_realism.WAVE / 1.03
    flux = np.where(wave < 6500, 1.0, 0.9)
    flux[(wave > 7100) & (wave < 7120)] *= 0.5
    values = mock_realism.star_values(z, flux, np.ones(4563))
    assert values["f7500/f5500"] == pytest.approx(0.9)
    assert values["TiO 7130"] == pytest.approx(10, abs=1)
    assert values["Dn4000"] == pytest.approx((4050 / 3900) ** 2, rel=0.01)


def test_the_table_says_which_quantities_are_out_of_range(capsys):
    real = {"colour": [0.9, 1.0], "alone": [2.0], "scatter about N2": [0.0236], "none": [1.0]}
    mock = {"colour": [0.5, 0.6, 0.7], "alone": [2.2], "scatter about N2": [0.003]}
    rows = {row["name"]: row for row in mock_realism.compare(real, mock)}
    assert [rows[k].get("in_range") for k in real] == [False, True, False, None]
    assert rows["alone"]["range"] == pytest.approx([1.7, 2.3])
    mock_realism.print_table(list(rows.values()))
    assert capsys.readouterr().out.count("NO") == 2


def test_without_real_files_the_comparison_is_skipped_in_one_line(tmp_path, capsys):
    config = mock_realism.Config(real=tmp_path, results=tmp_path / "results")
    assert mock_realism.main(config) == 0
    out = capsys.readouterr().out
    assert out.startswith("skipped: no manga-7815-3702")
    assert out.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_simulated_galaxies_pass_the_comparison(shared_manga, tmp_path):
    config = mock_realism.Config(real=shared_manga, n_galaxies=6, results=tmp_path)
    assert mock_realism.main(config) == 0
    rows = json.loads((tmp_path / "mock_realism.json").read_text())["rows"]
    verdicts = [row["in_range"] for row in rows if "in_range" in row]
    assert len(verdicts) > 20
    assert np.mean(verdicts) > 0.7
