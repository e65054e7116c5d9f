"""Which spaxels are learned: the options that choose them, and the list of a split's samples.

Reads   processed/labels, and packed cubes or the index tables of patch files.

Galaxies are used together only if their cubes and labels were made with the same options.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

import data_io
import utils
from hsi_proc_fns import Stats
from labels import LABEL_NONE, LOGOH_SCALE, class_names, label_classes
from pack_cubes import PackedCubes, PackedType
from recipe import digest_of, require_alike
from utils import DataError, LabelTask, PatchNorm

log = logging.getLogger(__name__)

Source = Literal["packed", "patches"]
CUTOUT = 5
"""Default side of the cutouts from packed cubes, in spaxels."""
REBUILD_LABELS = "Re-run cube_processing.py (or process_single_cube.py) --overwrite"


@dataclass(frozen=True)
class PatchSpec:
    """What a sample is."""

    label_task: LabelTask
    n_classes: int = 6
    """Number of metallicity classes, 6 or 8; ignored for BPT, which has 3."""
    patch_norm: PatchNorm = "PCA"
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
    patch_norm: PatchNorm = "PCA"
    """Normalisation of the spectra. PCA: principal components of the training split."""
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
    with the same expectation as patch by patch, but faster. 1: patch by patch. Default 5 from
    packed cubes; patch files only allow 1."""
    batch_size: int = 256
    """Labelled spaxels per step; with cutouts on average."""
    samples_per_epoch: int | None = None
    """Labelled spaxels per epoch; default as many as there are in the training part."""
    balance: bool = True
    """Draw all classes equally often; otherwise as often as they occur."""
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
        return PatchSpec(
            self.label_task, self.n_classes, self.patch_norm, self.patch_size, self.bands
        )

    @property
    def cutout_size(self) -> int:
        """Side of the cutouts; 1 for patches."""
        return self.cutout or (CUTOUT if self.source == "packed" else 1)

    def check(self) -> None:
        """Raise a DataError if options contradict each other."""
        size, cutout = self.patch_size, self.cutout_size
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
    listing = SpaxelListing(root, spec, packed, stats)
    found: list[pd.DataFrame] = []
    problems: list[str] = []
    bar = tqdm(plateifus, desc="listing spaxels", unit="galaxy", leave=False, disable=None)
    for i, plateifu in enumerate(bar):
        try:
            rows = listing.of(plateifu)
        except DataError as error:
            problems.append(str(error))
            continue
        if by_spaxel:
            rows = rows.merge(chosen[plateifu], on=["y", "x"])
        found.append(rows.sort_values(["y", "x"]).assign(galaxy=i))
    if problems:
        remedy = " Or remove their label maps and rebuild the split."
        raise DataError(
            f"{problems[0]} ({len(problems)} of the {len(plateifus)} galaxies of this part of the "
            f"split have such a problem.){remedy if len(problems) < len(plateifus) else ''}"
        )
    whole = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    if whole.empty:
        raise DataError(
            f"{root}: no labelled {spec.label_task} spaxel in the {len(plateifus)} galaxies of a "
            "part of the split. Look at the label maps (processed/labels), or choose another split."
        )
    check_scale(spec, listing.options["labels"], root)
    if "label_digest" in table:
        split_maps = table.drop_duplicates("plateifu").set_index("plateifu")["label_digest"]
        now = {p: d[: data_io.DIGEST_LENGTH] for p, d in listing.label_maps.items()}
        changed = [p for p, digest in now.items() if digest != split_maps.get(p)]
        if changed:
            log.warning(
                "the label maps of %d of the %d galaxies (%s, ...) have changed since the split "
                "was made; rebuild it with create_data_splits.py --overwrite",
                len(changed),
                len(plateifus),
                changed[0],
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
    assert (classes != LABEL_NONE).all(), "a spaxel without a label became a sample"
    inputs = listing.options, listing.cubes, listing.label_maps
    return Samples(plateifus, galaxy, y, x, row, classes.astype(np.int64), values, *inputs)


class SpaxelListing:
    """List the labelled spaxels of galaxies, and check that the galaxies belong together.

    Attributes
    ----------
    options : dict
        How the cubes ("cube") and labels ("labels") of the galaxies so far were made.
    cubes, label_maps : dict of plateifu -> str
        As in `Samples`.
    """

    def __init__(
        self, root: Path, spec: PatchSpec, packed: PackedCubes | None, stats: Stats | None
    ) -> None:
        self.root, self.spec, self.packed, self.stats = Path(root), spec, packed, stats
        self.options: dict[str, dict[str, Any]] = {"cube": {}, "labels": {}}
        self.cubes: dict[str, str] = {}
        self.label_maps: dict[str, str] = {}
        self._first = ""

    def of(self, plateifu: str) -> pd.DataFrame:
        """List a galaxy's labelled and usable spaxels: row (-1 without patch files), y, x, label.

        Raises
        ------
        DataError
            If a file is missing or outdated, or was made with other options than the first
            galaxy's.
        """
        read = self._from_packed if self.packed is not None else self._from_patch_file
        rows, options, cube, label_map = read(plateifu)
        whose = f"those of {self._first}"
        for product, made in options.items():
            if made and self.options[product]:
                where = f"{plateifu} ({product})"
                require_alike(made, self.options[product], where, whose, REBUILD_LABELS)
        self.options = {k: self.options[k] or options[k] for k in self.options}
        self._first = self._first or plateifu
        self.cubes[plateifu], self.label_maps[plateifu] = cube, label_map
        return rows

    def _from_packed(self, plateifu: str) -> tuple[pd.DataFrame, dict[str, Any], str, str]:
        """Rows of a galaxy from its label map; options; digests of cube and label map."""
        assert self.packed is not None
        spec, usable = self.spec, self.packed.rows[plateifu] > 0
        path = utils.label_path(self.root, spec.label_task, plateifu)
        labels = data_io.read_labels(path)
        check_label_shape(labels, usable, path)
        classes = label_classes(labels, spec.label_task, spec.n_classes)
        y, x = np.nonzero((classes != LABEL_NONE) & usable)
        rows = pd.DataFrame({"row": -1, "y": y, "x": x, "label": labels[y, x]})
        made = data_io.read_label_meta(path).get("recipe")
        options = {
            "cube": self.packed.recipe.options["cube"],
            "labels": made.shared if made else {},
        }
        return rows, options, self.packed.cubes[plateifu], digest_of(labels)

    def _from_patch_file(self, plateifu: str) -> tuple[pd.DataFrame, dict[str, Any], str, str]:
        """Rows of a galaxy from its patch file's index; options; digests of cube and label map."""
        spec, remedy = self.spec, "Re-run cube_patch_processing.py --overwrite"
        path = patch_file(self.root, spec, plateifu)
        patches, rows, made = data_io.read_patches(path)
        if patches.shape[1] < spec.patch_size:
            raise DataError(
                f"{path}: patches of {patches.shape[1]}x{patches.shape[1]} spaxels, expected at "
                f"least {spec.patch_size}x{spec.patch_size}. {remedy} --patch-size "
                f"{spec.patch_size}."
            )
        cube = utils.cube_path(self.root, plateifu)
        label = utils.label_path(self.root, spec.label_task, plateifu)
        if cube.is_file() and label.is_file():
            data_io.patch_recipe(
                data_io.read_cube_head(cube).recipe,
                data_io.read_labels(label),
                data_io.read_label_meta(label).get("recipe"),
                spec.patch_norm,
                made.options["patch_size"],
                self.stats,
            ).require(made, path, remedy)
        elif self.stats and made.inputs.get("set of statistics") != self.stats.recipe.digest:
            raise DataError(
                f"{path}: projected on other components than those of the split's statistics. "
                f"{remedy} with --split-dir."
            )
        options = {k: made.options[k] for k in ("cube", "labels")}
        return rows, options, made.inputs["cube"], made.inputs["label map"]


def check_scale(spec: PatchSpec, options: dict[str, Any], root: Path) -> None:
    """Raise a DataError if metallicities are not on the scale that the classes are defined on."""
    diagnostic = options.get("diagnostic")
    if spec.label_task == "logOH" and diagnostic not in (None, *LOGOH_SCALE):
        raise DataError(
            f"{root}: the labels were made with {diagnostic}; the class limits are on the scale of "
            f"{' and '.join(LOGOH_SCALE)}. Make labels with --diagnostic {LOGOH_SCALE[0]}."
        )


def check_label_shape(labels: np.ndarray, usable: np.ndarray, path: Path) -> None:
    """Raise a DataError unless a label map and its cube have the same spaxels."""
    if labels.shape != usable.shape:
        raise DataError(
            f"{path}: label map of {labels.shape} spaxels, expected {usable.shape} as in the cube. "
            "Re-run process_single_cube.py --overwrite."
        )


def patch_file(root: Path, spec: PatchSpec, plateifu: str) -> Path:
    """Path of a galaxy's patch file."""
    return utils.patch_path(root, spec.label_task, spec.patch_norm, plateifu)
