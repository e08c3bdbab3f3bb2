"""Training crops of scenes: a picture and its label map cut, scaled and mirrored together.

The pipeline of mmsegmentation's ADE20K recipes: the shorter edge to a random size, a random square,
a random flip, then brightness, contrast, saturation and hue as SSD changes them. `SceneCrop` has
the two halves of `transforms.Transform` and stands in its place in a `SampleMaker`.
"""

import random
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor

from muse.data.decode import BadSample
from muse.data.masks import IGNORE_INDEX
from muse.data.transforms import to_pixels
from muse.errors import ConfigError

MEAN_COLOUR = (124, 116, 104)  # ImageNet's, in bytes: what a network sees as zero
CROP_ATTEMPTS = 10
BRIGHTNESS = 32  # bytes, up or down
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18 / 180  # of a turn each way: 8-bit HSV of OpenCV has 180 hues, and 18 of them


@dataclass(frozen=True)
class SceneCrop:
    """Args:
    shorter_edge: pixels, before the ratio.
    ratio: least and greatest; one is drawn evenly for each picture.
    crop_size: side of the square; a smaller picture is padded right and below, with the mean
        colour and ignored labels.
    largest_class: a square of which one class has this share or more is drawn anew, ten times
        at most; 1 takes the first.
    flip: probability of a mirrored picture.
    photometric: whether colours change.
    """

    shorter_edge: int = 512
    ratio: tuple[float, float] = (0.5, 2.0)
    crop_size: int = 512
    largest_class: float = 0.75
    flip: float = 0.5
    photometric: bool = True

    def __post_init__(self) -> None:
        if min(self.shorter_edge, self.crop_size) < 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError("shorter_edge, crop_size and ratio must be positive")

    def resize(
        self, image: Image.Image, mask: Image.Image | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """RGB picture -> uint8 (3,h,w) of its own size, and its mask: all else is drawn anew.

        Raises BadSample mask_size if the mask is of another size than the picture.
        """
        if mask is None:
            raise ConfigError("a scene is cut together with its mask")
        if mask.size != image.size:
            raise BadSample("mask_size", f"mask {mask.size}, image {image.size}")
        return to_pixels(image), torch.from_numpy(numpy.array(mask))

    def crop(
        self, pixels: Tensor, mask: Tensor, rng: random.Random | None = None
    ) -> tuple[Tensor, Tensor]:
        """uint8 (3,h,w) and (h,w) -> (3,c,c) and (c,c), drawn from rng."""
        if rng is None:
            raise ValueError("a random part of a scene needs a generator")
        pixels, mask = scale_scene(pixels, mask, int(self.shorter_edge * rng.uniform(*self.ratio)))
        side = self.crop_size
        top, left = self._corner(mask, rng)
        pixels = pixels[:, top : top + side, left : left + side]
        mask = mask[top : top + side, left : left + side]
        if rng.random() < self.flip:
            pixels, mask = pixels.flip(-1), mask.flip(-1)
        if self.photometric:
            pixels = distort_colours(pixels, rng)
        return _padded(pixels, mask, side)

    def _corner(self, mask: Tensor, rng: random.Random) -> tuple[int, int]:
        """(top, left) of a square in which no class is too large, or of the last one drawn."""
        spare = [max(0, length - self.crop_size) for length in mask.shape]
        for _ in range(CROP_ATTEMPTS):
            top, left = (rng.randint(0, one) for one in spare)
            part = mask[top : top + self.crop_size, left : left + self.crop_size]
            counts = part[part != IGNORE_INDEX].unique(return_counts=True)[1]
            if self.largest_class >= 1 or (
                len(counts) > 1 and counts.max() < self.largest_class * counts.sum()
            ):
                break
        return top, left


def scale_scene(pixels: Tensor, mask: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """uint8 (3,h,w) and (h,w) with the shorter edge at `edge`, the longer rounded.

    The picture bilinear and antialiased, the mask nearest.
    """
    height, width = mask.shape
    scale = edge / min(height, width)
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image = image.resize(size, Image.Resampling.BILINEAR)
    labels = Image.fromarray(mask.to(torch.int32).numpy()).resize(size, Image.Resampling.NEAREST)
    return to_pixels(image), torch.from_numpy(numpy.array(labels))


def _padded(pixels: Tensor, mask: Tensor, side: int) -> tuple[Tensor, Tensor]:
    height, width = mask.shape
    if (height, width) == (side, side):
        return pixels.contiguous(), mask.contiguous()
    colours = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
    labels = torch.full((side, side), IGNORE_INDEX, dtype=mask.dtype)
    colours[:, :height, :width], labels[:height, :width] = pixels, mask
    return colours, labels


# ------------------------------------------------------------------------------------------ colours
def distort_colours(pixels: Tensor, rng: random.Random) -> Tensor:
    """uint8 (3,h,w) -> the same with other brightness, contrast, saturation and hue.

    Each of them changes with probability one half; contrast comes before saturation and hue or
    after them, likewise.
    """
    if rng.random() < 0.5:
        pixels = linear_change(pixels, 1.0, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else None
    early = rng.random() < 0.5
    if contrast is not None and early:
        pixels = linear_change(pixels, contrast)
    saturation = rng.uniform(*SATURATION) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-HUE, HUE) if rng.random() < 0.5 else 0.0
    if saturation != 1 or hue:
        pixels = change_hsv(pixels, saturation, hue)
    if contrast is not None and not early:
        pixels = linear_change(pixels, contrast)
    return pixels


def linear_change(pixels: Tensor, factor: float, shift: float = 0.0) -> Tensor:
    """uint8 -> uint8: factor · value + shift, cut to 0..255, fractions dropped."""
    return (pixels.float() * factor + shift).clamp_(0, 255).to(torch.uint8)


def change_hsv(pixels: Tensor, saturation: float, hue: float) -> Tensor:
    """uint8 (3,h,w) with its saturation times a factor and its hue turned, through 8-bit HSV.

    Args:
        pixels: RGB.
        saturation: factor; the product is cut to 255.
        hue: of a whole turn.
    """
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    hues, saturations, values = (numpy.array(band) for band in image.convert("HSV").split())
    hues = hues + numpy.uint8(int(hue * 255) % 256)  # over 255, and so a negative turn, goes round
    saturations = numpy.minimum(saturations * saturation, 255).astype(numpy.uint8)
    bands = [Image.fromarray(band) for band in (hues, saturations, values)]
    return to_pixels(Image.merge("HSV", bands).convert("RGB"))
