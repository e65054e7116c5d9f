"""The most that a device allows the network: a roofline (Williams et al. 2009) of dense training.

Counts the operations and the least memory traffic of a training step from the network's sizes,
measures the device's ceilings, and sets a measured rate beside the bound that they give.
bench_network.py prints the table (doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measuring

import torch

from HSI_SSFTT import SSFTT, SSFTTConfig, count_parameters

PEAKS: dict[str, tuple[float, float]] = {
    "NVIDIA H200": (989.5e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989.5e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
}
"""Dense bfloat16 FLOP/s and bytes/s by the device's name, of SXM modules (NVIDIA's data sheets
"H200 Tensor Core GPU", "H100 Tensor Core GPU" and "A100 80GB Tensor Core GPU"; the first two state
twice the FLOP/s, with sparsity)."""
SECONDS_OF_WORK = 0.2
"""Shortest measurement of a ceiling."""
ADAM_BYTES = 4 * 8
"""Memory traffic of a float32 parameter in a step of Adam: read it, its gradient and both moments;
write it and both moments; and write the gradient in the backward pass."""


def positions(of: SSFTTConfig, cutout: int) -> tuple[int, int, int]:
    """Positions of a cutout's input, after the first and after the second convolution."""
    padded, shrink = cutout + of.patch_size - 1, of.spatial_kernel - 1
    return padded**2, (padded - shrink) ** 2, (padded - 2 * shrink) ** 2


def count_flops(of: SSFTTConfig, cutout: int, training: bool) -> int:
    """Operations of the matrix products and convolutions on one cutout of T x T spaxels.

    A multiplication and an addition count as two. The backward pass takes each product twice
    (towards weights and inputs), except for the first layer, whose inputs need no gradient.
    Not counted: products with the zeros that SSFTT_dense.features_by_pairs adds to its filters,
    and what is no such product (norms, activations, the attention of the class token).
    """
    whole, first, second = positions(of, cutout)
    dim, area = of.dim, of.spatial_kernel**2
    layers = [of.bands * of.projection * whole] if of.projection else []
    layers.append(of.folded_channels * of.spectral_kernel * area * first)
    layers.append(of.folded_channels * dim * area * second)
    layers.append((of.n_tokens + dim) * dim * second)
    each = dim * dim + 2 * dim * dim * (of.n_tokens + 1)  # q of the class token; k and v of all
    each += dim * dim + 2 * dim * of.mlp_dim + dim * of.n_classes
    layers.append(each * cutout**2)
    forward = 2 * sum(layers)
    return 3 * forward - 2 * layers[0] if training else forward


def count_bytes(model: SSFTT, cutout: int, itemsize: int, cutouts: int) -> float:
    """Least memory traffic of a training step for one of its cutouts.

    Assumes that every element-wise operation is fused with its neighbours and that nothing of the
    size of a convolution's output stays in cache. Then the output of a convolution followed by a
    batch norm crosses the memory eight times: written; read by the next layer (with the statistics
    taken on the way); in the backward pass read for the next layer's weights, its gradient
    written, both read for the norm's sums, both read for the layer's own weights. The input
    crosses twice, a projection's output four times. Parameters: ADAM_BYTES per step, and a read of
    them in each pass.
    """
    of = model.config
    whole, first, second = positions(of, cutout)
    moved = (2 * of.bands + 4 * (of.projection or 0)) * whole
    moved += 8 * of.folded_channels * first + 8 * of.dim * second
    return moved * itemsize + count_parameters(model) * (ADAM_BYTES + 2 * itemsize) / cutouts


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy on this device."""
    on_gpu = device.type == "cuda"
    side, n = (8192, 1 << 30) if on_gpu else (2048, 1 << 28)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(n // 4, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        def repeat(times: int) -> None:
            for _ in range(times):
                work()
            if on_gpu:
                torch.cuda.synchronize()

        repeat(3)
        once = measuring.timed(lambda: repeat(3)) / 3
        times = max(3, int(SECONDS_OF_WORK / max(once, 1e-6)))
        return min(measuring.timed(lambda: repeat(times)) for _ in range(3)) / times

    return 2 * side**3 / best(lambda: a @ b), 2 * n / best(lambda: target.copy_(source))


def set_beside(
    rate: float,
    model: SSFTT,
    cutout: int,
    cutouts: int,
    dtype: torch.dtype,
    ceilings: tuple[float, float],
) -> dict[str, Any]:
    """Set a rate of dense training, spaxels/s, beside the bound of the device.

    Parameters
    ----------
    rate : float
    model : SSFTT
    cutout, cutouts : int
        Width of a cutout in spaxels, cutouts per step.
    dtype : torch.dtype
        Type that the convolutions compute in.
    ceilings : tuple
        Of `measure_ceilings`.

    Returns
    -------
    dict
        Of one spaxel: flops, bytes. bound_measured, bound_peak: spaxels/s at the measured ceilings
        and at the data sheet's (None for devices not in PEAKS); share_measured, share_peak: the
        rate's share of these. limit: what sets the bound.
    """
    device = next(model.parameters()).device
    flops = count_flops(model.config, cutout, training=True) / cutout**2
    moved = count_bytes(model, cutout, dtype.itemsize, cutouts) / cutout**2
    peak = PEAKS.get(torch.cuda.get_device_name()) if device.type == "cuda" else None
    bound = 1 / max(flops / ceilings[0], moved / ceilings[1])
    bound_peak = 1 / max(flops / peak[0], moved / peak[1]) if peak else None
    return {
        "spaxels_per_s": rate,
        "flops": flops,
        "bytes": moved,
        "limit": "arithmetic" if flops / ceilings[0] > moved / ceilings[1] else "memory",
        "ceiling_flops_per_s": ceilings[0],
        "ceiling_bytes_per_s": ceilings[1],
        "bound_measured": bound,
        "share_measured": rate / bound,
        "bound_peak": bound_peak,
        "share_peak": rate / bound_peak if bound_peak else None,
    }


def print_table(table: list[dict[str, Any]]) -> None:
    """Print the roofline, one line per variant."""
    ceilings = table[0]["ceiling_flops_per_s"] / 1e12, table[0]["ceiling_bytes_per_s"] / 1e9
    print(f"measured ceilings: {ceilings[0]:.3g} TFLOP/s, {ceilings[1]:.3g} GB/s")
    words = f"{'MFLOP':>9}{'kB':>9}{'spaxels/s':>12}{'of bound':>10}{'of peak':>9}  limit"
    print(f"{'dense training':16}{words}")
    for row in table:
        of_peak = f"{row['share_peak']:.1%}" if row["share_peak"] else "-"
        print(
            f"{row['variant']:16}{row['flops'] / 1e6:9.2f}{row['bytes'] / 1e3:9.1f}"
            f"{row['spaxels_per_s']:12.4g}{row['share_measured']:10.1%}{of_peak:>9}  {row['limit']}"
        )
