"""Measure image-extractor against ctapipe-process and eventio's bare decoding, in one run.

Reads   real simtel files in ../shared/data/cta; ../shared/tools/replicate_simtel.py repeats their
        events to make them long.
Writes  a table to the screen; its rows, and the measurements of each program, to --out.

Every time is that of a whole process including its start: the median of --repeats runs in turn,
after one of each that is not counted. The decoding floor is eventio's SimTelFile reading from igzip
instead of its zcat pipe: every object is parsed, nothing is calibrated or written.

    image-extractor/.venv/bin/python benchmarks/bench_cta.py --out results/bench/bench_cta.json
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import measuring
import utils
from measuring import ROOT, Row, make_row

SHARED = ROOT.parent / "shared"
REPLICATE = SHARED / "tools" / "replicate_simtel.py"
BINARIES = Path(sys.executable).parent
FILES = {
    "proton": ("proton_run202_za20deg_azm0deg_North_test_layout_test-prod.simtel.zst", 100, 600),
    "sct": ("gamma_test.simtel.gz", 50, 450),
}
"""File, how often its events are repeated, and how many there are then."""
CONFIG = """\
storage_mode = {storage}
[image]
mode = PIXELS_TIMING_2C
scale_factor = 1
[telescope]
type_mode = ALL
[energy_bins]
min = -2
max = 2
bin_size = 4
"""
FLOOR = """\
import sys, warnings
warnings.simplefilter("ignore")
import eventio.base
from isal import igzip
eventio.base.gzip = igzip
from eventio import SimTelFile
with SimTelFile(sys.argv[1], zcat=False) as f:
    print(sum(1 for _ in f))
"""

Words = list[str | Path]
"""The words of a command."""


class Measured(NamedTuple):
    """Time, memory and output of a program for one input."""

    seconds: float
    peak_mb: float
    """Peak of its largest process, in the last run."""
    output_bytes: int


def ours(source: str | Path, folder: Path, storage: str, *more: str) -> Words:
    """Make the command of image-extractor; write its configuration beside the output."""
    config = folder / f"{storage}.config"
    config.write_text(CONFIG.format(storage=storage))
    return [BINARIES / "image_extractor.py", source, folder / "out.h5", config, *more]


def programs(source: Path, folder: Path) -> dict[str, Words]:
    """List the commands to compare on one file; their output, if any, is folder/out.h5."""
    ctapipe: Words = [BINARIES / "ctapipe-process", "--input", source]
    ctapipe += ["--output", folder / "out.h5", "--provenance-log", folder / "provenance.log"]
    ctapipe += ["--write-images", "--no-write-parameters"]
    ctapipe += ["--SimTelEventSource.focal_length_choice=EQUIVALENT"]
    return {
        "ctapipe": ctapipe,
        "eventio": [sys.executable, "-c", FLOOR, source],
        "mapped": ours(source, folder, "mapped"),
        "all": ours(source, folder, "all"),
    }


def measure(commands: dict[str, Words], output: Path, runs: int) -> dict[str, Measured]:
    """Run commands in turn; the output is removed before each."""
    last: dict[str, tuple[float, int]] = {}

    def run(name: str) -> None:
        output.unlink(missing_ok=True)
        peaks = measuring.run_watched(commands[name])[1]
        size = output.stat().st_size if output.is_file() else 0
        last[name] = 1e3 * max(peaks.values()), size

    seconds = measuring.in_turn({n: functools.partial(run, n) for n in commands}, runs)
    return {name: Measured(seconds[name], *last[name]) for name in commands}


def make_rows(key: str, found: dict[str, Measured], n_events: int) -> list[Row]:
    """Make the rows of the table from the result of `measure` for one of FILES."""
    rates = {name: n_events / of.seconds for name, of in found.items()}
    mapped, ctapipe = found["mapped"], found["ctapipe"]
    size, other_size = (of.output_bytes / n_events for of in (mapped, ctapipe))
    other, floor = "ctapipe-process", "eventio and igzip: decoding only"
    rows: list[tuple[str, float, float, str, str]] = [
        ("vs_ctapipe_process", rates["mapped"], rates["ctapipe"], "events/s", other),
        ("vs_decode_floor", rates["mapped"], rates["eventio"], "events/s", floor),
        ("all_vs_ctapipe_process", rates["all"], rates["ctapipe"], "events/s", other),
        ("peak_memory", mapped.peak_mb, ctapipe.peak_mb, "MB", other),
        ("bytes_per_event", size, other_size, "bytes", other),
    ]
    return [make_row(f"{key}_{row[0]}", *row[1:]) for row in rows]


def jobs_row(source: Path, folder: Path, n_events: int) -> Row:
    """Compare two processes with one on four files, timed once after a run that is not counted.

    The files hold the same events, so those of all but the first are left out as duplicates, after
    they were processed.
    """
    for i in range(4):
        (folder / f"copy_{i}.simtel.gz").symlink_to(source)
    copies = f"{folder}/copy_*.simtel.gz"
    commands = {n: ours(copies, folder, "mapped", "--jobs", n) for n in ("1", "2")}
    found = measure(commands, folder / "out.h5", runs=1)
    one, two = (4 * n_events / found[n].seconds for n in ("1", "2"))
    return make_row("four_files_jobs_2_vs_1", two, one, "events/s", "the same with --jobs 1")


def main(out: Path, repeats: int) -> None:
    """Measure, print, write."""
    if repeats < 1:
        raise utils.DataError(f"--repeats {repeats}: expected at least 1.")
    if not REPLICATE.is_file():
        raise utils.DataError(f"{REPLICATE}: no such file; it makes the long simtel files.")
    rows: list[Row] = []
    took: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench_cta_") as name:
        folder = Path(name)
        for key, (short, times, n_events) in FILES.items():
            long = folder / f"{key}.simtel.gz"
            words: Words = [sys.executable, REPLICATE, SHARED / "data" / "cta" / short, long]
            subprocess.run([*words, str(times)], check=True)
            found = measure(programs(long, folder), folder / "out.h5", repeats)
            rows += make_rows(key, found, n_events)
            took[key] = {name: of._asdict() for name, of in found.items()}
            if key == "proton":
                rows.append(jobs_row(long, folder, n_events))
    measuring.print_rows(rows)
    measuring.write_rows(out, rows, programs=took, repeats=repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Benchmark image-extractor against ctapipe-process and eventio."
    )
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "bench_cta.json")
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        help="timed runs of each program, in turn, after one that is not counted",
    )
    arguments = parser.parse_args()
    try:
        main(arguments.out, arguments.repeats)
    except utils.DataError as error:
        sys.exit(f"error: {error}")
