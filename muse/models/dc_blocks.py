"""DC-AE's decoder out of torch's own layers (Chen et al., 2024, arXiv 2410.10733).

The tensors have the names of diffusers' `AutoencoderDC.decoder`, and outputs and gradients have its
bits (tests/models/test_decoder.py). diffusers itself is not imported: it takes seconds, and brings
in every model that it has.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.models.norms import SameTypeRMSNorm

ACTIVATIONS = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}
NORMS = ("rms_norm", "batch_norm")
BLOCKS = ("ResBlock", "EfficientViTBlock")
UPSAMPLING = ("pixel_shuffle", "interpolate")


def _norm(kind: str, channels: int) -> nn.Module:
    """A norm over the channels of (B, C, H, W): the last dimension for `rms_norm`."""
    if kind == "rms_norm":
        return SameTypeRMSNorm(
            nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), 1e-5
        )
    if kind == "batch_norm":
        return nn.BatchNorm2d(channels)
    raise ValueError(f"unknown norm {kind!r}: one of {', '.join(NORMS)}")


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm of `_norm` applied to x (B, C, H, W)."""
    return norm(x) if isinstance(norm, nn.BatchNorm2d) else norm(x.movedim(1, -1)).movedim(-1, 1)


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


# ------------------------------------------------------------------------------------------- blocks
class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))), 3x3 convolutions, as many channels out as in."""

    def __init__(self, channels: int, norm: str, activation: str):
        super().__init__()
        self.nonlinearity = _activation(activation)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = _norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        return _normed(self.norm, self.conv2(self.nonlinearity(self.conv1(x)))) + x


class _Neighbourhood(nn.Module):
    """Queries, keys and values mixed with their neighbours, then within each head."""

    def __init__(self, width: int, heads: int, kernel: int):
        super().__init__()
        self.proj_in = nn.Conv2d(
            3 * width, 3 * width, kernel, padding=kernel // 2, groups=3 * width, bias=False
        )
        self.proj_out = nn.Conv2d(3 * width, 3 * width, 1, groups=3 * heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x))


class LinearAttention(nn.Module):
    """x + norm(attention(x)) with similarity relu(q) relu(k), at several scales side by side.

    Where there are more places than a head has channels, values and keys are multiplied first:
    linear in the number of places.
    """

    EPS = 1e-15

    def __init__(self, channels: int, head_dim: int, kernels: Sequence[int], norm: str):
        super().__init__()
        self.head_dim, heads = head_dim, channels // head_dim
        width = heads * head_dim
        self.to_q = nn.Linear(channels, width, bias=False)
        self.to_k = nn.Linear(channels, width, bias=False)
        self.to_v = nn.Linear(channels, width, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            _Neighbourhood(width, heads, kernel) for kernel in kernels
        )
        self.to_out = nn.Linear(width * (1 + len(kernels)), channels, bias=False)
        self.norm_out = _norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        last = x.movedim(1, -1)
        qkv = torch.cat([self.to_q(last), self.to_k(last), self.to_v(last)], dim=3).movedim(-1, 1)
        scales = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], dim=1)
        linear = height * width > self.head_dim
        if linear:  # sums over all places: float32 also under autocast
            scales = scales.float()
        scales = scales.reshape(x.shape[0], -1, 3 * self.head_dim, height * width)
        query, key, value = scales.chunk(3, dim=2)  # (B, heads of all scales, d, places) each
        query, key = F.relu(query), F.relu(key)
        mixed = self._linear(query, key, value) if linear else self._quadratic(query, key, value)
        mixed = mixed.to(x.dtype) if linear else mixed
        mixed = mixed.reshape(x.shape[0], -1, height, width)
        mixed = self.to_out(mixed.movedim(1, -1)).movedim(-1, 1)
        return _normed(self.norm_out, mixed) + x

    def _linear(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        value = F.pad(value, (0, 0, 0, 1), value=1)  # the row of ones sums up the weights
        mixed = ((value @ key.transpose(-1, -2)) @ query).float()
        return mixed[:, :, :-1] / (mixed[:, :, -1:] + self.EPS)

    def _quadratic(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (key.transpose(-1, -2) @ query).float()
        weights = weights / (weights.sum(dim=2, keepdim=True) + self.EPS)
        return value @ weights.to(value.dtype)


class _GatedConv(nn.Module):
    """x + norm(1x1(a * silu(b))) with (a, b) = depthwise 3x3(silu(1x1(x))), four times as wide."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = 4 * channels
        self.nonlinearity = nn.SiLU()
        self.conv_inverted = nn.Conv2d(channels, hidden * 2, 1)
        self.conv_depth = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = _norm("rms_norm", channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv_depth(self.nonlinearity(self.conv_inverted(x))).chunk(2, dim=1)
        return _normed(self.norm, self.conv_point(value * self.nonlinearity(gate))) + x


class LinearAttentionBlock(nn.Module):
    """DC-AE's `EfficientViTBlock`: linear attention, then a gated convolution."""

    def __init__(self, channels: int, head_dim: int, kernels: Sequence[int], norm: str):
        super().__init__()
        self.attn = LinearAttention(channels, head_dim, kernels, norm)
        self.conv_out = _GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class UpBlock(nn.Module):
    """Twice the height and width: a convolution beside a shortcut that unfolds channels into space.

    Args:
        fan_in: channels in.
        fan_out: channels out.
        interpolate: enlarge by repetition, then convolve; otherwise convolve, then unfold.
        shortcut: add the unfolded input.
    """

    factor = 2

    def __init__(self, fan_in: int, fan_out: int, interpolate: bool, shortcut: bool):
        super().__init__()
        self.interpolate, self.shortcut = interpolate, shortcut
        self.repeats = fan_out * self.factor**2 // fan_in
        wide = fan_out if interpolate else fan_out * self.factor**2
        self.conv = nn.Conv2d(fan_in, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate:
            large = self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))
        else:
            large = F.pixel_shuffle(self.conv(x), self.factor)
        if not self.shortcut:
            return large
        return large + F.pixel_shuffle(_repeated(x, self.repeats), self.factor)


def _repeated(x: Tensor, times: int) -> Tensor:
    """Every channel of x `times` times in a row; the size is given, so nothing waits for it."""
    return x.repeat_interleave(times, dim=1, output_size=x.shape[1] * times)


# ------------------------------------------------------------------------------------------ decoder
class DCDecoder(nn.Module):
    """Latent (B, C, h, w) to pixels (B, 3, H, W), nominal [-1, 1].

    Stages are kept from the finest to the coarsest and run the other way round.
    """

    def __init__(self, fields: dict[str, Any]):
        """fields: `AutoencoderDC`'s; ValueError and others where they do not fit together."""
        super().__init__()
        widths = fields["decoder_block_out_channels"]
        layers = fields["decoder_layers_per_block"]
        latent, count = fields["latent_channels"], len(widths)
        types, norms, activations = (
            (value,) * count if isinstance(value, str) else value
            for value in (
                fields["decoder_block_types"],
                fields["decoder_norm_types"],
                fields["decoder_act_fns"],
            )
        )
        if fields["upsample_block_type"] not in UPSAMPLING:
            raise ValueError(f"unknown upsample_block_type {fields['upsample_block_type']!r}")
        interpolate = fields["upsample_block_type"] == "interpolate"
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.repeats = widths[-1] // latent if fields["decoder_in_shortcut"] else 0
        stages: list[nn.Module] = []
        for index in reversed(range(count)):  # the order in which random weights are drawn
            width, parts = widths[index], []
            if index < count - 1 and layers[index] > 0:
                parts.append(UpBlock(widths[index + 1], width, interpolate, shortcut=True))
            for _ in range(layers[index]):
                if types[index] == "ResBlock":
                    parts.append(ResBlock(width, norms[index], activations[index]))
                elif types[index] == "EfficientViTBlock":
                    kernels = fields["decoder_qkv_multiscales"][index]
                    head_dim = fields["attention_head_dim"]
                    parts.append(LinearAttentionBlock(width, head_dim, kernels, norms[index]))
                else:
                    raise ValueError(
                        f"unknown block type {types[index]!r}: one of {', '.join(BLOCKS)}"
                    )
            stages.insert(0, nn.Sequential(*parts))
        self.up_blocks = nn.ModuleList(stages)
        width = widths[0] if layers[0] > 0 else widths[1]
        self.norm_out = _norm("rms_norm", width)
        self.conv_act = _activation(fields["decoder_conv_act_fn"])
        if layers[0] > 0:
            self.conv_out = nn.Conv2d(width, fields["in_channels"], 3, padding=1)
        else:
            self.conv_out = UpBlock(width, fields["in_channels"], interpolate, shortcut=False)

    def unfold_channels(self, latent: Tensor) -> Tensor:
        """Latent -> features of the coarsest stage."""
        features = self.conv_in(latent)
        return features + _repeated(latent, self.repeats) if self.repeats else features

    def to_pixels(self, features: Tensor) -> Tensor:
        """Features of the finest stage -> pixels."""
        return self.conv_out(self.conv_act(_normed(self.norm_out, features)))

    def forward(self, latent: Tensor) -> Tensor:
        x = self.unfold_channels(latent)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.to_pixels(x)
