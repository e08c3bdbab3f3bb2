"""Decode a large latent piece by piece: the same picture in less memory.

DC-AE's first stages see the whole picture (linear attention), at an eighth of its resolution or
less; they run as they are. What follows, and takes most of the memory, are convolutions, whose
outputs depend on a few neighbours only. That part runs tile by tile. Each tile comes with as many
cells around it as the convolutions reach, so that a tile's pixels are those of the untiled decoder
and there is no seam to blend. The encoder attends over all tokens, so it is not tiled.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from muse.models.dc_blocks import LinearAttentionBlock, UpBlock


def decode_tiled(decoder: nn.Module, latent: Tensor, tile: int) -> Tensor:
    """What `decoder(latent)` gives, (B, 3, H, W), nominal [-1, 1], for inference.

    Args:
        decoder: of `build_decoder`.
        latent: (B, C, h, w).
        tile: side of a tile in pixels of the output, rounded down to whole cells of the features
            that are tiled, at least one.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1 pixel, got {tile}")
    head, tail = _split(decoder)
    features = decoder.unfold_channels(latent)
    for stage in head:
        features = stage(features)
    if not tail:
        return decoder.to_pixels(features)
    scale, reach = _scale_and_reach(decoder, tail)
    side, pixels = max(1, tile // scale), None
    height, width = features.shape[-2:]
    for top, bottom in _spans(height, side):
        for left, right in _spans(width, side):
            above, before = min(top, reach), min(left, reach)
            piece = features[..., top - above : bottom + reach, left - before : right + reach]
            for stage in tail:
                piece = stage(piece)
            piece = decoder.to_pixels(piece)
            rows = slice(above * scale, (above + bottom - top) * scale)
            columns = slice(before * scale, (before + right - left) * scale)
            if pixels is None:
                shape = (*piece.shape[:2], height * scale, width * scale)
                pixels = torch.empty(shape, dtype=piece.dtype, device=piece.device)
            pixels[..., top * scale : bottom * scale, left * scale : right * scale] = piece[
                ..., rows, columns
            ]
    return pixels


def _spans(length: int, side: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each tile along one side."""
    return ((start, min(start + side, length)) for start in range(0, length, side))


def _split(decoder: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Stages in the order in which they run: up to the last that sees everything, and the rest."""
    stages = list(reversed(decoder.up_blocks))
    seeing = [
        index
        for index, stage in enumerate(stages)
        if any(isinstance(module, LinearAttentionBlock) for module in stage.modules())
    ]
    last = seeing[-1] + 1 if seeing else 0
    return stages[:last], stages[last:]


def _scale_and_reach(decoder: nn.Module, tail: list[nn.Module]) -> tuple[int, int]:
    """How much the tail enlarges, and how many of its input's cells an output depends on, to each
    side.
    """
    scale, reach = 1, 0.0
    for module in (*(part for stage in tail for part in stage), decoder.conv_out):
        for part in module.modules():
            if isinstance(part, nn.Conv2d):  # in front of the enlargement it reaches further
                reach += (part.kernel_size[0] // 2) / scale
        if isinstance(module, UpBlock):
            scale *= module.factor
    return scale, math.ceil(reach)
