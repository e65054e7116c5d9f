"""Use a trained model: on a cube, on a map of spectra, on the samples of a loader.

    >>> model = load_model("runs/demo")
    >>> prediction = predict_cube(model, "processed/cubes/8485/8485-1901.h5")

Reads   a run folder of run_SSFTT_training.py (run_folder.py), processed/cubes, processed/labels.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import utils
from utils import DataError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import data_io
import hsi_proc_fns
import networks
import pack_cubes
import run_folder
from batches import PackedDataset, dataset_of
from hsi_proc_fns import Stats
from intervals import LEVEL
from labels import LABEL_NONE
from networks import Answer, Network
from pack_cubes import NormalisedCube
from recipe import require_alike
from run_folder import ModelCard
from samples import REBUILD_LABELS, PatchSpec

Amp = Literal["off", "bf16", "fp16"]
AMP_TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READERS = 8
"""Maximum number of threads that read cubes."""
BANDS_AT_ONCE = 1000
"""Bands of all fields that a GPU classifies together: 32 galaxies with 30 components each."""
SHAPE_STEP = 16
"""Such fields are padded to multiples of it: cuDNN searches algorithms for every new shape."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt (malloc.h)."""


# Models


@dataclass
class TrainedModel:
    """A model and all that using it requires."""

    network: Network
    """In evaluation mode, on `device`."""
    card: ModelCard
    """Its description: class names, class values, recipe, best epoch, ..."""
    stats: Stats | None
    """For the norm PCA."""
    device: torch.device
    parts: dict[str, str] = field(default_factory=dict)
    """Part of the run's split by mangaid; training for a galaxy in several (easy splits)."""

    @property
    def spec(self) -> PatchSpec:
        """How its samples are made."""
        return self.card.spec

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

    `device` is auto, cpu or cuda.

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
    """A model's prediction for every spaxel of a cube; NaN or LABEL_NONE where not usable."""

    plateifu: str
    classes: np.ndarray
    """(y, x) int16."""
    probabilities: np.ndarray
    """(y, x, class) float32."""
    class_names: list[str]
    inside: np.ndarray
    """(y, x) bool: spaxels with any measured bin."""
    attrs: dict[str, Any]
    """Of the cube: redshift, wcs_header, ..."""
    class_values: np.ndarray | None = None
    """(class,) 12+log(O/H) that stands for each class, dex; None for BPT."""
    part: str = ""
    """Part of the run's split that the galaxy is in; empty if in none."""
    logoh: np.ndarray | None = None
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    """(y, x) float32: 12+log(O/H), dex, and the ends of its 90 % interval (intervals.py); None for
    BPT."""
    unlike: np.ndarray | None = None
    """(y, x) bool: spaxels whose spectra are unlike those of training, so that interval and class
    promise nothing; None if the network cannot tell."""

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
            last = "; median 12+log(O/H) of all classified spaxels, star-forming or not, "
            last += f"{np.nanmedian(self.logoh):.3f} dex"
            if self.upper is not None and np.isfinite(self.upper).any():
                width = np.nanmedian(self.upper - self.logoh)
                last += f", {LEVEL:.0%} intervals of +-{width:.3f} dex"
        return (
            f"{self.plateifu}: {ny} x {nx} spaxels, {int(self.usable.sum())} classified\n"
            f"  {', '.join(f'{name}: {count}' for name, count in counts)}\n"
            f"  {seen}{last}"
        )


def predict_cube(model: TrainedModel | Path | str, path: Path | str) -> CubePrediction:
    """Run a trained model (or that of a run's folder) on a whole H5 cube; no labels are needed.

    Raises
    ------
    DataError
        If the cube is unreadable, or was made with other options than the training's.
    """
    trained = model if isinstance(model, TrainedModel) else load_model(model)
    return predict_normalised(trained, read_cube_for(trained, Path(path)), utils.plateifu_of(path))


def read_cube_for(model: TrainedModel, path: Path) -> NormalisedCube:
    """Read and normalise a cube like the model's training cubes; see `predict_cube`."""
    spec = model.spec
    cube = pack_cubes.read_normalised(path, spec.patch_norm, model.stats, spec.bands)
    options = model.card.recipe.options["cube"]
    whose = "those that the model learned from"
    require_alike(cube.recipe.shared, options, path, whose, data_io.REBUILD_CUBE)
    return cube


def count_readers() -> int:
    """Choose the number of threads that read cubes ahead of the network."""
    return min(utils.cpu_count(), READERS)


def read_labels_for(model: TrainedModel, path: Path, usable: np.ndarray) -> np.ndarray:
    """Read a label map (y, x) that predictions for `usable` (y, x) spaxels may be compared with.

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


def predict_normalised(model: TrainedModel, cube: NormalisedCube, plateifu: str) -> CubePrediction:
    """Run a trained model on a cube of `read_cube_for`; see `predict_cube`."""
    card, found = model.card, map_answer(model, cube.values)
    result = CubePrediction(
        plateifu,
        np.where(cube.usable, found.classes, LABEL_NONE).astype(np.int16),
        np.where(cube.usable[..., None], found.probabilities, np.float32(np.nan)),
        card.class_names,
        cube.inside,
        cube.attrs,
        card.dex_values,
        model.parts.get(str(cube.attrs.get("mangaid") or plateifu), ""),
    )
    if found.value is not None and found.scale is not None:
        result.logoh = np.where(cube.usable, found.value, np.nan).astype(np.float32)
        scale = found.scale.astype(np.float32)
        result.lower, result.upper = card.calibration.interval(result.logoh, scale)
    if found.unlikeness is not None and card.calibration.largest_unlikeness is not None:
        result.unlike = (found.unlikeness > card.calibration.largest_unlikeness) & cube.usable
    return result


@torch.inference_mode()
def map_answer(model: TrainedModel, values: np.ndarray, patch_wise: bool = False) -> Answer:
    """Answer for every spaxel (y, x) of a normalised cube, (y, x, band) float32.

    Meaningless where spaxels are not usable. `patch_wise` runs the network on every spaxel's patch
    instead of once over the map: the same numbers.
    """
    if not patch_wise:
        field = torch.from_numpy(values).permute(2, 0, 1)[None, None].to(model.device)
        return model.answer(networks.map_outputs(model.network, field)[0].permute(1, 2, 0))
    out, columns = [], np.arange(values.shape[1])
    for y in range(len(values)):
        rows = np.full_like(columns, y)
        patches = hsi_proc_fns.extract_patches(values, rows, columns, model.spec.patch_size)
        patches = np.ascontiguousarray(patches.transpose(0, 3, 1, 2)[:, None])
        out.append(model.network(torch.from_numpy(patches).to(model.device)))
    return model.answer(torch.stack(out))


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
