"""What a network is compared with: a linear regression on one spectrum, without its neighbours.

For matched filters, on classical line ratios (line_fits.py): ridge regression for metallicities in
dex, logistic regression for classes. For SSFTT, a logistic regression on principal components of
the same spectra. Either is one matrix, kept in the run's folder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import hsi_proc_fns
import line_fits
import matched_filter_net
import resample
from batches import PatchDataset
from labels import label_classes
from samples import PatchSpec

SOME_SPECTRA = 10_000
"""Spectra that a baseline is fitted to (more do not change its accuracy), and from which networks
start."""
COMPONENTS = 50
"""Principal components of the spectra."""
RIDGES = np.logspace(-2, 4, 13)
"""Strengths of the ridge that are tried."""


class Guess(NamedTuple):
    """What a baseline says of spectra."""

    classes: np.ndarray
    """(n,) int64."""
    logoh: np.ndarray | None
    """(n,) dex; None if it only gives classes."""


def name_of(spec: PatchSpec) -> str:
    """Name of the baseline for networks that learn from such samples."""
    return "line ratios" if spec.patch_norm == "residual" else "spectrum only"


def wave_of(cube_options: dict[str, Any]) -> np.ndarray:
    """Wavelengths of cubes made with these options, (band,) vacuum rest Angstrom."""
    grid = (cube_options[k] for k in ("wave_min", "wave_max", "n_band"))
    return resample.target_grid(*grid)[0]


def sample_spectra(
    dataset: PatchDataset, seed: int, n: int = SOME_SPECTRA
) -> tuple[np.ndarray, np.ndarray]:
    """Draw samples without replacement: rows (n,), ascending, and spectra (n, C) float32."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(dataset), size=min(n, len(dataset)), replace=False))
    return rows, dataset.centres(rows)


def terms_of(spectra: np.ndarray, spec: PatchSpec, wave: np.ndarray | None) -> np.ndarray:
    """Numbers of each spectrum (n, C) that the regression is linear in, (n, term) float64.

    The spectra themselves; for the norm residual the logarithms of line ratios and their products.
    """
    if spec.patch_norm != "residual":
        return spectra.astype(np.float64)
    assert wave is not None
    residual, weight, _ = matched_filter_net.split(torch.from_numpy(spectra))
    lines = line_fits.fit_lines(residual.double().numpy(), weight.double().numpy(), wave)
    ratios = line_fits.log_ratios(lines, [n for n in line_fits.RATIO_LINES if n in lines])
    first, second = np.triu_indices(ratios.shape[1])
    return np.concatenate([ratios, ratios[:, first] * ratios[:, second]], 1)


def fit(
    dataset: PatchDataset, seed: int, wave: np.ndarray | None, learns_dex: bool
) -> dict[str, Tensor]:
    """Fit the baseline to some training spectra.

    Parameters
    ----------
    dataset : PatchDataset
    seed : int
    wave : (band,) array, optional
        Needed for the norm residual.
    learns_dex : bool
        Whether metallicities are learned as values in dex.

    Returns
    -------
    dict of weight (class, term) and bias (class,)
        Scaling, principal components and regression are linear, so that one matrix combines them.
        Classes that do not occur get a bias of -inf. For values, there is one row.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression, RidgeCV

    rows, spectra = sample_spectra(dataset, seed)
    terms = terms_of(spectra, dataset.spec, wave)
    classes = dataset.samples.classes[rows]
    if dataset.spec.patch_norm == "residual":
        mean, scale = terms.mean(0), terms.std(0) + 1e-9
        whiten = np.diag(1 / scale)
    else:
        k = min(COMPONENTS, *terms.shape)
        pca = PCA(k, random_state=seed, whiten=True).fit(terms)
        mean = pca.mean_
        whiten = hsi_proc_fns.whitening(pca.components_, pca.explained_variance_)
    scaled = (terms - mean) @ whiten.T
    if learns_dex:
        model = RidgeCV(RIDGES).fit(scaled, dataset.samples.values[rows])
        weight, bias = model.coef_[None] @ whiten, np.atleast_1d(model.intercept_)
        bias = bias - weight @ mean
    else:
        n_classes = len(dataset.spec.class_names)
        weight, bias = np.zeros((n_classes, terms.shape[1])), np.full(n_classes, -np.inf)
        present = np.unique(classes)
        bias[present] = 0.0
        if present.size > 1:
            regression = LogisticRegression(max_iter=300).fit(scaled, classes)
            given = present[-len(regression.coef_) :]  # of two, the second against the first
            weight[given] = regression.coef_ @ whiten
            bias[given] = regression.intercept_ - weight[given] @ mean
    return {
        "weight": torch.from_numpy(weight.astype(np.float32)),
        "bias": torch.from_numpy(bias.astype(np.float32)),
    }


def apply(
    weights: dict[str, Tensor], spectra: np.ndarray, spec: PatchSpec, wave: np.ndarray | None
) -> Guess:
    """Apply a baseline to normalised spectra (n, C)."""
    out = terms_of(spectra, spec, wave) @ weights["weight"].numpy().T + weights["bias"].numpy()
    if out.shape[1] > 1:
        return Guess(out.argmax(1), None)
    return Guess(label_classes(out[:, 0], spec.label_task, spec.n_classes), out[:, 0])


def scores(
    train: PatchDataset,
    val: PatchDataset,
    weights: dict[str, Tensor] | None,
    wave: np.ndarray | None,
) -> dict[str, float]:
    """Score the majority class and the baseline on the validation part."""
    truth, values = val.samples.classes, val.samples.values
    counts = train.samples.class_counts(len(train.spec.class_names))
    found = {"val_majority_accuracy": float((truth == counts.argmax()).mean())}
    if weights is None:
        return found
    blocks = np.array_split(np.arange(len(val)), max(1, len(val) // SOME_SPECTRA))
    guesses = [apply(weights, val.centres(rows), val.spec, wave) for rows in blocks]
    name = "val_" + name_of(val.spec).replace(" ", "_")
    classes = np.concatenate([g.classes for g in guesses])
    found[f"{name}_accuracy"] = float((truth == classes).mean())
    if guesses[0].logoh is not None:
        logoh = np.concatenate([g.logoh for g in guesses if g.logoh is not None])
        found[f"{name}_mae_dex"] = float(np.abs(logoh - values).mean())
    return found
