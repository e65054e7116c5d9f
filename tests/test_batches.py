import itertools
import pickle
import shutil

import utils
from utils import LABEL_TASKS

import mock_cubes
import numpy as np
import pytest
import torch

import data_fns
import data_io
import hsi_proc_fns
from batches import N_TURNS, SpaxelBatchSampler
from data_fns import DataOptions
from labels import LABEL_NONE


@pytest.fixture(scope="module")
def files(root, tmp_path_factory):
    """Data folder with patches cut by hand, of both tasks and all norms."""
    own = shutil.copytree(root, tmp_path_factory.mktemp("files"), dirs_exist_ok=True)
    for task, norm in itertools.product(LABEL_TASKS, utils.PATCH_NORMS):
        mock_cubes.write_patch_files(own, task, norm, size=9)
    return own


def loader_of(root, part="train", seed=0, **options):
    usual = {"split_dir": "hard", "patch_norm": "global", "cutout": 1, "packed_type": "float32"}
    chosen = DataOptions(**{"data_dir": root, "network": "ssftt", **usual, **options})
    return data_fns.get_dataloaders(chosen, seed, (part,))[part]


def dataset_of(root, **options):
    return loader_of(root, **options).dataset


def normalised(root, dataset, galaxy, norm="spectral"):
    """Map of a galaxy's spectra, normalised by hand."""
    cube = data_io.read_cube(utils.cube_path(root, dataset.samples.plateifus[galaxy]))
    return hsi_proc_fns.normalise(cube.flux, norm)


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("norm", utils.PATCH_NORMS)
@pytest.mark.parametrize("task", LABEL_TASKS)
def test_packed_cubes_give_the_tensors_of_patches_cut_by_hand(files, task, norm):
    for size, bands in ((9, None), (7, (1, 5)), (4, None), (1, None)):
        options = {"label_task": task, "patch_norm": norm, "patch_size": size, "bands": bands}
        options["augment"] = size % 2 == 1
        packed = dataset_of(files, **options)
        by_hand = dataset_of(files, source="patches", **options)
        rows = np.random.default_rng(0).permutation(len(packed))
        pairs = np.stack([rows, rows % N_TURNS * (size % 2)], axis=1)
        ours = packed.__getitems__(pairs)
        assert_same(ours, by_hand.__getitems__(pairs))
        assert_same(type(ours)(*(part[5] for part in ours)), packed[tuple(pairs[5])])
        assert ours.rows.tolist() == rows.tolist()
        np.testing.assert_array_equal(ours.classes, packed.samples.classes[rows])
        np.testing.assert_array_equal(packed.centres(rows), by_hand.centres(rows))
        for name in ("options", "cubes", "label_maps"):
            assert getattr(packed.samples, name) == getattr(by_hand.samples, name)
        n_bands = 4 if bands else (6 if norm == "PCA" else mock_cubes.N_BAND)
        assert packed.n_bands == by_hand.n_bands == n_bands
        assert ours.patches.shape == (len(packed), 1, n_bands, size, size)
        assert (ours.patches.dtype, ours.classes.dtype) == (torch.float32, torch.int64)
        if norm == "spectral" and not bands:  # by hand, too
            s, centre = packed.samples, size // 2
            maps = [normalised(files, packed, galaxy) for galaxy in range(len(s.plateifus))]
            expected = [maps[s.galaxy[row]][s.y[row], s.x[row]] for row in rows]
            np.testing.assert_array_equal(packed.centres(rows), expected)
            np.testing.assert_array_equal(ours.patches[:, 0, :, centre, centre], expected)


def test_turned_patches_are_the_eight_symmetries_about_the_centre(files):
    dataset = dataset_of(files, patch_norm="spatial", patch_size=5)
    plain = dataset[30].patches[0].numpy()
    turned = [dataset[30, k].patches[0].numpy() for k in range(N_TURNS)]
    mirror = plain.transpose(0, 2, 1)
    expected = [np.rot90(p, k, axes=(1, 2)) for p in (plain, mirror) for k in range(4)]
    for a, b in zip(turned, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[:, 2, 2], plain[:, 2, 2])
    assert len({t.tobytes() for t in turned}) == 8


@pytest.mark.parametrize("cutout", [1, 5])
def test_field_is_the_box_around_the_usable_spaxels(root, cutout):
    dataset = dataset_of(root, patch_norm="spectral", patch_size=5, cutout=cutout)
    for galaxy in range(len(dataset.samples.plateifus)):
        values, (y, x) = dataset.field(galaxy)
        whole = normalised(root, dataset, galaxy)
        box = whole[y : y + values.shape[3], x : x + values.shape[4]]
        np.testing.assert_array_equal(values[0, 0].permute(1, 2, 0), box)
        assert np.count_nonzero(box) == np.count_nonzero(whole)
        assert all(side.any() for side in (box[0], box[-1], box[:, 0], box[:, -1]))


def test_balanced_batches_draw_all_classes_equally_often():
    """Of more samples than torch.multinomial's 2**24 categories, too."""
    classes = np.repeat(np.array([0, 1, 2, 5], np.int8), [1, 10, 100, 2**24])
    batches = SpaxelBatchSampler(classes, 100, seed=3, balance=True, num_samples=20_000)
    rows = np.concatenate(list(batches))[:, 0]
    counts = np.bincount(classes[rows], minlength=6)
    assert counts[[3, 4]].sum() == 0
    assert np.abs(counts[[0, 1, 2, 5]] - 5000).max() < 5 * np.sqrt(5000)
    assert np.unique(rows[classes[rows] == 2]).size == 100  # every member has its turn


@pytest.mark.parametrize("options", [{"balance": True, "augment": True}, {}, {"shuffle": False}])
def test_batches_are_fixed_by_seed_and_epoch_and_can_be_resumed(options):
    def drawn(seed=1, epoch=0, skip=0):
        batches = SpaxelBatchSampler(np.arange(1000) % 7, 64, seed, **options)
        batches.set_epoch(epoch, skip)
        assert len(list(batches)) == len(batches) - skip
        return np.concatenate(list(batches)).tolist()

    assert drawn() == drawn()
    assert drawn(skip=5) == drawn()[5 * 64 :]
    for other in (drawn(epoch=1), drawn(seed=2)):
        assert (other == drawn()) == (options == {"shuffle": False})


def test_evaluation_sees_every_sample_once_and_training_only_full_batches():
    classes = np.zeros(130, int)
    rows = np.concatenate(list(SpaxelBatchSampler(classes, 64, shuffle=False)))[:, 0]
    np.testing.assert_array_equal(rows, np.arange(130))
    assert [len(b) for b in SpaxelBatchSampler(classes, 64)] == [64, 64]
    assert [len(b) for b in SpaxelBatchSampler(classes, 200)] == [130]


@pytest.mark.parametrize(("cutout", "size"), [(3, 5), (5, 4), (9, 7), (31, 3)])
def test_cutout_is_the_patches_of_all_samples_around_one(root, cutout, size):
    options = {"patch_norm": "spectral", "patch_size": size, "augment": False}
    patches, cutouts = dataset_of(root, **options), dataset_of(root, cutout=cutout, **options)
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
    dataset = dataset_of(root, patch_norm="spectral", patch_size=5, cutout=7)
    plain = dataset[40]
    for turn in range(N_TURNS):
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
    options = {"split_dir": split, "patch_norm": "PCA", "patch_size": 3, "cutout": 5}
    loader = loader_of(root, balance=balance, **options)
    dataset, batches = loader.dataset, loader.batch_sampler
    classes = dataset.samples.classes
    each = np.full(len(classes), 1 / len(classes))
    if balance:  # a class, then one of its members
        each = 1 / (np.unique(classes).size * np.bincount(classes)[classes])
    np.testing.assert_allclose(batches.probabilities, each)
    drawn = dataset.__getitems__(np.arange(len(dataset)))
    first = drawn.patches[:, 0, 0, 1:-1, 1:-1].double()  # component of the spaxels themselves
    own = dataset.centres(np.arange(len(dataset)))[:, 0].astype(float)
    cases = [(first, own), (torch.ones_like(first), np.ones(len(own)))]
    cases += [(drawn.classes == c, classes == c) for c in np.unique(classes)]
    for of_cutouts, of_patches in cases:
        sums = (drawn.weights * of_cutouts).sum((1, 2)).numpy()
        assert each @ sums == pytest.approx(each @ of_patches, rel=1e-5)


def test_batch_size_counts_labelled_spaxels(root, caplog):
    loader = loader_of(root, batch_size=120, cutout=5)
    seen = [int((batch.classes >= 0).sum()) for batch in loader]
    assert np.mean(seen) == pytest.approx(120, rel=0.15)
    assert sum(seen) == pytest.approx(len(loader.dataset), rel=0.3)
    assert "Choose a smaller --cutout" not in caplog.text
    loader_of(root, batch_size=20, cutout=5)
    assert "so a step has only 1 of them" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("source", "cutout"), [("packed", 5), ("patches", 1)])
def test_spawned_workers_give_the_batches_of_this_process(files, source, cutout):
    options = {"source": source, "cutout": cutout, "batch_size": 100, "label_task": "BPT"}
    state = torch.get_rng_state()
    here, there = (list(loader_of(files, workers=n, **options)) for n in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(here) == len(there) > 1
    for ours, theirs in zip(here, there, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("source", ["packed", "patches"])
def test_pickled_datasets_leave_their_spectra_behind(files, source):
    dataset = dataset_of(files, source=source)
    before = dataset[3].patches
    pickled = pickle.dumps(dataset)
    assert len(pickled) < (30_000 if source == "patches" else dataset.spectra.nbytes)
    assert torch.equal(pickle.loads(pickled)[3].patches, before)


def test_parts_of_a_split_share_the_spectra_and_only_training_is_shuffled(root):
    loaders = data_fns.get_dataloaders(
        DataOptions(root, "hard", network="ssftt"), parts=utils.SPLIT_PARTS
    )
    stores = {loader.dataset.spectra.data_ptr() for loader in loaders.values()}
    assert len(stores) == 1
    batches = [type(next(iter(loader))).__name__ for loader in loaders.values()]
    assert batches == ["CutoutBatch", "Batch", "Batch"]
    for part in ("val", "test"):
        rows = torch.cat([batch.rows for batch in loaders[part]])
        np.testing.assert_array_equal(rows, np.arange(len(loaders[part].dataset)))
