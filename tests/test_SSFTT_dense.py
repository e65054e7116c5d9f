import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_network import batch_norms, like_trained
from torch import Tensor

import hsi_proc_fns
import SSFTT_dense
from HSI_SSFTT import SSFTT, get_SSFTT_model
from SSFTT_dense import cutout_logits, dense_logits, renormalise, window_tokens

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def patches_of(cutouts: Tensor, size: int) -> Tensor:
    """Every patch inside (B, 1, band, y, x): (B * spaxels, 1, band, P, P), spaxel by spaxel."""
    windows = cutouts[:, 0].unfold(2, size, 1).unfold(3, size, 1)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)[:, None]


@torch.inference_mode()
def both_modes(model: SSFTT, cutout: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Logits (spaxel, classes) of a (1, 1, band, y, x) cutout, patch-wise and dense."""
    cube = cutout[0, 0].permute(1, 2, 0).cpu().numpy()
    ys, xs = np.indices(cube.shape[:2]).reshape(2, -1)
    patches = hsi_proc_fns.extract_patches(cube, ys, xs, model.config.patch_size)
    patch_wise = model(torch.from_numpy(patches).permute(0, 3, 1, 2)[:, None].to(cutout))
    return patch_wise, dense_logits(model, cutout, **options)[0].flatten(1).T


def off(one: Tensor, other: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return float((one - other).abs().max() / one.abs().max())


@settings(max_examples=40, deadline=None)
@given(
    patch_size=st.integers(1, 14),
    ny=st.integers(1, 12),
    nx=st.integers(1, 12),
    bands=st.integers(3, 12),
    n_classes=st.integers(2, 8),
    n_tokens=st.integers(1, 5),
    seed=st.integers(0, 99),
    block_bytes=st.sampled_from([1, 20_000, 1 << 27]),
    front=st.sampled_from([{}, {"projection": 3}, {"spectral_kernel": 2, "spectral_stride": 2}]),
)
def test_dense_logits_are_the_patch_wise_ones(
    patch_size, ny, nx, bands, n_classes, n_tokens, seed, block_bytes, front
):
    torch.manual_seed(seed)
    model = like_trained(get_SSFTT_model(n_classes, patch_size, bands, n_tokens, **front), seed)
    patch_wise, dense = both_modes(model, torch.randn(1, 1, bands, ny, nx), block_bytes=block_bytes)
    assert off(patch_wise, dense) <= 1e-4
    margin = patch_wise.topk(2, dim=-1).values.diff(dim=-1).abs().squeeze(-1)
    clear = margin > 1e-4 * patch_wise.abs().max()  # a tie within rounding may fall either way
    assert torch.equal(patch_wise.argmax(-1)[clear], dense.argmax(-1)[clear])


def test_modes_agree_where_logits_differ_by_hundreds():
    torch.manual_seed(0)
    model, cube = like_trained(get_SSFTT_model(3, 7, 8)), torch.randn(1, 1, 8, 14, 15)
    model.token_logits.data.mul_(500)
    with torch.inference_mode():
        features = model.features(F.pad(cube, (3, 3, 3, 3)))
        logits = torch.einsum("bdyx,td->btyx", features, model.token_logits)
        assert (logits.amax((2, 3)) - logits.amin((2, 3))).min() > 100
    assert off(*both_modes(model, cube)) <= 1e-4


def test_modes_agree_on_every_device(device):
    torch.manual_seed(0)
    model = like_trained(get_SSFTT_model(4, 7, 16)).to(device)
    patch_wise, dense = both_modes(model, torch.randn(1, 1, 16, 9, 10).to(device))
    assert off(patch_wise, dense) <= (1e-4 if device == "cpu" else 5e-3)  # GPUs convolve in TF32


def test_gradients_of_both_modes_agree():
    torch.manual_seed(0)
    model = like_trained(get_SSFTT_model(3, 7, 8, dropout=0.0)).double()
    cube, upstream = torch.randn(1, 1, 8, 6, 5).double(), torch.randn(30, 3).double()
    patches = patches_of(F.pad(cube, (3, 3, 3, 3)), 7)
    gradients = []
    for logits in (model(patches), dense_logits(model, cube)[0].flatten(1).T):
        gradients.append(torch.autograd.grad((logits * upstream).sum(), [*model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


@HALF
@pytest.mark.parametrize("spread", [1, 200])
def test_half_precision_stays_near_and_keeps_most_decisions(dtype, spread):
    """With a spread of 200 the tokenizer's logits lie hundreds apart on the map."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = like_trained(get_SSFTT_model(4, 7, 16), seed)
        model.token_logits.data.mul_(spread)
        cube = torch.randn(1, 1, 16, 11, 12)
        exact, _ = both_modes(model, cube)
        with torch.inference_mode(), torch.autocast("cpu", dtype):
            half = dense_logits(model, cube)[0].flatten(1).T.float()
        assert half.isfinite().all()
        each = (half - exact).abs().amax(-1) / exact.abs().max()
        # wide apart, a rounded logit may let another position win a window: few spaxels, not many
        tolerance = 0.1 if dtype is torch.bfloat16 else 0.01
        assert each.quantile(0.9 if spread > 1 else 1.0) < tolerance
        assert (half.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def test_training_mode_sees_the_whole_cutout_at_once():
    """Batch statistics over blocks of rows would differ from those of the cutout."""
    model = get_SSFTT_model(3, 5, 8, dropout=0.0).train()
    cutout = torch.randn(1, 1, 8, 9, 9)
    whole = dense_logits(model, cutout)
    torch.testing.assert_close(whole, dense_logits(model, cutout, block_bytes=1))
    assert model.spatial[1].num_batches_tracked == 2


@pytest.mark.slow
def test_compiled_cutouts_train_as_uncompiled_ones():
    """Traced as torch.compile does, but run by its backend without a C++ compiler."""
    torch.manual_seed(0)
    model = get_SSFTT_model(3, 5, 11, dropout=0.0).double().train()
    cutouts, weights = torch.randn(2, 1, 11, 7, 8).double(), torch.rand(2, 3, 4).double()
    found = []
    for compiled in (False, True):
        twin, logits_of = copy.deepcopy(model), cutout_logits
        if compiled:
            options = {"dynamic": False, "fullgraph": True, "backend": "aot_eager"}
            logits_of = torch.compile(logits_of, **options)
        logits = logits_of(twin, cutouts, weights)
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in twin.parameters()), *twin.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def direct_windows(logits: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Softmax average over each window, one at a time, in float64."""
    b, t, ny, nx = logits.shape
    out = np.empty((b, t, values.shape[1], ny - size + 1, nx - size + 1))
    for y, x in np.ndindex(out.shape[-2:]):
        a = logits[..., y : y + size, x : x + size].reshape(b, t, -1).astype(float)
        v = values[..., y : y + size, x : x + size].reshape(b, values.shape[1], -1).astype(float)
        e = np.exp(a - a.max(-1, keepdims=True))
        out[..., y, x] = (e / e.sum(-1, keepdims=True)) @ v.transpose(0, 2, 1)
    return out


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 9),
    extra=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_window_tokens_equal_a_softmax_over_each_window(size, extra, spread, seed):
    rng = np.random.default_rng(seed)
    ny, nx = size + extra[0], size + extra[1]
    logits = (spread * rng.normal(size=(2, 3, ny, nx))).astype(np.float32)
    values = rng.normal(size=(2, 4, ny, nx)).astype(np.float32)
    found = window_tokens(torch.from_numpy(logits), torch.from_numpy(values), size)
    expected = direct_windows(logits, values, size)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 4e-3)]
)
def test_tokens_are_right_where_a_map_wide_maximum_underflows(dtype, tolerance):
    """Left half at 100, right half at 0: exp(-100) is 0 in half and single precision."""
    torch.manual_seed(3)
    logits, values = torch.randn(1, 2, 12, 24), torch.randn(1, 3, 12, 24).to(dtype)
    logits[..., :12] += 100
    logits = logits.to(dtype)
    found = window_tokens(logits, values, 5)
    assert found.isfinite().all()
    expected = direct_windows(logits.double().numpy(), values.double().numpy(), 5)
    np.testing.assert_allclose(found.double().numpy(), expected, atol=tolerance)


@pytest.mark.parametrize(
    ("patch_size", "kernel", "projection"), [(7, 3, None), (3, 4, 9), (5, 2, 5)]
)
def test_features_by_pairs_of_bands_are_the_features(patch_size, kernel, projection):
    torch.manual_seed(0)
    sizes = {"spectral_kernel": kernel, "projection": projection}
    model = like_trained(get_SSFTT_model(3, patch_size, 9 + kernel, **sizes))
    x = torch.randn(2, 1, 9 + kernel, 9, 11)
    with torch.inference_mode():
        paired = SSFTT_dense.features_by_pairs(model)(x, None)
        torch.testing.assert_close(paired, model.features(x))
        torch.testing.assert_close(SSFTT_dense.features(model, x), model.features(x))


@pytest.mark.parametrize("weighted", [False, True])
def test_features_by_pairs_train_as_the_features_do(weighted):
    x, upstream = torch.randn(2, 1, 12, 9, 11).double(), torch.randn(2, 64, 5, 7).double()
    weights = torch.rand(2, 3, 5).double() if weighted else None
    found = []
    for by_pairs in (False, True):
        torch.manual_seed(0)
        model = get_SSFTT_model(3, 7, 12).double().train()
        features_of = partial(SSFTT_dense.features, model)
        if by_pairs:
            features_of = SSFTT_dense.features_by_pairs(model)
        (features_of(x, weights) * upstream).sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(found[-1]) == 8
        found[-1] += model.buffers()
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("patch_size", "side"), [(7, 5), (5, 4), (4, 3), (6, 1)])
def test_weighted_cutouts_train_as_their_patches_each_repeated(patch_size, side):
    """Momentum 1 makes the averages the batch's: then loss, gradients, statistics are the same."""
    torch.manual_seed(0)
    model = get_SSFTT_model(3, patch_size, 12, dropout=0.0).double().train()
    for norm in batch_norms(model):
        norm.momentum = 1.0
    twin, size = copy.deepcopy(model), side + patch_size - 1
    cutouts = torch.randn(2, 1, 12, size, size, dtype=torch.double)
    classes = torch.randint(3, (2, side, side))
    times = torch.randint(0, 4, (2, side, side)) + 1 * (side == 1)

    logits = cutout_logits(model, cutouts, times / 7)
    loss = (F.cross_entropy(logits, classes, reduction="none") * times).sum() / times.sum()
    loss.backward()
    repeated = patches_of(cutouts, patch_size).repeat_interleave(times.flatten(), 0)
    expected = F.cross_entropy(twin(repeated), classes.flatten().repeat_interleave(times.flatten()))
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        # a window of one position leaves the tokenizer no choice: no gradient at all
        gradient = torch.zeros_like(one) if one.grad is None else one.grad
        torch.testing.assert_close(gradient, other.grad, rtol=1e-6, atol=1e-9)
    n = repeated[:, 0, 0].numel()  # Bessel's correction of the variance is of the order of 1 / n
    for one, other in zip(batch_norms(model), batch_norms(twin), strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean)
        torch.testing.assert_close(one.running_var, other.running_var, rtol=30 / n, atol=0)


def test_renormalisation_is_that_of_its_paper(device):
    """Ioffe 2017, algorithm 1, by autograd with r and d as constants."""
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.double).to(device)

    norm = torch.nn.BatchNorm2d(5).double().to(device)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    for _ in range(30):  # past the first, plain averages
        renormalise(normal(2, 5, 6, 7) * 2 + 1, norm, normal(2, 6, 7).abs())
    x = (normal(2, 5, 6, 7) * 3).requires_grad_()
    weights, upstream = normal(2, 6, 7).abs(), normal(2, 5, 6, 7)
    before = norm.running_mean.clone(), norm.running_var.clone()
    y = renormalise(x, norm, weights)
    found = torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream)

    share = (weights / weights.sum())[:, None]
    mean = (x * share).sum((0, 2, 3))
    variance = ((x - mean.view(5, 1, 1)) ** 2 * share).sum((0, 2, 3))
    running = 0.9 * before[0] + 0.1 * mean.detach(), 0.9 * before[1] + 0.1 * variance.detach()
    sigma, running_sigma = (variance + norm.eps).sqrt(), (running[1] + norm.eps).sqrt()
    r, d = (sigma / running_sigma).detach(), ((mean - running[0]) / running_sigma).detach()
    mean, sigma, r, d, weight, bias = (
        a.view(5, 1, 1) for a in (mean, sigma, r, d, norm.weight, norm.bias)
    )
    expected = ((x - mean) / sigma * r + d) * weight + bias
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected, (x, norm.weight, norm.bias), upstream)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close((norm.running_mean, norm.running_var), running)


@HALF
def test_renormalisation_in_half_precision_bears_offsets_and_outliers(device, dtype):
    """Neither a mean of 30 sigma spoils the gradient nor 300**2, past fp16, the average."""
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 5, 8, 8) + 30).to(dtype)
    x[0, 0, 0, 0, 0] = 300
    weights, upstream = torch.rand(4, 5, 5), torch.randn(x.shape).to(dtype)
    norms, gradients = [], []
    for kind in (torch.double, dtype):
        norm = torch.nn.BatchNorm3d(3).to(device)
        norm = norm.double() if kind is torch.double else norm
        given = x.to(device, kind).requires_grad_()
        y = renormalise(given, norm, weights.to(device))
        gradients.append(torch.autograd.grad(y, given, upstream.to(device, kind))[0].double())
        norms.append(norm.double())
    exact, found = gradients
    tolerance = 0.005 if dtype is torch.bfloat16 else 0.002
    assert (found - exact).norm() < tolerance * exact.norm()
    for name in ("running_mean", "running_var"):
        one, other = (getattr(norm, name) for norm in norms)
        torch.testing.assert_close(one, other, rtol=0.02, atol=0)


def test_cutouts_train_on_what_evaluation_will_normalise_by():
    """The averages that a training step normalises by are those it leaves behind."""
    torch.manual_seed(0)
    model = get_SSFTT_model(3, 5, 8, dropout=0.0)
    for step in range(3):
        cutouts = torch.randn(2, 1, 8, 9, 9) + step
        trained = cutout_logits(model.train(), cutouts, torch.ones(2, 5, 5))
        for norm in batch_norms(model):
            assert norm.running_var.mean() != 1  # the initial 0 and 1 are forgotten at once
        with torch.no_grad():
            evaluated = cutout_logits(model.eval(), cutouts)
        torch.testing.assert_close(trained, evaluated, rtol=1e-4, atol=1e-5)
