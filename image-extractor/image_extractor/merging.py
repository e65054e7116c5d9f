"""Merge data sets, e.g. the outputs of parallel jobs; also split or shuffle one that exists.

Reads   data sets with equal array, configuration and compression, none of them split.
Writes  one data set with the events of all, each event once, and the Runs of all.

Rows and compressed images are copied one by one, so that memory does not grow with the data, except
for the index, 60 bytes per event.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import layout
from .config import differences, parse_config
from .errors import DataError
from .finishing import finish
from .transaction import OutputTransaction, cannot_write
from .writer import Writer


def merge(
    inputs: list[Path],
    output: Path,
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int], Any] | None = None,
    **arrangement: Any,
) -> list[tuple[int, int, int]]:
    """Merge data sets.

    Parameters
    ----------
    inputs : list of Path
        The first determines the attributes of the output.
    overwrite : bool
        Replace an existing output.
    progress : callable, optional
        Called with the number of events of each input.
    **arrangement
        Options of `finishing.finish`: shuffle, split, split_by, stratify, seed.

    Returns
    -------
    list of (int, int, int)
        Of each input: events; those that an earlier input has, too, and which are left out; those
        beside another event with the same run and event numbers.

    Raises
    ------
    DataError
        If an input does not fit to the first or was split, or the output exists.
    """
    if output.exists() and not overwrite:
        raise DataError(
            f"{output}: exists (expected a new file). Give another output, or --overwrite."
        )
    first = _described(inputs[0])
    for path in inputs[1:]:
        _check_fits(path, _described(path), inputs[0], first)
    transaction = OutputTransaction(output, append=False)
    writer, counts = None, []
    try:
        try:
            shutil.copyfile(inputs[0], transaction.path)
        except OSError as error:
            raise DataError(cannot_write(output, error)) from error
        writer = Writer.of_file(transaction.path)
        for number, path in enumerate(inputs):
            if number:
                found = writer.merge(path)
                n, is_new, is_other = len(found), found[:, 0], found[:, 1]
                counts.append((n, int((~is_new).sum()), int(is_other.sum())))
            else:
                counts.append((writer.written, 0, 0))
            if progress:
                progress(counts[-1][0])
        writer.note_merge([path.name for path in inputs], command)
        finish(writer, transaction, **arrangement)
    finally:
        if writer is not None:
            writer.abandon()
        transaction.close()
    return counts


def _described(path: Path) -> dict[str, Any]:
    """Root attributes of an input that is not split."""
    with layout.open_layout(path) as h5:
        attrs = layout.check_schema(h5)
    if "split" in attrs:
        raise DataError(
            f"{path}: was split into several tables (expected one). Merge data sets before they "
            "are split: extract this one again without --split."
        )
    return attrs


def _check_fits(path: Path, ours: dict[str, Any], first: Path, theirs: dict[str, Any]) -> None:
    how = layout.difference(json.loads(str(ours["array"])), json.loads(str(theirs["array"])))
    if how:
        raise DataError(
            f"{path}: has another array than {first}: {how} (expected the same). Leave it out."
        )
    settings = [
        parse_config(str(a["config"]), f"{p}: attribute config")
        for p, a in ((path, ours), (first, theirs))
    ]
    what = differences(*settings) if settings[0] != settings[1] else []
    for name in ("energy_bin_source", "compression"):
        if ours[name] != theirs[name]:
            what.append(f"{name} = {ours[name]}, not {theirs[name]}")
    if what:
        raise DataError(
            f"{path}: was written with other settings than {first} ({'; '.join(what)}). Extract "
            "both with one configuration."
        )
