"""Mean, standard deviation and principal components of a training split's spectra.

Each usable spectrum is divided by its own mean first, so the statistics describe shapes. Moments
are accumulated galaxy by galaxy: the memory needed is that of one cube and one (band, band) matrix,
whatever the number of galaxies, and the result is the exact PCA of all spectra. Training with the
patch norm PCA runs this with the default options if it has not been run.

Reads   splits/<split_dir>/train.csv and processed/cubes/<plate>/<plateifu>.h5 of its galaxies.
Writes  splits/<split_dir>/stats.h5, stats_components.png, stats_variance.png.

    python calc_data_stats.py --split-dir hard_logOH --n-components 30
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import utils
from utils import DataError

import numpy as np
from scipy.linalg import eigh

import data_io
import hsi_proc_fns
from hsi_proc_fns import Stats
from recipe import Recipe, require_alike

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config(utils.CommandOptions):
    """Mean, standard deviation and principal components of a training split's spectra."""

    split_dir: str
    """Split whose training part is used."""
    n_components: int = 30
    """Principal components to keep."""
    min_snr: float = 2.0
    """Leave out spectra with a lower median signal-to-noise ratio per bin: they add only noise."""


class Moments:
    """Running count `n`, `mean` (band,) and `scatter` (band, band) of spectra, float64.

    The scatter is the sum of outer products of deviations from the mean.
    """

    def __init__(self, n_band: int) -> None:
        self.n, self.mean, self.scatter = 0, np.zeros(n_band), np.zeros((n_band, n_band))

    def add(self, spectra: np.ndarray) -> None:
        """Add (N, band) spectra; Chan et al. (1983), The American Statistician 37, 242, eq. 2.1."""
        if not len(spectra):
            return
        block = spectra.astype(float)
        block_mean = block.mean(axis=0)
        deviations, shift = block - block_mean, block_mean - self.mean
        total = self.n + len(block)
        self.scatter += deviations.T @ deviations
        self.scatter += np.outer(shift, shift) * (self.n * len(block) / total)
        self.mean += shift * (len(block) / total)
        self.n = total


def principal_components(moments: Moments, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading principal components of accumulated spectra.

    Returns
    -------
    components : (k, band)
        Orthonormal rows by falling variance; the largest entry of each is positive.
    variance, ratio : (k,)
        Sample variance along each (divisor n - 1), and its share of the total.
    """
    covariance, n_band = moments.scatter / (moments.n - 1), moments.mean.size
    values, vectors = eigh(covariance, subset_by_index=(n_band - k, n_band - 1))  # ascending
    components = vectors[:, ::-1].T
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(k), largest])[:, None]
    variance = np.maximum(values[::-1], 0)
    return components, variance, variance / np.trace(covariance)


def usable_spectra(cube: data_io.Cube, min_snr: float) -> np.ndarray:
    """Select a cube's complete, bright spectra, each divided by its own mean; (N, band)."""
    usable = hsi_proc_fns.usable_spaxels(cube.flux)
    spectra = hsi_proc_fns.fill_gaps(cube.flux[usable])
    if cube.ivar is not None and min_snr > 0:
        snr = np.median(np.abs(spectra) * np.sqrt(cube.ivar[usable]), axis=1)
        spectra = spectra[snr >= min_snr]
    return hsi_proc_fns.unit_mean(spectra)


def split_stats(
    root: Path, split_dir: str, plateifus: list[str], n_components: int, min_snr: float
) -> Stats:
    """Compute the statistics of the spectra of the given galaxies, whose cubes share options."""
    from tqdm import tqdm

    recipe = stats_recipe(root, plateifus, n_components, min_snr)
    wave = data_io.read_cube_head(utils.cube_path(root, plateifus[0])).wave
    if not 1 <= n_components <= wave.size:
        raise DataError(
            f"--n-components {n_components}: expected 1 to {wave.size}, the number of bands."
        )
    moments, first = Moments(wave.size), f"that of {plateifus[0]}"
    mangaids = set[str]()
    for plateifu in tqdm(plateifus, desc="statistics", unit="observation", disable=None):
        path = utils.cube_path(root, plateifu)
        cube = data_io.read_cube(path)
        require_alike(cube.recipe.shared, recipe.options["cube"], path, first, data_io.REBUILD_CUBE)
        moments.add(usable_spectra(cube, min_snr))
        mangaids.add(cube.attrs.get("mangaid") or plateifu)
    if moments.n <= n_components:
        raise DataError(
            f"{root}: {moments.n} usable spectra in {len(mangaids)} galaxies, expected more than "
            f"the {n_components} components. Lower --n-components or --min-snr."
        )
    components, variance, ratio = principal_components(moments, n_components)
    std = np.sqrt(np.diag(moments.scatter) / (moments.n - 1))
    attrs = {
        "n_spaxels": moments.n,
        "n_galaxies": len(mangaids),
        "split_dir": split_dir,
        **utils.made_now(),
    }
    return Stats(wave, moments.mean, std, components, variance, ratio, recipe, attrs)


def stats_recipe(root: Path, plateifus: list[str], n_components: int, min_snr: float) -> Recipe:
    """Name what decides the statistics of the given galaxies' cubes, all made like the first."""
    cube = data_io.read_cube_head(utils.cube_path(root, plateifus[0])).recipe
    options = {"n_components": n_components, "min_snr": min_snr, "cube": cube.shared}
    inputs = data_io.stats_inputs(data_io.cube_digests(root, plateifus))
    return Recipe("statistics", data_io.STATS_VERSION, options, inputs)


def main(config: Config) -> int:
    """Compute, write and draw the statistics."""
    import vis_fns  # figures only: the numbers need no matplotlib

    root = utils.data_dir(config.data_dir)
    folder = utils.split_path(root, config.split_dir)
    parts, _ = data_io.read_split(folder)
    plateifus = sorted(parts["train"]["plateifu"].unique())
    if not plateifus:
        raise DataError(f"{folder}/train.csv: no galaxy, expected some. Rebuild the split.")
    target = utils.stats_path(root, config.split_dir)
    if target.is_file() and not config.overwrite:
        today = stats_recipe(root, plateifus, config.n_components, config.min_snr)
        today.require(data_io.read_stats(target).recipe, target, "Replace it with --overwrite")
        log.info("%s: up to date", target)
        return utils.EXIT_DONE
    stats = split_stats(root, config.split_dir, plateifus, config.n_components, config.min_snr)
    vis_fns.save(vis_fns.components_figure(stats), folder / "stats_components.png")
    vis_fns.save(vis_fns.variance_figure(stats), folder / "stats_variance.png")
    data_io.write_stats(target, stats)
    shown = ", ".join(f"{100 * r:.1f}" for r in stats.explained_ratio[:5])
    counts = f"{stats.attrs['n_spaxels']} spectra of {stats.attrs['n_galaxies']} galaxies"
    log.info("%s; the first components explain %s %% of the variance", counts, shown)
    log.info("Statistics and figures: %s", folder)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
