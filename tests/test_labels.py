"""Labels against the published equations, Monte Carlo errors and a real galaxy."""

from dataclasses import replace

import utils

import numpy as np
import pytest
from astropy import units
from conftest import LINES
from dust_extinction.parameter_averages import CCM89

import labels as ll
from line_fits import EMLINES


def as_maps(flux, ivar, bad=None):
    none = {k: np.zeros_like(v, bool) for k, v in flux.items()}
    return ll.LineMaps(flux, ivar, {**none, **(bad or {})})


@pytest.fixture
def bright(line_maps):
    """Maps (4, 5) of bright H II spaxels; sigma is 0.5."""
    flux, ivar, _ = line_maps
    return as_maps(flux, ivar)


def changed(maps, kind, line, at, value):
    """Maps with another flux, ivar or mask of one line in one spaxel."""
    values = getattr(maps, kind)[line].copy()
    values[at] = value
    return replace(maps, **{kind: {**getattr(maps, kind), line: values}})


def test_names_of_lines_are_their_wavelengths_as_in_the_dap():
    assert len(EMLINES) == 35
    for name, wave_aa in EMLINES.items():
        assert int(wave_aa) == int(name.partition("-")[2]), name
    assert {*ll.BPT_LINES, ll.OII_BLUE, ll.OII_RED} <= EMLINES.keys()


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-0.5, -0.5, ll.SF),
        (-0.2, 0.0, ll.COMPOSITE),
        (0.0, 0.8, ll.AGN),
        (0.05, -3.0, ll.COMPOSITE),  # on Kauffmann's pole
        (0.2, -3.0, ll.COMPOSITE),  # right of it, far below Kewley
        (0.47, -9.0, ll.AGN),  # on Kewley's pole
        (0.9, -9.0, ll.AGN),  # right of it, where the formula alone would say below
        (-2.0, 0.97, ll.AGN),  # where the curves have crossed
    ],
)
def test_demarcation_at_known_points(x, y, expected):
    assert ll.demarcate(np.array(x), np.array(y)) == expected


def test_curves_themselves_belong_below():
    x = np.linspace(-1, 0, 30)
    for step, expected in ((-1e-9, ll.SF), (1e-9, ll.COMPOSITE)):
        assert (ll.demarcate(x, 0.61 / (x - 0.05) + 1.3 + step) == expected).all()


@pytest.mark.parametrize(
    ("diagnostic", "ratio", "expected"),
    [
        ("O3N2-M13", 0.5, 8.533 - 0.214 * 0.5),
        ("N2-M13", -0.6, 8.743 - 0.462 * 0.6),
        ("O3N2-PP04", 1.0, 8.41),
        ("N2O2-KD02", 0.0, np.log10(1.54020) + 8.93),
    ],
)
def test_calibration_values(diagnostic, ratio, expected):
    value, _ = ll.calibrated(np.array(ratio), diagnostic)
    assert value == pytest.approx(expected)


@pytest.mark.parametrize("diagnostic", list(ll.CALIBRATIONS))
def test_slope_is_the_derivative(diagnostic):
    at, step = np.linspace(-0.9, 0.5, 7), 1e-6
    low, high = (ll.calibrated(at + sign * step, diagnostic)[0] for sign in (-1, 1))
    numeric = (high - low) / (2 * step)
    np.testing.assert_allclose(ll.calibrated(at, diagnostic)[1], numeric, rtol=1e-6)


@pytest.mark.parametrize("diagnostic", list(ll.CALIBRATIONS))
def test_error_is_the_scatter_of_noisy_measurements(diagnostic):
    rng = np.random.default_rng(0)
    typical = dict(zip(LINES, (60.0, 80.0, 30.0, 30.0, 100.0, 30.0), strict=True))
    sigma, shape = 0.6, (200, 200)
    noisy = {k: v + sigma * rng.standard_normal(shape) for k, v in typical.items()}
    ivar = {k: np.full(shape, sigma**-2) for k in LINES}
    values, errors = ll.metallicity(as_maps(noisy, ivar), diagnostic, star_forming_only=False)
    assert np.nanstd(values) == pytest.approx(np.nanmean(errors), rel=0.05)


def test_dust_does_not_change_dereddened_n2o2():
    clean = dict(zip(LINES, (60.0, 80.0, 35.0, 30.0, 100.1, 30.0), strict=True))
    ivar, law, values = {k: np.full((1, 1), 1e4) for k in LINES}, CCM89(Rv=3.1), []
    k_of = {line: float(law(float(line.split("-")[1]) * units.AA)) * 3.1 for line in LINES}
    for ebv in (0.0, 0.3, 0.8):
        dusty = {k: np.full((1, 1), v * 10 ** (-0.4 * k_of[k] * ebv)) for k, v in clean.items()}
        values.append(ll.metallicity(as_maps(dusty, ivar), "N2O2-KD02", 3, False)[0][0, 0])
        found = ll.balmer_ebv(dusty["Ha-6564"], dusty["Hb-4862"])[0, 0]
        assert found == pytest.approx(ebv, abs=1e-6)
    # the two [O II] lines, 2 Angstrom apart, are dereddened by their mean extinction
    np.testing.assert_allclose(values, values[0], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "line", "value"),
    [
        ("bad", "OIII-5008", True),
        ("flux", "Hb-4862", 0.0),
        ("flux", "Hb-4862", -5.0),
        ("flux", "Hb-4862", np.nan),
        ("flux", "Hb-4862", 1.0),  # S/N 2
        ("ivar", "OIII-5008", 0.0),
    ],
)
def test_a_line_that_is_masked_or_not_detected_leaves_no_label(bright, kind, line, value):
    maps = changed(bright, kind, line, (1, 2), value)
    classes, p_wrong = ll.bpt_classes(maps)
    assert classes[1, 2] == ll.LABEL_NONE
    assert np.isnan(p_wrong[1, 2])
    assert (classes >= 0).sum() == 19
    assert np.isnan(ll.metallicity(maps)[0][1, 2])
    # N2 alone uses neither of these lines
    assert np.isfinite(ll.metallicity(maps, "N2-M13", star_forming_only=False)[0][1, 2])


def test_labels_do_not_change_with_flux_scale(bright):
    flux = {k: 7.3 * v for k, v in bright.flux.items()}
    scaled = as_maps(flux, {k: v / 7.3**2 for k, v in bright.ivar.items()})
    np.testing.assert_array_equal(ll.bpt_classes(bright)[0], ll.bpt_classes(scaled)[0])
    for a, b in zip(ll.metallicity(bright), ll.metallicity(scaled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_metallicity_is_for_star_forming_spaxels_by_default_and_in_the_calibrated_range(bright):
    maps = changed(bright, "flux", "NII-6585", (0, 0), 90.0)  # composite or AGN
    assert ll.bpt_classes(maps)[0][0, 0] != ll.SF
    assert np.isnan(ll.metallicity(maps)[0][0, 0])
    assert np.isfinite(ll.metallicity(maps, star_forming_only=False)[0][0, 0])
    weak = changed(bright, "flux", "NII-6585", (0, 0), 2.1)  # N2 = -1.7 < -1.6
    assert np.isnan(ll.metallicity(weak, "N2-M13", star_forming_only=False)[0][0, 0])


def test_p_wrong_is_half_on_the_line_and_small_far_from_it():
    x = -0.3
    y = 0.61 / (x - 0.05) + 1.3
    flux = {"Ha-6564": 100.0, "NII-6585": 100 * 10**x, "Hb-4862": 30.0, "OIII-5008": 30 * 10**y}
    flux = {k: np.full((1, 1), v) for k, v in flux.items()}
    ivar = {k: np.full((1, 1), 1.0) for k in flux}
    assert ll.bpt_classes(as_maps(flux, ivar))[1][0, 0] == pytest.approx(0.5, abs=0.1)
    flux["NII-6585"] = np.full((1, 1), 8.0)
    assert ll.bpt_classes(as_maps(flux, ivar))[1][0, 0] < 0.01


def test_unknown_diagnostic_is_named():
    with pytest.raises(utils.DataError, match=r"'R23'.*O3N2-M13"):
        ll.lines_needed("R23")


@pytest.mark.parametrize(
    ("n_classes", "values", "expected"),
    [
        (6, [8.3, 8.40, 8.4399, 8.44, 8.9, np.nan], [0, 1, 1, 2, 5, ll.LABEL_NONE]),
        (8, [8.3399, 8.34, 8.9], [0, 1, 7]),
    ],
)
def test_an_edge_belongs_to_the_class_above_it(n_classes, values, expected):
    np.testing.assert_array_equal(ll.label_classes(np.array(values), "logOH", n_classes), expected)


@pytest.mark.parametrize("n_classes", [6, 8])
def test_every_metallicity_class_has_a_name_and_contains_its_middle(n_classes):
    middles = ll.class_middles(n_classes)
    assert len(ll.class_names("logOH", n_classes)) == n_classes == middles.size
    back = ll.label_classes(middles, "logOH", n_classes)
    np.testing.assert_array_equal(back, np.arange(n_classes))


def test_bpt_labels_are_classes_already():
    labels = np.array([0, ll.LABEL_NONE, 2], np.int16)
    np.testing.assert_array_equal(ll.label_classes(labels, "BPT"), labels)
    assert ll.class_names("BPT") == ("star-forming", "composite", "AGN")


def test_numbers_of_classes_without_a_scale_are_refused():
    with pytest.raises(utils.DataError, match="7 metallicity classes: expected 6 or 8"):
        ll.logoh_edges(7)
    with pytest.raises(utils.DataError, match="BPT with 6 classes: expected 3"):
        ll.class_names("BPT", 6)
