"""Figures of a training run and of galaxies.

Reads   a run folder (run_SSFTT_training.py, eval_fns.py), cubes and labels of the data folder and,
        for the BPT diagram, raw MAPS.
Writes  <run_dir>/figures/*.png.
What is drawn on given axes: sky_maps.py, diagrams.py. torch is imported only to run a model.

    python vis_fns.py --run-dir runs/demo --plateifu 8485-1901
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import utils
from utils import DataError

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import data_io
import sky_maps
from diagrams import (
    LINE_GREY,
    MODEL_COLOUR,
    mark_lines,
    plot_bpt,
    plot_confusion,
    plot_explained_variance,
    plot_spectrum,
    plot_training_curves,
)
from hsi_proc_fns import Stats, check_label_shape
from labels import BPT_LINES, SF, TASK_TITLES, detected, label_classes, log_ratio

if TYPE_CHECKING:
    from inference import CubePrediction, TrainedModel
    from run_folder import ModelCard

log = logging.getLogger(__name__)

DPI = 150
CLOSE_DEX = 0.1
"""Distance from the truth within which a metallicity counts as right."""


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


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """Make a figure of some inches, and its rows * columns axes; rows share their x axis."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex="col", squeeze=False).ravel().tolist()


def galaxy_figure(
    trained: TrainedModel, root: Path, plateifu: str
) -> tuple[Figure, CubePrediction]:
    """Make a galaxy's maps: prediction and interval (or probability).

    Predicted metallicities of spaxels that BPT labels do not call star-forming are hatched.
    With labels, also these and their difference from the prediction; of a simulated galaxy, also
    the noiseless truth, the difference from that, and how many metallicities are near it.

    Raises
    ------
    DataError
        If the galaxy has no cube, or labels made with other options than the training labels.
    """
    import inference

    found = inference.predict_cube(trained, utils.cube_path(root, plateifu))
    task, labels = trained.spec.label_task, None
    label_file = utils.label_path(root, task, plateifu)
    if label_file.is_file():
        labels = inference.read_labels_for(trained, label_file, found.usable)
    bpt, bpt_file = None, utils.label_path(root, "BPT", plateifu)
    if bpt_file.is_file():
        bpt = data_io.read_labels(bpt_file)
        check_label_shape(bpt, found.usable, bpt_file)
    truth = true_labels(root, plateifu, task)
    n = 2 + 2 * (labels is not None) + 2 * (truth is not None)
    rows = 2 if n == 6 else 1
    figure, axes = _figure(4.9 * n / rows, 4.1 * rows, rows, n // rows)
    title, true_classes = plateifu, true_labels(root, plateifu, "BPT")
    if not (found.logoh is None or labels is None or truth is None or true_classes is None):
        counted = found.usable & (true_classes == SF)
        title += "\n" + reach(found.logoh[counted], labels[counted], truth[counted])
    figure.suptitle(title)
    for ax_above in axes:
        ax_above.tick_params(labelbottom=True)
    ax = iter(axes)
    if labels is not None:
        sky_maps.plot_answer(next(ax), found, labels, "label")
    seen = {"train": " (training galaxy)", "val": " (validation galaxy)"}.get(found.part, "")
    answer = found.classes if found.logoh is None else found.logoh
    predicted = sky_maps.plot_answer(next(ax), found, answer, f"prediction{seen}")
    sky_maps.mark_distrusted(predicted, found, bpt)
    if labels is not None:
        sky_maps.plot_difference(next(ax), found, labels)
    sky_maps.plot_doubt(next(ax), found, labels)
    if truth is not None:
        sky_maps.plot_answer(next(ax), found, truth, "truth (simulated, no noise)")
        sky_maps.plot_difference(next(ax), found, truth, "truth")
    return figure, found


def reach(predicted: np.ndarray, labels: np.ndarray, truth: np.ndarray) -> str:
    """Say in how many of n star-forming spaxels predictions and labels (n,) dex are near truth."""
    close = [int((np.abs(values - truth) < CLOSE_DEX).sum()) for values in (predicted, labels)]
    return (
        f"within {CLOSE_DEX} dex of the truth: prediction in {close[0]}, label in {close[1]} of "
        f"{utils.counted(truth.size, 'star-forming spaxel')}"
    )


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


def bpt_figure(root: Path, prediction: CubePrediction, label_task: str) -> Figure:
    """Make a galaxy's BPT diagrams, coloured by label and by prediction.

    They show the usable spaxels whose four lines exceed the signal-to-noise cut of the labels, with
    the fluxes of the MAPS file that the labels were derived from.

    Raises
    ------
    DataError
        If the MAPS file is neither in the data folder nor where it was when the labels were made.
    """
    import archive_files
    import fits_utils

    plateifu, n_classes = prediction.plateifu, prediction.probabilities.shape[2]
    label_file = utils.label_path(root, label_task, plateifu)
    meta = data_io.read_label_meta(label_file)
    if name := meta.get("source_file"):
        maps_file = utils.raw_dir(root, plateifu) / name
        if not maps_file.is_file():
            maps_file = Path(meta.get("source_path", maps_file))
        if not maps_file.is_file():
            raise DataError(
                f"{maps_file}: no such file, expected the MAPS file that the labels of {plateifu} "
                f"were made from. Copy or link it to {utils.raw_dir(root, plateifu)}."
            )
    else:
        maps_file = utils.find_raw(root, plateifu, "MAPS")
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
        with utils.reading(metrics, "a table with a row per epoch", "Copy it again, or retrain."):
            figures["training_curves"], axes = _figure(11, 3.4, columns=2)
            plot_training_curves(axes, pd.read_csv(metrics), card)
    else:
        command = f"python run_SSFTT_training.py --config {run_dir / run_folder.CONFIG_FILE}"
        log.warning("no training curves: no %s; retrain with %s --run-dir NEW", metrics, command)
    evaluation = run_dir / part / run_folder.RESULT_FILE
    if evaluation.is_file():
        figures[f"confusion_{part}"] = confusion_figure(run_dir, card, part)
    else:
        command = f"python eval_fns.py --run-dir {run_dir} --part {part}"
        log.warning("no confusion matrix: no %s; create it with %s", evaluation, command)
    stats = run_dir / run_folder.STATS_FILE
    if stats.is_file():
        figures["explained_variance"] = variance_figure(data_io.read_stats(stats))
    return figures


def confusion_figure(run_dir: Path, card: ModelCard, part: str) -> Figure:
    """Draw the confusion matrix of an evaluation by eval_fns.py."""
    import run_folder

    folder, (figure, (ax,)) = run_dir / part, _figure(6, 5.6)
    remedy = f"Evaluate again: python eval_fns.py --run-dir {run_dir} --part {part}"
    with utils.reading(folder, "scores and a confusion matrix", remedy):
        result = json.loads((folder / run_folder.RESULT_FILE).read_text())
        epochs = (result["best_epoch"], card.best["epoch"])
        if epochs[0] != epochs[1]:
            log.warning("%s: epoch %d, the model: epoch %d; evaluate again", folder, *epochs)
        table = pd.read_csv(folder / run_folder.CONFUSION_FILE, index_col="true")
        spaxels = utils.counted(result["spaxels"], "spaxel")
        galaxies = utils.counted(result["galaxies"], "galaxy", "galaxies")
        title = (
            f"{TASK_TITLES[result['label_task']]}, {part} part of the {result['split_kind']} split"
            f"\naccuracy {result['accuracy']:.3f}: {spaxels}, {galaxies}"
        )
        plot_confusion(ax, table.to_numpy(), list(table.columns), title)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Save a figure, whole or not at all."""
    with utils.atomic_path(path) as part, mpl.rc_context({"hatch.linewidth": 0.5}):
        figure.savefig(part, dpi=DPI, bbox_inches="tight")  # legends can push labels off the page
    log.info("%s", path)


def main(config: VisConfig) -> int:
    """Draw the figures of a run and of the requested galaxies."""
    import inference
    import run_folder

    trained = inference.load_model(config.run_dir, config.device)
    root = run_folder.run_data_dir(config.run_dir, config.data_dir)
    out = config.run_dir / run_folder.FIGURES_FOLDER
    for name, figure in run_figures(config.run_dir, trained.card, config.part).items():
        save(figure, out / f"{name}.{config.format}")
    code = utils.EXIT_DONE
    for plateifu in config.plateifu:
        try:
            figure, found = galaxy_figure(trained, root, plateifu)
            save(figure, out / f"{plateifu}_maps.{config.format}")
            save(spectrum_figure(root, plateifu), out / f"{plateifu}_spectrum.{config.format}")
        except DataError as error:
            log.error("%s", error)
            code = utils.EXIT_DATA
            continue
        try:
            figure = bpt_figure(root, found, trained.spec.label_task)
            save(figure, out / f"{plateifu}_bpt.{config.format}")
        except DataError as error:  # only MAPS can be missing; the other figures are drawn
            log.warning("no BPT diagram: %s", error)
    return code


if __name__ == "__main__":
    utils.run_command(main, VisConfig, __doc__)
