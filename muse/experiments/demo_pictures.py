"""The demo's pictures: reconstructions and attention of held-out pictures, and the loss curves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse.evaluation.attention_quality import object_cells, teacher_maps
from muse.evaluation.suite import Pictures
from muse.utils.curves import METRICS, draw_curves, read_run
from muse.utils.viz_utils import attention_sheet, save_image, tile

COLUMNS = 8
CURVES = ("distillation_cosine", "reconstruction", "perceptual", "topology", "itc")


def draw_held_out(
    output: Path, model: Any, val: Pictures, teacher: Any, seen: Pictures | None = None
) -> list[tuple[Path, str]]:
    """Write `reconstructions.png`, `attention.png` and, with `seen`, `reconstructions-seen.png`.

    Args:
        output: the directory.
        model: what decodes and attends.
        val: pictures that no stage saw; some of them are drawn.
        teacher: gives the last row of the attention.
        seen: new pictures of objects that the training shows.

    Returns:
        (file, caption) of each.
    """
    chosen = spread_over_captions(val.text, 2 * COLUMNS)
    top = val.images[chosen[:COLUMNS]]
    with torch.inference_mode():
        encoding = model.encode(top, return_attention=True)
        target = teacher_maps(teacher, top, encoding.grid)[-1][:, 0]  # (B,N,N)
    reconstructions = output / "reconstructions.png"
    _draw_reconstructions(model, val, reconstructions)
    found = [(reconstructions, "Reconstructions of objects it has never seen")]
    if seen is not None:
        again = output / "reconstructions-seen.png"
        _draw_reconstructions(model, seen, again)
        found.append((again, "Reconstructions of new pictures of training objects"))
    cells = object_cells(val.masks[chosen[:COLUMNS]], encoding.grid)  # (B,N)
    queries = [_query(row, encoding.grid) for row in cells]
    attention = output / "attention.png"
    save_image(attention_sheet(top, encoding, queries, target), attention)
    return [*found, (attention, "What each block attends to, from the framed cell")]


def _draw_reconstructions(model: Any, pictures: Pictures, path: Path) -> None:
    """Two rows of pictures, each above its reconstructions."""
    images = pictures.images[spread_over_captions(pictures.text, 2 * COLUMNS)]
    with torch.inference_mode():
        recon = model.reconstruct(images)
    rows = [row for both in zip(images.split(COLUMNS), recon.split(COLUMNS)) for row in both]
    labels = ["original", "reconstruction"] * (len(rows) // 2)
    save_image(tile([list(row) for row in rows], labels), path)


def named_thing(caption: str) -> str:
    """A caption without its category: "A zebra" of "A zebra, a kind of animal."."""
    return caption.split(",")[0].rstrip(".")


def spread_over_captions(captions: list[str], count: int) -> Tensor:
    """Indices of `count` pictures, spread over the set, with as few equal captions as possible."""
    first: dict[str, int] = {}  # what a caption names -> first picture of it
    for index, caption in enumerate(captions):
        first.setdefault(named_thing(caption), index)
    pool = list(first.values())
    if len(pool) < count:
        rest = [index for index in range(len(captions)) if index not in set(pool)]
        pool += rest[: count - len(pool)]
    places = torch.linspace(0, len(pool) - 1, min(count, len(pool))).round().long()
    return torch.tensor(pool)[places]


def _query(cells: Tensor, grid: tuple[int, int]) -> int:
    """The object's cell nearest to its own centre; the picture's middle where no object is."""
    inside = cells.nonzero().flatten()
    if not len(inside):
        return (grid[0] // 2) * grid[1] + grid[1] // 2
    places = torch.stack([inside // grid[1], inside % grid[1]], dim=1).float()
    return int(inside[(places - places.mean(0)).square().sum(1).argmin()])


def draw_curves_of_stages(output: Path, stages: Iterable[str]) -> tuple[Path, str]:
    """Draw the losses of all stages over optimizer steps; (file, caption)."""
    folders = [output / stage for stage in stages]
    runs = [read_run(folder) for folder in folders if (folder / METRICS).is_file()]
    return draw_curves(runs, output / "curves.png", CURVES), "Losses"
