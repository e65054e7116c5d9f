import dataclasses
import math

from utils import DataError

import numpy as np
import pytest
import torch
from mock_network import like_trained
from numpy.lib.stride_tricks import sliding_window_view

from HSI_SSFTT import SSFTT, SSFTTConfig, count_parameters, get_SSFTT_model


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        # published, or counted by hand from the published layers
        ({}, 9_414_654),
        ({"n_classes": 8}, 9_414_784),
        ({"n_classes": 16, "patch_size": 13, "bands": 30}, 153_224),
        # measured before with other code, in units of 10,000
        ({"spectral_kernel": 9, "spectral_stride": 8}, pytest.approx(1.19e6, abs=5e3)),
        ({"spectral_kernel": 16, "spectral_stride": 16}, pytest.approx(0.61e6, abs=5e3)),
        ({"projection": 30}, pytest.approx(0.21e6, abs=5e3)),
        ({"bands": 30}, pytest.approx(0.15e6, abs=5e3)),
    ],
)
def test_parameter_counts_are_the_known_ones(sizes, count):
    assert count_parameters(get_SSFTT_model(**sizes)) == count


def logits_written_out(model: SSFTT, patch: np.ndarray) -> np.ndarray:
    """The network in numpy and float64, every token through the whole block. Patch (band, P, P)."""
    w = {k: v.double().numpy() for k, v in model.state_dict().items()}

    def linear(a, name):
        return a @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def batch_norm_relu(a, name):
        """Channels first."""
        mean, var, scale, shift = (
            w[f"{name}.{part}"].reshape(-1, *(1,) * (a.ndim - 1))
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return np.maximum((a - mean) / np.sqrt(var + 1e-5) * scale + shift, 0)

    def layer_norm(a, name):
        scaled = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def softmax(a, axis):
        e = np.exp(a - a.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    kernels = w["spectral.0.weight"][:, 0]
    x = np.einsum("bijklm,cklm->cbij", sliding_window_view(patch, kernels.shape[1:]), kernels)
    x = batch_norm_relu(x + w["spectral.0.bias"][:, None, None, None], "spectral.1")
    x = x.reshape(-1, *x.shape[2:])  # channel slow, band fast
    kernels = w["spatial.0.weight"]
    windows = sliding_window_view(x, kernels.shape[2:], axis=(1, 2))
    x = np.einsum("cijkl,dckl->dij", windows, kernels) + w["spatial.0.bias"][:, None, None]
    x = batch_norm_relu(x, "spatial.1").reshape(len(kernels), -1).T  # (positions, dim)
    attention = softmax(x @ w["token_logits"].T, 0)
    tokens = attention.T @ (x @ w["token_values"])
    tokens = np.concatenate([w["class_token"][0], tokens]) + w["positions"][0]

    normalised, dim, heads = layer_norm(tokens, "block.norm_attention"), tokens.shape[1], 8
    keys_values = np.split(linear(normalised, "block.to_kv"), 2, axis=1)
    q, k, v = (
        a.reshape(-1, heads, dim // heads) for a in (linear(normalised, "block.to_q"), *keys_values)
    )
    scores = softmax(np.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim), -1)
    attended = np.einsum("hij,jhd->ihd", scores, v).reshape(-1, dim)
    tokens = tokens + linear(attended, "block.project")
    hidden = linear(layer_norm(tokens, "block.norm_mlp"), "block.mlp.0")
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return linear((tokens + linear(hidden, "block.mlp.3"))[0], "head")


@pytest.mark.parametrize("patch_size", [3, 5, 7])
def test_network_equals_its_equations_written_out(patch_size):
    torch.manual_seed(1)
    model = like_trained(get_SSFTT_model(4, patch_size, 9))
    patch = np.random.default_rng(0).normal(size=(9, patch_size, patch_size))
    with torch.inference_mode():
        logits = model.double()(torch.from_numpy(patch)[None, None])[0].numpy()
    np.testing.assert_allclose(logits, logits_written_out(model, patch), rtol=1e-10, atol=1e-10)


def test_projection_is_a_matrix_before_the_network_of_fewer_bands():
    torch.manual_seed(0)
    model = like_trained(get_SSFTT_model(4, 5, 20, projection=6))
    components, mean = torch.randn(6, 20), torch.randn(20)
    model.start_projection(components, mean)
    plain = get_SSFTT_model(4, 5, 6).eval()
    weights = model.state_dict()
    plain.load_state_dict({k: v for k, v in weights.items() if not k.startswith("projection")})
    patches = torch.randn(7, 1, 20, 5, 5)
    centred = patches[:, 0] - mean[:, None, None]
    with torch.inference_mode():
        expected = plain(torch.einsum("nbyx,cb->ncyx", centred, components)[:, None])
        torch.testing.assert_close(model(patches), expected, rtol=1e-4, atol=1e-5)


def test_weights_load_into_the_network_that_the_saved_config_makes():
    sizes = {"n_tokens": 2, "spectral_kernel": 9, "spectral_stride": 4, "projection": 20}
    model = get_SSFTT_model(3, 5, 50, **sizes)
    assert model.config == SSFTTConfig(3, 5, 50, **sizes)
    again = get_SSFTT_model(**dataclasses.asdict(model.config))
    again.load_state_dict(model.state_dict())
    assert again.spectral[0].weight.shape == (8, 1, 9, 3, 3)
    assert again.config.folded_channels == 8 * 3


def test_num_classes_is_another_name_of_n_classes():
    assert get_SSFTT_model().config == SSFTTConfig()
    for names in ({"num_classes": 8}, {"n_classes": 8}, {"num_classes": 8, "n_classes": 8}):
        assert get_SSFTT_model(bands=9, **names).head.out_features == 8
    with pytest.raises(DataError, match="n_classes is 6 and num_classes 8"):
        get_SSFTT_model(6, num_classes=8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        *(
            ({name: 0}, f"{name} is 0, expected at least 1")
            for name in ("n_classes", "patch_size", "spectral_kernel", "heads", "dim")
        ),
        ({"heads": 7}, r"dim is 64, expected a multiple of 7 \(heads\)"),
        ({"bands": 2}, "spectral_kernel is 3, expected at most 2"),
        ({"projection": 2}, "spectral_kernel is 3, expected at most 2"),
        ({"projection": 0}, r"projection is 0, expected 1 to 2040 \(bands\)"),
        ({"bands": 9, "projection": 10}, r"projection is 10, expected 1 to 9 \(bands\)"),
        ({"dropout": 1.5}, "dropout is 1.5, expected at least 0 and below 1"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(sizes, message):
    with pytest.raises(DataError, match=message) as error:
        get_SSFTT_model(**sizes)
    assert "\n" not in str(error.value)
