"""Datasets and loaders: labelled patches and cutouts, from cubes, packed cubes or patch files.

Reads   splits/<split_dir>/{train,val,test}.csv and stats.h5, processed/cubes, processed/labels or
        processed/patches (layouts: docs/data_formats.md).
Writes  processed/packed, when packed cubes are asked for and there are none that serve.

A sample is one labelled, usable spaxel: its patch (1, band, P, P), with the spaxel at
[P//2, P//2] and zeros beyond the field, and its class. All datasets give the same tensors for
the same split. Batches are cut in one call each, so no Python runs per patch.

A cutout is a sample with T - 1 more spaxels a side, of which every labelled one is learned from:
see CutoutBatch. Cutouts come from packed cubes: one table of normalised spectra, memory-mapped or
held on the GPU, where batches are then cut, turned and mirrored.

    >>> spec = PatchSpec("logOH", n_classes=6, patch_norm="global", patch_size=7)
    >>> loaders = get_dataloaders(root, "hard", spec, batch_size=256, workers=4)
    >>> patches, classes, rows = next(iter(loaders["train"]))
"""

from __future__ import annotations

import logging
import signal
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import data_io
import hsi_proc_fns
import loops
import utils
from labels import LABEL_NONE, LOGOH_SCALE, class_names, label_classes
from utils import DataError, LabelTask, PatchNorm

log = logging.getLogger(__name__)

Source = Literal["cubes", "patches", "packed"]
PackedType = Literal["float16", "float32"]
DEVICE_SHARE = 0.6
"""Share of a GPU's free memory that packed cubes may take to be held there."""
FEW_OF_PLANNED = 0.5
"""Share of the labelled spaxels that a split counts, below which training warns."""
FEW_CUTOUTS = 3
"""Cutouts a step under which training is warned of."""
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
        return class_names(self.label_task, None if self.label_task == "BPT" else self.n_classes)

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


class CutoutBatch(NamedTuple):
    """What a loader of cutouts yields; also one cutout, without the first axis.

    Notes
    -----
    A cutout is drawn as a sample is (a class, then one of its members), and brings along all that
    surround the member. Spaxel j, which a sampler of patches draws with the probability p_j, is
    then seen with q_j, the sum of p over all members within T//2 of it, and counts as p_j / q_j
    (Horvitz & Thompson 1952, eq. 3). So the expected sum over a cutout, of whatever is summed, is
    the expectation over the patches: sum_j q_j (p_j / q_j) f_j = sum_j p_j f_j.
    """

    patches: Tensor
    """(N, 1, band, T + P - 1, T + P - 1) float32; bands lie together in memory."""
    classes: Tensor
    """(N, T, T) int64, LABEL_NONE where there is no sample."""
    rows: Tensor
    """(N,) int64, of the samples that were drawn, at [T//2, T//2]."""
    weights: Tensor
    """(N, T, T) float32, 0 where there is no sample; expected sum over a cutout: 1."""


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
    label_options : dict
        How all the labels were made; empty if their files do not say.
    """

    plateifus: list[str]
    galaxy: np.ndarray
    y: np.ndarray
    x: np.ndarray
    row: np.ndarray
    classes: np.ndarray
    values: np.ndarray
    label_options: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the samples."""
        return self.classes.size

    def describe(self, rows: Sequence[int]) -> list[str]:
        """Rows in words: plateifu and spaxel."""
        return [f"{self.plateifus[self.galaxy[i]]} y={self.y[i]} x={self.x[i]}" for i in rows]

    def by_galaxy(self) -> Iterator[tuple[int, np.ndarray]]:
        """Give the galaxies, as in `galaxy`, and their samples' numbers."""
        order = np.argsort(self.galaxy, kind="stable")
        starts = np.flatnonzero(np.diff(self.galaxy[order], prepend=-1))
        for rows in np.split(order, starts[1:]) if len(order) else []:
            yield int(self.galaxy[rows[0]]), rows


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
        If the file is no cube, has not the bands asked for, or is of another kind than those that
        the statistics describe.
    """
    cube = data_io.read_cube(path, with_errors=False)
    if stats is not None:
        found = data_io.CubeKind.of(cube.wave, cube.attrs)
        found.check(path, stats.kind, "the statistics")
    usable = hsi_proc_fns.usable_spaxels(cube.flux)
    values = hsi_proc_fns.normalise(cube.flux, spec.patch_norm, stats, usable)
    bands = spec.slice_bands(values.shape[2], path)
    inside = np.isfinite(cube.flux).any(axis=2)
    cut = np.ascontiguousarray(values[..., bands])
    return NormedCube(cut, usable, inside, cube.wave, cube.attrs)


def _usable_in(outline: data_io.Outline) -> np.ndarray:
    return hsi_proc_fns.is_usable(outline.measured, outline.wave.size)


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
        self.kind: data_io.CubeKind | None = None
        """Of all the cubes; known once one was looked at."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cubes behind: a worker reads its own."""
        return {**self.__dict__, "_kept": OrderedDict(), "_bytes": 0, "_usable": {}}

    def _load(self, plateifu: str) -> None:
        """Read a cube, normalise it and keep it."""
        path = utils.cube_path(self.root, plateifu)
        cube = load_normed(path, self.spec, self.stats)
        padded = hsi_proc_fns.pad_for_patches(cube.values, self.spec.patch_size)
        flat = padded.reshape(-1, padded.shape[2])
        self._bytes += flat.nbytes
        self._kept[plateifu] = flat, padded.shape[1]
        while self._bytes > self.cache_bytes and len(self._kept) > 1:
            _, (dropped, _) = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes

    def usable(self, plateifu: str) -> np.ndarray:
        """Say which spaxels of a cube are usable, (y, x) bool; its spectra are not read."""
        if plateifu not in self._usable:
            path = utils.cube_path(self.root, plateifu)
            outline = data_io.read_outline(path)
            kind = data_io.CubeKind.of(outline.wave, outline.attrs)
            self.kind = self.kind or kind
            kind.check(path, self.kind, "the cubes before")
            n_bands = len(self.stats.components) if self.stats else outline.wave.size
            self.spec.slice_bands(n_bands, path)
            self._usable[plateifu] = _usable_in(outline)
        return self._usable[plateifu]

    def spectra(self, plateifu: str) -> tuple[np.ndarray, int]:
        """Return a padded cube as (rows * columns, C), and its number of columns."""
        if plateifu not in self._kept:
            self._load(plateifu)
        self._kept.move_to_end(plateifu)
        return self._kept[plateifu]


class PatchDataset(Dataset, ABC):
    """Samples and how their batches are put together; the subclasses know where patches lie.

    An index is a row of `samples`, or a pair (row, turn): see N_TURNS.
    """

    def __init__(self, samples: Samples, spec: PatchSpec) -> None:
        self.samples, self.spec = samples, spec

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.samples)

    @property
    def n_bands(self) -> int:
        """Bands of a patch."""
        return self[0].patches.shape[1]

    @property
    @abstractmethod
    def kind(self) -> data_io.CubeKind | None:
        """Kind of the cubes that the patches were cut from."""

    def __getitem__(self, index: int | np.integer | tuple[int, int]) -> Batch | CutoutBatch:
        """Cut one sample."""
        batch = self.__getitems__([index])
        return type(batch)(*(part[0] for part in batch))

    @abstractmethod
    def __getitems__(self, index: Sequence | np.ndarray) -> Batch | CutoutBatch:
        """Cut a whole batch at once; called by torch's loader."""

    @abstractmethod
    def centres(self, rows: np.ndarray) -> np.ndarray:
        """Read the samples' own spectra, (n, band) float32."""

    @abstractmethod
    def field(self, galaxy: int) -> tuple[Tensor, tuple[int, int]]:
        """Return the usable part of a whole galaxy.

        Parameters
        ----------
        galaxy : int
            Row of `samples.plateifus`.

        Returns
        -------
        (1, 1, band, y, x) float32
            The box around all usable spaxels.
        (y, x) of the box's first spaxel.

        Raises
        ------
        DataError
            For patch files, which do not hold whole galaxies.
        """


class GatheredDataset(PatchDataset):
    """Patches put together galaxy by galaxy."""

    def __init__(self, samples: Samples, spec: PatchSpec) -> None:
        super().__init__(samples, spec)
        self._turned = turned_positions(spec.patch_size)

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

    @abstractmethod
    def _cut(self, plateifu: str, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Spaxels (n, k, C) of one galaxy's patches at the positions `order` (n, k)."""


class CubePatchDataset(GatheredDataset):
    """Patches cut from normalised cubes as they are asked for; no spaxel is stored twice."""

    def __init__(self, samples: Samples, spec: PatchSpec, store: CubeStore) -> None:
        super().__init__(samples, spec)
        self.store = store

    @property
    def kind(self) -> data_io.CubeKind | None:
        """Kind of the cubes."""
        return self.store.kind

    def field(self, galaxy: int) -> tuple[Tensor, tuple[int, int]]:
        """Return the usable part of a whole galaxy."""
        plateifu = self.samples.plateifus[galaxy]
        box = usable_box(self.store.usable(plateifu))
        flat, columns = self.store.spectra(plateifu)
        before = self.spec.patch_size // 2
        inside = tuple(slice(s.start + before, s.stop + before) for s in box)
        values = flat.reshape(-1, columns, flat.shape[1])[inside]
        return torch.from_numpy(values).permute(2, 0, 1)[None, None], (box[0].start, box[1].start)

    def _cut(self, plateifu: str, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        flat, columns = self.store.spectra(plateifu)
        dy, dx = np.divmod(order, self.spec.patch_size)
        first = self.samples.y[rows].astype(np.int64) * columns + self.samples.x[rows]
        return flat[first[:, None] + dy * columns + dx]


class PatchFileDataset(GatheredDataset):
    """Patches from the files of cube_patch_processing.py, read through memory maps.

    Files of larger patches serve too: the middle is cut out of them.
    """

    def __init__(
        self, samples: Samples, spec: PatchSpec, root: Path, stats: data_io.Stats | None = None
    ) -> None:
        super().__init__(samples, spec)
        self.root = Path(root)
        self.stats_sha256 = stats.sha256 if stats else None
        self._maps: dict[str, np.ndarray] = {}

    @property
    def kind(self) -> data_io.CubeKind | None:
        """Kind of the cubes, as the first patch file tells it."""
        meta = data_io.read_patches(_patch_file(self.root, self.spec, self.samples.plateifus[0]))[2]
        return data_io.CubeKind(**meta["cubes"]) if "cubes" in meta else None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: a worker opens its own."""
        return {**self.__dict__, "_maps": {}}

    def field(self, galaxy: int) -> tuple[Tensor, tuple[int, int]]:
        """Refuse: only patches are there."""
        raise DataError("patch files hold no whole galaxies: choose --source cubes or packed.")

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
        if self.stats_sha256 and meta.get("stats") not in (None, self.stats_sha256):
            raise DataError(
                f"{path}: projected on other components than those of the split's statistics. "
                "Re-run cube_patch_processing.py --overwrite with the split."
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


class PackedStore:
    """Packed cubes, of which several datasets may share the spectra.

    A pickled store (in a worker) maps the file anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._packed: data_io.Packed | None = None
        self._spectra: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the spectra behind."""
        return {"path": self.path, "_packed": None, "_spectra": None}

    @property
    def packed(self) -> data_io.Packed:
        """The file's content."""
        self._packed = self._packed or data_io.read_packed(self.path)
        return self._packed

    @property
    def spectra(self) -> Tensor:
        """All spectra, (row, C), on disk until `to` moves them; row 0 is zero."""
        if self._spectra is None:
            with warnings.catch_warnings():  # that nobody may write to the map; nobody does
                warnings.simplefilter("ignore", UserWarning)
                self._spectra = torch.from_numpy(self.packed.spectra)
        return self._spectra

    def to(self, device: torch.device) -> None:
        """Hold the spectra on a device."""
        self._spectra = self.spectra.to(device)

    def usable(self, plateifu: str) -> np.ndarray:
        """Say which spaxels of a cube are usable, (y, x) bool."""
        return self.packed.rows[plateifu] > 0


class PackedDataset(PatchDataset):
    """Patches or cutouts, gathered from packed cubes by one index operation a batch.

    The tensors of a batch lie where the dataset does: on the CPU until `to` moves it.

    Parameters
    ----------
    samples : Samples
    spec : PatchSpec
    store : PackedStore
        Holds all the samples' galaxies.
    cutout : int
        T, odd; 1 gives patches (`Batch`), more gives cutouts (`CutoutBatch`).
    probabilities : (N,) array, optional
        With which each sample is drawn; needed for cutouts.
    """

    def __init__(
        self,
        samples: Samples,
        spec: PatchSpec,
        store: PackedStore,
        cutout: int = 1,
        probabilities: np.ndarray | None = None,
    ) -> None:
        super().__init__(samples, spec)
        self.store, self.cutout = store, cutout
        self._bands = spec.slice_bands(store.spectra.shape[1], store.path)
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
        # every galaxy's map with its margin, one behind the other; a window of one is
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

    @property
    def kind(self) -> data_io.CubeKind | None:
        """Kind of the packed cubes."""
        packed = self.store.packed
        return data_io.CubeKind.of(packed.wave, packed.recipes[self.samples.plateifus[0]])

    def to(self, device: torch.device) -> None:
        """Hold everything on a device."""
        self.store.to(device)
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def __getitems__(self, index: Sequence | np.ndarray) -> Batch | CutoutBatch:
        """Cut a whole batch at once; called by torch's loader."""
        pairs = torch.as_tensor(np.asarray(index, np.int64))
        if self._rows.is_cuda:  # from pinned memory: else the copy waits for the step under way
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
        """Read the samples' own spectra, (n, band) float32."""
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
        spectra = self.store.spectra[:, self._bands]
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

    @property
    def probabilities(self) -> np.ndarray:
        """Probability of each sample to be the next one drawn, (N,); sums to 1."""
        each = np.full(self.n, 1 / self.n)
        if self.balance:
            for members in self.members:
                each[members] = 1 / (len(self.members) * members.size)
        return each

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


# Packed cubes


def open_packed(
    root: Path,
    split_dir: str,
    patch_norm: PatchNorm,
    plateifus: Sequence[str],
    dtype: PackedType = "float16",
    jobs: int = 1,
    anew: bool = False,
) -> PackedStore:
    """Open the packed cubes of a split; pack them first if there are none that serve.

    Parameters
    ----------
    root : Path
        Data folder.
    split_dir : str
    patch_norm : PatchNorm
    plateifus : sequence of str
        Galaxies that must be in.
    dtype : {"float16", "float32"}
        float16 keeps 11 bits of each value (bf16 training uses 8), in half the memory.
    jobs : int
        Processes that pack.
    anew : bool
        Pack also where the file there would serve.

    Notes
    -----
    A packed file serves if it holds the galaxies, made from the cubes and statistics that are
    there now. Where a cube itself is absent, what was packed is taken.

    Raises
    ------
    DataError
        If cubes or statistics that are needed are missing or unreadable.
    """
    stats = _stats_for(root, split_dir, patch_norm)
    path = data_io.packed_path(root, split_dir, patch_norm, dtype)
    reason = "asked for anew" if path.is_file() else "there is none"
    if path.is_file() and not anew:
        reason = _why_stale(data_io.read_packed(path), root, plateifus, stats)
        if not reason:
            return PackedStore(path)
    log.info("packing %d cubes into %s: %s", len(plateifus), path, reason)
    pack_cubes(path, root, plateifus, patch_norm, stats, dtype, jobs)
    return PackedStore(path)


def _stats_for(root: Path, split_dir: str, patch_norm: str) -> data_io.Stats | None:
    """Read a split's statistics if the norm needs them."""
    if patch_norm != "PCA":
        return None
    return data_io.read_split_stats(utils.stats_path(root, split_dir))


def _why_stale(
    packed: data_io.Packed, root: Path, plateifus: Sequence[str], stats: data_io.Stats | None
) -> str:
    """Say why a packed file does not serve; empty if it does."""
    if packed.attrs.get("stats") != (stats.sha256 if stats else None):
        return "the statistics are others"
    for plateifu in plateifus:
        if plateifu not in packed.rows:
            return f"{plateifu} is not in it"
        path = utils.cube_path(root, plateifu)
        if not path.is_file():
            continue
        if data_io.recipe_of(data_io.read_cube_attrs(path)) != packed.recipes[plateifu]:
            return f"{path} was made anew"
    return ""


def pack_cubes(
    path: Path,
    root: Path,
    plateifus: Sequence[str],
    patch_norm: PatchNorm,
    stats: data_io.Stats | None = None,
    dtype: PackedType = "float16",
    jobs: int = 1,
) -> None:
    """Normalise cubes and write their usable spectra into one file, whole or not at all."""
    rows: dict[str, np.ndarray] = {}
    recipes: dict[str, dict[str, Any]] = {}
    n_rows, kind, wave = 1, None, np.empty(0)
    for plateifu in plateifus:
        cube = utils.cube_path(root, plateifu)
        outline = data_io.read_outline(cube)
        wave = outline.wave
        found = data_io.CubeKind.of(wave, outline.attrs)
        kind = kind or found
        found.check(cube, kind, "the cubes before")
        usable = _usable_in(outline)
        count = int(usable.sum())
        rows[plateifu] = np.zeros(usable.shape, np.int32)
        rows[plateifu][usable] = np.arange(n_rows, n_rows + count)
        recipes[plateifu] = data_io.recipe_of(outline.attrs)
        n_rows += count
    n_bands = len(wave) if stats is None else len(stats.components)
    spectra = np.broadcast_to(np.zeros(1, dtype), (n_rows, n_bands))
    attrs = {
        "patch_norm": patch_norm,
        "stats": stats.sha256 if stats else None,
        "code_version": utils.VERSION,
        "created_utc": utils.utc_now(),
    }
    packed = data_io.Packed(spectra, rows, wave, recipes, attrs)
    work = partial(_spectra_of, Path(root), patch_norm, stats, dtype)
    with loops.worker_pool(jobs, "spawn") if jobs > 1 else ThreadPoolExecutor(1) as pool:
        normed = loops.in_order(pool, work, plateifus, 2 * jobs)
        bar = tqdm(normed, desc="packing", total=len(plateifus), unit="galaxy", disable=None)
        data_io.write_packed(path, packed, bar)


def _spectra_of(
    root: Path, patch_norm: PatchNorm, stats: data_io.Stats | None, dtype: str, plateifu: str
) -> np.ndarray:
    """Normalised spectra of a cube's usable spaxels, (n, C)."""
    spec = PatchSpec("logOH", patch_norm=patch_norm)
    path = utils.cube_path(root, plateifu)
    cube = load_normed(path, spec, stats)
    spectra = cube.values[cube.usable]
    with np.errstate(over="ignore"):
        rounded = spectra.astype(dtype)
    if not np.isfinite(rounded).all():
        raise DataError(
            f"{path}: values up to {np.abs(spectra).max():.3g} in the norm {patch_norm}, too large "
            f"for {dtype}. Use --packed-type float32."
        )
    return rounded


# Samples and loaders


def get_samples(
    table: pd.DataFrame,
    spec: PatchSpec,
    root: Path,
    source: Source,
    store: CubeStore | PackedStore | None,
) -> Samples:
    """List the samples of one part of a split, by galaxy in the split's order, then y and x.

    Parameters
    ----------
    table : DataFrame
        The part's CSV: plateifu, and y and x where the split is by spaxel.
    spec : PatchSpec
    root : Path
    source : {"cubes", "patches", "packed"}
    store : CubeStore, PackedStore or None
        For cubes: says which spaxels are usable.

    Raises
    ------
    DataError
        If files of galaxies are missing or do not go together (the first one is named), or no
        sample is left.
    """
    plateifus = list(dict.fromkeys(table["plateifu"]))
    by_spaxel = {"y", "x"} <= set(table.columns)
    found: list[pd.DataFrame] = []
    missing: list[str] = []
    options: dict[str, Any] = {}  # of the labels
    whose = ""
    kinds: list[data_io.CubeKind] = []
    chosen = dict(list(table.groupby("plateifu")[["y", "x"]])) if by_spaxel else {}
    bar = tqdm(plateifus, desc="listing spaxels", unit="galaxy", leave=False, disable=None)
    for i, plateifu in enumerate(bar):
        try:
            if source == "patches":
                rows, made = _patch_index(root, spec, plateifu, kinds)
            else:
                assert store is not None, "samples from cubes need a store"
                rows, made = _labelled_spaxels(root, spec, plateifu, store)
            if made and not options:
                options, whose = made, f"those of {plateifu}"
            check_label_options(plateifu, made, options, whose)
        except DataError as error:
            missing.append(str(error))
            continue
        if by_spaxel:
            rows = rows.merge(chosen[plateifu], on=["y", "x"])
        found.append(rows.sort_values(["y", "x"]).assign(galaxy=i))
    if missing:
        remedy = ": process them, or remove their label maps and make the split anew"
        raise DataError(
            f"{missing[0]} {len(missing)} of the split's {len(plateifus)} galaxies have such a "
            f"problem{remedy if len(missing) < len(plateifus) else ''}."
        )
    whole = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    if whole.empty:
        raise DataError(
            f"{root}: no labelled {spec.label_task} spaxel in the {len(plateifus)} galaxies of a "
            "part of the split. Look at the label maps (processed/labels), or choose another split."
        )
    check_scale(spec, options, root)
    planned = table["n_labelled"].sum() if "n_labelled" in table else 0
    if len(whole) < FEW_OF_PLANNED * planned:
        log.warning(
            "%d labelled and usable spaxels, the split counts %d labelled: were the labels made "
            "anew? Then make the split anew (create_data_splits.py --overwrite).",
            len(whole),
            planned,
        )
    if by_spaxel and len(whole) < len(table):
        log.warning(
            "%d of the split's %d spaxels have no %s label or no usable spectrum: left out",
            len(table) - len(whole),
            len(table),
            spec.label_task,
        )
    classes = label_classes(whole["label"].to_numpy(), spec.label_task, spec.n_classes)
    galaxy, y, x, row = (whole[c].to_numpy(np.int32) for c in ("galaxy", "y", "x", "row"))
    values = whole["label"].to_numpy(np.float32)
    samples = Samples(plateifus, galaxy, y, x, row, classes.astype(np.int64), values, options)
    assert (samples.classes != LABEL_NONE).all(), "a spaxel without a label became a sample"
    return samples


def _labelled_spaxels(
    root: Path, spec: PatchSpec, plateifu: str, store: CubeStore | PackedStore
) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    """Labelled and usable spaxels of a galaxy (row -1, y, x, label), and the labels' options."""
    path = utils.label_path(root, spec.label_task, plateifu)
    labels = data_io.read_labels(path)
    usable = store.usable(plateifu)
    check_label_shape(labels, usable, path)
    classes = label_classes(labels, spec.label_task, spec.n_classes)
    y, x = np.nonzero((classes != LABEL_NONE) & usable)
    rows = pd.DataFrame({"row": -1, "y": y, "x": x, "label": labels[y, x]})
    return rows, data_io.read_label_meta(path).get("options")


def _patch_index(
    root: Path, spec: PatchSpec, plateifu: str, kinds: list[data_io.CubeKind]
) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    """Index of a patch file, and the options of its labels.

    Refuses a file older than its source, or of another kind of cubes than the first's (`kinds`).
    """
    path = _patch_file(root, spec, plateifu)
    _, rows, meta = data_io.read_patches(path)
    cube = utils.cube_path(root, plateifu)
    label = utils.label_path(root, spec.label_task, plateifu)
    if cube.is_file() and label.is_file():
        source = data_io.patch_source(cube, label)
        if any(meta.get(key) != value for key, value in source.items()):
            raise DataError(
                f"{path}: made of another cube or label map than those there now. Re-run "
                "cube_patch_processing.py --overwrite."
            )
    if "cubes" in meta:
        kinds.append(data_io.CubeKind(**meta["cubes"]))
        kinds[-1].check(path, kinds[0], "the patch files before")
    return rows, meta.get("label", {}).get("options")


def check_label_options(
    plateifu: str, made: dict[str, Any] | None, want: dict[str, Any] | None, whose: str
) -> None:
    """Raise a DataError unless labels were made with the wanted options; None: not known."""
    if not made or not want or made == want:
        return
    changed = [k for k in {**want, **made} if made.get(k) != want.get(k)]
    found, wanted = (", ".join(f"{k}={o.get(k)}" for k in changed) for o in (made, want))
    raise DataError(
        f"{plateifu}: labels made with {found}, {whose} with {wanted}. Re-run cube_processing.py "
        "(or process_single_cube.py) --overwrite with one set of options."
    )


def check_scale(spec: PatchSpec, options: dict[str, Any], root: Path) -> None:
    """Raise a DataError if metallicities are not on the scale that the classes are cut on."""
    diagnostic = options.get("diagnostic")
    if spec.label_task == "logOH" and diagnostic not in (None, *LOGOH_SCALE):
        raise DataError(
            f"{root}: labels by {diagnostic}; the classes are cut on the scale of "
            f"{' and '.join(LOGOH_SCALE)}. Make labels with --diagnostic "
            f"{LOGOH_SCALE[0]}."
        )


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
    store: CubeStore | PackedStore | None = None,
) -> PatchDataset:
    """Make the dataset of one part of a split; several may share a store of cubes."""
    if source == "patches":
        samples = get_samples(table, spec, root, source, None)
        return PatchFileDataset(samples, spec, root, stats)
    if isinstance(store, PackedStore):
        return PackedDataset(get_samples(table, spec, root, source, store), spec, store)
    assert source == "cubes", "packed cubes come through their store"
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
    cutout: int = 1,
    packed_type: PackedType = "float16",
    device: torch.device | None = None,
) -> dict[str, DataLoader]:
    """Make the loaders of a split; they yield `Batch`, or for training `CutoutBatch`.

    Parameters
    ----------
    root : Path
        Data folder.
    split_dir : str
    spec : PatchSpec
    source : {"cubes", "patches", "packed"}
    parts : sequence of {"train", "val", "test"}
        Only "train" is shuffled, balanced and augmented.
    batch_size, seed : int
    balance, augment : bool
        Draw all classes equally often; turn and mirror patches (odd patch sizes only).
    num_samples : int, optional
        Patches an epoch; default as many as there are labelled spaxels.
    workers : int
        Processes that cut patches (and pack cubes), spawned; 0 cuts in this one.
    cache_gb : float
        Memory for normalised cubes, all workers together.
    pin_memory : bool
        Give pinned memory, for transfers to a GPU.
    cutout : int
        T: 1 trains patch by patch, an odd T > 1 on cutouts of T x T spaxels. `batch_size` and
        `num_samples` still count labelled spaxels, on average.
    packed_type : {"float16", "float32"}
        Of packed cubes.
    device : torch.device, optional
        A GPU: packed cubes are held there if there is room, and batches are cut there.

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
    if cutout > 1 and source != "packed":
        raise DataError("cutouts come from packed cubes: choose --source packed.")
    if cutout < 1 or cutout % 2 == 0:
        raise DataError(f"cutouts of {cutout} spaxels a side: choose an odd number.")
    tables, _ = data_io.read_split(utils.split_path(root, split_dir))
    stats = _stats_for(root, split_dir, spec.patch_norm)
    store: CubeStore | PackedStore = CubeStore(root, spec, stats, cache_gb / max(workers, 1))
    if source == "packed":
        galaxies = pd.concat([tables[part]["plateifu"] for part in parts]).unique().tolist()
        store = open_packed(root, split_dir, spec.patch_norm, galaxies, packed_type, workers)
    loaders: dict[str, DataLoader] = {}
    for part in parts:
        train = part == "train"
        dataset = get_dataset(root, tables[part], spec, source, stats, store)
        for other, loader in loaders.items():
            theirs, whose = loader.dataset, f"those of the {other} part"
            assert isinstance(theirs, PatchDataset)
            options = dataset.samples.label_options, theirs.samples.label_options
            check_label_options(f"{part} part", *options, whose)
            if dataset.kind and theirs.kind:
                dataset.kind.check(Path(f"{part} part"), theirs.kind, whose)
        batches = Batches(
            dataset.samples.classes,
            batch_size,
            seed,
            shuffle=train,
            balance=train and balance,
            augment=train and augment,
            num_samples=num_samples if train else None,
        )
        if train and cutout > 1:
            assert isinstance(store, PackedStore)
            dataset = PackedDataset(dataset.samples, spec, store, cutout, batches.probabilities)
            each = labelled_in_a_cutout(dataset.samples, batches.probabilities, cutout)
            batches.num_samples = max(1, round(batches.num_samples / each))
            batches.batch_size = max(1, round(batch_size / each))
            if batches.batch_size < FEW_CUTOUTS:
                log.warning(
                    "cutouts of %d hold %.0f labelled spaxels on average: %d a step are few "
                    "galaxies to learn from at once. Choose a smaller --cutout, or "
                    "--batch-size %.0f.",
                    cutout,
                    each,
                    batches.batch_size,
                    FEW_CUTOUTS * each,
                )
        on_device = _hold_on(device, dataset)
        loaders[part] = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=0 if on_device else workers,
            multiprocessing_context="spawn" if workers and not on_device else None,
            persistent_workers=workers > 0 and not on_device,
            worker_init_fn=_leave_signals,
            pin_memory=pin_memory and not on_device,
            generator=torch.Generator(),  # the loader's own draws leave the global state alone
        )
    return loaders


def _hold_on(device: torch.device | None, dataset: PatchDataset) -> bool:
    """Move packed cubes to a GPU if they fit there; say whether they lie there now."""
    if device is None or device.type != "cuda" or not isinstance(dataset, PackedDataset):
        return False
    spectra = dataset.store.spectra
    need, free = 0 if spectra.is_cuda else spectra.nbytes, torch.cuda.mem_get_info(device)[0]
    if need > DEVICE_SHARE * free:
        log.info(
            "packed cubes of %.1f GB stay on disk, %.1f GB of GPU memory are free",
            need / 1e9,
            free / 1e9,
        )
        return False
    dataset.to(device)
    return True


def labelled_in_a_cutout(samples: Samples, probabilities: np.ndarray, cutout: int) -> float:
    """Count the samples that a cutout is expected to hold."""
    return float(probabilities @ chance_of_being_seen(samples, np.ones(len(samples)), cutout))


def _leave_signals(_worker: int) -> None:
    """Leave signals to the process that reads: it ends the workers, and they notice its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def collate(batch: Any) -> Batch:
    """Pass a batch on: `__getitems__` cut it whole."""
    return batch


def class_counts(samples: Samples, n_classes: int) -> np.ndarray:
    """Count the samples of each class, (classes,) int."""
    return np.bincount(samples.classes, minlength=n_classes)
