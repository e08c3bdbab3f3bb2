"""PSNR and SSIM of [0,1] images, one value an image.

SSIM is Wang et al. 2004: Gaussian window 11×11, σ 1.5, data range 1, K = .01, .03, population covariance, border of five
pixels left out, mean over channels. It equals scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
use_sample_covariance=False, data_range=1)`.
"""

import torch

from muse.models.layers import check_images

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
CHUNK = 4  # images filtered at a time: the working set stays in the processor's cache


def check_pair(real: torch.Tensor, fake: torch.Tensor) -> None:
    """ValueError unless both are (B,3,H,W), of one shape, free of NaN and inside [-0.01, 1.01] (the range is named)."""
    check_images(real, "real images")
    check_images(fake, "fake images")
    if real.shape != fake.shape:
        raise ValueError(f"real and fake images differ in shape: {tuple(real.shape)} and {tuple(fake.shape)}")


def float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, on the CPU where its device has none (mps)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def psnr(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) twice -> (B,) in dB, data range 1; infinite for equal images."""
    return -10 * (float64(real) - float64(fake)).square().mean(dim=(1, 2, 3)).log10()


def gaussian_window(device=None, dtype=torch.float32) -> torch.Tensor:
    """(11,) weights that sum to 1."""
    offsets = torch.arange(WINDOW, device=device, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    return (weights / weights.sum()).to(dtype)


def _blur(maps: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """(..., H, W) -> (..., H-10, W-10): separable filter without padding, by shifted sums (faster than 1-channel conv)."""
    height, width = maps.shape[-2] - WINDOW + 1, maps.shape[-1] - WINDOW + 1
    across = maps[..., :width] * weights[0]
    for i in range(1, WINDOW):
        across.add_(maps[..., i : i + width], alpha=weights[i])
    down = across[..., :height, :] * weights[0]
    for i in range(1, WINDOW):
        down.add_(across[..., i : i + height, :], alpha=weights[i])
    return down


def _ssim_chunk(real: torch.Tensor, fake: torch.Tensor, weights: list[float]) -> torch.Tensor:
    shift = real.mean(dim=(2, 3), keepdim=True)  # variances of shifted values lose fewer digits in float32
    x, y = real - shift, fake - shift
    blurred = _blur(torch.stack((x, y, x * x + y * y, x * y)), weights)
    mean_x, mean_y, squares, product = blurred
    variances = squares - mean_x * mean_x - mean_y * mean_y
    covariance = product - mean_x * mean_y
    mean_x, mean_y = mean_x + shift, mean_y + shift
    luminance = (2 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    return float64(luminance * (2 * covariance + C2) / (variances + C2)).mean(dim=(1, 2, 3))


def ssim(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) twice -> (B,) float64; float32 inside (float64 for float64 images). ValueError under 11 pixels a side."""
    if min(real.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}×{WINDOW} pixels, got {real.shape[-2]}×{real.shape[-1]}")
    dtype = torch.float64 if real.dtype == torch.float64 and real.device.type != "mps" else torch.float32
    weights = gaussian_window(dtype=torch.float64).tolist()
    parts = [
        _ssim_chunk(a.to(dtype), b.to(dtype), weights) for a, b in zip(real.split(CHUNK), fake.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)
