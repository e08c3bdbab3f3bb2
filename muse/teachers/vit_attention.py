"""Topology teacher: attention maps of a frozen ViT (paper: DINOv3), captured layer by layer.

Only the layers asked for write their attention out; all others keep the fused kernels. A map is cut
to the patch tokens and averaged over heads as soon as its layer has run, so that no more than one
layer's full maps are alive at a time.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.models.layers import check_images
from muse.teachers.base import (
    FrozenTeacher,
    Normalise,
    TopologyTarget,
    choose_layers,
    image_size_option,
    log,
    resize_images,
)
from muse.teachers.hub import INTERNVIT, TIMM, is_timm_directory
from muse.teachers.vit_parts import internvit_parts, timm_parts, transformers_parts


def patch_attention(weights: Tensor, num_prefix: int, heads: str = "mean") -> Tensor:
    """Attention among patch tokens (B, heads or 1, Nt, Nt), float32, rows sum to 1.

    `weights` (B,heads,T,T) has `num_prefix` class and register tokens in front; they are dropped
    and the rows renormalised, after the mean over heads, so that a head which looks at the
    registers alone counts for little.
    """
    kept = weights[..., num_prefix:, num_prefix:].float()  # (B,heads,Nt,Nt)
    if heads == "mean":
        kept = kept.mean(dim=1, keepdim=True)  # (B,1,Nt,Nt)
    return kept / kept.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class AttentionTeacher(FrozenTeacher):
    """`teacher(images)` -> TopologyTarget with one map for each entry of `layers`.

    Args:
        network: the ViT.
        sources: layer -> the module whose forward output is, or ends with, that layer's attention
            weights (B,heads,T,T).
        layers: the layer of each map.
        patch: (height, width) of a patch in pixels.
        num_prefix: class and register tokens in front of the patches.
        normalise: from [0,1] to the network's own range.
        heads: `mean` or `per_head`.
        image_size: size to which images are resized; None: their own, rounded to whole patches.
        method: the network's forward that takes normalised pixels.
    """

    def __init__(
        self,
        network: nn.Module,
        sources: Mapping[int, nn.Module],
        layers: Sequence[int],
        *,
        patch: tuple[int, int],
        num_prefix: int,
        normalise: Normalise,
        heads: str = "mean",
        image_size: tuple[int, int] | None = None,
        method: str = "forward",
    ):
        super().__init__()
        self.network, self.normalise = network, normalise
        self.layers, self.heads = tuple(layers), heads
        self.patch, self.num_prefix, self.image_size = patch, num_prefix, image_size
        self._sources = {layer: sources[layer] for layer in self.layers}
        self._method = method
        self.freeze()

    def set_precision(self, precision: str) -> "AttentionTeacher":
        """In bf16 the weights of linear layers are kept as autocast would make them each time."""
        if precision == "bf16":
            for module in self.network.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        return super().set_precision(precision)

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size (H, W) at which the network sees an image of `size`: whole patches."""
        wanted = self.image_size or size
        return tuple(max(1, round(side / patch)) * patch for side, patch in zip(wanted, self.patch))

    @torch.no_grad()
    def forward(self, images: Tensor) -> TopologyTarget:
        """Maps of images (B,3,H,W) in [0,1]; their grid is the input size / patch.

        Raises ValueError outside the pixel contract.
        """
        check_images(images, wait=False)
        size, dtype = self.input_size(images.shape[-2:]), next(self.network.parameters()).dtype
        pixels = self.normalise(resize_images(images, size)).to(dtype)
        maps: dict[int, Tensor] = {}
        hooks = [
            module.register_forward_hook(partial(self._keep, maps, layer))
            for layer, module in self._sources.items()
        ]
        try:
            with self.inside_precision():
                getattr(self.network, self._method)(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        grid = (size[0] // self.patch[0], size[1] // self.patch[1])
        return TopologyTarget(tuple(maps[layer] for layer in self.layers), grid)

    @torch.no_grad()
    def forward_fused(self, images: Tensor) -> Tensor:
        """The network alone with fused attention in every layer, and no map: what its time is held
        against. Images as above -> the last layer's tokens (B,T,C).
        """
        size, dtype = self.input_size(images.shape[-2:]), next(self.network.parameters()).dtype
        pixels = self.normalise(resize_images(images, size)).to(dtype)
        written = [one for one in self.network.modules() if getattr(one, "fused_attn", 1) is False]
        eager = [one.config for one in self._sources.values() if hasattr(one, "config")]
        for module in written:
            module.fused_attn = True
        for config in eager:
            config._attn_implementation = "sdpa"
        try:
            with self.inside_precision():
                out = getattr(self.network, self._method)(pixels)
        finally:
            for module in written:
                module.fused_attn = False
            for config in eager:
                config._attn_implementation = "eager"
        return out if isinstance(out, Tensor) else out[0]

    def _keep(
        self, maps: dict[int, Tensor], layer: int, module: nn.Module, inputs: Any, output: Any
    ) -> None:
        weights = output[-1] if isinstance(output, tuple) else output
        maps[layer] = patch_attention(weights, self.num_prefix, self.heads)


def build_attention_teacher(
    options: dict[str, Any], num_maps: int, grid: tuple[int, int] | None
) -> AttentionTeacher:
    """An attention teacher from the options of `teacher.topology`, and `pretrained`.

    Args:
        options: `source`: a hub id, a directory in transformers' or timm's layout, `timm:NAME`,
            `internvit:SOURCE`, or `random` (a DINOv3 built from `config`). `image_size`: pixels,
            [H, W], `grid` (as many patches as the student's `grid` has tokens), or None (the
            images' own). Further `config, layers, heads, pretrained`.
        num_maps: how many student blocks there are.
        grid: the student's token grid.
    """
    source, config = str(options["source"]), dict(options["config"])
    parts = transformers_parts
    if source.startswith(INTERNVIT):
        parts = internvit_parts
    elif source.startswith(TIMM) or is_timm_directory(source):
        parts = timm_parts
    network, attentions, settings = parts(source, config, options["pretrained"])
    layers = choose_layers(options["layers"], len(attentions), num_maps)
    own_size = settings.pop("image_size", None)
    size = options["image_size"] or own_size
    if size == "grid":
        if grid is None:
            raise ConfigError("teacher.topology.image_size=grid needs the student's grid")
        size = [tokens * patch for tokens, patch in zip(grid, settings["patch"])]
    size = image_size_option(size, "teacher.topology.image_size")
    sources = {layer: written_out(attentions[layer]) for layer in layers}
    words = "topology teacher %s: layers %s of %d, heads %s"
    log.info(words, source, layers, len(attentions), options["heads"])
    return AttentionTeacher(
        network, sources, layers, heads=options["heads"], image_size=size, **settings
    )


def written_out(attention: nn.Module) -> nn.Module:
    """Make one attention module compute its weights; returns the module whose output has them."""
    if hasattr(attention, "fused_attn"):
        attention.fused_attn = False
        return attention.attn_drop
    # Modules of a transformers model share one configuration: a copy of its own turns this layer
    # alone to eager attention.
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "eager"
    return attention
