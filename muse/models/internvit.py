"""The two pretrained parts of the student: InternViT (transformers' native class) and the DC-AE decoder (diffusers).

A source is a hub id, a local directory, or `random` (built from `config`, no network). Where `config` is given, it alone
fixes the architecture and the source gives only weights, so a checkpoint loads without its sources.
Only the tensors that are needed are read: safetensors files are memory-mapped and picked from by name.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from muse.errors import CheckpointError, ConfigError
from muse.utils.weights import TensorFiles, locate, read_config

# InternViT: the original layout's names (left) in transformers' words. Fused qkv is split in `internvit_to_transformers`.
_INTERNVIT_NAMES = [
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.ls1$", ".lambda_1"),
    (r"\.ls2$", ".lambda_2"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.(q_norm|k_norm)\.", r".attention.\1."),
    (r"(encoder\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(encoder\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
]
_VISION_PREFIXES = ("model.vision_tower.", "vision_tower.", "vision_model.", "")


def internvit_to_transformers(name: str) -> list[str]:
    """Names in transformers' layout of one tensor of the original InternViT layout; three (q, k, v) for a fused qkv."""
    for pattern, replacement in _INTERNVIT_NAMES:
        name = re.sub(pattern, replacement, name)
    if ".attn.qkv." in name:
        return [name.replace(".attn.qkv.", f".attention.{part}_proj.") for part in "qkv"]
    return [name]


def is_original_layout(names: list[str]) -> bool:
    """Whether InternViT tensor names (without prefix) follow the original layout rather than transformers'."""
    return "embeddings.class_embedding" in names


def convert_internvit(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of the original layout as transformers' tensors."""
    names = internvit_to_transformers(name)
    return dict(zip(names, tensor.chunk(len(names), dim=0)))


def _load_strict(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    expected = module.state_dict()
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise CheckpointError(
            f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, the configuration makes it "
                f"{tuple(tensor.shape)}"
            )
    module.load_state_dict({name: state[name] for name in expected})


# ------------------------------------------------------------------------------------------------------- encoder
def build_encoder(source: str, config: dict[str, Any], load_weights: bool = True) -> nn.Module:
    """InternViT as transformers' `InternVLVisionModel`, without a final norm (FIDELITY, "The method").

    source: hub id, local directory in either InternVL layout, or `random`; config: fields of `InternVLVisionConfig`.
    """
    from transformers import InternVLVisionConfig, InternVLVisionModel

    directory = None
    if source != "random" and (load_weights or not config):
        directory = locate(source, ["config.json", "*.safetensors", "*.safetensors.index.json"])
    fields = dict(config) if config else {}
    if not fields and directory is not None:
        fields = _vision_fields(read_config(directory))
    fields["use_mean_pooling"] = True  # the only difference it makes here: no final LayerNorm
    vision_config = _checked(InternVLVisionConfig, fields, "model.encoder.config")
    with _full_precision_init():
        encoder = InternVLVisionModel(vision_config)
    if directory is not None and load_weights:
        _load_strict(encoder, dict(_vision_tensors(TensorFiles(directory))), source)
    return encoder.eval()


def _vision_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `InternVLVisionConfig` out of any InternVL config.json: whole model or tower alone, either layout."""
    from transformers import InternVLVisionConfig

    vision = config.get("vision_config", config)
    fields = {name: vision[name] for name in InternVLVisionConfig().to_dict() if name in vision}
    if "qkv_bias" in vision:  # the original layout's words
        fields["attention_bias"] = vision["qkv_bias"]
        fields["use_qk_norm"] = vision.get("qk_normalization", False)
    for name in (
        "model_type",
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
    ):
        fields.pop(name, None)
    return fields


def _vision_tensors(files: TensorFiles) -> Iterator[tuple[str, Tensor]]:
    names = files.keys()
    prefix = next(
        p for p in _VISION_PREFIXES if p == "" or any(name.startswith(p) for name in names)
    )
    wanted = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    original = is_original_layout(list(wanted.values()))
    for name, short in wanted.items():
        if original:
            yield from convert_internvit(short, files[name].float()).items()
        else:
            yield short, files[name].float()


# ------------------------------------------------------------------------------------------------------- decoder


def _checked(make: Callable, fields: dict[str, Any], key: str) -> Any:
    """`make(**fields)` for a transformers configuration class, with unknown or ill-typed fields as `ConfigError`."""
    _refuse_unknown(fields, list(make().to_dict()), key)
    try:
        return make(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {str(error).strip().splitlines()[-1].strip()}") from None
    except Exception as error:  # huggingface_hub's strict dataclasses raise a class of their own
        if "Strict" not in type(error).__name__:
            raise
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from None


def _refuse_unknown(fields: dict[str, Any], known: list[str], key: str) -> None:
    from muse.config import nearest

    for name in fields:
        if name not in known:
            raise ConfigError(f"unknown key {key}.{name}{nearest(name, known)}")


@contextmanager
def _full_precision_init():
    """Weights are made in float32 whatever default the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
