"""Training batches: the sampler, datasets from packed cubes or patch files, loaders.

Reads   splits/<split_dir>/{train,val,test}.csv, and processed/packed (made from processed/cubes on
        demand) or processed/patches. Layouts: docs/data_formats.md.

A sample is one labelled, usable spaxel: its patch (1, band, P, P), with the spaxel at
[P//2, P//2] and zeros beyond the field of view, and its class. Both datasets give the same tensors
for the same split. Batches are cut in one call each, so no Python code runs per patch.

A cutout is a sample with T - 1 more spaxels per side, all labelled spaxels of which are learned
from: see CutoutBatch. Cutouts come from packed cubes: one table of normalised spectra,
memory-mapped or held on the GPU, where batches are then cut, turned and mirrored.

    >>> loaders = get_dataloaders(DataOptions(label_task="logOH", cutout=1))
    >>> patches, classes, rows = next(iter(loaders["train"]))
"""

from __future__ import annotations

import logging
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import data_io
import pack_cubes
import utils
from hsi_proc_fns import Stats, band_slice
from labels import LABEL_NONE
from pack_cubes import PackedCubes
from recipe import require_alike
from samples import REBUILD_LABELS, DataOptions, PatchSpec, Samples, get_samples, patch_file

log = logging.getLogger(__name__)

DEVICE_SHARE = 0.6
"""Fraction of a GPU's free memory that packed cubes may take to be held there."""
FEW_CUTOUTS = 3
"""Training warns if a step has fewer cutouts than this."""
N_TURNS = 8
"""Symmetries of the square: four quarter turns, each plain or mirrored; 0 leaves a patch as is."""


class Batch(NamedTuple):
    """What a loader of patches yields; also one sample, without the first axis."""

    patches: Tensor
    """(N, 1, band, P, P) float32; bands are contiguous in memory."""
    classes: Tensor
    """(N,) int64."""
    rows: Tensor
    """(N,) int64, into the dataset's `samples`."""


class CutoutBatch(NamedTuple):
    """What a loader of cutouts yields; also one cutout, without the first axis.

    Notes
    -----
    A cutout is drawn like a sample (a class, then one of its members) and contains the spaxels that
    surround it. Spaxel j, which a sampler of patches draws with probability p_j, is then included
    with q_j, the sum of p over all samples within T//2 of it, and gets the weight p_j / q_j
    (Horvitz & Thompson 1952, eq. 3). So the expected sum of any quantity f over a cutout is its
    expectation over the patches: sum_j q_j (p_j / q_j) f_j = sum_j p_j f_j.
    """

    patches: Tensor
    """(N, 1, band, T + P - 1, T + P - 1) float32; bands are contiguous in memory."""
    classes: Tensor
    """(N, T, T) int64, LABEL_NONE where there is no sample."""
    rows: Tensor
    """(N,) int64, the samples that were drawn, at [T//2, T//2]."""
    weights: Tensor
    """(N, T, T) float32, 0 where there is no sample; expected sum over a cutout: 1."""


# Datasets


class PatchDataset(Dataset, ABC):
    """Samples and how their batches are put together; subclasses know where the patches are.

    An index is a row of `samples`, or a pair (row, turn): see N_TURNS.
    """

    has_fields = False
    """Whether `field` can return whole galaxies."""

    def __init__(self, samples: Samples, spec: PatchSpec) -> None:
        self.samples, self.spec = samples, spec

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.samples)

    @property
    def n_bands(self) -> int:
        """Number of bands of a patch."""
        return self[0].patches.shape[1]

    def __getitem__(self, index: int | np.integer | tuple[int, int]) -> Batch | CutoutBatch:
        """Cut one sample."""
        batch = self.__getitems__([index])
        return type(batch)(*(part[0] for part in batch))

    @abstractmethod
    def __getitems__(self, index: Sequence | np.ndarray) -> Batch | CutoutBatch:
        """Cut a whole batch at once; called by torch's loader."""

    @abstractmethod
    def centres(self, rows: np.ndarray) -> np.ndarray:
        """Read the spectra of the samples themselves, (n, band) float32."""

    def field(self, galaxy: int) -> tuple[Tensor, tuple[int, int]]:
        """Return the usable part of a whole galaxy, if the dataset `has_fields`.

        Parameters
        ----------
        galaxy : int
            Row of `samples.plateifus`.

        Returns
        -------
        (1, 1, band, y, x) float32
            The box around all usable spaxels.
        (y, x) of the box's first spaxel.
        """
        raise TypeError("patch files hold no whole galaxies")


class PatchFileDataset(PatchDataset):
    """Patches from the files of cube_patch_processing.py, read through memory maps.

    From files of larger patches, the middle is cut out.
    """

    def __init__(self, samples: Samples, spec: PatchSpec, root: Path) -> None:
        super().__init__(samples, spec)
        self.root = Path(root)
        self._turned = turned_positions(spec.patch_size)
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory maps: a worker opens its own."""
        return {**self.__dict__, "_maps": {}}

    def __getitems__(self, index: Sequence | np.ndarray) -> Batch | CutoutBatch:
        """Cut a whole batch at once; called by torch's loader."""
        pairs = np.asarray(index, np.int64)
        rows, turns = (pairs, np.zeros_like(pairs)) if pairs.ndim == 1 else pairs.T
        size = self.spec.patch_size
        patches = torch.from_numpy(self._gather(rows, self._turned[turns]))
        return Batch(
            patches.view(rows.size, size, size, -1).permute(0, 3, 1, 2).unsqueeze(1),
            torch.from_numpy(self.samples.classes[rows]),
            torch.from_numpy(rows.copy()),
        )

    def centres(self, rows: np.ndarray) -> np.ndarray:
        """Read the spectra of the samples themselves, (n, band) float32."""
        centre = self.spec.patch_size // 2 * (self.spec.patch_size + 1)
        return self._gather(rows, np.full((rows.size, 1), centre))[:, 0]

    def _gather(self, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Collect spaxels (n, k, C) of patches; order (n, k) gives the positions in each."""
        galaxies = self.samples.galaxy[rows]
        out: np.ndarray | None = None
        for galaxy in np.unique(galaxies):
            here = np.flatnonzero(galaxies == galaxy)
            patches = self._patches(self.samples.plateifus[galaxy])[self.samples.row[rows[here]]]
            flat = patches.reshape(here.size, -1, patches.shape[3])
            cut = np.take_along_axis(flat, order[here][..., None], axis=1)
            if out is None:
                out = np.empty((rows.size, *cut.shape[1:]), np.float32)
            out[here] = cut
        assert out is not None, "an empty batch"
        return out

    def _patches(self, plateifu: str) -> np.ndarray:
        """Map a galaxy's patches, cut to the size and the bands asked for."""
        if plateifu not in self._maps:
            path = patch_file(self.root, self.spec, plateifu)
            patches = data_io.read_patches(path)[0]
            start = patches.shape[1] // 2 - self.spec.patch_size // 2
            inner = slice(start, start + self.spec.patch_size)
            bands = band_slice(self.spec.bands, patches.shape[3], path)
            self._maps[plateifu] = patches[:, inner, inner, bands]
        return self._maps[plateifu]


class PackedSpectra:
    """Spectra of packed cubes as a tensor, which several datasets may share.

    A pickled object (in a worker) maps the file again.
    """

    def __init__(self, packed: PackedCubes) -> None:
        self.path = packed.path
        self._packed: PackedCubes | None = packed
        self._tensor: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the spectra."""
        return {"path": self.path, "_packed": None, "_tensor": None}

    @property
    def packed(self) -> PackedCubes:
        """The file's content."""
        self._packed = self._packed or pack_cubes.read_packed(self.path)
        return self._packed

    @property
    def tensor(self) -> Tensor:
        """All spectra, (row, C), on disk until `to` moves them; row 0 is zero."""
        if self._tensor is None:
            with warnings.catch_warnings():  # about a read-only map, which nothing writes to
                warnings.simplefilter("ignore", UserWarning)
                self._tensor = torch.from_numpy(self.packed.spectra)
        return self._tensor

    def to(self, device: torch.device) -> None:
        """Hold the spectra on a device."""
        self._tensor = self.tensor.to(device)


class PackedDataset(PatchDataset):
    """Patches or cutouts, gathered from packed cubes by one index operation per batch.

    The tensors of a batch are on the dataset's device: the CPU, until `to` moves it.

    Parameters
    ----------
    samples : Samples
    spec : PatchSpec
    store : PackedSpectra
        Holds all the samples' galaxies.
    cutout : int
        T, odd; 1 gives patches (`Batch`), more gives cutouts (`CutoutBatch`).
    probabilities : (N,) array, optional
        Probability with which each sample is drawn; needed for cutouts.
    """

    has_fields = True

    def __init__(
        self,
        samples: Samples,
        spec: PatchSpec,
        store: PackedSpectra,
        cutout: int = 1,
        probabilities: np.ndarray | None = None,
    ) -> None:
        super().__init__(samples, spec)
        self.store, self.cutout = store, cutout
        self._bands = band_slice(spec.bands, store.tensor.shape[1], store.path)
        size = spec.patch_size + cutout - 1
        before = spec.patch_size // 2 + cutout // 2
        edges = (before, size - 1 - before)
        padded = [np.pad(store.packed.rows[p], (edges, edges)) for p in samples.plateifus]
        ends = np.cumsum([r.size for r in padded])
        widths = np.array([r.shape[1] for r in padded])
        first = (ends - [r.size for r in padded])[samples.galaxy]
        width = widths[samples.galaxy]
        corner = first + samples.y.astype(np.int64) * width + samples.x
        centre = corner + before * (width + 1)
        # all galaxies' maps with their margins, one after the other; a window is
        # corner + dy * width + dx
        self._rows = torch.from_numpy(np.concatenate([r.ravel() for r in padded]))
        self._corner, self._width = torch.from_numpy(corner), torch.from_numpy(width)
        self._centre = torch.from_numpy(centre)
        self._sample_classes = torch.from_numpy(samples.classes)
        dy, dx = np.divmod(turned_positions(size), size)
        self._dy, self._dx = torch.from_numpy(dy), torch.from_numpy(dx)
        if cutout > 1:
            assert probabilities is not None, "cutouts need the probabilities of the samples"
            self._classes = torch.full(self._rows.shape, LABEL_NONE, dtype=torch.int8)
            self._classes[self._centre] = self._sample_classes.to(torch.int8)
            self._weights = torch.zeros(self._rows.shape)
            shares = probabilities / chance_of_being_seen(samples, probabilities, cutout)
            self._weights[self._centre] = torch.from_numpy(shares.astype(np.float32))

    def to(self, device: torch.device) -> None:
        """Hold everything on a device."""
        self.store.to(device)
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def __getitems__(self, index: Sequence | np.ndarray) -> Batch | CutoutBatch:
        """Cut a whole batch at once; called by torch's loader."""
        pairs = torch.as_tensor(np.asarray(index, np.int64))
        if self._rows.is_cuda:  # from pinned memory: otherwise the copy waits for the current step
            pairs = pairs.pin_memory().to(self._rows.device, non_blocking=True)
        rows, turns = (pairs, torch.zeros_like(pairs)) if pairs.ndim == 1 else pairs.unbind(1)
        width = self._width[rows, None]
        flat = self._corner[rows, None] + self._dy[turns] * width + self._dx[turns]  # (N, S*S)
        size = self.spec.patch_size + self.cutout - 1
        values = self._look_up(self._rows[flat]).view(len(rows), size, size, -1)
        patches = values.permute(0, 3, 1, 2).unsqueeze(1)
        if self.cutout == 1:
            return Batch(patches, self._sample_classes[rows], rows)
        start = self.spec.patch_size // 2
        inner = slice(start, start + self.cutout)
        seen = flat.view(len(rows), size, size)[:, inner, inner]
        return CutoutBatch(patches, self._classes[seen].long(), rows, self._weights[seen])

    def centres(self, rows: np.ndarray) -> np.ndarray:
        """Read the spectra of the samples themselves, (n, band) float32."""
        there = self._centre[torch.from_numpy(rows).to(self._rows.device)]
        return self._look_up(self._rows[there]).cpu().numpy()

    def field(self, galaxy: int) -> tuple[Tensor, tuple[int, int]]:
        """Return the usable part of a whole galaxy."""
        rows = self.store.packed.rows[self.samples.plateifus[galaxy]]
        box = usable_box(rows > 0)
        here = torch.from_numpy(rows[box]).to(self._rows.device)
        values = self._look_up(here).view(*here.shape, -1)
        return values.permute(2, 0, 1)[None, None], (box[0].start, box[1].start)

    def _look_up(self, rows: Tensor) -> Tensor:
        """Spectra of rows of any shape, (n, C) float32."""
        spectra = self.store.tensor[:, self._bands]
        return spectra.index_select(0, rows.reshape(-1)).float()


def usable_box(usable: np.ndarray) -> tuple[slice, slice]:
    """Smallest box (y, x) around the usable spaxels of a map that has any."""
    y, x = np.nonzero(usable)
    return slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1)


def chance_of_being_seen(samples: Samples, probabilities: np.ndarray, cutout: int) -> np.ndarray:
    """Sum the probabilities of all samples in the (cutout x cutout) box around each, (N,)."""
    seen = np.empty(len(samples))
    for _, here in samples.by_galaxy():
        y, x = samples.y[here], samples.x[here]
        drawn = np.zeros((y.max() + 1, x.max() + 1))
        drawn[y, x] = probabilities[here]
        seen[here] = uniform_filter(drawn, cutout, mode="constant")[y, x] * cutout**2
    return seen


def turned_positions(patch_size: int) -> np.ndarray:
    """Positions of a patch under the symmetries of the square, (N_TURNS, P*P).

    A turned patch is `patch.reshape(P*P, C)[positions[turn]]`. They keep the centre where it is
    only for odd P.
    """
    grid = np.arange(patch_size**2).reshape(patch_size, patch_size)
    turns = [np.rot90(g, k) for g in (grid, grid.T) for k in range(4)]
    return np.stack([t.reshape(-1) for t in turns])


class SpaxelBatchSampler(Sampler):
    """Draw batches of samples, the same ones for the same seed, epoch and options.

    Yields (n, 2) int64 arrays of rows and turns. Balanced: a class is drawn, then one of its
    members, with replacement; no weight is kept per sample, so their number is not limited.

    Parameters
    ----------
    classes : (N,) int array
    batch_size : int
        All batches are full, unless there are fewer samples than this.
    seed : int
    shuffle, balance, augment : bool
        Balance implies shuffle. Augment draws a turn (N_TURNS) for each sample.
    num_samples : int, optional
        Samples per epoch; default as many as there are.
    """

    def __init__(
        self,
        classes: np.ndarray,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        balance: bool = False,
        augment: bool = False,
        num_samples: int | None = None,
    ) -> None:
        order = np.argsort(classes, kind="stable")
        ends = np.flatnonzero(np.diff(classes[order])) + 1
        self.members = np.split(order, ends)
        self.n, self.batch_size, self.seed = classes.size, batch_size, seed
        self.shuffle, self.balance, self.augment = shuffle, balance, augment
        self.num_samples = num_samples or self.n
        self.epoch = self.skip = 0

    @property
    def probabilities(self) -> np.ndarray:
        """Probability of each sample to be the next one drawn, (N,); sums to 1."""
        each = np.full(self.n, 1 / self.n)
        if self.balance:
            for members in self.members:
                each[members] = 1 / (len(self.members) * members.size)
        return each

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch's order; leave out its first `skip` batches, done before a resume."""
        self.epoch, self.skip = epoch, skip

    @property
    def drops_last(self) -> bool:
        """Whether a last, smaller batch is left out: in training, unless it is the only one."""
        return (self.shuffle or self.balance) and self.num_samples >= self.batch_size

    def __len__(self) -> int:
        """Count the batches of a whole epoch."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > 0 and not self.drops_last)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Draw the epoch's batches, except the skipped ones."""
        rng = np.random.default_rng([self.seed, self.epoch])
        rows = self._order(rng)
        turns = np.zeros_like(rows)
        if self.augment:
            turns = rng.integers(N_TURNS, size=rows.size)
        pairs = np.stack([rows, turns], axis=1)
        for i in range(self.skip, len(self)):
            yield pairs[i * self.batch_size : (i + 1) * self.batch_size]

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """Rows of the epoch's samples, in order."""
        if self.balance:
            classes = rng.integers(len(self.members), size=self.num_samples)
            order = np.empty(self.num_samples, np.int64)
            for c, members in enumerate(self.members):
                here = classes == c
                order[here] = members[rng.integers(members.size, size=here.sum())]
            return order
        if not self.shuffle:
            return np.arange(self.num_samples)
        rounds = -(-self.num_samples // self.n)
        return np.concatenate([rng.permutation(self.n) for _ in range(rounds)])[: self.num_samples]


# Loaders


def get_dataset(
    options: DataOptions,
    table: pd.DataFrame,
    store: PackedSpectra | None = None,
    stats: Stats | None = None,
) -> PatchDataset:
    """Make the dataset of patches of one part of a split.

    Parameters
    ----------
    options : DataOptions
    table : DataFrame
        The part's CSV.
    store : PackedSpectra, optional
        Needed for packed cubes; several parts may share it.
    stats : Stats, optional
        Needed for patch files with the norm PCA.
    """
    spec, root = options.spec, options.root
    if store is None:
        return PatchFileDataset(get_samples(table, spec, root, None, stats), spec, root)
    return PackedDataset(get_samples(table, spec, root, store.packed), spec, store)


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
    options.check()
    root, spec = options.root, options.spec
    tables, _ = data_io.read_split(utils.split_path(root, options.split))
    store, stats, inputs = None, None, {"split": data_io.split_digest(tables)}
    if options.source == "packed":
        galaxies = pd.concat([tables[part]["plateifu"] for part in parts]).unique().tolist()
        packed = pack_cubes.open_packed(
            root,
            options.split,
            spec.patch_norm,
            galaxies,
            options.packed_type,
            max(options.workers, 1),
        )
        log.info("learning from %s: %s, memory-mapped", packed.path, packed.size)
        store = PackedSpectra(packed)
        inputs |= packed.recipe.inputs
    elif spec.patch_norm == "PCA":
        stats = data_io.read_split_stats(root, options.split)
        inputs["set of statistics"] = stats.recipe.digest
    datasets = {part: get_dataset(options, tables[part], store, stats) for part in parts}
    first = datasets[parts[0]].samples
    for part, dataset in datasets.items():
        dataset.samples.inputs = inputs
        where, whose = f"the {part} part", f"those of the {parts[0]} part"
        require_alike(dataset.samples.options, first.options, where, whose, REBUILD_LABELS)
    loaders: dict[str, DataLoader] = {}
    for part, dataset in datasets.items():
        train = part == "train"
        sampler = SpaxelBatchSampler(
            dataset.samples.classes,
            options.batch_size,
            seed,
            shuffle=train,
            balance=train and options.balance,
            augment=train and options.augment,
            num_samples=options.samples_per_epoch if train else None,
        )
        if train and options.cutout_size > 1:
            assert store is not None
            dataset = cutouts_of(dataset.samples, spec, store, options.cutout_size, sampler)
        on_device = _hold_on(device, dataset)
        loaders[part] = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=0 if on_device else options.workers,
            multiprocessing_context="spawn" if options.workers and not on_device else None,
            persistent_workers=options.workers > 0 and not on_device,
            worker_init_fn=_ignore_signals,
            pin_memory=device is not None and device.type == "cuda" and not on_device,
            generator=torch.Generator(),  # the loader's own draws leave the global state alone
        )
    return loaders


def cutouts_of(
    samples: Samples,
    spec: PatchSpec,
    store: PackedSpectra,
    cutout: int,
    sampler: SpaxelBatchSampler,
) -> PackedDataset:
    """Make the dataset of cutouts, and have the sampler count labelled spaxels in cutouts."""
    probabilities = sampler.probabilities
    each = labelled_in_a_cutout(samples, probabilities, cutout)
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
    return PackedDataset(samples, spec, store, cutout, probabilities)


def _hold_on(device: torch.device | None, dataset: PatchDataset) -> bool:
    """Move packed cubes to a GPU if they fit; say whether they are there now."""
    if device is None or device.type != "cuda" or not isinstance(dataset, PackedDataset):
        return False
    spectra = dataset.store.tensor
    need, free = 0 if spectra.is_cuda else spectra.nbytes, torch.cuda.mem_get_info(device)[0]
    if need > DEVICE_SHARE * free:
        log.info(
            "packed cubes of %.1f GB stay on disk: %.1f GB of GPU memory are free",
            need / 1e9,
            free / 1e9,
        )
        return False
    dataset.to(device)
    return True


def labelled_in_a_cutout(samples: Samples, probabilities: np.ndarray, cutout: int) -> float:
    """Estimate the number of samples in a cutout (the expected value)."""
    return float(probabilities @ chance_of_being_seen(samples, np.ones(len(samples)), cutout))


def _ignore_signals(_worker: int) -> None:
    """Leave signals to the parent process, which ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def dataset_of(loader: DataLoader) -> PatchDataset:
    """Return the dataset of a loader of `get_dataloaders`."""
    assert isinstance(loader.dataset, PatchDataset)
    return loader.dataset


def collate(batch: Any) -> Any:
    """Pass a batch on: `__getitems__` cut it whole."""
    return batch
