"""Scores of predicted classes: all spaxels together, each class, each galaxy, and their intervals.

Arrays and tables in, numbers out. The spaxels of one galaxy are not independent, so intervals come
from drawing galaxies; those of one bin share one label and have a weight of 1 together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

N_BOOTSTRAP = 2000
INTERVAL = (0.025, 0.975)
"""Quantiles of the bootstrap intervals."""


def confusion_matrix(
    truth: np.ndarray, predicted: np.ndarray, n_classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Count pairs of classes, (true class, predicted class) int; float with weights."""
    pairs = np.asarray(truth, np.int64) * n_classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, weights, n_classes**2).reshape(n_classes, n_classes)


def bin_weights(frame: pd.DataFrame) -> np.ndarray:
    """Weights with which every bin counts once: 1 / number of its spaxels in the table.

    `frame` has one row per spaxel, with the columns plateifu and bin.
    """
    return 1 / frame.groupby(["plateifu", "bin"])["bin"].transform("size").to_numpy(float)


def class_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1, intersection over union and support of each class.

    Parameters
    ----------
    confusion : (..., true class, predicted class) array

    Returns
    -------
    dict of (..., class) arrays; 0 where a denominator is 0.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    true, predicted = confusion.sum(-1).astype(float), confusion.sum(-2).astype(float)

    def ratio(over: np.ndarray) -> np.ndarray:
        return np.divide(hits, over, out=np.zeros_like(hits), where=over > 0)

    return {
        "precision": ratio(predicted),
        "recall": ratio(true),
        "f1": ratio((true + predicted) / 2),
        "iou": ratio(true + predicted - hits),
        "support": true,
    }


def overall_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, macro F1 and Cohen's kappa.

    Parameters
    ----------
    confusion : (..., true class, predicted class) array, not empty

    Returns
    -------
    dict of (...) arrays
        The macro F1 is the mean over the classes that occur in truth or prediction. Kappa
        (Cohen 1960, eq. 1) is NaN if chance agreement is complete, as with a single class.
    """
    total = confusion.sum((-2, -1)).astype(float)
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    accuracy = np.diagonal(confusion, axis1=-2, axis2=-1).sum(-1) / total
    occurs = (true + predicted) > 0
    f1 = class_metrics(confusion)["f1"].sum(-1) / occurs.sum(-1)
    chance = (true * predicted).sum(-1) / total**2
    undefined = np.full_like(accuracy, np.nan)
    kappa = np.divide(accuracy - chance, 1 - chance, out=undefined, where=chance < 1)
    return {"accuracy": accuracy, "macro_f1": f1, "kappa": kappa}


def score_predictions(
    frame: pd.DataFrame,
    class_names: Sequence[str],
    class_counts: Sequence[int],
    label_median: float,
    seed: int = 0,
) -> tuple[dict[str, Any], np.ndarray, pd.DataFrame, pd.DataFrame]:
    """Score predictions: all spaxels together, each class, each galaxy.

    Parameters
    ----------
    frame : DataFrame
        One row per spaxel: plateifu, mangaid, value, true, predicted; for metallicities logoh and
        optionally the ends of intervals (lower_0.9, upper_0.9, ...), dex; optionally baseline,
        baseline_logoh, and weight (of `bin_weights`) in all scores and counts but `spaxels`.
    class_names : sequence of str
    class_counts : sequence of int
        Training samples of each class.
    label_median : float
        Median label of the training samples.
    seed : int
        Random seed of the bootstrap.

    Returns
    -------
    overall : dict
        accuracy, macro_f1, kappa; majority_accuracy (of the training's majority class) and
        baseline_accuracy; for metallicities mae_dex and rmse_dex of logoh against the label, the
        same of the baseline and of the training median (constant_mae_dex, ...), and coverage, the
        fraction of labels in the intervals of each level;
        `intervals`: 95 % of the bootstrap over galaxies, since the spaxels of one galaxy are not
        independent (a galaxy is a mangaid); `bins`, the sum of the weights, if there are any.
    confusion : (true class, predicted class) int
    per_class, per_galaxy : DataFrame
    """
    n = len(class_names)
    frame = frame.assign(majority=frame["true"] == int(np.argmax(class_counts)))
    if "logoh" in frame:
        frame["error"] = frame["logoh"] - frame["value"]
        frame["constant_error"] = label_median - frame["value"]
    if "baseline_logoh" in frame:
        frame["baseline_error"] = frame["baseline_logoh"] - frame["value"]

    confusion = confusion_matrix(frame["true"], frame["predicted"], n, frame.get("weight"))
    overall: dict[str, Any] = {"galaxies": frame["mangaid"].nunique(), **_scores(frame, n)}
    if "baseline" in frame:
        overall["baseline_accuracy"] = _mean(frame, frame["true"] == frame["baseline"])
    if "logoh" in frame:
        overall["coverage"] = {
            k: _mean(frame, frame["value"].between(frame[f"lower_{k}"], frame[f"upper_{k}"]))
            for k in (name.removeprefix("lower_") for name in frame if name.startswith("lower_"))
            if np.isfinite(frame[f"lower_{k}"]).all()
        }
    overall["intervals"] = bootstrap_intervals(frame, n, seed)
    per_class = pd.DataFrame(class_metrics(confusion))
    per_class[confusion.sum(0) + confusion.sum(1) == 0] = np.nan
    per_class["support"] = confusion.sum(1).round().astype(int)
    per_class.insert(0, "class", class_names)
    per_galaxy = [
        {"plateifu": plateifu, "mangaid": g["mangaid"].iloc[0], **_scores(g, n)}
        for plateifu, g in frame.groupby("plateifu", sort=False)
    ]
    return overall, confusion, per_class, pd.DataFrame(per_galaxy)


def _scores(frame: pd.DataFrame, n_classes: int) -> dict[str, float]:
    """Scores of the spaxels of a table: their number (and of bins), classes, errors in dex."""
    weight = frame.get("weight")
    confusion = confusion_matrix(frame["true"], frame["predicted"], n_classes, weight)
    scores: dict[str, float] = {"spaxels": len(frame)}
    if weight is not None:
        scores["bins"] = round(weight.sum())
    scores |= {k: float(v) for k, v in overall_metrics(confusion).items()}
    scores["majority_accuracy"] = _mean(frame, frame["majority"])
    for prefix in ("", "constant_", "baseline_"):
        if f"{prefix}error" in frame:
            error = frame[f"{prefix}error"].to_numpy(float)
            scores[f"{prefix}mae_dex"] = _mean(frame, np.abs(error))
            scores[f"{prefix}rmse_dex"] = float(np.sqrt(_mean(frame, error**2)))
    return scores


def _mean(frame: pd.DataFrame, values: Any) -> float:
    """Mean over the spaxels of a table, with their weights if there are any."""
    return float(np.average(values, weights=frame.get("weight")))


def bootstrap_intervals(
    frame: pd.DataFrame, n_classes: int, seed: int = 0, n_draws: int = N_BOOTSTRAP
) -> dict[str, list[float]]:
    """Estimate 95 % intervals of the scores by drawing galaxies with replacement.

    Parameters
    ----------
    frame : DataFrame
        mangaid, true, predicted and, for metallicities, error in dex; one row per spaxel, and
        optionally its weight.
    n_classes, seed, n_draws : int

    Returns
    -------
    dict of score -> [low, high]
        Percentile intervals (Efron 1979); empty for a single galaxy.
    """
    groups = [g for _, g in frame.groupby("mangaid", sort=True)]
    if len(groups) < 2:
        return {}
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=n_draws)
    each = [confusion_matrix(g["true"], g["predicted"], n_classes, g.get("weight")) for g in groups]
    scores = overall_metrics(np.tensordot(draws, np.stack(each), axes=1))
    if "error" in frame:
        weight = frame.get("weight", pd.Series(1.0, frame.index))
        moments = pd.DataFrame({k: weight * frame["error"].abs() ** k for k in range(3)})
        sums = moments.groupby(frame["mangaid"], sort=True).sum().to_numpy()
        count, absolute, square = (draws @ sums).T
        scores |= {"mae_dex": absolute / count, "rmse_dex": np.sqrt(square / count)}
    defined = {k: v[np.isfinite(v)] for k, v in scores.items()}
    return {k: np.quantile(v, INTERVAL).tolist() for k, v in defined.items() if v.size}
