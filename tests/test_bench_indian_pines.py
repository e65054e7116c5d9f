"""The protocol of the Indian Pines benchmark on small made-up scenes, and the scene itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_indian_pines as bench

from HSI_SSFTT import get_SSFTT_model
from labels import LABEL_NONE
from utils import DataError


def make_truth(shape=(18, 24)) -> np.ndarray:
    """Three classes: two fields, three fields, one field; strips without a label between."""
    truth = np.full(shape, LABEL_NONE, np.int64)
    truth[:6, :12], truth[:6, 14:] = 0, 0
    truth[7:12, :9], truth[7:12, 10:20], truth[7:12, 21:] = 1, 1, 1
    truth[14:, :] = 2
    return truth


def make_scene(seed: int = 0) -> bench.Scene:
    """Spectra that tell the classes apart, with noise."""
    truth, rng = make_truth(), np.random.default_rng(seed)
    shapes = rng.normal(size=(4, 40))  # the last one where there is no label
    return bench.Scene((shapes[truth] + rng.normal(size=(*truth.shape, 40))).astype("f4"), truth)


def connected(truth: np.ndarray) -> list[set[tuple[int, int]]]:
    """Fields by flooding, pixel after pixel."""
    left = {(int(y), int(x)) for y, x in np.argwhere(truth != LABEL_NONE)}
    fields = []
    while left:
        todo, field = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            field.add((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left and truth[near] == truth[y, x]:
                    left.remove(near)
                    todo.append(near)
        fields.append(field)
    return fields


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_fields_are_those_that_flooding_finds(seed):
    truth = np.random.default_rng(seed).integers(-1, 3, size=(9, 7))
    fields = bench.find_fields(truth)
    np.testing.assert_array_equal(fields == LABEL_NONE, truth == LABEL_NONE)
    found = [
        {(int(y), int(x)) for y, x in np.argwhere(fields == k)} for k in range(fields.max() + 1)
    ]
    assert sorted(map(sorted, found)) == sorted(map(sorted, connected(truth)))


def test_pixels_that_touch_by_a_corner_are_two_fields():
    fields = bench.find_fields(np.array([[0, -1], [-1, 0]]))
    assert fields.tolist() == [[0, -1], [-1, 1]]


@pytest.mark.parametrize("seed", range(8))
def test_whole_fields_lie_on_one_side_and_single_ones_are_trained_on(seed):
    truth = make_truth()
    split = bench.split_by_field(truth, seed)
    number = bench.find_fields(truth).ravel()
    held = set(number[split.test])
    assert not held & set(number[split.train])
    assert sorted(split.test) == np.flatnonzero(np.isin(number, list(held))).tolist()
    # one of the two fields of class 0, one of the three of class 1, not the one of class 2
    classes = [truth.flat[np.flatnonzero(number == k)[0]] for k in held]
    assert sorted(classes) == [0, 1]
    trained = np.bincount(truth.flat[split.train])
    np.testing.assert_array_equal(trained, np.round(0.1 * np.bincount(truth[truth >= 0])))


def test_a_class_trains_on_no_more_pixels_than_its_training_fields_have():
    truth = np.full((4, 30), LABEL_NONE)
    truth[0], truth[2, :2] = 0, 0
    splits = [bench.split_by_field(truth, seed, share=0.5) for seed in range(20)]
    assert {(len(s.train), len(s.test)) for s in splits} == {(16, 2), (2, 30)}


@pytest.mark.parametrize("seed", [0, 1])
def test_random_split_takes_a_tenth_of_each_class_and_tests_the_rest(seed):
    truth = make_truth()
    split = bench.split_random(truth, seed)
    both = np.concatenate([split.train, split.test])
    np.testing.assert_array_equal(np.sort(both), np.flatnonzero(truth != LABEL_NONE))
    sizes = np.bincount(truth[truth >= 0])
    assert np.all(np.abs(np.bincount(truth.flat[split.train]) - 0.1 * sizes) <= 1)


def test_seeds_vary_every_split_but_the_published():
    truth = make_truth()
    same = {
        name: np.array_equal(make(truth, 0).train, make(truth, 1).train)
        for name, make in bench.SPLITS.items()
    }
    assert same == {"published": True, "random pixels": False, "whole fields": False}


def test_share_of_patches_that_see_a_training_pixel_is_the_counted_one():
    truth = make_truth()
    split = bench.split_random(truth, 3, share=0.02)
    ny, nx = truth.shape
    (ys, xs), (train_y, train_x) = np.divmod(split.test, nx), np.divmod(split.train, nx)
    apart = np.maximum(abs(ys[:, None] - train_y), abs(xs[:, None] - train_x))
    share = (apart.min(axis=1) <= 2).mean()
    assert 0 < share < 1
    assert bench.share_seeing_training(split, (ny, nx), patch_size=5) == pytest.approx(share)


def test_coordinates_baseline_gives_a_nearest_training_pixels_class():
    truth = make_truth()
    split = bench.split_random(truth, 0)
    predicted = bench.nearest_pixel(truth, split)
    where = np.indices(truth.shape).reshape(2, -1).T
    d = ((where[split.test][:, None] - where[split.train]) ** 2).sum(-1)
    is_nearest = d == d.min(axis=1, keepdims=True)
    same_class = truth.flat[split.train] == predicted[:, None]
    assert np.all((is_nearest & same_class).any(axis=1))


def test_spectrum_baseline_learns_from_spectra_alone():
    scene = make_scene()
    split = bench.split_random(scene.truth, 0)
    truth = scene.truth.flat[split.test]
    assert (bench.single_spectrum(scene, split) == truth).mean() > 0.9
    pixels = np.random.default_rng(0).permutation(scene.truth.size)
    moved = bench.Scene(  # pixels in any other order: the same spectra, the same classes
        scene.spectra.reshape(-1, 40)[pixels].reshape(scene.spectra.shape),
        scene.truth.flat[pixels].reshape(scene.truth.shape),
    )
    at = np.argsort(pixels)
    again = bench.single_spectrum(moved, bench.Split(at[split.train], at[split.test]))
    np.testing.assert_array_equal(again, bench.single_spectrum(scene, split))


def test_commonest_class_is_that_of_training():
    truth = np.array([[0, 1, 1, 2, 2, 2]])
    split = bench.Split(np.array([0, 1, 2, 3]), np.array([4, 5]))
    assert bench.commonest_class(truth, split).tolist() == [1, 1]


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 2, 3], size=200)  # class 1 is not tested, but may be predicted
    predicted = np.where(rng.random(200) < 0.6, truth, rng.integers(4, size=200))
    is_true = np.unique(truth)
    found = bench.score(truth, predicted, 4)
    recall = metrics.recall_score(truth, predicted, labels=is_true, average="macro")
    assert found["OA"] == pytest.approx(100 * metrics.accuracy_score(truth, predicted))
    assert found["AA"] == pytest.approx(100 * recall)
    assert found["kappa"] == pytest.approx(100 * metrics.cohen_kappa_score(truth, predicted))


def test_components_are_white_and_span_the_leading_directions():
    spectra = make_scene().spectra
    values = bench.whiten(spectra, 5).reshape(-1, 5)
    np.testing.assert_allclose(np.cov(values.T), np.eye(5), atol=1e-4)
    pixels = spectra.reshape(-1, 40).astype(float)
    u = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)[0][:, :5]
    expected = u * np.sqrt(len(u) - 1)
    signs = np.sign((values * expected).sum(axis=0))
    np.testing.assert_allclose(values * signs, expected, atol=1e-4)


def test_patches_come_row_by_row_with_their_pixel_in_the_middle():
    image = np.random.default_rng(0).normal(size=(6, 7, 3)).astype("f4")
    patches = bench.cut_patches(image, 5)
    assert patches.shape == (42, 1, 3, 5, 5)
    np.testing.assert_array_equal(patches[:, 0, :, 2, 2], image.reshape(-1, 3))
    np.testing.assert_array_equal(patches[0, 0, :, :2], 0)
    np.testing.assert_array_equal(patches[0, 0, :, 2:, 2:], image[:3, :3].transpose(2, 0, 1))


def test_training_learns_and_a_seed_gives_the_same_network():
    rng = np.random.default_rng(0)
    classes = torch.from_numpy(rng.integers(3, size=96))
    patches = torch.randn(96, 1, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    patches[:, 0, 0] += 3 * (classes[:, None, None] - 1)
    first, again = (bench.train_network(patches, classes, 3, 15, seed=4) for _ in range(2))
    other = bench.train_network(patches, classes, 3, 1, seed=5)
    assert not first.training
    logits = bench.map_patches(first, patches)
    assert (logits.argmax(1) == classes).float().mean() > 0.9
    torch.testing.assert_close(logits, bench.map_patches(again, patches), rtol=0, atol=0)
    assert not torch.equal(logits, bench.map_patches(other, patches))


def test_a_loss_that_is_no_number_stops_training():
    patches = torch.full((8, 1, 4, 5, 5), torch.nan)
    with pytest.raises(DataError, match="loss of epoch 1 is nan"):
        bench.train_network(patches, torch.zeros(8, dtype=torch.int64), 2, 3, seed=0)


def test_both_maps_list_the_pixels_alike():
    image = np.random.default_rng(0).normal(size=(9, 11, 6)).astype("f4")
    torch.manual_seed(0)
    model = get_SSFTT_model(4, 5, 6).eval()
    cutout = torch.from_numpy(image).permute(2, 0, 1)[None, None]
    patch_wise = bench.map_patches(model, bench.cut_patches(image, 5))
    agreement = bench.compare_maps(patch_wise, bench.map_dense(model, cutout))
    assert agreement["differing_pixels"] == 0
    assert agreement["logit_difference"] < 1e-5


def test_maps_that_differ_are_seen():
    one = torch.tensor([[4.0, 0.0], [1.0, 1.5], [0.0, 2.0]])
    other = torch.tensor([[4.0, 0.0], [1.6, 1.5], [0.0, 2.0]])
    found = bench.compare_maps(one, other)
    assert found["differing_pixels"] == 1
    assert found["largest_margin"] == pytest.approx(0.5 / 4)
    assert found["logit_difference"] == pytest.approx(0.6 / 4)


def test_spread_over_seeds_is_the_samples():
    found = bench.summarise([1.0, 2.0, 6.0])
    assert (found["mean"], found["std"]) == (3.0, pytest.approx(np.std([1, 2, 6], ddof=1)))
    assert bench.summarise([5.0])["std"] is None


def test_the_command_prints_and_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "load_scene", make_scene)
    config = bench.Config(seeds=(0, 1), epochs=1, runs=1, results=tmp_path)
    assert bench.main(config) == 0
    written = json.loads((tmp_path / "bench_indian_pines.json").read_text())
    rows = {row["name"]: row for row in written["rows"]}
    assert len(rows) == 7
    for row in rows.values():
        assert set(row) == {"name", "ours", "baseline", "ratio", "unit", "against"}
        assert row["ratio"] == pytest.approx(row["ours"] / row["baseline"])
    seconds = written["map_seconds"]
    rate = rows["indian_pines_dense_map"]
    assert rate["ratio"] == pytest.approx(seconds["patch_wise"] / seconds["dense"])
    runs = written["runs"]["whole fields"]
    assert [r["tested_classes"] for r in runs] == [2, 2]
    assert all(r["maps"]["differing_pixels"] == 0 for r in runs)
    shown = written["scores"]["random pixels"]["nearest (row, column)"]["OA"]
    out = capsys.readouterr().out
    assert f"{shown['mean']:.2f} +- {shown['std']:.2f}" in out
    assert "whole fields" in out
    assert all(name in out for name in rows)
    assert written["config"]["seeds"] == [0, 1]
    assert written["environment"]["packages"]["torch"]


def test_no_seeds_no_epochs_no_runs_are_refused():
    for bad in ({"seeds": ()}, {"epochs": 0}, {"runs": 0}):
        with pytest.raises(DataError, match="at least one of each"):
            bench.main(bench.Config(**bad))


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    monkeypatch.setitem(sys.modules, "tensorly.datasets", None)
    with pytest.raises(DataError, match=r"pip install tensorly==0\.10\.0") as caught:
        bench.load_scene()
    assert "\n" not in str(caught.value)


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
