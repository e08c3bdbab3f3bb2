"""Resize, crop and flip of pictures and their masks.

Two halves, so that a small data set may be kept decoded: `resize` does what is the same in every
epoch, `crop` what is drawn anew.
"""

import hashlib
import random
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from muse.data.decode import BadSample
from muse.errors import ConfigError


def generator_for(*parts: object) -> random.Random:
    """A generator that depends on `parts` (seed, epoch, key, ...) alone, on every machine."""
    digest = hashlib.blake2b(
        repr(parts).encode("utf-8", "surrogateescape"), digest_size=16
    ).digest()
    return random.Random(int.from_bytes(digest, "big"))


def to_pixels(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 (3,h,w)."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [0,1], any shape, the same numbers on every device."""
    # A GPU multiplies by 1/255 where a plain number is given, which rounds otherwise.
    whole = 255 if images.device.type == "cpu" else torch.full((), 255.0, device=images.device)
    return images.to(torch.float32).div_(whole)


def _resized(image: Image.Image, size: tuple[int, int], full: tuple[int, int]) -> Tensor:
    """RGB picture -> uint8 (3,h,w) of `size` (width, height).

    Within 1 of Pillow's bicubic where `image` has its `full` size. A reduced one ends with a part
    of a pixel where the reduction does not divide the size, which must not shift all others.
    """
    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None]
    reduction = round(full[0] / image.width)
    if (image.width * reduction, image.height * reduction) == full:
        made = F.interpolate(pixels, size=size[::-1], mode="bicubic", antialias=True)
    else:
        # Of sizes, torch takes the whole number below input x factor: a hair above is safe.
        factors = [new * reduction / old * (1 + 1e-9) for new, old in zip(size, full)][::-1]
        made = F.interpolate(pixels, scale_factor=factors, mode="bicubic", antialias=True)
    return made[0]


@dataclass(frozen=True)
class Transform:
    """Shorter edge to a size, then a square out of it.

    Args:
        resize_shorter_edge: pixels; None keeps the size, or enlarges it to the crop.
        crop_size: side of the square; None keeps the resized picture.
        random_crop: a drawn place where `crop` gets a generator; else the centre.
        random_flip: half of the pictures mirrored where `crop` gets a generator; else none.
        jpeg_draft: JPEGs may be decoded smaller, and are resized by torch's 8-bit kernel instead
            of Pillow's: some times as fast, and within 2 of 255 of the plain way on average.
    """

    resize_shorter_edge: int | None = 256
    crop_size: int | None = 224
    random_crop: bool = False
    random_flip: bool = False
    jpeg_draft: bool = False

    def __post_init__(self) -> None:
        edge, crop = self.resize_shorter_edge, self.crop_size
        for name, value in (("resize_shorter_edge", edge), ("crop_size", crop)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be positive, not {value}")
        if edge is not None and crop is not None and edge < crop:
            raise ConfigError(f"crop_size {crop} does not fit into resize_shorter_edge {edge}")

    def resize(
        self,
        image: Image.Image,
        mask: Image.Image | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """RGB picture -> uint8 (3,h,w), antialiased bicubic, and its mask -> int32 (h,w), nearest.

        Raises BadSample mask_size if the mask is of another size than the picture.

        Args:
            image: the picture.
            mask: if it has one.
            size: (width, height) of the picture if `image` was decoded with `jpeg_draft`.
        """
        full = size or image.size
        if mask is not None and mask.size != full:
            raise BadSample("mask_size", f"mask {mask.size}, image {full}")
        target = self.target(*full)
        if mask is not None and target != full:
            mask = mask.resize(target, Image.Resampling.NEAREST)
        numbers = None if mask is None else torch.from_numpy(numpy.array(mask))
        if target == image.size:
            return to_pixels(image), numbers
        if size is not None:
            return _resized(image, target, full), numbers
        return to_pixels(image.resize(target, Image.Resampling.BICUBIC)), numbers

    def target(self, width: int, height: int) -> tuple[int, int]:
        """torchvision's size: the longer side is cut down to whole pixels, not rounded."""
        shorter, longer = min(width, height), max(width, height)
        edge = self.resize_shorter_edge or max(shorter, self.crop_size or 0)
        scaled = int(edge * longer / shorter)
        return (edge, scaled) if width <= height else (scaled, edge)

    def crop(
        self, pixels: Tensor, mask: Tensor | None = None, rng: random.Random | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The same crop and flip of a picture (3,h,w) and its mask (h,w), both as `resize` gave
        them.

        `rng` draws them; without it the centre is cropped and nothing flipped.
        """
        height, width = pixels.shape[-2:]
        side = self.crop_size
        if side is not None:
            spare_h, spare_w = height - side, width - side
            if rng is not None and self.random_crop:
                top, left = rng.randint(0, spare_h), rng.randint(0, spare_w)
            else:
                # torchvision's middle: half a pixel goes to the even number.
                top, left = round(spare_h / 2), round(spare_w / 2)
            pixels = pixels[:, top : top + side, left : left + side]
            mask = None if mask is None else mask[top : top + side, left : left + side]
        if rng is not None and self.random_flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
            mask = None if mask is None else mask.flip(-1)
        return pixels, mask
