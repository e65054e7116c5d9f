"""Extraction: images against ctapipe's in every layout; appending, merging, interruptions."""

import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import tables
from conftest import (
    PACKAGE,
    all_images,
    decompressed,
    extract,
    other_production,
    real_file,
    settings,
    stored,
)
from hypothesis import given
from hypothesis import strategies as st

from image_extractor import cli, layout
from image_extractor import simtel as simtel_module
from image_extractor.errors import DataError, UsageError
from image_extractor.image_extractor import ImageExtractor
from image_extractor.images import SelectedArray
from image_extractor.instrument import describe_array
from image_extractor.look import inspect, validate
from image_extractor.mapping import camera_mapping
from image_extractor.rearrangement import assign, assign_showers
from image_extractor.settings import Cut, EnergyBins, Settings
from image_extractor.simtel import SimtelFile
from image_extractor.writer import Writer


def cells(key):
    """Telescope id -> (cell of each pixel, image shape, sampling rate in GHz)."""
    with SimtelFile(real_file(key)) as simtel:
        found = {}
        for tel_id, telescope in describe_array(simtel).items():
            mapping = camera_mapping(telescope.camera.pixel_x, telescope.camera.pixel_y)
            found[tel_id] = (mapping.cells, mapping.shape, telescope.camera.sampling_rate_ghz)
    return found


def in_samples(peak_time, rate, unit):
    """Numbers stored for peak times in ns, negative ones as 0."""
    samples = np.clip(peak_time * np.float32(rate), 0, None).astype(np.float64)
    return np.rint(samples * (1 / unit))


@pytest.mark.parametrize("key", ["gamma", "sst", "proton"])
@pytest.mark.parametrize("storage", ["mapped", "all"])
def test_every_stored_pixel_equals_ctapipes(key, storage, dl1, tmp_path):
    if storage == "all" and key == "gamma":
        pytest.skip("126 telescopes in one table are tested with the SCTs alone, below")
    reference, _ = dl1(key)
    extract(key, tmp_path / "o.h5", storage_mode=storage, dtype="uint32")
    found = all_images(tmp_path / "o.h5")
    assert [k[1] for k in sorted(found)] == sorted(r[0] for r in reference)
    where = cells(key)
    for event_id, images, shower in reference:
        row, pictures = next(v for k, v in found.items() if k[1] == event_id)
        assert pictures.keys() == images.keys()
        assert row["mc_energy"] == pytest.approx(shower.energy.to_value("TeV"), rel=1e-12)
        assert (row["core_x"], row["core_y"]) == (
            shower.core_x.to_value("m"),
            shower.core_y.to_value("m"),
        )
        assert row["alt"] == pytest.approx(shower.alt.to_value("rad"), rel=1e-6)
        assert row["az"] == pytest.approx(shower.az.to_value("rad"), rel=1e-6)
        assert row["h_first_int"] == shower.h_first_int.to_value("m")
        assert row["primary_id"] == shower.shower_primary_id
        for tel_id, (charge, peak_time) in images.items():
            index, shape, rate = where[tel_id]
            expected = np.zeros(np.prod(shape))
            expected[index] = stored(charge)
            np.testing.assert_array_equal(pictures[tel_id][..., 0], expected.reshape(shape))
            np.testing.assert_array_equal(
                pictures[tel_id][..., 1].reshape(-1)[index],
                in_samples(peak_time, rate, 0.01),
            )
    assert validate(tmp_path / "o.h5") == []


@pytest.mark.parametrize("order", ["channels_last", "channels_first"])
@pytest.mark.parametrize("mode", sorted(layout.CHANNELS))
@pytest.mark.parametrize("storage", ["mapped", "all"])
def test_image_modes_scales_and_orders(mode, order, storage, dl1, tmp_path):
    """Includes defect 6 of the historic tool, see test_defects.py."""
    time_unit = 1.0 if storage == "all" else 0.01  # the former is the historic layout
    extract(
        "gamma",
        tmp_path / "o.h5",
        image_mode=mode,
        dim_order=order,
        storage_mode=storage,
        scale_factor=2,
        type_mode="SCT",
        time_unit=time_unit,
    )
    found = all_images(tmp_path / "o.h5")
    names = layout.CHANNELS[mode]
    index, shape, rate = cells("gamma")[101]
    n = 0
    for event_id, images, _ in dl1("gamma")[0]:
        for tel_id in images.keys() & set(range(101, 127)):
            image = found[31964, event_id][1][tel_id]
            assert image.shape == (
                (240, 240, len(names)) if order == "channels_last" else (len(names), 240, 240)
            )
            image = image if order == "channels_first" else np.moveaxis(image, -1, 0)
            for i in (0, 1):
                for j in (0, 1):
                    small = image[:, i::2, j::2]
                    assert small.dtype == np.uint16
                    for channel, name in zip(small, names, strict=True):
                        expected = np.zeros(14400)
                        if name == "charge":
                            expected[index] = stored(images[tel_id][0])
                        elif name == "time":
                            expected[index] = in_samples(images[tel_id][1], rate, time_unit)
                        np.testing.assert_array_equal(channel, expected.reshape(shape))
            n += 1
    assert n == 8


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [("uint16", 65535), ("int16", 32767), ("uint32", None), ("int32", None), ("float32", None)],
)
def test_charges_never_overflow(dtype, largest, dl1, tmp_path):
    """Defect 5 of the historic tool, see test_defects.py."""
    report = extract("proton", tmp_path / "o.h5", dtype=dtype)
    charges = np.concatenate([c for _, images, _ in dl1("proton")[0] for c, _ in images.values()])
    assert charges.max() > 900
    found = np.concatenate(
        [
            i[..., 0].ravel()
            for _, images in all_images(tmp_path / "o.h5").values()
            for i in images.values()
        ]
    )
    if dtype == "float32":
        expected = charges.astype(np.float64) * 100  # neither clipped nor rounded
        np.testing.assert_allclose(
            np.sort(found[found != 0]), np.sort(expected[expected != 0]), rtol=1e-6
        )
    else:
        expected = stored(charges)
        assert report.saturated_pixels == (0 if largest is None else (expected > largest).sum())
        expected = np.clip(expected, 0, largest)
        np.testing.assert_array_equal(np.sort(found[found > 0]), np.sort(expected[expected > 0]))
    assert (report.saturated_pixels > 0) == (largest is not None)


@pytest.mark.parametrize("method", ["none", "oversampling", "rebin", "nearest"])
def test_other_mappings_equal_the_product_with_the_stored_matrix(method, dl1, tmp_path):
    extract("sst", tmp_path / "o.h5", mapping=method, dtype="uint32")
    with layout.open_layout(tmp_path / "o.h5") as h5:
        key = h5.root.Tel_Table[0]["camera"].decode()
        _, matrix, camera = layout.camera_pixels(h5, key)
    shape = json.loads(camera["image_shape"])
    found = all_images(tmp_path / "o.h5")
    for event_id, images, _ in dl1("sst")[0]:
        for tel_id, (charge, _) in images.items():
            expected = np.bincount(
                matrix["cell"],
                matrix["weight"] * charge[matrix["pixel"]].astype(float),
                np.prod(shape),
            )
            image = found[102, event_id][1][tel_id][..., 0]
            assert image.shape == tuple(shape)
            np.testing.assert_allclose(
                image.ravel(), np.clip(expected, 0, None) * 100, atol=0.51, rtol=1e-6
            )


def test_peak_times_keep_their_resolution(tmp_path, dl1):
    """In whole samples, the times of a cleaned image have a handful of values."""
    from ctapipe.image import tailcuts_clean

    reference, subarray = dl1("proton")
    where, n_values = cells("proton"), {}
    for unit in (0.01, 1.0):
        extract("proton", tmp_path / f"{unit}.h5", time_unit=unit)
        with tables.open_file(str(tmp_path / f"{unit}.h5")) as h5:
            assert h5.root._v_attrs.time_unit_samples == unit
        found = {k[1]: v[1] for k, v in all_images(tmp_path / f"{unit}.h5").items()}
        for event_id, images, _ in reference:
            for tel_id, (charge, peak_time) in images.items():
                mask = tailcuts_clean(subarray.tel[tel_id].camera.geometry, charge, 10, 5)
                index, _, rate = where[tel_id]
                stored_time = found[event_id][tel_id][..., 1].reshape(-1)[index] * unit
                error = (stored_time - peak_time * rate)[mask]
                assert np.abs(error).max(initial=0) <= 0.5001 * unit
                if mask.sum() >= 20:
                    n_values.setdefault(unit, []).append(np.unique(stored_time[mask]).size)
    assert 3 * sum(n_values[1.0]) < sum(n_values[0.01])


def test_a_type_too_small_for_the_peak_times_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"camera \w+: its \d+ samples .* too large for int16"):
        extract("calib", tmp_path / "o.h5", dtype="int16", time_unit=0.001)


def test_mappings_are_made_once_for_all_files():
    found = []
    for _ in range(2):
        with SimtelFile(real_file("proton")) as simtel:
            found.append(SelectedArray(simtel, settings(mapping="rebin")).mappings)
    assert all(found[0][t] is found[1][t] for t in found[0])
    assert len({id(m) for m in found[0].values()}) in (2, 3)  # LSTCam, FlashCam, perhaps ASTRICam


def test_energy_recon_labels_the_true_energy(tmp_path):
    report = extract("sst", tmp_path / "o.h5", mode="energy_recon", storage_mode="mapped")
    assert report.events_written == 31
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        rows = h5.root.Events.read()
        assert rows["energy_reconstruction_bin_label"].dtype == np.uint8
        expected = np.floor((np.log10(rows["mc_energy"]) + 2) / 0.05 + 1e-9).astype(int)
        np.testing.assert_array_equal(rows["energy_reconstruction_bin_label"], expected)
    assert validate(tmp_path / "o.h5") == []
    left_out = extract("proton", tmp_path / "p.h5", mode="energy_recon")
    assert (left_out.events_written, left_out.other_primary) == (0, 6)
    assert (
        extract(
            "proton", tmp_path / "q.h5", mode="energy_recon", gamma_only=False, storage_mode="all"
        ).events_written
        == 6
    )
    assert validate(tmp_path / "q.h5") == []


def test_old_code_can_read_the_output(tmp_path):
    """Plain PyTables code that knows only the historic layout."""
    extract(
        "gamma",
        tmp_path / "mapped.h5",
        image_mode="PIXELS_1C",
        type_mode="SCT",
        energy_bins=EnergyBins(min=-1, max=0.5),
    )
    n = 0
    with tables.open_file(str(tmp_path / "mapped.h5"), mode="r") as f:
        tel_ids = [int(t["tel_id"]) for t in f.root.Tel_Table.iterrows()]
        assert set(f.root.Tel_Table.cols.tel_type[:]) == {b"SCT"}
        assert f.root.Tel_Table.cols.run_array_direction[0].tolist() == pytest.approx(
            [0, 1.2217305]
        )
        for i in range(3):
            group = f.get_node(f"/E{i}")
            assert (group._v_attrs.min_energy, group._v_attrs.max_energy) == (
                -1 + i / 2,
                -0.5 + i / 2,
            )
            assert group._v_attrs.units == "TeV"
            for event in group.Events.iterrows():
                assert event["gamma_hadron_label"] == 0
                assert -1 + i / 2 <= np.log10(event["mc_energy"]) < -0.5 + i / 2
                for slot, row in enumerate(event["tel_map"]):
                    if row != -1:
                        image = f.get_node(f"/E{i}/T{tel_ids[slot]}")[row]
                        assert image.shape == (120, 120, 1)
                        n += 1
        events = f.root.E0.Events
        historic = {
            **dict.fromkeys(("event_number", "run_number"), "uint32"),
            "gamma_hadron_label": "uint8",
            **dict.fromkeys(("core_x", "core_y", "h_first_int", "mc_energy"), "float64"),
            **dict.fromkeys(("az", "alt"), "float32"),
            "reconstructed_energy": "float64",
            "tel_map": "int32",
        }
        assert events.colnames[:11] == list(historic)
        assert [events.coltypes[name] for name in historic] == list(historic.values())
    assert n == 8


def test_readers_need_no_compression_plugin(tmp_path):
    extract("proton", tmp_path / "o.h5")
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        for node in h5.walk_nodes("/", "Leaf"):
            assert node.filters.complib in ("zlib", None)


def test_the_dictionary_determines_events_bins_and_energies(tmp_path):
    chosen = {
        (102, 301): (1, 0.7),
        (102, 303): (0, 0.2),
        (102, 999999): (2, 1.0),
        (5, 301): (0, 1.0),
    }
    report = extract(
        "sst", tmp_path / "o.h5", bins_cuts_dict=chosen, energy_bins=EnergyBins(min=-1, max=0.5)
    )
    assert (report.events_read, report.events_written, report.not_in_dictionary) == (31, 2, 29)
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        assert h5.root.E1.Events[0]["event_number"] == 301
        assert h5.root.E1.Events[0]["reconstructed_energy"] == 0.7
        assert h5.root.E0.Events[0]["event_number"] == 303
    ignored = extract("sst", tmp_path / "p.h5", bins_cuts_dict=chosen, use_pkl_dict=False)
    assert ignored.events_written == 31


@pytest.mark.parametrize("first", [True, False])
def test_events_with_and_without_a_dictionary_do_not_mix(tmp_path, first):
    """The former are binned by reconstructed energy, the latter by true energy."""
    chosen = {(102, 301): (1, 0.7)}
    extract("sst", tmp_path / "o.h5", bins_cuts_dict=chosen if first else None)
    with pytest.raises(DataError, match=r"chosen and binned by .* Give another output"):
        extract("sst", tmp_path / "o.h5", bins_cuts_dict=None if first else chosen)


def test_image_cuts_equal_ctapipes(tmp_path, dl1):
    from ctapipe.image import leakage_parameters, tailcuts_clean

    reference, subarray = dl1("sst")
    expected = {}
    for event_id, images, _ in reference:
        for tel_id, (charge, _) in images.items():
            geometry = subarray.tel[tel_id].camera.geometry
            mask = tailcuts_clean(geometry, charge, picture_thresh=10, boundary_thresh=5)
            if mask.any() and charge[mask].sum() >= 60:
                if leakage_parameters(geometry, charge, mask).intensity_width_2 <= 0.2:
                    expected.setdefault(event_id, set()).add(tel_id)
    expected = {e: t for e, t in expected.items() if len(t) >= 2}
    report = extract(
        "sst", tmp_path / "o.h5", min_telescopes=2, min_intensity=60.0, max_leakage=0.2
    )
    found = {k[1]: set(v[1]) for k, v in all_images(tmp_path / "o.h5").items()}
    assert found == expected
    assert 0 < len(found) < 31
    assert report.failed_image_cuts == 31 - len(found)


def test_appending_skips_and_reports_events_that_are_in_the_output(tmp_path, caplog):
    out = tmp_path / "o.h5"
    first = extract("sst", out, max_events=10)
    assert first.events_written == 10
    again = extract("sst", out)
    assert (again.duplicates, again.events_written) == (10, 21)
    assert "10 events of run 102 are already in the output" in caplog.text
    extract("sst", tmp_path / "whole.h5")
    assert_same(all_images(out), all_images(tmp_path / "whole.h5"))
    assert validate(out) == []
    before = all_images(out)
    extract("sst", out)
    assert_same(all_images(out), before)


def assert_same(a, b, rows=True):
    assert a.keys() == b.keys()
    for key in a:
        if rows:
            for name in (
                "mc_energy",
                "core_x",
                "alt",
                "gamma_hadron_label",
                "reconstructed_energy",
            ):
                np.testing.assert_array_equal(a[key][0][name], b[key][0][name])
        assert a[key][1].keys() == b[key][1].keys()
        for tel_id in a[key][1]:
            np.testing.assert_array_equal(a[key][1][tel_id], b[key][1][tel_id])


@pytest.mark.parametrize(
    ("how", "storage", "jobs"),
    [({"primary": 0}, "mapped", 1), ({"energy": 1.01}, "all", 2), ({}, "mapped", 2)],
)
def test_equal_events_are_skipped_and_different_ones_kept_apart(
    how, storage, jobs, tmp_path, caplog
):
    """Files of two productions share run and event numbers; the third file repeats the first."""
    raw = decompressed(real_file("proton"))
    for name, content in (("a", raw), ("b", other_production(raw, **how)), ("c", raw)):
        (tmp_path / f"{name}.simtel").write_bytes(content)
    extractor = ImageExtractor(tmp_path / "o.h5", settings=settings(storage_mode=storage))
    reports = extractor.process_files(sorted(tmp_path.glob("*.simtel")), jobs=jobs)
    n = 6 if how else 0
    assert [r.events_written for r in reports] == [6, n, 0]
    assert [r.duplicates for r in reports] == [0, 6 - n, 6]
    assert [r.same_numbers for r in reports] == [0, n, 0]
    assert ("have the run and event numbers of other events" in caplog.text) == bool(how)
    assert validate(tmp_path / "o.h5") == []
    with layout.open_layout(tmp_path / "o.h5") as h5:
        index = layout.index_table(h5)
    assert len(np.unique(index["identity"])) == len(index) == 6 + n
    assert len(np.unique(index["shower"])) == (6 if how else 3)
    extractor.process_files([tmp_path / "b.simtel"])  # appending finds them, too
    with layout.open_layout(tmp_path / "o.h5") as h5:
        assert len(layout.index_table(h5)) == 6 + n


def test_events_with_equal_physics_and_other_data_are_kept_apart(tmp_path):
    """For example the same showers simulated with more light of the night sky."""
    raw = decompressed(real_file("proton"))
    with SimtelFile(real_file("proton")) as simtel:
        data = max(
            next(simtel.events()).telescopes.values(), key=lambda adc: len(adc.payload)
        ).payload
    at = raw.index(bytes(data)) + len(data) - 100
    (tmp_path / "b.simtel").write_bytes(raw[:at] + bytes([raw[at] ^ 2]) + raw[at + 1 :])
    extract("proton", tmp_path / "o.h5")
    report = extract(tmp_path / "b.simtel", tmp_path / "o.h5")
    assert (report.duplicates, report.events_written, report.same_numbers) == (5, 1, 1)
    assert validate(tmp_path / "o.h5") == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_dictionary_that_cannot_tell_two_events_apart_is_refused(jobs, tmp_path):
    raw = decompressed(real_file("proton"))
    (tmp_path / "a.simtel").write_bytes(raw)
    (tmp_path / "b.simtel").write_bytes(other_production(raw, primary=0))
    files = sorted(tmp_path.glob("*.simtel"))
    with SimtelFile(files[0]) as simtel:
        first = next(simtel.events())
    chosen = {(first.run_number, first.event_id): (0, 0.5)}
    same = f"run {first.run_number} event {first.event_id}: two different events"
    with pytest.raises(UsageError, match=same):
        ImageExtractor(tmp_path / "o.h5", chosen, settings=settings()).process_files(
            files, jobs=jobs
        )
    assert not (tmp_path / "o.h5").exists()
    for path in files:  # each with its own dictionary
        extract(path, tmp_path / "o.h5", bins_cuts_dict=chosen)
    with layout.open_layout(tmp_path / "o.h5") as h5:
        assert sorted(layout.index_table(h5)["primary_id"]) == [0, 101]


def test_other_arrays_and_configurations_are_refused(tmp_path):
    """Defect 11 of the historic tool, see test_defects.py."""
    out = tmp_path / "o.h5"
    extract("sst", out)
    before = out.read_bytes()
    with pytest.raises(
        DataError,
        match=r"proton.*another array than the output's: telescope 1 is a LSTCam, not a DigiCam",
    ):
        extract("proton", out)
    with pytest.raises(
        DataError, match=r"another configuration .*\[image\] dtype = int32, not uint16"
    ):
        extract("sst", out, dtype="int32")
    assert out.read_bytes() == before
    with ImageExtractor(tmp_path / "p.h5", settings=settings()) as extractor:
        extractor.process_data(real_file("proton"))
        with pytest.raises(DataError, match=r"another array .* Give another output"):
            extractor.process_data(real_file("sst"))
    assert len(all_images(tmp_path / "p.h5")) == 6


def test_the_first_difference_between_arrays_is_named():
    ours = [[1, "LST", "LSTCam", "f", 0.0, 0.0, 1.0], [2, "LST", "LSTCam", "f", 5.0, 0.0, 1.0]]
    moved = [ours[0], [2, "LST", "LSTCam", "f", 5.5, 0.0, 1.0]]
    assert layout.difference(ours, ours) == ""
    assert "telescope 2 is at (5.5, 0.0, 1.0) m, not (5.0," in layout.difference(moved, ours)
    assert "telescope 2 (LST LSTCam) is missing" in layout.difference(ours[:1], ours)
    assert "telescope 2 (LST LSTCam) is additional" in layout.difference(ours, ours[:1])
    assert "another camera geometry" in layout.difference(
        [[1, "LST", "LSTCam", "g", 0.0, 0.0, 1.0]], ours[:1]
    )


@pytest.mark.parametrize("storage", ["mapped", "all"])
@pytest.mark.parametrize(
    ("compression", "split_by"), [("gzip", "shower"), ("none", "event"), ("blosc-lz4", "event")]
)
def test_shuffle_and_split_lose_no_row(storage, compression, split_by, tmp_path):
    plain, out, again = tmp_path / "plain.h5", tmp_path / "o.h5", tmp_path / "again.h5"
    options = dict(storage_mode=storage, compression=compression)
    extract("sst", plain, **options)
    split = {"Training": 0.7, "Validation": 0.2, "Test": 0.1}
    options |= dict(shuffle=True, split=split, split_by=split_by, seed=5)
    extract("sst", out, **options)
    extract("sst", again, **options)
    assert_same(all_images(out), all_images(plain))
    assert list(all_images(out)) == list(all_images(again))  # same seed, same order
    assert list(all_images(out)) != list(all_images(plain))
    assert validate(out) == []
    with tables.open_file(str(out)) as h5:
        names = {t.name for t in layout.event_tables(h5)}
        by_part = [set(layout.shower_keys(t.read())) for t in layout.event_tables(h5) if t.nrows]
        assert (sum(map(len, by_part)) > len(set().union(*by_part))) == (split_by == "event")
        assert names == {"Events_Training", "Events_Validation", "Events_Test"}
        per_bin = {}
        for table in layout.event_tables(h5):
            per_bin.setdefault(table._v_parent._v_name, {})[table.name] = int(table.nrows)
    for counts in per_bin.values() if split_by == "event" else ():
        n = sum(counts.values())
        for name, fraction in split.items():
            assert abs(counts[f"Events_{name}"] - fraction * n) < 1
    assert ("shower in another part" in inspect(out)) == (split_by == "event")


@pytest.mark.parametrize("storage", ["mapped", "all"])
def test_a_shuffled_file_can_be_appended_to_and_shuffled_again(storage, tmp_path):
    out = tmp_path / "o.h5"
    for max_events, shuffle in ((7, True), (12, False), (31, True)):
        extract("sst", out, max_events, storage_mode=storage, shuffle=shuffle)
        assert validate(out) == []
        assert len(all_images(out)) == max_events
    extract("sst", out, storage_mode=storage, split={"A": 0.5, "B": 0.5})
    assert validate(out) == []
    extract("sst", tmp_path / "p.h5", storage_mode=storage)
    assert_same(all_images(out), all_images(tmp_path / "p.h5"))


def test_mapped_images_are_not_copied_by_shuffling(tmp_path):
    extract("sst", tmp_path / "a.h5")
    extract("sst", tmp_path / "b.h5", shuffle=True, split={"A": 0.5, "B": 0.5})
    sizes = [(tmp_path / n).stat().st_size for n in ("a.h5", "b.h5")]
    assert sizes[1] < sizes[0] * 1.15


def test_stratified_parts_have_their_fraction_of_every_class():
    rng = np.random.default_rng(0)
    labels = np.r_[np.zeros(905, int), np.full(95, 101)]
    parts = assign(labels, {"Training": 0.8, "Validation": 0.1, "Test": 0.1}, rng)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1000))
    assert [int((labels[rows] == 101).sum()) for rows in parts.values()] == [76, 10, 9]
    assert [rows.size for rows in parts.values()] == [800, 101, 99]


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.integers(1, 20))
def test_showers_are_split_whole_and_by_class_and_energy(seed, n_showers, uses):
    rng = np.random.default_rng(seed)
    shower = np.repeat(np.arange(n_showers), rng.integers(1, uses + 1, n_showers))
    index = np.zeros(shower.size, layout.INDEX_DTYPE)
    index["shower"] = rng.permutation(2 * n_showers)[shower]
    index["primary_id"] = np.where(rng.random(n_showers) < 0.3, 0, 101)[shower]
    index["mc_energy"] = rng.pareto(1, n_showers)[shower]
    index = rng.permutation(index)
    fractions = {"Training": 0.7, "Validation": 0.2, "Test": 0.1, "None": 0.0}
    parts = assign_showers(index, fractions, rng)
    assert len(np.unique(np.c_[index["shower"], parts], axis=0)) == n_showers
    for primary in (0, 101):
        energy = index["mc_energy"][index["primary_id"] == primary]
        for limit in np.quantile(energy, [0.25, 0.5, 1.0]) if energy.size else ():
            chosen = (index["primary_id"] == primary) & (index["mc_energy"] <= limit)
            counts = np.bincount(parts[chosen], minlength=4)
            # Blocks of ten showers may be cut by the limit; the last has no limit above it.
            slack = (2 if limit == energy.max() else 12) * uses
            np.testing.assert_array_less(
                np.abs(counts - 0.1 * np.array([7, 2, 1, 0]) * chosen.sum()), slack + 1e-9
            )
    assert not (parts == 3).any()


def test_which_showers_are_drawn_depends_on_the_seed_alone():
    index = np.zeros(200, layout.INDEX_DTYPE)
    index["shower"], index["mc_energy"] = np.arange(200), np.arange(200)
    drawn = [
        np.flatnonzero(assign_showers(index, {"a": 0.9, "b": 0.1}, np.random.default_rng(seed)))
        for seed in range(400)
    ]
    assert all(d.size == 20 for d in drawn)
    assert drawn[0].tolist() != drawn[1].tolist()
    times = np.bincount(np.concatenate(drawn), minlength=200)  # 40 are expected of each
    assert 15 < times.min() <= times.max() < 70


def test_validate_finds_a_shower_in_two_parts(tmp_path):
    extract("sst", tmp_path / "o.h5", split={"A": 0.5, "B": 0.5})
    assert validate(tmp_path / "o.h5") == []
    extract("sst", tmp_path / "p.h5", split={"A": 0.5, "B": 0.5}, split_by="event")
    assert validate(tmp_path / "p.h5") == []
    with tables.open_file(str(tmp_path / "p.h5"), "a") as h5:
        h5.root._v_attrs.split = str(h5.root._v_attrs.split).replace("event", "shower")
        layout.seal(h5)
    (problem,) = validate(tmp_path / "p.h5")
    assert "events have their shower in another part, too" in problem


def test_appending_to_a_split_file_is_refused(tmp_path):
    extract("sst", tmp_path / "o.h5", split={"A": 0.5, "B": 0.5})
    with pytest.raises(DataError, match="was split"):
        extract("sst", tmp_path / "o.h5")


@pytest.mark.parametrize("storage", ["mapped", "all"])
def test_two_jobs_write_the_same_as_one(storage, tmp_path):
    """With a truncated file, an unusable one, the whole of the first, and one of another array."""
    folder = tmp_path / "in"
    folder.mkdir()
    raw = real_file("sst").read_bytes()
    (folder / "a.simtel.gz").write_bytes(raw[: len(raw) // 3])
    (folder / "b.simtel.gz").write_bytes(b"nothing")
    (folder / "c.simtel.gz").write_bytes(raw)
    (folder / "d.simtel.zst").write_bytes(real_file("proton").read_bytes())
    files = sorted(folder.iterdir())
    results = {}
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.h5"
        extractor = ImageExtractor(out, settings=settings(storage_mode=storage))
        results[jobs] = [
            (r.failed, r.events_read, r.events_passed, r.duplicates, r.events_written)
            for r in extractor.process_files(files, jobs=jobs)
        ]
        assert validate(out) == []
    assert results[1] == results[2]
    assert [r[0] for r in results[1]] == [False, True, False, True]
    assert results[1][2][3] == results[1][0][4] > 0
    assert list(all_images(tmp_path / "1.h5")) == list(all_images(tmp_path / "2.h5"))
    assert_same(all_images(tmp_path / "1.h5"), all_images(tmp_path / "2.h5"))
    assert not list(tmp_path.glob(".*"))


CONFIG = (
    "storage_mode = mapped\n[image]\nscale_factor = 1\n[telescope]\ntype_mode "
    "= ALL\n[energy_bins]\nmin=-2\nmax=2\nbin_size=4\n"
)


def command(source, out, config):
    return [sys.executable, "-m", "image_extractor", str(source), str(out), str(config)]


def start(words, **options):
    """Start a command whose output is not needed."""
    environment = {**os.environ, "SLURM_CPUS_PER_TASK": "4"}  # so that --jobs 2 are two
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    quiet |= options
    return subprocess.Popen(words, **quiet)


def wait_for(process, is_reached):
    """Wait until a process has reached a state, or has ended."""
    while not is_reached() and process.poll() is None:
        time.sleep(0.01)


@pytest.fixture
def place(tmp_path):
    """A configuration, and an output in a folder of its own."""
    (tmp_path / "c.config").write_text(CONFIG)
    (tmp_path / "out").mkdir()
    return tmp_path / "c.config", tmp_path / "out" / "o.h5"


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
def test_kill_9_at_any_moment_leaves_nothing_or_the_old_file(existing, place, long_file):
    config, out = place
    words = [*command(long_file, out, config), "--max_events", "150"]
    before = None
    if existing:
        assert subprocess.run([*words[:-1], "50"], capture_output=True).returncode == 0
        before = out.read_bytes()
    rng = np.random.default_rng(int(existing))
    killed = 0
    for _ in range(3):
        process = start(words, cwd=PACKAGE)
        wait_for(process, (out.parent / ".o.h5.partial").exists)
        time.sleep(float(rng.uniform(0, 0.6)))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert (out.read_bytes() if existing else None) == before
        assert existing or not out.exists()
    assert killed >= 2
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert validate(out) == []
    assert len(all_images(out)) == 150
    assert [p.name for p in out.parent.iterdir()] == ["o.h5"]  # leftovers have been removed


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ending_a_run_with_jobs_leaves_no_process_and_no_file(how, place, long_file, tmp_path):
    import psutil

    (config, out), folder = place, tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.simtel.gz").symlink_to(long_file)
    process = start([*command(f"{folder}/*.gz", out, config), "--jobs", "2"])
    wait_for(process, lambda: len(list(out.parent.glob("..o.h5.partial-*.partial"))) >= 2)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(how)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=600)  # so that a failure does not hang
    assert alive == []
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert not out.exists()
    if how == signal.SIGTERM:
        assert list(out.parent.iterdir()) == []
    extract("sst", out)  # the next run removes what a killed one left
    assert [p.name for p in out.parent.iterdir()] == ["o.h5"]


def test_terminating_removes_temporary_files(place, long_file):
    config, out = place
    process = start(command(long_file, out, config), stderr=subprocess.PIPE, text=True)
    wait_for(process, (out.parent / ".o.h5.partial").exists)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Stopped" in errors
    assert list(out.parent.iterdir()) == []


def parse_stopped(*_):
    signal.raise_signal(signal.SIGTERM)


def swallow(*_):
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("reading", [parse_stopped, swallow])
def test_a_signal_swallowed_by_a_library_still_stops(reading, place, monkeypatch, capsys):
    """Such as numba's, which loads its extensions when the first image is made."""
    config, out = place
    before = signal.getsignal(signal.SIGTERM)
    whole = simtel_module.guarded
    monkeypatch.setattr(
        simtel_module, "guarded", lambda parse, what: whole(lambda: reading() or parse(), what)
    )
    assert cli.main([str(real_file("sst")), str(out), str(config)]) == 130
    assert "Stopped" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_writer_is_refused(tmp_path):
    out = tmp_path / "o.h5"
    with ImageExtractor(out, settings=settings()) as first:
        with pytest.raises(DataError, match="another process is writing it"):
            extract("sst", out)
        first.process_data(real_file("sst"), 3)
    assert len(all_images(out)) == 3
    assert extract("sst", out).events_written == 28


def test_a_failure_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "add", full)
    with pytest.raises(DataError, match=r"could not be written .No space left"):
        extract("sst", tmp_path / "o.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_a_full_disk_is_reported_in_one_line_and_leaves_no_file(compression, place):
    """The system refuses files above 300 kB, as if the disk were full."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        "from image_extractor.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    config, out = place
    arguments = [str(real_file("sst")), str(out), str(config), "--compression", compression]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "could not be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(out.parent.iterdir()) == []


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(DataError, match="its folder does not exist"):
        extract("sst", tmp_path / "absent" / "o.h5")
    with pytest.raises(DataError, match="is a folder"):
        extract("sst", tmp_path)
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(DataError, match="not an HDF5 file"):
        extract("sst", tmp_path / "text.h5")
    with tables.open_file(str(tmp_path / "other.h5"), "w") as h5:
        h5.create_array("/", "x", [1, 2])
    with pytest.raises(DataError, match="not written by image_extractor"):
        extract("sst", tmp_path / "other.h5")
    assert (tmp_path / "text.h5").read_text() == "not HDF5"


def test_a_header_without_events_gives_a_valid_empty_data_set(tmp_path):
    report = extract("header", tmp_path / "o.h5")
    assert (report.events_read, report.problem) == (0, "")
    assert validate(tmp_path / "o.h5") == []


def test_calibration_events_are_counted_but_not_written(tmp_path):
    report = extract("calib", tmp_path / "o.h5")
    assert (report.events_read, report.calibration_events, report.events_written) == (0, 1, 0)


def test_the_python_example_of_the_readme(tmp_path):
    output_path, bins_cuts_dict, mode = str(tmp_path / "o.h5"), {(102, 301): (0, 0.2)}, "gh_class"
    extractor = ImageExtractor(output_path, bins_cuts_dict, mode, telescope_type="SST")
    extractor.process_data(str(real_file("sst")), 50)
    assert list(all_images(output_path)) == [(102, 301)]
    for words in ((None, mode, "SST", "mapped"), (None, mode, "SST")):  # as historically
        made = ImageExtractor(output_path, *words).settings
        assert (made.type_mode, made.storage_mode) == ("SST", ([*words, "all"])[3])
    with pytest.raises(UsageError, match="no option colour"):
        ImageExtractor(output_path, None, mode, colour=1)
    with pytest.raises(UsageError, match="mode = gamma"):
        ImageExtractor(output_path, None, "gamma")


def test_memory_does_not_grow_with_the_file(place, long_file):
    """Peak memory for 10 and for 60 copies of the same events: 90 kB per event are noticed."""
    code = (
        "import sys; from image_extractor.cli import main; main(sys.argv[1:]);"
        # ru_maxrss would include the peak of the parent process, which Linux passes on in exec
        "print([w.split()[1] for w in open('/proc/self/status') if w.startswith('VmHWM')][0])"
    )
    config, out = place
    peaks = []
    for n_events in (60, 360):
        words = [sys.executable, "-c", code, str(long_file), str(out), str(config), "--overwrite"]
        words += ["--max_events", str(n_events)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 27, peaks
    assert peaks[1] < 800


@pytest.mark.parametrize("jobs", [1, 2])
def test_overwrite_replaces_the_old_output_but_not_its_own(jobs, tmp_path):
    out = tmp_path / "o.h5"
    extract("sst", out)
    extractor = ImageExtractor(out, settings=settings(), overwrite=True)
    extractor.process_files([real_file("sst")], 7, jobs)
    assert len(all_images(out)) == 7
    extractor.process_files([real_file("sst")], 5, jobs)
    assert len(all_images(out)) == 7


def test_overwrite_still_applies_after_a_failure(tmp_path, monkeypatch):
    out = tmp_path / "o.h5"
    extract("sst", out, dtype="int32")  # another configuration
    extractor = ImageExtractor(out, settings=settings(), overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr("image_extractor.finishing.verify", _fail)
        with pytest.raises(DataError, match="could not be written"):
            extractor.process_data(real_file("sst"), 3)
    extractor.process_data(real_file("sst"), 3)
    assert len(all_images(out)) == 3


def _fail(*_):
    raise DataError("as if the disk were full")


@pytest.mark.parametrize(("storage", "max_events"), [("mapped", 3), ("all", None)])
def test_a_repeated_run_changes_nothing(storage, max_events, tmp_path):
    """With one process and with two, which count the same."""
    (tmp_path / "in").mkdir()
    files = [tmp_path / "in" / name for name in ("a", "b")]  # the same file
    for path in files:
        path.symlink_to(real_file("proton"))
    first, second = {}, {}
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.h5"
        for reports in (first, second):
            before = out.read_bytes() if out.exists() else None
            extractor = ImageExtractor(out, settings=settings(storage_mode=storage))
            reports[jobs] = [
                (r.duplicates, r.events_written, sum(r.images.values()), r.saturated_pixels)
                for r in extractor.process_files(files, max_events, jobs)
            ]
        assert out.read_bytes() == before
        images = [image for _, images in all_images(out).values() for image in images.values()]
        n, saturated = max_events or 6, sum(int((i[..., 0] == 65535).sum()) for i in images)
        assert saturated > 0
        assert first[jobs] == [(0, n, len(images), saturated), (n, 0, 0, 0)]
        assert second[jobs] == [(n, 0, 0, 0)] * 2
        assert validate(out) == []
    assert first[1] == first[2]


def test_runs_gets_a_row_only_when_something_is_new(tmp_path):
    """New are further events of a file, or the complete file after an incomplete one."""
    out, part, whole = tmp_path / "o.h5", tmp_path / "x.gz", real_file("sst").read_bytes()

    def rows():
        with layout.open_layout(out) as h5:
            runs = layout.runs_table(h5)
        return list(zip(runs["events_written"].tolist(), runs["complete"].tolist(), strict=True))

    part.write_bytes(whole[:-100])
    for _ in range(2):
        n = len(all_images(out)) if extract(part, out) else 0
        assert rows() == [(n, 0)]
    part.write_bytes(whole)
    extract(part, out)
    extract(part, out, max_events=2)
    extract(part, out)
    assert rows() == [(n, 0), (31 - n, 1)]


def test_the_checksum_is_that_of_the_file_or_empty(tmp_path):
    """It is empty if reading failed or stopped before the end of the file."""
    raw = real_file("sst").read_bytes()
    damaged = bytearray(raw)
    damaged[len(raw) // 8] ^= 0xFF
    for name, content, max_events, is_known in (
        ("whole", raw, None, True),
        ("zstd", real_file("proton").read_bytes(), None, True),
        ("padded", raw + b"\0" * 5_000_000, None, True),
        ("cut", raw[:5_000_000], None, True),
        ("damaged", bytes(damaged), None, False),
        ("left", raw, 2, False),
    ):
        path, out = tmp_path / f"{name}.simtel.gz", tmp_path / f"{name}.h5"
        path.write_bytes(content)
        extract(path, out, max_events)
        with layout.open_layout(out) as h5:
            stored_sum = layout.runs_table(h5)["sha256"][0].decode()
        assert stored_sum == (hashlib.sha256(content).hexdigest() if is_known else ""), name


def test_a_file_system_without_locks_is_not_mistaken_for_another_writer(tmp_path, monkeypatch):
    from image_extractor import transaction

    def no_lock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(transaction.fcntl, "flock", no_lock)
    with pytest.raises(
        DataError, match=r"o\.h5: its file system does not support locks .*local disk"
    ):
        extract("header", tmp_path / "o.h5")
    # The lock file stays: if locks fail only sometimes, another process may hold it.
    assert [p.name for p in tmp_path.iterdir()] == [".o.h5.lock"]


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"storage_mode": "all"}])
def test_an_output_keeps_its_mode_bits(options, tmp_path):
    out = tmp_path / "o.h5"
    extract("header", out, storage_mode=options.get("storage_mode", "mapped"))
    for mode in (0o600, 0o664):
        out.chmod(mode)
        extract("header", out, shuffle=True, **options)
        assert stat.S_IMODE(out.stat().st_mode) == mode


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real.h5", tmp_path / "o.h5"
    link.symlink_to(real)
    extract("sst", link, max_events=3)
    extract("sst", link, max_events=5)
    assert link.is_symlink()
    assert len(all_images(real)) == 5
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["disk", "o.h5", "real.h5"]


def test_a_device_cannot_be_the_output(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a folder or a device"):
        extract("header", tmp_path / "pipe")


@pytest.mark.parametrize(
    "options",
    [{"seed": -1}, {"seed": 1.5}, {"split": {"A": 0.5, "B": 0.6}}, {"split": {"A/B": 1.0}}],
)
def test_a_wrong_seed_or_split_is_refused_at_once(options, tmp_path):
    with pytest.raises(UsageError, match=next(iter(options))):
        ImageExtractor(tmp_path / "o.h5", shuffle=True, **options)


def test_settings_may_be_made_in_python(tmp_path):
    made = Settings(storage_mode="mapped")
    assert ImageExtractor(tmp_path / "o.h5", settings=made).settings == made
    cuts = ImageExtractor(tmp_path / "o.h5", preselection_cuts={}).settings.preselection_cuts
    assert cuts["MSCW"] == Cut(("MSCW",), None, None)  # a cut that is left out is open


def test_the_stored_configuration_is_compared_as_settings(tmp_path):
    """Another spelling of the same values, as other versions may write, is not a difference."""
    extract("sst", tmp_path / "o.h5", max_events=2)
    with tables.open_file(str(tmp_path / "o.h5"), "a") as h5:
        text = str(h5.root._v_attrs.config)
        changed = text.replace("min = -2.0", "min = -2").replace("dim_order =", "dim_ordering =")
        h5.root._v_attrs.config = "# a comment\n" + changed.replace("mapping = auto\n", "")
    assert extract("sst", tmp_path / "o.h5", max_events=3).events_written == 1
    with pytest.raises(DataError, match=r"\(now \[image\] mapping = none, not auto\)"):
        extract("sst", tmp_path / "o.h5", mapping="none")


def test_linear_bins_may_begin_at_zero(tmp_path):
    bins = EnergyBins(scale="linear", min=0.0, max=20.0, bin_size=10.0)
    extract("proton", tmp_path / "o.h5", energy_bins=bins)
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        attrs = h5.root.E0._v_attrs
        assert (10**attrs.min_energy, attrs.max_energy) == (0, 1)
        assert h5.root.E0.Events.nrows > 0
    assert "events, 0 to 10 TeV" in inspect(tmp_path / "o.h5")
    assert validate(tmp_path / "o.h5") == []


@pytest.mark.parametrize(
    ("value", "message", "jobs"),
    [(np.nan, "is not a number", 1), (1e30, "lie too far apart", 2)],
)
def test_a_file_with_a_damaged_description_is_left_out(value, message, jobs, tmp_path):
    """The undamaged file after it is extracted."""
    bad, good, out = tmp_path / "a.simtel", real_file("proton"), tmp_path / "o.h5"
    raw = bytearray(decompressed(good))
    with SimtelFile(good) as simtel:
        x = next(iter(simtel.telescopes.values()))["camera_settings"]["pixel_x"]
    at = raw.index(np.asarray(x, "<f4").tobytes()) + 40
    raw[at : at + 4] = np.float32(value).tobytes()
    bad.write_bytes(raw)
    extractor = ImageExtractor(out, settings=settings(mapping="rebin"))
    reports = extractor.process_files([bad, good], jobs=jobs)
    assert [r.failed for r in reports] == [True, False]
    assert reports[0].problem.startswith("camera LSTCam: ")
    assert message in reports[0].problem
    assert len(all_images(out)) == 6


@pytest.mark.parametrize("jobs", [1, 2])
def test_events_that_may_come_from_a_damaged_file_are_reported(tmp_path, caplog, jobs):
    """The complete file does not replace them."""
    cut, whole = tmp_path / "a.simtel", real_file("sst")
    raw = decompressed(whole)
    cut.write_bytes(raw[: int(0.9 * len(raw))])
    extractor = ImageExtractor(tmp_path / "o.h5", settings=settings())
    for files, is_reported in (([cut], False), ([whole], True)):
        caplog.clear()
        extractor.process_files(files, jobs=jobs)
        assert ("They may come from a damaged file" in caplog.text) is is_reported


def test_a_telescope_that_cannot_be_calibrated_is_reported(tmp_path, monkeypatch):
    """For example one with more disabled pixels than pixels."""

    def broken(_):
        raise IndexError("index 1855 is out of bounds")

    monkeypatch.setattr("image_extractor.images.Calibrator", broken)
    report = extract("proton", tmp_path / "o.h5")
    assert "unreadable (IndexError: index 1855 is out of bounds)" in report.problem
    assert validate(tmp_path / "o.h5") == []


def test_an_unknown_mirror_class_is_accepted(tmp_path):
    path = tmp_path / "a.simtel"
    raw = decompressed(real_file("header"))
    changed, n = re.subn(rb"(MIRROR_CLASS\x02)[0-9] ", rb"\1x ", raw)
    assert n > 0
    path.write_bytes(changed)
    assert extract(path, tmp_path / "o.h5").problem == ""
    extract("header", tmp_path / "o.h5")  # the same array, so that it can be appended
