"""Run the benchmarks of the MaNGA pipeline and gather their rows in one table.

Each benchmark runs in a process of its own, on --cores cores, one after the other; the two sides of
a row are always measured in the same run. Takes less than ten minutes on two cores. A ratio is ours
divided by the baseline: of times (s) and sizes (MB, GB) less is better, of rates (.../s) more.
Writes results/bench/bench.json and one JSON per benchmark. Not included: bench_indian_pines.py
(accuracy, ten minutes more), compare_training.py (an hour), bench_cta.py (which needs
image-extractor's environment) and GPUs (make bench-gpu).

    python benchmarks/run_all.py
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import measuring
import utils
from measuring import Row

log = logging.getLogger(__name__)

BENCHMARKS = {
    "bench_process": "bench_process.json",
    "bench_storage": "bench_storage.json",
    "bench_loaders": "bench_loaders.json",
    "bench_network": "bench_network_cpu.json",
}
"""Scripts in this folder, and the JSON that each writes."""
TABLE_FILE = "bench.json"


@dataclass(frozen=True)
class Config(measuring.Options):
    """Run the benchmarks and gather their rows in one table."""

    cores: int = 2
    """Maximum number of cores to use."""


def pin(cores: int) -> int:
    """Restrict this process and its children to a few cores; return how many it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    found = min(cores, utils.cpu_count())
    os.environ["OMP_NUM_THREADS"] = str(found)
    os.environ["SLURM_CPUS_PER_TASK"] = str(found)  # what utils.cpu_count reads first
    return found


def gather(results: Path, names: dict[str, str]) -> list[Row]:
    """Read the rows of all benchmarks, each with the benchmark's name.

    Raises
    ------
    DataError
        If two rows have one name.
    """
    rows: list[Row] = []
    for benchmark, file in names.items():
        found = json.loads((results / file).read_text())["rows"]
        rows += [{**row, "benchmark": benchmark} for row in found]
    seen = [row["name"] for row in rows]
    twice = sorted({name for name in seen if seen.count(name) > 1})
    if twice:
        raise utils.DataError(f"{results}: two rows are called {twice[0]}; expected unique names.")
    return rows


def main(config: Config) -> int:
    """Run, gather, print, write; exit code 1 if a benchmark failed."""
    if config.cores < 1:
        raise utils.DataError(f"--cores {config.cores}: expected at least 1.")
    cores, start = pin(config.cores), time.monotonic()
    done: dict[str, str] = {}
    for name, file in BENCHMARKS.items():
        log.info("%s on %d cores", name, cores)
        words = [sys.executable, Path(__file__).with_name(f"{name}.py")]
        words += ["--results", config.results]
        ended = subprocess.run(
            [str(w) for w in words], stdout=subprocess.PIPE, text=True, check=False
        )
        if ended.returncode:
            log.error("%s ended with code %d", name, ended.returncode)
        else:
            done[name] = file
    rows = gather(config.results, done)
    measuring.print_rows(rows)
    seconds = time.monotonic() - start
    measuring.write_rows(config.results / TABLE_FILE, rows, cores=cores, seconds=round(seconds))
    missing = sorted(BENCHMARKS.keys() - done.keys())
    if missing:
        raise utils.DataError(f"not measured: {', '.join(missing)}; see the messages above.")
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
