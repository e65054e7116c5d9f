"""From emission-line fluxes to labels: BPT class and gas metallicity, with uncertainties.

Arrays in, arrays out; every map is (y, x). Lines have the DAP's channel names, which contain the
vacuum wavelength in Angstrom. A line counts as detected where it is unmasked, positive and above
the cut in signal-to-noise ratio; a spaxel has a label only where all lines of the label count.

    >>> classes, p_wrong = bpt_classes(maps, min_snr=3.0)
    >>> logoh, error = metallicity(maps, "O3N2-M13")
    >>> class_of_spaxel = label_classes(logoh, "logOH", n_classes=6)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from utils import DataError

import numpy as np

HA, HB, NII, OIII = "Ha-6564", "Hb-4862", "NII-6585", "OIII-5008"
OII_BLUE, OII_RED = "OII-3727", "OII-3729"
OII = OII_BLUE + "+" + OII_RED
BPT_LINES = (HA, HB, NII, OIII)

BALMER_RATIO = 2.86
"""Intrinsic Ha/Hb: case B, T = 1e4 K, n_e = 100 cm-3 (Osterbrock & Ferland 2006, table 4.4)."""

R_V = 3.1
"""Total-to-selective extinction of the Milky Way's diffuse dust (Cardelli et al. 1989)."""

RATIOS: dict[str, dict[str, float]] = {
    "N2": {NII: 1, HA: -1},
    "O3N2": {OIII: 1, HB: -1, NII: -1, HA: 1},
    "N2O2": {NII: 1, OII: -1},
}
"""Each log ratio as a weighted sum of log fluxes; lines joined by + are summed before the log."""

NOISE_NODES = 15
"""Quantiles per axis at which the error ellipse of a spaxel in the BPT plane is sampled."""


@dataclass(frozen=True)
class Calibration:
    """A strong-line metallicity calibration: 12+log(O/H) as a polynomial of one log line ratio."""

    ratio: str
    """A key of RATIOS."""
    coefficients: tuple[float, ...]
    """Of the powers 0, 1, ... of the log ratio; for N2O2-KD02 inside the logarithm."""
    valid: tuple[float, float]
    """Range of the log ratio over which the calibration was made."""
    scatter: float
    """Of the calibrating sample about the relation, dex; not part of the labels' uncertainty."""
    source: str
    """Paper and equation."""


CALIBRATIONS: dict[str, Calibration] = {
    "O3N2-M13": Calibration(
        "O3N2", (8.533, -0.214), (-1.1, 1.7), 0.18, "Marino et al. 2013, A&A 559, A114, eq. 2"
    ),
    "N2-M13": Calibration(
        "N2", (8.743, 0.462), (-1.6, -0.2), 0.16, "Marino et al. 2013, A&A 559, A114, eq. 4"
    ),
    "O3N2-PP04": Calibration(
        "O3N2", (8.73, -0.32), (-1.0, 1.9), 0.14, "Pettini & Pagel 2004, MNRAS 348, L59, eq. 3"
    ),
    "N2O2-KD02": Calibration(
        "N2O2",
        (1.54020, 1.26602, 0.167977),
        (-1.2, np.inf),
        0.04,
        "Kewley & Dopita 2002, ApJS 142, 35, eq. 5 (12+log(O/H) > 8.4), dereddened",
    ),
}

# Class scales, names and colours

LABEL_NONE = -1
"""Class of a spaxel without a label."""

SF, COMPOSITE, AGN = 0, 1, 2
BPT_CLASSES = ("star-forming", "composite", "AGN")
"""Names of these classes: below the curve of Kauffmann et al. (2003, MNRAS 346, 1055), between the
curves, above the curve of Kewley et al. (2001, ApJ 556, 121)."""

LOGOH_EDGES: dict[int, tuple[float, ...]] = {
    6: (8.40, 8.44, 8.48, 8.52, 8.56),
    8: (8.34, 8.40, 8.44, 8.47, 8.50, 8.52, 8.55),
}
"""Inner edges of the 6 and 8 metallicity classes, 12+log(O/H) in dex; the outer classes are open.
The project's own choice, about the survey's mean label of 8.45 (standard deviation 0.09 dex)."""

LOGOH_SCALE = ("O3N2-M13", "N2-M13")
"""Calibrations for which these edges are meant. Others differ by up to 0.7 dex (Kewley & Ellison
2008, ApJ 681, 1183), so that their labels would fall into one or two classes."""

CLASS_COLOURS: dict[tuple[str, int], tuple[str, ...]] = {
    ("BPT", 3): ("#0072B2", "#E69F00", "#882255"),
    ("logOH", 6): ("#440154", "#414487", "#2A788E", "#22A884", "#7AD151", "#FDE725"),
    ("logOH", 8): (
        "#440154", "#46327E", "#365C8D", "#277F8E", "#1FA187", "#4AC16D", "#A0DA39", "#FDE725",
    ),
}  # fmt: skip
"""Colours of the classes by label task and number of classes, safe for colour-blind readers. BPT:
blue and orange of Okabe & Ito (2008), wine of P. Tol's muted scheme; metallicity: viridis."""

MASKED_COLOUR = "#BDBDBD"
"""Spaxels in the field of view without a usable spectrum."""

TASK_TITLES = {"BPT": "BPT class", "logOH": "12 + log(O/H)"}


# Lines


@dataclass(frozen=True)
class LineMaps:
    """Emission-line maps of a galaxy, (y, x) by line."""

    flux: Mapping[str, np.ndarray]
    """1e-17 erg/s/cm2/spaxel, corrected for Galactic extinction, as the DAP does."""
    ivar: Mapping[str, np.ndarray]
    """Inverse variance of the flux."""
    bad: Mapping[str, np.ndarray]
    """Spaxels that the DAP masks, bool."""

    @property
    def shape(self) -> tuple[int, int]:
        """(y, x) of the maps."""
        return next(iter(self.flux.values())).shape  # type: ignore[return-value]


def _summed(maps: LineMaps, group: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flux, variance and mask (True: bad) of one line, or of the sum of lines joined by +."""
    lines = group.split("+")
    flux = np.sum([maps.flux[line].astype(float) for line in lines], axis=0)
    with np.errstate(divide="ignore"):
        variance = np.sum([1 / maps.ivar[line].astype(float) for line in lines], axis=0)
    bad = np.any([maps.bad[line] | ~(maps.ivar[line] > 0) for line in lines], axis=0)
    return flux, variance, bad | ~np.isfinite(flux)


def detected(maps: LineMaps, lines: tuple[str, ...], min_snr: float) -> np.ndarray:
    """Spaxels where every line is unmasked, positive and above the cut; (y, x) bool.

    The [O II] doublet is blended at MaNGA's resolution: the cut applies to the sum of its two
    channels.
    """
    ok, groups, doublet = np.ones(maps.shape, bool), set(lines), {OII_BLUE, OII_RED}
    if doublet <= groups:
        groups = groups - doublet | {OII}
    for group in groups:
        flux, variance, bad = _summed(maps, group)
        with np.errstate(invalid="ignore", divide="ignore"):
            ok &= ~bad & (flux > 0) & (flux > min_snr * np.sqrt(variance))
    return ok


def lines_needed(diagnostic: str) -> tuple[str, ...]:
    """Lines used by a metallicity diagnostic, a key of CALIBRATIONS, and its dust correction."""
    if diagnostic not in CALIBRATIONS:
        known = ", ".join(CALIBRATIONS)
        raise DataError(f"diagnostic {diagnostic!r}: unknown. Expected one of {known}.")
    ratio = CALIBRATIONS[diagnostic].ratio
    names = [line for group in RATIOS[ratio] for line in group.split("+")]
    return tuple(dict.fromkeys([*names, HA, HB] if ratio == "N2O2" else names))


# Ratios


def extinction_k(line: str) -> float:
    """A(lambda) / E(B-V) at a line, for the law of Cardelli et al. (1989) with R_V = 3.1.

    The vacuum wavelength is taken from the line's name, which gives it to 1 Angstrom.
    """
    from astropy import units as u
    from dust_extinction.parameter_averages import CCM89

    return float(CCM89(Rv=R_V)(float(line.rpartition("-")[2]) * u.AA)) * R_V


def balmer_ebv(f_ha: np.ndarray, f_hb: np.ndarray) -> np.ndarray:
    """Colour excess from the Balmer decrement.

    Parameters
    ----------
    f_ha, f_hb : (y, x) array, 1e-17 erg/s/cm2/spaxel
        Observed fluxes, corrected for Galactic extinction. Non-positive pixels give NaN.

    Returns
    -------
    (y, x) array, mag
        E(B-V), clipped below at 0: 2.5 log10((Ha/Hb) / 2.86) / (k(Hb) - k(Ha)), k of Cardelli et
        al. (1989) with R_V = 3.1.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.log10(np.where((f_ha > 0) & (f_hb > 0), f_ha / f_hb, np.nan) / BALMER_RATIO)
    return np.maximum(2.5 * excess / (extinction_k(HB) - extinction_k(HA)), 0)


def _log_sum(maps: LineMaps, weights: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sum of log10 fluxes, and its variance to first order, without covariances."""
    value = np.zeros(maps.shape)
    variance = np.zeros(maps.shape)
    for group, weight in weights.items():
        flux, flux_variance, _ = _summed(maps, group)
        flux = np.where(flux > 0, flux, np.nan)
        value += weight * np.log10(flux)
        with np.errstate(invalid="ignore"):
            variance += weight**2 * flux_variance / (flux * np.log(10)) ** 2
    return value, variance


def _dereddened_n2o2(maps: LineMaps) -> tuple[np.ndarray, np.ndarray]:
    """Log10 of N2O2 and its variance, corrected for dust by the Balmer decrement."""
    raw = RATIOS["N2O2"]
    slope = (extinction_k(NII) - (extinction_k(OII_BLUE) + extinction_k(OII_RED)) / 2) / (
        extinction_k(HB) - extinction_k(HA)
    )  # d(log ratio) = 0.4 * (k_NII - k_OII) * E(B-V), with E(B-V) = 2.5 log(...) / (k_Hb - k_Ha)
    plain, plain_variance = _log_sum(maps, raw)
    dusty, dusty_variance = _log_sum(maps, {**raw, HA: slope, HB: -slope})
    is_dusty = balmer_ebv(maps.flux[HA], maps.flux[HB]) > 0
    value = np.where(is_dusty, dusty - slope * np.log10(BALMER_RATIO), plain)
    return value, np.where(is_dusty, dusty_variance, plain_variance)


def log_ratio(maps: LineMaps, ratio: str) -> tuple[np.ndarray, np.ndarray]:
    """Log10 of a line ratio (a key of RATIOS) and its 1-sigma error from the flux errors.

    Returns
    -------
    value, error : (y, x) float, dex
        NaN where a flux is not positive. N2O2 is corrected for dust by the Balmer decrement, whose
        error is included.
    """
    is_dusty = ratio == "N2O2"
    value, variance = _dereddened_n2o2(maps) if is_dusty else _log_sum(maps, RATIOS[ratio])
    return value, np.sqrt(variance)


# Labels


def demarcate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Class of points x = log([N II] 6585 / Ha), y = log([O III] 5008 / Hb) in the BPT plane.

    Returns
    -------
    int16 array
        AGN above Kewley et al. (2001), ApJ 556, 121, eq. 5: 0.61 / (x - 0.47) + 1.19; star-forming
        below it and below Kauffmann et al. (2003), MNRAS 346, 1055, eq. 1: 0.61 / (x - 0.05) + 1.3;
        composite between. Points to the right of a curve's pole count as above the curve.
    """
    with np.errstate(divide="ignore"):
        kauffmann = np.where(x < 0.05, 0.61 / (x - 0.05) + 1.3, -np.inf)
        kewley = np.where(x < 0.47, 0.61 / (x - 0.47) + 1.19, -np.inf)
    return np.where(y > kewley, AGN, np.where(y > kauffmann, COMPOSITE, SF)).astype(np.int16)


def bpt_classes(maps: LineMaps, min_snr: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """BPT class of every spaxel, and the probability that noise put it into the wrong class.

    Each of the four BPT_LINES needs a signal-to-noise ratio above `min_snr`.

    Returns
    -------
    classes : (y, x) int16
        SF, COMPOSITE, AGN or LABEL_NONE.
    p_wrong : (y, x) float32
        Fraction of the Gaussian error ellipse in the BPT plane that lies in other classes; NaN
        without a class.
    """
    ok = detected(maps, BPT_LINES, min_snr)
    x, x_error = (a[ok] for a in log_ratio(maps, "N2"))
    y, y_variance = _log_sum(maps, {OIII: 1, HB: -1})
    y, y_error = y[ok], np.sqrt(y_variance[ok])
    classes = np.full(maps.shape, LABEL_NONE, np.int16)
    classes[ok] = demarcate(x, y)
    steps = [NormalDist().inv_cdf((i + 0.5) / NOISE_NODES) for i in range(NOISE_NODES)]
    wrong = np.zeros(x.shape)
    for dx, dy in itertools.product(steps, steps):
        wrong += demarcate(x + dx * x_error, y + dy * y_error) != classes[ok]
    p_wrong = np.full(maps.shape, np.nan, np.float32)
    p_wrong[ok] = wrong / NOISE_NODES**2
    return classes, p_wrong


def calibrated(ratio: np.ndarray, diagnostic: str) -> tuple[np.ndarray, np.ndarray]:
    """12+log(O/H) of a log line ratio, and its derivative (dex per dex)."""
    calibration = CALIBRATIONS[diagnostic]
    polynomial = np.polynomial.Polynomial(calibration.coefficients)
    value, slope = polynomial(ratio), polynomial.deriv()(ratio)
    if calibration.ratio == "N2O2":  # KD02, eq. 5: log10 of the polynomial, plus 8.93
        return np.log10(value) + 8.93, slope / (value * np.log(10))
    return value, slope


def metallicity(
    maps: LineMaps,
    diagnostic: str = "O3N2-M13",
    min_snr: float = 3.0,
    star_forming_only: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Gas metallicity of every spaxel by a strong-line calibration.

    `diagnostic` is a key of CALIBRATIONS. The maps must hold the lines of `lines_needed`, and
    BPT_LINES if `star_forming_only`: then composite and AGN spaxels get no label, because the
    calibrations are made on H II regions.

    Returns
    -------
    logoh, error : (y, x) float32, dex
        12+log(O/H) and its 1-sigma error from the flux errors alone; NaN without a label (a line
        not detected, a ratio outside the calibrated range, a spaxel that is not star-forming).
    """
    calibration = CALIBRATIONS[diagnostic]
    ok = detected(maps, lines_needed(diagnostic), min_snr)
    if star_forming_only:
        ok &= bpt_classes(maps, min_snr)[0] == SF
    ratio, ratio_error = log_ratio(maps, calibration.ratio)
    low, high = calibration.valid
    with np.errstate(invalid="ignore"):
        ok &= (ratio > low) & (ratio < high)
    ratio = np.where(ok, ratio, np.nan)
    logoh, slope = calibrated(ratio, diagnostic)
    error = np.where(ok, np.abs(slope) * ratio_error, np.nan)
    return logoh.astype(np.float32), error.astype(np.float32)


# Classes


def logoh_edges(n_classes: int) -> tuple[float, ...]:
    """Inner class edges of the 6- or 8-class metallicity scale, dex."""
    if n_classes not in LOGOH_EDGES:
        scales = " or ".join(map(str, LOGOH_EDGES))
        raise DataError(f"{n_classes} metallicity classes: expected {scales}.")
    return LOGOH_EDGES[n_classes]


def class_names(label_task: str, n_classes: int | None = None) -> tuple[str, ...]:
    """Names of the classes of a label task, in class order; by default 6 for metallicity."""
    if label_task == "BPT":
        if n_classes not in (None, len(BPT_CLASSES)):
            raise DataError(f"BPT with {n_classes} classes: expected {len(BPT_CLASSES)}.")
        return BPT_CLASSES
    edges = logoh_edges(n_classes or 6)
    middle = [f"{a:.2f}-{b:.2f}" for a, b in itertools.pairwise(edges)]
    return (f"< {edges[0]:.2f}", *middle, f">= {edges[-1]:.2f}")


def label_classes(labels: np.ndarray, label_task: str, n_classes: int = 6) -> np.ndarray:
    """Convert label values to classes.

    Parameters
    ----------
    labels : array of any shape
        BPT: classes, LABEL_NONE without a label. logOH: 12+log(O/H) in dex, NaN without a label.
    n_classes : int
        Number of metallicity classes, 6 or 8; ignored for BPT.

    Returns
    -------
    int16 array of the same shape
        LABEL_NONE without a label. A value on an edge belongs to the class above; values and edges
        are compared as float32, the type in which labels are stored.
    """
    labels = np.asarray(labels)
    if label_task == "BPT":
        return labels.astype(np.int16)
    labels = labels.astype(np.float32)
    edges = np.array(logoh_edges(n_classes), np.float32)
    classes = np.digitize(labels, edges).astype(np.int16)
    classes[~np.isfinite(labels)] = LABEL_NONE
    return classes


def class_middles(n_classes: int) -> np.ndarray:
    """Return the middle of each metallicity class, (n_classes,) 12+log(O/H) in dex.

    An open outer class is taken to be as wide as its neighbour.
    """
    edges = np.pad(logoh_edges(n_classes), 1, mode="reflect", reflect_type="odd")
    return (edges[:-1] + edges[1:]) / 2
