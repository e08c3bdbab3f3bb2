"""LightningDiT: a transformer that gives the velocity of a latent on its way from noise to data.

Published by Yao, Yang and Wang, "Reconstruction vs. Generation" (arXiv 2501.01423): DiT with
SwiGLU, RMSNorm and 2-D rotary positions. Parameter names and shapes are those of its checkpoints,
so that they load here.

    x_t ── patches + table ──┬── [block] × depth ── final layer ── velocity
    t ── sines ── MLP ──┐    │
    y ── table ────────(+)── c, which shifts, scales and gates every block (AdaLN-zero)

Legend: B images, C latent channels, (h, w) latent grid, p patch side, N = h/p * w/p tokens,
D width, heads x d = D.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muse.generation.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    RotaryTable,
    TimestepEmbedder,
    rotate_pairs,
    sine_table,
)
from muse.models.layers import RMSNorm


class LightningDiT(nn.Module):
    """Velocity of a noisy latent; `net(x, t, y)`.

    Args:
        input_size: side of the latent grid, or (h, w). The tables of positions fit this grid alone.
        patch_size: side of the square of latent cells that makes one token.
        in_channels: channels C of the latent, in and out.
        hidden_size: width D, a multiple of 4 * num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: labels are 0 ... num_classes - 1; the label num_classes means "no class".
        mlp_ratio: width of a plain MLP over D; the gated one of a block has two thirds of it.
        qk_norm: RMSNorm of queries and keys.
        class_dropout_prob: in training, the share of images whose label becomes "no class", for
            guidance.
        gradient_checkpointing: compute each block again in the backward pass instead of keeping
            what it computed.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        class_dropout_prob: float = 0.1,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        h, w = (input_size, input_size) if isinstance(input_size, int) else input_size
        if h % patch_size or w % patch_size:
            raise ValueError(f"input_size {h}x{w} is not a multiple of patch_size {patch_size}")
        if hidden_size % (4 * num_heads):
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of 4 * num_heads = {4 * num_heads}: "
                "each head rotates pairs by row and pairs by column"
            )
        self.arguments = {
            "input_size": [h, w],
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
            "mlp_ratio": mlp_ratio,
            "qk_norm": qk_norm,
            "class_dropout_prob": class_dropout_prob,
        }
        self.facts: dict[str, Any] = {}
        self.latent_shape = (in_channels, h, w)
        self.num_classes, self.patch_size = num_classes, patch_size
        self.gradient_checkpointing = gradient_checkpointing

        grid = (h // patch_size, w // patch_size)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        # Fixed, yet a parameter: in the published network it is among the 675,035,552 of XL/1.
        table = sine_table(grid, hidden_size)[None]  # (1, N, D)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.feat_rope = RotaryTable(grid, hidden_size // num_heads)
        self.blocks = nn.ModuleList(
            LightningDiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """As DiT starts: Xavier, and zeros where a block or the output would add something."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def portable_config(self) -> dict[str, Any]:
        """What config.json holds: the arguments, and `facts` of whoever trained it."""
        return {"model_type": "muse_generator", "generator": self.arguments, **self.facts}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity data - noise, (B, C, h, w) in x's dtype.

        Args:
            x: noisy latents (B, C, h, w), floating point.
            t: time of each image (B,), 0 = noise, 1 = data.
            y: label of each image (B,), int64 in 0 ... num_classes.

        Raises:
            ValueError: another shape or dtype; a label out of range (looked at on a CPU alone:
                asking an accelerator would wait for it).
        """
        self._check(x, t, y)
        # A label is dropped here, once a sample: all blocks see the same condition.
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        tokens = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        rotary = (self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, rotary, use_reentrant=False)
            else:
                tokens = block(tokens, c, rotary)
        return self._unpatchify(self.final_layer(tokens, c)).to(x.dtype)

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.latent_shape or not x.is_floating_point():
            expected = ", ".join(map(str, self.latent_shape))
            raise ValueError(
                f"x must be floating point (B, {expected}), got {x.dtype} {tuple(x.shape)}"
            )
        if t.shape != x.shape[:1] or not t.is_floating_point():
            raise ValueError(
                f"t must be floating point ({len(x)},), got {t.dtype} {tuple(t.shape)}"
            )
        if y.shape != x.shape[:1] or y.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"y must be int64 ({len(x)},), got {y.dtype} {tuple(y.shape)}")
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            check_class_labels(y, self.num_classes)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, p*p*C), the channels of a cell side by side -> (B, C, h, w)"""
        c, h, w = self.latent_shape
        p = self.patch_size
        cells = patches.unflatten(1, (h // p, w // p)).unflatten(3, (p, p, c))  # (B, h, w, p, p, C)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), c, h, w)


def check_class_labels(labels: Tensor, num_classes: int) -> None:
    """`ValueError` with the first label outside 0 ... num_classes; it waits for the device."""
    wrong = labels[(labels < 0) | (labels > num_classes)]
    if len(wrong):
        raise ValueError(
            f"label {wrong[0].item()}: labels are 0 to {num_classes - 1}, "
            f"and {num_classes} for no class"
        )


class LightningDiTBlock(nn.Module):
    """Attention and gated MLP, each shifted, scaled and gated by the condition c."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = SelfAttention(dim, num_heads, qk_norm)
        self.norm2 = RMSNorm(dim)
        self.mlp = GatedMLP(dim, int(2 / 3 * int(dim * mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, N, D), c (B, D), rotary tables (N, d) each -> (B, N, D)"""
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # six of (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotary)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class SelfAttention(nn.Module):
    """Attention over all tokens, queries and keys rotated by their place on the grid."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, N, 3, heads, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        query, key = (rotate_pairs(part, rotary) for part in (self.q_norm(query), self.k_norm(key)))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """w3(silu(a) * b), a and b the two halves of w12(x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * values)


class FinalLayer(nn.Module):
    """Tokens to the velocities of their patches."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(self.norm_final(x) * (1 + scale) + shift)
