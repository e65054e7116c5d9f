"""The HDF5 layout: its names, types, shapes and units; creating, opening and reading a file.

    /                             attributes: schema, versions, config, units, array, split, ...
    /Tel_Table                    row i is slot i of tel_map and trig_list
    /E{i}/Events                  gh_class: one group per energy bin; energy_recon: /Events
    /E{i}/T{tel_id}               mapped: images (row, x, y, channel) or (row, channel, x, y)
    /Metadata/Runs                one row per input file
    /Metadata/Event_Index         numbers, group, part, source, checksum, ... of every event
    /Metadata/Cameras/{key}       pixels, and the matrix that made the images

No other module states these names. Everything outside /Metadata is the historic layout, which plain
PyTables code reads by name, with three differences: tel_id is u2 (u1 overflowed at 256), image
arrays have the configured type (i2 wrapped at 327.67 p.e.), and new columns come after the old
ones. Each image is one chunk, so that reading an event reads only its own bytes.

The rows of Event_Index with one `group` and `part` are in the order of that Events table, so that
it tells everything needed to split, count or search events without reading their images.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tables
from isal import isal_zlib

from . import __version__
from .config import as_text
from .errors import DataError
from .settings import CONSERVING, EnergyBins, Settings

if TYPE_CHECKING:  # so that reading a file needs neither ctapipe nor scipy
    from .instrument import Telescope
    from .mapping import Mapping

SCHEMA = "cta-image-extractor"
SCHEMA_VERSION = 2
# Values of the attribute energy_bin_source, in words.
BIN_SOURCES = {"dictionary": "a dictionary of bins and cuts", "mc_energy": "their true energy"}
CHARGE_UNIT_PE = 0.01
EVENTS = "Events"  # and Events_Training, ... once split
TEL_TABLE = "/Tel_Table"
METADATA = "/Metadata"
RUNS, INDEX, CAMERAS = f"{METADATA}/Runs", f"{METADATA}/Event_Index", f"{METADATA}/Cameras"
SPLIT_BY = ("shower", "event")
COMPRESSIONS = ("gzip", "none", "blosc-lz4", "blosc-zstd")
DIRECT = ("gzip", "none")  # chunks are compressed by us, not by HDF5
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
}
TEL_DTYPE = np.dtype(
    [
        ("tel_id", "u2"),
        ("tel_x", "f4"),
        ("tel_y", "f4"),
        ("tel_z", "f4"),
        ("tel_type", "S8"),
        ("run_array_direction", "f4", (2,)),
        ("camera", "S48"),  # name of the node below /Metadata/Cameras
        ("name", "S32"),  # of the camera in the file
        ("optics", "S32"),
        ("focal_length", "f4"),
        ("mirror_area", "f4"),
    ]
)
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
INDEX_DTYPE = np.dtype(
    [
        ("run_number", "u4"),
        ("event_number", "u4"),
        ("group", "u1"),
        ("part", "u1"),  # position in the attribute `parts`
        ("source", "u4"),  # row of Runs
        ("identity", "u8"),  # tells events with equal numbers apart
        ("shower", "u8"),  # the same for all uses of a shower
        ("primary_id", "i4"),
        ("mc_energy", "f8"),
        ("checksum", "u4"),  # of the row and the images, see event_checksum
    ]
)
MOST_COMPRESSED = 1100  # ratio of sizes, that of gzip for constant data
CHECKSUM = "checksum"  # attribute of every node
EVENT_DATA = re.compile(r"(/E\d+)?/(Events(_\w+)?|T\d+)")  # paths of event tables and images
SHOWER_COLUMNS = (
    "run_number",
    "shower_number",
    "primary_id",
    "mc_energy",
    "az",
    "alt",
    "h_first_int",
)
MAX_CHUNK = 2**31 - 1024  # bytes of the images of a row, or of one image; NumPy allows no more
BATCH_BYTES = 128 * 1024 * 1024  # rows held in memory at a time


def image_shape(mapping: Mapping, settings: Settings) -> tuple[int, ...]:
    """Shape of a stored image: scaled axes (or a vector) and channels, in the configured order."""
    scale = settings.scale_factor if len(mapping.shape) == 2 else 1
    spatial = tuple(n * scale for n in mapping.shape)
    n_channels = len(CHANNELS[settings.image_mode])
    if settings.dim_order == "channels_first":
        return (n_channels, *spatial)
    return (*spatial, n_channels)


def _check_size(
    telescopes: list[Telescope], mappings: dict[int, Mapping], settings: Settings
) -> None:
    """Refuse rows and images that are too large for a chunk of HDF5."""
    shapes = [image_shape(mappings[t.tel_id], settings) for t in telescopes]
    sizes = [math.prod(shape) * np.dtype(settings.dtype).itemsize for shape in shapes]
    is_mapped = settings.storage_mode == "mapped"
    size = max(sizes) if is_mapped else sum(sizes)
    if size > MAX_CHUNK:
        raise DataError(
            f"{'an image' if is_mapped else 'an event with its images'} would take "
            f"{size / 2**30:.1f} GiB (expected less than {(MAX_CHUNK + 1) / 2**30:.0f} GiB). Use "
            f"{'' if is_mapped else 'storage_mode = mapped, '}a smaller scale_factor or fewer "
            "telescopes."
        )


def events_dtype(
    telescopes: list[Telescope], mappings: dict[int, Mapping], settings: Settings
) -> np.dtype:
    """Columns of an Events table: the historic ones in their order, then the new ones."""
    _check_size(telescopes, mappings, settings)
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


def shower_keys(rows: np.ndarray) -> np.ndarray:
    """Numbers that are equal for all uses of one simulated shower, and only for these.

    They are digests of run, shower number, primary, energy, direction and first interaction, so
    that showers of different productions differ even if their numbers are equal.

    Parameters
    ----------
    rows : (n,) array of an Events table

    Returns
    -------
    (n,) uint64 array
    """
    return _digests(rows, SHOWER_COLUMNS)


def event_identity(row: np.ndarray, content: int) -> int:
    """Make a number that tells events apart whose run and event numbers are equal.

    The high half is a digest of the shower and the core position, the low half is `content`, a
    CRC-32 of the telescopes' raw data.

    Parameters
    ----------
    row : (1,) array of an Events table
    """
    physics = int(_digests(row, (*SHOWER_COLUMNS, "core_x", "core_y"))[0])
    return physics >> 32 << 32 | content


def _digests(rows: np.ndarray, columns: Iterable[str]) -> np.ndarray:
    parts = [
        np.ascontiguousarray(rows[name]).view(np.uint8).reshape(len(rows), -1) for name in columns
    ]
    digests = [hashlib.blake2b(r.tobytes(), digest_size=8).digest() for r in np.hstack(parts)]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def event_checksum(row: np.void, images: Iterable[tuple[int, np.ndarray]]) -> int:
    """CRC-32 of an event: its values, and its images with their slots.

    Independent of where the event is stored: `tel_map` and `trig_list` enter by the slots alone.

    Parameters
    ----------
    row : one row of an Events table
    images : (slot, stored image), in the order of the slots
    """
    total = 0
    for name in _value_columns(row.dtype.names or ()):
        total = isal_zlib.crc32(row[name].tobytes(), total)
    for slot, image in images:
        total = isal_zlib.crc32(np.ascontiguousarray(image), isal_zlib.crc32(b"%d" % slot, total))
    return total


@functools.cache
def _value_columns(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not re.fullmatch(r"tel_map|trig_list|T\d+", name)]


def array_identity(telescopes: list[Telescope]) -> list[list[Any]]:
    """Describe an array for comparison: ids, types, cameras, positions to the cm."""
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
    """Name the first difference between two results of `array_identity`; "" if there is none."""
    if ours == theirs:
        return ""
    ours_by, theirs_by = {t[0]: t for t in ours}, {t[0]: t for t in theirs}
    for tel_id in sorted(ours_by.keys() | theirs_by.keys()):
        a, b = ours_by.get(tel_id, []), theirs_by.get(tel_id, [])
        if not a:
            return f"telescope {tel_id} ({b[1]} {b[2]}) is missing"
        if not b:
            return f"telescope {tel_id} ({a[1]} {a[2]}) is additional"
        if a[2:4] != b[2:4]:
            what = f"is a {a[2]}, not a {b[2]}" if a[2] != b[2] else "has another camera geometry"
            return f"telescope {tel_id} {what}"
        if a[4:] != b[4:]:
            return f"telescope {tel_id} is at {tuple(a[4:])} m, not {tuple(b[4:])} m"
    return "the telescopes are in another order"


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


def camera_key(telescope: Telescope) -> str:
    """Name of a type of camera: unique in a file and valid as the name of a node."""
    name = "".join(c if c.isalnum() else "_" for c in telescope.camera.kind)
    return f"{name}_{telescope.camera.fingerprint[:8]}"


def group_paths(settings: Settings) -> list[str]:
    """Where the Events tables are: "/E0", ... or "/"."""
    if settings.mode == "energy_recon":
        return ["/"]
    return [f"/E{i}" for i in range(settings.energy_bins.count())]


def create(
    h5: tables.File,
    settings: Settings,
    telescopes: list[Telescope],
    mappings: dict[int, Mapping],
    compression: str,
    direction: tuple[float, float],
    attributes: dict[str, Any],
) -> None:
    """Fill a new HDF5 file with the attributes, groups and empty tables of this layout.

    Parameters
    ----------
    telescopes : list of Telescope
        The selected ones, in the order of tel_map.
    mappings : dict
        Telescope id -> Mapping.
    direction : (float, float)
        Pointing (azimuth, altitude) of the first run, rad.
    attributes : dict
        Further root attributes: versions, command, source of the energy bins.
    """
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
        "time_unit_samples": settings.time_unit,
        "units": json.dumps({**UNITS, "time": f"{settings.time_unit:g} samples"}),
        "compression": compression,
        "energy_bin_edges_tev": json.dumps(settings.bins.edges_tev()),
        "array": json.dumps(array_identity(telescopes)),
        "parts": json.dumps([EVENTS]),
        **attributes,
    }
    for name, value in values.items():
        h5.root._v_attrs[name] = value
    h5.create_table(*_split(TEL_TABLE), _tel_rows(telescopes, direction))
    h5.create_group(*_split(METADATA))
    h5.create_table(*_split(RUNS), RUNS_DTYPE)
    h5.create_table(*_split(INDEX), INDEX_DTYPE, filters=filters(compression))
    cameras = h5.create_group(*_split(CAMERAS))
    one_of_each = {camera_key(t): t for t in reversed(telescopes)}
    for key, telescope in one_of_each.items():
        group = h5.create_group(cameras, key)
        _write_camera(h5, group, telescope, mappings[telescope.tel_id], settings.derotate)
    dtype = events_dtype(telescopes, mappings, settings)
    is_mapped = settings.storage_mode == "mapped"
    for i, group_path in enumerate(group_paths(settings)):
        if group_path != "/":
            _write_energy_bin(h5.create_group(*_split(group_path)), settings.energy_bins, i)
        table = h5.create_table(
            group_path,
            EVENTS,
            dtype,
            filters=filters(compression),
            chunkshape=None if is_mapped else (1,),
        )
        names = dtype.names or ()
        table.attrs.units = json.dumps({n: UNITS[n] for n in names if n in UNITS})
        for telescope in telescopes if is_mapped else ():
            shape = image_shape(mappings[telescope.tel_id], settings)
            h5.create_earray(
                group_path,
                f"T{telescope.tel_id}",
                tables.Atom.from_dtype(np.dtype(settings.dtype)),
                (0, *shape),
                filters=filters(compression),
                chunkshape=(1, *shape),
            )


def _split(path: str) -> tuple[str, str]:
    """Parent and name of a node."""
    parent, _, name = path.rpartition("/")
    return parent or "/", name


def _write_energy_bin(group: tables.Group, bins: EnergyBins, number: int) -> None:
    with np.errstate(divide="ignore"):  # a linear bin may begin at 0: 10 to the power of -inf
        exponents = np.log10(bins.edges_tev()[number : number + 2])
    if bins.scale == "log10":
        exponents = np.array(bins.edges()[number : number + 2])
    group._v_attrs.min_energy, group._v_attrs.max_energy = map(float, exponents)
    group._v_attrs.units = bins.units if bins.scale == "log10" else "TeV"


def _tel_rows(telescopes: list[Telescope], direction: tuple[float, float]) -> np.ndarray:
    rows = np.zeros(len(telescopes), TEL_DTYPE)
    for row, t in zip(rows, telescopes, strict=True):
        camera = t.camera
        row["tel_id"], (row["tel_x"], row["tel_y"], row["tel_z"]) = t.tel_id, t.position
        row["tel_type"], row["run_array_direction"] = camera.telescope_type, direction
        row["camera"], row["name"], row["optics"] = camera_key(t), camera.name, camera.optics
        row["focal_length"], row["mirror_area"] = camera.focal_length_m, camera.mirror_area_m2
    return rows


def _write_camera(
    h5: tables.File,
    group: tables.Group,
    telescope: Telescope,
    mapping: Mapping,
    is_derotated: bool,
) -> None:
    camera = telescope.camera
    attrs = group._v_attrs
    attrs.name, attrs.optics, attrs.telescope_type = (
        camera.kind,
        camera.optics,
        camera.telescope_type,
    )
    # Counter-clockwise, deg: pixels x, y to the camera frame; the image's axes to that frame.
    attrs.rotation_deg = camera.rotation_deg
    own = 0.0 if is_derotated else camera.rotation_deg
    attrs.image_rotation_deg = own - mapping.turn_deg
    attrs.focal_length_m, attrs.effective_focal_length_m = (
        camera.focal_length_m,
        camera.effective_focal_length_m,
    )
    attrs.mirror_area_m2, attrs.sampling_rate_ghz = camera.mirror_area_m2, camera.sampling_rate_ghz
    attrs.n_pixels, attrs.n_samples = camera.n_pixels, camera.n_samples
    attrs.pixel_type = str(camera.geometry.pix_type.value)
    attrs.pixel_rotation_deg = float(camera.geometry.pix_rotation.deg)  # of the derotated ones
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
    """Check that a file has this layout; return its root attributes. Raises DataError."""
    attrs = {name: h5.root._v_attrs[name] for name in h5.root._v_attrs._f_list("user")}
    if attrs.get("schema") != SCHEMA:
        raise DataError(
            f"{h5.filename}: not written by image_extractor (expected the attribute "
            f"schema = {SCHEMA!r}). Give an output of image_extractor.py."
        )
    if int(attrs["schema_version"]) != SCHEMA_VERSION:
        raise DataError(
            f"{h5.filename}: schema_version {attrs['schema_version']}, "
            f"expected {SCHEMA_VERSION}. Extract the data again."
        )
    return attrs


def seal(h5: tables.File) -> None:
    """Give every node the attribute `checksum`; call this when all else has been written."""
    for node in h5.walk_nodes("/"):
        node._v_attrs[CHECKSUM] = node_checksum(node)


def node_checksum(node: tables.Node) -> int:
    """CRC-32 of a node: path, attributes, and the names in a group or the type and data of a leaf.

    The data of events and images are left out: Event_Index has a checksum of each event.
    """
    attrs = node._v_attrs
    total = isal_zlib.crc32(node._v_pathname.encode())
    for name in sorted(set(attrs._f_list("all")) - {CHECKSUM}):
        is_numpy, value = isinstance(attrs[name], np.generic), np.asarray(attrs[name])
        content = repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()
        total = isal_zlib.crc32(
            f"{name} {is_numpy} {value.dtype} {value.shape}".encode() + content, total
        )
    if isinstance(node, tables.Group):
        return isal_zlib.crc32(json.dumps(sorted(node._v_children)).encode(), total)
    total = isal_zlib.crc32(f"{node.dtype.descr} {node.shape}".encode(), total)
    if not EVENT_DATA.fullmatch(node._v_pathname):
        if node.size_in_memory > MOST_COMPRESSED * node._v_file.get_filesize():
            raise DataError(f"{node._v_pathname}: is longer than the file can hold")
        total = isal_zlib.crc32(np.ascontiguousarray(node.read()).view(np.uint8), total)
    return total


def open_layout(path: str | Path, **parameters: int) -> tables.File:
    """Open a file of this layout for reading, with parameters of PyTables. Raises DataError."""
    try:
        h5 = tables.open_file(str(path), **parameters)
    # PyTables has no error type of its own for damaged files: almost any error occurs.
    except Exception as error:
        reason = "no such file" if not Path(path).exists() else "not an HDF5 file"
        raise DataError(
            f"{path}: {reason} (expected an output of image_extractor.py). Check the path."
        ) from error
    try:
        check_schema(h5)
    except BaseException:
        h5.close()
        raise
    return h5


def part_name(name: str) -> str:
    """Name of the Events table of a part; "" is the whole."""
    return f"{EVENTS}_{name}" if name else EVENTS


def event_tables(h5: tables.File) -> Iterator[tables.Table]:
    """Every Events table or part of a split one, energy bin by energy bin."""
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


def group_number(table: tables.Table) -> int:
    """Return the energy bin of an Events table, as in the index; 0 for one in the root."""
    return int(table._v_parent._v_name[1:]) if table._v_depth > 1 else 0


def tel_table(h5: tables.File) -> np.ndarray:
    """Read the telescope table as a structured array."""
    return h5.get_node(TEL_TABLE).read()


def runs_table(h5: tables.File) -> np.ndarray:
    """Read the table of input files as a structured array."""
    return h5.get_node(RUNS).read()


def camera_pixels(h5: tables.File, key: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Pixel table, mapping matrix (cell, pixel, weight, time_weight) and attributes of a camera."""
    group = h5.get_node(f"{CAMERAS}/{key}")
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
    return h5.get_node(INDEX).read()
