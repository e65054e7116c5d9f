"""How fast loaders feed training: patch files, packed cubes, cutouts; one process or several.

Simulates DR17-format galaxies, processes them with the code of the commands, cuts patch files of
full spectra, packs the cubes, and times in turn a pass of each loader over labelled spaxels,
without a network. All files are in the page cache, as in every pass but the first; if they have to
be read from a disk, the larger files lose more.
Reads and writes only a temporary folder (about 0.7 GB), and results/bench/bench_loaders.json.

    python benchmarks/bench_loaders.py
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import utils
from measuring import Row, make_row

import bench_storage
import pandas as pd
import torch
from torch.utils.data import DataLoader

import data_fns
import data_io
import pack_cubes
import process_single_cube as single
from data_fns import DataOptions
from labels import LABEL_NONE
from recipe import Recipe

TASK: utils.LabelTask = "logOH"
NORM: utils.PatchNorm = "global"
PATCH_SIZE = 7
"""Full spectra are loaded."""
SPLIT = utils.default_split(TASK)


@dataclass(frozen=True)
class Config(measuring.Options):
    """How fast loaders feed training."""

    galaxies: int = 2
    """Number of simulated galaxies."""
    bundle: int = 19
    """Fibres in the bundle of each."""
    samples: int = 1024
    """Labelled spaxels per pass."""
    batch_size: int = 256
    """Labelled spaxels per batch."""
    cutout: int = 5
    """Width of a cutout in spaxels (odd)."""
    workers: int = 2
    """Worker processes to compare with none."""
    runs: int = 3
    """Timed passes of each loader, after one that is not counted."""


def make_data(root: Path, config: Config) -> dict[str, float]:
    """Simulate, process, cut and pack; return the MB of patch files and packed cubes."""
    names = bench_storage.simulate(root, (config.bundle,), config.galaxies)[config.bundle]
    options = single.GalaxyOptions(label_tasks=(TASK,), patch_norms=(NORM,), patch_size=PATCH_SIZE)
    for name in names:
        single.process_galaxy(name, root, options)
    assert single.cut_patches(root, options, names) == utils.EXIT_DONE
    table = pd.DataFrame({"plateifu": names, "mangaid": names})
    parts = {"train": table, "val": table[:0], "test": table[:0]}
    recipe = Recipe("split", data_io.SPLIT_VERSION, {"kind": "hard", "seed": 0})
    data_io.write_split(utils.split_path(root, SPLIT), parts, recipe)
    packed = pack_cubes.open_packed(root, SPLIT, NORM, names)
    files = {"patch_files": [utils.patch_path(root, TASK, NORM, n) for n in names]}
    files["packed"] = [packed.path]
    return {k: sum(p.stat().st_size for p in paths) / 1e6 for k, paths in files.items()}


def make_loader(root: Path, config: Config, **options: Any) -> DataLoader:
    """Make a training loader of the split; augmented, as training does by default."""
    data = DataOptions(
        network="ssftt",
        data_dir=root,
        split_dir=SPLIT,
        label_task=TASK,
        patch_norm=NORM,
        patch_size=PATCH_SIZE,
        batch_size=config.batch_size,
        samples_per_epoch=config.samples,
        **options,
    )
    return data_fns.get_dataloaders(data, parts=("train",))["train"]


def one_pass(loader: DataLoader) -> int:
    """Load all batches, read every value, and count the labelled spaxels."""
    labelled = 0
    for batch in loader:
        labelled += int((batch.classes != LABEL_NONE).sum())
        assert torch.isfinite(batch.patches.sum()), "a value is not finite"
    return labelled


def measure(root: Path, config: Config) -> list[Row]:
    """Compare the loaders."""
    loaders = {
        "patch files": make_loader(root, config, source="patches"),
        "packed": make_loader(root, config, cutout=1),
        "packed, workers": make_loader(root, config, cutout=1, workers=config.workers),
        "cutouts": make_loader(root, config, cutout=config.cutout),
    }
    works = {name: functools.partial(one_pass, loader) for name, loader in loaders.items()}
    rates = measuring.rates_of(works, config.runs)
    no_workers = "patches from packed cubes, no workers"
    return [
        make_row(name, rates[ours], rates[baseline], "spaxels/s", against)
        for name, ours, baseline, against in (
            ("patches_from_packed", "packed", "patch files", "patch files"),
            ("cutouts_from_packed", "cutouts", "patch files", "patch files"),
            (f"loader_workers_{config.workers}", "packed, workers", "packed", no_workers),
        )
    ]


def main(config: Config) -> int:
    """Measure, print, write."""
    if min(config.galaxies, config.samples, config.batch_size, config.workers, config.runs) < 1:
        raise utils.DataError(
            "--galaxies, --samples, --batch-size, --workers, --runs: expected at least 1 of each."
        )
    torch.set_num_threads(utils.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        sizes = make_data(Path(folder), config)
        rows = measure(Path(folder), config)
    against = f"patch files, {PATCH_SIZE}x{PATCH_SIZE}, float32"
    rows.append(make_row("packed_size", sizes["packed"], sizes["patch_files"], "MB", against))
    measuring.print_rows(rows)
    measuring.write_rows(config.results / "bench_loaders.json", rows)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
