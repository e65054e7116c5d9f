"""Map galaxies with a trained model: the class of every spaxel, its 12+log(O/H) and an interval.

Reads   a run folder of run_SSFTT_training.py; processed/cubes/<plate>/<plateifu>.h5. No label is
        needed: these may be galaxies that nobody has labelled. For the mask,
        processed/labels/BPT/<plateifu>.npy where it exists.
Writes  <run_dir>/maps/<plateifu>.fits, classes, probabilities, for metallicities 12+log(O/H) and
        the ends of its 90 % interval, and a bit mask, with the cube's sky coordinates;
        <run_dir>/maps/galaxies.csv, a row per galaxy.
Layouts: docs/data_formats.md#maps. Every usable spaxel gets a class; the mask says which are known
to be star-forming. Maps that this model made from today's cubes and BPT labels are left alone;
others are made again.

    python map_galaxies.py --run-dir runs/demo                          # every cube there is
    python map_galaxies.py --run-dir runs/demo --plateifu 8485-1901 7815-3702
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import utils

import numpy as np
import pandas as pd
from astropy.io import fits

import data_io
import eval_fns
import hsi_proc_fns
import loops
import run_folder
from intervals import LEVEL
from labels import LABEL_NONE, SF
from pack_cubes import NormalisedCube
from recipe import Recipe, digest_of, file_digest

log = logging.getLogger(__name__)

TABLE_FILE = "galaxies.csv"
MAP_VERSION = 3

MASK_BITS = {
    "NOSPEC": "no measured bin",
    "FEWBINS": "too few measured bins for a prediction",
    "NOTSF": "composite or AGN by its BPT label",
    "NOBPT": "without a BPT label",
    "TRAINED": "in a galaxy of the training part",
    "UNLIKE": "spectrum unlike those of training",
}
"""Bits of the extension MASK, from bit 0 on, and their meaning."""

DISTRUST = {"BPT": 0b100011, "logOH": 0b101111}
"""Bits of spaxels whose value is not to be trusted: metallicity calibrations hold for H II regions,
and models learn from those alone unless told otherwise; nor does a model know what spectra mean
that are unlike those it learned from."""

HDUCLASS = {"HDUCLASS": ("SDSS", "as in the maps of MaNGA's DAP"), "HDUCLAS1": "IMAGE"}
DATA = {**HDUCLASS, "HDUCLAS2": "DATA", "QUALDATA": ("MASK", "extension of the bit mask")}
ENDS = {
    **DATA,
    "BUNIT": "dex",
    "COVERAGE": (LEVEL, "fraction of labels that intervals contain"),
}
CLASS_AXIS = {"CTYPE3": ("CLASS", "its number, from 0"), "CUNIT3": "", "CRPIX3": 1.0, "CRVAL3": 0.0}
FLAGS = {f"FLAG{i:02}": bit for i, bit in enumerate(MASK_BITS.items())}
IMAGE_CARDS: dict[str, dict[str, Any]] = {
    "CLASS": {**DATA, "BUNIT": "", "COMMENT": "-1 without a prediction"},
    "PROBABILITY": {**DATA, "HDUCLAS1": "CUBE", "BUNIT": "", **CLASS_AXIS, "CDELT3": 1.0},
    "LOGOH": {**DATA, "BUNIT": "dex", "COMMENT": "12+log(O/H): see MASK for what to trust"},
    "LOGOH_LOWER": {**ENDS, "COMMENT": "lower end of the interval of LOGOH"},
    "LOGOH_UPPER": {**ENDS, "COMMENT": "upper end of the interval of LOGOH"},
    "MASK": {**HDUCLASS, "HDUCLAS2": "QUALITY", "HDUCLAS3": "FLAG32BIT", **FLAGS},
}
"""Header cards of the extensions."""


@dataclass(frozen=True, kw_only=True)
class Config(loops.GalaxyChoice):
    """Map galaxies with a trained model."""

    run_dir: Path
    """Folder of a training run."""
    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else the run's, else ./data/manga."""
    jobs: int = 0
    """Number of threads that read cubes ahead of the network; 0 uses one per CPU, at most 8."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    overwrite: bool = False
    """Also replace maps that are up to date."""


def map_recipe(weights_digest: str, cube: Recipe, bpt: np.ndarray | None) -> Recipe:
    """Name what decides a map: the model's weights, the cube, and any BPT labels."""
    inputs = {"weights": weights_digest, "cube": cube.digest}
    inputs |= {} if bpt is None else {"BPT labels": digest_of(bpt)}
    return Recipe("map", MAP_VERSION, {}, inputs)


def spaxel_mask(result: eval_fns.CubePrediction, bpt: np.ndarray | None) -> np.ndarray:
    """Set the bits of MASK_BITS in every spaxel, (y, x) int32; `bpt` as in `write_map`."""
    mask = np.zeros(result.classes.shape, np.int32)
    labels = np.full_like(result.classes, LABEL_NONE) if bpt is None else bpt
    unknown = labels == LABEL_NONE
    unmeasured, trained = ~result.inside, np.full(mask.shape, result.part == "train")
    unlike = np.zeros(mask.shape, bool) if result.unlike is None else result.unlike
    unusable = ~result.usable & ~unmeasured
    flags = (unmeasured, unusable, (labels != SF) & ~unknown, unknown, trained, unlike)
    for bit, is_set in enumerate(flags):  # in the order of MASK_BITS
        mask[is_set] |= 1 << bit
    return mask


def read_map_header(path: Path) -> fits.Header:
    """Read the primary header of a map; an empty one if there is no readable map."""
    try:
        return fits.getheader(path)
    except OSError:
        return fits.Header()


def write_map(
    path: Path,
    result: eval_fns.CubePrediction,
    trained: eval_fns.TrainedModel,
    cards: dict,
    bpt: np.ndarray | None,
) -> None:
    """Write a map as FITS, whole or not at all, with additional cards in the primary header.

    `bpt`, (y, x) int16: the galaxy's BPT labels; None if it has none.
    """
    task, mask = trained.spec.label_task, spaxel_mask(result, bpt)
    values = [] if result.class_values is None else result.class_values.tolist()
    trusted = (mask & DISTRUST[task]) == 0
    images = {"CLASS": result.classes, "PROBABILITY": np.moveaxis(result.probabilities, 2, 0)}
    median = None
    if result.logoh is not None:
        images["LOGOH"] = result.logoh
        if result.lower is not None and result.upper is not None:
            images |= {"LOGOH_LOWER": result.lower, "LOGOH_UPPER": result.upper}
        median = float(np.median(result.logoh[trusted])) if trusted.any() else None
    images["MASK"] = mask
    counts = map(int, result.class_counts)
    cards = {
        "ORIGIN": ("MaNGA SSFTT", "software project"),
        "CREATOR": (f"map_galaxies.py {utils.VERSION}", "command and version"),
        "DATE": (utils.utc_now().rstrip("Z"), "UTC"),
        "PLATEIFU": (result.plateifu, "galaxy"),
        "MANGAID": (result.attrs.get("mangaid"), "galaxy, however often observed"),
        "REDSHIFT": (result.attrs.get("redshift"), "of the cube"),
        "TASK": (task, "label that was learned"),
        "CALIBRAT": (trained.card.recipe.options["labels"].get("diagnostic"), "of the labels"),
        "NCALGAL": (
            trained.card.calibration.galaxies if values else None,
            "galaxies that calibrated the intervals",
        ),
        "NEPOCH": (trained.card.best["epoch"], "training epoch of the weights"),
        **cards,
        "PART": (result.part, "of the run's split; empty if in none"),
        "SPAXELS": (int(result.usable.sum()), "with a prediction"),
        "TRUSTED": (int(trusted.sum()), "spaxels without the bits DISTRUST of MASK"),
        "MEDTRUST": (median, "[dex] median LOGOH of the TRUSTED spaxels"),
        **{f"CLASS{k}": (name, "") for k, name in enumerate(result.class_names)},
        **{f"COUNT{k}": (n, "spaxels of the class") for k, n in enumerate(counts)},
        **{f"VALUE{k}": (v, "[dex] 12+log(O/H) of the class") for k, v in enumerate(values)},
    }
    primary = fits.PrimaryHDU()
    primary.header.update({k: v for k, v in cards.items() if v[0] is not None})
    sky = fits.Header.fromstring(result.attrs.get("wcs_header", ""), sep="\n")
    hdus = fits.HDUList([primary])
    for name, image in images.items():
        hdus.append(fits.ImageHDU(image, sky, name))
        hdus[name].header.update(IMAGE_CARDS[name])
    channels = {f"C{k}": name for k, name in enumerate(result.class_names, 1)}
    hdus["PROBABILITY"].header.update(channels)
    hdus["MASK"].header["SCIDATA"] = "LOGOH" if values else "CLASS"
    hdus["MASK"].header["DISTRUST"] = (DISTRUST[task], "bits of values not to be trusted")
    with utils.atomic_path(path) as part:
        hdus.writeto(part, overwrite=True, checksum=True)


def tabulate_maps(folder: Path) -> pd.DataFrame:
    """Tabulate all maps in a folder from their headers, one row per galaxy.

    Returns
    -------
    DataFrame
        plateifu, mangaid, redshift, part (of the run's split; empty if in none), spaxels, for
        metallicities the number of trusted ones (known to be star-forming) and their median_logoh
        (dex), and the number of spaxels of each class.
    """
    rows = []
    for path in utils.files_in(folder, "*.fits"):
        header = read_map_header(path)
        row = {k: header.get(k.upper()) for k in ("plateifu", "mangaid", "redshift", "part")}
        row["spaxels"] = header.get("SPAXELS")
        if header.get("TASK") == "logOH":
            row |= {"trusted": header.get("TRUSTED"), "median_logoh": header.get("MEDTRUST")}
        row |= {header[f"CLASS{k}"]: n for k, n in enumerate(header["COUNT*"].values())}
        rows.append(row)
    return pd.DataFrame(rows)


def map_galaxies(
    trained: eval_fns.TrainedModel,
    run_dir: Path,
    root: Path,
    plateifus: Sequence[str],
    failed_csv: Path,
    readers: int = 1,
    overwrite: bool = False,
) -> dict[str, str]:
    """Map galaxies into the run's folder `maps`; `readers` threads read cubes in advance.

    Returns
    -------
    dict of plateifu -> {"written", "up to date", "failed"}
    """
    folder = run_dir / run_folder.MAPS_FOLDER
    weights = file_digest(run_dir / run_folder.WEIGHTS_FILE)

    def read(plateifu: str) -> tuple[NormalisedCube, np.ndarray | None] | Exception | None:
        path, label_path = utils.cube_path(root, plateifu), utils.label_path(root, "BPT", plateifu)
        try:
            bpt = data_io.read_labels(label_path) if label_path.is_file() else None
            recipe = map_recipe(weights, data_io.read_cube_head(path).recipe, bpt)
            made = read_map_header(folder / f"{plateifu}.fits").get("RECIPE")
            if made == recipe.digest and not overwrite:
                return None
            cube = eval_fns.read_cube_for(trained, path)
            if bpt is not None:
                hsi_proc_fns.check_label_shape(bpt, cube.usable, label_path)
            return cube, bpt
        except Exception as error:  # raised when its galaxy's turn comes
            return error

    found_cubes = loops.in_threads(read, plateifus, readers)

    def work(plateifu: str) -> str:
        found = next(found_cubes)
        if isinstance(found, Exception):
            raise found
        if found is None:
            return "up to date"
        cube, bpt = found
        result = eval_fns.predict_normalised(trained, cube, plateifu)
        if not result.usable.any():
            log.warning("%s: no usable spaxel, hence no prediction", plateifu)
        cards = {
            "RUN": (run_dir.resolve().name, "folder of the training run"),
            "RECIPE": map_recipe(weights, cube.recipe, bpt).digest,
        }
        write_map(folder / f"{plateifu}.fits", result, trained, cards, bpt)
        return "written"

    return loops.for_each_galaxy(work, plateifus, "maps", failed_csv)


def main(config: Config) -> int:
    """Map the chosen galaxies and tabulate all maps of the run."""
    trained = eval_fns.load_model(config.run_dir, config.device)
    root = run_folder.run_data_dir(config.run_dir, config.data_dir)
    galaxies = loops.chosen_galaxies(config, [p.stem for p in utils.processed_cubes(root)])
    folder = config.run_dir / run_folder.MAPS_FOLDER
    readers = utils.processes(config.jobs) if config.jobs else eval_fns.count_readers()
    failed_csv = loops.failed_path(folder, config.shard)
    outcome = map_galaxies(
        trained, config.run_dir, root, galaxies, failed_csv, readers, config.overwrite
    )
    table = tabulate_maps(folder)
    if len(table):
        gone = [not utils.cube_path(root, p).is_file() for p in table["plateifu"]]
        table["cube"] = np.where(gone, "gone", "")
        if any(gone):
            log.warning(
                f"{sum(gone)} of the maps ({table['plateifu'][gone].iloc[0]}, ...) are of cubes "
                f"that are not in {root} (any more): marked as gone in {TABLE_FILE}"
            )
        with utils.atomic_path(folder / TABLE_FILE) as part:
            table.to_csv(part, index=False)
        chosen = table["plateifu"].isin(galaxies)
        if "trusted" in table and (unknown := chosen & ~(table["trusted"] > 0)).any():
            log.warning(
                f"{unknown.sum()} of these galaxies ({table['plateifu'][unknown].iloc[0]}, ...) "
                "have no spaxel that a BPT label calls star-forming: do not trust their "
                "metallicities. Where BPT labels are missing, process_single_cube.py --labels-only "
                "makes them"
            )
        shown = chosen & (table["part"] == "train")
        if shown.any():
            names = ", ".join(table["plateifu"][shown][:3]) + (", ..." if shown.sum() > 3 else "")
            log.warning(
                f"{shown.sum()} of these galaxies ({names}) were trained on: their maps do not "
                "show how well the model works on new ones"
            )
    return loops.report(outcome, "maps", folder)


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
