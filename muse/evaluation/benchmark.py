"""Our evaluation beside the plain way that the field's scripts take, timed in one run on one machine.

The slow ways: covariance by one float64 outer product an image and SSIM by scikit-image; the Fréchet distance by
SciPy's matrix root; mIoU by comparing whole masks for every class of every image. Only the ratio counts.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from muse.errors import ConfigError
from muse.evaluation.evaluator import Evaluator
from muse.evaluation.fid import RunningMoments, frechet_distance
from muse.evaluation.segmentation import IGNORE, ConfusionMatrix

BATCH = 32
REPEATS = 5


def _seconds(call: Callable[[], object], repeats: int = 1) -> tuple[float, object]:
    """The shortest of some runs, and the last result: what else the machine does only ever adds time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return min(times), result


def _agree(name: str, ours: float, slow: float, tolerance: float) -> None:
    if abs(ours - slow) > tolerance * abs(slow):
        raise AssertionError(f"{name}: {ours} here, {slow} the slow way")


def slow_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance (D, D) of (n, D) by an outer product an image."""
    total, products = np.zeros(features.shape[1]), np.zeros((features.shape[1],) * 2)
    for row in features.astype(np.float64):
        total += row
        products += np.outer(row, row)
    mean = total / len(features)
    return mean, (products - len(features) * np.outer(mean, mean)) / (len(features) - 1)


def time_evaluator(dim: int, images: int) -> dict:
    """Everything outside the network, ms an image pair at 224×224: PSNR, SSIM, and moments of both sides' features."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    generator = torch.Generator().manual_seed(0)
    real = torch.rand(images, 3, 224, 224, generator=generator)
    fake = (real + 0.05 * torch.randn(real.shape, generator=generator)).clamp(0, 1)
    features = torch.randn(2, images, dim, generator=generator)

    def ours() -> dict:
        evaluator, sides = Evaluator(("psnr", "ssim")), (RunningMoments(), RunningMoments())
        for index in torch.arange(images).split(BATCH):
            evaluator.update(real[index], fake[index])
            for moments, rows in zip(sides, features, strict=True):
                moments.update(rows[index])
        return {"cov": [moments.compute()[2] for moments in sides], **evaluator.compute()}

    def slow() -> dict:
        psnr, ssim = [], []
        for a, b in zip(real.permute(0, 2, 3, 1).numpy(), fake.permute(0, 2, 3, 1).numpy(), strict=True):
            psnr.append(peak_signal_noise_ratio(a, b, data_range=1))
            ssim.append(
                structural_similarity(
                    a, b, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
                )
            )
        return {
            "cov": [slow_statistics(rows.numpy())[1] for rows in features],
            "psnr": np.mean(psnr),
            "ssim": np.mean(ssim),
        }

    (fast_time, fast), (slow_time, reference) = _seconds(ours, REPEATS), _seconds(slow, 2)
    for name in ("psnr", "ssim"):
        _agree(name, fast[name], float(reference[name]), 1e-5)
    _agree("covariance", float(fast["cov"][0].trace()), float(reference["cov"][0].trace()), 1e-9)
    return {"ours": fast_time / images * 1e3, "slow": slow_time / images * 1e3, "unit": "ms", "goal": 29.6 / 5}


def time_frechet(dim: int) -> dict:
    """Seconds for one distance between two full-rank Gaussians of width `dim`."""
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -3, dim, dtype=torch.float64)
    moments = []
    for _ in range(2):
        rows = torch.randn(2 * dim, dim, generator=generator, dtype=torch.float64) * spectrum.sqrt()
        moments += [rows.mean(0), rows.T.cov()]

    def slow() -> float:
        mean1, cov1, mean2, cov2 = (part.numpy() for part in moments)
        root = sqrtm(cov1 @ cov2)
        return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(np.real(root)))

    (fast_time, fast), (slow_time, reference) = _seconds(lambda: frechet_distance(*moments), 2), _seconds(slow)
    _agree("Fréchet distance", fast, reference, 1e-5)
    return {"ours": fast_time, "slow": slow_time, "unit": "s", "goal": 8.4 / 2}


def time_miou(masks: int, classes: int = 150) -> dict:
    """ms an image of 512×512 with 150 classes, predictions given."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, classes, (2, masks, 16, 16), generator=generator)
    truth, guess = coarse.repeat_interleave(32, 2).repeat_interleave(32, 3)

    def ours() -> float:
        confusion = ConfusionMatrix(classes)
        for a, b in zip(guess, truth, strict=True):
            confusion.update(a, b)
        return confusion.compute().mean

    def slow() -> float:
        hits, union = np.zeros(classes), np.zeros(classes)
        for a, b in zip(guess, truth, strict=True):
            valid = b != IGNORE
            for label in range(classes):
                predicted, wanted = (a == label) & valid, (b == label) & valid
                hits[label] += (predicted & wanted).sum().item()
                union[label] += (predicted | wanted).sum().item()
        return float((hits[union > 0] / union[union > 0]).mean())

    (fast_time, fast), (slow_time, reference) = _seconds(ours, REPEATS), _seconds(slow, 2)
    _agree("mIoU", fast, reference, 1e-12)
    return {"ours": fast_time / masks * 1e3, "slow": slow_time / masks * 1e3, "unit": "ms", "goal": 651 / 200}


def run(parts: Sequence[str], dim: int = 2048, images: int = 128, masks: int = 4) -> dict[str, dict]:
    """part -> {ours, slow, unit, goal}; ConfigError on an unknown part.

    goal: what `ours` should not exceed on two CPU cores: a fifth, a half and a 200th of the authors' scripts' time.
    """
    timers = {
        "evaluator": lambda: time_evaluator(dim, images),
        "frechet": lambda: time_frechet(dim),
        "miou": lambda: time_miou(masks),
    }
    unknown = [part for part in parts if part not in timers]
    if unknown:
        raise ConfigError(f"unknown part '{unknown[0]}': one of {', '.join(timers)}")
    return {part: timers[part]() for part in parts}
