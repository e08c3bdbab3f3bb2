"""Saving and loading the multimodal model as one directory.

`config.json`, `model.safetensors`, and the text tokenizer's own files. If asked for, parts are left
out that are frozen as their source gave them: a frozen language model need not be written again
with every checkpoint. Their fingerprints are written instead, so that a source that has changed
since is noticed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from muse.errors import CheckpointError
from muse.models.loading import load_model
from muse.models.muse_vit import MUSE_ViT
from muse.models.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_model_config,
    write_weights,
)
from muse.multimodal.language_model import (
    build_language_model,
    language_fields,
    load_text_tokenizer,
    tied,
)
from muse.multimodal.sana import build_sana, sana_fields
from muse.utils.io import atomic_directory
from muse.utils.weights import load_into, locate, read_state_dict

# Part -> the configuration's section that has its source, and its names in the state dict.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tokenizer": ("tokenizer", ("tokenizer.",)),
    "language_model": (
        "language_model",
        ("internvl.model.language_model.", "internvl.lm_head."),
    ),
    "projector": ("language_model", ("internvl.model.multi_modal_projector.",)),
    "generator": ("generator", ("generator.",)),
}
_HEAD = "internvl.lm_head.weight"
_EMBEDDINGS = "internvl.model.language_model.embed_tokens.weight"


class UMMCheckpointMixin:
    """`save_pretrained` and `from_pretrained` of `MUSE_UMM`."""

    def save_pretrained(self, directory: str | Path, frozen: bool = True) -> None:
        """Write the model; an existing directory is replaced only once the new one is complete.

        Args:
            directory: where to.
            frozen: False leaves out each part whose parameters are all frozen and came from a hub
                id or a directory, from which `from_pretrained` reads them again.
        """
        state = self.portable_state(frozen)
        with atomic_directory(directory) as folder:
            write_weights(folder, state, self.portable_config(self.left_out(frozen)))
            if self.chat is not None:
                self.chat.tokenizer.save_pretrained(folder)

    def portable_state(self, frozen: bool = True) -> dict[str, Tensor]:
        """The state dict, a tied head once, with or without parts as in `save_pretrained`."""
        names = tuple(name for part in self.left_out(frozen) for name in PARTS[part][1])
        if tied(self.internvl):
            names += (_HEAD,)
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not names or not name.startswith(names)
        }

    def left_out(self, frozen: bool) -> list[str]:
        """Parts that `save_pretrained(frozen=frozen)` leaves out."""
        if frozen:
            return []
        learns = [name for name, value in self.named_parameters() if value.requires_grad]
        return [
            part
            for part, (_, names) in PARTS.items()
            if part in self.from_source and not any(name.startswith(names) for name in learns)
        ]

    def portable_config(self, left_out: list[str]) -> dict[str, Any]:
        """The configuration with every part spelled out, so that building needs no source."""
        model = json.loads(json.dumps(self.config))
        model["latent_statistics"] = model["text_tokenizer"] = None
        fields = {
            "tokenizer": self.tokenizer.portable_config()["model"],
            "language_model": language_fields(self.internvl),
            "generator": sana_fields(self.generator),
        }
        for section, config in fields.items():
            model[section] = {"source": self.sources[section], "config": config}
        marks = {part: _fingerprint(self.state_dict(), PARTS[part][1]) for part in left_out}
        as_source = self.left_out(frozen=False)
        return {
            "model_type": "muse_umm",
            "model": model,
            "left_out": marks,
            "as_source": as_source,
        }

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        changes: Mapping[str, Any] | None = None,
    ) -> Self:
        """A model in eval mode.

        Args:
            source: a directory or a hub id. Parts that were left out are read from their sources.
            device: where the model goes.
            changes: keys of the configuration that replace the saved ones.

        Raises:
            CheckpointError: anything does not fit, or a source is not what it was.
        """
        path = Path(source).expanduser()
        if not path.is_dir():
            path = locate(str(source), [WEIGHTS_FILE, "*.json", "*.jinja"])
        config = {**read_model_config(path), **(changes or {})}
        about = json.loads((path / CONFIG_FILE).read_text())
        if about.get("model_type") != "muse_umm":
            raise CheckpointError(
                f"{path}: a model of type {about.get('model_type')}, not a multimodal one"
            )
        marks = about.get("left_out", {})
        state = read_state_dict(path / WEIGHTS_FILE)
        chat = load_text_tokenizer(str(path)) if (path / "tokenizer.json").is_file() else None
        model = cls(config, load_sources=False, text_tokenizer=chat)
        for part, mark in marks.items():
            if part not in PARTS:
                raise CheckpointError(f"{path}: leaves out {part}, which is no part of the model")
            state |= _from_source(part, config, mark)
        if tied(model.internvl) and _EMBEDDINGS in state:
            state[_HEAD] = state[_EMBEDDINGS]
        load_into(model, state, path)
        model.from_source = set(marks) | set(about.get("as_source", ()))
        return model.to(device).eval()

    def _remember_sources(self, loaded: bool) -> None:
        """Where each section's weights came from, and which parts are as their source gave them."""
        sections = ("tokenizer", "language_model", "generator")
        self.sources = {name: _absolute(self.config[name]["source"]) for name in sections}
        self.from_source = {
            part
            for part, (section, _) in PARTS.items()
            if loaded and self.sources[section] != "random"
        }


def build_tokenizer(source: str, config: dict[str, Any], load_weights: bool = True) -> MUSE_ViT:
    """MUSE_ViT from a hub id, a directory or file (`config`: its section `model`), or random.

    load_weights: False builds it from `config` alone, for a checkpoint that brings weights.
    """
    if source == "random" or (config and not load_weights):
        return MUSE_ViT(config, load_backbones=load_weights)
    if config and Path(source).expanduser().exists():
        return load_model(source, config)
    return MUSE_ViT.from_pretrained(source)  # brings its own configuration


def _fingerprint(state: Mapping[str, Tensor], names: tuple[str, ...]) -> str:
    """sha256 of the tensors whose names begin so, in bfloat16: the same in either precision."""
    digest = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith(names)):
        values = state[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(name.encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _from_source(part: str, config: dict[str, Any], mark: str) -> dict[str, Tensor]:
    """The tensors of a part that was left out, under their names in the whole model."""
    section, names = PARTS[part]
    source = config[section]["source"]
    module: nn.Module
    if section == "tokenizer":
        prefix, module = "tokenizer.", build_tokenizer(source, config[section]["config"])
    elif section == "language_model":
        prefix, module = "internvl.", build_language_model(source, config[section]["config"])
    else:
        channels = config["tokenizer"]["config"]["latent_dim"]
        prefix, module = "generator.", build_sana(**config[section], latent_dim=channels)
    state = {f"{prefix}{name}": value for name, value in module.state_dict().items()}
    state = {name: value for name, value in state.items() if name.startswith(names)}
    if _fingerprint(state, names) != mark:
        raise CheckpointError(
            f"{source}: its {part} is not the one with which this checkpoint was saved"
        )
    return state


def _absolute(source: str) -> str:
    """A local path that holds from every working directory; a hub id or "random" as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
