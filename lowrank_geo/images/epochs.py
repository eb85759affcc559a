"""Batches of images: which ones a step sees, and as what, follows from the seed and the step alone."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from lowrank_geo.images.augment import augment
from lowrank_geo.images.collect import Images
from lowrank_geo.images.reading import Sample


class Batch(NamedTuple):
    """Shapes: images (B, C, H, W) in [0, 1]; targets (B, H, W) or (B), integers."""

    images: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.images.to(device), self.targets.to(device))


class Epochs:
    """The images to train on, in a new order every epoch, cut into batches as even as can be: none has one image
    unless all have."""

    def __init__(self, images: Images, batch: int, seed: int, *, augmented: bool) -> None:
        self.images, self.seed, self.augmented = images, seed, augmented
        self.train = torch.tensor(images.split.train)
        self.steps = -(-len(self.train) // batch)  # of an epoch

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps)
        order = torch.randperm(len(self.train), generator=generator(self.seed, epoch))
        chosen = self.train[order].tensor_split(self.steps)[place].tolist()
        pairs = [pixels(self.images.samples[i], self.images.channels) for i in chosen]
        if self.augmented:
            pairs = [
                changed(image, target, generator(self.seed, epoch, 1 + i))
                for i, (image, target) in zip(chosen, pairs, strict=True)
            ]
        return stack(pairs)


def generator(*key: int) -> Generator:
    """A generator that depends on every number of the key."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(state) % 2**63)


def changed(image: Tensor, target: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
    image, mask = augment(image, target if target.dim() else None, draw)
    return image, target if mask is None else mask


def pixels(sample: Sample, channels: int) -> tuple[Tensor, Tensor]:
    """The image as the network takes it, grey ones with all channels alike, and its target."""
    return sample.image.float().div(255).expand(channels, -1, -1), sample.target


def stack(pairs: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    images, targets = zip(*pairs, strict=True)
    return Batch(torch.stack(images), torch.stack(targets))


def in_order(images: Images, places: Sequence[int], batch: int) -> Iterator[Batch]:
    """The samples at `places` as they are."""
    for start in range(0, len(places), batch):
        chosen = places[start : start + batch]
        yield stack([pixels(images.samples[i], images.channels) for i in chosen])
