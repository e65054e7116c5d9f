"""Intervals that can be checked: conformal prediction with the calibration split by galaxy.

A network's own idea of its error is only a scale. How many scales an interval needs is measured on
galaxies that it has not learned from: the quantile of |error| / scale over their spaxels (split
conformal prediction; Vovk, Gammerman & Shafer 2005, Lei et al. 2018, JASA 113, 1094). It is
measured in quarters of the predicted values (Mondrian conformal prediction, the same book, section
4.5), because scales are too small at some metallicities, and interpolated between them. The spaxels
of one galaxy are alike, so what counts is the number of galaxies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LEVELS = (0.68, 0.9, 0.95)
"""Fractions of spaxels that intervals are made for."""
LEVEL = 0.9
"""The one in maps and tables."""
ENOUGH_GALAXIES = 19
"""With fewer, no statement about a further galaxy can be made at 95 %: 1/20 is its own share."""
BINS = 4
"""Bins of predicted values, with ENOUGH_GALAXIES; with fewer, there is one."""
UNLIKE_QUANTILE = 0.99
"""Fraction of the calibration spaxels that count as like those of training."""


@dataclass(frozen=True)
class Calibration:
    """How wide intervals have to be."""

    galaxies: int = 0
    """Number of galaxies it comes from."""
    spaxels: int = 0
    values: list[float] = field(default_factory=list)
    """Median predicted value of each bin, ascending."""
    quantiles: dict[str, list[float]] = field(default_factory=dict)
    """Half-width of the interval in units of the scale at these values, by level (0.68, ...)."""
    largest_unlikeness: float | None = None
    """Limit beyond which a spaxel is flagged as unlike those of training."""

    def factor(self, value: np.ndarray, level: float = LEVEL) -> np.ndarray:
        """Half-width of the interval in units of the scale; NaN if not calibrated.

        Between the bins' median values it is interpolated, beyond them constant.
        """
        if str(level) not in self.quantiles:
            return np.full(np.shape(value), np.nan)
        return np.interp(value, self.values, self.quantiles[str(level)])

    def widening(self, value: np.ndarray) -> np.ndarray:
        """Factor between the true scale of the errors and the network's, at LEVEL; 1 if unknown.

        A Laplace distribution contains the fraction q within -log(1 - q) scales.
        """
        return np.nan_to_num(self.factor(value) / -np.log(1 - LEVEL), nan=1.0)

    def interval(
        self, value: np.ndarray, scale: np.ndarray, level: float = LEVEL
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends around values of any shape, in their unit; NaN if not calibrated."""
        half = (self.factor(value, level) * scale).astype(value.dtype)
        return value - half, value + half


def calibrate(
    value: np.ndarray | None,
    label: np.ndarray,
    scale: np.ndarray | None,
    unlikeness: np.ndarray | None,
    galaxy: np.ndarray,
    is_new: np.ndarray,
    bins: int = BINS,
) -> Calibration:
    """Measure how many scales intervals need on galaxies that were not learned from.

    Parameters
    ----------
    value, scale : (spaxel,) arrays, or None
        Prediction and the width that the network gives, in the label's unit.
    label : (spaxel,) array
    unlikeness : (spaxel,) array, or None
        As in `networks.Answer`.
    galaxy : (spaxel,) array
        Identity of the spaxel's galaxy: its mangaid, which it keeps however often it is observed.
    is_new : (spaxel,) bool
        Whether the spaxel's galaxy was not learned from; the others do not count.
    bins : int
        Bins of predicted values with equal numbers of spaxels, given ENOUGH_GALAXIES.
    """
    galaxies = np.unique(galaxy[is_new]).size
    values, quantiles, limit = list[float](), dict[str, list[float]](), None
    if value is not None and scale is not None and galaxies:
        value, ratio = value[is_new], (np.abs(value - label) / scale)[is_new]
        parts = np.array_split(np.argsort(value), bins if galaxies >= ENOUGH_GALAXIES else 1)
        values = [float(np.median(value[part])) for part in parts]
        quantiles = {
            str(q): [float(np.quantile(ratio[part], q, method="higher")) for part in parts]
            for q in LEVELS
        }
    if unlikeness is not None:
        limit = float(np.quantile(unlikeness, UNLIKE_QUANTILE))
    return Calibration(galaxies, int(is_new.sum()), values, quantiles, limit)
