"""Cut processed cubes into labelled patches for training.

Reads   processed/cubes/<plate>/<plateifu>.h5 and processed/labels/<label_task>/<plateifu>.npy;
        for the norm PCA also splits/<split_dir>/stats.h5.
Writes  processed/patches/<label_task>/<patch_norm>/<plateifu>/<plateifu>.npy, float32 (N, P, P, C),
        one row per labelled spaxel, beside its index table (row, y, x, label). Layout:
        docs/data_formats.md#patches.
The label belongs to the spaxel at [P//2, P//2]; beyond the field of view a patch holds zeros.
Training does not need these files: by default it uses packed cubes (pack_cubes.py), while a patch
file repeats every spaxel up to P*P times. No astronomy package is needed.

    python cube_patch_processing.py --plateifu 8485-1901 --patch-size 9 --patch-norms global
    python cube_patch_processing.py --label-tasks logOH --patch-norms PCA --split-dir hard_logOH
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import utils
from utils import LABEL_TASKS, DataError, LabelTask

import numpy as np

import data_io
import hsi_proc_fns
import loops
from hsi_proc_fns import Stats
from labels import LABEL_NONE, label_classes
from recipe import require_alike

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchOptions:
    """How patches are cut."""

    patch_norms: tuple[utils.PatchNorm, ...] = ()
    """Normalisations to write patch files for (global spatial spectral PCA); default none."""
    patch_size: int = 7
    """Side of a patch in spaxels."""
    split_dir: str | None = None
    """Split whose statistics the norm PCA uses, e.g. hard_logOH."""
    max_gb: float = 10
    """Refuse to write more patch files than this, in GB: a patch holds each spectrum P x P times.
    Packed cubes (pack_cubes.py), which training reads by default, hold it once."""

    def __post_init__(self) -> None:
        """Check the size of patches here, before any work is done."""
        if self.patch_size < 1:
            raise DataError(f"--patch-size {self.patch_size}: expected 1 or more.")


@dataclass(frozen=True)
class Config(PatchOptions, loops.GalaxyChoice):
    """Cut processed cubes into labelled patches."""

    patch_norms: tuple[utils.PatchNorm, ...] = ("global",)
    """Normalisations to write patch files for (global spatial spectral PCA)."""
    label_tasks: tuple[LabelTask, ...] = LABEL_TASKS  # type: ignore[assignment]
    """Labels to cut patches for."""


def patch_galaxy(
    root: Path,
    plateifu: str,
    label_task: str,
    options: PatchOptions,
    stats: Stats | None = None,
    overwrite: bool = False,
) -> str:
    """Write the patch files of one galaxy and label task, one for each norm.

    The norm PCA needs `stats` (`stats_for`). Files that were made otherwise are replaced with
    `overwrite` only. Returns "written" or "up to date".
    """
    import pandas as pd

    cube_path = utils.cube_path(root, plateifu)
    label_path = utils.label_path(root, label_task, plateifu)
    head = data_io.read_cube_head(cube_path)
    labels, about = data_io.read_labels(label_path), data_io.read_label_meta(label_path)
    hsi_proc_fns.check_label_shape(labels, head.measured, label_path)
    usable = hsi_proc_fns.is_usable(head.measured, head.wave.size)
    ys, xs = np.nonzero(usable & (label_classes(labels, label_task) != LABEL_NONE))
    index = pd.DataFrame({"row": np.arange(ys.size), "y": ys, "x": xs, "label": labels[ys, xs]})
    flux: np.ndarray | None = None
    for norm in options.patch_norms:
        norm_stats = stats if norm == "PCA" else None
        recipe = data_io.patch_recipe(
            head.recipe, labels, about.get("recipe"), norm, options.patch_size, norm_stats
        )
        target = utils.patch_path(root, label_task, norm, plateifu)
        if target.is_file() and not overwrite:
            made = data_io.read_patches(target)[2]
            recipe.require(made, target, "Replace it with --overwrite")
            continue
        if norm_stats is not None:
            theirs = norm_stats.recipe.options["cube"], cube_path, "the statistics"
            require_alike(head.recipe.shared, *theirs, data_io.REBUILD_CUBE)
        if flux is None:
            flux = data_io.read_cube(cube_path, with_errors=False).flux
        normalised = hsi_proc_fns.normalise(flux, norm, norm_stats, usable)
        patches = hsi_proc_fns.extract_patches(normalised, ys, xs, options.patch_size)
        meta = {
            "plateifu": plateifu,
            "mangaid": about.get("mangaid"),
            **utils.made_now(),
        }
        data_io.write_patches(target, patches, index, recipe, meta)
    return "up to date" if flux is None else "written"


def stats_for(root: Path, options: PatchOptions) -> Stats | None:
    """Read the statistics that the norms need, which must be up to date; None for no PCA."""
    if "PCA" not in options.patch_norms:
        return None
    if options.split_dir is None:
        raise DataError(
            "--patch-norms PCA: no --split-dir given; expected the split whose training part the "
            "components are of, e.g. --split-dir hard_logOH."
        )
    return data_io.read_split_stats(root, options.split_dir)


def patch_all_tasks(plateifu: str, root: Path, config: Config, stats: Stats | None) -> str:
    """Write one galaxy's patch files for all chosen label tasks."""
    words = {
        patch_galaxy(root, plateifu, task, config, stats, config.overwrite)
        for task in config.label_tasks
    }
    return "written" if "written" in words else "up to date"


def bytes_to_write(root: Path, config: Config, galaxies: Sequence[str], stats: Stats | None) -> int:
    """Estimate the size of the patch files still to be written, from the label maps."""
    total, n_bands = 0, 0
    for plateifu, task in itertools.product(galaxies, config.label_tasks):
        targets = {n: utils.patch_path(root, task, n, plateifu) for n in config.patch_norms}
        new = [n for n, path in targets.items() if config.overwrite or not path.is_file()]
        with contextlib.suppress(DataError):  # which the loop reports
            n_bands = n_bands or data_io.read_cube_head(utils.cube_path(root, plateifu)).wave.size
            labels = data_io.read_labels(utils.label_path(root, task, plateifu)) if new else None
            if labels is not None:
                count = np.count_nonzero(label_classes(labels, task) != LABEL_NONE)
                n_components = len(stats.components) if stats else 0
                columns = sum(n_components if norm == "PCA" else n_bands for norm in new)
                total += int(count) * columns * config.patch_size**2 * 4  # float32
    return total


def cut_patches(root: Path, config: Config, galaxies: Sequence[str]) -> int:
    """Write the patch files of galaxies, at most `config.max_gb`; return the exit code."""
    stats = stats_for(root, config)
    needed = bytes_to_write(root, config, galaxies, stats) / 1e9
    log.info(f"{needed:.2f} GB of patch files to write")
    if needed > config.max_gb:
        raise DataError(
            f"{root}: the patch files would take {needed:.2f} GB, expected at most --max-gb "
            f"{config.max_gb:g}. Raise it, choose fewer --patch-norms or --label-tasks, or train "
            "on packed cubes, which need no patch files."
        )
    work = partial(patch_all_tasks, root=root, config=config, stats=stats)
    folder = root / "processed" / "patches"
    failed_csv = loops.failed_path(folder, config.shard)
    outcome = loops.for_each_galaxy(work, galaxies, "patches", failed_csv, config.jobs)
    return loops.report(outcome, "patches", folder)


def main(config: Config) -> int:
    """Cut the patches of all chosen galaxies."""
    root = utils.data_dir(config.data_dir)
    galaxies = loops.chosen_galaxies(config, [p.stem for p in utils.processed_cubes(root)])
    return cut_patches(root, config, galaxies)


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
