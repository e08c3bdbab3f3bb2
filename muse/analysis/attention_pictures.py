"""Pictures of what blocks attend to: from query cells, or in the style of the authors' figures."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from muse.data.dataloader import sample_images
from muse.errors import ConfigError, DataError
from muse.inference import find_images, read_image
from muse.utils.viz_utils import attention_sheet, heat, save_image, tile

STYLES = ("query", "release")
RELEASE_HEADS = 3
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
    style: str = "query",
) -> list[Path]:
    """Write `NAME_attention.png` (single) or `attention.png` (batch).

    Args:
        model: what attends.
        pictures: (name, picture), from `pictures_for`.
        folder: the directory.
        mode: single: a column for each query; batch: a column for each picture.
        place: (y, x) of the query as fractions; None: the middle, and for single four more.
        style: query: what a cell attends to, in every block; release: where the last block looks,
            without a query (see `looked_at`).

    Returns:
        The files.
    """
    side = model.encoder.config.image_size[0] // model.cell * model.cell
    device = next(model.parameters()).device
    images = torch.stack([square(image, side) for _, image in pictures]).to(device)  # (B,3,S,S)
    encoding = model.encode(images, return_attention=True)
    name = "attention.png" if mode == "batch" else f"{pictures[0][0]}_attention.png"
    if style == "release":
        if place is not None:
            raise ConfigError("--query is for --style query: the release's maps have no query")
        sheet = release_sheet(images, encoding.topology[-1], encoding.grid)
    elif mode == "batch":
        cells = [query_cell(place or PLACES[0], encoding.grid)] * len(images)
        sheet = attention_sheet(images, encoding, cells)
    else:
        cells = [query_cell(one, encoding.grid) for one in ([place] if place else PLACES)]
        repeated = encoding._replace(
            topology=tuple(maps.expand(len(cells), -1, -1, -1) for maps in encoding.topology)
        )
        sheet = attention_sheet(images.expand(len(cells), -1, -1, -1), repeated, cells)
    save_image(sheet, folder / name)
    return [folder / name]


# ---------------------------------------------------------------- the style of the authors' figures
def looked_at(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Where a block looks, head by head; the clearest heads first (docs/fidelity.md row 49).

    What a cell gives to itself is left out, and the mean over all queries says how much every cell
    is looked at. A head that looks at the border more than at the rest shows the background, so its
    map is inverted. Above its mean, the largest connected region stays and all else is 0. The
    authors' file has a temperature of 1.0, which makes the whole map 0; there is none here.

    Args:
        attention: (heads, N, N), rows sum to 1.
        grid: (h, w) with h * w = N.

    Returns:
        (3, h, w) in [0, 1]: the three heads with the largest variance (fewer where there are
        fewer).
    """
    maps = attention.detach().double().cpu()
    maps = maps * (1 - torch.eye(maps.shape[-1], dtype=maps.dtype))
    maps = maps.mean(dim=1)  # (heads, N): over queries
    order = maps.var(dim=1).argsort(descending=True, stable=True)[:RELEASE_HEADS]
    maps = maps[order].unflatten(1, grid)  # (3, h, w)
    border = torch.ones(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    for index, one in enumerate(maps):
        one = _stretch(one)
        if one[border].mean() > one.mean():
            one = 1 - one
        maps[index] = _stretch(one * largest_region(one > one.mean()))
    return maps.float()


def _stretch(values: Tensor) -> Tensor:
    """To [0, 1]; all 0 where they are all equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def largest_region(mask: Tensor) -> Tensor:
    """The largest part of (h, w) true cells that share edges; of equal ones the first."""
    left = {tuple(cell) for cell in mask.nonzero().tolist()}
    best: list[tuple[int, int]] = []
    for start in sorted(left):
        if start not in left:
            continue  # of a region that was seen before
        left.remove(start)
        region = [start]
        for row, column in region:  # grows while it is walked through
            for cell in (
                (row - 1, column),
                (row + 1, column),
                (row, column - 1),
                (row, column + 1),
            ):
                if cell in left:
                    left.remove(cell)
                    region.append(cell)
        best = max(best, region, key=len)
    kept = torch.zeros_like(mask)
    for cell in best:
        kept[cell] = True
    return kept


def release_sheet(images: Tensor, attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """A column a picture: the picture, then its three maps laid over it (0.45 picture, 0.55 map).

    Args:
        images: (B, 3, H, W) in [0, 1].
        attention: (B, heads, N, N) of the last block.
        grid: (h, w) with h * w = N.
    """
    columns = []
    for image, one in zip(images.cpu(), attention):
        maps = looked_at(one, grid)[None]  # (1, 3, h, w)
        maps = F.interpolate(maps, size=image.shape[-2:], mode="bilinear", align_corners=False)[0]
        columns.append([image, *(0.45 * image + 0.55 * heat(each, "jet") for each in maps)])
    labels = ["picture", *(f"head {rank}" for rank in range(1, len(columns[0])))]
    return tile(list(zip(*columns)), labels)
