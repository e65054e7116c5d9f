"""What the network learns of metallicities where emission lines are missing.

Trains the default network on cubes in which the bins around some lines are gaps, as if the detector
were bad there, and evaluates it on whole galaxies that were held out. The labels stay the same, so
what is lost says what only those lines tell.

Reads   a data folder: cubes, labels of metallicity, a split by galaxies.
Writes  --work-dir: for each group of lines a data folder with the cubes that lack them, and a run;
        results/mask-lines/table.json. Finished runs are kept, so the same command continues.

    python benchmarks/mask_lines.py --data-dir data/demo --work-dir work
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measuring
import utils
from utils import DataError

import numpy as np

import data_io
import eval_fns
import evidence
import run_folder
import run_SSFTT_training


@dataclass(frozen=True)
class Config:
    """Train and evaluate the network without some emission lines."""

    work_dir: Path
    """Folder for the cubes and runs."""
    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else ./data/manga."""
    split_dir: str = "hard_logOH"
    """Split by galaxies, in the data folder."""
    without: tuple[str, ...] = ("", "NII", "Ha", "OIII", "NII+Ha", "NII+Ha+OIII")
    """Lines to leave out, by the beginnings of their names; an empty one leaves all in."""
    epochs: int | None = None
    """Epochs of each training; default as training."""
    seed: int = 0
    """Random seed of the trainings."""
    results: Path = measuring.ROOT / "results" / "mask-lines"
    """Folder of table.json."""
    debug: bool = False
    """Show the traceback of an error."""


def bins_of(wave: np.ndarray, lines: str) -> np.ndarray:
    """Find the bins of lines such as NII+Ha, by wavelength (band,) in Angstrom."""
    bins = []
    for begins in lines.split("+") if lines else ():
        found = [at for name, at in evidence.bins_of_lines(wave).items() if name.startswith(begins)]
        if not found:
            raise DataError(
                f"--without {lines}: no line in the cubes' range begins with {begins!r}, expected "
                f"some of {', '.join(evidence.bins_of_lines(wave))}. Choose other lines."
            )
        bins += found
    return np.concatenate(bins) if bins else np.zeros(0, int)


def make_cubes(root: Path, target: Path, lines: str, plateifus: list[str]) -> None:
    """Write cubes with gaps at some lines into another data folder, with the same labels."""
    for name in ("splits", "processed/labels"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if not (target / name).exists():
            (target / name).symlink_to((root / name).resolve())
    for plateifu in plateifus:
        path, source = utils.cube_path(target, plateifu), utils.cube_path(root, plateifu)
        recipe = data_io.read_cube_head(source).recipe
        recipe = replace(recipe, inputs={**recipe.inputs, "without": lines})
        if path.is_file() and data_io.read_cube_head(path).recipe == recipe:
            continue
        cube = data_io.read_cube(source, with_errors=True)
        assert cube.ivar is not None
        gaps = bins_of(cube.wave, lines)
        cube.flux[..., gaps], cube.ivar[..., gaps] = np.nan, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        data_io.write_cube(path, replace(cube, recipe=recipe))


def scores_without(config: Config, root: Path, lines: str) -> dict[str, Any]:
    """Train and evaluate without some lines; the scores of the test part."""
    folder = config.work_dir / (f"without-{lines}" if lines else "all-lines")
    run_dir = folder / "run"
    result = run_dir / "test" / run_folder.RESULT_FILE
    if not result.is_file():
        parts, _ = data_io.read_split(utils.split_path(root, config.split_dir))
        make_cubes(root, folder, lines, [p for part in parts.values() for p in part["plateifu"]])
        options = run_SSFTT_training.train_config(
            label_task="logOH", data_dir=folder, split_dir=config.split_dir, seed=config.seed,
            epochs=config.epochs, baselines=False, run_dir=run_dir, overwrite=True,
        )  # fmt: skip
        if run_SSFTT_training.main(options) != utils.EXIT_DONE:
            raise DataError(
                f"{run_dir}: stopped by a signal, expected the training to finish. "
                "Run the same command again; this training then starts from the beginning."
            )
        utils.setup_logging()  # no longer into the run's log file
        eval_fns.evaluate_split(run_dir, "test", folder)
    return json.loads(result.read_text())


def main(config: Config) -> int:
    """Train, evaluate, print and write."""
    root = utils.data_dir(config.data_dir)
    rows = [{"without": lines, **scores_without(config, root, lines)} for lines in config.without]
    print(f"{'without':<16}{'MAE (dex)':>10}{'95 %':>18}{'accuracy':>10}{'in intervals':>14}")
    for row in rows:
        low, high = row["intervals"]["mae_dex"]
        print(
            f"{row['without'] or '(all lines)':<16}{row['mae_dex']:>10.4f}"
            f"{f'{low:.4f} to {high:.4f}':>18}{row['accuracy']:>10.3f}"
            f"{row['coverage']['0.9']:>14.3f}"
        )
    print(f"{'(a constant)':<16}{rows[0]['constant_mae_dex']:>10.4f}")
    measuring.write_rows(config.results / "table.json", rows, config=utils.config_dict(config))
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
