"""Frozen ViTs of transformers and timm, with the attention module of each of their layers."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from muse.errors import ConfigError
from muse.models.internvit import build_encoder
from muse.models.layers import IMAGENET_MEAN, IMAGENET_STD
from muse.teachers.base import Normalise
from muse.teachers.hub import (
    DINOV3,
    INTERNVIT,
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
NO_WEIGHTS_ADVICE = (
    "For its cost without weights name a directory that holds its config.json, or timm:NAME, as "
    "the source."
)
# transformers' model_type -> its class. All put the class token first, then the registers.
MODEL_CLASSES = {
    "dinov3_vit": "DINOv3ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}


class VitParts(NamedTuple):
    """A ViT, the attention module of each of its layers, and what `AttentionTeacher` asks of it."""

    network: nn.Module
    attentions: list[nn.Module]
    settings: dict[str, Any]


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
    num_prefix = 1 + getattr(settings, "num_register_tokens", 0)
    patch = (settings.patch_size,) * 2
    return VitParts(
        network,
        _attention_modules(network),
        {"patch": patch, "normalise": normalise, "num_prefix": num_prefix},
    )


def internvit_parts(source: str, config: dict[str, Any], pretrained: bool) -> VitParts:
    """An InternViT from `internvit:SOURCE`, SOURCE as `model.encoder.source` takes it: InternVL's
    own, or the encoder of a MUSE model. `config` and errors as above.
    """
    source = source.removeprefix(INTERNVIT)
    network = build_encoder(source, config, load_weights=pretrained)
    patch = tuple(network.config.patch_size)
    settings = {"patch": patch, "normalise": Normalise(), "num_prefix": 1}
    return VitParts(network, _attention_modules(network), settings)


def _attention_modules(network: nn.Module) -> list[nn.Module]:
    """The innermost attention module of each layer of a transformers ViT.

    By class name, because the modules move between transformers versions.
    """
    return [
        module
        for module in network.modules()
        if _is_attention(module)
        and not any(_is_attention(child) for child in module.modules() if child is not module)
    ]


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


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _native_class(settings: Any, source: str) -> Any:
    import transformers  # noqa: PLC0415 - heavy

    if settings.model_type not in MODEL_CLASSES:
        raise ConfigError(
            f"teacher.topology.source {source!r} is a {settings.model_type!r} model; attention is "
            f"read from {', '.join(MODEL_CLASSES)}, a timm ViT (timm:NAME) or internvit:SOURCE; "
            "use teacher.topology.kind=affinity for others"
        )
    return getattr(transformers, MODEL_CLASSES[settings.model_type])
