"""Pictures that go with the numbers: reconstructions beside their originals, and coloured label maps."""

import torch

from muse.evaluation.segmentation import IGNORE
from muse.utils.viz_utils import tile


def comparison_sheet(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) pairs -> (3,h,w): originals, reconstructions, and three times their absolute difference."""
    difference = (3 * (real - fake).abs()).clamp(0, 1)
    return tile([list(real), list(fake), list(difference)], ["original", "reconstruction", "difference x3"])


def palette(num_classes: int) -> torch.Tensor:
    """(K,3) colours in [0,1]: class 0 black, the others bright, hues a golden angle apart so that neighbours differ."""
    turns = torch.arange(num_classes) * 0.618034
    value = 1 - 0.35 * ((torch.arange(num_classes) // 5) % 2)[:, None]
    hue = (turns[:, None] + torch.tensor([0.0, 2 / 3, 1 / 3])) % 1
    colours = ((6 * hue - 3).abs() - 1).clamp(0, 1) * value
    colours[:1] = 0
    return colours


def colour_labels(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(B,H,W) class indices -> (B,3,H,W) colours; ignored pixels are white."""
    colours = torch.cat([palette(num_classes), torch.ones(1, 3)])
    return colours[labels.masked_fill(labels == IGNORE, num_classes)].permute(0, 3, 1, 2)


def segmentation_sheet(
    images: torch.Tensor, masks: torch.Tensor, predictions: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """Pictures, true labels and predicted labels laid half over them, as one (3,h,w) picture."""
    rows = [0.4 * images + 0.6 * colour_labels(labels, num_classes) for labels in (masks, predictions)]
    return tile([list(images), *(list(row) for row in rows)], ["picture", "truth", "prediction"])
