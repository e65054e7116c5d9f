"""Resample spectra from one wavelength grid to another, conserving flux, with masks and errors.

Arrays in, arrays out: spectra (band, spaxel) in, (spaxel, band) out; wavelengths in Angstrom.

A spectrum is a step function: constant flux density within each pixel. The flux density of a target
bin is the mean over the part of its width that good pixels cover:

    f_j = sum_i o_ij g_i f_i / sum_i o_ij g_i       o_ij: overlap of bin j with pixel i, Angstrom
    1/ivar_j = sum_i (o_ij g_i)^2 / ivar_i / (sum_i o_ij g_i)^2         g_i: 1 if good, else 0
    good_j = sum_i o_ij g_i / width_j

so the integral over wavelength is conserved where all pixels are good, and the value of a bad pixel
has no influence (same principle: Carnall 2017, arXiv:1705.05165, eqs. 3-4). The overlaps form one
sparse matrix for a whole cube. Neighbouring bins share pixels, so their errors are correlated; only
the variances are computed.

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


def overlap_matrix(source: np.ndarray, target: np.ndarray) -> sparse.csr_array:
    """Overlap of every target bin with every source pixel.

    Parameters
    ----------
    source : (n + 1,) array
        Pixel edges, increasing, Angstrom.
    target : (m + 1,) array
        Bin edges, increasing, Angstrom.

    Returns
    -------
    (m, n) CSR float64, Angstrom
        About m + n non-zero overlaps.
    """
    # the merged edges of both grids cut the axis into pieces, each within one pixel and one bin
    low, high = max(source[0], target[0]), min(source[-1], target[-1])
    shape = (target.size - 1, source.size - 1)
    if low >= high:
        return sparse.csr_array(shape, dtype=np.float64)
    cuts = np.union1d(source, target)
    cuts = cuts[(cuts >= low) & (cuts <= high)]
    middle = (cuts[:-1] + cuts[1:]) / 2
    row = np.searchsorted(target, middle) - 1
    column = np.searchsorted(source, middle) - 1
    return sparse.csr_array((np.diff(cuts), (row, column)), shape=shape)


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
    flux_out, ivar_out, good_out = out = _empty_spectra(flux.shape[1], widths.size)
    used = np.flatnonzero(~bad.all(axis=0))
    if not used.size:
        return out
    span = slice(used[0], used[-1] + 1)
    flux, ivar, bad = flux[:, span], ivar[:, span], bad[:, span]
    scale = np.broadcast_to(factor, matrix.shape[1])
    scaled = matrix.copy()
    scaled.data *= scale[matrix.indices]
    value = flux.astype(float)
    value[bad] = 0.0
    covered = matrix @ (~bad).astype(float)  # (m, N), Angstrom
    empty = covered < MIN_GOOD_FRACTION * widths[:, None]
    covered[empty] = np.nan
    flux_out[span] = (scaled @ value / covered).T
    with np.errstate(divide="ignore", over="ignore"):
        variance = (1 / ivar).astype(float)
        variance[bad] = 0.0
        inverse = np.square(covered) / (scaled.power(2) @ variance)
    inverse[~np.isfinite(inverse)] = 0
    ivar_out[span] = inverse.T
    good = covered / widths[:, None]
    good_out[span] = 1
    partly = ~(good >= HALF_BELOW_ONE)  # NaN too; rounding to float16 is slow, all others are 1
    good_out[span].T[partly] = np.where(empty[partly], 0.0, good[partly])
    return out


def _empty_spectra(n: int, n_band: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make flux, ivar and good fraction of n spectra without a good pixel."""
    shape = (n, n_band)
    return np.full(shape, np.nan, "f4"), np.zeros(shape, "f4"), np.zeros(shape, "f2")


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
    widths = np.diff(target)
    out = _empty_spectra(flux.shape[1], widths.size)
    for i in np.flatnonzero(~bad.all(axis=0)):
        matrix = overlap_matrix(source / one_plus_z[i], target)
        one, scale = slice(i, i + 1), np.asarray(factor) * one_plus_z[i]
        rows = resample_spectra(flux[:, one], ivar[:, one], bad[:, one], matrix, widths, scale)
        for whole, row in zip(out, rows, strict=True):
            whole[i] = row[0]
    return out
