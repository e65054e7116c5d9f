"""Export a data set to ctapipe's DL1 format, which TableLoader and ctapipe's tools read.

Reads   HDF5 files written by image_extractor.py whose images have one cell per pixel.
Writes  an HDF5 file with images per pixel, true values, telescopes and runs; on request also the
        image parameters of ctapipe's ImageProcessor.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tables
from ctapipe.core import Provenance
from ctapipe.image import ImageProcessor
from ctapipe.io import DataWriter
from traitlets.config import Config

from .ctapipe_source import DatasetSource
from .errors import DataError
from .transaction import cannot_write, whole_file


def export(
    path: Path,
    output: Path,
    part: str | None = None,
    parameters: bool = False,
    picture_pe: float = 10.0,
    boundary_pe: float = 5.0,
    overwrite: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> int:
    """Write the events of a data set as ctapipe does; return their number.

    Parameters
    ----------
    part : str, optional
        Part of a split data set; by default all events.
    parameters : bool
        Clean the images and write their parameters (Hillas, leakage, concentration, timing,
        morphology) and cleaning masks.
    picture_pe, boundary_pe : float
        Thresholds of the cleaning; the defaults are ctapipe's.

    Raises
    ------
    DataError
        If pixels share cells, events cannot be told apart by their numbers, or the output exists.
    """
    if output.exists() and not overwrite:
        raise DataError(
            f"{output}: exists (expected a new file). Give another output, or --overwrite."
        )
    cleaning = {"picture_threshold_pe": picture_pe, "boundary_threshold_pe": boundary_pe}
    logging.getLogger("ctapipe").setLevel(logging.ERROR)  # of columns that are not filled
    n = 0
    Provenance().start_activity("image-extractor export")  # DataWriter records it
    try:
        with DatasetSource(path, part=part) as source, whole_file(output) as temporary:
            process = ImageProcessor(
                source.subarray, config=Config({"TailcutsImageCleaner": cleaning})
            )
            with (
                warnings.catch_warnings(),
                DataWriter(
                    source,
                    output_path=temporary,
                    overwrite=True,
                    write_dl1_images=True,
                    write_dl1_parameters=parameters,
                ) as write,
            ):
                warnings.simplefilter("ignore")  # PyTables', of names that are not identifiers
                for event in source:
                    if parameters:
                        process(event)
                    write(event)
                    n += 1
                    if progress:
                        progress(1)
    except (OSError, tables.HDF5ExtError) as error:
        raise DataError(cannot_write(output, error)) from error
    finally:
        Provenance().finish_activity("image-extractor export")
    return n
