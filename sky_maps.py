"""Maps on given axes: classes, metallicities, intervals, differences, parts of a split.

Every function draws into the axes it is given and returns them. Maps are shown as on the sky,
north up and east left, in arcseconds from the field's centre. astropy, slow to load,
is imported only to draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import utils

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import ListedColormap
from matplotlib.patches import Ellipse, Patch
from matplotlib.ticker import MaxNLocator

from diagrams import LINE_GREY, PART_COLOURS, legend_beside
from hsi_proc_fns import field_of_view
from intervals import LEVEL
from labels import (
    CLASS_COLOURS,
    LABEL_NONE,
    MASKED_COLOUR,
    SF,
    TASK_TITLES,
    class_names,
    label_classes,
)

if TYPE_CHECKING:
    from inference import CubePrediction

HATCHED: dict[str, Any] = {"hatch": "////", "ec": LINE_GREY, "lw": 0}
RIGHT_COLOUR, WRONG_COLOUR = "#DDE6ED", "#D55E00"
DISTRUST_COLOUR = "#D55E00"
"""Of the hatching over a map: seen on every colour of viridis."""
SPAXEL_ARCSEC = 0.5
"""Side of a MaNGA spaxel (Law et al. 2016, AJ 152, 83), for cubes without a WCS."""
SCALE_BAR_ARCSEC = 5.0
SAME_DEX = 1e-4
"""Intervals whose half-widths differ by less have no colour bar, which would show rounding."""


class Sky(NamedTuple):
    """A galaxy's field of view, where its maps are drawn."""

    inside: np.ndarray
    """(y, x) bool: spaxels with any measurement; the field of view is their convex hull."""
    usable: np.ndarray
    """(y, x) bool; other spaxels in the field of view are grey."""
    attrs: Mapping[str, Any] = {}
    """Of the cube: wcs_header, redshift, reff_arcsec, ...; what is unknown is not drawn."""


# The sky


def sky_edges(shape: tuple[int, ...], wcs_header: str | None = None) -> np.ndarray:
    """Find the corners of all spaxels on the sky.

    Without the celestial cards of the cube (attribute `wcs_header`): 0.5 arcsec spaxels, north up,
    east left, the centre of the map at the origin.

    Returns
    -------
    (2, ny + 1, nx + 1) arcsec
        Offsets to the east and to the north in the tangent plane, from the reference point.
    """
    ny, nx = shape
    y, x = np.mgrid[: ny + 1, : nx + 1] - 0.5  # spaxel centres are at integers
    matrix, centre = SPAXEL_ARCSEC * np.diag([-1, 1]), ((nx - 1) / 2, (ny - 1) / 2)
    if wcs_header:
        from astropy.io.fits import Header
        from astropy.wcs import WCS

        wcs = WCS(Header.fromstring(wcs_header, sep="\n"), naxis=2)
        matrix, centre = 3600 * wcs.pixel_scale_matrix, wcs.wcs.crpix - 1
    return np.tensordot(matrix, [x - centre[0], y - centre[1]], axes=1)


def finish_sky_axes(ax: Axes, sky: Sky, title: str = "") -> Axes:
    """Outline the field, set limits and labels, add scale bar, compass and effective radius.

    Kiloparsecs are proper lengths in the flat LCDM cosmology of Planck 2018 (astropy's Planck18);
    peculiar velocities are neglected.
    """
    from astropy.cosmology import Planck18

    east, north = sky_edges(sky.inside.shape, sky.attrs.get("wcs_header"))
    sides = outline_segments(field_of_view(sky.inside), east, north)
    ax.add_collection(LineCollection(list(sides), colors="k", lw=0.8))
    reach = 1.25 * max(np.abs(sides).max(), 1.0) if sides.size else np.abs(east).max()
    ax.set(xlim=(reach, -reach), ylim=(-reach, reach), aspect="equal", title=title)
    ax.set(xlabel="east offset (arcsec)", ylabel="north offset (arcsec)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, symmetric=True, steps=[1, 2, 5, 10]))
    z = float(sky.attrs.get("redshift") or 0)
    kpc = Planck18.kpc_proper_per_arcmin(z).value / 60 if z > 0 else 0.0  # per arcsec

    def length(arcsec: float, digits: str) -> str:
        return f'{arcsec:{digits}}"' + (f" = {arcsec * kpc:.1f} kpc" if kpc else "")

    bar, low = SCALE_BAR_ARCSEC if reach > SCALE_BAR_ARCSEC else 1.0, -0.94 * reach
    ax.plot([0.94 * reach, 0.94 * reach - bar], [low, low], color="k", lw=2)
    ax.text(0.94 * reach, low + 0.03 * reach, length(bar, "g"), fontsize=8)
    arrow = {"arrowstyle": "->", "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
    x, tip = -0.94 * reach, 0.1 * reach
    for name, end, va, ha in (
        ("N", (x, low + tip), "bottom", "center"),
        ("E", (x + tip, low), "center", "right"),
    ):
        ax.annotate("", xy=end, xytext=(x, low), arrowprops=arrow)
        ax.annotate(name, end, va=va, ha=ha, fontsize=8)
    if (reff := float(sky.attrs.get("reff_arcsec") or 0)) > 0:
        _draw_radius(ax, reff, sky.attrs)
        words = f"- - $R_e$ = {length(reff, '.1f')}"
        ax.text(0.03, 0.97, words, transform=ax.transAxes, va="top", fontsize=8)
    return ax


def _draw_radius(ax: Axes, reff_arcsec: float, attrs: Mapping[str, Any]) -> None:
    """Draw the ellipse of the effective radius.

    The radius is the semi-major axis of the elliptical Petrosian photometry of the NASA-Sloan
    Atlas, at the position angle (from north through east) and with the ellipticity 1 - b/a of the
    DAP's header; a circle without them.
    """
    from astropy.io.fits import Header

    angle, flattened = float(attrs.get("pa_deg") or 0), 1 - float(attrs.get("ellipticity") or 0)
    east = north = 0.0
    if attrs.get("wcs_header") and attrs.get("objra") is not None:
        cards = Header.fromstring(attrs["wcs_header"], sep="\n")
        turn = (attrs["objra"] - cards["CRVAL1"] + 180) % 360 - 180
        east = 3600 * turn * np.cos(np.deg2rad(attrs["objdec"]))
        north = 3600 * (attrs["objdec"] - cards["CRVAL2"])
    size = (2 * reff_arcsec * flattened, 2 * reff_arcsec)
    for colour, width, style in (("w", 2.2, "-"), ("k", 1.0, "--")):  # visible on any colour
        ring: dict[str, Any] = {"fill": False, "ec": colour, "lw": width, "ls": style}
        ax.add_patch(Ellipse((east, north), *size, angle=-angle, **ring))


def outline_segments(inside: np.ndarray, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    """Find the spaxel sides between inside and outside, (N, 2 points, 2) arcsec."""
    padded, corners = np.pad(inside, 1), np.stack([east, north], axis=-1)
    y, x = np.nonzero(np.diff(padded[1:-1], axis=1))  # side between x - 1 and x
    upright = np.stack([corners[y, x], corners[y + 1, x]], axis=1)
    y, x = np.nonzero(np.diff(padded[:, 1:-1], axis=0))
    level = np.stack([corners[y, x], corners[y, x + 1]], axis=1)
    return np.concatenate([upright, level])


def _draw_map(
    ax: Axes, values: np.ma.MaskedArray, sky: Sky, title: str, **colours: Any
) -> tuple[QuadMesh, list[Patch]]:
    """Draw values; grey where the spectrum is not usable, hatched where it has no value.

    Also returns legend entries for grey and hatched areas, where they occur.
    """
    east, north = sky_edges(sky.inside.shape, sky.attrs.get("wcs_header"))
    values, others = np.ma.masked_where(~sky.usable, values), []
    no_label, masked = values.mask & sky.usable, ~sky.usable & field_of_view(sky.inside)
    if no_label.any():
        ax.pcolor(east, north, np.ma.masked_equal(~no_label, True), **_scale(["w"]), **HATCHED)
        others.append(Patch(fc="w", **HATCHED, label="no label"))
    if masked.any():
        ax.pcolormesh(east, north, np.ma.masked_equal(~masked, True), **_scale([MASKED_COLOUR]))
        others += _patches(["masked"], [MASKED_COLOUR])
    drawn = ax.pcolormesh(east, north, values, **colours)
    finish_sky_axes(ax, sky, title)
    return drawn, others


def _scale(colours: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments that give class k the k-th colour."""
    return {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": len(colours) - 0.5}


def _patches(names: Iterable[str], colours: Iterable[str]) -> list[Patch]:
    """Legend entries of filled areas."""
    return [Patch(color=c, label=n) for n, c in zip(names, colours, strict=True)]


# Maps of anything


def plot_class_map(
    ax: Axes, classes: np.ndarray, label_task: str, n_classes: int, sky: Sky, title: str = ""
) -> Axes:
    """Draw a map of classes (y, x), with its legend beside it.

    Usable spaxels with LABEL_NONE are hatched. `label_task` and `n_classes` choose names and
    colours.
    """
    colours = CLASS_COLOURS[label_task, n_classes]
    shown = np.ma.masked_equal(classes, LABEL_NONE)
    _, others = _draw_map(ax, shown, sky, title, **_scale(colours))
    handles = _patches(class_names(label_task, n_classes), colours)
    if label_task == "logOH":
        handles.reverse()  # high above low, as on a colour bar
    legend_beside(ax, handles + others, TASK_TITLES[label_task])
    return ax


def plot_value_map(
    ax: Axes,
    values: np.ndarray,
    sky: Sky,
    label: str,
    title: str = "",
    limits: tuple[float, float] | None = None,
    colours: str = "cividis",
) -> Axes:
    """Draw a map of numbers with its colour bar.

    Parameters
    ----------
    values : (y, x) float
        NaN is hatched where the spaxel is usable.
    sky : Sky
    label : str
        Of the colour bar, with unit.
    limits : (low, high), optional
        Range of the colours; default: that of the data. The ends of the bar are pointed where
        values lie beyond them.
    colours : str
        One of matplotlib's colour maps.
    """
    shown = np.ma.masked_where(~sky.usable | ~np.isfinite(values), values)
    drawn, _ = _draw_map(ax, shown, sky, title, cmap=colours)
    beyond = 0
    if limits:
        drawn.set_clim(limits)
        beyond = bool((shown < limits[0]).any()) + 2 * bool((shown > limits[1]).any())
    bar = ax.figure.colorbar(
        drawn,
        cax=ax.inset_axes((1.04, 0.0, 0.05, 1.0)),
        extend=("neither", "min", "max", "both")[beyond],
    )
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
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
    sky = Sky(inside, inside, {"wcs_header": wcs_header})
    shown = np.ma.masked_equal(parts, LABEL_NONE)
    _, others = _draw_map(ax, shown, sky, title, **_scale(colours))
    legend_beside(ax, _patches(utils.SPLIT_PARTS, colours) + others)
    return ax


# Maps of a prediction


def sky_of(prediction: CubePrediction) -> Sky:
    """Field of view of a prediction."""
    return Sky(prediction.inside, prediction.usable, prediction.attrs)


def plot_answer(ax: Axes, prediction: CubePrediction, values: np.ndarray, title: str = "") -> Axes:
    """Draw metallicities (y, x) in dex, or BPT classes, in the colours of a prediction.

    `values` are what the model gives or labels for the same galaxy, as `data_io.read_labels` gives
    them.
    """
    sky = sky_of(prediction)
    if prediction.logoh is None:
        return plot_class_map(ax, values, "BPT", len(prediction.class_names), sky, title)
    shown = prediction.logoh[prediction.usable]
    low, high = np.quantile(shown, (0.01, 0.99)) if shown.size else (8.0, 9.0)
    limits = float(low), float(max(high, low + 0.05))
    return plot_value_map(ax, values, sky, "12+log(O/H) (dex)", title, limits, "viridis")


def plot_difference(
    ax: Axes, prediction: CubePrediction, wanted: np.ndarray, name: str = "label"
) -> Axes:
    """Draw predicted minus wanted metallicities (y, x) in dex, or whether the BPT classes agree.

    The title gives the scores over the spaxels that have both; `name` says what is wanted.
    """
    sky, task = sky_of(prediction), "BPT" if prediction.logoh is None else "logOH"
    classes = label_classes(wanted, task, len(prediction.class_names))
    both = prediction.usable & (classes != LABEL_NONE)
    agrees = np.ma.masked_where(~both, prediction.classes == classes)
    title = f"class accuracy {agrees.mean():.0%}" if both.any() else f"no {name}"
    if prediction.logoh is None:
        _, others = _draw_map(ax, agrees, sky, title, **_scale([WRONG_COLOUR, RIGHT_COLOUR]))
        handles = _patches(["agrees", "differs"], [RIGHT_COLOUR, WRONG_COLOUR])
        legend_beside(ax, handles + others, f"predicted class and {name}")
        return ax
    difference, limit = np.where(both, prediction.logoh - wanted, np.nan), 0.1
    if both.any():
        error = np.abs(difference[both])
        limit = max(0.02, float(np.quantile(error, 0.98)))
        title = f"MAE {error.mean():.3f} dex, {title}"
    label = f"prediction - {name} (dex)"
    return plot_value_map(ax, difference, sky, label, title, (-limit, limit), "PuOr")


def plot_doubt(ax: Axes, prediction: CubePrediction, labels: np.ndarray | None = None) -> Axes:
    """Draw half the width of the 90 % intervals, or the probability of the predicted BPT class.

    The title says how many of the labels (y, x) the intervals contain.
    """
    lower, upper, sky = prediction.lower, prediction.upper, sky_of(prediction)
    if lower is None or upper is None:
        highest = prediction.probabilities.max(axis=2)
        return plot_value_map(ax, highest, sky, "probability", "probability of the predicted class")
    title = f"{LEVEL:.0%} interval"
    if labels is not None and (known := np.isfinite(labels) & prediction.usable).any():
        held = ((labels >= lower) & (labels <= upper))[known].mean()
        title += f": holds {held:.0%} of the labels"
    width, name = (upper - lower) / 2, "half-width (dex)"
    shown = width[prediction.usable]
    if shown.size and np.ptp(shown) < SAME_DEX:
        one = ListedColormap([RIGHT_COLOUR])
        _, others = _draw_map(ax, np.ma.masked_invalid(width), sky, title, cmap=one)
        handles = _patches([f"constant: +-{shown[0]:.3f} dex"], [RIGHT_COLOUR])
        legend_beside(ax, handles + others)
        return ax
    return plot_value_map(ax, width, sky, name, title)


def mark_distrusted(ax: Axes, prediction: CubePrediction, bpt: np.ndarray | None = None) -> Axes:
    """Mark the spaxels whose prediction is not to be trusted, with a legend below.

    Crosses where the spectra are unlike those of training; hatched where metallicities are of
    spaxels that are not known to be star-forming by the BPT labels (y, x), if there are any.
    """
    edges = sky_edges(prediction.inside.shape, prediction.attrs.get("wcs_header"))
    marks: list[Artist] = []
    if bpt is not None and prediction.logoh is not None:
        unknown = prediction.usable & (bpt != SF)
        if unknown.any():
            hatched = HATCHED | {"ec": DISTRUST_COLOUR}
            ax.pcolor(*edges, np.ma.masked_equal(~unknown, True), **_scale(["none"]), **hatched)
            marks.append(Patch(fc="none", **hatched, label="composite, AGN or no BPT label"))
    if prediction.unlike is not None and prediction.unlike.any():
        x, y = ((edges[:, :-1, :-1] + edges[:, 1:, 1:]) / 2)[:, prediction.unlike]
        cross: dict[str, Any] = {"color": "white", "ms": 2.5, "mew": 0.6}
        marks += ax.plot(x, y, "x", **cross, label="unlike the training spectra")
    if marks:
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        ax.legend(handles=marks, fontsize=7, facecolor="0.8", **place)
    return ax
