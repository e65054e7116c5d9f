"""The truth file of a simulated galaxy: noiseless maps, line fluxes and how they were made.

Writes and reads truth/<plateifu>.h5 (layout: docs/data_formats.md). Maps are (y, x).

    >>> maps, attrs = read_truth(truth_path(data_dir, "13001-1901"))
    >>> maps["logoh_o3n2"], maps["line_flux/Ha-6564"]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import utils

import numpy as np

from h5_files import new_h5, open_h5, read_dataset
from labels import LABEL_NONE
from mock.physics import Galaxy, bpt_class, logoh_n2, logoh_o3n2, to_image, wave_grid
from recipe import Recipe

TRUTH_SCHEMA, TRUTH_VERSION = "manga-mock-truth", 4


def truth_path(root: Path, plateifu: str) -> Path:
    """Path of a simulated galaxy's truth file."""
    return Path(root) / "truth" / f"{plateifu}.h5"


def truth_maps(galaxy: Galaxy) -> dict[str, np.ndarray]:
    """Noiseless maps (y, x) by name: float32, NaN outside the field; bpt int16, -1 there.

    logoh_o3n2, logoh_n2 and bpt follow from the noiseless fluxes after the seeing, as a perfect
    measurement would find them; logoh_physical is the metallicity put in, before the seeing.
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

    Group `line_flux` holds one (y, x) map per line, under DR17's channel names: noiseless, after
    the seeing, in 1e-17 erg/s/cm2/spaxel, before Galactic reddening (the integral of FLUX x
    REDCORR over the line).
    """
    scene = galaxy.scene
    maps = truth_maps(galaxy)
    n_bytes = sum(values.nbytes for values in maps.values())
    recipe = truth_recipe(scene.meta)
    about = {"plateifu": scene.plateifu, "z": scene.z, "ebv_gal": scene.ebv_gal}
    about["code_version"] = utils.VERSION
    with new_h5(path, TRUTH_SCHEMA, TRUTH_VERSION, recipe, about, 4 * n_bytes) as f:
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
        If the file is missing, unreadable or not a truth file of this version.
    """
    maker = "mock_manga.py --overwrite"
    with open_h5(path, TRUTH_SCHEMA, TRUTH_VERSION, maker) as (f, _, attrs):
        lines = f["line_flux"].keys()  # of a group: a dataset has none
        names = [k for k in f if k != "line_flux"] + [f"line_flux/{k}" for k in lines]
        return {name: read_dataset(f, name) for name in names}, attrs


def truth_recipe(meta: dict[str, Any]) -> Recipe:
    """Name what decides a simulated galaxy: its parameters, or a MAPS file (by digest) and seed."""
    options = {k: v for k, v in meta.items() if k != "sha256"}
    inputs = {"MAPS": meta["sha256"]} if "sha256" in meta else {}
    return Recipe("simulated galaxy", TRUTH_VERSION, options, inputs)


def read_recipe(path: Path) -> Recipe:
    """Read the recipe of a simulated galaxy from its truth file; raises as `read_truth` does."""
    return Recipe.from_json(read_truth(path)[1]["recipe"], path)
