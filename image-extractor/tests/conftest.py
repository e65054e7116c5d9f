"""Real files, ctapipe's results for them, and helpers for all tests."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import settings as hypothesis_settings

from image_extractor.simtel import MC_SHOWER, SYNC_MARKER

hypothesis_settings.register_profile("no wall-clock limit", deadline=None)
hypothesis_settings.load_profile("no wall-clock limit")
PACKAGE = Path(__file__).resolve().parents[1]
SHARED = PACKAGE.parent.parent / "shared"
FOLDERS = (SHARED / "data" / "cta", PACKAGE / "build" / "demo-data")
NAMES = {
    "gamma": "gamma_test.simtel.gz",
    "sst": "gamma_20deg_0deg_run102___cta-prod4-sst-1m_desert-2150m-Paranal-sst-1m.simtel.gz",
    "calib": "calib_events.simtel.gz",
    "proton": "proton_run202_za20deg_azm0deg_North_test_layout_test-prod.simtel.zst",
    "header": "header_only_gamma_diffuse_run000010_North_alpha_6.0.2.simtel.zst",
}


def real_file(key: str) -> Path:
    """Path of a real simtel file; skip the test if it is absent."""
    for folder in FOLDERS:
        if (folder / NAMES[key]).is_file():
            return folder / NAMES[key]
    pytest.skip(f"{NAMES[key]} is absent: neither ../shared/data/cta nor build/demo-data has it")


def decompressed(path: Path) -> bytes:
    """Content of a compressed file."""
    raw = path.read_bytes()
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().stream_reader(raw).read()
    return gzip.decompress(raw)


def other_production(raw: bytes, primary: int | None = None, energy: float = 1.0) -> bytes:
    """Change the primary of every simulated shower, and multiply its energy, in a simtel file."""
    changed, pos = bytearray(raw), 0
    while (pos := raw.find(SYNC_MARKER + struct.pack("<H", MC_SHOWER), pos)) >= 0:
        start = pos + (20 if raw[pos + 6] & 2 else 16)  # an extended header has 4 more bytes
        old, tev = struct.unpack_from("<if", raw, start)
        struct.pack_into("<if", changed, start, old if primary is None else primary, tev * energy)
        pos = start
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
