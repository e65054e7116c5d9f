"""Train a network on the labelled spaxels of a split.

Without further options this is the recommended recipe: matched filters on packed cubes, which give
metallicities in dex with an interval. --network ssftt trains the published transformer. Statistics
and packed cubes that do not exist yet are created first.

Reads   splits/<split_dir>/, processed/labels, and processed/cubes (through processed/packed) or,
        with --source patches, the files of cube_patch_processing.py.
Writes  <run_dir>/: everything about the run, and all that using the model needs (run_folder.py).

Ctrl-C, SIGUSR1 and SIGTERM end the run after the current step: last.pt is saved, the exit code is
75, and the same command with --resume auto continues as if nothing had happened.

    python run_SSFTT_training.py --label-task logOH
    python run_SSFTT_training.py --label-task logOH --network ssftt
    python run_SSFTT_training.py --config configs/published.json --resume auto
    python run_SSFTT_training.py --config runs/20260101T120000_logOH_residual --seed 1
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import utils
from utils import DataError

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import baselines
import calc_data_stats
import data_fns
import distributed
import line_fits
import matched_filter_net
import network_start
import networks
import run_folder
from batches import PatchDataset, SpaxelBatchSampler, dataset_of
from data_fns import DataOptions
from HSI_SSFTT import count_parameters
from inference import pick_device
from labels import class_middles
from matched_filter_net import MatchedFilterConfig, MatchedFilterNet
from networks import USUAL, Network
from recipe import Recipe, digest_of
from run_folder import ModelCard
from samples import PatchSpec, Samples
from training import OptimisationOptions, Stopper, Training, in_words, restore, train

log = logging.getLogger(__name__)

FINAL_LR = 0.01
"""Learning rate at the end of the cosine, as a fraction of the peak."""
MAY_CHANGE = ("data_dir", "workers", "epochs", "patience", "device")
"""Options that may differ when a run is resumed."""


@dataclass(frozen=True)
class ModelOptions:
    """Size of the network; all but dropout for SSFTT only."""

    dropout: float = 0.1
    """Dropout of tokens and transformer, or of hidden layers."""
    n_tokens: int = 4
    """Tokens that summarise a patch's features."""
    spectral_kernel: int = 3
    """Width of the first convolution along the bands."""
    spectral_stride: int = 1
    """Stride of the first convolution along the bands; kernel 16 and stride 16 train about 10 times
    faster on full spectra."""
    projection: int | None = None
    """First project the bands on this number of learned components, which start as principal
    components of the training spectra."""


@dataclass(frozen=True)
class RunOptions:
    """Where and how the run is carried out."""

    run_dir: Path | None = None
    """Folder for everything the run writes; default ./runs/<time>_<label_task>_<patch_norm>."""
    resume: Literal["no", "auto"] = "no"
    """auto: continue the run in --run-dir, or the newest one with the same options in ./runs; start
    one if there is none."""
    overwrite: bool = False
    """Replace the run in --run-dir by a new one."""
    seed: int = 0
    """Random seed for weight initialisation, sample order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    compile: bool = False
    """Compile the training step (torch.compile): fewer kernel launches on a GPU, after some minutes
    of compiling. Needs a C++ compiler."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a network on the labelled spaxels of a split."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other options."""
        data, optimisation = self.data.resolved(), self.optimisation
        defaults: dict[str, Any] = {
            "epochs": USUAL[data.network].epochs,
            "lr": USUAL[data.network].lr,
            "monitor": "mae_dex" if data.learns_dex else "accuracy",
        }
        given = {k: v for k, v in defaults.items() if getattr(optimisation, k) is None}
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "optimisation", replace(optimisation, **given))

    @staticmethod
    def followers() -> dict[str, tuple[str, ...]]:
        """Options whose defaults depend on another one: see `utils.config_args`."""
        of_network = ("patch_norm", "cutout", "batch_size", "epochs", "lr", "monitor")
        return {"network": of_network, "label_task": ("split_dir", "monitor")}

    @property
    def deciding(self) -> dict[str, Any]:
        """Options that decide what is learned."""
        left_out = {*MAY_CHANGE, "run_dir", "resume", "overwrite", "debug"}
        return {k: v for k, v in utils.config_dict(self).items() if k not in left_out}


def train_config(**options: Any) -> TrainConfig:
    """Make a config from options named like the flags: the way of notebooks and tests."""
    groups: dict[str, Any] = {}
    for name, group in (
        ("data", DataOptions),
        ("model", ModelOptions),
        ("optimisation", OptimisationOptions),
        ("run", RunOptions),
    ):
        names = [f.name for f in fields(group) if f.name in options]
        groups[name] = group(**{n: options.pop(n) for n in names})
    if options:
        raise TypeError(f"unknown options: {', '.join(options)}")
    return TrainConfig(**groups)


# Set-up


def check_options(config: TrainConfig) -> None:
    """Raise a DataError for numbers out of range, before anything is written."""
    data, model, optimisation = config.data, config.model, config.optimisation
    infinity = math.inf
    ranges: dict[str, tuple[float, float, float]] = {  # low <= value < high
        "lr": (optimisation.lr or 0, 0, infinity),
        "weight_decay": (optimisation.weight_decay, 0, infinity),
        "dropout": (model.dropout, 0, 1),
        "label_smoothing": (optimisation.label_smoothing, 0, 1),
        "patch_size": (data.patch_size, 1, infinity),
        "n_tokens": (model.n_tokens, 1, infinity),
        "spectral_kernel": (model.spectral_kernel, 1, infinity),
        "spectral_stride": (model.spectral_stride, 1, infinity),
        "epochs": (optimisation.epochs or 0, 1, infinity),
        "batch_size": (data.batch_size or 0, 1, infinity),
        "samples_per_epoch": (data.samples_per_epoch or 1, 1, infinity),
        "patience": (optimisation.patience, 0, infinity),
        "workers": (data.workers, 0, infinity),
        "seed": (config.run.seed, 0, infinity),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value < high:
            limit = f"{low} or more" if high == infinity else f"at least {low} and below {high}"
            raise DataError(f"--{name.replace('_', '-')} {value:g}: expected {limit}.")
    data.check()
    is_ssftt = data.network == "ssftt"
    if data.learns_dex and optimisation.label_smoothing:
        raise DataError(
            f"--label-smoothing {optimisation.label_smoothing:g}: metallicities are learned in "
            "dex, without classes to smooth. Leave it out, or choose --network ssftt."
        )
    if optimisation.monitor == "mae_dex" and data.label_task != "logOH":
        raise DataError(
            f"--monitor mae_dex with --label-task {data.label_task}: expected metallicities. "
            "Choose --monitor accuracy."
        )
    if not is_ssftt:
        of_ssftt = {"amp": optimisation.amp != "off", "compile": config.run.compile}
        usual = asdict(ModelOptions(model.dropout))
        of_ssftt |= {name: value != usual[name] for name, value in asdict(model).items()}
        for name in (name for name, is_given in of_ssftt.items() if is_given):
            raise DataError(
                f"--{name.replace('_', '-')} with --network matched_filters: expected with SSFTT "
                "alone. Leave it out, or choose --network ssftt."
            )


def create_statistics(data: DataOptions) -> None:
    """Create the statistics of the split if its samples need them and there are none."""
    path = utils.stats_path(data.root, data.split)
    if data.patch_norm == "PCA" and not path.is_file():
        log.info("%s: creating the statistics of the split (calc_data_stats.py)", path)
        calc_data_stats.main(calc_data_stats.Config(data.split, data_dir=data.root))


def set_up(config: TrainConfig, run_dir: Path, resuming: bool = False) -> Training:
    """Make loaders, model and optimiser from the config and its seed.

    A run that is resumed needs no start of the model: it goes on from its checkpoint.
    """
    data, optimisation = config.data, config.optimisation
    device = pick_device(config.run.device)
    sampler_seed, weight_seed = (
        int(s.generate_state(1)[0]) for s in np.random.SeedSequence(config.run.seed).spawn(2)
    )
    assert data.batch_size is not None
    assert optimisation.lr is not None
    with distributed.first_one_ahead():  # which creates what is missing
        create_statistics(data)
        loaders = data_fns.get_dataloaders(data, sampler_seed, ("train", "val"), device)
        share_batches(config, loaders)
    dataset = dataset_of(loaders["train"])
    if min(data.batch_size, len(dataset)) < 2 and data.cutout_size == 1:
        raise DataError(
            f"--batch-size {data.batch_size}, {len(dataset)} training samples: expected at least 2 "
            "patches per step, for batch statistics. Choose a larger --batch-size or split."
        )
    torch.manual_seed(weight_seed)
    model = networks.make_network(data.network, network_sizes(config, dataset)).to(device)
    card = describe_model(config, loaders, model)

    def start() -> dict[str, Tensor]:
        if isinstance(model, MatchedFilterNet):
            network_start.start_filters(model, dataset, card, weight_seed)
        elif config.model.projection:
            network_start.start_projection(model, dataset, weight_seed)
        return {name: value.cpu() for name, value in model.state_dict().items()}

    if not resuming:
        model.load_state_dict(distributed.from_first(start))
    usual, average = USUAL[data.network], None
    if usual.average is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(usual.average))
    optimiser = torch.optim.AdamW(
        networks.parameter_groups(model, optimisation.lr),
        weight_decay=optimisation.weight_decay,
        fused=True,
    )
    steps = len(loaders["train"].batch_sampler)  # type: ignore[arg-type]
    rate = learning_rate(optimisation, steps, usual.warm_up)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    scaler = torch.amp.GradScaler(device.type, enabled=optimisation.amp == "fp16")
    training = Training(
        data=data,
        options=optimisation,
        run_dir=run_dir,
        device=device,
        loaders=loaders,
        model=model,
        optimiser=optimiser,
        scheduler=scheduler,
        scaler=scaler,
        card=card,
        config=utils.config_dict(config),
        average=average,
    )
    if config.run.compile:  # training only: maps come in too many sizes
        model.forward = torch.compile(model.forward, dynamic=False)  # type: ignore[method-assign]
        training.cutout_outputs = torch.compile(networks.cutout_outputs, dynamic=False)
    return training


def share_batches(config: TrainConfig, loaders: dict[str, DataLoader]) -> None:
    """Give each of several processes its share of the training batches.

    Raises
    ------
    DataError
        If they cannot train this network together, or a batch is too small to be shared.
    """
    sampler = loaders["train"].batch_sampler
    assert isinstance(sampler, SpaxelBatchSampler)
    _, n = sampler.share = distributed.share()
    if n > 1 and config.data.network == "ssftt":
        raise DataError(
            f"--network ssftt in {n} processes: its batch statistics would not be those of the "
            "whole batch, expected one process. Start one, or choose --network matched_filters."
        )
    smallest = min(sampler.batch_size, sampler.num_samples)
    if smallest < n:
        raise DataError(
            f"--batch-size {config.data.batch_size}: {smallest} cutouts or patches per step, "
            f"expected at least one for each of {n} processes. Choose a larger --batch-size, a "
            "smaller --cutout, or fewer processes."
        )


def network_sizes(config: TrainConfig, dataset: PatchDataset) -> dict[str, Any]:
    """Fields of the network's config: see `networks.make_network`."""
    data, n_classes = config.data, len(config.data.spec.class_names)
    if data.network == "ssftt":
        sizes = {"n_classes": n_classes, "patch_size": data.patch_size, "bands": dataset.n_bands}
        return {**sizes, **asdict(config.model)}
    bands = matched_filter_net.split(torch.empty(dataset.n_bands)).residual.numel()
    known = line_fits.line_places(baselines.wave_of(dataset.samples.options["cube"]))
    return {
        "bands": bands,
        "lines": len(known) if len(known) > 1 else MatchedFilterConfig.lines,
        "classes": 0 if data.learns_dex else n_classes,
        "window": data.patch_size,
        "dropout": config.model.dropout,
    }


def learning_rate(
    options: OptimisationOptions, steps_per_epoch: int, warm_up: int = 0
) -> Callable[[int], float]:
    """Make the function from a step to its learning rate, as a fraction of the peak."""
    assert options.epochs is not None
    total = max(1, options.epochs * steps_per_epoch)
    if options.schedule == "cosine":
        warm_up = min(warm_up, total // 10)

    def fraction(step: int) -> float:
        rise = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
        if options.schedule == "constant":
            return rise
        phase = math.pi * min(step, total) / total
        return rise * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(phase)) / 2)

    return fraction


def describe_model(
    config: TrainConfig, loaders: dict[str, DataLoader], model: Network
) -> ModelCard:
    """Describe the model and what decides it."""
    data, spec = config.data, config.data.spec
    train, val = (dataset_of(loaders[part]).samples for part in ("train", "val"))
    return ModelCard(
        recipe=run_recipe(config, train, val),
        spec=spec,
        class_names=list(spec.class_names),
        class_counts=train.class_counts(len(spec.class_names)).tolist(),
        class_values=class_values(train.values, train.classes, spec),
        label_median=float(np.median(train.values)),
        network_name=data.network,
        network=asdict(model.config),
        parameters=count_parameters(model),
        split_dir=data.split,
        data_dir=str(data.root.resolve()),
    )


def class_values(labels: np.ndarray, classes: np.ndarray, spec: PatchSpec) -> list[float] | None:
    """Mean 12+log(O/H) of each class's training labels, dex; of an empty class its middle."""
    if spec.label_task != "logOH":
        return None
    values = class_middles(spec.n_classes)
    for k in np.unique(classes):
        values[k] = labels[classes == k].mean(dtype=float)
    return values.tolist()


def run_recipe(config: TrainConfig, train: Samples, val: Samples) -> Recipe:
    """Name what decides a run: options, split, statistics, and every cube and label map."""
    inputs = {
        "split": train.inputs["split"],
        "set of cubes": digest_of([train.cubes, val.cubes]),
        "set of training labels": digest_of([train.label_maps, val.label_maps]),
        **train.inputs,  # statistics
    }
    options = {**config.deciding, **train.options}
    return Recipe("run", run_folder.MODEL_VERSION, options, inputs)


# The run


def main(config: TrainConfig) -> int:
    """Train as the config says; return the exit code."""
    check_options(config)
    run, stopper = config.run, Stopper()
    name = f"{config.data.label_task}_{config.data.patch_norm}"
    with (
        distributed.together(pick_device(run.device)),
        stopper.handling(signal.SIGUSR1, signal.SIGTERM),
    ):
        choose = partial(run_folder.choose, run.run_dir, run.resume == "auto", run.overwrite)
        run_dir, resuming = distributed.from_first(partial(choose, config.deciding, name))
        training, is_first = set_up(config, run_dir, resuming), distributed.is_first()
        lock = utils.locked(run_dir, "another process trains here")
        with lock if is_first else contextlib.nullcontext():
            if is_first and not resuming:  # only now that all is ready: it replaces an old run
                begin(config, training)
            if is_first:
                utils.setup_logging(run_dir / run_folder.LOG_FILE)
                describe_data(training)
            if resuming:
                restore(training)
                log.info("continuing in epoch %d", training.progress.epoch + 1)
            if is_first and resuming:
                write_config(config, run_dir)  # some options may change
            elif is_first:
                score_baselines(training)
            with stopper.handling(signal.SIGINT):
                return train(training, stopper)


def begin(config: TrainConfig, training: Training) -> None:
    """Make the folder of a new run."""
    run_dir = training.run_dir
    if not config.run.overwrite and (run_dir / run_folder.CHECKPOINT_FILE).is_file():
        raise DataError(
            f"{run_dir}: another process has just started a run here. Choose another --run-dir."
        )
    write_config(config, run_dir)  # first: it marks the folder of a run that is stopped here
    is_pca = config.data.patch_norm == "PCA"
    run_folder.start(run_dir, config.data.root, config.data.split, is_pca)


def write_config(config: TrainConfig, run_dir: Path) -> None:
    """Write a run's options, without where and how it was started."""
    run = replace(config.run, run_dir=None, resume="no", overwrite=False, debug=False)
    content = utils.config_dict(replace(config, run=run))
    utils.write_json(run_dir / run_folder.CONFIG_FILE, content)


def describe_data(training: Training) -> None:
    """Log what was found: software, device, samples of each part and class, model."""
    card = training.card
    log.info("training, version %s, torch %s", utils.VERSION, torch.__version__)
    device, cpus = training.device, utils.cpu_count()
    log.info("device %s, %d CPUs, run folder %s", device, cpus, training.run_dir)
    for part, loader in training.loaders.items():
        samples = dataset_of(loader).samples
        counts = samples.class_counts(len(card.class_names)).tolist()
        log.info(
            "%s: %d observations of galaxies, %d spaxels (%s)",
            part,
            len(samples.plateifus),
            len(samples),
            ", ".join(f"{n}: {count}" for n, count in zip(card.class_names, counts, strict=True)),
        )
        absent = [n for n, count in zip(card.class_names, counts, strict=True) if not count]
        if absent and part == "train":
            log.warning(
                "no training spaxel is of class %s: it cannot be learned", ", ".join(absent)
            )
    bands, size = training.model.config.bands, training.data.patch_size
    log.info(
        "network %s: %d parameters, patches of %d bands x %d x %d spaxels",
        card.network_name,
        card.parameters,
        bands,
        size,
        size,
    )
    is_global = training.data.patch_norm == "global" and not card.network.get("projection")
    if training.data.cutout_size > 1 and is_global:
        log.warning(
            "with --patch-norm global, training on cutouts hardly progresses: choose --patch-norm "
            "spectral or PCA, or --cutout 1 (docs/science_choices.md)"
        )


def score_baselines(training: Training) -> None:
    """Score what needs no network, and write the model's description."""
    train, val = (dataset_of(training.loaders[part]) for part in ("train", "val"))
    weights, wave = None, None
    if training.data.patch_norm == "residual":
        wave = baselines.wave_of(training.card.recipe.options["cube"])
    if training.options.baselines and wave is not None and not line_fits.has_ratios(wave):
        log.warning(
            "no baseline: Halpha or every other line of the classical ratios is outside of the "
            "cubes' range"
        )
    elif training.options.baselines:
        seed, learns_dex = training.config["seed"], training.data.learns_dex
        weights = baselines.fit(train, seed, wave, learns_dex)
        run_folder.write_tensors(training.run_dir / run_folder.BASELINE_FILE, weights)
    training.card.baselines = baselines.scores(train, val, weights, wave)
    log.info("without a network: %s", in_words(training.card.baselines))
    training.card.write(training.run_dir)


if __name__ == "__main__":
    utils.run_command(main, TrainConfig, __doc__)
