"""Finish a data set: shuffle and split it, give it checksums, read it back, put it in place.

Every command that writes a data set ends here, so that all outputs are equally complete.
"""

from __future__ import annotations

import tables

from . import layout
from .errors import DataError
from .rearrangement import rearrange
from .transaction import OutputTransaction
from .writer import Writer, verify


def finish(
    writer: Writer,
    transaction: OutputTransaction,
    shuffle: bool = False,
    split: dict[str, float] | None = None,
    split_by: str = "shower",
    stratify: bool = False,
    seed: int = 0,
) -> None:
    """Close a writer and make its file the output of the transaction.

    The options are those of `rearrangement.rearrange`.

    Raises
    ------
    DataError
        If the file cannot be read back; the output then stays as it was.
    """
    writer.close()
    if shuffle or split:
        rearrange(
            transaction.path, transaction.part("sorted"), seed, shuffle, split, split_by, stratify
        )
    with tables.open_file(str(transaction.path), "a") as h5:
        layout.seal(h5)
    try:
        verify(transaction.path, writer.written)
    except DataError as error:
        raise DataError(f"{transaction.output}: could not be written: {error}") from error
    transaction.commit()
