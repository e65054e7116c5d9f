"""Every layout: written, read back, and refused in one clear line if it is not what it says."""

import os
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import data_io
from hsi_proc_fns import Stats
from recipe import Recipe
from utils import DataError

GALAXY = "8485-1901"
WAVE = np.linspace(5000, 8000, 30)
RECIPE = Recipe("cube", data_io.CUBE_VERSION, {"n_band": 30}, {"LOGCUBE": "of a file"})
INDEX = pd.DataFrame({"row": range(4), "y": range(4), "x": 1, "label": [8.4, 8.5, 8.6, 8.3]})


def refused_in_one_line(read, path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read(path)
    assert "\n" not in str(refused.value)


def cube_of(flux, wave=WAVE, **parts):
    return data_io.Cube(flux, wave, RECIPE, **parts)


@pytest.fixture
def cube():
    rng = np.random.default_rng(0)
    flux = rng.random((9, 10, 30)).astype("f4")
    flux[:4, :5] = np.nan
    ivar = np.where(np.isfinite(flux), rng.random(flux.shape), 0).astype("f4")
    good = np.isfinite(flux).astype("f2")
    return cube_of(flux, ivar=ivar, good_fraction=good, attrs={"plateifu": GALAXY})


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_cube_round_trip(tmp_path, cube, compression):
    path = tmp_path / "a" / f"{GALAXY}.h5"
    data_io.write_cube(path, cube, compression)
    back = data_io.read_cube(path)
    for name in ("flux", "wave", "ivar", "good_fraction"):
        np.testing.assert_array_equal(getattr(back, name), getattr(cube, name))
    assert back.attrs["plateifu"] == GALAXY
    assert back.recipe == RECIPE
    assert data_io.read_cube(path, with_errors=False).ivar is None
    with h5py.File(path) as f:  # the names that other people's scripts open
        assert f["cube"].attrs["axes"] == "y,x,band"
        assert f["wave"].shape == (30,)


def test_head_of_a_cube_counts_measured_bins(tmp_path, cube):
    cube.flux[5, 5, :7] = np.nan
    cube.flux[6, 6] = 0
    cube.flux[7, 7, 1:] = 0
    data_io.write_cube(tmp_path / "c.h5", cube)
    head = data_io.read_cube_head(tmp_path / "c.h5")
    expected = np.full((9, 10), 30)
    expected[:4, :5] = expected[6, 6] = 0
    expected[5, 5] = 23
    np.testing.assert_array_equal(head.measured, expected)
    np.testing.assert_array_equal(head.wave, cube.wave)
    assert (head.recipe, head.attrs["plateifu"]) == (RECIPE, GALAXY)


def test_empty_corners_take_no_space(tmp_path, cube):
    cube.flux[:] = np.nan
    cube.flux[8, 9] = 1
    data_io.write_cube(tmp_path / "c.h5", cube)
    with h5py.File(tmp_path / "c.h5") as f:
        assert f["cube"].id.get_num_chunks() == 1
    np.testing.assert_array_equal(data_io.read_cube(tmp_path / "c.h5").flux, cube.flux)


def set_attribute(**attributes):
    def change(path: Path) -> None:
        with h5py.File(path, "a") as f:
            f.attrs.update(attributes)

    return change


@pytest.mark.parametrize("read", [data_io.read_cube, data_io.read_cube_head])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"no such file\. Create it with process_single_cube\.py\."),
        (lambda path: path.write_bytes(b"not hdf5"), "not a readable HDF5 file"),
        (set_attribute(schema_version=1), r"version 1, this code needs .* 3\. Re-run process_sing"),
        (set_attribute(schema="manga-stats"), "schema manga-stats .* needs manga-cube"),
        (set_attribute(plateifu="8485-1902"), f"the cube of 8485-1902, expected {GALAXY} as in"),
        (set_attribute(recipe="{"), "its recipe is damaged .* Rebuild the file"),
    ],
    ids=["missing", "foreign", "old", "of another kind", "of another galaxy", "damaged recipe"],
)
def test_cubes_that_are_not_what_they_say_are_refused(tmp_path, cube, read, damage, message):
    path = tmp_path / f"{GALAXY}.h5"
    data_io.write_cube(path, cube)
    damage(path)
    refused_in_one_line(read, path, message)


@pytest.fixture
def label_file(tmp_path):
    path = tmp_path / f"{GALAXY}.npy"
    labels, error = np.array([[8.4, np.nan]], "f4"), np.array([[0.01, np.nan]])
    data_io.write_labels(path, labels, error, RECIPE, {"n": 1})
    return path


def test_labels_round_trip(label_file):
    np.testing.assert_array_equal(data_io.read_labels(label_file), np.array([[8.4, np.nan]], "f4"))
    np.testing.assert_allclose(data_io.read_label_error(label_file), [[0.01, np.nan]])
    about = data_io.read_label_meta(label_file)
    assert (about["recipe"], about["n"]) == (RECIPE, 1)


def edit_values(path: Path) -> None:
    np.save(path, np.load(path) + np.float32(0.1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "no such file"),
        (edit_values, r"its values are not those that its \.json describes"),
        (lambda path: np.save(path, np.zeros(3)), "1 axes, expected 2"),
        (lambda path: path.write_bytes(b""), r"not a readable \.npy file"),
        (lambda path: path.with_suffix(".json").write_text("{"), "not readable provenance"),
        (lambda path: path.with_suffix(".json").write_text("[1]"), "not readable provenance"),
        (lambda path: path.with_suffix(".json").write_text('{"recipe": 5}'), "recipe is damaged"),
    ],
)
def test_labels_that_are_not_what_they_say_are_refused(label_file, damage, message):
    damage(label_file)
    refused_in_one_line(data_io.read_labels, label_file, message)


def test_labels_of_ones_own_need_no_provenance(label_file):
    edit_values(label_file)
    label_file.with_suffix(".json").unlink()
    assert data_io.read_labels(label_file)[0, 0] == pytest.approx(8.5)


@pytest.fixture
def patch_file(tmp_path):
    path = tmp_path / f"{GALAXY}.npy"
    patches = np.random.default_rng(0).random((4, 3, 3, 5)).astype("f4")
    data_io.write_patches(path, patches, INDEX, RECIPE, {})
    return path


def test_patches_round_trip(patch_file):
    patches, table, recipe = data_io.read_patches(patch_file)
    expected = np.random.default_rng(0).random((4, 3, 3, 5)).astype("f4")
    np.testing.assert_array_equal(patches, expected)
    pd.testing.assert_frame_equal(table, INDEX)
    assert recipe == RECIPE


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("_index.csv", "row,y,x,label\n0,0,1,8.4\n", "4 patches, but 1 rows"),
        ("_index.csv", "", "_index.csv: not readable"),
        (".json", '{"patch_norm": "PCA"}', "no recipe"),
        (".json", "{", "not readable provenance"),
        (".npy", "", "not a readable"),
    ],
)
def test_patches_that_are_not_what_they_say_are_refused(patch_file, name, content, message):
    patch_file.with_name(GALAXY + name).write_text(content)
    refused_in_one_line(data_io.read_patches, patch_file, f"{message}.*Re-run cube_patch_process")


@pytest.mark.parametrize("written", [0, 1])
def test_labels_replaced_half_way_are_absent_not_mixed(label_file, monkeypatch, written):
    """The .json says what is up to date: it must never lie beside older labels."""
    real, seen = data_io._save_npy, []

    def stopped(where, array):
        seen.append(where)
        if len(seen) > written:
            raise KeyboardInterrupt
        real(where, array)

    monkeypatch.setattr(data_io, "_save_npy", stopped)
    new = np.full((2, 2), 8.5, "f4")
    with pytest.raises(KeyboardInterrupt):
        data_io.write_labels(label_file, new, new, RECIPE, {})
    assert not label_file.exists()


def test_patches_replaced_half_way_are_absent_not_mixed(patch_file, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(data_io, "_save_npy", full)
    with pytest.raises(OSError, match="No space"):
        data_io.write_patches(patch_file, np.ones((4, 3, 3, 5)), INDEX, RECIPE, {})
    assert not patch_file.exists()


def test_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=12_799)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"not enough space on the disk: up to 0\.0 MB are needed"):
        data_io.write_cube(tmp_path / "1-1.h5", cube_of(np.ones((4, 4, 100)), np.arange(100.0)))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_disk_that_fills_up_meanwhile_is_one_clear_line(tmp_path, monkeypatch):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path])
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        usage = shutil.disk_usage("/")._replace(free=1 << 40)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        flux, wave = np.random.default_rng(0).random((40, 40, 300), np.float32), np.arange(300.0)
        with pytest.raises(DataError, match=r"1-1\.h5: could not be written \(No space left"):
            data_io.write_cube(tmp_path / "1-1.h5", cube_of(flux, wave))
        assert not list(tmp_path.iterdir())
        data_io.write_cube(tmp_path / "1-2.h5", cube_of(flux[:8, :8], wave))
        assert data_io.read_cube(tmp_path / "1-2.h5").flux.shape == (8, 8, 300)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def galaxies(*names):
    return pd.DataFrame({"plateifu": names, "mangaid": [f"1-{n[-1]}" for n in names]})


def split_recipe(kind: str) -> Recipe:
    return Recipe("split", data_io.SPLIT_VERSION, {"kind": kind, "seed": 3})


@pytest.fixture
def parts():
    names = {"train": ("8485-1901", "8485-1902"), "val": ("8485-1903",), "test": ("8485-1904",)}
    return {part: galaxies(*some) for part, some in names.items()}


def test_split_round_trip_keeps_recipe_and_text_ids(tmp_path, parts):
    data_io.write_split(tmp_path, parts, split_recipe("hard"))
    back, recipe = data_io.read_split(tmp_path)
    assert recipe == split_recipe("hard")
    assert data_io.split_digest(back) == data_io.split_digest(parts)
    for name, table in parts.items():
        pd.testing.assert_frame_equal(back[name], table, check_dtype=False)


def test_a_split_with_a_galaxy_in_two_parts_is_not_written(tmp_path, parts):
    parts["test"] = galaxies("7777-1901")  # another plate, the same galaxy
    with pytest.raises(DataError, match="1-1 and 0 more"):
        data_io.write_split(tmp_path, parts, split_recipe("hard"))
    assert not list(tmp_path.iterdir())


def test_easy_split_may_share_galaxies_but_no_spaxel(tmp_path):
    table, other, third = (galaxies(GALAXY).assign(y=1, x=x) for x in (2, 3, 4))
    parts = {"train": table, "val": other, "test": third}
    data_io.write_split(tmp_path, parts, split_recipe("easy"))
    with pytest.raises(DataError, match=f"{GALAXY} 1 2"):
        data_io.write_split(tmp_path, {**parts, "test": table}, split_recipe("easy"))


def replace(old: str, new: str):
    return lambda folder: (folder / "val.csv").write_text(
        (folder / "val.csv").read_text().replace(old, new)
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.copy(folder / "train.csv", folder / "val.csv"), "in two parts"),
        (lambda folder: (folder / "val.csv").unlink(), r"val\.csv: no such file"),
        (lambda folder: (folder / "val.csv").write_bytes(b"\xff\xfe"), r"val\.csv: not a readable"),
        (replace("8485-1903", "../../x"), r"val\.csv: '\.\./\.\./x' is not a valid plateifu"),
        (replace("# recipe: ", "# recipe "), r"val\.csv: not a readable split file"),
        (replace("# recipe: ", "# kind: "), r"val\.csv: not a readable split file"),
        (replace("# recipe: {", "# recipe: "), r"val\.csv: its recipe is damaged"),
        (replace('"options": {', '"options": 5, "x": {'), r"val\.csv: its recipe is damaged"),
        (replace('{"kind": "hard", "seed": 3}', "5"), r"val\.csv: its recipe is damaged"),
        (replace('"kind"', '"sort"'), r"val\.csv: no kind in its recipe"),
        (replace("mangaid", "name"), r"val\.csv: no column mangaid"),
        (replace('"seed": 3', '"seed": 4'), r"parts of different splits.*--overwrite"),
    ],
)
def test_splits_that_are_not_what_they_say_are_refused(tmp_path, parts, damage, message):
    data_io.write_split(tmp_path, parts, split_recipe("hard"))
    damage(tmp_path)
    refused_in_one_line(data_io.read_split, tmp_path, message)


def test_stats_round_trip(tmp_path):
    arrays = (np.random.default_rng(i).random((3, 7)) for i in range(6))
    stats = Stats(*arrays, Recipe("statistics", data_io.STATS_VERSION), {"n": 5})
    data_io.write_stats(tmp_path / "stats.h5", stats)
    back = data_io.read_stats(tmp_path / "stats.h5")
    for name in data_io.STATS_FIELDS:
        np.testing.assert_array_equal(getattr(back, name), getattr(stats, name))
    assert (back.recipe, back.attrs["n"]) == (stats.recipe, 5)
