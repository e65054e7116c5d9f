"""Scores of predicted classes: all spaxels together, each class, each galaxy, and their intervals.

Arrays and tables in, numbers out. The spaxels of one galaxy are not independent, so intervals come
from drawing galaxies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

N_BOOTSTRAP = 2000
INTERVAL = (0.025, 0.975)
"""Quantiles of the bootstrap intervals."""


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Count pairs of classes, (true class, predicted class) int."""
    pairs = np.asarray(truth, np.int64) * n_classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


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
    class_values: np.ndarray | None,
    label_median: float,
    seed: int = 0,
) -> tuple[dict[str, Any], np.ndarray, pd.DataFrame, pd.DataFrame]:
    """Score predictions: all spaxels together, each class, each galaxy.

    Parameters
    ----------
    frame : DataFrame
        One row per spaxel: plateifu, mangaid, value, true, predicted and, optionally,
        spectrum_only.
    class_names : sequence of str
    class_counts : sequence of int
        Training samples of each class.
    class_values : (class,) dex, or None
        12+log(O/H) that each class stands for; None for BPT.
    label_median : float
        Median label of the training samples.
    seed : int
        Random seed of the bootstrap.

    Returns
    -------
    overall : dict
        accuracy, macro_f1, kappa; majority_accuracy (of the training's majority class) and
        spectrum_accuracy; for metallicities mae_dex and rmse_dex of the predicted class's value
        against the label, and constant_mae_dex and constant_rmse_dex of the training median;
        `intervals`: 95 % of the bootstrap over galaxies, since the spaxels of one galaxy are not
        independent (a galaxy is a mangaid).
    confusion : (true class, predicted class) int
    per_class, per_galaxy : DataFrame
    """
    n, majority, values = len(class_names), int(np.argmax(class_counts)), class_values
    frame = frame.assign(majority=frame["true"] == majority)
    is_dex = values is not None
    if values is not None:
        frame["error"] = values[frame["predicted"]] - frame["value"]
        frame["constant_error"] = label_median - frame["value"]

    galaxies = {k: g for k, g in frame.groupby("plateifu", sort=False)}
    rows = []
    for plateifu, g in galaxies.items():
        confusion = confusion_matrix(g["true"], g["predicted"], n)
        row = {"plateifu": plateifu, "mangaid": g["mangaid"].iloc[0], "spaxels": len(g)}
        row |= {k: float(v) for k, v in overall_metrics(confusion).items()}
        row["majority_accuracy"] = g["majority"].mean()
        if is_dex:
            row |= _dex_errors(g)
        rows.append(row)

    confusion = confusion_matrix(frame["true"], frame["predicted"], n)
    overall: dict[str, Any] = {
        "galaxies": frame["mangaid"].nunique(),
        "spaxels": len(frame),
        **{k: float(v) for k, v in overall_metrics(confusion).items()},
        "majority_accuracy": float(frame["majority"].mean()),
    }
    if "spectrum_only" in frame:
        overall["spectrum_accuracy"] = float((frame["true"] == frame["spectrum_only"]).mean())
    if is_dex:
        overall |= _dex_errors(frame)
    overall["intervals"] = bootstrap_intervals(frame, n, seed)
    per_class = pd.DataFrame(class_metrics(confusion)).astype({"support": int})
    occurs = (confusion.sum(0) + confusion.sum(1)) > 0
    per_class.loc[~occurs, ["precision", "recall", "f1", "iou"]] = np.nan
    per_class.insert(0, "class", class_names)
    return overall, confusion, per_class, pd.DataFrame(rows)


def _dex_errors(frame: pd.DataFrame) -> dict[str, float]:
    """Mean absolute and root mean square error of the model and of the constant, dex."""
    out = {}
    for prefix, name in (("", "error"), ("constant_", "constant_error")):
        error = frame[name].to_numpy(float)
        out[f"{prefix}mae_dex"] = float(np.abs(error).mean())
        out[f"{prefix}rmse_dex"] = float(np.sqrt((error**2).mean()))
    return out


def bootstrap_intervals(
    frame: pd.DataFrame, n_classes: int, seed: int = 0, n_draws: int = N_BOOTSTRAP
) -> dict[str, list[float]]:
    """Estimate 95 % intervals of the scores by drawing galaxies with replacement.

    Parameters
    ----------
    frame : DataFrame
        mangaid, true, predicted and, for metallicities, error in dex; one row per spaxel.
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
    each = np.stack([confusion_matrix(g["true"], g["predicted"], n_classes) for g in groups])
    scores = overall_metrics(np.tensordot(draws, each, axes=1))
    if "error" in frame:
        sums = np.array([[len(g), g["error"].abs().sum(), (g["error"] ** 2).sum()] for g in groups])
        count, absolute, square = (draws @ sums).T
        scores |= {"mae_dex": absolute / count, "rmse_dex": np.sqrt(square / count)}
    defined = {k: v[np.isfinite(v)] for k, v in scores.items()}
    return {k: np.quantile(v, INTERVAL).tolist() for k, v in defined.items() if v.size}
