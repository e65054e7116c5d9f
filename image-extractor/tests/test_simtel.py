"""Reading: the same events as eventio's reader; complete events of damaged files are kept."""

import gzip
import itertools
import re
import struct

import numpy as np
import pytest
from conftest import decompressed, extract, real_file

from image_extractor import layout
from image_extractor.errors import DataError
from image_extractor.instrument import describe_array, select_telescopes, with_types
from image_extractor.look import validate
from image_extractor.simtel import ARRAY_EVENT, SYNC_MARKER, SimtelFile

EVENTS = {"gamma": 9, "sst": 31, "calib": 0, "proton": 6, "header": 0}


@pytest.mark.parametrize("key", ["gamma", "sst", "proton"])
def test_events_equal_those_of_eventio(key):
    from eventio import SimTelFile

    with (
        SimtelFile(real_file(key)) as ours,
        SimTelFile(str(real_file(key)), skip_calibration=True) as theirs,
    ):
        n = 0
        for a, b in zip(ours.events(), theirs, strict=True):
            n += 1
            assert a.event_id == b["event_id"]
            assert set(a.telescopes) == set(b["telescope_events"])
            assert a.shower["energy"] == b["mc_shower"]["energy"]
            assert a.mc["xcore"] == b["mc_event"]["xcore"]
        assert n == ours.events_read == EVENTS[key]
        assert ours.run_number == theirs.header["run"]
        np.testing.assert_array_equal(ours.header["tel_pos"], theirs.header["tel_pos"])


@pytest.mark.parametrize("key", ["gamma", "sst", "proton", "calib"])
def test_the_array_equals_ctapipes(key, dl1):
    subarray = dl1(key, calibration=key == "calib")[1]
    with SimtelFile(real_file(key)) as simtel:
        telescopes = describe_array(simtel)
    assert list(telescopes) == list(subarray.tel)
    for tel_id, telescope in telescopes.items():
        theirs, ours = subarray.tel[tel_id], telescope.camera
        np.testing.assert_allclose(telescope.position, subarray.positions[tel_id].to_value("m"))
        assert (ours.name, ours.optics) == (theirs.camera.name, theirs.optics.name)
        assert ours.sampling_rate_ghz == theirs.camera.readout.sampling_rate.to_value("GHz")
        assert ours.focal_length_m == theirs.optics.equivalent_focal_length.to_value("m")
        np.testing.assert_array_equal(ours.geometry.pix_x, theirs.camera.geometry.pix_x)
        assert (
            ours.geometry.neighbor_matrix_sparse != theirs.camera.geometry.neighbor_matrix_sparse
        ).nnz == 0


def test_telescopes_are_selected_by_type_camera_and_id():
    with SimtelFile(real_file("calib")) as simtel:
        telescopes = describe_array(simtel)
    types = "LST MST MST SST SST SST SCT".split()
    assert [t.camera.telescope_type for t in telescopes.values()] == types
    for type_mode, ids in (
        ("SST+SCT", [4, 5, 6, 7]),
        ("SCT+LST", [7, 1]),
        ("ALL", [4, 5, 6, 7, 1, 2, 3]),
        ("NectarCam+6", [2, 6]),
        ("flashcam", [3]),
        ("2-4+MST", [2, 3, 4]),
        ("*cam", [1, 2, 3, 4, 6, 7]),
    ):
        assert [t.tel_id for t in select_telescopes(telescopes, type_mode)] == ids
    with pytest.raises(DataError, match=r"'VERITAS'.*1 LST LSTCam"):
        select_telescopes(telescopes, "SST+VERITAS")


@pytest.fixture
def own_names(tmp_path):
    """A recent array, in which each telescope has a camera and optics name of its own."""
    raw, n = decompressed(real_file("header")), itertools.count(1)
    path = tmp_path / "own_names.simtel"
    pattern = rb"(MSTx-NectarCam|(?<=CAMERA_CONFIG_NAME\x09)NectarCam)"
    path.write_bytes(
        re.sub(pattern, lambda m: b"MSTN-" + b"%d" % (10 ** (len(m[0]) - 6) + next(n)), raw)
    )
    return path


def test_equal_cameras_are_one_type_whatever_their_names(own_names, tmp_path):
    with SimtelFile(own_names) as simtel:
        telescopes = describe_array(simtel)
    msts = [t for t in telescopes if t > 4]
    cameras = [telescopes[t].camera for t in msts]
    assert len({c.name for c in cameras}) == len(msts) >= 9
    assert {c.kind for c in cameras} == {"NectarCam"}
    assert len({c.fingerprint for c in cameras}) == len({id(c.geometry) for c in cameras}) == 1
    for type_mode, ids in (
        ("NectarCam", msts),
        ("MSTN-*", msts),
        ("mstn-*", msts),
        ("lstcam+MSTN-????*", [1, 2, 3, 4, *msts]),
        (cameras[2].name, [msts[2]]),
    ):
        assert [t.tel_id for t in select_telescopes(telescopes, type_mode)] == ids
    with pytest.raises(DataError, match=r"'SCT'.*4 LST LSTCam.*, \d+ MST NectarCam \(M"):
        select_telescopes(telescopes, "SCT")
    changed = with_types(telescopes, "MSTN-*: SST, 5: X_1")
    assert [changed[t].camera.telescope_type for t in msts] == ["SST"] * len(
        msts
    )  # the first item decides
    changed = with_types(telescopes, "5: X_1, MSTN-*: SST")
    assert [t.tel_id for t in select_telescopes(changed, "X_1")] == [5]
    assert [t.tel_id for t in select_telescopes(changed, "ALL")] == [*msts[1:], 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"no telescope 'CHEC' .* Change \[telescope\] types"):
        with_types(telescopes, "CHEC: SST")
    extract(own_names, tmp_path / "o.h5", types="LST: BIG", mapping="rebin, NectarCam: axial")
    with layout.open_layout(tmp_path / "o.h5") as h5:
        table = layout.tel_table(h5)
        assert table["name"][: len(msts)].astype(str).tolist() == [c.name for c in cameras]
        methods = [layout.camera_pixels(h5, k.decode())[2]["mapping"] for k in table["camera"]]
        kinds = table["tel_type"].astype(str).tolist()
        assert dict(zip(kinds, methods, strict=True)) == {"BIG": "rebin", "MST": "axial"}
        assert len(h5.get_node(layout.CAMERAS)._v_children) == 2
    assert validate(tmp_path / "o.h5") == []


def test_cameras_that_differ_in_one_pixel_are_not_one_type(tmp_path):
    raw = bytearray(decompressed(real_file("header")))
    with SimtelFile(real_file("header")) as simtel:
        x = np.asarray(simtel.telescopes[5]["camera_settings"]["pixel_x"], "<f4").tobytes()
    at = raw.index(x) + 400
    raw[at : at + 4] = (np.frombuffer(raw[at : at + 4], "<f4") + np.float32(1e-3)).tobytes()
    (tmp_path / "a.simtel").write_bytes(raw)
    with SimtelFile(tmp_path / "a.simtel") as simtel:
        cameras = [
            t.camera for t in describe_array(simtel).values() if t.camera.kind == "NectarCam"
        ]
    fingerprints = [c.fingerprint for c in cameras]
    assert len(set(fingerprints)) == 2
    assert len({id(c.geometry) for c in cameras}) == 2


def test_uncompressed_gzip_and_zstd_files_give_the_same_events(tmp_path):
    raw = decompressed(real_file("proton"))
    (tmp_path / "a.simtel").write_bytes(raw)
    (tmp_path / "b.simtel.gz").write_bytes(
        gzip.compress(raw[:3_000_000], 1) + gzip.compress(raw[3_000_000:], 1) + b"\0" * 512
    )
    expected = None
    for path in (real_file("proton"), tmp_path / "a.simtel", tmp_path / "b.simtel.gz"):
        with SimtelFile(path) as simtel:
            found = [(e.event_id, sorted(e.telescopes)) for e in simtel.events()]
            assert not simtel.problem
        expected = expected or found
        assert found == expected
    assert len(expected) == 6


def test_a_file_that_ends_in_the_middle_of_an_event_is_incomplete():
    with SimtelFile(real_file("gamma")) as simtel:
        assert len(list(simtel.events())) == 9
        assert "cut off" in simtel.problem


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(EVENTS))
def test_truncated_at_random_places_complete_events_are_kept(key, tmp_path):
    """What is extracted are the first events of the whole file, with the same images."""
    from conftest import all_images

    whole = real_file(key).read_bytes()
    extract(key, tmp_path / "whole.h5")
    expected = all_images(tmp_path / "whole.h5")
    order = []
    with SimtelFile(real_file(key)) as simtel:
        order = [(e.run_number, e.event_id) for e in simtel.events()]
    rng = np.random.default_rng(7)
    seen = set()
    for cut in sorted(rng.integers(1, len(whole), 9).tolist()):
        path = tmp_path / f"cut_{cut}{real_file(key).suffix}"
        path.write_bytes(whole[:cut])
        out = tmp_path / "cut.h5"
        out.unlink(missing_ok=True)
        try:
            report = extract(path, out)
        except DataError as error:
            assert "no complete simtel header" in str(error)
            assert not out.exists()
            seen.add("refused")
            continue
        assert report.problem, f"truncation at {cut} of {len(whole)} bytes was not detected"
        found = all_images(out)
        assert sorted(found) == sorted(order[: len(found)])
        for event, (_, images) in found.items():
            assert images.keys() == expected[event][1].keys()
            for tel_id, image in images.items():
                np.testing.assert_array_equal(image, expected[event][1][tel_id])
        assert validate(out) == []
        seen.add("kept")
        path.unlink()
    assert ("refused" if key == "header" else "kept") in seen


@pytest.mark.slow
@pytest.mark.parametrize("key", ["sst", "proton"])
def test_damaged_bytes_are_reported_or_harmless(key, tmp_path):
    """16 random bytes in an uncompressed file (no checksum), in the description or the events.

    Either a problem is reported or the output is valid.
    """
    raw = decompressed(real_file(key))
    first_event = raw.index(SYNC_MARKER + struct.pack("<H", ARRAY_EVENT))
    rng = np.random.default_rng(11)
    places = [*rng.integers(0, first_event, 8), *rng.integers(first_event, len(raw) - 16, 8)]
    for place in places:
        damaged = bytearray(raw)
        damaged[place : place + 16] = rng.bytes(16)
        path = tmp_path / "damaged.simtel"
        path.write_bytes(damaged)
        try:
            report = extract(path, tmp_path / "out.h5", overwrite=True)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert report.problem or validate(tmp_path / "out.h5") == []


def test_an_event_with_an_impossible_number_is_reported(tmp_path):
    raw = bytearray(decompressed(real_file("proton")))
    trigger = raw.index(SYNC_MARKER + struct.pack("<H", ARRAY_EVENT)) + 16
    struct.pack_into("<i", raw, trigger + 4, -5)
    (tmp_path / "a.simtel").write_bytes(raw)
    report = extract(tmp_path / "a.simtel", tmp_path / "out.h5")
    assert (report.problem, report.events_written) == ("an event has the impossible number -5", 0)


def test_a_second_run_in_a_file_is_reported_and_not_read(tmp_path):
    raw = decompressed(real_file("proton"))
    (tmp_path / "two.simtel").write_bytes(raw + raw)
    report = extract(tmp_path / "two.simtel", tmp_path / "out.h5")
    assert report.events_written == 6
    assert report.problem == "a second run begins in the middle of the file and is not read"
    with layout.open_layout(tmp_path / "out.h5") as h5:
        assert layout.runs_table(h5)["complete"].tolist() == [0]


def test_a_damaged_gzip_stream_is_reported(tmp_path):
    raw = bytearray(real_file("sst").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path = tmp_path / "damaged.simtel.gz"
    path.write_bytes(raw)
    report = extract(path, tmp_path / "out.h5")
    assert report.problem
    assert 0 < report.events_written <= 31


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x1f\x8b",
        b"\x28\xb5\x2f\xfd",
        b"SIMPLE  =",
        b"\x89HDF\r\n\x1a\n",
        b"\0" * 4096,
        gzip.compress(b"text", mtime=0),
    ],
)
def test_foreign_files_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "foreign.simtel.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no complete simtel header") as error:
        SimtelFile(path)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="cannot be opened"):
        SimtelFile(tmp_path / "absent.simtel.gz")
