"""The HDF5 layout: the one module that names groups, tables, columns and attributes.

    /                             attributes: schema, versions, config, units, array, split, ...
    /Tel_Table                    row i is slot i of tel_map and trig_list
    /E{i}/Events                  gh_class: a group an energy bin; energy_recon: /Events in the root
    /E{i}/T{tel_id}               mapped: images (row, x, y, channel) or (row, channel, x, y)
    /Metadata/Runs                an input file a row
    /Metadata/Event_Index         (run_number, event_number, group) of every event
    /Metadata/Cameras/{key}       pixels, and the matrix that made the images

Everything outside /Metadata is the historic layout, which plain PyTables code reads by name. What
differs: tel_id is u2 (u1 overflowed at 256), image arrays have the configured dtype (i2 wrapped at
327.67 p.e.), and new columns stand behind the old ones. Images are chunked one by one, so that
reading an event touches only its own bytes. With gzip the chunks are compressed by igzip and handed
to HDF5 ready made, several times faster than HDF5's own filter; any HDF5 reader opens them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tables
from isal import isal_zlib

from . import __version__
from .config import Settings, as_text
from .cuts import event_keys
from .errors import DataError
from .instrument import Telescope
from .mapping import CONSERVING, Mapping

SCHEMA = "cta-image-extractor"
SCHEMA_VERSION = 1
BIN_SOURCES = {"dictionary": "a bins_cuts_dict", "mc_energy": "their true energy"}
"""What `energy_bin_source` may be, in words."""
CHARGE_UNIT_PE = 0.01
TEL_TABLE, EVENTS, METADATA, RUNS, INDEX, CAMERAS = (
    "Tel_Table",
    "Events",
    "Metadata",
    "Runs",
    "Event_Index",
    "Cameras",
)
COMPRESSIONS = ("gzip", "none", "blosc-lz4", "blosc-zstd")
DIRECT = ("gzip", "none")  # chunks made here, not by HDF5
CHANNELS = {
    "PIXELS_1C": ("charge",),
    "PIXELS_TIMING_2C": ("charge", "time"),
    "PIXELS_TIMING_3C": ("charge", "time", "zero"),
    "PIXELS_3C": ("charge", "zero", "zero"),
}
UNITS = {
    "core_x": "m",
    "core_y": "m",
    "h_first_int": "m",
    "mc_energy": "TeV",
    "az": "rad",
    "alt": "rad",
    "reconstructed_energy": "TeV",
    "tel_x": "m",
    "tel_y": "m",
    "tel_z": "m",
    "focal_length": "m",
    "mirror_area": "m2",
    "run_array_direction": "rad (azimuth, altitude)",
    "charge": "0.01 photo-electrons",
    "time": "samples",
}
RUNS_DTYPE = np.dtype(
    [
        ("file", "S256"),
        ("sha256", "S64"),
        ("run_number", "u4"),
        ("events_read", "u4"),
        ("events_passed", "u4"),
        ("events_written", "u4"),
        ("duplicates", "u4"),
        ("complete", "u1"),
        ("problem", "S256"),
        ("direction", "f4", (2,)),
        ("energy_range", "f8", (2,)),
        ("spectral_index", "f8"),
        ("n_showers", "u4"),
        ("shower_reuse", "u4"),
        ("core_range", "f8", (2,)),
        ("viewcone", "f8", (2,)),
        ("diffuse", "i4"),
        ("atmosphere", "i4"),
    ]
)
INDEX_DTYPE = np.dtype([("run_number", "u4"), ("event_number", "u4"), ("group", "u1")])
ROWS_BUFFERED = 2048
GROW = 64  # images that an array grows by at a time
BATCH_BYTES = 128 * 1024 * 1024  # rows held in memory while shuffling


def image_shape(mapping: Mapping, settings: Settings) -> tuple[int, ...]:
    """Give the shape of a stored image: scaled picture (or vector) and channels, in order."""
    scale = settings.scale_factor if len(mapping.shape) == 2 else 1
    spatial = tuple(n * scale for n in mapping.shape)
    n_channels = len(CHANNELS[settings.image_mode])
    if settings.dim_order == "channels_first":
        return (n_channels, *spatial)
    return (*spatial, n_channels)


def events_dtype(
    telescopes: list[Telescope], mappings: dict[int, Mapping], settings: Settings
) -> np.dtype:
    """Columns of an Events table: the historic ones in their order, then ours."""
    n_tel = len(telescopes)
    columns: list[Any] = [
        ("event_number", "u4"),
        ("run_number", "u4"),
        ("gamma_hadron_label", "u1"),
        ("core_x", "f8"),
        ("core_y", "f8"),
        ("h_first_int", "f8"),
        ("mc_energy", "f8"),
        ("az", "f4"),
        ("alt", "f4"),
        ("reconstructed_energy", "f8"),
    ]
    if settings.mode == "energy_recon":
        columns.append(("energy_reconstruction_bin_label", "u1"))
    if settings.storage_mode == "mapped":
        columns.append(("tel_map", "i4", (n_tel,)))
    else:
        columns.append(("trig_list", "u1", (n_tel,)))
        for telescope in telescopes:
            shape = image_shape(mappings[telescope.tel_id], settings)
            columns.append((f"T{telescope.tel_id}", settings.dtype, shape))
    return np.dtype([*columns, ("primary_id", "i4"), ("shower_number", "i4")])


def array_identity(telescopes: list[Telescope]) -> list[list[Any]]:
    """List what makes two files the same array: ids, types, cameras, positions to the cm."""
    return [
        [
            t.tel_id,
            t.camera.telescope_type,
            t.camera.name,
            t.camera.fingerprint,
            *(round(v, 2) for v in t.position),
        ]
        for t in telescopes
    ]


def difference(ours: list[list[Any]], theirs: list[list[Any]]) -> str:
    """Say in a few words how an array differs from the file's; "" if it does not."""
    if ours == theirs:
        return ""
    ours_by, theirs_by = {t[0]: t for t in ours}, {t[0]: t for t in theirs}
    for tel_id in sorted(ours_by.keys() | theirs_by.keys()):
        a, b = ours_by.get(tel_id, []), theirs_by.get(tel_id, [])
        if not a:
            return f"no telescope {tel_id} ({b[1]} {b[2]})"
        if not b:
            return f"telescope {tel_id} ({a[1]} {a[2]}) too many"
        if a[2:4] != b[2:4]:
            what = f"is a {a[2]}, not a {b[2]}" if a[2] != b[2] else "has another camera geometry"
            return f"telescope {tel_id} {what}"
        if a[4:] != b[4:]:
            return f"telescope {tel_id} stands at {tuple(a[4:])} m, not {tuple(b[4:])} m"
    return "the telescopes are in another order"


class SeenEvents:
    """The events already written; 4 bytes each, in order of number a run."""

    def __init__(self) -> None:
        self._runs: dict[int, array[int]] = {}

    def add(self, run_number: int, event_number: int) -> bool:
        """Note an event; False if it was there."""
        seen = self._runs.setdefault(run_number, array("I"))
        if not seen or event_number > seen[-1]:
            seen.append(event_number)
            return True
        i = bisect_left(seen, event_number)
        if seen[i] == event_number:
            return False
        insort(seen, event_number)
        return True


@dataclass
class _ImageArray:
    """An EArray of images, with its real length while it is grown in steps."""

    node: tables.EArray
    rows: int

    def write(self, image: np.ndarray, compression: str) -> None:
        if compression in DIRECT:
            self.write_raw(_chunk(image, compression, shuffle=True))
        else:
            self.node.append(image[np.newaxis])
            self.rows += 1

    def write_raw(self, chunk: bytes) -> None:
        if self.rows >= self.node.nrows:
            self.node.truncate(self.rows + GROW)
        self.node.write_chunk((self.rows,) + (0,) * (self.node.ndim - 1), chunk)
        self.rows += 1


@dataclass
class _Group:
    """One place of events: /E{i} or the root."""

    path: str
    events: tables.Table
    rows: int
    images: dict[int, _ImageArray] = field(default_factory=dict)
    buffer: list[np.ndarray] = field(default_factory=list)


def _chunk(data: np.ndarray, compression: str, shuffle: bool) -> bytes:
    """Make a chunk as HDF5's shuffle and gzip filters, or none, would."""
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    if compression == "none":
        return raw.tobytes()
    if shuffle:
        raw = np.ascontiguousarray(raw.reshape(-1, data.dtype.itemsize).T)
    return isal_zlib.compress(raw, 1)


def filters(compression: str) -> tables.Filters:
    """PyTables filters for one of COMPRESSIONS."""
    if compression == "none":
        return tables.Filters(complevel=0)
    if compression == "gzip":
        return tables.Filters(complevel=1, complib="zlib", shuffle=True)
    return tables.Filters(
        complevel=5 if compression == "blosc-lz4" else 1,
        complib=compression.replace("-", ":"),
        shuffle=True,
    )


class Writer:
    """Write events to an open layout.

    Parameters
    ----------
    path : Path
        A new file, or (with `append`) one of this layout.
    settings : Settings
    telescopes : list of Telescope
        The selected ones, in the order of tel_map.
    mappings : dict
        Telescope id -> Mapping.
    compression : str
        One of COMPRESSIONS; a file that is appended to keeps its own.
    direction : (float, float)
        Pointing (azimuth, altitude) of the first run, rad.

    Raises
    ------
    DataError
        If the file to append to is of another layout, array or configuration.
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
        self.settings, self.telescopes = settings, telescopes
        self.dtype = events_dtype(telescopes, mappings, settings)
        self._shapes = {t.tel_id: image_shape(mappings[t.tel_id], settings) for t in telescopes}
        self.slots = {t.tel_id: i for i, t in enumerate(telescopes)}
        self.is_mapped = settings.storage_mode == "mapped"
        self.identity = array_identity(telescopes)
        self.seen = SeenEvents()
        self.written = 0  # events in the file, those appended to included
        self._blank = np.zeros(1, self.dtype)
        self._index: list[tuple[int, int, int]] = []
        self._listed: set[tuple[bytes, int, bytes]] = set()  # file, run, sha256 of Runs
        self.incomplete: set[int] = set()  # runs of which an incomplete file was read
        is_new = not path.exists()
        self.is_changed = is_new  # whether there is anything that the file did not hold before
        self.compression = compression
        try:
            self._h5 = tables.open_file(str(path), "w" if is_new else "a")
        except tables.HDF5ExtError as error:
            raise DataError(
                "the output to append to is not an HDF5 file. Give another output, or --overwrite."
            ) from error
        try:
            if is_new:
                self._create(mappings, direction, attributes)
            else:
                self._check(attributes)
            self.groups = [self._open_group(p) for p in group_paths(settings)]
        except BaseException:
            self._h5.close()
            raise

    def _create(
        self,
        mappings: dict[int, Mapping],
        direction: tuple[float, float],
        attributes: dict[str, Any],
    ) -> None:
        h5, settings = self._h5, self.settings
        root = h5.root._v_attrs
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        values = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "created_utc": now,
            "code_version": __version__,
            "config": as_text(settings, comments=False),
            "mode": settings.mode,
            "storage_mode": settings.storage_mode,
            "channels": json.dumps(CHANNELS[settings.image_mode]),
            "dim_order": settings.dim_order,
            "scale_factor": settings.scale_factor,
            "charge_unit_pe": CHARGE_UNIT_PE,
            "units": json.dumps(UNITS),
            "compression": self.compression,
            "energy_bin_edges_tev": json.dumps(settings.bins.edges_tev()),
            "array": json.dumps(self.identity),
            **attributes,
        }
        for name, value in values.items():
            root[name] = value
        self._create_tel_table(direction)
        meta = h5.create_group("/", METADATA)
        h5.create_table(meta, RUNS, RUNS_DTYPE)
        h5.create_table(meta, INDEX, INDEX_DTYPE, filters=filters(self.compression))
        cameras = h5.create_group(meta, CAMERAS)
        for key, telescope in self._cameras().items():
            _write_camera(h5, h5.create_group(cameras, key), telescope, mappings[telescope.tel_id])
        edges = settings.energy_bins
        for i, group_path in enumerate(group_paths(settings)):
            if group_path != "/":
                group = h5.create_group("/", group_path[1:])
                with np.errstate(divide="ignore"):  # a linear bin may begin at 0: ten to the -inf
                    exponents = np.log10(edges.edges_tev()[i : i + 2])
                if edges.scale == "log10":
                    exponents = np.array(edges.edges()[i : i + 2])
                group._v_attrs.min_energy, group._v_attrs.max_energy = map(float, exponents)
                group._v_attrs.units = edges.units if edges.scale == "log10" else "TeV"
            table = h5.create_table(
                group_path,
                EVENTS,
                self.dtype,
                filters=filters(self.compression),
                chunkshape=None if self.is_mapped else (1,),
            )
            names = self.dtype.names or ()
            table.attrs.units = json.dumps({n: UNITS[n] for n in names if n in UNITS})
            if self.is_mapped:
                for telescope in self.telescopes:
                    shape = self._shapes[telescope.tel_id]
                    h5.create_earray(
                        group_path,
                        f"T{telescope.tel_id}",
                        tables.Atom.from_dtype(np.dtype(settings.dtype)),
                        (0, *shape),
                        filters=filters(self.compression),
                        chunkshape=(1, *shape),
                    )

    def _cameras(self) -> dict[str, Telescope]:
        """One telescope of every kind of camera, by the kind's key."""
        return {camera_key(t): t for t in reversed(self.telescopes)}

    def _create_tel_table(self, direction: tuple[float, float]) -> None:
        dtype = np.dtype(
            [
                ("tel_id", "u2"),
                ("tel_x", "f4"),
                ("tel_y", "f4"),
                ("tel_z", "f4"),
                ("tel_type", "S8"),
                ("run_array_direction", "f4", (2,)),
                ("camera", "S48"),
                ("optics", "S32"),
                ("focal_length", "f4"),
                ("mirror_area", "f4"),
            ]
        )
        rows = np.zeros(len(self.telescopes), dtype)
        for row, t in zip(rows, self.telescopes, strict=True):
            camera = t.camera
            row["tel_id"], (row["tel_x"], row["tel_y"], row["tel_z"]) = t.tel_id, t.position
            row["tel_type"], row["run_array_direction"] = camera.telescope_type, direction
            row["camera"], row["optics"] = camera_key(t), camera.optics
            row["focal_length"], row["mirror_area"] = camera.focal_length_m, camera.mirror_area_m2
        self._h5.create_table("/", TEL_TABLE, rows)

    def _check(self, attributes: dict[str, Any]) -> None:
        h5 = self._h5
        attrs = check_schema(h5)
        if "split" in attrs:
            raise DataError(
                "the output was split into training and other tables, which cannot be appended to. "
                "Give another output, or --overwrite."
            )
        how = difference(self.identity, json.loads(str(attrs["array"])))
        if how:
            raise DataError(f"another array than the output's: {how}")
        theirs, ours = str(attrs["config"]), as_text(self.settings, comments=False)
        if theirs != ours:
            lines = sorted(set(ours.splitlines()) - set(theirs.splitlines()))
            raise DataError(
                f"the output was written with another configuration (now {'; '.join(lines)}). "
                "Give another output, or --overwrite."
            )
        now, then = attributes["energy_bin_source"], str(attrs["energy_bin_source"])
        if now != then:
            raise DataError(
                f"the output's events were chosen and binned by {BIN_SOURCES[then]}, these by "
                f"{BIN_SOURCES[now]}. Give another output, or --overwrite."
            )
        self.compression = str(attrs["compression"])
        for row in h5.get_node(f"/{METADATA}/{INDEX}").iterrows():
            self.seen.add(int(row["run_number"]), int(row["event_number"]))
            self.written += 1
        for run in h5.get_node(f"/{METADATA}/{RUNS}").read():
            self._is_listed(run)

    def _open_group(self, path: str) -> _Group:
        prefix = "" if path == "/" else path
        events = self._h5.get_node(f"{prefix}/{EVENTS}")
        group = _Group(path, events, int(events.nrows))
        if self.is_mapped:
            for telescope in self.telescopes:
                node = self._h5.get_node(f"{prefix}/T{telescope.tel_id}")
                group.images[telescope.tel_id] = _ImageArray(node, int(node.nrows))
        return group

    def add(self, group_index: int, values: dict[str, Any], images: dict[int, np.ndarray]) -> None:
        """Write one event and its images.

        Parameters
        ----------
        group_index : int
            Energy bin (gh_class) or 0.
        values : dict
            Column -> value, without tel_map, trig_list and images.
        images : dict
            Telescope id -> stored image, of `image_shape` and the configured dtype.
        """
        group = self.groups[group_index]
        row = self._blank if not self.is_mapped else np.zeros(1, self.dtype)
        for name, value in values.items():
            row[name] = value
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
            if self.compression in DIRECT:
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
        self._note(values["run_number"], values["event_number"], group_index)

    def _grow(self, group: _Group) -> None:
        if group.rows >= group.events.nrows:
            group.events.truncate(group.rows + 1)

    def _note(self, run_number: int, event_number: int, group_index: int) -> None:
        self.written += 1
        self._index.append((run_number, event_number, group_index))
        if len(self._index) >= ROWS_BUFFERED:
            self._flush_index()

    def _flush(self, group: _Group) -> None:
        if group.buffer:
            group.events.append(np.concatenate(group.buffer))
            group.rows += len(group.buffer)
            group.buffer.clear()

    def _flush_index(self) -> None:
        if self._index:
            self._h5.get_node(f"/{METADATA}/{INDEX}").append(np.array(self._index, INDEX_DTYPE))
            self._index.clear()

    def add_run(self, row: np.ndarray) -> None:
        """Append one input file's row (RUNS_DTYPE, shape (1,)), unless it says nothing new."""
        if not self._is_listed(row[0]) or row["events_written"][0]:
            self._h5.get_node(f"/{METADATA}/{RUNS}").append(row)
            self.is_changed = True

    def _is_listed(self, run: np.void) -> bool:
        """Whether Runs has that file, as whole as it is now; from now on it has."""
        key = (bytes(run["file"]), int(run["run_number"]))
        was_listed = (*key, bytes(run["sha256"])) in self._listed
        self._listed |= {(*key, bytes(run["sha256"])), (*key, b"")}
        if not run["complete"]:
            self.incomplete.add(key[1])
        return was_listed

    def merge(self, part: Path) -> np.ndarray:
        """Append what is new of a part file written with the same settings.

        Images are copied as compressed chunks.

        Returns
        -------
        (n_events,) bool array
            Which of the part's events were new, in the order in which they were written.
        """
        with tables.open_file(str(part)) as source:
            index = source.get_node(f"/{METADATA}/{INDEX}").read()
            keep = np.array(
                [self.seen.add(int(r["run_number"]), int(r["event_number"])) for r in index], bool
            )
            for g, group in enumerate(self.groups):
                chosen = keep[index["group"] == g]
                prefix = "" if group.path == "/" else group.path
                events = source.get_node(f"{prefix}/{EVENTS}")
                if self.is_mapped:
                    self._merge_mapped(group, source, prefix, events, chosen)
                else:
                    for i in np.flatnonzero(chosen):
                        self._grow(group)
                        group.events.write_chunk((group.rows,), events.read_chunk((int(i),)))
                        group.rows += 1
            for row in index[keep].tolist():
                self._note(*row)
            runs = source.get_node(f"/{METADATA}/{RUNS}").read()
        runs["duplicates"] += np.uint32((~keep).sum())
        runs["events_written"] = keep.sum()
        self.add_run(runs)
        return keep

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
        """Close the file as it is; it is going to be removed."""
        if self._h5.isopen:
            with contextlib.suppress(
                tables.HDF5ExtError, OSError
            ):  # on a full disk closing fails too
                self._h5.close()


def camera_key(telescope: Telescope) -> str:
    """Name of a kind of camera, unique in a file and a legal node name."""
    name = "".join(c if c.isalnum() else "_" for c in telescope.camera.name)
    return f"{name}_{telescope.camera.fingerprint[:8]}"


def group_paths(settings: Settings) -> list[str]:
    """Where the Events tables are: "/E0", ... or "/"."""
    if settings.mode == "energy_recon":
        return ["/"]
    return [f"/E{i}" for i in range(settings.energy_bins.count())]


def _write_camera(
    h5: tables.File, group: tables.Group, telescope: Telescope, mapping: Mapping
) -> None:
    camera = telescope.camera
    attrs = group._v_attrs
    attrs.name, attrs.optics, attrs.telescope_type = (
        camera.name,
        camera.optics,
        camera.telescope_type,
    )
    attrs.focal_length_m, attrs.effective_focal_length_m = (
        camera.focal_length_m,
        camera.effective_focal_length_m,
    )
    attrs.mirror_area_m2, attrs.sampling_rate_ghz = camera.mirror_area_m2, camera.sampling_rate_ghz
    attrs.n_pixels, attrs.n_samples = camera.n_pixels, camera.n_samples
    attrs.pixel_type = str(camera.geometry.pix_type.value)
    attrs.mapping, attrs.image_shape = mapping.method, json.dumps(mapping.shape)
    attrs.conserves_charge = mapping.method in CONSERVING
    geometry = camera.geometry
    pixels = np.zeros(
        camera.n_pixels,
        np.dtype([(n, "f8") for n in ("x", "y", "area", "derotated_x", "derotated_y")]),
    )
    pixels["x"], pixels["y"] = camera.pixel_x, camera.pixel_y
    pixels["area"] = geometry.pix_area.to_value("m2")
    pixels["derotated_x"], pixels["derotated_y"] = (
        geometry.pix_x.to_value("m"),
        geometry.pix_y.to_value("m"),
    )
    table = h5.create_table(group, "pixels", pixels)
    table.attrs.units = (
        "m, m, m2, m, m; x and y as in the simtel file, derotated ones as in ctapipe"
    )
    charge = mapping.charge.tocoo()
    matrix = np.zeros(
        charge.nnz,
        np.dtype([("cell", "u4"), ("pixel", "u4"), ("weight", "f4"), ("time_weight", "f4")]),
    )
    matrix["cell"], matrix["pixel"], matrix["weight"] = charge.row, charge.col, charge.data
    matrix["time_weight"] = mapping.time.tocoo().data
    h5.create_table(group, "mapping", matrix, filters=filters("gzip"))


def check_schema(h5: tables.File) -> dict[str, Any]:
    """Root attributes of a file of this layout. Raises DataError for others."""
    attrs = {name: h5.root._v_attrs[name] for name in h5.root._v_attrs._f_list("user")}
    if attrs.get("schema") != SCHEMA:
        raise DataError(
            f"{h5.filename}: not written by image_extractor (no attribute schema = {SCHEMA!r})."
        )
    if int(attrs["schema_version"]) != SCHEMA_VERSION:
        raise DataError(
            f"{h5.filename}: schema_version {attrs['schema_version']}, "
            f"this code needs {SCHEMA_VERSION}. "
            "Extract the data again."
        )
    return attrs


def open_layout(path: str | Path) -> tables.File:
    """Open a file of this layout for reading. Raises DataError."""
    try:
        h5 = tables.open_file(str(path))
    except (OSError, tables.HDF5ExtError) as error:
        reason = "no such file" if not Path(path).exists() else "not an HDF5 file"
        raise DataError(f"{path}: {reason}.") from error
    try:
        check_schema(h5)
    except BaseException:
        h5.close()
        raise
    return h5


def event_tables(h5: tables.File) -> Iterator[tables.Table]:
    """Every Events table, split or not, bin by bin."""
    groups = sorted(
        (
            g
            for g in h5.root._f_iter_nodes("Group")
            if g._v_name[:1] == "E" and g._v_name[1:].isdigit()
        ),
        key=lambda g: int(g._v_name[1:]),
    )
    for group in [h5.root, *groups]:
        for table in group._f_iter_nodes("Table"):
            if table.name == EVENTS or table.name.startswith(EVENTS + "_"):
                yield table


def rearrange(
    path: Path,
    scratch: Path,
    seed: int,
    shuffle: bool,
    fractions: dict[str, float] | None,
    stratify: bool,
) -> None:
    """Shuffle and split every Events table of a file, losing no row.

    Parameters
    ----------
    path : Path
        A closed file of this layout, replaced in place.
    scratch : Path
        Where to build the new file.
    seed : int
        Same seed, same file, same order.
    shuffle : bool
        Put rows in random order; otherwise each part keeps the order of the file.
    fractions : dict, optional
        Part name -> fraction of the rows (they must add up to 1); rows are drawn at random.
    stratify : bool
        Give each part its fraction of every gamma_hadron_label.

    Notes
    -----
    `mapped`: only Events tables are rewritten, the image arrays stay. `all`: rows are copied as
    compressed chunks into a second file, which takes the disk space of the first until it replaces
    it.
    """
    with tables.open_file(str(path), "a") as h5:
        attrs = check_schema(h5)
        is_mapped = attrs["storage_mode"] == "mapped"
        target = h5 if is_mapped else tables.open_file(str(scratch), "w")
        try:
            if not is_mapped:
                _copy_all_but_events(h5, target)
            for number, table in enumerate(list(event_tables(h5))):
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


def verify(path: Path, n_events: int) -> None:
    """Check that a closed file is on the disk as it was meant to be.

    Every chunk must lie inside the file, every buffered table be readable, every count be right.

    Raises
    ------
    DataError
        If anything is missing.
    """
    size = path.stat().st_size
    try:
        with tables.open_file(str(path)) as h5:
            attrs = check_schema(h5)
            index = h5.get_node(f"/{METADATA}/{INDEX}").read()
            h5.get_node(f"/{METADATA}/{RUNS}").read()
            keys, images = [], 0
            for table in event_tables(h5):
                if attrs["storage_mode"] == "all" and attrs["compression"] in DIRECT:
                    images += int(table.nrows)
                    _verify_chunks(table, size)
                    continue
                for start in range(
                    0, int(table.nrows), batch := max(1, BATCH_BYTES // table.rowsize)
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
                if attrs["compression"] in DIRECT:
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
        raise DataError("what was written cannot be read back: disk full, or quota reached?")


def _verify_chunks(node: tables.Leaf, size: int) -> None:
    tail = (0,) * (node.ndim - 1)
    for row in range(int(node.nrows)):
        info = node.chunk_info((row, *tail))
        if info.offset is None or info.offset + info.size > size:
            raise OSError


def _labels(table: tables.Table) -> np.ndarray:
    return np.concatenate(
        [np.zeros(0, np.uint8)]
        + [table.read(i, i + 1, field="gamma_hadron_label") for i in range(int(table.nrows))]
        if table.chunkshape[0] == 1
        else [table.col("gamma_hadron_label")]
    )


def assign(
    labels: np.ndarray, fractions: dict[str, float], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw rows for each part; every row goes to exactly one.

    Parameters
    ----------
    labels : (n,) array
        Each value of it is divided in the given proportions (to within one row).

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
        # Largest remainders take the rows that rounding down left over.
        for i in np.argsort(counts - exact, kind="stable")[: rows.size - counts.sum()]:
            counts[i] += 1
        for name, piece in zip(names, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            chosen[name].append(piece)
    empty = np.zeros(0, np.int64)
    return {n: np.sort(np.concatenate([empty, *pieces])) for n, pieces in chosen.items()}


def _rewrite(table: tables.Table, target: tables.File, parts: dict[str, np.ndarray]) -> None:
    """Put the table's rows, in the given order, into one table a part."""
    group = table._v_parent._v_pathname
    new = []
    for name, rows in parts.items():
        node = target.create_table(
            group,
            f"{EVENTS}_{name}" if name else "Events_rearranged",
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
        batch = max(1, BATCH_BYTES // table.rowsize)
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
            node.rename(EVENTS)


def _copy_all_but_events(source: tables.File, target: tables.File) -> None:
    """Copy attributes, groups and small tables."""
    source.root._v_attrs._f_copy(target.root)
    for node in source.root._f_iter_nodes():
        if node._v_name == TEL_TABLE:
            node.copy(target.root)
        elif node._v_name == METADATA:
            node._f_copy(target.root, recursive=True)
        elif isinstance(node, tables.Group):
            copy = target.create_group("/", node._v_name)
            node._v_attrs._f_copy(copy)


def tel_table(h5: tables.File) -> np.ndarray:
    """Read the telescope table as a structured array."""
    return h5.get_node(f"/{TEL_TABLE}").read()


def runs_table(h5: tables.File) -> np.ndarray:
    """Read the table of input files as a structured array."""
    return h5.get_node(f"/{METADATA}/{RUNS}").read()


def camera_pixels(h5: tables.File, key: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Pixel table, mapping matrix (cell, pixel, weight, time_weight) and attributes of a camera."""
    group = h5.get_node(f"/{METADATA}/{CAMERAS}/{key}")
    attrs = {name: group._v_attrs[name] for name in group._v_attrs._f_list("user")}
    return group.pixels.read(), group.mapping.read(), attrs


def event_images(h5: tables.File, table: tables.Table, row: int) -> dict[int, np.ndarray]:
    """Images of one event: telescope id -> stored image."""
    tel_ids = tel_table(h5)["tel_id"].tolist()
    values = table[row]
    images = {}
    for slot, tel_id in enumerate(tel_ids):
        if "tel_map" in table.colnames:
            index = int(values["tel_map"][slot])
            if index >= 0:
                images[tel_id] = getattr(table._v_parent, f"T{tel_id}")[index]
        elif values["trig_list"][slot]:
            images[tel_id] = values[f"T{tel_id}"]
    return images


def index_table(h5: tables.File) -> np.ndarray:
    """Every event of the file: (run_number, event_number, group)."""
    return h5.get_node(f"/{METADATA}/{INDEX}").read()
