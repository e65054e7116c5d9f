"""Time from FITS to H5 for one large galaxy, against decompression alone and a plain script.

Simulates a DR17-format galaxy of 74 x 74 spaxels (or takes --fits), then times in turn, in one run:
  cube         process_cube in a running Python, as in a loop over galaxies: FITS in, H5 out
  command      process_single_cube.py as a whole process: start, cube, both label maps
  igzip        isal's igzip decompressing FLUX, IVAR, MASK and WAVE into memory, in one thread; LSF,
               which lies before WAVE, has to be decompressed as well
  discarding   the same, every megabyte into the same buffer: no arrays are kept
  plain        astropy.io.fits and numpy, spaxel by spaxel, for the cube alone
Prints a table of ratios and of peak memory; writes results/bench/bench_process.json.

    python benchmarks/bench_process.py
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import measuring
import utils

import bench_storage
import numpy as np

import archive_files
import fits_utils


@dataclass(frozen=True)
class Config(measuring.Options):
    """Time from FITS to H5 for one large galaxy."""

    fits: Path | None = None
    """LOGCUBE to use, with its MAPS beside it; default a simulated one."""
    bundle: int = 127
    """Fibres in the bundle of the simulated galaxy (127 gives 74 x 74 spaxels)."""
    runs: int = 5
    """Timed runs of each way, after one that is not counted."""


def array_spans(path: Path) -> list[tuple[bool, int]]:
    """List the parts of the uncompressed file up to the end of WAVE, and which are needed.

    Returns
    -------
    list of (is needed, number of bytes)
    """
    from astropy.io import fits

    spans, end = [], 0
    with fits.open(path) as hdus:
        last = hdus.index_of("WAVE")
        for hdu in hdus[: last + 1]:
            where = hdu.fileinfo()
            spans += [(False, where["datLoc"] - end)]
            spans += [(hdu.name in archive_files.ESSENTIAL, where["datSpan"])]
            end = where["datLoc"] + where["datSpan"]
    return spans


def decompress(path: Path, spans: list[tuple[bool, int]], keep: bool) -> list[bytes]:
    """Baseline: decompress the spans with igzip; return the needed ones if they are kept."""
    from isal import igzip

    kept = []
    buffer = memoryview(bytearray(1 << 20))
    with igzip.open(path) as f:
        for needed, n_bytes in spans:
            if keep and needed:
                kept.append(f.read(n_bytes))
                continue
            while n_bytes > 0:
                got = f.readinto(buffer[: min(len(buffer), n_bytes)])
                assert got, f"{path}: shorter than its headers state"
                n_bytes -= got
    return kept


def plain_process(path: Path, target: Path) -> None:
    """Baseline: astropy.io.fits, and np.interp of cumulative sums, spaxel by spaxel."""
    import h5py
    from astropy.io import fits

    with fits.open(path) as hdus:
        z = hdus[0].header["SCINPVEL"] / archive_files.C_KMS
        flux, ivar, mask = (hdus[n].data for n in ("FLUX", "IVAR", "MASK"))
        redcorr = hdus["REDCORR"].data.astype(float)
    n, ny, nx = flux.shape
    edges = 10 ** (3.5589 + 1e-4 * (np.arange(n + 1) - 0.5)) / (1 + z)
    bins = np.geomspace(5000, 8000, 2041)
    widths = np.diff(edges)
    cube = np.full((ny, nx, 2040), np.nan, "f4")
    weight = np.zeros((ny, nx, 2040), "f4")

    def per_bin(steps: np.ndarray) -> np.ndarray:
        return np.diff(np.interp(bins, edges, np.concatenate([[0], np.cumsum(steps)])))

    for y in range(ny):
        for x in range(nx):
            f, v = flux[:, y, x].astype(float), ivar[:, y, x].astype(float)
            good = ((mask[:, y, x] & archive_files.DAP_BAD) == 0) & (v > 0)
            if not good.any():
                continue
            f = np.where(good, f * redcorr * (1 + z), 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                variance = np.where(good, (redcorr * (1 + z)) ** 2 / v, 0)
                covered = per_bin(good * widths)
                cube[y, x] = per_bin(f * widths) / covered
                weight[y, x] = covered**2 / per_bin(variance * widths**2)
    with h5py.File(target, "w") as out:
        out["cube"], out["ivar"] = cube, weight


def simulate(folder: Path, bundle: int) -> Path:
    """Simulate one galaxy; return its LOGCUBE."""
    (plateifu,) = bench_storage.simulate(folder, (bundle,), 1)[bundle]
    return utils.find_raw(folder, plateifu, "LOGCUBE")


def measure(logcube: Path, folder: Path, runs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of each way, and peak GB of the command and the plain script."""
    maps = logcube.with_name(logcube.name.replace("LOGCUBE", "MAPS"))
    words: list[str | Path] = [sys.executable, measuring.ROOT / "process_single_cube.py"]
    words += ["--fits", logcube, "--maps", maps, "--data-dir"]
    cubes = (folder / f"cube-{i}.h5" for i in itertools.count())
    folders = (folder / f"out-{i}" for i in itertools.count())
    plain = folder / "plain.h5"
    options, spans = fits_utils.CubeOptions(remove_gas_velocity=False), array_spans(logcube)
    peaks: list[float] = []

    def command() -> None:
        peaks.append(max(measuring.run_watched([*words, next(folders)])[1].values()))

    seconds = measuring.in_turn(
        {
            "command": command,
            "cube": lambda: fits_utils.process_cube(logcube, next(cubes), options),
            "igzip": lambda: decompress(logcube, spans, keep=True),
            "discarding": lambda: decompress(logcube, spans, keep=False),
            "plain": lambda: plain_process(logcube, plain),
        },
        runs,
    )
    memory = {
        "command": statistics.median(peaks),
        "plain": measuring.peak_in_child(plain_process, logcube, plain)[0],
    }
    return seconds, memory


def make_rows(seconds: dict[str, float], memory: dict[str, float]) -> list[measuring.Row]:
    """Make the rows of the table from the result of `measure`."""
    igzip, plain = "igzip: needed arrays into memory", "astropy and a loop over the spaxels"
    discarding = "igzip: nothing is kept"
    rows = [
        ("fits_to_h5_vs_igzip", "cube", "igzip", igzip),
        ("fits_to_h5_vs_igzip_discarding", "cube", "discarding", discarding),
        ("fits_to_h5_vs_plain_script", "cube", "plain", plain),
        ("command_vs_igzip", "command", "igzip", igzip),
        ("plain_script_vs_igzip", "plain", "igzip", igzip),
    ]
    table = [
        measuring.make_row(name, seconds[ours], seconds[baseline], "s", against)
        for name, ours, baseline, against in rows
    ]
    row = measuring.make_row("command_peak_memory", memory["command"], memory["plain"], "GB", plain)
    return [*table, row]


def main(config: Config) -> int:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logcube = config.fits or simulate(folder / "data", config.bundle)
        rows = make_rows(*measure(logcube, folder, config.runs))
        size = logcube.stat().st_size / 1e6
        h5 = next(folder.glob("cube-*.h5")).stat().st_size / 1e6
    print(f"{logcube.name}: {size:.0f} MB gz -> {h5:.0f} MB h5; median of {config.runs} runs")
    measuring.print_rows(rows)
    measuring.write_rows(config.results / "bench_process.json", rows)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
