"""Real files, ctapipe's results for them, and helpers for all tests."""

import fcntl
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import settings as hypothesis_settings
from isal import igzip

from image_extractor.simtel import ARRAY_EVENT, EVENT_TYPES, MC_EVENT, MC_SHOWER
from image_extractor.transaction import write_whole

hypothesis_settings.register_profile("no wall-clock limit", deadline=None)
hypothesis_settings.load_profile("no wall-clock limit")
PACKAGE = Path(__file__).resolve().parents[1]
SHARED = PACKAGE.parent.parent / "shared" / "data" / "cta"
SAMPLES = PACKAGE / "build" / "sample-files"  # written by scripts/sample_files.py
NAMES = {
    "gamma": "gamma_test.simtel.gz",
    "sst": "gamma_20deg_0deg_run102___cta-prod4-sst-1m_desert-2150m-Paranal-sst-1m.simtel.gz",
    "calib": "calib_events.simtel.gz",
    "proton": "proton_run202_za20deg_azm0deg_North_test_layout_test-prod.simtel.zst",
    "header": "header_only_gamma_diffuse_run000010_North_alpha_6.0.2.simtel.zst",
}
# Files from which the last two are made where they are absent; see stand_in.
SOURCES = {
    "proton": "gamma_test_large_truncated.simtel.gz",
    "header": "camsettings_v6.simtel.zst",
}
MC_PE_SUM = 2026
# What is added to the numbers of these objects in each copy of the events.
NUMBERED = {MC_SHOWER: 10_000, MC_EVENT: 10**6, MC_PE_SUM: 10**6, ARRAY_EVENT: 10**6}


def pytest_terminal_summary(terminalreporter):
    """Say in one line per cause what was not tested."""
    skipped = terminalreporter.stats.get("skipped", [])
    causes = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if causes:
        terminalreporter.section("not tested")
    for cause, n in causes.most_common():
        terminalreporter.line(f"{n} test{'s' if n > 1 else ''}: {cause}")


def real_file(key: str) -> Path:
    """Path of a real simtel file; skip the test if it is absent."""
    for folder in (SHARED, SAMPLES):
        if (folder / NAMES[key]).is_file():
            return folder / NAMES[key]
    if key in SOURCES and (SAMPLES / SOURCES[key]).is_file():
        return stand_in(key)
    pytest.skip("the sample files are absent: python scripts/sample_files.py downloads them")


def stand_in(key: str) -> Path:
    """Make a file that takes the place of one that is not in eventio's source distribution.

    proton: 6 gammas of 3 showers, seen by LSTs, MSTs and SSTs, with the primary of protons. header:
    what comes before the first event of a file.
    """
    path = SAMPLES / f"stand_in_{NAMES[key]}"
    if not path.is_file():
        raw = decompressed(SAMPLES / SOURCES[key])
        if key == "proton":
            *_, (_, _, _, end) = objects(raw)
        else:
            end = next(begin for kind, begin, _, _ in objects(raw) if kind in EVENT_TYPES)
        write_whole(path, zstandard.compress(other_production(raw[:end], primary=101)))
    return path


def decompressed(path: Path) -> bytes:
    """Content of a compressed file, as far as it can be read."""
    raw = path.read_bytes()
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().stream_reader(raw).read()
    return zlib.decompressobj(31).decompress(raw)


def objects(raw: bytes):
    """Complete top-level objects of a simtel file: type, begin, begin of the content, end."""
    begin = 0
    while begin + 20 <= len(raw):
        kind, _, size, extension = struct.unpack_from("<4I", raw, begin + 4)
        is_extended = bool(kind >> 17 & 1)
        start = begin + 16 + 4 * is_extended
        end = start + (size & 0x3FFFFFFF) + ((extension & 0xFFF) << 30) * is_extended
        if end > len(raw):
            return
        yield kind & 0xFFFF, begin, start, end
        begin = end


def repeated(raw: bytes, times: int) -> bytes:
    """Repeat the events of a simtel file, with numbers of their own."""
    spans = list(objects(raw))
    first = next(i for i, span in enumerate(spans) if span[0] in NUMBERED)
    last = max(i for i, span in enumerate(spans) if span[0] == ARRAY_EVENT)
    copies = bytearray(raw[: spans[first][1]])
    for k in range(times):
        for kind, begin, start, end in spans[first : last + 1]:
            block = bytearray(raw[begin:end])
            # An array event begins with its trigger, which has the same number.
            at = [8, start - begin + 4] if kind == ARRAY_EVENT else [8] if kind in NUMBERED else []
            for place in at:
                (number,) = struct.unpack_from("<I", block, place)
                struct.pack_into("<I", block, place, number + k * NUMBERED[kind])
            copies += block
    return bytes(copies + raw[spans[last][3] : spans[-1][3]])


def other_production(raw: bytes, primary: int | None = None, energy: float = 1.0) -> bytes:
    """Change the primary of every simulated shower, and multiply its energy, in a simtel file."""
    changed = bytearray(raw)
    for kind, _, start, _ in objects(raw):
        if kind == MC_SHOWER:
            old, tev = struct.unpack_from("<if", raw, start)
            number = old if primary is None else primary
            struct.pack_into("<if", changed, start, number, tev * energy)
    return bytes(changed)


@pytest.fixture(scope="session")
def dl1():
    """ctapipe's DL1 of a real file: ([(event_id, {tel_id: (charge, time)}, shower)], subarray)."""
    cache = {}

    def reference(key, calibration=False):
        if key not in cache:
            from ctapipe.calib import CameraCalibrator
            from ctapipe.io import SimTelEventSource

            source = SimTelEventSource(
                real_file(key),
                focal_length_choice="EQUIVALENT",
                skip_calibration_events=not calibration,
                select_gain=True,
            )
            calibrator = CameraCalibrator(source.subarray)
            events = []
            for event in source:
                calibrator(event)
                images = {t: (c.image.copy(), c.peak_time.copy()) for t, c in event.dl1.tel.items()}
                events.append((int(event.index.event_id), images, event.simulation.shower))
            cache[key] = (events, source.subarray)
        return cache[key]

    return reference


@pytest.fixture(scope="session")
def long_file(tmp_path_factory):
    """The protons repeated 60 times (360 events); made once for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "long_proton.simtel.gz"
    with (folder / "long_proton.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            raw = repeated(decompressed(real_file("proton")), 60)
            path.write_bytes(igzip.compress(raw, 1))
    return path


def settings(**options):
    """Settings that keep all telescopes and events; mapped, one cell per pixel."""
    from dataclasses import replace

    from image_extractor.settings import EnergyBins, Settings

    base = dict(
        storage_mode="mapped",
        image_mode="PIXELS_TIMING_2C",
        scale_factor=1,
        type_mode="ALL",
        energy_bins=EnergyBins(min=-2.0, max=2.0, bin_size=1.0),
    )
    return replace(Settings(), **{**base, **options})


def extract(key_or_path, output, max_events=None, **options):
    """Extract one file with `settings(**options)`; return its report."""
    from image_extractor.image_extractor import ImageExtractor

    path = key_or_path if isinstance(key_or_path, Path) else real_file(key_or_path)
    own = {k: options.pop(k) for k in list(options) if k in OWN}
    dictionary = options.pop("bins_cuts_dict", None)
    extractor = ImageExtractor(output, dictionary, settings=settings(**options), **own)
    return extractor.process_data(path, max_events)


OWN = ("compression", "shuffle", "split", "split_by", "stratify", "seed", "overwrite")


def all_images(path):
    """All stored events: (run, event) -> (row, {telescope id: image})."""
    from image_extractor import layout

    found = {}
    with layout.open_layout(path) as h5:
        for table in layout.event_tables(h5):
            for i in range(int(table.nrows)):
                row = table[i]
                key = (int(row["run_number"]), int(row["event_number"]))
                assert key not in found
                found[key] = (row, layout.event_images(h5, table, i))
    return found


def stored(charge):
    """Numbers stored for charges: in 0.01 photo-electrons, negative ones as 0."""
    return np.rint(np.clip(charge.astype(np.float64), 0, None) * 100)
