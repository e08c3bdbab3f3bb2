"""MUSE_ViT, the student: InternViT encodes, SynergisticBlocks connect, DC-AE decodes (Fig. 2).

Shapes: B images, H W pixels, (h, w) latent grid, N = h*w tokens, D block width, E joint image-text
width, L blocks. Pixels are RGB in [0, 1] at every public boundary; each network normalises its own
input inside.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muse.config import STREAM_KEYS, model_config, plain
from muse.models.dc_ae import build_decoder
from muse.models.internvit import build_encoder
from muse.models.layers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RMSNorm,
    RotaryEmbedding,
    check_images,
    convolution_layout,
    padding_to_multiple,
    pixel_unshuffle,
    scale_gradient,
)
from muse.models.pretrained import PretrainedMixin
from muse.models.synergistic_block import SynergisticBlock

FEATURES = ("semantic", "block", "latent", "encoder")


class Encoding(NamedTuple):
    """What `encode` gives."""

    latent: Tensor  # (B, latent_dim, h, w)
    topology: tuple[Tensor, ...]  # L tensors (B, heads, N, N), rows sum to 1; () unless asked for
    semantic: Tensor  # (B, N, D): the semantic value stream of the last block
    grid: tuple[int, int]  # (h, w)
    anchors: Tensor  # (B, L, D): mean semantic token of every block


class StudentOutput(NamedTuple):
    """What a training step reads. A part that was not asked for is None (or an empty tuple)."""

    latent: Tensor | None  # (B, latent_dim, h, w)
    grid: tuple[int, int]  # (h, w)
    log_topology: tuple[Tensor, ...]  # L tensors (B, heads, N, N) of log-probabilities, float32
    anchors: Tensor | None  # (B, L, D)
    image_embeds: Tensor | None  # (L, B, E), L2-normalised: every block through the one projector
    reconstruction: Tensor | None  # (B, 3, H, W), nominal [0, 1], not clamped
    encoder_tokens: Tensor  # (B, C, he, we): encoder tokens before the pixel-unshuffle
    tokens: Tensor | None  # (B, D, h, w): tokens after the last block
    logit_scale: Tensor  # scalar, exp already taken


class _Trunk(NamedTuple):
    encoder_tokens: Tensor  # (B, he*we, C)
    encoder_grid: tuple[int, int]
    tokens: Tensor  # (B, N, D) after the last block
    grid: tuple[int, int]
    semantic: Tensor  # (B, N, D)
    anchors: Tensor  # (B, L, D)
    log_topology: tuple[Tensor, ...]


class MUSE_ViT(PretrainedMixin, nn.Module):
    """The tokenizer alone: no teacher, no loss.

    Args:
        config: the `model` section of a configuration (mapping, dataclass or DictConfig).
        load_backbones: read the weights of encoder and decoder from their sources; False builds
            them from `config` alone, for a checkpoint that brings all weights.
    """

    def __init__(self, config: Any, load_backbones: bool = True):
        super().__init__()
        self.config: DictConfig = model_config(config)
        cfg = self.config
        recompute_all = cfg.gradient_checkpointing == "all"
        self.encoder = build_encoder(
            cfg.encoder.source,
            plain(cfg.encoder.config),
            load_backbones,
            drop_path=cfg.encoder.drop_path,
            recompute=recompute_all,
        )
        self.patch_size = self.encoder.config.patch_size[0]
        self.cell = self.patch_size * cfg.unshuffle  # pixels of one latent cell, on the input side

        folded = self.encoder.config.hidden_size * cfg.unshuffle**2
        self.adapter_mlp = nn.Sequential(
            RMSNorm(folded), nn.Linear(folded, cfg.dim, bias=False), nn.GELU()
        )
        self.rotary = RotaryEmbedding(cfg.dim // cfg.num_heads)
        streams = {name: cfg[name] for name in STREAM_KEYS}
        self.muse_blocks = nn.ModuleList(
            SynergisticBlock(cfg.dim, cfg.num_heads, shared=cfg.routing == "shared", **streams)
            for _ in range(cfg.num_blocks)
        )
        self.to_latent = nn.Linear(cfg.dim, cfg.latent_dim)
        self.semantic_projector = nn.Sequential(
            nn.Linear(cfg.dim, cfg.dim, bias=False),
            nn.GELU(),
            nn.Linear(cfg.dim, cfg.semantic_dim, bias=False),
        )
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

        self.decoder, self.decoder_fields = build_decoder(
            cfg.decoder.source, plain(cfg.decoder.config), load_backbones, recompute_all
        )
        channels = self.decoder_fields["latent_channels"]
        self.decoder_adapter = (
            nn.Identity() if channels == cfg.latent_dim else nn.Conv2d(cfg.latent_dim, channels, 1)
        )
        self._init_weights()
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    def _init_weights(self) -> None:
        for part in (self.adapter_mlp, self.muse_blocks, self.to_latent, self.semantic_projector):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    # --------------------------------------------------------------------------------------- public
    def encode(self, images: Tensor, return_attention: bool = False) -> Encoding:
        """images (B, 3, H, W) in [0, 1], H and W multiples of `cell` -> `Encoding`.

        Raises `ValueError` on another range, shape or size; `reconstruct`, `embed_image` and
        `features` pad for you.
        """
        check_images(images)
        trunk = self._trunk(images, return_attention)
        topology = tuple(log.exp() for log in trunk.log_topology)
        return Encoding(
            self._latent(trunk.tokens, trunk.grid),
            topology,
            trunk.semantic,
            trunk.grid,
            trunk.anchors,
        )

    def decode(self, latent: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """latent (B, latent_dim, h, w) -> (B, 3, H, W), nominal [0, 1], not clamped.

        `size` is (H, W); without it (h, w) * cell.
        """
        if latent.ndim != 4 or latent.shape[1] != self.config.latent_dim:
            raise ValueError(
                f"latent must have shape (B, {self.config.latent_dim}, h, w), "
                f"got {tuple(latent.shape)}"
            )
        size = size or (latent.shape[-2] * self.cell, latent.shape[-1] * self.cell)
        latent = convolution_layout(self.decoder_adapter(latent))
        pixels = (self.decoder(latent) + 1) / 2  # DC-AE works in [-1, 1]
        if pixels.shape[-2:] != tuple(size):
            pixels = F.interpolate(pixels, size=tuple(size), mode="bilinear", align_corners=False)
        return pixels

    def reconstruct(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1], any H and W -> the same shape, clamped to [0, 1]."""
        height, width = images.shape[-2:]
        padded = self._pad(images)
        recon = self.decode(self.encode(padded).latent, size=padded.shape[-2:])
        return recon[..., :height, :width].clamp(0, 1)

    def embed_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> (B, E), L2-normalised: the last block's mean S."""
        trunk = self._trunk(self._pad(images), False)
        return F.normalize(self.semantic_projector(trunk.anchors[:, -1]).float(), dim=-1)

    def features(self, images: Tensor, kind: str = "semantic") -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> (B, C, h, w) for probes.

        `kind` is `semantic` (S of the last block), `block` (tokens after the last block), `latent`,
        or `encoder` (InternViT tokens, averaged over each unshuffle cell so that all four share the
        latent grid; `encoder_features` keeps its own).
        """
        if kind not in FEATURES:
            raise ValueError(f"kind must be one of {', '.join(FEATURES)}, got {kind!r}")
        images = self._pad(images)
        if kind == "encoder":
            return F.avg_pool2d(self.encoder_features(images), self.config.unshuffle)
        trunk = self._trunk(images, False)
        if kind == "latent":
            return self._latent(trunk.tokens, trunk.grid)
        return self._to_map(trunk.semantic if kind == "semantic" else trunk.tokens, trunk.grid)

    def encoder_features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> InternViT tokens (B, C, H/patch, W/patch)."""
        return self._to_map(*self._encode_tokens(self._pad(images)))

    def forward(
        self,
        images: Tensor,
        *,
        topology: bool = True,
        semantics: bool = True,
        reconstruction: bool = True,
        encoder_only: bool = False,
    ) -> StudentOutput:
        """One pass for training; each part is computed only when it is asked for.

        Args:
            images: (B, 3, H, W) in [0, 1], H and W multiples of `cell`.
            topology: the attention maps of every block.
            semantics: the image embeddings of every block.
            reconstruction: latent and decoded pixels.
            encoder_only: nothing but the encoder's tokens, for its distillation.
        """
        scale = self.logit_scale.exp()
        if encoder_only:
            tokens, grid = self._encode_tokens(images)
            return StudentOutput(
                None, grid, (), None, None, None, self._to_map(tokens, grid), None, scale
            )
        trunk = self._trunk(images, topology)
        embeds = latent = recon = None
        if semantics:
            embeds = F.normalize(
                self.semantic_projector(trunk.anchors.transpose(0, 1)).float(), dim=-1
            )
        if reconstruction:
            latent = self._latent(scale_gradient(trunk.tokens, self.config.grad_scale), trunk.grid)
            recon = self.decode(latent, size=images.shape[-2:])
        encoder_map = self._to_map(trunk.encoder_tokens, trunk.encoder_grid)
        tokens = self._to_map(trunk.tokens, trunk.grid)
        return StudentOutput(
            latent,
            trunk.grid,
            trunk.log_topology,
            trunk.anchors,
            embeds,
            recon,
            encoder_map,
            tokens,
            scale,
        )

    # --------------------------------------------------------------------------------------- inside
    def _encode_tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """images -> InternViT tokens without the class token (B, he*we, C), and (he, we)."""
        height, width = images.shape[-2:]
        if height % self.cell or width % self.cell:
            raise ValueError(
                f"image sides must be multiples of {self.cell} (patch {self.patch_size} x "
                f"unshuffle {self.config.unshuffle}), got {height}x{width}; "
                "reconstruct() takes any size"
            )
        pixels = (images - self.pixel_mean) / self.pixel_std
        trained = torch.is_grad_enabled() and any(
            p.requires_grad for p in self.encoder.parameters()
        )
        with torch.set_grad_enabled(trained):  # a frozen encoder keeps no graph
            tokens = self.encoder(pixel_values=pixels).last_hidden_state[:, 1:]
        return tokens, (height // self.patch_size, width // self.patch_size)

    def _trunk(self, images: Tensor, return_attention: bool) -> _Trunk:
        encoder_tokens, encoder_grid = self._encode_tokens(images)
        folded, grid = pixel_unshuffle(encoder_tokens, encoder_grid, self.config.unshuffle)
        x = self.adapter_mlp(folded)  # (B, N, D)
        rotary = self.rotary(x.shape[1], x.device)
        recompute = self.config.gradient_checkpointing != "none" and self.training
        anchors, maps = [], []
        for block in self.muse_blocks:
            if recompute and torch.is_grad_enabled():
                x, semantic, log_attention = checkpoint(
                    block, x, rotary, return_attention, use_reentrant=False
                )
            else:
                x, semantic, log_attention = block(x, rotary, return_attention)
            anchors.append(semantic.mean(dim=1))  # (B, D)
            maps.append(log_attention)
        maps = tuple(maps) if return_attention else ()
        return _Trunk(
            encoder_tokens, encoder_grid, x, grid, semantic, torch.stack(anchors, dim=1), maps
        )

    def _latent(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self._to_map(self.to_latent(tokens), grid)

    def _pad(self, images: Tensor) -> Tensor:
        """Repeat the last row and column until both sides are multiples of `cell`."""
        check_images(images)
        rows, columns = padding_to_multiple(images.shape[-2:], self.cell)
        return F.pad(images, (0, columns, 0, rows), mode="replicate") if rows or columns else images

    @staticmethod
    def _to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h*w, C) -> (B, C, h, w)"""
        return tokens.transpose(1, 2).unflatten(2, grid)
