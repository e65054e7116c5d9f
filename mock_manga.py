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
velocity and width that Halpha has after the seeing. Noise is independent from pixel to pixel in
wavelength and its stated variance exact. The continuum fit is taken to be perfect. Spectral
indices are not measured: all their values are masked NOVALUE|DONOTUSE.

    python mock_manga.py --data-dir data/manga --n-galaxies 24 --seed 1 --bundles 19 --jobs 2
    python mock_manga.py --data-dir data/manga --from-maps manga-7815-3702-MAPS-HYB10.fits.gz
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

import loops
import recipe
import utils
from labels import LABEL_NONE
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
    at_shift,
    blur,
    blur_matrix,
    bpt_class,
    draw_lines,
    elliptical_coordinates,
    extinction_curve,
    fit_lines,
    fit_stars,
    g_response,
    galactic_coordinates,
    hexagon_distance,
    hii_ratios,
    logoh_n2,
    logoh_o3n2,
    mix_templates,
    nuclear_ratios,
    observe,
    population_weights,
    sky_offsets,
    smooth_field,
    stellar_templates,
    to_image,
    wave_grid,
)
from utils import DataError

log = logging.getLogger(__name__)
DAPTYPE = "SPX-MILESHC-MASTARSSP"
DAPTYPES = (
    "HYB10-MILESHC-MASTARHC2",
    "SPX-MILESHC-MASTARSSP",
    "HYB10-MILESHC-MASTARSSP",
    "VOR10-MILESHC-MASTARSSP",
)
DAPALL = "dapall-v3_1_1-3.1.0.fits"
FIRST_PLATE = 13001
"""Of the simulated galaxies; the survey's end below."""
TRUTH_SCHEMA, TRUTH_VERSION = "manga-mock-truth", 1
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
Kind = Literal["star-forming", "composite", "Seyfert", "LINER"]


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


# Drawing galaxies


def plateifu_of_index(index: int, bundle: int) -> str:
    """Name of the mock galaxy, on a plate that the survey never had."""
    return f"{FIRST_PLATE + index // 2}-{bundle}{1 + index % 2:02d}"


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
    _flag_disc(bits, size, star_yx, p.seeing_arcsec, FORESTAR)
    _flag_disc(bits, size, dead_yx, 1.2, DEADFIBER)
    if dead_yx:
        cover[(bits & DEADFIBER) > 0] *= 0.3
    ys, xs = np.nonzero(inside)

    # stars
    weights = population_weights(log_age, metal)  # (age, metallicity, y, x)
    stars_v = 0.85 * v_field  # asymmetric drift
    disc_templates = stellar_templates(p.z, p.sigma_disc)
    stellar = mix_templates(disc_templates, weights * disc, stars_v, matrix, ys, xs)
    old = population_weights(np.array(9.95), np.array(np.clip(p.metal_re + 0.15, -0.6, 0.2)))
    bulge_template = stellar_templates(p.z, p.sigma_bulge)
    stellar += np.outer(
        np.tensordot(old, at_shift(bulge_template, 0), 2), bulge_light[ys, xs]
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
    cont_ha = np.tensordot(at_shift(disc_templates, 0)[..., near_ha], weights, 2) * disc * red_ha
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
    curve = dict(zip(EMLINES, extinction_curve(np.array(list(EMLINES.values()))), strict=True))
    # lines of a doublet are dimmed alike, so that their ratio is the one that the fit assumes
    dust = {k: curve[TIED[k][0] if k in TIED else k] - curve["Ha-6564"] for k in EMLINES}
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

    Dithering and the cube's kernel (Law et al. 2016, section 9) soften the edge by 1.5 arcsec.
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
    spectrum = at_shift(stellar_templates(0.0, 10.0), 0)[3, 0]
    profile = np.exp(-0.5 * ((ys - yx[0]) ** 2 + (xs - yx[1]) ** 2) / psf**2)
    return np.outer(spectrum, rng.uniform(0.5, 4) * profile).astype(np.float32)


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


# A real galaxy from its MAPS


def read_maps_scene(path: Path) -> Scene:
    """Make a noiseless scene of a real galaxy from its DAP MAPS file.

    Taken over: field of view and mask bits, bins, line fluxes (unmasked; lines that the file does
    not have stay away), velocity and width of Halpha, stellar velocity, the broad-band map and its
    S/N. Invented: the stellar spectrum, whose age follows the equivalent width of Halpha, with one
    metallicity and one dispersion for the galaxy. The maps have the seeing already, so nothing is
    blurred again.

    Parameters
    ----------
    path : Path
        MAPS of DR15 to DR17, any DAPTYPE; channels are found by name.

    Raises
    ------
    DataError
        If the file is missing, damaged, or no MAPS of a galaxy with a redshift.
    """
    import mock.dr17_files as head

    path = Path(path)
    primary, hdus, row = _read_maps(path)
    size = hdus["SPX_MFLUX"].shape[0]
    z = float(primary["SCINPVEL"]) / C_KMS
    line_bad = (hdus["EMLINE_GFLUX_MASK"] & DONOTUSE) != 0
    field_bits = np.bitwise_and.reduce(hdus["EMLINE_GFLUX_MASK"], axis=0)
    bits = (field_bits & (NOCOV | LOWCOV | DEADFIBER | FORESTAR)).astype(np.int32)
    bits[bits > 0] |= DONOTUSE
    bin_ids = hdus["BINID"]
    if bin_ids.ndim == 2:  # before DR15
        bin_ids = np.repeat(bin_ids[None], 5, axis=0)
    ys, xs = np.nonzero((hdus["SPX_MFLUX"] > 0) | (bin_ids[0] >= 0))
    if not ys.size:
        raise DataError(f"{path}: SPX_MFLUX is zero everywhere; there is no light to simulate.")
    ha = row["Ha-6564"]
    ok = ~line_bad[ha] & (hdus["EMLINE_GFLUX"][ha] > 0)
    star_ok = (hdus["STELLAR_VEL_MASK"] & DONOTUSE) == 0
    star_v = np.where(star_ok, hdus["STELLAR_VEL"], 0)
    gas_v = np.where(ok, hdus["EMLINE_GVEL"][ha], star_v)
    width2 = hdus["EMLINE_GSIGMA"][ha] ** 2 - hdus["EMLINE_INSTSIGMA"][ha] ** 2
    gas_sigma = np.sqrt(np.where(ok, np.clip(width2, 10.0**2, 500.0**2), 20.0**2))
    sigma = hdus["STELLAR_SIGMA"][star_ok]
    star_sigma = float(np.clip(np.median(sigma) if sigma.size else 60, 30, 250))
    ew = np.where(ok, hdus["EMLINE_GEW"][ha], 1.0)
    log_age = np.interp(
        np.log10(np.clip(ew, 1, 100)), (0, 0.5, 1, 1.5, 2), (10, 9.8, 9.5, 9.1, 8.6)
    )
    weights = population_weights(log_age, np.full_like(log_age, -0.1))
    templates = stellar_templates(z, star_sigma)
    shape = mix_templates(templates, weights, star_v, np.eye(size), ys, xs)
    lines = {
        name: np.where(line_bad[i], 0, hdus["EMLINE_GFLUX"][i])[ys, xs].astype(float)
        for name, i in row.items()
        if name in EMLINES
    }
    cards = {key: primary[key] for key, _, _ in head.PRIMARY if key in primary}
    for key in ("CHECKSUM", "DATASUM", "DAPFRMT", "MASKNAME"):
        cards.pop(key, None)
    cards.setdefault("IFURA", cards["OBJRA"])
    cards.setdefault("IFUDEC", cards["OBJDEC"])
    snr = hdus["SPX_SNR"][ys, xs].astype(float)
    scene = Scene(
        plateifu=str(primary["PLATEIFU"]).strip(),
        z=z,
        ebv_gal=float(primary["EBVGAL"]),
        size=size,
        ys=ys,
        xs=xs,
        coverage=np.ones(ys.size),
        bits=bits,
        stellar=shape,
        line_flux=lines,
        gas_v=gas_v[ys, xs].astype(float),
        gas_sigma=gas_sigma[ys, xs].astype(float),
        star_v=star_v[ys, xs].astype(float),
        star_sigma=np.full(ys.size, star_sigma),
        noise_scale=1.0,
        cards=cards,
        meta={"from_maps": path.name, "sha256": recipe.file_digest(path)},
        snr=np.maximum(snr, 0.1),
        bin_ids=bin_ids.astype(np.int32),
    )
    # scale the stars so that stars and lines, reddened, have the mean flux of the map
    redden = g_response() / 10 ** (0.4 * scene.ebv_gal * extinction_curve(wave_grid()))
    wanted = hdus["SPX_MFLUX"][ys, xs] - redden @ draw_lines(scene)
    scale = np.maximum(wanted, 1e-4) / (redden @ shape)
    scene.stellar = (shape * scale).astype(np.float32)
    return scene


MAPS_NEEDED = (
    "SPX_MFLUX", "SPX_SNR", "BINID", "STELLAR_VEL", "STELLAR_VEL_MASK", "STELLAR_SIGMA",
    "EMLINE_GFLUX", "EMLINE_GFLUX_MASK", "EMLINE_GEW", "EMLINE_GVEL", "EMLINE_GSIGMA",
    "EMLINE_INSTSIGMA",
)  # fmt: skip


CARDS_NEEDED = "PLATEIFU SCINPVEL EBVGAL OBJRA OBJDEC DAPTYPE REFF ECOOPA ECOOELL".split()


def _read_maps(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """Primary header, the arrays that a scene needs, and the line channels of a MAPS file."""
    import fits_stream
    import fits_utils

    hdus = fits_stream.read_hdus(path, ("PRIMARY", *MAPS_NEEDED))
    primary = dict(hdus.pop("PRIMARY").header)
    absent = [card for card in CARDS_NEEDED if card not in primary]
    if absent:
        raise DataError(
            f"{path}: no {', '.join(absent)}; expected a DAP MAPS file of DR15 to DR17."
        )
    channels = fits_utils.line_channels(hdus["EMLINE_GFLUX"].header, ("Ha-6564",), path)
    return primary, {name: hdu.data for name, hdu in hdus.items()}, channels


def resynthesise(data_dir: Path, maps: Path, seed: int, overwrite: bool = False) -> list[Path]:
    """Write the LOGCUBE that a real MAPS file could have come from, and a copy of the MAPS.

    The files keep the galaxy's own plateifu and DAPTYPE. The cube's noise has the S/N of the maps,
    but is not the noise that the real line fluxes were measured on; those fluxes are the truth.

    Raises
    ------
    DataError
        If the MAPS file cannot be used, or another LOGCUBE lies there already.
    """
    from mock.dr17_files import logcube_hdus, write_gzipped_fits

    scene = read_maps_scene(maps)
    folder = utils.raw_dir(data_dir, scene.plateifu)
    stem, daptype = f"manga-{scene.plateifu}", str(scene.cards["DAPTYPE"]).strip()
    cube, copy = (folder / f"{stem}-{kind}-{daptype}.fits.gz" for kind in ("LOGCUBE", "MAPS"))
    truth = truth_path(data_dir, scene.plateifu)
    scene.meta["seed"] = seed
    if cube.is_file() and not overwrite:
        there = json.loads(read_truth(truth)[1]["meta_json"]) if truth.is_file() else None
        if there != scene.meta:
            raise DataError(
                f"{cube}: exists, and was not made from this MAPS file and seed. "
                "Use --overwrite, or another --data-dir."
            )
        log.info("%s: there already", cube)
        return [cube, copy, truth]
    galaxy = observe(scene, np.random.default_rng([seed, 5]))
    if not copy.is_file() or recipe.file_digest(copy) != scene.meta["sha256"]:
        with utils.atomic_path(copy) as part:
            shutil.copyfile(maps, part)
    write_gzipped_fits(cube, logcube_hdus(galaxy))
    write_truth(truth, galaxy)
    return [cube, copy, truth]


def simulate_galaxy(params: GalaxyParams) -> Galaxy:
    """Simulate one galaxy: scene, then observation; nothing but `params` decides the outcome."""
    rng = np.random.default_rng([params.seed, 5, params.index])
    galaxy = observe(build_scene(params), rng)
    galaxy.fit = fit_lines(galaxy, rng) | fit_stars(galaxy, rng)
    return galaxy


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
    out = {k: to_image(scene, v, np.nan) for k, v in maps.items()}
    out["bpt"] = to_image(scene, bpt_class(scene.line_flux), LABEL_NONE, "i2")
    return out


def write_truth(path: Path, galaxy: Galaxy) -> None:
    """Write the truth file of a galaxy, whole or not at all.

    Group `line_flux` holds one (y, x) map a line, by DR17's names: noiseless, through the seeing,
    1e-17 erg/s/cm2/spaxel before Galactic reddening - what FLUX x REDCORR integrates to.
    """
    import data_io  # here: --help does not need h5py

    scene = galaxy.scene
    maps = truth_maps(galaxy)
    n_bytes = sum(values.nbytes for values in maps.values())
    with data_io.new_h5(path, 4 * n_bytes, track_order=False) as f:
        f.attrs.update(
            schema=TRUTH_SCHEMA,
            schema_version=TRUTH_VERSION,
            plateifu=scene.plateifu,
            z=scene.z,
            ebv_gal=scene.ebv_gal,
            code_version=utils.VERSION,
            meta_json=json.dumps(scene.meta, default=str),
        )
        for name, values in maps.items():
            f[name] = values
            f[name].attrs["axes"] = "y,x"
        for name, values in scene.line_flux.items():
            data = f.create_dataset(f"line_flux/{name}", data=to_image(scene, values, np.nan))
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
    from mock.dr17_files import logcube_hdus, maps_hdus, write_gzipped_fits

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


def check_folder(root: Path, galaxies: Sequence[GalaxyParams]) -> None:
    """Raise a DataError if these galaxies would mix with real ones, or with another survey's."""
    from catalogue import catalogue_rows  # here and below: --help does not need astropy

    catalogue = root / "raw" / DAPALL
    if catalogue.is_file():
        named = catalogue_rows(catalogue)
        real = [name for name in named if int(utils.split_plateifu(name)[0]) < FIRST_PLATE]
        if real:
            raise DataError(
                f"{catalogue}: holds real galaxies ({real[0]}, ...), and the simulated ones' would "
                "replace it. Choose another --data-dir."
            )
    wanted = {_place(p.plateifu): p.plateifu for p in galaxies}
    for path in utils.files_in(root / "truth", "*.h5"):
        ours = wanted.get(_place(path.stem), path.stem)
        if ours != path.stem:
            raise DataError(
                f"{path}: lies in the place of {ours}, with a bundle of another size. Give "
                "the same --bundles, or choose another --data-dir."
            )


def _place(plateifu: str) -> tuple[str, str]:
    """Place of a galaxy in its survey: plate and number on it, whatever the bundle."""
    plate, ifu = utils.split_plateifu(plateifu)
    return plate, ifu[-2:]


def galaxies_there(root: Path) -> list[GalaxyParams]:
    """List the simulated galaxies of a data folder by their truth files, without re-synthesised."""
    paths = utils.files_in(root / "truth", "*.h5")
    metas = (json.loads(read_truth(path)[1]["meta_json"]) for path in paths)
    return [GalaxyParams(**meta["params"]) for meta in metas if "params" in meta]


def write_catalogue(data_dir: Path, galaxies: Sequence[GalaxyParams]) -> Path:
    """Write the dapall-like catalogue: one table an analysis, as in the archive.

    Columns and their names are a part of the archive's 91, and EBVGAL. DAPDONE is true for the one
    analysis that the mock has files of.
    """
    from astropy.io import fits

    import mock.dr17_files as head

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
    dict of plateifu -> {"written", "up to date", "failed"}

    Raises
    ------
    DataError
        Unknown bundle, no galaxies, a folder with real galaxies or those of other bundles.
    """
    if config.n_galaxies < 1:
        raise DataError(f"--n-galaxies {config.n_galaxies}: expected 1 or more.")
    root = utils.data_dir(config.data_dir)
    galaxies = [draw_params(config.seed, i, config.bundles) for i in range(config.n_galaxies)]
    check_folder(root, galaxies)
    work = partial(
        _simulate_one,
        root=root,
        params={p.plateifu: p for p in galaxies},
        overwrite=config.overwrite,
    )
    outcome = loops.for_each_galaxy(
        work, [p.plateifu for p in galaxies], "simulate", root / "failed_mock.csv", config.jobs
    )
    write_catalogue(root, galaxies_there(root))
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
            return "up to date"
    write_galaxy(root, simulate_galaxy(wanted))
    return "written"


def main(config: MockConfig) -> int:
    """Simulate a survey; the exit code tells whether any galaxy failed."""
    root = utils.data_dir(config.data_dir)
    if config.from_maps is not None:
        for path in resynthesise(root, config.from_maps, config.seed, config.overwrite):
            log.info("%s", path)
        return utils.EXIT_DONE
    return loops.report(simulate_survey(config), "simulate", root / "raw")


if __name__ == "__main__":
    utils.run_command(main, MockConfig, __doc__)
