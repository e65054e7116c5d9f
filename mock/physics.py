"""Physics of the simulated galaxies: instrument, stars, gas, seeing, noise, and fits to them.

Arrays in, arrays out; reads and writes nothing. Spectra are (band, spaxel) on the cubes' grid of
4563 vacuum wavelengths in Angstrom, maps (y, x); fluxes in 1e-17 erg/s/cm2 (/Angstrom) /spaxel.

    >>> templates = stellar_templates(z=0.03, sigma_kms=60)
    >>> ratios = hii_ratios(logoh, ionisation, nitrogen)
    >>> galaxy = observe(scene, rng)  # noise and masks
    >>> galaxy.fit = measure_lines(galaxy, rng) | measure_stars(galaxy, rng)  # MAPS
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from labels import R_V
from line_fits import C_KMS, EMLINES

N_BANDS, LOG_WAVE0, LOG_STEP = 4563, 3.5589, 1e-4
"""Grid of the LOGCUBE: pixel i is at 10**(3.5589 + 1e-4 i) Angstrom, vacuum (DAP data model)."""
SPAXEL_ARCSEC = 0.5
FIBRE_PITCH_ARCSEC = 2.5
"""Distance between neighbouring fibres, whose cores are 2.0 arcsec wide (Drory et al. 2015)."""

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
"""Wavelength in Angstrom -> resolving power lambda/FWHM, measured on the real spectra among the
DAP's test data (DRP v2_4_3)."""

SKY_NODES = (
    (3600, 3750, 3850, 4000, 4300, 4650, 5100, 5650, 6250, 7000, 8100, 8850, 9500, 9900, 10150,
     10400),
    (0.055, 0.030, 0.0235, 0.0165, 0.0130, 0.0112, 0.0100, 0.0096, 0.0085, 0.0064, 0.0066, 0.0070,
     0.0095, 0.0120, 0.0250, 0.0450),
)  # fmt: skip
"""Wavelength -> 1-sigma noise of a dark spaxel between the sky lines, 1e-17 erg/s/cm2/Angstrom.
Like PHOTON_NODES, fitted to the inverse variances of the real spectra among the DAP's test data, at
flux densities of 0.02 to 5."""
PHOTON_NODES = (
    (3600, 3850, 4650, 5650, 7000, 8850, 9600, 10150, 10400),
    (2.0e-3, 8e-4, 2.3e-4, 1.8e-4, 1.05e-4, 1.0e-4, 2.0e-4, 5e-4, 8e-4),
)
"""Wavelength -> variance added per unit of flux density, 1e-17 erg/s/cm2/Angstrom."""

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
"""Telluric emission lines: vacuum wavelength in Angstrom, and the factor by which the line raises
the noise: the ratio of the noise to its running median in the same real spectra."""

NOISE_KERNEL_SPAXELS = 1.358
"""Sigma of the Gaussian that correlates the noise of neighbouring spaxels: white noise filtered by
it has a correlation of exp(-(d/1.92)**2/2) at a distance of d spaxels, as in the real cubes
(Westfall et al. 2019, section 6; Law et al. 2016, section 9.3)."""
NOISE_KERNEL_PIXELS = (-0.090, 0.085, 1.0, 0.085, -0.090)
"""Filter of white noise along wavelength: it correlates pixels by 0.15, -0.17 and -0.01 at
distances of 1, 2 and 3 pixels. Measured on the faint ones among the real spectra of the DAP's test
data (numbers 5 and 6, 5600 to 8500 Angstrom): 0.15 to 0.21 and -0.13 to -0.25, then 0.02 on
average. Resampling the spectra to the cubes' grid (cf. Law et al. 2016) leaves such a pattern."""

BRIGHT_SKY_AA = (5578.3, 5891.1, 6302.3)
"""The sky lines below 7000 Angstrom that leave residuals, vacuum."""
SKY_RESIDUAL, SKY_RESIDUAL_GALAXIES, SKY_RESIDUAL_LINES = 0.4, 0.6, 1.2
"""Residuals of the sky lines: by how much the noise at a line exceeds the stated one (0: not at
all) in the median, and the scatter (natural logarithm) of this excess between galaxies and between
the lines of one galaxy. Like BRIGHT_SKY, set so that the rows on sky lines of
benchmarks/mock_realism.py lie within the range of the eleven real spectra."""
BRIGHT_SKY, SKY_FOREST = 4.0, 0.3
"""The same excess at BRIGHT_SKY_AA and, beyond 8500 Angstrom, between the lines of SKY_LINES, where
weaker lines crowd; relative to SKY_RESIDUAL."""

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
"""Weak line of a doublet from one upper level -> strong line and flux ratio, which the DAP keeps
fixed (O and N as in a real MAPS file; S: Osterbrock & Ferland 2006)."""

FIT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("OII-3727", "OII-3729"), ("H12-3751", "H11-3771"), ("Hthe-3798",), ("Heta-3836",),
    ("NeIII-3869", "HeI-3889", "Hzet-3890"), ("NeIII-3968", "Heps-3971"), ("Hdel-4102",),
    ("Hgam-4341",), ("HeII-4687",), ("Hb-4862",), ("OIII-4960", "OIII-5008"),
    ("NI-5199", "NI-5201"), ("HeI-5877",), ("OI-6302", "OI-6365"),
    ("NII-6549", "Ha-6564", "NII-6585"), ("SII-6718", "SII-6732"), ("HeI-7067",), ("ArIII-7137",),
    ("ArIII-7753",), ("Peta-9017",), ("Pzet-9231",), ("SIII-9071", "SIII-9533", "Peps-9548"),
)  # fmt: skip
"""Lines fitted together, because they overlap or because their ratio is fixed."""

MIN_PROFILE = 0.5
"""Fraction of a line's profile that must fall on good pixels for the line to be fitted."""

NUCLEI: dict[str, dict[str, float]] = {
    "Seyfert": {"o3": 0.90, "n2": 0.02, "s2": -0.25, "o1": -0.85, "o2": 0.45, "he2": 0.20},
    "LINER": {"o3": 0.42, "n2": 0.12, "s2": 0.05, "o1": -0.65, "o2": 0.75, "he2": 0.05},
}
"""Line ratios of gas ionised by an active nucleus or by hot old stars: log10 of [OIII]/Hb,
[NII]/Ha, [SII]/Ha, [OI]/Ha and [OII]/Hb; HeII/Hb is linear. The middle of the Seyfert and LINER
sequences in Kewley et al. 2006, figure 1."""

NUCLEUS_DENSITY = 150.0
"""Electron density of gas ionised by a nucleus, cm-3; a choice between that of H II regions and of
narrow-line regions (Osterbrock & Ferland 2006, chapter 14)."""

# Stellar population nodes and absorption features
POP_LOG_AGE = (8.0, 8.7, 9.2, 9.6, 10.0)
"""log10 of the populations' ages in years."""
POP_METAL = (-0.6, -0.2, 0.2)
"""[Z/H] of the populations."""
POP_HOT_K = (13500.0, 9800.0, 7600.0, 6500.0, 6200.0)
"""Temperature by age of the black body of the stars near the main-sequence turn-off."""
POP_COOL_SHARE = (0.14, 0.21, 0.29, 0.37, 0.42)
"""Share of cool giants in the light at 5500 Angstrom by age. Like POP_HOT_K, set so that the
continuum between 4200 and 9100 Angstrom at a given Dn4000 is that of the real spectra
(benchmarks/mock_realism.py)."""
COOL_K = 3700.0
"""Temperature of the giants' black body, about that of early M giants (van Belle et al. 1999)."""
POP_BREAK_4000 = (0.06, 0.12, 0.23, 0.35, 0.44)
"""Depth of the 4000 Angstrom break by age (Dn4000 1.1 to 1.8; cf. Kauffmann et al. 2003b)."""
POP_BREAK_4420 = (0.02, 0.04, 0.08, 0.19, 0.28)
"""Depth by age of the step between 4250 and 4600 Angstrom, where CH, CN and Fe crowd; seen in all
real spectra with Dn4000 above 1.3."""
POP_BALMER_JUMP = (0.20, 0.30, 0.18, 0.05, 0.0)
"""Depth of the Balmer jump by age; a smooth guess that peaks with the Balmer lines."""
POP_BALMER_EW = (3.5, 8.5, 6.5, 3.0, 1.6)
"""Equivalent width of Hbeta absorption by age, Angstrom; strongest at a few 100 Myr (cf.
Gonzalez Delgado et al. 1999)."""
POP_METAL_EW = (0.06, 0.18, 0.42, 0.75, 1.0)
"""Strength of metal lines by age, relative to 10 Gyr."""

BALMER_FEATURES = (
    (6564.6, 0.75), (4862.7, 1.0), (4341.7, 1.05), (4102.9, 1.1), (3971.2, 1.0), (3890.2, 0.9),
    (3836.5, 0.8), (3799.0, 0.65), (3771.7, 0.5), (3751.2, 0.4),
)  # fmt: skip
"""Vacuum wavelength in Angstrom, and equivalent width relative to Hbeta's (POP_BALMER_EW)."""
METAL_FEATURES = (
    # name, vacuum wavelength, own width (sigma) in Angstrom, EW in Angstrom at 10 Gyr and solar,
    # d log EW / d[Z/H]
    ("CaK", 3934.8, 6.0, 8.0, 0.15), ("CaH", 3969.6, 6.0, 6.0, 0.15),
    ("CN", 4170.0, 18.0, 3.0, 0.7),
    ("Ca4227", 4227.9, 3.5, 1.3, 0.5), ("Gband", 4304.5, 10.0, 5.5, 0.25),
    ("Fe4383", 4384.8, 7.0, 4.5, 0.5), ("Fe4531", 4532.5, 9.0, 3.0, 0.35),
    ("C4668", 4669.0, 14.0, 4.5, 0.8), ("Fe5015", 5016.5, 12.0, 4.5, 0.35),
    ("MgH", 5150.0, 75.0, 14.0, 0.5), ("Mg1", 5102.0, 24.0, 3.0, 0.6),
    ("Mgb1", 5168.8, 3.5, 1.2, 0.5),
    ("Mgb2", 5174.1, 3.5, 1.6, 0.5), ("Mgb3", 5185.0, 3.5, 1.5, 0.5),
    ("Fe5270", 5271.0, 7.0, 2.7, 0.45), ("Fe5335", 5336.5, 7.0, 2.5, 0.5),
    ("Fe5406", 5407.5, 5.5, 1.5, 0.5), ("Fe5709", 5710.5, 5.0, 0.8, 0.4),
    ("Fe5782", 5783.5, 5.0, 0.7, 0.5), ("NaD1", 5891.6, 2.5, 1.7, 0.5),
    ("NaD2", 5897.6, 2.5, 1.4, 0.5), ("Fe6497", 6498.0, 5.0, 0.8, 0.3),
    ("CaH", 6830.0, 22.0, 1.6, 0.4), ("NaI8190", 8190.0, 5.0, 0.7, 0.6),
    ("CaT1", 8500.4, 3.5, 1.9, 0.2), ("CaT2", 8544.4, 4.5, 4.6, 0.2),
    ("CaT3", 8664.5, 4.0, 3.8, 0.2),
)  # fmt: skip
"""Stellar absorption features, about as strong as the Lick indices of old solar populations
(Worthey et al. 1994; Thomas et al. 2011); calcium triplet after Cenarro et al. 2001."""

TIO_BANDS = (
    (4763.0, 8.0), (4956.0, 8.0), (5450.0, 8.0), (5849.0, 10.0), (6160.0, 31.0), (6653.0, 14.0),
    (7055.0, 28.0), (7600.0, 24.0), (7830.0, 12.0), (8207.0, 12.0), (8434.0, 18.0), (8862.0, 22.0),
)  # fmt: skip
"""TiO bands of the cool giants: vacuum wavelength of the head in Angstrom (cf. Valenti et al.
1998), and equivalent width in Angstrom at solar metallicity, set so that indices of the bands at
6160 and 7055 Angstrom agree with the real spectra."""
TIO_METAL = 0.5
"""d log EW / d[Z/H] of the TiO bands."""
POP_TIO = (0.5, 0.6, 0.75, 0.9, 1.0)
"""Strength of the TiO bands of the giants by age, relative to 10 Gyr: young giants are warmer."""
TIO_SHAPE = ((18.0, 12.0, 0.15), (50.0, 20.0, 0.25), (90.0, 28.0, 0.3), (145.0, 40.0, 0.3))
"""Offset from the head and width (sigma) in Angstrom, and share, of the Gaussians that make a band:
steep on its blue side, with a shallow end 200 Angstrom to the red."""

FOREST_LINES = 500
"""Number of weak metal lines between the named features. Their wavelengths are invented, by a fixed
random draw; only their number, strength and crowding towards the blue resemble an old star."""


FEATURE_SCATTER_DEX, FOREST_SCATTER_DEX, CONTINUUM_SCATTER = 0.075, 0.19, 0.03
"""How galaxies differ from the mean templates of their age and metallicity (`draw_stars`): scatter
of the strength of each feature and each weak line (dex) and of the continuum's shape, relative.
Set so that a fit with the mean templates leaves residuals of 1.2 %, as the DAP's fit of 7815-3702
does where noise is small (STELLAR_CONT_FRESID and RCHI2 at S/N > 30)."""
CONTINUUM_TERMS = 6
"""Number of cosines in log wavelength that shape the continuum of a galaxy's stars."""


@dataclass(frozen=True)
class Stars:
    """How a galaxy's stars differ from the mean templates: factors, and cosine coefficients."""

    features: np.ndarray
    balmer: np.ndarray
    tio: np.ndarray
    forest: np.ndarray
    cool: float
    shape: np.ndarray


@dataclass
class Scene:
    """A galaxy as the spectrograph would see it without noise.

    Spectra are (band, spaxel), maps of spaxels (spaxel,) in the order of `ys`, `xs`; fluxes are
    free of Galactic reddening.
    """

    plateifu: str
    z: float
    ebv_gal: float
    size: int
    """Spaxels per side."""
    ys: np.ndarray
    """(spaxel,) int, like `xs`: spaxels with any coverage."""
    xs: np.ndarray
    coverage: np.ndarray
    """(spaxel,): weight of the fibres at the spaxel, relative to the field's centre, 0 to 1."""
    bits: np.ndarray
    """(y, x) int32: MANGA_DAPPIXMASK of the spaxels before any fit."""
    stellar: np.ndarray
    """(band, spaxel) float32, 1e-17 erg/s/cm2/Angstrom/spaxel."""
    line_flux: dict[str, np.ndarray]
    """By line name, (spaxel,) 1e-17 erg/s/cm2/spaxel."""
    gas_v: np.ndarray
    """(spaxel,) km/s, relative to `z`, like `star_v`."""
    gas_sigma: np.ndarray
    """(spaxel,) km/s, without the instrumental one, like `star_sigma`."""
    star_v: np.ndarray
    star_sigma: np.ndarray
    noise_scale: float
    """Factor on the typical noise."""
    cards: dict[str, Any]
    """Primary header cards."""
    truth: dict[str, np.ndarray] = field(default_factory=dict)
    """Further maps for the truth file, (spaxel,) by name."""
    meta: dict[str, Any] = field(default_factory=dict)
    """How the scene was made, for the truth file."""
    continuum: np.ndarray | None = None
    """(band, spaxel) float32: what a fit with the mean templates finds of `stellar`; without it the
    fit is perfect."""
    snr: np.ndarray | None = None
    """(spaxel,): S/N in the g band that the noise is scaled to; else it follows from the light."""
    bin_ids: np.ndarray | None = None
    """(5, y, x) int32: bin numbers, -1 for none; else each spaxel with S/N > 1 is its own bin."""

    @property
    def fitted(self) -> np.ndarray:
        """Continuum that a fit finds, (band, spaxel)."""
        return self.stellar if self.continuum is None else self.continuum


@dataclass
class Galaxy:
    """An observed scene: noise, masks and the results of the fits."""

    scene: Scene
    redcorr: np.ndarray
    """(band,): factor that undoes the reddening by the Milky Way (HDU REDCORR)."""
    emline: np.ndarray
    """(band, spaxel) float32: noiseless emission lines, not reddened by the Milky Way."""
    flux: np.ndarray
    """(band, spaxel) float32 as in the LOGCUBE, reddened; 0 where `bad`, like `ivar`."""
    ivar: np.ndarray
    bad: np.ndarray
    """(band, spaxel) bool: pixels lost to cosmic rays and the like."""
    binned: np.ndarray
    """(spaxel,) bool: spaxels that the DAP would fit."""
    mflux: np.ndarray
    """(spaxel,): mean flux density in the g band."""
    mflux_ivar: np.ndarray
    snr: np.ndarray
    """(spaxel,): S/N per pixel in the g band."""
    excess: np.ndarray
    """(band,) float32: true noise over the stated one."""
    depth: float
    """Exposure time over that of the survey."""
    fit: dict[str, np.ndarray] = field(default_factory=dict)
    """Results of `measure_lines` and `measure_stars`, (line, spaxel) or (spaxel,)."""
    deep: Galaxy | None = None
    """Deeper observation that MAPS are measured on instead of this one."""


def to_image(scene: Scene, values: np.ndarray, fill: float = 0, dtype: str = "f4") -> np.ndarray:
    """Put (..., spaxel) values on maps (..., y, x), with `fill` outside the field of view."""
    out = np.full((*values.shape[:-1], scene.size * scene.size), fill, dtype)
    out[..., scene.ys * scene.size + scene.xs] = values
    return out.reshape(*values.shape[:-1], scene.size, scene.size)


# Grids, instrument, curves


def wave_grid() -> np.ndarray:
    """Vacuum wavelengths of the cubes, (4563,) Angstrom: 10**(3.5589 + 1e-4 i)."""
    return 10 ** (LOG_WAVE0 + LOG_STEP * np.arange(N_BANDS))


def wave_edges() -> np.ndarray:
    """Edges of the cubes' pixels, (4564,) vacuum Angstrom."""
    return 10 ** (LOG_WAVE0 + LOG_STEP * (np.arange(N_BANDS + 1) - 0.5))


def instrument_sigma_kms(wave_aa: np.ndarray | float) -> np.ndarray:
    """Sigma of the Gaussian line spread function at observed wavelengths, km/s (LSF_NODES)."""
    power = np.interp(wave_aa, *LSF_NODES)
    return C_KMS / (power * 2 * np.sqrt(2 * np.log(2)))


def extinction_curve(wave_aa: np.ndarray) -> np.ndarray:
    """A_lambda / E(B-V) after O'Donnell (1994) for R_V = 3.1; beyond the optical CCM89."""
    return R_V * _curve(tuple(np.atleast_1d(wave_aa).tolist()))


@lru_cache(maxsize=8)
def _curve(wave_aa: tuple[float, ...]) -> np.ndarray:
    """A_lambda / A_V of O'Donnell (1994)."""
    from astropy import units
    from dust_extinction.parameter_averages import O94

    return np.asarray(O94(Rv=R_V)(np.array(wave_aa) * units.AA), dtype=float)


def hexagon_distance(x_arcsec: np.ndarray, y_arcsec: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the edge of a hexagon with two corners on the x axis, arcsec, positive inside."""
    half = np.sqrt(3) / 2
    x, y = np.abs(x_arcsec), np.abs(y_arcsec)
    return half * radius - np.maximum(y, half * x + y / 2)


def sky_offsets(size: int, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Offsets from the bundle's centre, east and north in arcsec, both (y, x).

    Columns run against right ascension; the centre is pixel size/2, counted from 0.
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


def galactic_coordinates(ra_deg: float, dec_deg: float) -> tuple[float, float]:
    """Galactic longitude and latitude in degrees from J2000 coordinates (ESA 1997, sect. 1.5.3)."""
    pole_ra, pole_dec, node = np.deg2rad([192.85948, 27.12825, 32.93192])
    ra, dec = np.deg2rad(ra_deg) - pole_ra, np.deg2rad(dec_deg)
    sin_b = np.sin(dec) * np.sin(pole_dec) + np.cos(dec) * np.cos(pole_dec) * np.cos(ra)
    y = np.sin(dec) * np.cos(pole_dec) - np.cos(dec) * np.sin(pole_dec) * np.cos(ra)
    longitude = np.arctan2(y, np.cos(dec) * np.sin(ra)) + node
    return float(np.rad2deg(longitude) % 360), float(np.rad2deg(np.arcsin(sin_b)))


def angular_distance_mpc_h(z: float) -> float:
    """Angular-diameter distance in Mpc/h; flat, Omega_m = 0.3 (Hogg 1999, eqs. 14-18)."""
    grid = np.linspace(0, z, 200)
    return float(
        C_KMS / 100 * np.trapezoid(1 / np.sqrt(0.3 * (1 + grid) ** 3 + 0.7), grid) / (1 + z)
    )


# Stars


def draw_stars(rng: np.random.Generator) -> Stars:
    """Draw how the stars of one galaxy differ from the mean templates (FEATURE_SCATTER_DEX)."""

    def strength(number: int, scatter_dex: float) -> np.ndarray:
        return 10 ** (scatter_dex * rng.standard_normal(number))

    return Stars(
        features=strength(len(METAL_FEATURES), FEATURE_SCATTER_DEX),
        balmer=strength(len(BALMER_FEATURES), FEATURE_SCATTER_DEX / 4),  # atomic physics ties them
        tio=strength(len(TIO_BANDS), FEATURE_SCATTER_DEX),
        forest=strength(FOREST_LINES, FOREST_SCATTER_DEX),
        cool=float(strength(1, FEATURE_SCATTER_DEX / 2)[0]),
        shape=CONTINUUM_SCATTER * rng.standard_normal(CONTINUUM_TERMS) / np.sqrt(CONTINUUM_TERMS),
    )


def mean_stars() -> Stars:
    """Return stars that do not differ from the mean templates."""
    lengths = len(METAL_FEATURES), len(BALMER_FEATURES), len(TIO_BANDS), FOREST_LINES
    features, balmer, tio, forest = (np.ones(n) for n in lengths)
    return Stars(features, balmer, tio, forest, 1.0, np.zeros(CONTINUUM_TERMS))


def stellar_templates(
    z: float, sigma_kms: float, stars: Stars | None = None, over: int = 2, pad: int = 60
) -> np.ndarray:
    """Spectra of single populations, redshifted and broadened by dispersion and instrument.

    Two black bodies, of stars near the turn-off and of cool giants with TiO bands, with absorption
    features whose strengths follow age and metallicity. The features are Gaussians in optical
    depth, so that their own width, the velocity dispersion and the instrument's width add in
    quadrature.

    Parameters
    ----------
    z : float
    sigma_kms : float
        Velocity dispersion.
    stars : Stars, optional
        How the galaxy's stars differ from the mean; not at all by default.
    over, pad : int
        Samples per pixel of the cubes' grid, and samples added on both sides for later shifts.

    Returns
    -------
    (age, metallicity, sample) float32
        Flux density relative to the continuum at 5500 Angstrom (rest frame). Sample
        `pad + over*i` is pixel i.
    """
    stars = stars or mean_stars()
    samples = np.arange(-pad, over * N_BANDS + pad)
    wave = 10 ** (LOG_WAVE0 + LOG_STEP / over * samples) / (1 + z)
    blur_kms = np.hypot(instrument_sigma_kms(wave * (1 + z)), sigma_kms)
    out = np.empty((len(POP_LOG_AGE), len(POP_METAL), wave.size), np.float32)
    rng = np.random.default_rng(5577)
    places = 3650 + 5400 * rng.random(FOREST_LINES) ** 1.7
    strengths = 0.22 * rng.exponential(size=FOREST_LINES) * (5000 / places) ** 2 * stars.forest
    forest = _absorption(
        wave, blur_kms, ((w, 1.5, ew) for w, ew in zip(places, strengths, strict=True))
    )
    bands = _absorption(
        wave,
        blur_kms,
        (
            (head + offset, sigma, ew * share * factor)
            for (head, ew), factor in zip(TIO_BANDS, stars.tio, strict=True)
            for offset, sigma, share in TIO_SHAPE
        ),
    )
    phase = np.pi * np.log(wave / 3500) / np.log(10500 / 3500)
    terms = np.arange(1, CONTINUUM_TERMS + 1)[:, None]
    shape = np.exp(stars.shape @ (np.cos(terms * phase) - np.cos(terms * _phase_5500())))
    for i in range(len(POP_LOG_AGE)):
        for j, metal in enumerate(POP_METAL):
            out[i, j] = shape * _population(wave, blur_kms, forest, bands, stars, i, metal)
    return out


def _phase_5500() -> float:
    """Phase of the cosines of `Stars.shape` at 5500 Angstrom, where they change nothing."""
    return float(np.pi * np.log(5500 / 3500) / np.log(10500 / 3500))


def _absorption(
    wave: np.ndarray, blur_kms: np.ndarray, features: Iterable[tuple[float, float, float]]
) -> np.ndarray:
    """Optical depth of Gaussian features (centre, own sigma, equivalent width) when broadened."""
    tau = np.zeros_like(wave)
    for centre, sigma, ew in features:
        total = np.hypot(sigma, np.interp(centre, wave, blur_kms) / C_KMS * centre)
        lo, hi = np.searchsorted(wave, (centre - 5 * total, centre + 5 * total))
        offset = (wave[lo:hi] - centre) / total
        tau[lo:hi] += ew / (total * np.sqrt(2 * np.pi)) * np.exp(-0.5 * offset**2)
    return tau


def _population(
    wave: np.ndarray,
    blur_kms: np.ndarray,
    forest: np.ndarray,
    bands: np.ndarray,
    stars: Stars,
    i: int,
    metal: float,
) -> np.ndarray:
    """Spectrum of population number `i` in age, at rest wavelengths."""

    def black_body(temperature_k: float) -> np.ndarray:
        def planck(w: np.ndarray | float) -> np.ndarray:
            return w**-5.0 / np.expm1(1.43878e8 / (w * temperature_k))

        return planck(wave) / planck(5500.0)

    cool = min(POP_COOL_SHARE[i] * 10 ** (0.15 * metal) * stars.cool, 0.9)
    giants = black_body(COOL_K) * np.exp(-bands * POP_TIO[i] * 10 ** (TIO_METAL * metal))
    continuum = (1 - cool) * black_body(POP_HOT_K[i] * 10 ** (-0.04 * metal)) + cool * giants
    depth = POP_BREAK_4000[i] * 10 ** (0.25 * metal)
    blueward = 1 / (1 + np.exp((wave - 3985) / 22))
    step = POP_BREAK_4420[i] * 10 ** (0.25 * metal) / (1 + np.exp((wave - 4420) / 60))
    jump = POP_BALMER_JUMP[i] / (1 + np.exp((wave - 3700) / 12))
    features = [
        (w, 7.0, POP_BALMER_EW[i] * ew * factor)
        for (w, ew), factor in zip(BALMER_FEATURES, stars.balmer, strict=True)
    ]
    features += [
        (w, sigma, ew * POP_METAL_EW[i] * 10 ** (slope * metal) * factor)
        for (_, w, sigma, ew, slope), factor in zip(METAL_FEATURES, stars.features, strict=True)
    ]
    tau = _absorption(wave, blur_kms, features) + forest * POP_METAL_EW[i] * 10 ** (0.4 * metal)
    return continuum * (1 - depth * blueward) * (1 - step) * (1 - jump) * np.exp(-tau)


def population_weights(log_age: np.ndarray, metal: np.ndarray) -> np.ndarray:
    """Weights of the populations by bilinear interpolation; (age, metallicity, ...), sum 1."""

    def linear(value: np.ndarray, nodes: Sequence[float]) -> np.ndarray:
        eye = np.eye(len(nodes))
        return np.stack([np.interp(value, nodes, row) for row in eye])

    return linear(log_age, POP_LOG_AGE)[:, None] * linear(metal, POP_METAL)[None]


def at_shift(templates: np.ndarray, half_pixels: int, pad: int = 60) -> np.ndarray:
    """Templates redshifted by a number of half pixels, on the cubes' grid."""
    start = pad - half_pixels
    return templates[..., start : start + 2 * N_BANDS : 2]


def fit_continuum(
    stellar: np.ndarray, mean: np.ndarray, order: int = 8, step: int = 32
) -> np.ndarray:
    """Continuum that a fit finds if its templates are not quite those of the galaxy.

    Like the DAP's pPXF with the right mixture of populations and a multiplicative polynomial of
    this order in log wavelength: mean templates times the polynomial that fits best.

    Parameters
    ----------
    stellar, mean : (band, spaxel) float32
        True spectra, and those of the mean templates.
    step : int
        Every how many pixels the polynomial is fitted.
    """
    basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, N_BANDS), order)
    ratio = stellar[::step] / mean[::step]
    factor = basis @ np.linalg.lstsq(basis[::step], ratio, rcond=None)[0]
    return mean * factor.astype(np.float32)


def mix_templates(
    templates: np.ndarray,
    weights: np.ndarray,
    v_kms: np.ndarray,
    matrix: np.ndarray,
    ys: np.ndarray,
    xs: np.ndarray,
) -> np.ndarray:
    """Sum of shifted templates through the seeing, (band, spaxel) float32.

    A velocity between two steps of half a pixel (34.5 km/s) is a mixture of both, which broadens
    the spectrum by 17 km/s at most.

    Parameters
    ----------
    templates : (age, metallicity, sample)
        From `stellar_templates`.
    weights : (age, metallicity, y, x)
        Flux density at 5500 Angstrom of each template, before the seeing.
    v_kms : (y, x)
    matrix : array
        From `blur_matrix`.
    ys, xs : (spaxel,) int
        Spaxels to return, after the seeing.
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
        basis.append(at_shift(templates, k).reshape(-1, N_BANDS))
    used = np.concatenate(maps)
    keep = used.any(axis=1)
    np.matmul(
        np.concatenate(basis)[keep].T.astype(np.float32), used[keep].astype(np.float32), out=out
    )
    return out


# Gas


def hii_ratios(
    logoh: np.ndarray,
    ionisation: np.ndarray,
    nitrogen: np.ndarray,
    diffuse: np.ndarray | float = 0.0,
    density: np.ndarray | float = 100.0,
) -> dict[str, np.ndarray]:
    """Dust-free line fluxes of H II regions and diffuse gas, relative to Hbeta.

    [NII]/Ha and [OIII]/Hb are such that the O3N2 and N2 calibrations of Marino et al. (2013, eqs.
    2 and 4) both return `logoh` where the offsets are zero. Ionisation raises log([OIII]/Hb) by
    its value, and lowers log([NII]/Ha) by 0.3 and log([SII]/Ha) by about 0.5 of it (same signs as
    in Kewley & Dopita 2002). A larger share of diffuse gas, whose spectrum is harder (Zhang et al.
    2017), raises log([OIII]/Hb), [NII]/Ha, [SII]/Ha, [OI]/Ha and [OII]/Hb together: by 1, 0.7,
    0.49, 1.04 and 1.09 times `diffuse`. The last three are the slopes of these ratios against
    [OIII]/Hb at fixed [NII]/Ha in 7815-3702; 0.7 is a choice that keeps [NII]/Ha flat along the
    radius while [OIII]/Hb rises, as it is there. log([NII]/[OII]) is -0.48 at 8.45 and rises by 2
    dex per dex of O/H, close to the Te-based relation of Bresolin (2007).
    [OI]/[SII] is that of 7815-3702; He, Ne, Ar and S have values typical of H II regions.

    Parameters
    ----------
    logoh : array
        12+log(O/H).
    ionisation, nitrogen, diffuse : arrays
        Offsets from the mean relations, dex: of [OIII]/Hb, of N/O, and of [OIII]/Hb.
    density : array, cm-3
        Of the electrons; sets the ratios within the doublets of [SII] and [OII].

    Returns
    -------
    dict of line name -> array, all 35 of EMLINES
    """
    n2 = (logoh - 8.743) / 0.462
    o3 = (8.533 - logoh) / 0.214 + n2 + ionisation + diffuse
    n2 = n2 - 0.3 * ionisation + nitrogen
    # [NII] of the H II regions decides the others
    s2 = -0.48 + 0.25 * (n2 + 0.5) - 0.4 * ionisation - 0.2 * nitrogen
    o1 = s2 - 1.3 + 1.04 * diffuse
    s2 = s2 + 0.49 * diffuse
    n2o2 = (logoh - 8.45) / 0.51 - 0.48
    o2 = n2 - nitrogen + np.log10(CASE_B["Ha-6564"]) - n2o2 + 1.09 * diffuse
    return _assemble(o3, n2 + 0.7 * diffuse, s2, o1, o2, 0.003, helium=0.12, density=density)


def nuclear_ratios(name: str, scatter: np.ndarray) -> dict[str, np.ndarray]:
    """Dust-free line fluxes relative to Hbeta of gas ionised by other than young stars (NUCLEI)."""
    r = NUCLEI[name]
    return _assemble(
        r["o3"] + scatter, r["n2"] - 0.3 * scatter, r["s2"] - 0.3 * scatter,
        r["o1"] - 0.3 * scatter, r["o2"] - 0.2 * scatter, r["he2"], helium=0.13,
        density=NUCLEUS_DENSITY,
    )  # fmt: skip


def doublet_ratios(density: np.ndarray | float) -> tuple[Any, Any]:
    """[SII] 6718/6732 and [OII] 3729/3727 by electron density in cm-3 (Sanders et al. 2016)."""
    sii = 0.4315 * (2107 + density) / (627.1 + density)
    return sii, 0.3771 * (2468 + density) / (638.4 + density)


def _assemble(
    o3: np.ndarray,
    n2: np.ndarray,
    s2: np.ndarray,
    o1: np.ndarray,
    o2: np.ndarray,
    he2: float,
    helium: float,
    density: np.ndarray | float,
) -> dict[str, np.ndarray]:
    """All 35 lines relative to Hbeta, from log10 of the strong ratios (as in NUCLEI)."""
    one = np.ones_like(o3)
    ha = CASE_B["Ha-6564"]
    oiii, oii = 10**o3, 10**o2
    sii, nii, oi = ha * 10**s2, ha * 10**n2, ha * 10**o1
    r_sii, r_oii = doublet_ratios(density)
    lines = {name: ratio * one for name, ratio in CASE_B.items()}
    # He and Ne: Osterbrock & Ferland 2006, chapters 4 and 5
    lines |= {
        "OII-3727": oii / (1 + r_oii), "OII-3729": oii * r_oii / (1 + r_oii),
        "NeIII-3869": 0.085 * oiii,
        "NeIII-3968": 0.301 * 0.085 * oiii, "HeI-3889": 0.80 * helium * one,
        "HeI-5877": helium * one, "HeI-7067": 0.22 * helium * one, "HeII-4687": he2 * one,
        "OIII-5008": oiii, "NI-5199": 0.04 * oi, "NI-5201": 0.05 * oi, "OI-6302": oi,
        "NII-6585": nii, "SII-6718": sii * r_sii / (1 + r_sii), "SII-6732": sii / (1 + r_sii),
        "ArIII-7137": 0.07 * one, "ArIII-7753": 0.24 * 0.07 * one, "SIII-9533": 0.45 * one,
    }  # fmt: skip
    for weak, (strong, ratio) in TIED.items():
        lines[weak] = ratio * lines[strong]
    return lines


def logoh_o3n2(flux: Mapping[str, np.ndarray]) -> np.ndarray:
    """12+log(O/H) by O3N2, Marino et al. (2013), eq. 2: 8.533 - 0.214 O3N2; NaN without flux.

    Written out here and not imported from labels.py: the truth must check that module
    independently. The same holds for `logoh_n2` and `bpt_class`.
    """
    o3 = _log_ratio(flux["OIII-5008"], flux["Hb-4862"])
    return 8.533 - 0.214 * (o3 - _log_ratio(flux["NII-6585"], flux["Ha-6564"]))


def logoh_n2(flux: Mapping[str, np.ndarray]) -> np.ndarray:
    """12+log(O/H) by N2, Marino et al. (2013), eq. 4: 8.743 + 0.462 N2; NaN without flux."""
    return 8.743 + 0.462 * _log_ratio(flux["NII-6585"], flux["Ha-6564"])


def bpt_class(flux: Mapping[str, np.ndarray]) -> np.ndarray:
    """BPT class, int16: 0 star-forming, 1 composite, 2 AGN, -1 without flux.

    Star-forming lies below Kauffmann et al. (2003, eq. 1), AGN above Kewley et al. (2001, eq. 5).
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
    """Gaussian random field (y, x) of unit variance, smoothed over a scale."""
    pad = int(4 * scale_spaxels) + 1
    matrix = blur_matrix(size, pad, scale_spaxels)
    matrix /= np.sqrt((matrix**2).sum(axis=1, keepdims=True))
    return blur(rng.standard_normal((size + 2 * pad, size + 2 * pad)), matrix)


def correlated_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise (band, y, x) of unit variance, correlated between neighbouring spaxels and pixels.

    See NOISE_KERNEL_SPAXELS and NOISE_KERNEL_PIXELS.
    """
    matrix = blur_matrix(size, 0, NOISE_KERNEL_SPAXELS).astype(np.float32)
    matrix /= np.sqrt((matrix**2).sum(axis=1, keepdims=True))
    kernel = np.array(NOISE_KERNEL_PIXELS, np.float32)
    kernel /= np.sqrt((kernel**2).sum())
    margin = kernel.size - 1
    white = rng.standard_normal((N_BANDS + margin, size * size), dtype=np.float32)
    noise = kernel[0] * white[:N_BANDS]
    for k in range(1, kernel.size):
        noise += kernel[k] * white[k : k + N_BANDS]
    return matrix @ (noise.reshape(-1, size) @ matrix.T).reshape(N_BANDS, size, size)


def sky_excess(rng: np.random.Generator) -> np.ndarray:
    """Draw true over stated noise at each wavelength, (4563,) float32, 1 between the sky lines.

    The residuals of sky subtraction exceed the stated noise above 7000 Angstrom and at the
    brightest lines (SKY_RESIDUAL).
    """
    wave, out = wave_grid(), np.ones(N_BANDS)
    of_galaxy = SKY_RESIDUAL * np.exp(SKY_RESIDUAL_GALAXIES * rng.standard_normal())
    out += SKY_FOREST * of_galaxy / (1 + np.exp((8500 - wave) / 30))
    for centre, _ in SKY_LINES:
        height = of_galaxy * np.exp(SKY_RESIDUAL_LINES * rng.standard_normal())
        if centre in BRIGHT_SKY_AA:
            height *= BRIGHT_SKY
        elif centre < 7000:
            continue
        width = centre * instrument_sigma_kms(centre) / C_KMS * 1.2
        out += height * np.exp(-0.5 * ((wave - centre) / width) ** 2)
    return out.astype(np.float32)


@lru_cache(maxsize=1)
def sky_sigma() -> np.ndarray:
    """1-sigma noise of a dark spaxel with the sky lines, (4563,) 1e-17 erg/s/cm2/Angstrom."""
    wave = wave_grid()
    raised = np.ones(N_BANDS)
    for centre, factor in SKY_LINES:
        width = centre * instrument_sigma_kms(centre) / C_KMS * 1.2
        raised += (factor - 1) * np.exp(-0.5 * ((wave - centre) / width) ** 2)
    return 10 ** np.interp(wave, SKY_NODES[0], np.log10(SKY_NODES[1])) * raised


@lru_cache(maxsize=1)
def g_response() -> np.ndarray:
    """Weights of a smooth band similar to SDSS g, (4563,) float32, sum 1."""
    weight = np.exp(-(((wave_grid() - 4700) / 650) ** 4))
    return (weight / weight.sum()).astype(np.float32)


@lru_cache(maxsize=1)
def photon_variance() -> np.ndarray:
    """Variance per unit of flux density, (4563,) 1e-17 erg/s/cm2/Angstrom."""
    return 10 ** np.interp(wave_grid(), PHOTON_NODES[0], np.log10(PHOTON_NODES[1]))


# Observing


def observe(
    scene: Scene, rng: np.random.Generator, depth: float = 1.0, within: Galaxy | None = None
) -> Galaxy:
    """Add noise and masks to a scene.

    The stated variance is that of the sky, raised where fewer fibres cover a spaxel, plus that of
    the galaxy's own light; the cube's IVAR is its inverse. The noise follows it but for the
    residuals of the sky lines (`sky_excess`), and is correlated (`correlated_noise`).

    Parameters
    ----------
    scene : Scene
    rng : numpy Generator
    depth : float
        Exposure time over that of the survey; the variance is proportional to its inverse.
    within : Galaxy, optional
        Deeper observation of the same scene, of whose exposures this one uses a part: it shares
        that part of the noise, the lost pixels and the spaxels that are fitted.
    """
    wave = wave_grid()
    redcorr = 10 ** (0.4 * scene.ebv_gal * extinction_curve(wave))
    emline = draw_lines(scene)
    model = (scene.stellar + emline) / redcorr[:, None].astype(np.float32)
    var = np.outer((scene.noise_scale * sky_sigma()) ** 2, 1 / scene.coverage).astype(np.float32)
    var += photon_variance()[:, None].astype(np.float32) * np.maximum(model, 0)
    g_band = g_response()[:, None]
    if scene.snr is not None:
        var *= ((g_band * model / np.sqrt(var)).sum(axis=0) / scene.snr) ** 2
    noise = correlated_noise(rng, scene.size).reshape(N_BANDS, -1)
    noise = noise[:, scene.ys * scene.size + scene.xs]
    excess = sky_excess(rng) if within is None else within.excess
    noise *= excess[:, None]
    noise *= np.sqrt(var)
    if within is None:
        noise /= np.float32(np.sqrt(depth))
        bad = _cosmic_rays(rng, noise.shape)
    else:
        # the other exposures of the deep data average out with these to its noise
        noise *= np.float32(np.sqrt(1 / depth - 1 / within.depth))
        noise += np.where(within.bad, 0, within.flux - model)
        bad = within.bad
    var /= np.float32(depth)
    ivar = np.where(bad, 0, 1 / var).astype(np.float32)
    flux = np.where(bad, 0, model + noise).astype(np.float32)

    weight = g_band * ~bad
    norm = np.maximum(weight.sum(axis=0), 1e-9)
    mflux = (weight * flux).sum(axis=0) / norm
    mflux_ivar = norm**2 / np.maximum((weight**2 * np.where(bad, 0, var)).sum(axis=0), 1e-30)
    snr = (weight * flux * np.sqrt(ivar)).sum(axis=0) / norm
    good_share = 1 - bad.mean(axis=0)
    if within is not None:
        binned = within.binned
    elif scene.bin_ids is not None:
        binned = scene.bin_ids[0, scene.ys, scene.xs] >= 0
    else:
        usable = (scene.bits[scene.ys, scene.xs] & DONOTUSE) == 0
        binned = usable & (snr > 1) & (good_share >= 0.8)
    return Galaxy(
        scene, redcorr, emline, flux, ivar, bad, binned, mflux, mflux_ivar, snr, excess, depth
    )


def _cosmic_rays(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Lost pixels (band, spaxel) bool: 0.1 % of all, in runs of three, as in real spectra."""
    bad = np.zeros(shape, bool)
    hits = rng.integers(0, (shape[0] - 2, shape[1]), size=(int(3.5e-4 * shape[0] * shape[1]), 2))
    for k in range(3):
        bad[hits[:, 0] + k, hits[:, 1]] = True
    return bad


def line_profiles(
    names: Sequence[str], scene: Scene, margin_aa: float = 32.0
) -> tuple[slice, np.ndarray] | None:
    """Profiles of some lines on the pixels around them.

    A profile is a Gaussian with the widths of gas and instrument, averaged over each pixel.

    Returns
    -------
    band : slice
        Pixels within `margin_aa` of the lines.
    profiles : (line, band, spaxel) float32, 1/Angstrom
    None instead of both if the pixels are not all on the grid.
    """
    from scipy.special import ndtr

    waves = np.array([EMLINES[n] for n in names]) * (1 + scene.z)
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
    """Emission-line spectra (band, spaxel) float32, without noise and Galactic reddening."""
    out = np.zeros((N_BANDS, scene.ys.size), np.float32)
    for name, flux in scene.line_flux.items():
        drawn = line_profiles([name], scene)
        if drawn is not None:
            out[drawn[0]] += drawn[1][0] * flux.astype(np.float32)
    return out


def measure_lines(galaxy: Galaxy, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Measure the emission lines on the noise of the cube.

    The fitted continuum is subtracted and Gaussians of known wavelength and width are fitted by
    least squares. With profiles P, weights W (stated inverse variances) and n, the noise of the
    cube plus the error of the continuum, the measured fluxes are the true ones plus
    (P^T W P)^-1 P^T W n, and their stated variances are the diagonal of (P^T W P)^-1. As in real
    maps these neglect that neighbouring pixels are correlated. Overlapping lines are fitted
    together, doublets of fixed ratio as one. Wavelength and width count as known because the DAP
    ties them over all lines (Belfiore et al. 2019); with a free width the flux errors would be 1.22
    times larger. Fluxes can be negative, whereas the DAP's are at least 0.

    Returns
    -------
    dict of arrays
        gflux, gflux_var : (line, spaxel)
            Flux of the fit and its variance (inf where too few pixels of the line are good).
        sflux, sflux_var : (line, spaxel)
            Flux summed over +-10 Angstrom (inf where any of these pixels is lost).
        cont : (line, spaxel)
            Continuum at the line.
        v_var : (spaxel,), (km/s)^2
            Variance of the velocity, and of the dispersion, from all lines together.
        v_error, s_error : (spaxel,), km/s
            Errors drawn for velocity and dispersion.
        Lines are in the order of EMLINES.
    """
    scene, ivar, redcorr = galaxy.scene, galaxy.ivar, galaxy.redcorr
    names = list(EMLINES)
    row = {n: i for i, n in enumerate(names)}
    shape = (len(names), scene.ys.size)
    gflux, sflux, cont = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    gvar, svar = np.full(shape, np.inf), np.full(shape, np.inf)
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
        clean = galaxy.flux[band] * red - scene.fitted[band] - galaxy.emline[band]
        seen = (columns * (weight > 0)).sum(axis=1) / columns.sum(axis=1)
        normal = np.einsum("lps,ps,mps->slm", columns, weight, columns, optimize=True)
        right = np.einsum("lps,ps,ps->sl", columns, weight, clean, optimize=True)
        normal = normal.astype(float)
        measured = (seen > MIN_PROFILE) & (normal.diagonal(axis1=1, axis2=2) > 0).T
        normal[:, range(len(free)), range(len(free))] += ~measured.T  # keeps the matrix regular
        inverse = np.linalg.inv(normal)
        error = np.einsum("slm,sm->ls", inverse, right.astype(float))
        variance = inverse.diagonal(axis1=1, axis2=2).T
        for k, name in enumerate(free):
            i = row[name]
            gflux[i] = scene.line_flux[name] + np.where(measured[k], error[k], 0)
            gvar[i] = np.where(measured[k], variance[k], np.inf)
        for weak, (strong, ratio) in TIED.items():
            if weak in group:
                gflux[row[weak]] = ratio * gflux[row[strong]]
                gvar[row[weak]] = ratio**2 * gvar[row[strong]]
        for name, *sums in _sums(scene, group, band, profile, clean, weight):
            sflux[row[name]], svar[row[name]], cont[row[name]] = sums
    for name, i in row.items():
        centre = EMLINES[name] * (1 + scene.z)
        total = np.hypot(scene.gas_sigma, instrument_sigma_kms(centre))
        if name not in TIED:
            # var(centre) = var(width) = 2 sigma**2 var(F) / F**2, from the Fisher matrix of a
            # Gaussian (cf. Lenz & Ayres 1992)
            v_info += np.where(scene.line_flux[name] > 0, scene.line_flux[name], 0) ** 2 / (
                2 * gvar[i] * total**2
            )
    v_var = 1 / np.maximum(v_info, 1e-12)
    return {
        "gflux": gflux, "gflux_var": gvar, "sflux": sflux, "sflux_var": svar, "cont": cont,
        "v_var": v_var, "v_error": rng.standard_normal(shape[1]) * np.sqrt(v_var),
        "s_error": rng.standard_normal(shape[1]) * np.sqrt(v_var),
    }  # fmt: skip


def measure_stars(galaxy: Galaxy, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Measured stellar velocity and dispersion, and their 1-sigma errors; each (spaxel,) km/s.

    The error of the velocity is 0.74 times the observed width (dispersion and 70 km/s in
    quadrature) over the S/N, the median in 7815-3702. The error of the dispersion grows as the
    dispersion falls below the instrument's (cf. Westfall et al. 2019). A negative dispersion stands
    for a fit that ends at its lower bound.
    """
    scene = galaxy.scene
    width = np.hypot(scene.star_sigma, 70.0)
    v_error = 0.74 * width / np.maximum(galaxy.snr, 0.5)
    s_error = v_error * width / np.maximum(scene.star_sigma, 20)
    return {
        "star_v": scene.star_v + v_error * rng.standard_normal(width.size),
        "star_v_sd": v_error,
        "star_sigma": scene.star_sigma + s_error * rng.standard_normal(width.size),
        "star_sigma_sd": s_error,
    }


def _sums(
    scene: Scene,
    group: Sequence[str],
    band: slice,
    profile: np.ndarray,
    noise: np.ndarray,
    weight: np.ndarray,
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield each line, its flux within +-10 Angstrom (rest frame), variance and continuum.

    Neighbouring lines that reach into the passband are included, as in the DAP.
    """
    wave, dl = wave_grid(), np.diff(wave_edges())[band, None]
    signal = sum(profile[k] * scene.line_flux[n] for k, n in enumerate(group))
    for name in group:
        centre = EMLINES[name] * (1 + scene.z) * (1 + scene.gas_v / C_KMS)
        inside = np.abs(wave[band, None] - centre) < 10 * (1 + scene.z)
        good = inside & (weight > 0)
        variance = np.divide(dl**2, weight, out=np.zeros_like(noise, dtype=float), where=good)
        whole = good.sum(axis=0) == inside.sum(axis=0)
        at = np.clip(np.searchsorted(wave, centre), 0, N_BANDS - 1)
        yield (
            name,
            ((signal + noise) * dl * good).sum(axis=0),
            np.where(whole, variance.sum(axis=0), np.inf),
            scene.fitted[at, np.arange(centre.size)],
        )
