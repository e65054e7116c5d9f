"""How batches of samples are drawn (sampler) and cut (datasets).

A dataset cuts a whole batch in one call, so that no Python code runs per patch. Both datasets give
the same tensors for the same samples: one from patch files, one from packed cubes, a table of
normalised spectra that is memory-mapped or held on a GPU, where batches are then cut, turned and
mirrored. Cutouts (`CutoutBatch`) come from packed cubes only.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import data_io
from hsi_proc_fns import band_slice
from labels import LABEL_NONE
from pack_cubes import PackedCubes
from samples import PatchSpec, Samples

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
    values: Tensor
    """(N,) float32, label values as in `Samples`."""


class CutoutBatch(NamedTuple):
    """What a loader of cutouts yields; also one cutout, without the first axis.

    A cutout is a sample with T - 1 more spaxels per side, all labelled spaxels of which are learned
    from.

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
    values: Tensor
    """(N, T, T) float32, label values, 0 where there is no sample."""


class SpaxelBatchSampler(Sampler):
    """Draw batches of samples, the same ones for the same seed, epoch and options.

    Yields (n, 2) int64 arrays of rows and turns. Balanced: a class is drawn, then one of its
    members, with replacement; no weight is kept per sample, so their number is not limited.
    `share` (k, n): of each batch only every n-th sample from the k-th, for one of n processes.

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
        self.share = (0, 1)

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
        k, n = self.share
        for i in range(self.skip, len(self)):
            yield pairs[i * self.batch_size : (i + 1) * self.batch_size][k::n]

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


class PatchDataset(Dataset, ABC):
    """Samples and how their batches are put together; subclasses know where the patches are.

    An index is a row of `samples`, or a pair (row, turn): see N_TURNS.
    """

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


class PatchFileDataset(PatchDataset):
    """Patches from the files of cube_patch_processing.py, read through memory maps.

    From files of larger patches, the middle is cut out.
    """

    def __init__(self, samples: Samples, spec: PatchSpec, root: Path) -> None:
        super().__init__(samples, spec)
        self.root = root
        self._turned = turned_positions(spec.patch_size)
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory maps: a worker opens its own."""
        return {**self.__dict__, "_maps": {}}

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
            torch.from_numpy(self.samples.values[rows]),
        )

    def centres(self, rows: np.ndarray) -> np.ndarray:
        """Read the spectra of the samples themselves, (n, band) float32."""
        centre = self.spec.patch_size // 2 * (self.spec.patch_size + 1)
        return self._gather(rows, np.full((rows.size, 1), centre))[:, 0]

    def _gather(self, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Collect spaxels (n, k, C) of patches; order (n, k) gives the positions in each."""
        names = [self.samples.plateifus[galaxy] for galaxy in self.samples.galaxy[rows]]
        out = np.empty((*order.shape, self._patches(names[0]).shape[3]), np.float32)
        for name in set(names):
            here = np.flatnonzero(np.array(names) == name)
            patches = self._patches(name)[self.samples.row[rows[here]]]
            flat = patches.reshape(here.size, -1, patches.shape[3])
            out[here] = np.take_along_axis(flat, order[here][..., None], axis=1)
        return out

    def _patches(self, plateifu: str) -> np.ndarray:
        """Map a galaxy's patches, cut to the size and the bands asked for."""
        if plateifu not in self._maps:
            path = self.spec.patch_file(self.root, plateifu)
            patches = data_io.read_patches(path)[0]
            start = patches.shape[1] // 2 - self.spec.patch_size // 2
            inner = slice(start, start + self.spec.patch_size)
            bands = band_slice(self.spec.bands, patches.shape[3], path)
            self._maps[plateifu] = patches[:, inner, inner, bands]
        return self._maps[plateifu]


class PackedDataset(PatchDataset):
    """Patches or cutouts, gathered from packed cubes by one index operation per batch.

    Parameters
    ----------
    samples : Samples
    spec : PatchSpec
    packed : PackedCubes
        Hold all the samples' galaxies.
    spectra : (row, C) Tensor, optional
        Their spectra, which several datasets may share; the tensors of a batch are on the same
        device. Default: those on the disk, memory-mapped.
    cutout : int
        T, odd; 1 gives patches (`Batch`), more gives cutouts (`CutoutBatch`).
    probabilities : (N,) array, optional
        Probability with which each sample is drawn; needed for cutouts.
    """

    def __init__(
        self,
        samples: Samples,
        spec: PatchSpec,
        packed: PackedCubes,
        spectra: Tensor | None = None,
        cutout: int = 1,
        probabilities: np.ndarray | None = None,
    ) -> None:
        super().__init__(samples, spec)
        self.packed, self.cutout = packed, cutout
        self.spectra = as_tensor(packed) if spectra is None else spectra
        self._bands = band_slice(spec.bands, self.spectra.shape[1], packed.path)
        on_device = partial(torch.as_tensor, device=self.spectra.device)
        size = spec.patch_size + cutout - 1
        before = spec.patch_size // 2 + cutout // 2
        edges = (before, size - 1 - before)
        # all galaxies' maps with their margins, one after the other; a window is
        # corner + dy * width + dx
        padded = [np.pad(packed.rows[p], (edges, edges)) for p in samples.plateifus]
        self._rows = on_device(np.concatenate([r.ravel() for r in padded]))
        sizes, widths = np.array([(r.size, r.shape[1]) for r in padded]).T
        first, width = (np.cumsum(sizes) - sizes)[samples.galaxy], widths[samples.galaxy]
        corner = first + samples.y.astype(np.int64) * width + samples.x
        centre = corner + before * (width + 1)
        dy, dx = np.divmod(turned_positions(size), size)
        self._corner, self._width, self._centre = map(on_device, (corner, width, centre))
        self._dy, self._dx = on_device(dy), on_device(dx)
        self._sample_classes, self._sample_values = map(
            on_device, (samples.classes, samples.values)
        )
        if cutout > 1:
            assert probabilities is not None, "cutouts need the probabilities of the samples"
            shares = probabilities / chance_of_being_seen(samples, probabilities, cutout)

            def on_map(values: np.ndarray, elsewhere: int, dtype: type) -> Tensor:
                whole: np.ndarray = np.full(len(self._rows), elsewhere, dtype)
                whole[centre] = values
                return on_device(whole)

            self._classes = on_map(samples.classes, LABEL_NONE, np.int8)
            self._values = on_map(samples.values, 0, np.float32)
            self._weights = on_map(shares, 0, np.float32)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the spectra: a worker maps the file again."""
        return {**self.__dict__, "spectra": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the spectra."""
        self.__dict__.update(state)
        self.spectra = as_tensor(self.packed).to(self._rows.device)

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
            return Batch(patches, self._sample_classes[rows], rows, self._sample_values[rows])
        start = self.spec.patch_size // 2
        inner = slice(start, start + self.cutout)
        seen = flat.view(len(rows), size, size)[:, inner, inner]
        classes, weights = self._classes[seen].long(), self._weights[seen]
        return CutoutBatch(patches, classes, rows, weights, self._values[seen])

    def centres(self, rows: np.ndarray) -> np.ndarray:
        """Read the spectra of the samples themselves, (n, band) float32."""
        there = self._centre[torch.from_numpy(rows).to(self._rows.device)]
        return self._look_up(self._rows[there]).cpu().numpy()

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
        """
        rows = self.packed.rows[self.samples.plateifus[galaxy]]
        y, x = np.nonzero(rows)
        box = rows[y.min() : y.max() + 1, x.min() : x.max() + 1]
        values = self._look_up(torch.from_numpy(box).to(self._rows.device)).view(*box.shape, -1)
        return values.permute(2, 0, 1)[None, None], (y.min(), x.min())

    def _look_up(self, rows: Tensor) -> Tensor:
        """Spectra of rows of any shape, (n, C) float32."""
        return self.spectra[:, self._bands].index_select(0, rows.reshape(-1)).float()


def as_tensor(packed: PackedCubes) -> Tensor:
    """Wrap the memory-mapped spectra of packed cubes, (row, C); row 0 is zero."""
    with warnings.catch_warnings():  # about a read-only map, which nothing writes to
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(packed.spectra)


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


def labelled_in_a_cutout(samples: Samples, probabilities: np.ndarray, cutout: int) -> float:
    """Estimate the number of samples in a cutout (the expected value)."""
    return float(probabilities @ chance_of_being_seen(samples, np.ones(len(samples)), cutout))


def dataset_of(loader: DataLoader) -> PatchDataset:
    """Return the dataset of a loader of `get_dataloaders`."""
    assert isinstance(loader.dataset, PatchDataset)
    return loader.dataset


def collate(batch: Any) -> Any:
    """Pass a batch on: `__getitems__` cut it whole."""
    return batch
