"""Measure image-extractor against ctapipe-process and eventio's bare decoding, in one run.

Reads   real simtel files of ../shared/data/cta, made long by ../shared/tools/replicate_simtel.py.
Writes  a table to the screen and {"rows": [{"name", "ours", "baseline", "ratio", "unit"}]} to
--out.

Every figure is of a whole process, start-up included, and the better of --repeats runs (the first
run of ours compiles nothing: a short file is extracted before). The decode floor is eventio's
SimTelFile fed by igzip instead of its zcat pipe: every object parsed, nothing calibrated, nothing
written.

    image-extractor/.venv/bin/python benchmarks/bench_cta.py --out results/bench/bench_cta.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
PROTONS = "proton_run202_za20deg_azm0deg_North_test_layout_test-prod.simtel.zst"
GAMMAS = "gamma_test.simtel.gz"
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


@dataclass(frozen=True)
class Run:
    """One measured process."""

    seconds: float
    peak_mb: float
    output_bytes: int


def measure(
    command: list[str], output: Path | None, repeats: int, allowed: tuple[int, ...] = (0,)
) -> Run:
    """Run a command several times and keep the fastest."""
    best: Run | None = None
    for _ in range(repeats):
        if output is not None:
            output.unlink(missing_ok=True)
        with tempfile.TemporaryFile() as log:
            started = time.perf_counter()
            folder = output.parent if output else None
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode not in allowed:
                log.seek(0)
                sys.exit(f"{' '.join(command)}\nfailed:\n{log.read().decode()[-2000:]}")
        size = output.stat().st_size if output is not None else 0
        run = Run(seconds, usage.ru_maxrss / 1024, size)
        if best is None or run.seconds < best.seconds:
            best = run
    assert best is not None
    return best


def main(out: Path, repeats: int) -> None:
    """Measure, print, write."""
    tool = SHARED / "tools" / "replicate_simtel.py"
    if not tool.is_file():
        sys.exit("../shared/tools/replicate_simtel.py is absent: it makes the long files.")
    binaries = Path(sys.executable).parent
    rows: list[dict] = []
    table: list[tuple] = []
    with tempfile.TemporaryDirectory(prefix="bench_cta_") as name:
        folder = Path(name)
        configs = {}
        for storage in ("mapped", "all"):
            configs[storage] = folder / f"{storage}.config"
            configs[storage].write_text(CONFIG.format(storage=storage))
        floor = folder / "floor.py"
        floor.write_text(FLOOR)

        def ours(source: str, storage: str, *more: str, runs: int = repeats) -> Run:
            output = folder / "ours.h5"
            command = [
                str(binaries / "image_extractor.py"),
                source,
                str(output),
                str(configs[storage]),
                *more,
            ]
            return measure(command, output, runs, (0, 1))

        def add(what: str, a: float, b: float, unit: str) -> None:
            rows.append(
                {
                    "name": what,
                    "ours": round(a, 2),
                    "baseline": round(b, 2),
                    "ratio": round(a / b, 2),
                    "unit": unit,
                }
            )

        for key, source, times, n_events in (
            ("proton", PROTONS, 100, 600),
            ("sct", GAMMAS, 50, 450),
        ):
            short, long = SHARED / "data" / "cta" / source, folder / f"{key}.simtel.gz"
            subprocess.run(
                [sys.executable, str(tool), str(short), str(long), str(times)], check=True
            )
            for storage in configs:
                ours(str(short), storage, runs=1)  # fills the caches of compiled code
            ctapipe_out = folder / "ctapipe.h5"
            ctapipe = measure(
                [
                    str(binaries / "ctapipe-process"),
                    "--input",
                    str(long),
                    "--output",
                    str(ctapipe_out),
                    "--write-images",
                    "--no-write-parameters",
                    "--overwrite",
                    "--SimTelEventSource.focal_length_choice=EQUIVALENT",
                ],
                ctapipe_out,
                repeats,
            )
            decode = measure([sys.executable, str(floor), str(long)], None, repeats)
            by_storage = {storage: ours(str(long), storage) for storage in configs}
            mapped = by_storage["mapped"]
            add(
                f"{key}_vs_ctapipe_process",
                n_events / mapped.seconds,
                n_events / ctapipe.seconds,
                "events/s",
            )
            add(
                f"{key}_vs_decode_floor",
                n_events / mapped.seconds,
                n_events / decode.seconds,
                "events/s",
            )
            add(
                f"{key}_all_vs_ctapipe_process",
                n_events / by_storage["all"].seconds,
                n_events / ctapipe.seconds,
                "events/s",
            )
            add(f"{key}_peak_memory", mapped.peak_mb, ctapipe.peak_mb, "MB")
            add(
                f"{key}_bytes_per_event",
                mapped.output_bytes / n_events,
                ctapipe.output_bytes / n_events,
                "bytes",
            )
            for label, run in (
                ("ctapipe-process", ctapipe),
                ("eventio + igzip", decode),
                *((f"ours, {s}", r) for s, r in by_storage.items()),
            ):
                rate = n_events / run.seconds
                table.append(
                    (
                        key,
                        label,
                        run.seconds,
                        rate,
                        rate * ctapipe.seconds / n_events,
                        run.peak_mb,
                        run.output_bytes / n_events,
                    )
                )
            if key == "proton":
                for i in range(4):
                    (folder / f"copy_{i}.simtel.gz").symlink_to(long)
                # Copies hold the same events: all but the first file's are left out as duplicates,
                # after the work.
                jobs = [
                    ours(f"{folder}/copy_*.simtel.gz", "mapped", "--jobs", str(n), runs=1)
                    for n in (1, 2)
                ]
                add(
                    "four_files_jobs_2_vs_1",
                    4 * n_events / jobs[1].seconds,
                    4 * n_events / jobs[0].seconds,
                    "events/s",
                )
                for n, run in enumerate(jobs, 1):
                    table.append(
                        (
                            "4 x proton",
                            f"ours, mapped, --jobs {n}",
                            run.seconds,
                            4 * n_events / run.seconds,
                            float("nan"),
                            run.peak_mb,
                            float("nan"),
                        )
                    )
            long.unlink()
    print(
        f"{'file':12}{'program':28}{'seconds':>9}{'events/s':>10}{'x ctapipe':>11}"
        f"{'peak MB':>9}{'bytes/event':>13}"
    )
    for key, label, seconds, rate, ratio, peak, size in table:
        print(f"{key:12}{label:28}{seconds:9.2f}{rate:10.1f}{ratio:11.2f}{peak:9.0f}{size:13.0f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps(
            {"rows": rows, "cpus": len(os.sched_getaffinity(0)), "repeats": repeats}, indent=1
        )
        + "\n"
    )
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Benchmark image-extractor against ctapipe-process and eventio."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "bench_cta.json")
    parser.add_argument(
        "--repeats", type=int, default=2, help="runs of each program; the fastest counts"
    )
    arguments = parser.parse_args()
    main(arguments.out, arguments.repeats)
