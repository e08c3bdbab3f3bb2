"""Encoder and decoder as torch.export programs and ONNX files with a dynamic batch.

Height and width are fixed at export, since positions are resampled to them. Pixels are not checked
inside: an exported graph cannot raise.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from muse.models.muse_vit import MUSE_ViT
from muse.utils.io import atomic_directory

EXPORT_PARTS = ("encoder", "decoder")
OPSET = 18


class LatentEncoder(nn.Module):
    """images (B, 3, H, W) in [0, 1], sides multiples of `cell` -> latent (B, C, h, w)."""

    def __init__(self, model: MUSE_ViT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        trunk = self.model._trunk(images, False)
        return self.model._latent(trunk.tokens, trunk.grid)


class PixelDecoder(nn.Module):
    """latent (B, C, h, w) -> (B, 3, h*cell, w*cell), nominal [0, 1], not clamped."""

    def __init__(self, model: MUSE_ViT):
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent)


def export_part(
    model: MUSE_ViT, part: str, size: tuple[int, int] = (224, 224)
) -> torch.export.ExportedProgram:
    """`encoder` or `decoder` as a program whose batch is free.

    Args:
        model: in eval mode; its parameters stop asking for gradients.
        part: which.
        size: (H, W) of the pictures, multiples of `model.cell`.
    """
    if part not in EXPORT_PARTS:
        raise ValueError(f"part must be encoder or decoder, got {part!r}")
    if any(side % model.cell for side in size):
        raise ValueError(f"sides must be multiples of {model.cell}, got {size[0]}x{size[1]}")
    model.requires_grad_(False).eval()
    height, width = size
    device = next(model.parameters()).device
    grid = height // model.cell, width // model.cell
    shape = (3, height, width) if part == "encoder" else (model.config.latent_dim, *grid)
    example = torch.full((2, *shape), 0.5, device=device)
    module = LatentEncoder(model) if part == "encoder" else PixelDecoder(model)
    name = "images" if part == "encoder" else "latent"
    with torch.no_grad():
        return torch.export.export(
            module, (example,), dynamic_shapes={name: {0: torch.export.Dim("batch", min=1)}}
        )


def export_onnx(model: MUSE_ViT, folder: str | Path, size: tuple[int, int] = (224, 224)) -> None:
    """Write `encoder.onnx` and `decoder.onnx` (packages onnx and onnxscript).

    Args:
        model: a `MUSE_ViT`.
        folder: replaced once both are complete.
        size: (H, W) of the pictures, multiples of `model.cell`.
    """
    names = {"encoder": ("images", "latent"), "decoder": ("latent", "pixels")}
    with atomic_directory(folder) as made:
        for part, (given, result) in names.items():
            program = torch.onnx.export(
                export_part(model, part, size),
                dynamo=True,
                input_names=[given],
                output_names=[result],
                opset_version=OPSET,
                # onnxscript's optimizer takes the 1e-15 that DC-AE's linear attention adds to its
                # denominators for nothing, and 0/0 gives NaN. onnxruntime optimizes by itself.
                optimize=False,
                verbose=False,
            )
            program.save(made / f"{part}.onnx")
