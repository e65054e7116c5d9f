"""Loaders of training batches: which samples are learned from which files, by the options.

Reads   splits/<split_dir>/{train,val,test}.csv, processed/labels, and processed/packed (made from
        processed/cubes on demand) or processed/patches. Layouts: docs/data_formats.md.

    >>> loaders = get_dataloaders(DataOptions(label_task="logOH", cutout=1))
    >>> patches, classes, rows, values = next(iter(loaders["train"]))
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import utils
from utils import DataError, LabelTask, Norm

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import data_io
import networks
import pack_cubes
from batches import (
    PackedDataset,
    PatchFileDataset,
    SpaxelBatchSampler,
    as_tensor,
    collate,
    labelled_in_a_cutout,
)
from networks import NetworkName
from pack_cubes import PackedCubes, PackedType
from recipe import require_alike
from samples import REBUILD_LABELS, PatchSpec, Samples, get_samples

log = logging.getLogger(__name__)

Source = Literal["packed", "patches"]
DEVICE_SHARE = 0.6
"""Fraction of a GPU's free memory that packed cubes may take to be held there."""
FEW_CUTOUTS = 3
"""Training warns if a step has fewer cutouts than this."""


@dataclass(frozen=True)
class DataOptions:
    """Which samples are learned, and from which files."""

    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else ./data/manga."""
    split_dir: str | None = None
    """Split to learn from, a folder in <data_dir>/splits; default hard_<label_task>."""
    label_task: LabelTask = "logOH"
    """Labels to learn."""
    n_classes: Literal[6, 8] = 6
    """Number of metallicity classes; ignored for BPT, which has 3."""
    network: NetworkName = "matched_filters"
    """Network that learns. matched_filters: measures lines with learned filters and gives the
    metallicity in dex with an interval. ssftt: the published transformer, which gives classes."""
    patch_norm: Norm | None = None
    """Normalisation of the spectra; default residual (continuum-subtracted, with errors) for
    matched filters, the only one they can use, and PCA (principal components of the training
    split) for SSFTT."""
    patch_size: int = 7
    """Side of a patch in spaxels."""
    bands: tuple[int, int] | None = None
    """First band (or component) and the one after the last; default all."""
    source: Source = "packed"
    """Files to learn from. packed: packed cubes (pack_cubes.py), created if necessary. patches:
    the patch files of cube_patch_processing.py."""
    packed_type: PackedType = "float16"
    """Number type of packed cubes; the values of the norm residual are float16 anyway."""
    cutout: int | None = None
    """Side of the cutouts in spaxels, odd; all labelled spaxels of a cutout are learned at once,
    with the same expectation as patch by patch, but faster. 1: patch by patch. Default 21 for
    matched filters, 5 for SSFTT; patch files only allow 1."""
    batch_size: int | None = None
    """Labelled spaxels per step; with cutouts on average. Default 1024 for matched filters, 256 for
    SSFTT."""
    samples_per_epoch: int | None = None
    """Labelled spaxels per epoch; default as many as there are in the training part."""
    balance: bool = True
    """Draw all classes equally often; otherwise as often as they occur, like metallicities that are
    learned in dex."""
    augment: bool = True
    """Turn and mirror patches at random (odd patch sizes only)."""
    workers: int = 0
    """Processes that cut batches and pack cubes; 0 uses this process, which is fast enough for
    principal components."""

    @property
    def root(self) -> Path:
        """Data folder."""
        return utils.data_dir(self.data_dir)

    @property
    def split(self) -> str:
        """Name of the split."""
        return self.split_dir or utils.default_split(self.label_task)

    @property
    def spec(self) -> PatchSpec:
        """What a sample is."""
        norm = self.resolved().patch_norm
        assert norm is not None
        return PatchSpec(self.label_task, self.n_classes, norm, self.patch_size, self.bands)

    @property
    def cutout_size(self) -> int:
        """Side of the cutouts; 1 for patches."""
        cutout = self.resolved().cutout
        assert cutout is not None
        return cutout

    @property
    def learns_dex(self) -> bool:
        """Whether metallicities are learned as values in dex, not as classes."""
        return self.label_task == "logOH" and networks.USUAL[self.network].learns_dex

    def resolved(self) -> DataOptions:
        """Fill in the defaults that depend on other options."""
        usual = networks.USUAL[self.network]
        defaults: dict[str, Any] = {
            "split_dir": utils.default_split(self.label_task),
            "patch_norm": usual.patch_norm,
            "cutout": usual.cutout if self.source == "packed" else 1,
            "batch_size": usual.batch_size,
        }
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def check(self) -> None:
        """Raise a DataError if options contradict each other."""
        size, cutout, norm = self.patch_size, self.cutout_size, self.spec.patch_norm
        if (norm == "residual") != (self.network == "matched_filters"):
            choice = "residual" if self.network == "matched_filters" else "one of the others"
            raise DataError(
                f"--patch-norm {norm} with --network {self.network}: expected {choice}. Leave out "
                "--patch-norm, choose the other network, or give --config a file made for this one."
            )
        wrong = {
            "--bands": (self.bands is not None, "all bands"),
            "--source patches": (self.source == "patches", "packed cubes"),
            f"--patch-size {size}": (size % 2 == 0, "an odd one"),
        }
        for flag, (is_wrong, expected) in wrong.items() if norm == "residual" else ():
            if is_wrong:
                raise DataError(
                    f"{flag} with --network matched_filters: expected {expected}. Leave it out, or "
                    "use --network ssftt."
                )
        first, end = self.bands or (0, 1)
        if not 0 <= first < end:
            raise DataError(
                f"--bands {first} {end}: expected a band and, after it, the one after the last, "
                "e.g. 900 1300."
            )
        if self.augment and size % 2 == 0:
            raise DataError(
                f"--patch-size {size}: an even patch has no central spaxel to turn about. Choose "
                "an odd size, or --no-augment."
            )
        if cutout > 1 and self.source != "packed":
            raise DataError(
                f"--cutout {cutout}: patch files hold no cutouts. Choose --cutout 1, or --source "
                "packed."
            )
        if cutout < 1 or cutout % 2 == 0:
            raise DataError(f"--cutout {cutout}: expected an odd number from 1.")


def get_dataloaders(
    options: DataOptions,
    seed: int = 0,
    parts: Sequence[str] = ("train", "val"),
    device: torch.device | None = None,
) -> dict[str, DataLoader]:
    """Make the loaders of a split; they yield `Batch`, or for training on cutouts `CutoutBatch`.

    Parameters
    ----------
    options : DataOptions
    seed : int
        Of the order of the samples.
    parts : sequence of {"train", "val", "test"}
        Only "train" is shuffled, balanced, augmented and cut into cutouts.
    device : torch.device, optional
        If it is a GPU, packed cubes are held there if they fit, and batches are cut there.

    Returns
    -------
    dict of part -> DataLoader
        `.dataset` is a PatchDataset, `.batch_sampler` a SpaxelBatchSampler; call its `set_epoch`
        before each epoch.

    Raises
    ------
    DataError
        Any problem with the options, the split, its statistics or its files.
    """
    options = options.resolved()
    options.check()
    root, spec = options.root, options.spec
    assert options.batch_size is not None
    tables, made = data_io.read_split(utils.split_path(root, options.split))
    task = made.options.get("label_task", options.label_task)
    if task != options.label_task:
        raise DataError(
            f"--split-dir {options.split}: made from {task} labels, expected a split of "
            f"{options.label_task} labels. Choose {utils.default_split(options.label_task)}, or "
            f"--label-task {task}."
        )
    packed, spectra, stats = None, None, None
    inputs = {"split": data_io.split_digest(tables)}
    if options.source == "packed":
        packed = pack_cubes.open_packed(
            root,
            options.split,
            spec.patch_norm,
            pd.concat([tables[part]["plateifu"] for part in parts]).unique().tolist(),
            options.packed_type,
            max(options.workers, 1),
        )
        log.info("learning from %s: %s, memory-mapped", packed.path, packed.size)
        spectra = spectra_on(device, packed)
        inputs |= packed.recipe.inputs
    elif spec.patch_norm == "PCA":
        stats = data_io.read_split_stats(root, options.split)
        inputs["set of statistics"] = stats.recipe.digest
    samples = {part: get_samples(tables[part], spec, root, packed, stats) for part in parts}
    for part, found in samples.items():
        found.inputs = inputs
        where, whose = f"the {part} part", f"those of the {parts[0]} part"
        require_alike(found.options, samples[parts[0]].options, where, whose, REBUILD_LABELS)
    on_gpu = spectra is not None and spectra.is_cuda
    workers = 0 if on_gpu else options.workers  # batches are cut on the GPU
    loaders: dict[str, DataLoader] = {}
    for part, found in samples.items():
        train = part == "train"
        sampler = SpaxelBatchSampler(
            found.classes,
            options.batch_size,
            seed,
            shuffle=train,
            balance=train and options.balance and not options.learns_dex,
            augment=train and options.augment,
            num_samples=options.samples_per_epoch if train else None,
        )
        probabilities = sampler.probabilities
        cutout = options.cutout_size if train else 1
        if cutout > 1:
            count_in_cutouts(sampler, found, cutout)
        loaders[part] = DataLoader(
            PatchFileDataset(found, spec, root)
            if packed is None
            else PackedDataset(found, spec, packed, spectra, cutout, probabilities),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_signals,
            pin_memory=device is not None and device.type == "cuda" and not on_gpu,
            generator=torch.Generator(),  # the loader's own draws leave the global state alone
        )
    return loaders


def count_in_cutouts(sampler: SpaxelBatchSampler, samples: Samples, cutout: int) -> None:
    """Have a sampler of patches draw cutouts instead, of as many labelled spaxels in total."""
    each = labelled_in_a_cutout(samples, sampler.probabilities, cutout)
    sampler.num_samples = max(1, round(sampler.num_samples / each))
    wanted, sampler.batch_size = sampler.batch_size, max(1, round(sampler.batch_size / each))
    if sampler.batch_size < FEW_CUTOUTS:
        log.warning(
            "--batch-size %d: cutouts %d wide contain %.0f labelled spaxels on average, so a step "
            "has only %d of them. Choose a smaller --cutout, or --batch-size %.0f or more.",
            wanted,
            cutout,
            each,
            sampler.batch_size,
            FEW_CUTOUTS * each,
        )


def spectra_on(device: torch.device | None, packed: PackedCubes) -> Tensor:
    """Spectra of packed cubes, (row, C): on a GPU if they fit there, else memory-mapped."""
    spectra = as_tensor(packed)
    if device is None or device.type != "cuda":
        return spectra
    free = torch.cuda.mem_get_info(device)[0]
    if spectra.nbytes <= DEVICE_SHARE * free:
        return spectra.to(device)
    log.info(
        "packed cubes of %.1f GB stay on disk: %.1f GB of GPU memory are free",
        spectra.nbytes / 1e9,
        free / 1e9,
    )
    return spectra


def _ignore_signals(_worker: int) -> None:
    """Leave signals to the parent process, which ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
