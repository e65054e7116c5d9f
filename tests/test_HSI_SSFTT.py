from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import hsi_proc_fns
from HSI_SSFTT import SSFTT, batch_norm, count_parameters, get_SSFTT_model, window_tokens
from utils import DataError


def like_trained(model: SSFTT, seed: int = 0) -> SSFTT:
    """Batch norms as training leaves them, and logits that are not all alike."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=g))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=g) + 0.3)
    model.class_token.data.copy_(torch.randn(model.class_token.shape, generator=g))
    model.head.weight.data.mul_(5)
    return model.eval()


def both_faces(model: SSFTT, cube: np.ndarray, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (y, x, classes) patch by patch, and densely."""
    ny, nx, _ = cube.shape
    ys, xs = np.indices((ny, nx)).reshape(2, -1)
    patches = hsi_proc_fns.extract_patches(cube, ys, xs, model.patch_size)
    with torch.inference_mode():
        one = model(torch.from_numpy(patches).permute(0, 3, 1, 2)[:, None])
        cutout = torch.from_numpy(cube).permute(2, 0, 1)[None, None]
        dense = model.forward_dense(cutout, **options)[0].permute(1, 2, 0)
    return one.view(ny, nx, -1), dense


def full_reference(model: SSFTT, patch: np.ndarray) -> np.ndarray:
    """The network written out in numpy, every token through the whole block, in float64."""
    w = {k: v.double().numpy() for k, v in model.state_dict().items()}

    def windows(a, shape):
        axes = tuple(range(a.ndim - len(shape), a.ndim))
        return np.lib.stride_tricks.sliding_window_view(a, shape, axis=axes)

    def batch_norm(a, name):
        shape = (-1,) + (1,) * (a.ndim - 1)
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        scale = w[f"{name}.weight"] / np.sqrt(var + 1e-5)
        return np.maximum(
            (a - mean.reshape(shape)) * scale.reshape(shape) + w[f"{name}.bias"].reshape(shape), 0
        )

    def linear(a, name):
        return a @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(a, name):
        centred = a - a.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def softmax(a, axis):
        e = np.exp(a - a.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    k3, k2 = w["spectral.0.weight"][:, 0], w["spatial.0.weight"]
    x = np.einsum("bijklm,cklm->cbij", windows(patch, k3.shape[1:]), k3)
    x = batch_norm(x + w["spectral.0.bias"][:, None, None, None], "spectral.1")
    x = x.reshape(-1, *x.shape[2:])  # channel slow, band fast
    x = np.einsum("cijkl,dckl->dij", windows(x, k2.shape[2:]), k2)
    x = batch_norm(x + w["spatial.0.bias"][:, None, None], "spatial.1")
    x = x.reshape(x.shape[0], -1).T  # (positions, dim)
    attention = softmax(x @ w["token_logits"].T, 0)
    tokens = attention.T @ (x @ w["token_values"])
    tokens = np.concatenate([w["class_token"][0], tokens]) + w["positions"][0]

    normed, dim, heads = layer_norm(tokens, "block.norm_attention"), tokens.shape[1], 8
    q = linear(normed, "block.to_q").reshape(-1, heads, dim // heads)
    k, v = np.split(linear(normed, "block.to_kv"), 2, axis=1)
    k, v = (a.reshape(-1, heads, dim // heads) for a in (k, v))
    scores = softmax(np.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim), -1)
    seen = np.einsum("hij,jhd->ihd", scores, v).reshape(-1, dim)
    tokens = tokens + linear(seen, "block.project")
    hidden = linear(layer_norm(tokens, "block.norm_mlp"), "block.mlp.0")
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    tokens = tokens + linear(hidden, "block.mlp.3")
    return linear(tokens[0], "head")


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({}, 9_414_654),
        ({"n_classes": 8}, 9_414_784),
        ({"n_classes": 16, "patch_size": 13, "bands": 30}, 153_224),
    ],
)
def test_parameter_counts_are_the_published_ones(arguments, count):
    assert count_parameters(get_SSFTT_model(**arguments)) == count


@pytest.mark.parametrize(
    ("arguments", "millions"),
    [
        ({"spectral_kernel": 9, "spectral_stride": 8}, 1.19),
        ({"spectral_kernel": 16, "spectral_stride": 16}, 0.61),
        ({"projection": 30}, 0.21),
        ({"bands": 30}, 0.15),
    ],
)
def test_stems_have_the_parameters_measured_before(arguments, millions):
    assert round(count_parameters(get_SSFTT_model(**arguments)) / 1e6, 2) == millions


def test_projection_is_a_matrix_before_the_network_of_fewer_bands():
    torch.manual_seed(0)
    model = like_trained(get_SSFTT_model(4, 5, 20, projection=6))
    plain = get_SSFTT_model(4, 5, 6).eval()
    weights = model.state_dict()
    components, mean = torch.randn(6, 20), torch.randn(20)
    model.start_projection(components, mean)
    for name in ("projection.weight", "projection.bias"):
        del weights[name]
    plain.load_state_dict(weights)
    patches = torch.randn(7, 1, 20, 5, 5)
    centred = patches[:, 0] - mean[:, None, None]
    with torch.inference_mode():
        expected = plain(torch.einsum("nbyx,cb->ncyx", centred, components)[:, None])
        torch.testing.assert_close(model(patches), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [3, 5, 7])
def test_network_equals_its_equations_written_out(patch_size):
    torch.manual_seed(1)
    model = like_trained(get_SSFTT_model(4, patch_size, 9))
    patch = np.random.default_rng(0).normal(size=(9, patch_size, patch_size))
    with torch.inference_mode():
        logits = model.double()(torch.from_numpy(patch)[None, None])[0].numpy()
    np.testing.assert_allclose(logits, full_reference(model, patch), rtol=1e-10, atol=1e-10)


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
    stem=st.sampled_from([{}, {"projection": 3}, {"spectral_kernel": 2, "spectral_stride": 2}]),
)
def test_dense_face_equals_patch_face(
    patch_size, ny, nx, bands, n_classes, n_tokens, seed, block_bytes, stem
):
    torch.manual_seed(seed)
    model = like_trained(get_SSFTT_model(n_classes, patch_size, bands, n_tokens, **stem), seed)
    cube = np.random.default_rng(seed).normal(size=(ny, nx, bands)).astype(np.float32)
    one, dense = both_faces(model, cube, block_bytes=block_bytes)
    scale = one.abs().max()
    assert (one - dense).abs().max() <= 1e-4 * scale
    margin = one.topk(2, dim=-1).values.diff(dim=-1).abs().squeeze(-1)
    clear = margin > 1e-4 * scale  # a tie within rounding may fall either way
    assert torch.equal(one.argmax(-1)[clear], dense.argmax(-1)[clear])


def test_faces_agree_for_a_trained_network():
    """Trained until the loss is small: large weights, moved batch norms."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = get_SSFTT_model(3, 7, 12, dropout=0.0)
    cube = rng.normal(size=(12, 13, 12)).astype(np.float32)
    target = torch.from_numpy(np.digitize(cube[..., 3] + cube[..., 5], [-0.7, 0.7]))
    cutout = torch.from_numpy(cube).permute(2, 0, 1)[None, None]
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = F.cross_entropy(model.forward_dense(cutout)[0].flatten(1).T, target.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2
    one, dense = both_faces(model.eval(), cube)
    assert (one - dense).abs().max() <= 1e-4 * one.abs().max()
    assert torch.equal(one.argmax(-1), dense.argmax(-1))
    assert (dense.argmax(-1) == target).float().mean() > 0.6  # running statistics lag, but serve


def test_cutouts_of_a_batch_do_not_mix():
    model = like_trained(get_SSFTT_model(3, 5, 8))
    cutouts = torch.randn(3, 1, 8, 6, 7)
    with torch.inference_mode():
        together = model.forward_dense(cutouts)
        alone = torch.cat([model.forward_dense(c[None]) for c in cutouts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_gradients_of_both_faces_agree():
    torch.manual_seed(0)
    model = like_trained(get_SSFTT_model(3, 7, 8, dropout=0.0)).double()
    cube = np.random.default_rng(0).normal(size=(6, 5, 8))
    ys, xs = np.indices((6, 5)).reshape(2, -1)
    patches = torch.from_numpy(hsi_proc_fns.extract_patches(cube, ys, xs, 7))
    weights = torch.randn(30, 3, dtype=torch.double)
    (model(patches.permute(0, 3, 1, 2)[:, None]) * weights).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    dense = model.forward_dense(torch.from_numpy(cube).permute(2, 0, 1)[None, None])
    (dense[0].flatten(1).T * weights).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-9)


def direct_windows(logits: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Softmax over each window, one at a time, in float64."""
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
    logits = spread * rng.normal(size=(2, 3, ny, nx))
    values = rng.normal(size=(2, 4, ny, nx))
    found = window_tokens(torch.from_numpy(logits).float(), torch.from_numpy(values).float(), size)
    logits32 = torch.from_numpy(logits).float().numpy()
    expected = direct_windows(logits32, values, size)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 4e-3)]
)
def test_tokens_are_right_where_a_map_wide_maximum_underflows(dtype, tolerance):
    """Left half at 100, right half at 0: exp(-100) is 0 in half and single precision."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(1, 2, 12, 24))
    logits[..., :12] += 100
    values = rng.normal(size=(1, 3, 12, 24))
    a, v = torch.from_numpy(logits).to(dtype), torch.from_numpy(values).to(dtype)
    found = window_tokens(a, v, 5)
    expected = direct_windows(a.double().numpy(), v.double().numpy(), 5)
    assert found.isfinite().all()
    np.testing.assert_allclose(found.double().numpy(), expected, atol=tolerance)


@pytest.mark.parametrize(
    ("patch_size", "kernel", "projection"), [(7, 3, None), (3, 4, 9), (5, 2, 5)]
)
def test_features_by_pairs_of_bands_are_the_features(patch_size, kernel, projection):
    torch.manual_seed(0)
    bands = 10 + kernel - 1
    model = get_SSFTT_model(3, patch_size, bands, spectral_kernel=kernel, projection=projection)
    model = like_trained(model)
    x = torch.randn(2, 1, bands, 9, 11)
    with torch.inference_mode():
        torch.testing.assert_close(model.features_by_pairs()(x), model.features(x))


def test_features_by_pairs_train_as_the_features_do():
    """Gradients and running statistics, with weights and in the batch's own statistics."""
    x, grow = torch.randn(2, 1, 12, 9, 11).double(), torch.randn(2, 64, 5, 7).double()
    for weights in (None, torch.rand(2, 3, 5).double()):
        found = []
        for by_pairs in (False, True):
            torch.manual_seed(0)
            model = get_SSFTT_model(3, 7, 12).double().train()
            features = model.features_by_pairs() if by_pairs else model.features
            (features(x, weights) * grow).sum().backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
            found[-1] += model.buffers()
        assert len(found[0]) > 8
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_dense_map_is_right_where_logits_differ_by_hundreds():
    torch.manual_seed(0)
    model = like_trained(get_SSFTT_model(3, 7, 8))
    model.token_logits.data.mul_(500)
    cube = np.random.default_rng(0).normal(size=(14, 15, 8)).astype(np.float32)
    cutout = F.pad(torch.from_numpy(cube).permute(2, 0, 1)[None, None], (3, 3, 3, 3))
    with torch.inference_mode():
        logits = torch.einsum("bdyx,td->btyx", model.features(cutout), model.token_logits)
        assert (logits.amax((2, 3)) - logits.amin((2, 3))).min() > 100
    one, dense = both_faces(model, cube)
    assert (one - dense).abs().max() <= 1e-4 * one.abs().max()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("spread", [1, 200])
def test_half_precision_stays_near_and_keeps_most_decisions(dtype, tolerance, spread):
    """With a spread of 200 the tokenizer's logits lie hundreds apart on the map."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = like_trained(get_SSFTT_model(4, 7, 16), seed)
        model.token_logits.data.mul_(spread)
        cube = np.random.default_rng(seed).normal(size=(11, 12, 16)).astype(np.float32)
        one, _ = both_faces(model, cube)
        with torch.inference_mode(), torch.autocast("cpu", dtype):
            dense = model.forward_dense(torch.from_numpy(cube).permute(2, 0, 1)[None, None])
        dense = dense[0].permute(1, 2, 0).float()
        assert dense.isfinite().all()
        off = (dense - one).abs().amax(-1) / one.abs().max()
        # wide apart, a rounded logit may let another position win a window: few spaxels, not many
        assert off.quantile(0.9 if spread > 1 else 1.0) < tolerance
        assert (dense.argmax(-1) == one.argmax(-1)).float().mean() > 0.9


def test_training_mode_sees_the_whole_cutout_at_once():
    """Batch statistics over blocks of rows would differ from those of the cutout."""
    model = get_SSFTT_model(3, 5, 8, dropout=0.0).train()
    cutout = torch.randn(1, 1, 8, 9, 9)
    whole = model.forward_dense(cutout)
    torch.testing.assert_close(whole, model.forward_dense(cutout, block_bytes=1))
    assert model.spatial[1].num_batches_tracked == 2


def test_inner_face_of_a_patch_is_the_patch_face():
    model = like_trained(get_SSFTT_model(3, 6, 9))
    patches = torch.randn(5, 1, 9, 6, 6)
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_inner(patches)[..., 0, 0], model(patches))


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize(("patch_size", "side"), [(7, 5), (5, 4), (4, 3), (6, 1)])
def test_weighted_cutouts_train_as_their_patches_each_repeated(patch_size, side):
    """Momentum 1 makes the averages the batch's: then loss, gradients, statistics are the same."""
    torch.manual_seed(0)
    model = get_SSFTT_model(3, patch_size, 12, dropout=0.0).double().train()
    for norm in norms_of(model):
        norm.momentum = 1.0
    twin = copy.deepcopy(model)
    size = side + patch_size - 1
    cutouts = torch.randn(2, 1, 12, size, size, dtype=torch.double)
    classes = torch.randint(3, (2, side, side))
    times = torch.randint(0, 4, (2, side, side)) + 1 * (side == 1)

    logits = model.forward_inner(cutouts, times / 7)
    loss = (F.cross_entropy(logits, classes, reduction="none") * times).sum() / times.sum()
    loss.backward()
    patches = cutouts[:, 0].unfold(2, patch_size, 1).unfold(3, patch_size, 1)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 1, 12, patch_size, patch_size)
    repeated = patches.repeat_interleave(times.flatten(), 0)
    expected = F.cross_entropy(twin(repeated), classes.flatten().repeat_interleave(times.flatten()))
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        # a window of one position leaves the tokenizer no choice: no gradient at all
        gradient = torch.zeros_like(one) if one.grad is None else one.grad
        torch.testing.assert_close(gradient, other.grad, rtol=1e-6, atol=1e-9)
    for one, other in zip(norms_of(model), norms_of(twin), strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean)
        n = repeated[:, 0, 0].numel()  # Bessel's correction is a part in some thousand
        torch.testing.assert_close(one.running_var, other.running_var, rtol=30 / n, atol=0)


def test_renormalisation_is_that_of_its_paper(device):
    """Ioffe 2017, algorithm 1, by autograd with r and d as constants."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(5).double().to(device)
    norm.weight.data.normal_()
    norm.bias.data.normal_()

    def normal(*shape):
        return torch.randn(shape, dtype=torch.double).to(device)

    for _ in range(30):  # past the first, plain averages
        batch_norm(normal(2, 5, 6, 7) * 2 + 1, norm, normal(2, 6, 7).abs())
    x = (normal(2, 5, 6, 7) * 3).requires_grad_()
    weights, upstream = normal(2, 6, 7).abs(), normal(2, 5, 6, 7)
    before = norm.running_mean.clone(), norm.running_var.clone()
    y = batch_norm(x, norm, weights)
    found = torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream)

    share = (weights / weights.sum())[:, None]
    mean = (x * share).sum((0, 2, 3))
    variance = ((x - mean[:, None, None]) ** 2 * share).sum((0, 2, 3))
    running_mean = 0.9 * before[0] + 0.1 * mean.detach()
    running_var = 0.9 * before[1] + 0.1 * variance.detach()
    sigma, running_sigma = (variance + norm.eps).sqrt(), (running_var + norm.eps).sqrt()
    r = (sigma / running_sigma).detach()
    d = ((mean - running_mean) / running_sigma).detach()
    shape = (5, 1, 1)
    normed = (x - mean.view(shape)) / sigma.view(shape) * r.view(shape) + d.view(shape)
    expected = normed * norm.weight.view(shape) + norm.bias.view(shape)
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected, (x, norm.weight, norm.bias), upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(norm.running_mean, running_mean)
    torch.testing.assert_close(norm.running_var, running_var)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float16, 0.002)], ids=["bf16", "fp16"]
)
def test_renormalisation_in_half_precision_bears_offsets_and_outliers(device, dtype, tolerance):
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
        y = batch_norm(given, norm, weights.to(device))
        gradients.append(torch.autograd.grad(y, given, upstream.to(device, kind))[0].double())
        norms.append(norm)
    exact, found = gradients
    assert (found - exact).norm() < tolerance * exact.norm()
    for name in ("running_mean", "running_var"):
        one, other = (getattr(norm, name).double() for norm in norms)
        torch.testing.assert_close(one, other, rtol=0.02, atol=0)


def test_faces_agree_on_every_device(device):
    torch.manual_seed(0)
    model = like_trained(get_SSFTT_model(4, 7, 16)).to(device)
    cube = torch.randn(1, 1, 16, 9, 10)
    padded = F.pad(cube, (3,) * 4).to(device)
    patches = (
        padded[0, 0].unfold(1, 7, 1).unfold(2, 7, 1).permute(1, 2, 0, 3, 4).reshape(-1, 1, 16, 7, 7)
    )
    with torch.inference_mode():
        one = model(patches)
        dense = model.forward_dense(cube.to(device))[0].permute(1, 2, 0).reshape(90, 4)
    tolerance = 1e-4 if device == "cpu" else 5e-3  # a GPU convolves float32 in TF32
    assert (dense - one).abs().max() <= tolerance * one.abs().max()


def test_cutouts_train_on_what_evaluation_will_normalise_by():
    """The averages that a training step normalises by are those it leaves behind."""
    torch.manual_seed(0)
    model = get_SSFTT_model(3, 5, 8, dropout=0.0).train()
    for step in range(3):
        cutouts = torch.randn(2, 1, 8, 9, 9) + step
        trained = model.forward_inner(cutouts, torch.ones(2, 5, 5))
        if step == 0:
            plain = torch.tensor([n.running_var.mean() for n in norms_of(model)])
            assert (plain != 1).all()  # the start of 0 and 1 is forgotten at once
        with torch.no_grad():
            evaluated = model.eval().forward_inner(cutouts)
        torch.testing.assert_close(trained, evaluated, rtol=1e-4, atol=1e-5)
        model.train()


def test_arguments_make_the_same_network_again():
    model = get_SSFTT_model(
        3, 5, 50, n_tokens=2, spectral_kernel=9, spectral_stride=4, projection=20
    )
    again = get_SSFTT_model(**model.arguments)
    again.load_state_dict(model.state_dict())
    assert again.spectral[0].weight.shape == (8, 1, 9, 3, 3)
    assert again.widest == 8 * 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"bands": 2}, "bands"),
        ({"projection": 0}, "projection"),
        ({"projection": 2}, "2 bands"),
        ({"heads": 7}, "heads"),
        ({"patch_size": 0}, "patch size"),
        ({"spectral_kernel": 0}, "spectral kernel"),
        ({"heads": 0}, "heads"),
        ({"dim": 0}, "width"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(arguments, word):
    with pytest.raises(DataError, match=word):
        get_SSFTT_model(**arguments)
