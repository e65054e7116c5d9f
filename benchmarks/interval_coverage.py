"""Whether the intervals of a run hold as many labels as they say: overall, in bins, by galaxy.

The galaxies that the run did not learn from (validation and test part) are divided at random into
two halves, again and again: one calibrates, the other is counted. One division alone scatters by
several per cent, because galaxies are few and their spaxels alike.

Reads   a run folder that learned metallicities, and its data folder.
Writes  results/intervals/coverage.json; prints the table.

    python benchmarks/interval_coverage.py --run-dir runs/a
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import utils
from utils import DataError

import numpy as np
import pandas as pd

import data_io
import eval_fns
import intervals
import run_folder


@dataclass(frozen=True)
class Config:
    """Count the labels that a run's intervals hold."""

    run_dir: Path
    """Folder of a training run that learned metallicities."""
    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else the run's, else ./data/manga."""
    divisions: int = 100
    """Random divisions of the galaxies into halves."""
    seed: int = 0
    """Random seed of the divisions."""
    results: Path = measuring.ROOT / "results" / "intervals"
    """Folder of coverage.json."""
    debug: bool = False
    """Show the traceback of an error."""


def held_out(config: Config) -> pd.DataFrame:
    """Predictions for the galaxies not learned from, with S/N and radius of each spaxel.

    Returns
    -------
    DataFrame, one row per spaxel
        As of `eval_fns.predictions_table`; snr (median of flux / error), radius (of the spaxel from
        the middle of the field, spaxels), ratio (|error| / scale).
    """
    root = run_folder.run_data_dir(config.run_dir, config.data_dir)
    parts = [eval_fns.evaluate_split(config.run_dir, part, root) for part in ("val", "test")]
    frame = pd.concat([part.predictions for part in parts], ignore_index=True)
    if "logoh" not in frame:
        raise DataError(f"{config.run_dir}: a run of classes. Expected one of metallicities.")
    level = str(intervals.LEVEL)
    calibration = run_folder.ModelCard.read(config.run_dir).calibration
    half = (frame[f"upper_{level}"] - frame[f"lower_{level}"]) / 2
    frame["ratio"] = (frame["logoh"] - frame["value"]).abs() / half * calibration.quantiles[level]
    for plateifu, rows in frame.groupby("plateifu").groups.items():
        cube = data_io.read_cube(utils.cube_path(root, str(plateifu)))
        assert cube.ivar is not None
        y, x = frame.loc[rows, ["y", "x"]].to_numpy().T
        flux, ivar = cube.flux[y, x], cube.ivar[y, x]
        frame.loc[rows, "snr"] = np.nanmedian(flux * np.sqrt(ivar), axis=1)
        middle = (np.array(cube.flux.shape[:2]) - 1) / 2
        frame.loc[rows, "radius"] = np.hypot(y - middle[0], x - middle[1])
    return frame


def thirds(values: pd.Series) -> pd.Series:
    """Find the third of the values that each is in, from 0."""
    return pd.qcut(values, 3, labels=False)


def coverage(
    frame: pd.DataFrame, divisions: int, seed: int, level: float = intervals.LEVEL
) -> list[dict[str, Any]]:
    """Mean and scatter, over divisions of the galaxies, of the fraction of labels held.

    Parameters
    ----------
    frame : DataFrame
        As of `held_out`.
    divisions, seed : int
    level : float

    Returns
    -------
    list of dict
        name, bin, spaxels, mean, std (over divisions); of single galaxies mean and the 5 and 95 %
        quantiles over galaxies and divisions.
    """
    of: dict[str, Callable[[pd.DataFrame], Any]] = {
        "all": lambda f: np.zeros(len(f), int),
        "S/N, third": lambda f: thirds(f["snr"]),
        "radius, third": lambda f: thirds(f["radius"]),
        "class": lambda f: f["true"],
    }
    bins = {name: np.asarray(make(frame)) for name, make in of.items()}
    galaxy = pd.factorize(frame["plateifu"])[0]
    n, ratio = galaxy.max() + 1, frame["ratio"].to_numpy()
    rng, found, single = np.random.default_rng(seed), dict[tuple[str, int], list[float]](), []
    for _ in range(divisions):
        calibrates = np.isin(galaxy, rng.permutation(n)[: n // 2])
        limit = np.quantile(ratio[calibrates], level, method="higher")
        held, rest = ratio <= limit, ~calibrates
        for name, bin_of in bins.items():
            for k in np.unique(bin_of):
                found.setdefault((name, int(k)), []).append(held[rest & (bin_of == k)].mean())
        counts = np.bincount(galaxy[rest], minlength=n)
        single.append(
            (np.bincount(galaxy[rest], held[rest], n) / np.maximum(counts, 1))[counts > 0]
        )
    rows: list[dict[str, Any]] = [
        {
            "name": name, "bin": k, "spaxels": int((bins[name] == k).sum()),
            "mean": float(np.nanmean(values)), "std": float(np.nanstd(values)),
        }
        for (name, k), values in found.items()
    ]  # fmt: skip
    each = np.concatenate(single)
    low, high = np.quantile(each, (0.05, 0.95))
    galaxies = {"name": "single galaxies", "bin": 0, "spaxels": len(frame)}
    return [*rows, {**galaxies, "mean": float(each.mean()), "low": float(low), "high": float(high)}]


def main(config: Config) -> int:
    """Count, print and write."""
    frame = held_out(config)
    rows = coverage(frame, config.divisions, config.seed)
    galaxies = frame["plateifu"].nunique()
    print(f"{intervals.LEVEL:.0%} intervals, {galaxies} galaxies, {config.divisions} divisions")
    for row in rows:
        spread = (
            f"+- {row['std']:.3f}" if "std" in row else f"{row['low']:.2f} to {row['high']:.2f}"
        )
        name = f"{row['name']} {row['bin']}" if row["name"] != "all" else "all"
        print(f"  {name:<20}{row['spaxels']:>8} spaxels   {row['mean']:.3f} {spread}")
    measuring.write_rows(config.results / "coverage.json", rows, config=utils.config_dict(config))
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
