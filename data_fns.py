"""Which spaxels are learned, and the batches that training reads.

Reads   splits/<split_dir>/{train,val,test}.csv, processed/labels, and processed/packed (made from
        processed/cubes on demand) or processed/patches. Layouts: docs/data_formats.md.

A sample is one labelled, usable spaxel: its patch (1, band, P, P), with the spaxel at
[P//2, P//2] and zeros beyond the field of view, and its class. Both datasets give the same tensors
for the same split. Batches are cut in one call each, so no Python code runs per patch. Galaxies are
used together only if their cubes and labels were made with the same options.

A cutout is a sample with T - 1 more spaxels per side, all labelled spaxels of which are learned
from: see CutoutBatch. Cutouts come from packed cubes: one table of normalised spectra,
memory-mapped or held on the GPU, where batches are then cut, turned and mirrored.

    >>> loaders = get_dataloaders(DataOptions(label_task="logOH", cutout=1))
    >>> patches, classes, rows, values = next(iter(loaders["train"]))
"""

from __future__ import annotations

import logging
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import utils
from utils import DataError, LabelTask, Norm

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import data_io
import networks
import pack_cubes
from hsi_proc_fns import Stats, band_slice, check_label_shape
from labels import LABEL_NONE, LOGOH_SCALE, class_names, label_classes
from networks import NetworkName
from pack_cubes import PackedCubes, PackedType
from recipe import DIGEST_LENGTH, digest_of, require_alike

log = logging.getLogger(__name__)

Source = Literal["packed", "patches"]
DEVICE_SHARE = 0.6
"""Fraction of a GPU's free memory that packed cubes may take to be held there."""
FEW_CUTOUTS = 3
"""Training warns if a step has fewer cutouts than this."""
N_TURNS = 8
"""Symmetries of the square: four quarter turns, each plain or mirrored; 0 leaves a patch as is."""
REBUILD_LABELS = "Re-run cube_processing.py (or process_single_cube.py) --overwrite"


# Options


@dataclass(frozen=True)
class PatchSpec:
    """What a sample is."""

    label_task: LabelTask
    n_classes: int = 6
    """Number of metallicity classes, 6 or 8; ignored for BPT, which has 3."""
    patch_norm: Norm = "PCA"
    patch_size: int = 7
    bands: tuple[int, int] | None = None
    """First band (or component) and the one after the last, cut after normalising; None: all."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        return class_names(self.label_task, None if self.label_task == "BPT" else self.n_classes)


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
    """Number type of packed cubes."""
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
        if norm == "residual" and (self.bands or self.source == "patches" or size % 2 == 0):
            raise DataError(
                "--network matched_filters: expected packed cubes with all bands and an odd "
                "--patch-size. Leave out --bands and --source, or use --network ssftt."
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


# Samples


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
    options : dict
        How all the cubes ("cube") and labels ("labels") were made; an empty dict if nothing says.
    cubes, label_maps : dict of plateifu -> str
        Digests of the cubes (of their recipes) and of the label maps (of their values).
    inputs : dict of str -> str
        Digests of the split and, with the norm PCA, of its statistics.
    """

    plateifus: list[str]
    galaxy: np.ndarray
    y: np.ndarray
    x: np.ndarray
    row: np.ndarray
    classes: np.ndarray
    values: np.ndarray
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    cubes: dict[str, str] = field(default_factory=dict)
    label_maps: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the samples."""
        return self.classes.size

    def class_counts(self, n_classes: int) -> np.ndarray:
        """Count the samples of each class, (classes,) int."""
        return np.bincount(self.classes, minlength=n_classes)

    def spaxel_names(self, rows: Sequence[int]) -> list[str]:
        """Plateifu and spaxel of some rows, in words."""
        return [f"{self.plateifus[self.galaxy[i]]} y={self.y[i]} x={self.x[i]}" for i in rows]

    def by_galaxy(self) -> Iterator[tuple[int, np.ndarray]]:
        """Iterate over the galaxies (rows of `plateifus`) and their samples (rows)."""
        order = np.argsort(self.galaxy, kind="stable")
        starts = np.flatnonzero(np.diff(self.galaxy[order], prepend=-1))
        for rows in np.split(order, starts[1:]) if len(order) else []:
            yield int(self.galaxy[rows[0]]), rows


class GalaxySpaxels(NamedTuple):
    """Labelled, usable spaxels of one galaxy, and how they were made."""

    rows: pd.DataFrame
    """row (of the patch file, else -1), y, x, label."""
    options: dict[str, dict[str, Any]]
    """As in `Samples`."""
    cube: str
    label_map: str
    """Digests, as in `Samples`."""


def get_samples(
    table: pd.DataFrame,
    spec: PatchSpec,
    root: Path,
    packed: PackedCubes | None = None,
    stats: Stats | None = None,
) -> Samples:
    """List the samples of one part of a split, by galaxy in the split's order, then y and x.

    Parameters
    ----------
    table : DataFrame
        The part's CSV: plateifu, and y and x where the split is by spaxel.
    spec : PatchSpec
    root : Path
        Data folder.
    packed : PackedCubes, optional
        Cubes to learn from; without them, the patch files.
    stats : Stats, optional
        Statistics that patch files with the norm PCA must have been made with.

    Raises
    ------
    DataError
        If files of galaxies are missing or do not belong together (the first one is named), or
        there is no sample.
    """
    plateifus = list(dict.fromkeys(table["plateifu"]))
    by_spaxel = {"y", "x"} <= set(table.columns)
    chosen = dict(list(table.groupby("plateifu")[["y", "x"]])) if by_spaxel else {}
    found: dict[str, GalaxySpaxels] = {}
    options: dict[str, dict[str, Any]] = {"cube": {}, "labels": {}}
    problems: list[str] = []
    for plateifu in tqdm(
        plateifus, desc="listing spaxels", unit="galaxy", leave=False, disable=None
    ):
        try:
            if packed is not None:
                spaxels = packed_spaxels(packed, root, spec, plateifu)
            else:
                spaxels = patch_file_spaxels(root, spec, stats, plateifu)
            for product, made in spaxels.options.items():
                if made and options[product]:
                    where, whose = f"{plateifu} ({product})", f"those of {next(iter(found))}"
                    require_alike(made, options[product], where, whose, REBUILD_LABELS)
                options[product] = options[product] or made
            found[plateifu] = spaxels
        except DataError as error:
            problems.append(str(error))
    if problems:
        remedy = " Or remove their label maps and rebuild the split."
        raise DataError(
            f"{problems[0]} ({len(problems)} of the {len(plateifus)} galaxies of this part of the "
            f"split have such a problem.){remedy if len(problems) < len(plateifus) else ''}"
        )
    each = []
    for i, (plateifu, spaxels) in enumerate(found.items()):
        rows = spaxels.rows.merge(chosen[plateifu], on=["y", "x"]) if by_spaxel else spaxels.rows
        each.append(rows.sort_values(["y", "x"]).assign(galaxy=i))
    whole = pd.concat(each, ignore_index=True) if each else pd.DataFrame()
    if whole.empty:
        raise DataError(
            f"{root}: no labelled {spec.label_task} spaxel in the {len(plateifus)} galaxies of a "
            "part of the split. Look at the label maps (processed/labels), or choose another split."
        )
    check_scale(spec, options["labels"], root)
    label_maps = {p: found[p].label_map for p in plateifus}
    warn_of_changes(table, len(whole), label_maps, spec.label_task)
    classes = label_classes(whole["label"].to_numpy(), spec.label_task, spec.n_classes)
    assert (classes != LABEL_NONE).all(), "a spaxel without a label became a sample"
    galaxy, y, x, row = (whole[c].to_numpy(np.int32) for c in ("galaxy", "y", "x", "row"))
    values = whole["label"].to_numpy(np.float32)
    inputs = options, {p: found[p].cube for p in plateifus}, label_maps
    return Samples(plateifus, galaxy, y, x, row, classes.astype(np.int64), values, *inputs)


def packed_spaxels(
    packed: PackedCubes, root: Path, spec: PatchSpec, plateifu: str
) -> GalaxySpaxels:
    """List a galaxy's spaxels by its label map and its usable spectra.

    Raises
    ------
    DataError
        If the label map is missing, unreadable or of another shape than the cube.
    """
    usable = packed.rows[plateifu] > 0
    path = utils.label_path(root, spec.label_task, plateifu)
    labels = data_io.read_labels(path)
    check_label_shape(labels, usable, path)
    classes = label_classes(labels, spec.label_task, spec.n_classes)
    y, x = np.nonzero((classes != LABEL_NONE) & usable)
    rows = pd.DataFrame({"row": -1, "y": y, "x": x, "label": labels[y, x]})
    made = data_io.read_label_meta(path).get("recipe")
    options = {"cube": packed.recipe.options["cube"], "labels": made.shared if made else {}}
    return GalaxySpaxels(rows, options, packed.cubes[plateifu], digest_of(labels))


def patch_file_spaxels(
    root: Path, spec: PatchSpec, stats: Stats | None, plateifu: str
) -> GalaxySpaxels:
    """List a galaxy's spaxels by the index of its patch file.

    Raises
    ------
    DataError
        If the file is missing, unreadable, outdated or holds smaller patches than needed.
    """
    remedy = "Re-run cube_patch_processing.py --overwrite"
    path = patch_file(root, spec, plateifu)
    patches, rows, made = data_io.read_patches(path)
    if patches.shape[1] < spec.patch_size:
        raise DataError(
            f"{path}: patches of {patches.shape[1]}x{patches.shape[1]} spaxels, expected at "
            f"least {spec.patch_size}x{spec.patch_size}. {remedy} --patch-size {spec.patch_size}."
        )
    cube = utils.cube_path(root, plateifu)
    label = utils.label_path(root, spec.label_task, plateifu)
    if cube.is_file() and label.is_file():
        data_io.patch_recipe(
            data_io.read_cube_head(cube).recipe,
            data_io.read_labels(label),
            data_io.read_label_meta(label).get("recipe"),
            spec.patch_norm,
            made.options["patch_size"],
            stats,
        ).require(made, path, remedy)
    elif stats and made.inputs.get("set of statistics") != stats.recipe.digest:
        raise DataError(
            f"{path}: projected on other components than those of the split's statistics. "
            f"{remedy} with --split-dir."
        )
    options = {k: made.options[k] for k in ("cube", "labels")}
    return GalaxySpaxels(rows, options, made.inputs["cube"], made.inputs["label map"])


def warn_of_changes(
    table: pd.DataFrame, n_found: int, label_maps: dict[str, str], label_task: str
) -> None:
    """Warn if label maps have changed since the split was made, or spaxels of it are unusable."""
    if "label_digest" in table:
        split_maps = table.drop_duplicates("plateifu").set_index("plateifu")["label_digest"]
        length = DIGEST_LENGTH
        changed = [p for p, digest in label_maps.items() if digest[:length] != split_maps.get(p)]
        if changed:
            log.warning(
                "the label maps of %d of the %d galaxies (%s, ...) have changed since the split "
                "was made; rebuild it with create_data_splits.py --overwrite",
                len(changed),
                len(label_maps),
                changed[0],
            )
    if {"y", "x"} <= set(table.columns) and n_found < len(table):
        log.warning(
            "%d of the split's %d spaxels have no %s label or no usable spectrum: left out",
            len(table) - n_found,
            len(table),
            label_task,
        )


def check_scale(spec: PatchSpec, options: dict[str, Any], root: Path) -> None:
    """Raise a DataError if metallicities are not on the scale that the classes are defined on."""
    diagnostic = options.get("diagnostic")
    if spec.label_task == "logOH" and diagnostic not in (None, *LOGOH_SCALE):
        raise DataError(
            f"{root}: the labels were made with {diagnostic}; the class limits are on the scale of "
            f"{' and '.join(LOGOH_SCALE)}. Make labels with --diagnostic {LOGOH_SCALE[0]}."
        )


def patch_file(root: Path, spec: PatchSpec, plateifu: str) -> Path:
    """Path of a galaxy's patch file."""
    return utils.patch_path(root, spec.label_task, spec.patch_norm, plateifu)


# Datasets


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
            torch.from_numpy(self.samples.values[rows]),
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
        size = spec.patch_size + cutout - 1
        before = spec.patch_size // 2 + cutout // 2
        edges = (before, size - 1 - before)
        padded = [np.pad(packed.rows[p], (edges, edges)) for p in samples.plateifus]
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
        self._sample_values = torch.from_numpy(samples.values)
        dy, dx = np.divmod(turned_positions(size), size)
        self._dy, self._dx = torch.from_numpy(dy), torch.from_numpy(dx)
        if cutout > 1:
            assert probabilities is not None, "cutouts need the probabilities of the samples"
            self._classes = torch.full(self._rows.shape, LABEL_NONE, dtype=torch.int8)
            self._classes[self._centre] = self._sample_classes.to(torch.int8)
            self._values = torch.zeros(self._rows.shape)
            self._values[self._centre] = self._sample_values
            self._weights = torch.zeros(self._rows.shape)
            shares = probabilities / chance_of_being_seen(samples, probabilities, cutout)
            self._weights[self._centre] = torch.from_numpy(shares.astype(np.float32))

        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(self.spectra.device))

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
        box = usable_box(rows > 0)
        here = torch.from_numpy(rows[box]).to(self._rows.device)
        values = self._look_up(here).view(*here.shape, -1)
        return values.permute(2, 0, 1)[None, None], (box[0].start, box[1].start)

    def _look_up(self, rows: Tensor) -> Tensor:
        """Spectra of rows of any shape, (n, C) float32."""
        return self.spectra[:, self._bands].index_select(0, rows.reshape(-1)).float()


def as_tensor(packed: PackedCubes) -> Tensor:
    """Wrap the memory-mapped spectra of packed cubes, (row, C); row 0 is zero."""
    with warnings.catch_warnings():  # about a read-only map, which nothing writes to
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(packed.spectra)


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


# Loaders


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
    on_gpu = spectra is not None and spectra.is_cuda  # batches are cut there, without workers
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
            num_workers=0 if on_gpu else options.workers,
            multiprocessing_context="spawn" if options.workers and not on_gpu else None,
            persistent_workers=options.workers > 0 and not on_gpu,
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
