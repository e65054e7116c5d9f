"""Use a trained model: load it, predict, map a cube, evaluate a split.

Reads   a run folder of run_SSFTT_training.py (model.json, best.safetensors, stats.h5, split/), and
        processed/cubes and processed/labels of the data folder.
Writes  <run_dir>/<part>/: metrics.json, confusion.csv, per_class.csv, per_galaxy.csv,
        predictions.csv.gz. (Maps of whole galaxies: map_galaxies.py.)

    python eval_fns.py --run-dir runs/demo --part test
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data_fns
import data_io
import hsi_proc_fns
import loops
import SSFTT_dense
import utils
from data_fns import PatchSpec
from HSI_SSFTT import SSFTT, get_SSFTT_model
from utils import LABEL_NONE, DataError

log = logging.getLogger(__name__)

MODEL_SCHEMA, MODEL_VERSION = "ssftt-model", 1
MODEL_FILE, WEIGHTS_FILE, STATS_FILE = "model.json", "best.safetensors", "stats.h5"
BASELINE_FILE, CONFIG_FILE, METRICS_FILE = "baseline.safetensors", "config.json", "metrics.csv"
SPLIT_FOLDER, MAPS_FOLDER, FIGURES_FOLDER = "split", "maps", "figures"
RESULT_FILE, CONFUSION_FILE = "metrics.json", "confusion.csv"
PER_CLASS_FILE, PER_GALAXY_FILE = "per_class.csv", "per_galaxy.csv"
PREDICTIONS_FILE = "predictions.csv.gz"

Amp = Literal["off", "bf16", "fp16"]
AMP_TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READERS = 8
"""Threads that read cubes at most."""
N_BOOTSTRAP = 2000
FEW_GALAXIES = 10
"""Fewer drawn again and again do not show how different galaxies are."""
INTERVAL = (0.025, 0.975)
"""Quantiles of the bootstrap intervals."""


@dataclass(frozen=True)
class EvalConfig:
    """Options of eval_fns.py."""

    run_dir: Path
    """Folder of a training run."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the run's split to evaluate."""
    data_dir: Path | None = None
    """Data folder; default the run's, else MANGA_DATA_DIR, else ./data/manga."""
    patch_wise: bool = False
    """Predict patch by patch instead of whole maps at once: the same numbers, slowly."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Of the bootstrap over galaxies."""
    debug: bool = False
    """Show the traceback of an error."""


# Metrics


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Count pairs of classes, (true class, predicted class) int."""
    pairs = np.asarray(truth, np.int64) * n_classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def class_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1, intersection over union and support of each class.

    Parameters
    ----------
    confusion : (..., true class, predicted class) array

    Returns
    -------
    dict of (..., class) arrays; 0 where a ratio has no denominator.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    true, predicted = confusion.sum(-1).astype(float), confusion.sum(-2).astype(float)

    def ratio(over: np.ndarray) -> np.ndarray:
        return np.divide(hits, over, out=np.zeros_like(hits), where=over > 0)

    return {
        "precision": ratio(predicted),
        "recall": ratio(true),
        "f1": ratio((true + predicted) / 2),
        "iou": ratio(true + predicted - hits),
        "support": true,
    }


def overall_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, macro F1 and Cohen's kappa.

    Parameters
    ----------
    confusion : (..., true class, predicted class) array, not empty

    Returns
    -------
    dict of (...) arrays
        The macro F1 is the mean over the classes that occur in truth or prediction. Kappa
        (Cohen 1960, eq. 1) is NaN where chance alone agrees everywhere: with one class.
    """
    total = confusion.sum((-2, -1)).astype(float)
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    accuracy = np.diagonal(confusion, axis1=-2, axis2=-1).sum(-1) / total
    occurs = (true + predicted) > 0
    f1 = class_metrics(confusion)["f1"].sum(-1) / occurs.sum(-1)
    chance = (true * predicted).sum(-1) / total**2
    undefined = np.full_like(accuracy, np.nan)
    kappa = np.divide(accuracy - chance, 1 - chance, out=undefined, where=chance < 1)
    return {"accuracy": accuracy, "macro_f1": f1, "kappa": kappa}


# Models


@dataclass
class TrainedModel:
    """A model and all that its use needs.

    Attributes
    ----------
    network : SSFTT
        In evaluation mode, on `device`.
    spec : PatchSpec
        How its patches are made.
    stats : Stats or None
        For the norm PCA.
    about : dict
        model.json: class names, wavelength grid, training labels, best epoch, ...
    device : torch.device
    parts : dict
        Part of the run's split by mangaid; of a galaxy in several (easy splits) training.
    """

    network: SSFTT
    spec: PatchSpec
    stats: data_io.Stats | None
    about: dict[str, Any]
    device: torch.device
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def class_values(self) -> np.ndarray | None:
        """12+log(O/H) that stands for each class, (class,) dex: the mean of its training spaxels.

        None for BPT.
        """
        if self.spec.label_task != "logOH":
            return None
        known = self.about["training_labels"].get("class_values")
        return utils.class_values(self.spec.n_classes) if known is None else np.array(known)


def pick_device(name: str) -> torch.device:
    """Device of a name; "auto" is the GPU if there is one. Settings for both are made.

    On a GPU float32 convolutions keep all their bits (no TF32): --amp bf16 is there for speed.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch finds no GPU here; use --device cpu.")
    if name == "cpu":
        utils.keep_freed_memory()
    else:
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def load_model(run_dir: Path, device: str = "auto") -> TrainedModel:
    """Load the best model of a training run; its folder is all that is needed.

    Raises
    ------
    DataError
        If the folder holds no trained model, a damaged one, or one of another version.
    """
    run_dir = Path(run_dir)
    path = run_dir / MODEL_FILE
    if not path.is_file() or not (run_dir / WEIGHTS_FILE).is_file():
        raise DataError(
            f"{run_dir}: no {MODEL_FILE} and {WEIGHTS_FILE}: not the folder of a training run that "
            "has finished an epoch (python run_SSFTT_training.py --run-dir ...)."
        )
    try:
        about = json.loads(path.read_text())
        with safe_open(run_dir / WEIGHTS_FILE, "pt") as f:
            weights = {name: f.get_tensor(name) for name in f.keys()}
            if f.metadata():  # a stop may have come between the two files
                about["best"] = json.loads(f.metadata()["best"])
    except (ValueError, SafetensorError) as error:
        raise DataError(
            f"{run_dir}: {MODEL_FILE} or {WEIGHTS_FILE} is damaged ({error}). Train the model anew."
        ) from None
    found = (about.get("schema"), about.get("schema_version"))
    if found != (MODEL_SCHEMA, MODEL_VERSION):
        raise DataError(
            f"{path}: schema {found[0]} version {found[1]}, this code needs {MODEL_SCHEMA} version "
            f"{MODEL_VERSION}. Train the model anew."
        )
    chosen = pick_device(device)
    network = get_SSFTT_model(**about["model"])
    network.load_state_dict(weights)
    patch = about["patch"]
    spec = PatchSpec(**{**patch, "bands": patch["bands"] and tuple(patch["bands"])})
    needed = [STATS_FILE] if spec.patch_norm == "PCA" else []
    has_split = (run_dir / SPLIT_FOLDER).is_dir()  # a model that was given away may have none
    needed += [f"{SPLIT_FOLDER}/{part}.csv" for part in utils.SPLIT_PARTS if has_split]
    lost = [name for name in needed if not (run_dir / name).is_file()]
    if lost:
        raise DataError(f"{run_dir}: {lost[0]} is gone. Copy the run anew, or train anew.")
    stats = data_io.read_stats(run_dir / STATS_FILE) if spec.patch_norm == "PCA" else None
    split = data_io.read_split(run_dir / SPLIT_FOLDER)[0] if has_split else {}
    parts = {m: part for part in reversed(split) for m in split[part]["mangaid"]}
    return TrainedModel(network.to(chosen).eval(), spec, stats, about, chosen, parts)


@torch.inference_mode()
def predict_logits(
    network: nn.Module, loader: DataLoader | Iterable, device: torch.device, amp: Amp = "off"
) -> tuple[np.ndarray, np.ndarray]:
    """Predict all patches of a loader.

    Returns
    -------
    logits : (N, classes) float32
    rows : (N,) int64
        Rows of the dataset's samples.
    """
    network.eval()
    logits, rows = [], []
    for batch in loader:
        patches = batch.patches.to(device, non_blocking=True)
        with torch.autocast(device.type, AMP_TYPES[amp], enabled=amp != "off"):
            logits.append(network(patches).float().cpu())
        rows.append(batch.rows)
    return torch.cat(logits).numpy(), torch.cat(rows).cpu().numpy()


def predict(trained: TrainedModel, patches: np.ndarray | torch.Tensor) -> np.ndarray:
    """Class probabilities of patches.

    Parameters
    ----------
    trained : TrainedModel
    patches : (N, 1, band, P, P) float32
        Normalised as the model's were; the spaxel in question is [P//2, P//2].

    Returns
    -------
    (N, classes) float32, rows sum to 1.
    """
    with torch.inference_mode():
        logits = trained.network(torch.as_tensor(patches).to(trained.device))
    return logits.float().softmax(1).cpu().numpy()


def baseline_logits(weights: dict[str, torch.Tensor], spectra: np.ndarray) -> np.ndarray:
    """Apply the linear spectrum-only baseline that training fitted; (n, band) -> (n, classes)."""
    return spectra @ weights["weight"].numpy().T + weights["bias"].numpy()


# Maps


@dataclass
class MapPrediction:
    """What a model says about every spaxel of a cube.

    Attributes
    ----------
    plateifu : str
    classes : (y, x) int16
        LABEL_NONE where the spaxel is not usable.
    probabilities : (y, x, class) float32
        NaN where the spaxel is not usable.
    inside : (y, x) bool
        Spaxels with anything measured.
    attrs : dict
        Of the cube: redshift, wcs_header, ...
    class_values : (class,) array or None
        As of `TrainedModel`.
    part : str
        Part of the run's split that the galaxy is in; empty if in none.
    """

    plateifu: str
    classes: np.ndarray
    probabilities: np.ndarray
    inside: np.ndarray
    attrs: dict[str, Any]
    class_values: np.ndarray | None = None
    part: str = ""

    @property
    def usable(self) -> np.ndarray:
        """Spaxels with a prediction, (y, x) bool."""
        return self.classes != LABEL_NONE


def predict_map(trained: TrainedModel, values: np.ndarray, patch_wise: bool = False) -> np.ndarray:
    """Class probabilities of every spaxel of a normalised cube.

    Parameters
    ----------
    trained : TrainedModel
    values : (y, x, band) float32
    patch_wise : bool
        Run the network on every spaxel's patch instead of once over the map. Same numbers.

    Returns
    -------
    (y, x, class) float32
    """
    ny, nx = values.shape[:2]
    with torch.inference_mode():
        if not patch_wise:
            cutout = torch.from_numpy(values).permute(2, 0, 1)[None, None].to(trained.device)
            logits = SSFTT_dense.dense_logits(trained.network, cutout)[0].permute(1, 2, 0)
            return logits.float().softmax(2).cpu().numpy()
    size = trained.spec.patch_size
    out = np.empty((ny, nx, len(trained.about["class_names"])), np.float32)
    columns = np.arange(nx)
    padded = hsi_proc_fns.pad_for_patches(values, size)
    for y in range(ny):
        strip = padded[y : y + size]  # the rows that this row's patches cover
        windows = np.lib.stride_tricks.sliding_window_view(strip, size, axis=1)
        patches = windows[:, columns].transpose(1, 2, 0, 3)[:, None]  # (x, 1, band, P, P)
        out[y] = predict(trained, np.ascontiguousarray(patches))
    return out


def evaluate_cube(
    model: TrainedModel | Path, path: Path, patch_wise: bool = False
) -> MapPrediction:
    """Run a trained model on a whole cube; no label is needed.

    Parameters
    ----------
    model : TrainedModel or Path
        A model, or the folder of its run.
    path : Path
        H5 cube.
    patch_wise : bool
        Patch by patch instead of the whole map at once. Same numbers.

    Raises
    ------
    DataError
        If the cube is unreadable, or of another kind (grid, options) than the training's.
    """
    trained = model if isinstance(model, TrainedModel) else load_model(model)
    return map_cube(trained, load_for(trained, path), utils.plateifu_of(path), patch_wise)


def load_for(trained: TrainedModel, path: Path) -> data_fns.NormedCube:
    """Read and normalise a cube as a model's training cubes were.

    Raises
    ------
    DataError
        If the cube is unreadable, or of another kind (grid, options) than the training's.
    """
    cube = data_fns.load_normed(path, trained.spec, trained.stats)
    if trained.about["cubes"]:
        want = data_io.CubeKind(**trained.about["cubes"])
        data_io.CubeKind.of(cube.wave, cube.attrs).check(path, want, "the model's training cubes")
    return cube


def count_readers() -> int:
    """Choose how many threads read cubes ahead of the network: HDF5 lets one read at a time."""
    return min(utils.cpu_count(), READERS)


def read_labels_for(trained: TrainedModel, path: Path, usable: np.ndarray) -> np.ndarray:
    """Read a label map that a model may be compared with, (y, x).

    Parameters
    ----------
    trained : TrainedModel
    path : Path
    usable : (y, x) bool
        Usable spaxels of the galaxy's cube.

    Raises
    ------
    DataError
        If it is unreadable, made with other options than the training's, or of another shape.
    """
    made = data_io.read_label_meta(path).get("options")
    want = trained.about["training_labels"].get("options")
    data_fns.check_label_options(utils.plateifu_of(path), made, want, "the training's")
    labels = data_io.read_labels(path)
    data_fns.check_label_shape(labels, usable, path)
    return labels


def map_cube(
    trained: TrainedModel, cube: data_fns.NormedCube, plateifu: str, patch_wise: bool = False
) -> MapPrediction:
    """Run a trained model on a cube of `load_for`; see `evaluate_cube`."""
    probabilities = predict_map(trained, cube.values, patch_wise)
    classes = probabilities.argmax(2).astype(np.int16)
    classes[~cube.usable] = LABEL_NONE
    probabilities[~cube.usable] = np.nan
    part = trained.parts.get(str(cube.attrs.get("mangaid") or plateifu), "")
    values = trained.class_values
    return MapPrediction(plateifu, classes, probabilities, cube.inside, cube.attrs, values, part)


# Splits


def predict_split(
    trained: TrainedModel,
    run_dir: Path,
    root: Path,
    table: pd.DataFrame,
    patch_wise: bool = False,
) -> pd.DataFrame:
    """Predict the labelled spaxels of one part of a split.

    Parameters
    ----------
    trained : TrainedModel
    run_dir : Path
        Folder of its run; its spectrum-only baseline is applied beside it if there is one.
    root : Path
        Data folder.
    table : DataFrame
        The part: plateifu, mangaid, and y and x where the split is by spaxel.
    patch_wise : bool
        As in `evaluate_cube`.

    Raises
    ------
    DataError
        If a cube or label map is missing, unreadable, or made otherwise than the training's.

    Returns
    -------
    DataFrame, one row a spaxel
        plateifu, mangaid, y, x, value (label: dex or class), true, predicted, probability (of the
        predicted class) and, with a baseline, spectrum_only (its class).
    """
    baseline = None
    if (run_dir / BASELINE_FILE).is_file():
        baseline = load_file(run_dir / BASELINE_FILE)
    spec, frames = trained.spec, []
    groups = table.groupby("plateifu", sort=False)
    paths = [utils.cube_path(root, plateifu) for plateifu in table["plateifu"].unique()]
    cubes = loops.in_threads(functools.partial(load_for, trained), paths, count_readers())
    bar = tqdm(groups, desc="galaxies", unit="galaxy", disable=None)
    for (plateifu, rows), cube in zip(bar, cubes, strict=True):
        label_path = utils.label_path(root, spec.label_task, plateifu)
        labels = read_labels_for(trained, label_path, cube.usable)
        result = map_cube(trained, cube, plateifu, patch_wise)
        classes = utils.label_classes(labels, spec.label_task, spec.n_classes)
        wanted = (classes != LABEL_NONE) & cube.usable
        if {"y", "x"} <= set(rows.columns):
            chosen = np.zeros_like(wanted)
            chosen[rows["y"], rows["x"]] = True
            wanted &= chosen
        y, x = np.nonzero(wanted)
        frame = pd.DataFrame(
            {
                "plateifu": plateifu,
                "mangaid": rows["mangaid"].iloc[0],
                "y": y,
                "x": x,
                "value": labels[y, x],
                "true": classes[y, x],
                "predicted": result.classes[y, x],
                "probability": result.probabilities[y, x].max(1),
            }
        )
        if baseline is not None:
            frame["spectrum_only"] = baseline_logits(baseline, cube.values[y, x]).argmax(1)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def predict_patch_files(
    trained: TrainedModel, run_dir: Path, root: Path, table: pd.DataFrame
) -> pd.DataFrame:
    """Do as `predict_split`, from patch files where there are no cubes."""
    dataset = data_fns.get_dataset(root, table, trained.spec, "patches", trained.stats)
    samples = dataset.samples
    batches = data_fns.Batches(samples.classes, 256, shuffle=False)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=data_fns.collate)
    logits, rows = predict_logits(trained.network, loader, trained.device)
    plateifus = np.array(samples.plateifus)[samples.galaxy[rows]]
    mangaids = table.drop_duplicates("plateifu").set_index("plateifu")["mangaid"]
    frame = pd.DataFrame(
        {
            "plateifu": plateifus,
            "mangaid": mangaids.loc[plateifus].to_numpy(),
            "y": samples.y[rows],
            "x": samples.x[rows],
            "value": samples.values[rows],
            "true": samples.classes[rows],
            "predicted": logits.argmax(1),
            "probability": torch.from_numpy(logits).softmax(1).numpy().max(1),
        }
    )
    if (run_dir / BASELINE_FILE).is_file():
        baseline = load_file(run_dir / BASELINE_FILE)
        frame["spectrum_only"] = baseline_logits(baseline, dataset.centres(rows)).argmax(1)
    return frame


def score_predictions(
    frame: pd.DataFrame, trained: TrainedModel, seed: int = 0
) -> tuple[dict[str, Any], np.ndarray, pd.DataFrame, pd.DataFrame]:
    """Score predictions: all spaxels together, each class, each galaxy.

    Parameters
    ----------
    frame : DataFrame
        From `predict_split`.
    trained : TrainedModel
    seed : int
        Of the bootstrap.

    Returns
    -------
    overall : dict
        accuracy, macro_f1, kappa; majority_accuracy (of the training's majority class) and
        spectrum_accuracy; for metallicities mae_dex and rmse_dex of the predicted class's value
        against the label, and constant_mae_dex and constant_rmse_dex of the training median;
        `intervals`: 95 % of the bootstrap over galaxies, since the spaxels of one galaxy are not
        independent (a galaxy is a mangaid).
    confusion : (true class, predicted class) int
    per_class, per_galaxy : DataFrame
    """
    names = trained.about["class_names"]
    n, labels = len(names), trained.about["training_labels"]
    majority = int(np.argmax(labels["class_counts"]))
    frame = frame.assign(majority=frame["true"] == majority)
    values = trained.class_values
    is_dex = values is not None
    if values is not None:
        frame["error"] = values[frame["predicted"]] - frame["value"]
        frame["constant_error"] = labels["median"] - frame["value"]

    galaxies = {k: g for k, g in frame.groupby("plateifu", sort=False)}
    rows = []
    for plateifu, g in galaxies.items():
        confusion = confusion_matrix(g["true"], g["predicted"], n)
        row = {"plateifu": plateifu, "mangaid": g["mangaid"].iloc[0], "spaxels": len(g)}
        row |= {k: float(v) for k, v in overall_metrics(confusion).items()}
        row["majority_accuracy"] = g["majority"].mean()
        if is_dex:
            row |= _dex_errors(g)
        rows.append(row)

    confusion = confusion_matrix(frame["true"], frame["predicted"], n)
    overall: dict[str, Any] = {
        "galaxies": frame["mangaid"].nunique(),
        "spaxels": len(frame),
        **{k: float(v) for k, v in overall_metrics(confusion).items()},
        "majority_accuracy": float(frame["majority"].mean()),
    }
    if "spectrum_only" in frame:
        overall["spectrum_accuracy"] = float((frame["true"] == frame["spectrum_only"]).mean())
    if is_dex:
        overall |= _dex_errors(frame)
    overall["intervals"] = bootstrap_intervals(frame, n, seed)
    per_class = pd.DataFrame(class_metrics(confusion)).astype({"support": int})
    occurs = (confusion.sum(0) + confusion.sum(1)) > 0
    per_class.loc[~occurs, ["precision", "recall", "f1", "iou"]] = np.nan
    per_class.insert(0, "class", names)
    return overall, confusion, per_class, pd.DataFrame(rows)


def _dex_errors(frame: pd.DataFrame) -> dict[str, float]:
    """Mean absolute and root mean square error of the model and of the constant, dex."""
    out = {}
    for prefix, name in (("", "error"), ("constant_", "constant_error")):
        error = frame[name].to_numpy(float)
        out[f"{prefix}mae_dex"] = float(np.abs(error).mean())
        out[f"{prefix}rmse_dex"] = float(np.sqrt((error**2).mean()))
    return out


def bootstrap_intervals(
    frame: pd.DataFrame, n_classes: int, seed: int = 0, n_draws: int = N_BOOTSTRAP
) -> dict[str, list[float]]:
    """Draw galaxies with replacement and see how far the scores move.

    Parameters
    ----------
    frame : DataFrame
        mangaid, true, predicted and, for metallicities, error in dex; one row a spaxel.
    n_classes, seed, n_draws : int

    Returns
    -------
    dict of score -> [low, high]
        95 % percentile intervals (Efron 1979); empty for a single galaxy, which cannot tell.
    """
    groups = [g for _, g in frame.groupby("mangaid", sort=True)]
    if len(groups) < 2:
        return {}
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=n_draws)
    each = np.stack([confusion_matrix(g["true"], g["predicted"], n_classes) for g in groups])
    scores = overall_metrics(np.tensordot(draws, each, axes=1))
    if "error" in frame:
        sums = np.array([[len(g), g["error"].abs().sum(), (g["error"] ** 2).sum()] for g in groups])
        count, absolute, square = (draws @ sums).T
        scores |= {"mae_dex": absolute / count, "rmse_dex": np.sqrt(square / count)}
    defined = {k: v[np.isfinite(v)] for k, v in scores.items()}
    return {k: np.quantile(v, INTERVAL).tolist() for k, v in defined.items() if v.size}


def evaluate_split(
    run_dir: Path,
    part: str = "test",
    data_dir: Path | None = None,
    patch_wise: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a run on a part of its own split and write the results to <run_dir>/<part>/.

    The split is the copy in the run folder: remaking the data folder's splits afterwards cannot
    move training galaxies into the test. Galaxies are mapped from their cubes; patch files serve
    a run that learned from them where there is no cube at all.

    Parameters
    ----------
    run_dir : Path
    part : {"train", "val", "test"}
    data_dir : Path, optional
        Default: the run's, else as everywhere.
    patch_wise : bool
        As in `evaluate_cube`.
    device : {"auto", "cpu", "cuda"}
    seed : int
        Of the bootstrap over galaxies.

    Returns
    -------
    dict
        Content of metrics.json: see `score_predictions`.
    """
    run_dir = Path(run_dir)
    trained = load_model(run_dir, device)
    config = json.loads((run_dir / CONFIG_FILE).read_text())
    root = run_data_dir(run_dir, data_dir)
    parts, meta = data_io.read_split(run_dir / SPLIT_FOLDER)
    cubes = [utils.cube_path(root, p) for p in parts[part]["plateifu"].unique()]
    if config["source"] == "patches" and not any(path.is_file() for path in cubes):
        log.info("evaluating the patch files: there is no cube")
        frame = predict_patch_files(trained, run_dir, root, parts[part])
    else:
        frame = predict_split(trained, run_dir, root, parts[part], patch_wise)
    if frame.empty:
        raise DataError(f"{run_dir}: no labelled spaxel in the {part} part of the split.")
    overall, confusion, per_class, per_galaxy = score_predictions(frame, trained, seed)
    result = {
        "part": part,
        "split": trained.about["split_dir"],
        "split_kind": meta.get("kind"),
        "label_task": trained.spec.label_task,
        "best_epoch": trained.about["best"]["epoch"],
        **{k: None if v != v else v for k, v in overall.items()},  # NaN is no JSON
        "created_utc": utils.utc_now(),
    }
    out = run_dir / part
    names = trained.about["class_names"]
    table = pd.DataFrame(confusion, index=pd.Index(names, name="true"), columns=names)
    for content, name in (
        (table.reset_index(), CONFUSION_FILE),
        (per_class, PER_CLASS_FILE),
        (per_galaxy, PER_GALAXY_FILE),
        (frame, PREDICTIONS_FILE),
    ):
        with utils.atomic_path(out / name) as temporary:
            content.to_csv(temporary, index=False)
    utils.write_json(out / RESULT_FILE, result)
    return result


def run_data_dir(run_dir: Path, flag: Path | None = None) -> Path:
    """Find a run's data folder: the flag, else the run's own if it exists, else the default."""
    saved = json.loads((Path(run_dir) / MODEL_FILE).read_text()).get("data_dir")
    if flag is None and saved and Path(saved).is_dir():
        return Path(saved)
    return utils.data_dir(flag)


def expected_value(probabilities: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of 12+log(O/H) over the classes' probabilities.

    Parameters
    ----------
    probabilities : (..., class)
    values : (class,) dex
        What stands for each class (`TrainedModel.class_values`).

    Returns
    -------
    mean, deviation : (...) dex
        What the model cannot tell apart; neither the width of a class nor the calibration's error
        is in it.
    """
    mean = probabilities @ values
    return mean, np.sqrt(np.maximum(probabilities @ values**2 - mean**2, 0))


def describe_result(result: dict[str, Any]) -> str:
    """Put the scores of `evaluate_split` into a few lines."""
    intervals = result["intervals"]
    lines = [
        f"{result['label_task']}, {result['part']} part of the split {result['split']} "
        f"({result['split_kind']}): {result['galaxies']} galaxies, {result['spaxels']} spaxels"
    ]
    if result["split_kind"] == "easy":
        lines.append("  an easy split: neighbours of the test spaxels were trained on")
    labels = {
        "accuracy": "accuracy",
        "majority_accuracy": "  majority class",
        "spectrum_accuracy": "  spectrum only",
        "macro_f1": "macro F1",
        "kappa": "kappa",
        "mae_dex": "MAE (dex)",
        "constant_mae_dex": "  constant",
        "rmse_dex": "RMSE (dex)",
        "constant_rmse_dex": "  constant",
    }
    for key, label in labels.items():
        if result.get(key) is not None:
            low_high = intervals.get(key)
            spread = f"  [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
            lines.append(f"  {label:<18}{result[key]:.3f}{spread}")
    if intervals:
        few = ": so few, they are too narrow" if result["galaxies"] < FEW_GALAXIES else ""
        lines.append(f"  [95 % intervals from a bootstrap over {result['galaxies']} galaxies{few}]")
    return "\n".join(lines)


def main(config: EvalConfig) -> int:
    """Evaluate a part of the run's split."""
    result = evaluate_split(
        config.run_dir,
        config.part,
        config.data_dir,
        config.patch_wise,
        config.device,
        config.seed,
    )
    print(describe_result(result))
    log.info("results in %s", config.run_dir / config.part)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, EvalConfig, __doc__)
