"""From noise to latents: Euler or Heun steps along a network's velocity, with or without guidance.

Guidance moves the velocity v of an image's own class away from a worse one u:  u + scale · (v - u).
- u from the same network without the class: classifier-free guidance (Ho, arXiv 2207.12598);
- u from a second, weaker network with the class: autoguidance (Karras et al., arXiv 2406.02507);
- only in an interval of times (Kynkäänniemi et al., arXiv 2404.07724), only on some channels
  (LightningDiT's "guidance 10" is meant for the first 3 of 32, and means nothing elsewhere).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy
import torch
from torch import Tensor, nn

from muse.generation.flow import VelocityField, shift_time
from muse.generation.lightningdit import check_class_labels

METHODS = ("euler", "heun")


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times, from exactly 0 (noise) to exactly 1 (data): i / steps, then `shift_time`."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [shift_time(i / steps, shift) for i in range(steps + 1)]


@torch.no_grad()
def sample(
    net: VelocityField,
    noise: Tensor,
    labels: Tensor,
    steps: int = 250,
    shift: float = 1.0,
    cfg_scale: float = 1.0,
    cfg_interval: tuple[float, float] = (0.0, 1.0),
    cfg_channels: int | None = None,
    method: str = "euler",
    guide: VelocityField | None = None,
) -> Tensor:
    """Normalised latents (B, C, h, w), float32 (float64 for float64 noise).

    Networks are put into eval mode meanwhile, so that no label is dropped. Precision is the
    caller's (autocast around the call); the latents themselves stay in float32 between the steps.

    Args:
        net: velocity as net(x, t, labels); `num_classes` is its label for "no class".
        noise: (B, C, h, w), standard normal; `noise_for` makes it independent of the batch.
        labels: (B,), int64 in 0 ... num_classes.
        steps: steps of the grid; Heun evaluates twice a step.
        shift: of the grid of times (`shift_time`); LightningDiT samples with 0.3.
        cfg_scale: of guidance; 1 is none, and then the network sees each image once a step.
        cfg_interval: (low, high): a step that starts at t is guided if low <= t < high.
        cfg_channels: guide this many first channels alone; the others keep the class's velocity.
        method: "euler" (first order) or "heun" (second order).
        guide: the weaker network of autoguidance; None is classifier-free guidance.

    Raises:
        ValueError: an argument out of its range, a label that is no class, shapes that do not
            belong together.
    """
    _check(net, noise, labels, cfg_interval, cfg_channels, method)
    if cfg_scale != 1.0 and guide is None and not hasattr(net, "num_classes"):
        raise ValueError("guidance needs a network with num_classes, or a second one as guide")
    velocity = _guided(net, guide, labels, cfg_scale, cfg_channels)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    low, high = cfg_interval
    with evaluating(net, guide):
        for t, after in pairwise(time_grid(steps, shift)):
            guided = cfg_scale != 1.0 and low <= t < high
            v = velocity(x, t, guided)
            if method == "heun":
                v = (v + velocity(x + (after - t) * v, after, guided)) / 2
            x = x + (after - t) * v
    return x


def _guided(
    net: VelocityField,
    guide: VelocityField | None,
    labels: Tensor,
    scale: float,
    channels: int | None,
) -> Callable[[Tensor, float, bool], Tensor]:
    """velocity(x, t, guided) of the whole batch at one time."""

    def velocity(x: Tensor, t: float, guided: bool) -> Tensor:
        times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        if not guided:
            return net(x, times, labels).to(x.dtype)
        if guide is not None:
            own, worse = net(x, times, labels), guide(x, times, labels)
        else:
            both = torch.cat([labels, torch.full_like(labels, net.num_classes)])  # (2B,)
            own, worse = net(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
        own, worse = own.to(x.dtype), worse.to(x.dtype)
        moved = worse + scale * (own - worse)
        return moved if channels is None else torch.cat([moved[:, :channels], own[:, channels:]], 1)

    return velocity


def _check(
    net: VelocityField,
    noise: Tensor,
    labels: Tensor,
    interval: tuple[float, float],
    channels: int | None,
    method: str,
) -> None:
    if noise.ndim != 4 or not noise.is_floating_point():
        raise ValueError(
            f"noise must be floating point (B, C, h, w), got {noise.dtype} {tuple(noise.shape)}"
        )
    if labels.shape != noise.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(noise)},) for noise {tuple(noise.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    if hasattr(net, "num_classes"):
        check_class_labels(labels, net.num_classes)
    if channels is not None and not 1 <= channels <= noise.shape[1]:
        raise ValueError(f"cfg_channels must be 1 to {noise.shape[1]}, got {channels}")
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise ValueError(f"cfg_interval must be two ascending times, got {tuple(interval)}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


@contextmanager
def evaluating(*networks: VelocityField | None) -> Iterator[None]:
    """Within the block the networks are in eval mode; then every part has its own mode again."""
    parts = [part for net in networks if isinstance(net, nn.Module) for part in net.modules()]
    modes = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, mode in zip(parts, modes):
            part.training = mode


def noise_for(seed: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Noise of the images `indices`, (len(indices), *shape) float32 on the CPU.

    Image i's depends on (seed, i) alone: it is a Philox stream with that key. A torch generator
    keeps 32 bits of its seed, so that two of 50,000 images share their noise in one run of four.

    Args:
        seed: 0 to 2**64 - 1.
        indices: the images' numbers, each 0 to 2**64 - 1, in any order and any batches.
        shape: of one image's noise, (C, h, w).
    """
    rows = []
    for index in indices:
        if not (0 <= seed < 2**64 and 0 <= index < 2**64):
            raise ValueError(f"seed and index must be 0 to 2**64 - 1, got {seed} and {index}")
        stream = numpy.random.Generator(numpy.random.Philox(key=(int(seed) << 64) | int(index)))
        rows.append(torch.from_numpy(stream.standard_normal(tuple(shape), dtype=numpy.float32)))
    return torch.stack(rows) if rows else torch.empty(0, *shape)
