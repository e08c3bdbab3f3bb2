"""Flow matching: a straight path from noise (t = 0) to data (t = 1), and the loss of its velocity.

    x_t = t · data + (1 - t) · noise          velocity = data - noise

LightningDiT (arXiv 2501.01423) adds to the squared error the cosine between the velocities, and
draws t logit-normal (Stable Diffusion 3, arXiv 2403.03206), so that most times lie mid-way.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Time = TypeVar("Time", float, Tensor)
# (x, t, labels) -> velocity, of x's shape
VelocityField = Callable[[Tensor, Tensor, Tensor], Tensor]

# In the cosine, shorter velocities count as this long. A new network's velocity is exactly zero,
# and there the cosine's gradient is one over this: with torch's own 1e-8 the first step would fill
# Adam's second moment for hundreds of steps.
MIN_NORM = 1e-3


class FlowLoss(NamedTuple):
    """Both parts of each image's loss, (B,) float32; LightningDiT adds their means."""

    velocity: Tensor  # mean squared error over channels and positions
    cosine: Tensor  # 1 - cosine over channels, mean over positions; in [0, 2]


def path_point(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t (B, C, h, w) of data `latents` and `noise` (B, C, h, w) at the times t (B,)."""
    t = t.view(-1, 1, 1, 1).to(latents.dtype)
    return t * latents + (1 - t) * noise


def path_velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt (B, C, h, w): the same at every t."""
    return latents - noise


def shift_time(t: Time, shift: float) -> Time:
    """s·t / (1 + (s - 1)·t), for t in [0, 1]: a shift s below 1 moves times towards the noise.

    It adds ln s to the logit of t. Stable Diffusion 3 counts time from the data: its shift is 1/s.
    """
    if shift <= 0:
        raise ValueError(f"shift must be above 0, got {shift}")
    return shift * t / (shift * t + (1 - t))  # the same, and exactly 1 at t = 1 in floating point


def sample_times(
    count: int,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Times of training, (count,) float32 in (0, 1): the sigmoid of a normal draw, then shifted.

    Args:
        count: number of times.
        mean: of the logit of t before the shift; below 0 nearer to the noise (VTP uses -0.75).
        std: of the logit of t.
        shift: see `shift_time`.
        generator: what the draw depends on; the global generator without one.
        device: where the times are wanted; the draw is made on the generator's own device.
    """
    logits = mean + std * _normal((count,), generator, device)
    return shift_time(logits.sigmoid(), shift)


def flow_loss(
    net: VelocityField,
    latents: Tensor,
    labels: Tensor,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    time_mean: float = 0.0,
    time_std: float = 1.0,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
) -> FlowLoss:
    """Velocity and cosine loss of `net` on the path to `latents`.

    Args:
        net: called as net(x_t, t, labels).
        latents: data (B, C, h, w), normalised (`LatentStatistics`), floating point.
        labels: class of each image (B,), int64.
        t: times (B,) in [0, 1]; drawn by `sample_times` when None.
        noise: (B, C, h, w) of unit variance; drawn when None.
        time_mean, time_std, shift: of the drawn times.
        generator: what the draws depend on. Labels are dropped by the network, from the global
            generator.

    Raises:
        ValueError: latents, labels, t or noise of shapes that do not belong together.
    """
    if latents.ndim != 4 or not latents.is_floating_point():
        raise ValueError(
            f"latents must be floating point (B, C, h, w), "
            f"got {latents.dtype} {tuple(latents.shape)}"
        )
    if t is None:
        t = sample_times(len(latents), time_mean, time_std, shift, generator, latents.device)
    if noise is None:
        noise = _normal(latents.shape, generator, latents.device).to(latents.dtype)
    for name, value, shape in (
        ("labels", labels, latents.shape[:1]),
        ("t", t, latents.shape[:1]),
        ("noise", noise, latents.shape),
    ):
        if value.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)} for latents {tuple(latents.shape)}, "
                f"got {tuple(value.shape)}"
            )
    predicted = net(path_point(latents, noise, t), t, labels).float()
    target = path_velocity(latents, noise).float()
    cosine = F.cosine_similarity(predicted, target, dim=1, eps=MIN_NORM)  # (B, h, w)
    return FlowLoss(
        velocity=(predicted - target).square().flatten(1).mean(1),
        cosine=(1 - cosine).flatten(1).mean(1),
    )


def _normal(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    """Standard normal float32 on `device`, the same on every device for a generator of the CPU."""
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)
