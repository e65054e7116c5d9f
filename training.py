"""The training loop: one epoch, validation, checkpoints, and stopping on a signal.

Everything is prepared by run_SSFTT_training.py; `train` works with the `Training` it is given. All
files are written through run_folder.py.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import utils
from utils import DataError

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
import intervals
import metrics
import networks
import run_folder
from batches import Batch, CutoutBatch, SpaxelBatchSampler, dataset_of
from data_fns import DataOptions
from inference import AMP_TYPES, Amp, sample_outputs
from networks import Network
from run_folder import ModelCard

log = logging.getLogger(__name__)

SHOWN = ("accuracy", "macro_f1", "mae_dex")
"""Validation scores that are logged."""
START_MARGIN = 0.05
"""Share of its error by which training has to improve on a start in closed form. Smaller gains on
the validation galaxies were not found on other galaxies, and models with them did worse on a real
one (docs/lab_notes.md#what-training-adds-to-the-start)."""
CHECK_STEPS = 50
"""Steps between two checks of the losses, for each of which a GPU has to wait."""


@dataclass(frozen=True)
class OptimisationOptions:
    """How the network learns."""

    epochs: int | None = None
    """Passes over the training samples; default 8 for matched filters, 30 for SSFTT."""
    lr: float | None = None
    """Peak learning rate of Adam; default 1.5e-3 for matched filters, 1e-3 for SSFTT (where that
    learns full spectra or a projection on cutouts, 3e-4 is better)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the epochs."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    label_smoothing: float = 0.0
    """Fraction of the target spread evenly over the classes."""
    monitor: Literal["accuracy", "macro_f1", "loss", "mae_dex"] | None = None
    """Validation score that selects the best epoch; default mae_dex where metallicities are learned
    in dex, else accuracy."""
    patience: int = 8
    """Stop after this number of epochs without a better one; 0: never."""
    baselines: bool = True
    """Also fit a baseline to single spectra: line ratios, or for SSFTT principal components."""
    amp: Amp = "off"
    """Mixed precision."""


@dataclass
class Progress:
    """State of a run; saved with the weights."""

    epoch: int = 0
    """Current epoch, from 0; earlier ones are finished."""
    step: int = 0
    """Finished steps of the current epoch."""
    loss_sum: float = 0.0
    hits: float = 0.0
    weight: float = 0.0
    """Sums over these steps, of weighted spaxels; a patch has weight 1."""
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


@dataclass
class Training:
    """Everything that one run works with."""

    data: DataOptions
    options: OptimisationOptions
    run_dir: Path
    device: torch.device
    loaders: dict[str, DataLoader]
    model: Network
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    card: ModelCard
    config: dict[str, Any]
    """All options as plain values, for the record."""
    cutout_outputs: Callable[..., Tensor] = networks.cutout_outputs
    """Of cutouts; compiled with --compile."""
    average: AveragedModel | None = None
    """Running mean of the weights, for networks that are evaluated with it."""
    progress: Progress = field(default_factory=Progress)

    @property
    def epochs(self) -> int:
        """Passes over the training samples."""
        assert self.options.epochs is not None
        return self.options.epochs

    @property
    def evaluated(self) -> Network:
        """Network that is validated and saved."""
        return self.model if self.average is None else cast(Network, self.average.module)

    @property
    def sampler(self) -> SpaxelBatchSampler:
        """Sampler of the training part."""
        sampler = self.loaders["train"].batch_sampler
        assert isinstance(sampler, SpaxelBatchSampler)
        return sampler


class Stopper:
    """Remember that a signal requested the end of the run."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def handling(self, *numbers: signal.Signals) -> Iterator[None]:
        """Handle these signals (only the main thread can), unless they are to be ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
        before = {n: signal.signal(n, self._note) for n in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        log.info("%s: stopping after this step", signal.Signals(number).name)
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C ends it at once


# One epoch


def train_epoch(training: Training, stopper: Stopper) -> bool:
    """Take the remaining steps of the epoch; False if a signal ended it early."""
    torch.backends.cudnn.benchmark = True  # shapes repeat: choose convolutions by trial
    options, progress = training.options, training.progress
    device, scaler = training.device, training.scaler
    largest = networks.USUAL[training.data.network].largest_gradient
    training.model.train()
    training.sampler.set_epoch(progress.epoch, skip=progress.step)
    start, seconds_before = time.monotonic(), progress.seconds
    sums, stopped = torch.zeros(4, dtype=torch.float64, device=device), False
    unchecked: list[tuple[Tensor, Tensor]] = []  # losses and rows, left on the device for a while

    bar = tqdm(
        training.loaders["train"],
        desc=f"epoch {progress.epoch + 1}/{training.epochs}",
        initial=progress.step,
        total=len(training.sampler),
        unit="batch",
        leave=False,
        disable=None if distributed.is_first() else True,
    )
    for batch in bar:
        distributed.seed_step(training.config["seed"], progress.epoch, progress.step)
        with torch.autocast(device.type, AMP_TYPES[options.amp], enabled=options.amp != "off"):
            loss, booked = batch_loss(training, batch)
        training.optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        distributed.sum_gradients(training.model.parameters(), len(batch.rows))
        if largest is not None:
            scaler.unscale_(training.optimiser)
            torch.nn.utils.clip_grad_norm_(training.model.parameters(), largest)
        scaler.step(training.optimiser)
        scaler.update()
        training.scheduler.step()
        if training.average is not None:
            training.average.update_parameters(training.model)
        sums += booked
        progress.step += 1
        unchecked.append((loss.detach(), batch.rows))
        if len(unchecked) == CHECK_STEPS:
            check_losses(training, unchecked)
        if stopped := distributed.any_of(stopper.requested):
            break
    check_losses(training, unchecked)
    progress.seconds = seconds_before + time.monotonic() - start
    loss_sum, hits, weight, seen = distributed.total(sums).tolist()
    progress.loss_sum += loss_sum
    progress.hits += hits
    progress.weight += weight
    progress.seen += int(seen)
    return not stopped


def batch_loss(training: Training, batch: Batch | CutoutBatch) -> tuple[Tensor, Tensor]:
    """Loss of a batch of patches or cutouts.

    Returns
    -------
    loss : ()
        Patches: the mean. Cutouts: the mean over cutouts of the weighted sum over their spaxels,
        whose expected value is the mean over patches (`CutoutBatch`).
    booked : (4,) float64
        Weighted sums of losses and hits, sum of weights, number of labelled spaxels.
    """
    device, model = training.device, training.model
    patches, classes, values = (
        part.to(device, non_blocking=True) for part in (batch.patches, batch.classes, batch.values)
    )
    if isinstance(batch, CutoutBatch):
        weights = batch.weights.to(device, non_blocking=True)
        outputs = training.cutout_outputs(model, patches, weights)
    else:
        weights = torch.ones_like(classes, dtype=torch.float32)
        outputs = model(patches)
    each = networks.losses(model, outputs, classes, values, training.options.label_smoothing)
    loss = (each * weights).sum() / len(classes)
    with torch.no_grad():
        found = networks.classes_of(model, outputs, training.card.edges)
        hits = (found == classes) * weights
        parts = (loss * len(classes), hits.sum(), weights.sum(), (weights > 0).sum())
        return loss, torch.stack([part.double() for part in parts])


def check_losses(training: Training, losses: list[tuple[Tensor, Tensor]]) -> None:
    """Stop at a loss that is not finite; drop the finite ones from the list.

    Parameters
    ----------
    training : Training
    losses : list of (loss, rows of the batch)
    """
    if not losses:
        return
    values = distributed.total(torch.stack([loss for loss, _ in losses])).tolist()
    rows = [rows for _, rows in losses]
    losses.clear()
    for loss, where in zip(values, rows, strict=True):
        if not math.isfinite(loss):
            refuse_loss(training, loss, where)


def refuse_loss(training: Training, loss: float, rows: Tensor) -> NoReturn:
    """Save the batch of a loss that is not finite, and raise a DataError that names its files."""
    data, progress = training.data, training.progress
    samples = dataset_of(training.loaders["train"]).samples
    whole = sorted(row for part in distributed.gathered(rows.tolist()) for row in part)
    plateifus = sorted({samples.plateifus[samples.galaxy[row]] for row in whole})
    out = training.run_dir / run_folder.NAN_FILE
    content = {
        "epoch": progress.epoch,
        "loss": loss,
        "rows": whole,
        "spaxels": samples.spaxel_names(whole),
    }
    if distributed.is_first():
        utils.write_json(out, content)
    files = [
        str(
            data.spec.patch_file(data.root, p)
            if data.source == "patches"
            else utils.cube_path(data.root, p)
        )
        for p in plateifus
    ]
    some = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    raise DataError(
        f"the loss is {loss} in epoch {progress.epoch + 1}, expected a finite number; {out} lists "
        f"the batch. Lower --lr ({training.options.lr:g}); if that does not help, look for values "
        f"that are not finite in {some}."
    )


def validate(training: Training) -> dict[str, float]:
    """Loss and scores over the validation part; calibrates intervals with it."""
    torch.backends.cudnn.benchmark = False  # many shapes, each once per epoch
    loader, model, card = training.loaders["val"], training.evaluated, training.card
    outputs, rows = validation_outputs(model, loader, training.device, training.options.amp)
    samples = dataset_of(loader).samples
    classes, values = samples.classes[rows], samples.values[rows]
    truth = [torch.from_numpy(part).to(training.device) for part in (classes, values)]
    losses = networks.losses(model, outputs.to(training.device), truth[0], truth[1])
    found = networks.answer(model, outputs, card.edges, card.dex_values)
    confusion = metrics.confusion_matrix(classes, found.classes, len(card.class_names))
    scores = {"loss": losses.mean(), **metrics.overall_metrics(confusion)}
    if found.value is not None:
        scores["mae_dex"] = np.abs(found.value - values).mean()
    learned = list(dataset_of(training.loaders["train"]).samples.mangaids.values())
    galaxy = np.array([samples.mangaids[p] for p in samples.plateifus])[samples.galaxy[rows]]
    is_new = ~np.isin(galaxy, learned)  # in an easy split, galaxies are in both
    card.calibration = intervals.calibrate(
        found.value, values, found.scale, found.unlikeness, galaxy, is_new
    )
    return {k: float(v) for k, v in scores.items()}  # type: ignore[arg-type]


def validation_outputs(
    model: Network, loader: DataLoader, device: torch.device, amp: Amp
) -> tuple[Tensor, np.ndarray]:
    """Like `sample_outputs`; several processes divide the galaxies among themselves."""
    k, n = distributed.share()
    if n == 1:
        return sample_outputs(model, loader, device, amp)
    has_any = k < len(np.unique(dataset_of(loader).samples.galaxy))
    part = sample_outputs(model, loader, device, amp, (k, n)) if has_any else None
    outputs, rows = zip(*filter(None, distributed.gathered(part)), strict=True)
    order = np.argsort(np.concatenate(rows))
    return torch.cat(outputs)[torch.from_numpy(order)], np.concatenate(rows)[order]


def finish_epoch(training: Training, scores: dict[str, float]) -> None:
    """Record an epoch: history, best weights, early stopping."""
    options, progress = training.options, training.progress
    if not math.isfinite(scores["loss"]):
        raise DataError(
            f"{training.run_dir}: the validation loss is {scores['loss']} in epoch "
            f"{progress.epoch + 1}, expected a finite number; the best epoch so far is kept. Lower "
            f"--lr ({options.lr:g})."
        )
    row = {
        "epoch": progress.epoch + 1,
        "train_loss": progress.loss_sum / progress.weight,
        "train_accuracy": progress.hits / progress.weight,
        **{f"val_{k}": v for k, v in scores.items()},
        "lr": training.optimiser.param_groups[0]["lr"],
        "seconds": round(progress.seconds, 2),
        "spaxels_per_s": round(progress.seen / max(progress.seconds, 1e-9), 1),
    }
    progress.history.append(row)
    better = keep_if_best(training, row)
    log.info(
        "epoch %d/%d: loss %.4f, accuracy %.3f; validation loss %.4f, %s%s; %.0f spaxels/s, "
        "%.1f min left",
        progress.epoch + 1,
        training.epochs,
        row["train_loss"],
        row["train_accuracy"],
        scores["loss"],
        in_words({k: v for k, v in scores.items() if k in SHOWN}),
        " (best)" if better else "",
        row["spaxels_per_s"],
        (training.epochs - progress.epoch - 1) * progress.seconds / 60,
    )
    progress.epoch += 1
    progress.step = progress.seen = 0
    progress.loss_sum = progress.hits = progress.weight = progress.seconds = 0.0
    if out_of_patience(training):
        log.info("stopping early: no better epoch in %d", progress.epoch - progress.best_epoch)
    progress.finished = out_of_patience(training) or progress.epoch >= training.epochs


def keep_if_best(training: Training, row: dict[str, float]) -> bool:
    """Write the weights if they are the best so far; `row` as in metrics.csv. Say whether."""
    monitor, progress = training.options.monitor, training.progress
    assert monitor is not None
    score = row[f"val_{monitor}"] * (-1 if monitor in ("loss", "mae_dex") else 1)
    better = score > progress.best
    if better:
        progress.best, progress.best_epoch = score, int(row["epoch"])
        training.card.best = {**row, "monitor": monitor}
        if distributed.is_first():
            run_folder.write_best(training.run_dir, training.card, training.evaluated.state_dict())
    return better


def keep_start(training: Training) -> None:
    """Count a start in closed form as epoch 0: kept unless training improves on it clearly."""
    scores = {f"val_{k}": v for k, v in validate(training).items()}
    keep_if_best(training, {"epoch": 0, **scores})
    monitor = training.card.best["monitor"]
    value = scores[f"val_{monitor}"]
    # errors that are smaller by a share lower the loss, a log likelihood, by that share
    error = {"mae_dex": value, "loss": 1.0}.get(monitor, 1 - value)
    training.progress.best += START_MARGIN * error
    log.info(
        "start: %s; kept unless an epoch is better by %.0f %%",
        in_words({f"val_{k}": scores[f"val_{k}"] for k in SHOWN if f"val_{k}" in scores}),
        100 * START_MARGIN,
    )


def out_of_patience(training: Training) -> bool:
    """Say whether too many epochs have passed since the best one."""
    patience, progress = training.options.patience, training.progress
    return bool(patience) and progress.epoch - progress.best_epoch >= patience


# Checkpoints


def save_checkpoint(training: Training) -> None:
    """Save everything that continuing the run needs."""
    on_gpu = training.device.type == "cuda"
    content = {
        "model": training.model.state_dict(),
        "average": training.average.state_dict() if training.average is not None else None,
        "optimiser": training.optimiser.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "scaler": training.scaler.state_dict(),
        "progress": asdict(training.progress),
        "rng": {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if on_gpu else None,
        },
        "config": training.config,
    }
    if distributed.is_first():
        run_folder.write_checkpoint(training.run_dir, content, training.progress.history)
    distributed.wait_for_all()  # the first one to end may end the others


def restore(training: Training) -> None:
    """Continue a run from its last.pt.

    Raises
    ------
    DataError
        If the run was made with other options or data than those of now.
    """
    run_dir, epochs = training.run_dir, training.epochs
    card = ModelCard.read(run_dir)
    remedy = "Start again with --overwrite, or put back what the run began with"
    training.card.recipe.require(card.recipe, run_dir, remedy)
    training.card = card
    saved = run_folder.read_checkpoint(run_dir, training.device)
    path = run_dir / run_folder.CHECKPOINT_FILE
    with utils.reading(path, "the checkpoint of this run", "Start again with --overwrite."):
        training.model.load_state_dict(saved["model"])
        if training.average is not None:
            training.average.load_state_dict(saved["average"])
        training.optimiser.load_state_dict(saved["optimiser"])
        training.scheduler.load_state_dict(saved["scheduler"])
        training.scaler.load_state_dict(saved["scaler"])
        training.progress = progress = Progress(**saved["progress"])
        torch.set_rng_state(saved["rng"]["torch"].cpu())
        if training.device.type == "cuda" and saved["rng"]["cuda"] is not None:  # None: of a CPU
            torch.cuda.set_rng_state(saved["rng"]["cuda"].cpu())
    if progress.epoch > epochs:
        log.warning(
            "%s: has %d epochs already, more than --epochs %d", run_dir, progress.epoch, epochs
        )
    was_finished = progress.finished
    progress.finished = progress.epoch >= epochs or out_of_patience(training)
    if was_finished and not progress.finished:
        log.info(
            "continuing to epoch %d: from here the learning rate follows the curve of a run of "
            "this length, and rises again",
            epochs,
        )


# The loop


def in_words(scores: dict[str, float]) -> str:
    """List scores with three decimals, errors in dex with four."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.{4 if name.endswith('dex') else 3}f}"
        for name, value in scores.items()
    )


def train(training: Training, stopper: Stopper) -> int:
    """Train until finished or told to stop; return the exit code."""
    progress, run_dir = training.progress, training.run_dir
    if progress.finished:
        log.info("%s: the run is finished; nothing to do", run_dir)
        return utils.EXIT_DONE
    if networks.USUAL[training.data.network].start_counts and progress.best_epoch < 0:
        keep_start(training)
    while not progress.finished:
        if train_epoch(training, stopper):
            finish_epoch(training, validate(training))
        save_checkpoint(training)
        if distributed.any_of(stopper.requested) and not progress.finished:
            log.info(
                "stopped in epoch %d after step %d; continue with --resume auto --run-dir %s",
                progress.epoch + 1,
                progress.step,
                run_dir,
            )
            return utils.EXIT_AGAIN
    best = training.card.best
    log.info(
        "best epoch %d: %s; without a network: %s",
        best.get("epoch", 0),
        in_words({f"val_{k}": best[f"val_{k}"] for k in SHOWN if f"val_{k}" in best}),
        in_words(training.card.baselines),
    )
    calibration = training.card.calibration
    if training.card.class_values and calibration.galaxies < intervals.ENOUGH_GALAXIES:
        log.warning(
            "%d validation galaxies calibrate the intervals (galaxies that were trained on do not "
            "count), fewer than the %d that assure the coverage of others; with none, there "
            "are no intervals. Use a split by galaxies (create_data_splits.py) with a larger "
            "validation part",
            calibration.galaxies,
            intervals.ENOUGH_GALAXIES,
        )
    log.info("results in %s; next: python eval_fns.py --run-dir %s", run_dir, run_dir)
    return utils.EXIT_DONE
