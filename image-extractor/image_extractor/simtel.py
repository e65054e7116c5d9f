"""Read sim_telarray files: decompress them, divide them into objects, yield triggered events.

Reads   *.simtel.gz, *.simtel.zst and uncompressed eventio files.
Writes  nothing.

Only what an image needs is parsed. One thread decompresses (igzip, zstd) into a bounded queue while
the caller decodes. A triggered event comes with about 200 objects, whose parsing would take most of
the time; those that are not needed are skipped. The others are parsed by the `eventio` package,
except the waveforms, which remain raw bytes for calibrate.py.

Only complete events are yielded. Missing bytes at the end, a wrong checksum or a missing sync
marker set `SimtelFile.problem`; the events before remain valid.

    with SimtelFile("gamma.simtel.gz") as f:
        for event in f.events(tel_ids={1, 2}):
            print(event.event_id, sorted(event.telescopes))
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import struct
import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import eventio.simtel  # noqa: F401  (fills KNOWN_OBJECTS)
import zstandard
from eventio.base import KNOWN_OBJECTS, parse_extension_field
from eventio.header import parse_header_bytes
from isal import isal_zlib

from .errors import DataError

SYNC_MARKER = b"\x37\x8a\x1f\xd4"
SYNC_MARKER_BIG_ENDIAN = SYNC_MARKER[::-1]
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Object types, see the manuals of eventio and sim_telarray (K. Bernloehr).
HISTORY_META = 75
RUN_HEADER, MC_RUN_HEADER = 2000, 2001
CAMERA_SETTINGS, CAMERA_ORGANIZATION, PIXEL_SETTINGS, DISABLED_PIXELS = 2002, 2003, 2004, 2005
TRIGGER, ARRAY_EVENT, ADC_SUMS, ADC_SAMPLES = 2009, 2010, 2012, 2013
MC_SHOWER, MC_EVENT, CAMERA_MONITORING, LASER_CALIBRATION = 2020, 2021, 2022, 2023
CALIBRATION_EVENT = 2028
TELESCOPE_PARTS = {
    CAMERA_SETTINGS: "camera_settings",
    CAMERA_ORGANIZATION: "camera_organization",
    PIXEL_SETTINGS: "pixel_settings",
    DISABLED_PIXELS: "disabled_pixels",
}
WANTED = {
    HISTORY_META,
    RUN_HEADER,
    MC_RUN_HEADER,
    ARRAY_EVENT,
    MC_SHOWER,
    MC_EVENT,
    CAMERA_MONITORING,
    LASER_CALIBRATION,
    CALIBRATION_EVENT,
    *TELESCOPE_PARTS,
}
EVENT_TYPES = {MC_SHOWER, MC_EVENT, ARRAY_EVENT, CALIBRATION_EVENT}

RAW_BLOCK = 4 * 1024 * 1024  # compressed bytes per read; large, to release the global lock rarely
BLOCK = 8 * 1024 * 1024  # maximum decompressed bytes per item of the queue
QUEUE_BLOCKS = 4
MAX_OBJECT = 512 * 1024 * 1024  # a longer object means a damaged length field
MAX_PENDING = 8  # unparsed monitoring objects kept per telescope
HALF_PI = 0.5 * 3.141592653589793
_WORDS = struct.Struct("<4sIiI")
_SUB_WORDS = struct.Struct("<IiI")


class Corrupt(Exception):
    """From here on the bytes are not a simtel file; what came before remains valid."""


class _Stop(Exception):
    """The reader was closed before the thread had finished."""


def _gzip_blocks(raw: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress a gzip stream of one or more members. Raises Corrupt."""
    engine = isal_zlib.decompressobj(wbits=31)
    try:
        for data in raw:
            while data:
                if engine.eof:
                    if not data.strip(b"\0"):  # zero padding may follow the last member
                        break
                    engine = isal_zlib.decompressobj(wbits=31)
                piece = engine.decompress(data, BLOCK)
                if piece:
                    yield piece
                data = engine.unused_data if engine.eof else engine.unconsumed_tail
    except isal_zlib.error as error:  # type: ignore[misc]  # isal's stub calls it an instance
        raise Corrupt(f"the gzip data are damaged ({error})") from error
    if not engine.eof:
        raise Corrupt("the gzip stream is cut off")


def _zstd_blocks(raw: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress a zstd stream of one or more frames. Raises Corrupt."""
    engine = zstandard.ZstdDecompressor().decompressobj()
    try:
        for data in raw:
            while data:
                if engine.eof:
                    engine = zstandard.ZstdDecompressor().decompressobj()
                piece = engine.decompress(data)
                if piece:
                    yield piece
                data = engine.unused_data if engine.eof else b""
    except zstandard.ZstdError as error:
        raise Corrupt(f"the zstd data are damaged ({error})") from error
    if not engine.eof:
        raise Corrupt("the zstd stream is cut off")


class ByteStream:
    """The decompressed bytes of a file, read ahead by a thread.

    Parameters
    ----------
    path : Path
        A gzip, zstd or uncompressed file, recognised by its first bytes.

    Attributes
    ----------
    sha256 : str
        Checksum of the file as stored; "" until its end has been read.
    """

    def __init__(self, path: Path) -> None:
        self.sha256 = ""
        self._is_read = False
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[bytes | Exception | None] = queue.Queue(QUEUE_BLOCKS)
        self._closing = threading.Event()
        self._file = path.open("rb")
        magic = self._file.read(4)
        self._file.seek(0)
        raw = self._raw()
        if magic[:2] == GZIP_MAGIC:
            blocks = _gzip_blocks(raw)
        elif magic == ZSTD_MAGIC:
            blocks = _zstd_blocks(raw)
        else:
            blocks = raw
        self._thread = threading.Thread(target=self._run, args=(blocks,), daemon=True)
        self._thread.start()

    def _raw(self) -> Iterator[bytes]:
        while data := self._file.read(RAW_BLOCK):
            self._hash.update(data)
            yield data
        self._is_read = True

    def _put(self, item: bytes | Exception | None) -> None:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return
        raise _Stop

    def _run(self, blocks: Iterator[bytes]) -> None:
        try:
            last: Exception | None = None
            try:
                for block in blocks:
                    self._put(block)
            except (Corrupt, OSError) as error:
                last = error
            self._put(last)
        except _Stop:
            pass

    def next_block(self) -> bytes:
        """Return the next bytes, b"" at the end. Raises Corrupt or OSError where reading fails."""
        item = self._queue.get()
        if isinstance(item, bytes):
            return item
        self._queue.put(item)  # for the next call
        if self._is_read:  # not if decompression failed before the end
            self.sha256 = self._hash.hexdigest()
        if item is None:
            return b""
        raise item

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._file.close()


@dataclass
class RawObject:
    """One unparsed eventio object: its header and its payload."""

    type: int
    id: int
    header: bytes
    payload: memoryview

    def parse(self) -> Any:
        """Parse with eventio's class for this type. Raises Corrupt for damaged bytes."""
        header = parse_header_bytes(self.header[:12], toplevel=False)
        if header.extended:
            header.content_size += parse_extension_field(self.header[12:16])
        header.content_address = 0
        cls = KNOWN_OBJECTS.get(self.type)
        if cls is None:
            raise Corrupt(f"unknown object type {self.type}")
        return guarded(lambda: cls(header, BytesIO(self.payload)).parse(), cls.__name__)


def guarded(parse: Callable[[], Any], what: str) -> Any:
    """Run code on bytes that may be damaged; any error except DataError becomes Corrupt."""
    try:
        return parse()
    except DataError:
        raise
    except NotImplementedError as error:
        raise Corrupt(f"{what}: in a format version that eventio cannot read ({error})") from error
    # eventio has no error type of its own for damaged bytes: IndexError, ValueError, struct.error,
    # AssertionError, KeyError, MemoryError and others occur.
    except Exception as error:
        raise Corrupt(f"{what}: unreadable ({type(error).__name__}: {error})") from error


def sub_objects(payload: memoryview) -> Iterator[RawObject]:
    """Divide the payload of an object into its unparsed sub-objects."""
    pos, end = 0, len(payload)
    while pos < end:
        if end - pos < 12:
            raise Corrupt("an object ends inside a header")
        word, id_, length = _SUB_WORDS.unpack_from(payload, pos)
        size, head = length & 0x3FFFFFFF, 12
        if word >> 17 & 1:
            if end - pos < 16:
                raise Corrupt("an object ends inside a header")
            head = 16
            size += (struct.unpack_from("<I", payload, pos + 12)[0] & 0xFFF) << 30
        start = pos + head
        if start + size > end:
            raise Corrupt("an object is longer than the object that contains it")
        yield RawObject(
            word & 0xFFFF, id_, bytes(payload[pos:start]), payload[start : start + size]
        )
        pos = start + size


def top_level_objects(stream: ByteStream, wanted: Container[int]) -> Iterator[RawObject]:
    """Read complete top-level objects of the wanted types, in the order of the file.

    Raises
    ------
    Corrupt
        Where the file does not continue with a complete object.
    """
    buffer, pos, offset = b"", 0, 0  # offset: of buffer[0] in the decompressed file
    view = memoryview(buffer)

    def fill(need: int) -> bool:
        """Read until buffer[pos : pos + need] is available; False if the file ends before."""
        nonlocal buffer, pos, offset, view
        parts, have = [buffer[pos:]], len(buffer) - pos
        offset += pos
        pos = 0
        while have < need:
            try:
                block = stream.next_block()
            except Corrupt as error:
                raise Corrupt(f"{error} after {offset + have} bytes") from error
            if not block:
                break
            parts.append(block)
            have += len(block)
        buffer = b"".join(parts)
        view = memoryview(buffer)
        return have >= need

    while True:
        if len(buffer) - pos < 16 and not fill(16):
            if len(buffer) == pos:
                return
            raise Corrupt(f"the file is cut off after {offset + len(buffer)} bytes")
        sync, word, id_, length = _WORDS.unpack_from(buffer, pos)
        if sync != SYNC_MARKER:
            if sync == SYNC_MARKER_BIG_ENDIAN:
                raise Corrupt("big-endian eventio data, which eventio cannot read")
            raise Corrupt(f"no object begins at byte {offset + pos}, where one is expected")
        size, head = length & 0x3FFFFFFF, 16
        if word >> 17 & 1:
            if len(buffer) - pos < 20 and not fill(20):
                raise Corrupt(f"the file is cut off after {offset + len(buffer)} bytes")
            head = 20
            size += (struct.unpack_from("<I", buffer, pos + 16)[0] & 0xFFF) << 30
        if size > MAX_OBJECT:
            raise Corrupt(f"an object at byte {offset + pos} has the impossible length {size}")
        if len(buffer) - pos < head + size and not fill(head + size):
            raise Corrupt(f"the file is cut off after {offset + len(buffer)} bytes")
        kind = word & 0xFFFF
        if kind in wanted:
            yield RawObject(
                kind, id_, buffer[pos + 4 : pos + head], view[pos + head : pos + head + size]
            )
        pos += head + size


@dataclass
class Event:
    """One triggered air shower event.

    Attributes
    ----------
    shower, mc : dict
        eventio's MCShower (energy TeV, altitude and azimuth rad, h_first_int m) and MCEvent (xcore,
        ycore m). Both are empty for a calibration event.
    telescopes : dict
        Telescope id -> its raw ADC object, for the selected telescopes that triggered.
    """

    run_number: int
    event_id: int
    shower: dict[str, Any]
    mc: dict[str, Any]
    telescopes: dict[int, RawObject]


@dataclass
class Monitoring:
    """Pedestals and gains of one telescope; parsed when an event needs them."""

    values: dict[str, Any] = field(default_factory=dict)
    pending: list[RawObject] = field(default_factory=list)
    latest: dict[int, bytes] = field(default_factory=dict)
    version: int = 0

    def add(self, item: RawObject) -> None:
        payload = bytes(item.payload)
        if self.latest.get(item.type) == payload:
            return
        self.latest[item.type] = payload
        self.pending.append(RawObject(item.type, item.id, item.header, memoryview(payload)))
        if len(self.pending) > MAX_PENDING:
            self.refresh()

    def refresh(self) -> dict[str, Any]:
        """Parse what is pending; return `pedestal`, `n_ped_slices`, `calib` and `tm_calib`."""
        if self.pending:
            for item in self.pending:
                self.values.update(item.parse())
            self.pending.clear()
            self.version += 1
        return self.values


class SimtelFile:
    """A simtel file: its header is read when it is opened, its events one by one.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    header, mc_run_header : dict
        eventio's RunHeader and the last MCRunHeader before the events.
    telescopes : dict
        Telescope id -> {"camera_settings", "camera_organization", "pixel_settings",
        "disabled_pixels"}. Telescopes with identical objects share the parsed parts.
    meta : dict
        Telescope id -> sim_telarray's metadata (bytes -> bytes); id -1 has those of the file.
    monitoring : dict
        Telescope id -> Monitoring.
    events_read, calibration_events : int
        Counts so far.
    problem : str
        Why the file is incomplete; empty if it is complete so far.

    Raises
    ------
    DataError
        If the file cannot be read or has no array description.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = {}
        self.mc_run_header: dict[str, Any] = {}
        self.telescopes: dict[int, dict[str, Any]] = {}
        self.meta: dict[int, dict[bytes, bytes]] = {}
        self.monitoring: dict[int, Monitoring] = {}
        self.events_read = 0
        self.calibration_events = 0
        self.problem = ""
        self._parsed: dict[tuple[int, bytes, bytes], Any] = {}
        try:
            self._stream = ByteStream(self.path)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be opened ({error.strerror}). Check the path."
            ) from error
        self._objects = top_level_objects(self._stream, WANTED)
        self._begun: list[RawObject] = []  # objects read before the first event was complete
        try:
            self._read_head()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SimtelFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    @property
    def sha256(self) -> str:
        """Checksum of the stored file; "" if reading stopped before its end."""
        return self._stream.sha256

    @property
    def run_number(self) -> int:
        return int(self.header["run"])

    def _read_head(self) -> None:
        try:
            for item in self._objects:
                if item.type not in EVENT_TYPES:
                    self._head_object(item)
                    continue
                self._begun = [b for b in self._begun if b.type != item.type] + [item]
                # Merged files describe some telescopes only after a first shower without trigger.
                if item.type not in (MC_SHOWER, MC_EVENT) or self._is_described():
                    break
        except Corrupt as error:
            self.problem = str(error)
        except OSError as error:
            self.problem = f"the file cannot be read ({error.strerror})"
        if not self._is_described():
            reason = self.problem or "it has no array description"
            raise DataError(
                f"{self.path}: no complete simtel header: {reason} (expected a sim_telarray file: "
                "*.simtel, .gz or .zst). Leave the file out or replace it."
            )

    def _is_described(self) -> bool:
        """Whether the run and all its telescopes have been described."""
        whole = sum(len(parts) == len(TELESCOPE_PARTS) for parts in self.telescopes.values())
        return whole > 0 and whole >= int(self.header.get("n_telescopes", 1 << 30))

    def _head_object(self, item: RawObject) -> None:
        if item.type == RUN_HEADER:
            self.header = item.parse()
        elif item.type == MC_RUN_HEADER:
            self.mc_run_header = item.parse()
        elif item.type == HISTORY_META:
            self.meta[item.id] = item.parse()
        elif item.type in TELESCOPE_PARTS:
            # An array has about 100 telescopes and few types of camera: parse equal bytes once.
            key = (item.type, item.header[:4], bytes(item.payload))
            if key not in self._parsed:
                self._parsed[key] = item.parse()
            self.telescopes.setdefault(item.id, {})[TELESCOPE_PARTS[item.type]] = self._parsed[key]
        else:
            self._monitoring_object(item)

    def _monitoring_object(self, item: RawObject) -> None:
        tel_id = item.id
        if item.type == CAMERA_MONITORING:  # the id also encodes what changed (hessio, io_hess.c)
            tel_id = (item.id & 0xFF) | ((item.id & 0x3F000000) >> 16)
        self.monitoring.setdefault(tel_id, Monitoring()).add(item)

    def events(
        self,
        tel_ids: Container[int] | None = None,
        wanted: Callable[[int, int], bool] | None = None,
        calibration: bool = False,
    ) -> Iterator[Event]:
        """Read complete triggered events, in the order of the file.

        Parameters
        ----------
        tel_ids : container of int, optional
            Telescopes whose data are kept; by default all.
        wanted : callable, optional
            (run_number, event_id) -> bool. Other events are counted, but not parsed.
        calibration : bool
            Also yield calibration events (with negative ids, like ctapipe).

        Yields
        ------
        Event
            Also those without a selected telescope, with `telescopes` empty, so that the caller can
            count them; but no events without any telescope data.
        """
        shower: RawObject | None = None
        shower_values: dict[str, Any] = {}
        mc_event: RawObject | None = None
        try:
            for item in itertools.chain(self._begun, self._objects):
                kind = item.type
                if kind == MC_EVENT:
                    mc_event = item
                elif kind == MC_SHOWER:
                    shower, shower_values = item, {}
                elif kind == ARRAY_EVENT and shower is not None and mc_event is not None:
                    event = self._event(item, tel_ids, wanted)
                    if event is not None:
                        if event.telescopes:
                            shower_values = shower_values or _shower_values(shower)
                            event.shower, event.mc = shower_values, mc_event.parse()
                        yield event
                elif kind in (ARRAY_EVENT, CALIBRATION_EVENT):
                    self.calibration_events += 1
                    if calibration:
                        inner = item
                        if kind == CALIBRATION_EVENT:
                            inner = next(sub_objects(item.payload))
                        event = self._event(inner, tel_ids, None)
                        if event is not None:
                            event.event_id = -inner.id
                            self.events_read -= 1
                            yield event
                elif kind in (CAMERA_MONITORING, LASER_CALIBRATION):
                    self._monitoring_object(item)
                elif kind == RUN_HEADER:
                    raise Corrupt("a second run begins in the middle of the file and is not read")
        except Corrupt as error:
            self.problem = str(error)
        except OSError as error:
            self.problem = f"the file cannot be read ({error.strerror})"

    def _event(
        self,
        array_event: RawObject,
        tel_ids: Container[int] | None,
        wanted: Callable[[int, int], bool] | None,
    ) -> Event | None:
        """Split an array event; None if it has no telescope data."""
        parts = sub_objects(array_event.payload)
        trigger = next(parts, None)
        if trigger is None or trigger.type != TRIGGER:
            raise Corrupt("an array event does not begin with its trigger")
        # In old files the number of the array event differs from that of the MC event, which the
        # trigger has, too.
        event_id = trigger.id if trigger.id != 0 else array_event.id
        if event_id < 0:
            raise Corrupt(f"an event has the impossible number {event_id}")
        triggered: set[int] | None = None
        telescopes: dict[int, RawObject] = {}
        has_data = False
        if wanted is not None and not wanted(self.run_number, event_id):
            tel_ids = ()
        for part in parts:
            base = part.type - 2200
            if base < 0 or base % 1000 >= 100:  # tracking positions, reconstruction
                continue
            tel_id = 100 * (base // 1000) + base % 1000
            has_data = True
            if tel_ids is not None and tel_id not in tel_ids:
                continue
            if triggered is None:
                triggered = set(trigger.parse()["triggered_telescopes"].tolist())
            if tel_id not in triggered:  # data of a telescope that did not trigger; like ctapipe
                continue
            adc = sums = None
            for sub in sub_objects(part.payload):
                if sub.type == ADC_SAMPLES:
                    adc = sub
                elif sub.type == ADC_SUMS:
                    sums = sub
            found = adc or sums
            if found is not None:
                telescopes[tel_id] = found
        if not has_data:
            return None
        self.events_read += 1
        return Event(self.run_number, event_id, {}, {}, telescopes)


def _shower_values(shower: RawObject) -> dict[str, Any]:
    """Parse an MCShower; limit its altitude to the zenith, since pi/2 in float32 is rounded up."""
    values = dict(shower.parse())
    if HALF_PI < values["altitude"] < (1 + 1e-6) * HALF_PI:
        values["altitude"] = HALF_PI
    return values
