"""Both networks through the functions that training, evaluation and maps share."""

from __future__ import annotations

import shutil

import utils

import mock_cubes
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import train
from scipy.stats import laplace

import baselines
import data_io
import eval_fns
import inference
import networks
import run_folder
from HSI_SSFTT import get_SSFTT_model
from intervals import Calibration
from labels import LABEL_NONE, logoh_edges
from matched_filter_net import MatchedFilterConfig, MatchedFilterNet, join, prepare_spectra, split

TEST_GALAXY = mock_cubes.PLATEIFUS[-1]
EDGES = np.array(logoh_edges(6))


def value_network(**sizes) -> MatchedFilterNet:
    network = MatchedFilterNet(MatchedFilterConfig(bands=60, lines=2, **sizes))
    network.target_mean.fill_(8.5)
    network.target_std.fill_(0.1)
    return network


# What outputs mean


def test_probabilities_are_those_of_a_laplace_distribution():
    outputs = torch.tensor([[0.3, -0.5, 1.0], [-2.0, -4.0, 1.0], [0.0, 2.0, 9.0]])
    found = networks.answer(value_network(), outputs, EDGES, None)
    value, scale = 8.5 + 0.1 * outputs[:, 0].numpy(), 0.1 * np.exp(outputs[:, 1].numpy())
    np.testing.assert_allclose(found.value, value, rtol=1e-6)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-5)
    below = laplace.cdf(EDGES, value[:, None], scale[:, None])
    wanted = np.diff(np.pad(below, ((0, 0), (1, 1)), constant_values=(0, 1))[:, :], axis=1)
    wanted[:, 0], wanted[:, -1] = below[:, 0], 1 - below[:, -1]
    np.testing.assert_allclose(found.probabilities, wanted, atol=1e-5)
    np.testing.assert_allclose(found.unlikeness, [1, 1, 9])


def test_probabilities_are_as_wide_as_the_calibration_says():
    outputs = torch.tensor([[0.3, -0.5, 1.0], [-2.0, -4.0, 1.0]])
    twice = Calibration(20, 100, [8.5], {"0.9": [2 * np.log(10)]})
    found = networks.answer(value_network(), outputs, EDGES, None, twice)
    wider = outputs + torch.tensor([0, np.log(2), 0])
    wanted = networks.answer(value_network(), wider, EDGES, None)
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-6)
    assert (found.scale < 0.6 * wanted.scale).all()


def test_classes_of_values_are_those_that_contain_them():
    values = torch.tensor([8.0, 8.39999, 8.401, 8.5, 8.9])
    outputs = torch.stack([(values - 8.5) / 0.1, torch.zeros(5), torch.ones(5)], 1)
    found = networks.classes_of(value_network(), outputs, EDGES)
    assert found.tolist() == np.digitize(values.numpy(), EDGES).tolist() == [0, 0, 1, 3, 5]


def test_a_network_of_classes_has_their_mean_as_its_value():
    logits, middles = torch.randn(4, 6), np.linspace(8.3, 8.6, 6)
    found = networks.answer(get_SSFTT_model(6, 3, 4), logits, EDGES, middles)
    np.testing.assert_allclose(found.value, logits.softmax(1).numpy() @ middles, rtol=1e-6)
    assert found.unlikeness is None


@pytest.mark.parametrize("classes", [0, 3])
def test_cutouts_fields_and_patches_give_the_same(classes):
    torch.manual_seed(0)
    network = value_network(classes=classes, window=3).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    flux = np.random.default_rng(0).normal(2, 1, (9, 9, 60))
    field = join(prepare_spectra(flux, np.ones_like(flux))).float()
    field[2, 3] = 0  # unusable
    field = field.movedim(2, 0)[None, None]
    whole = networks.map_outputs(network, field)[0]
    weights = torch.ones(1, 7, 7)
    cutout = networks.cutout_outputs(network, field, weights)[0]
    inner = whole[:, 1:-1, 1:-1]
    torch.testing.assert_close(cutout, inner.nan_to_num(), rtol=1e-4, atol=1e-5)
    assert inner[:, 1, 2].isnan().all()
    patch = field[..., 4:7, 3:6]
    torch.testing.assert_close(network(patch)[0], whole[:, 5, 4], rtol=1e-4, atol=1e-5)


def test_no_gradient_is_added_up_in_an_order_that_threads_decide():
    """Otherwise a resumed run is not the run that was never stopped.

    torch adds up the gradients of an indexed tensor on several threads at once, those of an
    embedding not.
    """
    todo, seen = [value_network().dense(torch.rand(1, 1, 137, 9, 9)).grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert "EmbeddingBackward0" in names
    assert "IndexBackward0" not in names


def test_joined_spectra_come_apart_again():
    flux = np.random.default_rng(0).normal(2, 1, (5, 60))
    spectra = prepare_spectra(flux, np.ones_like(flux))
    for one, other in zip(spectra, split(join(spectra)), strict=True):
        torch.testing.assert_close(one.half(), other, rtol=0, atol=0)


# Baselines


def test_line_ratios_follow_the_nitrogen_line():
    from line_fits import LINES

    wave = np.geomspace(5000, 8000, 2040)
    rng = np.random.default_rng(0)
    logoh = rng.uniform(8.3, 8.7, 400)
    flux = np.ones((400, wave.size)) * rng.uniform(0.5, 2, (400, 1))
    strengths = {"Ha-6564": 1, "NII-6585": 10 ** ((logoh - 8.743) / 0.462), "OIII-5008": 0.4}
    for line, strength in strengths.items():
        sigma = LINES[line] * 85 / 299792.458
        shape = np.exp(-0.5 * ((wave - LINES[line]) / sigma) ** 2)
        flux += flux[:, :1] * np.broadcast_to(strength, 400)[:, None] * shape
    flux += rng.normal(0, 0.01, flux.shape)
    rows = join(prepare_spectra(flux, np.full_like(flux, 1e4))).float().numpy()

    class Some:
        spec = baselines.PatchSpec("logOH", patch_norm="residual")
        samples = type("S", (), {"values": logoh, "classes": np.digitize(logoh, EDGES)})

        def __len__(self):
            return 300  # the others are new to it

        def centres(self, where):
            return rows[where]

    weights = baselines.fit(Some(), 0, wave, learns_dex=True)
    guess = baselines.apply(weights, rows[300:], Some.spec, wave)
    assert np.abs(guess.logoh - logoh[300:]).mean() < 0.01
    assert (guess.classes == np.digitize(guess.logoh, EDGES)).all()


# A whole run


def test_a_run_is_mapped_and_evaluated_with_intervals(root, filters_run):
    model = inference.load_model(filters_run, "cpu")
    path = utils.cube_path(root, TEST_GALAXY)
    maps = inference.predict_cube(model, path)
    cube = inference.read_cube_for(model, path)
    patches = inference.map_answer(model, cube.values, patch_wise=True)
    usable = maps.usable
    lower, upper = model.card.calibration.interval(patches.value, patches.scale)
    for name, by_patch in (
        ("probabilities", patches.probabilities),
        ("logoh", patches.value),
        ("lower", lower),
        ("upper", upper),
    ):
        np.testing.assert_allclose(getattr(maps, name)[usable], by_patch[usable], atol=2e-4)
    assert (maps.lower[usable] < maps.logoh[usable]).all()
    assert (np.isnan(maps.logoh) == ~usable).all()
    np.testing.assert_allclose(maps.probabilities[usable].sum(1), 1, rtol=1e-5)
    evaluation = eval_fns.evaluate_split(filters_run, "val", device="cpu")
    # calibrated on these very spaxels
    counted = {k: round(v * len(evaluation.predictions)) for k, v in
               evaluation.scores["coverage"].items()}  # fmt: skip
    for level, n in counted.items():
        assert n == pytest.approx(float(level) * len(evaluation.predictions), abs=2)
    assert "line ratios" in repr(evaluation)
    assert "90% intervals contain" in repr(evaluation)


def test_the_network_beats_the_constant_on_a_galaxy_never_seen(filters_run):
    scores = eval_fns.evaluate_split(filters_run, "test", device="cpu").scores
    assert scores["mae_dex"] < 0.7 * scores["constant_mae_dex"]


def test_the_start_is_kept_if_training_makes_it_worse(root, tmp_path):
    train(root, tmp_path / "run", network="matched_filters", cutout=7, lr=3.0, epochs=2)
    card = run_folder.ModelCard.read(tmp_path / "run")
    assert card.best["epoch"] == 0
    scores = eval_fns.evaluate_split(tmp_path / "run", "val", device="cpu").scores
    assert scores["mae_dex"] == pytest.approx(card.best["val_mae_dex"], rel=1e-5)
    later = pd.read_csv(tmp_path / "run" / run_folder.METRICS_FILE)
    assert (later["val_mae_dex"] > card.best["val_mae_dex"]).all()


def test_a_strange_spectrum_is_flagged(own_data, filters_run):
    model, path = inference.load_model(filters_run, "cpu"), utils.cube_path(own_data, TEST_GALAXY)
    before = inference.predict_cube(model, path)
    cube = data_io.read_cube(path)
    cube.flux[5, 5] = np.where(np.arange(mock_cubes.N_BAND) % 7 == 0, 40.0, 1.0)
    data_io.write_cube(path, cube)
    after = inference.predict_cube(model, path)
    assert not before.unlike[5, 5]
    assert after.unlike[5, 5]
    assert before.unlike.sum() < 0.1 * before.usable.sum()


def test_classes_are_learned_too(root, tmp_path):
    options = {"network": "matched_filters", "label_task": "BPT", "epochs": 2, "cutout": 7}
    run = train(root, tmp_path / "run", packed_type="float16", **options)
    evaluation = eval_fns.evaluate_split(run, "test", device="cpu")
    assert evaluation.scores["accuracy"] > evaluation.scores["majority_accuracy"]
    prediction = inference.predict_cube(run, utils.cube_path(root, TEST_GALAXY))
    assert prediction.logoh is None
    assert prediction.unlike is not None
    assert set(np.unique(prediction.classes)) <= {LABEL_NONE, 0, 1, 2}


def test_cubes_without_errors_are_refused_in_one_line(own_data, tmp_path):
    path = utils.cube_path(own_data, mock_cubes.PLATEIFUS[0])
    cube = data_io.read_cube(path)
    cube.ivar = None
    data_io.write_cube(path, cube)
    shutil.rmtree(own_data / "processed" / "packed", ignore_errors=True)  # of the whole cube
    with pytest.raises(utils.DataError, match=r"holds no ivar, .* --network ssftt"):
        train(own_data, tmp_path / "run", network="matched_filters")
