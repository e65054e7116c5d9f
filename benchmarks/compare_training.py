"""Accuracy and speed of training patch by patch and on cutouts, and of the spectral stems.

Reads   a data folder with a hard split (splits/hard_logOH) and its statistics; without
        --data-dir it simulates a survey first (36 small galaxies, the demonstration's).
Writes  runs and the simulated survey into --work-dir, results/bench/compare_training.json.

Every entry is a stem, and the cutout's width (1: patch by patch). All see the same galaxies, the
same number of labelled spaxels an epoch, the same epochs, the same peak learning rate; an entry is
trained with each seed. Accuracies are those of the best epoch by validation (`monitor`), on the
test galaxies, and on validation and test galaxies together; the number after +- is the standard
deviation over the seeds. Stopped, it goes on where it was when the same command is given again.

    python benchmarks/compare_training.py
    python benchmarks/compare_training.py --entries pca30:1 pca30:11 --seeds 0 1 2 3 4
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_network
import measuring
import numpy as np
import pandas as pd

import eval_fns
import run_SSFTT_training as training
import utils
from utils import DataError

STEMS: dict[str, dict[str, Any]] = {
    stem: {"patch_norm": "PCA"} if "bands" in options else {"patch_norm": "spectral", **options}
    for stem, options in bench_network.VARIANTS.items()
}
"""Options of training; the components that stand in for bands come with the norm PCA. With the norm
global, one brightness scale a galaxy, training on cutouts hardly gets going:
docs/science_choices.md."""
SPLIT = "hard_logOH"


@dataclass(frozen=True)
class Config:
    """Accuracy and speed of training patch by patch and on cutouts, and of the spectral stems."""

    work_dir: Path
    """Folder for the runs and, without --data-dir, the simulated survey."""
    data_dir: Path | None = None
    """Data folder with splits/hard_logOH and its 30 principal components."""
    entries: tuple[str, ...] = tuple(f"{stem}:{t}" for stem in reversed(STEMS) for t in (5, 11, 1))
    """What to train, stem:cutout; the default takes about an hour on two cores, a third of it for
    fiducial:1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, order and dropout."""
    epochs: int = 20
    """Passes over the training spaxels."""
    lr: float = 1e-3
    """Peak learning rate."""
    batch_size: int = 256
    """Labelled spaxels a step."""
    results: Path = measuring.RESULTS
    """Folder of the JSON."""
    debug: bool = False
    """Show the traceback of an error."""


def make_survey(root: Path) -> None:
    """Simulate the demonstration's survey, up to the statistics; finished steps are kept."""
    steps = (
        "mock_manga.py --n-galaxies 36 --bundles 19 --seed 1 --jobs 2",
        "cube_processing.py --remove-gas-velocity --no-splits",
        "create_data_splits.py --label-task logOH --fractions 0.6 0.15 0.25 --seed 1",
        f"calc_data_stats.py --split-dir {SPLIT} --n-components 30",
    )
    for step in steps:
        script, *words = step.split()
        words = [sys.executable, str(measuring.ROOT / script), "--data-dir", str(root), *words]
        subprocess.run(words, check=True)


def train_entry(config: Config, root: Path, entry: str, seed: int) -> dict[str, float]:
    """Train one entry with one seed; return its scores and rate."""
    stem, _, cutout = entry.partition(":")
    if stem not in STEMS or not cutout.isdigit():
        raise DataError(f"entry {entry!r}: expected stem:cutout, the stem of {', '.join(STEMS)}.")
    run_dir = config.work_dir / "runs" / f"{stem}_{cutout}_{config.epochs}epochs_{seed}"
    options = training.TrainConfig(
        data_dir=root,
        split_dir=SPLIT,
        run_dir=run_dir,
        resume="auto",
        source="packed",
        cutout=int(cutout),
        augment=True,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        baselines=False,
        seed=seed,
        **STEMS[stem],
    )
    saved = run_dir / eval_fns.CONFIG_FILE
    if saved.is_file() and Path(json.loads(saved.read_text())["data_dir"]) != root:
        raise DataError(f"{run_dir}: trained on other data. Choose another --work-dir.")
    if training.main(options) != utils.EXIT_DONE:
        raise DataError(f"{run_dir}: stopped by a signal; the same command goes on.")
    scores = {part: eval_fns.evaluate_split(run_dir, part) for part in ("val", "test")}
    hits = sum(s["accuracy"] * s["spaxels"] for s in scores.values())
    return {
        "test_accuracy": scores["test"]["accuracy"],
        "test_mae_dex": scores["test"]["mae_dex"],
        "held_out_accuracy": hits / sum(s["spaxels"] for s in scores.values()),
        "train_accuracy": float(pd.read_csv(run_dir / "metrics.csv")["train_accuracy"].iloc[-1]),
        "spaxels_per_s": float(pd.read_csv(run_dir / "metrics.csv")["spaxels_per_s"].median()),
        "parameters": json.loads((run_dir / eval_fns.MODEL_FILE).read_text())["parameters"],
    }


def main(config: Config) -> int:
    """Train everything, print the table, write it."""
    root = config.data_dir or config.work_dir / "survey"
    if config.data_dir is None:
        make_survey(root)
    rows = []
    for entry in config.entries:
        runs = [train_entry(config, root, entry, seed) for seed in config.seeds]
        utils.setup_logging()  # the run's log file is its own
        row: dict[str, Any] = {"name": entry, "runs": runs}
        for key in runs[0]:
            values = [run[key] for run in runs]
            row[key] = statistics.fmean(values)
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else np.nan
        rows.append(row)
        print(line_of(row), flush=True)
    print(f"\n{len(config.seeds)} seeds, {config.epochs} epochs\n{HEADER}")
    print("\n".join(line_of(row) for row in rows))
    out = config.results / "compare_training.json"
    measuring.write_rows(out, rows, config=utils.config_dict(config))
    return utils.EXIT_DONE


HEADER = (
    f"{'stem:cutout':<18}{'parameters':>11}{'test accuracy':>17}{'held-out acc.':>17}"
    f"{'MAE (dex)':>18}{'spaxels/s':>11}"
)


def line_of(row: dict[str, Any]) -> str:
    """Put a row of the table into a line."""
    cells = [
        f"{row[key]:.{digits}f} +- {row[f'{key}_std']:.{digits}f}"
        for key, digits in (("test_accuracy", 3), ("held_out_accuracy", 3), ("test_mae_dex", 4))
    ]
    return (
        f"{row['name']:<18}{row['parameters']:>11,.0f}{cells[0]:>17}{cells[1]:>17}{cells[2]:>18}"
        f"{row['spaxels_per_s']:>11.0f}"
    )


if __name__ == "__main__":
    logging.captureWarnings(True)
    utils.run_command(main, Config, __doc__)
