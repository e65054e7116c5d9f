"""Map galaxies with a trained model: the class of every spaxel, its 12+log(O/H) and an interval.

Reads   a run folder of run_SSFTT_training.py; processed/cubes/<plate>/<plateifu>.h5. No label is
        needed: these may be galaxies that nobody has labelled. For the mask,
        processed/labels/BPT/<plateifu>.npy where it exists.
Writes  <run_dir>/maps/<plateifu>.fits, classes, probabilities, for metallicities 12+log(O/H) and
        the ends of its 90 % interval, and a bit mask, with the cube's sky coordinates;
        <run_dir>/maps/galaxies.csv, a row per observation (plateifu).
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
from utils import DataError

import numpy as np
import pandas as pd
from astropy.io import fits

import data_io
import fits_stream
import hsi_proc_fns
import inference
import loops
import run_folder
from intervals import LEVEL
from labels import LABEL_NONE, SF
from pack_cubes import NormalisedCube
from recipe import Recipe, digest_of

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


def spaxel_mask(result: inference.CubePrediction, bpt: np.ndarray | None) -> np.ndarray:
    """Set the bits of MASK_BITS in every spaxel, (y, x) int32; `bpt` as in `write_map`."""
    labels = np.full_like(result.classes, LABEL_NONE) if bpt is None else bpt
    flags = {
        "NOSPEC": ~result.inside,
        "FEWBINS": result.inside & ~result.usable,
        "NOTSF": (labels != SF) & (labels != LABEL_NONE),
        "NOBPT": labels == LABEL_NONE,
        "TRAINED": result.part == "train",
        "UNLIKE": False if result.unlike is None else result.unlike,
    }
    mask = np.zeros(result.classes.shape, np.int32)
    for bit, name in enumerate(MASK_BITS):
        mask |= np.where(flags[name], np.int32(1 << bit), np.int32(0))
    return mask


def read_map_header(path: Path) -> fits.Header:
    """Read the primary header of a map; an empty one if there is no map, or a damaged one."""
    try:
        return fits_stream.check_whole(path) if path.is_file() else fits.Header()
    except DataError as error:
        log.warning("%s", str(error).replace(fits_stream.FETCH_AGAIN, "It has to be made again."))
        return fits.Header()


def write_map(
    path: Path,
    result: inference.CubePrediction,
    trained: inference.TrainedModel,
    cards: dict,
    bpt: np.ndarray | None,
) -> None:
    """Write a map as FITS, whole or not at all, with additional cards in the primary header.

    `bpt`, (y, x) int16: the galaxy's BPT labels; None if it has none.
    """
    card, task, mask = trained.card, trained.spec.label_task, spaxel_mask(result, bpt)
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
        "PLATEIFU": (result.plateifu, "observation"),
        "MANGAID": (result.attrs.get("mangaid"), "galaxy, however often observed"),
        "REDSHIFT": (result.attrs.get("redshift"), "of the cube"),
        "TASK": (task, "label that was learned"),
        "CALIBRAT": (card.recipe.options["labels"].get("diagnostic"), "of the labels"),
        "NCALGAL": (
            card.calibration.galaxies if values else None,
            "galaxies that calibrated the intervals",
        ),
        "NEPOCH": (card.best["epoch"], "training epoch of the weights"),
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
    """Tabulate all sound maps in a folder from their headers, one row per observation.

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
        if not header:  # damaged
            continue
        row = {k: header.get(k.upper()) for k in ("plateifu", "mangaid", "redshift", "part")}
        row["spaxels"] = header.get("SPAXELS")
        if header.get("TASK") == "logOH":
            row |= {"trusted": header.get("TRUSTED"), "median_logoh": header.get("MEDTRUST")}
        row |= {header[f"CLASS{k}"]: n for k, n in enumerate(header["COUNT*"].values())}
        rows.append(row)
    return pd.DataFrame(rows)


def map_galaxies(
    config: Config, trained: inference.TrainedModel, root: Path, plateifus: Sequence[str]
) -> dict[str, str]:
    """Map observations; say of each whether its map was written, is up to date, or failed."""
    run_dir, folder = config.run_dir, config.run_dir / run_folder.MAPS_FOLDER
    weights = utils.file_digest(run_dir / run_folder.WEIGHTS_FILE)
    readers = utils.processes(config.jobs) if config.jobs else inference.count_readers()

    def read(plateifu: str) -> tuple[NormalisedCube, np.ndarray | None] | Exception | None:
        path, label_path = utils.cube_path(root, plateifu), utils.label_path(root, "BPT", plateifu)
        try:
            bpt = data_io.read_labels(label_path) if label_path.is_file() else None
            recipe = map_recipe(weights, data_io.read_cube_head(path).recipe, bpt)
            made = read_map_header(folder / f"{plateifu}.fits").get("RECIPE")
            if made == recipe.digest and not config.overwrite:
                return None
            cube = inference.read_cube_for(trained, path)
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
        result = inference.predict_normalised(trained, cube, plateifu)
        if not result.usable.any():
            log.warning("%s: no usable spaxel, hence no prediction", plateifu)
        cards = {
            "RUN": (run_folder.card_name(run_dir), "folder of the training run"),
            "RECIPE": map_recipe(weights, cube.recipe, bpt).digest,
        }
        write_map(folder / f"{plateifu}.fits", result, trained, cards, bpt)
        return "written"

    return loops.for_each_galaxy(work, plateifus, "maps", loops.failed_path(folder, config.shard))


def warn(table: pd.DataFrame, words: str) -> None:
    """Warn of some maps, if there are any."""
    if len(table):
        more = ", ..." if len(table) > 1 else ""
        first = table["plateifu"].iloc[0]
        log.warning("%d of the maps (%s%s) %s", len(table), first, more, words)


def main(config: Config) -> int:
    """Map the chosen observations and tabulate all maps of the run."""
    trained = inference.load_model(config.run_dir, config.device)
    root = run_folder.run_data_dir(config.run_dir, config.data_dir)
    galaxies = loops.chosen_galaxies(config, [p.stem for p in utils.processed_cubes(root)])
    folder = config.run_dir / run_folder.MAPS_FOLDER
    if not (config.plateifu or config.galaxy_list or config.shard):  # then all are tried now
        for path in utils.files_in(folder, "failed*.csv"):
            path.unlink()
    outcome = map_galaxies(config, trained, root, galaxies)
    if len(table := tabulate_maps(folder)):
        is_gone = ~table["plateifu"].map(lambda p: utils.cube_path(root, p).is_file())
        table["cube"] = np.where(is_gone, "gone", "")
        with utils.atomic_path(folder / TABLE_FILE) as part:
            table.to_csv(part, index=False)
        warn(table[is_gone], f"are of cubes that are not in {root} (any more): see {TABLE_FILE}")
        chosen = table[table["plateifu"].isin(galaxies)]
        if "trusted" in table:
            warn(
                chosen[~(chosen["trusted"] > 0)],
                "have no spaxel that a BPT label calls star-forming: do not trust their "
                "metallicities. Where BPT labels are missing, process_single_cube.py --labels-only "
                "makes them",
            )
        warn(
            chosen[chosen["part"] == "train"],
            "show galaxies that the model was trained on, not how well it works on new ones",
        )
    where = folder
    if len(galaxies) == 1 and outcome[galaxies[0]] != "failed":
        where = folder / f"{galaxies[0]}.fits"
    return loops.report(outcome, "maps", where)


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
