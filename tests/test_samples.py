import shutil

import utils
from utils import LABEL_TASKS, DataError

import mock_cubes
import numpy as np
import pandas as pd
import pytest
from mock_cubes import later, rebuild_cube, rebuild_statistics, relabel, write_labels

import cube_patch_processing as patching
import data_fns
import data_io
import pack_cubes
from data_fns import DataOptions
from recipe import DIGEST_LENGTH, digest_of
from samples import PatchSpec, Samples, get_samples

TRAIN, VAL, GALAXIES = mock_cubes.PLATEIFUS[:2], mock_cubes.PLATEIFUS[2], mock_cubes.PLATEIFUS[:4]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = mock_cubes.make_data_dir(tmp_path_factory.mktemp("data"), GALAXIES)
    mock_cubes.write_patch_files(root, "logOH", "PCA", size=7)
    return root


def samples_of(root, spec, part="train", split="hard"):
    table = data_io.read_split(utils.split_path(root, split))[0][part]
    galaxies = table["plateifu"].unique()
    packed = pack_cubes.open_packed(root, split, spec.patch_norm, galaxies)
    return get_samples(table, spec, root, packed)


def spaxels_of(found):
    return set(zip(np.array(found.plateifus)[found.galaxy], found.y, found.x, strict=True))


def label_file(root, plateifu=TRAIN[0], task="logOH"):
    return utils.label_path(root, task, plateifu)


@pytest.mark.parametrize("task", LABEL_TASKS)
def test_masked_and_unlabelled_spaxels_never_become_samples(root, task, monkeypatch):
    expected = set()
    for plateifu in TRAIN:
        labels = data_io.read_labels(label_file(root, plateifu, task))
        has_label = labels >= 0 if task == "BPT" else np.isfinite(labels)
        assert has_label[4, 4]  # a label on a spectrum of which half is missing
        has_label[:2, :3] = has_label[4, 4] = False
        expected |= {(plateifu, y, x) for y, x in np.argwhere(has_label)}
    assert spaxels_of(samples_of(root, PatchSpec(task))) == expected
    monkeypatch.setattr(data_io, "read_cube", None)  # now packed, no spectra are read
    assert spaxels_of(samples_of(root, PatchSpec(task))) == expected


def test_classes_and_values_are_those_of_the_label_maps(root):
    found = samples_of(root, PatchSpec("logOH", 8))
    edges = [8.34, 8.40, 8.44, 8.47, 8.50, 8.52, 8.55]
    by_hand = np.sum(found.values[:, None] >= np.float32(edges), axis=1)
    np.testing.assert_array_equal(found.classes, by_hand)
    np.testing.assert_array_equal(found.class_counts(8), np.bincount(by_hand, minlength=8))
    for row in range(0, len(found), 29):
        plateifu, y, x = found.plateifus[found.galaxy[row]], found.y[row], found.x[row]
        assert found.values[row] == data_io.read_labels(label_file(root, plateifu))[y, x]
        assert found.spaxel_names([row]) == [f"{plateifu} y={y} x={x}"]


def test_samples_come_in_the_order_of_the_split_then_of_the_map(root):
    table = pd.DataFrame({"plateifu": list(GALAXIES[::-1]), "mangaid": "1-0"})
    packed = pack_cubes.open_packed(root, "hard", "global", GALAXIES)
    found = get_samples(table, PatchSpec("BPT", patch_norm="global"), root, packed)
    assert found.plateifus == list(table["plateifu"])
    assert (np.diff(found.galaxy.astype(int) * 10_000 + found.y * 100 + found.x) > 0).all()
    assert found.cubes == data_io.cube_digests(root, GALAXIES)


def test_easy_split_takes_only_its_spaxels_and_says_which_it_left_out(root, caplog):
    parts = data_io.read_split(utils.split_path(root, "easy"))[0]
    found = {part: spaxels_of(samples_of(root, PatchSpec("BPT"), part, "easy")) for part in parts}
    for part, table in parts.items():
        assert found[part] < set(zip(table["plateifu"], table["y"], table["x"], strict=True))
        left_out = len(table) - len(found[part])
        assert f"{left_out} of the split's {len(table)} spaxels have no BPT label" in caplog.text
    assert not found["train"] & found["val"]


def test_samples_by_galaxy_in_any_order():
    galaxy = np.array([2, 0, 2, 1, 0], np.int32)
    zero = np.zeros(5, np.int32)
    found = Samples(["a", "b", "c"], galaxy, zero, zero, zero, zero, zero).by_galaxy()
    assert {g: rows.tolist() for g, rows in found} == {0: [1, 4], 1: [3], 2: [0, 2]}
    assert list(Samples([], *[zero[:0]] * 6).by_galaxy()) == []


def test_label_maps_that_changed_since_the_split_are_warned_of(own_data, caplog):
    parts, recipe = data_io.read_split(utils.split_path(own_data, "hard"))
    digests = {p: digest_of(data_io.read_labels(label_file(own_data, p))) for p in GALAXIES}
    for name, table in parts.items():
        short = table["plateifu"].map(digests).str[:DIGEST_LENGTH]
        parts[name] = table.assign(label_digest=short)
    data_io.write_split(utils.split_path(own_data, "hard"), parts, recipe)
    samples_of(own_data, PatchSpec("logOH"))
    assert not caplog.text
    write_labels(own_data, "logOH", TRAIN[1], data_io.read_labels(label_file(own_data)))
    samples_of(own_data, PatchSpec("logOH"))
    assert f"label maps of 1 of the 2 galaxies ({TRAIN[1]}, ...) have changed" in caplog.text


# What is refused: (what happens to the data folder, options, message)


def of_another_shape(root):
    write_labels(root, "logOH", TRAIN[0], data_io.read_labels(label_file(root))[:-1])


def other_statistics_and_no_cubes(root):
    rebuild_statistics(root)
    shutil.rmtree(root / "processed" / "cubes")


def patch_files_of_a_rebuilt_cube(root, overwrite=False, **options):
    """Patch files of full spectra; then a cube is rebuilt, and with `overwrite` its file, too."""
    made = patching.PatchOptions(("spectral",), 7)
    for plateifu in GALAXIES:
        patching.patch_galaxy(root, plateifu, "logOH", made)
    rebuild_cube(root, TRAIN[1], "another LOGCUBE", **options)
    if overwrite:
        patching.patch_galaxy(root, TRAIN[1], "logOH", made, overwrite=True)


FILES = {"source": "patches"}
FULL = {**FILES, "patch_norm": "spectral"}
REFUSED = {
    "even patch, turned": (None, {"patch_size": 6}, "--patch-size 6: .* no central spaxel"),
    "cutouts of patch files": (None, {**FILES, "cutout": 3}, "--cutout 3: .*--source packed"),
    "even cutouts": (None, {"cutout": 4}, "--cutout 4: expected an odd number"),
    "negative cutouts": (None, {"cutout": -1}, "--cutout -1: expected an odd number"),
    "bands the wrong way round": (None, {"bands": (5, 2)}, "--bands 5 2: expected a band and"),
    "too many bands": (None, {"bands": (3, 99)}, "--bands 3 99: .* has 6 bands"),
    "no split": (None, {"split_dir": "no"}, r"train\.csv: no such file.*create_data_splits"),
    "no patch files": (None, {**FILES, "patch_norm": "global"}, "no such file.*cube_patch_proc"),
    "patches too small": (None, {**FILES, "patch_size": 9}, "7x7 spaxels, .* at least 9x9"),
    "no statistics": (
        lambda root: utils.stats_path(root, "hard").unlink(),
        {}, r"stats\.h5: no such file.*calc_data_stats",
    ),
    "training cube with another redshift": (
        later(rebuild_cube, TRAIN[1], redshift=0.5),
        {}, r"stats\.h5: made with another .*cubes\. Re-run calc_data_stats\.py",
    ),
    "validation cube on another grid": (
        later(rebuild_cube, VAL, wave_min=4800.0),
        {}, rf"{VAL}\.h5: made with wave_min=4800.0 .that of {TRAIN[0]}: 5000.0",
    ),
    "cube of another galaxy": (
        lambda root: shutil.copyfile(*(utils.cube_path(root, p) for p in TRAIN)),
        {}, f"the cube of {TRAIN[0]}, expected that of {TRAIN[1]}",
    ),
    "no cube": (
        lambda root: utils.cube_path(root, VAL).unlink(), {}, rf"{VAL}\.h5: no such file"
    ),
    "no label map": (
        lambda root: label_file(root).unlink(),
        {}, rf"{TRAIN[0]}\.npy: no such file.*1 of the 2 galaxies of this part",
    ),
    "label map of another shape": (
        of_another_shape, {}, r"label map of \(10, 12\) spaxels, expected \(11, 12\)"
    ),
    "no labels": (later(relabel, TRAIN, np.nan), {}, "no labelled logOH spaxel in the 2 galaxies"),
    "labels on another scale": (
        later(relabel, GALAXIES, diagnostic="N2O2-KD02"),
        {}, "labels were made with N2O2-KD02; .*--diagnostic O3N2-M13",
    ),
    "labels of two calibrations": (
        later(relabel, TRAIN[1:], diagnostic="N2-M13"),
        {}, f"{TRAIN[1]} .*diagnostic=N2-M13 .those of {TRAIN[0]}: O3N2-M13",
    ),
    "validation labels made otherwise": (
        later(relabel, [VAL], min_snr=5.0), {}, "val part: .*min_snr=5.0 .those of the train part"
    ),
    "patch files of other statistics": (
        rebuild_statistics,
        FILES, r"\.npy: made with another set of statistics.*cube_patch_processing\.py --overwrite",
    ),
    "patch files of other statistics, cubes gone": (
        other_statistics_and_no_cubes,
        FILES, r"\.npy: .*of the split's statistics.*cube_patch_processing\.py --overwrite",
    ),
    "patch files of another cube": (
        patch_files_of_a_rebuilt_cube,
        FULL, rf"{TRAIN[1]}\.npy.* made with another cube.*Re-run cube_patch",
    ),
    "patch files of cubes made otherwise": (
        later(patch_files_of_a_rebuilt_cube, True, remove_gas_velocity=False),
        FULL, r"\(cube\): made with remove_gas_velocity=False .those of .*: True",
    ),
    "patch files of other labels": (
        later(relabel, TRAIN, 0.01),
        FILES, r"\.npy: made with another label map.*cube_patch_processing\.py --overwrite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_do_not_belong_together_are_refused_in_one_line(own_data, case):
    change, options, message = REFUSED[case]
    if change:
        change(own_data)
    with pytest.raises(DataError, match=message) as caught:
        data_fns.get_dataloaders(
            DataOptions(
                **{"data_dir": own_data, "network": "ssftt", "split_dir": "hard", **options}
            )
        )
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("source", ["packed", "patches"])
def test_statistics_computed_again_with_the_same_recipe_serve(own_data, source):
    path = utils.stats_path(own_data, "hard")
    stats = data_io.read_stats(path)
    stats.attrs["created_utc"] = "2026-01-02T00:00:00Z"
    data_io.write_stats(path, stats)
    options = DataOptions(own_data, "hard", network="ssftt", source=source)
    assert next(iter(data_fns.get_dataloaders(options)["val"])).patches.shape[2] == 6
