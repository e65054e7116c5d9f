"""Cut processed cubes into labelled patches for training.

Reads   processed/cubes/<plate>/<plateifu>.h5 and processed/labels/<label_task>/<plateifu>.npy;
        for the norm PCA also splits/<split_dir>/stats.h5.
Writes  processed/patches/<label_task>/<patch_norm>/<plateifu>/<plateifu>.npy, float32 (N, P, P, C),
        one row a labelled spaxel, beside its index table (row, y, x, label). Layout:
        docs/data_formats.md#patches.
The label belongs to the spaxel at [P//2, P//2]; beyond the field of view a patch holds zeros.
Training does not need these files (it cuts patches from the cubes); a patch file repeats every
spaxel up to P*P times. No astronomy package is needed.

    python cube_patch_processing.py --plateifu 8485-1901 --patch-size 9 --patch-norms global
    python cube_patch_processing.py --label-tasks logOH --patch-norms PCA --split-dir hard_logOH
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import data_io
import hsi_proc_fns
import loops
import utils
from labels import LABEL_NONE, label_classes
from utils import LABEL_TASKS, DataError, LabelTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchOptions:
    """How patches are cut."""

    patch_norms: tuple[utils.PatchNorm, ...] = ()
    """Normalisations to write patch files for (global spatial spectral PCA)."""
    patch_size: int = 7
    """Spaxels a side."""
    split_dir: str | None = None
    """Split whose statistics the norm PCA uses."""


@dataclass(frozen=True)
class Config(PatchOptions, loops.GalaxyChoice):
    """Cut processed cubes into labelled patches."""

    patch_norms: tuple[utils.PatchNorm, ...] = ("global",)
    """Normalisations to write patch files for (global spatial spectral PCA)."""
    label_tasks: tuple[LabelTask, ...] = LABEL_TASKS  # type: ignore[assignment]
    """Labels to cut patches for."""


def label_patches(
    flux: np.ndarray,
    labels: np.ndarray,
    label_task: str,
    patch_norm: str,
    patch_size: int,
    stats: data_io.Stats | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the patches of every labelled, usable spaxel.

    Parameters
    ----------
    flux : (y, x, band) array
    labels : (y, x) array
        Label map of the task.
    label_task, patch_norm, patch_size, stats
        As in `hsi_proc_fns.normalise` and `extract_patches`.

    Returns
    -------
    patches : (N, P, P, C) float32
    ys, xs : (N,) int
        Spaxels at their centres, in C order of the map.
    """
    if labels.shape != flux.shape[:2]:
        raise DataError(f"label map of {labels.shape}, cube of {flux.shape[:2]} spaxels.")
    usable = hsi_proc_fns.usable_spaxels(flux)
    has_label = label_classes(labels, label_task) != LABEL_NONE
    ys, xs = np.nonzero(usable & has_label)
    normed = hsi_proc_fns.normalise(flux, patch_norm, stats, usable)
    return hsi_proc_fns.extract_patches(normed, ys, xs, patch_size), ys, xs


def patch_galaxy(
    root: Path,
    plateifu: str,
    label_task: str,
    options: PatchOptions,
    overwrite: bool = False,
) -> str:
    """Write the patch files of one galaxy and label task, one for each norm.

    Returns
    -------
    {"written", "up to date"}

    Raises
    ------
    DataError
        Missing or unreadable inputs, an existing file made with other options.
    """
    import pandas as pd

    cube_path = utils.cube_path(root, plateifu)
    label_path = utils.label_path(root, label_task, plateifu)
    source = data_io.patch_source(cube_path, label_path)
    cube = labels = None
    for norm in options.patch_norms:
        stats: data_io.Stats | None = None
        recipe: dict[str, Any] = {**source, "patch_norm": norm, "patch_size": options.patch_size}
        if norm == "PCA":
            stats = data_io.read_split_stats(_stats_path(root, options.split_dir))
            recipe["stats"] = stats.sha256
        target = utils.patch_path(root, label_task, norm, plateifu)
        if target.is_file() and not overwrite:
            utils.check_recipe(target, data_io.read_patches(target)[2], recipe)
            continue
        if cube is None or labels is None:
            cube = data_io.read_cube(cube_path, with_errors=False)
            labels = data_io.read_labels(label_path)
        kind = data_io.CubeKind.of(cube.wave, cube.attrs)
        if stats is not None:
            kind.check(cube_path, stats.kind, "the statistics")
        patches, ys, xs = label_patches(
            cube.flux, labels, label_task, norm, options.patch_size, stats
        )
        index = pd.DataFrame({"row": np.arange(ys.size), "y": ys, "x": xs, "label": labels[ys, xs]})
        meta: dict[str, Any] = {
            **recipe,
            "plateifu": plateifu,
            "label_task": label_task,
            "mangaid": cube.attrs.get("mangaid"),
            "cubes": kind._asdict(),
            "code_version": utils.VERSION,
            "created_utc": utils.utc_now(),
        }
        data_io.write_patches(target, patches, index, meta)
    return "up to date" if cube is None else "written"


def _stats_path(root: Path, split_dir: str | None) -> Path:
    """Statistics file for the norm PCA."""
    if split_dir is None:
        raise DataError(
            "patch norm PCA needs a training split's statistics: name the split with --split-dir."
        )
    return utils.stats_path(root, split_dir)


def patch_all_tasks(
    plateifu: str, root: Path, label_tasks: tuple[str, ...], options: PatchOptions, overwrite: bool
) -> str:
    """Write one galaxy's patch files for several label tasks."""
    words = {patch_galaxy(root, plateifu, task, options, overwrite) for task in label_tasks}
    return "written" if "written" in words else "up to date"


def main(config: Config) -> int:
    """Cut the patches of all chosen galaxies."""
    root = utils.data_dir(config.data_dir)
    cubes = utils.processed_cubes(root)
    galaxies = loops.chosen_galaxies(config, [p.stem for p in cubes])
    options = PatchOptions(config.patch_norms, config.patch_size, config.split_dir)
    work = partial(
        patch_all_tasks,
        root=root,
        label_tasks=config.label_tasks,
        options=options,
        overwrite=config.overwrite,
    )
    failed_csv = loops.failed_path(root / "processed" / "patches", config.shard)
    outcome = loops.for_each_galaxy(work, galaxies, "patches", failed_csv, config.jobs)
    return loops.report(outcome, "patches", root / "processed" / "patches")


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
