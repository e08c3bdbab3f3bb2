"""Reconstruct picture files with a trained model, and measure each reconstruction."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from muse.commands.picture_batches import batches_by_size
from muse.evaluation.metrics.psnr_ssim import WINDOW, psnr, ssim
from muse.inference import name_results
from muse.models.low_precision import computing
from muse.utils.io import atomic_file
from muse.utils.viz_utils import save_image
from muse.utils.viz_utils import tile as tile_images


class Reconstructed(NamedTuple):
    """One picture's result, measured against the picture as the model saw it."""

    source: Path
    reconstruction: Path
    comparison: Path
    height: int
    width: int
    psnr: float  # dB
    ssim: float  # NaN for a picture smaller than SSIM's window
    notes: tuple[str, ...]  # what reading changed: transparency, size


def reconstruct_files(
    model,
    files: Sequence[Path],
    folder: Path,
    max_side: int = 2048,
    batch_size: int = 8,
    tile: int | None = None,
) -> tuple[list[Reconstructed], list[tuple[Path, str]]]:
    """Write `NAME.png` (the reconstruction) and `NAME_compare.png` (input beside it) for each file.

    Args:
        model: a `MUSE_ViT`.
        files: pictures of any size.
        folder: where the results go.
        max_side: larger pictures are shrunk to this side, pixels.
        batch_size: pictures of one size at a time.
        tile: decode in tiles of this side, pixels; None: in one piece.

    Returns:
        The results in the order of the files, and the files that could not be read with the reason.

    Raises:
        DataError: a result would overwrite an input.
    """
    named = name_results(files, folder)
    results: dict[int, Reconstructed] = {}
    failed: list[tuple[Path, str]] = []
    device = next(model.parameters()).device
    for batch in batches_by_size(files, batch_size, max_side, failed):
        images = torch.stack([picture.image for picture in batch])  # (B, 3, H, W)
        with torch.inference_mode(), computing(model):
            recon = model.reconstruct(images.to(device), tile=tile).float().cpu()
        quality = zip(psnr(images, recon).tolist(), _ssim(images, recon).tolist())
        for picture, pixels, measured in zip(batch, recon, quality):
            _, target, both = named[picture.index]
            save_image(pixels, target)
            save_image(tile_images([[picture.image, pixels]]), both)
            results[picture.index] = Reconstructed(
                picture.file, target, both, *picture.size, *measured, picture.notes
            )
    return [results[index] for index in sorted(results)], failed


def _ssim(images: Tensor, recon: Tensor) -> Tensor:
    if min(images.shape[-2:]) < WINDOW:
        return torch.full((len(images),), math.nan)
    return ssim(images, recon)


def write_quality(file: Path, results: Sequence[Reconstructed]) -> None:
    """A CSV with a row a picture: files, size, PSNR in dB, SSIM (empty below 11 pixels), notes."""
    names = ("source", "reconstruction", "width", "height", "psnr", "ssim", "notes")
    with atomic_file(file) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(names)
        for one in results:
            quality = [f"{one.psnr:.4f}", "" if math.isnan(one.ssim) else f"{one.ssim:.6f}"]
            size = [one.width, one.height]
            rows.writerow([one.source, one.reconstruction, *size, *quality, "; ".join(one.notes)])
