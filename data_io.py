"""Owner of the file layouts of the pipeline: cubes, labels, patches, splits, statistics.

No other module spells a dataset name or a column; docs/data_formats.md describes each layout.
Axis order: cubes and patches (y, x, band), maps (y, x). Missing values: NaN in floats, LABEL_NONE
in classes. Every file records the `Recipe` that decided its numbers; whatever is missing, damaged
or of another version is a `DataError` when it is read. Needs neither astropy nor torch.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import utils
from utils import DataError

import h5py
import numpy as np
from isal import isal_zlib

from h5_files import OpenFile, new_h5, open_h5, read_dataset
from hsi_proc_fns import Stats, measured_bins
from recipe import Recipe, checksum, digest_of, sealed, sealed_text

if TYPE_CHECKING:  # tables alone need pandas: cubes and labels are spared its import time
    import pandas as pd

CUBE_SCHEMA, CUBE_VERSION = "manga-cube", 4
STATS_SCHEMA, STATS_VERSION = "manga-stats", 3
LABEL_VERSION = PATCH_VERSION = SPLIT_VERSION = 2
FLUX_UNIT = "1e-17 erg/s/cm2/Angstrom/spaxel"
CHUNK_SPAXELS = 4
"""Side of an H5 chunk in spaxels: 4 x 4 spectra of 2040 float32 are 131 kB."""
REBUILD_CUBE = "Re-run process_single_cube.py (or cube_processing.py) --overwrite"


# Cubes


@dataclass
class Cube:
    """A processed cube."""

    flux: np.ndarray
    """(y, x, band) float32, 1e-17 erg/s/cm2/Angstrom/spaxel: flux density in the rest frame, NaN
    where no good pixel contributed."""
    wave: np.ndarray
    """(band,) float64, Angstrom: vacuum rest wavelengths of the bin centres (geometric)."""
    recipe: Recipe
    """Options of processing; the content of the FITS files."""
    ivar: np.ndarray | None = None
    """(y, x, band) float32: inverse variance of `flux`, 0 where that is NaN."""
    good_fraction: np.ndarray | None = None
    """(y, x, band) float16: fraction of each bin's width that good pixels covered, 0 to 1."""
    attrs: dict[str, Any] = field(default_factory=dict)
    """plateifu, mangaid, redshift, provenance."""


class Rows(NamedTuple):
    """A few neighbouring rows of a `Cube`, (rows, x, band) each."""

    flux: np.ndarray
    ivar: np.ndarray | None
    good_fraction: np.ndarray | None


class CubeHead(NamedTuple):
    """What a cube's file holds besides its spectra."""

    measured: np.ndarray
    """(y, x) uint16: `hsi_proc_fns.measured_bins`."""
    wave: np.ndarray
    """(band,) float64, Angstrom."""
    recipe: Recipe
    attrs: dict[str, Any]


def write_cube(path: Path, cube: Cube, compression: str | None = None) -> None:
    """Write an H5 cube, whole or not at all; see `write_cube_rows`."""
    parts = (cube.flux, cube.ivar, cube.good_fraction)
    rows = (
        Rows(*(None if a is None else a[y : y + CHUNK_SPAXELS] for a in parts))  # type: ignore[arg-type]
        for y in range(0, len(cube.flux), CHUNK_SPAXELS)
    )
    write_cube_rows(path, cube.flux.shape, cube.wave, cube.attrs, cube.recipe, rows, compression)


def write_cube_rows(
    path: Path,
    shape: tuple[int, ...],
    wave: np.ndarray,
    attrs: dict[str, Any],
    recipe: Recipe,
    blocks: Iterable[Rows],
    compression: str | None = None,
) -> np.ndarray:
    """Write an H5 cube row by row as its spectra are made, whole or not at all.

    Chunks without a single good bin (the corners outside the hexagon) are not written: HDF5
    returns the fill value for chunks that do not exist.

    Parameters
    ----------
    path : Path
    shape : (y, x, band)
    wave : (band,) array, Angstrom
    attrs : dict
        Attributes of the file; None values are left out.
    recipe : Recipe
    blocks : iterable of Rows
        Starting at y = 0, CHUNK_SPAXELS rows each except the last. If it raises an exception, no
        file is left.
    compression : {None, "gzip"}
        For flux and ivar, which are noisy and hardly shrink (docs/performance.md); the good
        fraction is always compressed.

    Returns
    -------
    (y, x) uint16
        `hsi_proc_fns.measured_bins` of the flux.
    """
    chunk = (min(CHUNK_SPAXELS, shape[0]), min(CHUNK_SPAXELS, shape[1]), shape[2])
    squeeze = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    layouts = (  # of Rows
        ("cube", "f4", np.nan, FLUX_UNIT, squeeze if compression else {}),
        ("ivar", "f4", 0, f"({FLUX_UNIT})^-2", squeeze if compression else {}),
        ("good_fraction", "f2", 0, "1", squeeze),
    )
    measured = np.zeros(shape[:2], np.uint16)
    n_bytes = 8 * int(np.prod(shape, dtype=np.int64))  # flux and ivar, corners included
    about = CUBE_SCHEMA, CUBE_VERSION, recipe, attrs
    with new_h5(path, *about, n_bytes, libver=("earliest", "v110")) as f:
        dataset = f.create_dataset("wave", data=wave.astype("f8"))
        dataset.attrs.update(unit="Angstrom (vacuum, rest frame)", axes="band")
        y, datasets = 0, dict[str, h5py.Dataset]()
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


def read_cube(path: Path, with_errors: bool = True) -> Cube:
    """Read an H5 cube, of this schema version and of the galaxy that its name says.

    Without errors, ivar and the good fraction are not read.
    """
    with _open_cube(path) as (f, recipe, attrs):
        flux, wave = read_dataset(f, "cube"), read_dataset(f, "wave")
        ivar, good = (
            read_dataset(f, name) if with_errors and name in f else None
            for name in ("ivar", "good_fraction")
        )
        return Cube(flux, wave, recipe, ivar, good, attrs)


def read_cube_head(path: Path) -> CubeHead:
    """Read what a cube's file holds besides its spectra; raises the errors of `read_cube`."""
    with _open_cube(path) as (f, recipe, attrs):
        return CubeHead(read_dataset(f, "measured"), read_dataset(f, "wave"), recipe, attrs)


def cube_digests(root: Path, plateifus: Iterable[str]) -> dict[str, str]:
    """Digests of the recipes of cubes, by plateifu; cubes that do not exist are left out."""
    paths = {p: utils.cube_path(root, p) for p in plateifus}
    return {p: read_cube_head(path).recipe.digest for p, path in paths.items() if path.is_file()}


@contextlib.contextmanager
def _open_cube(path: Path) -> Iterator[OpenFile]:
    """Open a cube after checking that it is one, and of the galaxy that its name says."""
    if not Path(path).is_file():
        raise DataError(
            f"{path}: no such file, expected a processed cube. Make it with process_single_cube.py "
            f"--plateifu {Path(path).stem} (and --like-run RUN, for the model of a run)."
        )
    with open_h5(path, CUBE_SCHEMA, CUBE_VERSION, "process_single_cube.py --overwrite") as opened:
        named, found = utils.PLATEIFU.search(Path(path).name), opened.attrs.get("plateifu")
        if named and found and found != named[0]:
            raise DataError(
                f"{path}: the cube of {found}, expected that of {named[0]}, as its name says. "
                "Rename the file, or re-run process_single_cube.py --overwrite."
            )
        yield opened


# Labels


def label_error_path(label_file: Path) -> Path:
    """Path of the uncertainty map beside a label map."""
    return label_file.with_name(f"{label_file.stem}_err.npy")


def write_labels(
    path: Path, labels: np.ndarray, error: np.ndarray, recipe: Recipe, about: dict[str, Any]
) -> None:
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
    recipe : Recipe
    about : dict
        mangaid, counts, ..., as JSON values.
    """
    path.unlink(missing_ok=True)  # a stop half-way leaves none, not old labels with new options
    error = error.astype(np.float32)
    digests = {"digest": digest_of(labels), "error_digest": digest_of(error)}
    _write_provenance(path.with_suffix(".json"), {"recipe": recipe, **digests, **about})
    _save_npy(label_error_path(path), error)
    _save_npy(path, labels)


def read_labels(path: Path) -> np.ndarray:
    """Read a label map (y, x): int16 BPT classes or float32 12+log(O/H).

    If there is a .json beside it, the values must be those that it describes.
    """
    return _read_label_array(Path(path), Path(path), "digest")


def _read_label_array(path: Path, label_file: Path, name: str) -> np.ndarray:
    """Read an array of a label map; compare it with its digest in the .json, if there is one."""
    array = np.array(_load_npy(path, "process_single_cube.py", ndim=2))
    about = read_label_meta(label_file)
    if about and about.get(name) != digest_of(array):
        raise DataError(
            f"{path}: its values are not those that the .json describes. Re-run "
            "process_single_cube.py --overwrite, or remove the .json to use labels of your own."
        )
    return array


def read_label_bins(path: Path) -> np.ndarray:
    """Read the bins of a label map, (y, x) int: labelled spaxels of one bin share one measurement.

    Spaxels without a label or a known bin have a negative number of their own.
    """
    labels = read_labels(path)
    bins = -1 - np.arange(labels.size).reshape(labels.shape)
    listed = read_label_meta(path).get("bins")
    if listed is not None:
        y, x = np.nonzero(labels >= 0)
        if len(listed) != y.size:
            raise DataError(
                f"{Path(path).with_suffix('.json')}: {len(listed)} bins, expected one for each of "
                f"{y.size} labelled spaxels. Re-run process_single_cube.py --overwrite."
            )
        known = np.array(listed) >= 0
        bins[y[known], x[known]] = np.array(listed)[known]
    return bins


def read_label_error(path: Path) -> np.ndarray:
    """Read the uncertainty map that lies beside a label map."""
    return _read_label_array(label_error_path(Path(path)), Path(path), "error_digest")


def read_label_meta(path: Path) -> dict[str, Any]:
    """Read the .json beside a label map, "recipe" as a `Recipe`; {} if there is none."""
    side = Path(path).with_suffix(".json")
    return _read_provenance(side, "process_single_cube.py") if side.is_file() else {}


def _write_provenance(path: Path, content: dict[str, Any]) -> None:
    """Write provenance as JSON, with its checksum."""
    utils.write_json(path, sealed({**content, "recipe": json.loads(content["recipe"].to_json())}))


def _read_provenance(path: Path, maker: str) -> dict[str, Any]:
    """Read a .json file of provenance, "recipe" as a `Recipe`."""
    with utils.reading(path, "provenance as JSON", f"Re-run {maker} --overwrite."):
        content = dict(json.loads(path.read_text()))
        found = content.pop("checksum", None)
        if found != sealed(content)["checksum"]:
            raise ValueError("its checksum differs, or it has none")
        return {**content, "recipe": Recipe.from_json(content["recipe"], path)}


# Patches

PATCH_COLUMNS = ("row", "y", "x", "label")


def patch_index_path(patch_file: Path) -> Path:
    """Path of the index table beside a patch file."""
    return patch_file.with_name(f"{patch_file.stem}_index.csv")


def write_patches(
    path: Path, patches: np.ndarray, index: pd.DataFrame, recipe: Recipe, about: dict[str, Any]
) -> None:
    """Write a patch file, its index and its provenance; the patches last.

    Parameters
    ----------
    path : Path
        `processed/patches/<label_task>/<patch_norm>/<plateifu>/<plateifu>.npy`.
    patches : (N, P, P, C) float32
        The labelled spaxel is [P//2, P//2]; zeros beyond the field of view.
    index : DataFrame of N rows: row, y, x, label
        `label` is the label value: BPT class or 12+log(O/H).
    recipe : Recipe
        Options of cube and labels under "cube" and "labels".
    about : dict
        plateifu, mangaid, ..., as JSON values.
    """
    path.unlink(missing_ok=True)  # as in `write_labels`
    patches = np.ascontiguousarray(patches, dtype=np.float32)
    text = index.to_csv(columns=list(PATCH_COLUMNS), index=False)
    crcs = {"patches": checksum(patches), "index": isal_zlib.crc32(text.encode())}
    _write_provenance(path.with_suffix(".json"), {"recipe": recipe, "crc32": crcs, **about})
    with utils.atomic_path(patch_index_path(path)) as part:
        part.write_text(text)
    _save_npy(path, patches)


def read_patches(path: Path) -> tuple[np.ndarray, pd.DataFrame, Recipe]:
    """Read a patch file: memory-mapped patches (N, P, P, C), index table, recipe."""
    import pandas as pd

    maker, where = "cube_patch_processing.py", patch_index_path(Path(path))
    patches = _load_npy(path, maker, ndim=4)
    about = _read_provenance(Path(path).with_suffix(".json"), maker)
    with utils.reading(where, "the table of the patches", f"Re-run {maker} --overwrite."):
        text = where.read_bytes()
        index = pd.read_csv(io.BytesIO(text))
        crcs = {"patches": checksum(patches), "index": isal_zlib.crc32(text)}
        if about["crc32"] != crcs or len(index) != len(patches):
            raise ValueError(f"checksums of {len(patches)} patches and {len(index)} rows differ")
    return patches, index, about["recipe"]


def patch_recipe(
    cube: Recipe,
    labels: np.ndarray,
    label_recipe: Recipe | None,
    patch_norm: str,
    patch_size: int,
    stats: Stats | None,
) -> Recipe:
    """Recipe of the patches of a cube and its labels (y, x), whose own is None if it is unknown.

    The other arguments are those of `hsi_proc_fns.normalise` and `extract_patches`.
    """
    options = {"patch_norm": patch_norm, "patch_size": patch_size, "cube": cube.shared}
    options["labels"] = label_recipe.shared if label_recipe else {}
    inputs = {"cube": cube.digest, "label map": digest_of(labels)}
    if stats is not None:
        inputs["set of statistics"] = stats.recipe.digest
    return Recipe("patches", PATCH_VERSION, options, inputs)


def _save_npy(path: Path, array: np.ndarray) -> None:
    """Save an array, whole or not at all."""
    with utils.atomic_path(path) as part:
        np.save(part, array, allow_pickle=False)


def _load_npy(path: Path, maker: str, ndim: int) -> np.ndarray:
    """Map an array of `ndim` axes of numbers into memory; nothing is allocated."""
    is_there = Path(path).is_file()
    remedy = f"Re-run {maker} --overwrite." if is_there else f"Make it with {maker}."
    with utils.reading(path, f"a .npy file of {ndim} axes", remedy):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != ndim or array.dtype.kind not in "iuf":
            raise ValueError(f"{array.ndim} axes of {array.dtype}")
        return array


# Splits


def write_split(
    folder: Path, parts: dict[str, pd.DataFrame], recipe: Recipe, warning: str = ""
) -> None:
    """Write train.csv, val.csv and test.csv with their recipe in the header.

    Parameters
    ----------
    folder : Path
        `splits/<split_dir>`.
    parts : dict of "train", "val", "test" -> DataFrame
        Columns plateifu, mangaid, then y, x if the split is by spaxel (easy splits); more columns
        are kept.
    recipe : Recipe
        With the option kind: "hard" (whole galaxies) or "easy" (spaxels).
    warning : str
        For readers of the files, in the header.
    """
    check_split(parts, recipe.options["kind"], str(folder))
    made = utils.made_now() | ({"warning": warning} if warning else {})
    header = f"# recipe: {recipe.to_json()}\n"
    header += "".join(f"# {k}: {json.dumps(v)}\n" for k, v in made.items())
    for part, table in parts.items():
        with utils.atomic_path(Path(folder) / f"{part}.csv") as temporary:
            temporary.write_text(sealed_text(header + table.to_csv(index=False)))


def read_split(folder: Path) -> tuple[dict[str, pd.DataFrame], Recipe]:
    """Read a split; return its parts and its recipe.

    The parts must be of one split and disjoint: in galaxies, those of an easy split in spaxels.
    """
    folder, parts, recipes = Path(folder), {}, list[Recipe]()
    for part in utils.SPLIT_PARTS:
        parts[part], recipe = _read_part(folder / f"{part}.csv")
        recipes.append(recipe)
    kind = recipes[0].options["kind"]
    if len({recipe.digest for recipe in recipes}) > 1:
        maker = f"create_{'easy_' if kind == 'easy' else ''}data_splits.py"
        raise DataError(
            f"{folder}: its files are parts of different splits. Rebuild it with {maker} "
            f"--split-dir {folder.name} --overwrite."
        )
    check_split(parts, kind, str(folder))
    return parts, recipes[0]


def _read_part(path: Path) -> tuple[pd.DataFrame, Recipe]:
    """Read one file of a split."""
    import pandas as pd

    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a table of a split. {_other_split(path)}")
    remedy = "Create the split with create_data_splits.py --overwrite."
    with utils.reading(path, "a table of a split", remedy):
        text = path.read_bytes().decode()
        content = text.partition("\n")[2]
        if text != sealed_text(content):
            raise ValueError("its checksum differs, or it has none")
        recipe = Recipe.from_json(content.partition("\n")[0].removeprefix("# recipe: "), path)
        ids = {"plateifu": str, "mangaid": str}
        table = pd.read_csv(io.StringIO(content), comment="#", dtype=ids)
        keys = {"hard": ["mangaid"], "easy": ["mangaid", "y", "x"]}[recipe.options["kind"]]
        table[["plateifu", *keys]]  # a KeyError names what is missing
        for plateifu in table["plateifu"].unique():
            if not utils.PLATEIFU.fullmatch(str(plateifu)):
                raise ValueError(f"{plateifu!r} is not a valid plateifu")
        return table, recipe


def _other_split(path: Path) -> str:
    """Say what to do instead of reading a file of a split that does not exist."""
    name, splits = path.parent.name, path.parent.parent
    root = splits.parent
    if splits.name != "splits":
        return "Copy the run again, or retrain."
    if not root.is_dir() or not any(root.iterdir()):
        return f"The data folder {root} is missing or empty: check --data-dir and $MANGA_DATA_DIR."
    there = [p.parent.name for p in utils.files_in(splits, f"*/{path.name}")]
    near = difflib.get_close_matches(name, there, 1)
    meant = f"; did you mean {near[0]}?" if near else "."
    found = f"There is {', '.join(there)}{meant} Else create" if there else "Create"
    return f"{found} it with create_data_splits.py --label-task TASK --split-dir {name}."


def split_digest(parts: Mapping[str, pd.DataFrame]) -> str:
    """Digest of the content of a split's parts."""
    return digest_of([table.to_csv(index=False) for table in parts.values()])


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
            "are in two parts of the split. Rebuild it with create_data_splits.py --overwrite."
        )


# Statistics

STATS_FIELDS = ("wave", "mean", "std", "components", "explained_variance", "explained_ratio")


def write_stats(path: Path, stats: Stats) -> None:
    """Write the statistics of a training split, whole or not at all."""
    n_bytes = 2 * stats.components.nbytes  # and a few spectra
    with new_h5(path, STATS_SCHEMA, STATS_VERSION, stats.recipe, stats.attrs, n_bytes) as f:
        for name in STATS_FIELDS:
            f[name] = getattr(stats, name)


def read_stats(path: Path) -> Stats:
    """Read the statistics of a training split."""
    maker = "calc_data_stats.py --overwrite"
    with open_h5(path, STATS_SCHEMA, STATS_VERSION, maker) as (f, recipe, attrs):
        arrays = {name: read_dataset(f, name) for name in STATS_FIELDS}
        return Stats(**arrays, recipe=recipe, attrs=attrs)


def stats_inputs(cubes: Mapping[str, str]) -> dict[str, str]:
    """Name the inputs of statistics: the galaxies, and their cubes' digests by plateifu."""
    digests = digest_of(sorted(cubes)), digest_of(dict(cubes))
    return {"list of training galaxies": digests[0], "set of cubes": digests[1]}


def read_split_stats(root: Path, split_dir: str) -> Stats:
    """Read the statistics of a split, of its training galaxies and of their cubes as they are now.

    Cubes that are gone cannot be compared.
    """
    path = utils.stats_path(root, split_dir)
    stats = read_stats(path)
    table, _ = _read_part(utils.split_path(root, split_dir, "train"))
    plateifus = sorted(table["plateifu"].unique())
    now = {**dict.fromkeys(plateifus, ""), **cube_digests(root, plateifus)}
    inputs = stats_inputs(now)
    if not all(now.values()):
        inputs["set of cubes"] = stats.recipe.inputs.get("set of cubes", "")
    today = Recipe(stats.recipe.product, STATS_VERSION, stats.recipe.options, inputs)
    today.require(
        stats.recipe, path, f"Re-run calc_data_stats.py --split-dir {split_dir} --overwrite"
    )
    return stats
