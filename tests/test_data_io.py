"""Every layout: written, read back, and refused with one clear line when it is not what it says."""

import os
import shutil
import subprocess

import h5py
import numpy as np
import pandas as pd
import pytest

import data_io
from utils import DataError


@pytest.fixture
def cube():
    rng = np.random.default_rng(0)
    flux = rng.random((9, 10, 30)).astype("f4")
    flux[:4, :5] = np.nan
    ivar = np.where(np.isfinite(flux), rng.random(flux.shape), 0).astype("f4")
    good = np.isfinite(flux).astype("f2")
    return data_io.Cube(flux, np.linspace(5000, 8000, 30), ivar, good, {"plateifu": "8485-1901"})


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_cube_round_trip(tmp_path, cube, compression):
    path = tmp_path / "a" / "8485-1901.h5"
    data_io.write_cube(path, cube, compression)
    back = data_io.read_cube(path)
    for name in ("flux", "wave", "ivar", "good_fraction"):
        np.testing.assert_array_equal(getattr(back, name), getattr(cube, name))
    assert back.attrs["plateifu"] == "8485-1901"
    assert data_io.read_cube_attrs(path)["shape"] == (9, 10, 30)
    assert data_io.read_cube(path, with_errors=False).ivar is None
    with h5py.File(path) as f:  # the names that other people's scripts open
        assert f["cube"].attrs["axes"] == "y,x,band"
        assert f["wave"].shape == (30,)


def test_outline_counts_measured_bins(tmp_path, cube):
    cube.flux[5, 5, :7] = np.nan
    cube.flux[6, 6] = 0
    cube.flux[7, 7, 1:] = 0
    data_io.write_cube(tmp_path / "c.h5", cube)
    outline = data_io.read_outline(tmp_path / "c.h5")
    expected = np.full((9, 10), 30)
    expected[:4, :5] = expected[6, 6] = 0
    expected[5, 5] = 23
    np.testing.assert_array_equal(outline.measured, expected)
    np.testing.assert_array_equal(outline.wave, cube.wave)
    assert outline.attrs["plateifu"] == "8485-1901"


def test_empty_corners_take_no_space(tmp_path, cube):
    cube.flux[:] = np.nan
    cube.flux[8, 9] = 1
    data_io.write_cube(tmp_path / "c.h5", cube)
    with h5py.File(tmp_path / "c.h5") as f:
        assert f["cube"].id.get_num_chunks() == 1
    np.testing.assert_array_equal(data_io.read_cube(tmp_path / "c.h5").flux, cube.flux)


def test_foreign_old_missing_and_broken_cubes_are_told_apart(tmp_path, cube):
    path = tmp_path / "c.h5"
    with pytest.raises(DataError, match="no such file"):
        data_io.read_cube(path)
    path.write_bytes(b"not hdf5")
    with pytest.raises(DataError, match="not a readable HDF5"):
        data_io.read_cube(path)
    data_io.write_cube(path, cube)
    with h5py.File(path, "a") as f:
        f.attrs["schema_version"] = 1
    with pytest.raises(DataError, match=r"version 1, this code needs .* 2\. Re-run process_single"):
        data_io.read_cube(path)


def test_labels_round_trip(tmp_path):
    path = tmp_path / "8485-1901.npy"
    labels = np.array([[8.4, np.nan]], "f4")
    data_io.write_labels(path, labels, np.array([[0.01, np.nan]]), {"n": 1})
    np.testing.assert_array_equal(data_io.read_labels(path), labels)
    np.testing.assert_allclose(data_io.read_label_error(path), [[0.01, np.nan]])
    assert data_io.read_label_meta(path) == {"n": 1}


@pytest.mark.parametrize("after", [0, 1])
def test_labels_replaced_half_way_are_absent_not_mixed(tmp_path, monkeypatch, after):
    """The .json says what is up to date: it must never lie beside older labels."""
    path = tmp_path / "8485-1901.npy"
    old = np.full((2, 2), 8.4, "f4")
    data_io.write_labels(path, old, old, {"options": "old"})
    real, seen = data_io._save_npy, []

    def stopped(where, array):
        seen.append(where)
        if len(seen) > after:
            raise KeyboardInterrupt
        real(where, array)

    monkeypatch.setattr(data_io, "_save_npy", stopped)
    with pytest.raises(KeyboardInterrupt):
        data_io.write_labels(path, old + 0.1, old, {"options": "new"})
    assert not path.exists()


def test_patches_replaced_half_way_are_absent_not_mixed(tmp_path, monkeypatch):
    path = tmp_path / "8485-1901.npy"
    index = pd.DataFrame({"row": [0], "y": [0], "x": [1], "label": [8.4]})
    data_io.write_patches(path, np.zeros((1, 3, 3, 5)), index, {"patch_norm": "global"})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(data_io, "_save_npy", full)
    with pytest.raises(OSError, match="No space"):
        data_io.write_patches(path, np.ones((1, 3, 3, 5)), index, {"patch_norm": "spectral"})
    assert not path.exists()


def test_wrong_npy_is_refused(tmp_path):
    path = tmp_path / "8485-1901.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match="1 axes, expected 2"):
        data_io.read_labels(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a readable"):
        data_io.read_labels(path)


def test_patches_round_trip_and_index_must_fit(tmp_path):
    path = tmp_path / "8485-1901.npy"
    patches = np.random.default_rng(0).random((4, 3, 3, 5)).astype("f4")
    index = pd.DataFrame({"row": range(4), "y": range(4), "x": 1, "label": [8.4, 8.5, 8.6, 8.3]})
    data_io.write_patches(path, patches, index, {"patch_norm": "global"})
    back, table, meta = data_io.read_patches(path)
    np.testing.assert_array_equal(back, patches)
    pd.testing.assert_frame_equal(table, index)
    assert meta["patch_norm"] == "global"
    data_io.patch_index_path(path).write_text("row,y,x,label\n0,0,1,8.4\n")
    with pytest.raises(DataError, match="4 patches, but 1 rows"):
        data_io.read_patches(path)


def test_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    cube = data_io.Cube(np.ones((4, 4, 100), "f4"), np.arange(100.0))
    usage = shutil.disk_usage(tmp_path)._replace(free=12_799)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"no space left on the disk: up to 0\.0 MB are needed"):
        data_io.write_cube(tmp_path / "1-1.h5", cube)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_disk_that_fills_up_meanwhile_is_one_clear_line(tmp_path, monkeypatch):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path])
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        usage = shutil.disk_usage("/")._replace(free=1 << 40)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        flux = np.random.default_rng(0).random((40, 40, 300), np.float32)
        with pytest.raises(DataError, match=r"1-1\.h5: could not be made \(No space left"):
            data_io.write_cube(tmp_path / "1-1.h5", data_io.Cube(flux, np.arange(300.0)))
        assert not list(tmp_path.iterdir())
        data_io.write_cube(tmp_path / "1-2.h5", data_io.Cube(flux[:8, :8], np.arange(300.0)))
        assert data_io.read_cube(tmp_path / "1-2.h5").flux.shape == (8, 8, 300)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def galaxies(*names):
    return pd.DataFrame({"plateifu": names, "mangaid": [f"1-{n[-1]}" for n in names]})


def test_split_round_trip_keeps_header_and_text_ids(tmp_path):
    parts = {
        "train": galaxies("8485-1901", "8485-1902"),
        "val": galaxies("8485-1903"),
        "test": galaxies("8485-1904"),
    }
    data_io.write_split(tmp_path, parts, {"kind": "hard", "seed": 3})
    back, meta = data_io.read_split(tmp_path)
    assert meta == {"kind": "hard", "seed": 3, "sha256": data_io.split_sha256(parts)}
    for name, table in parts.items():
        pd.testing.assert_frame_equal(back[name], table, check_dtype=False)


def test_one_mangaid_in_two_parts_is_refused_on_writing_and_on_reading(tmp_path):
    parts = {
        "train": galaxies("8485-1901"),
        "val": galaxies("8485-1903"),
        "test": galaxies("7777-1901"),  # another plate, the same galaxy
    }
    with pytest.raises(DataError, match="1-1 and 0 more"):
        data_io.write_split(tmp_path, parts, {"kind": "hard"})
    parts["test"] = galaxies("8485-1904")
    data_io.write_split(tmp_path, parts, {"kind": "hard"})
    (tmp_path / "val.csv").write_text((tmp_path / "train.csv").read_text())
    with pytest.raises(DataError, match="two parts"):
        data_io.read_split(tmp_path)


def test_easy_split_may_share_galaxies_but_no_spaxel(tmp_path):
    table = galaxies("8485-1901").assign(y=1, x=2)
    other = galaxies("8485-1901").assign(y=1, x=3)
    parts = {"train": table, "val": other, "test": galaxies("8485-1901").assign(y=9, x=9)}
    data_io.write_split(tmp_path, parts, {"kind": "easy"})
    with pytest.raises(DataError, match="8485-1901 1 2"):
        data_io.write_split(tmp_path, {**parts, "test": table}, {"kind": "easy"})


def test_missing_split_part_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.csv: no such file"):
        data_io.read_split(tmp_path)


def test_stats_round_trip(tmp_path):
    stats = data_io.Stats(*(np.random.default_rng(i).random((3, 7)) for i in range(6)), {"n": 5})
    data_io.write_stats(tmp_path / "stats.h5", stats)
    back = data_io.read_stats(tmp_path / "stats.h5")
    for name in data_io.STATS_FIELDS:
        np.testing.assert_array_equal(getattr(back, name), getattr(stats, name))
    assert back.attrs["n"] == 5
