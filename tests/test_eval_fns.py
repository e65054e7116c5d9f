from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mock_cubes
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

import cube_patch_processing as patching
import data_fns
import data_io
import eval_fns
import run_SSFTT_training as training
import utils
from labels import LABEL_NONE
from run_SSFTT_training import TrainConfig
from utils import DataError

SCRIPT = Path(eval_fns.__file__)
TEST_GALAXY = mock_cubes.PLATEIFUS[-1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mock_cubes.make_data_dir(tmp_path_factory.mktemp("data"))


def train(root, run_dir, **options):
    config = TrainConfig(
        data_dir=root, run_dir=run_dir, patch_size=5, epochs=3, batch_size=64, device="cpu",
        **{"patch_norm": "PCA", "split_dir": "hard", **options},
    )  # fmt: skip
    assert training.main(config) == 0
    return run_dir


@pytest.fixture(scope="module")
def run_dir(root, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("runs") / "logOH")


@pytest.fixture
def own_run(run_dir, tmp_path):
    """A copy that a test may write into."""
    return shutil.copytree(run_dir, tmp_path / "run")


@settings(max_examples=60, deadline=None)
@given(
    n_classes=st.integers(2, 8),
    n=st.integers(1, 60),
    seed=st.integers(0, 999),
    narrow=st.booleans(),
)
def test_metrics_equal_scikit_learns(n_classes, n, seed, narrow):
    rng = np.random.default_rng(seed)
    truth = rng.integers(n_classes, size=n)
    guess = np.where(rng.random(n) < 0.5, truth, rng.integers(1 if narrow else n_classes, size=n))
    confusion = eval_fns.confusion_matrix(truth, guess, n_classes)
    labels = range(n_classes)
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(truth, guess, labels=labels))
    overall = eval_fns.overall_metrics(confusion)
    assert overall["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    assert overall["macro_f1"] == pytest.approx(sk.f1_score(truth, guess, average="macro"))
    if np.unique(np.concatenate([truth, guess])).size > 1:
        assert overall["kappa"] == pytest.approx(sk.cohen_kappa_score(truth, guess))
    else:
        assert np.isnan(overall["kappa"])
    each = eval_fns.class_metrics(confusion)
    options = {"labels": labels, "average": None, "zero_division": 0}
    for name, score in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("f1", sk.f1_score),
        ("iou", sk.jaccard_score),
    ):
        np.testing.assert_allclose(each[name], score(truth, guess, **options))


def test_model_needs_nothing_but_its_run_folder(root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    run = train(data, tmp_path / "run")
    trained = eval_fns.load_model(run)
    cube = utils.cube_path(data, TEST_GALAXY)
    expected = eval_fns.evaluate_cube(trained, cube).probabilities
    kept = shutil.copy(cube, tmp_path / cube.name)
    shutil.rmtree(data)
    moved = shutil.move(run, tmp_path / "elsewhere")
    found = eval_fns.evaluate_cube(Path(moved), Path(kept))
    np.testing.assert_array_equal(found.probabilities, expected)
    assert found.plateifu == TEST_GALAXY


@pytest.mark.parametrize("norm", ["PCA", "spectral"])
def test_dense_and_patch_wise_maps_agree(root, tmp_path, norm):
    run = train(root, tmp_path / "run", patch_norm=norm)
    cube = utils.cube_path(root, TEST_GALAXY)
    dense = eval_fns.evaluate_cube(run, cube)
    patch_wise = eval_fns.evaluate_cube(run, cube, patch_wise=True)
    np.testing.assert_allclose(dense.probabilities, patch_wise.probabilities, atol=2e-6)
    np.testing.assert_array_equal(dense.classes, patch_wise.classes)
    np.testing.assert_allclose(np.nansum(dense.probabilities, 2)[dense.usable], 1, rtol=1e-5)


def test_map_equals_the_prediction_of_the_loaders_patches(root, run_dir):
    trained = eval_fns.load_model(run_dir)
    loader = data_fns.get_dataloaders(root, "hard", trained.spec, parts=("test",))["test"]
    logits, rows = eval_fns.predict_logits(trained.network, loader, trained.device)
    samples = loader.dataset.samples
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    for g, plateifu in enumerate(samples.plateifus):
        result = eval_fns.evaluate_cube(trained, utils.cube_path(root, plateifu))
        here = samples.galaxy[rows] == g
        y, x = samples.y[rows][here], samples.x[rows][here]
        np.testing.assert_allclose(result.probabilities[y, x], probabilities[here], atol=2e-6)
    some = loader.dataset.__getitems__(np.arange(5)).patches
    np.testing.assert_allclose(eval_fns.predict(trained, some), probabilities[:5], atol=2e-6)


def test_unusable_spaxels_get_no_class_and_unlabelled_galaxies_a_whole_map(root, run_dir, tmp_path):
    cube = data_io.read_cube(utils.cube_path(root, TEST_GALAXY))
    path = utils.cube_path(tmp_path, "9999-12701")
    data_io.write_cube(path, cube)
    result = eval_fns.evaluate_cube(run_dir, path)
    usable = np.isfinite(cube.flux).mean(axis=2) >= 0.8
    np.testing.assert_array_equal(result.classes == LABEL_NONE, ~usable)
    np.testing.assert_array_equal(np.isnan(result.probabilities).all(axis=2), ~usable)
    np.testing.assert_array_equal(result.inside, np.isfinite(cube.flux).any(axis=2))
    assert result.classes.dtype == np.int16


def test_evaluation_of_a_split_adds_up(root, own_run):
    result = eval_fns.evaluate_split(own_run, "test", seed=3)
    out = own_run / "test"
    assert json.loads((out / "metrics.json").read_text()) == result
    frame = pd.read_csv(out / "predictions.csv.gz", dtype={"plateifu": str})
    trained = eval_fns.load_model(own_run)
    samples = data_fns.get_dataloaders(root, "hard", trained.spec, parts=("test",))["test"]
    samples = samples.dataset.samples
    assert result["spaxels"] == len(frame) == len(samples)
    np.testing.assert_array_equal(frame["true"], samples.classes)
    np.testing.assert_array_equal(frame[["y", "x"]], np.stack([samples.y, samples.x], axis=1))

    assert result["accuracy"] == pytest.approx(sk.accuracy_score(frame["true"], frame["predicted"]))
    train_samples = data_fns.get_dataloaders(root, "hard", trained.spec, parts=("train",))["train"]
    train_samples = train_samples.dataset.samples
    means = pd.Series(train_samples.values).groupby(train_samples.classes).mean()
    values = means[frame["predicted"]].to_numpy()
    assert result["mae_dex"] == pytest.approx(np.abs(values - frame["value"]).mean(), rel=1e-5)
    rmse = np.sqrt(((values - frame["value"]) ** 2).mean())
    assert result["rmse_dex"] == pytest.approx(rmse, rel=1e-5)
    error = np.median(train_samples.values) - samples.values
    assert result["constant_mae_dex"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert result["constant_rmse_dex"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    majority = np.bincount(train_samples.classes).argmax()
    assert result["majority_accuracy"] == pytest.approx((samples.classes == majority).mean())
    assert result["spectrum_accuracy"] == pytest.approx(
        (frame["true"] == frame["spectrum_only"]).mean()
    )

    confusion = pd.read_csv(out / "confusion.csv", index_col="true").to_numpy()
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(frame["true"], frame["predicted"]))
    per_class = pd.read_csv(out / "per_class.csv")
    np.testing.assert_array_equal(per_class["support"], confusion.sum(axis=1))
    per_galaxy = pd.read_csv(out / "per_galaxy.csv", dtype={"plateifu": str})
    weighted = (per_galaxy["accuracy"] * per_galaxy["spaxels"]).sum() / per_galaxy["spaxels"].sum()
    assert weighted == pytest.approx(result["accuracy"])
    for name, (low, high) in result["intervals"].items():
        assert low <= result[name] <= high


def test_patch_wise_evaluation_gives_the_same_numbers(own_run):
    dense = eval_fns.evaluate_split(own_run, "val")
    patch_wise = eval_fns.evaluate_split(own_run, "val", patch_wise=True)
    for result in (dense, patch_wise):
        result.pop("created_utc")
    assert dense == patch_wise
    metrics = pd.read_csv(own_run / "metrics.csv")
    assert dense["accuracy"] == pytest.approx(metrics["val_accuracy"].max())


def test_run_on_patch_files_is_evaluated_on_them(root, own_run, tmp_path):
    mock_cubes.write_patch_files(root, "logOH", "PCA", size=5)
    run = train(root, tmp_path / "files", source="patches")
    data = shutil.copytree(root, tmp_path / "data")
    shutil.rmtree(data / "processed" / "cubes")
    ours = eval_fns.evaluate_split(run, "test", data_dir=data)
    theirs = eval_fns.evaluate_split(own_run, "test")
    mapped = eval_fns.evaluate_split(run, "test")  # here there are cubes
    for result in (ours, theirs, mapped):
        result.pop("created_utc")
    assert ours == theirs == mapped


def test_patch_files_older_than_their_source_are_refused(root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    train_galaxy = mock_cubes.PLATEIFUS[0]
    for plateifu in mock_cubes.PLATEIFUS:
        options = patching.PatchOptions(("spectral",), 5)
        patching.patch_galaxy(data, plateifu, "logOH", options)
    run = {"source": "patches", "patch_norm": "spectral"}
    train(data, tmp_path / "run", **run)
    label = utils.label_path(data, "logOH", train_galaxy)
    data_io.write_labels(label, *[data_io.read_labels(label)] * 2, {"source_sha256": "of others"})
    with pytest.raises(DataError, match=f"{train_galaxy}.npy: made of another .*Re-run cube_patch"):
        train(data, tmp_path / "again", **run)


def test_labels_of_another_calibration_than_the_trainings_are_refused(root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    labels = data / "processed" / "labels" / "logOH"
    for name in mock_cubes.PLATEIFUS:
        utils.write_json(labels / f"{name}.json", {"options": {"diagnostic": "O3N2-M13"}})
    run = train(data, tmp_path / "run")
    utils.write_json(labels / f"{TEST_GALAXY}.json", {"options": {"diagnostic": "N2-M13"}})
    with pytest.raises(DataError, match=f"{TEST_GALAXY}: .*N2-M13, the training's with .*O3N2-M13"):
        eval_fns.evaluate_split(run, "test")


def test_patch_files_of_several_kinds_of_cubes_are_refused(root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    mock_cubes.write_patch_files(data, "logOH", "global", size=5)
    path = utils.patch_path(data, "logOH", "global", mock_cubes.PLATEIFUS[1]).with_suffix(".json")
    meta = json.loads(path.read_text())
    utils.write_json(path, {**meta, "cubes": {**meta["cubes"], "remove_gas_velocity": False}})
    with pytest.raises(DataError, match="remove_gas_velocity=False, the patch files before True"):
        train(data, tmp_path / "run", source="patches", patch_norm="global")


@pytest.mark.parametrize("name", ["model.json", "best.safetensors"])
def test_damaged_model_is_one_clear_line(own_run, name):
    path = own_run / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"best\.safetensors is damaged .*Train the model anew"):
        eval_fns.load_model(own_run)


def test_what_is_undefined_is_not_zero(own_run):
    trained = eval_fns.load_model(own_run)
    frame = pd.DataFrame(
        {
            "plateifu": ["1-1", "1-1", "1-2"],
            "mangaid": ["a", "a", "b"],
            "true": [2, 2, 2],
            "predicted": 2,
            "value": 8.46,
        }
    )
    overall, _, per_class, per_galaxy = eval_fns.score_predictions(frame, trained)
    assert overall["accuracy"] == 1
    assert np.isnan(overall["kappa"])
    assert "kappa" not in overall["intervals"]
    assert np.isnan(per_galaxy["kappa"]).all()
    assert per_class["f1"].tolist()[2] == 1
    assert per_class["f1"].isna().sum() == 5
    assert per_class["f1"].mean() == overall["macro_f1"]


@pytest.mark.parametrize("name", ["stats.h5", "split/test.csv"])
def test_run_folder_that_is_not_whole_is_told_as_such(own_run, name):
    (own_run / name).unlink()
    with pytest.raises(DataError, match=f"{name} is gone. Copy the run anew"):
        eval_fns.load_model(own_run)


def test_prediction_knows_the_part_of_its_galaxy(root, run_dir):
    parts, _ = data_io.read_split(utils.split_path(root, "hard"))
    for part, table in parts.items():
        cube = utils.cube_path(root, table["plateifu"].iloc[0])
        assert eval_fns.evaluate_cube(run_dir, cube).part == part


def test_weights_say_of_which_epoch_they_are(own_run):
    """A stop may come between the two files of a model."""
    best = eval_fns.load_model(own_run).about["best"]
    path = own_run / "model.json"
    about = json.loads(path.read_text())
    assert about.pop("best") == best
    utils.write_json(path, about)
    assert eval_fns.load_model(own_run).about["best"] == best


def test_empty_part_is_one_clear_line(own_run):
    parts, meta = data_io.read_split(own_run / "split")
    data_io.write_split(own_run / "split", {**parts, "test": parts["test"][:0]}, meta)
    with pytest.raises(DataError, match="no labelled spaxel in the test part"):
        eval_fns.evaluate_split(own_run, "test")


def test_easy_split_is_evaluated_on_its_own_spaxels_and_says_so(root, tmp_path):
    run = train(root, tmp_path / "easy", split_dir="easy", label_task="BPT")
    result = eval_fns.evaluate_split(run, "test")
    frame = pd.read_csv(run / "test" / "predictions.csv.gz", dtype={"plateifu": str})
    listed = data_io.read_split(utils.split_path(root, "easy"))[0]["test"]
    merged = frame.merge(listed, on=["plateifu", "y", "x"])
    assert len(merged) == len(frame) == result["spaxels"]
    assert "mae_dex" not in result
    assert "easy split" in eval_fns.describe_result(result)


def test_bootstrap_draws_galaxies_not_spaxels():
    """Ten galaxies, half all right, half all wrong: sd of the mean is sqrt(0.25 / 10)."""
    galaxy = np.repeat(np.arange(10), 50)
    frame = pd.DataFrame({"mangaid": galaxy, "true": 1, "predicted": galaxy % 2})
    low, high = eval_fns.bootstrap_intervals(frame, 2)["accuracy"]
    assert (high - low) / (2 * 1.96) == pytest.approx(np.sqrt(0.25 / 10), rel=0.15)
    one = frame[frame["mangaid"] == 3]
    assert eval_fns.bootstrap_intervals(one, 2) == {}


def test_bootstrap_of_equal_galaxies_has_no_width():
    frame = pd.DataFrame(
        {"mangaid": np.repeat(list("abc"), 4), "true": [0, 1] * 6, "predicted": [0, 0] * 6}
    )
    frame["error"] = 0.1
    for low, high in eval_fns.bootstrap_intervals(frame, 2).values():
        assert low == pytest.approx(high)


def test_split_made_anew_does_not_move_the_test_part(root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    run = train(data, tmp_path / "run")
    before = eval_fns.evaluate_split(run)
    parts, meta = data_io.read_split(utils.split_path(data, "hard"))
    parts["train"], parts["test"] = parts["test"], parts["train"]
    data_io.write_split(utils.split_path(data, "hard"), parts, meta)
    after = eval_fns.evaluate_split(run)
    assert before["galaxies"] == after["galaxies"] == 2
    assert before["accuracy"] == after["accuracy"]


def test_folder_that_is_no_run_is_told(tmp_path, own_run):
    with pytest.raises(DataError, match="not the folder of a training run"):
        eval_fns.load_model(tmp_path)
    about = json.loads((own_run / "model.json").read_text())
    utils.write_json(own_run / "model.json", {**about, "schema_version": 99})
    with pytest.raises(DataError, match="version 99"):
        eval_fns.load_model(own_run)


def test_cube_on_another_grid_is_refused(root, run_dir, tmp_path):
    cube = data_io.read_cube(utils.cube_path(root, TEST_GALAXY))
    path = utils.cube_path(tmp_path, TEST_GALAXY)
    data_io.write_cube(path, data_io.Cube(cube.flux, cube.wave + 3, attrs=cube.attrs))
    with pytest.raises(
        DataError, match=r"(the model's training cubes|the statistics) have .* on one grid"
    ):
        eval_fns.evaluate_cube(run_dir, path)


def test_cube_made_with_other_options_is_refused(root, run_dir, tmp_path):
    cube = data_io.read_cube(utils.cube_path(root, TEST_GALAXY))
    path = utils.cube_path(tmp_path, TEST_GALAXY)
    options = {"deredden": True, "remove_gas_velocity": False}
    cube.attrs["config_json"] = json.dumps(options)
    data_io.write_cube(path, cube)
    with pytest.raises(
        DataError,
        match=r"remove_gas_velocity=False.*--remove-gas-velocity .or make the others like it.\.$",
    ):
        eval_fns.evaluate_cube(run_dir, path)
    del cube.attrs["config_json"]  # a cube that does not say is taken
    data_io.write_cube(path, cube)
    assert eval_fns.evaluate_cube(run_dir, path).usable.any()


def test_command_prints_the_scores_beside_the_baselines(own_run, tmp_path):
    words = [sys.executable, str(SCRIPT), "--run-dir", str(own_run), "--part", "test"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("accuracy", "majority class", "spectrum only", "MAE (dex)", "constant", "kappa"):
        assert word in done.stdout
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--run-dir", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
