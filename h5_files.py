"""H5 files, whole or not at all, with a checksum of every dataset and of the attributes.

Written by `new_h5`, read by `open_h5` and `read_dataset`. What is in them is up to the owners of
the layouts (data_io.py, pack_cubes.py, mock/truth.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import utils
from utils import DataError

import h5py
import numpy as np
from isal import isal_zlib

from recipe import Recipe


class OpenFile(NamedTuple):
    """An H5 file of this project, open for reading."""

    f: h5py.File
    recipe: Recipe
    attrs: dict[str, Any]
    """Attributes of the file, text as str."""


@contextlib.contextmanager
def new_h5(
    path: Path,
    schema: str,
    version: int,
    recipe: Recipe,
    attrs: Mapping[str, Any],
    n_bytes: int,
    **options: Any,
) -> Iterator[h5py.File]:
    """Create an H5 file, whole or not at all.

    Parameters
    ----------
    path : Path
    schema, version, recipe, attrs
        Attributes of the file; None values are left out.
    n_bytes : int
        Upper limit of what will be written: a `DataError` if the disk has not enough space, now or
        later.
    **options
        Passed on to h5py.File.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    free, limit = shutil.disk_usage(path.parent).free, resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    free = free if limit == resource.RLIM_INFINITY else min(free, limit)
    if free < n_bytes:
        raise DataError(
            f"{path}: not enough space on the disk: up to {n_bytes / 1e6:.1f} MB are needed, "
            f"{free / 1e6:.1f} MB are free (or allowed: ulimit -f). Free some, or choose another "
            "--data-dir."
        )
    with utils.atomic_path(path) as part, _Sink(part, "w+") as sink:
        try:
            with h5py.File(sink, "w", **options) as f:
                try:
                    f.attrs.update({k: v for k, v in attrs.items() if v is not None})
                    f.attrs.update(schema=schema, schema_version=version, recipe=recipe.to_json())
                    yield f
                    seal(f, sink.fileno())
                except BaseException as error:  # also a stop: the rest need not be written
                    sink.is_open, sink.error = False, sink.error or error
        except (OSError, RuntimeError) as error:  # of closing
            sink.error = sink.error or error
        if isinstance(sink.error, OSError | RuntimeError):
            raise DataError(
                f"{path}: could not be written ({utils.first_line(sink.error)}). Check disk and "
                "quota, then re-run."
            ) from sink.error
        if sink.error:
            raise sink.error


class _Sink(io.FileIO):
    """File to which HDF5 writes; what follows a failed write is discarded, and no error raised.

    HDF5 crashes the process if it cannot write while it closes a file or a dataset.
    """

    error: Any = None
    is_open = True

    def write(self, data: Any) -> int:
        """Write all bytes, or keep the error (also that of a stop by a signal)."""
        rest = memoryview(data)
        try:
            while rest and self.is_open:
                rest = rest[super().write(rest) :]
        except BaseException as error:
            self.error, self.is_open = error, False
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Set the file's size, which HDF5 does at the end."""
        return super().truncate(size) if self.is_open else size or 0


def seal(f: h5py.File, handle: int | None = None) -> None:
    """Record the checksums of an H5 file: of each dataset that has none yet, of the attributes.

    `handle` is that of the open file, where HDF5 does not know it.
    """
    for name, value in list(f.attrs.items()):
        if isinstance(value, str):  # in a heap of text, HDF5 can search a damaged place for ever
            f.attrs[name] = np.bytes_(value.encode() or b" ")
    f.flush()
    fd = f.id.get_vfd_handle() if handle is None else handle

    def seal_one(_: str, data: Any) -> None:
        if isinstance(data, h5py.Dataset) and "crc32" not in data.attrs:
            data.attrs["crc32"] = _crc(data, fd)

    f.visititems(seal_one)
    f.attrs["crc32"] = _attributes_crc(_attributes(f))


def _attributes(f: h5py.File) -> dict[str, Any]:
    """Attributes of a file, text as str."""
    found = dict[str, Any]()
    for i in range(h5py.h5a.get_num_attrs(f.id)):
        attribute = h5py.h5a.open(f.id, index=i)
        value = np.empty(attribute.shape, attribute.dtype)
        if value.dtype == object:
            raise ValueError("attributes in a heap of text, as in older versions")
        attribute.read(value)
        text = value[()]
        found[attribute.name.decode()] = text.decode().rstrip() if isinstance(text, bytes) else text
    return found


def _crc(data: h5py.Dataset, fd: int, out: np.ndarray | None = None) -> int:
    """CRC-32 of a dataset as it is stored: of its layout, then of its chunks.

    `fd` is the file's handle: chunks read by it are still in the processor's cache for the sum,
    which is faster than HDF5 without any check. `out` are the values, if known; those of
    `_is_plain` datasets are filled in.
    """
    is_plain, dtype, shape = _is_plain(data), data.dtype, data.chunks
    layout = (dtype.str, data.shape, shape, is_plain, data.compression, data.shuffle)
    crc = isal_zlib.crc32(f"{layout} {data.fillvalue}".encode())
    if shape is None:
        array = np.asarray(data[()] if out is None else out)
        is_text = array.dtype == object
        text = json.dumps(array.tolist(), default=repr).encode() if is_text else b""
        return isal_zlib.crc32(text if is_text else np.ascontiguousarray(array), crc)
    chunks: list[Any] = []
    data.id.chunk_iter(chunks.append)
    chunks.sort(key=lambda chunk: chunk.chunk_offset)
    crc = isal_zlib.crc32(np.array([chunk.chunk_offset for chunk in chunks], np.int64), crc)
    buffer: Any = np.empty(shape, dtype)
    n_bytes = buffer.nbytes
    for offset, _, start, size in chunks:
        if size > 2 * n_bytes:
            raise ValueError(f"a chunk of {size} bytes")
        raw = buffer if is_plain else bytearray(size)
        os.preadv(fd, [raw], start)
        crc = isal_zlib.crc32(raw, crc)
        if is_plain and out is not None:
            y, x, _ = offset
            part = out[y : y + shape[0], x : x + shape[1]]
            part[...] = buffer[: part.shape[0], : part.shape[1]]  # without what lies outside
    return crc


def _is_plain(data: h5py.Dataset) -> bool:
    """Say whether a dataset consists of chunks of whole spectra that are not compressed."""
    is_cube = data.chunks is not None and data.ndim == 3 and data.chunks[2] == data.shape[2]
    return is_cube and not data.id.get_create_plist().get_nfilters()


def _attributes_crc(attrs: dict[str, Any]) -> int:
    """CRC-32 of a file's attributes, apart from itself."""
    content = {k: v for k, v in attrs.items() if k != "crc32"}
    return isal_zlib.crc32(json.dumps(content, sort_keys=True, default=str).encode())


@contextlib.contextmanager
def open_h5(path: Path, schema: str, version: int, maker: str) -> Iterator[OpenFile]:
    """Open an H5 file after checking its schema and attributes.

    `maker` is the command that rebuilds it; whatever fails inside of the `with` is taken for damage
    of the file.
    """
    again, new = f"Re-run {maker}.", f"Make it with {maker.removesuffix(' --overwrite')}."
    remedy = again if Path(path).is_file() else new
    with utils.reading(path, f"an HDF5 file ({schema})", remedy), h5py.File(path) as f:
        attrs = _attributes(f)
        found = (attrs.get("schema"), attrs.get("schema_version"))
        if found != (schema, version):
            raise DataError(
                f"{path}: schema {found[0]} version {found[1]}, this code needs {schema} "
                f"version {version}. Re-run {maker}."
            )
        if attrs["crc32"] != _attributes_crc(attrs):
            raise ValueError("the checksum of its attributes differs")
        yield OpenFile(f, Recipe.from_json(attrs["recipe"], path), attrs)


def read_dataset(f: h5py.File, name: str) -> np.ndarray:
    """Read a dataset of a file of `open_h5`, which reports errors, and compare its checksum."""
    data = f[name]
    if isinstance(f.get(name, getlink=True), h5py.ExternalLink) or data.external or data.is_virtual:
        raise ValueError(f"{name} lies in another file")
    if data.nbytes > utils.MAX_ARRAY_BYTES:
        raise ValueError(f"{name} would have {data.nbytes / 1e9:.1f} GB")
    is_plain = _is_plain(data)
    array = np.full(data.shape, data.fillvalue, data.dtype) if is_plain else data[()]
    if data.attrs["crc32"] != _crc(data, f.id.get_vfd_handle(), array):
        raise ValueError(f"the checksum of {name} differs")
    return array
