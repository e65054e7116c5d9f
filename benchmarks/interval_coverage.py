"""Whether the intervals of a run hold as many labels as they say: overall, in bins, by galaxy.

The galaxies that the run did not learn from (validation and test part) are divided at random into
two halves, again and again: one calibrates, the other is counted. One division alone scatters by
several per cent, because galaxies are few and their spaxels alike.

Reads   a run folder that learned metallicities, and its data folder.
Writes  results/intervals/coverage.json; prints the table. Evaluates the run's parts again, and
        so writes <run_dir>/val and <run_dir>/test.

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
    bins: tuple[int, ...] = (1, intervals.BINS)
    """Numbers of bins of predicted values, each of which has its own factor."""
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
        the middle of the field, spaxels), scale (that the network gives, dex).
    """
    root = run_folder.run_data_dir(config.run_dir, config.data_dir)
    card = run_folder.ModelCard.read(config.run_dir)
    if card.spec.label_task != "logOH" or not card.calibration.quantiles:
        raise DataError(
            f"{config.run_dir}: has no intervals. Expected a run of metallicities on a split by "
            "galaxies."
        )
    parts = [eval_fns.evaluate_split(config.run_dir, part, root) for part in ("val", "test")]
    frame = pd.concat([part.predictions for part in parts], ignore_index=True)
    level = intervals.LEVEL
    half = (frame[f"upper_{level}"] - frame[f"lower_{level}"]) / 2
    frame["scale"] = half / card.calibration.factor(frame["logoh"].to_numpy(), level)
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


def coverage(frame: pd.DataFrame, divisions: int, seed: int, bins: int) -> list[dict[str, Any]]:
    """Mean and scatter, over divisions of the galaxies, of the fraction of labels held.

    Parameters
    ----------
    frame : DataFrame
        As of `held_out`.
    divisions, seed : int
    bins : int
        As of `intervals.calibrate`.

    Returns
    -------
    list of dict
        name, bin, spaxels, mean, std (over divisions); of single galaxies mean and the 5 and 95 %
        quantiles over galaxies and divisions. The last: mean half-width of the intervals, dex.
    """
    of: dict[str, Callable[[pd.DataFrame], Any]] = {
        "all": lambda f: np.zeros(len(f), int),
        "S/N, third": lambda f: thirds(f["snr"]),
        "radius, third": lambda f: thirds(f["radius"]),
        "class": lambda f: f["true"],
    }
    groups = {name: np.asarray(make(frame)) for name, make in of.items()}
    galaxy = pd.factorize(frame["mangaid"])[0]
    value, label, scale = (frame[name].to_numpy() for name in ("logoh", "value", "scale"))
    n, rng, found = galaxy.max() + 1, np.random.default_rng(seed), dict[tuple[str, int], list]()
    single, widths = [], []
    for _ in range(divisions):
        calibrates = np.isin(galaxy, rng.permutation(n)[: n // 2])
        made = intervals.calibrate(value, label, scale, None, galaxy, calibrates, bins)
        lower, upper = made.interval(value, scale)
        held, rest = (lower <= label) & (label <= upper), ~calibrates
        for name, group in groups.items():
            for k in np.unique(group):
                found.setdefault((name, int(k)), []).append(held[rest & (group == k)].mean())
        counts = np.bincount(galaxy[rest], minlength=n)
        single.append(
            (np.bincount(galaxy[rest], held[rest], n) / np.maximum(counts, 1))[counts > 0]
        )
        widths.append(float((upper - lower)[rest].mean() / 2))
    rows: list[dict[str, Any]] = [
        {
            "name": name, "bin": k, "spaxels": int((groups[name] == k).sum()),
            "mean": float(np.nanmean(values)), "std": float(np.nanstd(values)),
        }
        for (name, k), values in found.items()
    ]  # fmt: skip
    each = np.concatenate(single)
    low, high = np.quantile(each, (0.05, 0.95))
    common = {"bin": 0, "spaxels": len(frame)}
    rows.append(
        {"name": "single galaxies", **common, "mean": float(each.mean()), "low": low, "high": high}
    )
    return [*rows, {"name": "half-width", **common, "mean": np.mean(widths), "std": np.std(widths)}]


def main(config: Config) -> int:
    """Count, print and write."""
    frame = held_out(config)
    tables = {bins: coverage(frame, config.divisions, config.seed, bins) for bins in config.bins}
    galaxies = frame["mangaid"].nunique()
    print(f"{intervals.LEVEL:.0%} intervals, {galaxies} galaxies, {config.divisions} divisions")
    print(f"{'bins of predicted values':<36}" + "".join(f"{bins:<18}" for bins in config.bins))
    for rows in zip(*tables.values(), strict=True):
        name = f"{rows[0]['name']} {rows[0]['bin']}"
        cells = (
            f"{row['mean']:.3f} "
            + (f"+- {row['std']:.3f}" if "std" in row else f"{row['low']:.2f}-{row['high']:.2f}")
            for row in rows
        )
        line = "".join(f"{cell:<18}" for cell in cells)
        print(f"  {name:<20}{rows[0]['spaxels']:>6} spaxels {line}")
    rows = [{"bins": bins, **row} for bins, table in tables.items() for row in table]
    measuring.write_rows(config.results / "coverage.json", rows, config=utils.config_dict(config))
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
