"""Pictures of what each block attends to (mean over heads), from a query cell."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from muse.data.dataloader import sample_images
from muse.errors import ConfigError, DataError
from muse.inference import find_images, read_image
from muse.utils.viz_utils import attention_sheet, save_image

PLACES = ((0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))


def pictures_for(
    cfg: DictConfig, mode: str, pattern: str | None, count: int
) -> list[tuple[str, Tensor]]:
    """What is to be drawn.

    Args:
        cfg: names the evaluation set.
        mode: single (one picture) or batch.
        pattern: file, directory or glob; None: pictures of the evaluation set.
        count: at most so many.

    Returns:
        (name, (3, H, W) in [0, 1]) of each picture.
    """
    if pattern is None:
        if mode == "single":
            raise ConfigError("single needs --image FILE")
        return [(f"eval-{index}", image) for index, image in enumerate(sample_images(cfg, count))]
    files = find_images(pattern)
    if mode == "single" and len(files) > 1:
        raise DataError(f"{pattern}: {len(files)} pictures; use batch for more than one")
    return [(file.stem, read_image(file)) for file in files[:count]]


def square(image: Tensor, side: int) -> Tensor:
    """The middle square of (3, H, W), at `side` pixels."""
    size = min(image.shape[-2:])
    top, left = ((length - size) // 2 for length in image.shape[-2:])
    crop = image[None, :, top : top + size, left : left + size]
    return F.interpolate(crop, size=(side, side), mode="bilinear", antialias=True)[0].clamp(0, 1)


def query_cell(place: Sequence[float], grid: tuple[int, int]) -> int:
    """The cell at (y, x), fractions of height and width."""
    for value in place:
        if not 0 <= value <= 1:
            raise ConfigError(f"--query takes fractions between 0 and 1, got {value:g}")
    row, column = (min(int(value * side), side - 1) for value, side in zip(place, grid))
    return row * grid[1] + column


@torch.inference_mode()
def draw_attention(
    model,
    pictures: Sequence[tuple[str, Tensor]],
    folder: Path,
    mode: str,
    place: Sequence[float] | None = None,
) -> list[Path]:
    """Write `NAME_attention.png` (single) or `attention.png` (batch).

    Args:
        model: what attends.
        pictures: (name, picture), from `pictures_for`.
        folder: the directory.
        mode: single: a column for each query; batch: a column for each picture.
        place: (y, x) of the query as fractions; None: the middle, and for single four more.

    Returns:
        The files.
    """
    side = model.encoder.config.image_size[0] // model.cell * model.cell
    device = next(model.parameters()).device
    images = torch.stack([square(image, side) for _, image in pictures]).to(device)  # (B,3,S,S)
    encoding = model.encode(images, return_attention=True)
    if mode == "batch":
        cells = [query_cell(place or PLACES[0], encoding.grid)] * len(images)
        path = folder / "attention.png"
        save_image(attention_sheet(images, encoding, cells), path)
        return [path]
    cells = [query_cell(one, encoding.grid) for one in ([place] if place else PLACES)]
    repeated = encoding._replace(
        topology=tuple(maps.expand(len(cells), -1, -1, -1) for maps in encoding.topology)
    )
    path = folder / f"{pictures[0][0]}_attention.png"
    save_image(attention_sheet(images.expand(len(cells), -1, -1, -1), repeated, cells), path)
    return [path]
