"""Topology teacher: attention maps of a frozen ViT (paper: DINOv3), captured layer by layer.

Only the layers asked for write their attention out; all others keep the fused kernels. A map is cut
to the patch tokens and averaged over heads as soon as its layer has run, so that no more than one
layer's full maps are alive at a time.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.models.layers import IMAGENET_MEAN, IMAGENET_STD, check_images
from muse.teachers.base import (
    FrozenTeacher,
    Normalise,
    TopologyTarget,
    choose_layers,
    image_size_option,
    log,
    resize_images,
)
from muse.teachers.hub import (
    DINOV3,
    TIMM,
    is_timm_directory,
    loading,
    require_complete,
    stored_normalisation,
    timm_name,
)

ADVICE = (
    "DINOv3 weights are given out after their licence is accepted; otherwise set "
    "teacher.topology.source to a local directory (transformers or timm layout) or to a timm name "
    "(timm:vit_huge_plus_patch16_dinov3.lvd1689m), or use teacher.topology.kind=affinity."
)
NO_WEIGHTS_ADVICE = "For its cost name a directory that holds its config.json, or timm:NAME."
# transformers' model_type -> its class. All put the class token first, then the registers.
MODEL_CLASSES = {
    "dinov3_vit": "DINOv3ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}


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

    def _keep(
        self, maps: dict[int, Tensor], layer: int, module: nn.Module, inputs: Any, output: Any
    ) -> None:
        weights = output[-1] if isinstance(output, tuple) else output
        maps[layer] = patch_attention(weights, self.num_prefix, self.heads)


class VitParts(NamedTuple):
    """A ViT, the attention module of each of its layers, and what AttentionTeacher asks of it."""

    network: nn.Module
    attentions: list[nn.Module]
    settings: dict[str, Any]


def build_attention_teacher(
    options: dict[str, Any], num_maps: int, grid: tuple[int, int] | None
) -> AttentionTeacher:
    """An attention teacher from the options of `teacher.topology`, and `pretrained`.

    Args:
        options: `source`: a hub id, a directory in transformers' or timm's layout, `timm:NAME`, or
            `random` (a DINOv3 built from `config`). `image_size`: pixels, [H, W], `grid` (as many
            patches as the student's `grid` has tokens), or None (the images' own). Further `config,
            layers, heads, pretrained`.
        num_maps: how many student blocks there are.
        grid: the student's token grid.
    """
    source, config = str(options["source"]), dict(options["config"])
    from_timm = source.startswith(TIMM) or is_timm_directory(source)
    parts = timm_parts if from_timm else transformers_parts
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


def transformers_parts(source: str, config: dict[str, Any], pretrained: bool) -> VitParts:
    """A DINO of transformers: a hub id, a directory (single or sharded safetensors) or `random`.

    `config` holds the fields of transformers' configuration (with `model_type`, by default
    dinov3_vit) for `random`, and overrides of the stored ones otherwise. Raises CheckpointError for
    weights that are refused, missing or incomplete.
    """
    what, normalise = f"topology teacher {source!r}", Normalise()
    with loading(what, ADVICE if pretrained else NO_WEIGHTS_ADVICE):
        settings = _transformers_settings(source, config, pretrained)
        native = _native_class(settings, source)
        if source == "random" or not pretrained:
            network = native(settings)
        else:
            network, report = native.from_pretrained(
                source,
                config=settings,
                dtype="float32",
                weights_only=True,
                output_loading_info=True,
            )
            require_complete(what, report["missing_keys"])
            normalise = Normalise(*stored_normalisation(source))
    # By class name, because the modules move between transformers versions: the innermost attention
    # module of each layer is the one.
    attentions = [
        module
        for module in network.modules()
        if _is_attention(module)
        and not any(_is_attention(child) for child in module.modules() if child is not module)
    ]
    num_prefix = 1 + getattr(settings, "num_register_tokens", 0)
    patch = (settings.patch_size,) * 2
    return VitParts(
        network, attentions, {"patch": patch, "normalise": normalise, "num_prefix": num_prefix}
    )


def _transformers_settings(source: str, config: dict[str, Any], pretrained: bool) -> Any:
    """transformers' configuration of `source`, with the fields of `config` on top."""
    import transformers  # noqa: PLC0415 - heavy

    if not pretrained and source in DINOV3 and not Path(source).is_dir():
        source, config = "random", DINOV3[source] | config
    if source == "random":
        kind = config.pop("model_type", "dinov3_vit")
        return transformers.AutoConfig.for_model(kind, **config)
    return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **config)


def timm_parts(source: str, config: dict[str, Any], pretrained: bool) -> VitParts:
    """A ViT of timm from `timm:NAME` or a directory in timm's layout.

    `config` goes to `timm.create_model`; `pretrained=false` there leaves random weights. Raises
    ConfigError for a model that is not a plain ViT.
    """
    arguments = {"num_classes": 0} | config
    arguments["pretrained"] = pretrained and config.get("pretrained", True)
    with loading(f"topology teacher {source!r}", ADVICE if pretrained else NO_WEIGHTS_ADVICE):
        network, any_size = _timm_network(timm_name(source), arguments)
    attentions = [getattr(block, "attn", None) for block in getattr(network, "blocks", ())]
    readable = all(hasattr(one, "attn_drop") and hasattr(one, "fused_attn") for one in attentions)
    if not attentions or not readable or not hasattr(network, "patch_embed"):
        raise ConfigError(
            f"teacher.topology.source {source!r} is not a plain ViT with readable attention; use "
            "teacher.topology.kind=affinity for it"
        )
    stored = network.pretrained_cfg
    settings = {
        "patch": tuple(network.patch_embed.patch_size),
        "num_prefix": getattr(network, "num_prefix_tokens", 1),
        "normalise": Normalise(stored.get("mean", IMAGENET_MEAN), stored.get("std", IMAGENET_STD)),
        "method": "forward_features",
    }
    if not any_size:
        settings["image_size"] = network.patch_embed.img_size
    return VitParts(network, attentions, settings)


def _timm_network(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, bool]:
    """A timm model, and whether it takes images of any size."""
    import timm  # noqa: PLC0415 - heavy

    try:
        return timm.create_model(name, dynamic_img_size=True, **arguments), True
    except TypeError:  # not every class knows the argument: such a ViT takes its own size alone
        return timm.create_model(name, **arguments), False


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


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _native_class(settings: Any, source: str) -> Any:
    import transformers  # noqa: PLC0415 - heavy

    if settings.model_type not in MODEL_CLASSES:
        raise ConfigError(
            f"teacher.topology.source {source!r} is a {settings.model_type!r} model; attention is "
            f"read from {', '.join(MODEL_CLASSES)} or a timm ViT (timm:NAME); use "
            "teacher.topology.kind=affinity for others"
        )
    return getattr(transformers, MODEL_CLASSES[settings.model_type])
