"""Diagrams on given axes: BPT, training curves, confusion, spectra, components, splits.

Every function draws into the axes it is given and returns them. Maps on the sky: sky_maps.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import utils

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hsi_proc_fns import Stats
from labels import AGN, CLASS_COLOURS, COMPOSITE, LABEL_NONE, TASK_TITLES, class_names, demarcate
from line_fits import LINES

if TYPE_CHECKING:
    from run_folder import ModelCard

EMPTY_COLOUR = "#E4E4E4"
"""Rows of classes that no label has."""
LINE_GREY = "#9A9A9A"
MODEL_COLOUR, OTHER_COLOUR = "#0072B2", "#D55E00"
PART_COLOURS = {"train": "#0072B2", "val": "#E69F00", "test": "#882255"}

SCORE_TITLES = {
    "loss": "loss: minus log likelihood (nat)",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "mae_dex": "mean absolute error (dex)",
}
"""Axis labels of the columns of metrics.csv that training curves show."""

PERMITTED = {"Hb": r"H$\beta$", "HeI": "HeI", "Ha": r"H$\alpha$"}


def line_title(name: str) -> str:
    """Name of an emission line in figures, e.g. "[OIII] 5008" for "OIII-5008"."""
    ion, wave = name.split("-")
    return f"{PERMITTED.get(ion, f'[{ion}]')} {wave}"


EMISSION_LINES = {line_title(name): wave for name, wave in LINES.items()}
"""Lines that figures mark: name and vacuum wavelength, Angstrom."""


def legend_beside(ax: Axes, handles: Sequence[Artist], title: str | None = None) -> None:
    """Put a legend to the right of the axes."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    place |= {"fontsize": 8, "title_fontsize": 8, "alignment": "left", "frameon": False}
    ax.legend(handles=handles, title=title, **place)


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

    In random order, the rarest class on top, so that none hides another.

    Parameters
    ----------
    nitrogen, oxygen : (N,) float
        log([N II] 6585 / Ha) and log([O III] 5008 / Hb).
    classes : (N,) int
        Symbols of LABEL_NONE are hollow.
    """
    colours = np.array(CLASS_COLOURS[label_task, n_classes])
    unknown = classes == LABEL_NONE
    counts = np.bincount(classes[~unknown], minlength=n_classes)
    order = np.random.default_rng(0).permutation(np.flatnonzero(~unknown))
    rarest = np.where(counts > 0, counts, len(classes)).argmin()
    order = order[np.argsort(classes[order] == rarest, kind="stable")]
    hollow: dict[str, Any] = {"s": 8, "fc": "none", "ec": LINE_GREY, "lw": 0.5}
    ax.scatter(nitrogen[order], oxygen[order], s=8, c=colours[classes[order]], alpha=0.6, lw=0)
    none = ax.scatter(nitrogen[unknown], oxygen[unknown], **hollow)
    none.set_label(f"no label: {unknown.sum()}")
    points: list[Artist] = [none] if unknown.any() else []
    names = class_names(label_task, n_classes)
    for name, colour, count in zip(names, colours, counts, strict=True):
        if count:
            symbol: dict[str, Any] = {"marker": "o", "ls": "", "ms": 3, "color": colour}
            points.append(Line2D([], [], **symbol, label=f"{name}: {count}"))
    if label_task == "logOH":
        points.reverse()  # high above low, "no label" last
    x_limits = min(-1.5, nitrogen.min(initial=0) - 0.1), max(0.6, nitrogen.max(initial=0) + 0.1)
    y_limits = min(-1.2, oxygen.min(initial=0) - 0.1), max(1.4, oxygen.max(initial=0) + 0.1)
    x, y = np.linspace(*x_limits, 400), np.linspace(*y_limits, 2000)
    regions = demarcate(x[:, None], y)
    for lowest, name, line in ((COMPOSITE, "Kauffmann+ 2003", "--"), (AGN, "Kewley+ 2001", "-")):
        above = regions >= lowest  # the curve is its lower edge; there is none right of the pole
        curve = np.where(above[:, 0], np.nan, y[above.argmax(axis=1)])
        points += ax.plot(x, curve, line, color="k", lw=1.4, label=name)
    legend_beside(ax, points, TASK_TITLES[label_task])
    ax.set(xlim=x_limits, ylim=y_limits, title=title)
    ax.set_xlabel(r"log([NII] 6585 / H$\alpha$), vacuum wavelength")
    ax.set_ylabel(r"log([OIII] 5008 / H$\beta$), vacuum wavelength")
    return ax


def plot_training_curves(
    axes: Sequence[Axes], metrics: pd.DataFrame, card: ModelCard | None = None
) -> Sequence[Axes]:
    """Draw the loss and a score (metrics.csv of a run) against the epoch in two axes.

    The card chooses the score, that which selected the best epoch (accuracy if that was the loss),
    and marks this epoch, the start if that was best (epoch 0), and the score of the baselines.
    """
    about = card.best if card is not None else {}
    best, score = about.get("epoch"), about.get("monitor", "loss")
    score = "accuracy" if score == "loss" else score
    first, last = 1 if best is None else min(1, best), int(metrics["epoch"].max())
    ticks = np.union1d(first, np.arange(last, 0, -max(1, -(-last // 5))))
    for ax, name in zip(axes, ("loss", score), strict=True):
        for part, colour, label in (
            ("train", OTHER_COLOUR, "training"),
            ("val", MODEL_COLOUR, "validation"),
        ):
            if (curve := metrics.get(f"{part}_{name}")) is not None:
                ax.plot(metrics["epoch"], curve, "o-", ms=3, color=colour, label=label)
        if best == 0:
            ax.plot(0, about[f"val_{name}"], "D", color=MODEL_COLOUR, label="validation, start")
        if best is not None:
            kept = f"best epoch: {best}" if best else "kept: the start"
            ax.axvline(best, color="k", lw=0.8, ls=":", label=kept)
        ax.set(xlabel="epoch", ylabel=SCORE_TITLES[name])
        ax.set(xlim=(first - 0.03 * last, 1.03 * last), xticks=ticks)
    baselines = card.baselines if card is not None else {}
    for key, name, line in (
        ("line_ratios", "line ratios", "-."),
        ("spectrum_only", "linear model", "-."),
        ("majority", "majority class", "--"),
    ):
        if (value := baselines.get(f"val_{key}_{score}")) is not None:
            label = f"validation, {name}"
            axes[1].axhline(value, color=MODEL_COLOUR, lw=1, ls=line, label=label)
    if score != "mae_dex":
        axes[1].set_ylim(0, 1)
    entries = {artist.get_label(): artist for ax in axes for artist in ax.lines}
    legend_beside(axes[1], list(entries.values()))
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
    edge = 0.01 * (wave[-1] - wave[0])  # [O III] 5008 is close to the end of the usual range
    ax.set(
        xlim=(wave[0] - edge, wave[-1] + edge),
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
    """Draw histograms of observations side by side, e.g. of the redshifts in each part of a split.

    `values` maps each part to its values, (N,) float; `label` states quantity and unit.
    """
    names = [f"{part}: {len(sample)}" for part, sample in values.items()]
    ax.hist(list(values.values()), bins, label=names, color=[PART_COLOURS[part] for part in values])
    ax.set(xlabel=label, ylabel="observations")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=8)
    return ax
