"""Turn MaNGA's FITS files into H5 cubes and label maps.

`process_cube`  LOGCUBE (DAP model cube or DRP) -> processed/cubes/<plate>/<plateifu>.h5
`process_map`   MAPS -> processed/labels/<label_task>/<plateifu>.npy, _err.npy, .json, .png

Line channels and HDUs are found by name, so releases DR15 to DR17 and every DAPTYPE are read alike
(data models: docs/data_formats.md). Axis order in FITS: (band, y, x).

    >>> process_cube(logcube, utils.cube_path(root, "8485-1901"), CubeOptions())
    >>> process_map(maps, utils.label_path(root, "logOH", "8485-1901"), "logOH", LabelOptions())
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import utils
from utils import DataError, LabelTask

import numpy as np
from astropy.io import fits

import data_io
import hsi_proc_fns
import label_picture
import loops
import resample
from catalogue import catalogue_row
from data_io import Recipe, file_digest, file_stamp
from fits_stream import FETCH_AGAIN, Hdu, iterate_hdus, read_hdus, shape_of
from labels import (
    BPT_LINES,
    CALIBRATIONS,
    HA,
    R_V,
    LineMaps,
    bpt_classes,
    class_names,
    label_classes,
    lines_needed,
    metallicity,
)

log = logging.getLogger(__name__)

C_KMS = 299792.458
"""Speed of light, km/s (exact)."""

Z_TOLERANCE = 0.005
"""Difference between a given redshift and the survey's that is warned of: 1500 km/s, several times
what gas moves within a galaxy."""

THREADS = 2
"""Threads that resample rows of spaxels; numpy and sparse products release the interpreter."""
LOOK_AHEAD = 8
"""Rows resampled in advance, so that writing and resampling overlap."""

WAVE_LOG_FIRST, WAVE_LOG_STEP, WAVE_N = 3.5589, 1e-4, 4563
"""The LOGCUBE grid: pixel i is at 10**(3.5589 + 1e-4 i) Angstrom, vacuum (DAP data model)."""

WAVE_TOLERANCE = 1e-6
"""Largest relative disagreement of WAVE with that grid: its float32 values are off by 1e-7."""

DAP_BAD = 0b11111
"""MANGA_DAPSPECMASK bits 0-4: IGNORED FORESTAR FLUXINVALID IVARINVALID ARTIFACT. The bits above
concern the DAP's fit, not the flux."""

DRP_BAD = 1 << 10 | 1 << 3
"""MANGA_DRP3PIXMASK: DONOTUSE, FORESTAR."""

MAPS_DONOTUSE = 1 << 30
"""MANGA_DAPPIXMASK: DONOTUSE; it is also set with every other bit that invalidates a value."""

LINE_BINS, STELLAR_BINS = "Em. line models", "Stellar continua"
"""Channels of BINID: spaxels whose lines, whose stars the DAP fitted as one spectrum."""

CRITICAL = 1 << 30
"""DRP3QUAL and DAPQUAL: the whole file is unreliable."""

COPIED_CARDS = {
    "drp3qual": "DRP3QUAL", "dapqual": "DAPQUAL", "drp_version": "VERSDRP3",
    "dap_version": "VERSDAP", "daptype": "DAPTYPE", "objra": "OBJRA", "objdec": "OBJDEC",
    "ebv_galactic": "EBVGAL", "reff_arcsec": "REFF",
    "pa_deg": "ECOOPA", "ellipticity": "ECOOELL",
}  # fmt: skip
"""Attributes of a cube that are cards of the LOGCUBE's primary header."""
CHANNEL = re.compile("C[0-9]{1,3}")
CELESTIAL_CARD = re.compile("(CRPIX|CRVAL|CDELT|CUNIT|CTYPE)[12]|(PC|CD)[12]_[12]|RADESYS|EQUINOX")

ESSENTIAL = ("FLUX", "IVAR", "MASK", "WAVE")
SKIPPED = "skipped: CRITICAL"

Diagnostic = Literal["O3N2-M13", "N2-M13", "O3N2-PP04", "N2O2-KD02"]


@dataclass(frozen=True)
class CubeOptions:
    """How a cube is processed."""

    wave_min: float = 5000.0
    """Blue end of the rest-frame grid, Angstrom (vacuum)."""
    wave_max: float = 8000.0
    """Red end of the rest-frame grid, Angstrom (vacuum)."""
    n_band: int = 2040
    """Number of logarithmic bins."""
    deredden: bool = True
    """Undo the Galaxy's reddening."""
    remove_gas_velocity: bool = True
    """Also shift each spaxel by its gas velocity (Ha, from MAPS), so that lines lie at rest."""


@dataclass(frozen=True)
class LabelOptions:
    """How labels are made."""

    diagnostic: Diagnostic = "O3N2-M13"
    """Metallicity calibration: O3N2 or N2 of Marino+13, O3N2 of Pettini & Pagel 04, N2O2 of
    Kewley & Dopita 02."""
    min_snr: float = 3.0
    """Signal-to-noise ratio that every line used must exceed."""
    star_forming_only: bool = True
    """Metallicity only where the BPT class is star-forming: the calibrations are for H II
    regions."""


def _of(options: Any, options_class: type) -> dict[str, Any]:
    """Values of the fields that a class of options declares; a command's config has more."""
    return {f.name: getattr(options, f.name) for f in fields(options_class)}


def vet_header(primary: fits.Header, source: Path, target: Path) -> tuple[str, bool]:
    """Check galaxy and quality of a file; return its plateifu and whether it is CRITICAL.

    A critical file (by DRP3QUAL or DAPQUAL) is also logged as a warning.

    Raises
    ------
    DataError
        If the file is of another galaxy than the output's name says (or else its own).
    """
    named = utils.PLATEIFU.search(target.name)
    expected = named[0] if named else utils.plateifu_of(source)
    found = str(primary.get("PLATEIFU") or expected).strip()
    if found != expected:
        raise DataError(
            f"{source}: holds galaxy {found}, expected {expected}. Give the file of {expected}, or "
            f"--plateifu {found}."
        )
    critical = [k for k in ("DRP3QUAL", "DAPQUAL") if int(primary.get(k) or 0) & CRITICAL]
    if critical:
        log.warning("%s: %s says CRITICAL", source, " and ".join(critical))
    return found, bool(critical)


# Cubes


class RawCube(NamedTuple):
    """The part of a LOGCUBE that resampling needs: some of its wavelengths."""

    flux: np.ndarray
    """(n, y, x) float, like `ivar`."""
    ivar: np.ndarray
    mask: np.ndarray
    """(n, y, x) int; the bits `bad_bits` invalidate a pixel."""
    bad_bits: int
    redcorr: np.ndarray
    """(n,) float factor that undoes the Galaxy's reddening."""
    header: fits.Header
    """Of FLUX."""

    def row(self, y: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flux, ivar (n, x) and bad pixels (n, x) bool of one row of spaxels."""
        flux, ivar = self.flux[:, y], self.ivar[:, y]
        bad = (self.mask[:, y] & self.bad_bits) != 0
        return flux, ivar, bad | ~(ivar > 0) | ~np.isfinite(ivar) | ~np.isfinite(flux)


def process_cube(
    source: Path,
    target: Path,
    options: CubeOptions,
    redshift: float | None = None,
    maps: Path | None = None,
    catalogue: Path | None = None,
    skip_critical: bool = False,
    overwrite: bool = False,
    compression: Literal["gzip"] | None = None,
) -> str:
    """De-redshift and resample one LOGCUBE, and write it as H5.

    Flux density is multiplied by (1 + z) as wavelengths are divided by it, so that
    the integral of a line stays as observed (docs/science_choices.md#rest-frame).

    Parameters
    ----------
    source : Path
        DAP or DRP LOGCUBE, plain or gzipped.
    target : Path
        H5 file; layout in docs/data_formats.md#cubes.
    redshift : float, optional
        Default: the DAP header's SCINPVEL / c, else the catalogue's.
    maps : Path, optional
        MAPS file; needed to remove the gas velocity.
    catalogue : Path, optional
        dapall or drpall; needed for DRP cubes without `redshift`.
    skip_critical : bool
        Do not process a cube whose quality flag says CRITICAL. Otherwise a warning is logged and
        the flag recorded.
    overwrite : bool
        Replace an output that was made with other options or from another source.

    Returns
    -------
    {"written", "up to date", "skipped: CRITICAL"}

    Raises
    ------
    DataError
        Any problem with the input; in that case nothing is written.
    """
    source, target = Path(source), Path(target)
    _check_file(source)
    _check_grid(options)
    chosen, inputs = {**_of(options, CubeOptions), "redshift": redshift}, dict[str, str]()
    if options.remove_gas_velocity and maps is not None and maps.is_file():
        inputs["MAPS"] = file_digest(maps)
    stamp = file_stamp(source)
    if target.is_file() and not overwrite:
        head = data_io.read_cube_head(target)
        made = head.recipe
        if "catalogue" in made.inputs and redshift is None:  # the redshift came from there
            inputs["catalogue"] = file_digest(catalogue) if catalogue else ""
        is_same = head.attrs.get("source_stamp") == stamp  # saves reading a whole survey again
        inputs["LOGCUBE"] = made.inputs.get("LOGCUBE", "") if is_same else file_digest(source)
        if inputs["LOGCUBE"] != made.inputs.get("LOGCUBE"):
            read_hdus(source, ESSENTIAL)  # says so if it is damaged, rather than another one
        today = Recipe("cube", data_io.CUBE_VERSION, chosen, inputs)
        today.require(made, target, "Replace it with --overwrite")
        return SKIPPED if skip_critical and head.attrs.get("critical") else "up to date"
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(file_digest, source)
        primary = read_hdus(source, ("PRIMARY",))["PRIMARY"].header
        with utils.reading(source, "the header of a LOGCUBE", FETCH_AGAIN):
            plateifu, critical = vet_header(primary, source, target)
            if critical and skip_critical:
                return SKIPPED
            if redshift is None and primary.get("SCINPVEL") is None and catalogue is not None:
                inputs["catalogue"] = file_digest(catalogue)
            z, mangaid = _identify(source, primary, plateifu, redshift, catalogue)
            copied = {name: _plain(primary.get(card)) for name, card in COPIED_CARDS.items()}
        edges = resample.log_edges(WAVE_LOG_FIRST, WAVE_LOG_STEP, WAVE_N)
        wave, bins = resample.target_grid(options.wave_min, options.wave_max, options.n_band)
        stretch = _gas_stretch(maps, source, plateifu) if options.remove_gas_velocity else None
        ends = bins[[0, -1]]
        if stretch is not None:
            ends = ends * [min(stretch.min(), 1), max(stretch.max(), 1)]
        pixels = resample.used_pixels(resample.overlap_matrix(edges / (1 + z), ends))
        if pixels.stop == pixels.start:
            raise DataError(
                f"{source}: at redshift {z:.4f} the cube does not cover "
                f"{options.wave_min:g}-{options.wave_max:g} Angstrom. Check --redshift, --wave-min "
                "and --wave-max."
            )
        outside = np.mean((bins[1:] > edges[-1] / (1 + z)) | (bins[:-1] < edges[0] / (1 + z)))
        if outside > 0:
            log.warning(
                f"{source}: {100 * outside:.0f} % of the bins lie outside of the observed range "
                f"({edges[0] / (1 + z):.0f}-{edges[-1] / (1 + z):.0f} Angstrom at redshift "
                f"{z:.4f}) and stay empty. Check --wave-min and --wave-max."
            )
        raw = _read_logcube(source, pixels, options.deredden, primary)
        if stretch is not None and stretch.shape != raw.flux.shape[1:]:
            raise DataError(
                f"{maps}: maps of {stretch.shape} spaxels, expected {raw.flux.shape[1:]} as in the "
                "cube. Check --maps."
            )
        attrs = {
            "plateifu": plateifu,
            "mangaid": mangaid,
            "redshift": z,
            "critical": critical,
            **copied,
            "wcs_header": _celestial(raw.header),
            "source_file": source.name,
            "source_stamp": stamp,
            "code_version": utils.VERSION,
            "created_utc": utils.utc_now(),
        }
        inputs["LOGCUBE"] = hashing.result()
    recipe = Recipe("cube", data_io.CUBE_VERSION, chosen, inputs)
    rows = _resampled_rows(raw, edges[pixels.start : pixels.stop + 1], bins, 1 + z, stretch, source)
    shape = (*raw.flux.shape[1:], options.n_band)
    measured = data_io.write_cube_rows(target, shape, wave, attrs, recipe, rows, compression)
    if not hsi_proc_fns.is_usable(measured, options.n_band).any():
        log.warning(
            f"{target}: no spaxel has enough measured bins in {options.wave_min:g}-"
            f"{options.wave_max:g} Angstrom (at best {measured.max() / options.n_band:.0%}): is "
            f"the redshift {z:.4f} right?"
        )
    return "written"


def _check_file(source: Path) -> None:
    """Raise a DataError unless a file exists."""
    if not source.is_file():
        raise DataError(
            f"{source}: no such file. Expected a LOGCUBE or MAPS file (FITS): check the path, or "
            "download the survey's with download_utils.py."
        )


def _plain(value: Any) -> Any:
    """Value of a card for an attribute; None for what is none, such as a value left out."""
    is_plain = isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 1 << 63)
    return value if is_plain else None


def _check_grid(options: CubeOptions) -> None:
    """Raise a DataError unless the target grid is valid."""
    if not (0 < options.wave_min < options.wave_max and options.n_band > 0):
        raise DataError(
            f"wavelength grid of {options.n_band} bins from {options.wave_min:g} to "
            f"{options.wave_max:g} Angstrom: expected 0 < --wave-min < --wave-max and --n-band > 0."
        )


def _identify(
    source: Path,
    primary: fits.Header,
    plateifu: str,
    redshift: float | None,
    catalogue: Path | None,
) -> tuple[float, str]:
    """Determine redshift (as given, else the header's, else the catalogue's) and mangaid of a cube.

    The header's redshift is that of the DAP: SCINPVEL is cz in km/s.
    """
    mangaid, cz = str(primary.get("MANGAID", "")).strip(), primary.get("SCINPVEL")
    if redshift is not None:
        z, where = redshift, "--redshift"
        _compare_redshift(z, source, cz, plateifu, catalogue)
    elif cz is not None:
        z, where = float(cz) / C_KMS, f"{source} (SCINPVEL)"
    elif catalogue is not None:
        row = catalogue_row(catalogue, plateifu)
        if row["redshift"] is None:
            raise DataError(f"{catalogue}: contains no redshift of {plateifu}. Give --redshift.")
        z, where, mangaid = row["redshift"], str(catalogue), mangaid or row["mangaid"]
    else:
        read_hdus(source, ESSENTIAL)  # a file that is no MaNGA cube lacks more than a redshift
        raise DataError(
            f"{source}: no redshift (SCINPVEL) in the primary header. Give --redshift, or put the "
            "dapall or drpall catalogue into <data-dir>/raw/."
        )
    if not -0.01 < z < 1.0:
        raise DataError(
            f"{where}: redshift {z}, expected a value from -0.01 to 1. Give --redshift."
        )
    return z, mangaid


def _compare_redshift(
    z: float, source: Path, cz: float | None, plateifu: str, catalogue: Path | None
) -> None:
    """Warn if a given redshift is not about that of the header, else of the catalogue, if any."""
    known, where = None if cz is None else float(cz) / C_KMS, "its header (SCINPVEL)"
    if cz is None and catalogue is not None:
        with contextlib.suppress(DataError):  # it does not list the galaxy
            known, where = catalogue_row(catalogue, plateifu)["redshift"], str(catalogue)
    if known is not None and -0.01 < known < 1.0 and abs(z - known) > Z_TOLERANCE:
        log.warning(
            f"{source}: --redshift {z:g} differs from the {known:.4f} of {where}. The given one is "
            "used; leave it out to use the other."
        )


def _read_logcube(path: Path, pixels: slice, deredden: bool, primary: fits.Header) -> RawCube:
    """Read the arrays of a LOGCUBE and check that they belong together."""
    is_dap = "DAPTYPE" in primary or str(primary.get("MASKNAME")).startswith("MANGA_DAP")
    shape: tuple[int, ...] = ()
    hdus: dict[str, Hdu] = {}
    for name, hdu in iterate_hdus(path, (*ESSENTIAL, *(["REDCORR"] if is_dap else [])), pixels):
        hdus[name] = hdu
        if name == "WAVE":
            _check_wave(hdu.data, path)
            continue
        shape = shape or (WAVE_N, *shape_of(hdu.header)[1:])
        n_axes = 1 if name == "REDCORR" else 3
        _check_array(path, name, hdu, shape[:n_axes], n_axes)
    if not deredden:
        redcorr = np.ones(WAVE_N)
    elif is_dap:
        redcorr = hdus["REDCORR"].data.astype(float)
    else:
        with utils.reading(path, "a number in EBVGAL", "Use --no-deredden."):
            redcorr = galactic_correction(primary, path)
    used = redcorr[pixels]
    if not np.all((used > 0) & np.isfinite(used)):
        raise DataError(
            f"{path}: Galactic correction (REDCORR, or by EBVGAL) from {used.min():g} to "
            f"{used.max():g}, expected positive factors. {FETCH_AGAIN}"
        )
    flux, ivar, mask = (hdus[name].data for name in ("FLUX", "IVAR", "MASK"))
    bad_bits = DAP_BAD if is_dap else DRP_BAD
    return RawCube(flux, ivar, mask, bad_bits, used, hdus["FLUX"].header)


def _check_array(path: Path, name: str, hdu: Hdu, shape: tuple[int, ...], n_axes: int = 3) -> None:
    """Raise a DataError unless an HDU holds an array of this shape; that of a MASK, integers."""
    found, dtype = shape_of(hdu.header), hdu.data.dtype
    kind = " of integers" if name.endswith("MASK") else ""
    if len(found) != n_axes or found != shape or (kind and dtype.kind != "i"):
        axes = "(n, y, x)" if n_axes == 3 else "(n,)"
        raise DataError(
            f"{path}: {name} has shape {found} of {dtype}, expected {axes}{kind} like the arrays "
            f"beside it, {shape}. {FETCH_AGAIN}"
        )


def _resampled_rows(
    raw: RawCube,
    edges: np.ndarray,
    bins: np.ndarray,
    one_plus_z: float,
    stretch: np.ndarray | None,
    path: Path,
) -> Iterator[data_io.Rows]:
    """Resample a cube a few rows of spaxels at a time, the next ones in the background.

    Parameters
    ----------
    edges : (n + 1,) array
        Observed edges of its pixels, Angstrom.
    bins : (band + 1,) array
        Rest-frame edges of the bins, Angstrom.
    stretch : (y, x) array, optional
        1 + v/c of each spaxel, on top of `one_plus_z`.

    Raises
    ------
    DataError
        After the last row, if every pixel was masked; `path` is the LOGCUBE.
    """
    ny = raw.flux.shape[1]
    matrix = resample.overlap_matrix(edges / one_plus_z, bins)
    widths = np.diff(bins)

    def one_row(y: int) -> tuple[np.ndarray, ...]:
        flux, ivar, bad = raw.row(y)
        if stretch is None:
            return resample.resample_spectra(
                flux, ivar, bad, matrix, widths, raw.redcorr * one_plus_z
            )
        return resample.resample_shifted(
            flux, ivar, bad, edges, bins, one_plus_z * stretch[y], raw.redcorr
        )

    any_good = False
    with ThreadPoolExecutor(THREADS) as pool:
        rows = loops.in_order(pool, one_row, range(ny), LOOK_AHEAD)
        while block := list(itertools.islice(rows, data_io.CHUNK_SPAXELS)):
            stacked = data_io.Rows(*(np.stack(a) for a in zip(*block, strict=True)))
            any_good = any_good or bool(np.any(stacked.good_fraction))
            yield stacked
    if not any_good:
        raise DataError(
            f"{path}: every pixel in the wavelength range is masked. Choose another range."
        )


def _logcube_wave() -> np.ndarray:
    """Wavelengths of the LOGCUBE grid, (WAVE_N,) Angstrom."""
    return 10 ** (WAVE_LOG_FIRST + WAVE_LOG_STEP * np.arange(WAVE_N))


def _check_wave(wave: np.ndarray, path: Path) -> None:
    """Raise a DataError unless WAVE is the LOGCUBE grid."""
    expected = _logcube_wave()
    if wave.shape != expected.shape or not np.all(np.abs(wave / expected - 1) <= WAVE_TOLERANCE):
        raise DataError(
            f"{path}: wrong wavelengths in WAVE, expected the LOGCUBE grid of {WAVE_N} pixels from "
            f"{expected[0]:.3f} to {expected[-1]:.3f} Angstrom. Give an uncut LOGCUBE."
        )


def galactic_correction(primary: fits.Header, path: Path) -> np.ndarray:
    """Compute the factor that undoes the Galaxy's reddening, from the header's E(B-V).

    For DRP cubes, which have no REDCORR: 10**(0.4 A), O'Donnell (1994) with R_V = 3.1, as the DAP
    does (header GEXTLAW, RVGAL). (n,) float64 on the LOGCUBE grid.
    """
    from astropy import units as u
    from dust_extinction.parameter_averages import O94

    ebv = primary.get("EBVGAL")
    if ebv is None:
        raise DataError(
            f"{path}: no Galactic E(B-V) in the primary header, expected the card EBVGAL (mag) to "
            "undo the Galaxy's reddening. Add the card; or give --no-deredden, which leaves the "
            "spectra reddened, so that no model trained on dereddened ones can map them (with "
            "--like-run, the run's choice is used)."
        )
    return 10 ** (0.4 * O94(Rv=R_V)(_logcube_wave() * u.AA) * R_V * float(ebv))


def _gas_stretch(maps: Path | None, source: Path, plateifu: str) -> np.ndarray:
    """Read 1 + v/c of the gas, (y, x), from the Ha velocity in MAPS; 1 where not measured."""
    if maps is None:
        raise DataError(
            f"{source}: no MAPS file of the galaxy, expected one with its gas velocities. Give "
            "--maps, or --no-remove-gas-velocity (like the cubes that a model learned from)."
        )
    hdus = read_hdus(maps, ("PRIMARY", "EMLINE_GVEL", "EMLINE_GVEL_MASK"))
    found = str(hdus["PRIMARY"].header.get("PLATEIFU") or plateifu).strip()
    if found != plateifu:
        raise DataError(f"{maps}: holds galaxy {found}, expected {plateifu}. Check --maps.")
    for name in ("EMLINE_GVEL", "EMLINE_GVEL_MASK"):
        _check_array(maps, name, hdus[name], hdus["EMLINE_GVEL"].data.shape)
    channel = line_channels(hdus["EMLINE_GVEL"].header, (HA,), maps)[HA]
    velocity, mask = (hdus[f"EMLINE_GVEL{end}"].data[channel] for end in ("", "_MASK"))
    is_bad = (mask & MAPS_DONOTUSE != 0) | ~np.isfinite(velocity)
    return np.where(is_bad, 1.0, 1 + velocity.astype(float) / C_KMS)


def _celestial(header: fits.Header) -> str:
    """Select the celestial WCS cards of a cube header, as a header string."""
    cards = [card for card in header.cards if CELESTIAL_CARD.fullmatch(card.keyword)]
    return fits.Header(cards).tostring(sep="\n", endcard=False, padding=False)


# Maps


def line_channels(header: fits.Header, lines: Sequence[str], path: Path) -> dict[str, int]:
    """Map every line to its channel, from the header cards C01.. (C1.. where there are few).

    Raises
    ------
    DataError
        If one of `lines` is missing; the message lists those that exist.
    """
    with utils.reading(path, "a header with the names of channels", FETCH_AGAIN):
        cards = [(int(k[1:]), str(header[k]).strip()) for k in header if CHANNEL.fullmatch(k)]
    channels = {name: number - 1 for number, name in cards}
    if len(channels) < len(cards) or any(not 0 < n <= header["NAXIS3"] for n, _ in cards):
        raise DataError(
            f"{path}: channels {', '.join(f'C{n} {name}' for n, name in cards)}, expected one "
            f"name each for {header['NAXIS3']} channels. {FETCH_AGAIN}"
        )
    unknown = [line for line in lines if line not in channels]
    if unknown:
        raise DataError(
            f"{path}: no channel {', '.join(unknown)}; it contains {', '.join(channels)}. Give a "
            "DAP MAPS file of DR15 to DR17."
        )
    return channels


def read_line_maps(path: Path, lines: Sequence[str]) -> tuple[LineMaps, Hdu, Hdu]:
    """Read Gaussian-fit fluxes of emission lines from a MAPS file.

    Parameters
    ----------
    path : Path
        DAP MAPS of DR15 to DR17, any DAPTYPE.
    lines : sequence of str
        DAP names such as "Ha-6564".

    Returns
    -------
    maps : LineMaps
    primary, flux : Hdu
        For their headers.
    """
    names = ("EMLINE_GFLUX", "EMLINE_GFLUX_IVAR", "EMLINE_GFLUX_MASK")
    hdus = read_hdus(path, ("PRIMARY", *names))
    found = [hdus[name] for name in names]
    for name in names:
        _check_array(path, name, hdus[name], shape_of(found[0].header))
    channels = line_channels(found[0].header, lines, path)
    flux, ivar, mask = ({line: hdu.data[channels[line]] for line in lines} for hdu in found)
    bad = {line: (bits & MAPS_DONOTUSE) != 0 for line, bits in mask.items()}
    return LineMaps(flux, ivar, bad), hdus["PRIMARY"], found[0]


def count_bins(path: Path, is_labelled: np.ndarray) -> dict[str, Any]:
    """Count the independent measurements among the labelled spaxels of a MAPS file.

    Parameters
    ----------
    path : Path
    is_labelled : (y, x) bool

    Returns
    -------
    dict
        n_bins and n_stellar_bins: numbers of spectra to which the DAP fitted the lines and the
        stars of these spaxels (one number in files before DR15); bins: the bin of the line fit of
        each of them, row by row, or None if no two share one. {} if the file has no BINID before
        its EMLINE_GFLUX, where the DAP puts it.
    """
    name, hdu = next(iterate_hdus(path, ("BINID", "EMLINE_GFLUX")))
    if name != "BINID":
        return {}
    lines = stars = hdu.data
    if hdu.data.ndim == 3:
        channels = line_channels(hdu.header, (LINE_BINS, STELLAR_BINS), path)
        lines, stars = (hdu.data[channels[name]] for name in (LINE_BINS, STELLAR_BINS))
    if lines.shape != is_labelled.shape:
        raise DataError(
            f"{path}: BINID has maps of {lines.shape} spaxels, expected {is_labelled.shape} as in "
            f"EMLINE_GFLUX. {FETCH_AGAIN}"
        )
    ids = lines[is_labelled]
    n_bins, n_stellar_bins = (
        np.unique(each[each >= 0]).size + int((each < 0).sum())  # -1: in no bin
        for each in (ids, stars[is_labelled])
    )
    listed = ids.tolist() if n_bins < ids.size else None
    return {"n_bins": n_bins, "n_stellar_bins": n_stellar_bins, "bins": listed}


def _check_beside(source: Path, target: Path, shape: tuple[int, int]) -> None:
    """Raise a DataError if the galaxy's cube in the data folder has another number of spaxels."""
    try:
        cube = utils.sibling(target, "cube")
    except DataError:  # not in a data folder
        return
    expected = data_io.read_cube_head(cube).measured.shape if cube.is_file() else shape
    if shape != expected:
        raise DataError(
            f"{source}: maps of {shape} spaxels, expected {expected} as in {cube}. Make both from "
            "files of one analysis (--daptype)."
        )


def process_map(
    source: Path,
    target: Path,
    label_task: LabelTask,
    options: LabelOptions,
    skip_critical: bool = False,
    overwrite: bool = False,
) -> str:
    """Make the label map of one galaxy.

    Parameters
    ----------
    source : Path or marvin.tools.Maps
        DAP MAPS, plain or gzipped; of a Maps, the file that it was opened from.
    target : Path
        `.npy` label map; beside it the uncertainty (`_err.npy`), provenance (`.json`) and a
        picture (`.png`). Layout in docs/data_formats.md#labels.
    skip_critical, overwrite : bool
        As in `process_cube`.

    Returns
    -------
    {"written", "up to date", "skipped: CRITICAL"}

    Raises
    ------
    DataError
        Any problem with the input; in that case nothing is written.
    """
    source, target = Path(getattr(source, "filename", source)), Path(target)
    _check_file(source)
    chosen = {**_of(options, LabelOptions), "label_task": label_task}
    recipe = Recipe("labels", data_io.LABEL_VERSION, chosen, {"MAPS": file_digest(source)})
    if target.is_file() and not overwrite:
        data_io.read_labels(target)  # a damaged one is not up to date
        made = data_io.read_label_meta(target)
        beside = (data_io.label_error_path(target), target.with_suffix(".png"))
        lost = [path.name for path in beside if not path.is_file()]
        if lost or "recipe" not in made:
            missing = " and ".join(lost or [target.with_suffix(".json").name])
            raise DataError(
                f"{target}: {missing} beside it is missing. Replace it with --overwrite."
            )
        if recipe.inputs != made["recipe"].inputs:
            read_line_maps(source, BPT_LINES)  # says so if it is damaged, rather than another one
        recipe.require(made["recipe"], target, "Replace it with --overwrite")
        return SKIPPED if skip_critical and made.get("critical") else "up to date"
    lines = list(BPT_LINES)
    if label_task == "logOH":
        needed = lines_needed(options.diagnostic)
        lines = list(dict.fromkeys([*needed, *(lines if options.star_forming_only else ())]))
    maps, primary_hdu, flux_hdu = read_line_maps(source, lines)
    primary = primary_hdu.header
    with utils.reading(source, "the header of a MAPS file", FETCH_AGAIN):
        plateifu, critical = vet_header(primary, source, target)
        mangaid = str(primary.get("MANGAID", "")).strip()
        version = {k: _plain(primary.get(k)) for k in ("DAPTYPE", "VERSDAP")}
    if critical and skip_critical:
        return SKIPPED
    _check_beside(source, target, maps.shape)
    if label_task == "BPT":
        labels, error = bpt_classes(maps, options.min_snr)
    else:
        labels, error = metallicity(
            maps, options.diagnostic, options.min_snr, options.star_forming_only
        )
    classes = label_classes(labels, label_task)
    counts = {n: int((classes == i).sum()) for i, n in enumerate(class_names(label_task))}
    n_labelled = sum(counts.values())
    if not n_labelled:
        log.warning("%s: no spaxel has a %s label", source, label_task)
    bins = count_bins(source, classes >= 0)
    if bins and n_labelled > min(bins["n_bins"], bins["n_stellar_bins"]):
        log.info(
            f"{source}: {n_labelled} spaxels have a {label_task} label; the DAP fitted their lines "
            f"to {bins['n_bins']} spectra, their stars to {bins['n_stellar_bins']} "
            "(docs/science_choices.md#binned-maps)"
        )
    meta: dict[str, Any] = {
        "plateifu": plateifu,
        "mangaid": mangaid,
        "n_labelled": n_labelled,
        **bins,
        "counts": counts,
        "critical": critical,
        "daptype": version["DAPTYPE"],
        "dap_version": version["VERSDAP"],
        "source_file": source.name,
        "wcs_header": _celestial(flux_hdu.header),
        "code_version": utils.VERSION,
        "created_utc": utils.utc_now(),
    }
    if label_task == "logOH":
        calibration = CALIBRATIONS[options.diagnostic]
        meta["calibration"] = {"source": calibration.source, "scatter_dex": calibration.scatter}
    covered = np.any([ivar > 0 for ivar in maps.ivar.values()], axis=0)
    note = f"S/N > {options.min_snr:g}"
    note += f", {options.diagnostic}" if label_task == "logOH" else ""
    label_picture.write_label_png(target.with_suffix(".png"), labels, label_task, covered, note)
    data_io.write_labels(target, labels, error, recipe, meta)
    return "written"
