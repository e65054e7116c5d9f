"""What the figures show: read back from their axes, against astropy, scipy and closed forms."""

import json
import shutil
from dataclasses import replace

import utils

import mock_cubes
import numpy as np
import pandas as pd
import pytest
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS
from conftest import write_maps
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from scipy.integrate import quad

import data_io
import diagrams
import eval_fns
import inference
import sky_maps
import vis_fns
from labels import (
    AGN,
    BPT_CLASSES,
    BPT_LINES,
    CLASS_COLOURS,
    COMPOSITE,
    LABEL_NONE,
    SF,
    class_middles,
    class_names,
    demarcate,
)
from recipe import Recipe
from run_folder import ModelCard
from sky_maps import Sky
from vis_fns import VisConfig


@pytest.fixture(scope="module")
def run_dir(trained_run, tmp_path_factory):
    """A copy of the trained run, evaluated."""
    run = shutil.copytree(trained_run, tmp_path_factory.mktemp("evaluated") / "run")
    eval_fns.evaluate_split(run)
    return run


@pytest.fixture(scope="module")
def card(run_dir):
    return ModelCard.read(run_dir)


@pytest.fixture
def ax():
    return Figure().subplots()


def prediction_of(classes, n_classes, plateifu="1-1"):
    """A prediction of all spaxels of the field."""
    is_bpt, probabilities = n_classes == 3, np.zeros((*classes.shape, n_classes))
    names = BPT_CLASSES if is_bpt else class_names("logOH", n_classes)
    values = None if is_bpt else class_middles(n_classes)
    inside = np.ones(classes.shape, bool)
    return inference.CubePrediction(plateifu, classes, probabilities, names, inside, {}, values)


def mesh_of(ax) -> QuadMesh:
    return [c for c in ax.collections if isinstance(c, QuadMesh)][-1]


def texts_of(ax) -> list[str]:
    return [t.get_text() for t in ax.texts]


def legend_of(ax) -> list[str]:
    return [t.get_text() for t in ax.get_legend().get_texts()]


def header(rotation_deg: float = 0.0) -> tuple[WCS, str]:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crpix, wcs.wcs.crval = [18, 17], [232.5, 48.7]
    cos, sin = np.cos(np.deg2rad(rotation_deg)), np.sin(np.deg2rad(rotation_deg))
    wcs.wcs.cd = np.array([[cos, -sin], [sin, cos]]) @ np.diag([-0.5 / 3600, 0.5 / 3600])
    return wcs, wcs.to_header().tostring(sep="\n")


@pytest.mark.parametrize("rotation", [0, 30, 180])
def test_spaxels_lie_where_astropy_puts_them(rotation):
    wcs, cards = header(rotation)
    east, north = sky_maps.sky_edges((33, 35), cards)
    y, x = np.mgrid[:34, :36] - 0.5
    sky = SkyCoord(*wcs.all_pix2world(x, y, 0), unit="deg")
    offsets = SkyCoord(*wcs.wcs.crval, unit="deg").spherical_offsets_to(sky)
    np.testing.assert_allclose(east, offsets[0].arcsec, atol=1e-3)
    np.testing.assert_allclose(north, offsets[1].arcsec, atol=1e-3)


def test_outline_of_a_rectangle_has_its_perimeter():
    inside = np.zeros((10, 12), bool)
    inside[2:6, 3:10] = True
    segments = sky_maps.outline_segments(inside, *sky_maps.sky_edges((10, 12)))
    lengths = np.linalg.norm(segments[:, 1] - segments[:, 0], axis=1)
    assert lengths.sum() == pytest.approx(2 * (4 + 7) * 0.5)
    assert np.abs(segments[..., 0]).max() <= 3.0


def test_maps_without_wcs_have_north_up_and_east_left_and_claim_nothing_unknown():
    inside, (east, north) = np.ones((9, 9), bool), sky_maps.sky_edges((9, 9))
    assert north[-1, 0] > north[0, 0]  # up the array is north
    assert east[0, 0] > east[0, -1]  # along the array is west
    for attrs in ({}, {"redshift": -0.001, "reff_arcsec": -9999.0}):
        ax = sky_maps.finish_sky_axes(Figure().subplots(), Sky(inside, inside, attrs))
        left, right = ax.get_xlim()
        assert left > right  # so that east is on the left of the figure
        assert "arcsec" in ax.get_xlabel()
        assert {*texts_of(ax)} == {"N", "E", '1"', ""}
        assert not ax.patches


def test_a_metallicity_near_the_truth_counts_and_a_missing_one_does_not():
    truth = np.full(4, 8.5)
    labels, predicted = np.array([8.5, np.nan, 8.7, np.nan]), np.array([8.45, 8.59, 8.3, 8.41])
    said = vis_fns.reach(predicted, labels, truth)
    wanted = "prediction in 3, label in 1 of 4 star-forming spaxels"
    assert said == f"within 0.1 dex of the truth: {wanted}"


def test_radius_and_kiloparsecs_are_drawn_where_the_galaxy_is(ax):
    """The scale by Hogg (1999, arXiv:astro-ph/9905116, eqs. 15, 18), flat, Planck 2018."""
    z, h0, matter = 0.05, 67.66, 0.3097
    integral = quad(lambda x: 1 / np.sqrt(matter * (1 + x) ** 3 + 1 - matter), 0, z)[0]
    kpc = 299792.458 / h0 * integral / (1 + z) * 1e3 * np.deg2rad(1 / 3600)  # per arcsec
    wcs, cards = header()
    ra, dec = wcs.wcs.crval
    attrs = {"redshift": z, "reff_arcsec": 4.0, "wcs_header": cards, "objdec": dec + 1 / 3600}
    attrs |= {"pa_deg": 30.0, "ellipticity": 0.5}
    attrs["objra"] = ra + 2 / 3600 / np.cos(np.deg2rad(dec))
    inside = np.ones((33, 35), bool)
    sky_maps.finish_sky_axes(ax, Sky(inside, inside, attrs))
    assert f'5" = {5 * kpc:.1f} kpc' in texts_of(ax)
    assert any(f'4.0" = {4 * kpc:.1f} kpc' in t for t in texts_of(ax))
    rings = [p for p in ax.patches if isinstance(p, Ellipse)]
    assert {(ring.width, ring.height) for ring in rings} == {(4.0, 8.0)}
    for ring in rings:
        assert ring.get_center() == pytest.approx((2, 1), abs=1e-3)  # east, north
        tip = ring.get_patch_transform().transform((0, 1)) - ring.get_center()
        assert tip == pytest.approx([4 * 0.5, 4 * np.sqrt(0.75)])  # 30 degrees, north through east


@pytest.mark.parametrize(("task", "n"), [("BPT", 3), ("logOH", 6), ("logOH", 8)])
def test_classes_have_fixed_distinct_colours_and_missing_ones_none(ax, task, n):
    classes, inside = np.full((5, 8), LABEL_NONE), np.ones((5, 8), bool)
    classes[1, :n] = range(n)
    usable = inside.copy()
    usable[0, 0] = False
    sky_maps.plot_class_map(ax, classes, task, n, Sky(inside, usable))
    hatched, grey, shown = (c for c in ax.collections if isinstance(c.get_array(), np.ndarray))
    assert shown.get_array().mask.sum() == 40 - n
    colours = shown.to_rgba(shown.get_array())[1, :n, :3]
    np.testing.assert_allclose(colours, [to_rgb(c) for c in CLASS_COLOURS[task, n]])
    assert (~grey.get_array().mask).sum() == 1  # the masked spaxel
    assert hatched.get_hatch()
    assert len(hatched.get_paths()) == 40 - n - 1  # usable, but without a label
    assert set(class_names(task, n)) | {"no label", "masked"} == set(legend_of(ax))
    whole = Sky(inside, inside)
    ax = sky_maps.plot_class_map(Figure().subplots(), 0 * classes, task, n, whole)
    assert set(legend_of(ax)) == set(class_names(task, n))  # nothing else there


def test_difference_map_shows_value_minus_label():
    label, predicted, error = Figure().subplots(1, 3)
    labels, classes = np.full((6, 6), np.nan, np.float32), np.zeros((6, 6), np.int16)
    labels[2, 3], labels[4, 1] = 8.50, 8.41
    classes[2, 3], classes[4, 1] = 5, 1
    logoh = np.full((6, 6), 8.3)
    logoh[2, 3], logoh[4, 1] = 8.58, 8.42
    prediction = replace(prediction_of(classes, 6), logoh=logoh)
    sky_maps.plot_answer(label, prediction, labels)
    sky_maps.plot_answer(predicted, prediction, logoh)
    assert mesh_of(label).get_clim() == mesh_of(predicted).get_clim()
    sky_maps.plot_difference(error, prediction, labels)
    shown = mesh_of(error).get_array()
    assert (~shown.mask).sum() == 2
    assert [shown[2, 3], shown[4, 1]] == pytest.approx([0.08, 0.01], abs=1e-5)
    assert error.get_title() == "MAE 0.045 dex, class accuracy 50%"
    assert error.child_axes[0].get_ylabel() == "prediction - label (dex)"
    empty = sky_maps.plot_difference(Figure().subplots(), prediction, labels * np.nan, "truth")
    assert empty.get_title() == "no truth"


def test_bpt_classes_agree_or_differ(ax):
    labels = np.zeros((2, 3), np.int16)
    labels[0], classes = LABEL_NONE, labels.copy()
    classes[:], classes[1, 0] = 0, 2
    sky_maps.plot_difference(ax, prediction_of(classes, 3), labels)
    assert ax.get_title() == "class accuracy 67%"
    shown = mesh_of(ax).get_array()
    np.testing.assert_array_equal(shown[1], [False, True, True])
    assert shown[0].mask.all()
    assert legend_of(ax) == ["agrees", "differs", "no label"]


def test_interval_map_counts_the_labels_inside_and_strange_spaxels_are_crossed_out(ax):
    logoh, labels = np.full((6, 6), 8.5), np.full((6, 6), np.nan)
    labels[1, :4] = 8.45, 8.49, 8.51, 8.60
    unlike = np.zeros((6, 6), bool)
    unlike[0, 5] = True
    prediction = replace(
        prediction_of(np.zeros((6, 6), np.int16), 6),
        logoh=logoh, lower=logoh - 0.02, upper=logoh + 0.02, unlike=unlike,
    )  # fmt: skip
    sky_maps.plot_doubt(ax, prediction, labels)
    assert ax.get_title() == "90% interval: holds 50% of the labels"
    np.testing.assert_allclose(mesh_of(ax).get_array(), 0.02)
    assert mesh_of(ax).colorbar is None  # of one value
    assert legend_of(ax) == ["constant: +-0.020 dex"]
    prediction.upper[0, 0] += 0.02
    sky_maps.plot_doubt(other := Figure().subplots(), prediction)
    assert mesh_of(other).get_clim() == pytest.approx((0.02, 0.03))
    assert mesh_of(other).colorbar is not None
    (crosses,) = sky_maps.mark_distrusted(Figure().subplots(), prediction).lines
    np.testing.assert_allclose(crosses.get_xydata(), [[-1.25, -1.25]])  # the lower right spaxel


def test_metallicities_of_spaxels_not_known_to_be_star_forming_are_hatched(ax):
    classes, bpt = np.zeros((3, 4), np.int16), np.full((3, 4), SF)
    classes[2, 3] = LABEL_NONE  # not usable
    bpt[0, :3], bpt[2, 3] = (COMPOSITE, AGN, LABEL_NONE), AGN
    prediction = prediction_of(classes, 6)
    assert not sky_maps.mark_distrusted(ax, prediction, bpt).collections  # classes alone
    prediction = replace(prediction, logoh=np.full((3, 4), 8.5))
    (hatched,) = sky_maps.mark_distrusted(ax, prediction, bpt).collections
    assert hatched.get_hatch()
    assert len(hatched.get_paths()) == 3
    assert hatched.to_rgba([0.0])[0, 3] == 0  # the map stays visible
    assert legend_of(ax) == ["composite, AGN or no BPT label"]
    alike = sky_maps.mark_distrusted(Figure().subplots(), prediction, 0 * bpt)
    assert alike.get_legend() is None


@pytest.mark.parametrize(
    ("limits", "extend"),
    [((-0.1, 0.1), "both"), ((-0.5, 0.1), "max"), ((-0.1, 0.5), "min"), (None, "neither")],
)
def test_colour_bar_is_pointed_where_values_exceed_it(ax, limits, extend):
    values, inside = np.array([[-0.3, 0.05], [0.2, np.nan]]), np.ones((2, 2), bool)
    sky_maps.plot_value_map(ax, values, Sky(inside, inside), "x", limits=limits)
    assert mesh_of(ax).colorbar.extend == extend
    assert mesh_of(ax).get_clim() == (limits or (-0.3, 0.2))


def test_part_map_explains_hatch_and_grey(ax):
    inside, parts = np.ones((6, 6), bool), np.full((6, 6), LABEL_NONE)
    inside[2, 2], parts[:2] = False, 1
    sky_maps.plot_part_map(ax, parts, inside)
    assert legend_of(ax) == ["train", "val", "test", "no label", "masked"]


def test_class_colours_stay_apart_for_colour_blind_readers():
    """Red-green blindness by Vienot et al. (1999): all classes must differ after it."""
    rgb_to_lms = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    missing_l = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    missing_m = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for colours in CLASS_COLOURS.values():
        rgb = np.array([to_rgb(c) for c in colours]) ** 2.2
        for missing in (missing_l, missing_m):
            seen = rgb @ (np.linalg.inv(rgb_to_lms) @ missing @ rgb_to_lms).T
            seen = np.clip(seen, 0, 1) ** (1 / 2.2)
            gaps = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
            assert gaps[~np.eye(len(seen), dtype=bool)].min() > 0.1


def test_bpt_curves_are_kauffmanns_and_kewleys_and_separate_the_points(ax):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1.2, 0.4, 300), rng.uniform(-1, 1.2, 300)
    classes = demarcate(x, y)
    classes[:20] = LABEL_NONE
    diagrams.plot_bpt(ax, x, y, classes, "BPT", 3, "title")
    by_name = {line.get_label(): line.get_xydata() for line in ax.lines}
    for name, pole, top in (("Kauffmann+ 2003", 0.05, 1.3), ("Kewley+ 2001", 0.47, 1.19)):
        curve = by_name[name]
        drawn = curve[np.isfinite(curve[:, 1]) & (curve[:, 0] > -1.2)]  # they cross left of that
        assert drawn[:, 0].max() < pole
        np.testing.assert_allclose(drawn[:, 1], 0.61 / (drawn[:, 0] - pole) + top, atol=2e-3)
    filled, hollow = ax.collections
    counts = np.bincount(classes[20:], minlength=3)
    names = [f"{name}: {count}" for name, count in zip(BPT_CLASSES, counts, strict=True)]
    assert legend_of(ax)[:4] == ["no label: 20", *names]
    np.testing.assert_array_equal(hollow.get_offsets(), np.stack([x, y], 1)[:20])
    assert hollow.get_facecolor().size == 0
    where = {(a, b): k for a, b, k in zip(x, y, classes, strict=True)}
    shown = np.array([where[tuple(point)] for point in filled.get_offsets()])
    np.testing.assert_array_equal(np.bincount(shown), counts)
    wanted = np.array([to_rgb(colour) for colour in CLASS_COLOURS["BPT", 3]])[shown]
    np.testing.assert_allclose(filled.get_facecolor()[:, :3], wanted)
    rarest = counts.argmin()
    assert (shown[-counts[rarest] :] == rarest).all()  # on top
    others = shown[: -counts[rarest]]
    assert (np.diff(others) != 0).mean() > 0.2  # in random order
    for label, line in ((ax.get_xlabel(), "6585"), (ax.get_ylabel(), "5008")):
        assert line in label
        assert "vacuum" in label


def test_bpt_figure_shows_the_lines_of_the_maps_that_the_labels_were_derived_from(tmp_path):
    plateifu, shape = "8000-101", (4, 5)
    flux = np.random.default_rng(1).uniform(1, 5, (4, *shape))
    ivar = np.full(flux.shape, 100.0)
    ivar[0, 0, 0] = 0.01  # below the cut
    raw = utils.raw_dir(tmp_path, plateifu)
    for kind, steps in (("HYB10", 1), ("SPX", 7)):  # two analyses: the labels say which
        scaled = steps ** np.arange(4)[:, None, None] * flux
        maps = [dict(zip(BPT_LINES, a, strict=True)) for a in (scaled, ivar, 0 * flux)]
        write_maps(raw / f"manga-{plateifu}-MAPS-{kind}.fits", *maps, lines=BPT_LINES)

    def write_labels(**about):
        labels, recipe = np.ones(shape, np.int16), Recipe("labels", 0, {"min_snr": 2.0})
        path = utils.label_path(tmp_path, "BPT", plateifu)
        data_io.write_labels(path, labels, 0 * labels, recipe, about)

    in_raw = raw / f"manga-{plateifu}-MAPS-HYB10.fits"
    classes = np.zeros(shape, np.int16)
    classes[3, 3] = LABEL_NONE
    prediction = prediction_of(classes, 3, plateifu)
    keep = np.ones(shape, bool)
    keep[0, 0] = keep[3, 3] = False
    ha, hb, nii, oiii = flux[:, keep]
    wanted = np.log10([nii / ha, oiii / hb]).T
    own = tmp_path / "my.fits"  # a file that was given as --maps, outside of raw/
    for about in ({"source_file": in_raw.name}, {"source_file": own.name, "source_path": str(own)}):
        write_labels(**about)
        figure = vis_fns.bpt_figure(tmp_path, prediction, "BPT")
        assert figure.get_suptitle() == f"{plateifu}: 18 spaxels with S/N > 2 in all four lines"
        for ax, entry in zip(figure.axes, ("composite: 18", "star-forming: 18"), strict=True):
            assert entry in legend_of(ax)
            found = ax.collections[0].get_offsets()
            np.testing.assert_allclose(np.sort(found, axis=0), np.sort(wanted, axis=0), atol=1e-5)
        own.write_bytes(in_raw.read_bytes())
    for about, message in (
        ({}, "2 MAPS files"),
        (
            {"source_file": "my.fits"},
            r"8000/101/my\.fits: no such file.* Copy or link it to .*raw/8000/101",
        ),
    ):
        write_labels(**about)
        with pytest.raises(utils.DataError, match=message):
            vis_fns.bpt_figure(tmp_path, prediction, "BPT")


def test_confusion_shows_fractions_of_the_true_class_and_none_of_a_class_without_labels(ax):
    confusion = np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]])
    diagrams.plot_confusion(ax, confusion, ["a", "b", "c"], "title")
    cells = ["0.80\n8", "0.20\n2", "0.00\n0", "0.20\n1", "0.80\n4", "0.00\n0", "-", "-", "-"]
    assert texts_of(ax) == cells
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array()[0], [0.8, 0.2, 0.0])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c (no label)"]
    assert ax.get_ylabel() == "label (each row sums to 1)"
    assert image.colorbar.ax.get_ylabel() == "fraction of the true class"
    colours = image.to_rgba(image.get_array())[..., :3]
    np.testing.assert_allclose(colours[2], [to_rgb(diagrams.EMPTY_COLOUR)] * 3)
    assert (np.ptp(colours[:2], axis=2) > 0).all()  # not grey


def test_lines_are_at_vacuum_wavelengths():
    """Standard-air wavelengths (NIST) through Morton (2000, ApJS 130, 403, eq. 8)."""
    air = {
        r"H$\beta$ 4862": 4861.35, "[OIII] 4960": 4958.911, "[OIII] 5008": 5006.843,
        "HeI 5877": 5875.62, "[OI] 6302": 6300.304, "[OI] 6365": 6363.776,
        "[NII] 6549": 6548.05, r"H$\alpha$ 6564": 6562.79, "[NII] 6585": 6583.45,
        "[SII] 6718": 6716.44, "[SII] 6732": 6730.816,
    }  # fmt: skip
    assert air.keys() == diagrams.EMISSION_LINES.keys()
    for name, wave in air.items():
        s2 = (1e4 / wave) ** 2
        index = 1 + 8.34254e-5 + 2.406147e-2 / (130 - s2) + 1.5998e-4 / (38.9 - s2)
        assert diagrams.EMISSION_LINES[name] == pytest.approx(wave * index, abs=0.05)
        assert name.split()[-1] == str(int(diagrams.EMISSION_LINES[name]))


def test_only_lines_inside_the_spectrum_are_marked(ax):
    wave, flux = np.geomspace(6400, 6600, 50), np.ones(50)
    flux[3] = np.nan
    diagrams.plot_spectrum(ax, wave, flux, np.full(50, 4.0))
    marked = texts_of(ax)
    assert marked == ["[NII] 6549", r"H$\alpha$ 6564", "[NII] 6585"]
    wide = diagrams.mark_lines(Figure().subplots(), 5000, 8000)
    shifts = {t.get_text(): t.xyann[0] for t in wide.texts}
    assert np.diff([shifts[name] for name in marked]).min() >= 10  # points: none covers another
    assert legend_of(ax) == ["flux density", r"1$\sigma$ error"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 0.5)  # 1/sqrt(4)
    assert ax.get_ylabel().startswith("flux density")
    assert ax.get_xlabel() == "rest wavelength in vacuum (Angstrom)"


@pytest.mark.parametrize(
    ("epochs", "ticks"), [(1, [1]), (2, [1, 2]), (7, [1, 3, 5, 7]), (20, [1, 4, 8, 12, 16, 20])]
)
def test_training_curves_show_every_epoch_the_best_and_the_baselines(card, epochs, ticks):
    names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
    metrics = pd.DataFrame({"epoch": range(1, epochs + 1), **{n: 0.5 for n in names}})
    baselines = {"val_majority_accuracy": 0.2, "val_spectrum_only_accuracy": 0.6}
    card = replace(card, best={"epoch": 1}, baselines=baselines)
    axes = diagrams.plot_training_curves(Figure().subplots(1, 2), metrics, card)
    for ax in axes:
        assert ax.get_xticks().tolist() == ticks
        low, high = ax.get_xlim()
        assert low < 1 <= epochs < high
        assert ax.lines[0].get_marker() == "o"  # a line alone does not show one epoch
    drawn = {line.get_label(): line for line in axes[1].lines}
    assert set(drawn["best epoch: 1"].get_xdata()) == {1}
    assert set(drawn["validation, linear model"].get_ydata()) == {0.6}
    assert set(drawn["validation, majority class"].get_ydata()) == {0.2}
    assert legend_of(axes[1]) == list(drawn)
    metrics["val_mae_dex"] = 0.02
    best = {"epoch": 0, "monitor": "mae_dex", "val_loss": 0.4, "val_mae_dex": 0.01}
    start = replace(card, best=best, baselines={"val_line_ratios_mae_dex": 0.03})
    axes = diagrams.plot_training_curves(Figure().subplots(1, 2), metrics, start)
    for ax, at_start, title in zip(axes, (0.4, 0.01), ("loss", "mean absolute"), strict=True):
        assert ax.get_xlim()[0] < 0
        (point,) = (line for line in ax.lines if line.get_label() == "validation, start")
        np.testing.assert_allclose(point.get_xydata(), [[0, at_start]])
        assert ax.get_ylabel().startswith(title)
    assert set(axes[1].lines[0].get_ydata()) == {0.02}
    wanted = ["training", "validation", "validation, start", "kept: the start"]
    assert legend_of(axes[1]) == [*wanted, "validation, line ratios"]
    axes = diagrams.plot_training_curves(Figure().subplots(1, 2), metrics)
    assert legend_of(axes[1]) == ["training", "validation"]  # all that metrics.csv alone says


def test_run_figures_show_the_results_of_the_run(run_dir, card):
    figures = vis_fns.run_figures(run_dir, card)
    assert set(figures) == {"training_curves", "confusion_test", "explained_variance"}
    loss, accuracy = figures["training_curves"].axes
    metrics = pd.read_csv(run_dir / "metrics.csv")
    for line, name in zip(loss.lines[:2], ("train_loss", "val_loss"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), metrics[name])
    best = f"best epoch: {card.best['epoch']}"
    assert {best, "validation, majority class", "validation, linear model"} < {*legend_of(accuracy)}
    stats = data_io.read_stats(run_dir / "stats.h5")
    heights = [b.get_height() for b in figures["explained_variance"].axes[0].patches]
    np.testing.assert_allclose(heights, stats.explained_ratio)
    result = json.loads((run_dir / "test" / "metrics.json").read_text())
    title = figures["confusion_test"].axes[0].get_title()
    assert title.startswith("12 + log(O/H), test part of the hard split")
    assert f"accuracy {result['accuracy']:.3f}: {result['spaxels']} spaxels, 2 galaxies" in title


def test_what_a_run_lacks_or_what_is_outdated_is_reported(run_dir, card, tmp_path, caplog):
    assert vis_fns.run_figures(tmp_path, card) == {}
    assert f"no {tmp_path / 'metrics.csv'}" in caplog.text
    assert f"run_SSFTT_training.py --config {tmp_path / 'config.json'}" in caplog.text
    assert f"python eval_fns.py --run-dir {tmp_path} --part test" in caplog.text
    part = shutil.copytree(run_dir / "test", tmp_path / "test")
    result = json.loads((part / "metrics.json").read_text())
    result |= {"spaxels": 1, "galaxies": 1, "best_epoch": 7}
    utils.write_json(part / "metrics.json", result)
    figure = vis_fns.run_figures(tmp_path, card)["confusion_test"]
    assert figure.axes[0].get_title().endswith(": 1 spaxel, 1 galaxy")
    assert f"epoch 7, the model: epoch {card.best['epoch']}" in caplog.text


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("metrics.csv", "Copy it again, or retrain"),
        ("test/metrics.json", "python eval_fns.py --run-dir"),
        ("test/confusion.csv", "python eval_fns.py --run-dir"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b"a,b\n1"])
def test_damaged_results_are_refused_in_one_line(run_dir, card, tmp_path, file, remedy, content):
    run = shutil.copytree(run_dir, tmp_path / "run")
    (run / file).write_bytes(content)
    with pytest.raises(utils.DataError, match=remedy) as refused:
        vis_fns.run_figures(run, card)
    assert "\n" not in str(refused.value)


def test_components_and_their_variances_are_drawn_with_the_remainder(run_dir, ax):
    stats = data_io.read_stats(run_dir / "stats.h5")
    figure = vis_fns.components_figure(stats, n=3)
    assert len(figure.axes) == 4
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), stats.mean)
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), stats.components[1])
    three = {"components": np.zeros((3, 100)), "explained_ratio": np.array([0.2, 0.05, 0.03])}
    diagrams.plot_explained_variance(ax, replace(stats, wave=np.arange(100), **three))
    assert ax.get_ylim() == pytest.approx((0, 0.308))
    assert ax.get_title() == "remaining 97 directions: 72%, 0.74% each on average"


def test_shares_and_histograms_show_their_numbers(ax):
    counts = {"train": np.array([6, 3, 1]), "val": np.array([0, 1, 0]), "test": np.zeros(3, int)}
    diagrams.plot_class_shares(ax, counts, "BPT", 3)
    shares = [0.6, 0.3, 0.1, 0, 1, 0, *[np.nan] * 3]
    np.testing.assert_allclose([b.get_height() for b in ax.patches], shares)
    assert legend_of(ax) == ["train: 10 spaxels", "val: 1 spaxel", "test: 0 spaxels"]
    assert ax.get_title() == "BPT class"
    other = Figure().subplots()
    diagrams.plot_histograms(other, {"train": np.arange(10), "val": np.arange(4)}, "redshift")
    assert legend_of(other) == ["train: 10", "val: 4"]
    train, val = other.containers
    assert [sum(bar.get_height() for bar in bars) for bars in (train, val)] == [10, 4]
    for left, right in zip(train, val, strict=True):
        assert left.get_x() + left.get_width() <= right.get_x() + 1e-9  # side by side


def test_command_draws_labelled_and_unlabelled_galaxies_and_reports_missing_ones(
    own_data, own_run, caplog
):
    labelled, unlabelled = mock_cubes.PLATEIFUS[-2:]
    utils.label_path(own_data, "logOH", unlabelled).unlink()
    config = VisConfig(own_run, (labelled, unlabelled, "7777-101"), data_dir=own_data, device="cpu")
    assert vis_fns.main(config) == utils.EXIT_DATA
    assert "7777-101.h5" in caplog.text
    assert f"no BPT diagram: {labelled}: no manga-{labelled}-MAPS" in caplog.text
    drawn = {path.name: path for path in (own_run / "figures").iterdir()}
    for plateifu in (labelled, unlabelled):
        assert {f"{plateifu}_maps.png", f"{plateifu}_spectrum.png"} <= drawn.keys()
    for path in drawn.values():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000
    title = vis_fns.spectrum_figure(own_data, labelled).get_suptitle()
    assert title.startswith(f"{labelled}, z = 0.0300: brightest spaxel (y = ")
