"""The plain ways to the evaluation's numbers, as the field's scripts take them.

scripts/benchmark.py holds ours against them, in value and in time.
"""

import numpy
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor

from muse.data.masks import IGNORE_INDEX


def slow_statistics(features: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Mean and covariance (D, D) of (n, D) by a float64 outer product an image."""
    total, products = numpy.zeros(features.shape[1]), numpy.zeros((features.shape[1],) * 2)
    for row in features.astype(numpy.float64):
        total += row
        products += numpy.outer(row, row)
    mean = total / len(features)
    return mean, (products - len(features) * numpy.outer(mean, mean)) / (len(features) - 1)


def slow_quality(real: Tensor, fake: Tensor) -> dict[str, float]:
    """PSNR and SSIM of (n,3,H,W) pairs by scikit-image, an image at a time."""
    # no requirement of the package: the other parts are timed without it
    from skimage.metrics import (  # noqa: PLC0415
        peak_signal_noise_ratio,
        structural_similarity,
    )

    psnr, ssim = [], []
    pictures = (images.permute(0, 2, 3, 1).numpy() for images in (real, fake))
    for a, b in zip(*pictures, strict=True):
        psnr.append(peak_signal_noise_ratio(a, b, data_range=1))
        ssim.append(
            structural_similarity(
                a,
                b,
                channel_axis=2,
                data_range=1,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
        )
    return {"psnr": float(numpy.mean(psnr)), "ssim": float(numpy.mean(ssim))}


def slow_frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The Fréchet distance by SciPy's matrix root; means (D,), covariances (D, D)."""
    mean1, cov1, mean2, cov2 = (part.numpy() for part in (mean1, cov1, mean2, cov2))
    root = sqrtm(cov1 @ cov2)
    return float(
        numpy.square(mean1 - mean2).sum()
        + numpy.trace(cov1)
        + numpy.trace(cov2)
        - 2 * numpy.trace(numpy.real(root))
    )


def one_hot_miou(guess: Tensor, truth: Tensor, classes: int) -> float:
    """mIoU of (n,H,W) labels from one-hot maps of all classes, an image at a time."""
    hits, union = torch.zeros(classes, dtype=torch.long), torch.zeros(classes, dtype=torch.long)
    for a, b in zip(guess, truth, strict=True):
        ignored = b == IGNORE_INDEX
        maps = [
            F.one_hot(x.masked_fill(ignored, classes), classes + 1).float()[..., :classes]
            for x in (a, b)
        ]
        hits += (maps[0] * maps[1]).sum((0, 1)).long()
        union += (maps[0] + maps[1]).clamp(max=1).sum((0, 1)).long()
    return float((hits[union > 0].double() / union[union > 0]).mean())


def looped_miou(guess: Tensor, truth: Tensor, classes: int) -> float:
    """mIoU of (n,H,W) labels by a loop over the classes, an image at a time."""
    hits, union = numpy.zeros(classes), numpy.zeros(classes)
    for a, b in zip(guess.numpy(), truth.numpy(), strict=True):
        valid = b != IGNORE_INDEX
        for label in range(classes):
            predicted, wanted = (a == label) & valid, (b == label) & valid
            hits[label] += (predicted & wanted).sum()
            union[label] += (predicted | wanted).sum()
    return float((hits[union > 0] / union[union > 0]).mean())
