"""Process a whole set of galaxies: cubes, labels, the split CSVs and, on request, patches.

Does the work of process_single_cube.py for every galaxy, in parallel. A galaxy that fails is listed
in processed/failed.csv and the loop continues; running it again does only what is missing.

Reads   raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-<daptype>.fits.gz
Writes  processed/cubes, processed/labels, processed/patches (see process_single_cube.py),
        splits/hard_<label_task>/{train,val,test}.csv unless --no-splits or --shard is given.

    python cube_processing.py --data-dir data/manga --jobs 8
    python cube_processing.py --galaxy-list galaxies.txt --shard 3/100      # one of a job array
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import utils
from utils import DataError

import create_data_splits
import loops
import process_single_cube as single
from cube_patch_processing import stats_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config(single.GalaxyOptions, loops.GalaxyChoice):
    """Process a whole set of galaxies."""

    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else that of the run --like-run, else ./data/manga."""
    splits: bool = True
    """At the end, create a split by whole galaxies, splits/hard_<label_task>, for each label task
    that has none (options: create_data_splits.py)."""
    seed: int = 0
    """Random seed of that split."""


def create_splits(root: Path, config: Config, code: int) -> None:
    """Create the split of each label task that has none; none after failures (exit code `code`)."""
    if code != utils.EXIT_DONE:
        log.warning(
            "no split is created while galaxies fail: run this again, or create_data_splits.py"
        )
        return
    for task in config.label_tasks:
        name = utils.default_split(task)
        if all(utils.split_path(root, name, part).is_file() for part in utils.SPLIT_PARTS):
            log.info(
                f"split {name} exists and is kept (models may have learned from it); replace it "
                f"with create_data_splits.py --label-task {task} --overwrite"
            )
            continue
        try:
            split = create_data_splits.Config(task, data_dir=root, seed=config.seed)
            create_data_splits.main(replace(split, skip_critical=config.skip_critical))
        except DataError as error:  # too few galaxies are worth processing all the same
            log.warning("no split %s: %s", name, error)


def main(config: Config) -> int:
    """Process all chosen galaxies, split them, and cut their patches if asked to."""
    root, config = single.data_dir_for(config, config.data_dir), single.vetted(config)
    kind = "MAPS" if config.labels_only else "LOGCUBE"
    cubes = (root / "raw").glob(f"*/*/manga-*-{kind}*.fits*")
    galaxies = loops.chosen_galaxies(config, sorted({utils.plateifu_of(path) for path in cubes}))
    work = partial(single.process_galaxy, root=root, options=config, overwrite=config.overwrite)
    stats_for(root, config)  # missing ones are reported before the work, not after
    failed_csv = loops.failed_path(root / "processed", config.shard)
    outcome = loops.for_each_galaxy(work, galaxies, "cubes", failed_csv, config.jobs)
    code = loops.report(outcome, "cubes", root / "processed")
    if config.splits and not config.shard:
        create_splits(root, config, code)
    done = [name for name, word in outcome.items() if word in ("written", "up to date")]
    again = {"overwrite": config.overwrite, "jobs": config.jobs, "shard": config.shard}
    return max(code, single.cut_patches(root, config, done, **again))


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
