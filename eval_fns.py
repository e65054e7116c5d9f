"""Use a trained model: load it, predict, map a cube, evaluate a split.

Reads   a run folder of run_SSFTT_training.py (model.json, best.safetensors, stats.h5, split/), and
        processed/cubes and processed/labels of the data folder.
Writes  <run_dir>/<part>/: metrics.json, confusion.csv, per_class.csv, per_galaxy.csv,
        predictions.csv.gz; with --plateifu <run_dir>/maps/<plateifu>.npy, a map of classes (y, x),
        and <plateifu>_prob.npy (y, x, class). Trains nothing.

    python eval_fns.py --run-dir runs/demo --part test
    python eval_fns.py --run-dir runs/demo --plateifu 8485-1901
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data_fns
import data_io
import utils
from data_fns import PatchSpec
from HSI_SSFTT import SSFTT, get_SSFTT_model
from utils import LABEL_NONE, DataError

log = logging.getLogger(__name__)

MODEL_SCHEMA, MODEL_VERSION = "ssftt-model", 1
MODEL_FILE, WEIGHTS_FILE, STATS_FILE = "model.json", "best.safetensors", "stats.h5"
BASELINE_FILE, CONFIG_FILE, METRICS_FILE = "baseline.safetensors", "config.json", "metrics.csv"
SPLIT_FOLDER, MAPS_FOLDER = "split", "maps"
RESULT_FILE, CONFUSION_FILE = "metrics.json", "confusion.csv"
PER_CLASS_FILE, PER_GALAXY_FILE = "per_class.csv", "per_galaxy.csv"
PREDICTIONS_FILE = "predictions.csv.gz"

Amp = Literal["off", "bf16", "fp16"]
AMP_TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N_BOOTSTRAP = 2000
INTERVAL = (0.025, 0.975)
"""Quantiles of the bootstrap intervals."""


@dataclass(frozen=True)
class EvalConfig:
    """Options of eval_fns.py."""

    run_dir: Path
    """Folder of a training run."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the run's split to evaluate."""
    plateifu: str | None = None
    """Map this galaxy instead; it needs a cube, no label."""
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
        (Cohen 1960, eq. 1) is 0 where chance alone agrees everywhere.
    """
    total = confusion.sum((-2, -1)).astype(float)
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    accuracy = np.diagonal(confusion, axis1=-2, axis2=-1).sum(-1) / total
    occurs = (true + predicted) > 0
    f1 = class_metrics(confusion)["f1"].sum(-1) / occurs.sum(-1)
    chance = (true * predicted).sum(-1) / total**2
    kappa = np.divide(accuracy - chance, 1 - chance, out=np.zeros_like(accuracy), where=chance < 1)
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
    """

    network: SSFTT
    spec: PatchSpec
    stats: data_io.Stats | None
    about: dict[str, Any]
    device: torch.device


def pick_device(name: str) -> torch.device:
    """Device of a name; "auto" is the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch finds no GPU here; use --device cpu.")
    return torch.device(name)


def load_model(run_dir: Path, device: str = "auto") -> TrainedModel:
    """Load the best model of a training run; its folder is all that is needed.

    Raises
    ------
    DataError
        If the folder holds no trained model, or one of another version.
    """
    run_dir = Path(run_dir)
    path = run_dir / MODEL_FILE
    if not path.is_file() or not (run_dir / WEIGHTS_FILE).is_file():
        raise DataError(
            f"{run_dir}: no {MODEL_FILE} and {WEIGHTS_FILE}: not the folder of a training run that "
            "has finished an epoch (python run_SSFTT_training.py --run-dir ...)."
        )
    about = json.loads(path.read_text())
    found = (about.get("schema"), about.get("schema_version"))
    if found != (MODEL_SCHEMA, MODEL_VERSION):
        raise DataError(
            f"{path}: schema {found[0]} version {found[1]}, this code needs {MODEL_SCHEMA} version "
            f"{MODEL_VERSION}. Train the model anew."
        )
    chosen = pick_device(device)
    network = get_SSFTT_model(**about["model"])
    network.load_state_dict(load_file(run_dir / WEIGHTS_FILE))
    patch = about["patch"]
    spec = PatchSpec(**{**patch, "bands": patch["bands"] and tuple(patch["bands"])})
    stats = data_io.read_stats(run_dir / STATS_FILE) if spec.patch_norm == "PCA" else None
    return TrainedModel(network.to(chosen).eval(), spec, stats, about, chosen)


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
    return torch.cat(logits).numpy(), torch.cat(rows).numpy()


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
