from __future__ import annotations

from utils import DataError

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from HSI_SSFTT import count_parameters
from matched_filter_net import (
    COLOURS,
    LINE_SIGMA,
    MatchedFilterConfig,
    MatchedFilterNet,
    Spectra,
    laplace_losses,
    log_amplitude,
    neighbours,
    prepare_spectra,
    ridge_by_galaxy,
)

BANDS = 300


def small_config(**sizes) -> MatchedFilterConfig:
    return MatchedFilterConfig(**{"bands": BANDS, "lines": 3, "half_width": 20, **sizes})


def random_spectra(*shape: int, seed: int = 0) -> Spectra:
    rng = torch.Generator().manual_seed(seed)
    residual = torch.randn(*shape, BANDS, generator=rng)
    weight = torch.rand(*shape, BANDS, generator=rng) * 5
    return Spectra(residual, weight, torch.randn(*shape, COLOURS, generator=rng))


def trained_like(config: MatchedFilterConfig, seed: int = 0) -> MatchedFilterNet:
    """A network in which every weight matters."""
    torch.manual_seed(seed)
    model = MatchedFilterNet(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def gaussian(centre: float, sigma: float = LINE_SIGMA) -> np.ndarray:
    return np.exp(-0.5 * ((np.arange(BANDS) - centre) / sigma) ** 2)


# Spectra


def line_on_continuum() -> tuple[np.ndarray, np.ndarray]:
    flux = 2 + 0.002 * np.arange(BANDS) + 3 * gaussian(140)
    return flux[None].astype(np.float32), np.full((1, BANDS), 4.0, np.float32)


def test_a_linear_continuum_is_removed_and_a_line_stays():
    flux, ivar = line_on_continuum()
    residual = prepare_spectra(flux, ivar).residual[0].numpy()
    scale = flux.mean()
    inner = slice(40, 260)  # towards the ends the continuum is held constant
    np.testing.assert_allclose(residual[inner], 3 * gaussian(140)[inner] / scale, atol=0.01)


def test_brightness_changes_nothing():
    flux, ivar = line_on_continuum()
    flux = flux + np.random.default_rng(0).normal(size=flux.shape).astype(np.float32) / 2
    for one, other in zip(
        prepare_spectra(flux, ivar), prepare_spectra(64 * flux, ivar / 64**2), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-3)


def test_the_weight_is_the_inverse_variance_of_the_residual():
    flux, ivar = line_on_continuum()
    spectra = prepare_spectra(flux, ivar)
    scale = float((flux.mean() ** 2 + (1 / ivar).sum() / BANDS**2) ** 0.5)
    np.testing.assert_allclose(spectra.weight, ivar * scale**2, rtol=2e-3)


def test_gaps_have_neither_residual_nor_weight():
    flux, ivar = line_on_continuum()
    flux[0, 100:170] = np.nan
    ivar[0, 10:20] = 0
    flux[0, 10:20] = 1e6
    spectra = prepare_spectra(flux, ivar)
    gap = np.r_[10:20, 100:170]
    assert not spectra.residual[0, gap].any()
    assert not spectra.weight[0, gap].any()
    assert all(part.isfinite().all() for part in spectra)
    assert spectra.residual.abs().max() < 0.05


def test_a_spectrum_without_a_good_bin_is_zero():
    spectra = prepare_spectra(np.full((1, BANDS), np.nan), np.zeros((1, BANDS)))
    assert not any(part.any() for part in spectra)


def test_maps_keep_their_shape():
    flux = np.ones((4, 5, BANDS), np.float32)
    assert [p.shape for p in prepare_spectra(flux, flux)] == [
        (4, 5, BANDS),
        (4, 5, BANDS),
        (4, 5, COLOURS),
    ]


def test_flux_and_ivar_of_different_shape_are_refused():
    with pytest.raises(DataError, match="same shape"):
        prepare_spectra(np.ones((2, BANDS)), np.ones((3, BANDS)))


# Amplitudes


def test_amplitudes_are_those_of_weighted_least_squares():
    model = MatchedFilterNet(small_config())
    spectra = random_spectra(7)
    n, d = (part.detach() for part in model.measure(*spectra)[:2])
    filters = (4 * torch.nn.functional.normalize(model.filters, dim=0)).detach().numpy()
    for spaxel in range(7):
        root = spectra.weight[spaxel].sqrt().numpy()
        for k in range(filters.shape[1]):
            wanted, *_ = np.linalg.lstsq(
                (root * filters[:, k])[:, None], root * spectra.residual[spaxel].numpy(), rcond=None
            )
            assert float(n[spaxel, k] / d[spaxel, k]) == pytest.approx(
                wanted[0], rel=1e-3, abs=1e-5
            )


def test_a_bright_line_gives_the_logarithm_of_its_amplitude():
    amplitude, error = torch.tensor([3.0, 0.2]), torch.tensor([1e-3, 1e-4])
    d = error**-2
    found = log_amplitude(amplitude * d, d)
    torch.testing.assert_close(found[:2], amplitude.log(), rtol=0, atol=1e-5)


def test_the_ratio_of_two_lines_is_a_difference_of_features():
    d = torch.full((2,), 1e8)
    faint, bright = (log_amplitude(scale * torch.tensor([2.0, 5.0]) * d, d)[:2] for scale in (1, 7))
    torch.testing.assert_close(faint[1] - faint[0], bright[1] - bright[0])


def test_no_signal_and_no_weight_stay_finite():
    n = torch.tensor([0.0, -50.0, 0.0], requires_grad=True)
    d = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)
    found = log_amplitude(n, d)
    found.sum().backward()
    assert found.isfinite().all()
    assert n.grad.isfinite().all()


# Neighbours


def test_neighbours_are_listed_row_by_row_and_beyond_the_edge_there_is_none():
    usable = torch.ones(2, 3, 4, dtype=torch.bool)
    usable[1, 0, 1] = False
    near = neighbours(usable, 3)
    assert near[5].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert near[12].tolist() == [-1, -1, -1, -1, 12, -1, -1, 16, 17]


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_map_and_the_windows_of_its_spaxels_give_the_same(window):
    model = trained_like(small_config(window=window)).double()
    spectra = Spectra(*(p.double() for p in random_spectra(9, 8)))
    spectra.weight[2, 3] = spectra.weight[8, 7] = 0
    whole = model.map(*spectra)
    half = window // 2
    for y in range(9):
        for x in range(8):
            if not spectra.weight[y, x].any():
                assert whole[y, x].isnan().all()
                continue
            rows = slice(max(0, y - half), y + half + 1), slice(max(0, x - half), x + half + 1)
            alone = model.map(*(part[rows] for part in spectra))
            torch.testing.assert_close(alone[min(y, half), min(x, half)], whole[y, x])


def test_neighbours_matter_and_distant_spaxels_do_not():
    model = trained_like(small_config(window=3))
    spectra = random_spectra(5, 9)
    before = model.map(*spectra)
    spectra.residual[2, 4] += 3
    changed = (model.map(*spectra) - before).abs().sum(-1) > 0
    wanted = torch.zeros(5, 9, dtype=torch.bool)
    wanted[1:4, 3:6] = True
    assert torch.equal(changed, wanted)


def test_spaxels_without_weight_do_not_matter():
    model = trained_like(small_config())
    spectra = random_spectra(6, 6)
    spectra.weight[1, 2] = 0
    before = model.map(*spectra)
    spectra.residual[1, 2], spectra.colour[1, 2] = 1e3, -1e3
    torch.testing.assert_close(model.map(*spectra), before, equal_nan=True, rtol=0, atol=0)


def test_equal_neighbours_add_up_as_independent_measurements():
    """Nine equal spaxels have the amplitude of one, and three times its signal-to-noise ratio."""
    config = small_config(window=3, reaches=(1e6,))
    model = MatchedFilterNet(config)
    torch.nn.init.zeros_(model.key.weight)
    one = random_spectra(1)
    nine = Spectra(*(p.expand(9, -1) for p in one))
    near, centre = torch.arange(9)[None], torch.tensor([4])
    sums = model.measure(*nine)
    pooled = model.features(sums, near, centre)[0, config.own_features : -config.squares]
    k = config.filters
    wanted = log_amplitude(9 * sums.n[0], 9 * sums.d[0])
    torch.testing.assert_close(pooled, wanted.clamp(-6, 6), rtol=1e-4, atol=1e-4)
    ratio = (pooled[k:].sinh() / torch.asinh(sums.n[0] / sums.d[0].sqrt()).sinh())[
        wanted[k:].abs() < 6
    ]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0), rtol=1e-3, atol=1e-3)


def test_squares_are_those_of_line_ratios_of_each_pair_and_head():
    model = MatchedFilterNet(small_config(window=1, reaches=(1.0, 2.0)))
    spectra = random_spectra(5)
    near, centre = torch.arange(5)[:, None], torch.arange(5)
    features = model.features(model.measure(*spectra), near, centre)
    own, squares = model.config.own_features, model.config.squares
    lines = features[:, own:-squares].view(5, 2, -1)[..., :3]
    wanted = [(lines[..., i] - lines[..., j]) ** 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    wanted = torch.stack(wanted, -1).flatten(1).clamp(max=6)
    torch.testing.assert_close(features[:, -squares:], wanted)


# Starting values


def planted_lines(n: int, centres: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    residual = rng.normal(size=(n, BANDS)) / 10
    for centre in centres:
        residual += rng.lognormal(size=(n, 1)) * gaussian(centre)
    return torch.from_numpy(residual).float(), torch.full((n, BANDS), 100.0)


def test_filters_start_at_the_lines_of_the_spectra_without_a_list():
    model = MatchedFilterNet(small_config())
    found = model.start_filters(*planted_lines(500, (60, 150, 230)))
    assert sorted(round(c / 10) for c in found) == [6, 15, 23]


def test_half_of_the_filters_do_not_see_a_linear_continuum_or_other_lines():
    model = MatchedFilterNet(small_config())
    residual, weight = planted_lines(5, (60,))
    model.start_filters(residual, weight, [[(60.0, 1.0)], [(72.0, 1.0)], [(200.0, 1.0)]])
    with_side_bands = (model.filters * model.support)[:, 3:].detach().numpy()
    bins = np.arange(BANDS)
    for nuisance, seen_by in ((np.ones(BANDS), 3), (bins, 3), (gaussian(72), 1)):
        np.testing.assert_allclose(nuisance @ with_side_bands[:, :seen_by], 0, atol=2e-3)
    assert gaussian(60) @ with_side_bands[:, 0] > 1


def test_a_filter_sees_only_its_part_of_the_spectrum():
    model = trained_like(small_config())
    model.start_filters(
        *planted_lines(50, (60, 150, 230)), [[(60.0, 1.0)], [(150.0, 1.0)], [(230.0, 1.0)]]
    )
    spectra = random_spectra(1)
    before = model.measure(*spectra).n
    spectra.residual[:, 81:] = 0
    unchanged = (model.measure(*spectra).n == before)[0]
    assert unchanged.tolist() == [True, False, False] * 2


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(a) for a in arrays]


def test_a_ridge_with_a_strength_for_each_group_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    x, galaxy = rng.normal(size=(200, 6)), np.repeat(np.arange(20), 10)
    y, group = x @ rng.normal(size=6) + 3 + rng.normal(size=200), np.array([0, 0, 1, 1, 1, 0])
    found = ridge_by_galaxy(*tensors(x, y, galaxy, group), strengths=((0.01,), (0.5,)))
    scale = np.array([0.01, 0.5])[group] ** -0.5
    other = Ridge(alpha=200).fit(x * scale, y)
    np.testing.assert_allclose(found, [other.intercept_, *other.coef_ * scale], rtol=1e-6)


def test_features_that_only_tell_galaxies_apart_hardly_count():
    rng = np.random.default_rng(0)
    galaxy = np.repeat(np.arange(60), 10)
    names = rng.normal(size=(60, 40))[galaxy] + 0.01 * rng.normal(size=(600, 40))
    y, group = rng.normal(size=60)[galaxy], np.full(40, 2)
    by_galaxy = ridge_by_galaxy(*tensors(names, y, galaxy, group))
    by_spaxel = ridge_by_galaxy(*tensors(names, y, np.arange(600), group))
    assert by_galaxy[1:].norm() < 0.3 * by_spaxel[1:].norm()


def test_ridges_of_equal_error_count_alike_and_bad_ones_not():
    rng = np.random.default_rng(0)
    x, galaxy = rng.normal(size=(400, 3)), np.arange(400) % 20
    y, group = x @ np.ones(3) + 0.1 * rng.normal(size=400), np.zeros(3, int)
    known = tensors(x, y, galaxy, group)
    good, other, bad = (ridge_by_galaxy(*known, strengths=[[s]]) for s in (1e-9, 1e-8, 1e3))
    found = ridge_by_galaxy(*known, strengths=[[1e-9, 1e-8, 1e3]])
    torch.testing.assert_close(found, (good + other) / 2)
    assert (found - bad).abs().max() > 0.5


def test_the_network_starts_as_a_ridge_regression_of_its_features():
    torch.manual_seed(0)
    model = MatchedFilterNet(small_config())
    residual, weight = planted_lines(400, (60, 150, 230))
    model.start_filters(residual, weight)
    spectra = Spectra(residual, weight, torch.zeros(400, COLOURS))
    near, centre = neighbours(torch.ones(4, 10, 10, dtype=torch.bool), 7), torch.arange(400)
    lines = [residual[:, c].clamp(min=0.01).log() for c in (60, 150)]
    target = 8.5 + 0.1 * (lines[0] - lines[1])
    model.start_head([(spectra, near, centre)], target, torch.arange(400) // 100)
    features = model.features(model.measure(*spectra), near, centre)
    value, scale = model.in_units(model.answer(features).detach())
    assert (value - target).abs().mean() < 0.25 * (target - target.median()).abs().mean()
    assert float(scale.mean()) == pytest.approx(float((value - target).abs().mean()), rel=0.05)


def test_the_scale_starts_wider_for_faint_spaxels_than_for_bright_ones():
    torch.manual_seed(0)
    model = MatchedFilterNet(small_config(window=1))
    residual, weight = planted_lines(400, (60, 150, 230))
    weight[200:] /= 25
    model.start_filters(residual, weight)
    spectra = Spectra(residual, weight, torch.zeros(400, COLOURS))
    near, centre = torch.arange(400)[:, None], torch.arange(400)
    error = torch.randn(400) * torch.tensor([0.02, 0.1]).repeat_interleave(200)
    model.start_head([(spectra, near, centre)], 8.5 + error, torch.arange(400) % 20)
    out = model.answer(model.features(model.measure(*spectra), near, centre))
    scale = model.in_units(out)[1].detach()
    assert (scale[200:].mean() / scale[:200].mean()).item() == pytest.approx(5, rel=0.2)


# Loss and sizes


def test_the_loss_is_least_at_the_median_and_the_mean_absolute_deviation():
    target = torch.tensor([0.0, 1.0, 2.0, 5.0, 40.0])
    out = torch.zeros(1, 2, requires_grad=True)
    optimiser = torch.optim.Adam([out], 0.05)
    for _ in range(2000):
        optimiser.zero_grad()
        laplace_losses(out.expand(5, 2), target).mean().backward()
        optimiser.step()
    assert out[0, 0].item() == pytest.approx(2, abs=0.1)
    assert out[0, 1].exp().item() == pytest.approx((target - 2).abs().mean().item(), rel=0.05)


def test_the_default_network_has_fewer_than_300000_parameters():
    assert count_parameters(MatchedFilterNet(MatchedFilterConfig())) < 300_000


@pytest.mark.parametrize("sizes", [{"window": 4}, {"lines": 1}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(DataError, match="Choose another"):
        small_config(**sizes)
