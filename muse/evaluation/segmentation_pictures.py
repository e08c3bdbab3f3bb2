"""Predictions in colours: the picture, its true labels, the predicted ones, and a legend."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from muse.data.transforms import to_float, to_pixels
from muse.errors import DataError
from muse.evaluation.class_names import read_class_names
from muse.utils.viz_utils import GAP, to_uint8

LEGEND_CLASSES = 24  # of more the names would not be read
LEGEND_LINE = 20  # pixels
OTHER = 1.0  # white: no class, as ignored pixels


def class_colours(num_classes: int) -> Tensor:
    """(K,3) in [0,1], always the same for a class: hues a golden angle apart, in twelve shades.

    Near neighbours in number differ most; 150 classes are all told apart.
    """
    number = torch.arange(num_classes)
    hue = (number * 0.618034 + number // 12 * 0.201626) % 1  # a golden angle in a shade, too
    saturation = torch.tensor([0.95, 0.6, 0.8])[number % 3]
    value = torch.tensor([0.95, 0.55, 0.75, 0.35])[(number // 3) % 4]
    turned = (hue[:, None] + torch.tensor([0.0, 2 / 3, 1 / 3])) % 1
    pure = ((6 * turned - 3).abs() - 1).clamp(0, 1)  # (K,3), of saturation and value 1
    return value[:, None] * (1 - saturation[:, None] * (1 - pure))


def coloured(labels: Tensor, num_classes: int) -> Tensor:
    """(H,W) class indices -> (3,H,W); what is no class is white."""
    colours = torch.cat([class_colours(num_classes), torch.full((1, 3), OTHER)])
    is_class = (labels >= 0) & (labels < num_classes)
    return colours[labels.where(is_class, num_classes).cpu()].permute(2, 0, 1)


def _at_size(labels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(labels.shape) == size:
        return labels
    return F.interpolate(labels[None, None].float(), size, mode="nearest")[0, 0].long()


def prediction_picture(
    picture: Tensor,
    truth: Tensor,
    guess: Tensor,
    num_classes: int,
    names: tuple[str, ...] = (),
) -> Tensor:
    """One (3,h,w) picture: photograph, truth, prediction side by side, with a legend below.

    The legend has the classes of this picture where they are few (LEGEND_CLASSES).

    Args:
        picture: (3,H,W) in [0,1].
        truth: labels of any size; they are shown at the picture's.
        guess: predicted labels, likewise.
        num_classes: K.
        names: of the classes; numbers where there are none.
    """
    size = tuple(picture.shape[-2:])
    maps = [_at_size(labels.cpu(), size) for labels in (truth, guess)]
    columns = [picture.cpu(), *(coloured(labels, num_classes) for labels in maps)]
    gap = torch.ones(3, size[0], GAP)
    strip = torch.cat([columns[0], gap, columns[1], gap, columns[2]], dim=2)
    present = torch.cat([labels.flatten() for labels in maps]).unique()
    present = present[(present >= 0) & (present < num_classes)].tolist()
    if not 0 < len(present) <= LEGEND_CLASSES:
        return strip
    entries = [(number, names[number] if names else str(number)) for number in present]
    return torch.cat([strip, _legend(entries, class_colours(num_classes), strip.shape[-1])], dim=1)


def _legend(entries: list[tuple[int, str]], colours: Tensor, width: int) -> Tensor:
    """(3,h,width): coloured squares with names, in as many lines as they need."""
    font = ImageFont.load_default(size=12)
    places, left, line = [], GAP, 0
    for number, name in entries:
        long = LEGEND_LINE + int(font.getlength(name)) + 2 * GAP
        if left + long > width and left > GAP:
            left, line = GAP, line + 1
        places.append((left, line * LEGEND_LINE + GAP, number, name))
        left += long
    canvas = Image.new("RGB", (width, (line + 1) * LEGEND_LINE + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for left, top, number, name in places:
        fill = tuple(to_uint8(colours[number]).tolist())
        draw.rectangle((left, top, left + 12, top + 12), fill=fill, outline=(60, 60, 60))
        draw.text((left + 17, top + 6), name, fill=(30, 30, 30), font=font, anchor="lm")
    return to_float(to_pixels(canvas))


def stacked(pictures: list[Tensor], limit: int = 1600) -> Tensor:
    """Pictures (3,h,w) of several sizes below each other, white beside the narrow ones.

    Args:
        pictures: at least one.
        limit: greatest width; wider ones are shrunk.
    """
    fitted = []
    for picture in pictures:
        height, width = picture.shape[-2:]
        if width > limit:
            size = (max(1, round(height * limit / width)), limit)
            picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
        fitted.append(picture)
    widest = max(picture.shape[-1] for picture in fitted)
    return torch.cat(
        [F.pad(picture, (0, widest - picture.shape[-1], 0, GAP), value=1.0) for picture in fitted],
        dim=1,
    ).clamp(0, 1)


@dataclass(frozen=True)
class SavedPredictions:
    """Where the predictions for all validation pictures go, and the classes' names.

    Args:
        folder: of numbered PNG files.
        names: a file, one name a line in the order of the labels that are learned; None shows the
            labels' numbers.
    """

    folder: str
    names: str | None = None

    def class_names(self, num_classes: int) -> tuple[str, ...]:
        """() without a file. DataError unless there is a name for each class."""
        names = tuple(read_class_names(self.names)) if self.names else ()
        if names and len(names) != num_classes:
            raise DataError(f"{self.names}: {len(names)} names for {num_classes} classes")
        return names
