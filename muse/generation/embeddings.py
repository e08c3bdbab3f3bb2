"""What enters LightningDiT: patches, time and label as vectors, and its two tables of positions.

Legend: B images, C latent channels, (h, w) latent grid, N tokens, D width, d head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE = 10000.0  # of every sine here: positions, rotary angles and time
TIME_FEATURES = 256


class PatchEmbed(nn.Module):
    """(B, C, h, w) -> (B, N, D)"""

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D)"""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(steps * (-math.log(BASE) / half))  # (B, 128)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        # Float32 whatever the rest is: the fastest angle is t itself, and bfloat16 would round its
        # sine and cosine to 1/256, as coarsely as 250 steps divide the path.
        first, _, last = self.mlp
        with torch.autocast(t.device.type, enabled=False):
            hidden = F.silu(F.linear(features, first.weight.float(), first.bias.float()))
            condition = F.linear(hidden, last.weight.float(), last.bias.float())
        return condition.to(last.weight.dtype)


class LabelEmbedder(nn.Module):
    """y (B,) -> (B, D); the last row of the table is "no class"."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


class RotaryTable(nn.Module):
    """Cosines and sines (N, d): half of d turns with the row, the other half with the column."""

    def __init__(self, grid: tuple[int, int], head_dim: int):
        super().__init__()
        steps = torch.arange(0, head_dim // 2, 2, dtype=torch.float64)  # (d/4,)
        frequencies = (BASE ** (-steps / (head_dim // 2))).repeat_interleave(2)  # (d/2,) in pairs
        row, column = (place[:, None] * frequencies for place in places(grid))  # (N, d/2) each
        angles = torch.cat([row, column], dim=-1)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())


def rotate_pairs(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, heads, N, d) by tables (N, d), in float32; pairs are 2i and 2i + 1 of d."""
    cos, sin = rotary
    wide = x.float()
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, N, d/2) each
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (wide * cos + turned * sin).to(x.dtype)


def sine_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Positions of DiT and MAE, (N, D) float32: sines and cosines of the column, then the row."""
    frequencies = BASE ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = (place[:, None] * frequencies for place in places(grid))  # (N, D/4) each
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1).float()


def places(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of every token, (N,) float64 each, row by row."""
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return row.flatten(), column.flatten()
