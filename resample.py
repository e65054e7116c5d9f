"""Resample spectra from one wavelength grid to another, conserving flux, with masks and errors.

Arrays in, arrays out: spectra (band, spaxel) in, (spaxel, band) out; wavelengths in Angstrom.

A spectrum is a step function: constant flux density within each pixel. The flux density of a target
bin is the mean over the part of its width that good pixels cover:

    f_j = sum_i o_ij g_i f_i / sum_i o_ij g_i       o_ij: overlap of bin j with pixel i, Angstrom
    1/ivar_j = sum_i (o_ij g_i)^2 / ivar_i / (sum_i o_ij g_i)^2         g_i: 1 if good, else 0
    good_j = sum_i o_ij g_i / width_j

so the integral over wavelength is conserved where all pixels are good, and the value of a bad pixel
has no influence (same principle: Carnall 2017, arXiv:1705.05165, eqs. 3-4). The overlaps form one
sparse matrix for a whole cube, or a list for each spectrum that has a redshift of its own.
Neighbouring bins share pixels, so their errors are correlated; only the variances are computed.

    >>> wave, bins = target_grid(5000, 8000, 2040)
    >>> matrix = overlap_matrix(log_edges(3.5589, 1e-4, 4563) / (1 + z), bins)
    >>> flux, ivar, good = resample_spectra(flux, ivar, bad, matrix, np.diff(bins), 1 + z)
"""

from __future__ import annotations

from utils import DataError

import numpy as np
from scipy import sparse

MIN_GOOD_FRACTION = 1e-6
"""A bin with less than this fraction of its width on good pixels is empty but for rounding."""

HALF_BELOW_ONE = 1 - 2.0**-12
"""Smallest number that is rounded to 1 in float16."""


def log_edges(log_first: float, log_step: float, n: int) -> np.ndarray:
    """Edges (n + 1,) of n pixels whose centres are 10**(log_first + log_step * i)."""
    return 10 ** (log_first + log_step * (np.arange(n + 1) - 0.5))


def target_grid(wave_min: float, wave_max: float, n_band: int) -> tuple[np.ndarray, np.ndarray]:
    """Bins of equal logarithmic width that fill a wavelength range exactly.

    Returns
    -------
    wave : (n_band,) float64
        Geometric bin centres, Angstrom.
    edges : (n_band + 1,) float64
        From wave_min to wave_max.
    """
    if not (0 < wave_min < wave_max and n_band > 0):
        raise DataError(
            f"wavelength grid of {n_band} bins from {wave_min:g} to {wave_max:g} Angstrom: "
            "expected 0 < --wave-min < --wave-max and --n-band > 0. Correct these options."
        )
    edges = np.geomspace(wave_min, wave_max, n_band + 1)
    return np.sqrt(edges[:-1] * edges[1:]), edges


def overlaps(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the overlaps of target bins with source pixels, in order; about m + n of them.

    Parameters
    ----------
    source : (n + 1,) array
        Pixel edges, increasing, Angstrom.
    target : (m + 1,) array
        Bin edges, increasing, Angstrom.

    Returns
    -------
    bins, pixels : (k,) int
        Which bin overlaps which pixel.
    widths : (k,) float64
        By how much, Angstrom; above 0.
    """
    # The edges of both grids cut the axis into pieces, each within one pixel and one bin.
    edges = np.concatenate((target, source))
    order = np.argsort(edges, kind="stable")  # merges the two
    widths = np.diff(edges[order])
    bins = np.cumsum(order < target.size)[:-1] - 1
    pixels = np.arange(bins.size) - bins - 1
    inside = (bins >= 0) & (bins < target.size - 1) & (pixels >= 0) & (pixels < source.size - 1)
    inside &= widths > 0
    return bins[inside], pixels[inside], widths[inside]


def overlap_matrix(source: np.ndarray, target: np.ndarray) -> sparse.csr_array:
    """Make `overlaps` a matrix: (m, n) CSR float64, Angstrom."""
    bins, pixels, widths = overlaps(source, target)
    shape = (target.size - 1, source.size - 1)
    return sparse.csr_array((widths, (bins, pixels)), shape=shape)


def used_pixels(matrix: sparse.csr_array) -> slice:
    """Range of the source pixels that overlap any bin; the other pixels need not be read."""
    if not matrix.nnz:
        return slice(0, 0)
    return slice(int(matrix.indices.min()), int(matrix.indices.max()) + 1)


def resample_spectra(
    flux: np.ndarray,
    ivar: np.ndarray,
    bad: np.ndarray,
    matrix: sparse.csr_array,
    widths: np.ndarray,
    factor: np.ndarray | float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resample many spectra from one common grid to another.

    Parameters
    ----------
    flux, ivar : (n, N) array
        Flux density and its inverse variance, one spectrum per column, any float type.
    bad : (n, N) bool
        Pixels to ignore. Pixels whose flux is not finite, or whose ivar is not finite and positive,
        must be among them.
    matrix : (m, n) CSR
        From `overlap_matrix`.
    widths : (m,) array
        Widths of the target bins, Angstrom.
    factor : (n,) array or float
        Factor on the flux of each source pixel, such as dereddening or (1 + z); ivar is divided by
        its square.

    Returns
    -------
    flux : (N, m) float32
        NaN in bins without a good pixel.
    ivar : (N, m) float32
        0 in bins without a good pixel; always finite.
    good : (N, m) float16
        Fraction of the bin's width covered by good pixels.
    """
    out = _empty_spectra(flux.shape[1], widths.size)
    used = np.flatnonzero(~bad.all(axis=0))
    if not used.size:
        return out
    span = slice(used[0], used[-1] + 1)
    value, variance, is_good = _prepare(flux[:, span], ivar[:, span], bad[:, span])
    scaled = matrix.copy()
    scaled.data *= np.broadcast_to(factor, matrix.shape[1])[matrix.indices]
    sums = matrix @ is_good, scaled @ value, scaled.power(2) @ variance
    for whole, found in zip(out, _divide(widths[:, None], *sums), strict=True):
        whole[span] = found.T
    return out


def _empty_spectra(n: int, n_band: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make flux, ivar and good fraction of n spectra without a good pixel."""
    shape = (n, n_band)
    return np.full(shape, np.nan, "f4"), np.zeros(shape, "f4"), np.zeros(shape, "f2")


def _prepare(flux: np.ndarray, ivar: np.ndarray, bad: np.ndarray) -> tuple[np.ndarray, ...]:
    """Make float64 flux, variance and 1 for good, all 0 in bad pixels, of the same shape."""
    with np.errstate(divide="ignore", over="ignore"):
        variance = (1 / ivar).astype(float)
    variance[bad] = 0.0
    value = flux.astype(float)
    value[bad] = 0.0
    return value, variance, (~bad).astype(float)


def _divide(
    widths: np.ndarray, covered: np.ndarray, total: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make flux, ivar and good fraction of the three sums over pixels, all of one shape.

    `widths` are those of the bins, in the unit of `covered`, which is changed.
    """
    empty = covered < MIN_GOOD_FRACTION * widths
    covered[empty] = np.nan
    with np.errstate(divide="ignore", over="ignore"):
        inverse = (np.square(covered) / noise).astype("f4")
    inverse[~np.isfinite(inverse)] = 0
    fraction, good = covered / widths, np.ones(covered.shape, "f2")
    partly = ~(fraction >= HALF_BELOW_ONE)  # NaN too; rounding to float16 is slow, all others are 1
    good[partly] = np.where(empty[partly], 0.0, fraction[partly])
    return total / covered, inverse, good


def resample_shifted(
    flux: np.ndarray,
    ivar: np.ndarray,
    bad: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    one_plus_z: np.ndarray,
    factor: np.ndarray | float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resample spectra that each have their own redshift.

    The other arguments and the result are those of `resample_spectra`.

    Parameters
    ----------
    source : (n + 1,) array
        Observed pixel edges, Angstrom.
    target : (m + 1,) array
        Rest-frame bin edges, Angstrom.
    one_plus_z : (N,) array
        Observed over rest-frame wavelength of each spectrum; its flux density is multiplied by it,
        besides `factor`.
    """
    widths, factor = np.diff(target), np.broadcast_to(factor, source.size - 1)
    out = _empty_spectra(flux.shape[1], widths.size)
    for i in np.flatnonzero(~bad.all(axis=0)):
        bins, pixels, overlap = overlaps(source / one_plus_z[i], target)
        value, variance, is_good = _prepare(flux[:, i], ivar[:, i], bad[:, i])
        scaled = overlap * (factor * one_plus_z[i])[pixels]
        terms = overlap * is_good[pixels], scaled * value[pixels], scaled**2 * variance[pixels]
        # whole numbers if there is no overlap at all
        sums = (np.bincount(bins, term, widths.size).astype(float) for term in terms)
        for whole, found in zip(out, _divide(widths, *sums), strict=True):
            whole[i] = found
    return out
