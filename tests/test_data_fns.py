from __future__ import annotations

import pickle

import mock_cubes
import numpy as np
import pandas as pd
import pytest
import torch

import data_fns
import data_io
import hsi_proc_fns
import utils
from data_fns import Batches, CubePatchDataset, CubeStore, PatchSpec
from labels import LABEL_NONE
from utils import LABEL_TASKS, DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mock_cubes.make_data_dir(tmp_path_factory.mktemp("data"))


def dataset_of(root, spec, part="train", split="hard", source="cubes", **options):
    loaders = data_fns.get_dataloaders(root, split, spec, source, (part,), **options)
    return loaders[part].dataset


@pytest.mark.parametrize("norm", utils.PATCH_NORMS)
@pytest.mark.parametrize("task", LABEL_TASKS)
def test_cubes_and_patch_files_give_identical_tensors(root, task, norm):
    mock_cubes.write_patch_files(root, task, norm, size=9)
    for size, bands in ((9, None), (7, (1, 5)), (4, None)):
        spec = PatchSpec(task, 6, norm, size, bands)
        cubes = dataset_of(root, spec)
        files = dataset_of(root, spec, source="patches")
        assert len(cubes) == len(files) > 100
        rows = np.arange(len(cubes))
        ours, theirs = cubes.__getitems__(rows), files.__getitems__(rows)
        n_bands = 4 if bands else (6 if norm == "PCA" else mock_cubes.N_BAND)
        assert ours.patches.shape == (len(cubes), 1, n_bands, size, size)
        assert ours.patches.dtype == torch.float32
        assert ours.classes.dtype == torch.int64
        assert torch.equal(ours.patches, theirs.patches)
        assert torch.equal(ours.classes, theirs.classes)
        assert cubes.kind == files.kind
        assert cubes.kind[2:] == (mock_cubes.N_BAND, True, True)


def test_samples_are_listed_without_reading_spectra(root, monkeypatch):
    listed = dataset_of(root, PatchSpec("logOH")).samples
    monkeypatch.setattr(data_io, "read_cube", None)
    samples = dataset_of(root, PatchSpec("logOH")).samples
    np.testing.assert_array_equal(samples.y, listed.y)
    assert len(samples) > 100


@pytest.mark.parametrize("size", [1, 4, 5, 8])
def test_labelled_spaxel_is_at_the_centre_of_its_patch(root, size):
    dataset = dataset_of(root, PatchSpec("logOH", 6, "spectral", size))
    batch = dataset.__getitems__(np.arange(len(dataset)))
    centres = batch.patches[:, 0, :, size // 2, size // 2].numpy()
    s = dataset.samples
    for i in range(0, len(dataset), 37):
        cube = data_io.read_cube(utils.cube_path(root, s.plateifus[s.galaxy[i]]))
        normed = hsi_proc_fns.normalise(cube.flux, "spectral")
        np.testing.assert_array_equal(centres[i], normed[s.y[i], s.x[i]])
    np.testing.assert_array_equal(dataset.centres(np.arange(len(dataset))), centres)


@pytest.mark.parametrize("task", LABEL_TASKS)
def test_masked_and_unlabelled_spaxels_never_become_samples(root, task):
    samples = dataset_of(root, PatchSpec(task)).samples
    found = set(zip(samples.galaxy, samples.y, samples.x, strict=True))
    expected = set()
    for g, plateifu in enumerate(samples.plateifus):
        labels = data_io.read_labels(utils.label_path(root, task, plateifu))
        has_label = labels >= 0 if task == "BPT" else np.isfinite(labels)
        assert has_label[4, 4]  # a label on a spectrum of which half is missing
        has_label[:2, :3] = has_label[4, 4] = False
        expected |= {(g, y, x) for y, x in np.argwhere(has_label)}
    assert found == expected


def test_classes_and_values_are_those_of_the_label_maps(root):
    samples = dataset_of(root, PatchSpec("logOH", 8)).samples
    edges = [8.34, 8.40, 8.44, 8.47, 8.50, 8.52, 8.55]
    by_hand = np.sum(samples.values[:, None] >= np.float32(edges), axis=1)
    np.testing.assert_array_equal(samples.classes, by_hand)


def test_easy_split_takes_only_its_spaxels(root):
    table = data_io.read_split(utils.split_path(root, "easy"))[0]["val"]
    samples = dataset_of(root, PatchSpec("BPT"), "val", "easy").samples
    listed = set(zip(table["plateifu"], table["y"], table["x"], strict=True))
    plateifus = np.array(samples.plateifus)[samples.galaxy]
    found = set(zip(plateifus, samples.y, samples.x, strict=True))
    assert found < listed
    whole = dataset_of(root, PatchSpec("BPT"), "train", "easy").samples
    others = set(zip(np.array(whole.plateifus)[whole.galaxy], whole.y, whole.x, strict=True))
    assert not found & others


def test_batch_keeps_the_order_asked_for_and_equals_single_samples(root):
    dataset = dataset_of(root, PatchSpec("logOH"))
    rows = np.random.default_rng(0).permutation(len(dataset))[:40]
    batch = dataset.__getitems__(rows)
    assert batch.rows.tolist() == rows.tolist()
    for i, row in enumerate(rows[:10]):
        single = dataset[row]
        assert torch.equal(single.patches, batch.patches[i])
        assert single.classes == batch.classes[i] == dataset.samples.classes[row]


def test_turned_patches_are_the_eight_symmetries_about_the_centre(root):
    mock_cubes.write_patch_files(root, "logOH", "spatial", size=5)
    spec = PatchSpec("logOH", 6, "spatial", 5)
    for source in ("cubes", "patches"):
        dataset = dataset_of(root, spec, source=source)
        plain = dataset[30].patches[0].numpy()
        turned = [dataset[30, k].patches[0].numpy() for k in range(data_fns.N_TURNS)]
        mirror = plain.transpose(0, 2, 1)
        expected = [np.rot90(p, k, axes=(1, 2)) for p in (plain, mirror) for k in range(4)]
        for a, b in zip(turned, expected, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a[:, 2, 2], plain[:, 2, 2])
        assert len({t.tobytes() for t in turned}) == 8


def test_augmenting_even_patches_is_refused(root):
    with pytest.raises(DataError, match="central spaxel"):
        data_fns.get_dataloaders(root, "hard", PatchSpec("logOH", patch_size=6), augment=True)


def test_balanced_batches_draw_all_classes_equally_often():
    classes = np.repeat([0, 1, 2, 5], [1, 10, 100, 5000])
    batches = Batches(classes, 100, seed=3, balance=True, num_samples=20_000)
    rows = np.concatenate(list(batches))[:, 0]
    counts = np.bincount(classes[rows], minlength=6)
    assert counts[[3, 4]].sum() == 0
    expected = 20_000 / 4
    assert np.abs(counts[[0, 1, 2, 5]] - expected).max() < 5 * np.sqrt(expected)
    assert np.unique(rows[classes[rows] == 2]).size == 100  # every member has its turn


def test_batches_are_fixed_by_seed_and_epoch_and_can_be_resumed():
    classes = np.arange(1000) % 7
    for options in ({"balance": True, "augment": True}, {}, {"shuffle": False}):
        batches = Batches(classes, 64, seed=1, **options)
        first = list(batches)
        assert len(first) == len(batches)
        batches.set_epoch(0, skip=5)
        np.testing.assert_array_equal(np.concatenate(list(batches)), np.concatenate(first[5:]))
        batches.set_epoch(1)
        same = np.array_equal(np.concatenate(list(batches)), np.concatenate(first))
        assert same == (options == {"shuffle": False})


def test_evaluation_sees_every_sample_once_and_training_only_full_batches():
    classes = np.zeros(130, int)
    rows = np.concatenate(list(Batches(classes, 64, shuffle=False)))[:, 0]
    np.testing.assert_array_equal(rows, np.arange(130))
    sizes = [len(b) for b in Batches(classes, 64)]
    assert sizes == [64, 64]
    assert [len(b) for b in Batches(classes, 200)] == [130]


def test_cache_stays_within_its_memory_and_changes_nothing(root):
    spec = PatchSpec("logOH")
    table = data_io.read_split(utils.split_path(root, "hard"))[0]["train"]
    one_cube = 17 * 18 * mock_cubes.N_BAND * 4  # 11 x 12 spaxels and the padding
    small = CubeStore(root, spec, None, cache_gb=2.5 * one_cube / 1e9)
    bounded = data_fns.get_dataset(root, table, spec, store=small)
    roomy = data_fns.get_dataset(root, table, spec)
    rows = np.random.default_rng(0).integers(len(roomy), size=200)
    assert torch.equal(bounded.__getitems__(rows).patches, roomy.__getitems__(rows).patches)
    assert len(small._kept) == 2
    assert small._bytes == 2 * one_cube
    assert len(roomy.store._kept) == 4


def test_cube_is_read_and_normalised_once(root, monkeypatch):
    reads = []
    real = data_io.read_cube
    monkeypatch.setattr(
        data_io, "read_cube", lambda path, **k: (reads.append(path), real(path, **k))[1]
    )
    loaders = data_fns.get_dataloaders(root, "easy", PatchSpec("logOH"), parts=utils.SPLIT_PARTS)
    for loader in loaders.values():
        for _ in loader:
            pass
    assert len(reads) == len(set(reads)) == len(mock_cubes.PLATEIFUS)


def test_pickled_datasets_leave_cubes_and_maps_behind(root):
    mock_cubes.write_patch_files(root, "logOH", "global", size=7)
    for source in ("cubes", "patches"):
        dataset = dataset_of(root, PatchSpec("logOH"), source=source)
        before = dataset[3].patches
        again = pickle.loads(pickle.dumps(dataset))
        assert not (again.store._kept if source == "cubes" else again._maps)
        assert torch.equal(again[3].patches, before)


@pytest.mark.parametrize("source", ["cubes", "patches"])
def test_spawned_workers_give_the_batches_of_this_process(root, source):
    mock_cubes.write_patch_files(root, "logOH", "global", size=7)
    spec = PatchSpec("logOH")
    options = {"parts": ("train",), "batch_size": 100, "augment": True}
    here = list(data_fns.get_dataloaders(root, "hard", spec, source, **options)["train"])
    loader = data_fns.get_dataloaders(root, "hard", spec, source, **options, workers=2)["train"]
    there = list(loader)
    assert len(here) == len(there) > 1
    for ours, theirs in zip(here, there, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_loaders_leave_the_global_random_state_alone(root):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in data_fns.get_dataloaders(root, "hard", PatchSpec("logOH"))["train"]:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def error_of(root, spec, **options):
    with pytest.raises(DataError) as caught:
        data_fns.get_dataloaders(root, "hard", spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bad_input_is_told_in_one_line(tmp_path):
    root = mock_cubes.make_data_dir(tmp_path, mock_cubes.PLATEIFUS[:4])
    spec = PatchSpec("logOH")
    assert "no such file" in error_of(root, spec, source="patches")
    assert "bands 3 to 99 of 40" in error_of(root, PatchSpec("logOH", bands=(3, 99)))

    mock_cubes.write_patch_files(root, "logOH", "global", size=5)
    loaders = data_fns.get_dataloaders(root, "hard", spec, "patches")
    with pytest.raises(DataError, match="5x5, asked for 7x7"):
        next(iter(loaders["train"]))

    label_file = utils.label_path(root, "logOH", mock_cubes.PLATEIFUS[0])
    labels = data_io.read_labels(label_file)
    np.save(label_file, labels[:-1])
    assert "label map of (10, 12), cube of (11, 12)" in error_of(root, spec)
    np.save(label_file, np.full_like(labels, np.nan))
    second = utils.label_path(root, "logOH", mock_cubes.PLATEIFUS[1])
    np.save(second, np.full_like(labels, np.nan))
    assert "no labelled logOH spaxel" in error_of(root, spec)
    np.save(label_file, labels)
    np.save(second, labels)

    utils.stats_path(root, "hard").unlink()
    assert "calc_data_stats.py" in error_of(root, PatchSpec("logOH", patch_norm="PCA"))

    path = utils.cube_path(root, mock_cubes.PLATEIFUS[1])
    cube = data_io.read_cube(path)
    data_io.write_cube(path, data_io.Cube(cube.flux, cube.wave * 1.01, attrs=cube.attrs))
    assert "on one grid" in error_of(root, spec)
    path.unlink()
    message = error_of(root, spec)
    assert str(path) in message
    assert "1 of the split's 2 galaxies" in message


def test_patch_files_of_other_statistics_are_refused(tmp_path):
    root = mock_cubes.make_data_dir(tmp_path, mock_cubes.PLATEIFUS[:4])
    mock_cubes.write_patch_files(root, "logOH", "PCA", size=7)
    spec = PatchSpec("logOH", patch_norm="PCA")
    stats = data_io.read_stats(utils.stats_path(root, "hard"))
    for path in root.glob("processed/patches/logOH/PCA/*/*.npy"):
        meta = {**data_io.read_patches(path)[2], "stats": stats.sha256}
        utils.write_json(path.with_suffix(".json"), meta)

    def first_batch():
        return next(iter(data_fns.get_dataloaders(root, "hard", spec, "patches")["train"]))

    stats.attrs["created_utc"] = "2026-01-02T00:00:00Z"  # the same components, made again
    data_io.write_stats(utils.stats_path(root, "hard"), stats)
    assert first_batch().patches.shape[2] == len(stats.components)
    stats.components[0] *= -1  # others, made in the same second
    data_io.write_stats(utils.stats_path(root, "hard"), stats)
    with pytest.raises(DataError, match="Re-run cube_patch_processing"):
        first_batch()


def test_many_samples_need_no_weight_each():
    """More than torch.multinomial's 2**24 categories."""
    classes = np.zeros(2**24 + 10, np.int8)
    classes[-5:] = 1
    batch = next(iter(Batches(classes, 1000, balance=True, num_samples=1000)))
    assert 400 < classes[batch[:, 0]].sum() < 600


def test_samples_of_hard_splits_follow_the_table(root):
    table = pd.DataFrame({"plateifu": list(mock_cubes.PLATEIFUS[5:2:-1]), "mangaid": "1-0"})
    dataset = data_fns.get_dataset(root, table, PatchSpec("BPT"))
    assert isinstance(dataset, CubePatchDataset)
    assert dataset.samples.plateifus == list(table["plateifu"])
    order = dataset.samples.galaxy.astype(np.int64) * 10_000
    order += dataset.samples.y * 100 + dataset.samples.x
    assert (np.diff(order) > 0).all()


# Packed cubes and cutouts


def packed_of(root, spec, cutout=1, part="train", **options):
    options = {"packed_type": "float32", **options}
    return dataset_of(root, spec, part, source="packed", cutout=cutout, **options)


@pytest.mark.parametrize("norm", utils.PATCH_NORMS)
@pytest.mark.parametrize("task", LABEL_TASKS)
def test_packed_cubes_give_the_patches_of_the_cubes(root, task, norm):
    for size, bands in ((7, None), (5, (1, 5)), (4, None), (1, None)):
        spec = PatchSpec(task, 6, norm, size, bands)
        cubes, packed = dataset_of(root, spec), packed_of(root, spec)
        rows = np.arange(len(cubes))
        pairs = np.stack([rows, rows % data_fns.N_TURNS * (size % 2)], axis=1)
        ours, theirs = packed.__getitems__(pairs), cubes.__getitems__(pairs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        np.testing.assert_array_equal(packed.centres(rows), cubes.centres(rows))
        assert packed.kind == cubes.kind
        assert packed.n_bands == cubes.n_bands


def test_half_precision_packs_to_eleven_bits(root):
    spec = PatchSpec("logOH")
    rows = np.arange(100)
    exact = packed_of(root, spec).__getitems__(rows).patches
    half = packed_of(root, spec, packed_type="float16").__getitems__(rows).patches
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=2**-11, atol=2**-24)


def test_packed_file_holds_each_usable_spectrum_once(root):
    packed = packed_of(root, PatchSpec("logOH")).store.packed
    usable = 0
    for plateifu, rows in packed.rows.items():
        cube = data_io.read_cube(utils.cube_path(root, plateifu), with_errors=False)
        np.testing.assert_array_equal(rows > 0, hsi_proc_fns.usable_spaxels(cube.flux))
        usable += (rows > 0).sum()
    assert len(packed.spectra) == usable + 1
    assert not packed.spectra[0].any()


@pytest.mark.parametrize(("cutout", "size"), [(3, 5), (5, 4), (9, 7), (31, 3)])
def test_cutout_is_the_patches_of_all_samples_around_one(root, cutout, size):
    spec = PatchSpec("logOH", 6, "spectral", size)
    patches, cutouts = dataset_of(root, spec), packed_of(root, spec, cutout)
    s, half = patches.samples, cutout // 2
    for row in range(0, len(s), 53):
        one = cutouts[row]
        assert one.patches.shape == (1, patches.n_bands, cutout + size - 1, cutout + size - 1)
        windows = one.patches[0].unfold(1, size, 1).unfold(2, size, 1)  # (band, T, T, P, P)
        dy, dx = s.y - s.y[row] + half, s.x - s.x[row] + half
        inside = (dy >= 0) & (dy < cutout) & (dx >= 0) & (dx < cutout)
        inside &= s.galaxy == s.galaxy[row]
        expected = np.full((cutout, cutout), LABEL_NONE)
        expected[dy[inside], dx[inside]] = s.classes[inside]
        np.testing.assert_array_equal(one.classes, expected)
        np.testing.assert_array_equal(one.weights > 0, expected != LABEL_NONE)
        assert one.classes[half, half] == s.classes[row]
        around = np.flatnonzero(inside)
        found = windows[:, dy[inside], dx[inside]].movedim(1, 0)
        assert torch.equal(found, patches.__getitems__(around).patches[:, 0])


def test_cutouts_turn_with_their_classes_and_weights(root):
    dataset = packed_of(root, PatchSpec("logOH", 6, "spectral", 5), 7)
    plain = dataset[40]
    for turn in range(data_fns.N_TURNS):
        turned = dataset[40, turn]
        for name in ("patches", "classes", "weights"):
            expected = getattr(plain, name).numpy()
            expected = expected.swapaxes(-1, -2) if turn >= 4 else expected
            expected = np.rot90(expected, turn % 4, axes=(-2, -1))
            np.testing.assert_array_equal(getattr(turned, name).numpy(), expected)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("split", ["hard", "easy"])
def test_cutouts_expect_what_patches_do(root, balance, split):
    """Sum over all cutouts that can be drawn: any function of spaxels has the patches' mean."""
    options = {"balance": balance, "source": "packed", "cutout": 5, "packed_type": "float32"}
    spec = PatchSpec("logOH", 6, "PCA", 3)
    loader = data_fns.get_dataloaders(root, split, spec, parts=("train",), **options)["train"]
    dataset, batches = loader.dataset, loader.batch_sampler
    classes = dataset.samples.classes
    each = 1 / len(classes)
    if balance:  # a class, then one of its members
        each = 1 / (np.unique(classes).size * np.bincount(classes)[classes])
    np.testing.assert_allclose(batches.probabilities, each)
    drawn = dataset.__getitems__(np.arange(len(dataset)))
    centres = drawn.patches[:, 0, 0, 1:-1, 1:-1].double()  # a value a spaxel: its first component
    sums = (drawn.weights * centres).sum((1, 2)).numpy()
    own = dataset.centres(np.arange(len(dataset)))[:, 0].astype(float)
    assert batches.probabilities @ sums == pytest.approx(batches.probabilities @ own, rel=1e-5)
    assert batches.probabilities @ drawn.weights.sum((1, 2)).numpy() == pytest.approx(1, rel=1e-5)
    for c in np.unique(classes):
        share = (drawn.weights * (drawn.classes == c)).sum((1, 2)).numpy()
        expected = np.broadcast_to(each, classes.shape)[classes == c].sum()
        assert batches.probabilities @ share == pytest.approx(expected, rel=1e-5)


def test_batch_size_counts_labelled_spaxels(root):
    options = {"batch_size": 120, "source": "packed", "cutout": 5}
    loader = data_fns.get_dataloaders(root, "hard", PatchSpec("logOH"), **options)["train"]
    seen = [int((batch.classes >= 0).sum()) for batch in loader]
    assert np.mean(seen) == pytest.approx(120, rel=0.15)
    assert sum(seen) == pytest.approx(len(loader.dataset), rel=0.3)


@pytest.mark.parametrize("cutout", [1, 5])
def test_spawned_workers_gather_from_packed_cubes(root, cutout):
    options = {"parts": ("train",), "batch_size": 100, "augment": True, "cutout": cutout}
    here, there = (
        list(data_fns.get_dataloaders(root, "hard", PatchSpec("BPT"), "packed", **o)["train"])
        for o in (options, {**options, "workers": 2})
    )
    assert len(here) == len(there) > 1
    for ours, theirs in zip(here, there, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_parts_of_a_split_share_the_spectra(root):
    loaders = data_fns.get_dataloaders(root, "hard", PatchSpec("BPT"), "packed", cutout=5)
    stores = [loaders[part].dataset.store for part in ("train", "val")]
    assert stores[0].spectra.data_ptr() == stores[1].spectra.data_ptr()


@pytest.mark.parametrize("source", ["cubes", "packed"])
def test_field_is_the_box_around_the_usable_spaxels(root, source):
    spec = PatchSpec("logOH", 6, "spectral", 5)
    dataset = dataset_of(root, spec, source=source, packed_type="float32")
    for galaxy, plateifu in enumerate(dataset.samples.plateifus):
        values, (y, x) = dataset.field(galaxy)
        flux = data_io.read_cube(utils.cube_path(root, plateifu)).flux
        normed = hsi_proc_fns.normalise(flux, "spectral")
        box = normed[y : y + values.shape[3], x : x + values.shape[4]]
        np.testing.assert_array_equal(values[0, 0].permute(1, 2, 0), box)
        assert np.count_nonzero(box) == np.count_nonzero(normed)
        assert box[0].any()
        assert box[:, -1].any()


def packings(caplog):
    return [r.message for r in caplog.records if "packing" in r.message]


def test_packed_file_is_kept_while_it_serves_and_made_anew_when_not(tmp_path, caplog):
    root = mock_cubes.make_data_dir(tmp_path)
    caplog.set_level("INFO")
    galaxies = list(mock_cubes.PLATEIFUS[:3])

    def opened(*more, norm="PCA"):
        caplog.clear()
        store = data_fns.open_packed(root, "hard", norm, [*galaxies, *more])
        return store.packed, " ".join(packings(caplog))

    packed, said = opened()
    assert "there is none" in said
    assert list(packed.rows) == galaxies
    assert opened()[1] == ""
    assert f"{mock_cubes.PLATEIFUS[5]} is not in it" in opened(mock_cubes.PLATEIFUS[5])[1]
    galaxies.append(mock_cubes.PLATEIFUS[5])

    path = utils.cube_path(root, galaxies[1])
    cube = data_io.read_cube(path)
    attrs = {**cube.attrs, "created_utc": "2026-01-01T00:00:00Z"}
    data_io.write_cube(path, data_io.Cube(cube.flux * 2, cube.wave, attrs=attrs))
    assert f"{path} was made anew" in opened()[1]

    stats = data_io.read_stats(utils.stats_path(root, "hard"))
    stats.mean[3] += 1
    data_io.write_stats(utils.stats_path(root, "hard"), stats)
    assert "the statistics are others" in opened()[1]
    utils.cube_path(root, galaxies[0]).unlink()  # the packed file alone may be copied to a GPU
    assert opened()[1] == ""


def test_packed_file_is_whole_or_absent(tmp_path, monkeypatch):
    root = mock_cubes.make_data_dir(tmp_path)
    real, calls = data_fns.load_normed, []

    def fails_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk full")
        return real(*args)

    monkeypatch.setattr(data_fns, "load_normed", fails_at_the_third)
    with pytest.raises(DataError, match=r"could not be made \(disk full\)"):
        data_fns.open_packed(root, "hard", "global", mock_cubes.PLATEIFUS)
    assert list((root / "processed" / "packed").rglob("*.h5")) == []


def test_cutouts_that_cannot_be_are_refused(root, tmp_path):
    spec = PatchSpec("logOH")
    assert "--source packed" in error_of(root, spec, cutout=3)
    assert "odd" in error_of(root, spec, source="packed", cutout=4)
    assert "odd" in error_of(root, spec, source="packed", cutout=-1)
    other = mock_cubes.make_data_dir(tmp_path)
    path = utils.cube_path(other, mock_cubes.PLATEIFUS[1])
    cube = data_io.read_cube(path)
    data_io.write_cube(path, data_io.Cube(cube.flux, cube.wave * 1.01, attrs=cube.attrs))
    assert "on one grid" in error_of(other, spec, source="packed")
    packed = data_io.packed_path(root, "hard", "global", "float16")
    data_fns.open_packed(root, "hard", "global", mock_cubes.PLATEIFUS[:1])
    packed.write_bytes(b"half a file")
    message = error_of(root, spec, source="packed")
    assert "pack_cubes.py --overwrite" in message
    packed.unlink()


def test_samples_by_galaxy_in_any_order():
    galaxy = np.array([2, 0, 2, 1, 0], np.int32)
    zero = np.zeros(5, np.int32)
    samples = data_fns.Samples(["a", "b", "c"], galaxy, zero, zero, zero, zero, zero)
    found = {g: rows.tolist() for g, rows in samples.by_galaxy()}
    assert found == {0: [1, 4], 1: [3], 2: [0, 2]}
    none = data_fns.Samples([], *[zero[:0]] * 6)
    assert list(none.by_galaxy()) == []
