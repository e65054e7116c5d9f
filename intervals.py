"""Intervals that can be checked: conformal prediction with the calibration split by galaxy.

A network's own idea of its error is only a scale. How many scales an interval needs is measured on
galaxies that it has not learned from: the quantile of |error| / scale over their spaxels (split
conformal prediction; Vovk, Gammerman & Shafer 2005, Lei et al. 2018, JASA 113, 1094). The spaxels
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
UNLIKE_QUANTILE = 0.99
"""Fraction of the calibration spaxels that count as like those of training."""


@dataclass(frozen=True)
class Calibration:
    """How wide intervals have to be."""

    galaxies: int = 0
    """Number of galaxies it comes from."""
    spaxels: int = 0
    quantiles: dict[str, float] = field(default_factory=dict)
    """Half-width of the interval in units of the scale, by level (0.68, ...)."""
    largest_unlikeness: float | None = None
    """Limit beyond which a spaxel is flagged as unlike those of training."""

    def interval(
        self, value: np.ndarray, scale: np.ndarray, level: float = LEVEL
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends around values of any shape, in their unit; NaN if not calibrated."""
        half = self.quantiles.get(str(level), np.nan) * scale
        return value - half, value + half


def calibrate(
    error: np.ndarray | None,
    scale: np.ndarray | None,
    unlikeness: np.ndarray | None,
    galaxies: int,
    spaxels: int,
) -> Calibration:
    """Measure how many scales intervals need on galaxies that were not learned from.

    Parameters
    ----------
    error, scale : (spaxel,) arrays, or None
        Prediction minus label, and the width that the network gives, in one unit.
    unlikeness : (spaxel,) array, or None
        As in `networks.Answer`.
    galaxies, spaxels : int
        Their numbers.
    """
    quantiles = {}
    if error is not None and scale is not None:
        ratio = np.abs(error) / scale
        quantiles = {str(q): float(np.quantile(ratio, q, method="higher")) for q in LEVELS}
    limit = None if unlikeness is None else float(np.quantile(unlikeness, UNLIKE_QUANTILE))
    return Calibration(galaxies, spaxels, quantiles, limit)
