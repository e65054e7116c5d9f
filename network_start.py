"""Where networks start from: weights computed in closed form from training spectra.

Matched filters start at the known lines and as a regression on what they measure; a learned
projection of SSFTT as principal components.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from utils import DataError

import numpy as np
import torch
from torch import Tensor

import baselines
import hsi_proc_fns
import line_fits
import matched_filter_net
from batches import PackedDataset, PatchDataset
from HSI_SSFTT import SSFTT
from matched_filter_net import MatchedFilterNet, Spectra
from run_folder import ModelCard

log = logging.getLogger(__name__)

START_SPECTRA = 6_000
"""Spectra that show where matched filters start if no known line is in range."""
START_SPAXELS = 50_000
"""Labelled spaxels, at most, of whole galaxies, that the head of matched filters starts from."""
START_GALAXIES = 12
"""Galaxies measured together there; the first ones decide the normalisation of the features."""


def start_filters(
    model: MatchedFilterNet, dataset: PatchDataset, card: ModelCard, seed: int
) -> None:
    """Start matched filters at the known lines, and their head as a regression (`start_head`).

    Without two lines in range, they start where the training spectra vary most.
    """
    assert isinstance(dataset, PackedDataset)
    samples, rng = dataset.samples, np.random.default_rng(seed)
    _, some = baselines.sample_spectra(dataset, seed, START_SPECTRA)
    spectra = matched_filter_net.split(torch.from_numpy(some))
    known = line_fits.line_places(baselines.wave_of(card.recipe.options["cube"]))
    known = known if len(known) > 1 else []
    places = model.start_filters(spectra.residual, spectra.weight, known)
    groups = list(samples.by_galaxy())
    order = [groups[i] for i in rng.permutation(len(groups))]
    counted = np.cumsum([len(rows) for _, rows in order])
    order = order[: int(np.searchsorted(counted, START_SPAXELS)) + 1]
    rows = np.concatenate([rows for _, rows in order])
    target = samples.classes if model.config.classes else samples.values
    # a galaxy that was observed twice counts once
    mangaid = np.array([samples.mangaids[p] for p in samples.plateifus])[samples.galaxy[rows]]
    galaxies, galaxy = np.unique(mangaid, return_inverse=True)
    if len(galaxies) < 2:
        raise DataError(
            f"{card.split_dir}: spaxels of one training galaxy, expected at least two galaxies. "
            "Use more galaxies, or --network ssftt."
        )
    if model.config.classes and len(np.unique(target[rows])) < 2:
        raise DataError(
            f"{card.split_dir}: all training spaxels are of one class, expected at least two. "
            "Choose another split or --label-task."
        )
    chosen = torch.from_numpy(target[rows]), torch.from_numpy(galaxy)
    model.start_head(together(dataset, order, model.config.window), *chosen)
    log.info(
        "matched filters start at %d places, their head from %d spaxels of %d galaxies",
        len(places),
        rows.size,
        len(galaxies),
    )


def together(
    dataset: PackedDataset, galaxies: list[tuple[int, np.ndarray]], window: int
) -> Iterator[tuple[Spectra, Tensor, Tensor]]:
    """Yield some galaxies' spectra at a time, as `MatchedFilterNet.start_head` needs them."""
    for i in range(0, len(galaxies), START_GALAXIES):
        fields, nears, centres, n = [], [], [], 0
        for galaxy, rows in galaxies[i : i + START_GALAXIES]:
            field, (y, x) = dataset.field(galaxy)
            values = field[0, 0].movedim(0, -1)
            nx = values.shape[1]
            usable = (matched_filter_net.split(values).weight > 0).any(-1)
            near = matched_filter_net.neighbours(usable[None], window)
            here = (dataset.samples.y[rows] - y) * nx + dataset.samples.x[rows] - x
            centre = torch.from_numpy(here.astype(np.int64)).to(near.device)
            # only usable spaxels, since they decide the normalisation of the features
            place = usable.flatten().cumsum(0) - 1 + n
            near = near[centre]
            fields.append(values[usable])
            nears.append(torch.where(near < 0, near, place[near]))
            centres.append(place[centre])
            n += int(usable.sum())
        spectra = matched_filter_net.split(torch.cat(fields))
        yield spectra, torch.cat(nears), torch.cat(centres)


def start_projection(model: SSFTT, dataset: PatchDataset, seed: int) -> None:
    """Start a learned projection as the whitened principal components of training spectra.

    From random weights, training on cutouts hardly progresses (docs/science_choices.md).

    Raises
    ------
    DataError
        If there are fewer samples than components.
    """
    from sklearn.decomposition import PCA

    _, spectra = baselines.sample_spectra(dataset, seed)
    k = model.config.projection
    assert k is not None
    if len(spectra) <= k:
        raise DataError(
            f"--projection {k}: expected fewer components than the {len(spectra)} training samples."
        )
    pca = PCA(k, svd_solver="covariance_eigh").fit(spectra.astype(np.float64))
    parts = (hsi_proc_fns.whitening(pca.components_, pca.explained_variance_), pca.mean_)
    device = next(model.parameters()).device
    model.start_projection(*(torch.from_numpy(p.astype(np.float32)).to(device) for p in parts))
