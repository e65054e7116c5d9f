"""Use trained models: prediction, and evaluation beside a baseline.

Three functions are meant for notebooks, each of which returns an object that prints itself:

    >>> model = load_model("runs/demo")                         # a trained model
    >>> prediction = predict_cube(model, "processed/cubes/8485/8485-1901.h5")
    >>> evaluation = evaluate_split("runs/demo", "test")        # scores on galaxies it never saw

Reads   a run folder of run_SSFTT_training.py (run_folder.py), and processed/cubes and
        processed/labels of the data folder.
Writes  <run_dir>/<part>/: metrics.json, confusion.csv, per_class.csv, per_galaxy.csv,
        predictions.csv.gz. (Maps of whole galaxies: map_galaxies.py.)

    python eval_fns.py --run-dir runs/demo --part test
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import utils
from utils import DataError

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import baselines
import data_io
import hsi_proc_fns
import loops
import metrics
import networks
import pack_cubes
import run_folder
from batches import PackedDataset, PatchFileDataset, dataset_of
from hsi_proc_fns import Stats
from intervals import LEVEL, LEVELS
from labels import LABEL_NONE, label_classes
from networks import Answer, Network
from pack_cubes import NormalisedCube
from recipe import require_alike
from run_folder import ModelCard
from samples import REBUILD_LABELS, PatchSpec, get_samples

log = logging.getLogger(__name__)

Amp = Literal["off", "bf16", "fp16"]
AMP_TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READERS = 8
"""Maximum number of threads that read cubes."""
BANDS_AT_ONCE = 1000
"""Bands of all fields that a GPU classifies together: 32 galaxies with 30 components each."""
SHAPE_STEP = 16
"""Such fields are padded to multiples of it: cuDNN searches algorithms for every new shape."""
PATCHES_AT_ONCE = 256
"""Patches of patch files that are classified together."""
FEW_GALAXIES = 10
"""With fewer galaxies, the bootstrap underestimates how much they differ."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt (malloc.h)."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a trained model on a part of its split."""

    run_dir: Path
    """Folder of a training run."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the run's split to evaluate."""
    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else the run's, else ./data/manga."""
    patch_wise: bool = False
    """Predict patch by patch instead of whole maps at once: the same numbers, but slower."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Random seed of the bootstrap over galaxies."""
    debug: bool = False
    """Show the traceback of an error."""


# Models


@dataclass
class TrainedModel:
    """A model and all that using it requires.

    Attributes
    ----------
    network : Network
        In evaluation mode, on `device`.
    card : ModelCard
        Its description: class names, class values, recipe, best epoch, ...
    stats : Stats or None
        For the norm PCA.
    device : torch.device
    parts : dict
        Part of the run's split by mangaid; training for a galaxy in several (easy splits).
    """

    network: Network
    card: ModelCard
    stats: Stats | None
    device: torch.device
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> PatchSpec:
        """How its samples are made."""
        return self.card.spec

    @property
    def wave(self) -> np.ndarray | None:
        """Wavelengths of its cubes, (band,) vacuum rest Angstrom, where its baseline needs them."""
        if self.spec.patch_norm != "residual":
            return None
        return baselines.wave_of(self.card.recipe.options["cube"])

    def answer(self, outputs: Tensor) -> Answer:
        """Decode the network's outputs (..., output)."""
        card = self.card
        values = (card.edges, card.dex_values, card.calibration)
        return networks.answer(self.network, outputs, *values)

    def __repr__(self) -> str:
        """Describe the model in three lines."""
        spec, best = self.spec, self.card.best
        cube = self.card.recipe.options.get("cube", {})
        grid = f"{cube.get('wave_min')}-{cube.get('wave_max')} Angstrom"
        return (
            f"{self.card.network_name} for {spec.label_task}: {', '.join(self.card.class_names)}\n"
            f"  input: patches of {spec.patch_size} x {spec.patch_size} spaxels, norm "
            f"{spec.patch_norm}, cubes of {grid}; {self.card.parameters} parameters\n"
            f"  split {self.card.split_dir}, best epoch {best.get('epoch')}, validation accuracy "
            f"{best.get('val_accuracy', float('nan')):.3f}"
            + (f", MAE {best['val_mae_dex']:.4f} dex" if "val_mae_dex" in best else "")
        )


def pick_device(name: str) -> torch.device:
    """Choose a device by name and set it up; "auto" is the GPU if there is one.

    On a GPU, float32 convolutions keep all their bits (no TF32): for SSFTT, use --amp bf16 for
    speed.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: no GPU found by torch. Use --device cpu.")
    if name == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def keep_freed_memory() -> None:
    """Have this process reuse the memory it frees, however large the arrays.

    By default, glibc returns blocks over 32 MB to the system and requests them again page by page,
    which takes half of the time of a training step on a CPU. Kept blocks are reused; the peak
    memory grows by the gaps between them. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def load_model(run_dir: Path | str, device: str = "auto") -> TrainedModel:
    """Load the best model of a training run; its folder is all that is needed.

    Parameters
    ----------
    run_dir : Path
    device : {"auto", "cpu", "cuda"}

    Raises
    ------
    DataError
        If the folder holds no trained model, a damaged one, or one of another version.
    """
    card, weights, stats, parts = run_folder.read_model(Path(run_dir))
    what = f"{run_folder.WEIGHTS_FILE} and {run_folder.MODEL_FILE} of one network"
    with utils.reading(run_dir, what, "Copy the run again, or retrain."):
        network = networks.make_network(card.network_name, card.network)
        network.load_state_dict(weights)
    chosen = pick_device(device)
    network = network.to(chosen).eval()
    return TrainedModel(network, card, stats, chosen, parts)


# Prediction


@dataclass(repr=False)
class CubePrediction:
    """A model's prediction for every spaxel of a cube.

    Attributes
    ----------
    plateifu : str
    classes : (y, x) int16
        LABEL_NONE where the spaxel is not usable.
    probabilities : (y, x, class) float32
        NaN where the spaxel is not usable.
    class_names : list of str
    inside : (y, x) bool
        Spaxels with any measured bin.
    attrs : dict
        Of the cube: redshift, wcs_header, ...
    class_values : (class,) array or None
        12+log(O/H) that stands for each class, dex; None for BPT.
    part : str
        Part of the run's split that the galaxy is in; empty if in none.
    logoh, lower, upper : (y, x) float32, or None
        12+log(O/H), dex, and the ends of its 90 % interval (intervals.py); NaN where the spaxel is
        not usable. None for BPT.
    unlike : (y, x) bool, or None
        Spaxels whose spectra are unlike those of training, so that interval and class promise
        nothing; None if the network cannot tell.
    """

    plateifu: str
    classes: np.ndarray
    probabilities: np.ndarray
    class_names: list[str]
    inside: np.ndarray
    attrs: dict[str, Any]
    class_values: np.ndarray | None = None
    part: str = ""
    logoh: np.ndarray | None = None
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    unlike: np.ndarray | None = None

    @property
    def usable(self) -> np.ndarray:
        """Spaxels with a prediction, (y, x) bool."""
        return self.classes != LABEL_NONE

    @property
    def class_counts(self) -> np.ndarray:
        """Number of spaxels of each class, (class,) int."""
        return np.bincount(self.classes[self.usable], minlength=len(self.class_names))

    def __repr__(self) -> str:
        """Describe the prediction in three lines."""
        ny, nx = self.classes.shape
        counts = zip(self.class_names, self.class_counts, strict=True)
        seen = f"in the run's {self.part} part" if self.part else "not in the run's split"
        last = ""
        if self.logoh is not None and self.usable.any():
            last = f"; median 12+log(O/H) {np.nanmedian(self.logoh):.3f} dex, star-forming or not"
            if self.upper is not None and np.isfinite(self.upper).any():
                width = np.nanmedian(self.upper - self.logoh)
                last += f", {LEVEL:.0%} intervals of +-{width:.3f} dex"
        return (
            f"{self.plateifu}: {ny} x {nx} spaxels, {int(self.usable.sum())} classified\n"
            f"  {', '.join(f'{name}: {count}' for name, count in counts)}\n"
            f"  {seen}{last}"
        )


def predict_cube(
    model: TrainedModel | Path | str, path: Path | str, patch_wise: bool = False
) -> CubePrediction:
    """Run a trained model on a whole cube; no labels are needed.

    Parameters
    ----------
    model : TrainedModel or Path
        A model, or the folder of its run.
    path : Path
        H5 cube.
    patch_wise : bool
        Classify patch by patch instead of the whole map at once: the same numbers, but slower.

    Raises
    ------
    DataError
        If the cube is unreadable, or was made with other options than the training's.
    """
    trained = model if isinstance(model, TrainedModel) else load_model(model)
    cube = read_cube_for(trained, Path(path))
    return predict_normalised(trained, cube, utils.plateifu_of(path), patch_wise)


def read_cube_for(model: TrainedModel, path: Path) -> NormalisedCube:
    """Read and normalise a cube like the model's training cubes.

    Raises
    ------
    DataError
        If the cube is unreadable, or was made with other options than the training's.
    """
    spec = model.spec
    cube = pack_cubes.read_normalised(path, spec.patch_norm, model.stats, spec.bands)
    options = model.card.recipe.options["cube"]
    whose = "those that the model learned from"
    require_alike(cube.recipe.shared, options, path, whose, data_io.REBUILD_CUBE)
    return cube


def read_labels_for(model: TrainedModel, path: Path, usable: np.ndarray) -> np.ndarray:
    """Read a label map that a model's predictions may be compared with, (y, x).

    Parameters
    ----------
    model : TrainedModel
    path : Path
    usable : (y, x) bool
        Usable spaxels of the galaxy's cube.

    Raises
    ------
    DataError
        If it is unreadable, was made with other options than the training's, or has another shape.
    """
    made, options = data_io.read_label_meta(path).get("recipe"), model.card.recipe.options["labels"]
    if made is not None and options:
        require_alike(made.shared, options, path, "the training labels", REBUILD_LABELS)
    labels = data_io.read_labels(path)
    hsi_proc_fns.check_label_shape(labels, usable, path)
    return labels


def predict_normalised(
    model: TrainedModel, cube: NormalisedCube, plateifu: str, patch_wise: bool = False
) -> CubePrediction:
    """Run a trained model on a cube of `read_cube_for`; see `predict_cube`."""
    found = map_answer(model, cube.values, patch_wise)
    classes = found.classes.astype(np.int16)
    classes[~cube.usable] = LABEL_NONE
    found.probabilities[~cube.usable] = np.nan
    part = model.parts.get(str(cube.attrs.get("mangaid") or plateifu), "")
    card, unlike, logoh, lower, upper = model.card, None, None, None, None
    if found.value is not None and found.scale is not None:
        logoh = np.where(cube.usable, found.value, np.nan).astype(np.float32)
        lower, upper = card.calibration.interval(logoh, found.scale.astype(np.float32))
    if found.unlikeness is not None and card.calibration.largest_unlikeness is not None:
        unlike = (found.unlikeness > card.calibration.largest_unlikeness) & cube.usable
    return CubePrediction(
        plateifu,
        classes,
        found.probabilities,
        card.class_names,
        cube.inside,
        cube.attrs,
        card.dex_values,
        part,
        logoh,
        lower,
        upper,
        unlike,
    )


def map_answer(model: TrainedModel, values: np.ndarray, patch_wise: bool = False) -> Answer:
    """Answer for every spaxel of a normalised cube.

    Parameters
    ----------
    model : TrainedModel
    values : (y, x, band) float32
    patch_wise : bool
        Run the network on every spaxel's patch instead of once over the map: the same numbers.

    Returns
    -------
    Answer
        Of (y, x) spaxels; meaningless where they are not usable.
    """
    ny, nx = values.shape[:2]
    if not patch_wise:
        with torch.inference_mode():
            cutout = torch.from_numpy(values).permute(2, 0, 1)[None, None].to(model.device)
            return model.answer(networks.map_outputs(model.network, cutout)[0].permute(1, 2, 0))
    columns, out = np.arange(nx), []
    for y in range(ny):
        rows = np.full(nx, y)
        patches = hsi_proc_fns.extract_patches(values, rows, columns, model.spec.patch_size)
        patches = patches.transpose(0, 3, 1, 2)[:, None]  # (x, 1, band, P, P)
        out.append(predict(model, np.ascontiguousarray(patches)))
    return networks.join(out, np.stack)


def predict(model: TrainedModel, patches: np.ndarray | Tensor) -> Answer:
    """Answer for the spaxels in the middle of patches, (N,).

    Parameters
    ----------
    model : TrainedModel
    patches : (N, 1, band, P, P) float32
        Normalised like the training patches; the spaxel in question is [P//2, P//2].
    """
    with torch.inference_mode():
        return model.answer(model.network(torch.as_tensor(patches).to(model.device)))


def sample_outputs(
    network: Network,
    loader: DataLoader,
    device: torch.device,
    amp: Amp = "off",
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, np.ndarray]:
    """Apply a network to all samples of a loader of patches.

    Whole galaxies at a time where the dataset has them (packed cubes), otherwise patch by patch:
    the same numbers. `share` (k, n), k less than n and than the number of galaxies: of whole
    galaxies, only every n-th from the k-th.

    Returns
    -------
    outputs : (N, output) float32, on the CPU
    rows : (N,) int64
        Into the dataset's samples.
    """
    dataset = dataset_of(loader)
    if isinstance(dataset, PackedDataset):
        return field_outputs(network, dataset, device, amp, share=share)
    return patch_outputs(network, loader, device, amp)


@torch.no_grad()
def patch_outputs(
    network: Network, loader: DataLoader, device: torch.device, amp: Amp = "off"
) -> tuple[Tensor, np.ndarray]:
    """Like `sample_outputs`, always patch by patch."""
    network.eval()
    outputs, rows = [], []
    for batch in loader:
        patches = batch.patches.to(device, non_blocking=True)
        with torch.autocast(device.type, AMP_TYPES[amp], enabled=amp != "off"):
            outputs.append(network(patches).float().cpu())
        rows.append(batch.rows)
    return torch.cat(outputs), torch.cat(rows).cpu().numpy()


@torch.no_grad()
def field_outputs(
    network: Network,
    dataset: PackedDataset,
    device: torch.device,
    amp: Amp = "off",
    at_once: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, np.ndarray]:
    """Like `sample_outputs`, for whole galaxies.

    A GPU classifies `at_once` galaxies together (default: by their number of bands), the smaller
    ones padded with zeros, as beyond any field of view; a CPU one at a time, without padding.
    """
    network.eval()
    outputs, order, chosen = [], [], dataset.samples
    if at_once is None:
        at_once = max(1, BANDS_AT_ONCE // dataset.n_bands) if device.type == "cuda" else 1
    step = SHAPE_STEP if at_once > 1 else 1
    parts = itertools.islice(chosen.by_galaxy(), share[0], None, share[1])
    while some := list(itertools.islice(parts, at_once)):
        fields, corners = zip(*(dataset.field(galaxy) for galaxy, _ in some), strict=True)
        ny, nx = (-(-max(f.shape[axis] for f in fields) // step) * step for axis in (3, 4))
        padded = [F.pad(f, (0, nx - f.shape[4], 0, ny - f.shape[3])) for f in fields]
        with torch.autocast(device.type, AMP_TYPES[amp], enabled=amp != "off"):
            whole = torch.cat(padded).to(device, non_blocking=True)
            dense = networks.map_outputs(network, whole)
        there = [
            (i * ny + chosen.y[rows].astype(np.int64) - y) * nx + chosen.x[rows] - x
            for i, ((_, rows), (y, x)) in enumerate(zip(some, corners, strict=True))
        ]
        spaxels = torch.from_numpy(np.concatenate(there)).to(device)
        outputs.append(dense.movedim(1, 3).flatten(0, 2)[spaxels].float())
        order += [rows for _, rows in some]
    return torch.cat(outputs).cpu(), np.concatenate(order)


# Splits


@dataclass(repr=False)
class Evaluation:
    """How well a model does on a part of its split.

    Attributes
    ----------
    scores : dict
        Content of metrics.json: see `metrics.score_predictions`; also part, split, split_kind,
        label_task, best_epoch.
    class_names : list of str
    confusion : (true class, predicted class) int
    per_class, per_galaxy : DataFrame
    predictions : DataFrame
        One row per spaxel: see `predictions_table`.
    """

    scores: dict[str, Any]
    class_names: list[str]
    confusion: np.ndarray
    per_class: pd.DataFrame
    per_galaxy: pd.DataFrame
    predictions: pd.DataFrame

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
            with utils.atomic_path(folder / name) as temporary:
                content.to_csv(temporary, index=False)
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
    patch_wise: bool = False,
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
    patch_wise : bool
        As in `predict_cube`.
    device : {"auto", "cpu", "cuda"}
    seed : int
        Random seed of the bootstrap over galaxies.
    """
    run_dir = Path(run_dir)
    if part not in utils.SPLIT_PARTS:
        raise DataError(f"part {part!r}: expected one of {', '.join(utils.SPLIT_PARTS)}.")
    model = load_model(run_dir, device)
    root = run_folder.run_data_dir(run_dir, data_dir)
    parts, split = data_io.read_split(run_dir / run_folder.SPLIT_FOLDER)
    weights = None
    if (path := run_dir / run_folder.BASELINE_FILE).is_file():
        weights, _ = run_folder.read_tensors(path)
    cubes = [utils.cube_path(root, p) for p in parts[part]["plateifu"].unique()]
    source = model.card.recipe.options["source"]
    if source == "patches" and not any(path.is_file() for path in cubes):
        log.info("evaluating the patch files: there are no cubes")
        galaxies = predict_patch_files(model, root, parts[part])
    else:
        galaxies = predict_cubes(model, root, parts[part], patch_wise)
    mangaids = dict(zip(parts[part]["plateifu"], parts[part]["mangaid"], strict=True))
    frame = predictions_table(model, galaxies, mangaids, weights)
    if frame.empty:
        raise DataError(
            f"{run_dir}: no labelled spaxel in the {part} part of the split. Choose another --part."
        )
    add_bin_weights(frame, root, model.spec.label_task)
    card = model.card
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
    """Add the column weight to a table of predictions if labels of its spaxels share a bin.

    Parameters
    ----------
    frame : DataFrame
        One row per spaxel: plateifu, y, x.
    root : Path
        Data folder; galaxies without a label map there (only patch files) count as not binned.
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


def count_readers() -> int:
    """Choose the number of threads that read cubes ahead of the network."""
    return min(utils.cpu_count(), READERS)


class Labelled(NamedTuple):
    """The labelled spaxels of one galaxy and what a model says of them."""

    plateifu: str
    y: np.ndarray
    x: np.ndarray
    value: np.ndarray
    true: np.ndarray
    answer: Answer
    """Of (n,) spaxels."""
    spectra: np.ndarray
    """(n, band) float32, normalised."""


def predictions_table(
    model: TrainedModel,
    galaxies: Iterable[Labelled],
    mangaids: dict[str, str],
    baseline: dict[str, Tensor] | None,
) -> pd.DataFrame:
    """Gather the predictions for the labelled spaxels of galaxies.

    Returns
    -------
    DataFrame, one row per spaxel
        plateifu, mangaid, y, x, value (label: dex or class), true, predicted, probability (of the
        predicted class); for metallicities logoh and the ends of its intervals, lower_0.9 and so
        on, dex; with a baseline, baseline (its class) and, if it gives one, baseline_logoh.
    """
    frames = [pd.DataFrame()]
    for galaxy in galaxies:
        frame = pd.DataFrame(
            {
                "plateifu": galaxy.plateifu,
                "mangaid": mangaids[galaxy.plateifu],
                "y": galaxy.y,
                "x": galaxy.x,
                "value": galaxy.value,
                "true": galaxy.true,
                "predicted": galaxy.answer.classes,
                "probability": np.take_along_axis(
                    galaxy.answer.probabilities, galaxy.answer.classes[:, None], 1
                )[:, 0],
            }
        )
        value, scale = galaxy.answer.value, galaxy.answer.scale
        if value is not None and scale is not None:
            frame["logoh"] = value
            for level in LEVELS:
                ends = model.card.calibration.interval(value, scale, level)
                frame[f"lower_{level}"], frame[f"upper_{level}"] = ends
        if baseline is not None:
            guess = baselines.apply(baseline, galaxy.spectra, model.spec, model.wave)
            frame["baseline"] = guess.classes
            if guess.logoh is not None:
                frame["baseline_logoh"] = guess.logoh
        frames.append(frame)
    return pd.concat(frames[1:] or frames, ignore_index=True)


def predict_cubes(
    model: TrainedModel, root: Path, table: pd.DataFrame, patch_wise: bool = False
) -> Iterator[Labelled]:
    """Predict the labelled spaxels of one part of a split.

    Parameters
    ----------
    model : TrainedModel
    root : Path
        Data folder.
    table : DataFrame
        The part: plateifu, and y and x where the split is by spaxel.
    patch_wise : bool
        As in `predict_cube`.

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
        label_path = utils.label_path(root, spec.label_task, plateifu)
        labels = read_labels_for(model, label_path, cube.usable)
        found = map_answer(model, cube.values, patch_wise)
        classes = label_classes(labels, spec.label_task, spec.n_classes)
        wanted = (classes != LABEL_NONE) & cube.usable
        if {"y", "x"} <= set(rows.columns):
            chosen = np.zeros_like(wanted)
            chosen[rows["y"], rows["x"]] = True
            wanted &= chosen
        y, x = np.nonzero(wanted)
        here = found.apply(lambda part, y=y, x=x: part[y, x])  # type: ignore[misc]
        yield Labelled(plateifu, y, x, labels[y, x], classes[y, x], here, cube.values[y, x])


def predict_patch_files(model: TrainedModel, root: Path, table: pd.DataFrame) -> Iterator[Labelled]:
    """Like `predict_cubes`, but from patch files."""
    samples = get_samples(table, model.spec, root, None, model.stats)
    dataset = PatchFileDataset(samples, model.spec, root)
    for galaxy, rows in samples.by_galaxy():
        blocks = np.split(rows, range(PATCHES_AT_ONCE, len(rows), PATCHES_AT_ONCE))
        answers = [predict(model, dataset.__getitems__(block).patches) for block in blocks]
        yield Labelled(
            samples.plateifus[galaxy],
            samples.y[rows],
            samples.x[rows],
            samples.values[rows],
            samples.classes[rows],
            networks.join(answers, np.concatenate),
            dataset.centres(rows),
        )


def main(config: EvalConfig) -> int:
    """Evaluate a part of the run's split."""
    evaluation = evaluate_split(
        config.run_dir,
        config.part,
        config.data_dir,
        config.patch_wise,
        config.device,
        config.seed,
    )
    print(evaluation)
    log.info("results in %s", config.run_dir / config.part)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, EvalConfig, __doc__)
