"""Simulate MaNGA galaxies whose files have the structure of the archive's, with the truth beside.

Reads   nothing; with --from-maps a real DAP MAPS file, whose LOGCUBE it re-synthesises.
Writes  raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-SPX-MILESHC-MASTARSSP.fits.gz,
        raw/dapall-v3_1_1-3.1.0.fits and, what no survey can give, truth/<plateifu>.h5.

Cubes are (band, y, x), maps (y, x) or (channel, y, x); fluxes in 1e-17 erg/s/cm2 (/Angstrom)
/spaxel; wavelengths in vacuum Angstrom. FLUX is reddened by the Galaxy as in the archive, line
fluxes are not.

What is modelled, each with its source at the function or constant: bundles and redshifts as in
DR17; inclined discs with a bulge; stellar spectra that vary with age and metallicity; H II regions
on the strong-line calibrations with scatter in ionisation and N/O; Seyfert, LI(N)ER and composite
centres; dust by the Balmer decrement; rotation; seeing that mixes neighbouring spectra; noise as
measured on real spectra and correlated between neighbours; foreground stars, dead fibres, low
coverage. Line fluxes in MAPS are measured on the noise that the cube has.

What is not: the metallicity of the gas is drawn without regard to size, brightness, redshift or
rotation (the real survey's mass-metallicity relation is left out on purpose: a network must read
the spectrum). Stellar spectra are parametric, not a library. A line is one Gaussian, of the
velocity and width that Halpha has after the seeing. The errors of the continuum fit are not
simulated. Spectral indices are not measured: all their values are masked NOVALUE|DONOTUSE.

    python mock_manga.py --data-dir data/manga --n-galaxies 24 --seed 1 --bundles 19 --jobs 2
    python mock_manga.py --data-dir data/manga --from-maps manga-7815-3702-MAPS-HYB10.fits.gz
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import utils
from utils import DataError

if TYPE_CHECKING:
    from astropy.io import fits

log = logging.getLogger(__name__)

C_KMS = 299792.458
DAPTYPE = "SPX-MILESHC-MASTARSSP"
DAPTYPES = (
    "HYB10-MILESHC-MASTARHC2",
    "SPX-MILESHC-MASTARSSP",
    "HYB10-MILESHC-MASTARSSP",
    "VOR10-MILESHC-MASTARSSP",
)
DAPALL = "dapall-v3_1_1-3.1.0.fits"
TRUTH_SCHEMA, TRUTH_VERSION = "manga-mock-truth", 1

N_BANDS, LOG_WAVE0, LOG_STEP = 4563, 3.5589, 1e-4
SPAXEL_ARCSEC = 0.5
FIBRE_PITCH_ARCSEC = 2.5
"""Distance of neighbouring fibres; their core is 2.0 arcsec wide (Drory et al. 2015)."""

BUNDLES: dict[int, tuple[int, int, float]] = {
    19: (2, 34, 0.117),
    37: (3, 44, 0.235),
    61: (4, 54, 0.234),
    91: (5, 64, 0.118),
    127: (6, 74, 0.296),
}
"""Fibres -> rings around the central fibre, spaxels on a side, share of DR17's galaxies."""

Z_QUANTILES = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
Z_OF_BUNDLE: dict[int, tuple[float, ...]] = {
    19: (0.0050, 0.0150, 0.0183, 0.0206, 0.0245, 0.0305, 0.0422, 0.0617, 0.0819, 0.1314, 0.1472),
    37: (0.0050, 0.0151, 0.0185, 0.0217, 0.0266, 0.0377, 0.0548, 0.0851, 0.1112, 0.1407, 0.1670),
    61: (0.0050, 0.0152, 0.0188, 0.0217, 0.0271, 0.0407, 0.0626, 0.0957, 0.1197, 0.1415, 0.1497),
    91: (0.0050, 0.0154, 0.0189, 0.0216, 0.0268, 0.0396, 0.0620, 0.0961, 0.1223, 0.1422, 0.1497),
    127: (0.0050, 0.0138, 0.0173, 0.0202, 0.0253, 0.0378, 0.0548, 0.0851, 0.1115, 0.1402, 0.1497),
}
"""Redshift quantiles by bundle, from DR17's drpall (the few nearer than 0.005 are left out)."""

# Mask bits (sdssMaskbits.par: MANGA_DAPPIXMASK of maps, MANGA_DAPSPECMASK of cubes)
NOCOV, LOWCOV, DEADFIBER, FORESTAR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
NOVALUE, MATHERROR, FITFAILED, NEARBOUND = 1 << 4, 1 << 6, 1 << 7, 1 << 8
DONOTUSE = 1 << 30
SPEC_IGNORED, SPEC_FORESTAR, SPEC_FLUXINVALID, SPEC_IVARINVALID = 1, 2, 4, 8
SPEC_ARTIFACT, SPEC_FITIGNORED, SPEC_NOMODEL = 16, 32, 512

LSF_NODES = (
    (3600, 4000, 4500, 5000, 5500, 6000, 6500, 7000, 8000, 9000, 10000, 10400),
    (1390, 1613, 1763, 1815, 1863, 1884, 1926, 2042, 2027, 2480, 2191, 2100),
)
"""Resolving power lambda/FWHM against wavelength, read off the real spectra that the DAP ships as
its test data (DRP v2_4_3); cf. Law et al. 2016, figure 18."""

SKY_NODES = (
    (3600, 3750, 3850, 4000, 4300, 4650, 5100, 5650, 6250, 7000, 8100, 8850, 9500, 9900, 10150,
     10400),
    (0.055, 0.030, 0.0235, 0.0165, 0.0130, 0.0112, 0.0100, 0.0096, 0.0085, 0.0064, 0.0066, 0.0070,
     0.0095, 0.0120, 0.0250, 0.0450),
)  # fmt: skip
"""1-sigma noise of a spaxel without light between the sky lines, 1e-17 erg/s/cm2/Angstrom, and
(PHOTON_NODES) the variance that each unit of flux density adds; both fitted to the inverse
variances of the DAP's real test spectra at flux densities of 0.02 to 5."""
PHOTON_NODES = (
    (3600, 3850, 4650, 5650, 7000, 8850, 9600, 10150, 10400),
    (2.0e-3, 8e-4, 2.3e-4, 1.8e-4, 1.05e-4, 1.0e-4, 2.0e-4, 5e-4, 8e-4),
)

SKY_LINES = (
    (5578.3, 3.8), (5891.1, 2.0), (6302.3, 1.4), (6365.5, 1.2), (6865.0, 1.2), (7242.7, 1.4),
    (7279.5, 1.4), (7319.8, 1.35), (7343.4, 1.45), (7606.8, 1.9), (7631.3, 1.5), (7719.7, 1.35),
    (7753.5, 1.4), (7796.5, 1.3), (7825.3, 1.45), (7856.0, 1.45), (7915.9, 1.65), (7967.1, 1.4),
    (7996.5, 1.55), (8029.7, 1.4), (8290.9, 1.5), (8348.3, 2.05), (8402.3, 1.9), (8433.3, 2.1),
    (8468.4, 1.7), (8507.5, 1.4), (8633.8, 1.4), (8667.6, 1.4), (8770.0, 1.8), (8794.3, 1.35),
    (8830.8, 2.6), (8871.6, 1.4), (8890.0, 2.15), (8922.8, 2.5), (8961.9, 2.1), (9005.3, 1.9),
    (9053.2, 1.4), (9317.5, 2.85), (9341.1, 1.7), (9379.9, 4.3), (9423.2, 1.75), (9442.8, 4.3),
    (9479.8, 2.75), (9506.0, 2.25), (9525.8, 1.3), (9569.7, 2.3), (9625.0, 1.45), (9702.9, 1.5),
    (9723.0, 1.6), (9794.9, 2.4), (9851.4, 1.3), (9876.4, 2.1), (9917.4, 2.0), (9949.5, 2.3),
    (10016.1, 2.7), (10085.6, 1.9), (10127.4, 2.05), (10176.5, 2.0), (10214.1, 2.05),
    (10289.6, 3.7), (10349.0, 3.0),
)  # fmt: skip
"""Telluric emission lines: vacuum wavelength and by how much they raise the noise, measured on the
same real spectra as the ratio of the noise to its running median."""

NOISE_KERNEL_SPAXELS = 1.358
"""Width of the Gaussian that correlates the noise of neighbours: white noise so filtered has a
correlation of exp(-(d/1.92)**2/2) at d spaxels, as the cubes have (Westfall et al. 2019, eq. 6)."""

R_V = 3.1
STELLAR_TO_GAS_EBV = 0.44
"""Colour excess of the stars over that of the gas (Calzetti et al. 2000, eq. 3)."""

CASE_B = {
    "Ha-6564": 2.86, "Hb-4862": 1.0, "Hgam-4341": 0.468, "Hdel-4102": 0.259, "Heps-3971": 0.159,
    "Hzet-3890": 0.105, "Heta-3836": 0.0731, "Hthe-3798": 0.0530, "H11-3771": 0.0397,
    "H12-3751": 0.0305, "Peps-9548": 0.0366, "Pzet-9231": 0.0254, "Peta-9017": 0.0184,
}  # fmt: skip
"""Hydrogen lines over Hbeta: case B, 1e4 K, 100 cm-3 (Osterbrock & Ferland 2006, table 4.4)."""

TIED: dict[str, tuple[str, float]] = {
    "OIII-4960": ("OIII-5008", 0.340),
    "NII-6549": ("NII-6585", 0.327),
    "OI-6365": ("OI-6302", 0.328),
    "SIII-9071": ("SIII-9533", 0.405),
}
"""Weak line of a doublet from one upper level -> strong line and flux ratio: the ratios that the
DAP fixes (read off a real MAPS file for O and N; S: Osterbrock & Ferland 2006)."""

FIT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("OII-3727", "OII-3729"), ("H12-3751", "H11-3771"), ("Hthe-3798",), ("Heta-3836",),
    ("NeIII-3869", "HeI-3889", "Hzet-3890"), ("NeIII-3968", "Heps-3971"), ("Hdel-4102",),
    ("Hgam-4341",), ("HeII-4687",), ("Hb-4862",), ("OIII-4960", "OIII-5008"),
    ("NI-5199", "NI-5201"), ("HeI-5877",), ("OI-6302", "OI-6365"),
    ("NII-6549", "Ha-6564", "NII-6585"), ("SII-6718", "SII-6732"), ("HeI-7067",), ("ArIII-7137",),
    ("ArIII-7753",), ("Peta-9017",), ("Pzet-9231",), ("SIII-9071", "SIII-9533", "Peps-9548"),
)  # fmt: skip
"""Lines that are fitted together, because they overlap or because their ratio is fixed."""

Kind = Literal["star-forming", "composite", "Seyfert", "LINER"]
NUCLEI: dict[str, dict[str, float]] = {
    "Seyfert": {"o3": 0.90, "n2": 0.02, "s2": -0.25, "o1": -0.85, "o2": 0.45, "he2": 0.20},
    "LINER": {"o3": 0.42, "n2": 0.12, "s2": 0.05, "o1": -0.65, "o2": 0.75, "he2": 0.05},
}
"""Line ratios of gas ionised by an active nucleus or by hot old stars, all as log10: [OIII]/Hb,
[NII]/Ha, [SII]/Ha, [OI]/Ha, [OII]/Hb, then HeII/Hb as it is. Seyferts and LINERs at the middle of
their sequences in Kewley et al. 2006, figures 1 and 4."""

# Stellar population nodes and absorption features
POP_LOG_AGE = (8.0, 8.7, 9.2, 9.6, 10.0)
POP_METAL = (-0.6, -0.2, 0.2)
POP_TEMPERATURE_K = (13500.0, 9500.0, 7200.0, 5900.0, 5100.0)
"""Temperature of the black body under each age: about that of the stars that dominate V."""
POP_BREAK_4000 = (0.06, 0.12, 0.22, 0.33, 0.42)
"""Depth of the 4000 Angstrom break by age (Dn4000 1.1 to 1.8; Kauffmann et al. 2003b, fig. 2)."""
POP_BALMER_JUMP = (0.20, 0.30, 0.18, 0.05, 0.0)
POP_BALMER_EW = (3.5, 8.5, 6.5, 3.0, 1.6)
"""Equivalent width of Hbeta absorption by age, Angstrom; strongest at a few 100 Myr (Gonzalez
Delgado et al. 1999, figure 4)."""
POP_METAL_EW = (0.06, 0.18, 0.42, 0.75, 1.0)
"""Strength of metal lines by age over that at 10 Gyr."""

BALMER_FEATURES = (
    (6564.6, 0.75), (4862.7, 1.0), (4341.7, 1.05), (4102.9, 1.1), (3971.2, 1.0), (3890.2, 0.9),
    (3836.5, 0.8), (3799.0, 0.65), (3771.7, 0.5), (3751.2, 0.4),
)  # fmt: skip
METAL_FEATURES = (
    # name, vacuum wavelength, own width (sigma) in Angstrom, EW in Angstrom at 10 Gyr and solar,
    # d log EW / d[Z/H]
    ("CaK", 3934.8, 6.0, 8.0, 0.15), ("CaH", 3969.6, 6.0, 6.0, 0.15),
    ("CN", 4170.0, 18.0, 3.0, 0.7),
    ("Ca4227", 4227.9, 3.5, 1.3, 0.5), ("Gband", 4304.5, 10.0, 5.5, 0.25),
    ("Fe4383", 4384.8, 7.0, 4.5, 0.5), ("Fe4531", 4532.5, 9.0, 3.0, 0.35),
    ("C4668", 4669.0, 14.0, 4.5, 0.8), ("Fe5015", 5016.5, 12.0, 4.5, 0.35),
    ("Mg1", 5102.0, 24.0, 3.0, 0.6), ("Mgb1", 5168.8, 3.5, 1.2, 0.5),
    ("Mgb2", 5174.1, 3.5, 1.6, 0.5), ("Mgb3", 5185.0, 3.5, 1.5, 0.5),
    ("Fe5270", 5271.0, 7.0, 2.7, 0.45), ("Fe5335", 5336.5, 7.0, 2.5, 0.5),
    ("Fe5406", 5407.5, 5.5, 1.5, 0.5), ("Fe5709", 5710.5, 5.0, 0.8, 0.4),
    ("Fe5782", 5783.5, 5.0, 0.7, 0.5), ("NaD1", 5891.6, 2.5, 1.7, 0.5),
    ("NaD2", 5897.6, 2.5, 1.4, 0.5), ("TiO1", 5965.0, 18.0, 2.2, 0.5),
    ("TiO2", 6230.0, 28.0, 4.5, 0.5), ("Fe6497", 6498.0, 5.0, 0.8, 0.3),
    ("CaH", 6830.0, 22.0, 1.6, 0.4), ("TiO7100", 7110.0, 32.0, 4.5, 0.5),
    ("TiO7670", 7690.0, 35.0, 4.0, 0.5), ("NaI8190", 8190.0, 5.0, 0.7, 0.6),
    ("CaT1", 8500.4, 3.5, 1.5, 0.2), ("CaT2", 8544.4, 4.5, 3.6, 0.2),
    ("CaT3", 8664.5, 4.0, 3.0, 0.2), ("TiO8860", 8870.0, 30.0, 3.0, 0.5),
)  # fmt: skip
"""Absorption features of the stars; strengths of the order of the Lick indices of old solar
populations (Worthey et al. 1994; Thomas et al. 2011), calcium triplet after Cenarro et al. 2001."""


@dataclass(frozen=True)
class MockConfig:
    """Simulate MaNGA galaxies in the DR17 file format, with the truth beside them."""

    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else ./data/manga."""
    n_galaxies: int = 24
    """Number of galaxies (plateifus); one in 72, and the twelfth, shows a galaxy a second time."""
    seed: int = 1
    """Same seed, same bytes; galaxy k is the same whatever the number of galaxies."""
    bundles: tuple[int, ...] = ()
    """Bundle sizes to draw from (19 37 61 91 127); default all five as often as in DR17."""
    jobs: int = 1
    """Processes."""
    overwrite: bool = False
    """Simulate again what exists already."""
    from_maps: Path | None = None
    """Real MAPS file (22 or 35 channels) whose LOGCUBE to re-synthesise; nothing else is made."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class GalaxyParams:
    """What a galaxy is; everything is drawn by `draw_params`.

    Angles in degrees, position angle from north to east; radii in arcsec; velocities in km/s.
    `flux_re` is the continuum at 5500 Angstrom (rest) at the effective radius, 1e-17
    erg/s/cm2/Angstrom/spaxel. `logoh_re` is 12+log(O/H) of the gas at the effective radius,
    `logoh_slope` its gradient in dex per effective radius.
    """

    plateifu: str
    mangaid: str
    seed: int
    index: int
    twin_of: int
    kind: Kind
    bundle: int
    z: float
    ra: float
    dec: float
    ebv_gal: float
    r_eff: float
    axis_ratio: float
    pa: float
    flux_re: float
    bulge_fraction: float
    v_max: float
    r_turn: float
    sigma_disc: float
    sigma_bulge: float
    sigma_gas: float
    log_age_re: float
    metal_re: float
    ew_ha: float
    ebv_re: float
    logoh_re: float
    logoh_slope: float
    ionisation: float
    nitrogen: float
    agn_fraction: float
    agn_radius: float
    seeing_arcsec: float
    noise_scale: float
    foreground_star: bool
    dead_fibre: bool


@dataclass
class Scene:
    """A galaxy as the spectrograph would see it without noise.

    Spectra are (band, spaxel), maps of spaxels (spaxel,) in the order of `ys`, `xs`; fluxes are
    free of Galactic reddening.

    Attributes
    ----------
    size : int
        Spaxels on a side.
    ys, xs : (spaxel,) int
        Spaxels with any coverage.
    coverage : (spaxel,) float
        Weight of the fibres there over that in the middle, 0 to 1.
    bits : (y, x) int32
        MANGA_DAPPIXMASK of the spaxels before any fit.
    stellar : (band, spaxel) float32
    line_flux : dict of line name -> (spaxel,)
        1e-17 erg/s/cm2/spaxel.
    gas_v, gas_sigma, star_v, star_sigma : (spaxel,) km/s
        Velocities relative to `z`; widths without the instrument.
    cards : dict
        Primary header cards.
    truth : dict of name -> (spaxel,)
        Further maps for the truth file.
    """

    plateifu: str
    z: float
    ebv_gal: float
    size: int
    ys: np.ndarray
    xs: np.ndarray
    coverage: np.ndarray
    bits: np.ndarray
    stellar: np.ndarray
    line_flux: dict[str, np.ndarray]
    gas_v: np.ndarray
    gas_sigma: np.ndarray
    star_v: np.ndarray
    star_sigma: np.ndarray
    noise_scale: float
    cards: dict[str, Any]
    truth: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Galaxy:
    """A scene, observed: noise, masks and what a fit measures on them.

    Attributes
    ----------
    emline : (band, spaxel) float32
        Noiseless emission lines, not reddened by the Galaxy.
    flux, ivar : (band, spaxel) float32
        As in the LOGCUBE: reddened; 0 where `bad`.
    bad : (band, spaxel) bool
        Pixels lost to cosmic rays and the like.
    binned : (spaxel,) bool
        Spaxels that the DAP would fit.
    fit : dict of name -> (line, spaxel) or (spaxel,)
        See `fit_lines`.
    """

    scene: Scene
    redcorr: np.ndarray
    emline: np.ndarray
    flux: np.ndarray
    ivar: np.ndarray
    bad: np.ndarray
    binned: np.ndarray
    mflux: np.ndarray
    mflux_ivar: np.ndarray
    snr: np.ndarray
    fit: dict[str, np.ndarray]


# Grids, instrument, curves


def wave_grid() -> np.ndarray:
    """Vacuum wavelengths of the cubes, (4563,) Angstrom: 10**(3.5589 + 1e-4 i)."""
    return 10 ** (LOG_WAVE0 + LOG_STEP * np.arange(N_BANDS))


def wave_edges() -> np.ndarray:
    """Edges of the pixels, (4564,) Angstrom."""
    return 10 ** (LOG_WAVE0 + LOG_STEP * (np.arange(N_BANDS + 1) - 0.5))


def instrument_sigma_kms(wave_aa: np.ndarray | float) -> np.ndarray:
    """Gaussian width of the line spread at observed wavelengths, km/s (LSF_NODES)."""
    power = np.interp(wave_aa, *LSF_NODES)
    return C_KMS / (power * 2 * np.sqrt(2 * np.log(2)))


def extinction_curve(wave_aa: np.ndarray) -> np.ndarray:
    """A_lambda / E(B-V) for R_V = 3.1 after O'Donnell (1994), CCM89 outside of the optical."""
    return R_V * _curve(tuple(np.atleast_1d(wave_aa).tolist()))


@lru_cache(maxsize=8)
def _curve(wave_aa: tuple[float, ...]) -> np.ndarray:
    """A_lambda / A_V of O'Donnell (1994)."""
    from astropy import units
    from dust_extinction.parameter_averages import O94

    return np.asarray(O94(Rv=R_V)(np.array(wave_aa) * units.AA), dtype=float)


def hexagon_distance(x_arcsec: np.ndarray, y_arcsec: np.ndarray, radius: float) -> np.ndarray:
    """Distance inwards from the edge of a hexagon with two corners on the x axis, arcsec."""
    half = np.sqrt(3) / 2
    x, y = np.abs(x_arcsec), np.abs(y_arcsec)
    return half * radius - np.maximum(y, half * x + y / 2)


def sky_offsets(size: int, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Offsets from the bundle's centre, east and north in arcsec, both (y, x).

    Columns count against right ascension; the centre is pixel size/2 counted from 0.
    """
    steps = (np.arange(-pad, size + pad) - size // 2) * SPAXEL_ARCSEC
    north, east = np.meshgrid(steps, -steps, indexing="ij")
    return east, north


def elliptical_coordinates(
    east: np.ndarray, north: np.ndarray, pa_deg: float, axis_ratio: float
) -> tuple[np.ndarray, np.ndarray]:
    """Radius along the major axis (arcsec) and azimuth (degrees) in an inclined disc's plane."""
    pa = np.deg2rad(pa_deg)
    major = east * np.sin(pa) + north * np.cos(pa)
    minor = (-east * np.cos(pa) + north * np.sin(pa)) / axis_ratio
    return np.hypot(major, minor), np.rad2deg(np.arctan2(minor, major)) % 360


# Drawing galaxies


def plateifu_of_index(index: int, bundle: int) -> str:
    """Name of the mock galaxy: plates from 13001 on, which the survey never had."""
    return f"{13001 + index // 2}-{bundle}{1 + index % 2:02d}"


def twin_index(index: int) -> int:
    """Galaxy that this one observes again (itself, mostly): 1.4 % as in DR17, first the 12th."""
    return index - 7 if index % 72 == 11 else index


def draw_params(seed: int, index: int, bundles: Sequence[int] = ()) -> GalaxyParams:
    """Draw galaxy number `index` of a seeded survey.

    Metallicity and kind follow a low-discrepancy sequence over the index (a Kronecker sequence on
    the powers of the plastic number), so that a small survey covers both evenly and in all
    combinations; all else is random and independent of them.

    Parameters
    ----------
    seed, index : int
    bundles : sequence of int
        Sizes to draw from; default all, as often as in DR17.

    Raises
    ------
    DataError
        If a bundle size does not exist.
    """
    wrong = sorted(set(bundles) - BUNDLES.keys())
    if wrong:
        raise DataError(
            f"--bundles {wrong[0]}: MaNGA has bundles of {', '.join(map(str, BUNDLES))}."
        )
    sizes = tuple(dict.fromkeys(bundles)) or tuple(BUNDLES)
    body = twin_index(index)
    offset = np.random.default_rng([seed, 0]).random(2)
    even = (offset + body * np.array([0.7548776662466927, 0.5698402909980532])) % 1
    rng = np.random.default_rng([seed, 1, body])
    share = np.array([BUNDLES[b][2] for b in sizes])
    bundle = int(rng.choice(sizes, p=share / share.sum()))
    radius = BUNDLES[bundle][0] * FIBRE_PITCH_ARCSEC + 1.25
    cos_i = rng.uniform(0.35, 1.0)
    sin_i = np.sqrt(1 - cos_i**2)
    kind = _kind(even[1])
    r_eff = radius / rng.uniform(1.4, 2.6)
    quiet = kind == "LINER"
    params: dict[str, Any] = {
        "z": float(np.interp(rng.random(), Z_QUANTILES, Z_OF_BUNDLE[bundle])),
        "ra": rng.uniform(0, 360),
        "dec": float(np.rad2deg(np.arcsin(rng.uniform(-0.05, 0.9)))),
        "ebv_gal": float(np.clip(0.03 * np.exp(0.7 * rng.standard_normal()), 0.005, 0.3)),
        "r_eff": r_eff,
        # a disc of finite thickness, 0.2 (Holmberg 1958)
        "axis_ratio": float(np.sqrt((1 - 0.2**2) * cos_i**2 + 0.2**2)),
        "pa": rng.uniform(0, 360),
        "flux_re": 0.13 * 10 ** (0.13 * rng.standard_normal()),
        "bulge_fraction": rng.uniform(0.0, 0.35),
        "v_max": rng.uniform(110, 260) * sin_i,
        "r_turn": rng.uniform(0.2, 0.5) * r_eff,
        "sigma_disc": rng.uniform(30, 70),
        "sigma_bulge": rng.uniform(90, 180),
        "sigma_gas": rng.uniform(18, 30),
        "log_age_re": rng.uniform(9.7, 9.9) if quiet else rng.uniform(8.9, 9.6),
        "ew_ha": 10 ** (rng.uniform(0.75, 0.95) if quiet else rng.uniform(1.1, 1.55)),
        "ebv_re": rng.uniform(0.05, 0.35),
        "logoh_re": 8.38 + 0.27 * even[0],
        "logoh_slope": -0.10 + 0.06 * rng.standard_normal(),
        "ionisation": 0.06 * rng.standard_normal(),
        "nitrogen": 0.03 * rng.standard_normal(),
        "agn_fraction": _agn_fraction(kind, rng),
        "agn_radius": r_eff * rng.uniform(0.25, 0.5),
    }
    # stars follow the gas loosely (solar 8.69, Asplund et al. 2009)
    params["metal_re"] = params["logoh_re"] - 8.69 + 0.1 * rng.standard_normal()
    here = np.random.default_rng([seed, 2, index])  # of this observation
    return GalaxyParams(
        plateifu=plateifu_of_index(index, bundle),
        mangaid=f"99-{100001 + body}",
        seed=seed,
        index=index,
        twin_of=body,
        kind=kind,
        bundle=bundle,
        seeing_arcsec=here.uniform(2.4, 2.65),
        noise_scale=here.uniform(0.85, 1.15),
        foreground_star=bool(here.random() < 0.12),
        dead_fibre=bool(here.random() < 0.10),
        **{k: float(v) for k, v in params.items()},
    )


def _kind(u: float) -> Kind:
    """Kind of galaxy for a number in [0, 1): a quarter has a centre that is not star-forming."""
    if u < 0.74:
        return "star-forming"
    if u < 0.83:
        return "composite"
    return "Seyfert" if u < 0.94 else "LINER"


def _agn_fraction(kind: Kind, rng: np.random.Generator) -> float:
    """Halpha of the active nucleus over that of the H II regions, in the centre."""
    low, high = {
        "star-forming": (0.0, 0.0),
        "composite": (0.5, 1.0),
        "Seyfert": (2.5, 6.0),
        "LINER": (3.0, 5.0),
    }[kind]
    return float(rng.uniform(low, high))


# Stars


def stellar_templates(z: float, sigma_kms: float, over: int = 2, pad: int = 60) -> np.ndarray:
    """Spectra of simple populations at a redshift, blurred by stars' motion and the instrument.

    A black body under absorption features whose strengths follow age and metallicity; features
    are Gaussian in the exponent, so that the width of all three blurs adds in quadrature.

    Parameters
    ----------
    z : float
    sigma_kms : float
        Velocity dispersion.
    over, pad : int
        Samples per pixel of the cube's grid, and samples added on both sides, for shifting.

    Returns
    -------
    (age, metallicity, sample) float32
        Flux density, 1 at 5500 Angstrom rest. Sample `pad + over*i` is pixel i.
    """
    samples = np.arange(-pad, over * N_BANDS + pad)
    wave = 10 ** (LOG_WAVE0 + LOG_STEP / over * samples) / (1 + z)
    blur_kms = np.hypot(instrument_sigma_kms(wave * (1 + z)), sigma_kms)
    out = np.empty((len(POP_LOG_AGE), len(POP_METAL), wave.size), np.float32)
    for i in range(len(POP_LOG_AGE)):
        for j, metal in enumerate(POP_METAL):
            out[i, j] = _population(wave, blur_kms, i, metal)
    return out


def _population(wave: np.ndarray, blur_kms: np.ndarray, i: int, metal: float) -> np.ndarray:
    """One population's spectrum at rest wavelengths."""
    temperature = POP_TEMPERATURE_K[i] * 10 ** (-0.04 * metal)

    def planck(w: np.ndarray | float) -> np.ndarray:
        return w**-5.0 / np.expm1(1.43878e8 / (w * temperature))

    depth = POP_BREAK_4000[i] * 10 ** (0.25 * metal)
    blueward = 1 / (1 + np.exp((wave - 3985) / 22))
    jump = POP_BALMER_JUMP[i] / (1 + np.exp((wave - 3700) / 12))
    tau = np.zeros_like(wave)
    features = [(w, 7.0, POP_BALMER_EW[i] * s) for w, s in BALMER_FEATURES]
    features += [
        (w, s, ew * POP_METAL_EW[i] * 10 ** (g * metal)) for _, w, s, ew, g in METAL_FEATURES
    ]
    for centre, sigma, ew in features:
        total = np.hypot(sigma, np.interp(centre, wave, blur_kms) / C_KMS * centre)
        lo, hi = np.searchsorted(wave, (centre - 5 * total, centre + 5 * total))
        near = wave[lo:hi]
        tau[lo:hi] += (
            ew / (total * np.sqrt(2 * np.pi)) * np.exp(-0.5 * ((near - centre) / total) ** 2)
        )
    return planck(wave) / planck(5500.0) * (1 - depth * blueward) * (1 - jump) * np.exp(-tau)


def population_weights(log_age: np.ndarray, metal: np.ndarray) -> np.ndarray:
    """Share of each population node, bilinear; (age, metallicity, ...) that sums to 1."""

    def linear(value: np.ndarray, nodes: Sequence[float]) -> np.ndarray:
        eye = np.eye(len(nodes))
        return np.stack([np.interp(value, nodes, row) for row in eye])

    return linear(log_age, POP_LOG_AGE)[:, None] * linear(metal, POP_METAL)[None]


# Gas


def hii_ratios(
    logoh: np.ndarray, ionisation: np.ndarray, nitrogen: np.ndarray
) -> dict[str, np.ndarray]:
    """Line fluxes of H II regions over Hbeta, free of dust.

    [NII]/Ha and [OIII]/Hb are such that the N2 and O3N2 calibrations of Marino et al. (2013, eqs.
    2 and 4) both return `logoh` where the two offsets vanish; ionisation raises [OIII], lowers
    [NII] by a third of that (Kewley & Dopita 2002, figs. 3 and 7) and the low-ionisation lines.
    [OII] follows the Te-based N2O2 calibration of Bresolin (2007, eq. 3) taken linearly about its
    middle; [SII], [OI], He, Ne, Ar and S lie in the middle of the H II regions of CALIFA.

    Parameters
    ----------
    logoh : array
        12+log(O/H).
    ionisation, nitrogen : arrays
        Offsets in dex from the mean relation: of [OIII]/Hb, of N/O.
    """
    n2 = (logoh - 8.743) / 0.462
    o3 = (8.533 - logoh) / 0.214 + n2 + ionisation
    n2 = n2 - 0.3 * ionisation + nitrogen
    s2 = -0.48 + 0.25 * (n2 + 0.5) - 0.4 * ionisation - 0.2 * nitrogen
    o1 = s2 - 1.1
    o2 = n2 - nitrogen + np.log10(2.86) - (logoh - 8.66) / 0.50 - 0.30
    return _assemble(o3, n2, s2, o1, o2, 0.003, helium=0.12)


def nuclear_ratios(name: str, scatter: np.ndarray) -> dict[str, np.ndarray]:
    """Line fluxes over Hbeta of gas that is not ionised by young stars (NUCLEI)."""
    r = NUCLEI[name]
    return _assemble(
        r["o3"] + scatter, r["n2"] - 0.3 * scatter, r["s2"] - 0.3 * scatter,
        r["o1"] - 0.3 * scatter, r["o2"] - 0.2 * scatter, r["he2"], helium=0.13,
    )  # fmt: skip


def _assemble(
    o3: np.ndarray,
    n2: np.ndarray,
    s2: np.ndarray,
    o1: np.ndarray,
    o2: np.ndarray,
    he2: float,
    helium: float,
) -> dict[str, np.ndarray]:
    """All 35 lines over Hbeta from the logarithms of the strong ratios."""
    one = np.ones_like(o3)
    ha = CASE_B["Ha-6564"]
    oiii, oii = 10**o3, 10**o2
    sii, nii, oi = ha * 10**s2, ha * 10**n2, ha * 10**o1
    lines = {name: ratio * one for name, ratio in CASE_B.items()}
    # doublet ratios at 100 cm-3, He and Ne: Osterbrock & Ferland 2006, tables 4.6, 5.8 and 3.12
    lines |= {
        "OII-3727": oii / 2.35, "OII-3729": oii * 1.35 / 2.35, "NeIII-3869": 0.085 * oiii,
        "NeIII-3968": 0.301 * 0.085 * oiii, "HeI-3889": 0.80 * helium * one,
        "HeI-5877": helium * one, "HeI-7067": 0.22 * helium * one, "HeII-4687": he2 * one,
        "OIII-5008": oiii, "NI-5199": 0.04 * oi, "NI-5201": 0.05 * oi, "OI-6302": oi,
        "NII-6585": nii, "SII-6718": sii * 1.35 / 2.35, "SII-6732": sii / 2.35,
        "ArIII-7137": 0.07 * one, "ArIII-7753": 0.24 * 0.07 * one, "SIII-9533": 0.45 * one,
    }  # fmt: skip
    for weak, (strong, ratio) in TIED.items():
        lines[weak] = ratio * lines[strong]
    return lines


def logoh_o3n2(flux: Mapping[str, np.ndarray]) -> np.ndarray:
    """12+log(O/H) by O3N2, Marino et al. (2013), eq. 2: 8.533 - 0.214 O3N2; NaN without flux."""
    o3 = _log_ratio(flux["OIII-5008"], flux["Hb-4862"])
    return 8.533 - 0.214 * (o3 - _log_ratio(flux["NII-6585"], flux["Ha-6564"]))


def logoh_n2(flux: Mapping[str, np.ndarray]) -> np.ndarray:
    """12+log(O/H) by N2, Marino et al. (2013), eq. 4: 8.743 + 0.462 N2; NaN without flux."""
    return 8.743 + 0.462 * _log_ratio(flux["NII-6585"], flux["Ha-6564"])


def bpt_class(flux: Mapping[str, np.ndarray]) -> np.ndarray:
    """0 star-forming, 1 composite, 2 AGN, -1 without flux; int16.

    Below Kauffmann et al. (2003, eq. 1), between, above Kewley et al. (2001, eq. 5).
    """
    x = _log_ratio(flux["NII-6585"], flux["Ha-6564"])
    y = _log_ratio(flux["OIII-5008"], flux["Hb-4862"])
    with np.errstate(divide="ignore", invalid="ignore"):
        pure = (x < 0.05) & (y < 0.61 / (x - 0.05) + 1.3)
        maximal = (x < 0.47) & (y < 0.61 / (x - 0.47) + 1.19)
    out = np.where(pure, 0, np.where(maximal, 1, 2)).astype(np.int16)
    out[~np.isfinite(x) | ~np.isfinite(y)] = -1
    return out


def _log_ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """log10(a/b), NaN where either is not positive."""
    good = (a > 0) & (b > 0)
    return np.log10(np.where(good, a, np.nan) / np.where(good, b, 1))


# Seeing and noise kernels


def blur_matrix(size: int, pad: int, sigma_spaxels: float) -> np.ndarray:
    """Matrix (size, size + 2 pad) that blurs one axis by a Gaussian and crops the padding."""
    out = np.arange(size)[:, None] + pad - np.arange(size + 2 * pad)[None]
    kernel = np.exp(-0.5 * (out / sigma_spaxels) ** 2)
    return kernel / kernel[size // 2].sum()


def blur(maps: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Blur and crop maps (..., y, x) with `blur_matrix` along both axes."""
    return matrix @ maps @ matrix.T


def smooth_field(rng: np.random.Generator, size: int, scale_spaxels: float) -> np.ndarray:
    """Gaussian random field (y, x) of unit variance, correlated over a scale."""
    pad = int(4 * scale_spaxels) + 1
    matrix = blur_matrix(size, pad, scale_spaxels)
    matrix /= np.sqrt((matrix**2).sum(axis=1, keepdims=True))
    return blur(rng.standard_normal((size + 2 * pad, size + 2 * pad)), matrix)


def correlated_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise (band, y, x) of unit variance, correlated between neighbouring spaxels.

    See NOISE_KERNEL_SPAXELS. Wavelengths are independent, as nearly so in the real cubes.
    """
    matrix = blur_matrix(size, 0, NOISE_KERNEL_SPAXELS).astype(np.float32)
    matrix /= np.sqrt((matrix**2).sum(axis=1, keepdims=True))
    white = rng.standard_normal((N_BANDS, size, size), dtype=np.float32)
    return matrix @ (white.reshape(-1, size) @ matrix.T).reshape(white.shape)


@lru_cache(maxsize=1)
def sky_sigma() -> np.ndarray:
    """Noise of a spaxel without light, (4563,) 1e-17 erg/s/cm2/Angstrom."""
    wave = wave_grid()
    raised = np.ones(N_BANDS)
    for centre, factor in SKY_LINES:
        width = centre * instrument_sigma_kms(centre) / C_KMS * 1.2
        raised += (factor - 1) * np.exp(-0.5 * ((wave - centre) / width) ** 2)
    return 10 ** np.interp(wave, SKY_NODES[0], np.log10(SKY_NODES[1])) * raised


@lru_cache(maxsize=1)
def photon_variance() -> np.ndarray:
    """Variance per unit of flux density, (4563,)."""
    return 10 ** np.interp(wave_grid(), PHOTON_NODES[0], np.log10(PHOTON_NODES[1]))


# A galaxy without noise


def build_scene(p: GalaxyParams) -> Scene:
    """Make a galaxy's noiseless spectra and maps as seen through the seeing.

    Everything is laid out on a grid somewhat larger than the field, then blurred: continuum
    spectra as weights of templates at each velocity, so that neighbouring spectra truly mix, lines
    as fluxes and flux-weighted velocity moments.
    """
    rings, size, _ = BUNDLES[p.bundle]
    radius = rings * FIBRE_PITCH_ARCSEC + 1.25
    psf = p.seeing_arcsec / SPAXEL_ARCSEC / (2 * np.sqrt(2 * np.log(2)))
    pad = int(np.ceil(3.5 * psf))
    rng = np.random.default_rng([p.seed, 3, p.twin_of])
    here = np.random.default_rng([p.seed, 4, p.index])
    east, north = sky_offsets(size, pad)
    r, azimuth = elliptical_coordinates(east, north, p.pa, p.axis_ratio)
    re = r / p.r_eff
    n = size + 2 * pad
    fields = {
        name: smooth_field(rng, n, scale)
        for name, scale in (("age", 3), ("metal", 4), ("dust", 2.5), ("clump", 1.6),
                            ("logoh", 3), ("ion", 2.5), ("nitrogen", 4), ("agn", 3))
    }  # fmt: skip

    # light: exponential disc (1.678 scale lengths to Re) and a de Vaucouleurs bulge
    disc = p.flux_re * np.exp(-1.678 * (re - 1))
    r_bulge = np.maximum(np.hypot(east, north), 0.25) / (0.25 * p.r_eff)
    bulge = np.exp(-7.669 * (r_bulge**0.25 - 1))
    bulge *= p.bulge_fraction / (1 - p.bulge_fraction) * disc.sum() / bulge.sum()
    ebv = np.clip(p.ebv_re * 10 ** (-0.15 * (re - 1) + 0.12 * fields["dust"]), 0, 1)
    log_age = np.clip(p.log_age_re - 0.15 * (re - 1) + 0.12 * fields["age"], 8.0, 10.0)
    metal = np.clip(p.metal_re + p.logoh_slope * (re - 1) + 0.05 * fields["metal"], -0.6, 0.2)
    v_field = p.v_max * np.tanh(r / p.r_turn) * np.cos(np.deg2rad(azimuth))

    matrix = blur_matrix(size, pad, psf)
    disc_light, bulge_light = blur(disc, matrix), blur(bulge, matrix)
    cover, bits, inside = _field_of_view(size, radius)
    star_yx = _foreground_star(p, here, radius)
    dead_yx = _dead_fibre(p, here, rings)
    _flag_disc(bits, size, star_yx, 1.3 * p.seeing_arcsec, FORESTAR)
    _flag_disc(bits, size, dead_yx, 1.2, DEADFIBER)
    if dead_yx:
        cover[(bits & DEADFIBER) > 0] *= 0.3
    ys, xs = np.nonzero(inside)

    # stars
    weights = population_weights(log_age, metal)  # (age, metallicity, y, x)
    stars_v = 0.85 * v_field  # asymmetric drift
    disc_templates = stellar_templates(p.z, p.sigma_disc)
    stellar = _mix_templates(disc_templates, weights * disc, stars_v, matrix, ys, xs)
    old = population_weights(np.array(9.95), np.array(np.clip(p.metal_re + 0.15, -0.6, 0.2)))
    bulge_template = stellar_templates(p.z, p.sigma_bulge)
    stellar += np.outer(
        np.tensordot(old, _at_shift(bulge_template, 0), 2), bulge_light[ys, xs]
    ).astype(np.float32)
    light = disc_light + bulge_light
    stars_ebv = STELLAR_TO_GAS_EBV * blur(ebv * (disc + bulge), matrix) / light
    wave = wave_grid()
    rest_curve = extinction_curve(wave / (1 + p.z)) - R_V
    stellar *= np.exp(np.outer(-0.4 * np.log(10) * rest_curve, stars_ebv[ys, xs])).astype(
        np.float32
    )

    # gas, on the fine grid
    ha_wave = np.array([6564.632])
    red_ha = 10 ** (-0.4 * STELLAR_TO_GAS_EBV * ebv * (extinction_curve(ha_wave)[0] - R_V))
    near_ha = int(np.argmin(np.abs(wave - 6530 * (1 + p.z))))
    cont_ha = np.tensordot(_at_shift(disc_templates, 0)[..., near_ha], weights, 2) * disc * red_ha
    log_ew = np.log10(p.ew_ha) + 0.12 * (re - 1).clip(-1, 1) + 0.18 * fields["clump"]
    ha = 10 ** np.clip(log_ew, 0, 2.2) * (1 + p.z) * cont_ha
    logoh = p.logoh_re + p.logoh_slope * (np.minimum(re, 2) - 1) + 0.035 * fields["logoh"]
    logoh = np.clip(logoh, 8.1, 8.75)
    lines = hii_ratios(
        logoh,
        p.ionisation + 0.04 * fields["ion"],
        p.nitrogen + 0.02 * fields["nitrogen"],
    )
    lines = {name: ha * ratio / lines["Ha-6564"] for name, ratio in lines.items()}
    sigma2 = np.full_like(ha, p.sigma_gas**2)
    if p.agn_fraction > 0:
        nuclear = "Seyfert" if p.kind == "Seyfert" else "LINER"
        gas = nuclear_ratios(nuclear, 0.08 * fields["agn"])
        if p.kind == "LINER":  # old stars ionise the whole disc (Belfiore et al. 2016)
            ha = ha / (1 + p.agn_fraction)
            lines = {name: f / (1 + p.agn_fraction) for name, f in lines.items()}
            agn = p.agn_fraction * ha
        else:
            agn = p.agn_fraction * ha[r < p.r_eff / 3].mean() * np.exp(-r / p.agn_radius)
        for name in lines:
            lines[name] = lines[name] + agn * gas[name] / gas["Ha-6564"]
        sigma2 += agn / (ha + agn) * 90.0**2
    line_wave = _line_waves()
    curve = extinction_curve(np.array(list(line_wave.values())))
    dust = dict(zip(line_wave, curve - curve[list(line_wave).index("Ha-6564")], strict=True))
    lines = {k: f * 10 ** (-0.4 * ebv * dust[k]) for k, f in lines.items()}

    # seeing
    flux = {k: blur(f, matrix)[ys, xs] for k, f in lines.items()}
    total = lines["Ha-6564"]
    seen = blur(total, matrix)
    v = blur(total * v_field, matrix) / seen
    sigma = np.sqrt(blur(total * (v_field**2 + sigma2), matrix) / seen - v**2)
    star_v = blur(disc * stars_v, matrix) / light
    second = blur(disc * (stars_v**2 + p.sigma_disc**2) + bulge * p.sigma_bulge**2, matrix) / light
    star_sigma = np.sqrt(second - star_v**2)
    if star_yx:
        stellar += _star_light(p, here, star_yx, psf, ys, xs)

    crop = np.s_[pad : pad + size, pad : pad + size]
    truth = {
        "logoh_physical": logoh[crop],
        "gas_ebv": blur(ebv * total, matrix) / seen,
        "stellar_log_age": blur(disc * log_age + bulge * 9.95, matrix) / light,
        "stellar_metallicity": blur(disc * metal + bulge * min(p.metal_re + 0.15, 0.2), matrix)
        / light,
    }
    return Scene(
        plateifu=p.plateifu,
        z=p.z,
        ebv_gal=p.ebv_gal,
        size=size,
        ys=ys,
        xs=xs,
        coverage=cover[ys, xs],
        bits=bits,
        stellar=stellar,
        line_flux=flux,
        gas_v=v[ys, xs],
        gas_sigma=sigma[ys, xs],
        star_v=star_v[ys, xs],
        star_sigma=star_sigma[ys, xs],
        noise_scale=p.noise_scale,
        cards=_cards_of(p),
        truth={k: m[ys, xs] for k, m in truth.items()},
        meta={"params": asdict(p)},
    )


def _field_of_view(size: int, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage 0..1, mask bits and footprint (y, x) of a dithered bundle of a given radius.

    Dithering and the cube's kernel (Law et al. 2016, section 9.1) soften the edge by 1.5 arcsec.
    LOWCOV marks less than 30 % of the full weight, as the DRP does.
    """
    east, north = sky_offsets(size)
    soft = np.clip((hexagon_distance(east, north, radius) + 0.75) / 1.5, 0, 1)
    cover = soft**2 * (3 - 2 * soft)
    bits = np.zeros((size, size), np.int32)
    bits[cover < 0.3] |= LOWCOV | DONOTUSE
    bits[cover < 0.02] |= NOCOV
    return cover, bits, cover >= 0.02


def _foreground_star(
    p: GalaxyParams, rng: np.random.Generator, radius: float
) -> tuple[float, float] | None:
    """Place of a foreground star (row, column), None without one."""
    distance, angle = rng.uniform(0.45, 0.8) * radius, rng.uniform(0, 2 * np.pi)
    if not p.foreground_star:
        return None
    centre = BUNDLES[p.bundle][1] // 2
    return (
        centre + distance * np.sin(angle) / SPAXEL_ARCSEC,
        centre + distance * np.cos(angle) / SPAXEL_ARCSEC,
    )


def _dead_fibre(
    p: GalaxyParams, rng: np.random.Generator, rings: int
) -> tuple[float, float] | None:
    """Place of a dead fibre (row, column) in one of the rings but the innermost."""
    ring, angle = rng.integers(1, rings + 1), rng.integers(6) * np.pi / 3
    if not p.dead_fibre:
        return None
    centre, step = BUNDLES[p.bundle][1] // 2, ring * FIBRE_PITCH_ARCSEC / SPAXEL_ARCSEC
    return centre + step * np.sin(angle) * 0.9, centre + step * np.cos(angle) * 0.9


def _flag_disc(
    bits: np.ndarray, size: int, yx: tuple[float, float] | None, radius_arcsec: float, bit: int
) -> None:
    """Set a bit, with DONOTUSE, on the covered spaxels around a place."""
    if yx is None:
        return
    y, x = np.indices((size, size))
    near = np.hypot(y - yx[0], x - yx[1]) * SPAXEL_ARCSEC < radius_arcsec
    bits[near & ((bits & NOCOV) == 0)] |= bit | DONOTUSE


def _star_light(
    p: GalaxyParams,
    rng: np.random.Generator,
    yx: tuple[float, float],
    psf: float,
    ys: np.ndarray,
    xs: np.ndarray,
) -> np.ndarray:
    """Spectrum of a foreground star at rest (an old, metal-poor one) in each spaxel."""
    spectrum = _at_shift(stellar_templates(0.0, 10.0), 0)[3, 0]
    profile = np.exp(-0.5 * ((ys - yx[0]) ** 2 + (xs - yx[1]) ** 2) / psf**2)
    return np.outer(spectrum, rng.uniform(1, 6) * profile).astype(np.float32)


def _at_shift(templates: np.ndarray, half_pixels: int, pad: int = 60) -> np.ndarray:
    """Templates redshifted by a number of half pixels, on the cube's grid."""
    start = pad - half_pixels
    return templates[..., start : start + 2 * N_BANDS : 2]


def _mix_templates(
    templates: np.ndarray,
    weights: np.ndarray,
    v_kms: np.ndarray,
    matrix: np.ndarray,
    ys: np.ndarray,
    xs: np.ndarray,
) -> np.ndarray:
    """Sum of shifted templates through the seeing, (band, spaxel) float32.

    Velocities are split linearly between neighbouring half pixels (34.5 km/s), which broadens by
    17 km/s at most.
    """
    shift = np.log1p(v_kms / C_KMS) / (np.log(10) * LOG_STEP / 2)  # half pixels
    low = int(np.floor(shift.min()))
    steps = range(low, int(np.ceil(shift.max())) + 1)
    out = np.zeros((N_BANDS, ys.size), np.float32)
    basis, maps = [], []
    for k in steps:
        share = np.clip(1 - np.abs(shift - k), 0, None)
        if not share.any():
            continue
        maps.append(blur(weights * share, matrix)[..., ys, xs].reshape(-1, ys.size))
        basis.append(_at_shift(templates, k).reshape(-1, N_BANDS))
    used = np.concatenate(maps)
    keep = used.any(axis=1)
    np.matmul(
        np.concatenate(basis)[keep].T.astype(np.float32), used[keep].astype(np.float32), out=out
    )
    return out


def _line_waves() -> dict[str, float]:
    """Line names of DR17 and their vacuum wavelengths."""
    from mock_fits_headers import EMLINES

    return EMLINES


def _cards_of(p: GalaxyParams) -> dict[str, Any]:
    """Primary header cards that a mock galaxy sets."""
    plate, ifu = utils.split_plateifu(p.plateifu)
    ra, dec = round(p.ra, 9), round(p.dec, 9)
    longitude, latitude = galactic_coordinates(ra, dec)
    fwhm = {f"{band}FWHM": round(p.seeing_arcsec, 5) for band in "GRIZ"}
    return {
        "IFURA": round(ra, 6), "IFUDEC": round(dec, 6), "OBJRA": ra, "OBJDEC": dec,
        "CENRA": round(ra, 3), "CENDEC": round(dec, 3), "PLATEID": int(plate),
        "DESIGNID": int(plate) + 500, "IFUDSGN": int(ifu), "PLATEIFU": p.plateifu,
        "IFUGLON": round(longitude, 6), "IFUGLAT": round(latitude, 6),
        "MANGAID": p.mangaid, "EBVGAL": round(p.ebv_gal, 7), "DAPTYPE": DAPTYPE,
        "ECOOPA": round(p.pa, 3), "ECOOELL": round(1 - p.axis_ratio, 5),
        "REFF": round(p.r_eff, 5), "SCINPVEL": p.z * C_KMS,
        **fwhm,
    }  # fmt: skip


def galactic_coordinates(ra_deg: float, dec_deg: float) -> tuple[float, float]:
    """Galactic longitude and latitude in degrees from J2000 ones (ESA 1997, vol. 1, sect. 1.5.3)."""
    pole_ra, pole_dec, node = np.deg2rad([192.85948, 27.12825, 32.93192])
    ra, dec = np.deg2rad(ra_deg) - pole_ra, np.deg2rad(dec_deg)
    sin_b = np.sin(dec) * np.sin(pole_dec) + np.cos(dec) * np.cos(pole_dec) * np.cos(ra)
    y = np.sin(dec) * np.cos(pole_dec) - np.cos(dec) * np.sin(pole_dec) * np.cos(ra)
    longitude = np.arctan2(y, np.cos(dec) * np.sin(ra)) + node
    return float(np.rad2deg(longitude) % 360), float(np.rad2deg(np.arcsin(sin_b)))


# Observing


def observe(scene: Scene, rng: np.random.Generator) -> Galaxy:
    """Add noise and masks to a scene, and measure it.

    Variance: that of the sky, raised where fewer fibres cover a spaxel, plus that of the light
    itself. The cube's IVAR is its exact inverse.
    """
    wave = wave_grid()
    redcorr = 10 ** (0.4 * scene.ebv_gal * extinction_curve(wave))
    emline = draw_lines(scene)
    model = (scene.stellar + emline) / redcorr[:, None].astype(np.float32)
    var = np.outer((scene.noise_scale * sky_sigma()) ** 2, 1 / scene.coverage).astype(np.float32)
    var += photon_variance()[:, None].astype(np.float32) * np.maximum(model, 0)
    noise = correlated_noise(rng, scene.size).reshape(N_BANDS, -1)
    noise = noise[:, scene.ys * scene.size + scene.xs]
    noise *= np.sqrt(var)
    bad = _cosmic_rays(rng, noise.shape)
    ivar = np.where(bad, 0, 1 / var).astype(np.float32)
    flux = np.where(bad, 0, model + noise).astype(np.float32)

    g_band = np.exp(-(((wave - 4700) / 650) ** 4))  # about SDSS g
    weight = g_band[:, None].astype(np.float32) * ~bad
    norm = np.maximum(weight.sum(axis=0), 1e-9)
    mflux = (weight * flux).sum(axis=0) / norm
    mflux_ivar = norm**2 / np.maximum((weight**2 * np.where(bad, 0, var)).sum(axis=0), 1e-30)
    snr = (weight * flux * np.sqrt(ivar)).sum(axis=0) / norm
    good_share = 1 - bad.mean(axis=0)
    usable = (scene.bits[scene.ys, scene.xs] & DONOTUSE) == 0
    binned = usable & (snr > 1) & (good_share >= 0.8)
    fit = fit_lines(scene, noise, ivar, redcorr, rng)
    return Galaxy(
        scene, redcorr, emline, flux, ivar, bad, binned, mflux, mflux_ivar, snr, fit
    )  # fmt: skip


def _cosmic_rays(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Lost pixels (band, spaxel): 0.1 % in runs of three, as in real spectra."""
    bad = np.zeros(shape, bool)
    hits = rng.integers(0, (shape[0] - 2, shape[1]), size=(int(3.5e-4 * shape[0] * shape[1]), 2))
    for k in range(3):
        bad[hits[:, 0] + k, hits[:, 1]] = True
    return bad


def line_profiles(
    names: Sequence[str], scene: Scene, margin_aa: float = 32.0
) -> tuple[slice, np.ndarray] | None:
    """Pixels around some lines and the lines' profiles there.

    A Gaussian of the gas' width and the instrument's, integrated over each pixel.

    Returns
    -------
    slice of bands, (line, band, spaxel) float32 of 1/Angstrom; None if a line is off the grid.
    """
    from scipy.special import ndtr

    waves = np.array([_line_waves()[n] for n in names]) * (1 + scene.z)
    edges = wave_edges()
    lo, hi = waves.min() - margin_aa, waves.max() + margin_aa
    if lo < edges[0] or hi > edges[-1]:
        return None
    i0, i1 = np.searchsorted(edges, (lo, hi))
    centre = waves[:, None] * (1 + scene.gas_v / C_KMS)  # (line, spaxel)
    sigma = centre * np.hypot(scene.gas_sigma, instrument_sigma_kms(centre)) / C_KMS
    z = (edges[None, i0 : i1 + 1, None] - centre[:, None]) / sigma[:, None]
    cdf = ndtr(z.astype(np.float32))
    width = np.diff(edges[i0 : i1 + 1])[None, :, None]
    return slice(int(i0), int(i1)), (np.diff(cdf, axis=1) / width).astype(np.float32)


def draw_lines(scene: Scene) -> np.ndarray:
    """Emission-line spectra, (band, spaxel) float32, without noise and Galactic reddening."""
    out = np.zeros((N_BANDS, scene.ys.size), np.float32)
    for name, flux in scene.line_flux.items():
        drawn = line_profiles([name], scene)
        if drawn is not None:
            out[drawn[0]] += drawn[1][0] * flux.astype(np.float32)
    return out


def fit_lines(
    scene: Scene,
    noise: np.ndarray,
    ivar: np.ndarray,
    redcorr: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Measure the lines on the noise that the cube has.

    A least-squares fit of Gaussians of known place and width, after the continuum: the flux of
    line l is its truth plus (P^T W P)^-1 P^T W n, with profiles P, weights W (the inverse
    variance) and the very noise n of the cube; its variance is the diagonal of (P^T W P)^-1.
    Overlapping lines are fitted together, doublets of fixed ratio as one. Place and width are
    known because the DAP ties them over all lines (Belfiore et al. 2019, section 2.3); with a free
    width the flux errors would be 1.22 times larger. Fluxes may come out negative; the DAP's are
    cut at 0.

    Returns
    -------
    dict of (line, spaxel) float64 in the order of DR17's channels
        gflux, gflux_var (inf where there is no pixel to fit), sflux, sflux_var, cont; and
        (spaxel,) v_var, s_var: variance of velocity and width from all lines together.
    """
    names = list(_line_waves())
    row = {n: i for i, n in enumerate(names)}
    shape = (len(names), scene.ys.size)
    gflux, sflux, cont = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    gvar, svar = np.full(shape, np.inf), np.full(shape, np.inf)
    wave, step = wave_grid(), np.diff(wave_edges())
    v_info = np.zeros(scene.ys.size)
    for group in FIT_GROUPS:
        drawn = line_profiles(group, scene)
        if drawn is None:
            continue
        band, profile = drawn
        free = [n for n in group if n not in TIED]
        columns = np.stack([profile[group.index(n)] for n in free])
        for weak, (strong, ratio) in TIED.items():
            if weak in group:
                columns[free.index(strong)] += np.float32(ratio) * profile[group.index(weak)]
        red = redcorr[band, None].astype(np.float32)
        weight = ivar[band] / red**2
        clean = noise[band] * red
        normal = np.einsum("lps,ps,mps->slm", columns, weight, columns, optimize=True)
        right = np.einsum("lps,ps,ps->sl", columns, weight, clean, optimize=True)
        normal = normal.astype(float)
        measured = normal.diagonal(axis1=1, axis2=2) > 0  # (spaxel, line)
        normal[:, range(len(free)), range(len(free))] += ~measured  # keeps the matrix regular
        inverse = np.linalg.inv(normal)
        error = np.einsum("slm,sm->ls", inverse, right.astype(float))
        variance = inverse.diagonal(axis1=1, axis2=2).T
        for k, name in enumerate(free):
            i = row[name]
            gflux[i] = scene.line_flux[name] + np.where(measured[:, k], error[k], 0)
            gvar[i] = np.where(measured[:, k], variance[k], np.inf)
        for weak, (strong, ratio) in TIED.items():
            if weak in group:
                gflux[row[weak]] = ratio * gflux[row[strong]]
                gvar[row[weak]] = ratio**2 * gvar[row[strong]]
        _sum_flux(scene, group, row, band, clean, weight, wave, step, sflux, svar, cont)
    for name, i in row.items():
        centre = _line_waves()[name] * (1 + scene.z)
        total = np.hypot(scene.gas_sigma, instrument_sigma_kms(centre))
        if name not in TIED:
            # two more parameters of a Gaussian beside its flux: Lenz & Ayres 1992, eq. 1
            v_info += np.where(scene.line_flux[name] > 0, scene.line_flux[name], 0) ** 2 / (
                2 * gvar[i] * total**2
            )
    v_var = 1 / np.maximum(v_info, 1e-12)
    return {
        "gflux": gflux, "gflux_var": gvar, "sflux": sflux, "sflux_var": svar, "cont": cont,
        "v_var": v_var, "v_error": rng.standard_normal(shape[1]) * np.sqrt(v_var),
        "s_error": rng.standard_normal(shape[1]) * np.sqrt(v_var),
    }  # fmt: skip


def _sum_flux(
    scene: Scene,
    group: Sequence[str],
    row: Mapping[str, int],
    band: slice,
    noise: np.ndarray,
    weight: np.ndarray,
    wave: np.ndarray,
    step: np.ndarray,
    sflux: np.ndarray,
    svar: np.ndarray,
    cont: np.ndarray,
) -> None:
    """Flux summed over +-10 Angstrom (rest) about each line of a group, in place.

    Neighbouring lines of the group that reach into the passband are counted, as in the DAP.
    """
    drawn = line_profiles(group, scene)
    assert drawn is not None
    profile = drawn[1]
    signal = sum(profile[k] * scene.line_flux[n] for k, n in enumerate(group))
    dl = step[band, None]
    for name in group:
        centre = _line_waves()[name] * (1 + scene.z) * (1 + scene.gas_v / C_KMS)
        inside = np.abs(wave[band, None] - centre) < 10 * (1 + scene.z)
        good = inside & (weight > 0)
        i = row[name]
        sflux[i] = ((signal + noise) * dl * good).sum(axis=0)
        variance = np.divide(dl**2, weight, out=np.zeros_like(noise, dtype=float), where=good)
        whole = good.sum(axis=0) == inside.sum(axis=0)
        svar[i] = np.where(whole, variance.sum(axis=0), np.inf)
        at = np.searchsorted(wave, centre)
        cont[i] = scene.stellar[np.clip(at, 0, N_BANDS - 1), np.arange(centre.size)]


def simulate_galaxy(params: GalaxyParams) -> Galaxy:
    """Simulate one galaxy: scene, then observation; nothing but `params` decides the outcome."""
    return observe(build_scene(params), np.random.default_rng([params.seed, 5, params.index]))


# Files


def _to_image(scene: Scene, values: np.ndarray, fill: float = 0, dtype: str = "f4") -> np.ndarray:
    """Lay (..., spaxel) values onto (..., y, x); `fill` outside of the field."""
    out = np.full((*values.shape[:-1], scene.size * scene.size), fill, dtype)
    out[..., scene.ys * scene.size + scene.xs] = values
    return out.reshape(*values.shape[:-1], scene.size, scene.size)


def _bin_ids(galaxy: Galaxy) -> np.ndarray:
    """Bin numbers (5, y, x) int32: one spaxel each, -1 where there is none."""
    ids = np.where(galaxy.binned, np.cumsum(galaxy.binned) - 1, -1)
    return np.repeat(_to_image(galaxy.scene, ids, -1, "i4")[None], 5, axis=0)


def logcube_hdus(galaxy: Galaxy) -> Iterator[fits.PrimaryHDU | fits.ImageHDU]:
    """Yield the 13 HDUs of a DAP LOGCUBE, one after the other.

    Outside of the field and in spaxels that were not binned FLUX, IVAR and the models are 0 and
    flagged; models are reddened by the Galaxy like FLUX. STELLAR ends with its templates at 7409
    Angstrom (rest).
    """
    import mock_fits_headers as head

    scene = galaxy.scene
    n_bins = int(galaxy.binned.sum())
    cards = scene.cards | {"NBINS": n_bins, "NSCMOD": n_bins, "NELMOD": n_bins}
    ra, dec = cards["IFURA"], cards["IFUDEC"]
    wcs = head.wcs_cards(ra, dec, scene.size, "spectral")
    bits = scene.bits[scene.ys, scene.xs]
    shown = galaxy.binned | ((bits & FORESTAR) > 0)
    outside = SPEC_IGNORED | SPEC_FLUXINVALID | SPEC_IVARINVALID
    red = (1 / galaxy.redcorr[:, None]).astype(np.float32)
    wave = wave_grid()

    def cube(name: str, data: np.ndarray, fill: float = 0, **more: Any) -> fits.ImageHDU:
        values = np.where(shown if data.dtype == np.float32 else True, data, data.dtype.type(0))
        image = _to_image(scene, values, fill, data.dtype.str)
        return head.image_hdu(name, image, wcs, mask_set="MANGA_DAPSPECMASK", **more)

    def mask(name: str, values: np.ndarray, partners: dict[str, str]) -> fits.ImageHDU:
        image = _to_image(scene, values, fill_bits[name], "i2")
        return head.image_hdu(
            name, image, wcs, mask_set="MANGA_DAPSPECMASK", role="QUALITY", partners=partners
        )

    fill_bits = {"MASK": outside, "MODEL_MASK": SPEC_NOMODEL | SPEC_FITIGNORED}
    fill_bits["STELLAR_MASK"] = fill_bits["MODEL_MASK"]
    unit = {"unit": head.FLUX_UNIT}
    yield head.primary_hdu("LOGCUBE", cards)
    yield cube(
        "FLUX", galaxy.flux, **unit, partners={"ERRDATA": "FLUX_IVAR", "QUALDATA": "FLUX_MASK"}
    )
    yield cube(
        "IVAR", galaxy.ivar, **unit, role="ERROR", partners={"SCIDATA": "FLUX", "QUALDATA": "MASK"}
    )
    flag = np.where(galaxy.bad, outside, 0).astype(np.int16)
    flag |= np.where(
        galaxy.binned, 0, np.where(shown, SPEC_FORESTAR | SPEC_IGNORED, outside)
    ).astype(np.int16)
    yield mask("MASK", flag, {"SCIDATA": "FLUX", "ERRDATA": "IVAR"})
    lsf = (wave * instrument_sigma_kms(wave) / C_KMS).astype(np.float32)
    lsf_cube = np.broadcast_to(lsf[:, None], galaxy.flux.shape)
    yield cube(
        "LSF", lsf_cube, unit="angstrom", extra=[("DRPEXT", "LSFPRE", "Source ext from DRP file")]
    )
    yield head.image_hdu("WAVE", wave.astype(np.float32))
    yield head.image_hdu("REDCORR", galaxy.redcorr.astype(np.float32))
    model = (scene.stellar + galaxy.emline) * red * galaxy.binned
    yield cube("MODEL", model, **unit, partners={"QUALDATA": "MODEL_MASK"})
    unfit = np.int16(SPEC_NOMODEL | SPEC_FITIGNORED)
    flag = np.where(galaxy.bad, SPEC_FITIGNORED, 0).astype(np.int16)
    flag |= np.where(galaxy.binned, np.int16(0), unfit)
    flag[(wave > 5570) & (wave < 5586)] |= SPEC_ARTIFACT  # the brightest sky line
    yield mask("MODEL_MASK", flag, {"SCIDATA": "MODEL"})
    yield cube("EMLINE", galaxy.emline * red * galaxy.binned, **unit)
    beyond = wave > 7409 * (1 + scene.z)
    stellar = scene.stellar * red * galaxy.binned
    stellar[beyond] = 0
    yield cube("STELLAR", stellar, **unit, partners={"QUALDATA": "STELLAR_MASK"})
    flag[beyond] |= unfit
    yield mask("STELLAR_MASK", flag, {"SCIDATA": "STELLAR"})
    yield head.image_hdu(
        "BINID", _bin_ids(galaxy), head.wcs_cards(ra, dec, scene.size, "channel"),
        channels=head.channel_cards(head.BIN_CHANNELS), data_class="CUBE",
    )  # fmt: skip


def maps_hdus(galaxy: Galaxy) -> Iterator[fits.PrimaryHDU | fits.ImageHDU]:
    """Yield the 64 HDUs of a DAP MAPS file.

    Masked values are 0 with zero inverse variance. Simulated: coordinates, mean flux and S/N, bin
    numbers, stellar and gas kinematics, summed and Gaussian line fluxes and equivalent widths with
    their continua, instrumental widths, amplitudes, figures of merit. Spectral indices are all
    masked; template widths are those of MILES.
    """
    import mock_fits_headers as head

    scene, fit = galaxy.scene, galaxy.fit
    names = list(_line_waves())
    rest = np.array(list(_line_waves().values()))
    n_bins = int(galaxy.binned.sum())
    cards = scene.cards | {"NBINS": n_bins, "NSCMOD": n_bins, "NELMOD": n_bins} | _ring_snr(galaxy)
    ra, dec = cards["IFURA"], cards["IFUDEC"]
    flat = head.wcs_cards(ra, dec, scene.size, "image")
    deep = head.wcs_cards(ra, dec, scene.size, "channel")
    east, north = sky_offsets(scene.size)
    r, azimuth = elliptical_coordinates(east, north, cards["ECOOPA"], 1 - cards["ECOOELL"])
    r_kpc = np.deg2rad(r / 3600) * angular_distance_mpc_h(scene.z) * 1e3
    ell = np.stack([r, r / cards["REFF"], r_kpc, azimuth]).astype("f4")
    sky = np.stack([east, north]).astype("f4")
    binned = _to_image(scene, galaxy.binned, 0, "bool")

    def image(values: np.ndarray, used: np.ndarray | None = None) -> np.ndarray:
        keep = galaxy.binned if used is None else used
        return _to_image(scene, np.where(keep, values, 0))

    base = scene.bits.copy()
    base[(base == 0) & ~binned] |= NOVALUE | DONOTUSE
    sky_ch = head.channel_cards(["On-sky X", "On-sky Y"])
    ell_ch = head.channel_cards(*zip(*head.ELL_CHANNELS, strict=True))
    line_ch = head.channel_cards(names)
    cube = {"data_class": "CUBE"}
    unit = {"unit": head.FLUX_UNIT}

    yield head.primary_hdu("MAPS", cards)
    yield head.image_hdu("SPX_SKYCOO", sky, deep, channels=sky_ch, unit="arcsec", **cube)
    yield head.image_hdu("SPX_ELLCOO", ell, deep, channels=ell_ch, **cube)
    every = np.ones(scene.ys.size, bool)
    mflux = image(galaxy.mflux, every), image(galaxy.mflux_ivar, every)
    yield from head.quantity_hdus("SPX_MFLUX", *mflux, None, flat, **unit)
    yield head.image_hdu("SPX_SNR", image(galaxy.snr, every), flat)
    yield head.image_hdu(
        "BINID", _bin_ids(galaxy), deep, channels=head.channel_cards(head.BIN_CHANNELS), **cube
    )
    sky_ch = head.channel_cards(["Lum. weighted on-sky X", "Lum. weighted on-sky Y"])
    yield head.image_hdu("BIN_LWSKYCOO", sky * binned, deep, channels=sky_ch, unit="arcsec", **cube)
    ell_ch = head.channel_cards(*zip(*head.LW_ELL_CHANNELS, strict=True))
    yield head.image_hdu("BIN_LWELLCOO", ell * binned, deep, channels=ell_ch, **cube)
    area = (SPAXEL_ARCSEC**2 * binned).astype("f4")
    yield head.image_hdu("BIN_AREA", area, flat, unit="arcsec^2")
    yield head.image_hdu("BIN_FAREA", binned.astype("f4"), flat)
    mflux = image(galaxy.mflux), image(galaxy.mflux_ivar)
    yield from head.quantity_hdus("BIN_MFLUX", *mflux, base, flat, **unit)
    yield head.image_hdu("BIN_SNR", image(galaxy.snr), flat)

    # stellar kinematics: error of the order of 1/(S/N) of the resolved width
    rng = np.random.default_rng(n_bins)
    snr = np.maximum(galaxy.snr, 0.5)
    width = np.hypot(scene.star_sigma, 70.0)
    v_err = 1.3 * width / snr
    s_err = v_err * width / np.maximum(scene.star_sigma, 20)
    star_v = scene.star_v + v_err * rng.standard_normal(snr.size)
    star_s = scene.star_sigma + s_err * rng.standard_normal(snr.size)
    for name, value, err in (("VEL", star_v, v_err), ("SIGMA", np.abs(star_s), s_err)):
        mask = base | (
            _to_image(scene, galaxy.binned & (value < 0), 0, "bool") & (name == "SIGMA")
        ) * (NEARBOUND | DONOTUSE)
        yield from head.quantity_hdus(
            f"STELLAR_{name}", image(value), image(1 / err**2), mask.astype("i4"), flat, unit="km/s"
        )
    corr = np.full((2, scene.ys.size), 33.0)
    yield head.image_hdu(
        "STELLAR_SIGMACORR", image(corr), deep, unit="km/s", **cube,
        channels=head.channel_cards(["resolution difference", "fit"]),
    )  # fmt: skip
    fom_ch = head.channel_cards(*zip(*head.FOM_CHANNELS, strict=True))
    fom = figures_of_merit(galaxy)
    yield head.image_hdu("STELLAR_FOM", image(fom), deep, channels=fom_ch, **cube)

    # emission lines
    line_bits = np.repeat(base[scene.ys, scene.xs][None], len(names), axis=0)
    moment_bits = line_bits.copy()
    off = np.all(~np.isfinite(fit["gflux_var"]), axis=1)[:, None] & galaxy.binned
    lost = ~np.isfinite(fit["gflux_var"]) & ~off & galaxy.binned
    line_bits[off] |= NOVALUE | DONOTUSE
    line_bits[lost] |= FITFAILED | DONOTUSE
    moment_bits[~np.isfinite(fit["sflux_var"]) & galaxy.binned] |= NOVALUE | DONOTUSE
    good, moment_good = line_bits == 0, moment_bits == 0
    g_ivar = np.where(good, 1 / fit["gflux_var"], 0)
    s_ivar = np.where(moment_good, 1 / fit["sflux_var"], 0)
    # a width cannot be measured on a line that came out without flux
    flat_line = good & (fit["gflux"] <= 0)
    width_bits = line_bits | flat_line * (MATHERROR | DONOTUSE)
    observed = rest[:, None] * (1 + scene.z)
    inst = instrument_sigma_kms(observed) * np.ones_like(scene.gas_v)
    gas_v = scene.gas_v + fit["v_error"]
    total = np.hypot(inst, scene.gas_sigma) + fit["s_error"]
    outside = {"base": np.repeat(base[None], len(names), axis=0)}
    v_ivar = np.where(good, 1 / fit["v_var"], 0)
    cont = np.where(fit["cont"] > 0, fit["cont"], np.inf) * (1 + scene.z)
    channels = (line_ch, line_ch, line_ch)

    def lay_bits(values: np.ndarray) -> np.ndarray:
        out = outside["base"].copy()
        out[:, scene.ys, scene.xs] = values
        return out.astype("i4")

    def line_maps(
        name: str, value: np.ndarray, ivar: np.ndarray, flags: np.ndarray, **more: Any
    ) -> list[fits.ImageHDU]:
        ok = (flags & (NOCOV | LOWCOV | NOVALUE | FORESTAR | DEADFIBER | FITFAILED)) == 0
        return head.quantity_hdus(
            name, image(value, ok), image(ivar, ok), lay_bits(flags), deep, channels, **more, **cube
        )

    def plain(name: str, value: np.ndarray, flags: np.ndarray, **more: Any) -> fits.ImageHDU:
        return head.image_hdu(
            name, image(value, flags == 0), deep, channels=line_ch, **more, **cube
        )

    line_unit = {"unit": head.LINE_UNIT}
    yield from line_maps("EMLINE_SFLUX", fit["sflux"], s_ivar, moment_bits, **line_unit)
    sew = line_maps(
        "EMLINE_SEW",
        fit["sflux"] / cont,
        s_ivar * np.where(np.isfinite(cont), cont, 0) ** 2,
        moment_bits,
        unit="ang",
    )
    yield sew[0]
    yield plain("EMLINE_SEW_CNT", fit["cont"], moment_bits, **unit)
    yield from sew[1:]
    yield from line_maps("EMLINE_GFLUX", fit["gflux"], g_ivar, line_bits, **line_unit)
    gew = line_maps(
        "EMLINE_GEW",
        fit["gflux"] / cont,
        g_ivar * np.where(np.isfinite(cont), cont, 0) ** 2,
        line_bits,
        unit="ang",
    )
    yield gew[0]
    yield plain("EMLINE_GEW_CNT", fit["cont"], line_bits, **unit)
    yield from gew[1:]
    tied_v = np.broadcast_to(gas_v, inst.shape)
    yield from line_maps("EMLINE_GVEL", tied_v, v_ivar, line_bits, unit="km/s")
    yield from line_maps("EMLINE_GSIGMA", total, v_ivar, width_bits, unit="km/s")
    yield plain("EMLINE_INSTSIGMA", inst, line_bits, unit="km/s")
    tpl = 2.54 / 2.3548 / rest[:, None] * C_KMS * np.ones_like(scene.gas_v)  # MILES
    yield plain("EMLINE_TPLSIGMA", tpl, line_bits, unit="km/s")
    sigma_aa = observed * total / C_KMS
    amplitude = fit["gflux"] / (sigma_aa * np.sqrt(2 * np.pi))
    yield plain("EMLINE_GA", amplitude, line_bits, **unit)
    at = np.clip(np.searchsorted(wave_grid(), observed[:, 0]), 0, N_BANDS - 1)
    noise = galaxy.redcorr[at, None] / np.sqrt(np.maximum(galaxy.ivar[at], 1e-6))
    yield plain("EMLINE_GANR", amplitude / noise, line_bits)
    yield head.image_hdu("EMLINE_FOM", image(fom), deep, channels=fom_ch, **cube)
    yield plain("EMLINE_LFOM", np.repeat(fom[2][None], len(names), axis=0), line_bits)

    # spectral indices: not measured
    index_names, index_units = zip(
        *(s.split(":") for s in head.SPECTRAL_INDICES.split()), strict=True
    )
    none = np.zeros((len(index_names), scene.size, scene.size), "f4")
    flags = np.repeat((base | NOVALUE | DONOTUSE)[None], len(index_names), axis=0).astype("i4")
    units = head.channel_cards(index_names, index_units)
    ivar_units = head.channel_cards(
        index_names, [f"({u})^{{-2}}" if u else "" for u in index_units]
    )
    bare = head.channel_cards(index_names)
    for name in ("SPECINDEX", "SPECINDEX_BF", "SPECINDEX_WGT"):
        yield from head.quantity_hdus(
            name, none, none, flags, deep, (units, ivar_units, bare), **cube
        )
        for part in ("CORR", "MODEL"):
            yield head.image_hdu(f"{name}_{part}", none, deep, channels=bare, **cube)


def figures_of_merit(galaxy: Galaxy) -> np.ndarray:
    """Nine figures of merit of the fit per spaxel (9, spaxel), FOM_CHANNELS; every 8th pixel."""
    model = ((galaxy.scene.stellar + galaxy.emline) / galaxy.redcorr[:, None])[::8]
    ivar = galaxy.ivar[::8]
    resid = np.where(ivar > 0, galaxy.flux[::8] - model, 0)
    frac = np.abs(resid) / np.maximum(model, 1e-6)
    chi = np.abs(resid) * np.sqrt(ivar)
    out = [np.sqrt((resid**2).mean(0)), np.sqrt((frac**2).mean(0)), (chi**2).mean(0)]
    for value in (frac, chi):
        out += [*np.percentile(value, (68, 99), axis=0), value.max(axis=0)]
    return np.array(out)


def angular_distance_mpc_h(z: float) -> float:
    """Angular-diameter distance in Mpc/h; flat, Omega_m = 0.3 (Hogg 1999, eqs. 14-18)."""
    grid = np.linspace(0, z, 200)
    return float(
        C_KMS / 100 * np.trapezoid(1 / np.sqrt(0.3 * (1 + grid) ** 3 + 0.7), grid) / (1 + z)
    )


def _ring_snr(galaxy: Galaxy) -> dict[str, float]:
    """Median and summed S/N at 1 to 1.5 effective radii; all four bands take that of g."""
    scene = galaxy.scene
    east, north = sky_offsets(scene.size)
    r, _ = elliptical_coordinates(east, north, scene.cards["ECOOPA"], 1 - scene.cards["ECOOELL"])
    re = r[scene.ys, scene.xs] / scene.cards["REFF"]
    ring = galaxy.snr[galaxy.binned & (re > 1) & (re < 1.5)]
    median = float(np.median(ring)) if ring.size else 0.0
    total = float(np.sqrt((ring**2).sum()) / 1.9) if ring.size else 0.0  # covariance: about 1.9
    return {f"SNR{b}MED": median for b in "GRIZ"} | {f"SNR{b}RING": total for b in "GRIZ"}


# Truth


def truth_path(root: Path, plateifu: str) -> Path:
    """Truth file of a mock galaxy."""
    return Path(root) / "truth" / f"{plateifu}.h5"


def truth_maps(galaxy: Galaxy) -> dict[str, np.ndarray]:
    """Noiseless maps (y, x) by name, NaN outside of the field; float32, class maps int16.

    logoh_o3n2, logoh_n2 and bpt come from the noiseless fluxes through the seeing, as a perfect
    measurement would; logoh_physical is the metallicity put in, before the seeing.
    """
    scene = galaxy.scene
    maps = {
        "logoh_o3n2": logoh_o3n2(scene.line_flux),
        "logoh_n2": logoh_n2(scene.line_flux),
        "gas_velocity": scene.gas_v,
        "gas_sigma": scene.gas_sigma,
        "stellar_velocity": scene.star_v,
        "stellar_sigma": scene.star_sigma,
        "continuum_5500": scene.stellar[int(np.argmin(np.abs(wave_grid() - 5500 * (1 + scene.z))))],
        **scene.truth,
    }
    out = {k: _to_image(scene, v, np.nan) for k, v in maps.items()}
    out["bpt"] = _to_image(scene, bpt_class(scene.line_flux), utils.LABEL_NONE, "i2")
    return out


def write_truth(path: Path, galaxy: Galaxy) -> None:
    """Write the truth file of a galaxy, whole or not at all.

    Group `line_flux` holds one (y, x) map a line, by DR17's names: noiseless, through the seeing,
    1e-17 erg/s/cm2/spaxel before Galactic reddening - what FLUX x REDCORR integrates to.
    """
    import h5py

    scene = galaxy.scene
    with utils.atomic_path(path) as part, h5py.File(part, "w", track_order=False) as f:
        f.attrs.update(
            schema=TRUTH_SCHEMA,
            schema_version=TRUTH_VERSION,
            plateifu=scene.plateifu,
            z=scene.z,
            ebv_gal=scene.ebv_gal,
            code_version=utils.VERSION,
            meta_json=json.dumps(scene.meta, default=str),
        )
        for name, values in truth_maps(galaxy).items():
            f[name] = values
            f[name].attrs["axes"] = "y,x"
        for name, values in scene.line_flux.items():
            data = f.create_dataset(f"line_flux/{name}", data=_to_image(scene, values, np.nan))
            data.attrs.update(unit="1e-17 erg/s/cm2/spaxel", axes="y,x")


def read_truth(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a truth file: maps by name (lines as "line_flux/<name>") and attributes.

    Raises
    ------
    DataError
        If the file is missing or of another kind.
    """
    import h5py

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file. Simulate the galaxy with mock_manga.py.")
    try:
        with h5py.File(path) as f:
            attrs = dict(f.attrs)
            if attrs.get("schema") != TRUTH_SCHEMA or attrs["schema_version"] != TRUTH_VERSION:
                raise DataError(
                    f"{path}: not a {TRUTH_SCHEMA} file of version {TRUTH_VERSION}. "
                    "Re-run mock_manga.py --overwrite."
                )
            maps = {k: f[k][...] for k in f if k != "line_flux"}
            maps |= {f"line_flux/{k}": d[...] for k, d in f["line_flux"].items()}
    except OSError as error:
        raise DataError(f"{path}: not readable ({error}). Re-run mock_manga.py.") from None
    return maps, attrs


# Writing


def write_galaxy(data_dir: Path, galaxy: Galaxy) -> list[Path]:
    """Write LOGCUBE, MAPS and, last, the truth file of a galaxy; return their paths."""
    from mock_fits_headers import write_gzipped_fits

    plateifu, daptype = galaxy.scene.plateifu, galaxy.scene.cards["DAPTYPE"]
    folder = utils.raw_dir(data_dir, plateifu)
    out = []
    for kind, hdus in (("LOGCUBE", logcube_hdus), ("MAPS", maps_hdus)):
        path = folder / f"manga-{plateifu}-{kind}-{daptype}.fits.gz"
        write_gzipped_fits(path, hdus(galaxy))
        out.append(path)
    out.append(truth_path(data_dir, plateifu))
    write_truth(out[-1], galaxy)
    return out


def write_catalogue(data_dir: Path, galaxies: Sequence[GalaxyParams]) -> Path:
    """Write the dapall-like catalogue: one table an analysis, as in the archive.

    Columns and their names are a part of the archive's 91, and EBVGAL. DAPDONE is true for the one
    analysis that the mock has files of.
    """
    from astropy.io import fits

    import mock_fits_headers as head

    rows = sorted(galaxies, key=lambda p: p.plateifu)

    def table(daptype: str) -> fits.BinTableHDU:
        columns = {
            "PLATE": ("J", [int(p.plateifu.split("-")[0]) for p in rows]),
            "IFUDESIGN": ("J", [int(p.plateifu.split("-")[1]) for p in rows]),
            "PLATEIFU": ("12A", [p.plateifu for p in rows]),
            "MANGAID": ("12A", [p.mangaid for p in rows]),
            "DRPALLINDX": ("J", list(range(len(rows)))),
            "MODE": ("4A", ["CUBE"] * len(rows)),
            "DAPTYPE": ("32A", [daptype] * len(rows)),
            "DAPDONE": ("L", [daptype == DAPTYPE] * len(rows)),
            "OBJRA": ("D", [p.ra for p in rows]),
            "OBJDEC": ("D", [p.dec for p in rows]),
            "IFURA": ("D", [round(p.ra, 6) for p in rows]),
            "IFUDEC": ("D", [round(p.dec, 6) for p in rows]),
            "Z": ("D", [p.z for p in rows]),
            "NSA_Z": ("D", [p.z for p in rows]),
            "NSA_ELPETRO_BA": ("D", [p.axis_ratio for p in rows]),
            "NSA_ELPETRO_PHI": ("D", [p.pa % 180 for p in rows]),
            "NSA_ELPETRO_TH50_R": ("D", [p.r_eff for p in rows]),
            "EBVGAL": ("D", [p.ebv_gal for p in rows]),
            "VERSDRP3": ("8A", ["v3_1_1"] * len(rows)),
            "VERSDAP": ("8A", ["3.1.0"] * len(rows)),
            "DRP3QUAL": ("J", [0] * len(rows)),
            "DAPQUAL": ("J", [0] * len(rows)),
            "BINKEY": ("8A", [daptype.split("-")[0]] * len(rows)),
        }
        hdu = fits.BinTableHDU.from_columns(
            [fits.Column(k, form, array=np.array(v)) for k, (form, v) in columns.items()]
        )
        hdu.header["EXTNAME"] = daptype
        hdu.add_checksum(when=head.STAMP)
        return hdu

    path = Path(data_dir) / "raw" / DAPALL
    with utils.atomic_path(path) as part:
        fits.HDUList([fits.PrimaryHDU(), *map(table, DAPTYPES)]).writeto(part)
    return path


def simulate_survey(config: MockConfig) -> dict[str, str]:
    """Simulate the galaxies of a survey that are not there yet, then write the catalogue.

    Returns
    -------
    dict of plateifu -> "written", "skipped" or "failed".

    Raises
    ------
    DataError
        Unknown bundle, no galaxies.
    """
    if config.n_galaxies < 1:
        raise DataError(f"--n-galaxies {config.n_galaxies}: expected 1 or more.")
    root = utils.data_dir(config.data_dir)
    galaxies = [draw_params(config.seed, i, config.bundles) for i in range(config.n_galaxies)]
    work = partial(
        _simulate_one,
        root=root,
        params={p.plateifu: p for p in galaxies},
        overwrite=config.overwrite,
    )
    outcome = utils.for_each_galaxy(
        work, [p.plateifu for p in galaxies], "simulate", root / "failed_mock.csv", config.jobs
    )
    write_catalogue(root, [p for p in galaxies if outcome[p.plateifu] != "failed"])
    return outcome


def _simulate_one(
    plateifu: str, root: Path, params: Mapping[str, GalaxyParams], overwrite: bool
) -> str:
    """Simulate and write one galaxy unless its files are there."""
    wanted, truth = params[plateifu], truth_path(root, plateifu)
    if truth.is_file() and not overwrite:
        _, attrs = read_truth(truth)
        there = json.loads(attrs["meta_json"]).get("params")
        if there != json.loads(json.dumps(asdict(wanted))):
            raise DataError(
                f"{truth}: made with other settings (seed, bundles or code). "
                "Use --overwrite, or another --data-dir."
            )
        if all(utils.raw_paths(root, plateifu, kind, DAPTYPE) for kind in ("LOGCUBE", "MAPS")):
            return "skipped"
    write_galaxy(root, simulate_galaxy(wanted))
    return "written"


def main(config: MockConfig) -> int:
    """Simulate a survey; the exit code tells whether any galaxy failed."""
    root = utils.data_dir(config.data_dir)
    outcome = simulate_survey(config)
    count = {word: list(outcome.values()).count(word) for word in ("written", "skipped", "failed")}
    log.info(
        "%d galaxies written, %d there already, %d failed: %s",
        count["written"],
        count["skipped"],
        count["failed"],
        root / "raw",
    )
    return utils.EXIT_DATA if count["failed"] else utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, MockConfig, __doc__)
