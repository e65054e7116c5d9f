"""Normalised cubes: read one, or pack those of a split into one memory-mapped table.

Training does the packing itself where it is needed; on a cluster it is better done beforehand, by
many cores, than while a GPU waits.

Reads   splits/<split_dir>/{train,val,test}.csv, processed/cubes; for the norm PCA also stats.h5.
Writes  processed/packed/<split_dir>/<patch_norm>_<dtype>.h5: the usable spectra of the training and
        validation galaxies, one per row. Layout: docs/data_formats.md#packed-cubes.

    python pack_cubes.py --split-dir hard_logOH --jobs 16
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import utils
from utils import DataError, Norm

import numpy as np
from isal import isal_zlib
from tqdm import tqdm

import data_io
import h5_files
import hsi_proc_fns
import loops
from hsi_proc_fns import Stats
from recipe import Recipe, require_alike

log = logging.getLogger(__name__)

PACKED_SCHEMA, PACKED_VERSION = "manga-packed", 3
CHECKED_AT_ONCE = 1 << 24
"""Bytes of spectra that are compared with their checksum at a time."""
PackedType = Literal["float16", "float32"]
PACKED_AXES = {"PCA": "component", "residual": "residual+weight+colour"}


class NormalisedCube(NamedTuple):
    """A normalised cube."""

    values: np.ndarray
    """(y, x, C) float32, zeros at unusable spaxels; C bands, with the norm PCA components, and with
    the norm residual what `matched_filter_net.join` gives."""
    usable: np.ndarray
    """(y, x) bool."""
    inside: np.ndarray
    """(y, x) bool: spaxels with any measured bin."""
    recipe: Recipe
    """Of the cube."""
    attrs: dict[str, Any]


@dataclass
class PackedCubes:
    """Normalised spectra of many cubes in one table."""

    path: Path
    spectra: np.ndarray
    """(row, C) float32 or float16, memory-mapped; row 0 is all zeros and stands for every unusable
    spaxel."""
    rows: dict[str, np.ndarray]
    """By plateifu, the row of each spaxel's spectrum, (y, x) int32."""
    cubes: dict[str, str]
    """By plateifu, the digest of the cube's recipe."""
    recipe: Recipe
    """Options of the cubes under "cube"."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path alone: a worker maps the file again."""
        return read_packed, (self.path, False)

    @property
    def size(self) -> str:
        """Number of cubes and spectra, and the size on disk, in words."""
        n, c = self.spectra.shape
        n_bytes = self.spectra.size * self.spectra.dtype.itemsize
        size = f"{n_bytes / 1e9:.1f} GB" if n_bytes > 1e9 else f"{n_bytes / 1e6:.1f} MB"
        return f"{len(self.rows)} cubes, {n - 1} spectra of {c} {self.spectra.dtype} values, {size}"


def read_normalised(
    path: Path, patch_norm: Norm, stats: Stats | None, bands: tuple[int, int] | None = None
) -> NormalisedCube:
    """Read a cube, normalise it and keep some bands, from the first to the one before the last.

    Norm residual: see `matched_filter_net.prepare_spectra`; others: `hsi_proc_fns.normalise`.

    Raises
    ------
    DataError
        If the file is not a readable cube, was made with other options than the cubes of the
        statistics, or lacks the errors that the norm residual needs.
    """
    cube = data_io.read_cube(path, with_errors=patch_norm == "residual")
    if stats is not None:
        options = stats.recipe.options["cube"]
        require_alike(
            cube.recipe.shared, options, path, "those of the statistics", data_io.REBUILD_CUBE
        )
    usable = hsi_proc_fns.usable_spaxels(cube.flux)
    if patch_norm != "residual":
        values = hsi_proc_fns.normalise(cube.flux, patch_norm, stats, usable)
    elif cube.ivar is None:
        raise DataError(
            f"{path}: holds no ivar, expected the inverse variance of the flux. Re-run "
            "process_single_cube.py --overwrite, or train with --network ssftt."
        )
    else:
        import matched_filter_net  # here, since it needs torch, which takes seconds to load

        spectra = matched_filter_net.prepare_spectra(cube.flux[usable], cube.ivar[usable])
        joined = matched_filter_net.join(spectra).numpy()
        values = np.zeros((*usable.shape, joined.shape[1]), np.float32)
        values[usable] = joined
    kept = hsi_proc_fns.band_slice(bands, values.shape[2], path)
    inside = np.isfinite(cube.flux).any(axis=2)
    return NormalisedCube(
        np.ascontiguousarray(values[..., kept]), usable, inside, cube.recipe, cube.attrs
    )


# The file


def packed_path(root: Path, split_dir: str, patch_norm: str, dtype: str) -> Path:
    """Path of the packed cubes of a split."""
    return Path(root) / "processed" / "packed" / split_dir / f"{patch_norm}_{dtype}.h5"


def write_packed(path: Path, packed: PackedCubes, cubes: Iterable[np.ndarray]) -> None:
    """Write packed cubes, whole or not at all.

    Of `packed.spectra`, only shape and type are used; `cubes` are the spectra (n, C) of each cube
    of `packed.rows` in turn, in the order of their rows.
    """
    n_bytes = packed.spectra.dtype.itemsize * int(np.prod(packed.spectra.shape, dtype=np.int64))
    about = PACKED_SCHEMA, PACKED_VERSION, packed.recipe, utils.made_now()
    with h5_files.new_h5(path, *about, n_bytes) as f:
        f["plateifu"] = np.array(list(packed.rows), "S")
        f["cube"] = np.array([packed.cubes[p] for p in packed.rows], "S")
        f["shape"] = np.array([r.shape for r in packed.rows.values()], np.int32)
        f["rows"] = np.concatenate([r.ravel() for r in packed.rows.values()])
        spectra = f.create_dataset("spectra", packed.spectra.shape, packed.spectra.dtype)
        axis = PACKED_AXES.get(packed.recipe.options["patch_norm"], "band")
        spectra.attrs.update(axes=f"row,{axis}")
        spectra[0] = 0
        crc, row = isal_zlib.crc32(np.zeros(spectra.shape[1:], spectra.dtype)), 1
        for values in cubes:
            stored = np.ascontiguousarray(values, spectra.dtype)
            spectra[row : row + len(values)] = stored
            crc, row = isal_zlib.crc32(stored, crc), row + len(values)
        spectra.attrs["crc32"] = crc
        assert row == len(spectra), "the number of spectra differs from that in the maps of rows"


def read_packed(path: Path, is_checked: bool = True) -> PackedCubes:
    """Open packed cubes; the spectra stay on disk, memory-mapped, checked or not."""
    maker = "pack_cubes.py --overwrite"
    with h5_files.open_h5(path, PACKED_SCHEMA, PACKED_VERSION, maker) as (f, recipe, _):
        texts = (h5_files.read_dataset(f, name) for name in ("plateifu", "cube"))
        names, cubes = ([word.decode() for word in text] for text in texts)
        shapes, flat = (h5_files.read_dataset(f, name) for name in ("shape", "rows"))
        parts = np.split(flat, np.cumsum(shapes.prod(1))[:-1])
        rows = {p: r.reshape(s) for p, r, s in zip(names, parts, shapes, strict=True)}
        spectra = f["spectra"]
        mapped = np.memmap(path, spectra.dtype, "r", spectra.id.get_offset(), spectra.shape)
        crc, n_rows = 0, max(1, CHECKED_AT_ONCE // max(mapped[:1].nbytes, 1))
        for row in range(0, len(mapped), n_rows):  # once in a run: the workers map it unchecked
            crc = isal_zlib.crc32(mapped[row : row + n_rows], crc) if is_checked else crc
        if is_checked and crc != spectra.attrs["crc32"]:
            raise ValueError("the checksum of spectra differs")
    return PackedCubes(Path(path), mapped, rows, dict(zip(names, cubes, strict=True)), recipe)


# Packing


def open_packed(
    root: Path,
    split_dir: str,
    patch_norm: Norm,
    plateifus: Sequence[str],
    dtype: PackedType = "float16",
    jobs: int = 1,
    overwrite: bool = False,
) -> PackedCubes:
    """Open the packed cubes of a split; pack them first unless they are there and up to date.

    Parameters
    ----------
    plateifus : sequence of str
        Observations that are needed.
    dtype : {"float16", "float32"}
        float16 keeps 11 bits of each value (bf16 training uses 8), in half the memory.
    jobs : int
        Processes that pack.
    overwrite : bool
        Pack again even if the file is up to date.

    Notes
    -----
    A packed file is up to date if it is readable and holds the galaxies, made from the cubes and
    statistics of today. Where a cube itself no longer exists, its packed spectra are used.

    Raises
    ------
    DataError
        If cubes or statistics that are needed are missing, unreadable or outdated.
    """
    stats = data_io.read_split_stats(root, split_dir) if patch_norm == "PCA" else None
    path = packed_path(root, split_dir, patch_norm, dtype)
    reason = "--overwrite" if path.is_file() else "there is no such file yet"
    if path.is_file() and not overwrite:
        try:
            packed = read_packed(path)
            reason = why_outdated(packed, root, plateifus, patch_norm, dtype, stats)
        except DataError as error:  # damaged, or of an older version
            reason = str(error)
        if not reason:
            return packed
    log.info("%s: packing %d cubes (%s)", path, len(plateifus), reason)
    pack(path, root, plateifus, patch_norm, stats, dtype, jobs)
    return read_packed(path)


def packed_recipe(
    patch_norm: str, dtype: str, stats: Stats | None, cube_options: dict[str, Any]
) -> Recipe:
    """Name what decides packed cubes, besides the cubes themselves."""
    options = {"patch_norm": patch_norm, "dtype": dtype, "cube": cube_options}
    inputs = {"set of statistics": stats.recipe.digest} if stats is not None else {}
    return Recipe("packed cubes", PACKED_VERSION, options, inputs)


def why_outdated(
    packed: PackedCubes,
    root: Path,
    plateifus: Sequence[str],
    patch_norm: str,
    dtype: str,
    stats: Stats | None,
) -> str:
    """Say why a packed file cannot be used; empty if it can."""
    today = packed_recipe(patch_norm, dtype, stats, packed.recipe.options["cube"])
    changed = today.differences(packed.recipe)
    if changed:
        return f"the file was made with {', '.join(changed)}"
    lacking = [p for p in plateifus if p not in packed.rows]
    if lacking:
        return f"the file lacks {lacking[0]} and {len(lacking) - 1} more"
    now = data_io.cube_digests(root, plateifus)
    rebuilt = [p for p, digest in now.items() if digest != packed.cubes[p]]
    return f"the cube of {rebuilt[0]} and {len(rebuilt) - 1} more were rebuilt" if rebuilt else ""


def pack(
    path: Path,
    root: Path,
    plateifus: Sequence[str],
    patch_norm: Norm,
    stats: Stats | None = None,
    dtype: PackedType = "float16",
    jobs: int = 1,
) -> None:
    """Normalise cubes and write their usable spectra into one file, whole or not at all."""
    rows: dict[str, np.ndarray] = {}
    digests: dict[str, str] = {}
    n_rows, n_bands, options = 1, 0, dict[str, Any]()
    for plateifu in plateifus:
        cube = utils.cube_path(root, plateifu)
        head = data_io.read_cube_head(cube)
        n_bands, options = head.wave.size, options or head.recipe.shared
        whose = f"that of {plateifus[0]}"
        require_alike(head.recipe.shared, options, cube, whose, data_io.REBUILD_CUBE)
        usable = hsi_proc_fns.is_usable(head.measured, n_bands)
        count = int(usable.sum())
        rows[plateifu] = np.zeros(usable.shape, np.int32)
        rows[plateifu][usable] = np.arange(n_rows, n_rows + count)
        digests[plateifu] = head.recipe.digest
        n_rows += count
    n_columns = n_bands if stats is None else len(stats.components)
    if patch_norm == "residual":
        import matched_filter_net

        n_columns = matched_filter_net.joined_size(n_bands)
    spectra = np.broadcast_to(np.zeros(1, dtype), (n_rows, n_columns))
    recipe = packed_recipe(patch_norm, dtype, stats, options)
    packed = PackedCubes(path, spectra, rows, digests, recipe)
    log.info("needed on disk: %s", packed.size)
    work = partial(usable_spectra, Path(root), patch_norm, stats, dtype)
    with loops.worker_pool(jobs, "spawn") if jobs > 1 else ThreadPoolExecutor(1) as pool:
        spectra_of_each = loops.in_order(pool, work, plateifus, 2 * jobs)
        bar = tqdm(spectra_of_each, desc="packing", total=len(plateifus), unit="cube", disable=None)
        write_packed(path, packed, bar)


def usable_spectra(
    root: Path, patch_norm: Norm, stats: Stats | None, dtype: str, plateifu: str
) -> np.ndarray:
    """Normalised spectra of a cube's usable spaxels, (n, C) of the given type."""
    path = utils.cube_path(root, plateifu)
    cube = read_normalised(path, patch_norm, stats)
    spectra = cube.values[cube.usable]
    with np.errstate(over="ignore"):
        rounded = spectra.astype(dtype)
    if not np.isfinite(rounded).all():
        raise DataError(
            f"{path}: values up to {np.abs(spectra).max():.3g} with the norm {patch_norm}, too "
            f"large for {dtype}. Use --packed-type float32."
        )
    return rounded


# The command


@dataclass(frozen=True)
class Config(utils.CommandOptions):
    """Pack the normalised cubes of a split into one memory-mapped file."""

    split_dir: str
    """Split whose cubes are packed, e.g. hard_logOH."""
    patch_norm: Norm = "residual"
    """Normalisation of the spectra: residual for matched filters, others for SSFTT."""
    packed_type: PackedType = "float16"
    """Number type in the file; the values of the norm residual are float16 anyway."""
    jobs: int = 0
    """Number of processes; 0 uses one per CPU."""


def main(config: Config) -> int:
    """Pack a split."""
    root = utils.data_dir(config.data_dir)
    parts, _ = data_io.read_split(utils.split_path(root, config.split_dir))
    observations = [p for part in ("train", "val") for p in parts[part]["plateifu"]]
    packed = open_packed(
        root,
        config.split_dir,
        config.patch_norm,
        list(dict.fromkeys(observations)),
        config.packed_type,
        utils.processes(config.jobs),
        config.overwrite,
    )
    log.info("%s: %s", packed.path, packed.size)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
