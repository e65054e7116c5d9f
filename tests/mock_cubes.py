"""Small processed data folders for the tests of the model side, written in milliseconds.

Spectra are a smooth continuum with lines whose heights follow a class pattern, so that a network
can learn the labels. Nothing here claims to be a galaxy: mock_manga.py makes those.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import utils
from utils import LABEL_TASKS

import numpy as np
import pandas as pd

import data_io
import hsi_proc_fns
from labels import LABEL_NONE, label_classes
from recipe import Recipe

N_BAND = 40
PLATEIFUS = tuple(f"8000-{i}" for i in range(101, 109))


def wave_grid(n_band: int = N_BAND) -> np.ndarray:
    edges = np.geomspace(5000, 8000, n_band + 1)
    return np.sqrt(edges[:-1] * edges[1:])


def label_values(task: str, ny: int, nx: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth label map with holes."""
    y, x = np.indices((ny, nx))
    radius = np.hypot(y - ny / 2, x - nx / 2) / ny
    if task == "BPT":
        labels = np.digitize(radius + rng.normal(0, 0.03), [0.2, 0.4]).astype(np.int16)
        labels[rng.random((ny, nx)) < 0.1] = LABEL_NONE
        return labels
    labels = (8.62 - 0.4 * radius + rng.normal(0, 0.03)).astype(np.float32)
    labels[rng.random((ny, nx)) < 0.1] = np.nan
    return labels


def make_cube(
    oxygen: np.ndarray, bpt: np.ndarray, rng: np.random.Generator, n_band: int = N_BAND
) -> np.ndarray:
    """Flux (y, x, band) with one line for each label, noise, a masked block and a gap."""
    ny, nx = bpt.shape
    wave = wave_grid(n_band)
    flux = np.ones((ny, nx, n_band)) * rng.uniform(0.5, 2, (ny, nx, 1)) * (wave / 6500) ** -0.5
    strength = np.nan_to_num(oxygen, nan=8.4) - 8.2
    flux[..., n_band // 3] *= 1 + 8 * strength
    flux[..., 2 * n_band // 3] *= 1 + np.clip(bpt, 0, None)
    flux += rng.normal(0, 0.02, flux.shape)
    flux[:2, :3] = np.nan  # outside the field
    flux[3, 4, 5:8] = np.nan  # a gap that is bridged
    flux[4, 4, : n_band // 2] = np.nan  # too little measured: unusable, though labelled
    return flux.astype(np.float32)


def parted(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split a table: its first half for training, a quarter each for the other parts."""
    n = len(table)
    train, val, test = table[: n // 2], table[n // 2 : 3 * n // 4], table[3 * n // 4 :]
    return {"train": train, "val": val, "test": test}


def cube_recipe(n_band: int = N_BAND, source: str = "", **options: Any) -> Recipe:
    """Recipe of a cube of `make_data_dir`; `source` stands for the content of its LOGCUBE."""
    grid = {"wave_min": 5000.0, "wave_max": 8000.0, "n_band": n_band, "deredden": True}
    options = {**grid, "remove_gas_velocity": True, "redshift": None, **options}
    return Recipe("cube", data_io.CUBE_VERSION, options, {"LOGCUBE": source})


def rebuild_cube(root: Path, plateifu: str, source: str | None = None, **options: Any) -> Path:
    """Write a cube again as if made with other options, or from another LOGCUBE."""
    path = utils.cube_path(root, plateifu)
    cube = data_io.read_cube(path)
    inputs = cube.recipe.inputs if source is None else {"LOGCUBE": source}
    recipe = replace(cube.recipe, options={**cube.recipe.options, **options}, inputs=inputs)
    data_io.write_cube(path, replace(cube, recipe=recipe))
    return path


def write_labels(root: Path, task: str, plateifu: str, values: np.ndarray, **options: Any) -> None:
    """Write a label map with provenance."""
    error = np.where(np.isfinite(values), 0.03, np.nan)
    options = {"label_task": task, "diagnostic": "O3N2-M13", "min_snr": 3.0, **options}
    recipe = Recipe("labels", data_io.LABEL_VERSION, options, {"MAPS": plateifu})
    data_io.write_labels(utils.label_path(root, task, plateifu), values, error, recipe, {})


def relabel(
    root: Path, plateifus: Sequence[str], shift: float = 0, task: str = "logOH", **options: Any
) -> None:
    """Write label maps again, shifted (NaN: no labels left) or as if made with other options."""
    for plateifu in plateifus:
        labels = data_io.read_labels(utils.label_path(root, task, plateifu))
        write_labels(root, task, plateifu, labels + np.float32(shift), **options)


def later(function: Callable, *words: Any, **options: Any) -> Callable[[Path], Any]:
    """Function of a data folder that calls another one with these arguments, too."""
    return lambda root: function(root, *words, **options)


def write_statistics(
    root: Path, split: str = "hard", n_components: int = 6, min_snr: float = 0
) -> None:
    """Compute the statistics of a split from the cubes of now."""
    import calc_data_stats

    train = data_io.read_split(utils.split_path(root, split))[0]["train"]
    galaxies = sorted(train["plateifu"].unique())
    stats = calc_data_stats.split_stats(root, split, galaxies, n_components, min_snr)
    data_io.write_stats(utils.stats_path(root, split), stats)


rebuild_statistics = partial(write_statistics, min_snr=1)
"""Compute the statistics of the hard split again, with another option."""


def write_split(root: Path, name: str, parts: dict[str, pd.DataFrame], seed: int = 0) -> None:
    """Write a split whose name begins with its kind."""
    recipe = Recipe("split", data_io.SPLIT_VERSION, {"kind": name.split("_")[0], "seed": seed})
    data_io.write_split(utils.split_path(root, name), parts, recipe)


def make_data_dir(
    root: Path,
    plateifus: tuple[str, ...] = PLATEIFUS,
    shape: tuple[int, int] = (11, 12),
    seed: int = 0,
    n_band: int = N_BAND,
    n_components: int = 6,
) -> Path:
    """Write cubes, labels of both tasks, a hard and an easy split with statistics."""
    rng = np.random.default_rng(seed)
    for i, plateifu in enumerate(plateifus):
        labels = {t: label_values(t, *shape, rng) for t in LABEL_TASKS}
        labels["logOH"][4, 4], labels["BPT"][4, 4] = 8.5, 1
        flux = make_cube(labels["logOH"], labels["BPT"], rng, n_band)
        attrs = {"plateifu": plateifu, "mangaid": f"1-{i}", "redshift": 0.03}
        recipe = cube_recipe(n_band, f"{plateifu} {seed}")
        ivar = np.isfinite(flux).astype(np.float32) / 0.02**2
        cube = data_io.Cube(flux, wave_grid(n_band), recipe, ivar, attrs=attrs)
        data_io.write_cube(utils.cube_path(root, plateifu), cube)
        for task, values in labels.items():
            write_labels(root, task, plateifu, values)
    mangaids = [f"1-{i}" for i in range(len(plateifus))]
    table = pd.DataFrame({"plateifu": plateifus, "mangaid": mangaids})
    y, x = np.indices(shape).reshape(2, -1)
    spaxels = table.merge(pd.DataFrame({"y": y, "x": x}), how="cross")
    splits = {"hard": parted(table), "easy": parted(spaxels.sample(frac=1, random_state=seed))}
    for split, parts in splits.items():
        write_split(root, split, parts, seed)
        write_statistics(root, split, n_components)
    return root


def write_patch_files(root: Path, task: str, norm: str, size: int, split: str = "hard") -> None:
    """Write patch files of all galaxies, each patch cut by hand: an oracle, not a tool."""
    stats = data_io.read_stats(utils.stats_path(root, split))
    for path in sorted((root / "processed" / "cubes").glob("*/*.h5")):
        cube = data_io.read_cube(path, with_errors=False)
        labels = data_io.read_labels(utils.label_path(root, task, path.stem))
        usable = hsi_proc_fns.usable_spaxels(cube.flux)
        normalised = hsi_proc_fns.normalise(cube.flux, norm, stats, usable)
        has_label = label_classes(labels, task) != LABEL_NONE
        patches, rows = [], []
        margin = (size, size), (size, size), (0, 0)
        padded, first = np.pad(normalised, margin), size - size // 2
        for y, x in np.argwhere(usable & has_label):
            rows.append((len(patches), y, x, labels[y, x]))
            corner = y + first, x + first
            patches.append(padded[corner[0] : corner[0] + size, corner[1] : corner[1] + size])
        made = data_io.read_label_meta(utils.label_path(root, task, path.stem))["recipe"]
        used = stats if norm == "PCA" else None
        recipe = data_io.patch_recipe(cube.recipe, labels, made, norm, size, used)
        index = pd.DataFrame(rows, columns=["row", "y", "x", "label"])
        out = utils.patch_path(root, task, norm, path.stem)
        data_io.write_patches(out, np.stack(patches), index, recipe, {})
