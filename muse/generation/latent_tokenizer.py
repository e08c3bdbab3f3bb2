"""The tokenizer as generation uses it: pictures to latents and back, and its weights' hash."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from muse.errors import CheckpointError
from muse.models.loading import load_model, weights_file
from muse.models.muse_vit import MUSE_ViT
from muse.models.pretrained import CONFIG_FILE, read_model_config
from muse.utils.io import file_sha256


class LatentTokenizer(Protocol):
    """What makes latents of pictures, and pictures of latents."""

    sha256: str  # of its weights: no other one may decode its latents

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w), float32."""

    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1]; None is the decoder's own size."""


@dataclass
class MuseTokenizer:
    """A `LatentTokenizer` of a checkpoint of MUSE."""

    model: MUSE_ViT
    sha256: str
    path: str  # as it was given

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images).latent.float()

    @torch.no_grad()
    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:  # MUSE-1B reads 224 px and decodes 256 px: the decoder's side counts here
            scale = 2 ** (len(self.model.decoder_fields["decoder_block_out_channels"]) - 1)
            size = (latents.shape[-2] * scale, latents.shape[-1] * scale)
        return self.model.decode(latents, size=size).float().clamp(0, 1)


def tokenizer_sha256(checkpoint: str | Path) -> str:
    """SHA-256 of the weights file that a checkpoint stands for."""
    return file_sha256(weights_file(checkpoint))


def open_tokenizer(
    checkpoint: str | Path,
    config: Any = None,
    device: str | torch.device = "cpu",
    sha256: str | None = None,
) -> MuseTokenizer:
    """The tokenizer of any form of checkpoint, in eval mode.

    Args:
        checkpoint: see `muse.models.loading.load_model`.
        config: the `model` section; None takes the one beside the weights.
        device: where it goes.
        sha256: that its weights must have; None asks nothing.

    Raises:
        CheckpointError: no such checkpoint, another tokenizer, or weights that do not fit.
    """
    file = weights_file(checkpoint)
    found = file_sha256(file)
    if sha256 is not None and found != sha256:
        raise CheckpointError(
            f"{checkpoint}: another tokenizer: the sha256 of its weights begins with {found[:12]}, "
            f"the latents were made with {sha256[:12]}"
        )
    if config is None:
        if not (file.parent / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{checkpoint}: no {CONFIG_FILE} beside the tokenizer's weights, so that its sizes "
                "are not known: give the directory that save_pretrained wrote"
            )
        config = read_model_config(file.parent)
    return MuseTokenizer(load_model(checkpoint, config, device), found, str(checkpoint))
