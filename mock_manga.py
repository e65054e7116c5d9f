"""Simulate MaNGA galaxies in the archive's file format, with the truth beside them.

Reads   nothing; with --from-maps a real DAP MAPS file, whose LOGCUBE it re-synthesises.
Writes  raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-SPX-MILESHC-MASTARSSP.fits.gz,
        raw/dapall-v3_1_1-3.1.0.fits and, what no survey provides, truth/<plateifu>.h5.

Cubes are (band, y, x), maps (y, x) or (channel, y, x); fluxes in 1e-17 erg/s/cm2 (/Angstrom)
/spaxel; wavelengths in vacuum Angstrom. As in the archive, FLUX is reddened by the Milky Way and
line fluxes are not.

What is modelled (each source is given at the function or constant in mock/): bundles and redshifts
as in DR17; inclined discs with a bulge; stellar spectra that vary with age and metallicity; H II
regions and diffuse gas about the strong-line calibrations, with correlated scatter of the line
ratios; Seyfert, LI(N)ER and
composite centres; dust by the Balmer decrement; rotation; seeing that mixes neighbouring spectra;
noise as measured on real spectra, correlated between neighbouring spaxels and pixels, with
residuals of the sky lines beyond the stated errors; foreground stars, dead fibres, low coverage.
Line fluxes in MAPS are measured on the noise of the cube above a continuum fitted with templates
that are not quite the galaxy's, or with --deep-labels on deeper data. How close this is to real
files: benchmarks/mock_realism.py.

What is not modelled: the metallicity of the gas is drawn independently of size, brightness,
redshift and rotation (the real mass-metallicity relation is left out on purpose, unless
--metallicity-relation is given: a network must read the spectrum). Stellar spectra are parametric,
not from a library. Each line is one Gaussian with the velocity and width of Halpha after the
seeing. Spectral indices are not measured: all their values are masked NOVALUE|DONOTUSE.

    python mock_manga.py --data-dir data/manga --n-galaxies 24 --seed 1 --bundles 19 --jobs 2
    python mock_manga.py --data-dir data/manga --from-maps manga-7815-3702-MAPS-HYB10.fits.gz
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import utils
from utils import DataError

import loops
from mock.galaxy import BUNDLES, draw_params
from mock.survey import simulate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MockConfig(utils.CommandOptions):
    """Simulate MaNGA galaxies in the DR17 file format, with the truth beside them."""

    n_galaxies: int = 24
    """Number of plateifus; the 12th, and every 72nd after it, repeats an earlier galaxy."""
    seed: int = 1
    """Random seed: the same seed gives identical files, whatever the number of galaxies."""
    bundles: tuple[int, ...] = ()
    """Bundle sizes to draw from (19 37 61 91 127); default all five, as often as in DR17."""
    jobs: int = 1
    """Number of processes; 0 starts one per CPU."""
    depth: float = 1.0
    """Exposure time relative to the survey's; noise is proportional to 1/sqrt(depth)."""
    deep_labels: bool = False
    """Measure MAPS at the survey's depth and give only the cubes the noise of --depth."""
    metallicity_relation: float = 0.0
    """Correlation (-1 to 1) of metallicity with surface brightness and rotation; 0 for none."""
    from_maps: Path | None = None
    """Real MAPS file (22 or 35 channels) whose LOGCUBE to re-synthesise, instead of a survey."""


def _check_depth(depth: float) -> None:
    """Raise a DataError unless a depth is positive."""
    if not depth > 0:
        raise DataError(f"--depth {depth:g}: expected a number above 0, 1 for the survey's depth.")


def simulate_survey(config: MockConfig) -> dict[str, str]:
    """Simulate the galaxies of a survey that are missing, then write the catalogue.

    Returns "written", "up to date" or "failed" by plateifu.
    """
    _check_depth(config.depth)
    if config.n_galaxies < 1:
        raise DataError(f"--n-galaxies {config.n_galaxies}: expected 1 or more.")
    unknown = sorted(set(config.bundles) - BUNDLES.keys())
    if unknown:
        sizes = ", ".join(map(str, BUNDLES))
        raise DataError(f"--bundles {unknown[0]}: no such bundle size. Expected some of {sizes}.")
    if abs(config.metallicity_relation) > 1:
        raise DataError(
            f"--metallicity-relation {config.metallicity_relation:g}: expected a correlation "
            "from -1 to 1."
        )
    root = utils.data_dir(config.data_dir)
    drawn = (
        draw_params(config.seed, i, config.bundles, config.metallicity_relation)
        for i in range(config.n_galaxies)
    )
    galaxies = [replace(p, depth=config.depth, deep_labels=config.deep_labels) for p in drawn]
    return simulate(root, galaxies, config.jobs, config.overwrite)


def main(config: MockConfig) -> int:
    """Simulate a survey, or re-synthesise one real galaxy; return the exit code."""
    root = utils.data_dir(config.data_dir)
    _check_depth(config.depth)
    if config.from_maps is not None:
        from mock.from_maps import resynthesise

        for path in resynthesise(
            root, config.from_maps, config.seed, config.overwrite, config.depth
        ):
            log.info("%s", path)
        return utils.EXIT_DONE
    return loops.report(simulate_survey(config), "simulate", root / "raw")


if __name__ == "__main__":
    utils.run_command(main, MockConfig, __doc__)
