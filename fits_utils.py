"""Turn MaNGA's FITS files into H5 cubes and label maps.

`process_cube`  LOGCUBE (DAP model cube or DRP) -> processed/cubes/<plate>/<plateifu>.h5
`process_map`   MAPS -> processed/labels/<label_task>/<plateifu>.npy, _err.npy, .json, .png

    >>> process_cube(logcube, utils.cube_path(root, "8485-1901"), CubeOptions())
    >>> process_map(maps, utils.label_path(root, "logOH", "8485-1901"), "logOH", LabelOptions())
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import utils
from utils import DataError, LabelTask

import numpy as np

import archive_files
import data_io
import hsi_proc_fns
import label_picture
import loops
import resample
from fits_stream import FETCH_AGAIN, read_hdus
from labels import (
    BPT_LINES,
    CALIBRATIONS,
    bpt_classes,
    class_names,
    label_classes,
    lines_needed,
    metallicity,
)
from recipe import Recipe

log = logging.getLogger(__name__)

LOOK_AHEAD = 8
"""Rows resampled in advance, in one thread beside the one that writes: with a second one, both wait
for the interpreter."""

COPIED_CARDS = {
    "drp3qual": "DRP3QUAL", "dapqual": "DAPQUAL", "drp_version": "VERSDRP3",
    "dap_version": "VERSDAP", "daptype": "DAPTYPE", "objra": "OBJRA", "objdec": "OBJDEC",
    "ebv_galactic": "EBVGAL", "reff_arcsec": "REFF",
    "pa_deg": "ECOOPA", "ellipticity": "ECOOELL",
}  # fmt: skip
"""Attributes of a cube that are cards of the LOGCUBE's primary header."""
SKIPPED = "skipped: CRITICAL"
OTHER_CUBES = (
    "Replace it with --overwrite, or make the other cube in a second --data-dir, whose raw/ can be "
    "a link to this one's"
)
"""What to do about a cube that was made with other options, as a sentence without its full stop."""

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


# Cubes


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
    wave, bins = resample.target_grid(options.wave_min, options.wave_max, options.n_band)
    chosen, inputs = {**_of(options, CubeOptions), "redshift": redshift}, dict[str, str]()
    if options.remove_gas_velocity and maps is not None and maps.is_file():
        inputs["MAPS"] = utils.file_digest(maps)
    stamp = utils.file_stamp(source)
    if target.is_file() and not overwrite:
        head = data_io.read_cube_head(target)
        made = head.recipe
        if "catalogue" in made.inputs and redshift is None:  # the redshift came from there
            inputs["catalogue"] = utils.file_digest(catalogue) if catalogue else ""
        is_same = head.attrs.get("source_stamp") == stamp  # saves reading a whole survey again
        inputs["LOGCUBE"] = made.inputs.get("LOGCUBE", "") if is_same else utils.file_digest(source)
        if inputs["LOGCUBE"] != made.inputs.get("LOGCUBE"):
            read_hdus(source, archive_files.ESSENTIAL)  # if it is damaged, says that
        today = Recipe("cube", data_io.CUBE_VERSION, chosen, inputs)
        today.require(made, target, OTHER_CUBES)
        return SKIPPED if skip_critical and head.attrs.get("critical") else "up to date"
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(utils.file_digest, source)
        primary = read_hdus(source, ("PRIMARY",))["PRIMARY"].header
        with utils.reading(source, "the header of a LOGCUBE", FETCH_AGAIN):
            plateifu, critical = archive_files.vet_header(primary, source, target)
            if critical and skip_critical:
                return SKIPPED
            if redshift is None and primary.get("SCINPVEL") is None and catalogue is not None:
                inputs["catalogue"] = utils.file_digest(catalogue)
            z, mangaid = archive_files.identify(source, primary, plateifu, redshift, catalogue)
            copied = archive_files.plain_cards(primary, COPIED_CARDS)
        edges = resample.log_edges(*archive_files.WAVE_GRID)
        is_shifted = options.remove_gas_velocity
        stretch = archive_files.gas_stretch(maps, source, plateifu) if is_shifted else None
        pixels = _pixels_to_read(edges / (1 + z), bins, stretch, f"{source}, redshift {z:.4f}")
        raw = archive_files.read_logcube(source, pixels, options.deredden, primary)
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
            "wcs_header": archive_files.celestial(raw.header),
            "source_file": source.name,
            "source_stamp": stamp,
            **utils.made_now(),
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


def _pixels_to_read(
    edges: np.ndarray, bins: np.ndarray, stretch: np.ndarray | None, where: str
) -> slice:
    """Range of the pixels, with these rest-frame edges, that the bins of any spaxel overlap."""
    ends = bins[[0, -1]]
    if stretch is not None:
        ends = ends * [min(stretch.min(), 1), max(stretch.max(), 1)]
    pixels = resample.used_pixels(resample.overlap_matrix(edges, ends))
    outside = np.mean((bins[1:] > edges[-1]) | (bins[:-1] < edges[0]))
    found = f"{where}: the cube covers {edges[0]:.0f}-{edges[-1]:.0f} Angstrom (rest frame)"
    if pixels.stop == pixels.start:
        raise DataError(
            f"{found}, expected some of {bins[0]:g}-{bins[-1]:g}. Check --redshift, --wave-min and "
            "--wave-max."
        )
    if outside > 0:
        log.warning(
            f"{found}: {100 * outside:.0f} % of the bins lie outside and stay empty. Check "
            "--wave-min and --wave-max."
        )
    return pixels


def _resampled_rows(
    raw: archive_files.RawCube,
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
    path : Path
        Of the LOGCUBE, for the error after the last row if every pixel was masked.
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
    with ThreadPoolExecutor(1) as pool:
        rows = loops.in_order(pool, one_row, range(ny), LOOK_AHEAD)
        while block := list(itertools.islice(rows, data_io.CHUNK_SPAXELS)):
            stacked = data_io.Rows(*(np.stack(a) for a in zip(*block, strict=True)))
            any_good = any_good or bool(np.any(stacked.good_fraction))
            yield stacked
    if not any_good:
        raise DataError(
            f"{path}: every pixel in the wavelength range is masked. Choose another range."
        )


# Maps


def process_map(
    source: Path,
    target: Path,
    label_task: LabelTask,
    options: LabelOptions,
    skip_critical: bool = False,
    overwrite: bool = False,
    cube: Path | None = None,
) -> str:
    """Make the label map of one galaxy.

    Parameters
    ----------
    source : Path or marvin.tools.Maps
        DAP MAPS, plain or gzipped; of a Maps, the file that it was opened from.
    target : Path
        `.npy` label map; beside it the uncertainty (`_err.npy`), provenance (`.json`) and a
        picture (`.png`). Layout in docs/data_formats.md#labels.
    skip_critical, overwrite, result, errors
        As in `process_cube`.
    cube : Path, optional
        The galaxy's H5 cube: if there is one, the maps must have as many spaxels.
    """
    source, target = Path(getattr(source, "filename", source)), Path(target)
    chosen = {**_of(options, LabelOptions), "label_task": label_task}
    recipe = Recipe("labels", data_io.LABEL_VERSION, chosen, {"MAPS": utils.file_digest(source)})
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
            archive_files.read_line_maps(source, BPT_LINES)  # if it is damaged, says that
        recipe.require(made["recipe"], target, "Replace it with --overwrite")
        return SKIPPED if skip_critical and made.get("critical") else "up to date"
    lines = list(BPT_LINES)
    if label_task == "logOH":
        needed = lines_needed(options.diagnostic)
        lines = list(dict.fromkeys([*needed, *(lines if options.star_forming_only else ())]))
    maps, primary_hdu, flux_hdu = archive_files.read_line_maps(source, lines)
    primary = primary_hdu.header
    with utils.reading(source, "the header of a MAPS file", FETCH_AGAIN):
        plateifu, critical = archive_files.vet_header(primary, source, target)
        mangaid = str(primary.get("MANGAID", "")).strip()
        names = {"daptype": "DAPTYPE", "dap_version": "VERSDAP"}
        version = archive_files.plain_cards(primary, names)
    if critical and skip_critical:
        return SKIPPED
    if cube is not None and cube.is_file():
        expected = data_io.read_cube_head(cube).measured.shape
        if maps.shape != expected:
            raise DataError(
                f"{source}: maps of {maps.shape} spaxels, expected {expected} as in {cube}. Make "
                "both from files of one analysis (--daptype)."
            )
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
    bins = archive_files.count_bins(source, classes >= 0)
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
        **version,
        "source_file": source.name,
        "source_path": str(source.resolve()),
        "wcs_header": archive_files.celestial(flux_hdu.header),
        **utils.made_now(),
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
