"""Latents of pictures on disk: one safetensors file a picture, with what decoding must know.

The metadata name the tokenizer by the sha256 of its weights, so that no other model decodes them,
and the picture's size, since the latent is of the picture padded to whole cells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from muse.commands.picture_batches import batches_by_size
from muse.errors import DataError
from muse.generation.latents import check_tokenizer
from muse.inference import name_results
from muse.models.layers import padding_to_multiple
from muse.utils.io import atomic_file
from muse.utils.viz_utils import save_image

LATENT_FORMAT = "muse latent 1"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class PictureLatent(NamedTuple):
    """What a file of `encode_files` holds."""

    latent: Tensor  # (C, h, w), of the type it was stored in
    size: tuple[int, int]  # (H, W) of the picture
    sha256: str  # of the tokenizer's weights
    source: str  # name of the picture's file


def encode_files(
    model,
    sha256: str,
    files: Sequence[Path],
    folder: Path,
    dtype: str = "float32",
    max_side: int = 2048,
    batch_size: int = 8,
) -> tuple[list[tuple[Path, Path, tuple[int, ...]]], list[tuple[Path, str]]]:
    """Write `NAME.safetensors` for each picture.

    Args:
        model: a `MUSE_ViT`.
        sha256: of its weights.
        files: pictures of any size.
        folder: where the latents go.
        dtype: in which they are stored.
        max_side: larger pictures are shrunk to this side, pixels.
        batch_size: pictures of one size at a time.

    Returns:
        (picture, file, latent's shape) in the order of the pictures; what could not be read, why.
    """
    targets = [target.with_suffix(".safetensors") for _, target, _ in name_results(files, folder)]
    done: dict[int, tuple[Path, Path, tuple[int, ...]]] = {}
    failed: list[tuple[Path, str]] = []
    device = next(model.parameters()).device
    for batch in batches_by_size(files, batch_size, max_side, failed):
        images = torch.stack([picture.image for picture in batch]).to(device)
        with torch.inference_mode():
            latents = model.features(images, kind="latent").to(DTYPES[dtype]).cpu()
        for picture, latent in zip(batch, latents):
            target = targets[picture.index]
            _write(target, PictureLatent(latent, picture.size, sha256, picture.file.name))
            done[picture.index] = (picture.file, target, tuple(latent.shape))
    return [done[index] for index in sorted(done)], failed


def _write(file: Path, stored: PictureLatent) -> None:
    height, width = stored.size
    facts = {
        "format": LATENT_FORMAT,
        "tokenizer_sha256": stored.sha256,
        "height": str(height),
        "width": str(width),
        "source": stored.source,
    }
    with atomic_file(file) as partial:
        save_file({"latent": stored.latent.contiguous()}, partial, metadata=facts)


def read_latent(file: str | Path) -> PictureLatent:
    """A file of `encode_files`; `DataError` where it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            facts = opened.metadata() or {}
            if facts.get("format") != LATENT_FORMAT:
                raise ValueError(f"its format is {facts.get('format')!r}, not {LATENT_FORMAT!r}")
            latent = opened.get_tensor("latent")
        if latent.ndim != 3:
            raise ValueError(f"a latent of shape {tuple(latent.shape)}, not (C, h, w)")
        size = int(facts["height"]), int(facts["width"])
        return PictureLatent(latent, size, facts["tokenizer_sha256"], facts.get("source", ""))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{file}: not a latent that muse encode wrote ({said})") from None


def find_latents(words: Sequence[str]) -> list[Path]:
    """The .safetensors of all files and folders, each once, in order; `DataError` if none."""
    found: list[Path] = []
    for word in words:
        path = Path(word).expanduser()
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise DataError(f"{word}: no latents here (.safetensors of muse encode)")
        found += files
    return list(dict.fromkeys(found))


def decode_files(model, sha256: str, files: Sequence[Path], folder: Path) -> list[Path]:
    """Write `NAME.png` for each latent, in the size of the picture that it was made of.

    Every file is read and checked before the first picture is written.

    Args:
        model: the `MUSE_ViT` that made the latents.
        sha256: of its weights.
        files: of `encode_files`.
        folder: where the pictures go.

    Raises:
        CheckpointError: latents of another tokenizer.
        DataError: a file is no latent, or does not fit its picture's size.
    """
    for file in files:
        stored = read_latent(file)
        check_tokenizer(file, stored.sha256, sha256)
        padded = _padded(stored.size, model.cell)
        grid = tuple(side // model.cell for side in padded)
        wanted = (model.config.latent_dim, *grid)
        if tuple(stored.latent.shape) != wanted:
            shape = tuple(stored.latent.shape)
            raise DataError(f"{file}: a latent of {shape}, a picture of its size has {wanted}")
    written = []
    device = next(model.parameters()).device
    for file, target, _ in name_results(files, folder):
        stored = read_latent(file)
        height, width = stored.size
        with torch.inference_mode():
            latent = stored.latent[None].float().to(device)
            pixels = model.decode(latent, size=_padded(stored.size, model.cell))
        save_image(pixels[0, :, :height, :width].clamp(0, 1).float().cpu(), target)
        written.append(target)
    return written


def _padded(size: tuple[int, int], cell: int) -> tuple[int, int]:
    """(H, W) with the rows and columns that `MUSE_ViT` adds to whole cells."""
    return tuple(side + more for side, more in zip(size, padding_to_multiple(size, cell)))
