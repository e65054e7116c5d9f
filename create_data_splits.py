"""Split galaxies into training, validation and test parts: whole galaxies, by mangaid.

A galaxy observed twice keeps both observations in one part. The parts are stratified: galaxies are
sorted by their mean label, and each part takes its share evenly along that order.

Reads   processed/labels/<label_task>/*.npy (and the .json beside each).
Writes  splits/<split_dir>/{train,val,test}.csv: plateifu, mangaid, n_labelled, mean_label, the
        count of each class, the digest of the label map; seed and options in the header.

    python create_data_splits.py --label-task logOH --fractions 0.7 0.15 0.15 --seed 0
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import utils
from utils import DataError, LabelTask

import numpy as np
import pandas as pd

import data_io
import loops
from labels import LABEL_NONE, class_names, label_classes
from recipe import DIGEST_LENGTH, Recipe, digest_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config(utils.CommandOptions):
    """Split galaxies into training, validation and test parts."""

    label_task: LabelTask = "logOH"
    """Labels to stratify by."""
    split_dir: str | None = None
    """Name of the split; default hard_<label_task>."""
    galaxy_list: Path | None = None
    """File with the galaxies to split, one plateifu per line, or a CSV with a column plateifu;
    default all that have labels."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Fractions of training, validation and test."""
    min_labelled: int = 20
    """Leave out galaxies with fewer labelled spaxels."""
    skip_critical: bool = False
    """Leave out galaxies whose quality flag DRP3QUAL or DAPQUAL says CRITICAL."""
    seed: int = 0
    """Random seed."""


def labelled_galaxies(
    root: Path,
    label_task: str,
    min_labelled: int,
    skip_critical: bool = False,
    galaxy_list: Path | None = None,
) -> pd.DataFrame:
    """List the observed galaxies with enough labels, without CRITICAL ones on request.

    One row per observation (plateifu) of all galaxies, or of those listed in a file.

    Returns
    -------
    DataFrame
        plateifu, mangaid, n_labelled, mean_label (12+log(O/H), or the mean BPT class), and
        class_<k> counts (6-class scale for logOH) and label_digest, sorted by plateifu.
    """
    paths = utils.label_maps(root, label_task)
    if galaxy_list is not None:
        listed = set(loops.read_galaxy_list(galaxy_list))
        paths = [path for path in paths if path.stem in listed]
    if not paths:
        raise DataError(
            f"{root}: no label maps of {label_task}"
            + (f" for the galaxies of {galaxy_list}" if galaxy_list else "")
            + ". Expected some; create them with cube_processing.py."
        )
    n_classes = len(class_names(label_task))
    rows, most = [], 0
    for path in paths:
        labels = data_io.read_labels(path)
        classes = label_classes(labels, label_task)
        has_label = classes != LABEL_NONE
        count = int(has_label.sum())
        most = max(most, count)
        about = data_io.read_label_meta(path)
        if count < max(min_labelled, 1) or (skip_critical and about.get("critical")):
            continue
        plateifu = utils.plateifu_of(path)
        counts = np.bincount(classes[has_label], minlength=n_classes)
        rows.append(
            {
                "plateifu": plateifu,
                "mangaid": about.get("mangaid") or plateifu,
                "n_labelled": count,
                "mean_label": round(float(labels[has_label].mean(dtype=float)), 4),
                **{f"class_{k}": int(c) for k, c in enumerate(counts)},
                "label_digest": digest_of(labels)[:DIGEST_LENGTH],
            }
        )
    if not rows:
        raise DataError(
            f"{paths[0].parent}: none of {len(paths)} label maps has {min_labelled} "
            f"labelled spaxels, at most {most}. Lower --min-labelled, or look at the label maps."
        )
    if left_out := len(paths) - len(rows):
        why = " or CRITICAL" if skip_critical else ""
        share = f"{left_out} of {utils.counted(len(paths), 'observation')}"
        log.info(f"{share} left out: fewer than {min_labelled} labelled spaxels{why}")
    return pd.DataFrame(rows)


def check_options(config: Config, kind: str) -> Path:
    """Check options before anything is read; return the folder of the "hard" or "easy" split."""
    if min(config.fractions) <= 0 or abs(sum(config.fractions) - 1) > 1e-6:
        numbers = " ".join(map(str, config.fractions))
        raise DataError(f"--fractions {numbers}: expected three positive numbers summing to 1.")
    if config.min_labelled < 1:
        raise DataError(f"--min-labelled {config.min_labelled}: expected 1 or more.")
    split_dir = config.split_dir or f"{kind}_{config.label_task}"
    return utils.split_path(utils.data_dir(config.data_dir), split_dir)


def split_galaxies(
    galaxies: pd.DataFrame, fractions: tuple[float, float, float], seed: int
) -> dict[str, pd.DataFrame]:
    """Distribute whole galaxies (with plateifu, mangaid and mean_label) over the parts.

    Returns
    -------
    dict of part -> DataFrame
        Disjoint in mangaid. Each part's number of galaxies is within one of its share.
    """
    rng = np.random.default_rng(seed)
    means = galaxies.groupby("mangaid")["mean_label"].mean()
    if len(means) < 3:
        raise DataError(
            f"{utils.counted(len(means), 'galaxy', 'galaxies')}: expected at least 3, one for each "
            "part. Process more."
        )
    order = means.index[np.lexsort((rng.random(len(means)), means.to_numpy()))]
    part_of = dict(zip(order, _interleave(len(order), fractions, rng), strict=True))
    assigned = galaxies["mangaid"].map(part_of)
    return {
        name: galaxies[assigned == i].sort_values("plateifu").reset_index(drop=True)
        for i, name in enumerate(utils.SPLIT_PARTS)
    }


def _interleave(n: int, fractions: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Assign a part to each of n sorted galaxies, every part evenly spread over the order."""
    counts = np.maximum(np.round(np.array(fractions) * n).astype(int), 1)
    counts[0] = n - counts[1:].sum()
    if counts[0] < 1:
        raise DataError(
            f"--fractions {fractions}: no galaxy of {n} is left for training. Choose other "
            "fractions, or process more galaxies."
        )
    position = [(np.arange(c) + rng.random(c)) / c for c in counts]  # jittered, one per stratum
    part = np.repeat(np.arange(len(fractions)), counts)
    return part[np.argsort(np.concatenate(position), kind="stable")]


def write_checked(
    config: Config,
    kind: str,
    folder: Path,
    galaxies: pd.DataFrame,
    parts: dict[str, pd.DataFrame],
    warning: str = "",
) -> None:
    """Write a "hard" or "easy" split unless it is there already; log what each part holds.

    The recipe holds the options and the label maps of `galaxies` (from `labelled_galaxies`).
    Another split of this name is replaced only with --overwrite.
    """
    names = ("label_task", "fractions", "min_labelled", "skip_critical", "seed")
    options = {"kind": kind, **{name: getattr(config, name) for name in names}}
    maps = galaxies[["plateifu", "mangaid", "label_digest"]].to_numpy().tolist()
    recipe = Recipe("split", data_io.SPLIT_VERSION, options, {"set of label maps": digest_of(maps)})
    if not config.overwrite and all((folder / f"{part}.csv").is_file() for part in parts):
        recipe.require(data_io.read_split(folder)[1], folder, "Replace it with --overwrite")
        log.info("Split: %s, up to date", folder)
        return
    data_io.write_split(folder, parts, recipe, warning)
    for name, table in parts.items():
        spaxels = int(table["n_labelled"].sum()) if "n_labelled" in table else len(table)
        count = table["mangaid"].nunique()
        log.info(f"{folder.name}/{name}: {count} galaxies, {spaxels} labelled spaxels")
    log.info("Split: %s", folder)


def main(config: Config) -> int:
    """Write the split."""
    folder = check_options(config, "hard")
    root, task = utils.data_dir(config.data_dir), config.label_task
    cuts = config.min_labelled, config.skip_critical, config.galaxy_list
    galaxies = labelled_galaxies(root, task, *cuts)
    parts = split_galaxies(galaxies, config.fractions, config.seed)
    write_checked(config, "hard", folder, galaxies, parts)
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
