"""Evaluate a trained model on a part of its split, beside a baseline.

    >>> evaluation = evaluate_split("runs/demo", "test")        # scores on galaxies it never saw

Reads   a run folder of run_SSFTT_training.py (run_folder.py), and processed/cubes and
        processed/labels of the data folder.
Writes  <run_dir>/<part>/: metrics.json, confusion.csv, per_class.csv, per_galaxy.csv,
        predictions.csv.gz. (Maps of whole galaxies: map_galaxies.py.)

    python eval_fns.py --run-dir runs/demo --part test
"""

from __future__ import annotations

import functools
import gzip
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import utils
from utils import DataError

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import baselines
import data_io
import loops
import metrics
import run_folder
from batches import PatchFileDataset, collate
from inference import (
    TrainedModel,
    count_readers,
    load_model,
    map_answer,
    patch_outputs,
    read_cube_for,
    read_labels_for,
)
from intervals import LEVELS
from labels import LABEL_NONE, label_classes
from networks import Answer
from samples import get_samples

log = logging.getLogger(__name__)

PATCHES_AT_ONCE = 256
"""Patches of patch files that are classified together."""
FEW_GALAXIES = 10
"""With fewer galaxies, the bootstrap underestimates how much they differ."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a trained model on a part of its split."""

    run_dir: Path
    """Folder of a training run."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the run's split to evaluate."""
    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else the run's, else ./data/manga."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Random seed of the bootstrap over galaxies."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(repr=False)
class Evaluation:
    """How well a model does on a part of its split."""

    scores: dict[str, Any]
    """Content of metrics.json: see `metrics.score_predictions`; also part, split, split_kind,
    label_task, best_epoch."""
    class_names: list[str]
    confusion: np.ndarray
    """(true class, predicted class) int."""
    per_class: pd.DataFrame
    per_galaxy: pd.DataFrame
    predictions: pd.DataFrame
    """One row per spaxel: see `predictions_table`."""

    def write(self, folder: Path) -> None:
        """Write the results into a folder."""
        names = pd.Index(self.class_names, name="true")
        table = pd.DataFrame(self.confusion, index=names, columns=self.class_names)
        for content, name in (
            (table.reset_index(), run_folder.CONFUSION_FILE),
            (self.per_class, run_folder.PER_CLASS_FILE),
            (self.per_galaxy, run_folder.PER_GALAXY_FILE),
            (self.predictions, run_folder.PREDICTIONS_FILE),
        ):
            text = content.to_csv(index=False).encode()
            with utils.atomic_path(folder / name) as temporary:  # equal tables give equal bytes
                temporary.write_bytes(gzip.compress(text, mtime=0) if name.endswith("gz") else text)
        utils.write_json(folder / run_folder.RESULT_FILE, self.scores)

    def __repr__(self) -> str:
        """Describe the scores in a few lines."""
        result, intervals = self.scores, self.scores["intervals"]
        lines = [
            f"{result['label_task']}, {result['part']} part of the split {result['split']} "
            f"({result['split_kind']}): {result['galaxies']} galaxies, {result['spaxels']} spaxels"
        ]
        if "bins" in result:
            lines.append(f"  in {result['bins']} bins; each counts once, however many its spaxels")
        if result["split_kind"] == "easy":
            lines.append("  an easy split: neighbours of the test spaxels were trained on")
        names = {
            "accuracy": "accuracy",
            "majority_accuracy": "  majority class",
            "baseline_accuracy": f"  {result.get('baseline')}",
            "macro_f1": "macro F1",
            "kappa": "kappa",
            "mae_dex": "MAE (dex)",
            "constant_mae_dex": "  constant",
            "baseline_mae_dex": f"  {result.get('baseline')}",
            "rmse_dex": "RMSE (dex)",
            "constant_rmse_dex": "  constant",
        }
        for key, name in names.items():
            if result.get(key) is not None:
                low_high = intervals.get(key)
                n = 4 if key.endswith("dex") else 3
                spread = f"  [{low_high[0]:.{n}f}, {low_high[1]:.{n}f}]" if low_high else ""
                lines.append(f"  {name:<18}{result[key]:.{n}f}{spread}")
        for level, covered in (result.get("coverage") or {}).items():
            how = {"val": " (which calibrated them)", "train": " (trained on)"}
            lines.append(
                f"  {float(level):.0%} intervals contain {covered:.1%} of the labels"
                f"{how.get(result['part'], '')}"
            )
        if intervals:
            n = result["galaxies"]
            few = "; with so few they are too narrow" if n < FEW_GALAXIES else ""
            lines.append(f"  [95 % intervals from a bootstrap over {n} galaxies{few}]")
        return "\n".join(lines)


def evaluate_split(
    run_dir: Path | str,
    part: str = "test",
    data_dir: Path | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Evaluation:
    """Evaluate a run on a part of its own split and write the results to <run_dir>/<part>/.

    The split is the copy in the run folder: rebuilding the data folder's splits afterwards cannot
    move training galaxies into the test part. Galaxies are mapped from their cubes; a run that
    learned from patch files is evaluated on these if there are no cubes at all.

    Parameters
    ----------
    run_dir : Path
    part : {"train", "val", "test"}
    data_dir : Path, optional
        Default: the run's, else as everywhere.
    device : {"auto", "cpu", "cuda"}
    seed : int
        Random seed of the bootstrap over galaxies.
    """
    run_dir = Path(run_dir)
    if part not in utils.SPLIT_PARTS:
        raise DataError(f"part {part!r}: expected one of {', '.join(utils.SPLIT_PARTS)}.")
    model = load_model(run_dir, device)
    card = model.card
    root = run_folder.run_data_dir(run_dir, data_dir)
    parts, split = data_io.read_split(run_dir / run_folder.SPLIT_FOLDER)
    table = parts[part]
    cubes = [utils.cube_path(root, p) for p in table["plateifu"].unique()]
    if card.recipe.options["source"] == "patches" and not any(path.is_file() for path in cubes):
        log.info("evaluating the patch files: there are no cubes")
        galaxies = predict_patch_files(model, root, table)
    else:
        galaxies = predict_cubes(model, root, table)
    weights = None
    if (path := run_dir / run_folder.BASELINE_FILE).is_file():
        weights, _ = run_folder.read_tensors(path)
    frame = predictions_table(model, galaxies, weights)
    if frame.empty:
        raise DataError(
            f"{run_dir}: no labelled spaxel in the {part} part of the split. Choose another --part."
        )
    mangaids = dict(zip(table["plateifu"], table["mangaid"], strict=True))
    frame.insert(1, "mangaid", frame["plateifu"].map(mangaids))
    add_bin_weights(frame, root, model.spec.label_task)
    overall, confusion, per_class, per_galaxy = metrics.score_predictions(
        frame, card.class_names, card.class_counts, card.label_median, seed
    )
    scores = {
        "part": part,
        "split": card.split_dir,
        "split_kind": split.options["kind"],
        "label_task": model.spec.label_task,
        "best_epoch": card.best["epoch"],
        "baseline": baselines.name_of(model.spec),
        **{k: None if v != v else v for k, v in overall.items()},  # JSON has no NaN
        "created_utc": utils.utc_now(),
    }
    evaluation = Evaluation(scores, card.class_names, confusion, per_class, per_galaxy, frame)
    evaluation.write(run_dir / part)
    return evaluation


def add_bin_weights(frame: pd.DataFrame, root: Path, label_task: str) -> None:
    """Add the column weight to a table of spaxels (plateifu, y, x) if labels share a bin.

    Galaxies without a label map in the data folder (only patch files) count as not binned.
    """
    bins = np.arange(len(frame))
    for plateifu, rows in frame.groupby("plateifu").indices.items():
        path = utils.label_path(root, label_task, str(plateifu))
        if path.is_file():
            y, x = frame.iloc[rows][["y", "x"]].to_numpy().T
            bins[rows] = data_io.read_label_bins(path)[y, x]
    weight = metrics.bin_weights(frame.assign(bin=bins))
    if (weight < 1).any():
        frame["weight"] = weight


class Predicted(NamedTuple):
    """The labelled spaxels of one galaxy and what a model says of them."""

    table: pd.DataFrame
    """One row per spaxel: plateifu, y, x, value (label: dex or class), true (class)."""
    answer: Answer
    """Of (n,) spaxels."""
    spectra: np.ndarray
    """(n, band) float32, normalised."""


def predictions_table(
    model: TrainedModel, galaxies: Iterator[Predicted], baseline: dict[str, Tensor] | None
) -> pd.DataFrame:
    """Gather the predictions for the labelled spaxels of galaxies.

    Returns
    -------
    DataFrame, one row per spaxel
        plateifu, y, x, value, true as in `Predicted`; predicted, probability (of the predicted
        class); for metallicities logoh and the ends of its intervals, lower_0.9 and so on, dex;
        with a baseline, baseline (its class) and, if it gives one, baseline_logoh.
    """
    frames, wave = [pd.DataFrame()], None
    if model.spec.patch_norm == "residual":
        wave = baselines.wave_of(model.card.recipe.options["cube"])
    for frame, answer, spectra in galaxies:
        frame["predicted"] = answer.classes
        frame["probability"] = answer.probabilities[np.arange(len(frame)), answer.classes]
        if answer.value is not None and answer.scale is not None:
            frame["logoh"] = answer.value
            for level in LEVELS:
                ends = model.card.calibration.interval(answer.value, answer.scale, level)
                frame[f"lower_{level}"], frame[f"upper_{level}"] = ends
        if baseline is not None:
            guess = baselines.apply(baseline, spectra, model.spec, wave)
            frame["baseline"] = guess.classes
            if guess.logoh is not None:
                frame["baseline_logoh"] = guess.logoh
        frames.append(frame)
    return pd.concat(frames[1:] or frames, ignore_index=True)


def predict_cubes(model: TrainedModel, root: Path, table: pd.DataFrame) -> Iterator[Predicted]:
    """Predict the labelled spaxels of one part of a split; `table` as in `get_samples`.

    Raises
    ------
    DataError
        If a cube or label map is missing, unreadable, or made otherwise than the training's.
    """
    spec = model.spec
    groups = table.groupby("plateifu", sort=False)
    paths = [utils.cube_path(root, plateifu) for plateifu in table["plateifu"].unique()]
    cubes = loops.in_threads(functools.partial(read_cube_for, model), paths, count_readers())
    bar = tqdm(groups, desc="galaxies", unit="galaxy", disable=None)
    for (plateifu, rows), cube in zip(bar, cubes, strict=True):
        path = utils.label_path(root, spec.label_task, plateifu)
        labels = read_labels_for(model, path, cube.usable)
        answer = map_answer(model, cube.values)
        classes = label_classes(labels, spec.label_task, spec.n_classes)
        wanted = (classes != LABEL_NONE) & cube.usable
        if {"y", "x"} <= set(rows.columns):
            chosen = np.zeros_like(wanted)
            chosen[rows["y"], rows["x"]] = True
            wanted &= chosen
        y, x = np.nonzero(wanted)
        spaxels = {"plateifu": plateifu, "y": y, "x": x, "value": labels[y, x]}
        found = pd.DataFrame({**spaxels, "true": classes[y, x]})
        yield Predicted(found, answer.apply(itemgetter((y, x))), cube.values[y, x])


def predict_patch_files(
    model: TrainedModel, root: Path, table: pd.DataFrame
) -> Iterator[Predicted]:
    """Like `predict_cubes`, but from patch files."""
    samples = get_samples(table, model.spec, root, None, model.stats)
    dataset = PatchFileDataset(samples, model.spec, root)
    loader: DataLoader = DataLoader(dataset, PATCHES_AT_ONCE, collate_fn=collate)
    answer = model.answer(patch_outputs(model.network, loader, model.device)[0])
    for galaxy, rows in samples.by_galaxy():
        spaxels = {"plateifu": samples.plateifus[galaxy], "y": samples.y[rows]}
        spaxels |= {"x": samples.x[rows], "value": samples.values[rows]}
        found = pd.DataFrame({**spaxels, "true": samples.classes[rows]})
        yield Predicted(found, answer.apply(itemgetter(rows)), dataset.centres(rows))


def main(config: EvalConfig) -> int:
    """Evaluate a part of the run's split."""
    run_dir, part = config.run_dir, config.part
    evaluation = evaluate_split(run_dir, part, config.data_dir, config.device, config.seed)
    print(evaluation)
    log.info("results in %s", run_dir / part)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, EvalConfig, __doc__)
