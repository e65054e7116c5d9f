"""Measure image-extractor against ctapipe-process and eventio's bare decoding, in one run.

Reads   the real simtel files of the tests of image-extractor, which are downloaded once where they
        are absent; their events are repeated to make them long.
Writes  a table to the screen; its rows, the measurements of each program, and a table of storage
        (bytes, reading speed and largest error of each type and compression), to --out.

Every time is that of a whole process including its start: the median of --repeats runs in turn,
after one of each that is not counted. The decoding floor is eventio's SimTelFile reading from igzip
instead of its zcat pipe: every object is parsed, nothing is calibrated or written. Of the reader,
only the calls are timed, in random order, against reading the same arrays without labels or units.

    image-extractor/.venv/bin/python benchmarks/bench_cta.py --out results/bench/bench_cta.json
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import utils
from measuring import ROOT, Row, make_row

import numpy as np

PACKAGE = ROOT / "image-extractor"
BINARIES = Path(sys.executable).parent
FILES = {
    "proton": ("proton", 100, 600),
    "proton_short": ("proton", 1, 6),
    "sct": ("gamma", 50, 450),
    "sct_short": ("gamma", 1, 9),
}
"""Name in the tests, how often its events are repeated, and how many there are then. The short ones
show what starting a program costs.
"""
STORED = [
    ("uint16", "gzip"),
    ("uint16", "none"),
    ("uint16", "blosc-lz4"),
    ("uint16", "blosc-zstd"),
    ("float32", "gzip"),
    ("float32", "none"),
    ("float32", "blosc-zstd"),
]
"""Types and compressions of the storage table; the first is the default of mapped data sets."""
N_READ = 2000
"""Images that are read."""
CONFIG = """\
storage_mode = {storage}
[image]
mode = PIXELS_TIMING_2C
scale_factor = 1
dtype = {dtype}
[telescope]
type_mode = {telescopes}
[energy_bins]
min = -2
max = 2
bin_size = 4
"""
FLOOR = """\
import sys, warnings
warnings.simplefilter("ignore")
import eventio.base
eventio.base.gzip = igzip
from eventio import SimTelFile
with SimTelFile(sys.argv[1], zcat=False) as f:
    print(sum(1 for _ in f))
"""
READING = """\
import sys, time, warnings
import numpy as np
warnings.simplefilter("ignore")
path, seconds = sys.argv[1], float(sys.argv[2])
{load}
order = np.random.default_rng().permutation(n)
count, end = 0, time.perf_counter() + seconds
while time.perf_counter() < end:
    read(order[np.arange(count, count + 64) % n].tolist())
    count += 64
print(count)
"""
"""A program that reads batches of 64 images in random order."""
READERS = {
    "ours": """\
from image_extractor.reader import Images
data = Images(path)
n = len(data)
def read(numbers):
    np.stack([data[i]["image"] for i in numbers])
""",
    "dl1dh": """\
from dl1_data_handler.reader import DLImageReader
data = DLImageReader([path], channels=["image", "peak_time"], force_dl1_lookup=True,
    image_mapper_type=[("type", "*", "AxialMapper")], focal_length_choice="EQUIVALENT")
n = len(data.example_identifiers)
read = data.generate_mono_batch
""",
}
READING_S = 10
"""Seconds that readers read."""

Words = list[str | Path]
"""The words of a command."""


class Measured(NamedTuple):
    """Time, memory and output of a program for one input."""

    seconds: float
    peak_mb: float
    """Peak of its largest process, in the last run."""
    output_bytes: int


def ours(
    source: str | Path,
    folder: Path,
    storage: str,
    *more: str,
    dtype: str = "uint16",
    telescopes: str = "ALL",
) -> Words:
    """Make the command of image-extractor; write its configuration beside the output."""
    config = folder / f"{storage}.config"
    config.write_text(CONFIG.format(storage=storage, dtype=dtype, telescopes=telescopes))
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
        ("bytes_vs_ctapipe", size, other_size, "bytes per event", other),
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


def read_all(data: Any, order: list[int]) -> None:
    """Read images as training does: with units and labels, none of them kept."""
    for i in order:
        data[i]


def read_raw(data: Any, order: list[int]) -> None:
    """Read the arrays of images as they are stored."""
    nodes = {}
    for slot in np.unique(data._images["slot"]).tolist():
        nodes[slot] = data._node(0, 0, slot)[0]
    for i in data._images[order]:
        nodes[int(i["slot"])][int(i["row"])]


def is_stored(values: np.ndarray) -> np.ndarray:
    """Whether values are neither negative nor too large for uint16; those are cut, not rounded."""
    return (values >= 0) & (values <= 65535 * 0.01)


def storage_table(source: Path, folder: Path, repeats: int) -> tuple[list[Row], list[Row]]:
    """Compare types and compressions on the LST images of a file, and the reader with PyTables.

    Returns
    -------
    rows, table : lists of dict
        Of the results, and of the storage.
    """
    from image_extractor.reader import Images

    outputs = {}
    for dtype, compression in STORED:
        outputs[dtype, compression] = out = folder / f"{dtype}_{compression}.h5"
        more = ("--compression", compression, "--overwrite")
        words = ours(source, folder, "mapped", *more, dtype=dtype, telescopes="LST")
        words[2] = out
        measuring.run_watched(words)
    data = {key: Images(path) for key, path in outputs.items()}
    exact = data["float32", "none"]
    order = np.random.default_rng(0).permutation(len(exact))[:N_READ].tolist()
    works: dict[str, Callable[[], object]] = {
        " ".join(key): functools.partial(read_all, d, order) for key, d in data.items()
    }
    works["raw"] = functools.partial(read_raw, data[STORED[0]], order)
    seconds = measuring.in_turn(works, repeats)
    table: list[Row] = []
    for key, images in data.items():
        pairs = [(images[i]["image"], exact[i]["image"]) for i in order]
        errors = [np.max(abs(a - b), (1, 2), where=is_stored(b), initial=0) for a, b in pairs]
        charge_error, time_error = np.max(errors, axis=0)
        row = {"dtype": key[0], "compression": key[1], "charge_error_pe": float(charge_error)}
        row |= {"bytes_per_image": outputs[key].stat().st_size / len(images)}
        row |= {
            "images_per_s": len(order) / seconds[" ".join(key)],
            "time_error_samples": float(time_error),
        }
        table.append(row)
    ours_rate, raw_rate = (len(order) / seconds[key] for key in (" ".join(STORED[0]), "raw"))
    rows = [make_row("reader_vs_raw_h5", ours_rate, raw_rate, "images/s", "PyTables: arrays alone")]
    return rows, table


def reading_rate(python: str | Path, reader: str, path: Path, workers: int) -> float:
    """Images/s that processes of one of READERS read together."""
    words = [str(python), "-c", READING.format(load=READERS[reader]), str(path), str(READING_S)]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    counts = [process.communicate()[0] for process in processes]
    if not all(counts):
        raise utils.DataError(
            f"{python}: cannot read {path}, see above (expected an environment with "
            "dl1-data-handler). Install it, or leave --dl1dh out."
        )
    return sum(map(int, counts)) / READING_S


def reader_rows(path: Path, dl1dh: Path) -> list[Row]:
    """Compare the reader with that of dl1-data-handler, on the same images in ctapipe's format."""
    exported = path.with_suffix(".dl1.h5")
    words: Words = [BINARIES / "image-extractor", "export", path, "--output", exported]
    words.append("--parameters")
    measuring.run_watched(words)
    rows = []
    for workers in (1, 4):
        ours_rate = reading_rate(sys.executable, "ours", path, workers)
        other = reading_rate(dl1dh, "dl1dh", exported, workers)
        name = f"reader_images_vs_dl1dh{'' if workers == 1 else f'_{workers}_workers'}"
        rows.append(make_row(name, ours_rate, other, "images/s", "dl1-data-handler"))
    return rows


def main(out: Path, repeats: int, dl1dh: Path | None) -> None:
    """Measure, print, write."""
    if repeats < 1:
        raise utils.DataError(f"--repeats {repeats}: expected at least 1.")
    # Imported here, because the tests of the repository read this module in another environment.
    sys.path += [str(PACKAGE / "tests"), str(PACKAGE / "scripts")]
    import conftest
    import sample_files
    from isal import igzip

    try:
        sample_files.fetch()
    except OSError as error:
        raise utils.DataError(str(error)) from None
    rows: list[Row] = []
    took: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench_cta_") as name:
        folder = Path(name)
        for key, (short, times, n_events) in FILES.items():
            long = folder / f"{key}.simtel.gz"
            raw = conftest.decompressed(conftest.real_file(short))
            long.write_bytes(igzip.compress(conftest.repeated(raw, times), 1))
            found = measure(programs(long, folder), folder / "out.h5", repeats)
            rows += make_rows(key, found, n_events)
            took[key] = {name: of._asdict() for name, of in found.items()}
            if key == "proton":
                rows.append(jobs_row(long, folder, n_events))
                storage_rows, storage = storage_table(long, folder, repeats)
                rows += storage_rows
                if dl1dh is not None:
                    rows += reader_rows(folder / "uint16_gzip.h5", dl1dh)
    measuring.print_rows(rows)
    for row in storage:
        print(
            "  ".join(f"{v:>12.4g}" if isinstance(v, float) else f"{v:>12}" for v in row.values())
        )
    measuring.write_rows(out, rows, programs=took, storage=storage, repeats=repeats)


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
    parser.add_argument(
        "--dl1dh",
        type=Path,
        help="Python of an environment with dl1-data-handler, to compare with its reader, too",
    )
    arguments = parser.parse_args()
    try:
        main(arguments.out, arguments.repeats, arguments.dl1dh)
    except utils.DataError as error:
        sys.exit(f"error: {error}")
