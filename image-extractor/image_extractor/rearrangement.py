"""Rearrange the events of a finished data set: shuffle them, split them into parts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import tables

from . import layout

log = logging.getLogger(__name__)
BLOCK = 10  # showers of similar energy, one of which is drawn for a part with a tenth of the events


def rearrange(
    path: Path,
    scratch: Path,
    seed: int,
    shuffle: bool,
    fractions: dict[str, float] | None,
    split_by: str,
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
        Part name -> fraction of the events (they must add up to 1).
    split_by : str
        "shower": all events of a shower go to one part, see `assign_showers`. "event": rows are
        drawn singly, as historically, so that parts share showers.
    stratify : bool
        With split_by "event", divide the rows of each primary in these fractions.

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
            index = layout.index_table(h5)
            names = list(fractions or [""])
            if fractions and split_by == "shower":
                part_of = assign_showers(index, fractions, np.random.default_rng(seed))
            rearranged = []
            for number, table in enumerate(list(layout.event_tables(h5))):
                rng = np.random.default_rng([seed, number])
                in_table = np.flatnonzero(index["group"] == number)
                if not fractions:
                    parts = [np.arange(in_table.size)]
                elif split_by == "shower":
                    parts = [np.flatnonzero(part_of[in_table] == k) for k in range(len(names))]
                else:
                    labels = index["primary_id"][in_table] * stratify
                    parts = list(assign(labels, fractions, rng).values())
                if shuffle:
                    parts = [rng.permutation(rows) for rows in parts]
                _rewrite(table, target, dict(zip(names, parts, strict=True)))
                for k, rows in enumerate(parts):
                    rearranged.append(index[in_table[rows]])
                    rearranged[-1]["part"] = k
            if len(index):
                target.get_node(layout.INDEX)[:] = np.concatenate(rearranged)
            _warn_of_empty_parts(rearranged, fractions or {})
            root = target.root._v_attrs
            root.parts = json.dumps([layout.part_name(name) for name in names])
            if shuffle:
                root.shuffle_seed = seed
            if fractions:
                root.split = json.dumps(
                    {"fractions": fractions, "by": split_by, "seed": seed, "stratify": stratify}
                )
        finally:
            if not is_mapped:
                target.close()
    if not is_mapped:
        scratch.replace(path)


def _warn_of_empty_parts(tables_of_parts: list[np.ndarray], fractions: dict[str, float]) -> None:
    index = np.concatenate([np.zeros(0, layout.INDEX_DTYPE), *tables_of_parts])
    counts = np.bincount(index["part"], minlength=len(fractions))
    for (name, fraction), n in zip(fractions.items(), counts, strict=False):
        if fraction > 0 and not n:
            log.warning(
                "%s has no event: there are only %d events, of %d showers.",
                layout.part_name(name),
                len(index),
                np.unique(index["shower"]).size,
            )


def assign_showers(
    index: np.ndarray, fractions: dict[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Draw a part for each shower: all events of a shower go to the same.

    The showers of each primary are taken in order of energy, in random order within blocks of
    BLOCK; each goes to the part that lacks most events. Thus every part has its fraction of each
    primary and energy range, to within the events of one shower.

    Parameters
    ----------
    index : (n,) array of INDEX_DTYPE

    Returns
    -------
    (n,) int array
        Position of each event's part in `fractions`.
    """
    _, first, shower, uses = np.unique(
        index["shower"], return_index=True, return_inverse=True, return_counts=True
    )
    share = np.array(list(fractions.values())) / sum(fractions.values())
    part = np.zeros(first.size, np.int64)
    primary, energy = index["primary_id"][first], index["mc_energy"][first]
    for value in np.unique(primary):
        members = np.flatnonzero(primary == value)
        members = members[np.argsort(energy[members], kind="stable")]
        order = np.lexsort((rng.random(members.size), np.arange(members.size) // BLOCK))
        given, total = np.zeros(share.size), 0
        for i in members[order].tolist():
            total += int(uses[i])
            part[i] = np.argmax(share * total - given)
            given[part[i]] += uses[i]
    return part[shower]


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
            layout.part_name(name) if name else "Events_rearranged",
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
