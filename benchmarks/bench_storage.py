"""Time and disk space for 10,000 galaxies, extrapolated from a few, and the layout of cubes.

Simulates DR17-format galaxies, --galaxies of each bundle size, and measures:
  jobs     cube_processing.py over all of them, with one process and with --jobs, in turn:
           galaxies/s and the peak memory of the largest process
  size     the time of process_galaxy (cube, both label maps) and the bytes of FITS, H5 and labels
           for each bundle size; weighted with DR17's fractions, the extrapolation to a survey
  checksums  reading the largest galaxy's cube and LOGCUBE with and without them
  layouts  flux and ivar of the largest galaxy in HDF5 with various chunk shapes and compressions:
           file size, and the seconds to write, to read whole, to read the spectrum of one spaxel,
           and to read one band; files are in the page cache. blosc, lz4 and zstd are included if
           hdf5plugin is installed.
Reads and writes only a temporary folder (about 0.8 GB), and results/bench/bench_storage.json.

    python benchmarks/bench_storage.py
    python benchmarks/bench_storage.py --data-dir data/bench    # keeps the simulated galaxies
"""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import measuring
import utils
from measuring import Row, make_row
from utils import LABEL_TASKS

import h5py
import numpy as np

import data_io
import fits_stream
import process_single_cube as single
from mock.galaxy import BUNDLES, GalaxyParams, draw_params, simulate_galaxy
from mock.survey import write_galaxy

SURVEY = 10_000
"""Number of galaxies to extrapolate to; DR17 has 10,161."""
SEED = 1
N_SPECTRA = 30
"""Spaxels, and N_BANDS bands, that are read one by one for the mean time of one."""
N_BANDS = 5
ARRAYS = ("FLUX", "IVAR", "MASK", "WAVE", "REDCORR")
"""Of a LOGCUBE, what a cube is made from."""
SHUFFLED = {"shuffle": True}


@dataclass(frozen=True)
class Config(measuring.Options):
    """Time and disk space for 10,000 galaxies, and the layout of cubes."""

    galaxies: int = 1
    """Number of simulated galaxies of each bundle size."""
    bundles: tuple[int, ...] = tuple(BUNDLES)
    """Bundle sizes, in fibres."""
    jobs: int = 2
    """Number of processes to compare with a single one."""
    runs: int = 3
    """Timed runs of each way, after one that is not counted."""
    data_dir: Path | None = None
    """Folder for the simulated galaxies, which are kept and reused; default a temporary one."""


# Galaxies


def simulate(root: Path, bundles: tuple[int, ...], galaxies: int) -> dict[int, list[str]]:
    """Simulate `galaxies` of each bundle size that do not exist yet; plateifus by bundle size."""
    params = {b: star_forming(b, galaxies) for b in bundles}
    todo = [
        p for ps in params.values() for p in ps if not utils.raw_paths(root, p.plateifu, "MAPS")
    ]
    with ProcessPoolExecutor(utils.cpu_count()) as pool:
        list(pool.map(_simulate_one, [root] * len(todo), todo))
    return {b: [p.plateifu for p in ps] for b, ps in params.items()}


def star_forming(bundle: int, galaxies: int) -> list[GalaxyParams]:
    """Draw galaxies with metallicities to label."""
    drawn = (draw_params(SEED, i, (bundle,)) for i in itertools.count())
    return list(itertools.islice((p for p in drawn if p.kind == "star-forming"), galaxies))


def _simulate_one(root: Path, params: GalaxyParams) -> None:
    write_galaxy(root, simulate_galaxy(params))


def measure_jobs(root: Path, n_galaxies: int, jobs: int, runs: int) -> list[Row]:
    """Compare cube_processing.py with one process and with several."""
    words: list[str | Path] = [sys.executable, measuring.ROOT / "cube_processing.py"]
    words += ["--data-dir", root, "--overwrite", "--no-splits", "--jobs"]
    peaks: dict[int, list[float]] = {1: [], jobs: []}

    def process(n: int) -> None:
        peaks[n].append(max(measuring.run_watched([*words, str(n)])[1].values()))

    seconds = measuring.in_turn({str(n): functools.partial(process, n) for n in peaks}, runs)
    rates = {n: n_galaxies / seconds[str(n)] for n in peaks}
    against = "cube_processing.py --jobs 1"
    return [
        make_row(f"processing_jobs_{jobs}", rates[jobs], rates[1], "galaxies/s", against),
        make_row("processing_worker_memory", max(peaks[jobs]), max(peaks[1]), "GB", against),
    ]


def measure_size(root: Path, plateifu: str, runs: int) -> dict[str, float]:
    """Seconds and CPU seconds to process one galaxy in this process, and MB of its files."""
    options = single.GalaxyOptions()

    def process() -> None:
        single.process_galaxy(plateifu, root, options, overwrite=True)

    process()
    labels = [utils.label_path(root, task, plateifu).parent for task in LABEL_TASKS]
    files = {
        "fits_mb": [p for k in ("LOGCUBE", "MAPS") for p in utils.raw_paths(root, plateifu, k)],
        "h5_mb": [utils.cube_path(root, plateifu)],
        "labels_mb": [p for folder in labels for p in folder.glob(f"{plateifu}*")],
    }
    sizes = {k: sum(p.stat().st_size for p in paths) / 1e6 for k, paths in files.items()}
    before = time.process_time()
    seconds = measuring.in_turn({"": process}, runs)[""]
    cpu_seconds = (time.process_time() - before) / (runs + 1)  # of all threads
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, **sizes}


def extrapolate(
    by_bundle: dict[int, list[dict[str, float]]], shares: dict[int, float], survey: int = SURVEY
) -> dict[str, float]:
    """Extrapolate to a survey: the means over each bundle size, weighted with its fraction.

    Parameters
    ----------
    by_bundle : dict of bundle -> list of {"seconds", "cpu_seconds", "..._mb"}
    shares : dict of bundle -> fraction of the survey's galaxies
        Scaled to the bundle sizes that were measured.
    survey : int
        Number of galaxies.

    Returns
    -------
    dict
        hours of one process (which uses more than one core at times), core_hours, and the GB of
        each kind of file.
    """
    whole = sum(shares[b] for b in by_bundle)
    mean = {
        key: sum(
            shares[b] / whole * float(np.mean([g[key] for g in found]))
            for b, found in by_bundle.items()
        )
        for key in next(iter(by_bundle.values()))[0]
    }
    hours, core_hours = (survey * mean.pop(key) / 3600 for key in ("seconds", "cpu_seconds"))
    out = {"galaxies": float(survey), "hours": hours, "core_hours": core_hours}
    return {**out, **{k.replace("_mb", "_gb"): survey * v / 1e3 for k, v in mean.items()}}


# Checksums


def measure_checksums(root: Path, plateifu: str, runs: int) -> list[Row]:
    """Compare reading with and without checksums: an H5 cube, and a LOGCUBE that becomes one."""
    path, logcube = utils.cube_path(root, plateifu), utils.find_raw(root, plateifu, "LOGCUBE")
    everything = ("wave", "cube", "ivar", "good_fraction")

    def plain(names: tuple[str, ...]) -> None:
        with h5py.File(path) as f:
            for name in names:
                f[name][()]

    def unchecked() -> None:
        none = SimpleNamespace(add=len, check=lambda *_: None, value=0xFFFFFFFF, total=0)
        with patch.object(fits_stream, "_Checksum", lambda: none):
            fits_stream.read_hdus(logcube, ARRAYS)

    works: dict[str, Callable[[], object]] = {
        "cube_read": lambda: data_io.read_cube(path),
        "cube_read_plain": lambda: plain(everything),
        "flux_read": lambda: data_io.read_cube(path, with_errors=False),
        "flux_read_plain": lambda: plain(everything[:2]),
        "logcube_read": lambda: fits_stream.read_hdus(logcube, ARRAYS),
        "logcube_read_plain": unchecked,
    }
    found = measuring.in_turn(works, runs)
    against = {"cube": "h5py alone", "flux": "h5py alone", "logcube": "no checksums"}
    return [
        make_row(f"{name}_checked", found[f"{name}_read"], found[f"{name}_read_plain"], "s", what)
        for name, what in against.items()
    ]


# Layouts


class Layout(NamedTuple):
    """Layout of a dataset in a file."""

    name: str
    chunk: tuple[int, int, int] | None
    """Spaxels (y, x) and bands; None: contiguous."""
    options: dict[str, Any]


def layouts(ny: int, nx: int, n_band: int) -> list[Layout]:
    """List the layouts to try on a cube (y, x, band); the first is what data_io writes."""
    side = data_io.CHUNK_SPAXELS
    here = (min(side, ny), min(side, nx), n_band)
    compressions: list[tuple[str, dict[str, Any]]] = [
        ("none", {}),
        ("gzip-1", {**SHUFFLED, "compression": "gzip", "compression_opts": 1}),
        ("gzip-4", {**SHUFFLED, "compression": "gzip", "compression_opts": 4}),
    ]
    try:
        import hdf5plugin
    except ImportError:
        pass
    else:
        compressions += [
            ("blosc-lz4", dict(hdf5plugin.Blosc("lz4", 5, hdf5plugin.Blosc.SHUFFLE))),
            ("blosc-zstd", dict(hdf5plugin.Blosc("zstd", 3, hdf5plugin.Blosc.SHUFFLE))),
            ("bitshuffle-lz4", dict(hdf5plugin.Bitshuffle())),
            ("zstd", {**SHUFFLED, **hdf5plugin.Zstd(3)}),
        ]
    found = [Layout(name, here, options) for name, options in compressions]
    others = (
        (1, 1, n_band),
        (8, 8, n_band),
        (here[0], here[1], -(-n_band // 8)),
        (min(16, ny), min(16, nx), -(-n_band // 16)),
        (ny, nx, 1),
    )
    for chunk in others:
        found += [Layout(name, chunk, options) for name, options in compressions[:2]]
    return [*found, Layout("none", None, {})]


def write_layout(path: Path, flux: np.ndarray, ivar: np.ndarray, layout: Layout) -> None:
    """Write flux and ivar; chunks of whole spectra without any good bin are left out."""
    occupied = np.isfinite(flux).any(axis=2)
    n_band = flux.shape[2]
    with h5py.File(path, "w", libver=("earliest", "v110")) as f:
        for name, data, fill in (("cube", flux, np.nan), ("ivar", ivar, 0)):
            dataset = f.create_dataset(
                name, flux.shape, "f4", chunks=layout.chunk, fillvalue=fill, **layout.options
            )
            step = layout.chunk[0] if layout.chunk else flux.shape[0]
            for y in range(0, flux.shape[0], step):
                columns = np.flatnonzero(occupied[y : y + step].any(axis=0))
                if not columns.size:
                    continue
                width = layout.chunk[1] if layout.chunk and layout.chunk[2] == n_band else None
                first = columns[0] // width * width if width else 0
                last = columns[-1] + 1 if width else flux.shape[1]
                dataset[y : y + step, first:last] = data[y : y + step, first:last]


def measure_layout(
    path: Path, flux: np.ndarray, ivar: np.ndarray, layout: Layout, runs: int
) -> dict[str, Any]:
    """Measure a layout: its size, and seconds to write and read it.

    Raises
    ------
    DataError
        If the values read are not those that were written.
    """
    rng = np.random.default_rng(SEED)
    spaxels = np.argwhere(np.isfinite(flux).all(axis=2))
    spaxels = spaxels[rng.permutation(len(spaxels))[:N_SPECTRA]]
    bands = rng.integers(flux.shape[2], size=N_BANDS)

    def whole() -> None:
        with h5py.File(path) as f:
            f["cube"][...], f["ivar"][...]

    def spectra() -> None:
        for y, x in spaxels:  # opened for each: no chunk of the previous spaxel is cached
            with h5py.File(path) as f:
                f["cube"][y, x]

    def images() -> None:
        for band in bands:
            with h5py.File(path) as f:
                f["cube"][..., band]

    works = {
        "write_s": lambda: write_layout(path, flux, ivar, layout),
        "whole_s": whole,
        "spectrum_s": spectra,
        "band_s": images,
    }
    seconds = measuring.in_turn(works, runs)
    with h5py.File(path) as f:
        if not (
            np.array_equal(f["cube"][...], flux, equal_nan=True)
            and np.array_equal(f["ivar"][...], ivar)
        ):
            raise utils.DataError(f"{layout}: the values read differ from those written.")
    return {
        "chunk": list(layout.chunk) if layout.chunk else None,
        "compression": layout.name,
        "size_mb": path.stat().st_size / 1e6,
        **seconds,
        "spectrum_s": seconds["spectrum_s"] / len(spaxels),
        "band_s": seconds["band_s"] / len(bands),
    }


def compare_layouts(table: list[dict[str, Any]]) -> list[Row]:
    """Compare the first layout, which data_io writes, with the same under gzip-1."""
    ours, other = table[0], next(x for x in table if x["compression"] == "gzip-1")
    names = {"size_mb": "h5_size", "write_s": "h5_write", "whole_s": "h5_read_whole"}
    names |= {"spectrum_s": "h5_read_spectrum", "band_s": "h5_read_band"}
    against = "the same chunks with gzip-1 and shuffle (--compression gzip)"
    return [
        make_row(name, ours[key], other[key], "MB" if key == "size_mb" else "s", against)
        for key, name in names.items()
    ]


def print_layouts(table: list[dict[str, Any]]) -> None:
    """Print the layouts relative to the first."""
    keys = ("size_mb", "write_s", "whole_s", "spectrum_s", "band_s")
    print(f"{'flux and ivar, relative to the first':40}" + "".join(f"{k[:-2]:>11}" for k in keys))
    for row in table:
        chunk = "contiguous" if row["chunk"] is None else " x ".join(map(str, row["chunk"]))
        ratios = (row[key] / table[0][key] for key in keys)
        print(f"{chunk:22}{row['compression']:18}" + "".join(f"{r:11.2f}" for r in ratios))


def main(config: Config) -> int:
    """Measure, print, write."""
    if not config.bundles or min(config.galaxies, config.jobs, config.runs) < 1:
        raise utils.DataError(
            "--bundles, --galaxies, --jobs, --runs: expected at least one of each."
        )
    with tempfile.TemporaryDirectory() as temporary:
        root = config.data_dir or Path(temporary) / "data"
        names = simulate(root, config.bundles, config.galaxies)
        n_galaxies = sum(map(len, names.values()))
        rows = measure_jobs(root, n_galaxies, config.jobs, config.runs)
        by_bundle = {
            b: [measure_size(root, p, config.runs) for p in found] for b, found in names.items()
        }
        shares = {b: share for b, (_, _, share) in BUNDLES.items()}
        survey = extrapolate(by_bundle, shares)
        rows += measure_checksums(root, names[max(names)][0], 3 * config.runs)
        cube = data_io.read_cube(utils.cube_path(root, names[max(names)][0]))
        assert cube.ivar is not None
        table = [
            measure_layout(Path(temporary) / "layout.h5", cube.flux, cube.ivar, x, config.runs)
            for x in layouts(*cube.flux.shape)
        ]
    rows += compare_layouts(table)
    measuring.print_rows(rows)
    print_layouts(table)
    print(
        f"extrapolated from {n_galaxies} simulated galaxies to {SURVEY}, by DR17's bundle sizes: "
        f"{survey['hours']:.1f} h in one process, {survey['core_hours']:.1f} core hours; "
        f"FITS {survey['fits_gb']:.0f} GB, cubes {survey['h5_gb']:.0f} GB, "
        f"labels {survey['labels_gb']:.1f} GB"
    )
    out = config.results / "bench_storage.json"
    measuring.write_rows(out, rows, survey=survey, by_bundle=by_bundle, layouts=table)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
