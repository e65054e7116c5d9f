"""The network: spectral-spatial feature tokenization transformer (SSFTT) for hyperspectral cubes.

Sun, Zhao, Zheng & Wu 2022, IEEE TGRS 60, 5522214: two convolutions find local features, a few
tokens gather them over the patch by a softmax over positions, one transformer block lets a class
token look at them.

One module, two faces that share every weight:

    forward        patches (N, 1, band, P, P)  -> logits (N, classes), of the spaxels [P//2, P//2]
    forward_dense  cutouts (B, 1, band, y, x)  -> logits (B, classes, y, x), of every spaxel

The two agree because nothing inside pads: a patch's features are a window of the cutout's, so
each is computed once instead of once a patch. Beyond a cutout's edge lie zeros, as in the patches.
Training takes cutouts with their surroundings, `forward_inner`, which can weigh the batch
statistics so that they too are those of the patches.

    >>> model = get_SSFTT_model(n_classes=6, patch_size=7, bands=2040)
    >>> maps = model.eval().forward_dense(cube.permute(2, 0, 1)[None, None])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import DataError

SMALLEST_CONVOLVED = 5
"""Patches under 5x5 cannot take two 3x3 convolutions without padding; theirs are 1x1."""

BLOCK_BYTES = 256 << 20
"""Widest activation of a block of rows in dense evaluation, of which some four are alive."""


class ClassTokenBlock(nn.Module):
    """One pre-norm transformer block, evaluated for the first token only.

    The head reads nothing but the class token and there is one block, so the other tokens serve
    as keys and values and their own outputs are never needed.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = dim**-0.5  # of the whole width, not of one head: facts of the published net
        self.norm_attention = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, dim),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, dim), the class token first -> class token (N, dim)."""
        n, t, dim = tokens.shape
        normed = self.norm_attention(tokens)
        q = self.to_q(normed[:, 0]).view(n, 1, self.heads, -1)
        k, v = self.to_kv(normed).view(n, t, 2, self.heads, -1).unbind(2)  # each (N, T, h, dim/h)
        # sums of products: as batches of matrix products of 1 x 8 they take twice as long
        weights = ((q * k).sum(-1, keepdim=True) * self.scale).softmax(1)  # (N, T, h, 1)
        seen = (weights * v).sum(1).reshape(n, dim)
        out = tokens[:, 0] + self.dropout(self.project(seen))
        return out + self.mlp(self.norm_mlp(out))


class SSFTT(nn.Module):
    """The network; `get_SSFTT_model` says what its arguments mean, checks and keeps them."""

    arguments: dict[str, Any]

    def __init__(
        self,
        n_classes: int,
        patch_size: int,
        bands: int,
        n_tokens: int,
        dim: int,
        heads: int,
        mlp_dim: int,
        channels: int,
        dropout: float,
        spectral_kernel: int,
        spectral_stride: int,
        projection: int | None,
    ) -> None:
        super().__init__()
        kernel = 3 if patch_size >= SMALLEST_CONVOLVED else 1
        self.patch_size = patch_size
        self.window = patch_size - 2 * (kernel - 1)
        """Side of the window of features that one patch has."""
        bands_left = ((projection or bands) - spectral_kernel) // spectral_stride + 1
        self.widest = channels * bands_left
        """Channels between the two convolutions."""
        self.projection = nn.Conv2d(bands, projection, 1) if projection else None
        self.spectral = nn.Sequential(
            nn.Conv3d(
                1,
                channels,
                (spectral_kernel, kernel, kernel),
                stride=(spectral_stride, 1, 1),
            ),
            nn.BatchNorm3d(channels),
            nn.ReLU(inplace=True),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(self.widest, dim, kernel),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
        )
        # (1, tokens, dim) is drawn, not (tokens, dim): docs/science_choices.md, "Initial weights"
        self.token_logits = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, n_tokens, dim))[0])
        self.token_values = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, dim, dim))[0])
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, n_tokens + 1, dim) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.block = ClassTokenBlock(dim, heads, mlp_dim, dropout)
        self.head = nn.Linear(dim, n_classes)

    @torch.no_grad()
    def start_projection(self, components: Tensor, mean: Tensor) -> None:
        """Start the projection as that on given components.

        Parameters
        ----------
        components : (projection, band)
        mean : (band,)
            Of the spectra; it is projected on zero.
        """
        assert self.projection is not None
        assert self.projection.bias is not None
        self.projection.weight.copy_(components[:, :, None, None])
        self.projection.bias.copy_(-components @ mean)

    def project(self, x: Tensor) -> Tensor:
        """Apply the learned projection, if there is one, to (B, 1, band, y, x).

        Returns the usual layout, of which the first convolution's two passes would each make a
        copy: loaders give the bands innermost.
        """
        if self.projection is None:
            return x.contiguous()
        with torch.autocast(x.device.type, enabled=False):  # its products nearly cancel
            return self.projection(x.squeeze(1).to(self.projection.weight.dtype)).unsqueeze(1)

    def features(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Convolve: (B, 1, band, y, x) -> (B, dim, y - s, x - s), s = patch_size - window.

        The weights are those of `forward_inner`.
        """
        x = self.project(x)
        convolve, norm, activate = self.spectral
        x = activate(batch_norm(convolve(x), norm, weights)).flatten(1, 2)
        convolve, norm, activate = self.spatial
        return activate(batch_norm(convolve(x), norm, weights))

    def choose_features(self, x: Tensor) -> Callable[..., Tensor]:
        """Pick the fastest way to convolve cutouts: `features`, or what it returns by pairs."""
        convolve = self.spectral[0]
        assert isinstance(convolve, nn.Conv3d)
        even = convolve.stride[0] == 1 and self.widest // convolve.out_channels % 2 == 0
        return self.features_by_pairs() if even and x.device.type == "cpu" else self.features

    def features_by_pairs(self) -> Callable[..., Tensor]:
        """Make a function that does as `features`, two neighbouring bands at a time.

        For an even number of bands after a convolution of stride 1; with the weights of now.
        Twice the filters, one band longer, at twice the stride: oneDNN packs 8 channels as 16 and
        takes long to unpack them. In evaluation the filters take in the batch norms. Pays for
        cutouts, not for patches (docs/performance.md).
        """
        convolve, norm, activate = self.spectral
        weight, bias = _with_norm(convolve, norm)
        filters, bands = len(weight), self.widest // len(weight)
        earlier, later = ((0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 1, 0))
        first = torch.stack([F.pad(weight, sides) for sides in (earlier, later)], 1).flatten(0, 1)
        first_bias = bias.repeat_interleave(2)
        then, then_norm, then_activate = self.spatial
        second, second_bias = _with_norm(then, then_norm)
        dim, _, *kernel = second.shape  # its inputs: first the earlier, then the later
        second = second.view(dim, filters, bands // 2, 2, *kernel).transpose(2, 3)
        second = second.reshape(dim, self.widest, *kernel)

        def features(x: Tensor, weights: Tensor | None = None) -> Tensor:
            if self.projection is None:  # a whole map copied at once reads a page for each value
                x = torch.cat([rows.contiguous() for rows in x.split(4, dim=-2)], dim=-2)
            x = F.conv3d(self.project(x), first, first_bias, stride=(2, 1, 1))
            x = x.reshape(len(x), filters, bands, *x.shape[-2:])  # was (B, 2 filters, bands/2, ..)
            if norm.training:
                x = batch_norm(x, norm, weights)
            x = F.conv2d(activate(x).flatten(1, 2), second, second_bias)
            if then_norm.training:
                x = batch_norm(x, then_norm, weights)
            return then_activate(x)

        return features

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, dim) of N spaxels -> logits (N, classes)."""
        first = self.class_token.expand(len(tokens), -1, -1)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1) + self.positions
        return self.head(self.block(self.dropout(tokens)))

    def forward(self, patches: Tensor) -> Tensor:
        """Classify the spaxel [P//2, P//2] of each patch.

        Parameters
        ----------
        patches : (N, 1, band, P, P)

        Returns
        -------
        (N, classes) logits
        """
        features = self.features(patches).flatten(2).transpose(1, 2)  # (N, window**2, dim)
        attention = (features @ self.token_logits.T).softmax(dim=1)  # over positions
        values = features @ self.token_values
        return self.classify(attention.transpose(1, 2).to(values.dtype) @ values)

    def forward_dense(self, cutouts: Tensor, block_bytes: int = BLOCK_BYTES) -> Tensor:
        """Classify every spaxel of cutouts.

        Parameters
        ----------
        cutouts : (B, 1, band, y, x)
            Any y and x, also smaller than a patch.
        block_bytes : int
            Evaluation works through blocks of rows whose widest activation stays near this; at
            least one row. Training takes the whole at once, as batch statistics need it. The
            first convolution gets multiples of 8 rows: oneDNN unpacks others 3 times slower.

        Returns
        -------
        (B, classes, y, x) logits, those of `forward` on the patches of these spaxels.
        """
        before = self.patch_size // 2
        after = self.patch_size - 1 - before
        sides = 0, 0, before, after, before, after  # in the usual layout, bands innermost: a copy
        padded = F.pad(cutouts.movedim(2, -1), sides).movedim(-1, 2)
        if self.training:
            return self.forward_inner(padded)
        margin = self.patch_size - self.window
        row_bytes = len(padded) * self.widest * padded.shape[-1] * padded.element_size()
        step = max(1, (block_bytes // row_bytes - margin // 2) // 8 * 8 - margin // 2)
        starts = range(0, padded.shape[-2] - margin, step)
        features = self.choose_features(padded)
        blocks = [features(padded[..., y : y + step + margin, :]) for y in starts]
        return self.classify_windows(torch.cat(blocks, dim=2))

    def forward_inner(self, cutouts: Tensor, weights: Tensor | None = None) -> Tensor:
        """Classify the spaxels of cutouts whose whole patch lies inside.

        Parameters
        ----------
        cutouts : (B, 1, band, y + P - 1, x + P - 1)
        weights : (B, y, x), optional
            For training: how often each spaxel counts in the batch statistics, not all 0. A
            spaxel counts with its whole patch, as in `forward`, and the statistics are averaged
            over batches: see `batch_norm`. Default: every position of the cutouts counts once,
            in this batch's statistics.

        Returns
        -------
        (B, classes, y, x) logits
        """
        return self.classify_windows(self.choose_features(cutouts)(cutouts, weights))

    def classify_windows(self, features: Tensor) -> Tensor:
        """Features (B, dim, y + window - 1, x + window - 1) -> logits (B, classes, y, x)."""
        logits = torch.einsum("bdyx,td->btyx", features, self.token_logits)
        values = torch.einsum("bdyx,de->beyx", features, self.token_values)
        tokens = window_tokens(logits, values, self.window)  # (B, T, dim, y, x)
        b, t, d, y, x = tokens.shape
        out = self.classify(tokens.permute(0, 3, 4, 1, 2).reshape(b * y * x, t, d))
        return out.reshape(b, y, x, -1).permute(0, 3, 1, 2)


def _with_norm(convolve: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution, in evaluation of it and the batch norm after it."""
    assert isinstance(convolve, nn.Conv2d | nn.Conv3d)
    assert isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)
    assert convolve.bias is not None
    if norm.training:
        return convolve.weight, convolve.bias
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = convolve.weight * scale.view(-1, *_ones(convolve.weight), 1)
    return weight, (convolve.bias - norm.running_mean) * scale + norm.bias


def batch_norm(x: Tensor, norm: nn.Module, weights: Tensor | None) -> Tensor:
    """Normalise features by the statistics of the patches of weighted spaxels.

    Parameters
    ----------
    x : (B, C, ..., Y, X)
    norm : BatchNorm2d or BatchNorm3d of C channels
        Its running statistics are updated; in evaluation it is applied as it is.
    weights : (B, y, x) or None
        A spaxel's window of features is (Y - y + 1, X - x + 1) wide. None: `norm` itself.

    Notes
    -----
    A position counts with the weights of all the spaxels that have it in their window: sums over
    a box. The spaxels of a cutout are alike, so a batch of few cutouts tells less of the mean than
    as many patches from everywhere do. Therefore features are normalised by the running averages
    (at once updated by this batch), as they will be in evaluation, while gradients pass through
    the batch's own statistics: batch renormalisation (Ioffe 2017, arXiv:1702.03275, section 3)
    without a bound on its r and d. The first averages are plain means over the batches so far;
    with a momentum of 1 all this is ordinary batch normalisation.
    """
    if weights is None or not norm.training:
        return norm(x)
    assert isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    dtype = norm.running_mean.dtype
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rows, columns = (x.shape[a] - weights.shape[a] for a in (-2, -1))
        counts = F.pad(weights.to(dtype), (columns, columns, rows, rows))[:, None]
        counts = F.avg_pool2d(counts, (rows + 1, columns + 1), stride=1)
        share = counts / (counts.sum() * x[0, 0, ..., 0, 0].numel())
        mean = _channel_sum(x, share)
        shift = mean.to(x.dtype)
        wide = x.float() if x.dtype == torch.float16 else x  # whose squares end at 65504
        centre = shift.to(wide.dtype).view(-1, *_ones(x)).expand_as(x)
        squares = F.mse_loss(wide, centre, reduction="none")  # in one pass
        variance = _channel_sum(squares, share) - (mean - shift).square()
        norm.num_batches_tracked.add_(1)
        momentum = norm.num_batches_tracked.to(dtype).reciprocal().clamp(min=norm.momentum)
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance, momentum)
        averages = norm.running_mean.clone(), norm.running_var.clone()
    batch = mean, (variance + norm.eps).rsqrt()
    return _Renormalise.apply(x, share, norm.weight, norm.bias, norm.eps, *averages, *batch)


def _ones(x: Tensor) -> tuple[int, ...]:
    """Axes of length 1 for all but the first two of x, so that (C, ...) spreads over it."""
    return (1,) * (x.ndim - 2)


def _channel_sum(x: Tensor, share: Tensor) -> Tensor:
    """Sum x (B, C, ..., Y, X) to (C,), positions of the cutouts counting share (B, 1, Y, X)."""
    maps = x.reshape(*x.shape[:2], -1, *x.shape[-2:]).sum(2, dtype=share.dtype)
    return (maps * share).sum((0, 2, 3))


class _Renormalise(torch.autograd.Function):
    """Normalise by given averages; the gradient is that of the batch's own statistics.

    With u = (x - batch mean) / batch sigma and z = (x - mean) / sigma, forward is y = w z + b.
    Backward is that of batch normalisation, in which r = batch sigma / sigma and the shift are
    constants: dx = w / sigma (dy - share (sum dy + u sum dy u)).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        share: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        mean: Tensor,
        variance: Tensor,
        batch_mean: Tensor,
        batch_inverse: Tensor,
    ) -> Tensor:
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, share, weight, mean, inverse, batch_mean, batch_inverse)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, share, weight, mean, inverse, batch_mean, batch_inverse = ctx.saved_tensors
        shape = (-1, *_ones(x))
        with_centred, total = _norm_sums(x, dy, batch_mean)
        by_u = with_centred * batch_inverse
        by_z = (with_centred + (batch_mean - mean) * total) * inverse
        scale = weight * inverse
        slope = -scale * by_u * batch_inverse
        constant = -scale * total
        if x.dtype == mean.dtype:
            constant -= slope * batch_mean
        else:  # too coarse a number for a difference of large ones
            x = x - batch_mean.view(shape).to(x.dtype)
        spread = share.view(len(x), *_ones(x)[:-1], *x.shape[-2:])
        slope, constant = ((spread * part.view(shape)).to(x.dtype) for part in (slope, constant))
        dx = torch.addcmul(constant, x, slope).addcmul_(dy, scale.view(shape).to(x.dtype))
        return dx, None, by_z, total, None, None, None, None, None


def _norm_sums(x: Tensor, dy: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sum dy (x - mean), and dy, over all but the channels of (B, C, ..., Y, X), (C,) each.

    Those are the gradients of an evaluated batch norm's weight and bias if the variance is 1, and
    torch takes both in one pass. Bands go as channels of their own: GPUs give each channel to one
    multiprocessor.
    """
    bands = x[0, 0, ..., 0, 0].numel()
    x, dy = (part.reshape(len(part), -1, *part.shape[-2:]) for part in (x, dy))
    means = mean.repeat_interleave(bands)
    ones = torch.ones_like(means)
    _, *sums = torch.ops.aten.native_batch_norm_backward(  # CUDA wants both means
        dy, x, ones, means, ones, means, ones, False, 0.0, [False, True, True]
    )
    with_centred, total = (part.view(-1, bands).sum(1) for part in sums)
    return with_centred, total


def window_tokens(logits: Tensor, values: Tensor, window: int) -> Tensor:
    """Gather values over every window by a softmax over the window's positions.

    Parameters
    ----------
    logits : (B, T, Y, X)
    values : (B, dim, Y, X)
    window : int
        Side w of the square windows.

    Returns
    -------
    (B, T, dim, Y - w + 1, X - w + 1)

    Notes
    -----
    The softmax over a window is a ratio of two box sums, sum(exp(a) v) / sum(exp(a)), and box
    sums are built from sums over smaller boxes. Here each box carries the maximum m of its
    logits, the sum s of exp(a - m), and its weighted mean of v. Two boxes join by rescaling both
    sums to the larger maximum, and their means mix in the ratio of the sums. So no exponential
    over- or underflows in any window, however far the logits of a map lie apart, and the means
    stay within the values, in any precision. A window of w takes about 4 log2(w) joins.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))[:, :, None]
    top = exact.detach()  # the result does not depend on it, so gradients need not pass it
    boxes = Boxes(top, (exact - top).exp(), values[:, None])  # one mean for all tokens until joined
    for axis in (3, 4):
        boxes = _grow(boxes, window, axis)
    return boxes.mean.expand(-1, logits.shape[1], -1, -1, -1)


class Boxes(NamedTuple):
    """Running softmax over boxes of positions; a box's first position indexes it."""

    top: Tensor
    """(B, T, 1, Y, X) largest logit."""
    total: Tensor
    """(B, T, 1, Y, X) sum of exp(logit - top), between 1 and the number of positions."""
    mean: Tensor
    """(B, T, dim, Y, X) weighted mean of the values."""

    def from_to(self, axis: int, first: int, count: int) -> Boxes:
        """Take `count` boxes along an axis."""
        return Boxes(*(part.narrow(axis, first, count) for part in self))


def _grow(boxes: Boxes, size: int, axis: int) -> Boxes:
    """Join each run of `size` boxes along an axis."""
    if size == 1:
        return boxes
    half = _grow(boxes, size // 2, axis)
    whole = _join(half, half, size // 2, axis)
    return _join(whole, boxes, size - 1, axis) if size % 2 else whole


def _join(first: Boxes, second: Boxes, shift: int, axis: int) -> Boxes:
    """Join the boxes at i with the second kind at i + shift."""
    count = second.top.shape[axis] - shift
    first, second = first.from_to(axis, 0, count), second.from_to(axis, shift, count)
    top = torch.maximum(first.top, second.top)
    one = first.total * (first.top - top).exp()
    total = one + second.total * (second.top - top).exp()
    share = (one / total).to(first.mean.dtype)
    return Boxes(top, total, torch.lerp(second.mean, first.mean, share))


def get_SSFTT_model(
    n_classes: int = 6,
    patch_size: int = 7,
    bands: int = 2040,
    n_tokens: int = 4,
    dim: int = 64,
    heads: int = 8,
    mlp_dim: int = 8,
    channels: int = 8,
    dropout: float = 0.1,
    spectral_kernel: int = 3,
    spectral_stride: int = 1,
    projection: int | None = None,
) -> SSFTT:
    """Make the network; the defaults are MaNGA's fiducial model (9,414,654 parameters).

    Parameters
    ----------
    n_classes : int
    patch_size : int
        P. Under 5 both convolutions are 1x1 in space.
    bands : int
        Bands (or principal components) of the patches.
    n_tokens, dim, heads, mlp_dim : int
        Tokens beside the class token, width of all of them, heads of the attention, hidden width
        of the transformer's MLP.
    channels : int
        Filters of the first, three-dimensional convolution.
    dropout : float
    spectral_kernel, spectral_stride : int
        Of the first convolution along the bands. 16 and 16 need a fifteenth of the parameters and
        about a tenth of the time of the fiducial 3 and 1.
    projection : int, optional
        First project the bands on so many learned components (a 1x1 convolution); the spectral
        kernel and stride then apply to these. `SSFTT.start_projection` gives it a start.

    Raises
    ------
    DataError
        If the numbers cannot make a network.
    """
    numbers = {
        "classes": n_classes,
        "patch size": patch_size,
        "bands": bands,
        "tokens": n_tokens,
        "width": dim,
        "heads": heads,
        "hidden width": mlp_dim,
        "channels": channels,
        "spectral kernel": spectral_kernel,
        "spectral stride": spectral_stride,
    }
    for name, number in numbers.items():
        if number < 1:
            raise DataError(f"{name} {number}: must be at least 1.")
    if projection is not None and not 1 <= projection <= bands:
        raise DataError(f"projection of {bands} bands on {projection}: choose 1 to {bands}.")
    if (projection or bands) < spectral_kernel:
        raise DataError(
            f"{projection or bands} bands: the spectral kernel of {spectral_kernel} needs as many."
        )
    if dim % heads:
        raise DataError(f"width {dim} does not divide among {heads} heads.")
    arguments: dict[str, Any] = {
        "n_classes": n_classes,
        "patch_size": patch_size,
        "bands": bands,
        "n_tokens": n_tokens,
        "dim": dim,
        "heads": heads,
        "mlp_dim": mlp_dim,
        "channels": channels,
        "dropout": dropout,
        "spectral_kernel": spectral_kernel,
        "spectral_stride": spectral_stride,
        "projection": projection,
    }
    model = SSFTT(**arguments)
    model.arguments = arguments
    return model


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
