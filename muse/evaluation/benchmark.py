"""Our evaluation beside the plain way that the field's scripts take, timed in one run on one machine.

The slow ways: covariance by one float64 outer product an image and SSIM by scikit-image; the Fréchet distance by
SciPy's matrix root; mIoU from one-hot maps of every class, and, a quicker one shown beside it, from a loop over the
classes. Only the ratio counts.
"""

import time
from collections.abc import Callable, Sequence

import numpy
import torch
import torch.nn.functional as F

from muse.errors import ConfigError
from muse.evaluation.evaluator import Evaluator
from muse.evaluation.metrics.frechet import RunningMoments, frechet_distance
from muse.evaluation.segmentation import IGNORE, ConfusionMatrix

BATCH = 32
REPEATS = 3


def _race(*ways: Callable[[], object], repeats: int = REPEATS) -> list[tuple[float, object]]:
    """Each way's shortest time in seconds and last result. They take turns: what else the machine does meets all of
    them, and only ever adds time.
    """
    times: list[list[float]] = [[] for _ in ways]
    results: list[object] = [None] * len(ways)
    for _ in range(repeats):
        for i, way in enumerate(ways):
            start = time.perf_counter()
            results[i] = way()
            times[i].append(time.perf_counter() - start)
    return [(min(taken), result) for taken, result in zip(times, results, strict=True)]


def _agree(name: str, ours: float, slow: float, tolerance: float) -> None:
    if abs(ours - slow) > tolerance * abs(slow):
        raise AssertionError(f"{name}: {ours} here, {slow} the slow way")


def slow_statistics(features: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Mean and covariance (D, D) of (n, D) by an outer product an image."""
    total, products = numpy.zeros(features.shape[1]), numpy.zeros((features.shape[1],) * 2)
    for row in features.astype(numpy.float64):
        total += row
        products += numpy.outer(row, row)
    mean = total / len(features)
    return mean, (products - len(features) * numpy.outer(mean, mean)) / (len(features) - 1)


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
        for a, b in zip(
            real.permute(0, 2, 3, 1).numpy(), fake.permute(0, 2, 3, 1).numpy(), strict=True
        ):
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
        return {
            "cov": [slow_statistics(rows.numpy())[1] for rows in features],
            "psnr": numpy.mean(psnr),
            "ssim": numpy.mean(ssim),
        }

    (fast_time, fast), (slow_time, reference) = _race(ours, slow)
    for name in ("psnr", "ssim"):
        _agree(name, fast[name], float(reference[name]), 1e-5)
    _agree("covariance", float(fast["cov"][0].trace()), float(reference["cov"][0].trace()), 1e-9)
    return {
        "ours": fast_time / images * 1e3,
        "slow": slow_time / images * 1e3,
        "unit": "ms",
        "goal": 29.6 / 5,
    }


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
        return float(
            numpy.square(mean1 - mean2).sum()
            + numpy.trace(cov1)
            + numpy.trace(cov2)
            - 2 * numpy.trace(numpy.real(root))
        )

    (fast_time, fast), (slow_time, reference) = _race(
        lambda: frechet_distance(*moments), slow, repeats=1
    )
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
        hits, union = torch.zeros(classes, dtype=torch.long), torch.zeros(classes, dtype=torch.long)
        for a, b in zip(guess, truth, strict=True):
            ignored = b == IGNORE
            maps = [
                F.one_hot(x.masked_fill(ignored, classes), classes + 1).float()[..., :classes]
                for x in (a, b)
            ]
            hits += (maps[0] * maps[1]).sum((0, 1)).long()
            union += (maps[0] + maps[1]).clamp(max=1).sum((0, 1)).long()
        return float((hits[union > 0].double() / union[union > 0]).mean())

    def loop() -> float:
        hits, union = numpy.zeros(classes), numpy.zeros(classes)
        for a, b in zip(guess.numpy(), truth.numpy(), strict=True):
            valid = b != IGNORE
            for label in range(classes):
                predicted, wanted = (a == label) & valid, (b == label) & valid
                hits[label] += (predicted & wanted).sum()
                union[label] += (predicted | wanted).sum()
        return float((hits[union > 0] / union[union > 0]).mean())

    (fast_time, fast), (slow_time, reference), (loop_time, by_loop) = _race(ours, slow, loop)
    _agree("mIoU", fast, reference, 1e-12)
    _agree("mIoU", fast, by_loop, 1e-12)
    ours_ms, slow_ms, loop_ms = (
        seconds / masks * 1e3 for seconds in (fast_time, slow_time, loop_time)
    )
    return {
        "ours": ours_ms,
        "slow": slow_ms,
        "unit": "ms",
        "goal": 651 / 200,
        "also": {"loop over the classes": loop_ms},
    }


def run(
    parts: Sequence[str], dim: int = 2048, images: int = 128, masks: int = 4
) -> dict[str, dict]:
    """part -> {ours, slow, unit, goal}; ConfigError on an unknown part or a size that is not positive.

    goal: what `ours` should not exceed on two CPU cores: a fifth, a half and a 200th of the authors' scripts' time.
    `also` (of miou): times of other ways to the same number.
    """
    for name, value in (("dim", dim), ("images", images), ("masks", masks)):
        if value < 1 or (name == "images" and value < 2):
            raise ConfigError(
                f"--{name} must be at least {2 if name == 'images' else 1}, not {value}"
            )
    timers = {
        "evaluator": lambda: time_evaluator(dim, images),
        "frechet": lambda: time_frechet(dim),
        "miou": lambda: time_miou(masks),
    }
    unknown = [part for part in parts if part not in timers]
    if unknown:
        raise ConfigError(f"unknown part '{unknown[0]}': one of {', '.join(timers)}")
    return {part: timers[part]() for part in parts}
