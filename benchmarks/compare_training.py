"""Accuracy and speed of training patch by patch and on cutouts, for every spectral front end.

Reads   a data folder with a hard split (splits/hard_logOH) and its statistics; without
        --data-dir it simulates a survey first (36 small galaxies, those of demo.sh).
Writes  runs and the simulated survey into --work-dir, results/bench/compare_training.json.

An entry is a spectral front end and the width of the cutouts (1: patch by patch). All entries see
the same galaxies, the same number of labelled spaxels per epoch, the same epochs and the same peak
learning rate; each is trained once per seed. Accuracies are those of the best epoch by validation,
on the test galaxies, and on validation and test galaxies together; the number after +- is the
standard deviation over the seeds. If it is stopped, the same command continues.

    python benchmarks/compare_training.py --work-dir work
    python benchmarks/compare_training.py --work-dir work --entries pca30:1 pca30:5 --seeds 0 1 2 3
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import utils
from utils import DataError

import bench_network
import numpy as np
import pandas as pd

import eval_fns
import run_folder
import run_SSFTT_training
from run_folder import ModelCard

FRONT_ENDS: dict[str, dict[str, Any]] = {
    name: {"patch_norm": "PCA"} if "bands" in options else {"patch_norm": "spectral", **options}
    for name, options in bench_network.VARIANTS.items()
}
"""Options of training. pca30 learns from principal components (the norm PCA), the others from whole
spectra; with the norm global, training on cutouts hardly progresses: docs/science_choices.md."""
SPLIT = "hard_logOH"


@dataclass(frozen=True)
class Config(measuring.Options):
    """Accuracy and speed of training patch by patch and on cutouts, for every front end."""

    work_dir: Path
    """Folder for the runs and, without --data-dir, the simulated survey."""
    data_dir: Path | None = None
    """Data folder with splits/hard_logOH and its 30 principal components."""
    entries: tuple[str, ...] = tuple(f"{f}:{t}" for f in reversed(FRONT_ENDS) for t in (5, 11, 1))
    """What to train, as front_end:cutout_width; the default takes about an hour on two cores, a
    third of it for published:1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds; each decides weight initialisation, sample order and dropout."""
    epochs: int = 20
    """Passes over the training spaxels."""
    lr: float = 1e-3
    """Peak learning rate."""
    batch_size: int = 256
    """Labelled spaxels per step; with cutouts on average."""


def make_survey(root: Path) -> None:
    """Simulate the survey of demo.sh, up to the statistics; finished steps are skipped."""
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
    name, _, cutout = entry.partition(":")
    if name not in FRONT_ENDS or not cutout.isdigit():
        raise DataError(
            f"--entries {entry}: expected front_end:cutout_width, e.g. pca30:5, with a front end "
            f"of {', '.join(FRONT_ENDS)}."
        )
    run_dir = config.work_dir / "runs" / f"{name}_{cutout}_{config.epochs}epochs_{seed}"
    options = run_SSFTT_training.train_config(
        network="ssftt",
        data_dir=root,
        split_dir=SPLIT,
        run_dir=run_dir,
        resume="auto",
        cutout=int(cutout),
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        patience=0,
        baselines=False,
        seed=seed,
        **FRONT_ENDS[name],
    )
    is_begun = (run_dir / run_folder.MODEL_FILE).is_file()
    if is_begun and Path(ModelCard.read(run_dir).data_dir) != root.resolve():
        raise DataError(
            f"{run_dir}: trained on other data, expected {root}. Choose another --work-dir."
        )
    if run_SSFTT_training.main(options) != utils.EXIT_DONE:
        raise DataError(f"{run_dir}: stopped by a signal. Give the same command again to continue.")
    scores = {part: eval_fns.evaluate_split(run_dir, part).scores for part in ("val", "test")}
    hits = sum(s["accuracy"] * s["spaxels"] for s in scores.values())
    history = pd.read_csv(run_dir / run_folder.METRICS_FILE)
    return {
        "test_accuracy": scores["test"]["accuracy"],
        "test_mae_dex": scores["test"]["mae_dex"],
        "held_out_accuracy": hits / sum(s["spaxels"] for s in scores.values()),
        "train_accuracy": float(history["train_accuracy"].iloc[-1]),
        "spaxels_per_s": float(history["spaxels_per_s"].median()),
        "parameters": ModelCard.read(run_dir).parameters,
    }


def main(config: Config) -> int:
    """Train everything, print the table, write it."""
    root = config.data_dir or config.work_dir / "survey"
    if config.data_dir is None:
        make_survey(root)
    rows = []
    for entry in config.entries:
        runs = [train_entry(config, root, entry, seed) for seed in config.seeds]
        utils.setup_logging()  # no longer into the run's log file
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
    f"{'front end:cutout':<18}{'parameters':>11}{'test accuracy':>17}{'held-out acc.':>17}"
    f"{'MAE (dex)':>18}{'spaxels/s':>11}"
)


def line_of(row: dict[str, Any]) -> str:
    """Lay out a row of the table as a line."""
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
