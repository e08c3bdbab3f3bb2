"""Fréchet distance between two Gaussians, the running moments that feed it, and the metric `fd_`.

    d² = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½

The trace of the root is the sum of the roots of the eigenvalues of Σ₁Σ₂. With Σ₁ = L Lᵀ the
symmetric product Lᵀ Σ₂ L has the same non-zero eigenvalues, so no matrix root is taken and no
imaginary part can appear. L is Σ₁'s Cholesky factor; of a singular covariance (fewer samples than
dimensions) it comes from a Cholesky factorisation with pivoting, which stops at the rank, and the
covariance of the lower rank is the one that is factored.
"""

import logging
from collections.abc import Callable

import numpy
import torch
from scipy.linalg import lapack

from muse.evaluation.metrics.networks import (
    MetricOptions,
    load_feature_network,
    network_protocol,
    rounded_bytes,
)
from muse.evaluation.metrics.psnr_ssim import float64
from muse.utils.distributed import all_rows, all_sum, is_main_process

logger = logging.getLogger(__name__)

# What the field measures on. From fewer pictures a distance comes out too large, the more so the
# more features there are.
ENOUGH_IMAGES = 50_000


def _cholesky(cov: torch.Tensor) -> torch.Tensor | None:
    """The lower Cholesky factor, or None where the matrix is singular to float64's precision.

    The bound is the one that LAPACK's factorisation with pivoting stops at.
    """
    lower, info = torch.linalg.cholesky_ex(cov)
    bound = len(cov) * torch.finfo(cov.dtype).eps * cov.diagonal().max()
    return lower if int(info) == 0 and lower.diagonal().square().min() > bound else None


def semidefinite_factor(cov: torch.Tensor) -> torch.Tensor:
    """(D, D) positive semidefinite, float64 -> L (D, r) with L Lᵀ = cov, r the numerical rank."""
    lower, pivots, rank, info = lapack.dpstrf(cov.numpy(), lower=1)
    if info < 0:
        raise ValueError("the covariance contains NaN or infinity")
    factor = numpy.tril(lower)[:, :rank]
    rows = numpy.empty_like(factor)
    rows[pivots - 1] = factor  # LAPACK counts rows from one
    return torch.from_numpy(numpy.ascontiguousarray(rows))


def root_trace(cov1: torch.Tensor, cov2: torch.Tensor) -> torch.Tensor:
    """tr (Σ₁ Σ₂)^½ of two symmetric positive semidefinite (D, D) float64 matrices."""
    lower1, lower2 = _cholesky(cov1), _cholesky(cov2)
    if lower1 is not None and lower2 is not None:
        # LAPACK's reduction of a symmetric-definite pair: Lᵀ Σ₂ L for a quarter of the cost of two
        # matrix products
        product, _ = lapack.dsygst(cov2.numpy().T, lower1.numpy(), itype=2, lower=1)
        return torch.linalg.eigvalsh(torch.from_numpy(product), UPLO="L").clamp_min(0).sqrt().sum()
    sides = [
        (semidefinite_factor(a), b)
        for a, b, lower in ((cov1, cov2, lower1), (cov2, cov1, lower2))
        if lower is None
    ]
    factor, other = min(sides, key=lambda side: side[0].shape[1])
    product = factor.T @ other @ factor
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()


def _float64(value, name: str, dims: int) -> torch.Tensor:
    tensor = torch.as_tensor(value).detach().to("cpu", torch.float64)
    if tensor.ndim != dims or not torch.isfinite(tensor).all():
        raise ValueError(
            f"{name} must be finite with {dims} dimension(s), got shape {tuple(tensor.shape)}"
        )
    return tensor


def frechet_distance(mean1, cov1, mean2, cov2) -> float:
    """Squared Fréchet (2-Wasserstein) distance of N(mean1, cov1) and N(mean2, cov2).

    In float64 on the CPU; never negative. ValueError on shapes that do not fit or on values that
    are not finite.

    Args:
        mean1: (D,) array or tensor.
        cov1: (D, D) array or tensor.
        mean2: (D,) array or tensor.
        cov2: (D, D) array or tensor.
    """
    mean1, mean2 = _float64(mean1, "mean1", 1), _float64(mean2, "mean2", 1)
    cov1, cov2 = _float64(cov1, "cov1", 2), _float64(cov2, "cov2", 2)
    dim = len(mean1)
    if len(mean2) != dim or cov1.shape != (dim, dim) or cov2.shape != (dim, dim):
        raise ValueError(
            f"feature widths differ: means {dim} and {len(mean2)}, "
            f"covariances {tuple(cov1.shape)} and {tuple(cov2.shape)}"
        )
    cov1, cov2 = (cov1 + cov1.T) / 2, (cov2 + cov2.T) / 2
    distance = (
        (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root_trace(cov1, cov2)
    )
    return max(float(distance), 0.0)


class RunningMoments:
    """Mean and covariance of a stream of feature rows, in float64, mergeable over processes.

    Rows are shifted by the first batch's mean (no cancellation when the mean is large) and gathered
    into blocks of `block` rows, so that the D×D sum is touched once a block and not once an image.
    """

    def __init__(self, block: int = 256):
        self.block = block
        self.count = 0
        self._rows: list[torch.Tensor] = []
        self._shift: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._outer: torch.Tensor | None = None

    @property
    def dim(self) -> int | None:
        """Feature width, None before the first batch."""
        return None if self._shift is None else len(self._shift)

    def update(self, rows: torch.Tensor) -> None:
        """rows (n, D), any float type; ValueError on another width or on NaN."""
        if rows.ndim != 2 or (self.dim is not None and rows.shape[1] != self.dim):
            raise ValueError(f"features must be (n, {self.dim or 'D'}), got {tuple(rows.shape)}")
        if not torch.isfinite(rows).all():
            raise ValueError("features contain NaN or infinity")
        if not len(rows):
            return
        rows = float64(rows.detach())
        if self._shift is None:
            self._shift = rows.mean(0)
            self._sum = torch.zeros_like(self._shift)
            self._outer = rows.new_zeros(rows.shape[1], rows.shape[1])
        self._rows.append(rows - self._shift)
        self.count += len(rows)
        if sum(map(len, self._rows)) >= self.block:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            rows = torch.cat(self._rows)
            self._sum += rows.sum(0)
            self._outer.addmm_(rows.T, rows)
            self._rows = []

    def compute(self, dim: int | None = None) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(count, mean (D,), unbiased covariance (D, D)) over all processes; each must call it.

        dim is needed only where a process may have seen no rows. ValueError with fewer than two
        rows in all.
        """
        self._flush()
        dim = self.dim or dim
        if dim is None:
            raise ValueError("no features were given")
        sums = self._sum if self._sum is not None else torch.zeros(dim, dtype=torch.float64)
        shift = self._shift if self._shift is not None else torch.zeros_like(sums)
        outer = self._outer if self._outer is not None else sums.new_zeros(dim, dim)
        total = int(
            all_sum(torch.tensor(float(self.count), dtype=torch.float64, device=sums.device))
        )
        if total < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {total}")
        mean = all_sum(sums + self.count * shift) / total
        # Σ (x−μ)(x−μ)ᵀ = Σ yyᵀ − aδᵀ − δaᵀ with y = x−shift, δ = μ−shift, a = Σy − nδ/2: one pass
        # over the D×D sum
        delta = mean - shift
        half = sums - delta * (self.count / 2)
        scatter = torch.addmm(
            outer, torch.stack((half, delta), 1), torch.stack((delta, half)), alpha=-1
        )
        scatter = all_sum(scatter)
        return total, mean, scatter.div_(total - 1)


def warn_of_few(name: str, count: int, source: str = "") -> None:
    """A warning where a distance is of fewer than ENOUGH_IMAGES.

    Args:
        name: of the metric.
        count: images.
        source: where they are from, if that is to be said.
    """
    if count < ENOUGH_IMAGES and is_main_process():
        logger.warning(
            "%s from %d images%s: below %d a Fréchet distance is biased upwards",
            name,
            count,
            f" of {source}" if source else "",
            ENOUGH_IMAGES,
        )


class FrechetDistance:
    """Fréchet distance of real and fake features of `network(images) -> (B, D)`.

    Args:
        name: of the metric.
        network: gets images in [0,1].
        protocol: what names the network.
        rounded: the images are rounded to bytes first, as for rfid and as in a saved PNG.
    """

    def __init__(
        self, name: str, network: Callable, protocol: dict | None = None, rounded: bool = True
    ):
        self.name, self.network, self.rounded = name, network, rounded
        self.protocol = {**protocol, "rounded_to_bytes": rounded} if protocol else {}
        self.real, self.fake = RunningMoments(), RunningMoments()

    def update(self, real: torch.Tensor, fake: torch.Tensor, indices: torch.Tensor | None) -> None:
        """Add (B,3,H,W) pairs."""
        if self.rounded:
            real, fake = (rounded_bytes(images).to(images.dtype) / 255 for images in (real, fake))
        self.add(self.network(real), self.network(fake))

    def add(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Features (B, D) of both sides."""
        for moments, rows in ((self.real, real), (self.fake, fake)):
            if rows.ndim != 2:
                raise ValueError(
                    f"{self.name}: the network must return (B, D), got {tuple(rows.shape)}"
                )
            moments.update(rows)

    def compute(self) -> dict[str, float]:
        """{name: distance} over the images of all processes."""
        dim = int(max(all_rows(torch.tensor([self.real.dim or 0]))))
        if not dim:
            raise ValueError(f"{self.name}: no images were given")
        count, mean1, cov1 = self.real.compute(dim)
        _, mean2, cov2 = self.fake.compute(dim)
        warn_of_few(self.name, count)
        return {self.name: frechet_distance(mean1, cov1, mean2, cov2)}


def frechet_metric(name: str, options: MetricOptions) -> FrechetDistance:
    """`fd_<network>`: the network of the options, or the one of that name."""
    network = options.feature_network
    if network is None:
        network = load_feature_network(name.removeprefix("fd_"), options.feature_weights)
        network = network.to(options.device)
    return FrechetDistance(name, network, network_protocol(network))
