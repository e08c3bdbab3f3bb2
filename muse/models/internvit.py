"""InternViT, the student's encoder, as transformers' `InternVLVisionModel`.

Its source is a hub id, a local directory in either InternVL layout, a saved MUSE model (a packaged
one by name: `muse_tiny`), or `random` (no network). Where
`config` is given, it alone fixes the architecture and the source gives only weights, so a
checkpoint loads without its sources.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.models.layers import DropPath
from muse.utils.weights import TensorFiles, load_into, locate, read_config, refuse_unknown

# One tensor's name in the original layout (left) and in transformers' (right), piece by piece; read
# in both directions. Beside these, the original layout fuses q, k and v into one `attn.qkv`.
_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.q_norm.", ".attention.q_norm."),
    (".attn.k_norm.", ".attention.k_norm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
)
_FUSED, _PARTS = ".attn.qkv.", tuple(f".attention.{part}_proj." for part in "qkv")
_PREFIXES = ("model.vision_tower.", "vision_tower.", "vision_model.", "")
# Notes that transformers keeps in a configuration and that do not shape the network.
_NOTES = (
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "model_type",
    "_name_or_path",
)


# ------------------------------------------------------------------------------------------ layouts
def is_original_layout(names: list[str]) -> bool:
    """Whether InternViT's tensor names (without prefix) are those of the original layout."""
    return "embeddings.class_embedding" in names


def internvit_to_transformers(name: str) -> list[str]:
    """Names in transformers' layout of one tensor of the original layout; three for a fused qkv."""
    for original, transformers in _NAMES:
        name = name.replace(original, transformers)
    return [name.replace(_FUSED, part) for part in _PARTS] if _FUSED in name else [name]


def convert_internvit(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of the original layout as transformers' tensors."""
    names = internvit_to_transformers(name)
    return dict(zip(names, tensor.chunk(len(names), dim=0)))


def original_internvit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a tower in the original layout; the inverse of `convert_internvit`."""
    converted = {}
    for name, tensor in state.items():
        if any(part in name for part in _PARTS[1:]):
            continue  # k and v go with their q
        if _PARTS[0] in name:
            tensor = torch.cat([state[name.replace(_PARTS[0], part)] for part in _PARTS])
            name = name.replace(_PARTS[0], _FUSED)
        for original, transformers in _NAMES:
            name = name.replace(transformers, original)
        converted[name] = tensor
    return converted


# ----------------------------------------------------------------------------------------- building
def build_encoder(
    source: str,
    config: dict[str, Any],
    load_weights: bool = True,
    drop_path: float = 0.0,
    recompute: bool = False,
) -> nn.Module:
    """InternViT without a final norm (FIDELITY, "The method").

    Args:
        source: hub id, local directory in either InternVL layout, or `random`.
        config: fields of `InternVLVisionConfig`; empty for those of the source.
        load_weights: read the source's weights; False leaves them random.
        drop_path: rate of stochastic depth at the last layer (docs/fidelity.md row 45).
        recompute: where it learns, each layer is computed again in the backward pass.
    """
    from transformers import InternVLVisionModel  # noqa: PLC0415 (takes seconds to import)

    directory = None
    if source != "random" and (load_weights or not config):
        directory = locate(source)
    vision_config = _vision_config(config, directory)
    with _full_precision_init():
        encoder = InternVLVisionModel(vision_config)
    if directory and load_weights:
        load_into(encoder, _vision_tensors(directory, encoder), source, "model.encoder")
    _add_drop_path(encoder, drop_path)
    if recompute:
        newer = getattr(encoder, "activation_checkpointing_enable", None)  # transformers 5
        (newer or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
    return encoder.eval()


def _add_drop_path(encoder: nn.Module, last_rate: float) -> None:
    """Stochastic depth as InternViT has it and transformers' class has not.

    Both residual branches of a layer get its rate, which rises linearly from 0 at the first layer.
    It takes the place of the dropouts at the branches' ends: they have no tensors, so no name in a
    state dict changes, and scaling a branch by `lambda` before or after is the same.
    """
    layers = encoder.encoder.layer
    for index, layer in enumerate(layers):
        rate = last_rate * index / max(1, len(layers) - 1)
        if rate > 0:
            attention = layer.attention
            attention.projection_dropout = nn.Sequential(
                attention.projection_dropout, DropPath(rate)
            )
            layer.dropout = nn.Sequential(layer.dropout, DropPath(rate))


def encoder_fields(encoder: nn.Module) -> dict[str, Any]:
    """The fields of `InternVLVisionConfig` that build this encoder again."""
    fields = {
        name: value for name, value in encoder.config.to_diff_dict().items() if name not in _NOTES
    }
    for name in ("image_size", "patch_size"):  # lists, whatever the library's version makes of them
        fields[name] = list(getattr(encoder.config, name))
    return fields


def _vision_config(config: dict[str, Any], directory: Path | None) -> Any:
    """The given fields, or the source's, as transformers' class; `ConfigError` on a wrong one."""
    from transformers import InternVLVisionConfig  # noqa: PLC0415 (takes seconds to import)

    key, known = "model.encoder.config", InternVLVisionConfig().to_dict().keys()
    fields = _stored_fields(directory, known) if directory and not config else dict(config)
    refuse_unknown(fields, known, key)
    fields["use_mean_pooling"] = True  # the only difference it makes here: no final LayerNorm
    try:
        return InternVLVisionConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {str(error).strip().splitlines()[-1].strip()}") from None
    except Exception as error:  # huggingface_hub's strict dataclasses raise a class of their own
        if "Strict" not in type(error).__name__:
            raise
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from None


def _stored_fields(directory: Path, known: Collection[str]) -> dict[str, Any]:
    """The vision fields of any InternVL's config.json: full model or tower alone, either layout."""
    stored = read_config(directory)
    if stored.get("model_type") == "muse":
        stored = stored["model"]["encoder"]["config"]
    vision = stored.get("vision_config", stored)
    fields = {name: vision[name] for name in known if name in vision and name not in _NOTES}
    if "qkv_bias" in vision:  # the original layout's words
        fields["attention_bias"] = vision["qkv_bias"]
        fields["use_qk_norm"] = vision.get("qk_normalization", False)
    return fields


def _vision_tensors(directory: Path, encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's tensors out of a source, which may hold more, such as a language model."""
    expected = encoder.state_dict().keys()
    found = _read_tower(TensorFiles(directory))
    return {name: tensor for name, tensor in found if name in expected}


def _read_tower(files: TensorFiles) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, tensor in float32) of the vision tower, in whichever layout it lies."""
    names = files.keys()
    prefixes = ("encoder.", *_PREFIXES) if "encoder.embeddings.cls_token" in names else _PREFIXES
    prefix = next(p for p in prefixes if p == "" or any(name.startswith(p) for name in names))
    wanted = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    original = is_original_layout(list(wanted.values()))
    for name, short in wanted.items():
        tensor = files[name].float()
        yield from (convert_internvit(short, tensor) if original else {short: tensor}).items()


@contextmanager
def _full_precision_init() -> Iterator[None]:
    """Weights are made in float32 whatever default the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
