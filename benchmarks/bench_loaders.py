"""How fast loaders feed training: patch files, cubes, packed cubes; one process or several.

Simulates DR17-format galaxies, processes them as the commands do, cuts patch files of full spectra
and measures, in turn, a pass of each loader over labelled spaxels, without a network. All files
are in the page cache and all cubes in the loader's, as in any pass but the first: on a cluster's
disk the larger files lose more.
Reads and writes only a temporary folder (about 0.7 GB), and results/bench/bench_loaders.json.

    python benchmarks/bench_loaders.py
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_storage
import measuring
import pandas as pd
import torch
from measuring import Row, make_row
from torch.utils.data import DataLoader

import data_fns
import data_io
import process_single_cube as single
import utils
from labels import LABEL_NONE

SPLIT = "hard_logOH"
SPEC = data_fns.PatchSpec("logOH", patch_norm="global", patch_size=7)


@dataclass(frozen=True)
class Config:
    """How fast loaders feed training."""

    galaxies: int = 2
    """Simulated galaxies to load from."""
    bundle: int = 19
    """Their fibres."""
    samples: int = 1024
    """Labelled spaxels of one pass."""
    batch_size: int = 256
    """Labelled spaxels a batch."""
    cutout: int = 5
    """Spaxels a side of a cutout (odd)."""
    workers: int = 2
    """Processes to compare with none."""
    runs: int = 3
    """Counted passes of each, after one that is not."""
    results: Path = measuring.RESULTS
    """Folder of the JSON."""


def make_data(root: Path, config: Config) -> dict[str, float]:
    """Simulate, process, cut and pack; return the MB of patch files and packed cubes."""
    names = bench_storage.simulate(root, (config.bundle,), config.galaxies)[config.bundle]
    options = single.GalaxyOptions(
        label_tasks=("logOH",), patch_norms=(SPEC.patch_norm,), patch_size=SPEC.patch_size
    )
    for name in names:
        single.process_galaxy(name, root, options)
    table = pd.DataFrame({"plateifu": names, "mangaid": names})
    nobody = table[:0]
    parts = {"train": table, "val": nobody, "test": nobody}
    data_io.write_split(utils.split_path(root, SPLIT), parts, {"kind": "hard", "seed": 0})
    make_loader(root, config, source="packed")
    norm = SPEC.patch_norm
    files = {"patch_files": [utils.patch_path(root, SPEC.label_task, norm, n) for n in names]}
    files["packed"] = [data_io.packed_path(root, SPLIT, norm, "float16")]
    return {k: sum(p.stat().st_size for p in paths) / 1e6 for k, paths in files.items()}


def make_loader(root: Path, config: Config, **options: Any) -> DataLoader:
    """Make a training loader of the split."""
    return data_fns.get_dataloaders(
        root,
        SPLIT,
        SPEC,
        parts=("train",),
        batch_size=config.batch_size,
        augment=True,
        num_samples=config.samples,
        **options,
    )["train"]


def one_pass(loader: DataLoader) -> int:
    """Load all batches; count the labelled spaxels and touch every value."""
    labelled = 0
    for batch in loader:
        labelled += int((batch.classes != LABEL_NONE).sum())
        assert torch.isfinite(batch.patches.sum()), "a value that is no number"
    return labelled


def measure(root: Path, config: Config) -> list[Row]:
    """Compare the loaders."""
    loaders = {
        "patch files": make_loader(root, config, source="patches"),
        "cubes": make_loader(root, config, source="cubes"),
        "cubes, workers": make_loader(root, config, source="cubes", workers=config.workers),
        "packed": make_loader(root, config, source="packed"),
        "cutouts": make_loader(root, config, source="packed", cutout=config.cutout),
    }
    labelled: dict[str, int] = {}

    def work(name: str) -> None:
        labelled[name] = one_pass(loaders[name])

    works = {name: functools.partial(work, name) for name in loaders}
    took = measuring.in_turn(works, config.runs)
    rates = {name: labelled[name] / seconds for name, seconds in took.items()}
    rows = [
        ("patches_from_cubes", "cubes", "patch files"),
        ("patches_from_packed", "packed", "patch files"),
        ("cutouts_from_packed", "cutouts", "patch files"),
        (f"loader_workers_{config.workers}", "cubes, workers", "cubes"),
    ]
    return [make_row(name, rates[a], rates[b], "spaxels/s", b) for name, a, b in rows]


def main(config: Config) -> int:
    """Measure, print, write."""
    if min(config.galaxies, config.samples, config.batch_size, config.workers, config.runs) < 1:
        raise utils.DataError("every number must be at least 1.")
    torch.set_num_threads(utils.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        sizes = make_data(Path(folder), config)
        rows = measure(Path(folder), config)
    against = f"patch files, {SPEC.patch_size}x{SPEC.patch_size}, float32"
    rows.append(make_row("packed_size", sizes["packed"], sizes["patch_files"], "MB", against))
    measuring.print_rows(rows)
    measuring.write_rows(config.results / "bench_loaders.json", rows)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
