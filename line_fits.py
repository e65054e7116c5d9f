"""Emission lines by the classical method: Gaussians of known width, fitted to single spectra.

The classical method beside which a network has to prove itself (baselines.py), and the places where
the filters of matched_filter_net.py start.
"""

from __future__ import annotations

import numpy as np

C_KMS = 299_792.458
"""Speed of light, km/s (exact)."""

EMLINES: dict[str, float] = {
    "OII-3727": 3727.092, "OII-3729": 3729.875, "H12-3751": 3751.219, "H11-3771": 3771.704,
    "Hthe-3798": 3798.983, "Heta-3836": 3836.479, "NeIII-3869": 3869.86, "HeI-3889": 3889.749,
    "Hzet-3890": 3890.158, "NeIII-3968": 3968.59, "Heps-3971": 3971.202, "Hdel-4102": 4102.899,
    "Hgam-4341": 4341.691, "HeII-4687": 4687.015, "Hb-4862": 4862.691, "OIII-4960": 4960.295,
    "OIII-5008": 5008.240, "NI-5199": 5199.349, "NI-5201": 5201.705, "HeI-5877": 5877.243,
    "OI-6302": 6302.046, "OI-6365": 6365.535, "NII-6549": 6549.86, "Ha-6564": 6564.632,
    "NII-6585": 6585.271, "SII-6718": 6718.295, "SII-6732": 6732.674, "HeI-7067": 7067.144,
    "ArIII-7137": 7137.76, "ArIII-7753": 7753.24, "Peta-9017": 9017.384, "SIII-9071": 9071.1,
    "Pzet-9231": 9231.546, "SIII-9533": 9533.2, "Peps-9548": 9548.588,
}  # fmt: skip
"""Vacuum wavelengths, Angstrom, of the 35 channels of DR17's EMLINE_* HDUs in order (NIST Atomic
Spectra Database, the values of the DAP's line list ELPMPL11). The names contain them truncated."""

NOT_FOLLOWED = ("HeI",)
"""Lines of GROUPS that filters do not start at: He I 5877 lies beside Na D, absorption by stars and
interstellar gas, and a network that follows them errs more on a real galaxy
(docs/lab_notes.md#a-real-galaxy)."""

LINE_SIGMA_KMS = 85.0
"""Width of the fitted Gaussians: gas of 35 km/s, the instrument and the bins."""

GROUPS: tuple[dict[str, dict[str, float]], ...] = (
    {"Hb": {"Hb-4862": 1}},
    {"OIII": {"OIII-5008": 1, "OIII-4960": 0.340}},
    {"Ha": {"Ha-6564": 1}, "NII": {"NII-6585": 1, "NII-6549": 0.327}},
    {"SIIa": {"SII-6718": 1}, "SIIb": {"SII-6732": 1}},
    {"OI": {"OI-6302": 1, "OI-6365": 0.328}},
    {"HeI": {"HeI-5877": 1}},
)
"""Lines fitted together, on a linear continuum within 60 Angstrom; doublets as one line, with the
ratios that the DAP keeps fixed."""

LINES = {
    name: wave
    for name, wave in EMLINES.items()
    if any(name in parts for group in GROUPS for parts in group.values())
}
"""The fitted lines and their wavelengths; filters start there, too."""

RATIO_LINES = ("Hb", "OIII", "Ha", "NII", "SII")
"""Lines of the classical ratios, where in range."""


def fit_lines(flux: np.ndarray, ivar: np.ndarray, wave: np.ndarray) -> dict[str, np.ndarray]:
    """Weighted least squares of Gaussians of known width on a linear continuum.

    Parameters
    ----------
    flux, ivar : (N, band) array
        Of any unit; ivar 0 in gaps.
    wave : (band,) array
        Vacuum rest wavelengths, Angstrom.

    Returns
    -------
    dict of line -> (3, N)
        Flux, its variance, continuum at the middle of the group, for each line of GROUPS in range;
        "SII" is the sum of the doublet.
    """
    out = {}
    for group in GROUPS:
        waves = [LINES[n] for parts in group.values() for n in parts]
        if not any(wave[0] + 4 < w < wave[-1] - 4 for w in waves):
            continue
        seen = (wave > min(waves) - 60) & (wave < max(waves) + 60)
        good = np.isfinite(flux[:, seen]) & (ivar[:, seen] > 0)
        f, w = np.where(good, flux[:, seen], 0.0), np.where(good, ivar[:, seen], 0.0)
        grid = wave[seen]
        columns = []
        for parts in group.values():
            profile = np.zeros(grid.size)
            for name, ratio in parts.items():
                sigma = LINES[name] * LINE_SIGMA_KMS / C_KMS
                gauss = np.exp(-0.5 * ((grid - LINES[name]) / sigma) ** 2)
                profile += ratio * gauss / (sigma * np.sqrt(2 * np.pi))
            columns.append(profile)
        a = np.stack([*columns, np.ones(grid.size), (grid - grid.mean()) / 50], 1)
        normal = np.einsum("bi,nb,bj->nij", a, w, a, optimize=True)
        normal += 1e-9 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(a.shape[1])
        normal += 1e-12 * np.eye(a.shape[1])
        inverse = np.linalg.inv(normal)
        fitted = np.einsum("nij,bj,nb->ni", inverse, a, w * f, optimize=True)
        for k, name in enumerate(group):
            out[name] = np.stack([fitted[:, k], inverse[:, k, k], fitted[:, -2]])
    if {"SIIa", "SIIb"} <= set(out):
        out["SII"] = out["SIIa"] + out["SIIb"] * [[1], [1], [0]]
    return out


def has_ratios(wave: np.ndarray) -> bool:
    """Say whether a range of wavelengths contains Halpha and another line of the ratios."""
    inside = {
        name
        for group in GROUPS
        for name in group
        if any(wave[0] + 4 < LINES[n] < wave[-1] - 4 for parts in group.values() for n in parts)
    }
    return "Ha" in inside and len(inside & {*RATIO_LINES, "SIIa"}) > 1


def log_ratios(lines: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    """Logarithms of fluxes over Ha's, linear in the noise, (N, line - 1).

    asinh magnitudes (Lupton, Gunn & Szalay 1999, AJ 118, 1406) with the error as softening.
    """
    logs = {}
    for name in names:
        flux, error = lines[name][0], np.sqrt(lines[name][1])
        logs[name] = np.arcsinh(flux / error / 2) + np.log(error)
    return np.stack([logs[n] - logs["Ha"] for n in names if n != "Ha"], 1)


def line_places(wave: np.ndarray) -> list[list[tuple[float, float]]]:
    """Bins and relative strengths of the lines in a range of wavelengths, doublets together.

    Each line of GROUPS but those NOT_FOLLOWED; the strongest bin of each comes first.
    """
    lines = [
        [(LINES[name], ratio) for name, ratio in parts.items()]
        for group in GROUPS
        for line, parts in group.items()
        if line not in NOT_FOLLOWED
    ]
    inside = [[(w, ratio) for w, ratio in line if wave[0] < w < wave[-1]] for line in lines]
    bins = np.arange(wave.size)
    return [[(float(np.interp(w, wave, bins)), r) for w, r in line] for line in inside if line]
