"""The field's ways to cut a picture for a measurement, equal to the pixel to the code they copy.

    center   torchvision: the shorter edge resized, then the square in the centre
    squash   the whole picture to a square, whatever its shape
    adm      ADM: halved by boxes while it is large enough, the shorter edge to the size, the centre

`PictureCrop` and `RandomCrop` have the two halves of `transforms.Transform` and stand in its place
in a `SampleMaker`. `reflect_pad` and `unpad` are for a network whose cell does not divide 256.
"""

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from muse.data.decode import BadSample
from muse.errors import ConfigError

METHODS = ("center", "squash", "adm")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def _to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 (3,h,w)."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


def _check_choice(what: str, value: str, known) -> None:
    if value not in known:
        raise ConfigError(f"unknown {what} {value!r}: one of {', '.join(known)}")


# --------------------------------------------------------------------------------- the arithmetic
def shorter_edge_size(width: int, height: int, edge: int) -> tuple[int, int]:
    """(width, height) with the shorter at `edge`; the longer is truncated, as in torchvision."""
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def adm_sizes(width: int, height: int, side: int) -> list[tuple[int, int]]:
    """ADM's sizes (width, height), in order: of every halving, then of the last resize."""
    sizes = []
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        sizes.append((width, height))
    scale = side / min(width, height)
    return [*sizes, (round(width * scale), round(height * scale))]


@dataclass(frozen=True)
class PictureCrop:
    """One cut of a picture, without chance.

    Args:
        method: center, squash or adm, see above.
        resize_shorter_edge: pixels before the crop, for `center` alone; None keeps the size, or
            enlarges it to the crop.
        crop_size: side of the square; None (`center` alone) keeps the picture as resized.
        filter: bicubic or bilinear, both antialiased as Pillow's are; adm's is bicubic.
        resize_mask: a mask follows its picture, nearest; False leaves it at its own size, which
            no crop then fits.
    """

    method: str = "center"
    resize_shorter_edge: int | None = 256
    crop_size: int | None = 224
    filter: str = "bicubic"
    resize_mask: bool = True

    def __post_init__(self) -> None:
        _check_choice("way to crop", self.method, METHODS)
        _check_choice("resize filter", self.filter, FILTERS)
        edge, crop = self.resize_shorter_edge, self.crop_size
        for name, value in (("resize_shorter_edge", edge), ("crop_size", crop)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be positive, not {value}")
        if self.method != "center" and (crop is None or edge is not None):
            raise ConfigError(f"the crop {self.method!r} takes a crop_size and no other resize")
        if self.method == "adm" and self.filter != "bicubic":
            raise ConfigError("ADM's crop is bicubic")
        if edge is not None and crop is not None and edge < crop:
            raise ConfigError(f"crop_size {crop} does not fit into resize_shorter_edge {edge}")
        if not self.resize_mask and crop is not None and self.method != "squash":
            raise ConfigError("a mask of its own size does not fit a cropped picture")

    def sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """The (width, height) of every resize in turn, none where the picture stays as it is."""
        if self.method == "squash":
            return [(self.crop_size, self.crop_size)]
        if self.method == "adm":
            return adm_sizes(width, height, self.crop_size)
        shorter = min(width, height)
        edge = self.resize_shorter_edge or max(shorter, self.crop_size or 0)
        return [] if edge == shorter else [shorter_edge_size(width, height, edge)]

    def resize(
        self, image: Image.Image, mask: Image.Image | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """RGB picture -> uint8 (3,h,w), and its mask -> int32 (h,w) or its own size.

        Raises BadSample mask_size if the mask is of another size than the picture.
        """
        if mask is not None and mask.size != image.size:
            raise BadSample("mask_size", f"mask {mask.size}, image {image.size}")
        sizes = self.sizes(*image.size)
        for size in sizes[:-1]:  # ADM's halvings
            image = image.resize(size, Image.Resampling.BOX)
        for size in sizes[-1:]:
            image = image.resize(size, FILTERS[self.filter])
            if mask is not None and self.resize_mask:
                mask = mask.resize(size, Image.Resampling.NEAREST)
        return _to_tensor(image), None if mask is None else torch.from_numpy(numpy.array(mask))

    def crop(
        self, pixels: Tensor, mask: Tensor | None = None, rng: random.Random | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(3,h,w) and (h,w) -> the square in the centre of both; rng is not used."""
        side = self.crop_size
        if side is None or self.method == "squash":
            return pixels, mask
        spare_h, spare_w = (length - side for length in pixels.shape[-2:])
        if self.method == "adm":
            top, left = spare_h // 2, spare_w // 2
        else:  # torchvision rounds a half to the even pixel, as Python does
            top, left = round(spare_h / 2), round(spare_w / 2)
        pixels = pixels[:, top : top + side, left : left + side]
        return pixels, None if mask is None else mask[top : top + side, left : left + side]

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> uint8 (3,h,w)."""
        return self.crop(self.resize(image)[0])[0]


@dataclass(frozen=True)
class RandomCrop:
    """A random part of the picture, resized to a square and mirrored by chance: for training.

    Args:
        crop_size: side of the square.
        scale: least and greatest share of the picture's area.
        ratio: least and greatest width over height, drawn evenly in its logarithm.
        flip: probability of a mirrored picture.
        attempts: boxes drawn until one fits, then the centre: torchvision's 10. With 1 the first
            box is cut to the picture where it does not fit: MAE's.
        filter: bicubic or bilinear.
    """

    crop_size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    attempts: int = 10
    filter: str = "bicubic"

    def __post_init__(self) -> None:
        _check_choice("resize filter", self.filter, FILTERS)
        if self.crop_size < 1 or self.attempts < 1:
            raise ConfigError("crop_size and attempts must be positive")

    def box(self, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
        """(left, top, width, height) of the part that is drawn."""
        for _ in range(self.attempts):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(*map(math.log, self.ratio)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if self.attempts == 1:
                w, h = max(1, min(w, width)), max(1, min(h, height))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, width - w), rng.randint(0, height - h), w, h
        narrow, wide = self.ratio
        w = width if width / height <= wide else round(height * wide)
        h = height if width / height >= narrow else round(width / narrow)
        return (width - w) // 2, (height - h) // 2, w, h

    def resize(
        self, image: Image.Image, mask: Image.Image | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """RGB picture -> uint8 (3,h,w) of its own size: all the rest is drawn anew each epoch."""
        if mask is not None:
            raise ConfigError("a random part of a picture is for labels of whole pictures")
        return _to_tensor(image), None

    def crop(
        self, pixels: Tensor, mask: Tensor | None = None, rng: random.Random | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(3,h,w) -> (3,crop_size,crop_size), drawn from rng."""
        if rng is None:
            raise ValueError("a random part of a picture needs a generator")
        left, top, w, h = self.box(pixels.shape[-1], pixels.shape[-2], rng)
        part = pixels[:, top : top + h, left : left + w].permute(1, 2, 0).contiguous()
        image = Image.fromarray(part.numpy())
        pixels = _to_tensor(image.resize((self.crop_size, self.crop_size), FILTERS[self.filter]))
        return (pixels.flip(-1) if rng.random() < self.flip else pixels), None


# ------------------------------------------------------------------------------ padding of tensors
class Padding(NamedTuple):
    """Where a padded picture holds the original."""

    top: int
    left: int
    height: int
    width: int


def _reflected(length: int, before: int, after: int, device: torch.device) -> Tensor:
    """Places to read from: 2 1 | 0 1 2 3 | 2 1, over again where the padding is longer."""
    period = max(1, 2 * (length - 1))
    places = torch.arange(-before, length + after, device=device).remainder(period)
    return torch.where(places < length, places, period - places)


def reflect_pad(images: Tensor, multiple: int) -> tuple[Tensor, Padding]:
    """(...,H,W) padded by reflection, evenly on both sides, until `multiple` divides each side.

    The edge itself is not repeated. Of an odd number of pixels the last goes right or below.
    """
    height, width = images.shape[-2:]
    extra_h, extra_w = -height % multiple, -width % multiple
    top, left = extra_h // 2, extra_w // 2
    rows = _reflected(height, top, extra_h - top, images.device)
    columns = _reflected(width, left, extra_w - left, images.device)
    padded = images.index_select(-2, rows).index_select(-1, columns)
    return padded, Padding(top, left, height, width)


def unpad(images: Tensor, padding: Padding) -> Tensor:
    """(...,H,W) without what `reflect_pad` added."""
    rows = slice(padding.top, padding.top + padding.height)
    return images[..., rows, padding.left : padding.left + padding.width]
