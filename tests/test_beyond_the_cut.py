"""Maps beyond the cut of line ratios: what counts as right, and a run at a tiny size."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import beyond_the_cut
from test_benchmark_hard import square_survey


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
    error = np.array(
        [0.0, 0.02, 0.2, -0.03, -0.3]
    )  # of widths 0.01 to 0.05: right, right, not, ...
    of = beyond_the_cut.limit_of_equal_reliability
    assert of(error, width, 1.0) == 0.02
    assert of(error, width, 0.75) == 0.04
    assert of(error, width, 0.6) == 0.05
    assert of(np.full(5, 0.2), width, 0.9) == 0


@pytest.mark.slow
def test_a_small_survey_gives_a_table_and_pictures(tmp_path):
    config = beyond_the_cut.Config(
        work_dir=tmp_path, n_galaxies=14, epochs=1, results=tmp_path / "results",
        jobs=1,
    )  # fmt: skip
    assert beyond_the_cut.main(config) == 0
    rows = json.loads((config.results / "table.json").read_text())["rows"]
    assert [row["depth"] for row in rows] == [1] * 4 + [1 / 25] * 4
    assert all(0 <= row["right"] <= row["given"] <= 1 for row in rows)
    of = {(row["depth"], row["name"]): row for row in rows}
    name = "O3N2, every line S/N > 3"
    assert of[1 / 25, name]["given"] < 0.7 * of[1, name]["given"]
    assert of[1, "network, everywhere"]["given"] == 1
    assert {path.name for path in config.results.glob("*.png")} == {"depth_1.png", "depth_25.png"}
