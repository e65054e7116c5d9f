"""The networks that training offers: usual options, application, decoding of outputs.

Everything that depends on which network it is stands here; training, evaluation and maps only use
these functions. A further network is one more entry in USUAL and one more case in each function.

    matched_filters   matched_filter_net.py: the metallicity in dex with its scale, or BPT classes
    ssftt             HSI_SSFTT.py, on whole maps SSFTT_dense.py: classes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from utils import DataError, Norm

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import SSFTT_dense
from HSI_SSFTT import SSFTT, get_SSFTT_model
from intervals import Calibration
from labels import LABEL_NONE
from matched_filter_net import MatchedFilterConfig, MatchedFilterNet, laplace_losses

Network = SSFTT | MatchedFilterNet
NetworkName = Literal["matched_filters", "ssftt"]


@dataclass(frozen=True)
class Usual:
    """Usual options of training a network, and how its training differs from the others'."""

    patch_norm: Norm
    cutout: int
    batch_size: int
    epochs: int
    lr: float
    learns_dex: bool
    """Whether metallicities are learned as values in dex, not as classes."""
    warm_up: int = 0
    """Steps in which the learning rate rises."""
    largest_gradient: float | None = None
    """Norm at which gradients are clipped."""
    average: float | None = None
    """Decay per step of the running mean of the weights that is evaluated; None: the weights."""
    start_counts: bool = False
    """Whether the start is a model already, kept if training does not improve on it."""


USUAL: dict[NetworkName, Usual] = {
    "matched_filters": Usual("residual", 21, 1024, 8, 1.5e-3, True, 50, 1.0, 0.98, True),
    "ssftt": Usual("PCA", 5, 256, 30, 1e-3, False),
}
FILTER_LR = 0.1
"""Learning rate of matched filters, which start at the lines, relative to the others'."""
NOT_CALIBRATED = Calibration()


class Answer(NamedTuple):
    """Decoded outputs of a network for spaxels of any shape."""

    classes: np.ndarray
    """(...) int64: of a value the class that contains it, else the most probable class."""
    probabilities: np.ndarray
    """(..., class) float32."""
    value: np.ndarray | None
    """(...) 12+log(O/H), dex; None for BPT."""
    scale: np.ndarray | None
    """(...) mean absolute deviation that the network expects, dex; 1 if it gives none; None for
    BPT."""
    unlikeness: np.ndarray | None
    """(...) see `MatchedFilterNet.unlikeness`; None if the network gives none."""

    def apply(self, function: Callable[[np.ndarray], np.ndarray]) -> Answer:
        """Apply a function to each array that there is."""
        return Answer(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]


def make_network(name: NetworkName, sizes: dict[str, Any]) -> Network:
    """Make a network with initial weights from its name and its config's fields."""
    if name == "ssftt":
        return get_SSFTT_model(**sizes)
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    return MatchedFilterNet(MatchedFilterConfig(**sizes))


def parameter_groups(network: Network, lr: float) -> list[dict[str, Any]]:
    """Group the parameters for the optimiser."""
    if isinstance(network, SSFTT):
        return [{"params": list(network.parameters()), "lr": lr}]
    others = [p for name, p in network.named_parameters() if name != "filters"]
    filters = {"params": [network.filters], "lr": FILTER_LR * lr, "weight_decay": 0.0}
    return [{"params": others, "lr": lr}, filters]


def map_outputs(network: Network, fields: Tensor) -> Tensor:
    """Apply a network to fields (N, 1, band, y, x): (N, output, y, x)."""
    if isinstance(network, SSFTT):
        return SSFTT_dense.dense_logits(network, fields)
    return network.dense(fields)


def cutout_outputs(network: Network, cutouts: Tensor, weights: Tensor) -> Tensor:
    """Apply a network in training to cutouts: (N, output, T, T).

    Parameters
    ----------
    network : Network
    cutouts : (N, 1, band, T + P - 1, T + P - 1)
    weights : (N, T, T)
        Of the spaxels, as in `batches.CutoutBatch`. Outputs where they are 0 have no meaning, but
        are finite.
    """
    if isinstance(network, SSFTT):
        return SSFTT_dense.cutout_logits(network, cutouts, weights)
    edge = (cutouts.shape[-1] - weights.shape[-1]) // 2
    out = network.dense(cutouts, F.pad(weights > 0, (edge,) * 4))
    inner = slice(edge, edge + weights.shape[-1])
    return out[..., inner, inner].nan_to_num()


def losses(
    network: Network, outputs: Tensor, classes: Tensor, values: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Loss of each spaxel.

    Parameters
    ----------
    network : Network
    outputs : (N, output, ...)
    classes : (N, ...) int64
        LABEL_NONE where there is no label.
    values : (N, ...) float32
        Label values.
    smoothing : float
        Fraction of the target spread evenly over the classes.

    Returns
    -------
    (N, ...)
    """
    if isinstance(network, MatchedFilterNet):
        if not network.config.classes:
            return laplace_losses(outputs, (values - network.target_mean) / network.target_std)
        outputs = outputs[:, : network.config.classes]
    return F.cross_entropy(
        outputs.float(),
        classes,
        reduction="none",
        ignore_index=LABEL_NONE,
        label_smoothing=smoothing,
    )


@torch.no_grad()
def classes_of(network: Network, outputs: Tensor, edges: np.ndarray | None) -> Tensor:
    """Most probable classes in training, (N, ...) int64, from outputs (N, output, ...).

    Of a value, the class that contains it.
    """
    if isinstance(network, MatchedFilterNet) and not network.config.classes:
        value, _ = network.in_units(outputs.movedim(1, -1))
        return torch.bucketize(value.contiguous(), torch.tensor(edges).to(value), right=True)
    n = network.config.classes if isinstance(network, MatchedFilterNet) else None
    return outputs[:, :n].argmax(1)


def answer(
    network: Network,
    outputs: Tensor,
    edges: np.ndarray | None,
    class_values: np.ndarray | None,
    calibration: Calibration = NOT_CALIBRATED,
) -> Answer:
    """Decode outputs (..., output).

    Parameters
    ----------
    network : Network
    outputs : (..., output)
    edges : (class - 1,) array, optional
        Limits between metallicity classes, dex.
    class_values : (class,) array, optional
        12+log(O/H) that stands for each class, dex.
    calibration : Calibration
        Widens the network's scale in the probabilities of classes, by `Calibration.widening`.

    Notes
    -----
    A network that gives classes has the mean over their probabilities as its value. One that gives
    a value has the probabilities of a Laplace distribution between the classes' limits.
    """
    outputs = outputs.float()
    if isinstance(network, SSFTT):
        probabilities = outputs.softmax(-1).cpu().numpy()
        classes = probabilities.argmax(-1)
        if class_values is None:
            return Answer(classes, probabilities, None, None, None)
        mean = probabilities @ class_values
        return Answer(classes, probabilities, mean, np.ones_like(mean), None)
    outputs = outputs.to(network.target_mean.device)
    unlikeness = outputs[..., -1].cpu().numpy()
    if network.config.classes:
        probabilities = outputs[..., :-1].softmax(-1).cpu().numpy()
        return Answer(probabilities.argmax(-1), probabilities, None, None, unlikeness)
    if edges is None:
        raise DataError("a network for values without class limits: expected metallicities.")
    value, width = network.in_units(outputs)
    limits = torch.tensor(np.asarray(edges), dtype=value.dtype, device=value.device)
    widening = torch.from_numpy(calibration.widening(value.cpu().numpy())).to(value)
    z = (limits - value[..., None]) / (widening * width)[..., None]
    below = 0.5 + 0.5 * z.sign() * (1 - (-z.abs()).exp())  # Laplace distribution function
    chances = F.pad(F.pad(below, (0, 1), value=1.0), (1, 0), value=0.0).diff(dim=-1)
    probabilities, logoh, scale = (part.cpu().numpy() for part in (chances, value, width))
    return Answer(np.digitize(logoh, edges), probabilities, logoh, scale, unlikeness)
