"""Read selected HDUs of a FITS file as a stream, and check them against their DATASUM.

Reads   FITS files, plain or gzipped, up to the last wanted HDU; a second thread decompresses them.
Returns headers, and arrays in native byte order with numpy's axis order: (band, y, x).

    >>> hdus = read_hdus(path, ("PRIMARY", "FLUX"))
    >>> for name, hdu in iterate_hdus(path, ("FLUX", "WAVE"), planes=slice(1000, 2000)): ...
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import utils
from utils import DataError

import numpy as np
from astropy.io import fits
from isal import igzip_threaded

FITS_BLOCK = 2880
"""Bytes: headers and data units are padded to multiples of it (FITS standard 4.0, section 3.1)."""
DECOMPRESSION_BUFFER = 1 << 20
"""Bytes decompressed, or skipped, at a time."""
SWAP_BUFFER = 1 << 18
"""Bytes swapped to native order at a time: few enough to stay in the processor's cache."""
MAX_HEADER = 500 * FITS_BLOCK
"""Longest header, bytes: 18,000 cards."""
MAX_FILE = 4 << 30
"""Bytes of a file, unpacked: four times those of the largest LOGCUBE."""
FETCH_AGAIN = "Fetch it again with download_utils.py --overwrite, or copy it again if it is yours."
SUM_CARD = re.compile(rb"(CHECKSUM|DATASUM ) *= *'([0-9A-Za-z]+)")


@dataclass(frozen=True)
class Hdu:
    """Header and array of one HDU; (band, y, x), native byte order. Without data, it is empty."""

    header: fits.Header
    data: np.ndarray
    shape: tuple[int, ...]
    """Of the whole array in the file, of which `data` may be a part."""


class _Checksum:
    """Checksum of a data unit, as in its card DATASUM (FITS standard 4.0, section 4.4.2.7).

    The sum of its four-byte words in ones' complement: the overflow is added to the low end.
    """

    def __init__(self) -> None:
        self.total = self.n_bytes = 0

    def add(self, part: bytes | memoryview) -> None:
        """Add the next bytes of the data unit."""
        lead, n = self.n_bytes % 4, len(part)
        if lead or n % 8:
            part = bytes(lead) + bytes(part) + bytes(-(lead + n) % 8)
        pairs = np.frombuffer(part, ">u4").astype(np.uint32).view(np.uint64)  # faster than words
        upper, both = int((pairs >> np.uint64(32)).sum()), int(pairs.sum())
        self.total += upper + (both - (upper << 32)) % (1 << 64)  # numpy's sum is modulo 2**64
        self.n_bytes += n

    @property
    def value(self) -> int:
        """The sum so far."""
        while self.total >> 32:
            self.total = (self.total & 0xFFFFFFFF) + (self.total >> 32)
        return self.total

    def check(self, header: fits.Header, path: Path, name: str) -> None:
        """Raise a DataError if the header's DATASUM differs."""
        expected = str(header.get("DATASUM", "")).strip()
        if expected.isdigit() and int(expected) != self.value:
            raise DataError(
                f"{path}: {name} is damaged: the checksum of its data is {self.value}, but its "
                f"DATASUM is {expected}. {FETCH_AGAIN}"
            )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a plain or gzipped FITS file for sequential reading."""
    remedy = "Check the path, or fetch it with download_utils.py."
    with utils.reading(path, "a FITS file", remedy), path.open("rb") as raw:
        lead = raw.read(2)
    if not lead:
        raise DataError(f"{path}: zero bytes. Expected a FITS file. {FETCH_AGAIN}")
    gzipped = partial(igzip_threaded.open, threads=1, block_size=DECOMPRESSION_BUFFER)
    with (
        utils.reading(path, "a whole FITS file", FETCH_AGAIN),
        (gzipped if lead == b"\x1f\x8b" else open)(path, "rb") as stream,
    ):
        yield stream


def iterate_hdus(
    path: Path, wanted: Sequence[str] | None, planes: slice | None = None
) -> Iterator[tuple[str, Hdu]]:
    """Yield the wanted HDUs in file order; the file is read up to the last of them.

    Parameters
    ----------
    path : Path
        Plain or gzipped.
    wanted : sequence of str
        Extension names; "PRIMARY" is the first HDU. Other HDUs are skipped. None: all HDUs are
        checked to the end of the file, and yielded without their arrays.
    planes : slice, optional
        Part of the first axis to keep of arrays with three axes (wavelengths of a cube).

    Raises
    ------
    DataError
        Missing, empty, truncated or damaged file; not a FITS file; a wanted HDU is missing (raised
        after the others were yielded).
    """
    path, missing, n_read = Path(path), set(wanted or ()), 0
    seen: list[str] = []
    with _opened(path) as stream:
        while missing or wanted is None:
            header = _read_header(stream, path, first=not seen)
            if header is None and wanted is None:
                return
            if header is None:
                raise DataError(
                    f"{path}: no HDU {', '.join(sorted(missing))}; it holds {', '.join(seen)}. "
                    "Give a file of the expected kind (LOGCUBE or MAPS)."
                )
            name = header.get("EXTNAME", "PRIMARY" if not seen else f"HDU{len(seen)}").strip()
            seen.append(name)
            n_bytes = _data_size(header, f"{path}: {name}")
            n_read += n_bytes
            if n_read > MAX_FILE:
                raise DataError(
                    f"{path}: {n_read / 1e9:.0f} GB, expected a MaNGA file of at most "
                    f"{MAX_FILE / 1e9:.0f}. {FETCH_AGAIN}"
                )
            where, checksum = f"{path}: cut short inside {name}", _Checksum()
            padding = -n_bytes % FITS_BLOCK  # zeros, which may be missing at the file's end
            if name not in missing and wanted is not None:
                _skip(stream, n_bytes, where)
                stream.read(padding)
                continue
            if wanted is None:
                data = np.empty(0)
                _skip(stream, n_bytes, where, checksum)
            else:
                data = _read_array(stream, header, planes, where, checksum)
            stream.read(padding)
            checksum.check(header, path, name)
            missing.discard(name)
            yield name, Hdu(header, data, _shape_of(header))


def _data_size(header: fits.Header, where: str) -> int:
    """Bytes of a data unit, after checking the cards that say so (FITS standard 4.0, table 7)."""
    bits, shape = header["BITPIX"], _shape_of(header)
    counts = (header.get("PCOUNT", 0), header.get("GCOUNT", 1), *shape)
    is_sound = bits in fits.BITPIX2DTYPE and all(type(n) is int and n >= 0 for n in counts)
    is_sound = is_sound and header.get("TFIELDS", 0) in range(1000)
    n_values = counts[1] * (math.prod(shape) + counts[0]) if is_sound and shape else 0
    n_bytes = abs(bits) // 8 * n_values if is_sound else 0
    if not is_sound or n_bytes > utils.MAX_ARRAY_BYTES:
        raise DataError(
            f"{where}: BITPIX {bits}, axes {shape}, expected an array of at most "
            f"{utils.MAX_ARRAY_BYTES >> 20} MB. {FETCH_AGAIN}"
        )
    return n_bytes


def _shape_of(header: fits.Header) -> tuple[int, ...]:
    """Shape of an HDU's whole array according to its header, in numpy's axis order."""
    return tuple(header[f"NAXIS{i}"] for i in range(header["NAXIS"], 0, -1))


def check_whole(path: Path) -> fits.Header:
    """Read a file to its end and compare all checksums that it has; return its primary header."""
    headers = [hdu.header for _, hdu in iterate_hdus(path, None)]
    return headers[0]


def read_hdus(path: Path, wanted: Sequence[str]) -> dict[str, Hdu]:
    """Read the wanted HDUs of a FITS file; see `iterate_hdus`."""
    return dict(iterate_hdus(path, wanted))


def _read_header(stream: BinaryIO, path: Path, first: bool) -> fits.Header | None:
    """Read the next header of the stream; None at the end of the file."""
    blocks, checksum = b"", _Checksum()
    while len(blocks) < MAX_HEADER:
        block = stream.read(FITS_BLOCK)
        if not block and not blocks and not first:
            return None
        if first and not blocks and not block.startswith(b"SIMPLE  ="):
            raise DataError(
                f"{path}: not a FITS file: expected to begin with SIMPLE. {FETCH_AGAIN}"
            )
        if len(block) < FITS_BLOCK:
            raise DataError(f"{path}: cut short inside a header. {FETCH_AGAIN}")
        if not first and not blocks and not block.startswith(b"XTENSION="):
            raise DataError(
                f"{path}: damaged: no header where one should be, expected XTENSION. {FETCH_AGAIN}"
            )
        ends = [i for i in range(0, FITS_BLOCK, 80) if block[i : i + 8] == b"END     "]
        cards = block[: ends[0]] if ends else block
        if not cards.decode("latin1").isprintable() or not cards.isascii():
            break
        blocks += block
        if ends:
            sums = dict(SUM_CARD.findall(blocks))
            if len(sums) == 2 and sums[b"DATASUM "].isdigit():
                checksum.add(blocks)
                checksum.total += int(sums[b"DATASUM "])
                if checksum.value != 0xFFFFFFFF:
                    raise DataError(f"{path}: the CHECKSUM of a header differs. {FETCH_AGAIN}")
            return fits.Header.fromstring(blocks.decode("ascii", "replace"))
    raise DataError(f"{path}: damaged: a header without an end, expected a card END. {FETCH_AGAIN}")


def _read_array(
    stream: BinaryIO, header: fits.Header, planes: slice | None, where: str, checksum: _Checksum
) -> np.ndarray:
    """Read planes of an array in native byte order; the checksum includes the other planes."""
    shape, native = _shape_of(header), np.dtype(fits.BITPIX2DTYPE[header["BITPIX"]])
    if not shape:
        return np.empty(0)
    if header.get("BSCALE", 1) != 1 or header.get("BZERO", 0) != 0:
        raise DataError(f"{where}: scaled values (BSCALE, BZERO), expected plain. {FETCH_AGAIN}")
    first, stop, _ = (planes if planes and len(shape) == 3 else slice(None)).indices(shape[0])
    array = np.empty((stop - first, *shape[1:]), native)
    plane = native.itemsize * math.prod(shape[1:])
    _skip(stream, first * plane, where, checksum)
    flat, scratch, filled = array.reshape(-1), bytearray(SWAP_BUFFER), 0
    while filled < flat.size:
        wanted = memoryview(scratch)[: (flat.size - filled) * native.itemsize]
        got = stream.readinto(wanted)  # type: ignore[attr-defined]
        if got < len(wanted):  # a buffered stream fills the buffer unless the file ends
            found = filled * native.itemsize + got
            raise DataError(f"{where}: {found} of {array.nbytes} bytes. {FETCH_AGAIN}")
        checksum.add(wanted)
        values = np.frombuffer(wanted, native.newbyteorder(">"))
        flat[filled : filled + values.size] = values
        filled += values.size
    _skip(stream, (shape[0] - stop) * plane, where, checksum)
    return array


def _skip(stream: BinaryIO, n: int, where: str, checksum: _Checksum | None = None) -> None:
    """Skip n bytes, of which the checksum takes account."""
    scratch = memoryview(bytearray(min(n, DECOMPRESSION_BUFFER)))
    while n > 0:
        got = stream.readinto(scratch[:n])  # type: ignore[attr-defined]
        if not got:
            raise DataError(f"{where}. {FETCH_AGAIN}")
        if checksum is not None:
            checksum.add(scratch[:got])
        n -= got
