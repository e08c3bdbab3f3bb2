"""A part of the training set on which a probe's settings are chosen: never on what is reported."""

import torch
from torch import Tensor

from muse.data.eval import spread_sample

SHARE = 0.1
MOST = 10_000  # of a large set a tenth would only cost features to train on


def split_training_set(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(fitted, held out): places of training samples, ascending, without a sample in both.

    A tenth of the set is held out, at most MOST samples, of all classes in their proportions. Every
    class keeps a sample to be fitted; where none has two, nothing can be held out, and the second
    is empty.

    Args:
        labels: (N,) classes.
        seed: of the draw.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # by class, in random order within each
    first = torch.ones(len(labels), dtype=torch.bool)
    first[1:] = labels[order][1:] != labels[order][:-1]
    spare = order[~first]  # without one sample of each class
    count = min(max(1, round(SHARE * len(labels))), MOST, len(spare))
    held = torch.zeros(len(labels), dtype=torch.bool)
    if count:
        held[spare[spread_sample(len(spare), count, seed)]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
