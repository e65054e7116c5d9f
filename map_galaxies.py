"""Map galaxies with a trained model: the class of every spaxel, and its 12+log(O/H).

Reads   a run folder of run_SSFTT_training.py; processed/cubes/<plate>/<plateifu>.h5. No label is
        needed: these may be galaxies that nobody has labelled.
Writes  <run_dir>/maps/<plateifu>.fits, classes, probabilities and, for metallicities, 12+log(O/H),
        with the cube's sky coordinates; <run_dir>/maps/galaxies.csv, one row per galaxy.
Layouts: docs/data_formats.md. Every usable spaxel gets a class, star-forming or not. Maps that
this model made from today's cubes are left alone; others are made again.

    python map_galaxies.py --run-dir runs/demo                          # every cube there is
    python map_galaxies.py --run-dir runs/demo --plateifu 8485-1901 7815-3702
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from astropy.io import fits

import data_io
import eval_fns
import loops
import run_folder
import utils
from pack_cubes import NormalisedCube
from recipe import Recipe, file_digest

log = logging.getLogger(__name__)

TABLE_FILE = "galaxies.csv"
MAP_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(loops.GalaxyChoice):
    """Map galaxies with a trained model."""

    run_dir: Path
    """Folder of a training run."""
    data_dir: Path | None = None
    """Data folder; default the run's, else $MANGA_DATA_DIR, else ./data/manga."""
    jobs: int = 0
    """Number of threads that read cubes ahead of the network; 0 uses one per CPU, at most 8."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    overwrite: bool = False
    """Also replace maps that are up to date."""


def map_recipe(weights_digest: str, cube: Recipe) -> Recipe:
    """Name what decides a map: the model's weights and the cube."""
    return Recipe("map", MAP_VERSION, {}, {"weights": weights_digest, "cube": cube.digest})


def read_map_header(path: Path) -> fits.Header:
    """Read the primary header of a map; an empty one if there is no readable map."""
    try:
        return fits.getheader(path)
    except OSError:
        return fits.Header()


def write_map(
    path: Path, result: eval_fns.CubePrediction, trained: eval_fns.TrainedModel, cards: dict
) -> None:
    """Write a map as FITS, whole or not at all, with additional cards in the primary header."""
    probabilities = np.moveaxis(result.probabilities, 2, 0)
    images: dict[str, Any] = {"CLASS": result.classes, "PROBABILITY": probabilities}
    median, values = None, result.class_values
    if values is not None:
        images["LOGOH"], images["LOGOH_SPREAD"] = result.logoh, result.logoh_spread
        median = float(np.median(images["LOGOH"][result.usable])) if result.usable.any() else None
    counts = map(int, result.class_counts)
    cards = {
        "PLATEIFU": (result.plateifu, "galaxy"),
        "MANGAID": (result.attrs.get("mangaid"), "galaxy, however often observed"),
        "REDSHIFT": (result.attrs.get("redshift"), "of the cube"),
        "TASK": (trained.spec.label_task, "label that was learned"),
        "EPOCH": (trained.card.best["epoch"], "of the weights"),
        **cards,
        "PART": (result.part, "of the run's split; empty if in none"),
        "SPAXELS": (int(result.usable.sum()), "with a prediction"),
        "MEDIAN": (median, "12+log(O/H) of those spaxels, dex"),
        **{f"CLASS{k}": (name, "") for k, name in enumerate(result.class_names)},
        **{f"COUNT{k}": (n, "spaxels of the class") for k, n in enumerate(counts)},
        **{
            f"VALUE{k}": (float(v), "dex, of the class")
            for k, v in enumerate([] if values is None else values)
        },
        "VERSION": (utils.VERSION, "of the code"),
        "DATE": (utils.utc_now().rstrip("Z"), "UTC"),
    }
    primary = fits.PrimaryHDU()
    primary.header.update({k: v for k, v in cards.items() if v[0] is not None})
    sky = fits.Header.fromstring(result.attrs.get("wcs_header", ""), sep="\n")
    hdus = [primary]
    for name, image in images.items():
        kind = np.int16 if name == "CLASS" else np.float32
        hdus.append(fits.ImageHDU(image.astype(kind), sky, name))
        if name.startswith("LOGOH"):
            hdus[-1].header["BUNIT"] = "dex"
            hdus[-1].header["COMMENT"] = "of every usable spaxel, star-forming or not"
    with utils.atomic_path(path) as part:
        fits.HDUList(hdus).writeto(part, overwrite=True)


def tabulate_maps(folder: Path) -> pd.DataFrame:
    """Tabulate all maps in a folder from their headers, one row per galaxy.

    Returns
    -------
    DataFrame
        plateifu, mangaid, redshift, part (of the run's split; empty if in none), spaxels, for
        metallicities median_logoh (dex), and the number of spaxels of each class.
    """
    rows = []
    for path in utils.files_in(folder, "*.fits"):
        header = read_map_header(path)
        row = {k: header.get(k.upper()) for k in ("plateifu", "mangaid", "redshift", "part")}
        row["spaxels"] = header.get("SPAXELS")
        if header.get("TASK") == "logOH":
            row["median_logoh"] = header.get("MEDIAN")
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

    def read(plateifu: str) -> NormalisedCube | Exception | None:
        path = utils.cube_path(root, plateifu)
        try:
            recipe = map_recipe(weights, data_io.read_cube_head(path).recipe)
            made = read_map_header(folder / f"{plateifu}.fits").get("RECIPE")
            is_done = made == recipe.digest and not overwrite
            return None if is_done else eval_fns.read_cube_for(trained, path)
        except Exception as error:  # raised when its galaxy's turn comes
            return error

    cubes = loops.in_threads(read, plateifus, readers)

    def work(plateifu: str) -> str:
        cube = next(cubes)
        if isinstance(cube, Exception):
            raise cube
        if cube is None:
            return "up to date"
        result = eval_fns.predict_normalised(trained, cube, plateifu)
        if not result.usable.any():
            log.warning("%s: no usable spaxel, hence no prediction", plateifu)
        cards = {
            "RUN": (run_dir.resolve().name, "folder of the training run"),
            "RECIPE": map_recipe(weights, cube.recipe).digest,
        }
        write_map(folder / f"{plateifu}.fits", result, trained, cards)
        return "written"

    return loops.for_each_galaxy(work, plateifus, "maps", failed_csv)


def main(config: Config) -> int:
    """Map the chosen galaxies and tabulate all maps of the run."""
    trained = eval_fns.load_model(config.run_dir, config.device)
    root = run_folder.run_data_dir(config.run_dir, config.data_dir)
    galaxies = loops.chosen_galaxies(config, [p.stem for p in utils.processed_cubes(root)])
    folder = config.run_dir / run_folder.MAPS_FOLDER
    readers = config.jobs or eval_fns.count_readers()
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
                f"that no longer exist in {root}: marked as gone in {TABLE_FILE}"
            )
        with utils.atomic_path(folder / TABLE_FILE) as part:
            table.to_csv(part, index=False)
        shown = (table["part"] == "train") & table["plateifu"].isin(galaxies)
        if shown.any():
            names = ", ".join(table["plateifu"][shown][:3]) + (", ..." if shown.sum() > 3 else "")
            log.warning(
                f"{shown.sum()} of these galaxies ({names}) were trained on: their maps do not "
                "show how well the model works on new ones"
            )
    return loops.report(outcome, "maps", folder)


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
