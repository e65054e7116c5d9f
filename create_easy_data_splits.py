"""Split spaxels, not galaxies: patches of one galaxy are in training AND in test.

FOR COMPARISON ONLY. Neighbouring spaxels share light (the seeing mixes them) and patches overlap,
so a score on such a split measures how well a network remembers galaxies of the training part, not
how well it does on new ones. Use create_data_splits.py for anything you report.

Reads   processed/labels/<label_task>/*.npy.
Writes  splits/<split_dir>/{train,val,test}.csv: plateifu, mangaid, y, x, one row per spaxel.

    python create_easy_data_splits.py --label-task logOH
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import utils

import numpy as np
import pandas as pd

import create_data_splits as hard
import data_io
from labels import LABEL_NONE, label_classes

log = logging.getLogger(__name__)

WARNING = (
    "EASY split: patches of one galaxy are in training and in test. Scores on it are far above "
    "those on new galaxies; report those on a split of create_data_splits.py instead."
)


@dataclass(frozen=True)
class Config(hard.Config):
    """Split spaxels, not galaxies. For comparison only: no score on it applies to new galaxies."""

    split_dir: str | None = None
    """Name of the split; default easy_<label_task>."""


def easy_split(
    galaxies: pd.DataFrame,
    spaxels: Mapping[str, tuple[np.ndarray, ...]],
    fractions: tuple[float, float, float],
    seed: int,
) -> dict[str, pd.DataFrame]:
    """Distribute each galaxy's labelled spaxels, (ys, xs) by plateifu, over the parts at random.

    Returns a table by part: plateifu, mangaid, y, x.
    """
    rng = np.random.default_rng(seed)
    tables = []
    for plateifu, mangaid in galaxies[["plateifu", "mangaid"]].itertuples(index=False):
        ys, xs = spaxels[plateifu]
        ends = np.round(np.cumsum(fractions) * ys.size).astype(int)
        part = np.searchsorted(ends, rng.permutation(ys.size), side="right")
        names = {"plateifu": plateifu, "mangaid": mangaid}
        tables.append(pd.DataFrame({**names, "y": ys, "x": xs, "part": part}))
    whole = pd.concat(tables, ignore_index=True)
    return {
        name: whole[whole["part"] == i].drop(columns="part").reset_index(drop=True)
        for i, name in enumerate(utils.SPLIT_PARTS)
    }


def main(config: Config) -> int:
    """Write the split, with a warning."""
    folder = hard.check_options(config, "easy")
    root, task = utils.data_dir(config.data_dir), config.label_task
    cuts = config.min_labelled, config.skip_critical, config.galaxy_list
    galaxies = hard.labelled_galaxies(root, task, *cuts)
    spaxels = {}
    for plateifu in galaxies["plateifu"]:
        labels = data_io.read_labels(utils.label_path(root, task, plateifu))
        spaxels[plateifu] = np.nonzero(label_classes(labels, task) != LABEL_NONE)
    parts = easy_split(galaxies, spaxels, config.fractions, config.seed)
    hard.write_checked(config, "easy", folder, galaxies, parts, WARNING)
    log.warning(WARNING)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
