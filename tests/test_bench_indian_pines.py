"""Protocol of the Indian Pines benchmark on small synthetic scenes, and the scene itself."""

from __future__ import annotations

import json
import sys

from utils import DataError

import bench_indian_pines as bench
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn import metrics

from HSI_SSFTT import get_SSFTT_model
from labels import LABEL_NONE

pytestmark = pytest.mark.slow


def make_truth(shape=(18, 24)) -> np.ndarray:
    """Three classes, of two, three and one fields; strips without a label in between."""
    truth = np.full(shape, LABEL_NONE, np.int64)
    truth[:6, :12], truth[:6, 14:] = 0, 0
    truth[7:12, :9], truth[7:12, 10:20], truth[7:12, 21:] = 1, 1, 1
    truth[14:, :] = 2
    return truth


def make_scene(seed: int = 0) -> bench.Scene:
    """Noisy spectra that differ between the classes."""
    truth, rng = make_truth(), np.random.default_rng(seed)
    shapes = rng.normal(size=(4, 40))  # the last one where there is no label
    return bench.Scene((shapes[truth] + rng.normal(size=(*truth.shape, 40))).astype("f4"), truth)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_fields_are_the_connected_components_of_each_class(seed):
    truth = np.random.default_rng(seed).integers(-1, 3, size=(9, 7))
    fields = bench.find_fields(truth)
    np.testing.assert_array_equal(fields == LABEL_NONE, truth == LABEL_NONE)
    number = np.arange(truth.size).reshape(truth.shape)
    below, right = truth[1:] == truth[:-1], truth[:, 1:] == truth[:, :-1]
    a = np.concatenate([number[1:][below], number[:, 1:][right]])
    b = np.concatenate([number[:-1][below], number[:, :-1][right]])
    graph = coo_matrix((np.ones(a.size), (a, b)), shape=(truth.size, truth.size))
    expected = connected_components(graph, directed=False)[1].reshape(truth.shape)[truth >= 0]
    pairs = set(zip(fields[truth >= 0].tolist(), expected.tolist(), strict=True))
    assert len(pairs) == len(np.unique(expected)) == fields.max() + 1


@pytest.mark.parametrize("seed", range(8))
def test_whole_fields_are_in_one_part_and_single_ones_are_trained_on(seed):
    truth = make_truth()
    split, number = bench.split_by_field(truth, seed), bench.find_fields(truth).ravel()
    held = set(number[split.test])
    assert not held & set(number[split.train])
    assert sorted(split.test) == np.flatnonzero(np.isin(number, list(held))).tolist()
    # one of the two fields of class 0, one of the three of class 1, not the one of class 2
    assert sorted(truth.flat[np.flatnonzero(number == k)[0]] for k in held) == [0, 1]
    trained = np.bincount(truth.flat[split.train])
    np.testing.assert_array_equal(trained, np.round(0.1 * np.bincount(truth[truth >= 0])))
    two = np.full((4, 30), LABEL_NONE)
    two[0], two[2, :2] = 0, 0  # half of the pixels, at most those of the training field
    split = bench.split_by_field(two, seed, share=0.5)
    assert (len(split.train), len(split.test)) in ((16, 2), (2, 30))


def test_random_split_trains_on_a_tenth_of_each_class_and_tests_the_rest():
    truth = make_truth()
    split = bench.split_random(truth, 0)
    both = np.concatenate(split)
    np.testing.assert_array_equal(np.sort(both), np.flatnonzero(truth != LABEL_NONE))
    sizes = np.bincount(truth[truth >= 0])
    assert np.all(np.abs(np.bincount(truth.flat[split.train]) - 0.1 * sizes) <= 1)
    same = {
        name: np.array_equal(make(truth, 0).train, make(truth, 1).train)
        for name, make in bench.SPLITS.items()
    }
    assert same == {"published": True, "random pixels": False, "whole fields": False}


def test_share_of_patches_with_a_training_pixel_and_its_nearest_class():
    """Both compared with all distances between test and training pixels."""
    truth = make_truth()
    split = bench.split_random(truth, 3, share=0.02)
    where = np.stack(np.divmod(np.arange(truth.size), truth.shape[1]), axis=1)
    apart = abs(where[split.test][:, None] - where[split.train])  # (test, train, axis)
    share = (apart.max(axis=2).min(axis=1) <= 2).mean()
    assert 0 < share < 1
    assert bench.share_seeing_training(split, truth.shape, 5) == pytest.approx(share)
    squares = (apart**2).sum(axis=2)
    is_nearest = squares == squares.min(axis=1, keepdims=True)
    same_class = truth.flat[split.train] == bench.nearest_pixel(truth, split)[:, None]
    assert np.all((is_nearest & same_class).any(axis=1))


def test_baselines_without_neighbours_learn_from_spectra_or_classes_alone():
    scene = make_scene()
    split = bench.split_random(scene.truth, 0)
    predicted = bench.single_spectrum(scene, split)
    assert (predicted == scene.truth.flat[split.test]).mean() > 0.9
    pixels = np.random.default_rng(0).permutation(scene.truth.size)
    moved = bench.Scene(  # pixels in another order: the same spectra, the same classes
        scene.spectra.reshape(-1, 40)[pixels].reshape(scene.spectra.shape),
        scene.truth.flat[pixels].reshape(scene.truth.shape),
    )
    at = np.argsort(pixels)
    again = bench.single_spectrum(moved, bench.Split(at[split.train], at[split.test]))
    np.testing.assert_array_equal(again, predicted)
    tiny = bench.Split(np.array([0, 1, 2, 3]), np.array([4, 5]))
    assert bench.commonest_class(np.array([[0, 1, 1, 2, 2, 2]]), tiny).tolist() == [1, 1]


def test_scores_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 2, 3], size=200)  # class 1 is not tested, but may be predicted
    predicted = np.where(rng.random(200) < 0.6, truth, rng.integers(4, size=200))
    recall = metrics.recall_score(truth, predicted, labels=[0, 2, 3], average="macro")
    expected = {
        "OA": 100 * metrics.accuracy_score(truth, predicted),
        "AA": 100 * recall,
        "kappa": 100 * metrics.cohen_kappa_score(truth, predicted),
    }
    assert bench.score(truth, predicted, 4) == pytest.approx(expected)
    found = bench.summarise([1.0, 2.0, 6.0])
    assert (found["mean"], found["std"]) == (3.0, pytest.approx(np.std([1, 2, 6], ddof=1)))
    assert bench.summarise([5.0])["std"] is None


def test_components_are_white_and_span_the_leading_directions():
    spectra = make_scene().spectra
    values = bench.whiten(spectra, 5).reshape(-1, 5)
    pixels = spectra.reshape(-1, 40).astype(float)
    u = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)[0][:, :5]
    expected = u * np.sqrt(len(u) - 1)
    np.testing.assert_allclose(
        values * np.sign((values * expected).sum(axis=0)), expected, atol=1e-4
    )


def test_training_learns_and_depends_on_nothing_but_the_seed():
    rng = np.random.default_rng(0)
    classes = torch.from_numpy(rng.integers(3, size=96))
    patches = torch.from_numpy(rng.normal(size=(96, 1, 6, 5, 5)).astype("f4"))
    patches[:, 0, 0] += 3 * (classes[:, None, None] - 1)
    models = [bench.train_network(patches, classes, 3, 15, seed) for seed in (4, 4, 5)]
    first, again, other = (bench.map_patches(model, patches) for model in models)
    assert (first.argmax(1) == classes).float().mean() > 0.9
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(DataError, match="loss of epoch 1 is nan"):
        bench.train_network(patches * torch.nan, classes, 3, 3, seed=0)


def test_maps_are_compared_pixel_by_pixel():
    image = np.random.default_rng(0).normal(size=(9, 11, 6)).astype("f4")
    torch.manual_seed(0)
    model = get_SSFTT_model(4, 5, 6).eval()
    patches = bench.cut_patches(image, 5)
    np.testing.assert_array_equal(patches[:, 0, :, 2, 2], image.reshape(-1, 6))
    dense = bench.map_dense(model, torch.from_numpy(image).permute(2, 0, 1)[None, None])
    agreement = bench.compare_maps(bench.map_patches(model, patches), dense)
    assert agreement["differing_pixels"] == 0
    assert agreement["logit_difference"] < 1e-5
    one, other = torch.tensor([[[4.0, 0], [1, 1.5], [0, 2]], [[4.0, 0], [1.6, 1.5], [0, 2]]])
    expected = {"differing_pixels": 1, "largest_margin": 0.5 / 4, "logit_difference": 0.6 / 4}
    assert bench.compare_maps(one, other) == pytest.approx(expected)


def test_the_command_prints_and_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "load_scene", make_scene)
    bench.main(bench.Config(seeds=(0, 1), epochs=1, runs=1, results=tmp_path))
    written = json.loads((tmp_path / "bench_indian_pines.json").read_text())
    rows, seconds = {row["name"]: row for row in written["rows"]}, written["map_seconds"]
    assert len(rows) == 7
    assert all(r["ratio"] == pytest.approx(r["ours"] / r["baseline"]) for r in rows.values())
    ratio = rows["indian_pines_dense_map"]["ratio"]
    assert ratio == pytest.approx(seconds["patch_wise"] / seconds["dense"])
    runs = written["runs"]["whole fields"]
    assert [(r["tested_classes"], r["maps"]["differing_pixels"]) for r in runs] == [(2, 0)] * 2
    shown = written["scores"]["random pixels"]["nearest (row, column)"]["OA"]
    assert f"{shown['mean']:.2f} +- {shown['std']:.2f}" in capsys.readouterr().out


def test_refusals_say_what_to_do(monkeypatch):
    for bad in ({"seeds": ()}, {"epochs": 0}, {"runs": 0}):
        with pytest.raises(DataError, match="at least one of each"):
            bench.main(bench.Config(**bad))
    monkeypatch.setitem(sys.modules, "tensorly.datasets", None)
    with pytest.raises(DataError, match=r"^[^\n]*pip install tensorly==0\.10\.0$"):
        bench.load_scene()


def test_the_scene_is_indian_pines():
    pytest.importorskip("tensorly", reason="Indian Pines: pip install tensorly==0.10.0")
    scene = bench.load_scene()
    assert scene.spectra.shape == (145, 145, 200)
    # published class sizes, alfalfa to stone-steel towers (Baumgardner, Biehl & Landgrebe 2015)
    sizes = [46, 1428, 830, 237, 483, 730, 28, 478, 20, 972, 2455, 593, 205, 1265, 386, 93]
    assert np.bincount(scene.truth[scene.truth != LABEL_NONE]).tolist() == sizes
    split = bench.SPLITS["published"](scene.truth, 0)
    assert (len(split.train), len(split.test)) == (1024, 9225)
    right = bench.nearest_pixel(scene.truth, split) == scene.truth.flat[split.test]
    assert 100 * right.mean() == pytest.approx(97.88, abs=0.005)  # measured without this code
