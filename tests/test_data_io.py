"""Every layout: written, read back, and refused in one clear line if it is not what it says."""

import json
import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from utils import DataError

import h5py
import numpy as np
import pandas as pd
import pytest

import data_io
import h5_files
from hsi_proc_fns import Stats
from recipe import Recipe, sealed, sealed_text

GALAXY = "8485-1901"
RECIPE = Recipe("cube", data_io.CUBE_VERSION, {"n_band": 30}, {"LOGCUBE": "of a file"})
HARD = Recipe("split", data_io.SPLIT_VERSION, {"kind": "hard", "seed": 3})
LABELS = np.array([[8.4, np.nan]], "f4")
INDEX = pd.DataFrame({"row": range(4), "y": range(4), "x": 1, "label": [8.4, 8.5, 8.6, 8.3]})


def cube_of(flux, **parts):
    return data_io.Cube(flux, np.linspace(5000, 8000, flux.shape[2]), RECIPE, **parts)


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
    assert (back.recipe, back.attrs["plateifu"]) == (RECIPE, GALAXY)
    assert data_io.read_cube(path, with_errors=False).ivar is None
    with h5py.File(path) as f:  # the names that other people's scripts open
        assert f["cube"].attrs["axes"] == "y,x,band"
        assert f["wave"].shape == (30,)


def test_head_of_a_cube_counts_measured_bins_and_empty_corners_take_no_space(tmp_path, cube):
    path = tmp_path / "c.h5"
    cube.flux[5, 5, :7] = np.nan
    cube.flux[6, 6] = cube.flux[7, 7, 1:] = 0
    data_io.write_cube(path, cube)
    head = data_io.read_cube_head(path)
    expected = np.full((9, 10), 30)
    expected[:4, :5] = expected[6, 6] = 0
    expected[5, 5] = 23
    np.testing.assert_array_equal(head.measured, expected)
    np.testing.assert_array_equal(head.wave, cube.wave)
    assert (head.recipe, head.attrs["plateifu"]) == (RECIPE, GALAXY)
    cube.flux[:] = np.nan
    cube.flux[8, 9] = 1
    data_io.write_cube(path, cube)
    with h5py.File(path) as f:
        assert f["cube"].id.get_num_chunks() == 1
    np.testing.assert_array_equal(data_io.read_cube(path).flux, cube.flux)


def write_labels(path, labels=LABELS):
    data_io.write_labels(path, labels, 0.1 * labels, RECIPE, {"n": 1})


def test_labels_round_trip_and_those_of_ones_own_need_no_provenance(tmp_path):
    path = tmp_path / f"{GALAXY}.npy"
    write_labels(path)
    np.testing.assert_array_equal(data_io.read_labels(path), LABELS)
    np.testing.assert_allclose(data_io.read_label_error(path), [[0.84, np.nan]])
    about = data_io.read_label_meta(path)
    assert (about["recipe"], about["n"]) == (RECIPE, 1)
    path.with_suffix(".json").unlink()
    np.save(path, LABELS + 1)
    np.testing.assert_array_equal(data_io.read_labels(path), LABELS + 1)


def write_patches(path, seed=0):
    patches = np.random.default_rng(seed).random((4, 3, 3, 5)).astype("f4")
    data_io.write_patches(path, patches, INDEX, RECIPE, {})
    return patches


def test_patches_and_statistics_round_trip(tmp_path):
    written = write_patches(tmp_path / f"{GALAXY}.npy")
    patches, table, recipe = data_io.read_patches(tmp_path / f"{GALAXY}.npy")
    np.testing.assert_array_equal(patches, written)
    pd.testing.assert_frame_equal(table, INDEX)
    assert recipe == RECIPE
    arrays = (np.random.default_rng(i).random((3, 7)) for i in range(6))
    stats = Stats(*arrays, Recipe("statistics", data_io.STATS_VERSION), {"n": 5})
    data_io.write_stats(tmp_path / "stats.h5", stats)
    back = data_io.read_stats(tmp_path / "stats.h5")
    for name in data_io.STATS_FIELDS:
        np.testing.assert_array_equal(getattr(back, name), getattr(stats, name))
    assert (back.recipe, back.attrs["n"]) == (stats.recipe, 5)


def galaxies(*names):
    return pd.DataFrame({"plateifu": names, "mangaid": [f"1-{n[-1]}" for n in names]})


@pytest.fixture
def parts():
    names = {"train": ("8485-1901", "8485-1902"), "val": ("8485-1903",), "test": ("8485-1904",)}
    return {part: galaxies(*some) for part, some in names.items()}


def test_split_round_trip_keeps_recipe_and_text_ids(tmp_path, parts):
    data_io.write_split(tmp_path, parts, HARD)
    back, recipe = data_io.read_split(tmp_path)
    assert recipe == HARD
    assert data_io.split_digest(back) == data_io.split_digest(parts)
    for name, table in parts.items():
        pd.testing.assert_frame_equal(back[name], table, check_dtype=False)


def test_split_with_a_galaxy_or_in_easy_ones_a_spaxel_in_two_parts_is_not_written(tmp_path, parts):
    parts["test"] = galaxies("7777-1901")  # another plate, the same galaxy
    with pytest.raises(DataError, match="1-1 and 0 more"):
        data_io.write_split(tmp_path, parts, HARD)
    assert not list(tmp_path.iterdir())
    recipe = replace(HARD, options={"kind": "easy", "seed": 3})
    train, val, test = (galaxies(GALAXY).assign(y=1, x=x) for x in (2, 3, 4))
    data_io.write_split(tmp_path, {"train": train, "val": val, "test": test}, recipe)
    with pytest.raises(DataError, match=f"{GALAXY} 1 2"):
        data_io.write_split(tmp_path, {"train": train, "val": val, "test": train}, recipe)


# What is refused: (file, how it is damaged, message)


def attribute(*, sealed=True, **attributes):
    def change(path: Path) -> None:
        with h5py.File(path, "a") as f:
            f.attrs.update(attributes)
            if sealed:
                h5_files.seal(f)

    return change


def content(new):
    return lambda path: path.write_bytes(new.encode("latin1"))


def values(name, change):
    """Change a dataset whose checksum stays."""

    def damage(path: Path) -> None:
        with h5py.File(path, "a") as f:
            f[name][...] = change(f[name][...])

    return damage


def elsewhere(path: Path) -> None:
    """Link a dataset to another file."""
    with h5py.File(path, "a") as f:
        f.copy("wave", "other")
        del f["wave"]
        f["wave"] = h5py.ExternalLink(path.name, "other")


def key(**changes):
    """Change keys of a .json (None: remove them) under a right checksum."""

    def change(path: Path) -> None:
        found = {**json.loads(path.read_text()), **changes}
        found = {k: v for k, v in found.items() if v is not None and k != "checksum"}
        path.write_text(json.dumps(sealed(found)))

    return change


def replaced(old, new, sealed=True):
    """Change the text of a part of a split, under a right checksum or not."""

    def change(path: Path) -> None:
        head, _, text = path.read_text().partition("\n")
        text = text.replace(old, new)
        path.write_text(sealed_text(text) if sealed else f"{head}\n{text}")

    return change


CUBE = f"cubes/{GALAXY}.h5"
LABEL, LABEL_ERROR, SIDE = (f"labels/{GALAXY}{end}" for end in (".npy", "_err.npy", ".json"))
PATCH, INDEX_FILE, PATCH_SIDE = (
    f"patches/{GALAXY}{end}" for end in (".npy", "_index.csv", ".json")
)
VAL = "splits/val.csv"
READERS = {
    "cubes": lambda folder: data_io.read_cube(folder / f"{GALAXY}.h5"),
    "labels": lambda folder: (
        data_io.read_labels(folder / f"{GALAXY}.npy"),
        data_io.read_label_error(folder / f"{GALAXY}.npy"),
    ),
    "patches": lambda folder: data_io.read_patches(folder / f"{GALAXY}.npy"),
    "splits": data_io.read_split,
}
REFUSED = {
    "no cube": (CUBE, Path.unlink, f"no such file, .*_single_cube.py --plateifu {GALAXY} .and"),
    "not HDF5": (CUBE, content("not hdf5"), r"not readable \(.*\), expected an HDF5 file"),
    "other flux": (CUBE, values("cube", np.negative), "the checksum of cube differs.*Re-run proc"),
    "one bit of flux": (
        CUBE, values("ivar", lambda a: np.where(a == a.max(), np.nextafter(a, 2), a)),
        "the checksum of ivar differs",
    ),
    "other attribute": (CUBE, attribute(sealed=False, redshift=1.0), "checksum of its attributes"),
    "external link": (CUBE, elsewhere, "wave lies in another file"),
    "old cube": (
        CUBE, attribute(schema_version=1), r"version 1, this code needs .* 4\. Re-run process_sing"
    ),
    "statistics": (CUBE, attribute(schema="manga-stats"), "schema manga-stats .* needs manga-cube"),
    "cube of another galaxy": (
        CUBE, attribute(plateifu="8485-1902"), f"the cube of 8485-1902, expected that of {GALAXY}"
    ),
    "cube without recipe": (CUBE, attribute(recipe="{"), "its recipe is damaged .* Rebuild the"),
    "no labels": (LABEL, Path.unlink, r"no such file.* Make it with process_single_cube\.py\.$"),
    "edited labels": (
        LABEL, lambda path: np.save(path, LABELS + 1), r"values are not those that the \.json desc"
    ),
    "labels of 1 axis": (
        LABEL, lambda path: np.save(path, np.zeros(3)), "1 axes of float64.*file of 2 axes"
    ),
    "labels of text": (LABEL, lambda path: np.save(path, [["a"]]), "2 axes of <U1"),
    "edited errors": (LABEL_ERROR, lambda path: np.save(path, LABELS), "_err.npy: its values are"),
    "archive of arrays": (
        LABEL, lambda path: np.savez(path.open("wb"), LABELS), "NpzFile.*expected a .npy file"
    ),
    "empty labels": (LABEL, content(""), r"not readable .* expected a \.npy file"),
    "damaged provenance": (SIDE, content("{"), r"not readable \(.*, expected provenance"),
    "edited provenance": (
        SIDE, lambda path: path.write_text(path.read_text().replace('"n": 1', '"n": 2')),
        "checksum differs",
    ),
    "labels without recipe": (SIDE, key(recipe=None), "'recipe'.*expected provenance"),
    "short index": (
        INDEX_FILE, content("row,y,x,label\n0,0,1,8\n"), "of 4 patches and 1 rows differ"
    ),
    "edited index": (
        INDEX_FILE, lambda path: path.write_text(path.read_text().replace("8.4", "8.5")), "differ"
    ),
    "other patches": (
        PATCH, lambda path: np.save(path, np.load(path) + 1), "checksums of 4 patches"
    ),
    "patches without recipe": (PATCH_SIDE, key(recipe=None), "'recipe'.*Re-run cube_patch_proc"),
    "a galaxy in two parts": (
        VAL, lambda path: shutil.copy(path.with_name("train.csv"), path), "in two parts"
    ),
    "no part": (VAL, Path.unlink, r"val\.csv: no such file"),
    "binary part": (VAL, content("\xff\xfe"), r"val\.csv: not readable"),
    "path as plateifu": (VAL, replaced("8485-1903", "../../x"), r"val\.csv: .*\.\./\.\./x' is not"),
    "edited part": (VAL, replaced("8485-1903", "8485-1905", False), "its checksum differs"),
    "damaged recipe": (VAL, replaced("# recipe: {", "# recipe: "), r"val\.csv: its recipe is dam"),
    "no kind": (VAL, replaced('"kind"', '"sort"'), "val\\.csv: not readable .*'kind'"),
    "no mangaid": (VAL, replaced("mangaid", "name"), r"val\.csv: not readable .*mangaid"),
    "part of another split": (VAL, replaced('"seed": 3', '"seed": 4'), "different splits.*--overw"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((), r"data folder .* is missing or empty"),
        (("processed/cubes",), r"table of a split. Create it with .* --split-dir hard_logH\.$"),
        (("splits/hard_BPT", "splits/hard_logOH"), "hard_BPT, hard_logOH; did you mean hard_logO"),
    ],
)
def test_a_missing_split_is_told_by_those_that_exist(tmp_path, made, message):
    for folder in made:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train.csv").touch()
    with pytest.raises(DataError, match=message) as refused:
        data_io.read_split(tmp_path / "splits" / "hard_logH")
    assert "--overwrite" not in str(refused.value)


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_not_what_they_say_are_refused_in_one_line(tmp_path, cube, parts, case):
    data_io.write_cube(tmp_path / CUBE, cube)
    write_labels(tmp_path / LABEL)
    write_patches(tmp_path / PATCH)
    data_io.write_split(tmp_path / "splits", parts, HARD)
    name, damage, message = REFUSED[case]
    folder = (tmp_path / name).parent
    READERS[folder.name](folder)
    damage(tmp_path / name)
    with pytest.raises(DataError, match=message) as refused:
        READERS[folder.name](folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("write", "saved"), [(write_labels, 0), (write_labels, 1), (write_patches, 0)]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_what_is_replaced_half_way_is_absent_not_mixed(tmp_path, monkeypatch, write, saved, error):
    """The .json says what is up to date: it must never lie beside older labels or patches."""
    path = tmp_path / f"{GALAXY}.npy"
    write(path)
    real, seen = data_io._save_npy, []

    def stopped(where, array):
        seen.append(where)
        if len(seen) > saved:
            raise error
        real(where, array)

    monkeypatch.setattr(data_io, "_save_npy", stopped)
    with pytest.raises((KeyboardInterrupt, OSError)):
        write(path)
    assert not path.exists()


def test_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=12_799)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"not enough space on the disk: up to 0\.0 MB are needed"):
        data_io.write_cube(tmp_path / "1-1.h5", cube_of(np.ones((4, 4, 100))))
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
        with pytest.raises(DataError, match=r"1-1\.h5: could not be written \(No space left"):
            data_io.write_cube(tmp_path / "1-1.h5", cube_of(flux))
        assert not list(tmp_path.iterdir())
        data_io.write_cube(tmp_path / "1-2.h5", cube_of(flux[:8, :8]))
        assert data_io.read_cube(tmp_path / "1-2.h5").flux.shape == (8, 8, 300)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_writing_that_fails_anywhere_is_one_clear_line_and_the_old_file_stays(
    tmp_path, monkeypatch, compression
):
    """HDF5 itself crashes the process when its last writes fail."""
    path, flux = tmp_path / "1-1.h5", np.random.default_rng(0).random((12, 12, 300), np.float32)
    cube = cube_of(flux, ivar=flux, good_fraction=flux.astype("f2"))
    data_io.write_cube(path, cube, compression)
    old, (_, most) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(DataError, match=r"0\.3 MB are needed, 0\.2 MB are free \(or allowed"):
        limited(200_000, most, data_io.write_cube, path, cube, compression)
    monkeypatch.setattr(h5_files.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, most))
    for limit in np.geomspace(10, len(old) - 1, 40).astype(int).tolist():
        with pytest.raises(DataError, match=r"1-1\.h5: could not be written \(File too large\)"):
            limited(limit, most, data_io.write_cube, path, cube, compression)
        assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == old


def limited(n_bytes, most, write, *words):
    """Write while no file may grow beyond n_bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, most))
    try:
        write(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_stop_while_writing_leaves_the_old_file_alone(tmp_path):
    path, cube = tmp_path / "1-1.h5", cube_of(np.ones((8, 8, 50), "f4"))
    data_io.write_cube(path, cube)
    old = path.read_bytes()

    def rows():
        yield data_io.Rows(cube.flux[:4], None, None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data_io.write_cube_rows(path, cube.flux.shape, cube.wave, {}, RECIPE, rows())
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == old
