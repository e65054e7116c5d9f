"""Rearrange the events of a finished data set: shuffle them, split them into parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tables

from . import layout


def rearrange(
    path: Path,
    scratch: Path,
    seed: int,
    shuffle: bool,
    fractions: dict[str, float] | None,
    stratify: bool,
) -> None:
    """Shuffle and split every Events table of a file; every row is kept.

    Parameters
    ----------
    path : Path
        A closed file of this layout, replaced in place.
    scratch : Path
        Temporary path for the new file.
    seed : int
        The same seed gives the same file the same order.
    shuffle : bool
        Put rows in random order. Otherwise each part keeps the order of the file.
    fractions : dict, optional
        Part name -> fraction of the rows (they must add up to 1); rows are drawn at random.
    stratify : bool
        Divide the rows of each gamma_hadron_label in these fractions.

    Notes
    -----
    `mapped`: only the Events tables are rewritten, the image arrays stay as they are. `all`: rows
    are copied as compressed chunks to a second file, so that the data need twice their space until
    it replaces the first.
    """
    with tables.open_file(str(path), "a") as h5:
        attrs = layout.check_schema(h5)
        is_mapped = attrs["storage_mode"] == "mapped"
        target = h5 if is_mapped else tables.open_file(str(scratch), "w")
        try:
            if not is_mapped:
                _copy_all_but_events(h5, target)
            for number, table in enumerate(list(layout.event_tables(h5))):
                rng = np.random.default_rng([seed, number])
                labels = _labels(table) if stratify else np.zeros(int(table.nrows), np.uint8)
                parts = (
                    assign(labels, fractions, rng)
                    if fractions
                    else {"": np.arange(int(table.nrows))}
                )
                if shuffle:
                    parts = {name: rng.permutation(rows) for name, rows in parts.items()}
                _rewrite(table, target, parts)
            root = target.root._v_attrs
            if shuffle:
                root.shuffle_seed = seed
            if fractions:
                root.split = json.dumps(
                    {"fractions": fractions, "seed": seed, "stratify": stratify}
                )
        finally:
            if not is_mapped:
                target.close()
    if not is_mapped:
        scratch.replace(path)


def _labels(table: tables.Table) -> np.ndarray:
    if table.chunkshape[0] > 1:
        return table.col("gamma_hadron_label")
    rows = range(int(table.nrows))  # one at a time: each holds its images
    return np.array([table.read(i, i + 1)["gamma_hadron_label"][0] for i in rows], np.uint8)


def assign(
    labels: np.ndarray, fractions: dict[str, float], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw rows for each part; every row goes to exactly one.

    Parameters
    ----------
    labels : (n,) array
        The rows of each value are divided in the given fractions, to within one row.

    Returns
    -------
    dict
        Part name -> sorted row numbers.
    """
    names = list(fractions)
    share = np.array([fractions[n] for n in names], np.float64)
    chosen: dict[str, list[np.ndarray]] = {n: [] for n in names}
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        exact = share / share.sum() * rows.size
        counts = np.floor(exact + 1e-9).astype(int)
        # Rows left over by rounding down go to the parts with the largest remainders.
        for i in np.argsort(counts - exact, kind="stable")[: rows.size - counts.sum()]:
            counts[i] += 1
        for name, piece in zip(names, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            chosen[name].append(piece)
    empty = np.zeros(0, np.int64)
    return {n: np.sort(np.concatenate([empty, *pieces])) for n, pieces in chosen.items()}


def _rewrite(table: tables.Table, target: tables.File, parts: dict[str, np.ndarray]) -> None:
    """Write the rows of a table to one table per part, in the given order."""
    group = table._v_parent._v_pathname
    new = []
    for name, rows in parts.items():
        node = target.create_table(
            group,
            f"{layout.EVENTS}_{name}" if name else "Events_rearranged",
            table.description,
            filters=table.filters,
            chunkshape=table.chunkshape,
        )
        node.attrs.units = table.attrs.units
        new.append((name, node))
        if table.chunkshape[0] == 1:
            node.truncate(len(rows))
            for i, row in enumerate(rows.tolist()):
                node.write_chunk((i,), table.read_chunk((row,)))
            continue
        batch = max(1, layout.BATCH_BYTES // table.rowsize)
        for start in range(0, len(rows), batch):
            wanted = rows[start : start + batch]
            order = np.argsort(wanted, kind="stable")
            values = np.empty(len(wanted), table.dtype)
            values[order] = table.read_coordinates(wanted[order])
            node.append(values)
        node.flush()
    if target is table._v_file:
        table.remove()
    for name, node in new:
        if not name:
            node.rename(layout.EVENTS)


def _copy_all_but_events(source: tables.File, target: tables.File) -> None:
    """Copy attributes, groups, Tel_Table and Metadata."""
    source.root._v_attrs._f_copy(target.root)
    for node in source.root._f_iter_nodes():
        if node._v_pathname == layout.TEL_TABLE:
            node.copy(target.root)
        elif node._v_pathname == layout.METADATA:
            node._f_copy(target.root, recursive=True)
        elif isinstance(node, tables.Group):
            copy = target.create_group("/", node._v_name)
            node._v_attrs._f_copy(copy)
