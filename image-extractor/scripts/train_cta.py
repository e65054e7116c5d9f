"""Train a network on a data set: gamma or hadron, and energy; beside it, boosted Hillas parameters.

Reads   a data set of image_extractor.py or mock_showers.py that was split into Training, Validation
        and Test, with gammas and other particles, charge and time, and one type of camera.
Writes  the run folder: config.json, environment.json, log.txt, metrics.csv (a row per epoch),
        network.pt, events.csv (test events: truth and results), summary.json, roc.png, energy.png;
        with --parameters, the tables of parameters, for later runs on the same events.

The baseline is gradient boosting of scikit-learn (which ctapipe installs) on the Hillas, leakage,
concentration, morphology and timing parameters of each event and its stereo reconstruction, see
shower_parameters.py. The network has these, too, those of each telescope, and all images: a small
residual network makes numbers of each image, which are averaged over telescopes. It begins with the
results of the baseline, to which it learns to add, so that their difference is what images add. In
training, results of the baseline are those of boosting that has not learned from the same showers.
Images are turned so that the reconstructed direction always lies on the same side; what is left of
symmetry, the reflection along the axis, is drawn at random and averaged over in results.

Both learn from Training; Validation decides which epoch of the network is kept and scales its
scores to probabilities; Test is for the scores alone. Intervals are 95 %, from drawing whole
showers of Test again, because the uses of one shower are not independent.

    python scripts/train_cta.py mock.h5 --run-dir runs/mock
"""

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import shower_parameters
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.ndimage import affine_transform
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn

from image_extractor import __version__, layout
from image_extractor.errors import DataError
from image_extractor.reader import Events
from image_extractor.torch_reader import loader
from image_extractor.transaction import write_whole

log = logging.getLogger("train_cta")
PARTS = ("Training", "Validation", "Test")
BRIGHT_PE = 3.0  # cells with less have noise as peak time
WINDOW = 16  # cells of a cut-out, a power of 2
RESULTS = ("logit of gamma", "log10(energy/TeV)")  # of the network
KEPT_BYTES = 300_000_000  # of the prepared events of a part
N_BOOTSTRAP = 400
ENERGY_EDGES = np.log10([0.1, 0.3, 1.0, 3.0, 10.0])  # log10(TeV), of the energy table


# Events


class Lattice:
    """The lattice of a camera in its stored images.

    Parameters
    ----------
    path : Path
        Data set with one type of camera.

    Attributes
    ----------
    scale : int
        Number of times that each cell is repeated.
    axes : (2, 2) array
        Steps (x, y) in the camera frame, deg, of one cell along the first and the second axis.
    origin : (2,) array
        Place (x, y) of cell 0, 0, deg.
    step : float
        Side of a square with the area of a cell, deg.

    Raises
    ------
    DataError
        If there are several types of camera, or vectors of pixels instead of images.
    """

    def __init__(self, path: Path) -> None:
        with layout.open_layout(path) as h5:
            self.scale = int(layout.check_schema(h5)["scale_factor"])
            keys = {row["camera"].decode() for row in layout.tel_table(h5)}
            pixels, matrix, attrs = layout.camera_pixels(h5, sorted(keys)[0])
        shape = json.loads(attrs["image_shape"])
        if len(keys) > 1 or len(shape) != 2:
            raise DataError(
                f"{path}: has {len(keys)} types of camera, with {len(shape)} axes of an image "
                "(expected one type, with two axes). Extract one telescope type, mapped."
            )
        cells = np.c_[(*np.unravel_index(matrix["cell"], shape), np.ones(len(matrix)))]
        places = np.c_[pixels["derotated_x"], pixels["derotated_y"]][matrix["pixel"]]
        degrees = np.degrees(places / float(attrs["focal_length_m"]))
        *axes, self.origin = np.linalg.lstsq(cells, degrees)[0]
        self.axes = np.array(axes)
        self.step = float(np.sqrt(abs(np.linalg.det(self.axes))))

    def cut_out(self, image: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Cut the surroundings of the centre of charge out of an image (charge and time, x, y).

        Returns
        -------
        (2, WINDOW, WINDOW) float32 array
            Square cells of the size of a pixel; the first axis points to `direction` (2,), deg.
        """
        charge, samples = image[:, :: self.scale, :: self.scale]
        charge = charge * (charge > BRIGHT_PE)
        total = max(float(charge.sum()), 1e-6)
        times = samples - (charge * samples).sum() / total
        centre = np.tensordot(np.indices(charge.shape), charge) / total
        along = direction - (centre @ self.axes + self.origin)
        along /= max(float(np.linalg.norm(along)), 1e-6)
        steps = self.step * np.array([along, [-along[1], along[0]]])
        cells = np.linalg.solve(self.axes.T, steps.T)  # (2, 2): of one step along each new axis
        offset = centre - cells.sum(1) * (WINDOW - 1) / 2
        charge, moment = (
            affine_transform(x, cells, offset, (WINDOW, WINDOW), order=1)
            for x in (charge, charge * times)
        )
        times = moment / np.maximum(charge, 1e-6)
        return np.stack([np.log1p(charge) / 3, times / 5]).astype(np.float32)


class Prepared:
    """Events as the network sees them, kept in memory after they were first read.

    `images` are cut-outs (2, WINDOW, WINDOW) around the centre of charge, turned so that their
    first axis points to the reconstructed direction: the logarithm of the charge, and the peak time
    relative to the image's mean; cells with noise alone are 0. The rows of `tables` are the
    event_parameters, the image_parameters and the boosted results of each event.
    """

    def __init__(
        self,
        data: Events,
        lattice: Lattice,
        direction: np.ndarray,
        tables: dict[str, np.ndarray],
    ) -> None:
        self.data, self.lattice, self.direction, self.tables = data, lattice, direction, tables
        self.kept: dict[int, dict] = {}
        self.room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self.data)

    def particles(self) -> np.ndarray:
        """Return 1 for each gamma, else 0."""
        return self.data.particles()

    def __getitem__(self, number: int) -> dict:
        if number in self.kept:
            return self.kept[number]
        sample = self.data[number]
        direction = self.direction[number]
        sample["images"] = [self.lattice.cut_out(x, direction) for x in sample["images"]]
        self.room -= sum(image.nbytes for image in sample["images"]) + 1000
        if self.room > 0:
            self.kept[number] = sample
        return sample


# The network


class Residual(nn.Module):
    """Two convolutions beside a shortcut; `stride` 2 halves the image."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.block(x) + self.shortcut(x))


class ShowerNetwork(nn.Module):
    """From the images of an event and their parameters to its RESULTS.

    Parameters
    ----------
    n_image, n_event : int
        Number of parameters of an image, and of an event.
    """

    def __init__(
        self, n_image: int, n_event: int, widths: tuple[int, ...] = (8, 16, 24), hidden: int = 48
    ) -> None:
        super().__init__()
        stem = [nn.Conv2d(2, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        blocks = [Residual(a, b, 2) for a, b in pairwise(widths)]
        n_cells = (WINDOW >> len(blocks)) ** 2
        self.trunk = nn.Sequential(
            *(*stem, *blocks, nn.Flatten()),
            *(nn.Linear(widths[-1] * n_cells, hidden), nn.ReLU(), nn.Dropout(0.4)),
        )
        self.telescope = nn.Sequential(
            *(nn.Linear(hidden + n_image, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        )
        self.single = nn.Linear(hidden, 1)  # logit of one image, for learning alone
        n = 2 * hidden + n_event
        # Dropout hinders regression, so that the energy has layers of its own.
        self.heads = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(n, hidden), nn.ReLU(), nn.Dropout(dropout)),
                *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)),
            )
            for dropout in (0.2, 0.0)
        )
        for head in self.heads:
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate a batch of events.

        Returns
        -------
        (event, RESULTS), and (image,): the logit from each image alone, in the order of the mask
        """
        mask, of_event = batch["mask"], batch["event_parameters"]
        both = torch.cat([self.trunk(batch["images"][mask]), batch["image_parameters"][mask]], 1)
        own = self.telescope(both)
        by_event = own.new_zeros(*mask.shape, own.shape[1])
        by_event[mask] = own
        n = mask.sum(1, keepdim=True)
        both = torch.cat([by_event.sum(1) / n, by_event.amax(1), of_event], 1)
        found = torch.cat([head(both) for head in self.heads], 1)
        return batch["boosted"] + found, self.single(own)[:, 0]


def batches_of(data: Prepared, size: int, seed: int | None) -> Iterator[dict]:
    """Batches of events with their parameters; in the order of the file without a seed."""
    for batch in loader(data, size, shuffle=seed is not None, seed=seed or 0):
        tables = {k: torch.from_numpy(x[batch["event"]]).float() for k, x in data.tables.items()}
        tables["image_parameters"] = tables["image_parameters"][:, : batch["mask"].shape[1]]
        yield batch | tables


def mirrored(batch: dict) -> dict:
    """Reflect each image of a batch along its axis, which leaves its parameters as they are."""
    return {**batch, "images": batch["images"].flip(-1)}


def apply(network: nn.Module, data: Prepared) -> np.ndarray:
    """Results (n_events, RESULTS): means over both reflections."""
    network.eval()
    found = []
    with torch.no_grad():
        for batch in batches_of(data, 256, None):
            found.append((network(batch)[0] + network(mirrored(batch))[0]) / 2)
    return torch.cat(found).double().numpy()


def train(
    data: dict[str, Prepared], epochs: int, batch_size: int, seed: int, run: Path
) -> nn.Module:
    """Train; return the network of the epoch with the smallest loss on Validation."""
    torch.manual_seed(seed)
    widths = (
        data["Training"].tables[k].shape[-1] for k in ("image_parameters", "event_parameters")
    )
    network = ShowerNetwork(*widths)
    steps = epochs * -(-len(data["Training"]) // batch_size)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, steps)
    held_out = data["Validation"].data
    truth = {
        "particle": torch.from_numpy(held_out.particles()),
        "log_energy": torch.from_numpy(np.log10(held_out.events["mc_energy"])).float(),
    }
    rows: list[dict] = []
    best: tuple[float, dict] | None = None
    for epoch in range(1, epochs + 1):
        started, total = time.perf_counter(), 0.0
        network.train()
        for b in batches_of(data["Training"], batch_size, seed + epoch):
            found, single = network(mirrored(b) if torch.rand(()) < 0.5 else b)
            of_image = b["particle"][:, None].expand_as(b["mask"])[b["mask"]].float()
            loss = loss_of(found, b)
            total += loss.item() * len(b["event"])
            alone = nn.functional.binary_cross_entropy_with_logits(single, of_image)
            optimiser.zero_grad()
            (loss + alone / 2).backward()
            optimiser.step()
            schedule.step()
        found = torch.from_numpy(apply(network, data["Validation"]))
        row = {
            "epoch": epoch,
            "training_loss": total / len(data["Training"]),
            "validation_loss": float(loss_of(found.float(), truth)),
            "validation_auc": roc_auc_score(truth["particle"].numpy(), found[:, 0].numpy()),
            "seconds": time.perf_counter() - started,
        }
        rows.append(row)
        log.info(
            "epoch %d of %d: loss %.3f, on Validation %.3f, AUC %.3f; %.0f s",
            *(epoch, epochs, row["training_loss"], row["validation_loss"]),
            *(row["validation_auc"], row["seconds"]),
        )
        if best is None or row["validation_loss"] < best[0]:
            state = {name: value.clone() for name, value in network.state_dict().items()}
            best = (row["validation_loss"], state)
        write_csv(run / "metrics.csv", rows)
    assert best is not None
    network.load_state_dict(best[1])
    return network


def loss_of(found: torch.Tensor, truth: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the particle; for gammas, also thrice the error of log10(energy)."""
    particle = truth["particle"].float()
    loss = nn.functional.binary_cross_entropy_with_logits(found[:, 0], particle)
    error = nn.functional.smooth_l1_loss(
        found[:, 1], truth["log_energy"], reduction="none", beta=0.1
    )
    return loss + 3 * (error * particle).sum() / particle.sum().clamp(min=1)


# The baseline


def standardised(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scale parameters, the last axis, to mean 0 and rms 1 in Training; missing values become 0."""
    axes = tuple(range(values["Training"].ndim - 1))
    mean, rms = np.nanmean(values["Training"], axes), np.nanstd(values["Training"], axes) + 1e-6
    return {
        part: np.nan_to_num(np.clip((x - mean) / rms, -4, 4)).astype(np.float32)
        for part, x in values.items()
    }


def boosted(
    events: dict[str, Events], tables: dict[str, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """Results (n_events, 2) of gradient boosting, by part: log odds of gamma, log10(energy in TeV).

    Those of Training are from boosting that has not learned from the same showers.
    """
    training, table = events["Training"], tables["Training"]
    is_gamma, log_tev = training.particles() == 1, np.log10(training.events["mc_energy"])
    options = {"max_iter": 200, "learning_rate": 0.06, "random_state": seed}

    def learned(rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        gammas = rows[is_gamma[rows]]
        classify = HistGradientBoostingClassifier(**options).fit(table[rows], is_gamma[rows])
        regress = HistGradientBoostingRegressor(**options).fit(table[gammas], log_tev[gammas])
        return lambda x: np.c_[classify.decision_function(x), regress.predict(x)]

    results = learned(np.arange(len(table)))
    found = {part: results(x) for part, x in tables.items()}
    folds = StratifiedGroupKFold(5).split(table, is_gamma, training.events["shower"])
    for rows, others in folds:
        found["Training"][others] = learned(rows)(table[others])
    return found


# Scores


def interval(statistic: object, showers: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Value and 95 % interval of a statistic of weighted events.

    Parameters
    ----------
    statistic : callable
        Weights (n,) -> number.
    showers : (n,) array
        Shower of each event; whole showers are drawn with replacement.
    """
    rng = np.random.default_rng(seed)
    _, shower = np.unique(showers, return_inverse=True)
    n, drawn = shower.max() + 1, []
    for _ in range(N_BOOTSTRAP):
        weights = np.bincount(rng.integers(n, size=n), minlength=n)[shower]
        drawn.append(statistic(weights))
    low, high = np.nanquantile(drawn, [0.025, 0.975])  # NaN: drawn without one of the classes
    return float(statistic(np.ones(len(showers), int))), float(low), float(high)


def bias_and_resolution(ratio: np.ndarray) -> tuple[float, float]:
    """Median of E/E_true - 1, and half the range that holds the middle 68 % of E/E_true."""
    low, middle, high = np.quantile(ratio, [0.16, 0.5, 0.84])
    return float(middle - 1), float(high - low) / 2


def score(results: dict[str, np.ndarray], data: Events, seed: int) -> dict:
    """Scores of each method on test events."""
    truth, showers = data.particles(), data.events["shower"]
    gamma, log_tev = truth == 1, np.log10(data.events["mc_energy"])
    scores: dict = {}
    for name, found in results.items():
        ratio = 10 ** (found[gamma, 1] - log_tev[gamma])

        def auc(weights: np.ndarray, found: np.ndarray = found) -> float:
            return roc_auc_score(truth, found[:, 0], sample_weight=weights)

        def resolution(weights: np.ndarray, ratio: np.ndarray = ratio) -> float:
            return bias_and_resolution(np.repeat(ratio, weights))[1]

        place = np.digitize(log_tev[gamma], ENERGY_EDGES)
        scores[name] = {
            "auc": interval(auc, showers, seed),
            "energy_resolution": interval(resolution, showers[gamma], seed),
            "energy_bias": bias_and_resolution(ratio)[0],
            "by_energy": [
                {
                    "tev": [float(10 ** ENERGY_EDGES[k - 1]), float(10 ** ENERGY_EDGES[k])],
                    "gammas": int((place == k).sum()),
                    "bias_resolution": bias_and_resolution(ratio[place == k]),
                }
                for k in range(1, ENERGY_EDGES.size)
                if (place == k).sum() >= 20
            ],
        }
    ours, theirs = results.values()

    def gain(weights: np.ndarray) -> float:
        a, b = (roc_auc_score(truth, r[:, 0], sample_weight=weights) for r in (ours, theirs))
        return a - b

    scores["auc_gain"] = interval(gain, showers, seed)
    return scores


def temperature(logit: np.ndarray, truth: np.ndarray) -> float:
    """Divisor of logits that makes them probabilities: the likeliest on Validation."""

    def loss(log_t: float) -> float:
        scaled = logit / np.exp(log_t)
        return float(np.mean(np.logaddexp(0, scaled) - truth * scaled))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


# Output


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a table; the first row has the names."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    text = "\n".join(
        ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in x) for x in lines
    )
    write_whole(path, (text + "\n").encode())


def figures(results: dict[str, np.ndarray], data: Events, scores: dict, run: Path) -> None:
    """Draw roc.png and energy.png."""
    for file, draw in (("roc", _draw_roc), ("energy", _draw_energy)):
        figure = Figure(figsize=(5.2, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        for name, colour in zip(results, ("#0072b2", "#d55e00"), strict=False):
            draw(ax, name, colour, data.particles(), results[name], scores[name])
        if file == "roc":
            ax.plot([0, 1], [0, 1], ":", color="grey")
            labels = ("protons taken for gammas", "gammas kept", "area under the curve (95 %)")
        else:
            ax.axhline(0, color="grey", lw=0.8)
            labels = ("log10(true energy / TeV)", "E / true E - 1: median, middle 68 %", "gammas")
        ax.set(xlabel=labels[0], ylabel=labels[1])
        if ax.get_legend_handles_labels()[0]:
            ax.legend(title=labels[2], loc="lower right" if file == "roc" else "best")
        ax.set_title(f"{data.paths[0].name}: {len(data)} test events", fontsize=10)
        drawn = BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        write_whole(run / f"{file}.png", drawn.getvalue())


def _draw_roc(
    ax: Axes, name: str, colour: str, truth: np.ndarray, found: np.ndarray, scores: dict
) -> None:
    false, true, _ = roc_curve(truth, found[:, 0])
    label = "{}: {:.3f} ({:.3f}-{:.3f})".format(name, *scores["auc"])
    ax.plot(false, true, color=colour, label=label)


def _draw_energy(
    ax: Axes, name: str, colour: str, truth: np.ndarray, found: np.ndarray, scores: dict
) -> None:
    if not scores["by_energy"]:
        return
    edges = np.log10([bins["tev"] for bins in scores["by_energy"]])
    bias, width = np.transpose([bins["bias_resolution"] for bins in scores["by_energy"]])
    centre = edges.mean(1) + (0.02 if name == "network" else -0.02)
    ax.errorbar(centre, bias, width, fmt="o", color=colour, label=name, capsize=3)


def main(args: argparse.Namespace) -> dict:
    """Train, score and write a run; return its summary."""
    started, run = time.perf_counter(), args.run_dir
    torch.set_num_threads(args.threads)
    run.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(run / "log.txt", "w")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers, force=True)
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_whole(run / "config.json", json.dumps(options, indent=1).encode())
    packages = {n: version(n) for n in ("numpy", "torch", "scikit-learn", "ctapipe")}
    environment = {"python": platform.python_version(), "image-extractor": __version__, **packages}
    environment |= {"command": sys.argv, "threads": torch.get_num_threads()}
    write_whole(run / "environment.json", json.dumps(environment, indent=1).encode())
    events = {part: Events(args.file, part) for part in PARTS}
    for part, of_part in events.items():
        n = np.bincount(of_part.particles(), minlength=2)
        if not n.all():
            raise DataError(
                f"{args.file}: {part} has {n[1]} gammas and {n[0]} other events (expected some of "
                "each). Extract both, and split them."
            )
        log.info("%s: %d gammas, %d others", part, n[1], n[0])
    test = events["Test"]
    shared = np.isin(test.events["shower"], events["Training"].events["shower"])
    if shared.any():
        log.warning(
            "%d of %d test events have their shower in Training, too: the scores are too good. "
            "Split with --split-by shower.",
            *(shared.sum(), shared.size),
        )
    found = shower_parameters.of_parts(args.file, events, args.parameters)
    tables = {part: p.table() for part, p in found.items()}
    baseline = boosted(events, tables, args.seed)
    of_event = standardised({part: np.c_[x, baseline[part]] for part, x in tables.items()})
    of_image = standardised({part: p.images for part, p in found.items()})
    lattice, data = Lattice(args.file), {}
    for part in PARTS:
        inputs = {"event_parameters": of_event[part], "image_parameters": of_image[part]}
        inputs["boosted"] = baseline[part]
        data[part] = Prepared(events[part], lattice, found[part].direction, inputs)
    prepared = time.perf_counter() - started
    log.info("%d parameters per event, after %.0f s", tables["Test"].shape[1], prepared)
    network = train(data, args.epochs, args.batch_size, args.seed, run)
    trained = time.perf_counter() - started - prepared
    log.info("trained in %.0f s; scoring", trained)
    buffer = BytesIO()
    torch.save(network.state_dict(), buffer)
    write_whole(run / "network.pt", buffer.getvalue())
    outputs = {part: apply(network, data[part]) for part in ("Validation", "Test")}
    scale = temperature(outputs["Validation"][:, 0], events["Validation"].particles())
    results = {
        "network": outputs["Test"] / [scale, 1],
        "Hillas, boosted": baseline["Test"],
    }
    scores = score(results, test, args.seed)
    probability = expit(results["network"][:, 0])
    summary = {
        "file": args.file.name,
        "events": {part: len(of_part) for part, of_part in events.items()},
        "test_events_with_shower_in_training": int(shared.sum()),
        "temperature": scale,
        "brier": float(np.mean((probability - test.particles()) ** 2)),
        "training_seconds": trained,
        "seconds": time.perf_counter() - started,
        **scores,
    }
    rows = [
        {
            "run_number": int(event["run_number"]),
            "event_number": int(event["event_number"]),
            "shower": int(event["shower"]),
            "particle": int(particle),
            "tev": float(event["mc_energy"]),
            **{f"{n} logit".replace(", ", " "): float(r[k, 0]) for n, r in results.items()},
            **{f"{n} tev".replace(", ", " "): float(10 ** r[k, 1]) for n, r in results.items()},
        }
        for k, (event, particle) in enumerate(zip(test.events, test.particles(), strict=True))
    ]
    write_csv(run / "events.csv", rows)
    write_whole(run / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    figures(results, test, scores, run)
    log.info("\n%s\n%s: roc.png, energy.png, summary.json", table(summary), run)
    return summary


def table(summary: dict) -> str:
    """Format the scores of the methods, a line each."""
    lines = [f"{'':18}{'AUC (95 %)':>24}{'energy resolution (95 %)':>28}{'bias':>8}"]
    for name, s in summary.items():
        if isinstance(s, dict) and "auc" in s:
            auc, width = (
                "{:.3f} ({:.3f}-{:.3f})".format(*s[k]) for k in ("auc", "energy_resolution")
            )
            lines.append(f"{name:18}{auc:>24}{width:>28}{s['energy_bias']:8.3f}")
    gain = "{:+.3f} ({:+.3f} to {:+.3f})".format(*summary["auc_gain"])
    lines.append(f"AUC of the network minus that of the baseline: {gain}")
    return "\n".join(lines)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("file", type=Path, help="data set, split into Training, Validation and Test")
    add("--run-dir", type=Path, required=True, help="folder of the results")
    add("--epochs", type=int, default=15, help="passes over the training events (default: 15)")
    add("--batch-size", type=int, default=64, help="events per step (default: 64)")
    add("--seed", type=int, default=1, help="random seed of weights and order (default: 1)")
    add(
        "--parameters",
        type=Path,
        help="npz file that keeps the table of image parameters, most of the time of a short run",
    )
    add(
        "--threads",
        type=int,
        default=1,
        help="of the network (default: 1, because more wait for each other where cores are shared)",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        main(parsed())
    except DataError as error:
        sys.exit(str(error))
