"""Train an SSFTT on the labelled spaxels of a split.

Reads   splits/<split_dir>/ (stats.h5 for the norm PCA), and processed/cubes and processed/labels,
        or with --source patches the files of cube_patch_processing.py. With --source packed the
        normalised cubes are packed into processed/packed first, if they are not there yet.
Writes  <run_dir>/: config.json, environment.json, split/ (a copy), log.txt, metrics.csv (one row an
        epoch), last.pt (all that --resume auto needs), and all that using the model needs:
        model.json, best.safetensors, stats.h5 (PCA), baseline.safetensors (spectrum only).

Ctrl-C, SIGUSR1 and SIGTERM end the run after the step at hand: last.pt is saved, the exit code is
75, and the same command with --resume auto goes on as if nothing had happened.

    python run_SSFTT_training.py --label-task logOH --patch-norm PCA --epochs 20
    python run_SSFTT_training.py --config configs/train_fiducial.json --resume auto
    python run_SSFTT_training.py --config configs/train_cutouts.json      # the fastest
    python run_SSFTT_training.py --config runs/20260101T120000_logOH_PCA/config.json --seed 1
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data_fns
import data_io
import eval_fns
import hsi_proc_fns
import SSFTT_dense
import utils
from data_fns import Batch, Batches, CutoutBatch, PatchDataset, PatchSpec
from HSI_SSFTT import SSFTT, count_parameters, get_SSFTT_model
from labels import LABEL_NONE, class_middles
from utils import DataError, LabelTask

log = logging.getLogger(__name__)

ENVIRONMENT_FILE, LOG_FILE = "environment.json", "log.txt"
CHECKPOINT_FILE, NAN_FILE = "last.pt", "nan_batch.json"
RUNS_FOLDER = Path("runs")
SOME_SPECTRA = 10_000
"""Spectra that the spectrum-only baseline is fitted to (more do not change its accuracy), and that
a learned projection starts from."""
BASELINE_COMPONENTS = 50
"""Principal components of the spectra that the baseline sees."""
CHECK_STEPS = 50
"""Steps between two looks at the losses, for which a GPU has to wait."""
BANDS_AT_ONCE = 1000
"""Of the fields that a GPU classifies together: 32 galaxies with 30 components each."""
SHAPE_STEP = 16
"""Such fields are padded to multiples of it: every new shape costs a search for convolutions."""
FINAL_LR = 0.01
"""Learning rate at the end of the cosine, as a share of the peak."""
RUN_FILES = (
    eval_fns.CONFIG_FILE,
    eval_fns.MODEL_FILE,
    eval_fns.WEIGHTS_FILE,
    eval_fns.METRICS_FILE,
    eval_fns.STATS_FILE,
    eval_fns.SPLIT_FOLDER,
    *utils.SPLIT_PARTS,
)
"""Names in a run's folder that a new run there replaces or removes."""
NOT_THE_RUN = ("run_dir", "resume", "overwrite", "debug")
"""Fields that say where and how to start, not what to compute."""
MAY_CHANGE = (*NOT_THE_RUN, "epochs", "patience", "workers", "cache_gb", "data_dir", "device")
"""Fields that may differ when a run is resumed."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of run_SSFTT_training.py."""

    data_dir: Path | None = None
    """Data folder; default MANGA_DATA_DIR, else ./data/manga."""
    split_dir: str | None = None
    """Split to learn from, a folder in <data_dir>/splits; default hard_<label_task>."""
    run_dir: Path | None = None
    """Folder for everything the run writes; default ./runs/<time>_<task>_<norm>."""
    resume: Literal["no", "auto"] = "no"
    """auto: go on with the run in --run-dir, or the newest one of the same options in ./runs."""
    overwrite: bool = False
    """Start anew in a --run-dir that holds a run."""
    label_task: LabelTask = "logOH"
    """Labels to learn."""
    n_classes: Literal[6, 8] = 6
    """Metallicity classes; BPT has 3, whatever this says."""
    patch_norm: utils.PatchNorm = "global"
    """Normalisation of the patches."""
    patch_size: int = 7
    """Spaxels a side of a patch."""
    bands: tuple[int, int] | None = None
    """First band (or component) and the one after the last; default all."""
    source: data_fns.Source = "cubes"
    """Cut patches from cubes on the fly, read patch files, or gather from packed cubes. Packed is
    the one for surveys: cubes that do not fit into --cache-gb are read again every epoch."""
    cutout: int = 1
    """1: learn patch by patch. An odd number more: learn all labelled spaxels of cutouts that are
    so many spaxels wide at once, from packed cubes: the same network and expectation, faster. Where
    the first layer learns from whole spectra (fiducial, --projection) with --lr 3e-4."""
    packed_type: data_fns.PackedType = "float16"
    """Numbers of packed cubes."""
    n_tokens: int = 4
    """Tokens that gather a patch's features."""
    dropout: float = 0.1
    """Dropout of tokens and transformer."""
    spectral_kernel: int = 3
    """Width of the first convolution along the bands."""
    spectral_stride: int = 1
    """Its stride; kernel 16 and stride 16 train some 10 times faster on full spectra."""
    projection: int | None = None
    """First project the bands on so many learned components; they start as principal ones."""
    epochs: int = 30
    """Passes over the training samples."""
    samples_per_epoch: int | None = None
    """Labelled spaxels in a pass; default as many as there are."""
    batch_size: int = 256
    """Labelled spaxels a step; in cutouts on average."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the epochs."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes."""
    balance: bool = True
    """Draw every class equally often; else as often as it occurs."""
    augment: bool = False
    """Turn and mirror patches at random (odd patch sizes)."""
    monitor: Literal["accuracy", "macro_f1", "loss"] = "accuracy"
    """Validation value that picks the best epoch."""
    patience: int = 0
    """Stop after this many epochs without a better one; 0: never."""
    baselines: bool = True
    """Fit the spectrum-only baseline."""
    amp: eval_fns.Amp = "off"
    """Mixed precision."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    compile: bool = False
    """Compile the training step (torch.compile): fewer launches for a GPU, after some minutes.
    Needs a C++ compiler."""
    workers: int = 0
    """Processes that cut patches and pack cubes; 0: this one, fast enough for PCA patches."""
    cache_gb: float = 4.0
    """Memory for normalised cubes, all workers together."""
    seed: int = 0
    """Of weights, order and dropout."""
    debug: bool = False
    """Show the traceback of an error."""

    @property
    def split(self) -> str:
        """Name of the split."""
        return self.split_dir or utils.hard_split(self.label_task)

    @property
    def spec(self) -> PatchSpec:
        """What a sample is."""
        return PatchSpec(
            self.label_task, self.n_classes, self.patch_norm, self.patch_size, self.bands
        )


@dataclass
class Progress:
    """How far a run is; saved with the weights."""

    epoch: int = 0
    """Epoch at hand, from 0; finished ones are below it."""
    step: int = 0
    """Steps done in it."""
    loss_sum: float = 0.0
    hits: float = 0.0
    weight: float = 0.0
    """Sums over these steps, of weighted spaxels; a patch weighs 1."""
    seen: int = 0
    """Labelled spaxels in these steps."""
    seconds: float = 0.0
    """Training time in this epoch."""
    best: float = -math.inf
    """Best monitored value; larger is better."""
    best_epoch: int = -1
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    """Rows of metrics.csv."""


class Stopper:
    """Remember that a signal asked for an end."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, *numbers: signal.Signals) -> Iterator[None]:
        """Listen to these signals (only the main thread may), unless they are to be ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
        before = {n: signal.signal(n, self._note) for n in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        log.info("%s: stopping after this step", signal.Signals(number).name)
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C ends it at once


@dataclass
class Training:
    """Everything that one run works with."""

    config: TrainConfig
    run_dir: Path
    device: torch.device
    loaders: dict[str, DataLoader]
    model: SSFTT
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    about: dict[str, Any]
    """Content of model.json."""
    progress: Progress = field(default_factory=Progress)
    cutout_logits: Callable[..., Tensor] = SSFTT_dense.cutout_logits
    """Of cutouts; compiled with --compile."""

    @property
    def batches(self) -> Batches:
        """Sampler of the training part."""
        sampler = self.loaders["train"].batch_sampler
        assert isinstance(sampler, Batches)
        return sampler

    @property
    def n_classes(self) -> int:
        """Classes of the task."""
        return len(self.config.spec.class_names)


# One epoch


def train_epoch(training: Training, stopper: Stopper) -> bool:
    """Take the steps of the epoch that are left; False if a signal ended it early."""
    torch.backends.cudnn.benchmark = True  # shapes repeat: pick convolutions by trial
    config, progress = training.config, training.progress
    model, device, scaler = training.model.train(), training.device, training.scaler
    training.batches.set_epoch(progress.epoch, skip=progress.step)
    start, seconds_before = time.monotonic(), progress.seconds
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    unchecked: list[tuple[Tensor, Tensor]] = []  # losses and rows, left on the device for a while

    def settle() -> None:
        """Wait for the steps under way and book them."""
        check_losses(training, unchecked)
        progress.seconds = seconds_before + time.monotonic() - start
        loss_sum, hits, weight, seen = sums.tolist()
        progress.loss_sum += loss_sum
        progress.hits += hits
        progress.weight += weight
        progress.seen += int(seen)

    bar = tqdm(
        training.loaders["train"],
        desc=f"epoch {progress.epoch + 1}/{config.epochs}",
        initial=progress.step,
        total=len(training.batches),
        unit="batch",
        leave=False,
        disable=None,
    )
    for batch in bar:
        with torch.autocast(
            device.type, eval_fns.AMP_TYPES[config.amp], enabled=config.amp != "off"
        ):
            loss, booked = batch_loss(
                model, batch, device, config.label_smoothing, training.cutout_logits
            )
        training.optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(training.optimiser)
        scaler.update()
        training.scheduler.step()
        sums += booked
        progress.step += 1
        unchecked.append((loss.detach(), batch.rows))
        if len(unchecked) == CHECK_STEPS:
            check_losses(training, unchecked)
        if stopper.asked:
            settle()
            return False
    settle()
    return True


def batch_loss(
    model: SSFTT,
    batch: Batch | CutoutBatch,
    device: torch.device,
    label_smoothing: float = 0.0,
    cutout_logits: Callable[..., Tensor] = SSFTT_dense.cutout_logits,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of a batch of patches or cutouts.

    Returns
    -------
    loss : ()
        Patches: the mean. Cutouts: the weighted sum over their spaxels, a cutout, whose expected
        value is the mean over patches (`CutoutBatch`).
    booked : (4,) float64
        Weighted sums of losses and hits, sum of weights, number of labelled spaxels.
    """
    patches = batch.patches.to(device, non_blocking=True)
    classes = batch.classes.to(device, non_blocking=True)
    if isinstance(batch, CutoutBatch):
        weights = batch.weights.to(device, non_blocking=True)
        logits = cutout_logits(model, patches, weights)
    else:
        weights = torch.ones_like(classes, dtype=torch.float32)
        logits = model(patches)
    each = F.cross_entropy(
        logits.float(),
        classes,
        reduction="none",
        ignore_index=LABEL_NONE,
        label_smoothing=label_smoothing,
    )
    loss = (each * weights).sum() / len(classes)
    with torch.no_grad():
        hits = (logits.argmax(1) == classes) * weights
        parts = (loss * len(classes), hits.sum(), weights.sum(), (weights > 0).sum())
        return loss, torch.stack([part.double() for part in parts])


def check_losses(training: Training, losses: list[tuple[Tensor, Tensor]]) -> None:
    """Forget losses that are numbers; stop at one that is none, save its batch, name its files.

    Parameters
    ----------
    training : Training
    losses : list of (loss, rows of the batch)

    Raises
    ------
    DataError
    """
    values = torch.stack([loss for loss, _ in losses]).tolist() if losses else []
    rows = [rows for _, rows in losses]
    losses.clear()
    for loss, where in zip(values, rows, strict=True):
        if not math.isfinite(loss):
            refuse_loss(training, loss, where)


def refuse_loss(training: Training, loss: float, rows: Tensor) -> NoReturn:
    """Save the batch of a loss that is no number, and name its files."""
    config, progress = training.config, training.progress
    samples = _dataset(training.loaders["train"]).samples
    plateifus = sorted({samples.plateifus[samples.galaxy[row]] for row in rows.tolist()})
    out = training.run_dir / NAN_FILE
    utils.write_json(
        out,
        {
            "epoch": progress.epoch,
            "loss": loss,
            "rows": rows.tolist(),
            "spaxels": samples.describe(rows.tolist()),
        },
    )
    root = utils.data_dir(config.data_dir)
    files = [
        str(
            utils.patch_path(root, config.label_task, config.patch_norm, p)
            if config.source == "patches"
            else utils.cube_path(root, p)
        )
        for p in plateifus
    ]
    some = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    raise DataError(
        f"the loss is {loss} in epoch {progress.epoch + 1}; the batch is in {out}. Lower --lr "
        f"({config.lr:g}); if that does not help, look for values that are not finite in {some}."
    )


def validate(training: Training) -> dict[str, float]:
    """Loss and metrics over the validation part."""
    torch.backends.cudnn.benchmark = False  # many shapes, each once an epoch
    loader = training.loaders["val"]
    patchwise = training.config.source == "patches"
    predict = eval_fns.predict_logits if patchwise else predict_fields
    logits, rows = predict(training.model, loader, training.device, training.config.amp)
    classes = _dataset(loader).samples.classes[rows]
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(classes))
    confusion = eval_fns.confusion_matrix(classes, logits.argmax(1), training.n_classes)
    metrics = eval_fns.overall_metrics(confusion)
    return {"loss": float(loss), **{k: float(v) for k, v in metrics.items()}}


@torch.inference_mode()
def predict_fields(
    network: SSFTT,
    loader: DataLoader,
    device: torch.device,
    amp: eval_fns.Amp,
    at_once: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Do as `eval_fns.predict_logits`, whole galaxies at a time: the same numbers, faster.

    A GPU takes `at_once` galaxies together (default by their number of bands), with zeros beside
    the smaller ones, as beyond any field; a CPU one, and computes no zeros.
    """
    dataset, logits, order = _dataset(loader), [], []
    samples = dataset.samples
    if at_once is None:
        at_once = max(1, BANDS_AT_ONCE // dataset.n_bands) if device.type == "cuda" else 1
    step = SHAPE_STEP if at_once > 1 else 1
    network.eval()
    parts = samples.by_galaxy()
    while some := list(itertools.islice(parts, at_once)):
        fields, corners = zip(*(dataset.field(galaxy) for galaxy, _ in some), strict=True)
        ny, nx = (-(-max(f.shape[axis] for f in fields) // step) * step for axis in (3, 4))
        padded = [F.pad(f, (0, nx - f.shape[4], 0, ny - f.shape[3])) for f in fields]
        with torch.autocast(device.type, eval_fns.AMP_TYPES[amp], enabled=amp != "off"):
            cutouts = torch.cat(padded).to(device, non_blocking=True)
            dense = SSFTT_dense.dense_logits(network, cutouts)
        there = [
            (i * ny + samples.y[rows].astype(np.int64) - y) * nx + samples.x[rows] - x
            for i, ((_, rows), (y, x)) in enumerate(zip(some, corners, strict=True))
        ]
        chosen = torch.from_numpy(np.concatenate(there)).to(device)
        logits.append(dense.movedim(1, 3).flatten(0, 2)[chosen].float())
        order += [rows for _, rows in some]
    return torch.cat(logits).cpu().numpy(), np.concatenate(order)


def finish_epoch(training: Training, values: dict[str, float]) -> None:
    """Book an epoch: history, best weights, early stopping."""
    config, progress = training.config, training.progress
    row = {
        "epoch": progress.epoch + 1,
        "train_loss": progress.loss_sum / progress.weight,
        "train_accuracy": progress.hits / progress.weight,
        **{f"val_{k}": v for k, v in values.items()},
        "lr": training.optimiser.param_groups[0]["lr"],
        "seconds": round(progress.seconds, 2),
        "spaxels_per_s": round(progress.seen / max(progress.seconds, 1e-9), 1),
    }
    progress.history.append(row)
    score = -values["loss"] if config.monitor == "loss" else values[config.monitor]
    better = score > progress.best
    if better:
        progress.best, progress.best_epoch = score, progress.epoch + 1
        save_best(training, row)
    left = (config.epochs - progress.epoch - 1) * progress.seconds / 60
    log.info(
        "epoch %d/%d: loss %.4f, accuracy %.3f; validation loss %.4f, accuracy %.3f, macro F1 %.3f"
        "%s; %.0f spaxels/s, %.1f min left",
        progress.epoch + 1,
        config.epochs,
        row["train_loss"],
        row["train_accuracy"],
        values["loss"],
        values["accuracy"],
        values["macro_f1"],
        " (best)" if better else "",
        row["spaxels_per_s"],
        left,
    )
    progress.epoch += 1
    progress.step = progress.seen = 0
    progress.loss_sum = progress.hits = progress.weight = progress.seconds = 0.0
    stale = progress.epoch - progress.best_epoch
    if config.patience and stale >= config.patience:
        log.info("no better epoch in %d: stopping early", stale)
        progress.finished = True
    progress.finished = progress.finished or progress.epoch >= config.epochs


# Files of a run


def save_best(training: Training, row: dict[str, float]) -> None:
    """Write the weights, then the description that names them."""
    weights = {k: v.detach().cpu().contiguous() for k, v in training.model.state_dict().items()}
    training.about["best"] = {**row, "monitor": training.config.monitor}
    best = {"best": json.dumps(training.about["best"])}
    write_tensors(training.run_dir / eval_fns.WEIGHTS_FILE, weights, best)
    utils.write_json(training.run_dir / eval_fns.MODEL_FILE, training.about)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file that others may read, too (its own writer lets nobody)."""
    with utils.atomic_path(path) as part:
        part.write_bytes(save(tensors, metadata))


def save_checkpoint(training: Training) -> None:
    """Write last.pt: all that going on needs, without a pickled object."""
    on_gpu = training.device.type == "cuda"
    content = {
        "model": training.model.state_dict(),
        "optimiser": training.optimiser.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "scaler": training.scaler.state_dict(),
        "progress": asdict(training.progress),
        "rng": {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if on_gpu else None,
        },
        "config": utils.config_dict(training.config),
    }
    with utils.atomic_path(training.run_dir / CHECKPOINT_FILE) as part:
        torch.save(content, part)
    if training.progress.history:
        with utils.atomic_path(training.run_dir / eval_fns.METRICS_FILE) as part:
            pd.DataFrame(training.progress.history).to_csv(part, index=False)


def read_checkpoint(run_dir: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read last.pt; no code in it is run."""
    path = run_dir / CHECKPOINT_FILE
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch has no one error for a damaged file
        raise DataError(
            f"{path}: no readable checkpoint ({error}). Start anew with --overwrite."
        ) from None


def restore(training: Training) -> None:
    """Take up a run where its last.pt left it.

    Raises
    ------
    DataError
        If the run was made with other options than these.
    """
    saved = read_checkpoint(training.run_dir, training.device)
    now = utils.config_dict(training.config)
    then = {**utils.config_dict(TrainConfig()), **saved["config"]}  # older runs lack new options
    changed = [k for k in now if k not in MAY_CHANGE and then[k] != now[k]]
    if changed:
        raise DataError(
            f"{training.run_dir}: the run was made with another {', '.join(changed)}. Give it the "
            f"same options (--config {training.run_dir / eval_fns.CONFIG_FILE} --run-dir "
            f"{training.run_dir}), or start anew with --overwrite."
        )
    training.model.load_state_dict(saved["model"])
    training.optimiser.load_state_dict(saved["optimiser"])
    training.scheduler.load_state_dict(saved["scheduler"])
    training.scaler.load_state_dict(saved["scaler"])
    training.progress = Progress(**saved["progress"])
    if training.progress.epoch < training.config.epochs and not (
        training.config.patience
        and training.progress.epoch - training.progress.best_epoch >= training.config.patience
    ):
        if training.progress.finished:  # more epochs were asked for than the run had
            log.info(
                "going on to epoch %d: the learning rate follows the curve of so many epochs from "
                "here, and rises again",
                training.config.epochs,
            )
        training.progress.finished = False
    elif training.progress.epoch > training.config.epochs:
        log.warning(
            "%s: has %d epochs already, more than --epochs %d",
            training.run_dir,
            training.progress.epoch,
            training.config.epochs,
        )
        training.progress.finished = True
    about = json.loads((training.run_dir / eval_fns.MODEL_FILE).read_text())
    labels = training.about["training_labels"]
    if any(labels[key] != value for key, value in about["training_labels"].items()):
        raise DataError(
            f"{training.run_dir}: the training labels are not those that the run began with. "
            "Start anew with --overwrite."
        )
    if about["cubes"] and training.about["cubes"]:
        where = utils.data_dir(training.config.data_dir) / "processed" / "cubes"
        found, want = (data_io.CubeKind(**a["cubes"]) for a in (training.about, about))
        found.check(where, want, "those that the run began with")
    training.about = about
    torch.set_rng_state(saved["rng"]["torch"].cpu())
    if training.device.type == "cuda" and saved["rng"]["cuda"] is not None:  # None: was on a CPU
        torch.cuda.set_rng_state(saved["rng"]["cuda"].cpu())


def check_inputs(config: TrainConfig, run_dir: Path) -> None:
    """Raise a DataError if a run to be resumed would go on with other galaxies or statistics."""
    root = utils.data_dir(config.data_dir)
    folders = utils.split_path(root, config.split), run_dir / eval_fns.SPLIT_FOLDER
    now, then = (data_io.read_split(folder)[0] for folder in folders)
    changed = [part for part in then if not then[part].equals(now[part])]
    if config.patch_norm == "PCA":
        paths = utils.stats_path(root, config.split), run_dir / eval_fns.STATS_FILE
        ours, other = (data_io.read_stats(path).sha256 for path in paths)
        changed += ["statistics"] if ours != other else []
    if changed:
        raise DataError(
            f"{folders[0]}: made anew since {run_dir} began ({', '.join(changed)} differ). "
            f"Start anew with --overwrite, or put back the split of which {folders[1]} is a copy."
        )


def choose_run_dir(config: TrainConfig) -> tuple[Path, bool]:
    """Folder of the run, and whether a run there is to be resumed.

    Raises
    ------
    DataError
        If the folder holds a run and the options do not say what to do with it, or things of
        other making that a run would replace.
    """
    if config.run_dir is None:
        if config.resume == "auto":
            mine = _comparable(utils.config_dict(config))
            runs = [p.parent for p in RUNS_FOLDER.glob(f"*/{CHECKPOINT_FILE}")]
            for run in sorted(runs, key=lambda r: -(r / CHECKPOINT_FILE).stat().st_mtime_ns):
                saved = run / eval_fns.CONFIG_FILE
                if saved.is_file() and _comparable(json.loads(saved.read_text())) == mine:
                    return run, True
        name = f"{time.strftime('%Y%m%dT%H%M%S')}_{config.label_task}_{config.patch_norm}"
        return RUNS_FOLDER / name, False
    run_dir = Path(config.run_dir)
    if (run_dir / CHECKPOINT_FILE).is_file():
        if config.resume == "auto" and not config.overwrite:
            return run_dir, True
        if not config.overwrite:
            raise DataError(
                f"{run_dir}: holds a run. Go on with it by --resume auto, or replace it by "
                "--overwrite."
            )
    theirs = [name for name in RUN_FILES if (run_dir / name).exists()]
    if theirs and not _is_run(run_dir):
        raise DataError(
            f"{run_dir}: holds {', '.join(theirs)}, but no run. Choose an empty or new --run-dir."
        )
    return run_dir, False


def _is_run(run_dir: Path) -> bool:
    """Say whether a folder is one that this script made."""
    try:
        saved = json.loads((run_dir / eval_fns.CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and {"label_task", "patch_norm", "split_dir"} <= set(saved)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Options that make a run, those that an older run lacks at their defaults."""
    config = {**utils.config_dict(TrainConfig()), **config}
    return {k: v for k, v in config.items() if k not in NOT_THE_RUN}


def check_options(config: TrainConfig) -> None:
    """Raise a DataError at numbers that no training can have; before anything is written."""
    wrong = {
        "--lr": not 0 <= config.lr < math.inf,
        "--weight-decay": not 0 <= config.weight_decay < math.inf,
        "--dropout": not 0 <= config.dropout < 1,
        "--label-smoothing": not 0 <= config.label_smoothing < 1,
        "--cutout": config.cutout < 1 or config.cutout % 2 == 0,
        "--patch-size": config.patch_size < 1,
        "--spectral-kernel": config.spectral_kernel < 1,
        "--spectral-stride": config.spectral_stride < 1,
        "--epochs": config.epochs < 1,
        "--batch-size": config.batch_size < 1,
        "--samples-per-epoch": config.samples_per_epoch is not None
        and config.samples_per_epoch < 1,
        "--patience": config.patience < 0,
        "--workers": config.workers < 0,
        "--seed": config.seed < 0,
    }
    for flag, is_wrong in wrong.items():
        if is_wrong:
            value = getattr(config, flag[2:].replace("-", "_"))
            raise DataError(f"{flag} {value}: out of range; --help says what it is.")


def start_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Make the folder and write all that is known before the first step."""
    root = utils.data_dir(config.data_dir)
    data_io.read_split(utils.split_path(root, config.split))  # first: no folder without a split
    write_config(config, run_dir)
    for name in (eval_fns.WEIGHTS_FILE, eval_fns.MODEL_FILE, eval_fns.BASELINE_FILE, NAN_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for name in (CHECKPOINT_FILE, eval_fns.METRICS_FILE, eval_fns.STATS_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for results in (*utils.SPLIT_PARTS, eval_fns.MAPS_FOLDER, eval_fns.FIGURES_FOLDER):
        shutil.rmtree(run_dir / results, ignore_errors=True)
    for part in utils.SPLIT_PARTS:
        copy_file(
            utils.split_path(root, config.split, part),
            run_dir / eval_fns.SPLIT_FOLDER / f"{part}.csv",
        )
    stats = utils.stats_path(root, config.split)
    if config.patch_norm == "PCA" and stats.is_file():
        copy_file(stats, run_dir / eval_fns.STATS_FILE)


def write_config(config: TrainConfig, run_dir: Path) -> None:
    """Write a run's options, but not where and how they were started."""
    start = TrainConfig()
    config = replace(config, **{name: getattr(start, name) for name in NOT_THE_RUN})
    utils.write_json(run_dir / eval_fns.CONFIG_FILE, utils.config_dict(config))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    with utils.atomic_path(target) as part:
        shutil.copyfile(source, part)


# Data, baselines, set-up


def _dataset(loader: DataLoader) -> PatchDataset:
    assert isinstance(loader.dataset, PatchDataset)
    return loader.dataset


def sample_spectra(dataset: PatchDataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw samples without replacement: rows (n,), ascending, and spectra (n, band) float64."""
    n = len(dataset)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(n, size=min(n, SOME_SPECTRA), replace=False))
    return rows, dataset.centres(rows).astype(np.float64)


def start_projection(model: SSFTT, dataset: PatchDataset, seed: int) -> None:
    """Start a learned projection as the whitened principal components of the samples' spectra.

    From random weights, training on cutouts hardly gets going (docs/science_choices.md).

    Raises
    ------
    DataError
        If there are fewer samples than components.
    """
    from sklearn.decomposition import PCA

    _, spectra = sample_spectra(dataset, seed)
    k = model.config.projection or 0
    if len(spectra) <= k:
        raise DataError(f"--projection {k}: needs more than the {len(spectra)} training samples.")
    pca = PCA(k, svd_solver="covariance_eigh").fit(spectra)
    parts = (hsi_proc_fns.whitening(pca.components_, pca.explained_variance_), pca.mean_)
    device = next(model.parameters()).device
    model.start_projection(*(torch.from_numpy(p.astype(np.float32)).to(device) for p in parts))


def fit_spectrum_baseline(dataset: PatchDataset, seed: int) -> dict[str, Tensor]:
    """Fit a logistic regression to the samples' own spectra, without their neighbours.

    Returns
    -------
    dict of weight (classes, band) and bias (classes,)
        The scaling, the principal components and the regression are linear: one matrix holds
        all. Classes that never occur get a bias of -inf.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    rows, spectra = sample_spectra(dataset, seed)
    classes = dataset.samples.classes[rows]
    n_classes, n_bands = len(dataset.spec.class_names), spectra.shape[1]
    weight = np.zeros((n_classes, n_bands))
    bias = np.full(n_classes, -np.inf)
    present = np.unique(classes)
    if present.size == 1:
        bias[present] = 0.0
    else:
        pca = PCA(min(BASELINE_COMPONENTS, n_bands, len(rows)), random_state=seed, whiten=True)
        regression = LogisticRegression(max_iter=300).fit(pca.fit_transform(spectra), classes)
        coefficients, intercept = regression.coef_, regression.intercept_
        if present.size == 2:  # sklearn keeps one row for two classes
            coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
            intercept = np.concatenate([-intercept / 2, intercept / 2])
        whiten = hsi_proc_fns.whitening(pca.components_, pca.explained_variance_)
        weight[present] = coefficients @ whiten
        bias[present] = intercept - weight[present] @ pca.mean_
    return {
        "weight": torch.from_numpy(weight.astype(np.float32)),
        "bias": torch.from_numpy(bias.astype(np.float32)),
    }


def score_baselines(training: Training) -> dict[str, float]:
    """Find the validation accuracy of the majority class and of the spectra alone."""
    train, val = (_dataset(training.loaders[p]) for p in ("train", "val"))
    truth = val.samples.classes
    counts = data_fns.class_counts(train.samples, training.n_classes)
    scores = {"val_majority_accuracy": float((truth == counts.argmax()).mean())}
    if training.config.baselines:
        weights = fit_spectrum_baseline(train, training.config.seed)
        write_tensors(training.run_dir / eval_fns.BASELINE_FILE, weights)
        guesses = [
            eval_fns.baseline_logits(weights, val.centres(rows)).argmax(1)
            for rows in np.array_split(np.arange(len(val)), max(1, len(val) // SOME_SPECTRA))
        ]
        scores["val_spectrum_accuracy"] = float((truth == np.concatenate(guesses)).mean())
    return scores


def describe_data(training: Training) -> None:
    """Log what was found: samples of each part and class."""
    names = training.config.spec.class_names
    for part, loader in training.loaders.items():
        samples = _dataset(loader).samples
        counts = data_fns.class_counts(samples, len(names))
        log.info(
            "%s: %d observations of galaxies, %d spaxels (%s)",
            part,
            len(samples.plateifus),
            len(samples),
            ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=True)),
        )
        absent = [name for name, count in zip(names, counts, strict=True) if not count]
        if absent and part == "train":
            log.warning("no training spaxel is %s: nothing of it can be learned", ", ".join(absent))


def describe_model(config: TrainConfig, loader: DataLoader, model: SSFTT) -> dict[str, Any]:
    """Content of model.json: all that using the model needs to know."""
    dataset = _dataset(loader)
    samples, names = dataset.samples, config.spec.class_names
    return {
        "schema": eval_fns.MODEL_SCHEMA,
        "schema_version": eval_fns.MODEL_VERSION,
        "model": asdict(model.config),
        "parameters": count_parameters(model),
        "patch": asdict(config.spec),
        "class_names": names,
        "cubes": dataset.kind and dataset.kind._asdict(),
        "split_dir": config.split,
        "data_dir": str(utils.data_dir(config.data_dir).resolve()),
        "training_labels": {
            "class_counts": data_fns.class_counts(samples, len(names)).tolist(),
            "median": float(np.median(samples.values)),
            "class_values": class_values(samples, config.spec),
            "options": samples.label_options,
        },
        "code_version": utils.VERSION,
    }


def class_values(samples: data_fns.Samples, spec: PatchSpec) -> list[float] | None:
    """Mean 12+log(O/H) of each class's training spaxels, dex; of an empty class its middle."""
    if spec.label_task != "logOH":
        return None
    means = class_middles(spec.n_classes)
    for k in np.unique(samples.classes):
        means[k] = samples.values[samples.classes == k].mean(dtype=float)
    return means.tolist()


def learning_rate(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate at a step, as a share of the peak."""
    total = max(1, config.epochs * steps_per_epoch)

    def share(step: int) -> float:
        if config.schedule == "constant":
            return 1.0
        phase = math.pi * min(step, total) / total
        return FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(phase)) / 2

    return share


def set_up(config: TrainConfig, run_dir: Path) -> Training:
    """Make loaders, model and optimiser from the config and its seed."""
    device = eval_fns.pick_device(config.device)
    root = utils.data_dir(config.data_dir)
    sampler_seed, weight_seed = (
        int(s.generate_state(1)[0]) for s in np.random.SeedSequence(config.seed).spawn(2)
    )
    loaders = data_fns.get_dataloaders(
        root,
        config.split,
        config.spec,
        config.source,
        ("train", "val"),
        batch_size=config.batch_size,
        seed=sampler_seed,
        balance=config.balance,
        augment=config.augment,
        num_samples=config.samples_per_epoch,
        workers=config.workers,
        cache_gb=config.cache_gb,
        pin_memory=device.type == "cuda",
        cutout=config.cutout,
        packed_type=config.packed_type,
        device=device,
    )
    if min(config.batch_size, len(_dataset(loaders["train"]))) < 2 and config.cutout == 1:
        raise DataError("batch statistics need two patches: choose a larger --batch-size or split.")
    torch.manual_seed(weight_seed)
    model = get_SSFTT_model(
        n_classes=len(config.spec.class_names),
        patch_size=config.patch_size,
        bands=_dataset(loaders["train"]).n_bands,
        n_tokens=config.n_tokens,
        dropout=config.dropout,
        spectral_kernel=config.spectral_kernel,
        spectral_stride=config.spectral_stride,
        projection=config.projection,
    ).to(device)
    if config.projection:
        start_projection(model, _dataset(loaders["train"]), weight_seed)
    cutout_logits = compile_steps(model) if config.compile else SSFTT_dense.cutout_logits
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    steps = len(loaders["train"].batch_sampler)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, learning_rate(config, steps))
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    about = describe_model(config, loaders["train"], model)
    parts = (loaders, model, optimiser, scheduler, scaler, about)
    return Training(config, run_dir, device, *parts, cutout_logits=cutout_logits)


def compile_steps(model: SSFTT) -> Callable[..., Tensor]:
    """Compile the model's forward; return `SSFTT_dense.cutout_logits` compiled.

    Shapes repeat in training, so each is compiled for itself; those of maps do not.
    """
    model.forward = torch.compile(model.forward, dynamic=False)  # type: ignore[method-assign]
    return torch.compile(SSFTT_dense.cutout_logits, dynamic=False)


def train(training: Training, stopper: Stopper) -> int:
    """Train until done or told to stop; return the exit code."""
    progress = training.progress
    while not progress.finished:
        whole = train_epoch(training, stopper)
        if whole:
            finish_epoch(training, validate(training))
        save_checkpoint(training)
        if stopper.asked and not progress.finished:
            log.info(
                "stopped in epoch %d after step %d; go on with --resume auto --run-dir %s",
                progress.epoch + 1,
                progress.step,
                training.run_dir,
            )
            return utils.EXIT_AGAIN
    return utils.EXIT_DONE


def main(config: TrainConfig) -> int:
    """Train as the config says; return the exit code."""
    check_options(config)
    run_dir, resuming = choose_run_dir(config)
    stopper = Stopper()
    with stopper.listening(signal.SIGUSR1, signal.SIGTERM):
        if resuming:
            check_inputs(config, run_dir)
        training = set_up(config, run_dir)
        with utils.locked(run_dir, "another process trains here"):
            if not resuming:  # now that everything is there, and not before: it replaces a run
                if not config.overwrite and (run_dir / CHECKPOINT_FILE).is_file():
                    raise DataError(f"{run_dir}: holds a run, of another process just now.")
                start_run_dir(config, run_dir)
            utils.setup_logging(run_dir / LOG_FILE)
            return run(training, stopper, resuming)


def run(training: Training, stopper: Stopper, resuming: bool) -> int:
    """Describe, restore or begin, train and report; return the exit code."""
    config, run_dir = training.config, training.run_dir
    log.info("SSFTT training %s, torch %s", utils.VERSION, torch.__version__)
    log.info("device %s, %d CPUs, run folder %s", training.device, utils.cpu_count(), run_dir)
    describe_data(training)
    log.info(
        "model: %d parameters, patches of %d bands x %d x %d spaxels",
        count_parameters(training.model),
        training.model.config.bands,
        config.patch_size,
        config.patch_size,
    )
    if config.cutout > 1 and config.patch_norm == "global" and not config.projection:
        log.warning(
            "cutouts of cubes normed globally hardly train: choose --patch-norm spectral or PCA, "
            "or --cutout 1 (docs/science_choices.md)"
        )
    if resuming:
        restore(training)
        if training.progress.finished:
            log.info("%s: the run is finished; nothing to do", run_dir)
            return utils.EXIT_DONE
        write_config(config, run_dir)  # some options may change
        log.info("going on in epoch %d", training.progress.epoch + 1)
    else:
        utils.write_json(run_dir / ENVIRONMENT_FILE, utils.environment())
        training.about["baselines"] = score_baselines(training)
        log.info("without a network: %s", _in_words(training.about["baselines"]))
        utils.write_json(run_dir / eval_fns.MODEL_FILE, training.about)
    with stopper.listening(signal.SIGINT):
        code = train(training, stopper)
    if code == utils.EXIT_DONE:
        report(training)
    return code


def _in_words(scores: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())


def report(training: Training) -> None:
    """Log the best epoch beside the baselines, and where everything lies."""
    best, baselines = training.about.get("best") or {}, training.about.get("baselines") or {}
    log.info(
        "best epoch %d: validation accuracy %.3f, macro F1 %.3f; %s",
        best.get("epoch", 0),
        best.get("val_accuracy", math.nan),
        best.get("val_macro_f1", math.nan),
        _in_words(baselines),
    )
    log.info(
        "results in %s; next: python eval_fns.py --run-dir %s", training.run_dir, training.run_dir
    )


if __name__ == "__main__":
    utils.run_command(main, TrainConfig, __doc__)
