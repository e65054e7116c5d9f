"""The spectral-spatial feature tokenization transformer (SSFTT) of Sun et al. 2022, patch by patch.

Input   patches (N, 1, band, P, P) of normalised spectra; the spaxel at [P//2, P//2] is classified.
Output  logits (N, classes).

Two convolutions extract local features, a softmax over the patch's positions condenses them into a
few tokens, and one transformer block lets a class token attend to these. Nothing inside pads its
input. SSFTT_dense.py evaluates the same network on whole maps and cutouts.

Source: Sun, Zhao, Zheng & Wu 2022, IEEE TGRS 60, 5522214, doi:10.1109/TGRS.2022.3144158, and the
layer sizes of their public demo; written from the text, without their code.

    >>> model = get_SSFTT_model(n_classes=6, patch_size=7, bands=2040)
    >>> logits = model(patches)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from utils import DataError

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

SMALLEST_CONVOLVED = 5
"""Smallest patch that two 3x3 convolutions without padding fit into; below, they are 1x1."""


@dataclass(frozen=True)
class SSFTTConfig:
    """Sizes of the network; the defaults are MaNGA's fiducial model (9,414,654 parameters)."""

    n_classes: int = 6
    """Number of classes."""
    patch_size: int = 7
    """Width P of a patch in spaxels. Below 5 both convolutions are 1x1 in space."""
    bands: int = 2040
    """Bands (or principal components) of a spectrum."""
    n_tokens: int = 4
    """Tokens besides the class token."""
    dim: int = 64
    """Width of features and tokens."""
    heads: int = 8
    """Heads of the attention; must divide `dim`."""
    mlp_dim: int = 8
    """Hidden width of the transformer's MLP."""
    channels: int = 8
    """Filters of the first, three-dimensional convolution."""
    dropout: float = 0.1
    """Dropout probability of tokens, attention output and MLP."""
    spectral_kernel: int = 3
    """Length along the bands of the first convolution's filters."""
    spectral_stride: int = 1
    """Stride along the bands of the first convolution. Kernel and stride 16 need a fifteenth of
    the fiducial parameters and about a tenth of the time."""
    projection: int | None = None
    """If set, a learned projection reduces the bands to this number of components first; the
    spectral kernel and stride then apply to the components."""

    def __post_init__(self) -> None:
        """Raise a DataError if no network has these sizes."""
        counts = [name for name in vars(self) if name not in ("dropout", "projection")]
        limits = [(name, getattr(self, name) >= 1, "at least 1") for name in counts]
        projection = 1 if self.projection is None else self.projection
        components = f"{self.components} (bands or projection)"
        limits += [
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("projection", 1 <= projection <= self.bands, f"1 to {self.bands} (bands)"),
            ("spectral_kernel", self.spectral_kernel <= self.components, f"at most {components}"),
            ("dim", self.dim % max(1, self.heads) == 0, f"a multiple of {self.heads} (heads)"),
        ]
        for name, holds, expected in limits:
            if not holds:
                found = f"SSFTT: {name} is {getattr(self, name)}, expected {expected}"
                raise DataError(f"{found}. Choose another {name}.")

    @property
    def components(self) -> int:
        """Bands that the first convolution receives."""
        return self.projection or self.bands

    @property
    def spatial_kernel(self) -> int:
        """Width of both convolutions in space."""
        return 3 if self.patch_size >= SMALLEST_CONVOLVED else 1

    @property
    def window(self) -> int:
        """Width of a patch's map of features, after both convolutions."""
        return self.patch_size - 2 * (self.spatial_kernel - 1)

    @property
    def spectral_bands(self) -> int:
        """Bands that the first convolution leaves."""
        return (self.components - self.spectral_kernel) // self.spectral_stride + 1

    @property
    def folded_channels(self) -> int:
        """Channels of the second convolution's input: filters and bands of the first, folded."""
        return self.channels * self.spectral_bands


class ClassTokenBlock(nn.Module):
    """One pre-norm transformer encoder block, evaluated for the class token only.

    Multi-head attention as in Vaswani et al. 2017 (arXiv:1706.03762), section 3.2. The head reads
    only the class token and there is one block, so the other tokens serve as keys and values and
    their own outputs are never needed.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = dim**-0.5  # as published: the whole width, not the width of one head
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
        normalised = self.norm_attention(tokens)
        q = rearrange(self.to_q(normalised[:, 0]), "n (h d) -> n 1 h d", h=self.heads)
        kv = rearrange(self.to_kv(normalised), "n t (kv h d) -> kv n t h d", kv=2, h=self.heads)
        k, v = kv.unbind(0)
        # for one query, sums of products take half the time of a batched matrix product
        weights = ((q * k).sum(-1, keepdim=True) * self.scale).softmax(1)  # (N, T, h, 1)
        attended = rearrange((weights * v).sum(1), "n h d -> n (h d)")
        out = tokens[:, 0] + self.dropout(self.project(attended))
        return out + self.mlp(self.norm_mlp(out))


class SSFTT(nn.Module):
    """The network, patch by patch. Its attribute `config` holds its sizes."""

    def __init__(self, config: SSFTTConfig) -> None:
        super().__init__()
        self.config = config
        dim, n_tokens, kernel = config.dim, config.n_tokens, config.spatial_kernel
        components = config.projection
        self.projection = nn.Conv2d(config.bands, components, 1) if components else None
        cuboid, stride = (config.spectral_kernel, kernel, kernel), (config.spectral_stride, 1, 1)
        self.spectral = nn.Sequential(
            nn.Conv3d(1, config.channels, cuboid, stride),
            nn.BatchNorm3d(config.channels),
            nn.ReLU(inplace=True),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(config.folded_channels, dim, kernel),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
        )
        # drawn with a leading axis of 1, which sets the deviation: docs/science_choices.md,
        # "Initial weights"
        self.token_logits = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, n_tokens, dim))[0])
        self.token_values = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, dim, dim))[0])
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, n_tokens + 1, dim) * 0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.block = ClassTokenBlock(dim, config.heads, config.mlp_dim, config.dropout)
        self.head = nn.Linear(dim, config.n_classes)

    @torch.no_grad()
    def start_projection(self, components: Tensor, mean: Tensor) -> None:
        """Start the learned projection as that on components (projection, band).

        The mean spectrum (band,) is projected to zero.
        """
        assert self.projection is not None
        assert self.projection.bias is not None
        self.projection.weight.copy_(rearrange(components, "k band -> k band 1 1"))
        self.projection.bias.copy_(-components @ mean)

    def project(self, x: Tensor) -> Tensor:
        """Apply the learned projection if there is one: (N, 1, band, y, x) -> (N, 1, K, y, x).

        The result is contiguous. Loaders keep the bands innermost in memory, which the first
        convolution would otherwise copy in its forward and again in its backward pass.
        """
        if self.projection is None:
            return x.contiguous()
        with torch.autocast(x.device.type, enabled=False):  # it sums terms that nearly cancel
            spectra = x.squeeze(1).to(self.projection.weight.dtype)
            return self.projection(spectra).unsqueeze(1)

    def features(self, x: Tensor) -> Tensor:
        """Spectral and spatial convolutions, each with batch norm and ReLU.

        (N, 1, band, y, x) -> (N, dim, y - P + window, x - P + window). Sun et al. 2022,
        "spectral-spatial feature extraction".
        """
        return self.spatial(rearrange(self.spectral(self.project(x)), "n c b y x -> n (c b) y x"))

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, dim) of N spaxels -> logits (N, classes)."""
        first = repeat(self.class_token, "1 1 d -> n 1 d", n=len(tokens))
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

        Notes
        -----
        The "Gaussian weighted feature tokenizer" of Sun et al. 2022: features X (positions, dim),
        attention A = softmax(X W_a^T) over the positions, tokens A^T (X W_v). W_a (tokens, dim)
        and W_v (dim, dim) are drawn from Gaussians at the start, hence its name.
        """
        x = rearrange(self.features(patches), "n d y x -> n (y x) d")
        attention = (x @ self.token_logits.T).softmax(dim=1)  # (N, positions, tokens)
        values = x @ self.token_values
        return self.classify(rearrange(attention, "n p t -> n t p").to(values.dtype) @ values)


def get_SSFTT_model(
    n_classes: int | None = None, *sizes: int, num_classes: int | None = None, **named: Any
) -> SSFTT:
    """Make the network from the fields of `SSFTTConfig`: in its order, by name, or its defaults.

    `num_classes` is another name of `n_classes`.

    Raises
    ------
    DataError
        If no network has these sizes, or if n_classes and num_classes differ.
    """
    if None not in (n_classes, num_classes) and n_classes != num_classes:
        raise DataError(
            f"SSFTT: n_classes is {n_classes} and num_classes {num_classes}, expected the same "
            "number, as both mean the number of classes. Give one of them."
        )
    if n_classes is None:
        n_classes = SSFTTConfig.n_classes if num_classes is None else num_classes
    return SSFTT(SSFTTConfig(n_classes, *sizes, **named))


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
