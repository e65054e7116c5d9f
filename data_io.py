"""Owner of every file layout the pipeline writes: cubes, labels, patches, splits, statistics.

No other module spells a dataset name or a column; docs/data_formats.md describes each layout.
Axis order: cubes and patches (y, x, band), maps (y, x). Missing values: NaN in floats, LABEL_NONE
in classes. Needs neither astropy nor torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np

import utils
from utils import DataError

if TYPE_CHECKING:  # tables alone need pandas: cubes and labels are spared its import time
    import pandas as pd

CUBE_SCHEMA, CUBE_VERSION = "manga-cube", 2
STATS_SCHEMA, STATS_VERSION = "manga-stats", 1
PACKED_SCHEMA, PACKED_VERSION = "manga-packed", 1
FLUX_UNIT = "1e-17 erg/s/cm2/Angstrom/spaxel"
CHUNK_SPAXELS = 4
"""Spaxels a side of an H5 chunk: 4 x 4 spectra of 2040 float32 are 131 kB."""


# Cubes


@dataclass
class Cube:
    """A processed cube.

    Attributes
    ----------
    flux : (y, x, band) float32, 1e-17 erg/s/cm2/Angstrom/spaxel
        Flux density in the rest frame, NaN where no good pixel contributed.
    ivar : (y, x, band) float32 or None
        Inverse variance of `flux`, 0 where that is NaN.
    good_fraction : (y, x, band) float16 or None
        Share of each bin's width that good pixels covered, 0 to 1.
    wave : (band,) float64, Angstrom
        Vacuum rest wavelengths of the bin centres (geometric).
    attrs : dict
        plateifu, mangaid, redshift, provenance.
    """

    flux: np.ndarray
    wave: np.ndarray
    ivar: np.ndarray | None = None
    good_fraction: np.ndarray | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


class Rows(NamedTuple):
    """A few neighbouring rows of a `Cube`, (rows, x, band) each."""

    flux: np.ndarray
    ivar: np.ndarray | None
    good_fraction: np.ndarray | None


class CubeKind(NamedTuple):
    """What cubes must share to be learned from together; None: the file does not say."""

    first: float
    """Wavelength of the first bin, Angstrom, vacuum, rest frame; bins are logarithmic."""
    last: float
    n_bands: int
    deredden: bool | None = None
    """The Galaxy's reddening was undone."""
    remove_gas_velocity: bool | None = None
    """Spectra were shifted by their gas velocity."""

    @classmethod
    def of(cls, wave: np.ndarray, attrs: dict[str, Any]) -> CubeKind:
        """Tell from a cube's wavelengths and attributes."""
        made = json.loads(attrs.get("config_json", "{}"))
        options = (made.get(name) for name in cls._fields[3:])
        return cls(float(wave[0]), float(wave[-1]), int(wave.size), *options)

    def check(self, path: Path, want: CubeKind, whose: str) -> None:
        """Raise a DataError unless a cube of this kind is of the wanted one."""
        remedy = "Re-run cube_processing.py (or process_single_cube.py) --overwrite"
        if self.n_bands != want.n_bands or not np.allclose(self[:2], want[:2], rtol=1e-6):
            found, wanted = (f"{k.n_bands} bands of {k[0]:.2f}-{k[1]:.2f} A" for k in (self, want))
            raise DataError(f"{path}: {found}, {whose} have {wanted}. {remedy} on one grid.")
        for name in self._fields[3:]:
            found, wanted = getattr(self, name), getattr(want, name)
            if found is not None and wanted is not None and found != wanted:
                flag = f"--{'' if wanted else 'no-'}{name.replace('_', '-')}"
                raise DataError(
                    f"{path}: made with {name}={found}, {whose} {wanted}. {remedy} {flag} (or make "
                    "the others like it)."
                )


class Outline(NamedTuple):
    """What a cube's file tells without its spectra."""

    measured: np.ndarray
    """(y, x) uint16, as of `measured_bins`."""
    wave: np.ndarray
    """(band,) float64, Angstrom."""
    attrs: dict[str, Any]


def measured_bins(flux: np.ndarray) -> np.ndarray:
    """Count the measured bins of each spectrum (..., band); 0 for a spectrum of zeros alone."""
    finite = np.isfinite(flux)
    has_light = ((flux != 0) & finite).any(axis=-1)
    return np.where(has_light, finite.sum(axis=-1, dtype=np.uint16), np.uint16(0))


def write_cube(path: Path, cube: Cube, compression: str | None = None) -> None:
    """Write an H5 cube, whole or not at all; see `write_cube_rows`."""
    parts = (cube.flux, cube.ivar, cube.good_fraction)
    rows = (
        Rows(*(None if a is None else a[y : y + CHUNK_SPAXELS] for a in parts))  # type: ignore[arg-type]
        for y in range(0, len(cube.flux), CHUNK_SPAXELS)
    )
    write_cube_rows(path, cube.flux.shape, cube.wave, cube.attrs, rows, compression)


def write_cube_rows(
    path: Path,
    shape: tuple[int, ...],
    wave: np.ndarray,
    attrs: dict[str, Any],
    blocks: Iterable[Rows],
    compression: str | None = None,
) -> np.ndarray:
    """Write an H5 cube row by row as its spectra are made, whole or not at all.

    Spaxels without a single good bin (the corners outside the hexagon) are never written: HDF5
    gives back the fill value for chunks that do not exist.

    Parameters
    ----------
    path : Path
    shape : (y, x, band)
    wave : (band,) array, Angstrom
    attrs : dict
        Of the file; None values are left out.
    blocks : iterable of Rows
        From y = 0 on, CHUNK_SPAXELS rows each but for the last. An exception raised here leaves
        no file.
    compression : {None, "gzip"}
        For flux and ivar, which are noise and hardly shrink (docs/performance.md); the good
        fraction is always compressed.

    Returns
    -------
    (y, x) uint16
        As of `measured_bins`.
    """
    chunk = (min(CHUNK_SPAXELS, shape[0]), min(CHUNK_SPAXELS, shape[1]), shape[2])
    squeeze = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    layouts = (  # of Rows
        ("cube", "f4", np.nan, FLUX_UNIT, squeeze if compression else {}),
        ("ivar", "f4", 0, f"({FLUX_UNIT})^-2", squeeze if compression else {}),
        ("good_fraction", "f2", 0, "1", squeeze),
    )
    measured = np.zeros(shape[:2], np.uint16)
    n_bytes = 8 * int(np.prod(shape, dtype=np.int64))  # of flux and ivar, corners and all
    with new_h5(path, n_bytes, libver=("earliest", "v110")) as f:
        f.attrs.update(schema=CUBE_SCHEMA, schema_version=CUBE_VERSION)
        f.attrs.update({k: v for k, v in attrs.items() if v is not None})
        dataset = f.create_dataset("wave", data=wave.astype("f8"))
        dataset.attrs.update(unit="Angstrom (vacuum, rest frame)", axes="band")
        y, datasets = 0, dict[str, h5py.Dataset]()  # kept: one that goes writes, and hides errors
        for block in blocks:
            y, start = y + len(block.flux), y
            measured[start:y] = measured_bins(block.flux)
            occupied = np.flatnonzero(np.isfinite(block.flux).any(axis=(0, 2)))
            for (name, dtype, fill, unit, options), data in zip(layouts, block, strict=True):
                if data is None:
                    continue
                if name not in datasets:
                    datasets[name] = f.create_dataset(
                        name, shape, dtype, chunks=chunk, fillvalue=fill, **options
                    )
                    datasets[name].attrs.update(unit=unit, axes="y,x,band")
                if occupied.size:
                    x = slice(occupied[0] // chunk[1] * chunk[1], occupied[-1] + 1)
                    datasets[name][start:y, x] = data[:, x]
        dataset = f.create_dataset("measured", data=measured)
        dataset.attrs.update(unit="bins", axes="y,x")
    return measured


@contextlib.contextmanager
def new_h5(path: Path, n_bytes: int, **options: Any) -> Iterator[h5py.File]:
    """Create an H5 file, whole or not at all.

    Parameters
    ----------
    path : Path
    n_bytes : int
        About to be written, at most.
    **options
        For h5py.File.

    Raises
    ------
    DataError
        If there is no room for it. HDF5 crashes the process that runs out of room while it
        writes: so this is found out before, and if it happens all the same, what was written
        makes way for the rest.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise DataError(
            f"{path}: no space left on the disk: up to {n_bytes / 1e6:.1f} MB are needed, "
            f"{free / 1e6:.1f} MB are free."
        )
    with utils.atomic_path(path) as part:
        f = h5py.File(part, "w", **options)
        try:
            yield f
            f.flush()
            f.close()
        except BaseException as error:  # a stop, too: h5py would write the rest on its way out
            os.truncate(part, 0)
            with contextlib.suppress(OSError, RuntimeError):
                f.close()
            if isinstance(error, OSError | RuntimeError):
                raise DataError(f"{path}: could not be made ({_first_line(error)}).") from error
            raise


def _first_line(error: Exception) -> str:
    """Reason of an HDF5 error, without its memory addresses."""
    found = re.search(r"error message = '([^']+)'", str(error))
    return found[1] if found else str(error).partition("\n")[0]


def read_cube(path: Path, with_errors: bool = True) -> Cube:
    """Read an H5 cube.

    Parameters
    ----------
    path : Path
    with_errors : bool
        Also read ivar and the good fraction.

    Raises
    ------
    DataError
        If the file is missing, no cube, or of another schema version.
    """
    with _open_h5(path, CUBE_SCHEMA, CUBE_VERSION, "process_single_cube.py --overwrite") as f:
        ivar, good = (
            f[k][...] if with_errors and k in f else None for k in ("ivar", "good_fraction")
        )
        return Cube(f["cube"][...], f["wave"][...], ivar, good, dict(f.attrs))


def read_outline(path: Path) -> Outline:
    """Read what a cube's file tells without its spectra; raises as `read_cube` does."""
    with _open_h5(path, CUBE_SCHEMA, CUBE_VERSION, "process_single_cube.py --overwrite") as f:
        if "measured" not in f:
            raise DataError(
                f"{path}: no dataset 'measured'. Re-run cube_processing.py --overwrite."
            )
        return Outline(f["measured"][...], f["wave"][...], dict(f.attrs))


def read_cube_attrs(path: Path) -> dict[str, Any]:
    """Read a cube's root attributes and its `shape` without touching the spectra."""
    with _open_h5(path, CUBE_SCHEMA, CUBE_VERSION, "process_single_cube.py --overwrite") as f:
        return {**f.attrs, "shape": f["cube"].shape}


def _open_h5(path: Path, schema: str, version: int, remedy: str) -> h5py.File:
    """Open an H5 file of ours after checking what it says it is."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. Make it with {remedy.replace(' --overwrite', '')}.")
    try:
        f = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file ({error}). Re-run {remedy}.") from None
    found = (f.attrs.get("schema"), f.attrs.get("schema_version"))
    if found != (schema, version):
        f.close()
        raise DataError(
            f"{path}: schema {found[0]} version {found[1]}, this code needs {schema} "
            f"version {version}. Re-run {remedy}."
        )
    return f


# Labels


def label_error_path(label_file: Path) -> Path:
    """Uncertainty map beside a label map."""
    return label_file.with_name(f"{label_file.stem}_err.npy")


def write_labels(path: Path, labels: np.ndarray, error: np.ndarray, meta: dict[str, Any]) -> None:
    """Write a label map, its uncertainty map and its provenance; the label map last.

    Parameters
    ----------
    path : Path
        `processed/labels/<label_task>/<plateifu>.npy`; beside it `_err.npy` and `.json`.
    labels : (y, x) int16 or float32
        BPT class (LABEL_NONE: none) or 12+log(O/H) in dex (NaN: none).
    error : (y, x) float32
        BPT: probability that noise put the spaxel into a wrong class. logOH: 1 sigma in dex from
        the flux errors. NaN where there is no label.
    meta : dict
        How the labels were made, as JSON values.
    """
    path.unlink(missing_ok=True)  # a stop half-way leaves none, not old labels with new options
    utils.write_json(path.with_suffix(".json"), meta)
    _save_npy(label_error_path(path), error.astype(np.float32))
    _save_npy(path, labels)


def read_labels(path: Path) -> np.ndarray:
    """Read a label map (y, x): int16 BPT classes or float32 12+log(O/H)."""
    return _load_npy(path, "process_single_cube.py", ndim=2)


def read_label_error(path: Path) -> np.ndarray:
    """Read the uncertainty map that lies beside a label map."""
    return _load_npy(label_error_path(Path(path)), "process_single_cube.py", ndim=2)


def read_label_meta(path: Path) -> dict[str, Any]:
    """Read how a label map was made ({} if nothing says)."""
    side = Path(path).with_suffix(".json")
    return json.loads(side.read_text()) if side.is_file() else {}


# Patches

PATCH_COLUMNS = ("row", "y", "x", "label")


def patch_index_path(patch_file: Path) -> Path:
    """Index table beside a patch file."""
    return patch_file.with_name(f"{patch_file.stem}_index.csv")


def write_patches(path: Path, patches: np.ndarray, index: pd.DataFrame, meta: dict) -> None:
    """Write a patch file, its index and its provenance; the patches last.

    Parameters
    ----------
    path : Path
        `processed/patches/<label_task>/<patch_norm>/<plateifu>/<plateifu>.npy`.
    patches : (N, P, P, C) float32
        The labelled spaxel is [P//2, P//2]; zeros beyond the field of view.
    index : DataFrame of N rows: row, y, x, label
        `label` is the label value: BPT class or 12+log(O/H).
    meta : dict
        How the patches were made (patch_norm, patch_size, wave, ...), as JSON values.
    """
    path.unlink(missing_ok=True)  # as in `write_labels`
    utils.write_json(path.with_suffix(".json"), meta)
    with utils.atomic_path(patch_index_path(path)) as part:
        index.to_csv(part, columns=list(PATCH_COLUMNS), index=False)
    _save_npy(path, np.ascontiguousarray(patches, dtype=np.float32))


def read_patches(path: Path) -> tuple[np.ndarray, pd.DataFrame, dict[str, Any]]:
    """Read a patch file: memory-mapped patches (N, P, P, C), index table, provenance."""
    import pandas as pd

    patches = _load_npy(path, "cube_patch_processing.py", ndim=4, mmap=True)
    index = pd.read_csv(patch_index_path(Path(path)))
    if len(index) != len(patches):
        raise DataError(
            f"{path}: {len(patches)} patches, but {len(index)} rows in its index. "
            "Re-run cube_patch_processing.py --overwrite."
        )
    return patches, index, json.loads(Path(path).with_suffix(".json").read_text())


def _save_npy(path: Path, array: np.ndarray) -> None:
    """Save an array, whole or not at all."""
    with utils.atomic_path(path) as part:
        np.save(part, array, allow_pickle=False)


def _load_npy(path: Path, maker: str, ndim: int, mmap: bool = False) -> np.ndarray:
    """Load an array of `ndim` axes, with one clear line if that cannot be."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. Make it with {maker}.")
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{path}: not a readable .npy file ({error}). Re-run {maker} --overwrite."
        ) from None
    if array.ndim != ndim:
        raise DataError(f"{path}: {array.ndim} axes, expected {ndim}. Re-run {maker} --overwrite.")
    return array


# Splits


def write_split(folder: Path, parts: dict[str, pd.DataFrame], meta: dict[str, Any]) -> None:
    """Write train.csv, val.csv and test.csv with their provenance in the header.

    Parameters
    ----------
    folder : Path
        `splits/<split_dir>`.
    parts : dict of "train", "val", "test" -> DataFrame
        Columns plateifu, mangaid, then y, x if the split is by spaxel (easy splits); more columns
        are kept.
    meta : dict
        kind ("hard" or "easy"), seed, ...; one header line each.
    """
    check_split(parts, meta.get("kind", "hard"), str(folder))
    meta = {**meta, "sha256": split_sha256(parts)}
    lines = [f"# {k}: {json.dumps(v, default=str)}\n" for k, v in meta.items()]
    for part, table in parts.items():
        with utils.atomic_path(Path(folder) / f"{part}.csv") as temporary:
            temporary.write_text("".join(lines) + table.to_csv(index=False))


def split_sha256(parts: dict[str, pd.DataFrame]) -> str:
    """Name of a split's content, which the header of each part holds."""
    whole = "".join(table.to_csv(index=False) for table in parts.values())
    return hashlib.sha256(whole.encode()).hexdigest()


def read_split(folder: Path) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Read and check a split; return its parts and its header.

    Raises
    ------
    DataError
        If a part is missing or of another split than the others, or a galaxy of a hard split
        stands in two parts.
    """
    import pandas as pd

    folder, parts, meta = Path(folder), {}, {}
    wholes = set()  # what the parts' headers say they are parts of
    for part in utils.SPLIT_PARTS:
        path = folder / f"{part}.csv"
        if not path.is_file():
            raise DataError(f"{path}: no such file. Make the split with create_data_splits.py.")
        with path.open() as f:
            lines = itertools.takewhile(lambda line: line.startswith("# "), f)
            header = [line[2:].partition(": ") for line in lines]
        meta = {key: json.loads(value) for key, _, value in header}
        wholes.add(meta.get("sha256"))
        table = pd.read_csv(path, comment="#", dtype={"plateifu": str, "mangaid": str})
        missing = {"plateifu", "mangaid"} - set(table.columns)
        if missing:
            raise DataError(f"{path}: no column {', '.join(sorted(missing))}.")
        parts[part] = table
    if len(wholes) > 1:
        maker = f"create_{'easy_' if meta.get('kind') == 'easy' else ''}data_splits.py"
        raise DataError(
            f"{folder}: its files are parts of different splits. Make it anew with {maker} "
            f"--split-dir {folder.name} --overwrite."
        )
    check_split(parts, meta.get("kind", "hard"), str(folder))
    return parts, meta


def check_split(parts: dict[str, pd.DataFrame], kind: str, where: str) -> None:
    """Raise a DataError if a galaxy (hard split) or a spaxel (easy split) is in two parts."""
    import pandas as pd

    keys = ["mangaid"] if kind == "hard" else ["plateifu", "y", "x"]
    whole = pd.concat(
        [t[keys].drop_duplicates().assign(part=p) for p, t in parts.items()], ignore_index=True
    )
    twice = whole[whole.duplicated(keys, keep=False)]
    if len(twice):
        first = twice.iloc[0]
        raise DataError(
            f"{where}: {' '.join(str(first[k]) for k in keys)} and {len(twice) // 2 - 1} more "
            "stand in two parts of the split. Make it anew with create_data_splits.py."
        )


# Statistics


@dataclass
class Stats:
    """Statistics of a training split's spectra, each divided by its own mean.

    Attributes
    ----------
    wave : (band,) float64, Angstrom
    mean, std : (band,) float64
    components : (K, band) float64
        Principal components, orthonormal rows, by falling variance.
    explained_variance, explained_ratio : (K,) float64
    attrs : dict
        n_spaxels, n_galaxies, split_dir, provenance (config_json: the cubes' options too).
    """

    wave: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    components: np.ndarray
    explained_variance: np.ndarray
    explained_ratio: np.ndarray
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> CubeKind:
        """Kind of the cubes that they describe."""
        return CubeKind.of(self.wave, self.attrs)

    @property
    def sha256(self) -> str:
        """Name of the components: by content, since one second may see two of them made."""
        parts = (self.components, self.mean, self.explained_variance)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


STATS_FIELDS = ("wave", "mean", "std", "components", "explained_variance", "explained_ratio")


def write_stats(path: Path, stats: Stats) -> None:
    """Write the statistics of a training split, whole or not at all."""
    n_bytes = 2 * stats.components.nbytes  # and a few spectra
    with new_h5(path, n_bytes) as f:
        f.attrs.update(schema=STATS_SCHEMA, schema_version=STATS_VERSION)
        f.attrs.update({k: v for k, v in stats.attrs.items() if v is not None})
        for name in STATS_FIELDS:
            f[name] = getattr(stats, name)


def read_split_stats(path: Path) -> Stats:
    """Read the statistics that lie in a split's folder.

    Raises
    ------
    DataError
        If they are unreadable, or of other galaxies than the split's training part.
    """
    stats, train = read_stats(path), Path(path).with_name("train.csv")
    made_of = json.loads(stats.attrs.get("config_json", "{}")).get("plateifus")
    if made_of not in (None, _galaxies_of(train, utils.file_stamp(train))):
        raise DataError(
            f"{path}: of other galaxies than the split's training part. Re-run calc_data_stats.py "
            "--overwrite."
        )
    return stats


@functools.lru_cache(maxsize=8)  # loops over galaxies ask for the same one
def _galaxies_of(csv: Path, _stamp: str) -> list[str]:
    """Plateifus of one part of a split, sorted."""
    import pandas as pd

    return sorted(pd.read_csv(csv, comment="#", usecols=["plateifu"], dtype=str).plateifu.unique())


def read_stats(path: Path) -> Stats:
    """Read the statistics of a training split."""
    with _open_h5(path, STATS_SCHEMA, STATS_VERSION, "calc_data_stats.py --overwrite") as f:
        return Stats(**{name: f[name][...] for name in STATS_FIELDS}, attrs=dict(f.attrs))


# Packed cubes


@dataclass
class Packed:
    """Normalised spectra of many cubes in one table.

    Attributes
    ----------
    spectra : (row, C) float32 or float16 array
        Memory-mapped when read. Row 0 is all zeros and stands for every unusable spaxel.
    rows : dict of plateifu -> (y, x) int32
        Row of each spaxel's spectrum.
    wave : (band,) float64, Angstrom
        Of the cubes; with the norm PCA, C is not their number of bands.
    recipes : dict of plateifu -> dict
        What each cube was made from, as `recipe_of` tells it.
    attrs : dict
        patch_norm, stats (hash of the PCA's statistics), provenance.
    """

    spectra: np.ndarray
    rows: dict[str, np.ndarray]
    wave: np.ndarray
    recipes: dict[str, dict[str, Any]]
    attrs: dict[str, Any] = field(default_factory=dict)


def packed_path(root: Path, split_dir: str, patch_norm: str, dtype: str) -> Path:
    """Packed cubes of a split."""
    return Path(root) / "processed" / "packed" / split_dir / f"{patch_norm}_{dtype}.h5"


def content_of(attrs: dict[str, Any]) -> dict[str, Any]:
    """Tell from a cube's attributes what decides its numbers: source's hash and options."""
    return {
        "source_sha256": attrs.get("source_sha256"),
        "options": json.loads(attrs.get("config_json", "{}")),
    }


def patch_source(cube_path: Path, label_path: Path) -> dict[str, Any]:
    """Tell what patches of a cube and its labels are made from, as their provenance has it."""
    label = read_label_meta(label_path)
    return {
        "cube": content_of(read_cube_attrs(cube_path)),
        "label": {k: label.get(k) for k in ("source_sha256", "options")},
    }


def recipe_of(attrs: dict[str, Any]) -> dict[str, str]:
    """Tell from a cube's attributes what it was made from: source's hash, options, time."""
    keys = ("source_sha256", "config_json", "created_utc")
    return {k: str(attrs[k]) for k in keys if k in attrs}


def write_packed(path: Path, packed: Packed, cubes: Iterable[np.ndarray]) -> None:
    """Write packed cubes, whole or not at all.

    Parameters
    ----------
    path : Path
        `processed/packed/<split_dir>/<patch_norm>_<dtype>.h5`.
    packed : Packed
        Of `spectra` only shape and type count.
    cubes : iterable of (n, C) arrays
        The spectra of each galaxy of `packed.rows` in turn, ascending by row.
    """
    n_bytes = packed.spectra.dtype.itemsize * int(np.prod(packed.spectra.shape, dtype=np.int64))
    with new_h5(path, n_bytes) as f:
        f.attrs.update(schema=PACKED_SCHEMA, schema_version=PACKED_VERSION)
        f.attrs.update({k: v for k, v in packed.attrs.items() if v is not None})
        f["wave"] = packed.wave
        f["plateifu"] = list(packed.rows)
        f["recipe"] = [json.dumps(packed.recipes[p]) for p in packed.rows]
        f["shape"] = np.array([r.shape for r in packed.rows.values()], np.int32)
        f["rows"] = np.concatenate([r.ravel() for r in packed.rows.values()])
        spectra = f.create_dataset("spectra", packed.spectra.shape, packed.spectra.dtype)
        spectra.attrs.update(axes="row,component" if packed.attrs.get("stats") else "row,band")
        spectra[0] = 0
        row = 1
        for values in cubes:
            spectra[row : row + len(values)] = values
            row += len(values)
        assert row == len(spectra), "fewer or more spectra than the maps of rows name"


def read_packed(path: Path) -> Packed:
    """Open packed cubes; the spectra stay on disk, memory-mapped."""
    with _open_h5(path, PACKED_SCHEMA, PACKED_VERSION, "pack_cubes.py --overwrite") as f:
        names = f["plateifu"].asstr()[...].tolist()
        recipes = [json.loads(text) for text in f["recipe"].asstr()[...]]
        shapes = f["shape"][...]
        parts = np.split(f["rows"][...], np.cumsum(shapes.prod(1))[:-1])
        rows = {p: r.reshape(s) for p, r, s in zip(names, parts, shapes, strict=True)}
        spectra, wave, attrs = f["spectra"], f["wave"][...], dict(f.attrs)
        layout = (spectra.dtype, spectra.id.get_offset(), spectra.shape)
    dtype, offset, shape = layout
    mapped = np.memmap(path, dtype, "r", offset, shape)
    return Packed(mapped, rows, wave, dict(zip(names, recipes, strict=True)), attrs)
