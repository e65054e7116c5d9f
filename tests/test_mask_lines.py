"""What is learned without some lines: the right bins are gaps, and what they tell is lost."""

import json
import sys
from pathlib import Path

import utils

import mock_cubes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import mask_lines

import data_io
import evidence


@pytest.mark.slow
def test_what_only_one_bin_tells_is_lost_without_it(root, tmp_path, monkeypatch):
    # in these cubes one bin follows the metallicity, so say that it is a line's
    wave, telling = mock_cubes.wave_grid(), mock_cubes.N_BAND // 3
    lines = {"NII-6585": wave[telling], "HeI-5877": wave[-9]}
    monkeypatch.setattr(evidence, "LINES", lines)
    monkeypatch.setattr(evidence, "WINDOW_AA", 1.0)
    config = mask_lines.Config(
        tmp_path, root, "hard", ("", "NII", "HeI"), epochs=1, results=tmp_path / "results"
    )
    assert mask_lines.main(config) == 0
    rows = json.loads((tmp_path / "results" / "table.json").read_text())["rows"]
    error = {row["without"]: row["mae_dex"] for row in rows}
    assert error["NII"] > 2 * max(error[""], error["HeI"])
    plateifu = mock_cubes.PLATEIFUS[0]
    whole, without = (
        data_io.read_cube(utils.cube_path(folder, plateifu))
        for folder in (root, tmp_path / "without-NII")
    )
    assert np.isnan(without.flux[..., telling]).all()
    assert not without.ivar[..., telling].any()
    others = np.arange(wave.size) != telling
    np.testing.assert_array_equal(without.flux[..., others], whole.flux[..., others])
    np.testing.assert_array_equal(without.ivar[..., others], whole.ivar[..., others])


def test_a_doublet_goes_by_the_beginning_of_its_name_and_an_unknown_line_is_refused():
    wave = np.linspace(5000, 8000, 2041)
    bins = mask_lines.bins_of(wave, "NII+OIII")
    found = evidence.bins_of_lines(wave)
    names = {"NII-6549", "NII-6585", "OIII-5008"}
    assert set(bins) == {at for name in names for at in found[name]}
    assert mask_lines.bins_of(wave, "").size == 0
    with pytest.raises(utils.DataError, match=r"begins with 'Hb', expected some of OIII-5008, "):
        mask_lines.bins_of(wave, "Hb")
