"""Evidence: exact against gradients of the whole network, complete, and where a line is."""

from dataclasses import replace

import utils

import mock_cubes
import numpy as np
import pytest
import torch
from astropy.io import fits
from test_matched_filter_net import random_spectra, small_config, trained_like

import evidence
import inference
from matched_filter_net import Spectra

TEST_GALAXY = mock_cubes.PLATEIFUS[-1]


def field(classes: int = 0):
    """A network in which every weight matters, and a map with a spaxel missing."""
    model = trained_like(small_config(classes=classes, window=3))
    model.target_mean.fill_(8.5)
    spectra = random_spectra(5, 4)
    spectra.weight[2, 1] = 0
    return model, spectra


def output(model, spectra: Spectra, y: int, x: int, chosen: int) -> torch.Tensor:
    out = model.map(*spectra)[y, x, :-1]
    return out.log_softmax(0)[chosen] if model.config.classes else model.in_units(out)[0]


@pytest.mark.parametrize("classes", [0, 3])
def test_shares_are_the_integrated_gradients_of_the_whole_network(classes, monkeypatch):
    # by many small steps, between which slopes hardly change
    steps, bend = 200, evidence.PATH_BEND
    monkeypatch.setattr(evidence, "STEPS", steps)
    model, (residual, weight, colour) = field(classes)
    found = evidence.explain(model, Spectra(residual, weight, colour))
    u = (np.arange(steps) + 0.5) / steps
    usable = (weight > 0).any(-1)
    for y, x in ((0, 0), (4, 2)):
        chosen = int(model.map(residual, weight, colour)[y, x, :-1].argmax())
        wanted = torch.zeros_like(residual)
        for t, share in zip(
            np.sinh(bend * u) / np.sinh(bend),
            bend * np.cosh(bend * u) / np.sinh(bend) / steps,
            strict=True,
        ):
            at = (t * residual).requires_grad_()
            out = output(model, Spectra(at, weight, colour), y, x, chosen)
            wanted += share * torch.autograd.grad(out, at)[0] * residual
        row = int(usable.flatten()[: y * 4 + x].sum())
        per_bin = wanted.sum((0, 1)).numpy()
        np.testing.assert_allclose(found.shares[row], per_bin, atol=1e-4 * np.abs(per_bin).max())
        free = output(model, Spectra(0 * residual, weight, colour), y, x, chosen)
        assert found.line_free[row] == pytest.approx(free.item(), rel=1e-5)


def test_a_step_over_the_limit_of_a_feature_counts_the_part_before_it(monkeypatch):
    # one step: half of the way, slopes in its middle are those of features at their limit
    monkeypatch.setattr(evidence, "STEPS", 1)
    model = trained_like(small_config(window=1))
    model.norm.std.fill_(0.2)
    model.linear.weight.data[:, model.config.own_features :] = 0
    model.correction[-1].weight.data.zero_()
    found = evidence.explain(model, random_spectra(4, 4))
    difference = found.answer - found.line_free
    np.testing.assert_allclose(
        found.shares.sum(1), difference, atol=1e-4 * np.abs(difference).max()
    )


@pytest.mark.parametrize("classes", [0, 3])
def test_shares_add_up_to_the_difference_of_the_answers(classes, monkeypatch):
    model, spectra = field(classes)
    difference = []
    for steps in (evidence.STEPS, 400):
        monkeypatch.setattr(evidence, "STEPS", steps)
        found = evidence.explain(model, spectra)
        left = found.shares.sum(1) - (found.answer - found.line_free)
        difference.append(np.abs(left).max() / np.abs(found.shares).sum(1).max())
    assert difference[0] < 0.05
    assert difference[1] < 0.005


def test_it_does_not_matter_how_many_spaxels_are_followed_at_once(monkeypatch):
    model, spectra = field()
    together = evidence.explain(model, spectra)
    monkeypatch.setattr(evidence, "SPAXELS_AT_ONCE", 3)
    for one, other in zip(evidence.explain(model, spectra), together, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_bins_of_lines_are_near_them_and_shared_by_none():
    wave = np.linspace(5000, 8000, 2040)
    bins = evidence.bins_of_lines(wave)
    assert set(bins) == {name for name, w in evidence.LINES.items() if w > 5000}
    for name, at in bins.items():
        assert np.abs(wave[at] - evidence.LINES[name]).max() < evidence.WINDOW_AA
    every = np.concatenate(list(bins.values()))
    assert len(every) == len(set(every))
    assert len(bins["Ha-6564"]) > 8


def test_lines_that_decide_a_label_include_their_doublets():
    o3n2 = {"Hb-4862", "OIII-5008", "OIII-4960", "NII-6585", "NII-6549", "Ha-6564"}
    of = evidence.defining_lines
    assert of("logOH", "O3N2-M13") == o3n2
    assert of("logOH", "N2-M13") == o3n2 - {
        "Hb-4862", "OIII-5008", "OIII-4960",
    }  # fmt: skip
    assert of("BPT") == o3n2
    assert {"OII-3727", "OII-3729"} < of("logOH", "N2O2-KD02")
    assert of("logOH") == set()  # labels that do not say how they were made


def test_the_command_names_the_bins_that_decide(root, filters_run, capsys, monkeypatch):
    # in these cubes one bin near no line follows the metallicity, so say that it is a line's
    wave = mock_cubes.wave_grid()
    telling = mock_cubes.N_BAND // 3
    monkeypatch.setattr(evidence, "LINES", {"NII-6585": wave[telling], "HeI-5877": wave[-9]})
    monkeypatch.setattr(evidence, "WINDOW_AA", 1.0)
    config = evidence.Config(filters_run, (TEST_GALAXY,), root, per_spaxel=True, device="cpu")
    assert evidence.main(config) == 0
    said = capsys.readouterr().out
    with fits.open(filters_run / "evidence" / f"{TEST_GALAXY}.fits", checksum=True) as hdus:
        table, header, shares = hdus["BINS"].data, hdus[0].header, hdus["SHARES"].data
        assert hdus["SHARES"].header["BUNIT"] == "dex"
    assert table["WEIGHT"].argmax() == telling
    np.testing.assert_allclose(table["WAVELENGTH"], wave)
    np.testing.assert_allclose(np.nanmean(shares, (1, 2)), table["SHARE"], atol=1e-6)
    assert np.isfinite(shares).all(0).sum() == header["SPAXELS"]
    assert header["DECISIVE"] == pytest.approx(table["WEIGHT"][telling] / table["WEIGHT"].sum())
    assert header["MOVED"] > 5 * header["MOVEDOTH"]
    assert 0 < header["INCOMPL"] < evidence.LARGEST_MISS
    assert "NII-6585 *" in said
    assert "; out of range: Ha-6564, Hb-4862, NII-6549, OIII-4960, OIII-5008\n" in said
    assert f"the answers move by {header['MOVED']:.4f} (dex), without" in said
    assert f"{header['INCOMPL']:.1%} of the shares' absolute sum" in said
    assert f"{header['DECISIVE']:.1%} of the weight, in 1 bin;" in said
    assert (filters_run / "figures" / f"{TEST_GALAXY}_evidence.png").stat().st_size > 10_000


def test_too_few_steps_are_reported(root, filters_run, monkeypatch, caplog):
    monkeypatch.setattr(evidence, "STEPS", 1)
    assert evidence.main(evidence.Config(filters_run, (TEST_GALAXY,), root, device="cpu")) == 0
    assert f"{TEST_GALAXY}: the sums of shares miss the differences" in caplog.text


def test_probabilities_have_no_unit_and_the_table_of_lines_has_aligned_columns(
    root, filters_run, tmp_path
):
    trained = inference.load_model(filters_run, "cpu")
    cube, found, report = evidence.explain_galaxy(trained, utils.cube_path(root, TEST_GALAXY))
    miss = np.abs(found.shares.sum(1) - (found.answer - found.line_free))
    assert report.incomplete == pytest.approx(miss.mean() / np.abs(found.shares).sum(1).mean())
    report = replace(report, unit="log probability", moved_unit="probability")
    head, *rows = str(report).splitlines()[: 1 + len(report.weight)]
    assert "weight  mean share (log probability)" in " ".join(head.split(" " * 3))
    assert {len(row) for row in rows} == {len(head)}
    wave, path = mock_cubes.wave_grid(), tmp_path / "evidence.fits"
    evidence.write_evidence(path, cube, wave, found, report, {}, per_spaxel=True)
    with fits.open(path) as hdus:
        assert hdus[0].header["MAXMISS"] == pytest.approx(miss.max())
        assert hdus["BINS"].columns.units == ["Angstrom", "", ""]
        assert hdus["SHARES"].header["BUNIT"] == ""


def test_the_figure_names_the_lines_that_decide_and_those_out_of_range(root, filters_run):
    trained = inference.load_model(filters_run, "cpu")
    _, found, report = evidence.explain_galaxy(trained, utils.cube_path(root, TEST_GALAXY))
    weight = {"NII-6585": 0.75, "Ha-6564": 0.1}
    report = replace(report, weight=weight, defining=["NII-6585"], out_of_range=["Hb-4862"])
    wave = np.linspace(6400, 6700, found.shares.shape[1])
    figure = evidence.evidence_figure(wave, found, 0 * wave, report, "1-1")
    first, second = figure.axes[0].get_title().splitlines()
    assert first == "1-1: 75% of the weight in lines that decide the label ([NII] 6585)"
    assert second == r"deciding too, but out of the cubes' range: H$\beta$ 4862"
    words = [t.get_text() for t in figure.legends[0].get_texts()]
    assert words == ["share of a bin in the answers", "mean spectrum"]


def test_another_network_and_a_missing_cube_are_refused_in_one_line(
    root, filters_run, trained_run, caplog
):
    for galaxies in ((TEST_GALAXY,), ("8000-998", "8000-999")):  # before any galaxy
        config = evidence.Config(trained_run, galaxies, root, device="cpu")
        with pytest.raises(utils.DataError, match=f"^{trained_run}: a run of ssftt, expected "):
            evidence.main(config)
    assert evidence.main(evidence.Config(filters_run, ("8000-999",), root, device="cpu")) == 1
    assert "8000-999" in caplog.text
