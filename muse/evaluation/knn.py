"""k nearest neighbours on stored features: a classifier without training.

The neighbours are exact, by cosine. Each votes for its class with exp(cosine / temperature), as in
DINOv2's evaluation: k of 10, 20, 100 and 200, temperature .07. Rows are read in blocks, so that the
features of a whole training set may stay on the disk.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
TRAIN_BLOCK = 16384  # with the query block: 64 MB of similarities
QUERY_BLOCK = 1024


class KnnScore(NamedTuple):
    """Shares of right answers in [0, 1]: over samples, and for top1 as a mean over classes."""

    top1: float
    top5: float
    top1_macro: float


def _blocks(features, size: int, device) -> Iterator[tuple[int, Tensor]]:
    """(first row, L2-normalised rows) of a tensor or of a memory-mapped array."""
    for start in range(0, len(features), size):
        rows = features[start : start + size]
        rows = rows if isinstance(rows, Tensor) else torch.from_numpy(numpy.array(rows))
        rows = rows.to(device).float()
        if not torch.isfinite(rows).all():
            raise ValueError("features contain NaN or infinity")
        yield start, F.normalize(rows, dim=1)


@torch.no_grad()
def nearest_neighbours(
    train,
    queries,
    k: int,
    device: str | torch.device = "cpu",
    train_block: int = TRAIN_BLOCK,
    query_block: int = QUERY_BLOCK,
) -> tuple[Tensor, Tensor]:
    """The k rows of `train` with the greatest cosine: (n, k) cosines, falling, and (n, k) rows.

    `train` is read once. In memory stand the result (12 bytes an entry) and one block of each set.

    Args:
        train: (N, C) tensor or memory-mapped array.
        queries: (n, C), likewise.
        k: neighbours, at most N.
        device: where similarities are computed and the result is kept.
        train_block: rows of `train` at a time.
        query_block: rows of `queries` at a time.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"{k} neighbours among {len(train)} training samples")
    if train.shape[1:] != queries.shape[1:] or len(train.shape) != 2:
        raise ValueError(f"features differ: {tuple(train.shape)} and {tuple(queries.shape)}")
    best = torch.full((len(queries), k), -torch.inf, device=device)
    places = torch.zeros((len(queries), k), dtype=torch.long, device=device)
    for first, known in _blocks(train, train_block, device):
        for start, asked in _blocks(queries, query_block, device):
            rows = slice(start, start + len(asked))
            near = (asked @ known.T).topk(min(k, len(known)), dim=1)
            both = torch.cat((best[rows], near.values), 1)
            where = torch.cat((places[rows], near.indices + first), 1)
            best[rows], order = both.topk(k, dim=1)
            places[rows] = where.gather(1, order)
    return best, places


def class_votes(
    cosines: Tensor, labels: Tensor, num_classes: int, temperature: float = TEMPERATURE
) -> Tensor:
    """(n, num_classes) shares of the neighbours' votes; each row sums to 1.

    Args:
        cosines: (n, k), falling.
        labels: (n, k) classes of the neighbours.
        num_classes: width of the result.
        temperature: the smaller, the more the nearest decide.
    """
    weights = (cosines / temperature).softmax(1)
    return weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)


def knn_scores(
    train,
    train_labels: Tensor,
    val,
    val_labels: Tensor,
    num_classes: int | None = None,
    ks: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: str | torch.device = "cpu",
) -> dict[int, KnnScore]:
    """Score of every k that the training set can serve.

    A class without any vote is never among the five best. ValueError on labels that do not fit, on
    features of two widths or with NaN, or when no k is small enough.

    Args:
        train: (N, C) features, tensor or memory-mapped array.
        train_labels: (N,) classes.
        val: (n, C) features to classify, likewise.
        val_labels: (n,) classes.
        num_classes: the greatest training label + 1 when None.
        ks: numbers of neighbours; those above N are left out.
        temperature: see `class_votes`.
        device: where all is computed.
    """
    if (len(train), len(val)) != (len(train_labels), len(val_labels)) or not len(val):
        raise ValueError(
            f"{len(train)} and {len(val)} features, "
            f"{len(train_labels)} and {len(val_labels)} labels"
        )
    classes = num_classes or int(train_labels.max()) + 1
    for name, labels in (("training", train_labels), ("validation", val_labels)):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"{name} labels {low}..{high} do not fit {classes} classes")
    served = sorted(k for k in set(ks) if 1 <= k <= len(train))
    if not served:
        raise ValueError(f"{min(ks)} neighbours among {len(train)} training samples")
    cosines, places = nearest_neighbours(train, val, served[-1], device)
    labels = train_labels.to(device)[places]  # (n, k)
    ranks: dict[int, list[Tensor]] = {k: [] for k in served}
    truth = val_labels.to(device)
    for start in range(0, len(truth), QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        for k in served:
            votes = class_votes(cosines[rows, :k], labels[rows, :k], classes, temperature)
            ranks[k].append(_rank(votes, truth[rows]))
    return {k: _score(torch.cat(ranks[k]).cpu(), val_labels.cpu(), classes) for k in served}


def _rank(votes: Tensor, truth: Tensor) -> Tensor:
    """How many classes have more votes than the right one; the number of classes if it has none."""
    right = votes.gather(1, truth[:, None])
    return (votes > right).sum(1).masked_fill(right[:, 0] == 0, votes.shape[1])


def _score(ranks: Tensor, labels: Tensor, classes: int) -> KnnScore:
    hits = (ranks < 1).double()
    counts = torch.bincount(labels, minlength=classes)
    by_class = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, hits)
    present = counts > 0
    macro = (by_class[present] / counts[present]).mean()
    return KnnScore(float(hits.mean()), float((ranks < 5).double().mean()), float(macro))
