"""The folder of a training run: its files, starting it, checkpoints, and the model that it holds.

Writes  <run_dir>/: config.json, environment.json, split/ (a copy), log.txt, metrics.csv (a row per
        epoch), last.pt (all that resuming needs), and all that using the model needs: model.json,
        best.safetensors, stats.h5 (norm PCA), baseline.safetensors (baselines.py).

`ModelCard` is the content of model.json. Layouts: docs/data_formats.md#runs.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import utils
from utils import DataError

import numpy as np
import pandas as pd
import torch
from isal import isal_zlib
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

import data_io
from hsi_proc_fns import Stats
from intervals import Calibration
from labels import logoh_edges
from networks import NetworkName
from recipe import Recipe, option_differences, sealed
from samples import PatchSpec

log = logging.getLogger(__name__)

RUNS_FOLDER = Path("runs")
MODEL_SCHEMA, MODEL_VERSION = "manga-model", 6
CONFIG_FILE, ENVIRONMENT_FILE, LOG_FILE = "config.json", "environment.json", "log.txt"
MODEL_FILE, WEIGHTS_FILE, STATS_FILE = "model.json", "best.safetensors", "stats.h5"
BASELINE_FILE, METRICS_FILE = "baseline.safetensors", "metrics.csv"
CHECKPOINT_FILE, NAN_FILE = "last.pt", "nan_batch.json"
SPLIT_FOLDER, MAPS_FOLDER, FIGURES_FOLDER = "split", "maps", "figures"
EVIDENCE_FOLDER = "evidence"
RESULT_FILE, CONFUSION_FILE = "metrics.json", "confusion.csv"
PER_CLASS_FILE, PER_GALAXY_FILE = "per_class.csv", "per_galaxy.csv"
PREDICTIONS_FILE = "predictions.csv.gz"

REPLACED = (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    WEIGHTS_FILE,
    BASELINE_FILE,
    METRICS_FILE,
    STATS_FILE,
    NAN_FILE,
    SPLIT_FOLDER,
    MAPS_FOLDER,
    FIGURES_FOLDER,
    EVIDENCE_FOLDER,
    *utils.SPLIT_PARTS,
)
"""Names in a run's folder that a new run there replaces or removes."""


@dataclass
class ModelCard:
    """What using a model requires, besides its weights: the content of model.json.

    Attributes
    ----------
    recipe : Recipe
        Of the run: what was learned, from which samples; options of cubes and labels under "cube"
        and "labels".
    spec : PatchSpec
        How its samples are made.
    class_names : list of str
    class_counts : list of int
        Training samples of each class.
    class_values : list of float or None
        12+log(O/H) that each class stands for, dex: the mean of its training samples (of a class
        without any, its middle). None for BPT.
    label_median : float
        Median label of the training samples: dex, or class.
    network_name : str
        One of networks.USUAL.
    network : dict
        Its sizes.
    parameters : int
        Number of trainable parameters.
    split_dir, data_dir : str
        Split that it learned from, and the data folder at the time.
    best : dict
        Scores of the best epoch as in metrics.csv (0: of the start), and the name of the monitored
        one; empty before it.
    baselines : dict of str -> float
        Validation accuracy (and mean absolute error, dex) without a network.
    calibration : Calibration
        How wide intervals have to be, from the validation galaxies.
    code_version : str
    """

    recipe: Recipe
    spec: PatchSpec
    class_names: list[str]
    class_counts: list[int]
    class_values: list[float] | None
    label_median: float
    network_name: NetworkName
    network: dict[str, Any]
    parameters: int
    split_dir: str
    data_dir: str
    best: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    code_version: str = utils.VERSION

    @property
    def edges(self) -> np.ndarray | None:
        """Limits between metallicity classes, (class - 1,) dex; None for BPT."""
        return None if self.class_values is None else np.array(logoh_edges(len(self.class_names)))

    @property
    def dex_values(self) -> np.ndarray | None:
        """12+log(O/H) that stands for each class, (class,) dex; None for BPT."""
        return None if self.class_values is None else np.array(self.class_values)

    def write(self, run_dir: Path) -> None:
        """Write model.json, whole or not at all."""
        head = {"schema": MODEL_SCHEMA, "schema_version": MODEL_VERSION}
        utils.write_json(run_dir / MODEL_FILE, sealed({**head, **asdict(self)}))

    @classmethod
    def read(cls, run_dir: Path) -> ModelCard:
        """Read model.json.

        Raises
        ------
        DataError
            If it is missing, damaged or of another version.
        """
        path = run_dir / MODEL_FILE
        if not path.is_file():
            raise DataError(
                f"{run_dir}: no {MODEL_FILE}. Expected the folder of a training run "
                "(python run_SSFTT_training.py --run-dir ...)."
            )
        with utils.reading(path, "the description of a model", "Copy it again, or retrain."):
            content = dict(json.loads(path.read_text()))
            checksum = content.pop("checksum", None)
            found = (content.get("schema"), content.get("schema_version"))
            if found == (MODEL_SCHEMA, MODEL_VERSION):
                if checksum != sealed(content)["checksum"]:
                    raise ValueError("its checksum differs")
                bands = content["spec"]["bands"]
                spec = PatchSpec(**{**content["spec"], "bands": bands and tuple(bands)})
                recipe = Recipe.from_json(content["recipe"], path)
                calibration = Calibration(**content["calibration"])
                del content["schema"], content["schema_version"]
                parts = {"spec": spec, "recipe": recipe, "calibration": calibration}
                return cls(**{**content, **parts})
        raise DataError(
            f"{path}: schema {found[0]} version {found[1]}, this code needs {MODEL_SCHEMA} version "
            f"{MODEL_VERSION}. Retrain the model: python run_SSFTT_training.py --config {run_dir} "
            f"--run-dir {run_dir} --overwrite"
        )


# Starting a run


def is_run(run_dir: Path) -> bool:
    """Say whether a folder was made by training: it holds a config.json with its options."""
    try:
        saved = json.loads((run_dir / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and {"label_task", "patch_norm", "split_dir"} <= set(saved)


def choose(
    run_dir: Path | None, resume: bool, overwrite: bool, options: dict[str, Any], name: str
) -> tuple[Path, bool]:
    """Choose the folder of a run, and whether a run there is resumed.

    Parameters
    ----------
    run_dir : Path, optional
        Default: with `resume` the newest run in ./runs that was made with these options, else a
        new folder there.
    resume, overwrite : bool
        Continue a run that is there; replace it.
    options : dict
        Options that decide the run, as in its recipe.
    name : str
        Ending of the name of a new folder in ./runs.

    Raises
    ------
    DataError
        If the folder holds a run and neither flag is given, a run to be resumed was made with
        other options, or there are files of other origin that a run would replace.
    """
    if run_dir is None:
        runs = [path.parent for path in RUNS_FOLDER.glob(f"*/{CHECKPOINT_FILE}")]
        runs.sort(key=lambda run: -(run / CHECKPOINT_FILE).stat().st_mtime_ns)
        for found in runs if resume else ():
            with contextlib.suppress(DataError):  # a damaged run is not the one
                if not option_differences(own_options(found), options):
                    return found, True
        return RUNS_FOLDER / f"{time.strftime('%Y%m%dT%H%M%S')}_{name}", False
    if run_dir.is_file():
        raise DataError(f"{run_dir}: a file, expected a new folder or a run's. Check --run-dir.")
    if (run_dir / CHECKPOINT_FILE).is_file() and not overwrite:
        if not resume:
            raise DataError(
                f"{run_dir}: holds a run. Continue it with --resume auto, or replace it with "
                "--overwrite."
            )
        changed = option_differences(own_options(run_dir), options)
        if changed:
            raise DataError(
                f"{run_dir}: the run was made with {', '.join(changed)}. Give the same options "
                f"(--config {run_dir} --run-dir {run_dir}), or start again with --overwrite."
            )
        return run_dir, True
    others = [file for file in REPLACED if (run_dir / file).exists()]
    if others and not is_run(run_dir):
        raise DataError(
            f"{run_dir}: holds {', '.join(others)}, but not a training run. Choose an empty or new "
            "--run-dir."
        )
    return run_dir, False


def own_options(run_dir: Path) -> dict[str, Any]:
    """Options of the run in a folder, without those of its cubes and labels."""
    options = ModelCard.read(run_dir).recipe.options
    return {k: v for k, v in options.items() if k not in ("cube", "labels")}


def start(run_dir: Path, root: Path, split_dir: str, is_pca: bool) -> None:
    """Fill the folder of a new run, which holds its config.json already.

    An old run is removed; the split and its statistics are copied.

    Parameters
    ----------
    run_dir : Path
    root : Path
        Data folder.
    split_dir : str
    is_pca : bool
        Whether the run needs the split's statistics.
    """
    data_io.read_split(utils.split_path(root, split_dir))  # first: no folder without a split
    for name in REPLACED:
        path = run_dir / name
        if name == CONFIG_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for part in utils.SPLIT_PARTS:
        _copy(
            utils.split_path(root, split_dir, part),
            run_dir / SPLIT_FOLDER / f"{part}.csv",
        )
    if is_pca:
        _copy(utils.stats_path(root, split_dir), run_dir / STATS_FILE)
    utils.write_json(run_dir / ENVIRONMENT_FILE, environment())


def _copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    with utils.atomic_path(target) as part:
        shutil.copyfile(source, part)


def environment() -> dict[str, Any]:
    """Gather what a run depended on: packages, platform, git state, SLURM job, command line."""
    packages = {}
    for name in "numpy scipy pandas h5py astropy scikit-learn torch isal".split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "version": utils.VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git": git_state(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpus": utils.cpu_count(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
        "created_utc": utils.utc_now(),
    }


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this module is in (None outside of one)."""

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}
    except OSError:  # no git
        return {"commit": None, "dirty": None}


# Weights and checkpoints


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file with the usual permissions (its own writer makes it private)."""
    with utils.atomic_path(path) as part:
        about = {**(metadata or {}), "crc32": str(_crc(tensors, metadata or {}))}
        part.write_bytes(save(tensors, about))


def _crc(tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """CRC-32 of tensors and metadata."""
    crc = isal_zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        crc = isal_zlib.crc32(f"{name} {values.dtype} {tuple(values.shape)}".encode(), crc)
        crc = isal_zlib.crc32(values.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a .safetensors file: tensors and metadata.

    Raises
    ------
    DataError
        If it is missing or damaged.
    """
    remedy = "Copy the run again, or retrain."
    with utils.reading(path, "the weights of a training run", remedy), safe_open(path, "pt") as f:
        tensors, about = {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata() or {})
        if about.pop("crc32", None) != str(_crc(tensors, about)):
            raise ValueError("its checksum differs, or it has none")
        return tensors, about


def _check_still_there(run_dir: Path) -> None:
    """Raise a DataError if the folder of a run in progress was removed: it would be incomplete."""
    if not (run_dir / CONFIG_FILE).is_file():
        raise DataError(
            f"{run_dir}: no {CONFIG_FILE} any more, expected the folder of the run in progress: it "
            "was removed or emptied. Start the run again."
        )


def write_best(run_dir: Path, card: ModelCard, weights: dict[str, Tensor]) -> None:
    """Write the weights of the best epoch, then the card that describes them."""
    _check_still_there(run_dir)
    content = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    about = {"best": json.dumps(card.best), "calibration": json.dumps(asdict(card.calibration))}
    write_tensors(run_dir / WEIGHTS_FILE, content, about)
    card.write(run_dir)


def write_checkpoint(run_dir: Path, content: dict[str, Any], history: list[dict]) -> None:
    """Write last.pt (tensors and plain values only) and metrics.csv."""
    _check_still_there(run_dir)
    with io.BytesIO() as buffer, utils.atomic_path(run_dir / CHECKPOINT_FILE) as part:
        torch.save(content, buffer)  # to a full disk, it would raise what says nothing
        part.write_bytes(buffer.getbuffer())
    if history:
        with utils.atomic_path(run_dir / METRICS_FILE) as part:
            pd.DataFrame(history).to_csv(part, index=False)


def read_checkpoint(run_dir: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read last.pt; no code in it is executed."""
    path = run_dir / CHECKPOINT_FILE
    remedy = "Start the run again with --overwrite."
    with utils.reading(path, "the checkpoint of a training run", remedy):
        with zipfile.ZipFile(path) as archive:  # torch itself compares no checksum
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} differs")
        return torch.load(path, map_location=device, weights_only=True)


# Using a run


def read_model(
    run_dir: Path,
) -> tuple[ModelCard, dict[str, Tensor], Stats | None, dict[str, str]]:
    """Read the best model of a run.

    Returns
    -------
    card : ModelCard
    weights : dict of str -> Tensor
    stats : Stats or None
        For the norm PCA.
    parts : dict of str -> str
        Part of the run's split by mangaid; training for a galaxy in several (easy splits).

    Raises
    ------
    DataError
        If the folder holds no trained model, or a damaged, incomplete or outdated one.
    """
    run_dir = Path(run_dir)
    card = ModelCard.read(run_dir)
    if not (run_dir / WEIGHTS_FILE).is_file():
        raise DataError(
            f"{run_dir}: no {WEIGHTS_FILE}. Expected the folder of a training run with a finished "
            "epoch (python run_SSFTT_training.py --run-dir ...)."
        )
    weights, about = read_tensors(run_dir / WEIGHTS_FILE)
    odd = [name for name, value in weights.items() if not value.isfinite().all()]
    if odd:
        raise DataError(
            f"{run_dir / WEIGHTS_FILE}: {odd[0]} holds values that are not finite, expected a "
            "trained network. Copy the run again, or retrain with a lower --lr."
        )
    if "best" in about:  # a stop may have come between writing weights and card
        calibration = Calibration(**json.loads(about["calibration"]))
        card = replace(card, best=json.loads(about["best"]), calibration=calibration)
    needed = [STATS_FILE] if card.spec.patch_norm == "PCA" else []
    has_split = (run_dir / SPLIT_FOLDER).is_dir()  # a model that was given away may have none
    needed += [f"{SPLIT_FOLDER}/{part}.csv" for part in utils.SPLIT_PARTS if has_split]
    lost = [name for name in needed if not (run_dir / name).is_file()]
    if lost:
        raise DataError(f"{run_dir}: {lost[0]} is missing. Copy the run again, or retrain.")
    stats = data_io.read_stats(run_dir / STATS_FILE) if STATS_FILE in needed else None
    split = data_io.read_split(run_dir / SPLIT_FOLDER)[0] if has_split else {}
    parts = {m: part for part in reversed(split) for m in split[part]["mangaid"]}
    return card, weights, stats, parts


def card_name(run_dir: Path) -> str:
    """Name of a run in a FITS card, which holds ASCII alone."""
    return run_dir.resolve().name.encode("ascii", "replace").decode()


def run_data_dir(run_dir: Path, flag: Path | None = None) -> Path:
    """Choose the data folder to use a run with, and log it: see `utils.data_dir`."""
    root = utils.data_dir(flag, ModelCard.read(Path(run_dir)).data_dir)
    log.info("data folder %s", root)
    return root
