"""Figures: label, prediction and difference on the sky, training curves, confusion, spectra.

Every function draws into the axes it is given and returns them. Maps are shown as on the sky,
north up and east left, in arcseconds from the field's centre.

Reads   a run folder (run_SSFTT_training.py, eval_fns.py), cubes and labels of the data folder.
Writes  <run_dir>/figures/*.png.
Only what runs a model imports torch, and only then.

    python vis_fns.py --run-dir runs/demo --plateifu 8485-1901
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from scipy.spatial import Delaunay

import data_io
import utils
from utils import LABEL_NONE, DataError

if TYPE_CHECKING:
    import eval_fns

log = logging.getLogger(__name__)

FIGURES_FOLDER = "figures"
DPI = 150

CLASS_COLOURS: dict[tuple[str, int], tuple[str, ...]] = {
    ("BPT", 3): ("#0072B2", "#E69F00", "#882255"),
    ("logOH", 6): ("#440154", "#414487", "#2A788E", "#22A884", "#7AD151", "#FDE725"),
    ("logOH", 8): (
        "#440154",
        "#46327E",
        "#365C8D",
        "#277F8E",
        "#1FA187",
        "#4AC16D",
        "#A0DA39",
        "#FDE725",
    ),
}
"""Of every task and scale. BPT: Okabe & Ito's blue and orange, Tol's wine; metallicity: viridis."""
MASKED_COLOUR = "#BDBDBD"
"""In the field, but without a usable spectrum."""
NO_LABEL_HATCH = "////"
RIGHT_COLOUR, WRONG_COLOUR = "#DDE6ED", "#D55E00"
MODEL_COLOUR, OTHER_COLOUR = "#0072B2", "#D55E00"
PART_COLOURS = {"train": "#0072B2", "val": "#E69F00", "test": "#882255"}

SPAXEL_ARCSEC = 0.5
"""Side of a MaNGA spaxel (Law et al. 2016, AJ 152, 83), for cubes that carry no WCS."""
SCALE_BAR_ARCSEC = 5.0

EMISSION_LINES: dict[str, float] = {
    r"H$\beta$": 4862.69,
    "[OIII]": 4960.295,
    "[OIII] ": 5008.240,
    "HeI": 5877.25,
    "[OI]": 6302.046,
    "[NII]": 6549.86,
    r"H$\alpha$": 6564.61,
    "[NII] ": 6585.27,
    "[SII]": 6718.29,
    "[SII] ": 6732.67,
}
"""Vacuum wavelengths, Angstrom: NIST Atomic Spectra Database, version 5 (Ritz values)."""


@dataclass(frozen=True)
class VisConfig:
    """Options of vis_fns.py."""

    run_dir: Path
    """Folder of a training run."""
    plateifu: tuple[str, ...] = ()
    """Galaxies to map."""
    part: Literal["train", "val", "test"] = "test"
    """Part whose confusion matrix is drawn, if eval_fns.py evaluated it."""
    data_dir: Path | None = None
    """Data folder; default the run's, else MANGA_DATA_DIR, else ./data/manga."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    debug: bool = False
    """Show the traceback of an error."""


# The sky


def sky_edges(shape: tuple[int, int], wcs_header: str | None = None) -> tuple[np.ndarray, ...]:
    """Find the corners of all spaxels on the sky.

    Parameters
    ----------
    shape : (ny, nx)
    wcs_header : str, optional
        Celestial cards of the cube (attribute `wcs_header`). Without them: 0.5 arcsec spaxels,
        north up, east left, the middle of the map at the origin.

    Returns
    -------
    east, north : (ny + 1, nx + 1) arcsec
        Offsets in the tangent plane from the reference point.
    """
    ny, nx = shape
    y, x = np.mgrid[: ny + 1, : nx + 1] - 0.5  # spaxel centres are whole numbers
    if not wcs_header:
        return -(x - (nx - 1) / 2) * SPAXEL_ARCSEC, (y - (ny - 1) / 2) * SPAXEL_ARCSEC
    from astropy.io.fits import Header
    from astropy.wcs import WCS

    wcs = WCS(Header.fromstring(wcs_header, sep="\n"), naxis=2)
    matrix = wcs.pixel_scale_matrix * 3600
    dx, dy = x + 1 - wcs.wcs.crpix[0], y + 1 - wcs.wcs.crpix[1]
    return matrix[0, 0] * dx + matrix[0, 1] * dy, matrix[1, 0] * dx + matrix[1, 1] * dy


def finish_sky_axes(
    ax: Axes, inside: np.ndarray, wcs_header: str | None, title: str, decorate: bool = True
) -> Axes:
    """Outline the field, set limits and labels; with `decorate` a scale bar and a compass."""
    east, north = sky_edges((inside.shape[0], inside.shape[1]), wcs_header)
    sides = outline_segments(field_of_view(inside), east, north)
    ax.add_collection(LineCollection(list(sides), colors="k", lw=0.8))
    reach = 1.25 * max(np.abs(sides).max(), 1.0) if sides.size else np.abs(east).max()
    ax.set(xlim=(reach, -reach), ylim=(-reach, reach), aspect="equal", title=title)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, symmetric=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("east offset (arcsec)")
    ax.set_ylabel("north offset (arcsec)")
    if decorate:
        bar, low = SCALE_BAR_ARCSEC if reach > SCALE_BAR_ARCSEC else 1.0, -0.94 * reach
        ax.plot([0.94 * reach, 0.94 * reach - bar], [low, low], color="k", lw=2)
        ax.text(0.94 * reach - bar / 2, low, f'{bar:g}"', ha="center", va="bottom", fontsize=8)
        arrow = {"arrowstyle": "->", "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
        corner, tip = (-0.94 * reach, low), 0.1 * reach
        for name, end in (
            ("N", (corner[0], corner[1] + tip)),
            ("E", (corner[0] + tip, corner[1])),
        ):
            ax.annotate("", xy=end, xytext=corner, arrowprops=arrow)
            along = "bottom" if name == "N" else "center"
            side = "center" if name == "N" else "right"
            ax.annotate(name, end, va=along, ha=side, fontsize=8)
    return ax


def field_of_view(inside: np.ndarray) -> np.ndarray:
    """Fill the field: the convex hull of the measured spaxels, (y, x) bool.

    A bundle sees a hexagon (Drory et al. 2015, AJ 149, 77); stars and dead fibres masked out of
    it leave holes and dents in what was measured.
    """
    points = np.argwhere(inside)
    if not points.size or np.ptp(points, axis=0).min() == 0:
        return inside
    everywhere = np.argwhere(np.ones_like(inside))
    return (Delaunay(points).find_simplex(everywhere) >= 0).reshape(inside.shape)


def outline_segments(inside: np.ndarray, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    """Find the spaxel sides that part the inside from the outside, (N, 2 points, 2) arcsec."""
    padded = np.pad(inside, 1)
    corners = np.stack([east, north], axis=-1)
    across = padded[1:-1, 1:] != padded[1:-1, :-1]  # side between x - 1 and x
    y, x = np.nonzero(across)
    upright = np.stack([corners[y, x], corners[y + 1, x]], axis=1)
    across = padded[1:, 1:-1] != padded[:-1, 1:-1]
    y, x = np.nonzero(across)
    level = np.stack([corners[y, x], corners[y, x + 1]], axis=1)
    return np.concatenate([upright, level])


def _hatch(ax: Axes, where: np.ndarray, east: np.ndarray, north: np.ndarray) -> None:
    """Hatch some spaxels."""
    y, x = np.nonzero(where)
    if not y.size:
        return
    corners = np.stack([east, north], axis=-1)
    squares = [
        Outline(corners[[i, i, i + 1, i + 1, i], [j, j + 1, j + 1, j, j]], closed=True)
        for i, j in zip(y, x, strict=True)
    ]
    patch = PathPatch(
        Outline.make_compound_path(*squares),
        facecolor="white",
        edgecolor="#9A9A9A",
        hatch=NO_LABEL_HATCH,
        lw=0,
    )
    ax.add_patch(patch)


def plot_class_map(
    ax: Axes,
    classes: np.ndarray,
    label_task: str,
    n_classes: int,
    usable: np.ndarray,
    inside: np.ndarray,
    title: str = "",
    wcs_header: str | None = None,
    legend: bool = True,
) -> Axes:
    """Draw a map of classes.

    Parameters
    ----------
    ax : Axes
    classes : (y, x) int
        LABEL_NONE is hatched where the spaxel is usable.
    label_task, n_classes
        Choose names and colours.
    usable : (y, x) bool
        The others in the field of view are grey.
    inside : (y, x) bool
        Spaxels with anything measured; the field of view is what they span.
    title : str
    wcs_header : str, optional
        As in `sky_edges`.
    legend : bool
        Classes beside the map.
    """
    colours = ListedColormap(CLASS_COLOURS[label_task, n_classes])
    shown = np.ma.masked_where(~usable | (classes == LABEL_NONE), classes)
    _draw_map(ax, shown, usable, inside, wcs_header, cmap=colours, vmin=-0.5, vmax=n_classes - 0.5)
    if legend:
        _class_legend(ax, label_task, n_classes)
    return finish_sky_axes(ax, inside, wcs_header, title)


def _draw_map(
    ax: Axes,
    values: np.ndarray,
    usable: np.ndarray,
    inside: np.ndarray,
    wcs_header: str | None,
    **colours: Any,
) -> QuadMesh:
    """Draw values; grey where the spectrum is not usable, hatched where it has no value."""
    east, north = sky_edges((inside.shape[0], inside.shape[1]), wcs_header)
    masked = np.ma.masked_where(usable | ~field_of_view(inside), np.zeros(inside.shape))
    ax.pcolormesh(east, north, masked, cmap=ListedColormap([MASKED_COLOUR]), vmin=0, vmax=1)
    _hatch(ax, usable & np.ma.getmaskarray(values), east, north)
    return ax.pcolormesh(east, north, values, **colours)


def _class_legend(ax: Axes, label_task: str, n_classes: int) -> None:
    """Legend of classes, "no label" and "masked" to the right of a map."""
    names = utils.class_names(label_task, n_classes)
    colours = CLASS_COLOURS[label_task, n_classes]
    handles = [Patch(color=c, label=n) for c, n in zip(colours, names, strict=True)]
    no_label = Patch(facecolor="w", edgecolor="#9A9A9A", hatch=NO_LABEL_HATCH, lw=0)
    no_label.set_label("no label")
    handles += [no_label, Patch(color=MASKED_COLOUR, label="masked")]
    if label_task == "logOH":
        handles[: len(names)] = handles[: len(names)][::-1]  # high above low, as on a colour bar
    title = "12 + log(O/H)" if label_task == "logOH" else "BPT class"
    ax.legend(
        handles=handles,
        title=title,
        fontsize=8,
        title_fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        alignment="left",
        frameon=False,
    )


def plot_value_map(
    ax: Axes,
    values: np.ndarray,
    usable: np.ndarray,
    inside: np.ndarray,
    label: str,
    title: str = "",
    wcs_header: str | None = None,
    limit: float | None = None,
) -> Axes:
    """Draw a map of numbers with its colour bar.

    Parameters
    ----------
    ax : Axes
    values : (y, x) float
        NaN is hatched where the spaxel is usable.
    usable, inside : (y, x) bool
        As in `plot_class_map`.
    label : str
        Of the colour bar, with unit.
    title, wcs_header
        As in `plot_class_map`.
    limit : float, optional
        Diverging colours from -limit to limit; default sequential ones over the data's range.
    """
    colours: dict[str, Any] = {"cmap": "cividis"}
    if limit is not None:
        colours = {"cmap": "PuOr", "vmin": -limit, "vmax": limit}
    drawn = _draw_map(ax, np.ma.masked_invalid(values), usable, inside, wcs_header, **colours)
    bar = ax.figure.colorbar(drawn, cax=ax.inset_axes((1.04, 0.0, 0.05, 1.0)))
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return finish_sky_axes(ax, inside, wcs_header, title)


def plot_comparison(
    axes: Sequence[Axes],
    prediction: eval_fns.MapPrediction,
    labels: np.ndarray,
    label_task: str,
    n_classes: int,
) -> Sequence[Axes]:
    """Draw label, prediction and their difference side by side.

    Parameters
    ----------
    axes : 3 Axes
    prediction : MapPrediction
    labels : (y, x) array
        Label map as read by data_io.read_labels.
    label_task, n_classes

    Notes
    -----
    The difference is the predicted class's value less the label in dex, or for BPT whether the
    two classes agree. Its title carries the score over the spaxels that have a label.
    """
    wcs = prediction.attrs.get("wcs_header")
    true = utils.label_classes(labels, label_task, n_classes)
    inside, usable = prediction.inside, prediction.usable
    both = usable & (true != LABEL_NONE)
    shared = (label_task, n_classes, usable, inside)
    plot_class_map(axes[0], true, *shared, f"{prediction.plateifu}: label", wcs, legend=False)
    plot_class_map(axes[1], prediction.classes, *shared, "prediction", wcs)
    agree = (prediction.classes == true)[both].mean() if both.any() else np.nan
    if label_task == "logOH":
        values = utils.class_values(n_classes)[prediction.classes]
        difference = np.where(both, values - labels, np.nan)
        mae = np.nanmean(np.abs(difference)) if both.any() else np.nan
        limit = max(0.02, float(np.nanquantile(np.abs(difference), 0.98)) if both.any() else 0.1)
        title = f"difference: MAE {mae:.3f} dex, {agree:.0%} right"
        plot_value_map(
            axes[2], difference, usable, inside, "predicted - label (dex)", title, wcs, limit
        )
    else:
        agrees = np.ma.masked_where(~both, prediction.classes == true)
        plot_agreement_map(axes[2], agrees, usable, inside, f"difference: {agree:.0%} right", wcs)
    return axes


def plot_agreement_map(
    ax: Axes,
    agrees: np.ndarray,
    usable: np.ndarray,
    inside: np.ndarray,
    title: str = "",
    wcs_header: str | None = None,
) -> Axes:
    """Draw where prediction and label agree, (y, x) bool, masked where one is missing."""
    colours = ListedColormap([WRONG_COLOUR, RIGHT_COLOUR])
    _draw_map(ax, agrees.astype(float), usable, inside, wcs_header, cmap=colours, vmin=0, vmax=1)
    handles = [Patch(color=RIGHT_COLOUR, label="same"), Patch(color=WRONG_COLOUR, label="other")]
    ax.legend(
        handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
    )
    return finish_sky_axes(ax, inside, wcs_header, title)


def plot_part_map(
    ax: Axes,
    parts: np.ndarray,
    inside: np.ndarray,
    title: str = "",
    wcs_header: str | None = None,
) -> Axes:
    """Draw which part of an easy split each spaxel is in.

    Parameters
    ----------
    ax : Axes
    parts : (y, x) int
        Index into utils.SPLIT_PARTS; LABEL_NONE is hatched.
    inside : (y, x) bool
    title, wcs_header
        As in `plot_class_map`.
    """
    colours = ListedColormap([PART_COLOURS[part] for part in utils.SPLIT_PARTS])
    shown = np.ma.masked_equal(parts, LABEL_NONE)
    _draw_map(ax, shown, inside, inside, wcs_header, cmap=colours, vmin=-0.5, vmax=2.5)
    handles = [Patch(color=colour, label=part) for part, colour in PART_COLOURS.items()]
    ax.legend(
        handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
    )
    return finish_sky_axes(ax, inside, wcs_header, title)


# Curves, matrices, spectra, splits


def plot_training_curves(axes: Sequence[Axes], metrics: pd.DataFrame) -> Sequence[Axes]:
    """Draw loss and accuracy against the epoch.

    Parameters
    ----------
    axes : 2 Axes
    metrics : DataFrame
        metrics.csv of a run.
    """
    for ax, name in zip(axes, ("loss", "accuracy"), strict=True):
        ax.plot(metrics["epoch"], metrics[f"train_{name}"], color=OTHER_COLOUR, label="training")
        ax.plot(metrics["epoch"], metrics[f"val_{name}"], color=MODEL_COLOUR, label="validation")
        ax.set(xlabel="epoch", ylabel=name if name == "accuracy" else "cross entropy (nat)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(frameon=False, loc="upper right" if name == "loss" else "lower right")
    axes[1].set_ylim(0, 1)
    return axes


def plot_confusion(ax: Axes, confusion: np.ndarray, names: Sequence[str]) -> Axes:
    """Draw a confusion matrix: shares of each true class, counts below them.

    Parameters
    ----------
    ax : Axes
    confusion : (true class, predicted class) int
    names : sequence of str
    """
    total = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if len(names) <= 4 else 7
    for i, j in np.ndindex(confusion.shape):
        colour = "white" if shares[i, j] > 0.55 else "black"
        text = f"{shares[i, j]:.2f}\n{confusion[i, j]}"
        ax.text(j, i, text, ha="center", va="center", color=colour, fontsize=size)
    ticks = range(len(names))
    ax.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, names)
    ax.set(xlabel="predicted", ylabel="label")
    return ax


def mark_lines(ax: Axes, wave_min: float, wave_max: float) -> Axes:
    """Mark the emission lines between two vacuum rest wavelengths (Angstrom)."""
    inside = {n: w for n, w in EMISSION_LINES.items() if wave_min < w < wave_max}
    last, level = -np.inf, 0
    room = 0.022 * (wave_max - wave_min)
    for name, wave in sorted(inside.items(), key=lambda item: item[1]):
        level = level + 1 if wave - last < room else 0  # neighbours' names climb
        last = wave
        ax.axvline(wave, color="#9A9A9A", lw=0.6, ls=":", zorder=0)
        ax.annotate(
            name.strip(),
            (wave, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2 + 9 * level),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
        )
    return ax


def plot_spectrum(
    ax: Axes,
    wave: np.ndarray,
    flux: np.ndarray,
    ivar: np.ndarray | None = None,
    label: str | None = None,
) -> Axes:
    """Draw a rest-frame spectrum with its emission lines and 1 sigma band.

    Parameters
    ----------
    ax : Axes
    wave : (band,) Angstrom, vacuum
    flux, ivar : (band,) 1e-17 erg/s/cm2/Angstrom/spaxel and its inverse variance
        NaN leaves a gap.
    label : str, optional
    """
    ax.plot(wave, flux, color=MODEL_COLOUR, lw=0.8, label=label, drawstyle="steps-mid")
    if ivar is not None:
        sigma = np.divide(1, np.sqrt(ivar), out=np.full(ivar.shape, np.nan), where=ivar > 0)
        ax.fill_between(
            wave, flux - sigma, flux + sigma, color=MODEL_COLOUR, alpha=0.25, lw=0, step="mid"
        )
    mark_lines(ax, wave[0], wave[-1])
    ax.set(
        xlim=(wave[0], wave[-1]),
        xlabel="rest wavelength, vacuum (Angstrom)",
        ylabel=r"flux ($10^{-17}$ erg/s/cm$^2$/$\AA$/spaxel)",
    )
    if label:
        ax.legend(frameon=False, loc="upper left", fontsize=8)
    return ax


def plot_explained_variance(ax: Axes, stats: data_io.Stats) -> Axes:
    """Draw each component's share of the variance and the sum of those up to it."""
    n = np.arange(1, stats.explained_ratio.size + 1)
    ax.bar(n, stats.explained_ratio, color=MODEL_COLOUR, label="one component")
    ax.plot(n, np.cumsum(stats.explained_ratio), "o-", ms=3, color=OTHER_COLOUR, label="all so far")
    ax.set(xlabel="component", ylabel="share of the variance", ylim=(0, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, loc="center right")
    return ax


def plot_components(axes: Sequence[Axes], stats: data_io.Stats) -> Sequence[Axes]:
    """Draw the mean spectrum and the first components, one in each of the axes."""
    curves = [("mean", stats.mean)]
    curves += [(f"component {k + 1}", c) for k, c in enumerate(stats.components)]
    for ax, (name, curve) in zip(axes, curves, strict=False):
        ax.plot(stats.wave, curve, color=MODEL_COLOUR, lw=0.8)
        ax.axhline(0, color="#9A9A9A", lw=0.5, zorder=0)
        ax.set(ylabel=name, xlim=(stats.wave[0], stats.wave[-1]))
    mark_lines(axes[0], stats.wave[0], stats.wave[-1])
    axes[-1].set_xlabel("rest wavelength, vacuum (Angstrom)")
    return axes


def plot_class_shares(
    ax: Axes, counts: Mapping[str, np.ndarray], label_task: str, n_classes: int
) -> Axes:
    """Draw the share of every class in each part of a split.

    Parameters
    ----------
    ax : Axes
    counts : mapping of part -> (classes,) int
    label_task, n_classes
    """
    names = utils.class_names(label_task, n_classes)
    width = 0.8 / len(counts)
    for i, (part, count) in enumerate(counts.items()):
        at = np.arange(n_classes) + (i - (len(counts) - 1) / 2) * width
        label = f"{part}: {count.sum()} spaxels"
        ax.bar(at, count / max(count.sum(), 1), width, color=PART_COLOURS.get(part), label=label)
    ax.set_xticks(range(n_classes), names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set(ylabel="share of the part's spaxels", title=label_task)
    ax.legend(frameon=False, fontsize=8)
    return ax


def plot_histograms(ax: Axes, values: Mapping[str, np.ndarray], label: str, bins: int = 12) -> Axes:
    """Draw histograms of several samples, e.g. the redshifts of each part of a split.

    Parameters
    ----------
    ax : Axes
    values : mapping of name -> (N,) float
    label : str
        Quantity and unit.
    bins : int
    """
    shades = list(PART_COLOURS.values())
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins)
    for i, (name, sample) in enumerate(values.items()):
        ax.hist(
            sample,
            edges.tolist(),
            label=f"{name}: {len(sample)}",
            color=shades[i % 3],
            histtype="step",
            lw=1.6,
        )
    ax.set(xlabel=label, ylabel="galaxies")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=8)
    return ax


# The command


def galaxy_figure(
    trained: eval_fns.TrainedModel, root: Path, plateifu: str
) -> tuple[Figure, eval_fns.MapPrediction]:
    """Make a galaxy's figure: with labels three maps, without the prediction and its probability.

    Raises
    ------
    DataError
        If the galaxy has no cube.
    """
    import eval_fns

    prediction = eval_fns.evaluate_cube(trained, utils.cube_path(root, plateifu))
    task, n_classes = trained.spec.label_task, len(trained.about["class_names"])
    label_file = utils.label_path(root, task, plateifu)
    if label_file.is_file():
        labels = data_io.read_labels(label_file)
        figure = Figure(figsize=(13, 4.1), layout="constrained")
        plot_comparison(figure.subplots(1, 3), prediction, labels, task, n_classes)
        return figure, prediction
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    wcs = prediction.attrs.get("wcs_header")
    inside = prediction.inside
    plot_class_map(
        left,
        prediction.classes,
        task,
        n_classes,
        prediction.usable,
        prediction.inside,
        f"{plateifu}: prediction",
        wcs,
    )
    surest = prediction.probabilities.max(axis=2)
    usable = prediction.usable
    plot_value_map(right, surest, usable, inside, "probability", "probability of the class", wcs)
    return figure, prediction


def spectrum_figure(root: Path, plateifu: str) -> Figure:
    """Make the figure of a galaxy's brightest spectrum."""
    cube = data_io.read_cube(utils.cube_path(root, plateifu))
    brightness = np.nan_to_num(cube.flux).mean(axis=2)
    y, x = np.unravel_index(int(brightness.argmax()), brightness.shape)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    ivar = None if cube.ivar is None else cube.ivar[y, x]
    label = f"{plateifu}, spaxel y={y} x={x}"
    plot_spectrum(figure.subplots(), cube.wave, cube.flux[y, x], ivar, label)
    return figure


def components_figure(stats: data_io.Stats, n: int = 5) -> Figure:
    """Make the figure of the mean spectrum and the first n components."""
    rows = min(n, len(stats.components)) + 1
    figure = Figure(figsize=(9, 1.5 * rows), layout="constrained")
    plot_components(figure.subplots(rows, 1, sharex=True), stats)
    return figure


def variance_figure(stats: data_io.Stats) -> Figure:
    """Make the figure of the variance that the components explain."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    plot_explained_variance(figure.subplots(), stats)
    return figure


def run_figures(run_dir: Path, part: str = "test") -> dict[str, Figure]:
    """Make the figures of a run: curves, confusion (if evaluated), explained variance (if PCA)."""
    import eval_fns

    figures = {}
    metrics = run_dir / eval_fns.METRICS_FILE
    if metrics.is_file():
        figures["training_curves"] = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figures["training_curves"].subplots(1, 2)
        plot_training_curves(axes, pd.read_csv(metrics))
    confusion = run_dir / part / eval_fns.CONFUSION_FILE
    if confusion.is_file():
        table = pd.read_csv(confusion, index_col="true")
        figures[f"confusion_{part}"] = Figure(figsize=(6, 5.5), layout="constrained")
        ax = figures[f"confusion_{part}"].subplots()
        plot_confusion(ax, table.to_numpy(), list(table.columns))
    stats = run_dir / eval_fns.STATS_FILE
    if stats.is_file():
        figures["explained_variance"] = variance_figure(data_io.read_stats(stats))
    return figures


def save(figure: Figure, path: Path) -> None:
    """Save a figure, whole or not at all."""
    with utils.atomic_path(path) as part, mpl.rc_context({"hatch.linewidth": 0.5}):
        figure.savefig(part, dpi=DPI)
    log.info("%s", path)


def main(config: VisConfig) -> int:
    """Draw a run's figures and those of the galaxies asked for."""
    import eval_fns

    trained = eval_fns.load_model(config.run_dir, config.device)
    root = eval_fns.run_data_dir(config.run_dir, config.data_dir)
    out = config.run_dir / FIGURES_FOLDER
    for name, figure in run_figures(config.run_dir, config.part).items():
        save(figure, out / f"{name}.png")
    failed = 0
    for plateifu in config.plateifu:
        try:
            save(galaxy_figure(trained, root, plateifu)[0], out / f"{plateifu}_maps.png")
            save(spectrum_figure(root, plateifu), out / f"{plateifu}_spectrum.png")
        except DataError as error:
            log.error("%s", error)
            failed += 1
    return utils.EXIT_DATA if failed else utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, VisConfig, __doc__)
