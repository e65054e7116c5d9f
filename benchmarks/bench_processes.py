"""How much faster two or more processes train the same network than one.

Trains with torchrun, on the packed cubes of a split (for GPUs with one process on each), by 1 and
by --processes processes in turn. The batches, and so the numbers learned, are the same.
Reads a data folder. Writes only a temporary folder and results/bench/bench_processes.json.

    python benchmarks/bench_processes.py --data-dir data/demo
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import measuring
import utils
from measuring import ROOT, make_row

import pandas as pd

import run_folder


@dataclass(frozen=True)
class Config(measuring.Options):
    """How much faster several processes train than one."""

    data_dir: Path = Path("data/demo")
    """Data folder with processed galaxies and the split hard_logOH."""
    processes: int = 2
    """Number of processes to compare with one."""
    epochs: int = 3
    """Epochs of each run; the first is not counted."""
    runs: int = 3
    """Runs of each kind, in turn."""
    device: str = "auto"
    """Where to compute, as in training."""


def rates(config: Config, processes: int, run_dir: Path) -> list[float]:
    """Labelled spaxels/s of the epochs of one run, without the first."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a CPU for each process, also for the only one
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    measuring.run_watched(
        [*torchrun, "--nproc-per-node", str(processes), ROOT / "run_SSFTT_training.py",
         "--data-dir", config.data_dir, "--run-dir", run_dir, "--epochs", str(config.epochs),
         "--patience", "0", "--no-baselines", "--device", config.device]
    )  # fmt: skip
    history = pd.read_csv(run_dir / run_folder.METRICS_FILE)
    return history["spaxels_per_s"].tolist()[1:]


def main(config: Config) -> int:
    """Measure and print."""
    found: dict[int, list[float]] = {1: [], config.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(config.runs):
            for n, rate in found.items():
                rate += rates(config, n, Path(folder) / f"{i}-{n}")
    one, several = (statistics.median(rate) for rate in found.values())
    name = f"training by {config.processes} processes"
    rows = [make_row(name, several, one, "spaxels/s", "one process", rates=found)]
    measuring.print_rows(rows)
    measuring.write_rows(config.results / "bench_processes.json", rows)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
