"""Masks beside feature maps: which pixels a map covers, and the classes in each of its cells."""

import numpy
import torch
import torch.nn.functional as F

from muse.data.masks import IGNORE_INDEX


def covered_size(size: tuple[int, int], cell: int | None) -> tuple[int, int]:
    """(H,W) that a feature map covers of pictures of `size`, which the model pads to whole cells.

    The padding lies to the right and below: a picture of 256 pixels and cells of 28 give ten cells
    a side, which cover 280. A cell of None divides the pictures, whatever their size.
    """
    if cell is None:
        return tuple(size)
    height, width = (side + -side % cell for side in size)
    return height, width


def cell_targets(
    masks: torch.Tensor,
    grid: tuple[int, int],
    num_classes: int,
    ignore: int = IGNORE_INDEX,
    cell: int | None = None,
) -> torch.Tensor:
    """(B,H,W) labels -> (B,h*w,K) share of every class among a cell's pixels, ignored ones none.

    Cross-entropy against these shares, summed, equals pixel-wise cross-entropy on logits repeated
    over the cell's pixels, at a fraction of the cost. What the model padded counts nothing, as
    ignored pixels do. Masks are cut to whole cells by nearest resizing where the grid still does
    not divide them.

    Args:
        masks: (B,H,W) labels.
        grid: (h, w).
        num_classes: K.
        ignore: the label that counts nothing.
        cell: see `covered_size`.
    """
    height, width = covered_size(masks.shape[-2:], cell)
    padding = (0, width - masks.shape[-1], 0, height - masks.shape[-2])
    masks = F.pad(masks.long(), padding, value=ignore)
    rows, columns = max(1, round(height / grid[0])), max(1, round(width / grid[1]))
    if (rows * grid[0], columns * grid[1]) != (height, width):
        size = (rows * grid[0], columns * grid[1])
        masks = F.interpolate(masks[:, None].float(), size, mode="nearest")[:, 0].long()
    ignored = masks == ignore
    check_mask_labels(masks, num_classes, ignore)
    # a class of its own, dropped below: far cheaper than picking the others out
    labels = masks.masked_fill(ignored, num_classes)
    batch, cells = len(masks), grid[0] * grid[1]
    tiles = labels.view(batch, grid[0], rows, grid[1], columns).permute(0, 1, 3, 2, 4)
    tiles = tiles.reshape(batch * cells, rows * columns)  # the pixels of each cell
    places = torch.arange(batch * cells, device=masks.device)[:, None] * (num_classes + 1) + tiles
    counts = torch.bincount(places.flatten(), minlength=batch * cells * (num_classes + 1))
    shares = counts.view(-1, num_classes + 1)[:, :num_classes].float()
    return (shares / (rows * columns)).view(batch, cells, num_classes)


def cell_maps(
    masks: torch.Tensor, grid: tuple[int, int], num_classes: int, cell: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a grid can know at best of (B,H,W) labels: (B,K,h,w) shares, and the majority, one-hot.

    Args:
        masks: (B,H,W) labels.
        grid: (h, w).
        num_classes: K.
        cell: see `covered_size`.
    """
    shares = cell_targets(masks, grid, num_classes, cell=cell)  # (B, h*w, K)
    majority = F.one_hot(shares.argmax(2), num_classes).float()
    return tuple(maps.transpose(1, 2).unflatten(2, grid) for maps in (shares, majority))


def check_mask_labels(masks: torch.Tensor, num_classes: int, ignore: int = IGNORE_INDEX) -> None:
    """ValueError unless all labels but the ignored one are classes."""
    bounds = torch.aminmax(masks.masked_fill(masks == ignore, 0))
    low, high = (int(bound) for bound in bounds)
    if low < 0 or high >= num_classes:
        raise ValueError(f"mask labels {low}..{high} do not fit {num_classes} classes")


def foreground_masks(masks: torch.Tensor) -> torch.Tensor:
    """Object masks -> 0 background, 1 any object; ignored pixels stay ignored."""
    return torch.where(masks == IGNORE_INDEX, IGNORE_INDEX, (masks > 0).long())


def count_classes(masks: numpy.ndarray, block: int = 256) -> int:
    """Largest label + 1 over (N,H,W) masks, ignored pixels left out."""
    largest = -1
    for start in range(0, len(masks), block):
        part = numpy.asarray(masks[start : start + block])
        labelled = part[part != IGNORE_INDEX]
        largest = max(largest, int(labelled.max()) if labelled.size else -1)
    if largest < 0:
        raise ValueError("the training masks hold no labelled pixel")
    return largest + 1
