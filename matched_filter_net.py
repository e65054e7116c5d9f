"""A network of matched filters and local attention, from spectra with their errors to labels.

Input   continuum-subtracted spectra and their weights, and broad continuum colours;
        `prepare_spectra` makes them from flux and inverse variance, and `join` puts them side by
        side, so that they are stored and cut like the bands of any other normalised cube.
Output  for each spaxel either a value and the logarithm of its scale, standardised (`in_units`), or
        the logits of classes; and how unlike the training spaxels it is (`unlikeness`).

Each spaxel's spectrum is measured by a few learned filters, as an optimal extraction measures a
line: with residual r, weights w (inverse variances) and filter f, the amplitude is
sum(f w r) / sum(f^2 w) (Horne 1986, PASP 98, 609, eq. 8). These sums are kept apart, because they
add over spaxels: local attention adds those of the neighbours, in several heads of different
reach, and only then takes logarithms. Line ratios are thus differences of features, and faint
lines are added up before they are divided. The squares of these ratios are features, too, so that
the start in closed form need not be linear. The spaxel's own features bypass the attention.

The network pads nowhere inside and looks at a neighbour only through its sums, so the answer for a
spaxel is the same on its window, a cutout or a whole map. Spaxels without weight, such as those
beyond the field of view, are ignored.

    >>> spectra = prepare_spectra(flux, ivar)              # flux, ivar: (y, x, band)
    >>> model = MatchedFilterNet(MatchedFilterConfig(bands=flux.shape[-1]))
    >>> model.start_filters(spectra.residual[some], spectra.weight[some])
    >>> out = model.map(*spectra)                          # (y, x, 3)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from utils import DataError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed

BLOCK = 25
"""Bins per block in which the median is taken for the continuum: 37 Angstrom at Halpha."""
BLOCKS_JOINED = 5
"""Blocks whose medians are joined by a running median; lines fill at most two of them."""
COLOURS = 17
"""Broad bands of the continuum that the network sees."""
LARGEST_WEIGHT = 6e4
"""Weights are stored as float16, which ends at 65504."""
LINE_SIGMA = 1.25
"""Width in bins (sigma) of the Gaussians that filters start from: 86 km/s on the default grid."""
EPS = 1e-12
LOG_SCALES = (-5.0, 3.0)
"""Range of the logarithm of the scale, in units of the training labels' deviation."""
USUAL_SHARE = 0.01
"""Share of a training step in the running mean and covariance of features."""
LOGISTIC_STRENGTH = 10.0
"""Penalty of the logistic regression from which classes start."""
SMALLEST_DEVIATION = 1e-3
"""Deviation that labels have at least, in their unit."""
ABSENT = -20.0
"""Logit at the start of classes without a training spaxel."""
STRENGTHS = ((1e-3,), (1e-3, 0.1, 10.0), (1e-3, 0.1, 10.0), (0.01, 1.0, 100.0))
"""Strengths of the ridge regressions that are averaged, per sample: for a spaxel's own amplitudes,
its other features, its neighbours' features, and the squares of their line ratios."""


class Spectra(NamedTuple):
    """Input of the network, all float32 or float16, finite."""

    residual: Tensor
    """(..., band) flux minus continuum, over the spaxel's mean flux; 0 in gaps."""
    weight: Tensor
    """(..., band) inverse variance of the residual; 0 in gaps and for unusable spaxels."""
    colour: Tensor
    """(..., COLOURS) continuum in broad bands, over the spaxel's mean flux."""


@dataclass(frozen=True)
class MatchedFilterConfig:
    """Sizes of the network."""

    bands: int = 2040
    """Bins of a spectrum."""
    classes: int = 0
    """Number of classes to tell apart; 0: a value and its scale."""
    colours: int = COLOURS
    """Broad bands, and whatever else of a spaxel is given in `Spectra.colour`."""
    lines: int = 12
    """Places in the spectrum that filters start from, at least two, in training as many as there
    are known lines in range; two filters at each, with and without side bands."""
    half_width: int = 60
    """Half-width in bins of the part of the spectrum that a filter sees."""
    reaches: tuple[float, ...] = (0.8, 1.5, 2.5, 4.0)
    """Reach (sigma, spaxels) that each head of the attention starts with."""
    window: int = 7
    """Width of the neighbourhood in spaxels, odd; 1: the spaxel alone."""
    key: int = 8
    """Width of queries and keys of each head."""
    hidden: int = 64
    """Width of the hidden layers."""
    dropout: float = 0.1
    """Dropout probability in the hidden layers."""

    def __post_init__(self) -> None:
        """Raise a DataError if no network has these sizes."""
        for name in ("bands", "lines", "key", "hidden", "window"):
            least = 2 if name == "lines" else 1  # a ratio needs two
            if getattr(self, name) < least:
                raise DataError(
                    f"matched filters: {name} is {getattr(self, name)}, expected at least {least}. "
                    f"Choose another {name}."
                )
        if self.window % 2 == 0:
            raise DataError(
                f"matched filters: window is {self.window}, expected an odd number, so that there "
                "is a spaxel in the middle. Choose another window."
            )

    @property
    def filters(self) -> int:
        """Number of filters."""
        return 2 * self.lines

    @property
    def own_features(self) -> int:
        """Features of a spaxel itself."""
        return 2 * self.filters + self.colours + 1

    @property
    def near_features(self) -> int:
        """Features of a spaxel's neighbourhood."""
        return len(self.reaches) * 2 * self.filters

    @property
    def squares(self) -> int:
        """Squares of line ratios: one for each pair of lines and each head."""
        return len(self.reaches) * math.comb(self.lines, 2)

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a spaxel."""
        return self.classes or 2


# Spectra to input


def continuum_nodes(flux: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Continuum in blocks of BLOCK bins: medians, then a running median over BLOCKS_JOINED blocks.

    Parameters
    ----------
    flux : (N, band) array
    good : (N, band) bool

    Returns
    -------
    (N, block) float32; blocks without a good bin are bridged, 0 if there is none.
    """
    n, bands = flux.shape
    blocks = math.ceil(bands / BLOCK)
    padded = np.full((n, blocks * BLOCK), np.nan, np.float32)
    padded[:, :bands] = np.where(good, flux, np.nan)
    medians = torch.from_numpy(padded).view(n, blocks, BLOCK).nanmedian(2).values
    edge = BLOCKS_JOINED // 2
    wide = F.pad(medians[:, None], (edge, edge), mode="replicate")[:, 0]
    nodes = wide.unfold(1, BLOCKS_JOINED, 1).nanmedian(2).values.numpy()
    gaps = ~np.isfinite(nodes)
    at = np.arange(blocks)
    for row in np.flatnonzero(gaps.any(axis=1)):
        gap = gaps[row]
        nodes[row, gap] = 0 if gap.all() else np.interp(at[gap], at[~gap], nodes[row, ~gap])
    return nodes


def prepare_spectra(flux: np.ndarray, ivar: np.ndarray) -> Spectra:
    """Subtract the continuum and scale each spectrum by its own brightness.

    Parameters
    ----------
    flux : (..., band) array
        NaN in gaps.
    ivar : (..., band) array
        Inverse variance of the flux; 0 in gaps.

    Returns
    -------
    Spectra
        float16, colours float32. The scale is the mean flux, added in quadrature to its error so
        that it is never near zero. Multiplying the flux by a number changes nothing.

    Raises
    ------
    DataError
        If flux and ivar differ in shape.
    """
    if flux.shape != ivar.shape:
        raise DataError(
            f"matched filters: flux of {flux.shape} and ivar of {ivar.shape}, expected the same "
            "shape. Read both from the same cube."
        )
    shape, bands = flux.shape, flux.shape[-1]
    flux, ivar = flux.reshape(-1, bands), ivar.reshape(-1, bands)
    good = np.isfinite(flux) & (ivar > 0)
    values = np.where(good, flux, 0).astype(np.float32)
    weight = np.where(good, ivar, 0).astype(np.float32)
    count = np.maximum(good.sum(axis=1), 1)
    variance = np.divide(1, weight, out=np.zeros_like(weight), where=good).sum(axis=1) / count**2
    scale = np.sqrt((values.sum(axis=1) / count) ** 2 + variance)[:, None]
    scale[scale == 0] = 1  # spectra without a good bin
    nodes = continuum_nodes(flux, good)
    middle = np.arange(nodes.shape[1]) * BLOCK + (BLOCK - 1) / 2
    place = np.clip((np.arange(bands) - middle[0]) / BLOCK, 0, nodes.shape[1] - 1)
    low = np.minimum(place.astype(int), max(nodes.shape[1] - 2, 0))
    high = np.minimum(low + 1, nodes.shape[1] - 1)
    share = (place - low).astype(np.float32)
    continuum = nodes[:, low] * (1 - share) + nodes[:, high] * share
    residual = np.where(good, values - continuum, 0) / scale
    ends = np.linspace(0, nodes.shape[1], COLOURS + 1).round().astype(int)
    starts = np.minimum(ends[:-1], nodes.shape[1] - 1)  # few blocks serve several colours
    pairs = zip(starts, np.maximum(ends[1:], starts + 1), strict=True)
    colour = np.stack([nodes[:, a:b].mean(axis=1) for a, b in pairs], axis=1) / scale
    residual = residual.clip(-LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.float16)
    weight = np.minimum(weight * scale**2, LARGEST_WEIGHT).astype(np.float16)
    out = (residual, weight, colour.astype(np.float32))
    return Spectra(*(torch.from_numpy(part.reshape(*shape[:-1], -1)) for part in out))


def join(spectra: Spectra) -> Tensor:
    """Put residual, weight and colour side by side, (..., 2 * band + COLOURS) float16."""
    return torch.cat([part.half() for part in spectra], -1)


def joined_size(bands: int) -> int:
    """Length of the row that `join` makes of a spectrum with this number of bins."""
    return 2 * bands + COLOURS


def split(rows: Tensor) -> Spectra:
    """Undo `join`."""
    bands = (rows.shape[-1] - COLOURS) // 2
    return Spectra(*rows.split([bands, bands, COLOURS], -1))


# Network


def log_amplitude(n: Tensor, d: Tensor) -> Tensor:
    """Logarithm of amplitudes that stays finite in the noise, and their signal-to-noise ratio.

    Parameters
    ----------
    n, d : (..., filter)
        sum(f w r) and sum(f^2 w); the amplitude is n/d, its error s = d**-1/2.

    Returns
    -------
    (..., 2 filter)
        asinh(n/d / 2s) + log s: the logarithm of the amplitude where it exceeds the noise, linear
        in it below (Lupton, Gunn & Szalay 1999, AJ 118, 1406, with the error as softening); then
        asinh of the signal-to-noise ratio.
    """
    error = (d + EPS).rsqrt()
    ratio = n * error
    return torch.cat([torch.asinh(ratio / 2) + torch.log(error), torch.asinh(ratio)], -1)


class Standardise(nn.Module):
    """Shift and scale features by their mean and deviation over some training spaxels."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.is_fitting = False
        """Whether to take mean and deviation from the features that come next."""

    def forward(self, x: Tensor) -> Tensor:
        """Standardise features (N, features), to at most 6 deviations from the mean."""
        if self.is_fitting:
            self.mean.copy_(x.mean(0))
            self.std.copy_(x.std(0) + 1e-3)
        return ((x - self.mean) / self.std).clamp(-6, 6)


class SpaxelSums(NamedTuple):
    """What a spaxel offers its neighbours, and its own features."""

    n: Tensor
    """(..., filter) sum(f w r)."""
    d: Tensor
    """(..., filter) sum(f^2 w)."""
    level: Tensor
    """(...,) logarithm of the mean weight: brightness over noise, squared."""
    features: Tensor
    """(..., own_features)."""


class MatchedFilterNet(nn.Module):
    """The network. Its attribute `config` holds its sizes."""

    support: Tensor
    target_mean: Tensor
    target_std: Tensor
    usual_mean: Tensor
    usual_covariance: Tensor

    def __init__(self, config: MatchedFilterConfig) -> None:
        super().__init__()
        self.config = config
        heads, own, half = len(config.reaches), config.own_features, config.window // 2
        self.filters = nn.Parameter(torch.randn(config.bands, config.filters))
        self.register_buffer("support", torch.ones(config.bands, config.filters))
        self.register_buffer("target_mean", torch.zeros(()))
        self.register_buffer("target_std", torch.ones(()))
        self.register_buffer("usual_mean", torch.zeros(own))
        self.register_buffer("usual_covariance", torch.eye(own))
        self.stars = nn.Linear(config.colours, config.filters)
        """Amplitude that the stars' continuum leaves in each filter."""
        nn.init.zeros_(self.stars.weight)
        nn.init.zeros_(self.stars.bias)
        self.norm = Standardise(own)
        y, x = torch.meshgrid(*[torch.arange(-half, half + 1.0)] * 2, indexing="ij")
        distance = (y**2 + x**2).flatten()[:, None]
        self.positions = nn.Parameter(-0.5 * distance / torch.tensor(config.reaches) ** 2)
        # weights are brightness squared over noise; adding up flux needs brightness to the first
        self.brightness = nn.Parameter(torch.full((heads,), 0.5))
        self.query = nn.Linear(own, heads * config.key)
        self.key = nn.Linear(own, heads * config.key, bias=False)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.normal_(self.key.weight, std=0.05)
        self.norm_near = Standardise(config.near_features)
        self.norm_squares = Standardise(config.squares)
        total = own + config.near_features + config.squares
        self.linear = nn.Linear(total, config.outputs)
        drop, hidden = nn.Dropout(config.dropout), config.hidden
        last = nn.Linear(hidden, config.outputs)
        layers = (drop, nn.Linear(total, hidden), nn.GELU(), drop, nn.Linear(hidden, hidden))
        self.correction = nn.Sequential(*layers, nn.GELU(), drop, last)
        for part in (self.linear, last):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    @property
    def profiles(self) -> Tensor:
        """Filters as they are applied to spectra, (band, filter)."""
        return 4 * F.normalize(self.filters * self.support, dim=0)

    def measure(self, residual: Tensor, weight: Tensor, colour: Tensor) -> SpaxelSums:
        """Apply the filters to spectra (..., band), each spaxel on its own."""
        filters = self.profiles
        residual, weight, colour = (p.to(filters.dtype) for p in (residual, weight, colour))
        d = weight @ filters.square()
        n = (residual * weight) @ filters + 0.05 * self.stars(colour) * d
        return self.sums(n, d, colour, torch.log(weight.mean(-1) + 1e-6))

    def sums(self, n: Tensor, d: Tensor, colour: Tensor, level: Tensor) -> SpaxelSums:
        """Features of spaxels from what the filters measured, as in `SpaxelSums`."""
        features = torch.cat([log_amplitude(n, d), colour, level[..., None]], -1)
        return SpaxelSums(n, d, level, self.norm(features))

    def features(self, sums: SpaxelSums, near: Tensor, centre: Tensor) -> Tensor:
        """Features of spaxels from their own and their neighbours' sums.

        Parameters
        ----------
        sums : SpaxelSums
            Of N spaxels, one row each.
        near : (Q, P*P) int64
            Rows of the spaxels around each of Q spaxels, row by row; -1 where there is none.
        centre : (Q,) int64
            Rows of these spaxels themselves.

        Returns
        -------
        (Q, features)
        """
        # F.embedding: on several threads, indexing adds up gradients in an order that varies
        own = F.embedding(centre, sums.features)
        if self.training and (moments := distributed.moments(own.detach())):
            self.usual_mean.lerp_(moments[0], USUAL_SHARE)
            self.usual_covariance.lerp_(moments[1], USUAL_SHARE)
        around = near.clamp(min=0)
        n, d, level, keys = (
            F.embedding(around, part)
            for part in (sums.n, sums.d, sums.level[:, None], self.key(sums.features))
        )
        return self.combine(own, n, d, level, keys, near >= 0)

    def combine(
        self, own: Tensor, n: Tensor, d: Tensor, level: Tensor, keys: Tensor, is_there: Tensor
    ) -> Tensor:
        """Join a spaxel's own features (Q, own) and those of its neighbours (Q, P*P, ...)."""
        heads, key = len(self.config.reaches), self.config.key
        query = self.query(own).view(-1, 1, heads, key)
        logits = self.positions - self.brightness * level
        logits = logits + (query * keys.unflatten(-1, (heads, key))).sum(-1) / key**0.5
        attention = logits.masked_fill(~is_there[..., None], -torch.inf).softmax(1)
        attention = attention.transpose(1, 2)  # (Q, head, P*P)
        spread = attention.square() @ d  # variance of n; of one spaxel it equals d
        n, d = attention @ n, attention @ d  # (Q, head, filter)
        ratio = d / (spread + EPS)
        pooled = self.norm_near(log_amplitude(n * ratio, d * ratio).flatten(1))
        lines = pooled.unflatten(1, (heads, -1))[..., : self.config.lines]
        pairs = itertools.combinations(lines.unbind(-1), 2)
        squares = torch.stack([(a - b).square() for a, b in pairs], -1).flatten(1)
        return torch.cat([own, pooled, self.norm_squares(squares)], 1)

    def answer(self, features: Tensor) -> Tensor:
        """Answer (Q, outputs) from `features`: standardised value and log scale, or logits."""
        return self.linear(features) + self.correction(features)

    def unlikeness(self, features: Tensor) -> Tensor:
        """How unlike the training spaxels some are, (Q,), from `features`.

        The squared Mahalanobis distance of a spaxel's own features from those of training
        (Mahalanobis 1936), over their number: 1 on average if they are alike.
        """
        own = features[:, : self.config.own_features] - self.usual_mean
        identity = torch.eye(own.shape[1], dtype=own.dtype, device=own.device)
        # _ex: without an error where weights have diverged, which the loss shows
        root, _ = torch.linalg.cholesky_ex(self.usual_covariance + 1e-3 * identity)
        return torch.linalg.solve_triangular(root, own.T, upper=False).square().mean(0)

    def map(
        self, residual: Tensor, weight: Tensor, colour: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """Answer for every spaxel of maps.

        Parameters
        ----------
        residual, weight, colour : (..., y, x, band or colour)
            As in `Spectra`. Weights of unusable spaxels are 0.
        wanted : (..., y, x) bool, optional
            Answer only for these; the others are their neighbours.

        Returns
        -------
        (..., y, x, outputs + 1)
            As `answer` gives it, then `unlikeness`. NaN for spaxels that are unusable or not
            wanted.
        """
        ny, nx = weight.shape[-3:-1]
        usable = (weight > 0).any(-1).reshape(-1, ny, nx)
        rows = usable.flatten().nonzero()[:, 0]
        # the last element stands for the neighbours that do not exist
        place = rows.new_full((usable.numel() + 1,), -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        sums = self.measure(*(p.flatten(0, -2)[rows] for p in (residual, weight, colour)))
        chosen = usable if wanted is None else usable & wanted.reshape(usable.shape)
        centre = chosen.flatten().nonzero()[:, 0]
        near = place[neighbours(usable, self.config.window)[centre]]
        features = self.features(sums, near, place[centre])
        unlike = features.new_zeros(len(features))  # in training nobody asks
        unlike = unlike if self.training else self.unlikeness(features)
        answers = torch.cat([self.answer(features), unlike[:, None]], 1)
        out = answers.new_full((usable.numel(), answers.shape[1]), torch.nan)
        out[centre] = answers
        return out.view(*weight.shape[:-1], -1)

    def dense(self, fields: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Answer for every spaxel of fields laid out like patches.

        Parameters
        ----------
        fields : (N, 1, C, y, x)
            `join`ed spectra.
        wanted : (N, y, x) bool, optional

        Returns
        -------
        (N, outputs + 1, y, x), as `map`.
        """
        return self.map(*split(fields[:, 0].movedim(1, -1)), wanted).movedim(-1, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Answer for the middle of patches (N, 1, C, P, P): (N, outputs + 1)."""
        middle = patches.shape[-1] // 2
        wanted = patches.new_zeros(len(patches), *patches.shape[3:], dtype=torch.bool)
        wanted[:, middle, middle] = True
        return self.dense(patches, wanted)[:, :, middle, middle]

    def in_units(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Value and scale (mean absolute deviation) in the labels' unit, from (..., outputs)."""
        return (
            out[..., 0] * self.target_std + self.target_mean,
            out[..., 1].clamp(*LOG_SCALES).exp() * self.target_std,
        )

    # Starting values

    @torch.no_grad()
    def start_filters(
        self,
        residual: Tensor,
        weight: Tensor,
        places: Sequence[Sequence[tuple[float, float]]] = (),
    ) -> list[float]:
        """Start the filters as Gaussians at the places where training spectra vary most.

        Half of the filters are plain Gaussians, half have side bands that make them blind to a
        linear continuum and to the other lines within reach.

        Parameters
        ----------
        residual, weight : (N, band)
            Of some training spectra.
        places : sequence of lines, optional
            Where to start instead, for example at known lines: bins and relative strengths of
            Gaussians that belong together, the strongest first.

        Returns
        -------
        list of float
            The (first) bins; they are repeated if there are fewer than `lines`.
        """
        config, bins = self.config, torch.arange(self.config.bands, dtype=torch.float64)
        if not places:
            excess = (weight.float() * residual.float().square()).mean(0) - 1
            excess = F.avg_pool1d(excess[None], 5, 1, 2, count_include_pad=False)[0]
            while len(places) < config.lines:
                peak = int(excess.argmax())
                places = [*places, [(float(peak), 1.0)]]
                excess[max(0, peak - 6) : peak + 7] = -torch.inf
        centres = [place[0][0] for place in places]
        lines = []
        for place in places:
            at, strength = torch.tensor(place, dtype=bins.dtype).T[..., None]
            lines.append((strength * torch.exp(-0.5 * ((bins - at) / LINE_SIGMA) ** 2)).sum(0))
        for k in range(config.filters):
            which = k % config.lines % len(places)
            seen = (bins - centres[which]).abs() <= config.half_width
            line = lines[which] * seen
            if k >= config.lines:
                others = [
                    other
                    for other, c in zip(lines, centres, strict=True)
                    if abs(c - centres[which]) > 1.5 and (other * seen).max() > 0.01
                ]
                nuisance = torch.stack([torch.ones_like(bins), bins - centres[which], *others], 1)
                nuisance = nuisance * seen[:, None]
                line = line - nuisance @ torch.linalg.lstsq(nuisance, line[:, None]).solution[:, 0]
            self.filters[:, k], self.support[:, k] = line.float(), seen.float()
        return centres

    @torch.no_grad()
    def start_head(
        self, batches: Iterable[tuple[Spectra, Tensor, Tensor]], target: Tensor, galaxy: Tensor
    ) -> None:
        """Fit the normalisation and the linear part of the head in closed form.

        From here, training improves on ridge regressions of the features (`ridge_by_galaxy`), with
        a scale that follows brightness over noise, or for classes on a logistic regression.

        Parameters
        ----------
        batches : iterable of (spectra, near, centre)
            Spectra (N, band) and, as in `features`, the spaxels to learn from; the normalisation
            is that of the first batch.
        target : (Q,)
            Labels of all these spaxels: values, or classes (int64), at least two of them.
        galaxy : (Q,) int64
            Galaxy of each.
        """
        self.eval()
        rows, device, target = [], self.filters.device, target.cpu()
        for i, (spectra, near, centre) in enumerate(batches):
            for norm in (self.norm, self.norm_near, self.norm_squares):
                norm.is_fitting = i == 0
            sums = self.measure(*(part.to(device) for part in spectra))
            rows.append(self.features(sums, near.to(device), centre.to(device)))
        for norm in (self.norm, self.norm_near, self.norm_squares):
            norm.is_fitting = False
        features = torch.cat(rows).cpu()
        own = features[:, : self.config.own_features]
        self.usual_mean.copy_(own.mean(0))
        self.usual_covariance.copy_(own.T.cov())
        features = features.double()
        if self.config.classes:
            self._start_classes(features, target)
            return
        mean, deviation = target.mean(), target.std().clamp(min=SMALLEST_DEVIATION)
        self.target_mean.copy_(mean)
        self.target_std.copy_(deviation)
        wanted = ((target - mean) / deviation).double()
        config = self.config
        others = config.own_features - config.filters
        sizes = torch.tensor([config.filters, others, config.near_features, config.squares])
        group = torch.arange(4).repeat_interleave(sizes)
        coefficients = ridge_by_galaxy(features, wanted, galaxy, group)
        errors = (features @ coefficients[1:] + coefficients[0] - wanted).abs()
        at_level = config.own_features - 1
        level = features[:, at_level] - features[:, at_level].mean()
        logarithms = errors.clamp(min=0.05 * errors.mean() + EPS).log()
        slope = (level @ logarithms) / (level @ level + EPS)
        constant = (errors / (slope * features[:, at_level]).exp()).mean().log()
        self.linear.weight[0] = coefficients[1:].float()
        self.linear.weight[1, at_level] = slope
        self.linear.bias.copy_(torch.stack([coefficients[0], constant]))

    def _start_classes(self, features: Tensor, classes: Tensor) -> None:
        """Start the linear part of the head as a logistic regression."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=1 / LOGISTIC_STRENGTH, max_iter=500)
        model.fit(features.cpu().numpy(), classes.cpu().numpy())
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(model.classes_) == 2:  # sklearn keeps one row for two classes
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        self.linear.bias.fill_(ABSENT)
        self.linear.weight[model.classes_] = weight.to(self.linear.weight)
        self.linear.bias[model.classes_] = bias.to(self.linear.bias)


def ridge_by_galaxy(
    features: Tensor,
    target: Tensor,
    galaxy: Tensor,
    group: Tensor,
    strengths: Sequence[Sequence[float]] = STRENGTHS,
    folds: int = 5,
) -> Tensor:
    """Average ridge regressions by how well they do on whole galaxies left out.

    Parameters
    ----------
    features : (N, k) float64
    target : (N,) float64
    galaxy : (N,) int64
    group : (k,) int64
        Group of each feature, from 0.
    strengths : sequence of sequence of float
        For each group, what to multiply with the number of samples; every combination is one ridge
        regression.
    folds : int
        Groups of galaxies that are left out in turn.

    Returns
    -------
    (1 + k,)
        The constant first; it is not penalised.

    Notes
    -----
    Each regression is weighted by its likelihood on what was left out, as if every galaxy were one
    independent sample with Gaussian errors (the exponential weights of Leung & Barron 2006, IEEE
    Trans. Inf. Theory 52, 3396). With few galaxies, the average is better than the best one.
    """
    x = F.pad(features, (1, 0), value=1.0)
    fold = torch.unique(galaxy, return_inverse=True)[1] % folds
    parts = [(x[fold == f], target[fold == f]) for f in range(folds)]
    grams = torch.stack([p.T @ p for p, _ in parts])
    rights = torch.stack([p.T @ t for p, t in parts])
    others = grams.sum(0) - grams, rights.sum(0) - rights

    def solve(gram: Tensor, right: Tensor, penalty: Tensor) -> Tensor:
        # by numpy: with several threads, torch 2.13 can hand over wrong pivots to oneMKL and fail
        matrix = (gram + gram[..., :1, :1] * penalty).numpy()
        return torch.from_numpy(np.linalg.solve(matrix, right[..., None].numpy())[..., 0])

    errors, solutions = [], []
    for some in itertools.product(*strengths):
        penalty = F.pad(torch.tensor(some, dtype=x.dtype)[group], (1, 0)).diag()
        b = solve(*others, penalty)
        errors.append(((b[:, None] @ grams)[:, 0] * b - 2 * b * rights).sum() + target @ target)
        solutions.append(solve(grams.sum(0), rights.sum(0), penalty))
    likelihood = -0.5 * len(torch.unique(galaxy)) * torch.stack(errors).clamp(min=EPS).log()
    return likelihood.softmax(0) @ torch.stack(solutions)


def laplace_losses(out: Tensor, target: Tensor) -> Tensor:
    """Negative log likelihood of standardised targets (Q, ...) under Laplace distributions.

    Their centre is the median, so it minimises the mean absolute error, and their scale is learned
    for every spaxel. out (Q, 2 or more, ...) as the network gives it.
    """
    scale = out[:, 1].clamp(*LOG_SCALES)
    return (out[:, 0] - target).abs() * (-scale).exp() + scale


def neighbours(usable: Tensor, window: int) -> Tensor:
    """Rows of the spaxels around each spaxel of maps.

    Parameters
    ----------
    usable : (map, y, x) bool
    window : int
        Width P of the neighbourhood, odd.

    Returns
    -------
    (map*y*x, P*P) int64
        Rows of the flattened maps; -1 beyond a map's edge and where a spaxel is not usable.
    """
    rows = torch.arange(usable.numel(), device=usable.device).view(usable.shape)
    rows = rows.masked_fill(~usable, -1)
    half = window // 2
    padded = F.pad(rows, (half, half, half, half), value=-1)
    return padded.unfold(1, window, 1).unfold(2, window, 1).reshape(usable.numel(), window**2)
