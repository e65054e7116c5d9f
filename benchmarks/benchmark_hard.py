"""Metallicity on galaxies never seen: the matched-filter network beside every simple method.

Reads   nothing: it simulates a survey, processes it with the pipeline's commands and splits it by
        galaxies. Finished steps and finished rows are skipped, so the same command continues.
Writes  --work-dir: survey, runs, one JSON per row; results/benchmark-hard/table.json.

Depth 1/k^2 is a survey whose signal-to-noise ratio is divided by k: noise is added to the H5 cubes,
correlated between neighbouring spaxels as the survey's own, and the labels stay those of the deep
data. Every method that learns sees the same galaxies; the network is trained as users train it
(run_SSFTT_training.py). Errors are given against the label and against the truth of the simulation.

    python benchmarks/benchmark_hard.py --work-dir work                     # depths 1 and 1/25
    python benchmarks/benchmark_hard.py --work-dir work --seeds 0 1 2 --noise 1 2 5 \
        --wave-min 5000 4800 --n-train 0 18                                  # the long form
"""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import measuring
import utils
from utils import DataError

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

import data_io
import eval_fns
import hsi_proc_fns
import run_SSFTT_training
from create_data_splits import labelled_galaxies, split_galaxies
from HSI_SSFTT import get_SSFTT_model
from labels import LOGOH_EDGES
from line_fits import RATIO_LINES, fit_lines, log_ratios
from matched_filter_net import neighbours, prepare_spectra
from mock.physics import NOISE_KERNEL_SPAXELS, blur_matrix
from mock.truth import read_truth, truth_path

log = logging.getLogger(__name__)

FRACTIONS = (0.58, 0.12, 0.30)
"""Training, calibration (reserved, not used for scores) and test galaxies."""
MIN_LABELLED = 20
"""Labelled spaxels of a galaxy that counts."""
WINDOW = 7
COMPONENTS = 30
N_BOOTSTRAP = 1000
ROWS_VERSION = 2
"""Of the finished rows: to be raised when a method, a score or the simulation changes."""


@dataclass(frozen=True)
class Config:
    """Metallicity on galaxies never seen: the matched-filter network beside simple methods."""

    work_dir: Path
    """Folder for the survey, runs and finished rows."""
    n_galaxies: int = 200
    """Simulated galaxies; about a sixth have too few labels."""
    noise: tuple[int, ...] = (1, 5)
    """Factors by which the signal-to-noise ratio is divided: 1, 2, 5 are depths 1, 1/4, 1/25."""
    wave_min: tuple[float, ...] = (5000.0,)
    """Blue ends of the rest-frame grid, Angstrom; 4800 includes Hbeta."""
    n_train: tuple[int, ...] = (0,)
    """Numbers of training galaxies; 0: all."""
    seeds: tuple[int, ...] = (0,)
    """Each decides which galaxies are held out, and everything random in the methods."""
    rows: tuple[str, ...] = ()
    """Rows to compute; default all."""
    ssftt_epochs: int = 15
    """Epochs of SSFTT."""
    epochs: int | None = None
    """Epochs of the network; default as training."""
    jobs: int = 2
    """Processes that simulate and process galaxies."""
    results: Path = measuring.ROOT / "results" / "benchmark-hard"
    """Folder of table.json."""
    debug: bool = False
    """Show the traceback of an error."""


# Data


@dataclass
class Survey:
    """Usable spaxels of all galaxies with enough labels."""

    galaxy: np.ndarray
    y: np.ndarray
    x: np.ndarray
    label: np.ndarray
    truth: np.ndarray
    galaxies: pd.DataFrame
    near: np.ndarray
    """(N, P*P) rows of the neighbours, -1 where there is none."""
    wave: np.ndarray
    root: Path
    """Data folder."""
    lines: dict[str, np.ndarray]
    """(3, N) flux, variance and continuum of each fitted line."""
    colour: np.ndarray
    """(N, colour) continuum in broad bands: `Spectra.colour`."""
    normalised: np.ndarray
    """(N, band) float16, spectra divided by their mean absolute value, 0 in gaps."""
    part: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Part of the split of each spaxel; see `split`."""

    def split(self, seed: int) -> None:
        """Divide the galaxies into parts."""
        parts = split_galaxies(self.galaxies, FRACTIONS, seed)
        part_of = {p: part for part, table in parts.items() for p in table["plateifu"]}
        self.part = np.array([part_of[p] for p in self.galaxies["plateifu"]])[self.galaxy]

    def learned(self, galaxies: np.ndarray) -> np.ndarray:
        """Rows of labelled spaxels of some galaxies."""
        return np.flatnonzero(np.isin(self.galaxy, galaxies) & np.isfinite(self.label))

    def train_galaxies(self, n: int) -> np.ndarray:
        """Training galaxies; the first n of a fixed random order, or all (0)."""
        galaxies = np.unique(self.galaxy[self.part == "train"])
        return np.sort(np.random.default_rng(0).permutation(galaxies)[: n or None])

    @property
    def test(self) -> np.ndarray:
        """Rows of the test spaxels."""
        return np.flatnonzero((self.part == "test") & np.isfinite(self.label))


def make_cubes(config: Config, wave_min: float) -> Path:
    """Simulate and process the survey with the pipeline's commands; return its data folder."""
    raw = config.work_dir / "survey"
    root = config.work_dir / f"from{wave_min:.0f}"
    (root / "processed").mkdir(parents=True, exist_ok=True)
    jobs = ["--jobs", str(config.jobs)]
    run(raw, "mock_manga.py", "--n-galaxies", str(config.n_galaxies), "--bundles", "19", *jobs)
    for name in ("raw", "truth"):
        if not (root / name).exists():
            (root / name).symlink_to((raw / name).resolve())
    limits = ["--wave-min", str(wave_min), "--remove-gas-velocity", "--no-splits"]
    run(root, "cube_processing.py", *limits, *jobs)
    return root


def run(root: Path, script: str, *words: str) -> None:
    """Run one of the pipeline's commands."""
    command = [sys.executable, str(measuring.ROOT / script), "--data-dir", str(root), *words]
    subprocess.run(command, check=True)


def make_shallow(root: Path, factor: int) -> Path:
    """Make cubes whose errors are `factor` times as large; return their data folder."""
    if factor == 1:
        return root
    shallow = root.with_name(f"{root.name}-noise{factor}")
    (shallow / "processed" / "cubes").mkdir(parents=True, exist_ok=True)
    for name in ("truth", "processed/labels"):
        if not (shallow / name).exists():
            (shallow / name).symlink_to((root / name).resolve())
    for number, plateifu in enumerate(labelled_galaxies(root, "logOH", MIN_LABELLED)["plateifu"]):
        path = utils.cube_path(shallow, plateifu)
        deep = data_io.read_cube_head(utils.cube_path(root, plateifu)).recipe
        noise = {"noise": f"factor {factor}, seed {number}"}
        recipe = replace(deep, inputs={**deep.inputs, **noise})
        if not path.is_file() or data_io.read_cube_head(path).recipe != recipe:
            cube = data_io.read_cube(utils.cube_path(root, plateifu))
            assert cube.ivar is not None
            flux = add_noise(cube.flux, cube.ivar, factor, seed=number)
            ivar = cube.ivar / factor**2
            data_io.write_cube(path, replace(cube, flux=flux, ivar=ivar, recipe=recipe))
    return shallow


def sky_noise(rng: np.random.Generator, planes: int, size: int) -> np.ndarray:
    """Draw unit noise (plane, y, x), correlated between neighbouring spaxels as the survey's."""
    blur = blur_matrix(size, 0, NOISE_KERNEL_SPAXELS).astype(np.float32)
    blur /= np.sqrt((blur**2).sum(axis=1, keepdims=True))
    noise = rng.standard_normal((planes, size, size), dtype=np.float32)
    return blur @ (noise.reshape(-1, size) @ blur.T).reshape(noise.shape)


def add_noise(flux: np.ndarray, ivar: np.ndarray, factor: int, seed: int) -> np.ndarray:
    """Flux (y, x, band) whose errors are `factor` times as large.

    The added noise is correlated in the sky.
    """
    noise = sky_noise(np.random.default_rng([seed, factor]), flux.shape[2], max(flux.shape[:2]))
    noise = noise[:, : flux.shape[0], : flux.shape[1]].transpose(1, 2, 0)
    added = np.divide(factor**2 - 1, ivar, out=np.zeros_like(ivar), where=ivar > 0)
    return flux + noise * np.sqrt(added)


def read_survey(root: Path) -> Survey:
    """Read the usable spaxels of all labelled galaxies; fit lines for the simple methods."""
    galaxies = labelled_galaxies(root, "logOH", MIN_LABELLED)
    columns: list[list[np.ndarray]] = []
    usable_maps: list[np.ndarray] = []
    lines: list[dict[str, np.ndarray]] = []
    for number, plateifu in enumerate(galaxies["plateifu"]):
        cube = data_io.read_cube(utils.cube_path(root, plateifu))
        assert cube.ivar is not None
        usable = hsi_proc_fns.usable_spaxels(cube.flux)
        label = data_io.read_labels(utils.label_path(root, "logOH", plateifu))
        truth = read_truth(truth_path(root, plateifu))[0]["logoh_o3n2"]
        y, x = np.nonzero(usable)
        flux, ivar = cube.flux[usable], cube.ivar[usable]
        lines.append(fit_lines(flux, ivar, cube.wave))
        normalised = hsi_proc_fns.unit_mean(np.nan_to_num(flux)).astype(np.float16)
        colour = prepare_spectra(flux, ivar).colour.numpy()
        number_of = np.full(y.size, number)
        columns.append([number_of, y, x, label[usable], truth[usable], colour, normalised])
        usable_maps.append(usable)
    galaxy, y, x, label, truth, colour, normalised = (
        np.concatenate(c) for c in zip(*columns, strict=True)
    )
    inside = torch.from_numpy(np.stack(usable_maps))
    flat = neighbours(inside, WINDOW)[inside.flatten()].numpy()
    row_of = np.full(inside.numel() + 1, -1)
    row_of[np.flatnonzero(inside.numpy())] = np.arange(len(galaxy))
    fitted = {k: np.concatenate([part[k] for part in lines], 1) for k in lines[0]}
    return Survey(
        galaxy, y, x, label, truth, galaxies, row_of[flat], cube.wave, root, fitted, colour,
        normalised,
    )  # fmt: skip


# Features of the simple methods


def line_features(survey: Survey, kind: str) -> np.ndarray:
    """Features (N, k) from line fits.

    Parameters
    ----------
    survey : Survey
    kind : {"ratios", "all", "neighbours"}
        Classical ratios; ratios, signal-to-noise ratios and equivalent widths of all lines, and
        the continuum's colours; those and the ratios of the fluxes summed over 3, 5 and 7 spaxels.
    """
    lines = survey.lines
    if kind == "ratios":
        return log_ratios(lines, [n for n in RATIO_LINES if n in lines])
    names = [n for n in lines if n != "SII"]
    snr = np.stack([np.arcsinh(lines[n][0] / np.sqrt(lines[n][1])) for n in names], 1)
    width = np.stack([lines[n][0] / np.maximum(np.abs(lines[n][2]), 1e-3) for n in names], 1)
    parts = [log_ratios(lines, names), snr, np.arcsinh(width / 5), survey.colour]
    if kind == "neighbours":
        near = survey.near
        dy, dx = np.divmod(np.arange(WINDOW**2), WINDOW)
        ring = np.maximum(np.abs(dy - WINDOW // 2), np.abs(dx - WINDOW // 2))
        for reach in (1, 2, 3):
            seen = (ring <= reach) & (near >= 0)
            summed = {n: np.where(seen, lines[n][:, near], 0).sum(2) for n in names}
            parts.append(log_ratios(summed, names))
            parts.append(np.stack([np.arcsinh(s[0] / np.sqrt(s[1])) for s in summed.values()], 1))
    return np.concatenate(parts, 1)


# Rows: each returns 12+log(O/H) of the test spaxels


def ridge(degree: int) -> Any:
    """Ridge regression on standardised features and their products up to a degree."""
    terms = (StandardScaler(), PolynomialFeatures(degree), StandardScaler())
    return make_pipeline(*terms, RidgeCV(np.logspace(-2, 4, 13)))


def boosting(seed: int) -> Any:
    """Gradient boosting that minimises the absolute error."""
    return HistGradientBoostingRegressor(
        loss="absolute_error", max_iter=300, learning_rate=0.06, l2_regularization=1.0,
        min_samples_leaf=30, random_state=seed,
    )  # fmt: skip


def from_lines(kind: str, make: Callable[[int], Any]) -> Callable[..., np.ndarray]:
    """Row of a regression on line fits."""

    def row(survey: Survey, galaxies: np.ndarray, seed: int, config: Config) -> np.ndarray:
        rows = survey.learned(galaxies)
        features = line_features(survey, kind)
        return make(seed).fit(features[rows], survey.label[rows]).predict(features[survey.test])

    return row


def components(survey: Survey, galaxies: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whitened principal components of training and test spectra, and the training labels."""
    rows = survey.learned(galaxies)
    model = PCA(COMPONENTS, whiten=True, svd_solver="randomized", random_state=0)
    train, test = (survey.normalised[r].astype(np.float32) for r in (rows, survey.test))
    return model.fit_transform(train), model.transform(test), survey.label[rows]


def logistic_row(survey: Survey, galaxies: np.ndarray, seed: int, config: Config) -> np.ndarray:
    """Logistic regression of one spectrum; the mean of its classes' labels."""
    x, test, label = components(survey, galaxies)
    classes = np.digitize(label, LOGOH_EDGES[6])
    model = LogisticRegression(max_iter=300).fit(x, classes)
    return model.predict_proba(test) @ [label[classes == k].mean() for k in model.classes_]


def mlp_row(survey: Survey, galaxies: np.ndarray, seed: int, config: Config) -> np.ndarray:
    """Multilayer perceptron of one spectrum that regresses dex."""
    x, test, label = components(survey, galaxies)
    model = MLPRegressor(
        hidden_layer_sizes=(64,), alpha=1e-2, early_stopping=True, max_iter=200, random_state=seed
    )
    mean, std = label.mean(), label.std()
    return model.fit(x, (label - mean) / std).predict(test) * std + mean


def constant_row(survey: Survey, galaxies: np.ndarray, seed: int, config: Config) -> np.ndarray:
    """Median label of the training spaxels."""
    return np.full(survey.test.size, np.median(survey.label[survey.learned(galaxies)]))


def position_row(survey: Survey, galaxies: np.ndarray, seed: int, config: Config) -> np.ndarray:
    """Gradient boosting of the position in the field."""
    rows, x = survey.learned(galaxies), np.stack([survey.y, survey.x], 1)
    return boosting(seed).fit(x[rows], survey.label[rows]).predict(x[survey.test])


def ceiling_row(survey: Survey, galaxies: np.ndarray, seed: int, config: Config) -> np.ndarray:
    """Truth itself: its error against the label is the label's noise."""
    return survey.truth[survey.test]


def ssftt_row(survey: Survey, galaxies: np.ndarray, seed: int, config: Config) -> np.ndarray:
    """SSFTT on patches of principal components, classes drawn equally often, as recommended."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    rows, test = survey.learned(galaxies), survey.test
    model = PCA(COMPONENTS, whiten=True, svd_solver="randomized", random_state=0)
    model.fit(survey.normalised[rows].astype(np.float32))
    values = model.transform(survey.normalised.astype(np.float32)).astype(np.float32)
    values = np.pad(values, ((0, 1), (0, 0)))  # the last row: where there is no neighbour
    classes = np.digitize(survey.label, LOGOH_EDGES[6])
    members = [rows[classes[rows] == k] for k in range(6)]
    members = [m for m in members if m.size]
    means = np.array([survey.label[rows[classes[rows] == k]].mean() if (classes[rows] == k).any()
                      else survey.label[rows].mean() for k in range(6)])  # fmt: skip
    network = get_SSFTT_model(6, WINDOW, COMPONENTS)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    steps = config.ssftt_epochs * rows.size // 256
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    square = np.arange(WINDOW**2).reshape(WINDOW, WINDOW)

    def patches(centre: np.ndarray, order: np.ndarray) -> torch.Tensor:
        cut = values[survey.near[centre][:, order.ravel()]].reshape(-1, WINDOW, WINDOW, COMPONENTS)
        return torch.from_numpy(cut).permute(0, 3, 1, 2)[:, None].contiguous()

    network.train()
    for _ in range(steps):
        drawn = [
            m[rng.integers(m.size)]
            for m in (members[k] for k in rng.integers(len(members), size=256))
        ]
        centre = np.array(drawn)
        order = np.rot90(square, int(rng.integers(4)))
        order = order.T if rng.integers(2) else order
        logits = network(patches(centre, order))
        loss = F.cross_entropy(logits, torch.from_numpy(classes[centre]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()
    with torch.inference_mode():
        blocks = np.array_split(test, max(1, test.size // 1000))
        chance = torch.cat([network(patches(b, square)).softmax(1) for b in blocks])
    return chance.numpy() @ means


def train_network(
    survey: Survey, galaxies: np.ndarray, seed: int, work_dir: Path, epochs: int | None
) -> Path:
    """Train the network as run_SSFTT_training.py does by default; return the run's folder."""
    parts = split_galaxies(survey.galaxies, FRACTIONS, seed)
    learned = set(survey.galaxies["plateifu"].iloc[galaxies])
    parts["train"] = parts["train"][parts["train"]["plateifu"].isin(learned)]
    name = f"{survey.root.name}_{galaxies.size}_{seed}"
    recipe = data_io.Recipe("split", data_io.SPLIT_VERSION, {"kind": "hard", "seed": seed}, {})
    data_io.write_split(utils.split_path(survey.root, name), parts, recipe)
    run_dir = work_dir / "runs" / name
    options = run_SSFTT_training.train_config(
        label_task="logOH", data_dir=survey.root, split_dir=name, seed=seed, epochs=epochs,
        baselines=False, run_dir=run_dir, overwrite=True,
    )  # fmt: skip
    if run_SSFTT_training.main(options) != utils.EXIT_DONE:
        raise DataError(
            f"{name}: stopped by a signal, expected the training to finish. "
            "Run the same command again; the training then starts from the beginning."
        )
    utils.setup_logging()  # no longer into the run's log file
    return run_dir


def ours_row(survey: Survey, galaxies: np.ndarray, seed: int, config: Config) -> np.ndarray:
    """Matched-filter network."""
    run_dir = train_network(survey, galaxies, seed, config.work_dir, config.epochs)
    found = eval_fns.evaluate_split(run_dir, "test", survey.root).predictions
    value_of = found.set_index(["plateifu", "y", "x"])["logoh"]
    test, names = survey.test, survey.galaxies["plateifu"].to_numpy()
    keys = pd.MultiIndex.from_arrays([names[survey.galaxy[test]], survey.y[test], survey.x[test]])
    return value_of.loc[keys].to_numpy()


ROWS: dict[str, Callable[..., np.ndarray]] = {
    "majority": constant_row,
    "position": position_row,
    "logistic": logistic_row,
    "mlp": mlp_row,
    "line_fits_ratios": from_lines("ratios", lambda seed: ridge(2)),
    "line_fits_ridge": from_lines("all", lambda seed: ridge(1)),
    "line_fits_boosting": from_lines("all", boosting),
    "line_fits_neighbours": from_lines("neighbours", lambda seed: ridge(1)),
    "line_fits_neighbours_boosting": from_lines("neighbours", boosting),
    "ssftt_before": ssftt_row,
    "ours": ours_row,
    "noise_ceiling": ceiling_row,
}


# Scores


def scores_of(survey: Survey, predicted: np.ndarray) -> dict[str, float]:
    """Scores over the test spaxels."""
    label, truth = survey.label[survey.test], survey.truth[survey.test]
    accuracy = {
        f"accuracy{k}": float((np.digitize(predicted, e) == np.digitize(label, e)).mean())
        for k, e in LOGOH_EDGES.items()
    }
    to_label, to_truth = predicted - label, predicted - truth
    return {
        **accuracy,
        "mae_label": float(np.abs(to_label).mean()),
        "mae_truth": float(np.nanmean(np.abs(to_truth))),
        "rmse_label": float(np.sqrt(np.square(to_label).mean())),
        "rmse_truth": float(np.sqrt(np.nanmean(np.square(to_truth)))),
    }


def galaxy_errors(survey: Survey, predicted: np.ndarray) -> list[list[float]]:
    """Count the test spaxels of each galaxy, and sum their errors (label, truth); (3, n)."""
    galaxy = np.unique(survey.galaxy[survey.test], return_inverse=True)[1]
    errors = [np.abs(predicted - v[survey.test]) for v in (survey.label, survey.truth)]
    sums = [np.bincount(galaxy, np.nan_to_num(e)) for e in (np.ones(galaxy.size), *errors)]
    return np.array(sums).tolist()


def compare(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, list[float]]:
    """95 % intervals of our MAE over another row's, drawing galaxies (paired bootstrap).

    The test galaxies of all seeds that both rows have count together.
    """
    theirs = {run["seed"]: run["galaxies"] for run in others}
    pairs = [(run["galaxies"], theirs[run["seed"]]) for run in ours if run["seed"] in theirs]
    a, b = (np.concatenate([np.array(pair[i]) for pair in pairs], axis=1) for i in (0, 1))
    drawn = np.random.default_rng(0).integers(a.shape[1], size=(N_BOOTSTRAP, a.shape[1]))
    ratio = a[1:, drawn].sum(2) / b[1:, drawn].sum(2)
    low, high = np.quantile(ratio, (0.025, 0.975), axis=1)
    return {"label": [low[0], high[0]], "truth": [low[1], high[1]]}


def main(config: Config) -> int:
    """Compute what is missing, print the table, write it."""
    torch.set_num_threads(1)
    names = config.rows or tuple(ROWS)
    for wave_min, factor in itertools.product(config.wave_min, config.noise):
        wanted = [
            (name, n, seed)
            for n, name in itertools.product(config.n_train, names)
            for seed in config.seeds
        ]
        missing = [
            w for w in wanted if not read_row(config, row_path(config, wave_min, factor, *w))
        ]
        if not missing:
            continue
        root = make_cubes(config, wave_min)
        survey = read_survey(make_shallow(root, factor))
        for name, n, seed in missing:
            survey.split(seed)
            start = time.monotonic()
            predicted = ROWS[name](survey, survey.train_galaxies(n), seed, config)
            row = {
                "name": name, "depth": 1 / factor**2, "wave_min": wave_min,
                "n_train": len(survey.train_galaxies(n)), "limit": n, "seed": seed,
                "made_with": made_with(config, name),
                **scores_of(survey, predicted), "seconds": time.monotonic() - start,
                "galaxies": galaxy_errors(survey, predicted),
            }  # fmt: skip
            utils.write_json(row_path(config, wave_min, factor, name, n, seed), row)
            log.info("%s", line_of({**row, "seeds": [seed]}))
    rows = table(config)
    print(f"\n{HEADER}")
    print("\n".join(line_of(row) for row in rows))
    measuring.write_rows(config.results / "table.json", rows, config=utils.config_dict(config))
    return utils.EXIT_DONE


def row_path(config: Config, wave_min: float, factor: int, name: str, n: int, seed: int) -> Path:
    """File of a finished row."""
    return config.work_dir / "rows" / f"{name}_{wave_min:.0f}_{factor}_{n}_{seed}.json"


def made_with(config: Config, name: str) -> dict[str, Any]:
    """Gather what decides a row besides what its file's name says."""
    epochs = {"ours": config.epochs, "ssftt_before": config.ssftt_epochs}.get(name)
    return {"version": ROWS_VERSION, "n_galaxies": config.n_galaxies, "epochs": epochs}


def read_row(config: Config, path: Path) -> dict[str, Any] | None:
    """Read a finished row; None if there is none, or one made with other options."""
    row = json.loads(path.read_text()) if path.is_file() else {}
    return row if row and row.get("made_with") == made_with(config, row["name"]) else None


def table(config: Config) -> list[dict[str, Any]]:
    """Average the finished rows over seeds; compare each with ours."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for path in sorted((config.work_dir / "rows").glob("*.json")):
        row = read_row(config, path)
        if row is None:
            continue
        key = (-row["wave_min"], -row["depth"], row["limit"], list(ROWS).index(row["name"]))
        found.setdefault(key, []).append(row)
    rows = []
    for key in sorted(found):
        runs = found[key]
        row = {k: runs[0][k] for k in ("name", "depth", "wave_min", "n_train")}
        row["seeds"] = [run["seed"] for run in runs]
        for score in (k for k, v in runs[0].items() if isinstance(v, float) and k not in row):
            values = [run[score] for run in runs]
            row[score] = float(np.mean(values))
            row[f"{score}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        ours = found.get((*key[:3], list(ROWS).index("ours")))
        if ours and row["name"] not in ("ours", "noise_ceiling"):
            row["ours_over_this"] = compare(ours, runs)
        rows.append(row)
    return rows


HEADER = (
    f"{'':<30}{'depth':>6}{'from':>6}{'train':>6}{'seeds':>6}{'acc. 6':>8}{'acc. 8':>8}"
    f"{'MAE label':>11}{'MAE truth':>11}{'RMSE':>8}{'seconds':>9}"
)


def line_of(row: dict[str, Any]) -> str:
    """Lay out a row of the table as a line."""
    return (
        f"{row['name']:<30}{row['depth']:>6.2f}{row['wave_min']:>6.0f}{row['n_train']:>6}"
        f"{len(row['seeds']):>6}{row['accuracy6']:>8.3f}{row['accuracy8']:>8.3f}"
        f"{row['mae_label']:>11.4f}{row['mae_truth']:>11.4f}{row['rmse_label']:>8.4f}"
        f"{row['seconds']:>9.0f}"
    )


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
