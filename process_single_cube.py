"""Process one galaxy: LOGCUBE and MAPS to an H5 cube, label maps and, on request, patches.

Reads   raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-<daptype>.fits.gz, or the files given.
Writes  processed/cubes/<plate>/<plateifu>.h5
        processed/labels/<label_task>/<plateifu>.npy, _err.npy, .json, .png
        processed/patches/<label_task>/<patch_norm>/<plateifu>/ for each of --patch-norms
Layouts: docs/data_formats.md. Outputs that are up to date are skipped.

    python process_single_cube.py --plateifu 8485-1901
    python process_single_cube.py --fits manga-8485-1901-LOGCUBE-SPX-MILESHC-MASTARSSP.fits.gz
    python process_single_cube.py --plateifu 8485-1901 --like-run runs/a  # then runs/a can map it
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import utils
from utils import LABEL_TASKS, DataError, LabelTask

import cube_patch_processing as patches
import data_io
import fits_utils
from fits_stream import read_hdus

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GalaxyOptions(fits_utils.CubeOptions, fits_utils.LabelOptions, patches.PatchOptions):
    """Options that decide the outputs of one galaxy."""

    like_run: Path | None = None
    """Process the galaxy like the training cubes of this run, so that its model can map it: its
    options of cube and labels replace those given here."""
    label_tasks: tuple[LabelTask, ...] = LABEL_TASKS  # type: ignore[assignment]
    """Labels to make; --label-tasks without a value makes none."""
    labels_only: bool = False
    """Make the labels alone, for which MAPS suffice; no cube."""
    daptype: str | None = None
    """DAP analysis to read if there are several, e.g. SPX-MILESHC-MASTARSSP."""
    skip_critical: bool = False
    """Leave out galaxies whose quality flag says CRITICAL; otherwise a warning is logged."""
    catalogue: Path | None = None
    """dapall or drpall catalogue, for the redshifts of DRP cubes; default the one in
    <data-dir>/raw/."""
    compression: Literal["none", "gzip"] = "none"
    """Compression of the cube's flux and ivar."""


@dataclass(frozen=True)
class OneGalaxy:
    """Which galaxy to process, and from which files."""

    plateifu: str | None = None
    """Galaxy, e.g. 8485-1901; default the one in the name of the --fits file."""
    fits: Path | None = None
    """LOGCUBE to read; default the galaxy's in <data-dir>/raw/."""
    maps: Path | None = None
    """MAPS to read; default the one beside the LOGCUBE, else the galaxy's in <data-dir>/raw/."""
    redshift: float | None = None
    """Redshift to use instead of the header's or the catalogue's; a warning is logged if they
    differ by more than 0.005."""


@dataclass(frozen=True)
class Config(GalaxyOptions, utils.CommandOptions, OneGalaxy):  # --help begins with the last
    """Process one galaxy."""

    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else that of the run --like-run, else ./data/manga."""


def process_galaxy(
    plateifu: str,
    root: Path,
    options: GalaxyOptions,
    logcube: Path | None = None,
    maps: Path | None = None,
    redshift: float | None = None,
    overwrite: bool = False,
) -> str:
    """Make the cube and the labels of one galaxy; the outcome is one of `fits_utils.process_cube`.

    `logcube` and `maps` are by default the galaxy's files in the raw folder of the data folder
    `root`, MAPS first beside the LOGCUBE. Outputs that were finished before an error are kept.
    """
    if logcube is None and not options.labels_only:
        logcube = utils.find_raw(root, plateifu, "LOGCUBE", options.daptype)
    needs_maps = bool(options.label_tasks) or options.remove_gas_velocity
    if needs_maps and maps is None:
        beside = logcube and logcube.with_name(logcube.name.replace("LOGCUBE", "MAPS"))
        if beside and beside != logcube and beside.is_file():
            maps = beside
        else:
            maps = utils.find_raw(root, plateifu, "MAPS", options.daptype)
    words, cube = [], utils.cube_path(root, plateifu)
    if not options.labels_only:
        assert logcube is not None
        word = fits_utils.process_cube(
            logcube,
            cube,
            options,
            redshift,
            maps if options.remove_gas_velocity else None,
            options.catalogue or utils.catalogue_path(root),
            options.skip_critical,
            overwrite,
            None if options.compression == "none" else options.compression,
        )
        if word.startswith("skipped"):
            return word
        words.append(word)
    for task in options.label_tasks:
        assert maps is not None
        target = utils.label_path(root, task, plateifu)
        word = fits_utils.process_map(
            maps, target, task, options, options.skip_critical, overwrite, cube
        )
        words.append(word)
    return "written" if "written" in words else words[-1]


def cut_patches(root: Path, options: GalaxyOptions, plateifus: Sequence[str], **config: Any) -> int:
    """Write the patch files of galaxies that are processed, if any were asked for.

    `config`: further options of `cube_patch_processing`. Returns the exit code.
    """
    labelled = [
        plateifu
        for plateifu in plateifus
        if all(utils.label_path(root, t, plateifu).is_file() for t in options.label_tasks)
    ]
    if not (options.patch_norms and labelled):
        return utils.EXIT_DONE
    names = (*(f.name for f in fields(patches.PatchOptions)), "label_tasks")
    config |= {name: getattr(options, name) for name in names}
    return patches.cut_patches(root, patches.Config(**config), labelled)


def data_dir_for(options: GalaxyOptions, flag: Path | None) -> Path:
    """Choose the data folder: the flag, else $MANGA_DATA_DIR, else that of the run --like-run."""
    if options.like_run is None:
        return utils.data_dir(flag)
    from run_folder import run_data_dir  # here: it needs torch

    return run_data_dir(options.like_run, flag)


Chosen = TypeVar("Chosen", bound=GalaxyOptions)


def vetted(options: Chosen) -> Chosen:
    """Check options; replace those of cube and labels by those of the run --like-run, if given."""
    if options.catalogue is not None:
        from archive_files import catalogue_rows  # here: it needs astropy

        catalogue_rows(options.catalogue)
    if not options.min_snr >= 0:  # nan is not, either
        raise DataError(f"--min-snr {options.min_snr:g}: expected 0 or more.")
    if options.labels_only and (options.patch_norms or not options.label_tasks):
        raise DataError(
            "--labels-only: expected some --label-tasks and no --patch-norms, which need a cube."
        )
    if options.like_run is None:
        return options
    from run_folder import ModelCard  # here: it needs torch

    made = ModelCard.read(options.like_run).recipe.options
    usual = {f.name: f.default for f in fields(options)}
    same = {k: v for k, v in {**made["cube"], **made["labels"]}.items() if k in usual}
    for name, value in same.items():
        if (given := getattr(options, name)) not in (value, usual[name]):
            raise DataError(
                f"--{name.replace('_', '-')}: {given}, but --like-run {options.like_run} expects "
                f"the run's {value}. Leave out one of the two."
            )
    return replace(options, **same)


def main(config: Config) -> int:
    """Process the galaxy and log where the outputs are."""
    root, config = data_dir_for(config, config.data_dir), vetted(config)
    if config.labels_only and config.redshift is not None:
        raise DataError("--labels-only: expected no --redshift, which only a cube needs.")
    if config.plateifu is None and config.fits is None and config.maps is None:
        raise DataError("no galaxy given. Expected --plateifu, e.g. 8485-1901, or --fits FILE.")
    for flag, kind, other in (("fits", "LOGCUBE", "MAPS"), ("maps", "MAPS", "LOGCUBE")):
        path: Path | None = getattr(config, flag)
        if path is not None and not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise DataError(f"{path}: {found}. Expected a {kind} file (FITS). Check --{flag}.")
        if path is not None and f"-{other}" in path.name:
            raise DataError(f"{path}: a {other} file by its name, expected a {kind} file.")
        if path is not None:
            read_hdus(path, ("PRIMARY",))  # is it a FITS file at all?
    plateifu = config.plateifu or utils.plateifu_of(config.fits or config.maps)  # type: ignore[arg-type]
    utils.split_plateifu(plateifu)
    files = config.fits, config.maps, config.redshift
    patches.stats_for(root, config)  # missing ones are reported before the work, not after
    word = process_galaxy(plateifu, root, config, *files, config.overwrite)
    log.info("%s: %s", plateifu, word)
    if word.startswith("skipped"):
        return utils.EXIT_DONE
    if not config.labels_only:
        log.info("cube: %s", utils.cube_path(root, plateifu))
    for task in config.label_tasks:
        path = utils.label_path(root, task, plateifu)
        n = data_io.read_label_meta(path)["n_labelled"]
        log.info("%s labels of %s: %s", task, utils.counted(n, "spaxel"), path)
    return cut_patches(root, config, [plateifu], overwrite=config.overwrite, jobs=1)


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
