"""Topology teacher: attention maps of a frozen ViT (paper: DINOv3), captured layer by layer.

Only the layers asked for write their attention out; all others keep the fused kernels. A map is cut to the patch
tokens and averaged over heads as soon as its layer has run, so that no more than one layer's full maps are alive at a
time.
"""
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from muse.models.layers import check_images
from muse.models.teachers.base import FrozenTeacher, Normalise, TopologyTarget, resize_images


def patch_attention(weights: Tensor, num_prefix: int, heads: str = "mean") -> Tensor:
    """Attention among patch tokens (B, heads or 1, Nt, Nt), float32, rows sum to 1.

    `weights` (B,heads,T,T) has `num_prefix` class and register tokens in front; they are dropped and the rows
    renormalised, after the mean over heads, so that a head which looks at the registers alone counts for little.
    """
    kept = weights[..., num_prefix:, num_prefix:].float()
    if heads == "mean":
        kept = kept.mean(dim=1, keepdim=True)
    return kept / kept.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class AttentionTeacher(FrozenTeacher):
    """`teacher(images)` -> TopologyTarget with one map for each entry of `layers`.

    sources: layer -> the module whose forward output is, or ends with, that layer's attention weights (B,heads,T,T).
    image_size: size to which images are resized; None: their own, rounded to whole patches.
    method: the network's forward that takes normalised pixels.
    """

    def __init__(self, network: nn.Module, sources: Mapping[int, nn.Module], layers: Sequence[int], *,
                 patch: tuple[int, int], num_prefix: int, normalise: Normalise, heads: str = "mean",
                 image_size: tuple[int, int] | None = None, method: str = "forward"):
        super().__init__()
        self.network, self.normalise = network, normalise
        self.layers, self.heads = tuple(layers), heads
        self.patch, self.num_prefix, self.image_size = patch, num_prefix, image_size
        self._sources = {layer: sources[layer] for layer in self.layers}
        self._method = method
        self.freeze()

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size (H, W) at which the network sees an image of `size`: whole patches, at least one."""
        wanted = self.image_size or size
        return tuple(max(1, round(side / patch)) * patch for side, patch in zip(wanted, self.patch))

    @torch.no_grad()
    def forward(self, images: Tensor) -> TopologyTarget:
        """Maps of images (B,3,H,W) in [0,1]; grid = input size / patch. ValueError outside the pixel contract."""
        check_images(images, wait=False)
        size = self.input_size(images.shape[-2:])
        pixels = self.normalise(resize_images(images, size)).to(next(self.network.parameters()).dtype)
        maps: dict[int, Tensor] = {}
        hooks = [module.register_forward_hook(partial(self._keep, maps, layer))
                 for layer, module in self._sources.items()]
        try:
            getattr(self.network, self._method)(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        grid = (size[0] // self.patch[0], size[1] // self.patch[1])
        return TopologyTarget(tuple(maps[layer] for layer in self.layers), grid)

    def _keep(self, maps: dict[int, Tensor], layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
        weights = output[-1] if isinstance(output, tuple) else output
        maps[layer] = patch_attention(weights, self.num_prefix, self.heads)
