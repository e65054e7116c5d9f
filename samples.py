"""Which spaxels are learned: the labelled, usable ones of a part of a split, with their classes.

Reads   processed/labels, and the maps of usable spectra in processed/packed, or the index tables in
        processed/patches. Layouts: docs/data_formats.md.

A sample is one such spaxel: its patch (1, band, P, P), with the spaxel at [P//2, P//2] and zeros
beyond the field of view, and its class. Galaxies are used together only if their cubes and labels
were made with the same options.

    >>> samples = get_samples(table, PatchSpec("logOH"), root, packed)
    >>> samples.class_counts(6)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import utils
from utils import DataError, LabelTask, Norm

import numpy as np
import pandas as pd
from tqdm import tqdm

import data_io
from hsi_proc_fns import Stats, check_label_shape
from labels import LABEL_NONE, LOGOH_SCALE, class_names, label_classes
from pack_cubes import PackedCubes
from recipe import DIGEST_LENGTH, digest_of, require_alike

log = logging.getLogger(__name__)

REBUILD_LABELS = "Re-run cube_processing.py (or process_single_cube.py) --overwrite"


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

    def patch_file(self, root: Path, plateifu: str) -> Path:
        """Path of a galaxy's patch file in a data folder."""
        return utils.patch_path(root, self.label_task, self.patch_norm, plateifu)


@dataclass
class Samples:
    """Labelled spaxels, one row each."""

    plateifus: list[str]
    """The galaxies."""
    galaxy: np.ndarray
    """(N,) int32, rows of `plateifus`."""
    y: np.ndarray
    x: np.ndarray
    row: np.ndarray
    """(N,) int32: the spaxel; its row in the patch file (-1 without one)."""
    classes: np.ndarray
    """(N,) int64."""
    values: np.ndarray
    """(N,) float32, labels: 12+log(O/H) in dex, or the BPT class."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """How all the cubes ("cube") and labels ("labels") were made; empty if nothing says."""
    cubes: dict[str, str] = field(default_factory=dict)
    label_maps: dict[str, str] = field(default_factory=dict)
    """By plateifu, digests of the cubes (of their recipes) and label maps (of their values)."""
    mangaids: dict[str, str] = field(default_factory=dict)
    """By plateifu, the galaxy that it is an observation of."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of the split and, with the norm PCA, of its statistics."""

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
        yield from pd.Series(self.galaxy).groupby(self.galaxy).indices.items()


class GalaxySpaxels(NamedTuple):
    """Labelled, usable spaxels of one galaxy, and how they were made; see `Samples`."""

    rows: pd.DataFrame
    """row (of the patch file, else -1), y, x, label."""
    options: dict[str, dict[str, Any]]
    cube: str
    label_map: str


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
        The part's CSV: plateifu, mangaid, and y and x where the split is by spaxel.
    packed : PackedCubes, optional
        Cubes to learn from; without them, the patch files below `root`, the data folder.
    stats : Stats, optional
        Statistics that patch files with the norm PCA must have been made with.

    Raises
    ------
    DataError
        If files of galaxies are missing or do not belong together (the first one is named), or
        there is no sample.
    """
    plateifus = table["plateifu"].unique().tolist()
    found: dict[str, GalaxySpaxels] = {}
    options: dict[str, dict[str, Any]] = {"cube": {}, "labels": {}}
    problems: list[str] = []
    bar = tqdm(plateifus, desc="listing spaxels", unit="observation", leave=False, disable=None)
    for plateifu in bar:
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
    each = [s.rows.sort_values(["y", "x"]).assign(galaxy=i) for i, s in enumerate(found.values())]
    whole = pd.concat(each, ignore_index=True) if each else pd.DataFrame()
    by_spaxel = {"y", "x"} <= set(table.columns)
    if by_spaxel and each:
        galaxy = table["plateifu"].map({p: i for i, p in enumerate(plateifus)})
        whole = whole.merge(table[["y", "x"]].assign(galaxy=galaxy))
    if whole.empty:
        raise DataError(
            f"{root}: no labelled {spec.label_task} spaxel in the {len(plateifus)} galaxies of a "
            "part of the split. Look at the label maps (processed/labels), or choose another split."
        )
    diagnostic = options["labels"].get("diagnostic")
    if spec.label_task == "logOH" and diagnostic not in (None, *LOGOH_SCALE):
        raise DataError(
            f"{root}: the labels were made with {diagnostic}; the class limits are on the scale of "
            f"{' and '.join(LOGOH_SCALE)}. Make labels with --diagnostic {LOGOH_SCALE[0]}."
        )
    label_maps = {p: spaxels.label_map for p, spaxels in found.items()}
    warn_of_changed_labels(table, label_maps)
    if by_spaxel and len(whole) < len(table):
        log.warning(
            "%d of the split's %d spaxels have no %s label or no usable spectrum: left out",
            len(table) - len(whole),
            len(table),
            spec.label_task,
        )
    classes = label_classes(whole["label"].to_numpy(), spec.label_task, spec.n_classes)
    assert (classes != LABEL_NONE).all(), "a spaxel without a label became a sample"
    galaxy, y, x, row = (whole[name].to_numpy(np.int32) for name in ("galaxy", "y", "x", "row"))
    return Samples(
        plateifus,
        galaxy,
        y,
        x,
        row,
        classes=classes.astype(np.int64),
        values=whole["label"].to_numpy(np.float32),
        options=options,
        cubes={p: spaxels.cube for p, spaxels in found.items()},
        label_maps=label_maps,
        mangaids=dict(zip(table["plateifu"], table["mangaid"], strict=True)),
    )


def packed_spaxels(
    packed: PackedCubes, root: Path, spec: PatchSpec, plateifu: str
) -> GalaxySpaxels:
    """List a galaxy's spaxels by its label map and its usable spectra."""
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
    path = spec.patch_file(root, plateifu)
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


def warn_of_changed_labels(table: pd.DataFrame, label_maps: dict[str, str]) -> None:
    """Warn if label maps have changed since the split was made."""
    if "label_digest" not in table:
        return
    split_maps = table.drop_duplicates("plateifu").set_index("plateifu")["label_digest"]
    length = DIGEST_LENGTH
    changed = [p for p, digest in label_maps.items() if digest[:length] != split_maps.get(p)]
    if changed:
        log.warning(
            "the label maps of %d of the %d galaxies (%s, ...) have changed since the split was "
            "made; rebuild it with create_data_splits.py --overwrite",
            len(changed),
            len(label_maps),
            changed[0],
        )
