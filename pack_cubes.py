"""Pack the normalised cubes of a split into one memory-mapped file.

Training with --source packed does this itself where it is needed; on a cluster it is better done
before, by many cores, than while a GPU waits.

Reads   splits/<split_dir>/{train,val,test}.csv, processed/cubes; for the norm PCA also stats.h5.
Writes  processed/packed/<split_dir>/<patch_norm>_<dtype>.h5: the usable spectra of the galaxies
        of the training and validation parts, one a row. Layout: docs/data_formats.md#packed-cubes.

    python pack_cubes.py --split-dir hard_logOH --patch-norm PCA --jobs 16
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import data_fns
import data_io
import utils

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Pack the normalised cubes of a split into one memory-mapped file."""

    split_dir: str
    """Split whose galaxies are packed."""
    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else ./data/manga."""
    patch_norm: utils.PatchNorm = "global"
    """Normalisation of the spectra."""
    packed_type: data_fns.PackedType = "float16"
    """Numbers in the file."""
    jobs: int = 0
    """Processes; 0 takes one a CPU."""
    overwrite: bool = False
    """Pack anew, also where the file there would serve."""
    debug: bool = False
    """Show tracebacks."""


def main(config: Config) -> int:
    """Pack a split."""
    root = utils.data_dir(config.data_dir)
    tables, _ = data_io.read_split(utils.split_path(root, config.split_dir))
    galaxies = pd.concat([tables[p]["plateifu"] for p in ("train", "val")]).unique().tolist()
    store = data_fns.open_packed(
        root,
        config.split_dir,
        config.patch_norm,
        galaxies,
        config.packed_type,
        config.jobs or utils.cpu_count(),
        config.overwrite,
    )
    spectra = store.packed.spectra
    log.info(
        "%d galaxies, %d spectra of %d %s values, %.2f GB: %s",
        len(store.packed.rows),
        len(spectra) - 1,
        spectra.shape[1],
        spectra.dtype,
        spectra.nbytes / 1e9,
        store.path,
    )
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
