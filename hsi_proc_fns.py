"""Normalise cubes and cut them into patches: arrays in, arrays out.

Axis order (y, x, band) throughout. A spaxel is *usable* if enough of its spectrum was measured;
the others are zero in every normalised cube, do not enter its minimum and maximum, and are never
the centre of a patch.

    >>> usable = usable_spaxels(cube.flux)
    >>> normalised = normalise(cube.flux, "spectral")
    >>> patches = extract_patches(normalised, ys, xs, patch_size=7)      # label of spaxel (y, x)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import PATCH_NORMS, DataError

import numpy as np

LEAST_VARIANCE = 1e-12
"""Of a component; smaller ones are rounding errors and must not be divided by."""

MIN_MEASURED = 0.8
"""Share of bins a spectrum needs to be usable, as the DAP requires (header FSPCOV)."""


@dataclass
class Stats:
    """Statistics of a training split's spectra, each divided by its own mean."""

    wave: np.ndarray
    """(band,) float64, Angstrom."""
    mean: np.ndarray
    """(band,) float64, like `std`."""
    std: np.ndarray
    components: np.ndarray
    """(K, band) float64: principal components, orthonormal rows in order of decreasing variance."""
    explained_variance: np.ndarray
    """(K,) float64, like `explained_ratio`."""
    explained_ratio: np.ndarray
    recipe: Any
    """recipe.Recipe, with the options of the cubes under "cube"."""
    attrs: dict[str, Any] = field(default_factory=dict)
    """n_spaxels, n_galaxies, split_dir, provenance."""


def measured_bins(flux: np.ndarray) -> np.ndarray:
    """Count the measured bins of each spectrum (..., band); 0 if all of them are exactly 0."""
    finite = np.isfinite(flux)
    has_light = ((flux != 0) & finite).any(axis=-1)
    return np.where(has_light, finite.sum(axis=-1, dtype=np.uint16), np.uint16(0))


def usable_spaxels(flux: np.ndarray) -> np.ndarray:
    """Spaxels with enough measured bins and any light in them: (..., band), NaN in gaps -> bool."""
    return is_usable(measured_bins(flux), flux.shape[-1])


def is_usable(measured: np.ndarray, n_bands: int) -> np.ndarray:
    """Say for each spectrum whether the number of its measured bins is sufficient."""
    return measured >= max(1, MIN_MEASURED * n_bands)


def check_label_shape(labels: np.ndarray, spaxels: np.ndarray, path: Path) -> None:
    """Raise a DataError unless a label map and a map of its cube's spaxels have one shape."""
    if labels.shape != spaxels.shape:
        raise DataError(
            f"{path}: label map of {labels.shape} spaxels, expected {spaxels.shape} as in the "
            "cube. Re-run process_single_cube.py --overwrite."
        )


def field_of_view(inside: np.ndarray) -> np.ndarray:
    """Complete the field of view: the convex hull of the measured spaxels' centres.

    A fibre bundle covers a hexagon (Drory et al. 2015, AJ 149, 77); masked stars and dead fibres
    leave holes and dents in what was measured, `inside`. Both are (y, x) bool.
    """
    from scipy.spatial import ConvexHull  # here: only pictures need it

    if not inside.any():
        return inside.copy()
    # small diamonds around the centres: a hull even of one line, that contains all of its edge
    diamond = 1e-3 * np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])
    corners = (np.argwhere(inside)[:, None] + diamond).reshape(-1, 2)
    sides = ConvexHull(corners).equations  # each side: a y + b x + c <= 0 within
    distance = np.tensordot(sides[:, :2], np.indices(inside.shape), 1) + sides[:, 2, None, None]
    return (distance <= 0).all(axis=0)


def fill_gaps(spectra: np.ndarray) -> np.ndarray:
    """Bridge unmeasured bins (NaN) of each spectrum linearly; hold the end values beyond the ends.

    Spectra are (N, band); those without any finite bin stay NaN. Returns the input itself, not a
    copy, if nothing had to be filled.
    """
    gaps = ~np.isfinite(spectra)
    rows = np.flatnonzero(gaps.any(axis=1) & ~gaps.all(axis=1))
    if not rows.size:
        return spectra
    filled = spectra.copy()
    bins = np.arange(spectra.shape[1])
    for row in rows:
        gap = gaps[row]
        filled[row, gap] = np.interp(bins[gap], bins[~gap], spectra[row, ~gap])
    return filled


def unit_mean(spectra: np.ndarray) -> np.ndarray:
    """Divide each spectrum by the mean of its absolute values, so that brightness drops out.

    The absolute value keeps the divisor away from zero where the noise exceeds the light.
    """
    scale = np.abs(spectra).mean(axis=-1, keepdims=True)
    return np.divide(spectra, scale, out=np.zeros_like(spectra), where=scale > 0)


def normalise(
    flux: np.ndarray,
    patch_norm: str,
    stats: Stats | None = None,
    usable: np.ndarray | None = None,
) -> np.ndarray:
    """Scale a cube for a neural network.

    Parameters
    ----------
    flux : (y, x, band) array
        NaN where nothing was measured.
    patch_norm : {"global", "spatial", "spectral", "PCA"}
        global: one minimum and maximum for the cube, mapped to [0, 1]. spatial: one pair per band
        (over the spaxels). spectral: one pair per spaxel (over its bands). PCA: each spectrum is
        divided by its own mean, the training mean is subtracted, and the result is projected on
        the training split's principal components, each scaled to unit variance.
    stats : Stats, optional
        Needed for PCA.
    usable : (y, x) bool, optional
        Default: `usable_spaxels(flux)`.

    Returns
    -------
    (y, x, C) float32, finite
        C = band, or the number of components for PCA. Unusable spaxels are 0. Where minimum and
        maximum coincide the result is 0.

    Raises
    ------
    DataError
        Unknown norm; PCA without statistics or with those of another wavelength grid.
    """
    if patch_norm not in PATCH_NORMS:
        raise DataError(f"patch norm {patch_norm!r}: expected one of {', '.join(PATCH_NORMS)}.")
    if usable is None:
        usable = usable_spaxels(flux)
    spectra = fill_gaps(flux[usable])  # (N, band)
    if patch_norm == "PCA":
        values = project_pca(spectra, stats)
    else:
        axis = {"global": None, "spatial": 0, "spectral": 1}[patch_norm]
        values = _to_unit_range(spectra, axis)
    out = np.zeros((*flux.shape[:2], values.shape[1]), np.float32)
    out[usable] = values
    return out


def project_pca(spectra: np.ndarray, stats: Stats | None) -> np.ndarray:
    """Whitened principal components of spectra; (N, band) -> (N, K)."""
    if stats is None:
        raise DataError(
            "patch norm PCA: no statistics given; expected those of a split. Make them with "
            "calc_data_stats.py --split-dir NAME."
        )
    if spectra.shape[1] != stats.mean.size:
        raise DataError(
            f"cube of {spectra.shape[1]} bands, statistics of {stats.mean.size}: expected the same "
            "wavelength grid. Run calc_data_stats.py on cubes of this grid."
        )
    matrix = whitening(stats.components, stats.explained_variance).astype(np.float32)
    centred = unit_mean(spectra) - stats.mean.astype(np.float32)
    return centred.astype(np.float32) @ matrix.T


def whitening(components: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Scale principal components (K, band) so that projections on them have unit variance."""
    return components / np.sqrt(np.maximum(variance, LEAST_VARIANCE))[:, None]


def _to_unit_range(spectra: np.ndarray, axis: int | None) -> np.ndarray:
    """Map the range along `axis` to [0, 1]; a range of zero width to 0."""
    if not spectra.size:
        return spectra
    low = spectra.min(axis=axis, keepdims=True)
    width = spectra.max(axis=axis, keepdims=True) - low
    return np.divide(spectra - low, width, out=np.zeros_like(spectra), where=width > 0)


def band_slice(bands: tuple[int, int] | None, n_bands: int, where: object) -> slice:
    """Slice from the first band to the one before the last of `where`, which has `n_bands`."""
    if bands is None:
        return slice(None)
    low, high = bands
    if not 0 <= low < high <= n_bands:
        raise DataError(
            f"--bands {low} {high}: {where} has {n_bands} bands. Expected 0 <= first < last <= "
            f"{n_bands}."
        )
    return slice(low, high)


def extract_patches(
    cube: np.ndarray, ys: np.ndarray, xs: np.ndarray, patch_size: int
) -> np.ndarray:
    """Cut the patches, P = `patch_size` spaxels wide, around spaxels of a cube (y, x, C).

    Returns
    -------
    (N, P, P, C) array of the cube's type
        Spaxel (ys[i], xs[i]) is at [i, P//2, P//2]; zeros beyond the cube's edge.
    """
    if patch_size < 1:
        raise DataError(f"--patch-size {patch_size}: expected 1 or more.")
    margins = patch_size // 2, (patch_size - 1) // 2
    padded = np.pad(cube, (margins, margins, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (patch_size, patch_size), axis=(0, 1)
    )
    return np.moveaxis(windows[ys, xs], 1, 3)  # (N, C, P, P) -> (N, P, P, C)
