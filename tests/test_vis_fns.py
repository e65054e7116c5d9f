from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mock_cubes
import numpy as np
import pandas as pd
import pytest
from astropy.wcs import WCS
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

import data_io
import eval_fns
import run_SSFTT_training as training
import utils
import vis_fns
from run_SSFTT_training import TrainConfig
from vis_fns import VisConfig

REPO = Path(vis_fns.__file__).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mock_cubes.make_data_dir(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_dir(root, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        data_dir=root, run_dir=run, split_dir="hard", patch_norm="PCA", patch_size=5, epochs=2,
        batch_size=64, device="cpu",
    )  # fmt: skip
    assert training.main(config) == 0
    eval_fns.evaluate_split(run)
    return run


@pytest.fixture
def ax():
    return Figure().subplots()


def header(rotation_deg: float = 0.0) -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crpix = [18, 17]
    wcs.wcs.crval = [232.5, 48.7]
    angle = np.deg2rad(rotation_deg)
    spin = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs.wcs.cd = spin @ np.diag([-0.5 / 3600, 0.5 / 3600])
    return wcs


@pytest.mark.parametrize("rotation", [0, 30, 180])
def test_spaxels_lie_where_astropy_puts_them(rotation):
    from astropy.coordinates import SkyCoord

    wcs = header(rotation)
    text = wcs.to_header().tostring(sep="\n")
    east, north = vis_fns.sky_edges((33, 35), text)
    y, x = np.mgrid[:34, :36] - 0.5
    sky = SkyCoord(*wcs.all_pix2world(x, y, 0), unit="deg")
    offsets = SkyCoord(*wcs.wcs.crval, unit="deg").spherical_offsets_to(sky)
    np.testing.assert_allclose(east, offsets[0].arcsec, atol=1e-3)
    np.testing.assert_allclose(north, offsets[1].arcsec, atol=1e-3)


def test_maps_without_wcs_have_north_up_and_east_left(ax):
    inside = np.ones((9, 9), bool)
    vis_fns.finish_sky_axes(ax, inside, None, "title")
    east, north = vis_fns.sky_edges((9, 9))
    assert north[-1, 0] > north[0, 0]  # up the array is north
    assert east[0, 0] > east[0, -1]  # along the array is west
    left, right = ax.get_xlim()
    assert left > right  # so that east is on the left of the figure
    assert "arcsec" in ax.get_xlabel()
    texts = {t.get_text() for t in ax.texts}
    assert {"N", "E"} <= texts
    assert any('"' in t for t in texts)


def test_field_is_the_hull_of_what_was_measured():
    field = np.zeros((20, 20), bool)
    field[4:15, 3:17] = True
    holed = field.copy()
    holed[8:10, 8:11] = holed[13:, 9:12] = False  # a star inside, a dead fibre at the rim
    np.testing.assert_array_equal(vis_fns.field_of_view(holed), field)
    thin = np.zeros((4, 4), bool)
    thin[2] = True
    np.testing.assert_array_equal(vis_fns.field_of_view(thin), thin)
    assert not vis_fns.field_of_view(np.zeros((3, 3), bool)).any()


def test_outline_of_a_rectangle_has_its_perimeter():
    inside = np.zeros((10, 12), bool)
    inside[2:6, 3:10] = True
    segments = vis_fns.outline_segments(inside, *vis_fns.sky_edges((10, 12)))
    lengths = np.linalg.norm(segments[:, 1] - segments[:, 0], axis=1)
    assert lengths.sum() == pytest.approx(2 * (4 + 7) * 0.5)
    assert np.abs(segments[..., 0]).max() <= 3.0


@pytest.mark.parametrize(("task", "n"), [("BPT", 3), ("logOH", 6), ("logOH", 8)])
def test_classes_have_fixed_distinct_colours_and_missing_ones_none(ax, task, n):
    classes = np.full((5, 8), utils.LABEL_NONE)
    classes[1, :n] = range(n)
    usable = np.ones((5, 8), bool)
    usable[0, 0] = False
    vis_fns.plot_class_map(ax, classes, task, n, usable, np.ones((5, 8), bool))
    meshes = [c for c in ax.collections if isinstance(c, QuadMesh)]
    shown = meshes[-1]
    assert shown.get_array().mask.sum() == 40 - n
    colours = shown.to_rgba(shown.get_array())[1, :n, :3]
    np.testing.assert_allclose(colours, [to_rgb(c) for c in vis_fns.CLASS_COLOURS[task, n]])
    assert len(np.unique(colours.round(6), axis=0)) == n
    assert (~meshes[0].get_array().mask).sum() == 1  # the masked spaxel, grey
    hatched = [p for p in ax.patches if isinstance(p, PathPatch) and p.get_hatch()]
    assert len(hatched) == 1
    squares = hatched[0].get_path().vertices.reshape(-1, 5, 2)
    assert len(squares) == 40 - n - 1  # usable, but without a label
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert set(utils.class_names(task, n)) | {"no label", "masked"} == set(labels)


def test_class_colours_stay_apart_for_colour_blind_readers():
    """Red-green blindness by Vienot et al. (1999): neighbours must differ after it."""
    rgb_to_lms = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    missing_l = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    missing_m = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for colours in vis_fns.CLASS_COLOURS.values():
        rgb = np.array([to_rgb(c) for c in colours]) ** 2.2
        for missing in (missing_l, missing_m):
            seen = rgb @ (np.linalg.inv(rgb_to_lms) @ missing @ rgb_to_lms).T
            seen = np.clip(seen, 0, 1) ** (1 / 2.2)
            gaps = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
            assert gaps[~np.eye(len(seen), dtype=bool)].min() > 0.1


def test_difference_map_shows_value_less_label():
    axes = Figure().subplots(1, 3)
    labels = np.full((6, 6), np.nan, np.float32)
    labels[2, 3], labels[4, 1] = 8.50, 8.41
    classes = np.zeros((6, 6), np.int16)
    classes[2, 3], classes[4, 1] = 5, 1  # values 8.58 and 8.42
    inside = np.ones((6, 6), bool)
    prediction = eval_fns.MapPrediction("1-1", classes, np.zeros((6, 6, 6)), inside, {})
    vis_fns.plot_comparison(axes, prediction, labels, "logOH", 6)
    shown = [c for c in axes[2].collections if isinstance(c, QuadMesh)][-1].get_array()
    assert (~shown.mask).sum() == 2
    assert shown[2, 3] == pytest.approx(0.08, abs=1e-5)
    assert shown[4, 1] == pytest.approx(0.01, abs=1e-5)
    assert "MAE 0.045 dex, 50% right" in axes[2].get_title()


def test_confusion_shows_shares_of_the_true_class(ax):
    confusion = np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]])
    vis_fns.plot_confusion(ax, confusion, ["a", "b", "c"])
    texts = [t.get_text() for t in ax.texts]
    assert texts[:5] == ["0.80\n8", "0.20\n2", "0.00\n0", "0.20\n1", "0.80\n4"]
    np.testing.assert_allclose(ax.images[0].get_array()[0], [0.8, 0.2, 0.0])
    assert ax.get_ylabel() == "label"


def test_lines_are_at_vacuum_wavelengths():
    """Standard-air wavelengths (NIST) through Morton (2000, ApJS 130, 403, eq. 8)."""
    air = {
        r"H$\beta$": 4861.35, "[OIII]": 4958.911, "[OIII] ": 5006.843, "HeI": 5875.62,
        "[OI]": 6300.304, "[NII]": 6548.05, r"H$\alpha$": 6562.79, "[NII] ": 6583.45,
        "[SII]": 6716.44, "[SII] ": 6730.816,
    }  # fmt: skip
    assert air.keys() == vis_fns.EMISSION_LINES.keys()
    for name, wave in air.items():
        s2 = (1e4 / wave) ** 2
        index = 1 + 8.34254e-5 + 2.406147e-2 / (130 - s2) + 1.5998e-4 / (38.9 - s2)
        assert vis_fns.EMISSION_LINES[name] == pytest.approx(wave * index, abs=0.05)


def test_only_lines_inside_the_spectrum_are_marked(ax):
    wave = np.geomspace(6400, 6600, 50)
    flux = np.ones(50)
    flux[3] = np.nan
    vis_fns.plot_spectrum(ax, wave, flux, np.full(50, 4.0))
    marked = {t.get_text() for t in ax.texts}
    assert marked == {"[NII]", r"H$\alpha$"}
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(1.5)  # one sigma of 1/sqrt(4)


def test_run_figures_show_what_the_run_has(run_dir):
    figures = vis_fns.run_figures(run_dir)
    assert set(figures) == {"training_curves", "confusion_test", "explained_variance"}
    loss = figures["training_curves"].axes[0].lines
    metrics = pd.read_csv(run_dir / "metrics.csv")
    np.testing.assert_allclose(loss[0].get_ydata(), metrics["train_loss"])
    np.testing.assert_allclose(loss[1].get_ydata(), metrics["val_loss"])
    stats = data_io.read_stats(run_dir / "stats.h5")
    heights = [b.get_height() for b in figures["explained_variance"].axes[0].patches]
    np.testing.assert_allclose(heights, stats.explained_ratio)


def test_components_and_shares_and_histograms_show_their_numbers(run_dir, ax):
    stats = data_io.read_stats(run_dir / "stats.h5")
    figure = vis_fns.components_figure(stats, n=3)
    assert len(figure.axes) == 4
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), stats.mean)
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), stats.components[1])
    counts = {"train": np.array([6, 3, 1]), "test": np.array([0, 0, 0])}
    vis_fns.plot_class_shares(ax, counts, "BPT", 3)
    np.testing.assert_allclose([b.get_height() for b in ax.patches], [0.6, 0.3, 0.1, 0, 0, 0])
    other = Figure().subplots()
    vis_fns.plot_histograms(other, {"train": np.arange(10), "val": np.arange(4)}, "redshift")
    assert [t.get_text() for t in other.get_legend().get_texts()] == ["train: 10", "val: 4"]


def test_command_draws_labelled_and_unlabelled_galaxies_and_reports_missing_ones(
    root, run_dir, caplog
):
    labelled, unlabelled = mock_cubes.PLATEIFUS[-2:]
    label_file = utils.label_path(root, "logOH", unlabelled)
    hidden = label_file.rename(label_file.with_suffix(".hidden"))
    try:
        config = VisConfig(run_dir, (labelled, unlabelled, "7777-101"), device="cpu")
        assert vis_fns.main(config) == utils.EXIT_DATA
    finally:
        hidden.rename(label_file)
    assert "7777-101.h5" in caplog.text
    names = {p.name for p in (run_dir / "figures").iterdir()}
    for plateifu in (labelled, unlabelled):
        assert {f"{plateifu}_maps.png", f"{plateifu}_spectrum.png"} <= names
    for path in (run_dir / "figures").iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000


def test_drawing_statistics_needs_no_torch():
    code = "import sys, vis_fns; assert 'torch' not in sys.modules; import matplotlib.pyplot"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
