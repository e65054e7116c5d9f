"""What the benchmarks share: timing in turn, peak memory, rows of results and their table.

A row compares two ways to do the same work, measured in one run:

    {"name", "ours", "baseline", "ratio": ours / baseline, "unit", "against": what the baseline is}

Of times and sizes less is better, of rates ("spaxels/s") and accuracies more. Importing
this module makes those of the repository importable, from any folder. It needs no more than numpy,
because bench_cta.py runs in image-extractor's environment. Memory is read from /proc (Linux), as
the peak of each process's own address space: the rusage of a child would also count the memory of
its parent.
"""

from __future__ import annotations

import functools
import multiprocessing
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

RESULTS = ROOT / "results" / "bench"
"""Where the benchmarks write their JSON."""
POLL_S = 0.01
"""Seconds between two readings of the memory of a running command."""
PACKAGES = "numpy scipy h5py astropy isal torch scikit-learn tensorly hdf5plugin ctapipe eventio"
"""Packages whose versions are recorded."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every benchmark."""

    results: Path = RESULTS
    """Folder of the JSON."""
    debug: bool = False
    """Show the traceback of an error."""


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(works: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median wall seconds of each of several ways, run in turn.

    The first round is not counted: it fills caches and creates buffers. Taking turns spreads
    whatever else the machine does evenly over all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for run in range(runs + 1):
        for name, work in works.items():
            took = timed(work)
            if run:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rates_of(works: Mapping[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """Measure the rates of several ways that return what they count, per second; see `in_turn`."""
    counts: dict[str, float] = {}

    def count(name: str) -> None:
        counts[name] = works[name]()

    took = in_turn({name: functools.partial(count, name) for name in works}, runs)
    return {name: counts[name] / seconds for name, seconds in took.items()}


# Memory


def memory_gb(pid: int | str = "self", field: str = "VmHWM") -> float:
    """Read a process's peak (VmHWM) or present (VmRSS) memory, GB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    kib = next(
        (int(x.split()[1]) for x in lines if x.startswith(f"{field}:")), 0
    )  # in units called kB
    return kib * 1024 / 1e9


def processes_under(pid: int) -> list[int]:
    """List a process and its descendants."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(p for child in words for p in processes_under(int(child)))]


def run_watched(words: Sequence[str | Path]) -> tuple[float, dict[int, float]]:
    """Run a command; return its wall seconds and the peak memory of each of its processes, GB.

    Raises
    ------
    DataError
        If the command fails; with the end of its messages.
    """
    peaks: dict[int, float] = {}
    start = time.perf_counter()
    child = subprocess.Popen(
        [str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for pid in processes_under(child.pid):
                peaks[pid] = max(peaks.get(pid, 0), memory_gb(pid))
            done.wait(POLL_S)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, messages = child.communicate()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if child.returncode:
        raise utils.DataError(
            f"{' '.join(map(str, words))} ended with code {child.returncode}: "
            f"{messages.strip()[-500:]}"
        )
    return seconds, peaks


def peak_in_child(work: Callable[..., object], *args: Any) -> tuple[float, float]:
    """Run a picklable call in a process of its own.

    Returns
    -------
    peak, added : float
        GB that the process held at most, and its excess over what it held before the call.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_watched_call, work, *args).result()


def _watched_call(work: Callable[..., object], *args: Any) -> tuple[float, float]:
    before = memory_gb(field="VmRSS")
    work(*args)
    peak = memory_gb()
    return peak, peak - before


# Rows


def make_row(name: str, ours: float, baseline: float, unit: str, against: str, **more: Any) -> Row:
    """Make a row of the table; `against` says what the baseline is."""
    row = {"name": name, "ours": ours, "baseline": baseline, "ratio": ours / baseline}
    return {**row, "unit": unit, "against": against, **more}


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table of ratios."""
    width = max((len(row["name"]) for row in rows), default=0) + 2
    print(f"{'':{width}}{'ours':>11}{'baseline':>11}{'ratio':>9}  {'unit':<12}baseline is")
    for row in rows:
        ours, baseline, ratio = (f"{row[k]:.4g}" for k in ("ours", "baseline", "ratio"))
        print(
            f"{row['name']:{width}}{ours:>11}{baseline:>11}{ratio:>9}  {row['unit']:<12}"
            f"{row['against']}"
        )


def environment() -> dict[str, Any]:
    """Gather what measurements depend on: machine, packages, commit, command line."""
    packages = {}
    for name in PACKAGES.split():
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    commit = None
    with suppress(OSError):  # no git
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "version": utils.VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": utils.cpu_count(),
        "packages": packages,
        "commit": commit or None,
        "command": sys.argv,
        "created_utc": utils.utc_now(),
    }


def write_rows(path: Path, rows: Sequence[Row], **more: Any) -> None:
    """Write rows, whatever else was measured, and the environment as JSON; print the path."""
    utils.write_json(path, {"rows": list(rows), **more, "environment": environment()})
    print(f"written: {path}")
