"""Accuracy of this SSFTT on Indian Pines: three splits, simple baselines, and the dense map.

Reads   the scene in the PyPI package tensorly (pip install tensorly==0.10.0): 145 x 145 pixels,
        200 bands, 16 classes on 10,249 labelled pixels (Baumgardner, Biehl & Landgrebe 2015,
        doi:10.4231/R7RX991C, CC BY 3.0).
Writes  results/bench/bench_indian_pines.json.

Protocol of Sun et al. 2022 (IEEE TGRS 60, 5522214): whitened PCA of all pixels to 30 components,
patches of 13 x 13 with zeros beyond the image, 10 % of the labelled pixels to train, Adam at 1e-3,
batches of 64, 100 epochs, no augmentation; the network after the last epoch is scored.

Splits, all with 10 % of each class's pixels to train:
  published      drawn anywhere, always the same pixels (seed 345, as in the authors' demo); the
                 rest is tested. Only the network varies with the seed.
  random pixels  the same, drawn again for every seed.
  whole fields   a field is a set of pixels of one class connected through their sides. Of each
                 class with n >= 2 fields, n // 2 drawn at random are tested, every pixel of them;
                 the training pixels are drawn from its other fields. A class with a single field
                 is trained on, and not tested. A patch may extend beyond the edge of its field;
                 the pixels there are seen without their labels.

The first two leak: the patch of nearly every test pixel contains training pixels. So the network is
compared with three baselines that learn from the same training pixels: the class of the nearest
training pixel by (row, column), without spectra; a support vector machine on the pixel's own
spectrum, without neighbours; and the most common training class.

The map of the whole image is timed as well: SSFTT_dense.dense_logits against the network on all
21,025 patches (cut beforehand), in turn in one run. For every trained network both maps are
compared pixel by pixel. About ten minutes on two cores.

    python benchmarks/bench_indian_pines.py
    python benchmarks/bench_indian_pines.py --seeds 0 --epochs 20
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import measuring
import utils
from measuring import Row, make_row
from utils import DataError

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

import hsi_proc_fns
import metrics
import SSFTT_dense
from HSI_SSFTT import SSFTT, get_SSFTT_model
from labels import LABEL_NONE

log = logging.getLogger(__name__)

TRAIN_SHARE = 0.1
COMPONENTS = 30
PATCH_SIZE = 13
LEARNING_RATE = 1e-3
BATCH = 64
"""The published protocol (Sun et al. 2022, section III)."""

PUBLISHED_SEED = 345
"""Seed of scikit-learn's stratified split in the authors' public demo."""

PUBLISHED = {"OA": 98.62, "AA": 97.94, "kappa": 98.43}
"""Per cent, from the log in the authors' public repository; for comparison, not measured here."""

MAP_BATCH = 128
"""Patches at a time in evaluation: the fastest on two cores of 64 to 1024."""

SVM_C = 100.0
"""Penalty of the support vector machine (radial kernel, bands scaled to unit variance)."""

METRICS = ("OA", "AA", "kappa")


@dataclass(frozen=True)
class Config(measuring.Options):
    """Accuracy of this SSFTT on Indian Pines: three splits, simple baselines, and the dense map."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds; each decides the splits, initial weights, dropout and order of the pixels."""
    epochs: int = 100
    """Passes over the training pixels."""
    runs: int = 5
    """Timed runs of each map, after one that is not counted."""


class Scene(NamedTuple):
    """An image with a class for some of its pixels."""

    spectra: np.ndarray
    """(y, x, band) float32."""
    truth: np.ndarray
    """(y, x) int64 classes from 0, LABEL_NONE where there is no label."""


class Split(NamedTuple):
    """Flat pixel numbers y * nx + x; no pixel is in both."""

    train: np.ndarray
    test: np.ndarray


# Data


def load_scene() -> Scene:
    """Load Indian Pines from the package that contains it.

    Raises
    ------
    DataError
        If the package is not installed.
    """
    try:
        from tensorly.datasets import load_indian_pines
    except ImportError:
        raise DataError(
            "the package tensorly, which contains Indian Pines, is not installed. Install it: "
            "pip install tensorly==0.10.0"
        ) from None
    found = load_indian_pines()
    truth = np.asarray(found.ticks[0]).astype(np.int64) - 1  # 0 is "no label" there
    return Scene(np.asarray(found.tensor, np.float32), np.where(truth < 0, LABEL_NONE, truth))


def whiten(spectra: np.ndarray, components: int = COMPONENTS) -> np.ndarray:
    """Leading principal components of all pixels, each of unit variance.

    (y, x, band) -> (y, x, components) float32. As in the published protocol, the test pixels
    contribute to the components (their classes do not).
    """
    pixels = spectra.reshape(-1, spectra.shape[-1]).astype(np.float64)
    values = PCA(components, whiten=True, svd_solver="full").fit_transform(pixels)
    return values.reshape(*spectra.shape[:2], components).astype(np.float32)


def cut_patches(image: np.ndarray, patch_size: int = PATCH_SIZE) -> Tensor:
    """Patches (y * x, 1, C, P, P) around all pixels of (y, x, C), row by row."""
    ys, xs = np.indices(image.shape[:2]).reshape(2, -1)
    patches = hsi_proc_fns.extract_patches(image, ys, xs, patch_size)
    return torch.from_numpy(patches).permute(0, 3, 1, 2)[:, None].contiguous()


# Splits


def split_random(truth: np.ndarray, seed: int, share: float = TRAIN_SHARE) -> Split:
    """Draw a share of each class's pixels to train, anywhere; test all others."""
    labelled = np.flatnonzero(truth != LABEL_NONE)
    train, test = train_test_split(
        labelled, test_size=1 - share, stratify=truth.flat[labelled], random_state=seed
    )
    return Split(train, test)


def find_fields(truth: np.ndarray) -> np.ndarray:
    """Assign each field of (y, x) classes a number, from 0.

    A field is a set of pixels of one class connected through their sides; LABEL_NONE where there
    is no label.
    """
    fields = np.full(truth.shape, LABEL_NONE, np.int64)
    count = 0
    for k in range(truth.max() + 1):
        numbers, found = ndimage.label(truth == k)
        fields[numbers > 0] = numbers[numbers > 0] - 1 + count
        count += found
    return fields


def split_by_field(truth: np.ndarray, seed: int, share: float = TRAIN_SHARE) -> Split:
    """Hold out whole fields.

    Parameters
    ----------
    truth : (y, x) classes, LABEL_NONE where there is none
    seed : int
    share : float
        Training pixels of a class as a fraction of all its pixels; fewer if its training fields
        contain fewer.

    Returns
    -------
    Split
        Of a class with n fields, n // 2 drawn at random are tested, every pixel of them; the
        training pixels are drawn from the others. So a class with one field is never tested.
    """
    rng = np.random.default_rng(seed)
    fields, classes = find_fields(truth).ravel(), truth.ravel()
    train, test = [], []
    for k in range(truth.max() + 1):
        pixels = np.flatnonzero(classes == k)
        numbers = rng.permutation(np.unique(fields[pixels]))
        is_test = np.isin(fields[pixels], numbers[: len(numbers) // 2])
        test.append(pixels[is_test])
        wanted = max(1, round(share * len(pixels)))
        train.append(rng.permutation(pixels[~is_test])[:wanted])
    return Split(np.concatenate(train), np.concatenate(test))


SPLITS: dict[str, Callable[[np.ndarray, int], Split]] = {
    "published": lambda truth, seed: split_random(truth, PUBLISHED_SEED),
    "random pixels": split_random,
    "whole fields": split_by_field,
}


def share_seeing_training(
    split: Split, shape: tuple[int, int], patch_size: int = PATCH_SIZE
) -> float:
    """Share of the test pixels with a training pixel inside their patch (odd sizes)."""
    is_train = np.zeros(shape, bool)
    is_train.flat[split.train] = True
    near = ndimage.maximum_filter(is_train, size=patch_size, mode="constant")
    return float(near.flat[split.test].mean())


# Methods: each learns from split.train and predicts the class of every pixel of split.test


def nearest_pixel(truth: np.ndarray, split: Split) -> np.ndarray:
    """Predict the class of the nearest training pixel by (row, column)."""
    where = np.indices(truth.shape).reshape(2, -1).T
    nearest = KNeighborsClassifier(1).fit(where[split.train], truth.flat[split.train])
    return nearest.predict(where[split.test])


def single_spectrum(scene: Scene, split: Split) -> np.ndarray:
    """Predict by a support vector machine on the pixel's own spectrum, without neighbours."""
    pixels = scene.spectra.reshape(-1, scene.spectra.shape[-1])
    machine = make_pipeline(StandardScaler(), SVC(C=SVM_C))
    machine.fit(pixels[split.train], scene.truth.flat[split.train])
    return machine.predict(pixels[split.test])


def commonest_class(truth: np.ndarray, split: Split) -> np.ndarray:
    """Predict the class with the most training pixels everywhere."""
    return np.full(len(split.test), np.bincount(truth.flat[split.train]).argmax())


def train_network(
    patches: Tensor, classes: Tensor, n_classes: int, epochs: int, seed: int, title: str = ""
) -> SSFTT:
    """Train as published; return the network after the last epoch, in evaluation mode.

    Parameters
    ----------
    patches : (N, 1, C, P, P)
        Patches of the training pixels.
    classes : (N,) int64
    n_classes, epochs, seed : int
    title : str
        Title of the progress bar.

    Raises
    ------
    DataError
        If the loss is not finite.
    """
    torch.manual_seed(seed)
    model = get_SSFTT_model(n_classes, patches.shape[-1], patches.shape[2])
    optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    bar = tqdm(range(epochs), desc=title, unit="epoch", disable=None, leave=False)
    for epoch in bar:
        total = 0.0
        for rows in torch.randperm(len(patches)).split(BATCH):
            loss = F.cross_entropy(model(patches[rows]), classes[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(rows)
        if not np.isfinite(total):
            raise DataError(
                f"{title}: the loss of epoch {epoch + 1} is {total}, expected a finite number."
            )
        bar.set_postfix(loss=f"{total / len(patches):.4f}")
    return model.eval()


@torch.inference_mode()
def map_patches(model: SSFTT, patches: Tensor) -> Tensor:
    """Logits (N, classes) of patches, MAP_BATCH at a time."""
    return torch.cat([model(part) for part in patches.split(MAP_BATCH)])


@torch.inference_mode()
def map_dense(model: SSFTT, cutout: Tensor) -> Tensor:
    """Logits (y * x, classes) of one cutout (1, 1, C, y, x)."""
    return SSFTT_dense.dense_logits(model, cutout)[0].flatten(1).T


# Scores


def score(truth: np.ndarray, predicted: np.ndarray, n_classes: int) -> dict[str, float]:
    """OA, AA and kappa in per cent; AA is the mean recall over the classes in `truth`."""
    confusion = metrics.confusion_matrix(truth, predicted, n_classes)
    overall, each = metrics.overall_metrics(confusion), metrics.class_metrics(confusion)
    average = each["recall"][each["support"] > 0].mean()
    values = overall["accuracy"], average, overall["kappa"]
    return {name: 100 * float(value) for name, value in zip(METRICS, values, strict=True)}


def compare_maps(patch_wise: Tensor, dense: Tensor) -> dict[str, float]:
    """Compare the logits (N, classes) of two maps.

    Returns
    -------
    dict
        differing_pixels: number of pixels with another class. largest_margin: the largest
        difference, among those pixels, between the two largest patch-wise logits (0 without any).
        logit_difference: the largest difference between the maps. The last two are relative to
        the largest |logit|.
    """
    scale = patch_wise.abs().max()
    differ = patch_wise.argmax(1) != dense.argmax(1)
    best = patch_wise[differ].topk(2, dim=1).values
    margin = (best[:, 0] - best[:, 1]).max() / scale if len(best) else torch.tensor(0.0)
    return {
        "differing_pixels": int(differ.sum()),
        "largest_margin": float(margin),
        "logit_difference": float((patch_wise - dense).abs().max() / scale),
    }


def summarise(values: list[float]) -> dict[str, Any]:
    """Mean over the seeds, standard deviation (n - 1; None for one value), and the values."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "values": values}


# Work


class Bench(NamedTuple):
    """What every seed needs."""

    scene: Scene
    patches: Tensor
    """(y * x, 1, C, P, P), of all pixels, row by row."""
    cutout: Tensor
    """(1, 1, C, y, x), the whole image."""


def prepare() -> Bench:
    """Load the scene, reduce it to its components, cut the patches."""
    scene = load_scene()
    image = whiten(scene.spectra)
    cutout = torch.from_numpy(image).permute(2, 0, 1)[None, None].contiguous()
    return Bench(scene, cut_patches(image), cutout)


def run_split(bench: Bench, name: str, seed: int, epochs: int) -> tuple[SSFTT, dict[str, Any]]:
    """Train on one split with one seed, score every method, and compare both maps.

    Returns
    -------
    SSFTT
        The trained network.
    dict
        trained_pixels, tested_pixels, tested_classes; seeing_training: `share_seeing_training`;
        training_s; scores of each method; maps: `compare_maps`.
    """
    truth, n_classes = bench.scene.truth, int(bench.scene.truth.max()) + 1
    split = SPLITS[name](truth, seed)
    classes = torch.from_numpy(truth.flat[split.train])
    title, start = f"seed {seed}, {name}", time.perf_counter()
    model = train_network(bench.patches[split.train], classes, n_classes, epochs, seed, title)
    training_s = time.perf_counter() - start
    logits = map_patches(model, bench.patches)
    predicted = {
        "SSFTT": logits.argmax(1).numpy()[split.test],
        "nearest (row, column)": nearest_pixel(truth, split),
        "SVM on the spectrum": single_spectrum(bench.scene, split),
        "most common class": commonest_class(truth, split),
    }
    tested = truth.flat[split.test]
    scores = {method: score(tested, found, n_classes) for method, found in predicted.items()}
    log.info("%s: OA %.2f %%, trained in %.0f s", title, scores["SSFTT"]["OA"], training_s)
    return model, {
        "seed": seed,
        "trained_pixels": len(split.train),
        "tested_pixels": len(split.test),
        "tested_classes": len(np.unique(tested)),
        "seeing_training": share_seeing_training(split, truth.shape),
        "training_s": training_s,
        "scores": scores,
        "maps": compare_maps(logits, map_dense(model, bench.cutout)),
    }


Scores = dict[str, dict[str, dict[str, Any]]]
"""Method -> metric -> `summarise`."""


def summarise_scores(found: list[dict[str, Any]]) -> Scores:
    """Mean and spread over the seeds of one split."""
    return {
        method: {m: summarise([one["scores"][method][m] for one in found]) for m in METRICS}
        for method in found[0]["scores"]
    }


def describe_split(name: str, found: list[dict[str, Any]]) -> str:
    """Lay out the scores of one split as a table, one line per method."""
    one = found[0]
    seen = 100 * statistics.fmean(f["seeing_training"] for f in found)
    lines = [
        f"{name}: {one['trained_pixels']} training pixels, {one['tested_pixels']} test pixels of "
        f"{one['tested_classes']} classes (seed {one['seed']}); {seen:.1f} % of the test pixels "
        "have a training pixel in their patch",
        f"{'':26}" + "".join(f"{metric + ' %':>18}" for metric in METRICS),
    ]
    for method, values in summarise_scores(found).items():
        cells = [
            f"{v['mean']:.2f}" + ("" if v["std"] is None else f" +- {v['std']:.2f}")
            for v in values.values()
        ]
        lines.append(f"  {method:24}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def make_rows(scores: dict[str, Scores], seconds: dict[str, float], pixels: int) -> list[Row]:
    """Rows of the table: accuracies of the splits, and the rates of both maps."""
    baselines = {"coordinates": "nearest (row, column)", "spectrum": "SVM on the spectrum"}
    rows = [
        make_row(
            f"indian_pines_{split.replace(' ', '_')}_vs_{short}",
            methods["SSFTT"]["OA"]["mean"],
            methods[baseline]["OA"]["mean"],
            "% OA",
            baseline,
        )
        for split, methods in scores.items()
        for short, baseline in baselines.items()
    ]
    dense, patch_wise = (pixels / seconds[way] for way in ("dense", "patch_wise"))
    return [*rows, make_row("indian_pines_dense_map", dense, patch_wise, "pixels/s", "patch-wise")]


def main(config: Config) -> int:
    """Train, score, time, print, write."""
    if not config.seeds or min(config.epochs, config.runs) < 1:
        raise DataError("--seeds, --epochs, --runs: expected at least one of each.")
    bench = prepare()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for seed in config.seeds:
        for name in SPLITS:
            model, result = run_split(bench, name, seed, config.epochs)
            found[name].append(result)
    works = {
        "patch_wise": lambda: map_patches(model, bench.patches),
        "dense": lambda: map_dense(model, bench.cutout),
    }
    seconds = measuring.in_turn(works, config.runs)
    maps = [one["maps"] for results in found.values() for one in results]
    worst = {key: max(m[key] for m in maps) for key in maps[0]}

    print(f"Indian Pines, {config.epochs} epochs, seeds {' '.join(map(str, config.seeds))}")
    for name, results in found.items():
        print(describe_split(name, results))
        if name == "published":
            cells = "".join(f"{PUBLISHED[metric]:18.2f}" for metric in METRICS)
            print(f"  {'(SSFTT, authors log)':24}{cells}")
    print(
        f"dense against patch-wise maps, worst of {len(maps)} trained networks: another class in "
        f"{worst['differing_pixels']} pixels (margin {worst['largest_margin']:.1e}), logits "
        f"differ by {worst['logit_difference']:.1e} of the largest"
    )
    scores = {name: summarise_scores(results) for name, results in found.items()}
    rows = make_rows(scores, seconds, len(bench.patches))
    measuring.print_rows(rows)
    measuring.write_rows(
        config.results / "bench_indian_pines.json",
        rows,
        scores=scores,
        runs=found,
        map_seconds=seconds,
        published=PUBLISHED,
        config=utils.config_dict(config),
    )
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
