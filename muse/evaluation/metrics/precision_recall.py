"""Improved precision and recall (Kynkäänniemi et al. 2019): shares of pictures inside manifolds.

A set's manifold is the union of balls around its features, each as large as the distance to the
k-th nearest other feature of the set. Precision is the share of fake features inside the real
manifold, recall the share of real features inside the fake one. The field takes k = 3; ADM takes
Inception's 2048 features of 10,000 reference pictures, and halves for the distances.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 4096  # rows of either set at a time: the distances of a block are 128 MB in float64


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D) and (m, D) of one type -> (n, m), float64 or float32; halves are computed as ADM's."""
    if a.dtype == torch.float16:
        # every sum and product is rounded to a half; a block that overflows is done in float32
        norms = [rows.float().square().half().float().sum(1).half() for rows in (a, b)]
        product = (a.float() @ b.float().T).half()
        squares = (norms[0][:, None] - 2 * product + norms[1]).clamp_min(0)
        if torch.isfinite(squares).all():
            return squares.float()
        a, b = a.float(), b.float()
    squares = a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)
    return squares.clamp_min_(0)


def _radii(features: Tensor, k: int, block: int) -> Tensor:
    """(n, D) -> (n,) squared distance of each row to its k-th nearest other row."""
    radii = []
    for rows in features.split(block):
        nearest = None  # the k + 1 least so far: the row itself is one of them
        for others in features.split(block):
            squares = _squared_distances(rows, others)
            if nearest is not None:
                squares = torch.cat((nearest, squares), 1)
            nearest = squares.topk(min(k + 1, squares.shape[1]), largest=False).values
        radii.append(nearest.max(1).values)
    return torch.cat(radii)


def _checked(features: Tensor, name: str, k: int) -> Tensor:
    features = torch.as_tensor(features).detach()
    if features.ndim != 2 or len(features) <= k:
        raise ValueError(
            f"precision and recall need more than {k} {name} features (n, D), "
            f"got {tuple(features.shape)}"
        )
    if not torch.isfinite(features).all():
        raise ValueError(f"the {name} features contain NaN or infinity")
    return features


@torch.no_grad()
def precision_recall(
    real: Tensor,
    fake: Tensor,
    k: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    block: int = BLOCK,
) -> PrecisionRecall:
    """Precision and recall of two sets of features, exact, in blocks.

    ValueError on features of two widths, of k or fewer rows, or with NaN.

    Args:
        real: (N, D) features of the reference.
        fake: (M, D) features of what is measured; M may differ from N.
        k: the neighbour that a ball reaches to.
        dtype: of the distances: float64, float32, or float16 as in ADM's evaluator.
        device: where they are computed; both sets must fit there.
        block: rows of each set at a time.
    """
    real, fake = _checked(real, "real", k), _checked(fake, "fake", k)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of two widths: {real.shape[1]} and {fake.shape[1]}")
    real, fake = (rows.to(device, dtype) for rows in (real, fake))
    if dtype != torch.float16:
        # distances do not change, and lose fewer digits where the features lie far from zero
        mean = real.mean(0)
        real, fake = real - mean, fake - mean
    real_radii, fake_radii = (_radii(rows, k, block) for rows in (real, fake))
    covered = torch.zeros(len(real), dtype=torch.bool, device=device)  # real inside the fake
    inside = torch.zeros(len(fake), dtype=torch.bool, device=device)  # fake inside the real
    for i in range(0, len(real), block):
        for j in range(0, len(fake), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            squares = _squared_distances(real[rows], fake[columns])
            covered[rows] |= (squares <= fake_radii[columns]).any(1)
            inside[columns] |= (squares <= real_radii[rows, None]).any(0)
    return PrecisionRecall(float(inside.double().mean()), float(covered.double().mean()))
