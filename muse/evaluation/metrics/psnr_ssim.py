"""PSNR and SSIM of [0,1] images, one value an image, and the metric that is their mean.

SSIM is Wang et al. 2004: Gaussian window 11×11, σ 1.5, data range 1, K = .01, .03, population
covariance, border of five pixels left out, mean over channels. It equals scikit-image's
`structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
data_range=1)`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from muse.models.layers import check_images
from muse.utils.distributed import all_sum

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


class ImageMean:
    """Mean over images of `measure(real, fake) -> (B,)`."""

    def __init__(self, name: str, measure: Callable, protocol: dict | None = None):
        self.name, self.measure, self.protocol = name, measure, protocol or {}
        self.total, self.count = torch.zeros((), dtype=torch.float64), 0

    def update(self, real: torch.Tensor, fake: torch.Tensor, indices: torch.Tensor | None) -> None:
        """Add the values of (B,3,H,W) pairs."""
        self.total = self.total + float64(self.measure(real, fake)).sum().cpu()
        self.count += len(real)

    def compute(self) -> dict[str, float]:
        """{name: mean} over the images of all processes."""
        count = torch.tensor(float(self.count), dtype=torch.float64)
        total, count = all_sum(torch.stack((self.total, count)))
        if not count:
            raise ValueError(f"{self.name}: no images were given")
        return {self.name: float(total / count)}


def check_pair(real: torch.Tensor, fake: torch.Tensor) -> None:
    """ValueError unless both are (B,3,H,W), of one shape, free of NaN and inside [-0.01, 1.01].

    The message names the range that was seen.
    """
    check_images(real, "real images")
    check_images(fake, "fake images")
    if real.shape != fake.shape:
        raise ValueError(
            f"real and fake images differ in shape: {tuple(real.shape)} and {tuple(fake.shape)}"
        )


def float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, on the CPU where its device has none (mps)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _chunk(images: torch.Tensor) -> int:
    """Images taken at a time: on a CPU few enough for its cache."""
    return 1 if images.device.type == "cpu" else len(images)


def psnr(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) twice -> (B,) float64 in dB, data range 1; infinite for equal images."""
    parts = zip(real.split(_chunk(real)), fake.split(_chunk(fake)), strict=True)
    rows = [float64((a - b).square().sum(dim=3)).mean(dim=(1, 2)) for a, b in parts]
    return -10 * (torch.cat(rows) / real.shape[3]).log10()


def gaussian_window(device=None, dtype=torch.float32) -> torch.Tensor:
    """(11,) weights that sum to 1."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    return (weights / weights.sum()).to(device, dtype)


class _Ssim:
    """SSIM of (n,3,H,W) pairs of one size.

    Its memory is used again for every pair: fresh memory costs a quarter of the time.
    """

    def __init__(
        self, count: int, height: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        window = gaussian_window(device, dtype).expand(12, 1, 1, WINDOW)
        self.across, self.down = window.contiguous(), window.transpose(2, 3).contiguous()
        self.maps = torch.empty(count, 12, height, width, dtype=dtype, device=device)
        # channels last: depthwise convolution along the 12 maps, six times as fast on a CPU
        self.packed = torch.empty_like(self.maps, memory_format=torch.channels_last)
        border = WINDOW - 1
        self.blurred = torch.empty(
            count, 12, height - border, width - border, dtype=dtype, device=device
        )
        self.product = torch.empty_like(self.blurred[:, :3])

    def __call__(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """(n,3,H,W) twice -> (n,) float64"""
        # variances of shifted values lose fewer digits in float32
        shift = real.mean(dim=(2, 3), keepdim=True)
        x, y, squares, product = self.maps.split(3, dim=1)
        torch.sub(real, shift, out=x)
        torch.sub(fake, shift, out=y)
        torch.mul(x, x, out=squares).addcmul_(y, y)
        torch.mul(x, y, out=product)
        across = F.conv2d(self.packed.copy_(self.maps), self.across, groups=12)
        self.blurred.copy_(F.conv2d(across, self.down, groups=12))
        mean_x, mean_y, squares, product = self.blurred.split(3, dim=1)
        variances = squares.addcmul_(mean_x, mean_x, value=-1).addcmul_(mean_y, mean_y, value=-1)
        covariance = product.addcmul_(mean_x, mean_y, value=-1)
        mean_x.add_(shift)
        mean_y.add_(shift)
        above = (
            torch.mul(mean_x, mean_y, out=self.product)
            .mul_(2)
            .add_(C1)
            .mul_(covariance.mul_(2).add_(C2))
        )
        below = mean_x.mul_(mean_x).addcmul_(mean_y, mean_y).add_(C1).mul_(variances.add_(C2))
        return float64(above.div_(below).mean(dim=(2, 3))).mean(dim=1)


@torch.no_grad()
def ssim(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) twice -> (B,) float64; float32 inside, float64 for float64 images.

    ValueError for pictures smaller than the window.
    """
    height, width = real.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {WINDOW}×{WINDOW} pixels, got {height}×{width}"
        )
    dtype = (
        torch.float64
        if real.dtype == torch.float64 and real.device.type != "mps"
        else torch.float32
    )
    count = _chunk(real)
    measure = _Ssim(count, height, width, dtype, real.device)
    parts = zip(real.split(count), fake.split(count), strict=True)
    return torch.cat([measure(a.to(dtype), b.to(dtype)) for a, b in parts])
