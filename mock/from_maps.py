"""Re-synthesise the LOGCUBE of a real galaxy from its DAP MAPS file.

Reads   a MAPS file of DR15 to DR17, any DAPTYPE; line channels are found by name.
Writes  raw/<plate>/<ifu>/manga-<plateifu>-LOGCUBE-<daptype>.fits.gz, a copy of the MAPS file beside
        it, and truth/<plateifu>.h5.

Maps are (y, x) or (channel, y, x); fluxes in 1e-17 erg/s/cm2 (/Angstrom) /spaxel.

    >>> paths = resynthesise(data_dir, maps_path, seed=1)
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import utils
from utils import DataError, file_digest

import numpy as np

import archive_files
import fits_stream
from labels import BALMER_RATIO
from mock.dr17_files import logcube_hdus, primary_cards, raw_file, write_gzipped_fits
from mock.physics import (
    C_KMS,
    DEADFIBER,
    DONOTUSE,
    EMLINES,
    FORESTAR,
    LOWCOV,
    NOCOV,
    R_V,
    STELLAR_TO_GAS_EBV,
    Scene,
    draw_lines,
    draw_stars,
    extinction_curve,
    g_response,
    mix_templates,
    observe,
    population_weights,
    stellar_templates,
    wave_grid,
)
from mock.truth import read_recipe, truth_path, truth_recipe, write_truth

log = logging.getLogger(__name__)

MAPS_NEEDED = (
    "SPX_MFLUX", "SPX_SNR", "BINID", "STELLAR_VEL", "STELLAR_VEL_MASK", "STELLAR_SIGMA",
    "EMLINE_GFLUX", "EMLINE_GFLUX_MASK", "EMLINE_GEW", "EMLINE_GVEL", "EMLINE_GSIGMA",
    "EMLINE_INSTSIGMA",
)  # fmt: skip
CARDS_NEEDED = "PLATEIFU SCINPVEL EBVGAL OBJRA OBJDEC DAPTYPE REFF ECOOPA ECOOELL".split()

EW_NODES = ((0, 0.5, 1, 1.5, 2), (10, 9.8, 9.5, 9.1, 8.6))
"""log10 of Halpha's equivalent width in Angstrom -> log10 of the stars' age in years; invented."""
STARS_METAL = -0.1
"""[Z/H] of the invented stars."""


def _read_maps(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """Primary header, the arrays that a scene needs, and the line channels of a MAPS file."""
    hdus = fits_stream.read_hdus(path, ("PRIMARY", *MAPS_NEEDED))
    primary = dict(hdus.pop("PRIMARY").header)
    absent = [card for card in CARDS_NEEDED if card not in primary]
    if absent:
        raise DataError(
            f"{path}: no {', '.join(absent)} in the primary header. Expected a DAP MAPS file of "
            "DR15 to DR17; fetch one with download_utils.py."
        )
    channels = archive_files.line_channels(hdus["EMLINE_GFLUX"].header, ("Ha-6564",), path)
    return primary, {name: hdu.data for name, hdu in hdus.items()}, channels


def _gas_reddening(flux: np.ndarray, bad: np.ndarray, row: dict[str, int]) -> float:
    """Median E(B-V) of the gas by the Balmer decrement, mag; 0 without Hbeta in the file."""
    if "Hb-4862" not in row:
        return 0.0
    rows = [row["Ha-6564"], row["Hb-4862"]]
    ok = (~bad[rows] & (flux[rows] > 0)).all(0)
    if not ok.any():
        return 0.0
    ha, hb = flux[rows][:, ok]
    k_ha, k_hb = extinction_curve(np.array([EMLINES["Ha-6564"], EMLINES["Hb-4862"]]))
    ebv = 2.5 / (k_hb - k_ha) * np.log10(ha / hb / BALMER_RATIO)
    return float(np.clip(np.median(ebv), 0, 1))


def read_scene(path: Path, seed: int) -> Scene:
    """Make a noiseless scene of a real galaxy from its MAPS file.

    Taken from the file: field of view and mask bits, bins, line fluxes (unmasked; lines that the
    file lacks are absent), velocity and width of Halpha, stellar velocity, the broad-band map and
    its S/N. Invented: the stellar spectrum, whose age follows the equivalent width of Halpha, with
    one metallicity, one dispersion and one reddening, by the median Balmer decrement, for the whole
    galaxy; `seed` decides how it differs from the mean templates. The maps contain the seeing
    already, so nothing is blurred again.

    Raises
    ------
    DataError
        If the file is missing, damaged, or not a MAPS file of a galaxy with a redshift.
    """
    path = Path(path)
    primary, hdus, row = _read_maps(path)
    size = hdus["SPX_MFLUX"].shape[0]
    z = float(primary["SCINPVEL"]) / C_KMS
    line_bad = (hdus["EMLINE_GFLUX_MASK"] & DONOTUSE) != 0
    field_bits = np.bitwise_and.reduce(hdus["EMLINE_GFLUX_MASK"], axis=0)
    bits = (field_bits & (NOCOV | LOWCOV | DEADFIBER | FORESTAR)).astype(np.int32)
    bits[bits > 0] |= DONOTUSE
    bin_ids = hdus["BINID"]
    if bin_ids.ndim == 2:  # files before DR15 have one map for all five steps of the DAP
        bin_ids = np.repeat(bin_ids[None], 5, axis=0)
    ys, xs = np.nonzero((hdus["SPX_MFLUX"] > 0) | (bin_ids[0] >= 0))
    if not ys.size:
        raise DataError(
            f"{path}: SPX_MFLUX is zero everywhere. Expected the light of a galaxy; fetch the file "
            "again with download_utils.py --overwrite, or use another one."
        )
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
    log_age = np.interp(np.log10(np.clip(ew, 1, 100)), *EW_NODES)
    weights = population_weights(log_age, np.full_like(log_age, STARS_METAL))
    templates = stellar_templates(z, star_sigma, draw_stars(np.random.default_rng([seed, 6])))
    shape = mix_templates(templates, weights, star_v, np.eye(size), ys, xs)
    curve = extinction_curve(wave_grid() / (1 + z)) - R_V  # relative to the V band
    ebv = STELLAR_TO_GAS_EBV * _gas_reddening(hdus["EMLINE_GFLUX"], line_bad, row)
    shape *= (10 ** (-0.4 * curve * ebv)).astype(np.float32)[:, None]
    lines = {
        name: np.where(line_bad[i], 0, hdus["EMLINE_GFLUX"][i])[ys, xs].astype(float)
        for name, i in row.items()
        if name in EMLINES
    }
    cards = {key: primary[key] for key in primary_cards() if key in primary}
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
        meta={"from_maps": path.name, "sha256": file_digest(path), "stellar_reddening": "Balmer"},
        snr=np.maximum(snr, 0.1),
        bin_ids=bin_ids.astype(np.int32),
    )
    # scale the stars so that stars and lines together, reddened, have the mean flux of the map
    redden = g_response() / 10 ** (0.4 * scene.ebv_gal * extinction_curve(wave_grid()))
    wanted = hdus["SPX_MFLUX"][ys, xs] - redden @ draw_lines(scene)
    scale = np.maximum(wanted, 1e-4) / (redden @ shape)
    scene.stellar = (shape * scale).astype(np.float32)
    return scene


def resynthesise(
    data_dir: Path, maps: Path, seed: int, overwrite: bool = False, depth: float = 1.0
) -> list[Path]:
    """Write a LOGCUBE that a real MAPS file could have come from, and a copy of the MAPS file.

    The files keep the galaxy's own plateifu and DAPTYPE. The cube's noise has the S/N of the maps,
    but is not the noise that the real line fluxes were measured on; those fluxes are the truth, and
    there is no truth where they are masked. A `depth` other than 1 scales the S/N by its root.

    Returns
    -------
    list of Path
        LOGCUBE, MAPS, truth file.

    Raises
    ------
    DataError
        If the MAPS file cannot be used, or another LOGCUBE of the galaxy exists.
    """
    scene = read_scene(maps, seed)
    daptype = str(scene.cards["DAPTYPE"]).strip()
    cube, copy = (raw_file(data_dir, scene.plateifu, form, daptype) for form in ("LOGCUBE", "MAPS"))
    truth = truth_path(data_dir, scene.plateifu)
    scene.meta |= {"seed": seed} | ({"depth": depth} if depth != 1 else {})
    if cube.is_file() and not overwrite:
        remedy = "Use --overwrite, or another --data-dir"
        if not truth.is_file():
            raise DataError(f"{cube}: exists, but is not a simulated cube. {remedy}.")
        truth_recipe(scene.meta).require(read_recipe(truth), cube, remedy)
        log.info("%s: up to date", cube)
        return [cube, copy, truth]
    galaxy = observe(scene, np.random.default_rng([seed, 5]), depth)
    if not copy.is_file() or file_digest(copy) != scene.meta["sha256"]:
        with utils.atomic_path(copy) as part:
            shutil.copyfile(maps, part)
    write_gzipped_fits(cube, logcube_hdus(galaxy))
    write_truth(truth, galaxy)
    return [cube, copy, truth]
