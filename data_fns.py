"""Datasets and loaders: labelled patches, cut on the fly from cubes or read from patch files.

Reads   splits/<split_dir>/{train,val,test}.csv and stats.h5, processed/cubes, processed/labels or
        processed/patches (layouts: docs/data_formats.md). Writes nothing.

A sample is one labelled, usable spaxel: its patch (1, band, P, P), with the spaxel at
[P//2, P//2] and zeros beyond the field, and its class. Both datasets give the same tensors for
the same split. Batches are cut in one call each, so no Python runs per patch.

    >>> spec = PatchSpec("logOH", n_classes=6, patch_norm="global", patch_size=7)
    >>> loaders = get_dataloaders(root, "hard", spec, batch_size=256, workers=4)
    >>> patches, classes, rows = next(iter(loaders["train"]))
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import data_io
import hsi_proc_fns
import utils
from utils import LABEL_NONE, DataError, LabelTask, PatchNorm

log = logging.getLogger(__name__)

Source = Literal["cubes", "patches"]
N_TURNS = 8
"""Symmetries of the square: four quarter turns, each plain or mirrored; 0 leaves a patch as is."""


@dataclass(frozen=True)
class PatchSpec:
    """What a sample is."""

    label_task: LabelTask
    n_classes: int = 6
    """Scale of the metallicity classes, 6 or 8; BPT has 3, whatever this says."""
    patch_norm: PatchNorm = "global"
    patch_size: int = 7
    bands: tuple[int, int] | None = None
    """First band (or component) and the one after the last; None: all. Cut after normalising."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        return utils.class_names(
            self.label_task, None if self.label_task == "BPT" else self.n_classes
        )

    def slice_bands(self, n_bands: int, where: Path | str) -> slice:
        """Slice of the band axis, checked against the bands there are."""
        if self.bands is None:
            return slice(None)
        low, high = self.bands
        if not 0 <= low < high <= n_bands:
            raise DataError(f"{where}: bands {low} to {high} of {n_bands}: choose --bands inside.")
        return slice(low, high)


class Batch(NamedTuple):
    """What a loader yields; also one sample, without the first axis."""

    patches: Tensor
    """(N, 1, band, P, P) float32; bands lie together in memory."""
    classes: Tensor
    """(N,) int64."""
    rows: Tensor
    """(N,) int64, of the dataset's `samples`."""


@dataclass
class Samples:
    """Labelled spaxels, one row each.

    Attributes
    ----------
    plateifus : list of str
        The galaxies.
    galaxy : (N,) int32
        Rows of `plateifus`.
    y, x, row : (N,) int32
        Spaxel; row of the patch file (-1 without one).
    classes : (N,) int64
    values : (N,) float32
        Label values: 12+log(O/H) in dex, or the BPT class.
    """

    plateifus: list[str]
    galaxy: np.ndarray
    y: np.ndarray
    x: np.ndarray
    row: np.ndarray
    classes: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        """Count the samples."""
        return self.classes.size

    def describe(self, rows: Sequence[int]) -> list[str]:
        """Rows in words: plateifu and spaxel."""
        return [f"{self.plateifus[self.galaxy[i]]} y={self.y[i]} x={self.x[i]}" for i in rows]


class Grid(NamedTuple):
    """Wavelength grid in short; the bins are logarithmic."""

    first: float
    """Angstrom, vacuum, rest frame."""
    last: float
    n_bands: int

    @classmethod
    def of(cls, wave: np.ndarray) -> Grid:
        """Describe the grid of a cube."""
        return cls(float(wave[0]), float(wave[-1]), int(wave.size))


class NormedCube(NamedTuple):
    """A normalised cube."""

    values: np.ndarray
    """(y, x, C) float32, zeros at unusable spaxels."""
    usable: np.ndarray
    """(y, x) bool."""
    inside: np.ndarray
    """(y, x) bool: anything at all was measured."""
    wave: np.ndarray
    """(band,) Angstrom, of all bands."""
    attrs: dict[str, Any]


def load_normed(path: Path, spec: PatchSpec, stats: data_io.Stats | None) -> NormedCube:
    """Read a cube, normalise it and keep the bands asked for.

    Raises
    ------
    DataError
        If the file is no cube, or has not the bands asked for.
    """
    cube = data_io.read_cube(path, with_errors=False)
    usable = hsi_proc_fns.usable_spaxels(cube.flux)
    values = hsi_proc_fns.normalise(cube.flux, spec.patch_norm, stats, usable)
    bands = spec.slice_bands(values.shape[2], path)
    inside = np.isfinite(cube.flux).any(axis=2)
    cut = np.ascontiguousarray(values[..., bands])
    return NormedCube(cut, usable, inside, cube.wave, cube.attrs)


class CubeStore:
    """Normalised cubes of a data folder, each made once and kept while there is room.

    The least recently used ones go first. A pickled store (in a worker) starts empty.
    """

    def __init__(
        self, root: Path, spec: PatchSpec, stats: data_io.Stats | None, cache_gb: float = 4
    ) -> None:
        self.root, self.spec, self.stats = Path(root), spec, stats
        self.cache_bytes = int(cache_gb * 1e9)
        self._kept: OrderedDict[str, tuple[np.ndarray, int]] = OrderedDict()
        self._bytes = 0
        self._usable: dict[str, np.ndarray] = {}
        self.grid: Grid | None = None
        """Of all the cubes; known once one was read."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cubes behind: a worker reads its own."""
        return {**self.__dict__, "_kept": OrderedDict(), "_bytes": 0, "_usable": {}}

    def _load(self, plateifu: str) -> None:
        """Read a cube, normalise it and keep it."""
        path = utils.cube_path(self.root, plateifu)
        cube = load_normed(path, self.spec, self.stats)
        grid = Grid.of(cube.wave)
        self.grid = self.grid or grid
        if grid != self.grid:
            raise DataError(
                f"{path}: another wavelength grid than the cubes read before. Re-run "
                "cube_processing.py --overwrite, so that all cubes share one grid."
            )
        padded = hsi_proc_fns.pad_for_patches(cube.values, self.spec.patch_size)
        flat = padded.reshape(-1, padded.shape[2])
        self._bytes += flat.nbytes
        self._kept[plateifu] = flat, padded.shape[1]
        while self._bytes > self.cache_bytes and len(self._kept) > 1:
            _, (dropped, _) = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes
        self._usable[plateifu] = cube.usable

    def usable(self, plateifu: str) -> np.ndarray:
        """Say which spaxels of a cube are usable, (y, x) bool."""
        if plateifu not in self._usable:
            self._load(plateifu)
        return self._usable[plateifu]

    def spectra(self, plateifu: str) -> tuple[np.ndarray, int]:
        """Return a padded cube as (rows * columns, C), and its number of columns."""
        if plateifu not in self._kept:
            self._load(plateifu)
        self._kept.move_to_end(plateifu)
        return self._kept[plateifu]


class PatchDataset(Dataset):
    """Samples and how their batches are put together; the subclasses know where patches lie.

    An index is a row of `samples`, or a pair (row, turn): see N_TURNS.
    """

    def __init__(self, samples: Samples, spec: PatchSpec) -> None:
        self.samples, self.spec = samples, spec
        self._turned = turned_positions(spec.patch_size)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.samples)

    @property
    def n_bands(self) -> int:
        """Bands of a patch."""
        return self[0].patches.shape[1]

    @property
    def grid(self) -> Grid | None:
        """Wavelength grid of the cubes that the patches were cut from."""
        raise NotImplementedError

    def __getitem__(self, index: int | np.integer | tuple[int, int]) -> Batch:
        """Cut one sample."""
        batch = self.__getitems__([index])
        return Batch(*(field[0] for field in batch))

    def __getitems__(self, index: Sequence | np.ndarray) -> Batch:
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
        """Read the samples' own spectra, (n, band) float32."""
        centre = self.spec.patch_size // 2 * (self.spec.patch_size + 1)
        return self._gather(rows, np.full((rows.size, 1), centre))[:, 0]

    def _gather(self, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Collect spaxels (n, k, C) of patches; order (n, k) says which positions of each."""
        galaxies = self.samples.galaxy[rows]
        out: np.ndarray | None = None
        for galaxy in np.unique(galaxies):
            here = np.flatnonzero(galaxies == galaxy)
            cut = self._cut(self.samples.plateifus[galaxy], rows[here], order[here])
            if out is None:
                out = np.empty((rows.size, *cut.shape[1:]), np.float32)
            out[here] = cut
        assert out is not None, "an empty batch"
        return out

    def _cut(self, plateifu: str, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Spaxels (n, k, C) of one galaxy's patches at the positions `order` (n, k)."""
        raise NotImplementedError


class CubePatchDataset(PatchDataset):
    """Patches cut from normalised cubes as they are asked for; no spaxel is stored twice."""

    def __init__(self, samples: Samples, spec: PatchSpec, store: CubeStore) -> None:
        super().__init__(samples, spec)
        self.store = store

    @property
    def grid(self) -> Grid | None:
        """Wavelength grid of the cubes."""
        return self.store.grid

    def _cut(self, plateifu: str, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        flat, columns = self.store.spectra(plateifu)
        dy, dx = np.divmod(order, self.spec.patch_size)
        first = self.samples.y[rows].astype(np.int64) * columns + self.samples.x[rows]
        return flat[first[:, None] + dy * columns + dx]


class PatchFileDataset(PatchDataset):
    """Patches from the files of cube_patch_processing.py, read through memory maps.

    Files of larger patches serve too: the middle is cut out of them.
    """

    def __init__(
        self, samples: Samples, spec: PatchSpec, root: Path, stats: data_io.Stats | None = None
    ) -> None:
        super().__init__(samples, spec)
        self.root = Path(root)
        self.stats_made = stats and stats.attrs.get("created_utc")
        self._maps: dict[str, np.ndarray] = {}

    @property
    def grid(self) -> Grid | None:
        """Wavelength grid of the cubes, as the first patch file tells it."""
        meta = data_io.read_patches(_patch_file(self.root, self.spec, self.samples.plateifus[0]))[2]
        if "n_band" not in meta:
            return None
        return Grid(meta["wave_min"], meta["wave_max"], meta["n_band"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: a worker opens its own."""
        return {**self.__dict__, "_maps": {}}

    def _cut(self, plateifu: str, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        if plateifu not in self._maps:
            self._maps[plateifu] = self._open(plateifu)
        patches = self._maps[plateifu][self.samples.row[rows]]
        flat = patches.reshape(len(rows), -1, patches.shape[3])
        return np.take_along_axis(flat, order[..., None], axis=1)

    def _open(self, plateifu: str) -> np.ndarray:
        """Map a galaxy's patches, cut to the size and the bands asked for."""
        path = _patch_file(self.root, self.spec, plateifu)
        patches, _, meta = data_io.read_patches(path)
        if self.stats_made and meta.get("stats") not in (None, self.stats_made):
            raise DataError(
                f"{path}: projected on components of {meta['stats']}, the split's statistics are "
                f"of {self.stats_made}. Re-run cube_patch_processing.py --overwrite with the split."
            )
        stored, size = patches.shape[1], self.spec.patch_size
        if stored < size:
            raise DataError(
                f"{path}: patches of {stored}x{stored}, asked for {size}x{size}. Re-run "
                f"cube_patch_processing.py --patch-size {size} --overwrite."
            )
        start = stored // 2 - size // 2
        inner = slice(start, start + size)
        return patches[:, inner, inner, self.spec.slice_bands(patches.shape[3], path)]


def turned_positions(patch_size: int) -> np.ndarray:
    """Positions of a patch under the symmetries of the square, (N_TURNS, P*P).

    A turned patch is `patch.reshape(P*P, C)[positions[turn]]`. They keep the centre where it is
    only for odd P.
    """
    grid = np.arange(patch_size**2).reshape(patch_size, patch_size)
    turns = [np.rot90(g, k) for g in (grid, grid.T) for k in range(4)]
    return np.stack([t.reshape(-1) for t in turns])


class Batches(Sampler):
    """Batches of sample indices, the same for the same seed, epoch and options.

    Yields (n, 2) int64 arrays of rows and turns. Balanced: a class is drawn, then one of its
    members, with replacement; no weight is kept per patch, so their number has no limit.

    Parameters
    ----------
    classes : (N,) int array
    batch_size : int
        All batches are full, unless there are fewer samples than that.
    seed : int
    shuffle, balance, augment : bool
        Balance implies shuffle. Augment draws a turn for each sample.
    num_samples : int, optional
        Samples an epoch; default as many as there are.
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

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch's order; leave out its first `skip` batches (already done)."""
        self.epoch, self.skip = epoch, skip

    @property
    def drops_last(self) -> bool:
        """Whether a last, smaller batch is left out: in training, if it is not the only one."""
        return (self.shuffle or self.balance) and self.num_samples >= self.batch_size

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > 0 and not self.drops_last)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Draw the epoch's batches, but for the skipped ones."""
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


def get_samples(
    table: pd.DataFrame, spec: PatchSpec, root: Path, source: Source, store: CubeStore | None
) -> Samples:
    """List the samples of one part of a split, by galaxy in the split's order, then y and x.

    Parameters
    ----------
    table : DataFrame
        The part's CSV: plateifu, and y and x where the split is by spaxel.
    spec : PatchSpec
    root : Path
    source : {"cubes", "patches"}
    store : CubeStore or None
        For cubes: says which spaxels are usable.

    Raises
    ------
    DataError
        If files of galaxies are missing (the first one is named), or no sample is left.
    """
    plateifus = list(dict.fromkeys(table["plateifu"]))
    by_spaxel = {"y", "x"} <= set(table.columns)
    found: list[pd.DataFrame] = []
    missing: list[str] = []
    for i, plateifu in enumerate(plateifus):
        try:
            if source == "patches":
                rows = data_io.read_patches(_patch_file(root, spec, plateifu))[1]
            else:
                assert store is not None, "samples from cubes need a store"
                rows = _labelled_spaxels(root, spec, plateifu, store)
        except DataError as error:
            missing.append(str(error))
            continue
        if by_spaxel:
            rows = rows.merge(table.loc[table["plateifu"] == plateifu, ["y", "x"]], on=["y", "x"])
        found.append(rows.sort_values(["y", "x"]).assign(galaxy=i))
    if missing:
        raise DataError(
            f"{missing[0]} {len(missing)} of the split's {len(plateifus)} galaxies have such a "
            "problem: process them, or make a split without them (create_data_splits.py)."
        )
    whole = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    if whole.empty:
        raise DataError(
            f"{root}: no labelled {spec.label_task} spaxel in {len(plateifus)} galaxies of the "
            "split. Look at the label maps (processed/labels), or choose another split."
        )
    if by_spaxel and len(whole) < len(table):
        log.warning(
            "%d of the split's %d spaxels have no %s label or no usable spectrum: left out",
            len(table) - len(whole),
            len(table),
            spec.label_task,
        )
    classes = utils.label_classes(whole["label"].to_numpy(), spec.label_task, spec.n_classes)
    galaxy, y, x, row = (whole[c].to_numpy(np.int32) for c in ("galaxy", "y", "x", "row"))
    values = whole["label"].to_numpy(np.float32)
    samples = Samples(plateifus, galaxy, y, x, row, classes.astype(np.int64), values)
    assert (samples.classes != LABEL_NONE).all(), "a spaxel without a label became a sample"
    return samples


def _labelled_spaxels(root: Path, spec: PatchSpec, plateifu: str, store: CubeStore) -> pd.DataFrame:
    """Labelled and usable spaxels of a galaxy: row (-1), y, x, label."""
    path = utils.label_path(root, spec.label_task, plateifu)
    labels = data_io.read_labels(path)
    usable = store.usable(plateifu)
    check_label_shape(labels, usable, path)
    classes = utils.label_classes(labels, spec.label_task, spec.n_classes)
    y, x = np.nonzero((classes != LABEL_NONE) & usable)
    return pd.DataFrame({"row": -1, "y": y, "x": x, "label": labels[y, x]})


def check_label_shape(labels: np.ndarray, usable: np.ndarray, path: Path) -> None:
    """Raise a DataError unless a label map and its cube have the same spaxels."""
    if labels.shape != usable.shape:
        raise DataError(
            f"{path}: label map of {labels.shape}, cube of {usable.shape} spaxels. Re-run "
            "process_single_cube.py --overwrite."
        )


def _patch_file(root: Path, spec: PatchSpec, plateifu: str) -> Path:
    return utils.patch_path(root, spec.label_task, spec.patch_norm, plateifu)


def get_dataset(
    root: Path,
    table: pd.DataFrame,
    spec: PatchSpec,
    source: Source = "cubes",
    stats: data_io.Stats | None = None,
    store: CubeStore | None = None,
) -> PatchDataset:
    """Make the dataset of one part of a split; several may share a store of cubes."""
    if source == "patches":
        samples = get_samples(table, spec, root, source, None)
        return PatchFileDataset(samples, spec, root, stats)
    store = store or CubeStore(root, spec, stats)
    return CubePatchDataset(get_samples(table, spec, root, source, store), spec, store)


def get_dataloaders(
    root: Path,
    split_dir: str,
    spec: PatchSpec,
    source: Source = "cubes",
    parts: Sequence[str] = ("train", "val"),
    batch_size: int = 256,
    seed: int = 0,
    balance: bool = True,
    augment: bool = False,
    num_samples: int | None = None,
    workers: int = 0,
    cache_gb: float = 4.0,
    pin_memory: bool = False,
) -> dict[str, DataLoader]:
    """Make the loaders of a split; they yield `Batch`.

    Parameters
    ----------
    root : Path
        Data folder.
    split_dir : str
    spec : PatchSpec
    source : {"cubes", "patches"}
    parts : sequence of {"train", "val", "test"}
        Only "train" is shuffled, balanced and augmented.
    batch_size, seed : int
    balance, augment : bool
        Draw all classes equally often; turn and mirror patches (odd patch sizes only).
    num_samples : int, optional
        Patches an epoch; default as many as there are labelled spaxels.
    workers : int
        Processes that cut patches, spawned; 0 cuts in this one.
    cache_gb : float
        Memory for normalised cubes, all workers together.
    pin_memory : bool
        Give pinned memory, for transfers to a GPU.

    Returns
    -------
    dict of part -> DataLoader
        `.dataset` is a PatchDataset, `.batch_sampler` a Batches; call its `set_epoch` before each
        epoch.

    Raises
    ------
    DataError
        Whatever is wrong with the split, its statistics or its files.
    """
    if augment and spec.patch_size % 2 == 0:
        raise DataError(
            f"patches of {spec.patch_size}x{spec.patch_size} have no central spaxel to turn "
            "about: choose an odd --patch-size or --no-augment."
        )
    tables, _ = data_io.read_split(utils.split_path(root, split_dir))
    stats = None
    if spec.patch_norm == "PCA":
        stats = data_io.read_stats(utils.stats_path(root, split_dir))
    store = CubeStore(root, spec, stats, cache_gb / max(workers, 1))
    loaders = {}
    for part in parts:
        dataset = get_dataset(root, tables[part], spec, source, stats, store)
        train = part == "train"
        batches = Batches(
            dataset.samples.classes,
            batch_size,
            seed,
            shuffle=train,
            balance=train and balance,
            augment=train and augment,
            num_samples=num_samples if train else None,
        )
        loaders[part] = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # the loader's own draws leave the global state alone
        )
    return loaders


def collate(batch: Any) -> Batch:
    """Pass a batch on: `__getitems__` cut it whole."""
    return batch


def class_counts(samples: Samples, n_classes: int) -> np.ndarray:
    """Count the samples of each class, (classes,) int."""
    return np.bincount(samples.classes, minlength=n_classes)
