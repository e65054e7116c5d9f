"""Make one simulated galaxy: draw its parameters, build its noiseless scene, observe it.

Arrays in, arrays out; reads and writes nothing. Maps are (y, x), spectra (band, spaxel); fluxes in
1e-17 erg/s/cm2 (/Angstrom) /spaxel; wavelengths in vacuum Angstrom.

    >>> params = draw_params(seed=1, index=0, bundles=(19,))
    >>> galaxy = simulate_galaxy(params)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import utils

import numpy as np

from mock.physics import (
    C_KMS,
    DEADFIBER,
    DONOTUSE,
    EMLINES,
    FIBRE_PITCH_ARCSEC,
    FORESTAR,
    LOWCOV,
    NOCOV,
    R_V,
    SPAXEL_ARCSEC,
    STELLAR_TO_GAS_EBV,
    TIED,
    Galaxy,
    Scene,
    Stars,
    at_shift,
    blur,
    blur_matrix,
    draw_stars,
    elliptical_coordinates,
    extinction_curve,
    fit_continuum,
    galactic_coordinates,
    hexagon_distance,
    hii_ratios,
    measure_lines,
    measure_stars,
    mix_templates,
    nuclear_ratios,
    observe,
    population_weights,
    sky_offsets,
    smooth_field,
    stellar_templates,
    wave_grid,
)

DAPTYPE = "SPX-MILESHC-MASTARSSP"
"""DAP analysis whose files are simulated: one bin per spaxel."""

FIRST_PLATE, PLATES_PER_SEED = 13001, 997
"""First plate of the galaxies of seed 1, and the step to those of the next seed; the plates of the
real survey have lower numbers."""

BUNDLES: dict[int, tuple[int, int, float]] = {
    19: (2, 34, 0.117),
    37: (3, 44, 0.235),
    61: (4, 54, 0.234),
    91: (5, 64, 0.118),
    127: (6, 74, 0.296),
}
"""Number of fibres -> rings around the central fibre, spaxels per side, fraction of DR17's galaxies
(drpall v3_1_1)."""

Z_QUANTILES = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
Z_OF_BUNDLE: dict[int, tuple[float, ...]] = {
    19: (0.0050, 0.0150, 0.0183, 0.0206, 0.0245, 0.0305, 0.0422, 0.0617, 0.0819, 0.1314, 0.1472),
    37: (0.0050, 0.0151, 0.0185, 0.0217, 0.0266, 0.0377, 0.0548, 0.0851, 0.1112, 0.1407, 0.1670),
    61: (0.0050, 0.0152, 0.0188, 0.0217, 0.0271, 0.0407, 0.0626, 0.0957, 0.1197, 0.1415, 0.1497),
    91: (0.0050, 0.0154, 0.0189, 0.0216, 0.0268, 0.0396, 0.0620, 0.0961, 0.1223, 0.1422, 0.1497),
    127: (0.0050, 0.0138, 0.0173, 0.0202, 0.0253, 0.0378, 0.0548, 0.0851, 0.1115, 0.1402, 0.1497),
}
"""Redshifts at Z_QUANTILES for each bundle size, from DR17's drpall; the few galaxies below 0.005
are left out."""

OLD_LOG_AGE = 9.95
"""log10 of the age of the bulge's stars in years."""
MAX_METAL = 0.2
"""Highest [Z/H] of the stellar templates."""

STARS_OVER_GAS_V, BULGE_OVER_GAS_V = 0.95, 0.6
"""Rotation of the stars of disc and bulge over that of the gas (asymmetric drift). Together they
give a ratio of about 0.8 as in 7815-3702 (0.81 by regression at S/N > 10)."""
FIELD_SCALE_RE = 0.5
"""Smoothing scale of the local scatter of line ratios over the effective radius: the residuals of
7815-3702 about its N2 relation are correlated by 0.5 at 4.5 spaxels, 0.6 effective radii, which
includes the seeing."""
IONISATION_DEX, DIFFUSE_DEX = 0.04, 0.09
"""Local scatter of the two offsets of [O III]/Hb, see `mock.physics.hii_ratios`. Set so that O3N2
metallicities scatter about a galaxy's own N2 relation by 0.02 to 0.03 dex in the median (0.024 in
two real galaxies)."""
DIFFUSE_SLOPE = (0.18, 0.05)
"""Mean and scatter between galaxies of the gradient of the offset by diffuse gas, dex per effective
radius, chosen like DIFFUSE_DEX; 7815-3702 has 0.24."""

Kind = Literal["star-forming", "composite", "Seyfert", "LINER"]


@dataclass(frozen=True)
class GalaxyParams:
    """Everything that defines a simulated galaxy; `draw_params` draws it."""

    plateifu: str
    mangaid: str
    seed: int
    index: int
    """Number of the galaxy in its survey."""
    twin_of: int
    """Index of the galaxy that this one observes a second time; its own index otherwise."""
    kind: Kind
    """What ionises the gas in the centre."""
    bundle: int
    """Number of fibres."""
    z: float
    ra: float
    """Degrees (J2000), like `dec`."""
    dec: float
    ebv_gal: float
    """E(B-V) of the Milky Way, mag."""
    r_eff: float
    """Effective radius, arcsec."""
    axis_ratio: float
    pa: float
    """Position angle from north to east, degrees."""
    flux_re: float
    """Continuum at 5500 Angstrom (rest frame) at the effective radius,
    1e-17 erg/s/cm2/Angstrom/spaxel."""
    bulge_fraction: float
    v_max: float
    """Rotation projected on the line of sight, km/s."""
    r_turn: float
    """Turnover radius of the rotation curve, arcsec."""
    sigma_disc: float
    """Velocity dispersion, km/s, like the next two."""
    sigma_bulge: float
    sigma_gas: float
    log_age_re: float
    """log10 of the stellar age in years at the effective radius."""
    metal_re: float
    """Stellar [Z/H] at the effective radius."""
    ew_ha: float
    """Rest-frame equivalent width of Halpha at the effective radius, Angstrom."""
    ebv_re: float
    """E(B-V) of the galaxy's gas at the effective radius, mag."""
    logoh_re: float
    """12+log(O/H) of the gas at the effective radius."""
    logoh_slope: float
    """Its gradient, dex per effective radius."""
    ionisation: float
    """Offset of [O III]/Hb from the mean relation of `mock.physics.hii_ratios`, dex."""
    nitrogen: float
    """The same of N/O."""
    agn_fraction: float
    """Halpha of the active nucleus over that of the H II regions, in the centre."""
    agn_radius: float
    """Scale length of the nuclear emission, arcsec."""
    diffuse_slope: float
    """Gradient of the offset of [O III]/Hb by diffuse gas, dex per effective radius."""
    density: float
    """Electron density of the H II regions, cm-3."""
    seeing_arcsec: float
    """Full width at half maximum."""
    noise_scale: float
    """Factor on the typical noise."""
    foreground_star: bool
    dead_fibre: bool
    depth: float = 1.0
    """Exposure time over that of the survey."""
    deep_labels: bool = False
    """Whether MAPS are measured at the survey's depth where the cube is shallower."""


# Parameters


def plateifu_of_index(seed: int, index: int, bundle: int) -> str:
    """Plateifu of simulated galaxy `index`, on a plate number that the real survey does not use.

    Seeds have plates of their own, until the five digits are used up.
    """
    plate = ((seed - 1) * PLATES_PER_SEED + index // 2) % (100_000 - FIRST_PLATE)
    return f"{FIRST_PLATE + plate}-{bundle}{1 + index % 2:02d}"


def twin_index(index: int) -> int:
    """Index of the galaxy that this one repeats, or its own: 1.4 % are repeats, as in DR17."""
    return index - 7 if index % 72 == 11 else index


def bundle_radius_arcsec(bundle: int) -> float:
    """Distance from the centre of a bundle to its corners, arcsec."""
    return BUNDLES[bundle][0] * FIBRE_PITCH_ARCSEC + 1.25


def _kind(u: float) -> Kind:
    """Kind of galaxy for a number in [0, 1): the centres of 26 % are not star-forming."""
    if u < 0.74:
        return "star-forming"
    if u < 0.83:
        return "composite"
    return "Seyfert" if u < 0.94 else "LINER"


def _agn_fraction(kind: Kind, rng: np.random.Generator) -> float:
    """Draw the ratio of the active nucleus' Halpha to that of the H II regions, in the centre."""
    low, high = {
        "star-forming": (0.0, 0.0),
        "composite": (0.5, 1.0),
        "Seyfert": (2.5, 6.0),
        "LINER": (3.0, 5.0),
    }[kind]
    return float(rng.uniform(low, high))


def draw_params(
    seed: int, index: int, bundles: Sequence[int] = (), relation: float = 0.0
) -> GalaxyParams:
    """Draw the parameters of galaxy number `index` of a seeded survey.

    Metallicity and kind follow a low-discrepancy sequence over the index (a Kronecker sequence on
    the powers of the plastic number), so that a small survey covers both evenly and in all
    combinations. All other parameters are random and, without a relation, independent of these.

    Parameters
    ----------
    seed, index : int
    bundles : sequence of int
        Bundle sizes to draw from, keys of BUNDLES; empty for all, as often as in DR17.
    relation : float
        Correlation of the metallicity with surface brightness and, standing for mass, with the
        speed of rotation, -1 to 1.
    """
    sizes = tuple(dict.fromkeys(bundles)) or tuple(BUNDLES)
    twin_of = twin_index(index)
    offset = np.random.default_rng([seed, 0]).random(2)
    even = (offset + twin_of * np.array([0.7548776662466927, 0.5698402909980532])) % 1
    rng = np.random.default_rng([seed, 1, twin_of])
    share = np.array([BUNDLES[b][2] for b in sizes])
    bundle = int(rng.choice(sizes, p=share / share.sum()))
    cos_i = rng.uniform(0.35, 1.0)
    sin_i = np.sqrt(1 - cos_i**2)
    kind = _kind(even[1])
    r_eff = bundle_radius_arcsec(bundle) / rng.uniform(1.4, 2.6)
    quiet = kind == "LINER"

    def related(own: float) -> float:
        """Mix a number of unit variance with the metallicity, by the correlation wanted."""
        metal = np.sqrt(12) * (even[0] - 0.5)  # uniform, unit variance
        return float(relation * metal + np.sqrt(1 - relation**2) * own)

    params: dict[str, Any] = {
        "z": float(np.interp(rng.random(), Z_QUANTILES, Z_OF_BUNDLE[bundle])),
        "ra": rng.uniform(0, 360),
        "dec": float(np.rad2deg(np.arcsin(rng.uniform(-0.05, 0.9)))),
        "ebv_gal": float(np.clip(0.03 * np.exp(0.7 * rng.standard_normal()), 0.005, 0.3)),
        "r_eff": r_eff,
        # a disc of finite thickness, 0.2 (Holmberg 1958)
        "axis_ratio": float(np.sqrt((1 - 0.2**2) * cos_i**2 + 0.2**2)),
        "pa": rng.uniform(0, 360),
        "flux_re": 0.13 * 10 ** (0.13 * related(rng.standard_normal())),
        "bulge_fraction": rng.uniform(0.0, 0.35),
        "v_max": (185 + 75 * related(rng.uniform(-1, 1) * np.sqrt(3)) / np.sqrt(3)) * sin_i,
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
    params["diffuse_slope"] = DIFFUSE_SLOPE[0] + DIFFUSE_SLOPE[1] * rng.standard_normal()
    # [S II] ratios of 1.42 to 1.45 in the median, as in real galaxies (Sanders et al. 2016)
    params["density"] = 10 ** rng.uniform(0.0, 0.9)
    # the stars' metallicity follows the gas loosely (solar 8.69, Asplund et al. 2009)
    params["metal_re"] = params["logoh_re"] - 8.69 + 0.1 * rng.standard_normal()
    here = np.random.default_rng([seed, 2, index])  # differs between a galaxy and its repeat
    return GalaxyParams(
        plateifu=plateifu_of_index(seed, index, bundle),
        mangaid=f"99-{(seed - 1) % 1000 * 1_000_000 + 100_001 + twin_of}",
        seed=seed,
        index=index,
        twin_of=twin_of,
        kind=kind,
        bundle=bundle,
        seeing_arcsec=here.uniform(2.4, 2.65),
        noise_scale=here.uniform(0.85, 1.15),
        foreground_star=bool(here.random() < 0.12),
        dead_fibre=bool(here.random() < 0.10),
        **{k: float(v) for k, v in params.items()},  # type: ignore[arg-type]  # none is a bool
    )


# Field of view, foreground star, dead fibre, header


def _field_of_view(size: int, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage 0 to 1, mask bits and footprint (y, x) of a dithered bundle of a given radius.

    Dithering and the cube's kernel (Law et al. 2016, section 9) soften the edge by 1.5 arcsec.
    LOWCOV marks less than 30 % of the full weight, as in the DRP.
    """
    east, north = sky_offsets(size)
    soft = np.clip((hexagon_distance(east, north, radius) + 0.75) / 1.5, 0, 1)
    cover = soft**2 * (3 - 2 * soft)
    bits = np.zeros((size, size), np.int32)
    bits[cover < 0.3] |= LOWCOV | DONOTUSE
    bits[cover < 0.02] |= NOCOV
    return cover, bits, cover >= 0.02


def _foreground_star(p: GalaxyParams, rng: np.random.Generator) -> tuple[float, float] | None:
    """Position (y, x) of a foreground star in spaxels, None without one."""
    distance = rng.uniform(0.45, 0.8) * bundle_radius_arcsec(p.bundle)
    angle = rng.uniform(0, 2 * np.pi)
    if not p.foreground_star:
        return None
    centre = BUNDLES[p.bundle][1] // 2
    return (
        centre + distance * np.sin(angle) / SPAXEL_ARCSEC,
        centre + distance * np.cos(angle) / SPAXEL_ARCSEC,
    )


def _dead_fibre(p: GalaxyParams, rng: np.random.Generator) -> tuple[float, float] | None:
    """Position (y, x) of a dead fibre in spaxels, in any ring around the central fibre."""
    rings, size, _ = BUNDLES[p.bundle]
    ring, angle = rng.integers(1, rings + 1), rng.integers(6) * np.pi / 3
    if not p.dead_fibre:
        return None
    centre, step = size // 2, ring * FIBRE_PITCH_ARCSEC / SPAXEL_ARCSEC
    return centre + step * np.sin(angle) * 0.9, centre + step * np.cos(angle) * 0.9


def _flag_disc(
    bits: np.ndarray, yx: tuple[float, float] | None, radius_arcsec: float, bit: int
) -> None:
    """Set a bit, and DONOTUSE, on the covered spaxels around a position; in place."""
    if yx is None:
        return
    y, x = np.indices(bits.shape)
    near = np.hypot(y - yx[0], x - yx[1]) * SPAXEL_ARCSEC < radius_arcsec
    bits[near & ((bits & NOCOV) == 0)] |= bit | DONOTUSE


def _star_light(
    rng: np.random.Generator,
    yx: tuple[float, float],
    psf: float,
    ys: np.ndarray,
    xs: np.ndarray,
) -> np.ndarray:
    """Spectra (band, spaxel) of a foreground star, old and metal-poor, at redshift 0."""
    spectrum = at_shift(stellar_templates(0.0, 10.0), 0)[3, 0]
    profile = np.exp(-0.5 * ((ys - yx[0]) ** 2 + (xs - yx[1]) ** 2) / psf**2)
    return np.outer(spectrum, rng.uniform(0.5, 4) * profile).astype(np.float32)


def _header_cards(p: GalaxyParams) -> dict[str, Any]:
    """Primary header cards that depend on the galaxy."""
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


# Scene: the galaxy without noise, as seen through the seeing


@dataclass(frozen=True)
class _Body:
    """A galaxy before the seeing: maps (y, x) on a grid padded beyond the field of view.

    r in arcsec; re: r over the effective radius; disc, bulge: continuum at 5500 Angstrom in 1e-17
    erg/s/cm2/Angstrom/spaxel; v: velocity of the gas in km/s; ebv: of the gas, mag; fields: random
    maps of unit variance, each named after the quantity that it disturbs.
    """

    r: np.ndarray
    re: np.ndarray
    disc: np.ndarray
    bulge: np.ndarray
    v: np.ndarray
    ebv: np.ndarray
    log_age: np.ndarray
    metal: np.ndarray
    fields: dict[str, np.ndarray]

    @property
    def star_v(self) -> np.ndarray:
        """Velocity of the disc's stars, km/s: slower than the gas by asymmetric drift."""
        return STARS_OVER_GAS_V * self.v

    @property
    def bulge_v(self) -> np.ndarray:
        """Velocity of the bulge's stars, km/s."""
        return BULGE_OVER_GAS_V * self.v


@dataclass(frozen=True)
class _Gas:
    """Emission before the seeing: line fluxes by name, squared width (km/s)^2, what set them."""

    lines: dict[str, np.ndarray]
    sigma2: np.ndarray
    truth: dict[str, np.ndarray]


def _lay_out(p: GalaxyParams, size: int, pad: int) -> _Body:
    """Lay out an inclined disc with a bulge, before the seeing."""
    rng = np.random.default_rng([p.seed, 3, p.twin_of])
    east, north = sky_offsets(size, pad)
    r, azimuth = elliptical_coordinates(east, north, p.pa, p.axis_ratio)
    re = r / p.r_eff
    ratios = FIELD_SCALE_RE * p.r_eff / SPAXEL_ARCSEC
    fields = {
        name: smooth_field(rng, size + 2 * pad, scale)
        for name, scale in (("age", 3), ("metal", 4), ("dust", 2.5), ("clump", 1.6),
                            ("logoh", 3), ("ion", ratios), ("nitrogen", ratios), ("agn", 3),
                            ("diffuse", ratios), ("density", 2))
    }  # fmt: skip
    # an exponential disc (1.678 scale lengths to Re) and a de Vaucouleurs bulge
    disc = p.flux_re * np.exp(-1.678 * (re - 1))
    r_bulge = np.maximum(np.hypot(east, north), 0.25) / (0.25 * p.r_eff)
    bulge = np.exp(-7.669 * (r_bulge**0.25 - 1))
    bulge *= p.bulge_fraction / (1 - p.bulge_fraction) * disc.sum() / bulge.sum()
    log_age = p.log_age_re - 0.15 * (re - 1) + 0.12 * fields["age"]
    metal = p.metal_re + p.logoh_slope * (re - 1) + 0.05 * fields["metal"]
    return _Body(
        r=r,
        re=re,
        disc=disc,
        bulge=bulge,
        v=p.v_max * np.tanh(r / p.r_turn) * np.cos(np.deg2rad(azimuth)),
        ebv=np.clip(p.ebv_re * 10 ** (-0.15 * (re - 1) + 0.12 * fields["dust"]), 0, 1),
        log_age=np.clip(log_age, 8.0, 10.0),
        metal=np.clip(metal, -0.6, MAX_METAL),
        fields=fields,
    )


def _stellar_spectra(
    p: GalaxyParams,
    body: _Body,
    weights: np.ndarray,
    matrix: np.ndarray,
    ys: np.ndarray,
    xs: np.ndarray,
    stars: Stars | None,
) -> np.ndarray:
    """Spectra of disc and bulge through the seeing, reddened inside the galaxy; (band, spaxel)."""
    templates = stellar_templates(p.z, p.sigma_disc, stars)
    stellar = mix_templates(templates, weights * body.disc, body.star_v, matrix, ys, xs)
    old = population_weights(
        np.array(OLD_LOG_AGE), np.array(np.clip(p.metal_re + 0.15, -0.6, MAX_METAL))
    )
    templates = stellar_templates(p.z, p.sigma_bulge, stars)
    bulge = old[..., None, None] * body.bulge
    stellar += mix_templates(templates, bulge, body.bulge_v, matrix, ys, xs)
    light = blur(body.disc + body.bulge, matrix)
    ebv = STELLAR_TO_GAS_EBV * blur(body.ebv * (body.disc + body.bulge), matrix) / light
    # fluxes are defined at 5500 Angstrom (V), so the dust dims relative to A_V
    curve = extinction_curve(wave_grid() / (1 + p.z)) - R_V
    dimming = np.exp(np.outer(-0.4 * np.log(10) * curve, ebv[ys, xs]))
    stellar *= dimming.astype(np.float32)
    return stellar


def _gas(p: GalaxyParams, body: _Body, weights: np.ndarray) -> _Gas:
    """Emission lines of H II regions and of an active nucleus, reddened inside the galaxy."""
    templates = stellar_templates(p.z, p.sigma_disc)
    # the equivalent width times the reddened continuum of the disc gives the flux of Halpha
    k_ha = extinction_curve(np.array([6564.632]))[0] - R_V
    dimming = 10 ** (-0.4 * STELLAR_TO_GAS_EBV * body.ebv * k_ha)
    near_ha = int(np.argmin(np.abs(wave_grid() - 6530 * (1 + p.z))))
    shape = np.tensordot(at_shift(templates, 0)[..., near_ha], weights, 2)
    continuum = shape * body.disc * dimming
    log_ew = np.log10(p.ew_ha) + 0.12 * (body.re - 1).clip(-1, 1) + 0.18 * body.fields["clump"]
    ha = 10 ** np.clip(log_ew, 0, 2.2) * (1 + p.z) * continuum

    slope = p.logoh_slope * (np.minimum(body.re, 2) - 1)
    logoh = np.clip(p.logoh_re + slope + 0.035 * body.fields["logoh"], 8.1, 8.75)
    gradient = p.diffuse_slope * (np.minimum(body.re, 2) - 1)
    truth = {
        "logoh": logoh,
        "ionisation": p.ionisation + IONISATION_DEX * body.fields["ion"],
        "nitrogen": p.nitrogen + 0.02 * body.fields["nitrogen"],
        "diffuse": gradient + DIFFUSE_DEX * body.fields["diffuse"],
        "density": p.density * 10 ** (0.2 * body.fields["density"]),
    }
    lines = hii_ratios(**truth)
    lines = {name: ha * ratio / lines["Ha-6564"] for name, ratio in lines.items()}
    sigma2 = np.full_like(ha, p.sigma_gas**2)
    if p.agn_fraction > 0:
        nuclear = "Seyfert" if p.kind == "Seyfert" else "LINER"
        ratios = nuclear_ratios(nuclear, 0.08 * body.fields["agn"])
        if p.kind == "LINER":  # old stars ionise the whole disc (Belfiore et al. 2016)
            ha = ha / (1 + p.agn_fraction)
            lines = {name: flux / (1 + p.agn_fraction) for name, flux in lines.items()}
            agn = p.agn_fraction * ha
        else:
            centre = ha[body.r < p.r_eff / 3].mean()
            agn = p.agn_fraction * centre * np.exp(-body.r / p.agn_radius)
        for name in lines:
            lines[name] = lines[name] + agn * ratios[name] / ratios["Ha-6564"]
        sigma2 += agn / (ha + agn) * 90.0**2
    curve = dict(zip(EMLINES, extinction_curve(np.array(list(EMLINES.values()))), strict=True))
    # both lines of a doublet get the same extinction, so that their ratio is the one of the fit
    dust = {k: curve[TIED[k][0] if k in TIED else k] - curve["Ha-6564"] for k in EMLINES}
    lines = {k: flux * 10 ** (-0.4 * body.ebv * dust[k]) for k, flux in lines.items()}
    return _Gas(lines, sigma2, truth)


def build_scene(p: GalaxyParams) -> Scene:
    """Build a galaxy's noiseless spectra and maps as seen through the seeing.

    The galaxy is laid out on a grid somewhat larger than the field of view, then blurred:
    continuum spectra as weights of templates at each velocity, so that neighbouring spectra truly
    mix; emission lines as fluxes and flux-weighted velocity moments.
    """
    size = BUNDLES[p.bundle][1]
    psf = p.seeing_arcsec / SPAXEL_ARCSEC / (2 * np.sqrt(2 * np.log(2)))
    pad = int(np.ceil(3.5 * psf))
    matrix = blur_matrix(size, pad, psf)
    body = _lay_out(p, size, pad)
    here = np.random.default_rng([p.seed, 4, p.index])
    cover, bits, inside = _field_of_view(size, bundle_radius_arcsec(p.bundle))
    star_yx = _foreground_star(p, here)
    dead_yx = _dead_fibre(p, here)
    _flag_disc(bits, star_yx, p.seeing_arcsec, FORESTAR)
    _flag_disc(bits, dead_yx, 1.2, DEADFIBER)
    if dead_yx:
        cover[(bits & DEADFIBER) > 0] *= 0.3
    ys, xs = np.nonzero(inside)

    weights = population_weights(body.log_age, body.metal)  # (age, metallicity, y, x)
    own = draw_stars(np.random.default_rng([p.seed, 6, p.twin_of]))
    stellar, mean = (
        _stellar_spectra(p, body, weights, matrix, ys, xs, stars) for stars in (own, None)
    )
    continuum = fit_continuum(stellar, mean)
    if star_yx:
        light = _star_light(here, star_yx, psf, ys, xs)
        stellar += light
        continuum += light
    gas = _gas(p, body, weights)

    disc, bulge, ha = body.disc, body.bulge, gas.lines["Ha-6564"]
    light, ha_seen = blur(disc, matrix) + blur(bulge, matrix), blur(ha, matrix)
    gas_v = blur(ha * body.v, matrix) / ha_seen
    gas_sigma = np.sqrt(blur(ha * (body.v**2 + gas.sigma2), matrix) / ha_seen - gas_v**2)
    star_v = blur(disc * body.star_v + bulge * body.bulge_v, matrix) / light
    second = disc * (body.star_v**2 + p.sigma_disc**2)
    second += bulge * (body.bulge_v**2 + p.sigma_bulge**2)
    star_sigma = np.sqrt(blur(second, matrix) / light - star_v**2)
    metal = disc * body.metal + bulge * min(p.metal_re + 0.15, MAX_METAL)
    truth = {
        "logoh_physical": gas.truth["logoh"],
        **{name: gas.truth[name] for name in ("ionisation", "nitrogen", "diffuse", "density")},
    }
    truth = {name: values[pad : pad + size, pad : pad + size] for name, values in truth.items()}
    truth |= {
        "gas_ebv": blur(body.ebv * ha, matrix) / ha_seen,
        "stellar_log_age": blur(disc * body.log_age + bulge * OLD_LOG_AGE, matrix) / light,
        "stellar_metallicity": blur(metal, matrix) / light,
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
        line_flux={name: blur(flux, matrix)[ys, xs] for name, flux in gas.lines.items()},
        gas_v=gas_v[ys, xs],
        gas_sigma=gas_sigma[ys, xs],
        star_v=star_v[ys, xs],
        star_sigma=star_sigma[ys, xs],
        noise_scale=p.noise_scale,
        cards=_header_cards(p),
        truth={name: values[ys, xs] for name, values in truth.items()},
        meta={"params": asdict(p)},
        continuum=continuum,
    )


def simulate_galaxy(params: GalaxyParams) -> Galaxy:
    """Simulate one galaxy: noiseless scene, observation, fits; all decided by `params`.

    With labels from deep data, the galaxy returned is the shallow one, and `galaxy.deep` the
    observation that MAPS are measured on.
    """
    rng = np.random.default_rng([params.seed, 5, params.index])
    scene = build_scene(params)
    deepest = max(params.depth, 1.0) if params.deep_labels else params.depth
    galaxy = observe(scene, rng, deepest)
    galaxy.fit = measure_lines(galaxy, rng) | measure_stars(galaxy, rng)
    if params.depth < deepest:
        deep, galaxy = galaxy, observe(scene, rng, params.depth, within=galaxy)
        galaxy.deep = deep
    return galaxy
