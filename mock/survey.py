"""The data folder of a simulated survey: its galaxies are simulated and listed in a catalogue.

Reads   truth/<plateifu>.h5 and the catalogue of an earlier simulation.
Writes  each galaxy's LOGCUBE, MAPS and truth file, and raw/dapall-v3_1_1-3.1.0.fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import utils
from utils import DataError

import numpy as np

import loops
from mock.galaxy import DAPTYPE, FIRST_PLATE, GalaxyParams, simulate_galaxy
from mock.physics import Galaxy
from mock.truth import read_recipe, truth_path, truth_recipe, write_truth

DAPTYPES = (
    "HYB10-MILESHC-MASTARHC2",
    "SPX-MILESHC-MASTARSSP",
    "HYB10-MILESHC-MASTARSSP",
    "VOR10-MILESHC-MASTARSSP",
)
"""Analyses of DR17, in the order of the tables in its dapall catalogue."""
DAPALL = "dapall-v3_1_1-3.1.0.fits"


def simulate(
    root: Path, galaxies: Sequence[GalaxyParams], jobs: int, overwrite: bool
) -> dict[str, str]:
    """Simulate the galaxies that are missing, then write the catalogue; return each one's outcome.

    The folder may hold no real galaxies, and no simulated ones of other bundles.
    """
    check_folder(root, galaxies)
    params = {p.plateifu: p for p in galaxies}
    work = partial(_simulate_one, root=root, params=params, overwrite=overwrite)
    failed_csv = root / "failed_mock.csv"
    outcome = loops.for_each_galaxy(work, list(params), "simulate", failed_csv, jobs)
    write_catalogue(root, simulated_galaxies(root))
    return outcome


def _simulate_one(
    plateifu: str, root: Path, params: Mapping[str, GalaxyParams], overwrite: bool
) -> str:
    """Simulate and write one galaxy unless its files exist."""
    wanted, truth = params[plateifu], truth_path(root, plateifu)
    if truth.is_file() and not overwrite:
        today = truth_recipe({"params": asdict(wanted)})
        today.require(read_recipe(truth), truth, "Use --overwrite, or another --data-dir")
        if all(utils.raw_paths(root, plateifu, form, DAPTYPE) for form in ("LOGCUBE", "MAPS")):
            return "up to date"
    write_galaxy(root, simulate_galaxy(wanted))
    return "written"


def write_galaxy(root: Path, galaxy: Galaxy) -> None:
    """Write LOGCUBE, MAPS and, last, the truth file of a galaxy."""
    import mock.dr17_files as dr17  # here and below: --help does not need astropy

    plateifu, daptype = galaxy.scene.plateifu, galaxy.scene.cards["DAPTYPE"]
    hdus = {"LOGCUBE": dr17.logcube_hdus(galaxy), "MAPS": dr17.maps_hdus(galaxy.deep or galaxy)}
    for form, of_file in hdus.items():
        dr17.write_gzipped_fits(dr17.raw_file(root, plateifu, form, daptype), of_file)
    write_truth(truth_path(root, plateifu), galaxy)


def _slot(plateifu: str) -> tuple[str, str]:
    """Plate and running number on the plate: what identifies a simulated galaxy of any bundle."""
    plate, ifu = utils.split_plateifu(plateifu)
    return plate, ifu[-2:]


def check_folder(root: Path, galaxies: Sequence[GalaxyParams]) -> None:
    """Raise a DataError if a folder holds real galaxies, or simulated ones of other bundles."""
    from archive_files import catalogue_rows

    dapall = root / "raw" / DAPALL
    if dapall.is_file():
        listed = catalogue_rows(dapall)
        real = [name for name in listed if int(utils.split_plateifu(name)[0]) < FIRST_PLATE]
        if real:
            raise DataError(
                f"{dapall}: lists real galaxies ({real[0]}, ...). Expected none, because the "
                "catalogue of the simulated galaxies replaces this file. Choose another --data-dir."
            )
    wanted = {_slot(p.plateifu): p.plateifu for p in galaxies}
    for path in utils.files_in(root / "truth", "*.h5"):
        expected = wanted.get(_slot(path.stem), path.stem)
        if expected != path.stem:
            raise DataError(
                f"{path}: the folder holds this galaxy with a bundle of another size, expected "
                f"{expected}. Give the --bundles of the earlier simulation, or another --data-dir."
            )


def simulated_galaxies(root: Path) -> list[GalaxyParams]:
    """Parameters of the simulated galaxies of a folder, from their truth files.

    Galaxies that were re-synthesised from real MAPS files are left out.
    """
    recipes = map(read_recipe, utils.files_in(root / "truth", "*.h5"))
    return [GalaxyParams(**r.options["params"]) for r in recipes if "params" in r.options]


def write_catalogue(data_dir: Path, galaxies: Sequence[GalaxyParams]) -> Path:
    """Write a catalogue like dapall: one table per analysis, as in the archive.

    The columns are some of the archive's 91, under the same names, and EBVGAL. DAPDONE is true only
    for the analysis whose files are simulated.
    """
    from astropy.io import fits

    from mock.dr17_files import STAMP

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
        hdu.add_checksum(when=STAMP)
        return hdu

    path = Path(data_dir) / "raw" / DAPALL
    with utils.atomic_path(path) as part:
        fits.HDUList([fits.PrimaryHDU(), *map(table, DAPTYPES)]).writeto(part)
    return path
