"""The settings of a run, except its files, and their defaults.

Every setting is stated once, as a field of `Settings`. config.py reads them from a file, checks
them and writes them to one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

TEV_PER_UNIT = {"eV": 1e-12, "MeV": 1e-6, "GeV": 1e-3, "TeV": 1.0}
MAX_BINS = 255  # the bin label is one byte
CONSERVING = ("square", "axial", "oversampling", "rebin", "none")  # mappings that conserve charge
MAPPINGS = ("auto", "square", "axial", "oversampling", "rebin", "nearest", "bilinear", "none")


@dataclass(frozen=True)
class EnergyBins:
    """Energy bins with edges from `min` to `max` in `units`; `scale` is linear or log10."""

    units: str = "TeV"
    scale: str = "log10"
    min: float = -1.0
    max: float = 1.0
    bin_size: float = 0.5

    def edges(self) -> list[float]:
        """Bin edges in the configured scale and units; the last is exactly `max`."""
        n = self.count()
        return [self.min + i * (self.max - self.min) / n for i in range(n)] + [self.max]

    def edges_tev(self) -> list[float]:
        """Bin edges in TeV."""
        unit = TEV_PER_UNIT[self.units]
        return [(10.0**e if self.scale == "log10" else e) * unit for e in self.edges()]

    def count(self) -> int:
        """Count the bins: rounded, since (0.3 - -2) / 0.1 is 22.999999999999996."""
        return round((self.max - self.min) / self.bin_size)

    def problems(self) -> list[str]:
        """Check that the numbers fit together; return at most one problem."""
        low, high, size = self.min, self.max, self.bin_size
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            return [f"min = {low}, max = {high}: expected finite numbers, min < max"]
        if not (math.isfinite(size) and size > 0):
            return [f"bin_size = {size}: expected a finite number above 0"]
        n = (high - low) / size
        if abs(n - round(n)) > 1e-6 * max(1.0, n) or round(n) < 1:
            return [f"bin_size = {size}: does not divide the range {low} to {high} into equal bins"]
        if round(n) > MAX_BINS:
            return [f"bin_size = {size}: gives {round(n)} bins, expected at most {MAX_BINS}"]
        if self.scale == "linear" and low < 0:
            return [f"min = {low}: expected an energy >= 0, because scale = linear"]
        return []


@dataclass(frozen=True)
class Cut:
    """Keep `low` <= value < `high`; None is an open bound. Several columns add in quadrature."""

    columns: tuple[str, ...]
    low: float | None
    high: float | None


def _historic_cuts() -> dict[str, Cut]:
    return {
        "MSCW": Cut(("MSCW",), -2.0, 2.0),
        "MSCL": Cut(("MSCL",), -2.0, 5.0),
        "EChi2S": Cut(("EChi2S",), 0.0, None),
        "ErecS": Cut(("ErecS",), 0.0, None),
        "EmissionHeight": Cut(("EmissionHeight",), 0.0, 50.0),
        "MC_Offset": Cut(("MCxoff", "MCyoff"), 0.0, 3.0),
        "NImages": Cut(("NImages",), 3.0, None),
        "dES": Cut(("dES",), 0.0, None),
    }


def selections(text: str) -> list[tuple[str, str]]:
    """Divide a list such as `axial, LST: rebin` into (telescopes, value); those of `axial` are "".

    Raises
    ------
    ValueError
        If an item has telescopes but no value, or a value but no telescopes.
    """
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        telescopes, colon, value = (word.strip() for word in item.rpartition(":"))
        if not value or (colon and not telescopes):
            raise ValueError(f"{item!r}: expected TELESCOPES: VALUE")
        found.append((telescopes, value))
    return found


@dataclass(frozen=True)
class Settings:
    """All settings of a run except its files.

    The defaults are those of the historic schema, except for time_unit (historically 1) and
    type_mode (historically SCT).
    """

    mode: str = "gh_class"
    storage_mode: str = "all"
    use_pkl_dict: bool = True
    image_mode: str = "PIXELS_3C"
    scale_factor: int = 2
    dtype: str = "uint16"
    dim_order: str = "channels_last"
    time_unit: float = 0.01
    mapping: str = "auto"
    derotate: bool = False
    type_mode: str = "ALL"
    types: str = ""
    energy_bins: EnergyBins = EnergyBins()
    preselection_cuts: dict[str, Cut] = field(default_factory=_historic_cuts)
    gamma_only: bool = True
    energy_recon_bins: EnergyBins = EnergyBins(min=-2.0, max=2.0, bin_size=0.05)
    min_telescopes: int = 1
    min_intensity: float = 0.0
    max_leakage: float = 1.0
    picture_threshold: float = 10.0
    boundary_threshold: float = 5.0

    @property
    def bins(self) -> EnergyBins:
        """Energy bins of the mode: of its groups (gh_class) or of its label (energy_recon)."""
        return self.energy_bins if self.mode == "gh_class" else self.energy_recon_bins
