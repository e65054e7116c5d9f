"""Figures: label, prediction and difference on the sky, BPT, training curves, confusion, spectra.

Every function draws into the axes it is given and returns them. Maps are shown as on the sky,
north up and east left, in arcseconds from the field's centre.

Reads   a run folder (run_SSFTT_training.py, eval_fns.py), cubes and labels of the data folder and,
        for the BPT diagram, raw MAPS.
Writes  <run_dir>/figures/*.png.
torch is imported only to run a model.

    python vis_fns.py --run-dir runs/demo --plateifu 8485-1901
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import utils
from utils import DataError

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

import data_io
from hsi_proc_fns import Stats, field_of_view
from intervals import LEVEL
from labels import (
    AGN,
    BPT_LINES,
    CLASS_COLOURS,
    COMPOSITE,
    LABEL_NONE,
    MASKED_COLOUR,
    TASK_TITLES,
    class_names,
    demarcate,
    detected,
    label_classes,
    log_ratio,
)
from line_fits import LINES

if TYPE_CHECKING:
    import eval_fns
    from run_folder import ModelCard

log = logging.getLogger(__name__)

DPI = 150

EMPTY_COLOUR = "#E4E4E4"
"""Rows of classes that no label has."""
NO_LABEL_HATCH, LINE_GREY = "////", "#9A9A9A"
RIGHT_COLOUR, WRONG_COLOUR = "#DDE6ED", "#D55E00"
MODEL_COLOUR, OTHER_COLOUR = "#0072B2", "#D55E00"
PART_COLOURS = {"train": "#0072B2", "val": "#E69F00", "test": "#882255"}

SPAXEL_ARCSEC = 0.5
"""Side of a MaNGA spaxel (Law et al. 2016, AJ 152, 83), for cubes without a WCS."""
SCALE_BAR_ARCSEC = 5.0
SCALE_BAR_TEXT = "scale bar"
LOGOH_TITLE = "12+log(O/H) (dex)"

EMISSION_LINES: dict[str, float] = {
    r"H$\beta$ 4862": LINES["Hb-4862"],
    "[OIII] 4960": LINES["OIII-4960"],
    "[OIII] 5008": LINES["OIII-5008"],
    "HeI 5877": LINES["HeI-5877"],
    "[OI] 6302": LINES["OI-6302"],
    "[NII] 6549": LINES["NII-6549"],
    r"H$\alpha$ 6564": LINES["Ha-6564"],
    "[NII] 6585": LINES["NII-6585"],
    "[SII] 6718": LINES["SII-6718"],
    "[SII] 6732": LINES["SII-6732"],
}
"""Lines that figures mark: name and vacuum wavelength, Angstrom."""


@dataclass(frozen=True)
class VisConfig:
    """Draw the figures of a training run and of galaxies."""

    run_dir: Path
    """Folder of a training run."""
    plateifu: tuple[str, ...] = ()
    """Galaxies to draw: maps, brightest spectrum, BPT diagrams."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the split whose confusion matrix is drawn, if eval_fns.py has evaluated it."""
    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else the run's, else ./data/manga."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    format: Literal["png", "pdf"] = "png"
    """Format of the figures; pdf for papers."""
    debug: bool = False
    """Show the traceback of an error."""


# The sky


def sky_edges(shape: tuple[int, ...], wcs_header: str | None = None) -> tuple[np.ndarray, ...]:
    """Find the corners of all spaxels on the sky.

    Without the celestial cards of the cube (attribute `wcs_header`): 0.5 arcsec spaxels, north up,
    east left, the centre of the map at the origin.

    Returns
    -------
    east, north : (ny + 1, nx + 1) arcsec
        Offsets in the tangent plane from the reference point.
    """
    ny, nx = shape
    y, x = np.mgrid[: ny + 1, : nx + 1] - 0.5  # spaxel centres are at integers
    if not wcs_header:
        return -(x - (nx - 1) / 2) * SPAXEL_ARCSEC, (y - (ny - 1) / 2) * SPAXEL_ARCSEC
    from astropy.io.fits import Header
    from astropy.wcs import WCS

    wcs = WCS(Header.fromstring(wcs_header, sep="\n"), naxis=2)
    matrix = wcs.pixel_scale_matrix * 3600
    dx, dy = x + 1 - wcs.wcs.crpix[0], y + 1 - wcs.wcs.crpix[1]
    return matrix[0, 0] * dx + matrix[0, 1] * dy, matrix[1, 0] * dx + matrix[1, 1] * dy


def finish_sky_axes(ax: Axes, inside: np.ndarray, wcs_header: str | None, title: str) -> Axes:
    """Outline the field, set limits and labels, add a scale bar and a compass."""
    east, north = sky_edges(inside.shape, wcs_header)
    sides = outline_segments(field_of_view(inside), east, north)
    ax.add_collection(LineCollection(list(sides), colors="k", lw=0.8))
    reach = 1.25 * max(np.abs(sides).max(), 1.0) if sides.size else np.abs(east).max()
    ax.set(xlim=(reach, -reach), ylim=(-reach, reach), aspect="equal", title=title)
    ax.set(xlabel="east offset (arcsec)", ylabel="north offset (arcsec)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, symmetric=True, steps=[1, 2, 5, 10]))
    bar, low = SCALE_BAR_ARCSEC if reach > SCALE_BAR_ARCSEC else 1.0, -0.94 * reach
    ax.plot([0.94 * reach, 0.94 * reach - bar], [low, low], color="k", lw=2)
    ax.text(0.94 * reach, low + 0.03 * reach, f'{bar:g}"', fontsize=8, gid=SCALE_BAR_TEXT)
    arrow = {"arrowstyle": "->", "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
    x, tip = -0.94 * reach, 0.1 * reach
    for name, end, va, ha in (
        ("N", (x, low + tip), "bottom", "center"),
        ("E", (x + tip, low), "center", "right"),
    ):
        ax.annotate("", xy=end, xytext=(x, low), arrowprops=arrow)
        ax.annotate(name, end, va=va, ha=ha, fontsize=8)
    return ax


def mark_scale(ax: Axes, attrs: Mapping[str, Any]) -> Axes:
    """Draw the ellipse of the effective radius and add kiloparsecs to the scale bar, where known.

    `ax` was finished by `finish_sky_axes`; `attrs` are those of a cube. Kiloparsecs are proper
    lengths in the flat LCDM cosmology of Planck 2018 (astropy's Planck18); peculiar velocities are
    neglected. The radius is the semi-major axis of the elliptical Petrosian photometry of the
    NASA-Sloan Atlas, at the position angle (from north through east) and with the ellipticity
    1 - b/a of the DAP's header; a circle without them.
    """
    from astropy.cosmology import Planck18
    from astropy.io.fits import Header

    z, reff = (float(attrs.get(name) or 0) for name in ("redshift", "reff_arcsec"))
    kpc = Planck18.kpc_proper_per_arcmin(z).value / 60 if z > 0 else 0.0  # per arcsec
    for text in ax.texts:
        if kpc and text.get_gid() == SCALE_BAR_TEXT:
            bar = text.get_text()
            text.set_text(f"{bar} = {float(bar[:-1]) * kpc:.1f} kpc")
    if not reff > 0:
        return ax
    angle, flattened = float(attrs.get("pa_deg") or 0), 1 - float(attrs.get("ellipticity") or 0)
    east = north = 0.0
    if attrs.get("wcs_header") and attrs.get("objra") is not None:
        cards = Header.fromstring(attrs["wcs_header"], sep="\n")
        turn = (attrs["objra"] - cards["CRVAL1"] + 180) % 360 - 180
        east = 3600 * turn * np.cos(np.deg2rad(attrs["objdec"]))
        north = 3600 * (attrs["objdec"] - cards["CRVAL2"])
    for colour, width, style in (("w", 2.2, "-"), ("k", 1.0, "--")):  # visible on any colour
        ring = {"fill": False, "ec": colour, "lw": width, "ls": style}
        ax.add_patch(Ellipse((east, north), 2 * reff * flattened, 2 * reff, angle=-angle, **ring))
    size = f'$R_e$ = {reff:.1f}"' + (f" = {reff * kpc:.1f} kpc" if kpc else "")
    ax.text(0.03, 0.97, f"- - {size}", transform=ax.transAxes, va="top", fontsize=8)
    return ax


def outline_segments(inside: np.ndarray, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    """Find the spaxel sides between inside and outside, (N, 2 points, 2) arcsec."""
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
    outline = Outline.make_compound_path(*squares)
    ax.add_patch(PathPatch(outline, fc="w", ec=LINE_GREY, hatch=NO_LABEL_HATCH, lw=0))


def plot_class_map(
    ax: Axes,
    classes: np.ndarray,
    label_task: str,
    n_classes: int,
    usable: np.ndarray,
    inside: np.ndarray,
    title: str = "",
    wcs_header: str | None = None,
) -> Axes:
    """Draw a map of classes, with its legend beside it.

    Parameters
    ----------
    classes : (y, x) int
        LABEL_NONE is hatched where the spaxel is usable.
    label_task, n_classes
        Choose names and colours.
    usable : (y, x) bool
        Other spaxels in the field of view are grey.
    inside : (y, x) bool
        Spaxels with any measurement; the field of view is their convex hull.
    wcs_header : str, optional
        As in `sky_edges`.
    """
    colours = CLASS_COLOURS[label_task, n_classes]
    shown = np.ma.masked_where(~usable | (classes == LABEL_NONE), classes)
    _, others = _draw_map(ax, shown, usable, inside, wcs_header, title, **_scale(colours))
    handles = _patches(class_names(label_task, n_classes), colours)
    if label_task == "logOH":
        handles.reverse()  # high above low, as on a colour bar
    _legend(ax, handles + others, TASK_TITLES[label_task])
    return ax


def _draw_map(
    ax: Axes,
    values: np.ndarray,
    usable: np.ndarray,
    inside: np.ndarray,
    wcs_header: str | None,
    title: str,
    **colours: Any,
) -> tuple[QuadMesh, list[Patch]]:
    """Draw values; grey where the spectrum is not usable, hatched where it has no value.

    Also returns legend entries for grey and hatched areas, where they occur.
    """
    east, north = sky_edges(inside.shape, wcs_header)
    masked = ~usable & field_of_view(inside)
    no_label = usable & np.ma.getmaskarray(values)
    grey = np.ma.masked_where(~masked, np.zeros(inside.shape))
    ax.pcolormesh(east, north, grey, **_scale([MASKED_COLOUR]))
    _hatch(ax, no_label, east, north)
    others = []
    if no_label.any():
        others.append(Patch(fc="w", ec=LINE_GREY, hatch=NO_LABEL_HATCH, lw=0, label="no label"))
    if masked.any():
        others += _patches(["masked"], [MASKED_COLOUR])
    drawn = ax.pcolormesh(east, north, values, **colours)
    finish_sky_axes(ax, inside, wcs_header, title)
    return drawn, others


def _scale(colours: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments that give class k the k-th colour."""
    return {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": len(colours) - 0.5}


def _patches(names: Iterable[str], colours: Iterable[str]) -> list[Patch]:
    """Legend entries of filled areas."""
    return [Patch(color=c, label=n) for n, c in zip(names, colours, strict=True)]


def _legend(ax: Axes, handles: Sequence[Artist], title: str | None = None) -> None:
    """Legend to the right of the axes."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    place |= {"fontsize": 8, "title_fontsize": 8, "alignment": "left", "frameon": False}
    ax.legend(handles=handles, title=title, **place)


def plot_value_map(
    ax: Axes,
    values: np.ndarray,
    usable: np.ndarray,
    inside: np.ndarray,
    label: str,
    title: str = "",
    wcs_header: str | None = None,
    limit: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Draw a map of numbers with its colour bar; other arguments as in `plot_class_map`.

    Parameters
    ----------
    values : (y, x) float
        NaN is hatched where the spaxel is usable.
    label : str
        Of the colour bar, with unit.
    limit : float, optional
        Diverging colours from -limit to limit.
    limits : (low, high), optional
        Sequential colours over this range; default: over that of the data. The ends of the bar are
        pointed where values lie beyond them.
    """
    shown = np.ma.masked_invalid(values)
    colours: dict[str, Any] = {"cmap": "cividis"}
    if limit is not None:
        colours, limits = {"cmap": "PuOr"}, (-limit, limit)
    ends = (False, False)
    if limits is not None and shown.count():
        colours |= {"vmin": limits[0], "vmax": limits[1]}
        ends = bool(shown.min() < limits[0]), bool(shown.max() > limits[1])
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(ends, "neither")
    drawn, _ = _draw_map(ax, shown, usable, inside, wcs_header, title, **colours)
    bar = ax.figure.colorbar(drawn, cax=ax.inset_axes((1.04, 0.0, 0.05, 1.0)), extend=extend)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return ax


def plot_comparison(
    axes: Sequence[Axes],
    prediction: eval_fns.CubePrediction,
    labels: np.ndarray,
    label_task: str,
    n_classes: int,
) -> Sequence[Axes]:
    """Draw label (as `data_io.read_labels` gives it), prediction and their difference in 3 axes.

    Metallicities are shown in dex; for BPT the third map shows whether the two classes agree. Its
    title gives the score over the labelled spaxels.
    """
    wcs = prediction.attrs.get("wcs_header")
    true = label_classes(labels, label_task, n_classes)
    inside, usable = prediction.inside, prediction.usable
    both = usable & (true != LABEL_NONE)
    shared = (label_task, n_classes, usable, inside)
    agree = (prediction.classes == true)[both].mean() if both.any() else np.nan
    score = f"accuracy {agree:.0%}" if both.any() else "no label"
    titles = f"{prediction.plateifu}: label", title_of(prediction)
    if prediction.logoh is not None:
        shown = np.where(both, labels, np.nan)
        for ax, values, title in zip(axes[:2], (shown, prediction.logoh), titles, strict=True):
            limits = dex_limits(prediction)
            plot_value_map(ax, values, usable, inside, LOGOH_TITLE, title, wcs, limits=limits)
        mark_unlike(axes[1], prediction)
        plot_error_map(axes[2], prediction, shown, "label", f", {score}" if both.any() else "")
    else:
        plot_class_map(axes[0], true, *shared, titles[0], wcs)
        plot_class_map(axes[1], prediction.classes, *shared, titles[1], wcs)
        agrees = np.ma.masked_where(~both, prediction.classes == true)
        plot_agreement_map(axes[2], agrees, usable, inside, score, wcs)
    for ax in axes:
        mark_scale(ax, prediction.attrs)
    return axes


def dex_limits(prediction: eval_fns.CubePrediction) -> tuple[float, float]:
    """Range of the colours of a galaxy's metallicities, 12+log(O/H) in dex."""
    assert prediction.logoh is not None
    values = prediction.logoh[prediction.usable]
    low, high = np.quantile(values, (0.01, 0.99)) if values.size else (8.0, 9.0)
    return float(low), float(max(high, low + 0.05))


def plot_error_map(
    ax: Axes, prediction: eval_fns.CubePrediction, wanted: np.ndarray, name: str, more: str = ""
) -> Axes:
    """Draw predicted minus wanted metallicities (y, x) in dex; NaN where there is none."""
    assert prediction.logoh is not None
    difference, limit, title = prediction.logoh - wanted, 0.1, f"no {name}"
    if np.isfinite(difference).any():
        limit = max(0.02, float(np.nanquantile(np.abs(difference), 0.98)))
        title = f"MAE {np.nanmean(np.abs(difference)):.3f} dex{more}"
    sky = (prediction.usable, prediction.inside)
    wcs = prediction.attrs.get("wcs_header")
    return plot_value_map(
        ax, difference, *sky, f"prediction - {name} (dex)", title, wcs, limit=limit
    )


def plot_interval_map(
    ax: Axes, prediction: eval_fns.CubePrediction, labels: np.ndarray | None = None
) -> Axes:
    """Draw half the width of the 90 % intervals; the title says how many labels they hold."""
    lower, upper = prediction.lower, prediction.upper
    assert lower is not None
    assert upper is not None
    title = f"{LEVEL:.0%} interval"
    if labels is not None and (known := np.isfinite(labels) & prediction.usable).any():
        held = ((labels >= lower) & (labels <= upper))[known].mean()
        title += f": holds {held:.0%} of the labels"
    sky = (prediction.usable, prediction.inside)
    wcs = prediction.attrs.get("wcs_header")
    return plot_value_map(ax, (upper - lower) / 2, *sky, "half-width (dex)", title, wcs)


def mark_unlike(ax: Axes, prediction: eval_fns.CubePrediction) -> Axes:
    """Cross out the spaxels whose spectra are unlike those of training."""
    if prediction.unlike is None or not prediction.unlike.any():
        return ax
    east, north = sky_edges(prediction.unlike.shape, prediction.attrs.get("wcs_header"))
    centres = [(e[:-1, :-1] + e[1:, 1:]) / 2 for e in (east, north)]
    x, y = (centre[prediction.unlike] for centre in centres)
    ax.plot(x, y, "x", color="white", ms=2.5, mew=0.6, label="unlike the training spectra")
    ax.legend(loc="upper left", fontsize=6, framealpha=1, facecolor="0.5", labelcolor="white")
    return ax


def title_of(prediction: eval_fns.CubePrediction) -> str:
    """Title of a predicted map: says whether the model was trained or selected on the galaxy."""
    seen = {"train": " (training galaxy)", "val": " (validation galaxy)"}
    return f"prediction{seen.get(prediction.part, '')}"


def plot_agreement_map(
    ax: Axes,
    agrees: np.ndarray,
    usable: np.ndarray,
    inside: np.ndarray,
    title: str = "",
    wcs_header: str | None = None,
) -> Axes:
    """Draw where prediction and label agree, (y, x) bool, masked where one is missing."""
    colours = _scale([WRONG_COLOUR, RIGHT_COLOUR])
    _, others = _draw_map(ax, agrees.astype(float), usable, inside, wcs_header, title, **colours)
    handles = _patches(["agrees", "differs"], [RIGHT_COLOUR, WRONG_COLOUR])
    _legend(ax, handles + others, "predicted class")
    return ax


def plot_part_map(
    ax: Axes,
    parts: np.ndarray,
    inside: np.ndarray,
    title: str = "",
    wcs_header: str | None = None,
) -> Axes:
    """Draw the part of an easy split that each spaxel is in.

    `parts` (y, x) are indices into utils.SPLIT_PARTS; LABEL_NONE is hatched.
    """
    colours = [PART_COLOURS[part] for part in utils.SPLIT_PARTS]
    shown = np.ma.masked_equal(parts, LABEL_NONE)
    _, others = _draw_map(ax, shown, inside, inside, wcs_header, title, **_scale(colours))
    _legend(ax, _patches(utils.SPLIT_PARTS, colours) + others)
    return ax


# Diagrams, curves, matrices, spectra, splits


def plot_bpt(
    ax: Axes,
    nitrogen: np.ndarray,
    oxygen: np.ndarray,
    classes: np.ndarray,
    label_task: str,
    n_classes: int,
    title: str = "",
) -> Axes:
    """Draw spaxels in the [N II] BPT plane, coloured by class, with the two demarcations.

    Parameters
    ----------
    nitrogen, oxygen : (N,) float
        log([N II] 6585 / Ha) and log([O III] 5008 / Hb).
    classes : (N,) int
        Symbols of LABEL_NONE are hollow.
    """
    colours = CLASS_COLOURS[label_task, n_classes]
    names = class_names(label_task, n_classes)
    points: list[Artist] = []
    for k, name in [(LABEL_NONE, "no label"), *enumerate(names)]:
        here = classes == k
        face, edge, width = ("none", LINE_GREY, 0.5) if k == LABEL_NONE else (colours[k], "k", 0.15)
        if here.any():
            style: dict[str, Any] = {"s": 8, "fc": face, "ec": edge, "lw": width}
            style["label"] = f"{name}: {here.sum()}"
            points.append(ax.scatter(nitrogen[here], oxygen[here], **style))
    if label_task == "logOH":
        points.reverse()  # high above low, "no label" last
    x_limits = min(-1.5, nitrogen.min(initial=0) - 0.1), max(0.6, nitrogen.max(initial=0) + 0.1)
    y_limits = min(-1.2, oxygen.min(initial=0) - 0.1), max(1.4, oxygen.max(initial=0) + 0.1)
    x, y = np.linspace(*x_limits, 400), np.linspace(*y_limits, 2000)
    regions = demarcate(x[:, None], y)
    authors = {COMPOSITE: "Kauffmann+ 2003", AGN: "Kewley+ 2001"}
    for (lowest, name), line in zip(authors.items(), ("--", "-"), strict=True):
        above = regions >= lowest  # the curve is its lower edge; there is none right of the pole
        curve = np.where(above[:, 0], np.nan, y[above.argmax(axis=1)])
        points += ax.plot(x, curve, line, color="k", lw=1.4, label=name)
    _legend(ax, points, TASK_TITLES[label_task])
    ax.set(xlim=x_limits, ylim=y_limits, title=title)
    ax.set_xlabel(r"log([NII] 6585 / H$\alpha$), vacuum wavelength")
    ax.set_ylabel(r"log([OIII] 5008 / H$\beta$), vacuum wavelength")
    return ax


def plot_training_curves(
    axes: Sequence[Axes], metrics: pd.DataFrame, card: ModelCard | None = None
) -> Sequence[Axes]:
    """Draw loss and accuracy (metrics.csv of a run) against the epoch in two axes.

    The card marks the best epoch and the validation accuracy of the baselines.
    """
    curves = {"train": ("training", OTHER_COLOUR), "val": ("validation", MODEL_COLOUR)}
    last = int(metrics["epoch"].max())
    ticks = np.union1d(1, np.arange(last, 0, -max(1, -(-last // 5))))
    for ax, name in zip(axes, ("loss", "accuracy"), strict=True):
        for part, (label, colour) in curves.items():
            curve = metrics[f"{part}_{name}"]
            ax.plot(metrics["epoch"], curve, "o-", ms=3, color=colour, label=label)
        if card is not None and (best := card.best):
            label = f"best epoch: {best['epoch']}"
            ax.axvline(best["epoch"], color="k", lw=0.8, ls=":", label=label)
        ax.set(xlabel="epoch", ylabel=name if name == "accuracy" else "loss (nat)")
        ax.set(xlim=(1 - 0.03 * last, 1.03 * last), xticks=ticks)
    baselines = card.baselines if card is not None else {}
    lines = {
        "line_ratios": ("line ratios", "-."),
        "spectrum_only": ("linear model", "-."),
        "majority": ("majority class", "--"),
    }
    for key, (name, line) in lines.items():
        if (value := baselines.get(f"val_{key}_accuracy")) is not None:
            label = f"validation, {name}"
            axes[1].axhline(value, color=MODEL_COLOUR, lw=1, ls=line, label=label)
    axes[1].set_ylim(0, 1)
    _legend(axes[1], axes[1].get_legend_handles_labels()[0])
    return axes


def plot_confusion(ax: Axes, confusion: np.ndarray, names: Sequence[str], title: str = "") -> Axes:
    """Draw a confusion matrix: fractions of each true class, counts below them.

    `confusion` is (true class, predicted class) int. The row of a class that no label has is grey,
    and its name says so.
    """
    shares = np.ma.divide(confusion, confusion.sum(axis=1, keepdims=True))  # masked in empty rows
    absent = np.ma.getmaskarray(shares)
    colours = mpl.colormaps["Blues"].with_extremes(bad=EMPTY_COLOUR)
    image = ax.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="fraction of the true class", fraction=0.05, pad=0.02)
    size = 9 if len(names) <= 4 else 7
    for i, j in np.ndindex(confusion.shape):
        colour = "white" if shares[i, j] > 0.55 else "black"
        text = "-" if absent[i, j] else f"{shares[i, j]:.2f}\n{confusion[i, j]}"
        ax.text(j, i, text, ha="center", va="center", color=colour, fontsize=size)
    ticks = range(len(names))
    ax.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, [f"{n} (no label)" if absent[k, 0] else n for k, n in enumerate(names)])
    ax.set(xlabel="predicted", ylabel="label (each row sums to 1)", title=title)
    return ax


def mark_lines(ax: Axes, wave_min: float, wave_max: float) -> Axes:
    """Mark the emission lines between two vacuum rest wavelengths (Angstrom)."""
    inside = {n: w for n, w in EMISSION_LINES.items() if wave_min < w < wave_max}
    waves = np.array(list(inside.values()))
    far = np.flatnonzero(np.diff(waves) > 0.022 * (wave_max - wave_min)) + 1
    style: dict[str, Any] = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 7}
    style["arrowprops"] = {"arrowstyle": "-", "lw": 0.5, "color": LINE_GREY, "shrinkB": 0}
    style |= {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    for group in np.split(np.array(list(inside)), far):
        for i, name in enumerate(group):
            wave, shift = inside[name], 10 * (i - (len(group) - 1) / 2)  # names side by side
            ax.axvline(wave, color=LINE_GREY, lw=0.6, ls=":", zorder=0)
            ax.annotate(name, (wave, 1), xytext=(shift, 10), **style)
    return ax


def plot_spectrum(
    ax: Axes,
    wave: np.ndarray,
    flux: np.ndarray,
    ivar: np.ndarray | None = None,
    label: str = "flux density",
) -> Axes:
    """Draw a rest-frame spectrum with its emission lines and its 1 sigma error.

    Parameters
    ----------
    wave : (band,) Angstrom, vacuum
    flux, ivar : (band,) 1e-17 erg/s/cm2/Angstrom/spaxel and its inverse variance
        NaN leaves a gap.
    """
    style: dict[str, Any] = {"lw": 0.8, "drawstyle": "steps-mid"}
    ax.plot(wave, flux, color=MODEL_COLOUR, label=label, **style)
    if ivar is not None:
        sigma = np.divide(1, np.sqrt(ivar), out=np.full(ivar.shape, np.nan), where=ivar > 0)
        ax.plot(wave, sigma, color=OTHER_COLOUR, label=r"1$\sigma$ error", **style)
    mark_lines(ax, wave[0], wave[-1])
    ax.set(
        xlim=(wave[0], wave[-1]),
        xlabel="rest wavelength in vacuum (Angstrom)",
        ylabel="flux density\n" r"($10^{-17}$ erg/s/cm$^2$/$\AA$/spaxel)",
    )
    ax.legend(frameon=False, loc="upper right", fontsize=8)
    return ax


def plot_explained_variance(ax: Axes, stats: Stats) -> Axes:
    """Draw the fraction of the variance that each component explains, and the cumulative one.

    The title states the remainder, which is spread over all other directions.
    """
    n = np.arange(1, stats.explained_ratio.size + 1)
    total = np.cumsum(stats.explained_ratio)
    ax.bar(n, stats.explained_ratio, color=MODEL_COLOUR, label="each component")
    ax.plot(n, total, "o-", ms=3, color=OTHER_COLOUR, label="cumulative")
    ax.set(xlabel="component", ylabel="fraction of the variance", ylim=(0, 1.1 * total[-1]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, loc="center right")
    left, others = 1 - total[-1], stats.wave.size - n.size
    if others > 0:
        mean = f"{left / others:.2%} each on average"
        directions = utils.counted(others, "direction")
        ax.set_title(f"remaining {directions}: {left:.0%}, {mean}", fontsize=9)
    return ax


def plot_class_shares(
    ax: Axes, counts: Mapping[str, np.ndarray], label_task: str, n_classes: int
) -> Axes:
    """Draw the fraction of each class in every part of a split; an empty part has no bars.

    `counts` maps each part to its number of spaxels per class, (classes,) int.
    """
    names = class_names(label_task, n_classes)
    width = 0.8 / len(counts)
    for i, (part, count) in enumerate(counts.items()):
        at = np.arange(n_classes) + (i - (len(counts) - 1) / 2) * width
        total = int(count.sum())
        shares = count / total if total else np.full(n_classes, np.nan)
        label = f"{part}: {utils.counted(total, 'spaxel')}"
        ax.bar(at, shares, width, color=PART_COLOURS.get(part), label=label)
    ax.set_xticks(range(n_classes), names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set(ylabel="fraction of the part's spaxels", title=TASK_TITLES[label_task])
    ax.legend(frameon=False, fontsize=8)
    return ax


def plot_histograms(ax: Axes, values: Mapping[str, np.ndarray], label: str, bins: int = 12) -> Axes:
    """Draw histograms of several samples side by side, e.g. the redshifts of a split's parts.

    `values` maps the name of each sample to its values, (N,) float; `label` states quantity and
    unit.
    """
    names = [f"{name}: {len(sample)}" for name, sample in values.items()]
    colours = list(itertools.islice(itertools.cycle(PART_COLOURS.values()), len(names)))
    ax.hist(list(values.values()), bins, label=names, color=colours)
    ax.set(xlabel=label, ylabel="galaxies")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=8)
    return ax


# The command


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """Make a figure of some inches, and its rows * columns axes; rows share their x axis."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex="col", squeeze=False).ravel().tolist()


def galaxy_figure(
    trained: eval_fns.TrainedModel, root: Path, plateifu: str
) -> tuple[Figure, eval_fns.CubePrediction]:
    """Make a galaxy's maps: label, prediction, difference; without labels prediction, probability.

    Of a simulated galaxy, the noiseless truth is shown beside them.

    Raises
    ------
    DataError
        If the galaxy has no cube, or labels made with other options than the training labels.
    """
    import eval_fns

    prediction = eval_fns.predict_cube(trained, utils.cube_path(root, plateifu))
    task, n_classes = trained.spec.label_task, len(trained.card.class_names)
    label_file = utils.label_path(root, task, plateifu)
    if label_file.is_file():
        labels = eval_fns.read_labels_for(trained, label_file, prediction.usable)
        truth = true_labels(root, plateifu, task)
        title, sky = "truth (simulated, no noise)", (prediction.usable, prediction.inside)
        wcs = prediction.attrs.get("wcs_header")
        if prediction.logoh is None:
            n = 3 if truth is None else 4
            figure, axes = _figure(4.7 * n, 4.1, columns=n)
            if truth is not None:
                classes = label_classes(truth, task, n_classes)
                plot_class_map(axes[3], classes, task, n_classes, *sky, title, wcs)
        else:
            rows, columns = (1, 4) if truth is None else (2, 3)
            figure, axes = _figure(4.9 * columns, 4.1 * rows, rows, columns)
            plot_interval_map(axes[3], prediction, labels)
            if truth is not None:
                limits = dex_limits(prediction)
                plot_value_map(axes[4], truth, *sky, LOGOH_TITLE, title, wcs, limits=limits)
                plot_error_map(axes[5], prediction, truth, "truth")
        plot_comparison(axes[:3], prediction, labels, task, n_classes)
        for ax in axes[3:]:
            mark_scale(ax, prediction.attrs)
        return figure, prediction
    figure, (left, right) = _figure(10, 4.3, columns=2)
    wcs, sky = prediction.attrs.get("wcs_header"), (prediction.usable, prediction.inside)
    title = f"{plateifu}: {title_of(prediction)}"
    if prediction.logoh is None:
        plot_class_map(left, prediction.classes, task, n_classes, *sky, title, wcs)
        highest = prediction.probabilities.max(axis=2)
        title = "probability of the predicted class"
        plot_value_map(right, highest, *sky, "probability", title, wcs)
    else:
        limits = dex_limits(prediction)
        plot_value_map(left, prediction.logoh, *sky, LOGOH_TITLE, title, wcs, limits=limits)
        mark_unlike(left, prediction)
        plot_interval_map(right, prediction)
    for ax in (left, right):
        mark_scale(ax, prediction.attrs)
    return figure, prediction


def true_labels(root: Path, plateifu: str, label_task: str) -> np.ndarray | None:
    """Noiseless labels (y, x) of a simulated galaxy, like a label map; None for a real one."""
    from mock.truth import read_truth, truth_path

    path = truth_path(root, plateifu)
    if not path.is_file():
        return None
    try:
        return read_truth(path)[0]["bpt" if label_task == "BPT" else "logoh_o3n2"]
    except DataError as error:
        log.warning(f"no truth beside the prediction: {error}")
        return None


def bpt_figure(root: Path, prediction: eval_fns.CubePrediction, label_task: str) -> Figure:
    """Make a galaxy's BPT diagrams, coloured by label and by prediction.

    They show the usable spaxels whose four lines exceed the signal-to-noise cut of the labels, with
    the fluxes of the MAPS file that the labels were derived from.

    Raises
    ------
    DataError
        If the galaxy has no MAPS file, or several and its labels do not name one of them.
    """
    import archive_files
    import fits_utils

    plateifu, n_classes = prediction.plateifu, prediction.probabilities.shape[2]
    label_file = utils.label_path(root, label_task, plateifu)
    meta = data_io.read_label_meta(label_file)
    named = utils.raw_dir(root, plateifu) / meta.get("source_file", "")
    maps_file = named if named.is_file() else utils.find_raw(root, plateifu, "MAPS")
    maps = archive_files.read_line_maps(maps_file, BPT_LINES)[0]
    made = meta["recipe"].options if "recipe" in meta else {}
    snr = made.get("min_snr", fits_utils.LabelOptions.min_snr)
    shown = detected(maps, BPT_LINES, snr) & prediction.usable
    nitrogen = log_ratio(maps, "N2")[0][shown]
    oxygen = log_ratio(maps, "O3N2")[0][shown] + nitrogen
    maps_of = {"prediction": prediction.classes}
    if label_file.is_file():
        labels = data_io.read_labels(label_file)
        maps_of = {"label": label_classes(labels, label_task, n_classes), **maps_of}
    figure, axes = _figure(5.5 * len(maps_of), 4.2, columns=len(maps_of))
    spaxels = utils.counted(int(shown.sum()), "spaxel")
    figure.suptitle(f"{plateifu}: {spaxels} with S/N > {snr:g} in all four lines")
    for ax, (name, classes) in zip(axes, maps_of.items(), strict=True):
        plot_bpt(ax, nitrogen, oxygen, classes[shown], label_task, n_classes, name)
    return figure


def spectrum_figure(root: Path, plateifu: str) -> Figure:
    """Make the figure of a galaxy's brightest spectrum."""
    cube = data_io.read_cube(utils.cube_path(root, plateifu))
    brightness = np.nan_to_num(cube.flux).mean(axis=2)
    y, x = np.unravel_index(int(brightness.argmax()), brightness.shape)
    figure, (ax,) = _figure(10, 4)
    ivar = None if cube.ivar is None else cube.ivar[y, x]
    plot_spectrum(ax, cube.wave, cube.flux[y, x], ivar)
    z = f", z = {cube.attrs['redshift']:.4f}" if "redshift" in cube.attrs else ""
    figure.suptitle(f"{plateifu}{z}: brightest spaxel (y = {y}, x = {x})")
    return figure


def components_figure(stats: Stats, n: int = 5) -> Figure:
    """Make the figure of the mean spectrum and the first n components."""
    curves = {"mean": stats.mean}
    curves |= {f"component {k}": curve for k, curve in enumerate(stats.components[:n], 1)}
    figure, axes = _figure(9, 1.5 * len(curves), len(curves))
    for ax, (name, curve) in zip(axes, curves.items(), strict=True):
        ax.plot(stats.wave, curve, color=MODEL_COLOUR, lw=0.8)
        ax.axhline(0, color=LINE_GREY, lw=0.5, zorder=0)
        ax.set(ylabel=name, xlim=(stats.wave[0], stats.wave[-1]))
    mark_lines(axes[0], stats.wave[0], stats.wave[-1])
    axes[-1].set_xlabel("rest wavelength in vacuum (Angstrom)")
    return figure


def variance_figure(stats: Stats) -> Figure:
    """Make the figure of the explained variance."""
    figure, (ax,) = _figure(5.5, 3.6)
    plot_explained_variance(ax, stats)
    return figure


def run_figures(run_dir: Path, card: ModelCard, part: str = "test") -> dict[str, Figure]:
    """Make the figures of a run: curves, confusion (if evaluated), explained variance (if PCA).

    What is missing is logged, with the command that creates it.
    """
    import run_folder

    figures = {}
    metrics = run_dir / run_folder.METRICS_FILE
    if metrics.is_file():
        figures["training_curves"], axes = _figure(11, 3.4, columns=2)
        plot_training_curves(axes, pd.read_csv(metrics), card)
    else:
        command = f"python run_SSFTT_training.py --config {run_dir / run_folder.CONFIG_FILE}"
        log.warning("no training curves: no %s; retrain with %s --run-dir NEW", metrics, command)
    evaluation = run_dir / part / run_folder.RESULT_FILE
    if evaluation.is_file():
        result = json.loads(evaluation.read_text())
        epochs = (result["best_epoch"], card.best["epoch"])
        if epochs[0] != epochs[1]:
            log.warning("%s: epoch %d, the model: epoch %d; evaluate again", evaluation, *epochs)
        table = pd.read_csv(run_dir / part / run_folder.CONFUSION_FILE, index_col="true")
        figures[f"confusion_{part}"], (ax,) = _figure(6, 5.6)
        spaxels = utils.counted(result["spaxels"], "spaxel")
        galaxies = utils.counted(result["galaxies"], "galaxy", "galaxies")
        title = (
            f"{TASK_TITLES[result['label_task']]}, {part} part of the {result['split_kind']} split"
            f"\naccuracy {result['accuracy']:.3f}: {spaxels}, {galaxies}"
        )
        plot_confusion(ax, table.to_numpy(), list(table.columns), title)
    else:
        command = f"python eval_fns.py --run-dir {run_dir} --part {part}"
        log.warning("no confusion matrix: no %s; create it with %s", evaluation, command)
    stats = run_dir / run_folder.STATS_FILE
    if stats.is_file():
        figures["explained_variance"] = variance_figure(data_io.read_stats(stats))
    return figures


def save(figure: Figure, path: Path) -> None:
    """Save a figure, whole or not at all."""
    with utils.atomic_path(path) as part, mpl.rc_context({"hatch.linewidth": 0.5}):
        figure.savefig(part, dpi=DPI)
    log.info("%s", path)


def main(config: VisConfig) -> int:
    """Draw the figures of a run and of the requested galaxies."""
    import eval_fns
    import run_folder

    trained = eval_fns.load_model(config.run_dir, config.device)
    root = run_folder.run_data_dir(config.run_dir, config.data_dir)
    out = config.run_dir / run_folder.FIGURES_FOLDER
    for name, figure in run_figures(config.run_dir, trained.card, config.part).items():
        save(figure, out / f"{name}.{config.format}")
    code = utils.EXIT_DONE
    for plateifu in config.plateifu:
        try:
            figure, prediction = galaxy_figure(trained, root, plateifu)
            save(figure, out / f"{plateifu}_maps.{config.format}")
            save(spectrum_figure(root, plateifu), out / f"{plateifu}_spectrum.{config.format}")
        except DataError as error:
            log.error("%s", error)
            code = utils.EXIT_DATA
            continue
        try:
            figure = bpt_figure(root, prediction, trained.spec.label_task)
            save(figure, out / f"{plateifu}_bpt.{config.format}")
        except DataError as error:  # only MAPS can be missing; the other figures are drawn
            log.warning("no BPT diagram: %s", error)
    return code


if __name__ == "__main__":
    utils.run_command(main, VisConfig, __doc__)
