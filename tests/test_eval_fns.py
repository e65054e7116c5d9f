"""Models are loaded, used on cubes and evaluated: against their patches, scikit-learn, by hand."""

import json
import shutil
from dataclasses import replace
from operator import itemgetter

import utils
from utils import DataError

import mock_cubes
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import numbers_of, train
from mock_network import like_trained
from sklearn import metrics as sk

import data_fns
import data_io
import eval_fns
import inference
import run_folder
from data_fns import DataOptions
from hsi_proc_fns import MIN_MEASURED
from HSI_SSFTT import get_SSFTT_model
from labels import LABEL_NONE
from recipe import sealed

TEST_GALAXY = mock_cubes.PLATEIFUS[-1]


@pytest.fixture(scope="module")
def model(trained_run):
    return inference.load_model(trained_run, "cpu")


@pytest.fixture(scope="module")
def loaders(root):
    """Loaders of all parts of the split, as in training."""
    options = DataOptions(
        root, "hard", network="ssftt", patch_size=5, cutout=1, packed_type="float32"
    )
    return data_fns.get_dataloaders(options, parts=utils.SPLIT_PARTS)


def test_model_needs_nothing_but_its_run_folder(root, own_run, model, tmp_path):
    cube = utils.cube_path(root, TEST_GALAXY)
    expected = inference.predict_cube(model, cube).probabilities
    kept, moved = shutil.copy(cube, tmp_path), own_run.rename(tmp_path / "elsewhere")
    hidden = root.rename(tmp_path / "data")
    try:
        found = inference.predict_cube(moved, kept)
    finally:
        hidden.rename(root)
    np.testing.assert_array_equal(found.probabilities, expected)
    assert found.plateifu == TEST_GALAXY


def test_dense_and_patch_wise_maps_of_full_spectra_agree(root, model):
    torch.manual_seed(1)
    network = like_trained(get_SSFTT_model(6, 5, mock_cubes.N_BAND))
    card = replace(model.card, spec=replace(model.spec, patch_norm="spectral"))
    model = replace(model, network=network, card=card, stats=None)
    cube = inference.read_cube_for(model, utils.cube_path(root, TEST_GALAXY))
    dense, patch_wise = (
        inference.map_answer(model, cube.values, way).apply(itemgetter(cube.usable))
        for way in (False, True)
    )
    np.testing.assert_allclose(dense.probabilities, patch_wise.probabilities, atol=2e-6)
    np.testing.assert_array_equal(dense.classes, patch_wise.classes)
    np.testing.assert_allclose(dense.probabilities.sum(1), 1, rtol=1e-5)
    assert np.ptp(dense.probabilities, axis=0).max() > 0.01


def test_map_equals_the_prediction_of_the_loaders_patches(root, model, loaders):
    chosen = loaders["test"].dataset.samples
    logits, rows = inference.patch_outputs(model.network, loaders["test"], model.device)
    probabilities = logits.softmax(1).numpy()
    for g, plateifu in enumerate(chosen.plateifus):
        prediction = inference.predict_cube(model, utils.cube_path(root, plateifu))
        here = chosen.galaxy[rows] == g
        y, x = chosen.y[rows][here], chosen.x[rows][here]
        np.testing.assert_allclose(prediction.probabilities[y, x], probabilities[here], atol=2e-6)


def test_usable_spaxels_of_unlabelled_galaxies_get_a_class_and_a_metallicity(root, model, tmp_path):
    cube = data_io.read_cube(utils.cube_path(root, TEST_GALAXY))
    path = utils.cube_path(tmp_path, "9999-12701")
    data_io.write_cube(path, replace(cube, attrs={"plateifu": "9999-12701"}))
    prediction = inference.predict_cube(model, path)
    usable = np.isfinite(cube.flux).mean(axis=2) >= MIN_MEASURED
    np.testing.assert_array_equal(prediction.usable, usable)
    np.testing.assert_array_equal(prediction.classes == LABEL_NONE, ~usable)
    np.testing.assert_array_equal(np.isnan(prediction.probabilities).all(axis=2), ~usable)
    np.testing.assert_array_equal(np.isnan(prediction.logoh), ~usable)
    np.testing.assert_array_equal(prediction.inside, np.isfinite(cube.flux).any(axis=2))
    counts = [(prediction.classes == k).sum() for k in range(6)]
    assert prediction.class_counts.tolist() == counts
    assert prediction.classes.dtype == np.int16
    assert prediction.part == ""


def test_model_and_prediction_describe_themselves_in_three_lines(root, model):
    best, (first, second, third) = model.card.best, repr(model).splitlines()
    assert first.startswith("ssftt for logOH: < 8.40, 8.40-8.44")
    assert "patches of 5 x 5 spaxels, norm PCA, cubes of 5000.0-8000.0 Angstrom" in second
    assert f"{model.card.parameters} parameters" in second
    accuracy = f"validation accuracy {best['val_accuracy']:.3f}"
    accuracy += f", MAE {best['val_mae_dex']:.4f} dex"
    assert third == f"  split hard, best epoch {best['epoch']}, {accuracy}"
    prediction = inference.predict_cube(model, utils.cube_path(root, TEST_GALAXY))
    first, second, third = repr(prediction).splitlines()
    assert first == f"{TEST_GALAXY}: 11 x 12 spaxels, {prediction.usable.sum()} classified"
    assert f"< 8.40: {prediction.class_counts[0]}, 8.40-8.44: " in second
    median = (
        f"of all classified spaxels, star-forming or not, {np.nanmedian(prediction.logoh):.3f} dex"
    )
    width = f"90% intervals of +-{np.nanmedian(prediction.upper - prediction.logoh):.3f} dex"
    assert third == f"  in the run's test part; median 12+log(O/H) {median}, {width}"


def test_evaluation_equals_scores_by_hand(own_run, loaders):
    evaluation = eval_fns.evaluate_split(own_run, "test", seed=3)
    scores, frame, out = evaluation.scores, evaluation.predictions, own_run / "test"
    chosen, train_part = (loaders[part].dataset.samples for part in ("test", "train"))
    assert scores["spaxels"] == len(frame) == len(chosen)
    np.testing.assert_array_equal(frame["true"], chosen.classes)
    np.testing.assert_array_equal(frame[["y", "x"]], np.stack([chosen.y, chosen.x], axis=1))

    truth, guess = frame["true"], frame["predicted"]
    errors = {
        "": frame["logoh"] - frame["value"],
        "constant_": np.median(train_part.values) - chosen.values,
    }
    for name, error in errors.items():
        assert scores[f"{name}mae_dex"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
        assert scores[f"{name}rmse_dex"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    majority = np.bincount(train_part.classes).argmax()
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    assert scores["majority_accuracy"] == pytest.approx((truth == majority).mean())
    assert scores["baseline_accuracy"] == pytest.approx((truth == frame["baseline"]).mean())
    for name, (low, high) in scores["intervals"].items():
        assert low <= scores[name] <= high

    np.testing.assert_array_equal(evaluation.confusion, sk.confusion_matrix(truth, guess))
    np.testing.assert_array_equal(evaluation.per_class["support"], evaluation.confusion.sum(axis=1))
    each = evaluation.per_galaxy
    weighted = np.average(each["accuracy"], weights=each["spaxels"])
    assert weighted == pytest.approx(scores["accuracy"])

    assert json.loads((out / "metrics.json").read_text()) == scores
    confusion = pd.read_csv(out / "confusion.csv", index_col="true")
    np.testing.assert_array_equal(confusion, evaluation.confusion)
    assert confusion.columns.tolist() == confusion.index.tolist() == evaluation.class_names
    for table, name in (
        (evaluation.per_class, "per_class.csv"),
        (each, "per_galaxy.csv"),
        (frame, "predictions.csv.gz"),
    ):
        written = pd.read_csv(out / name, dtype={"plateifu": str})
        pd.testing.assert_frame_equal(written, table, check_dtype=False)


def test_bins_of_labels_count_once(own_run, own_data):
    plain = eval_fns.evaluate_split(own_run, data_dir=own_data)
    path = utils.label_path(own_data, "logOH", plain.predictions["plateifu"][0])
    side = path.with_suffix(".json")
    n = int(np.isfinite(data_io.read_labels(path)).sum())
    about = json.loads(side.read_text()) | {"bins": [i // 4 for i in range(n)]}
    utils.write_json(side, sealed({k: v for k, v in about.items() if k != "checksum"}))
    binned = eval_fns.evaluate_split(own_run, data_dir=own_data)
    frame, scores = binned.predictions, binned.scores
    pd.testing.assert_frame_equal(frame.drop(columns="weight"), plain.predictions)
    y, x = frame[["y", "x"]].to_numpy().T
    bins = np.where(frame["plateifu"] == path.stem, data_io.read_label_bins(path)[y, x], -1)
    size = [1 if i < 0 else (bins == i).sum() for i in bins]
    np.testing.assert_allclose(frame["weight"], 1 / np.array(size))
    assert scores["bins"] == (bins < 0).sum() + len(set(bins[bins >= 0])) < scores["spaxels"]
    correct = frame["true"] == frame["predicted"]
    assert scores["accuracy"] == pytest.approx(np.average(correct, weights=frame["weight"]))
    assert "weight" not in plain.predictions
    assert "bins" not in plain.scores
    assert f"in {scores['bins']} bins; each counts once" in repr(binned)


def without_time(evaluation):
    """Scores but their time, rounded to what the order of sums leaves alone."""

    def rounded(value):
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items() if k != "created_utc"}
        if isinstance(value, list):
            return [rounded(v) for v in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return rounded(evaluation.scores)


def test_evaluation_of_the_validation_part_repeats_the_score_of_training(own_run):
    table = pd.read_csv(own_run / "metrics.csv")
    accuracy = eval_fns.evaluate_split(own_run, "val").scores["accuracy"]
    assert accuracy == pytest.approx(table["val_accuracy"].max(), rel=1e-3)


def test_run_on_patch_files_is_trained_alike_and_evaluated_on_them(own_data, tmp_path):
    mock_cubes.write_patch_files(own_data, "logOH", "PCA", size=5)
    # one after the other: what ran before decides the alignment of memory, and that the rounding
    run = train(own_data, tmp_path / "files", source="patches")
    own_run = train(own_data, tmp_path / "packed")
    weights = (run_folder.read_checkpoint(folder)["model"] for folder in (run, own_run))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    # packed cubes are validated a map at a time, files patch by patch: equal except for rounding
    pd.testing.assert_frame_equal(numbers_of(run), numbers_of(own_run), rtol=1e-5)
    mapped, theirs = (eval_fns.evaluate_split(folder, "test") for folder in (run, own_run))
    shutil.rmtree(own_data / "processed" / "cubes")
    ours = eval_fns.evaluate_split(run, "test", data_dir=own_data)
    assert without_time(ours) == without_time(theirs) == without_time(mapped)


def of_another_grid(run, data):
    mock_cubes.rebuild_cube(data, TEST_GALAXY, wave_min=5003.0)


def of_another_calibration(run, data):
    mock_cubes.relabel(data, [TEST_GALAXY], diagnostic="N2-M13")


def of_another_network(run, data):
    card = run_folder.ModelCard.read(run)
    replace(card, network={**card.network, "bands": 7}).write(run)


def without_test_part(run, data):
    parts, recipe = data_io.read_split(run / "split")
    data_io.write_split(run / "split", {**parts, "test": parts["test"][:0]}, recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_grid, r"wave_min=5003.0 .*5000.0.*\. Re-run process_single_cube\.py"),
        (
            of_another_calibration,
            f"{TEST_GALAXY}.npy: made with diagnostic=N2-M13 .the training labels: O3N2-M13",
        ),
        (of_another_network, r"expected best\.safetensors and model\.json of one network.*retrain"),
        (without_test_part, "no labelled spaxel in the test part"),
    ],
)
def test_data_unlike_those_of_the_training_are_refused(own_run, own_data, change, message):
    change(own_run, own_data)
    with pytest.raises(DataError, match=message):
        eval_fns.evaluate_split(own_run, "test", data_dir=own_data)


def test_rebuilding_the_split_does_not_move_the_test_part(own_run, own_data):
    before = eval_fns.evaluate_split(own_run, data_dir=own_data)
    parts, recipe = data_io.read_split(utils.split_path(own_data, "hard"))
    parts["train"], parts["test"] = parts["test"], parts["train"]
    data_io.write_split(utils.split_path(own_data, "hard"), parts, recipe)
    after = eval_fns.evaluate_split(own_run, data_dir=own_data)
    assert before.scores["galaxies"] == 2
    assert without_time(before) == without_time(after)


def test_easy_split_is_evaluated_on_its_own_spaxels_and_says_so(root, tmp_path):
    run = train(root, tmp_path / "easy", split_dir="easy", label_task="BPT", epochs=1)
    evaluation = eval_fns.evaluate_split(run, "test")
    frame = evaluation.predictions
    listed = data_io.read_split(utils.split_path(root, "easy"))[0]["test"]
    merged = frame.merge(listed, on=["plateifu", "y", "x"])
    assert len(merged) == len(frame) == evaluation.scores["spaxels"]
    assert "mae_dex" not in evaluation.scores
    lines = repr(evaluation).splitlines()
    assert lines[0].startswith("BPT, test part of the split easy (easy): 8 galaxies, ")
    assert lines[1] == "  an easy split: neighbours of the test spaxels were trained on"
    prediction = inference.predict_cube(run, utils.cube_path(root, TEST_GALAXY))
    assert prediction.logoh is None
    assert repr(prediction).splitlines()[2] == "  in the run's train part"


def test_command_prints_the_scores_beside_the_baselines(own_run, capsys):
    assert eval_fns.main(eval_fns.EvalConfig(own_run, device="cpu")) == 0
    printed = capsys.readouterr().out
    for word in ("accuracy", "majority class", "spectrum only", "MAE (dex)", "constant", "kappa"):
        assert word in printed
    assert len(printed.splitlines()) == 14
