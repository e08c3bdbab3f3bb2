"""What every teacher shares: it is frozen, takes [0,1] pixels, and names its options in errors."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.models.layers import IMAGENET_MEAN, IMAGENET_STD

log = logging.getLogger(__name__)


class TopologyTarget(NamedTuple):
    """What a topology teacher says of a batch (paper: A_T)."""

    # One tensor for each student block, (B, heads or 1, Nt, Nt) float32, rows sum to 1. The same
    # tensor may stand in several places.
    maps: tuple[Tensor, ...]
    grid: tuple[int, int]  # (ht, wt) with ht * wt = Nt


class FrozenTeacher(nn.Module):
    """A module without gradients that stays in eval mode. Call `freeze()` once it is built.

    Its network runs within `inside_precision()`; what it makes of the network's answer (softmax of
    cosines, unit length) stays in float32.
    """

    precision = "float32"

    def set_precision(self, precision: str) -> "FrozenTeacher":
        """How the network computes from now on: `float32`, `tf32` or `bf16`."""
        self.precision = precision
        return self

    def inside_precision(self) -> contextlib.AbstractContextManager:
        return frozen_precision(self.precision, self.device)

    def freeze(self) -> "FrozenTeacher":
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in eval mode whatever `mode` is."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        tensors = [*self.parameters(), *self.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")


@contextlib.contextmanager
def frozen_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Within: how a network that does not learn computes, whatever autocast says around it.

    Args:
        precision: `float32`; `tf32` (a GPU multiplies matrices with 10 bits of mantissa and adds in
            float32; elsewhere as float32); `bf16` (autocast).
        device: where it computes.
    """
    if not torch.amp.is_autocast_available(device.type):  # the meta device computes nothing
        yield
        return
    before = torch.get_float32_matmul_precision()
    if precision == "tf32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        if torch.get_float32_matmul_precision() != before:
            torch.set_float32_matmul_precision(before)


class Normalise(nn.Module):
    """[0,1] pixels to a network's own range: (x - mean) / std, once (FIDELITY row 3)."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std


def resize_images(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images (B,3,H,W) at `size`, unchanged where it is None.

    Bilinear and anti-aliased: no value overshoots [0,1].
    """
    if size is None or tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images.float(), size=tuple(size), mode="bilinear", antialias=True)


def evenly_spaced_layers(depth: int, count: int) -> list[int]:
    """`count` of `depth` layers, evenly spaced, the last one last (FIDELITY row 2).

    32, 6 -> 5, 10, 15, 21, 26, 31.
    """
    return [-(-(index + 1) * depth // count) - 1 for index in range(count)]


def choose_layers(layers: Sequence[int] | None, depth: int, count: int) -> list[int]:
    """The teacher layer of each student block: evenly spaced, or as named.

    Args:
        layers: one layer for all blocks, or one for each; negative numbers count from the end.
            None: evenly spaced.
        depth: how many layers the teacher has.
        count: how many student blocks there are.

    Raises ConfigError on a layer that does not exist or on a wrong number of them.
    """
    if layers is None:
        return evenly_spaced_layers(depth, count)
    if not all(isinstance(layer, int) for layer in layers):
        raise ConfigError(
            "teacher.topology.layers must be layer numbers for an attention teacher, "
            f"got {list(layers)}"
        )
    if len(layers) not in (1, count):
        raise ConfigError(
            f"teacher.topology.layers names {len(layers)} layers for {count} student blocks: "
            f"name 1 or {count}"
        )
    if not all(-depth <= layer < depth for layer in layers):
        raise ConfigError(
            f"teacher.topology.layers {list(layers)}: the teacher has layers 0..{depth - 1}"
        )
    chosen = [layer % depth for layer in layers]
    return chosen * count if len(chosen) == 1 else chosen


def image_size_option(value: Any, where: str) -> tuple[int, int] | None:
    """An image size given as one number or as [height, width]; None stays None.

    Raises ConfigError on anything else.
    """
    if value is None:
        return None
    sides = [value, value] if isinstance(value, int) else value
    if (
        not isinstance(sides, (list, tuple))
        or len(sides) != 2
        or not all(isinstance(s, int) and s > 0 for s in sides)
    ):
        raise ConfigError(f"{where} must be a number of pixels or [height, width], got {value!r}")
    return sides[0], sides[1]
