"""Reconstruct picture files with a trained model."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from muse.data.decode import BadSample, decode_image
from muse.data.transforms import to_float, to_pixels
from muse.errors import DataError
from muse.models.low_precision import computing
from muse.utils.viz_utils import fit_side, save_image
from muse.utils.viz_utils import tile as tile_images

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


class Reconstructed(NamedTuple):
    """One picture's result; PSNR in dB against the input as the model saw it."""

    source: Path
    reconstruction: Path
    comparison: Path
    height: int
    width: int
    psnr: float


def find_images(pattern: str) -> list[Path]:
    """A file, the pictures of a directory (not deeper), or what a glob matches; `DataError` if
    none.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"{path}: holds no picture ({', '.join(sorted(SUFFIXES))})")
        return found
    found = sorted(
        Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()
    )
    if not found:
        raise DataError(f"{pattern}: no such picture, directory or glob")
    return found


def read_image(file: str | Path) -> Tensor:
    """RGB (3, H, W) in [0, 1], upright, transparency on white; `DataError` if it is no picture."""
    try:
        return to_float(to_pixels(decode_image(Path(file).read_bytes())))
    except BadSample as error:
        raise DataError(f"{file}: not a readable picture ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def reconstruct_files(
    model,
    files: Sequence[Path],
    folder: Path,
    max_side: int = 2048,
    tile: int | None = None,
) -> tuple[list[Reconstructed], list[tuple[Path, str]]]:
    """Write `NAME.png` (the reconstruction) and `NAME_compare.png` (input beside it) for each file.

    Args:
        model: a `MUSE_ViT`.
        files: pictures of any size.
        folder: where the results go.
        max_side: larger pictures are shrunk to this side, pixels.
        tile: decode in tiles of this side, pixels; None: in one piece.

    Returns:
        The results, and the files that could not be read with the reason.

    Raises:
        DataError: a result would overwrite an input.
    """
    results: list[Reconstructed] = []
    failed: list[tuple[Path, str]] = []
    device = next(model.parameters()).device
    for file, target, both in name_results(files, folder):
        try:
            image = fit_side(read_image(file), max_side)
        except DataError as error:
            failed.append((file, str(error).removeprefix(f"{file}: ")))
            continue
        with torch.inference_mode(), computing(model):
            recon = model.reconstruct(image[None].to(device), tile=tile)[0].float().cpu()
        save_image(recon, target)
        save_image(tile_images([[image, recon]]), both)
        error = (recon - image).square().mean().clamp_min(1e-12)
        results.append(
            Reconstructed(file, target, both, *image.shape[-2:], float(-10 * error.log10()))
        )
    return results, failed


def name_results(files: Sequence[Path], folder: Path) -> list[tuple[Path, Path, Path]]:
    """(input, reconstruction, comparison) for each file: no name twice, none over an input."""
    named, taken, inputs = [], set(), {file.resolve() for file in files}
    for file in files:
        numbered = (f"{file.stem}_{number}" for number in range(2, len(files) + 2))
        for stem in (file.stem, file.name.replace(".", "_"), *numbered):
            targets = folder / f"{stem}.png", folder / f"{stem}_compare.png"
            if taken.isdisjoint(targets):
                break
        clash = inputs & {target.resolve() for target in targets}
        if clash:
            raise DataError(
                f"{clash.pop()}: would be overwritten by a reconstruction; "
                "choose another output directory"
            )
        taken.update(targets)
        named.append((file, *targets))
    return named
