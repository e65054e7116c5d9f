"""Benchmarks of metallicity at a tiny size: line fits, added noise, scores; no accuracy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import utils

import benchmark_hard
import beyond_the_cut
import numpy as np
import pandas as pd
import pytest
from benchmark_hard import Config, Survey

import data_io
import line_fits
from mock.physics import EMLINES

WAVE = np.geomspace(5000, 8000, 2040)


def square_survey(galaxies: int = 2, size: int = 12) -> Survey:
    y, x = np.indices((size, size)).reshape(2, -1)
    galaxy = np.repeat(np.arange(galaxies), y.size)
    label = np.linspace(8.3, 8.6, galaxy.size)
    near = np.tile(np.arange(galaxy.size)[:, None], (1, 49))
    names = pd.DataFrame({"plateifu": ["13001-1901", "13001-1902"]})
    y, x = np.tile(y, galaxies), np.tile(x, galaxies)
    nothing = np.zeros((galaxy.size, 0))
    about = (names, near, WAVE, Path("data"), {}, nothing, nothing)
    return Survey(galaxy, y, x, label, label + 0.01, *about)


def test_fitted_fluxes_are_those_of_the_planted_lines():
    wanted = {"OIII": 3.0, "Ha": 10.0, "NII": 4.0, "SIIa": 2.0, "SIIb": 1.5}
    flux = 1 + 1e-4 * (WAVE - 6500)
    for parts in line_fits.GROUPS:
        for name, doublet in parts.items():
            for line, ratio in doublet.items():
                sigma = EMLINES[line] * line_fits.LINE_SIGMA_KMS / 299792.458
                gauss = np.exp(-0.5 * ((WAVE - EMLINES[line]) / sigma) ** 2)
                flux += wanted.get(name, 0) * ratio * gauss / (sigma * (2 * np.pi) ** 0.5)
    ivar = np.full((1, WAVE.size), 100.0)
    ivar[0, 700:720] = 0
    found = line_fits.fit_lines(flux[None], ivar, WAVE)
    for name, value in wanted.items():
        assert found[name][0, 0] == pytest.approx(value, rel=1e-4)
    assert found["SII"][0, 0] == pytest.approx(3.5, rel=1e-4)


def test_stated_errors_of_line_fits_are_their_scatter():
    noise = np.random.default_rng(0).normal(size=(2000, WAVE.size))
    flux, variance, _ = line_fits.fit_lines(noise, np.ones_like(noise), WAVE)["NII"]
    assert flux.std() == pytest.approx(variance.mean() ** 0.5, rel=0.06)


def test_added_noise_has_the_stated_variance_and_is_shared_by_neighbours():
    flux = np.zeros((11, 12, 400), np.float32)
    ivar = np.full_like(flux, 4.0)
    ivar[..., :10] = 0
    noisy = benchmark_hard.add_noise(flux, ivar, 5, seed=0)
    assert not noisy[..., :10].any()
    maps = noisy[..., 10:]
    assert maps.var() == pytest.approx((25 - 1) / 4, rel=0.1)
    apart = [(maps[:, k:] * maps[:, : 12 - k]).mean() / maps.var() for k in (1, 2)]
    wanted = np.exp(-((np.array([1, 2]) / 1.92) ** 2) / 2)  # Westfall et al. 2019
    np.testing.assert_allclose(apart, wanted, atol=0.06)


def test_scores_count_label_and_truth_apart():
    survey = square_survey()
    survey.part = np.full(survey.galaxy.size, "test")
    scores = benchmark_hard.scores_of(survey, survey.label)
    assert (scores["accuracy6"], scores["accuracy8"], scores["mae_label"]) == (1, 1, 0)
    assert scores["mae_truth"] == pytest.approx(0.01)


def test_the_paired_bootstrap_of_a_row_with_itself_is_one():
    rng = np.random.default_rng(0)
    runs = [{"seed": s, "galaxies": rng.random((3, 20)).tolist()} for s in (0, 1)]
    assert benchmark_hard.compare(runs, runs) == {"label": [1, 1], "truth": [1, 1]}
    doubled = [{**r, "galaxies": (2 * np.array(r["galaxies"])).tolist()} for r in runs]
    np.testing.assert_allclose(benchmark_hard.compare(doubled, runs)["truth"], 2)


def test_rows_made_with_other_options_do_not_count(tmp_path):
    config = Config(work_dir=tmp_path, epochs=3)
    for name in ("ours", "majority", "ssftt_before"):
        path = benchmark_hard.row_path(config, 5000, 1, name, 0, 0)
        row = {"name": name, "wave_min": 5000.0, "depth": 1.0, "n_train": 9, "limit": 0, "seed": 0}
        row |= {"made_with": benchmark_hard.made_with(config, name), "galaxies": [[1.0] * 4] * 3}
        utils.write_json(path, row)

    def counting(**changed):
        return {row["name"] for row in benchmark_hard.table(replace(config, **changed))}

    assert counting() == {"ours", "majority", "ssftt_before"}
    assert counting(epochs=4) == {"majority", "ssftt_before"}
    assert counting(ssftt_epochs=4) == {"majority", "ours"}
    assert counting(n_galaxies=4) == set()


def test_noisy_cubes_record_their_noise_and_those_of_other_noise_are_made_again(own_data):
    (own_data / "truth").mkdir()
    shallow = benchmark_hard.make_shallow(own_data, 2)
    path = utils.processed_cubes(shallow)[0]
    deep = data_io.read_cube(utils.cube_path(own_data, path.stem))
    noisy = data_io.read_cube(path)
    assert noisy.recipe.inputs == {**deep.recipe.inputs, "noise": "factor 2, seed 0"}
    np.testing.assert_array_equal(noisy.ivar, deep.ivar / 4)
    data_io.write_cube(path, deep)  # as made before noise was recorded
    benchmark_hard.make_shallow(own_data, 2)
    np.testing.assert_array_equal(data_io.read_cube(path).flux, noisy.flux)


# Beyond the cut of line ratios


def test_values_are_right_within_a_tenth_of_a_dex_of_the_truth_of_star_forming_test_spaxels():
    survey = replace(square_survey(), part=np.full(288, "test"))
    survey.part[144:] = "train"
    survey.truth = np.full(288, 8.5)
    star_forming = np.arange(288) % 4 > 0
    few = np.where(np.arange(288) < 48, 8.55, np.nan)
    every = np.where(np.arange(288) < 96, 8.55, 8.7)
    rows = beyond_the_cut.compare(survey, {"few": few, "every": every}, star_forming)
    assert [row["spaxels"] for row in rows] == [108, 108]
    assert [row["given"] for row in rows] == pytest.approx([1 / 3, 1])
    assert [row["right"] for row in rows] == pytest.approx([1 / 3, 2 / 3])
    assert [row["reliability"] for row in rows] == pytest.approx([1, 2 / 3])
    assert [row["gain"] for row in rows] == pytest.approx([1, 2])
    assert rows[1]["gain_95"] == pytest.approx([2, 2])  # there is one galaxy
    assert rows[1]["mae"] == pytest.approx((2 * 0.05 + 0.2) / 3)


def test_the_limit_keeps_the_reliability_and_as_many_values_as_it_can():
    width = np.array([0.04, 0.01, 0.03, 0.02, 0.05])
    error = np.array([0, 0.02, 0.2, -0.03, -0.3])  # by width: right, right, not, right, not
    of = beyond_the_cut.limit_of_equal_reliability
    assert of(error, width, 1.0) == 0.02
    assert of(error, width, 0.75) == 0.04
    assert of(error, width, 0.6) == 0.05
    assert of(np.full(5, 0.2), width, 0.9) == 0


# Both benchmarks at a tiny size, on one survey


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Options of both; the second one finds the survey of the first."""
    folder = tmp_path_factory.mktemp("work")
    options = {"work_dir": folder, "results": folder / "results", "n_galaxies": 14}
    return {**options, "epochs": 1, "jobs": 1}


def rows_of(config):
    return json.loads((config.results / "table.json").read_text())["rows"]


@pytest.mark.slow
def test_a_small_survey_fills_the_table_and_a_second_run_only_reads(tiny, monkeypatch):
    config = Config(**tiny, ssftt_epochs=1)
    assert benchmark_hard.main(config) == 0
    rows = rows_of(config)
    assert {(r["name"], r["depth"]) for r in rows} == {
        (name, depth) for name in benchmark_hard.ROWS for depth in (1, 1 / 25)
    }
    assert all(0 <= r["accuracy8"] <= 1 and 0 <= r["mae_truth"] < 1 for r in rows)
    monkeypatch.setattr(benchmark_hard, "read_survey", None)
    assert benchmark_hard.main(config) == 0


@pytest.mark.slow
def test_maps_beyond_the_cut_give_a_table_and_pictures(tiny):
    config = beyond_the_cut.Config(**tiny)
    assert beyond_the_cut.main(config) == 0
    rows = rows_of(config)
    assert [row["depth"] for row in rows] == [1] * 4 + [1 / 25] * 4
    assert all(0 <= row["right"] <= row["given"] <= 1 for row in rows)
    of = {(row["depth"], row["name"]): row for row in rows}
    name = "O3N2, every line S/N > 3"
    assert of[1 / 25, name]["given"] < 0.7 * of[1, name]["given"]
    assert of[1, "network, everywhere"]["given"] == 1
    assert {path.name for path in config.results.glob("*.png")} == {"depth_1.png", "depth_25.png"}
