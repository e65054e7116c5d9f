"""Draw random images of a data set, a row per class and type of telescope; and distributions.

Reads   HDF5 files written by image_extractor.py.
Writes  a PNG file.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from . import layout
from .errors import DataError
from .reader import Images
from .transaction import write_whole

NAMES = {0: "gamma", 101: "proton"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
BRIGHT_SIGMA = 5  # signal is brighter than 5 times the rms of the noise
LOOKED_AT = 500  # images per class and type whose charges are in the distributions


def gallery(
    path: str | Path, output: str | Path, part: str | None = None, columns: int = 6, seed: int = 0
) -> str:
    """Draw random images, each with a colour scale of its own, above distributions by class.

    The distributions are those of energy and number of images of all events, and of charge per
    pixel and per image of at most LOOKED_AT images of each class and type.

    Parameters
    ----------
    part : str, optional
        Part of a split data set; by default all events.
    columns : int
        Images per row.
    seed : int
        Determines which images are drawn.

    Returns
    -------
    str
        A line that says what was drawn.

    Raises
    ------
    DataError
        If there are no images or the picture cannot be written.
    """
    rng = np.random.default_rng(seed)
    with layout.open_layout(path) as h5:
        types = dict.fromkeys(t["camera"].decode() for t in layout.tel_table(h5))
        kinds = {key: layout.camera_pixels(h5, key)[2] for key in types}
        cells = {key: np.unique(layout.camera_pixels(h5, key)[1]["cell"]) for key in types}
    rows: list[tuple[str, Images, np.ndarray, np.ndarray]] = []
    for key, camera in kinds.items():
        data = Images(path, part, key.rpartition("_")[0])
        primaries = data.events["primary_id"][data.events_of_images()]
        for primary in np.unique(primaries):
            name = NAMES.get(int(primary), f"particle {primary}")
            chosen = rng.permutation(np.flatnonzero(primaries == primary))
            label = f"{name}, {camera['telescope_type']} {camera['name']}"
            rows.append((label, data, chosen, cells[key]))
    if not rows:
        raise DataError(f"{path}: has no images to draw. Check it with: image-extractor inspect")
    figure = Figure(figsize=(2.3 * columns, 2.5 * len(rows) + 3), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.5 * len(rows), 3])
    above, below = parts
    axes = above.subplots(len(rows), columns, squeeze=False)
    for line, (label, data, chosen, _) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label)
        for ax, number in zip(line, chosen.tolist(), strict=False):
            _draw(ax, data[number])
        for ax in line[len(chosen) :]:
            ax.axis("off")
    above.supxlabel("charge in p.e. at the brightest cell; cells of the stored image", fontsize=8)
    _distributions(below.subplots(1, 4).tolist(), rows)
    drawn = BytesIO()
    figure.savefig(drawn, format=Path(output).suffix[1:] or "png", dpi=80)
    write_whole(Path(output), drawn.getvalue())
    n = sum(min(columns, len(chosen)) for _, _, chosen, _ in rows)
    return f"{n} images of {len(rows)} classes and types drawn to {output}"


def noise_rms(charge: np.ndarray) -> float:
    """Estimate the rms of the noise of pixels (n_pixels,), less than 10 % of which have a signal.

    Charges are cut at 0, because they may be stored so, and at their quantile of 0.9. Those of a
    normal distribution then have a mean square of 0.339 times its variance.
    """
    cut = np.clip(charge, 0, np.quantile(charge, 0.9))
    return float(np.sqrt(np.mean(cut.astype(np.float64) ** 2) / 0.339))


def _draw(ax: Any, sample: dict[str, Any]) -> None:
    charge = sample["image"][0]
    norm = PowerNorm(0.5, 0, max(1.0, float(charge.max())))
    if charge.ndim == 1:
        ax.plot(charge, lw=0.5)
    else:  # as in plot: the first axis is x
        ax.imshow(charge.T, origin="lower", cmap="viridis", norm=norm, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    tev = 10 ** float(sample["log_energy"])
    ax.set_title(f"{tev:.2g} TeV, {sample['impact']:.0f} m, {charge.max():.0f} p.e.", fontsize=7)


def _distributions(axes: list[Any], rows: list[tuple[str, Images, np.ndarray, np.ndarray]]) -> None:
    for number, (label, data, chosen, cells) in enumerate(rows):
        style: dict[str, Any] = {
            "histtype": "step",
            "color": COLOURS[number % len(COLOURS)],
            "ls": ("-", "--", ":")[number // len(COLOURS) % 3],
            "density": True,
        }
        images = [data[i]["image"][0].reshape(-1)[cells] for i in chosen[:LOOKED_AT].tolist()]
        pixels = np.concatenate(images)
        size = [np.log10(max(1.0, float(i[i > BRIGHT_SIGMA * noise_rms(i)].sum()))) for i in images]
        event, per_event = np.unique(data.events_of_images()[chosen], return_counts=True)
        axes[0].hist(np.log10(np.maximum(pixels, 0.1)), np.linspace(-1, 4, 60), log=True, **style)
        axes[1].hist(size, np.linspace(0, 6, 40), label=label, **style)
        axes[2].hist(np.log10(data.events["mc_energy"][event]), 30, **style)
        axes[3].hist(per_event, np.arange(0.5, per_event.max() + 1), **style)
    names = ("log10(charge of a cell / p.e.)", "log10(charge of an image above the noise / p.e.)")
    for ax, name in zip(axes, (*names, "log10(energy / TeV)", "images per event"), strict=True):
        ax.set_xlabel(name, fontsize=8)
        ax.set_yticks([])
    axes[0].set_ylabel("share (logarithmic)")
    axes[1].legend(fontsize=6)
