"""The SSFTT of HSI_SSFTT.py on whole maps and cutouts: the same logits, each feature computed once.

Input   cutouts (B, 1, band, y, x) of normalised spectra.
Output  logits (B, classes, y, x), of every spaxel.

The network pads nowhere, so the features of a patch are a window of the features of a larger
cutout. The convolutions run once over the cutout, and the tokenizer's softmax runs over every
window of features at once (`window_tokens`). The patch-wise and dense modes share every weight and
agree to rounding.

    dense_logits    every spaxel of a map; beyond its edges lie zeros, as in the patches
    cutout_logits   the spaxels whose whole patch lies inside the cutout: for training, with weights
                    that make the batch statistics those of the patches

    >>> maps = dense_logits(model.eval(), cube.permute(2, 0, 1)[None, None])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from HSI_SSFTT import SSFTT

BLOCK_BYTES = 256 << 20
"""Largest activation of a block of rows in `dense_logits`; about four such are alive at once."""
ROW_MULTIPLE = 8
"""The first convolution gives multiples of this number of rows, where possible: oneDNN takes three
times as long to unpack other outputs."""
ROWS_COPIED = 4
"""Rows of a map that are brought into the convolutions' memory layout at a time: copying a whole
map with the bands innermost would read one memory page for each value."""

Features = Callable[[Tensor, Tensor | None], Tensor]
"""Cutouts (B, 1, band, y, x) and weights -> features (B, dim, y - P + window, x - P + window)."""


# The tokenizer over every window


class Boxes(NamedTuple):
    """Softmax sums over boxes of positions, indexed by the first position of each box."""

    top: Tensor
    """(B, T, 1, Y, X) largest logit."""
    total: Tensor
    """(B, T, 1, Y, X) sum of exp(logit - top), between 1 and the number of positions."""
    mean: Tensor
    """(B, T, dim, Y, X) weighted mean of the values."""

    def from_to(self, axis: int, first: int, count: int) -> Boxes:
        """Take `count` boxes along an axis."""
        return Boxes(*(part.narrow(axis, first, count) for part in self))


def _join(first: Boxes, second: Boxes, shift: int, axis: int) -> Boxes:
    """Join the boxes of `first` at i with those of `second` at i + shift."""
    count = second.top.shape[axis] - shift
    first, second = first.from_to(axis, 0, count), second.from_to(axis, shift, count)
    top = torch.maximum(first.top, second.top)
    first_total = first.total * (first.top - top).exp()
    total = first_total + second.total * (second.top - top).exp()
    share = (first_total / total).to(first.mean.dtype)
    return Boxes(top, total, torch.lerp(second.mean, first.mean, share))


def _grow(boxes: Boxes, size: int, axis: int) -> Boxes:
    """Join each run of `size` boxes along an axis."""
    if size == 1:
        return boxes
    half = _grow(boxes, size // 2, axis)
    whole = _join(half, half, size // 2, axis)
    return _join(whole, boxes, size - 1, axis) if size % 2 else whole


def window_tokens(logits: Tensor, values: Tensor, window: int) -> Tensor:
    """Average values over every window, weighted by a softmax over the window's positions.

    Parameters
    ----------
    logits : (B, T, Y, X)
    values : (B, dim, Y, X)
    window : int
        Width w of the square windows.

    Returns
    -------
    (B, T, dim, Y - w + 1, X - w + 1)

    Notes
    -----
    The softmax average over a window is a ratio of two box sums, sum(exp(a) v) / sum(exp(a)).
    Large boxes are joined from smaller ones. Each box holds the maximum m of its logits, the sum s
    of exp(a - m), and its weighted mean of v; to join two, their sums are rescaled to the larger
    maximum, and their means mixed in the ratio of the sums (Milakov & Gimelshein 2018,
    arXiv:1805.02867, section 3.1). So no exponential over- or underflows in any window, however
    far apart the logits of a map lie. A window of width w takes about 4 log2(w) joins.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))[:, :, None]
    top = exact.detach()  # the result does not depend on it, so gradients need not pass it
    boxes = Boxes(top, (exact - top).exp(), values[:, None])  # all tokens share the first means
    for axis in (3, 4):
        boxes = _grow(boxes, window, axis)
    return boxes.mean.expand(-1, logits.shape[1], -1, -1, -1)


# Batch statistics of weighted spaxels


def _ones(x: Tensor) -> tuple[int, ...]:
    """Axes of length 1 for all but the first two of x, so that (C, *ones) broadcasts over it."""
    return (1,) * (x.ndim - 2)


def _channel_sum(x: Tensor, share: Tensor) -> Tensor:
    """Sum x (B, C, ..., Y, X), weighted by share (B, 1, Y, X), to (C,)."""
    maps = x.reshape(*x.shape[:2], -1, *x.shape[-2:]).sum(2, dtype=share.dtype)
    return (maps * share).sum((0, 2, 3))


def _gradient_sums(x: Tensor, dy: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sum dy (x - mean), and dy, over all axes but the channels of (B, C, ..., Y, X), (C,) each.

    These are the gradients of the weight and bias of a batch norm in evaluation mode with
    variance 1, which torch computes in one pass. Each band becomes a channel of its own, since a
    GPU assigns one multiprocessor to each channel.
    """
    x, dy = (part.reshape(len(part), -1, *part.shape[-2:]) for part in (x, dy))
    bands = x.shape[1] // len(mean)
    means = mean.repeat_interleave(bands)
    ones = torch.ones_like(means)
    _, *sums = torch.ops.aten.native_batch_norm_backward(  # CUDA needs both means
        dy, x, ones, means, ones, means, ones, False, 0.0, [False, True, True]
    )
    with_centred, total = (part.view(-1, bands).sum(1) for part in sums)
    return with_centred, total


class _Renormalise(torch.autograd.Function):
    """Normalise by given averages, with the gradient of the batch's own statistics.

    With u = (x - batch mean) / batch sigma and z = (x - mean) / sigma, forward is y = w z + b;
    its last arguments are mean, sigma**2 - eps, batch mean and 1 / batch sigma.
    Backward is that of batch norm in which r = batch sigma / sigma and d = (batch mean - mean) /
    sigma are constants: dx = w / sigma (dy - share (sum dy + u sum dy u)). Ioffe 2017
    (arXiv:1702.03275), section 3.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, share: Tensor, weight: Tensor, bias: Tensor, eps: float, *stats: Tensor
    ) -> Tensor:
        mean, variance, *batch = stats
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, share, weight, mean, inverse, *batch)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, share, weight, mean, inverse, batch_mean, batch_inverse = ctx.saved_tensors
        shape = (-1, *_ones(x))
        with_centred, total = _gradient_sums(x, dy, batch_mean)
        by_u = with_centred * batch_inverse
        by_z = (with_centred + (batch_mean - mean) * total) * inverse
        scale = weight * inverse
        slope = -scale * by_u * batch_inverse
        constant = -scale * total
        if x.dtype == mean.dtype:
            constant -= slope * batch_mean
        else:  # half precision cannot hold the difference of slope * x and slope * batch_mean
            x = x - batch_mean.view(shape).to(x.dtype)
        spread = share.view(len(x), *_ones(x)[:-1], *x.shape[-2:])
        slope, constant = ((spread * part.view(shape)).to(x.dtype) for part in (slope, constant))
        dx = torch.addcmul(constant, x, slope).addcmul_(dy, scale.view(shape).to(x.dtype))
        return dx, None, by_z, total, None, None, None, None, None


def renormalise(x: Tensor, norm: Any, weights: Tensor | None) -> Tensor:
    """Batch renormalisation of cutouts with the statistics of their weighted spaxels' patches.

    Parameters
    ----------
    x : (B, C, ..., Y, X)
        Features; any axes in between, such as bands.
    norm : BatchNorm2d or BatchNorm3d of C channels
        Its running averages are updated. In evaluation mode it is applied as it is.
    weights : (B, y, x) or None
        Weight of each spaxel, whose window of features is (Y - y + 1, X - x + 1) wide. None:
        plain batch norm.

    Returns
    -------
    (B, C, ..., Y, X)

    Notes
    -----
    A position counts with the summed weights of all spaxels whose window contains it: box sums of
    the weights. The spaxels of one cutout are alike, so a few cutouts estimate the mean less well
    than as many patches from many galaxies. Features are therefore normalised by the running
    averages, which include this batch, as they will be in evaluation, while gradients pass through
    the statistics of the batch: Ioffe 2017 (arXiv:1702.03275), section 3 and algorithm 1, without
    limits on its r and d. The first running averages are plain means over the batches so far.
    With a momentum of 1 this is ordinary batch norm.
    """
    if weights is None or not norm.training:
        return norm(x)
    dtype = norm.running_mean.dtype
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rows, columns = (x.shape[a] - weights.shape[a] for a in (-2, -1))
        counts = F.pad(weights.to(dtype), (columns, columns, rows, rows))[:, None]
        counts = F.avg_pool2d(counts, (rows + 1, columns + 1), stride=1)
        share = counts / (counts.sum() * x[0, 0, ..., 0, 0].numel())  # (B, 1, Y, X)
        mean = _channel_sum(x, share)
        shift = mean.to(x.dtype)
        wide = x.float() if x.dtype == torch.float16 else x  # squares overflow float16
        centre = shift.to(wide.dtype).view(-1, *_ones(x)).expand_as(x)
        squares = F.mse_loss(wide, centre, reduction="none")  # difference and square in one pass
        variance = _channel_sum(squares, share) - (mean - shift).square()
        norm.num_batches_tracked.add_(1)
        momentum = norm.num_batches_tracked.to(dtype).reciprocal().clamp(min=norm.momentum)
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance, momentum)
        averages = norm.running_mean.clone(), norm.running_var.clone()
    batch = mean, (variance + norm.eps).rsqrt()
    return _Renormalise.apply(x, share, norm.weight, norm.bias, norm.eps, *averages, *batch)


# Features


def _fold_batch_norm(convolve: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution; in evaluation mode with the batch norm that follows it."""
    if norm.training:
        return convolve.weight, convolve.bias
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = convolve.weight * scale.view(-1, 1, *_ones(convolve.weight))
    return weight, (convolve.bias - norm.running_mean) * scale + norm.bias


def features(model: SSFTT, cutouts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Like `SSFTT.features`, with the batch norms of weighted spaxels (`renormalise`)."""
    convolve, norm, relu = model.spectral
    x = relu(renormalise(convolve(model.project(cutouts)), norm, weights))
    convolve, norm, relu = model.spatial
    return relu(renormalise(convolve(rearrange(x, "b c k y x -> b (c k) y x")), norm, weights))


def features_by_pairs(model: SSFTT) -> Features:
    """Make a function that equals `features` but convolves two neighbouring bands at a time.

    For a spectral stride of 1 that leaves an even number of bands. The first convolution has
    twice as many filters, one band longer, at stride 2: oneDNN stores 8 channels as 16 and spends
    long on unpacking them. In evaluation mode the batch norms are folded into the filters. The
    function uses the weights of the time it was made. It is faster for cutouts, not for patches
    (docs/lab_notes.md).
    """
    convolve, norm, relu = model.spectral
    weight, bias = _fold_batch_norm(convolve, norm)  # (C, 1, kernel, ky, kx)
    earlier, later = F.pad(weight, (0, 0, 0, 0, 0, 1)), F.pad(weight, (0, 0, 0, 0, 1, 0))
    first = rearrange([earlier, later], "pair c i k ky kx -> (c pair) i k ky kx")
    first_bias = bias.repeat_interleave(2)
    then, then_norm, then_relu = model.spatial
    second, second_bias = _fold_batch_norm(then, then_norm)
    # the first convolution gives the channels in the order (filter, pair, band / 2)
    second = rearrange(
        second, "d (c k pair) ky kx -> d (c pair k) ky kx", c=model.config.channels, pair=2
    )

    def paired_features(x: Tensor, weights: Tensor | None = None) -> Tensor:
        if model.projection is None:
            x = torch.cat([rows.contiguous() for rows in x.split(ROWS_COPIED, dim=-2)], dim=-2)
        x = F.conv3d(model.project(x), first, first_bias, stride=(2, 1, 1))
        x = rearrange(x, "b (c pair) k y x -> b c (pair k) y x", pair=2)
        if norm.training:
            x = renormalise(x, norm, weights)
        x = F.conv2d(rearrange(relu(x), "b c k y x -> b (c k) y x"), second, second_bias)
        if then_norm.training:
            x = renormalise(x, then_norm, weights)
        return then_relu(x)

    return paired_features


def choose_features(model: SSFTT, cutouts: Tensor) -> Features:
    """Choose the fastest way to compute the features of cutouts."""
    config = model.config
    paired = config.spectral_stride == 1 and config.spectral_bands % 2 == 0
    if paired and cutouts.device.type == "cpu":
        return features_by_pairs(model)
    return partial(features, model)


# Logits


def classify_windows(model: SSFTT, features: Tensor) -> Tensor:
    """Classify the spaxel in the middle of each window of features, as `SSFTT.forward` does.

    (B, dim, y + window - 1, x + window - 1) -> logits (B, classes, y, x).
    """
    logits = einsum(features, model.token_logits, "b d y x, t d -> b t y x")
    values = einsum(features, model.token_values, "b d y x, d e -> b e y x")
    tokens = window_tokens(logits, values, model.config.window)
    b, _, _, y, x = tokens.shape
    out = model.classify(rearrange(tokens, "b t d y x -> (b y x) t d"))
    return rearrange(out, "(b y x) classes -> b classes y x", b=b, y=y, x=x)


def cutout_logits(model: SSFTT, cutouts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Classify the spaxels of cutouts whose whole patch lies inside.

    Parameters
    ----------
    cutouts : (B, 1, band, y + P - 1, x + P - 1)
    weights : (B, y, x), optional
        In training mode: how often each spaxel counts in the batch statistics (not all 0), with
        its whole patch as in patch-wise training, averaged over batches (`renormalise`). Default:
        plain batch norm, in which every position of the cutouts counts once.

    Returns
    -------
    (B, classes, y, x) logits
    """
    return classify_windows(model, choose_features(model, cutouts)(cutouts, weights))


def dense_logits(model: SSFTT, cutouts: Tensor, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """Classify every spaxel of cutouts or whole maps.

    Parameters
    ----------
    cutouts : (B, 1, band, y, x)
        Any y and x, also smaller than a patch.
    block_bytes : int
        In evaluation mode, convolve blocks of rows whose largest activation stays near this size
        (at least one row). Training mode convolves the whole at once, for its batch statistics.

    Returns
    -------
    (B, classes, y, x) logits, equal to the patch-wise ones of these spaxels.
    """
    size = model.config.patch_size
    before, after = size // 2, size - 1 - size // 2
    bands_innermost = rearrange(cutouts, "b c band y x -> b c y x band")  # as in memory: one copy
    padded = F.pad(bands_innermost, (0, 0, before, after, before, after))
    padded = rearrange(padded, "b c y x band -> b c band y x")
    if model.training:
        return cutout_logits(model, padded)
    margin = size - model.config.window  # rows that the two convolutions take off
    row_bytes = len(padded) * model.config.folded_channels * padded[0, 0, 0, 0].nbytes
    # the first convolution gives the rows of a block and half the margin: a multiple of these
    rows = (block_bytes // row_bytes - margin // 2) // ROW_MULTIPLE * ROW_MULTIPLE - margin // 2
    rows, features = max(1, rows), choose_features(model, padded)
    starts = range(0, padded.shape[-2] - margin, rows)
    blocks = [features(padded[..., y : y + rows + margin, :], None) for y in starts]
    return classify_windows(model, torch.cat(blocks, dim=2))
