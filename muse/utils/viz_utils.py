"""Pictures of what the model does: originals and reconstructions, attention, segmentation."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from muse.utils.io import atomic_file

GAP = 4


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] floats -> 0..255, rounded, on the CPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def save_image(image: Tensor, path: str | Path) -> None:
    """Write one (3, H, W) picture in [0, 1] atomically; the format follows the file's ending."""
    with atomic_file(path) as partial:
        Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(partial)


def tile(
    rows: Sequence[Sequence[Tensor]], labels: Sequence[str] = (), background: float = 1.0
) -> Tensor:
    """Rows of equally large (3, H, W) pictures as one picture, with labels left of the rows."""
    height, width = rows[0][0].shape[-2:]
    columns = max(len(row) for row in rows)
    margin = 110 if labels else 0
    sheet = torch.full(
        (3, len(rows) * (height + GAP) + GAP, margin + columns * (width + GAP) + GAP), background
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = GAP + i * (height + GAP), margin + GAP + j * (width + GAP)
            sheet[:, top : top + height, left : left + width] = (
                picture.detach().float().cpu().clamp(0, 1)
            )
    return _write_labels(sheet, labels, height) if labels else sheet


def _write_labels(sheet: Tensor, labels: Sequence[str], height: int) -> Tensor:
    canvas = Image.fromarray(to_uint8(sheet).permute(1, 2, 0).numpy())
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for i, label in enumerate(labels):
        draw.multiline_text(
            (6, GAP + i * (height + GAP) + height // 2),
            label,
            fill=(30, 30, 30),
            font=font,
            anchor="lm",
        )
    pixels = torch.from_numpy(numpy.array(canvas))  # (H, W, 3)
    return pixels.permute(2, 0, 1) / 255


def reconstruction_sheet(images: Tensor, recon: Tensor) -> Tensor:
    """Originals above reconstructions, (B, 3, H, W) each, one (3, h, w) picture."""
    return tile([list(images), list(recon)], ["original", "reconstruction"])


def heat(values: Tensor, colour_map: str = "inferno") -> Tensor:
    """(H, W) in [0, 1] -> (3, H, W) colours of one of matplotlib's maps, by default from dark blue
    over red to yellow.
    """
    from matplotlib import colormaps  # noqa: PLC0415 (slow, and most commands draw nothing)

    colours = colormaps[colour_map](values.detach().float().cpu().numpy())[..., :3]  # (H, W, 3)
    return torch.from_numpy(colours).permute(2, 0, 1).float()


def attention_overlay(
    image: Tensor, attention: Tensor, grid: tuple[int, int], query: int
) -> Tensor:
    """One row of attention over its picture, (3, H, W), the query's cell in a white frame.

    Args:
        image: (3, H, W) in [0, 1].
        attention: (N, N), rows sum to 1.
        grid: (h, w) with h * w = N.
        query: the row, counted along the grid.
    """
    height, width = image.shape[-2:]
    # Its own weight would hide the others, and its place is marked anyway.
    row = attention[query].detach().float().cpu().clone()
    row[query] = 0
    heatmap = (row / row.max().clamp_min(1e-12)).view(1, 1, *grid)
    heatmap = F.interpolate(heatmap, size=(height, width), mode="bilinear", align_corners=False)
    grey = image.detach().float().cpu().mean(0, keepdim=True).expand(3, -1, -1)
    picture = 0.35 * grey + 0.65 * heat(heatmap[0, 0])
    return _frame(picture, grid, query)


def _frame(picture: Tensor, grid: tuple[int, int], query: int) -> Tensor:
    height, width = picture.shape[-2:]
    row, column = divmod(query, grid[1])
    top, bottom = round(row * height / grid[0]), round((row + 1) * height / grid[0]) - 1
    left, right = round(column * width / grid[1]), round((column + 1) * width / grid[1]) - 1
    picture = picture.clone()
    picture[:, [top, bottom], left : right + 1] = 1
    picture[:, top : bottom + 1, [left, right]] = 1
    return picture


def attention_sheet(
    images: Tensor,
    encoding,
    queries: Sequence[int] | None = None,
    teacher: Sequence[Tensor] | None = None,
) -> Tensor:
    """Rows of pictures: the query, its attention in every block (mean over heads), the teacher's.

    Args:
        images: (B, 3, H, W) in [0, 1].
        encoding: what `encode(images, return_attention=True)` gave.
        queries: a cell for each picture, counted along the grid; the middle when None.
        teacher: maps (B, N, N) on the same grid, if there is a teacher.
    """
    h, w = encoding.grid
    queries = list(queries) if queries is not None else [(h // 2) * w + w // 2] * len(images)
    rows = [[_frame(image.cpu(), encoding.grid, query) for image, query in zip(images, queries)]]
    labels = ["query"]
    by_row = {
        f"block {index}": [one.mean(0) for one in maps]  # over heads, (N, N) each
        for index, maps in enumerate(encoding.topology, start=1)
    }
    if teacher is not None:
        by_row["teacher"] = teacher
    for label, maps in by_row.items():
        rows.append(
            [
                attention_overlay(image, one, encoding.grid, query)
                for image, one, query in zip(images, maps, queries)
            ]
        )
        labels.append(label)
    return tile(rows, labels)


def fit_side(image: Tensor, limit: int) -> Tensor:
    """(3, H, W) shrunk so that neither side is above `limit` pixels."""
    scale = limit / max(image.shape[-2:])
    if scale >= 1:
        return image
    size = [max(1, math.floor(side * scale)) for side in image.shape[-2:]]
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def comparison_sheet(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) pairs -> (3,h,w): originals, reconstructions, three times their difference."""
    difference = (3 * (real - fake).abs()).clamp(0, 1)
    return tile(
        [list(real), list(fake), list(difference)], ["original", "reconstruction", "difference x3"]
    )


def palette(num_classes: int) -> torch.Tensor:
    """(K,3) colours in [0,1]: class 0 black, the others bright and unlike their neighbours."""
    turns = torch.arange(num_classes) * 0.618034  # hues a golden angle apart
    value = 1 - 0.35 * ((torch.arange(num_classes) // 5) % 2)[:, None]
    hue = (turns[:, None] + torch.tensor([0.0, 2 / 3, 1 / 3])) % 1
    colours = ((6 * hue - 3).abs() - 1).clamp(0, 1) * value
    colours[:1] = 0
    return colours


def colour_labels(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(B,H,W) class indices -> (B,3,H,W) colours; what is no class, as ignored pixels, is white."""
    colours = torch.cat([palette(num_classes), torch.ones(1, 3)])
    is_class = (labels >= 0) & (labels < num_classes)
    return colours[labels.where(is_class, num_classes)].permute(0, 3, 1, 2)


def segmentation_sheet(
    images: torch.Tensor, masks: torch.Tensor, predictions: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """Pictures, true labels and predicted labels laid half over them, as one (3,h,w) picture."""
    rows = [
        0.4 * images + 0.6 * colour_labels(labels, num_classes) for labels in (masks, predictions)
    ]
    return tile([list(images), *(list(row) for row in rows)], ["picture", "truth", "prediction"])
