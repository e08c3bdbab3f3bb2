"""Logits of a whole picture of any size: in one piece, or averaged over windows that overlap.

As mmsegmentation's `whole` and `slide`. A network here is any function of a window (1,C,h,w) that
gives logits (R,K,h,w) at the window's pixels, R heads at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from muse.errors import ConfigError
from muse.evaluation.mask_cells import covered_size

Network = Callable[[Tensor], Tensor]
RESIZED_VALUES = 2**25  # logits in memory beside those of the picture, 128 MB


def cover_pixels(
    logits: Tensor, size: tuple[int, int], cell: int | None = None, mode: str = "bilinear"
) -> Tensor:
    """(...,K,h,w) on a grid -> (...,K,*size): resized to what the grid covers, and cut.

    Args:
        logits: (B,K,h,w).
        size: (H,W) of the pictures before any padding.
        cell: see `covered_size`.
        mode: bilinear, or nearest to repeat each cell.
    """
    align = {"align_corners": False} if mode == "bilinear" else {}
    covered = covered_size(size, cell)
    return F.interpolate(logits, covered, mode=mode, **align)[..., : size[0], : size[1]]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side; the last ends at its end, so it may overlap by more."""
    last = max(length - window, 0)
    count = -(-last // stride) + 1
    return [min(number * stride, last) for number in range(count)]


@dataclass(frozen=True)
class Inference:
    """How logits of a picture come about. ConfigError for a stride that leaves gaps.

    Args:
        window: side of the windows; None for the picture in one piece.
        stride: from window to window.
    """

    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not 1 <= (self.stride or 0) <= self.window:
            raise ConfigError(
                f"a stride of {self.stride} does not fit windows of {self.window} pixels"
            )

    def __call__(self, network: Network, picture: Tensor) -> Tensor:
        """(C,H,W) -> (R,K,H,W): where windows overlap, the mean of their logits."""
        if self.window is None:
            return network(picture[None])
        height, width = picture.shape[-2:]
        total, count = None, picture.new_zeros((height, width), dtype=torch.float32)
        for top in window_starts(height, self.window, self.stride):
            for left in window_starts(width, self.window, self.stride):
                place = (..., slice(top, top + self.window), slice(left, left + self.window))
                logits = network(picture[None][place])  # (R,K,h,w)
                if total is None:
                    total = logits.new_zeros((*logits.shape[:2], height, width))
                total[place] += logits
                count[place] += 1
        return total.div_(count.to(total.device))


def best_class(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(K,h,w) -> (H,W) class indices: resized bilinearly to `size`, then the best class.

    Equal to `F.interpolate` and argmax, in bands of rows, so that 150 classes of a picture of ten
    megapixels are never in memory together.
    """
    (classes, height, width), (rows, columns) = logits.shape, size
    if (height, width) == tuple(size):
        return logits.argmax(0)
    # rows as F.interpolate takes them without align_corners: centres of pixels on each other
    source = (torch.arange(rows, dtype=torch.float64) + 0.5) * (height / rows) - 0.5
    source = source.clamp_min(0)
    upper = source.floor().long().clamp_max(height - 1)
    weight = (source - upper).to(logits).view(-1, 1)
    upper = upper.to(logits.device)
    lower = (upper + 1).clamp_max(height - 1)
    band = max(1, RESIZED_VALUES // (classes * max(columns, width)))
    found = []
    for first in range(0, rows, band):
        part = slice(first, first + band)
        lines = torch.lerp(logits[:, upper[part]], logits[:, lower[part]], weight[part])
        wide = F.interpolate(
            lines[None], (lines.shape[1], columns), mode="bilinear", align_corners=False
        )
        found.append(wide[0].argmax(0))
    return torch.cat(found)
