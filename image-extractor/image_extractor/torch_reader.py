"""Batches of a data set for PyTorch: a DataLoader over reader.Images or reader.Events.

Needs the extra `torch`: pip install 'image-extractor[torch]'.

    from image_extractor.reader import Images
    from image_extractor.torch_reader import loader
    for batch in loader(Images("dataset.h5", "Training", "LST"), 64, workers=2, balanced=True):
        loss = loss_function(network(batch["image"]), batch["particle"])
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from .reader import Events, Images, Sample


class EpochSampler(Sampler[int]):
    """A random order for each epoch, determined by the seed.

    Parameters
    ----------
    particles : (n,) int array
        Class of each sample.
    balanced : bool
        Draw n samples with replacement: first a class, then one of its members. Otherwise each
        sample comes once per epoch.
    """

    def __init__(self, particles: np.ndarray, balanced: bool, seed: int) -> None:
        self.n, self.seed, self.epoch = len(particles), seed, 0
        self.members = [np.flatnonzero(particles == c) for c in np.unique(particles)]
        self.balanced = balanced

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        if not self.balanced:
            return iter(rng.permutation(self.n).tolist())
        classes = rng.integers(len(self.members), size=self.n)
        order = np.empty(self.n, np.int64)
        for c, members in enumerate(self.members):
            here = classes == c
            order[here] = members[rng.integers(members.size, size=here.sum())]
        return iter(order.tolist())


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Stack samples to a batch; images of events are padded.

    Returns
    -------
    dict
        Tensors with the batch first. Of events: `images` (event, telescope, channel, x, y), zeros
        where an event has fewer telescopes or a camera is smaller; `mask` (event, telescope),
        whether there is an image; `positions` and `tel_ids` are padded likewise.
    """
    if "images" not in samples[0]:
        return default_collate(samples)
    batch = default_collate(
        [
            {k: v for k, v in s.items() if k not in ("images", "tel_ids", "positions")}
            for s in samples
        ]
    )
    n_tel = max(len(s["images"]) for s in samples)
    shapes = np.array([image.shape for s in samples for image in s["images"]])
    batch["images"] = torch.zeros((len(samples), n_tel, *shapes.max(axis=0).tolist()))
    batch["mask"] = torch.zeros((len(samples), n_tel), dtype=torch.bool)
    batch["tel_ids"] = torch.zeros((len(samples), n_tel), dtype=torch.int64)
    batch["positions"] = torch.zeros((len(samples), n_tel, samples[0]["positions"].shape[1]))
    for i, sample in enumerate(samples):
        n = len(sample["images"])
        batch["mask"][i, :n] = True
        batch["tel_ids"][i, :n] = torch.tensor(sample["tel_ids"])
        batch["positions"][i, :n] = torch.from_numpy(sample["positions"])
        for k, image in enumerate(sample["images"]):
            corner = tuple(slice(length) for length in image.shape)
            batch["images"][(i, k, *corner)] = torch.from_numpy(image)
    return batch


def class_weights(data: Images | Events) -> torch.Tensor:
    """Weights of particle 0 and 1 for a loss: inversely proportional to their number, mean 1."""
    counts = np.bincount(data.particles(), minlength=2)
    weights = counts.sum() / (2 * np.maximum(counts, 1))
    return torch.tensor(weights, dtype=torch.float32)


def loader(
    data: Images | Events,
    batch_size: int,
    shuffle: bool = True,
    balanced: bool = False,
    workers: int = 0,
    seed: int = 0,
) -> DataLoader:
    """Make a DataLoader.

    Parameters
    ----------
    shuffle : bool
        Random order, another one in each epoch; otherwise that of the file.
    balanced : bool
        Draw gammas and others equally often, see EpochSampler.
    workers : int
        Processes that read; they are spawned, and each opens the files itself.
    """
    sampler = EpochSampler(data.particles(), balanced, seed) if shuffle or balanced else None
    return DataLoader(
        data,  # type: ignore[arg-type]  # a sequence is enough
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=workers > 0,
    )
