"""Read what the archive's FITS files hold: LOGCUBE (DAP or DRP), MAPS, catalogues; all checked.

Line channels and HDUs are found by name, so releases DR15 to DR17 and every DAPTYPE are read alike
(data models: docs/data_formats.md). Axis order in FITS: (band, y, x). Whatever is missing, damaged
or of another galaxy is a `DataError`.

    >>> raw = read_logcube(path, slice(1000, 3000), deredden=True, primary=header)
    >>> maps, primary, flux = read_line_maps(path, BPT_LINES)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import utils
from utils import DataError

import numpy as np
from astropy.io import fits

from fits_stream import FETCH_AGAIN, Hdu, check_whole, iterate_hdus, read_hdus
from labels import HA, R_V, LineMaps
from line_fits import C_KMS

log = logging.getLogger(__name__)

Z_TOLERANCE = 0.005
"""Difference between a given redshift and the survey's that is warned of: 1500 km/s, several times
what gas moves within a galaxy."""

WAVE_GRID = LOG_FIRST, LOG_STEP, WAVE_N = 3.5589, 1e-4, 4563
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

CHANNEL = re.compile("C[0-9]{1,3}")
CELESTIAL_CARD = re.compile("(CRPIX|CRVAL|CDELT|CUNIT|CTYPE)[12]|(PC|CD)[12]_[12]|RADESYS|EQUINOX")

ESSENTIAL = ("FLUX", "IVAR", "MASK", "WAVE")


def vet_header(primary: fits.Header, source: Path, target: Path) -> tuple[str, bool]:
    """Check galaxy and quality of a file; return its plateifu and whether it is CRITICAL.

    The galaxy must be that of the output's name, else of the file's own. A critical file (by
    DRP3QUAL or DAPQUAL) is also logged as a warning.
    """
    named = utils.PLATEIFU.search(target.name) or utils.PLATEIFU.search(source.name)
    found = str(primary.get("PLATEIFU") or "").strip() or (named[0] if named else "")
    expected = named[0] if named else found
    if not found:
        raise DataError(
            f"{source}: of an unknown galaxy, expected its plateifu in the file's name, e.g. "
            "8485-1901, or in the card PLATEIFU. Rename the file."
        )
    if found != expected:
        raise DataError(
            f"{source}: a file of galaxy {found}, expected {expected}. Give the file of "
            f"{expected}, or --plateifu {found}."
        )
    critical = [k for k in ("DRP3QUAL", "DAPQUAL") if int(primary.get(k) or 0) & CRITICAL]
    if critical:
        log.warning("%s: %s says CRITICAL", source, " and ".join(critical))
    return found, bool(critical)


def plain_cards(header: fits.Header, cards: Mapping[str, str]) -> dict[str, Any]:
    """Values of cards by another name; None for what is none, such as a value left out."""

    def is_plain(value: Any) -> bool:
        return isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 1 << 63)

    values = {name: header.get(card) for name, card in cards.items()}
    return {name: value if is_plain(value) else None for name, value in values.items()}


def identify(
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
    known, where = None if cz is None else float(cz) / C_KMS, "its header (SCINPVEL)"
    if cz is None and catalogue is not None:
        try:
            row, where = catalogue_row(catalogue, plateifu), str(catalogue)
            known, mangaid = row["redshift"], mangaid or row["mangaid"]
        except DataError:
            if redshift is None:
                raise
    if redshift is not None:
        if known is not None and -0.01 < known < 1.0 and abs(redshift - known) > Z_TOLERANCE:
            log.warning(
                f"{source}: --redshift {redshift:g} differs from the {known:.4f} of {where}. The "
                "given one is used; leave it out to use the other."
            )
        known, where = redshift, "--redshift"
    if known is None:
        read_hdus(source, ESSENTIAL)  # a file that is no MaNGA cube lacks more than a redshift
        raise DataError(
            f"{source}: no redshift of {plateifu} in the primary header (SCINPVEL) or a catalogue. "
            "Give --redshift, or put the dapall or drpall catalogue into <data-dir>/raw/."
        )
    if not -0.01 < known < 1.0:
        raise DataError(
            f"{source}: redshift {known} of {where}, expected -0.01 to 1. Give --redshift."
        )
    return known, mangaid


# LOGCUBE


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


def read_logcube(path: Path, pixels: slice, deredden: bool, primary: fits.Header) -> RawCube:
    """Read the arrays of a LOGCUBE and check that they belong together."""
    is_dap = "DAPTYPE" in primary or str(primary.get("MASKNAME")).startswith("MANGA_DAP")
    shape: tuple[int, ...] = ()
    hdus: dict[str, Hdu] = {}
    for name, hdu in iterate_hdus(path, (*ESSENTIAL, *(["REDCORR"] if is_dap else [])), pixels):
        hdus[name] = hdu
        if name == "WAVE":
            grid = _logcube_wave()
            is_grid = hdu.shape == grid.shape and np.abs(hdu.data / grid - 1) <= WAVE_TOLERANCE
            if not np.all(is_grid):
                raise DataError(
                    f"{path}: wrong wavelengths in WAVE, expected the LOGCUBE grid of {WAVE_N} "
                    f"pixels from {grid[0]:.3f} to {grid[-1]:.3f} Angstrom. Give an uncut LOGCUBE."
                )
            continue
        shape = shape or (WAVE_N, *hdu.shape[1:])
        n_axes = 1 if name == "REDCORR" else 3
        _check_array(path, name, hdu, shape[:n_axes], n_axes)
    if not deredden:
        redcorr = np.ones(WAVE_N)
    elif is_dap:
        redcorr = hdus["REDCORR"].data.astype(float)
    else:
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
    found, dtype = hdu.shape, hdu.data.dtype
    kind = " of integers" if name.endswith("MASK") else ""
    if len(found) != n_axes or found != shape or (kind and dtype.kind != "i"):
        axes = "(n, y, x)" if n_axes == 3 else "(n,)"
        raise DataError(
            f"{path}: {name} has shape {found} of {dtype}, expected {axes}{kind} like the arrays "
            f"beside it, {shape}. {FETCH_AGAIN}"
        )


def _logcube_wave() -> np.ndarray:
    """Wavelengths of the LOGCUBE grid, (WAVE_N,) Angstrom."""
    return 10 ** (LOG_FIRST + LOG_STEP * np.arange(WAVE_N))


def galactic_correction(primary: fits.Header, path: Path) -> np.ndarray:
    """Compute the factor that undoes the Galaxy's reddening, from the header's E(B-V).

    For DRP cubes, which have no REDCORR: 10**(0.4 A), O'Donnell (1994) with R_V = 3.1, as the DAP
    does (header GEXTLAW, RVGAL). (n,) float64 on the LOGCUBE grid.
    """
    from astropy import units as u
    from dust_extinction.parameter_averages import O94

    ebv = primary.get("EBVGAL")
    if not isinstance(ebv, int | float):
        raise DataError(
            f"{path}: Galactic E(B-V) is {ebv} in the primary header, expected a card EBVGAL (mag) "
            "to undo the Galaxy's reddening. Add the card; or give --no-deredden, which leaves the "
            "spectra reddened, so that no model trained on dereddened ones can map them (with "
            "--like-run, the run's choice is used)."
        )
    return 10 ** (0.4 * O94(Rv=R_V)(_logcube_wave() * u.AA) * R_V * float(ebv))


def gas_stretch(maps: Path | None, source: Path, plateifu: str) -> np.ndarray:
    """Read 1 + v/c of the gas, (y, x), from the Ha velocity in MAPS; 1 where not measured."""
    if maps is None:
        raise DataError(
            f"{source}: no MAPS file of the galaxy, expected one with its gas velocities. Give "
            "--maps, or --no-remove-gas-velocity (like the cubes that a model learned from)."
        )
    hdus = read_hdus(maps, ("PRIMARY", "EMLINE_GVEL", "EMLINE_GVEL_MASK"))
    found = str(hdus["PRIMARY"].header.get("PLATEIFU") or plateifu).strip()
    if found != plateifu:
        raise DataError(f"{maps}: a file of galaxy {found}, expected {plateifu}. Check --maps.")
    for name in ("EMLINE_GVEL", "EMLINE_GVEL_MASK"):
        _check_array(maps, name, hdus[name], hdus["EMLINE_GVEL"].data.shape)
    channel = line_channels(hdus["EMLINE_GVEL"].header, (HA,), maps)[HA]
    velocity, mask = (hdus[f"EMLINE_GVEL{end}"].data[channel] for end in ("", "_MASK"))
    is_bad = (mask & MAPS_DONOTUSE != 0) | ~np.isfinite(velocity)
    return np.where(is_bad, 1.0, 1 + velocity.astype(float) / C_KMS)


def celestial(header: fits.Header) -> str:
    """Select the celestial WCS cards of a cube header, as a header string."""
    cards = [card for card in header.cards if CELESTIAL_CARD.fullmatch(card.keyword)]
    return fits.Header(cards).tostring(sep="\n", endcard=False, padding=False)


# MAPS


def line_channels(header: fits.Header, lines: Sequence[str], path: Path) -> dict[str, int]:
    """Map every line to its channel, from the header cards C01.. (C1.. where there are few).

    Each of `lines` must exist.
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
    """Read Gaussian-fit fluxes of emission lines (DAP names such as "Ha-6564") from a MAPS file.

    Returns the maps, and two HDUs for their headers: PRIMARY and EMLINE_GFLUX.
    """
    names = ("EMLINE_GFLUX", "EMLINE_GFLUX_IVAR", "EMLINE_GFLUX_MASK")
    hdus = read_hdus(path, ("PRIMARY", *names))
    found = [hdus[name] for name in names]
    for name in names:
        _check_array(path, name, hdus[name], found[0].shape)
    channels = line_channels(found[0].header, lines, path)
    flux, ivar, mask = ({line: hdu.data[channels[line]] for line in lines} for hdu in found)
    bad = {line: (bits & MAPS_DONOTUSE) != 0 for line, bits in mask.items()}
    return LineMaps(flux, ivar, bad), hdus["PRIMARY"], found[0]


def count_bins(path: Path, is_labelled: np.ndarray) -> dict[str, Any]:
    """Count the independent measurements among the labelled spaxels, (y, x) bool, of a MAPS file.

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


# Catalogues


def catalogue_row(path: Path, plateifu: str) -> dict[str, Any]:
    """Redshift and identity of one galaxy, which must be listed, as in `catalogue_rows`."""
    rows = catalogue_rows(path, plateifu)
    if plateifu not in rows:
        raise DataError(
            f"{path}: no galaxy {plateifu} in the catalogue. Check --plateifu, or give --redshift."
        )
    return rows[plateifu]


def catalogue_rows(path: Path, plateifu: str | None = None) -> dict[str, dict[str, Any]]:
    """Rows of a catalogue by plateifu, each with mangaid and redshift; all, or that of one galaxy.

    The redshift is NSA_Z, else Z (in drpall nsa_z, else z); None where neither is above -0.01.
    """
    rows, is_catalogue = dict[str, dict[str, Any]](), False
    remedy = "Fetch it with download_utils.py --catalogue --overwrite, or check --catalogue."
    with utils.reading(path, "a dapall or drpall catalogue", remedy):
        check_whole(path)
        with fits.open(path) as hdus:
            for hdu in (hdu for hdu in hdus[1:] if isinstance(hdu, fits.BinTableHDU)):
                names = {name.lower() for name in hdu.columns.names}
                if "plateifu" not in names:
                    continue
                table, is_catalogue = hdu.data, True
                redshift = np.full(len(table), np.nan)
                for name in ("z", "nsa_z"):  # the latter takes precedence
                    if name in names:
                        values = np.asarray(table[name], float)
                        redshift = np.where(values > -0.01, values, redshift)
                for key, mangaid, z in zip(
                    table["plateifu"], table["mangaid"], redshift.tolist(), strict=True
                ):
                    if plateifu in (None, key.strip()):
                        row = {
                            "mangaid": mangaid.strip(),
                            "redshift": z if np.isfinite(z) else None,
                        }
                        rows.setdefault(key.strip(), row)
    if not is_catalogue:
        raise DataError(
            f"{path}: no table with a column plateifu, expected a dapall or drpall catalogue. "
            "Check --catalogue."
        )
    return rows
