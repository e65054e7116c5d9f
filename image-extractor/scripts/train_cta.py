"""Train a network on a data set: gamma or hadron, and energy; beside it, boosted Hillas parameters.

Reads   a data set of image_extractor.py or mock_showers.py that was split into Training, Validation
        and Test, with gammas and other particles, charge and time.
Writes  the run folder: config.json, environment.json, log.txt, metrics.csv (a row per epoch),
        network.pt, events.csv (test events: truth and results), summary.json, roc.png, energy.png.

The network sees all images of an event: a small residual network makes numbers of each image; these
and the telescope's position are averaged over telescopes. The baseline has the same events: Hillas,
leakage, concentration, morphology and timing parameters, and ctapipe's stereo reconstruction, in
scikit-learn's gradient boosting (which ctapipe installs). Both learn from Training; Validation
decides which epoch of the network is kept and scales its scores to probabilities; Test is for the
scores alone. Intervals are 95 %, from drawing whole showers of Test again, because the uses of one
shower are not independent.

    python scripts/train_cta.py mock.h5 --run-dir runs/mock
"""

import argparse
import json
import logging
import multiprocessing
import platform
import sys
import time
import warnings
from importlib.metadata import version
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

from image_extractor import __version__
from image_extractor.errors import DataError
from image_extractor.reader import Events
from image_extractor.torch_reader import loader
from image_extractor.transaction import write_whole

log = logging.getLogger("train_cta")
PARTS = ("Training", "Validation", "Test")
CLEANING = {"picture_threshold_pe": 6.0, "boundary_threshold_pe": 3.0}
BRIGHT_PE = 3.0  # cells with less have noise as peak time
WINDOW = 32  # cells of a cut-out
PLACES = 5  # numbers per telescope beside the image
N_BOOTSTRAP = 400
ENERGY_EDGES = np.log10([0.1, 0.3, 1.0, 3.0, 10.0])  # log10(TeV), of the energy table


# The network


def prepare(sample: dict) -> dict:
    """Cut out the shower of each image of an event, and scale it.

    `images` become (2, WINDOW, WINDOW) about the centre of charge: the logarithm of the charge, and
    the peak time relative to the image's mean; cells with noise alone are 0. `positions` become
    (x, y of the telescope, x, y of the cut-out, log10 of the charge), all about 1.
    """
    images, places = [], []
    for charge, samples in sample["images"]:
        bright = charge > BRIGHT_PE
        weights = charge * bright
        total = max(float(weights.sum()), 1e-9)
        centre = [
            float((weights.sum(1 - axis) @ np.arange(n)) / total) if total > 1 else n / 2
            for axis, n in enumerate(charge.shape)
        ]
        mean = float((weights * samples).sum() / total)
        whole = np.stack([np.log1p(weights) / 3, np.where(bright, (samples - mean) / 5, 0)])
        padded = np.pad(whole, ((0, 0), *[(WINDOW // 2, WINDOW // 2)] * 2))
        x, y = (round(c) for c in centre)
        images.append(padded[:, x : x + WINDOW, y : y + WINDOW].astype(np.float32))
        places.append([*(np.array(centre) / charge.shape - 0.5) * 4, np.log10(total) - 2])
    positions = np.c_[sample["positions"][:, :2] / 100, np.array(places)]
    return {**sample, "images": images, "positions": positions}


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
    """From the images of an event to (logit of gamma, log10 of the energy in TeV)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48), hidden: int = 64) -> None:
        super().__init__()
        stem = [nn.Conv2d(2, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        blocks = [Residual(a, b, 2) for a, b in pairwise(widths)]
        self.trunk = nn.Sequential(*stem, *blocks)
        self.telescope = nn.Sequential(
            nn.Linear(2 * widths[-1] + PLACES, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
        )
        self.single = nn.Linear(hidden, 1)  # logit of one image, for learning alone
        self.head = nn.Sequential(
            nn.Linear(2 * hidden + 1, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 2)
        )

    def forward(
        self, images: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate a batch.

        Parameters
        ----------
        images : (event, telescope, 2, x, y), see `prepare`
        mask : (event, telescope) bool
        positions : (event, telescope, PLACES)

        Returns
        -------
        (event, 2), and (image,): the logit from each image alone, in the order of the mask
        """
        seen = self.trunk(images[mask])  # (image, channel, x, y)
        pooled = torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], 1)
        own = self.telescope(torch.cat([pooled, positions[mask]], 1))  # (image, hidden)
        of_event = own.new_zeros(*mask.shape, own.shape[1])
        of_event[mask] = own
        n = mask.sum(1, keepdim=True)
        both = torch.cat([of_event.sum(1) / n, of_event.amax(1), n / 4], 1)
        return self.head(both), self.single(own)[:, 0]


def apply(network: nn.Module, batches: object) -> np.ndarray:
    """Results (n_events, 2) of a network, in the order of the events."""
    network.eval()
    with torch.no_grad():
        found = [network(b["images"], b["mask"], b["positions"])[0] for b in batches]
    return torch.cat(found).double().numpy()


def train(data: dict[str, Events], epochs: int, batch_size: int, seed: int, run: Path) -> nn.Module:
    """Train; return the network of the epoch with the smallest loss on Validation."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    network = ShowerNetwork()
    batches = loader(data["Training"], batch_size, seed=seed)
    held_out = loader(data["Validation"], 4 * batch_size, shuffle=False)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, epochs * len(batches))
    rows: list[dict] = []
    best: tuple[float, dict] | None = None
    for epoch in range(1, epochs + 1):
        started, total = time.perf_counter(), 0.0
        network.train()
        for b in (varied(batch, rng) for batch in batches):
            found, single = network(b["images"], b["mask"], b["positions"])
            of_image = b["particle"][:, None].expand_as(b["mask"])[b["mask"]].float()
            loss = loss_of(found, b)
            loss = loss + nn.functional.binary_cross_entropy_with_logits(single, of_image)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss_of(found, b).item() * len(b["event"])
        found = torch.from_numpy(apply(network, held_out)).float()
        events = data["Validation"].events
        truth = {
            "particle": torch.from_numpy(data["Validation"].particles()),
            "log_energy": torch.from_numpy(np.log10(events["mc_energy"])).float(),
        }
        row = {
            "epoch": epoch,
            "training_loss": total / len(data["Training"]),
            "validation_loss": float(loss_of(found, truth)),
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


def varied(batch: dict, rng: torch.Generator) -> dict:
    """Vary a batch: turn half of the events by 180 deg, and leave out a fifth of the images.

    Turned are the images and the places of telescopes and cut-outs, so that an event stays one that
    an array could have seen; one image of each event is kept.
    """
    images, mask, positions = batch["images"].clone(), batch["mask"], batch["positions"].clone()
    turned = torch.rand(len(mask), generator=rng) < 0.5
    images[turned] = images[turned].flip(-1, -2)
    positions[..., : PLACES - 1][turned] *= -1
    chance = torch.rand(mask.shape, generator=rng).masked_fill(~mask, -1)
    kept = mask & ((chance > 0.2) | (chance == chance.amax(1, keepdim=True)))
    return {**batch, "images": images, "mask": kept, "positions": positions}


def loss_of(found: torch.Tensor, truth: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the particle; for gammas, also the error of log10(energy)."""
    particle = truth["particle"].float()
    loss = nn.functional.binary_cross_entropy_with_logits(found[:, 0], particle)
    error = nn.functional.smooth_l1_loss(
        found[:, 1], truth["log_energy"], reduction="none", beta=0.1
    )
    return loss + (error * particle).sum() / particle.sum().clamp(min=1)


# The baseline


def parameters(path: Path, part: str) -> np.ndarray:
    """Hillas and stereo parameters of the events of a part, (n_events, n_parameters).

    Of each event: the mean over telescopes, weighted by charge, and the values of the brightest
    image; number of images; reconstructed height of the maximum, core and direction. Missing values
    are NaN.
    """
    warnings.simplefilter("ignore")  # ctapipe's, of empty images
    from ctapipe.image import ImageProcessor
    from ctapipe.reco import ShowerProcessor
    from traitlets.config import Config

    from image_extractor.ctapipe_source import DatasetSource

    config = Config({"TailcutsImageCleaner": CLEANING})
    found = []
    with DatasetSource(path, part=part) as source:
        process = ImageProcessor(source.subarray, config=config)
        reconstruct = ShowerProcessor(source.subarray)
        for event in source:
            process(event)
            reconstruct(event)
            found.append(_event_parameters(event))
    return np.array(found)


def _event_parameters(event: object) -> np.ndarray:
    rows, size = [], []
    for tel_id, dl1 in event.dl1.tel.items():
        p = dl1.parameters
        impact = event.dl2.tel[tel_id].impact["HillasReconstructor"].distance.to_value("m")
        row = [np.log10(p.hillas.intensity), impact, p.morphology.n_pixels, p.morphology.n_islands]
        row += [getattr(p.hillas, n).to_value("deg") for n in ("length", "width", "r")]
        row += [p.hillas.skewness, p.hillas.kurtosis, p.timing.slope.value, p.timing.deviation]
        row += [p.leakage.intensity_width_1, p.leakage.intensity_width_2]
        row += [p.concentration.cog, p.concentration.core, p.concentration.pixel]
        rows.append(np.array(row, float))
        size.append(p.hillas.intensity)
    table, weight = np.array(rows), np.nan_to_num(size)
    weighted = np.where(np.isnan(table), 0, table * weight[:, None]).sum(0)
    mean = weighted / np.maximum((~np.isnan(table) * weight[:, None]).sum(0), 1e-9)
    stereo = event.dl2.stereo.geometry["HillasReconstructor"]
    whole = [len(rows), np.isfinite(size).sum(), np.log10(max(weight.sum(), 1e-9))]
    whole += [stereo.h_max.to_value("km"), np.hypot(stereo.core_x, stereo.core_y).to_value("m")]
    pointing = event.monitoring.pointing
    whole += [
        (stereo.alt - pointing.array_altitude).to_value("deg"),
        (stereo.az - pointing.array_azimuth).wrap_at("180d").to_value("deg")
        if stereo.is_valid
        else np.nan,
    ]
    return np.r_[mean, table[weight.argmax()], whole]


def boosted(data: dict[str, Events], path: Path, seed: int) -> np.ndarray:
    """Results (n_test_events, 2) of gradient boosting: log odds of gamma, log10(energy in TeV)."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        tables = pool.starmap(parameters, [(path, "Training"), (path, "Test")])
    learn, test = tables
    if (len(learn), len(test)) != (len(data["Training"]), len(data["Test"])):
        raise DataError(f"{path}: the baseline has other events than the network. Report this.")
    is_gamma = data["Training"].particles() == 1
    tev = data["Training"].events["mc_energy"]
    options = {"max_iter": 200, "learning_rate": 0.06, "random_state": seed}
    classifier = HistGradientBoostingClassifier(**options).fit(learn, is_gamma)
    regressor = HistGradientBoostingRegressor(**options)
    regressor.fit(learn[is_gamma], np.log10(tev[is_gamma]))
    return np.c_[classifier.decision_function(test), regressor.predict(test)]


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
    if len(results) == 2:
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
    data = {part: Events(args.file, part, transform=prepare) for part in PARTS}
    for part, events in data.items():
        n = np.bincount(events.particles(), minlength=2)
        if not n.all():
            raise DataError(
                f"{args.file}: {part} has {n[1]} gammas and {n[0]} other events (expected some of "
                "each). Extract both, and split them."
            )
        log.info("%s: %d gammas, %d others", part, n[1], n[0])
    shared = np.isin(data["Test"].events["shower"], data["Training"].events["shower"])
    if shared.any():
        log.warning(
            "%d of %d test events have their shower in Training, too: the scores are too good. "
            "Split with --split-by shower.",
            *(shared.sum(), shared.size),
        )
    network = train(data, args.epochs, args.batch_size, args.seed, run)
    trained = time.perf_counter() - started
    log.info("trained in %.0f s; scoring", trained)
    buffer = BytesIO()
    torch.save(network.state_dict(), buffer)
    write_whole(run / "network.pt", buffer.getvalue())
    found = {
        part: apply(network, loader(data[part], 4 * args.batch_size, shuffle=False))
        for part in ("Validation", "Test")
    }
    scale = temperature(found["Validation"][:, 0], data["Validation"].particles())
    results = {"network": found["Test"] / [scale, 1]}
    if args.baseline:
        results["Hillas, boosted"] = boosted(data, args.file, args.seed)
    test = data["Test"]
    scores = score(results, test, args.seed)
    probability = expit(results["network"][:, 0])
    summary = {
        "file": args.file.name,
        "events": {part: len(events) for part, events in data.items()},
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
    if "auc_gain" in summary:
        gain = "{:+.3f} ({:+.3f} to {:+.3f})".format(*summary["auc_gain"])
        lines.append(f"AUC of the network minus that of the baseline: {gain}")
    return "\n".join(lines)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("file", type=Path, help="data set, split into Training, Validation and Test")
    add("--run-dir", type=Path, required=True, help="folder of the results")
    add("--epochs", type=int, default=10, help="passes over the training events (default: 10)")
    add("--batch-size", type=int, default=32, help="events per step (default: 32)")
    add("--seed", type=int, default=1, help="random seed of weights and order (default: 1)")
    add(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the boosted Hillas parameters, too (default: yes)",
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
