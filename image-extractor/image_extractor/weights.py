"""Weigh simulated events to a spectrum, and compute effective areas.

Reads   HDF5 files written by image_extractor.py, from input files that were read to their end.
Writes  nothing.

    from image_extractor.reader import Events
    from image_extractor.weights import Simulation, effective_area
    thrown, gammas = Simulation.of("gammas.h5", primary_id=0), Events("gammas.h5").events
    weight = thrown.weights(gammas["mc_energy"], lambda tev: 3.45e-7 * tev**-2.63, 50 * 3600)
    area = effective_area(gammas["mc_energy"][kept], [0.1, 1, 10], thrown)

What was simulated is in the table Runs, so that events without a trigger are counted, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import layout
from .errors import DataError


@dataclass(frozen=True)
class Simulation:
    """All simulated events of a primary: their number and how they were drawn.

    Attributes
    ----------
    n_events : int
        Showers times their uses.
    energy_tev : (float, float)
        Range of the true energy.
    index : float
        Of the power law from which energies were drawn, e.g. -2; not -1.
    radius_m : float
        Cores are uniform within this distance, in the plane across the direction of the shower.
    viewcone_deg : (float, float)
        Directions are uniform between these angles from the pointing; equal for a point source.
    """

    n_events: int
    energy_tev: tuple[float, float]
    index: float
    radius_m: float
    viewcone_deg: tuple[float, float]

    @classmethod
    def of(cls, path: str | Path, primary_id: int) -> Simulation:
        """Read what was simulated for the events of a primary in a data set.

        Raises
        ------
        DataError
            If there are none, if an input file was not read to its end, so that the number of its
            simulated events is not known, or if its files differ in how events were drawn.
        """
        with layout.open_layout(path) as h5:
            index, runs = layout.index_table(h5), layout.runs_table(h5)
        sources = np.unique(index["source"][index["primary_id"] == primary_id])
        if not sources.size:
            held = ", ".join(map(str, np.unique(index["primary_id"]))) or "no event at all"
            raise DataError(
                f"{path}: it has no event of primary_id {primary_id} (it holds {held}). "
                "Name one of these."
            )
        runs = runs[sources]
        # A file has another row each time that further events of it were added.
        runs = runs[np.unique(runs[["file", "run_number"]], return_index=True)[1]]
        unread = runs["file"][(runs["complete"] == 0) | (runs["sha256"] == b"")]
        drawn = {
            (*run["energy_range"], run["spectral_index"], run["core_range"][1], *run["viewcone"])
            for run in runs
        }
        if unread.size or len(drawn) != 1:
            found = (
                f"{unread[0].decode()} was not read to its end"
                if unread.size
                else f"its events of primary_id {primary_id} were simulated in {len(drawn)} ways"
            )
            raise DataError(
                f"{path}: {found} (expected whole files with one energy range, spectral index, "
                "area and view cone). Extract such files to a data set of their own."
            )
        low, high, spectral_index, radius, inner, outer = map(float, drawn.pop())
        n = int((runs["n_showers"].astype(np.int64) * runs["shower_reuse"]).sum())
        return cls(n, (low, high), spectral_index, radius, (inner, outer))

    @property
    def area_m2(self) -> float:
        """Area over which cores were drawn."""
        return float(np.pi * self.radius_m**2)

    @property
    def solid_angle_sr(self) -> float:
        """Solid angle from which showers came; 0 for a point source."""
        inner, outer = np.cos(np.radians(self.viewcone_deg))
        return float(2 * np.pi * (inner - outer))

    def density(self, tev: np.ndarray) -> np.ndarray:
        """Return the number of simulated events per TeV at each energy (n,)."""
        low, high = self.energy_tev
        slope = self.index + 1
        values = self.n_events * slope * tev**self.index / (high**slope - low**slope)
        return np.where((tev >= low) & (tev <= high), values, 0.0)

    def counts(self, edges_tev: np.ndarray) -> np.ndarray:
        """Return the expected number of simulated events between edges (n + 1,) of energy."""
        low, high = self.energy_tev
        slope = self.index + 1
        powers = np.clip(np.asarray(edges_tev, float), low, high) ** slope
        return self.n_events * np.diff(powers) / (high**slope - low**slope)

    def weights(
        self, tev: np.ndarray, flux: Callable[[np.ndarray], np.ndarray], seconds: float
    ) -> np.ndarray:
        """Weights that make simulated events those of a spectrum.

        Their sum over detected events is the number expected in an observation.

        Parameters
        ----------
        tev : (n,) array
            True energies.
        flux : callable
            Energy in TeV -> flux, 1/(TeV s m2), for a diffuse simulation 1/(TeV s m2 sr).
        seconds : float
            Length of the observation.

        Returns
        -------
        (n,) array
        """
        exposure = seconds * self.area_m2 * (self.solid_angle_sr or 1.0)
        return exposure * flux(tev) / self.density(tev)


def effective_area(tev: np.ndarray, edges_tev: np.ndarray, thrown: Simulation) -> np.ndarray:
    """Effective area in bins of true energy: the share of events that is kept, times the area.

    Parameters
    ----------
    tev : (n,) array
        True energies of the events that are kept.
    edges_tev : (n_bins + 1,) array
    thrown : Simulation

    Returns
    -------
    (n_bins,) array, m2
        NaN where nothing was simulated. For a diffuse simulation, the mean over its directions.
    """
    kept, simulated = np.histogram(tev, edges_tev)[0], thrown.counts(edges_tev)
    empty = np.full(len(kept), np.nan)
    return thrown.area_m2 * np.divide(kept, simulated, out=empty, where=simulated > 0)
