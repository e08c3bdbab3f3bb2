"""PSNR and SSIM of [0,1] images, one value an image.

SSIM is Wang et al. 2004: Gaussian window 11×11, σ 1.5, data range 1, K = .01, .03, population covariance, border of
five pixels left out, mean over channels. It equals scikit-image's `structural_similarity(gaussian_weights=True,
sigma=1.5, use_sample_covariance=False, data_range=1)`.
"""

import torch
import torch.nn.functional as F

from muse.models.layers import check_images

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def check_pair(real: torch.Tensor, fake: torch.Tensor) -> None:
    """ValueError unless both are (B,3,H,W), of one shape, free of NaN and inside [-0.01, 1.01] (the range is named)."""
    check_images(real, "real images")
    check_images(fake, "fake images")
    if real.shape != fake.shape:
        raise ValueError(f"real and fake images differ in shape: {tuple(real.shape)} and {tuple(fake.shape)}")


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


def _ssim_chunk(real: torch.Tensor, fake: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    shift = real.mean(dim=(2, 3), keepdim=True)  # variances of shifted values lose fewer digits in float32
    x, y = real - shift, fake - shift
    maps = torch.cat((x, y, x * x + y * y, x * y), dim=1)
    kernel = window.expand(maps.shape[1], 1, 1, WINDOW).contiguous()
    # channels last: depthwise convolution then runs along the 4*3 maps, six times faster on a CPU
    across = F.conv2d(maps.contiguous(memory_format=torch.channels_last), kernel, groups=len(kernel))
    blurred = F.conv2d(across, kernel.transpose(2, 3).contiguous(), groups=len(kernel)).contiguous()
    mean_x, mean_y, squares, product = blurred.split(3, dim=1)
    variances = squares - mean_x * mean_x - mean_y * mean_y
    covariance = product - mean_x * mean_y
    mean_x, mean_y = mean_x + shift, mean_y + shift
    luminance = (2 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    return float64((luminance * (2 * covariance + C2) / (variances + C2)).mean(dim=(2, 3))).mean(dim=1)


def ssim(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) twice -> (B,) float64; float32 inside (float64 for float64 images). ValueError under 11 pixels."""
    if min(real.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {WINDOW}×{WINDOW} pixels, got {real.shape[-2]}×{real.shape[-1]}"
        )
    dtype = torch.float64 if real.dtype == torch.float64 and real.device.type != "mps" else torch.float32
    window = gaussian_window(real.device, dtype)
    parts = zip(real.split(_chunk(real)), fake.split(_chunk(fake)), strict=True)
    return torch.cat([_ssim_chunk(a.to(dtype), b.to(dtype), window) for a, b in parts])
