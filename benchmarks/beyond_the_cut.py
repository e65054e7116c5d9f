"""Metallicity beyond the cut: how much of each galaxy the network maps, and line ratios do not.

Line ratios give a metallicity where each of their lines exceeds three times its error; the network
gives one everywhere, with an interval. Both are judged against the truth of simulated galaxies that
the network did not learn from, in all spaxels whose gas is star-forming in truth: which are within
0.1 dex of it, and which fraction of the values that are given. At equal reliability, the network
gives only values whose interval is narrow enough; how narrow is read off the galaxies that
calibrate the intervals.

Reads   nothing: simulates and processes the survey of benchmark_hard.py in --work-dir, or
        continues there.
Writes  results/beyond-the-cut/table.json, and a picture of one galaxy for each depth.

Line ratios are those of MAPS, whose noise grows like that of the cubes, and include Hbeta: what the
labels would be at that depth.

    python benchmarks/beyond_the_cut.py --work-dir work
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import utils

import benchmark_hard
import numpy as np
import torch
from benchmark_hard import Survey
from matplotlib.figure import Figure

import archive_files
import inference
import vis_fns
from labels import BPT_LINES, SF, LineMaps, metallicity
from mock.truth import read_truth, truth_path
from sky_maps import Sky, plot_value_map
from vis_fns import CLOSE_DEX

log = logging.getLogger(__name__)

N_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Config:
    """Metallicity beyond the cut: the network beside line ratios, against the truth."""

    work_dir: Path
    """Folder of the survey, as of benchmark_hard.py."""
    n_galaxies: int = 200
    """Simulated galaxies."""
    noise: tuple[int, ...] = (1, 5)
    """Factors by which the signal-to-noise ratio is divided: 1 and 5 are depths 1 and 1/25."""
    wave_min: float = 5000.0
    """Blue end of the rest-frame grid, Angstrom."""
    seed: int = 0
    """Random seed of the split, the network and the noise of MAPS."""
    epochs: int | None = None
    """Epochs of the network; default as training."""
    jobs: int = 2
    """Processes that simulate and process galaxies."""
    results: Path = measuring.ROOT / "results" / "beyond-the-cut"
    """Folder of table.json and the pictures."""
    debug: bool = False
    """Show the traceback of an error."""


def line_ratio_maps(root: Path, survey: Survey, factor: int, seed: int) -> dict[str, np.ndarray]:
    """12+log(O/H) from the line ratios of MAPS, (N,) dex by name; NaN where a line is too faint."""
    rng = np.random.default_rng([seed, factor])
    found = {name: np.full(survey.galaxy.size, np.nan) for name in ("O3N2", "N2")}
    for number, plateifu in enumerate(survey.galaxies["plateifu"]):
        maps = archive_files.read_line_maps(utils.find_raw(root, plateifu, "MAPS"), BPT_LINES)[0]
        noisy = {}
        for name, ivar in maps.ivar.items():
            added = np.divide(factor**2 - 1, ivar, out=np.zeros(ivar.shape), where=ivar > 0)
            noise = benchmark_hard.sky_noise(rng, 1, ivar.shape[0])[0]
            noisy[name] = maps.flux[name] + noise * np.sqrt(added)
        shallow = LineMaps(noisy, {k: v / factor**2 for k, v in maps.ivar.items()}, maps.bad)
        rows = survey.galaxy == number
        y, x = survey.y[rows], survey.x[rows]
        for name, values in found.items():
            values[rows] = metallicity(shallow, f"{name}-M13", star_forming_only=False)[0][y, x]
    return found


def true_classes(root: Path, survey: Survey) -> np.ndarray:
    """BPT class in truth, (N,)."""
    classes = np.zeros(survey.galaxy.size, int)
    for number, plateifu in enumerate(survey.galaxies["plateifu"]):
        rows = survey.galaxy == number
        maps = read_truth(truth_path(root, plateifu))[0]
        classes[rows] = maps["bpt"][survey.y[rows], survey.x[rows]]
    return classes


def network_maps(survey: Survey, run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """12+log(O/H) and half-width of its calibrated interval, (N,) dex, for held-out galaxies."""
    model = inference.load_model(run_dir)
    value, width = np.full((2, survey.galaxy.size), np.nan)
    for galaxy in np.unique(survey.galaxy[survey.part != "train"]):
        rows = survey.galaxy == galaxy
        path = utils.cube_path(survey.root, survey.galaxies["plateifu"][galaxy])
        found, at = inference.predict_cube(model, path), (survey.y[rows], survey.x[rows])
        assert found.logoh is not None
        assert found.lower is not None
        assert found.upper is not None
        value[rows] = found.logoh[at]
        width[rows] = (found.upper[at] - found.lower[at]) / 2
    return value, width


def limit_of_equal_reliability(error: np.ndarray, width: np.ndarray, reliability: float) -> float:
    """Largest half-width up to which the values with narrower intervals are that reliable.

    Parameters
    ----------
    error, width : (n,) dex
    reliability : float
        Fraction of the given values that are within CLOSE_DEX of the truth.
    """
    order = np.argsort(width)
    reached = np.cumsum(np.abs(error[order]) < CLOSE_DEX) / np.arange(1, order.size + 1)
    enough = np.flatnonzero(reached >= reliability)
    return float(width[order[enough[-1]]]) if enough.size else 0.0


def gain_of(right: np.ndarray, other: np.ndarray, galaxy: np.ndarray) -> tuple[float, list[float]]:
    """Compare two methods' numbers of right values: ratio, 95 % interval over galaxies."""
    galaxy = np.unique(galaxy, return_inverse=True)[1]
    sums = np.array([np.bincount(galaxy, part) for part in (right, other)])
    drawn = np.random.default_rng(0).integers(sums.shape[1], size=(N_BOOTSTRAP, sums.shape[1]))
    a, b = sums[:, drawn].sum(2)
    ends = np.quantile(a / np.maximum(b, 1), (0.025, 0.975))
    return float(sums[0].sum() / max(sums[1].sum(), 1)), ends.tolist()


def compare(
    survey: Survey, given: dict[str, np.ndarray], star_forming: np.ndarray
) -> list[dict[str, Any]]:
    """Count the values of each method that are right, in star-forming spaxels of test galaxies.

    Parameters
    ----------
    survey : Survey
    given : dict of method -> (N,) dex
        NaN where it gives none; the first is what the others are compared with.
    star_forming : (N,) bool
        In truth.
    """
    rows = np.flatnonzero((survey.part == "test") & star_forming & np.isfinite(survey.truth))
    errors = {name: np.abs(values[rows] - survey.truth[rows]) for name, values in given.items()}
    first = next(iter(errors.values())) < CLOSE_DEX
    table = []
    for name, error in errors.items():
        has_value, right = np.isfinite(error), error < CLOSE_DEX
        gain, ends = gain_of(right, first, survey.galaxy[rows])
        table.append(
            {
                "name": name, "spaxels": rows.size, "galaxies": np.unique(survey.galaxy[rows]).size,
                "given": float(has_value.mean()), "right": float(right.mean()),
                "reliability": float(right[has_value].mean()), "gain": gain, "gain_95": ends,
                "mae": float(error[has_value].mean()),
            }
        )  # fmt: skip
    return table


def picture(
    survey: Survey, galaxy: int, given: dict[str, np.ndarray], width: np.ndarray, title: str
) -> Figure:
    """Make the picture of a galaxy: truth, line ratios, network and half-width of its intervals."""
    rows = np.flatnonzero(survey.galaxy == galaxy)
    size = int(max(survey.y.max(), survey.x.max())) + 1
    usable = np.zeros((size, size), bool)
    usable[survey.y[rows], survey.x[rows]] = True

    def image(values: np.ndarray) -> np.ndarray:
        out = np.full((size, size), np.nan)
        out[survey.y[rows], survey.x[rows]] = values[rows]
        return out

    limits = tuple(np.nanquantile(survey.truth[rows], (0.02, 0.98)))
    sky = Sky(usable, usable)
    figure = Figure(figsize=(19, 4.4), layout="constrained")
    axes = figure.subplots(1, 4)
    figure.suptitle(title)
    for ax, (name, values) in zip(axes, {"truth": survey.truth, **given}.items(), strict=False):
        plot_value_map(ax, image(values), sky, "12+log(O/H) (dex)", name, limits)
    title = "the network's 90 % interval"
    plot_value_map(axes[3], image(width), sky, "half-width (dex)", title)
    return figure


def main(config: Config) -> int:
    """Train, compare, print, draw and write."""
    torch.set_num_threads(1)
    hard = benchmark_hard.Config(config.work_dir, n_galaxies=config.n_galaxies, jobs=config.jobs)
    root = benchmark_hard.make_cubes(hard, config.wave_min)
    table = []
    for factor in config.noise:
        survey = benchmark_hard.read_survey(benchmark_hard.make_shallow(root, factor))
        survey.split(config.seed)
        star_forming = true_classes(root, survey) == SF
        run_dir = benchmark_hard.train_network(
            survey, survey.train_galaxies(0), config.seed, config.work_dir, config.epochs
        )
        value, width = network_maps(survey, run_dir)
        ratios = line_ratio_maps(root, survey, factor, config.seed)
        known = (survey.part == "val") & star_forming & np.isfinite(survey.truth)
        error = np.abs(ratios["O3N2"] - survey.truth)[known]
        reliability = float((error[np.isfinite(error)] < CLOSE_DEX).mean())
        limit = limit_of_equal_reliability((value - survey.truth)[known], width[known], reliability)
        equal = f"network, half-width to {limit:.3f} dex"
        given = {
            "O3N2, every line S/N > 3": ratios["O3N2"],
            "N2, both lines S/N > 3": ratios["N2"],
            equal: np.where(width <= limit, value, np.nan),
            "network, everywhere": value,
        }
        rows = compare(survey, given, star_forming)
        depth = f"1/{factor**2}" if factor > 1 else "1"
        print(f"\ndepth {depth}: {rows[0]['galaxies']} galaxies, {rows[0]['spaxels']} spaxels")
        print(f"{'':<34}{'given':>7}{'right':>7}{'reliable':>10}{'gain':>7}{'MAE':>8}")
        for row in rows:
            low, high = row["gain_95"]
            print(
                f"{row['name']:<34}{row['given']:>7.3f}{row['right']:>7.3f}"
                f"{row['reliability']:>10.4f}{row['gain']:>7.2f}{row['mae']:>8.4f}"
                f"  ({low:.2f} to {high:.2f})"
            )
        table += [{"depth": 1 / factor**2, "limit": limit, **row} for row in rows]
        shown = survey.galaxy[(survey.part == "test") & star_forming]
        galaxy = int(np.bincount(shown).argmax())
        maps = {name: given[name] for name in (next(iter(given)), equal)}
        name = survey.galaxies["plateifu"][galaxy]
        figure = picture(survey, galaxy, maps, width, f"{name}, depth {depth}")
        vis_fns.save(figure, config.results / f"depth_{factor**2}.png")
    measuring.write_rows(config.results / "table.json", table, config=utils.config_dict(config))
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
