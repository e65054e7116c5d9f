"""Write an HDF5 data set: add events and images, merge part files, check the finished file.

With compression gzip or none, chunks are compressed by igzip and passed to HDF5 as they are to be
stored, several times faster than through HDF5's own filter; any HDF5 reader opens them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tables
from isal import isal_zlib

from . import layout
from .config import differences, parse_config
from .cuts import event_keys
from .errors import DataError, UsageError
from .instrument import Telescope
from .mapping import Mapping
from .settings import Settings

ROWS_BUFFERED = 2048
GROWTH = 64  # images by which an array is enlarged at a time


class SeenEvents:
    """The events already written, by run and in ascending order of number, 12 bytes each."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[array[int], array[int]]] = {}

    def add(self, run_number: int, event_number: int, identity: int) -> tuple[bool, bool]:
        """Add an event: (whether it is new, whether another event has the same numbers)."""
        numbers, identities = self._runs.setdefault(run_number, (array("I"), array("Q")))
        if not numbers or event_number > numbers[-1]:
            numbers.append(event_number)
            identities.append(identity)
            return True, False
        start, end = bisect_left(numbers, event_number), bisect_right(numbers, event_number)
        if identity in identities[start:end]:
            return False, False
        numbers.insert(end, event_number)
        identities.insert(end, identity)
        return True, end > start


@dataclass
class _ImageArray:
    """An EArray of images and the number of rows in use; it is enlarged in steps."""

    node: tables.EArray
    rows: int

    def write(self, image: np.ndarray, compression: str) -> None:
        if compression in layout.DIRECT:
            self.write_raw(_chunk(image, compression, shuffle=True))
        else:
            self.node.append(image[np.newaxis])
            self.rows += 1

    def write_raw(self, chunk: bytes) -> None:
        if self.rows >= self.node.nrows:
            self.node.truncate(self.rows + GROWTH)
        self.node.write_chunk((self.rows,) + (0,) * (self.node.ndim - 1), chunk)
        self.rows += 1


@dataclass
class _Group:
    """The events and images of one group, /E{i} or the root."""

    path: str
    events: tables.Table
    rows: int
    images: dict[int, _ImageArray] = field(default_factory=dict)
    buffer: list[np.ndarray] = field(default_factory=list)


def _chunk(data: np.ndarray, compression: str, shuffle: bool) -> bytes:
    """Make a chunk as HDF5's shuffle and gzip filters (or none) would."""
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    if compression == "none":
        return raw.tobytes()
    if shuffle:
        raw = np.ascontiguousarray(raw.reshape(-1, data.dtype.itemsize).T)
    return isal_zlib.compress(raw, 1)


class Writer:
    """Write events to a new data set, or append them to an existing one.

    Parameters
    ----------
    path : Path
        Created; if it exists, appended to.
    settings : Settings
    telescopes : list of Telescope
        The selected ones, in the order of tel_map.
    mappings : dict
        Telescope id -> Mapping.
    compression : str
        One of layout.COMPRESSIONS; an existing file keeps its own.
    direction : (float, float)
        Pointing (azimuth, altitude) of the first run, rad.
    attributes : dict
        Further root attributes, see `layout.create`.

    Raises
    ------
    DataError
        If the existing file has another layout, array or configuration.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        telescopes: list[Telescope],
        mappings: dict[int, Mapping],
        compression: str,
        direction: tuple[float, float],
        attributes: dict[str, Any],
    ) -> None:
        self.settings = settings
        self.dtype = layout.events_dtype(telescopes, mappings, settings)
        self._set_up([t.tel_id for t in telescopes], layout.array_identity(telescopes))
        self._has_dictionary = attributes["energy_bin_source"] == "dictionary"
        is_new = not path.exists()
        self.is_changed = is_new  # whether anything was added
        self.compression = compression
        try:
            self._h5 = tables.open_file(str(path), "w" if is_new else "a")
        except tables.HDF5ExtError as error:
            raise DataError(
                "the existing output is not an HDF5 file, so nothing can be appended to it. "
                "Give another output, or --overwrite."
            ) from error
        try:
            if is_new:
                layout.create(
                    self._h5, settings, telescopes, mappings, compression, direction, attributes
                )
            else:
                self._check_existing(attributes)
                self._take_over()
            self._open_groups()
        except BaseException:
            self._h5.close()
            raise

    @classmethod
    def of_file(cls, path: Path) -> Writer:
        """Append to a data set as it is, without a description of its telescopes."""
        self = cls.__new__(cls)
        self._h5 = tables.open_file(str(path), "a")
        attrs = layout.check_schema(self._h5)
        self.settings = parse_config(str(attrs["config"]), f"{path}: attribute config")
        self.dtype = next(layout.event_tables(self._h5)).dtype
        tel_ids = layout.tel_table(self._h5)["tel_id"].tolist()
        self._set_up(tel_ids, json.loads(str(attrs["array"])))
        self._has_dictionary, self.is_changed = False, True
        self._take_over()
        self._open_groups()
        return self

    def _set_up(self, tel_ids: list[int], identity: list[list[Any]]) -> None:
        """Begin with no event."""
        self.slots = {tel_id: slot for slot, tel_id in enumerate(tel_ids)}
        self.is_mapped = self.settings.storage_mode == "mapped"
        self.identity = identity
        self._seen = SeenEvents()
        self._looked_up = SeenEvents()  # those of this run that were chosen by a dictionary
        self.written = 0  # events in the file, including those from earlier runs
        self._blank = np.zeros(1, self.dtype)
        self._index: list[np.ndarray] = []
        self._listed: set[tuple[bytes, int, bytes]] = set()  # file, run, sha256 of Runs
        self.incomplete: set[int] = set()  # runs with an incomplete input file

    def _open_groups(self) -> None:
        self._n_runs = int(self._h5.get_node(layout.RUNS).nrows)
        self.groups = [self._open_group(p) for p in layout.group_paths(self.settings)]

    def _check_existing(self, attributes: dict[str, Any]) -> None:
        """Refuse a file whose events would not fit."""
        h5 = self._h5
        attrs = layout.check_schema(h5)
        if "split" in attrs:
            raise DataError(
                "the existing output was split into several tables, so nothing can be appended to "
                "it. Give another output, or --overwrite."
            )
        how = layout.difference(self.identity, json.loads(str(attrs["array"])))
        if how:
            raise DataError(
                f"another array than the output's: {how}. Give another output, or --overwrite."
            )
        theirs = parse_config(str(attrs["config"]), f"{h5.filename}: attribute config")
        if theirs != self.settings:
            raise DataError(
                "the existing output was written with another configuration (now "
                f"{'; '.join(differences(self.settings, theirs))}). "
                "Give another output, or --overwrite."
            )
        now, then = attributes["energy_bin_source"], str(attrs["energy_bin_source"])
        if now != then:
            raise DataError(
                f"the events of the existing output were chosen and binned by "
                f"{layout.BIN_SOURCES[then]}, these by {layout.BIN_SOURCES[now]}. "
                "Give another output, or --overwrite."
            )

    def _take_over(self) -> None:
        """Note which events and runs the file has, and its compression."""
        h5 = self._h5
        self.compression = str(layout.check_schema(h5)["compression"])
        for row in h5.get_node(layout.INDEX).iterrows():
            self._seen.add(int(row["run_number"]), int(row["event_number"]), int(row["identity"]))
            self.written += 1
        for run in layout.runs_table(h5):
            self._is_listed(run)

    def _open_group(self, path: str) -> _Group:
        prefix = "" if path == "/" else path
        events = self._h5.get_node(f"{prefix}/{layout.EVENTS}")
        group = _Group(path, events, int(events.nrows))
        if self.is_mapped:
            for tel_id in self.slots:
                node = self._h5.get_node(f"{prefix}/T{tel_id}")
                group.images[tel_id] = _ImageArray(node, int(node.nrows))
        return group

    def _is_new(self, run_number: int, event_number: int, identity: int) -> tuple[bool, bool]:
        """Note an event: (whether it is new, whether another one has its numbers)."""
        if self._has_dictionary and self._looked_up.add(run_number, event_number, identity)[1]:
            raise UsageError(
                f"run {run_number} event {event_number}: two different events have these numbers, "
                "by which the dictionary of bins and cuts lists them (expected one). Extract each "
                "production by a run of its own, with its own dictionary."
            )
        return self._seen.add(run_number, event_number, identity)

    def add(
        self, group_index: int, values: dict[str, Any], images: dict[int, np.ndarray], content: int
    ) -> tuple[bool, bool]:
        """Write one event and its images, unless it is in the output already.

        Parameters
        ----------
        group_index : int
            Energy bin (gh_class) or 0.
        values : dict
            Column -> value, without tel_map, trig_list and images.
        images : dict
            Telescope id -> stored image, of `layout.image_shape` and the configured dtype.
        content : int
            CRC-32 of the telescopes' raw data.

        Returns
        -------
        bool, bool
            Whether it was written, and whether another event has the same run and event numbers.

        Raises
        ------
        UsageError
            If a dictionary lists one event, but two different events have its numbers.
        """
        group = self.groups[group_index]
        row = self._blank if not self.is_mapped else np.zeros(1, self.dtype)
        for name, value in values.items():
            row[name] = value
        identity = layout.event_identity(row, content)
        is_new, is_other = self._is_new(values["run_number"], values["event_number"], identity)
        if not is_new:
            return is_new, is_other
        entry = np.zeros(1, layout.INDEX_DTYPE)
        for name in ("run_number", "event_number", "primary_id", "mc_energy"):
            entry[name] = row[name]
        entry["group"], entry["source"], entry["identity"] = group_index, self._n_runs, identity
        entry["shower"] = layout.shower_keys(row)
        by_slot = [(slot, images[t]) for t, slot in self.slots.items() if t in images]
        entry["checksum"] = layout.event_checksum(row[0], by_slot)
        if self.is_mapped:
            tel_map = row["tel_map"][0]
            tel_map[:] = -1
            for tel_id, image in images.items():
                stored = group.images[tel_id]
                tel_map[self.slots[tel_id]] = stored.rows
                stored.write(image, self.compression)
            group.buffer.append(row)
            if len(group.buffer) >= ROWS_BUFFERED:
                self._flush(group)
        else:
            row["trig_list"] = 0
            for tel_id, image in images.items():
                row["trig_list"][0, self.slots[tel_id]] = 1
                row[f"T{tel_id}"][0] = image
            if self.compression in layout.DIRECT:
                self._grow(group)
                # One row is one element: HDF5's shuffle leaves it as it is.
                group.events.write_chunk(
                    (group.rows,), _chunk(row, self.compression, shuffle=False)
                )
            else:
                group.events.append(row)
            group.rows += 1
            for tel_id in images:
                row[f"T{tel_id}"] = 0
        self._note(entry)
        return is_new, is_other

    def _grow(self, group: _Group) -> None:
        if group.rows >= group.events.nrows:
            group.events.truncate(group.rows + 1)

    def _note(self, entries: np.ndarray) -> None:
        self.written += len(entries)
        self._index.append(entries)
        if len(self._index) >= ROWS_BUFFERED:
            self._flush_index()

    def _flush(self, group: _Group) -> None:
        if group.buffer:
            group.events.append(np.concatenate(group.buffer))
            group.rows += len(group.buffer)
            group.buffer.clear()

    def _flush_index(self) -> None:
        if self._index:
            self._h5.get_node(layout.INDEX).append(np.concatenate(self._index))
            self._index.clear()

    def add_run(self, row: np.ndarray) -> None:
        """Append the row (1,) of one input file (RUNS_DTYPE), unless it adds nothing."""
        if not self._is_listed(row[0]) or row["events_written"][0]:
            self._h5.get_node(layout.RUNS).append(row)
            self._n_runs += 1
            self.is_changed = True

    def _is_listed(self, run: np.void) -> bool:
        """Whether Runs lists that file, as complete as now. Afterwards it counts as listed."""
        key = (bytes(run["file"]), int(run["run_number"]))
        was_listed = (*key, bytes(run["sha256"])) in self._listed
        self._listed |= {(*key, bytes(run["sha256"])), (*key, b"")}
        if not run["complete"]:
            self.incomplete.add(key[1])
        return was_listed

    def note_merge(self, names: list[str], command: str) -> None:
        """State in the attributes which data sets were merged, and how."""
        attrs = self._h5.root._v_attrs
        attrs.merged_from, attrs.merge_command = json.dumps(names), command

    def merge(self, part: Path) -> np.ndarray:
        """Append the new events of another data set, with the same settings and compression.

        Images are copied as compressed chunks. Each of its input files gets a row of Runs here.

        Returns
        -------
        (n_events, 2) bool array
            Which of the part's events were new, and which have the numbers of another event, in the
            order in which they were written.
        """
        with tables.open_file(str(part)) as source:
            index = layout.index_table(source)
            numbers = index[["run_number", "event_number", "identity"]].tolist()
            found = np.array([self._is_new(*n) for n in numbers], bool).reshape(-1, 2)
            keep = found[:, 0]
            for g, group in enumerate(self.groups):
                chosen = keep[index["group"] == g]
                prefix = "" if group.path == "/" else group.path
                events = source.get_node(f"{prefix}/{layout.EVENTS}")
                if self.is_mapped:
                    self._merge_mapped(group, source, prefix, events, chosen)
                else:
                    for i in np.flatnonzero(chosen):
                        self._grow(group)
                        group.events.write_chunk((group.rows,), events.read_chunk((int(i),)))
                        group.rows += 1
            runs, sources = layout.runs_table(source), index["source"].copy()
        for number in range(len(runs)):
            run, mine = runs[number : number + 1], sources == number
            index["source"][mine] = self._n_runs
            run["duplicates"] += np.uint32((mine & ~keep).sum())
            run["events_written"] = (mine & keep).sum()
            self.add_run(run)
        self._note(index[keep])
        return found

    def _merge_mapped(
        self,
        group: _Group,
        source: tables.File,
        prefix: str,
        events: tables.Table,
        chosen: np.ndarray,
    ) -> None:
        self._flush(group)
        for start in range(0, int(events.nrows), ROWS_BUFFERED):
            rows = events.read(start, start + ROWS_BUFFERED)[chosen[start : start + ROWS_BUFFERED]]
            tel_map = rows["tel_map"]
            for tel_id, slot in self.slots.items():
                images = group.images[tel_id]
                node = source.get_node(f"{prefix}/T{tel_id}")
                tail = (0,) * (node.ndim - 1)
                for r in np.flatnonzero(tel_map[:, slot] >= 0):
                    chunk = node.read_chunk((int(tel_map[r, slot]), *tail))
                    tel_map[r, slot] = images.rows
                    images.write_raw(chunk)
            group.events.append(rows)
            group.rows += len(rows)

    def close(self) -> None:
        """Write what is buffered and close the file."""
        if not self._h5.isopen:
            return
        try:
            for group in self.groups:
                self._flush(group)
                group.events.flush()
                for images in group.images.values():
                    if images.node.nrows != images.rows:
                        images.node.truncate(images.rows)
            self._flush_index()
            self._h5.root._v_attrs.modified_utc = datetime.datetime.now(datetime.UTC).isoformat(
                timespec="seconds"
            )
        finally:
            self._h5.close()

    def abandon(self) -> None:
        """Close the file as it is, to be removed."""
        if self._h5.isopen:
            # On a full disk closing fails, too.
            with contextlib.suppress(tables.HDF5ExtError, OSError):
                self._h5.close()


def verify(path: Path, n_events: int) -> None:
    """Read a closed file back: every chunk in the file, tables readable, counts right.

    Parameters
    ----------
    path : Path
    n_events : int
        Number of events that were written.

    Raises
    ------
    DataError
        If anything is missing.
    """
    size = path.stat().st_size
    try:
        with layout.open_layout(path) as h5:
            attrs = layout.check_schema(h5)
            index = layout.index_table(h5)
            layout.runs_table(h5)
            keys, images = [], 0
            for table in layout.event_tables(h5):
                if attrs["storage_mode"] == "all" and attrs["compression"] in layout.DIRECT:
                    images += int(table.nrows)
                    _verify_chunks(table, size)
                    continue
                for start in range(
                    0, int(table.nrows), batch := max(1, layout.BATCH_BYTES // table.rowsize)
                ):
                    rows = table.read(start, start + batch)
                    keys.append(event_keys(rows))
                    images += (
                        int((rows["tel_map"] >= 0).sum())
                        if "tel_map" in table.colnames
                        else len(rows)
                    )
            for node in h5.walk_nodes("/", "EArray"):
                images -= int(node.nrows)
                if attrs["compression"] in layout.DIRECT:
                    _verify_chunks(node, size)
                else:
                    for row in range(int(node.nrows)):
                        node[row]
            expected = np.sort(event_keys(index))
            found = np.sort(np.concatenate([np.zeros(0, np.uint64), *keys]))
            is_whole = len(index) == n_events and (not keys or np.array_equal(found, expected))
            is_whole &= images == (n_events if attrs["storage_mode"] == "all" else 0)
    except (tables.HDF5ExtError, tables.NoSuchNodeError, OSError, DataError, KeyError):
        is_whole = False
    if not is_whole:
        raise DataError(
            "the written data cannot be read back completely. Check the free space and the quota."
        )


def _verify_chunks(node: tables.Leaf, size: int) -> None:
    tail = (0,) * (node.ndim - 1)
    for row in range(int(node.nrows)):
        info = node.chunk_info((row, *tail))
        if info.offset is None or info.offset + info.size > size:
            raise OSError
