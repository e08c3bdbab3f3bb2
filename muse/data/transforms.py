"""Resize, crop and flip: PIL RGB to float32 (3,H,W) in [0,1]; masks follow with nearest resampling.

Two halves, so that a small data set may be kept decoded: `resize` does what is the same in every epoch, `crop` what is
drawn anew.
"""

import hashlib
import random
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor

from muse.data.decode import BadSample
from muse.errors import ConfigError


def generator_for(*parts: object) -> random.Random:
    """A generator that depends on `parts` (seed, epoch, key, ...) only: no global state, the same on every machine."""
    digest = hashlib.blake2b(
        repr(parts).encode("utf-8", "surrogateescape"), digest_size=16
    ).digest()
    return random.Random(int.from_bytes(digest, "big"))


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [0,1], any shape."""
    return images.to(torch.float32).div_(255)


@dataclass(frozen=True)
class Transform:
    """`resize_shorter_edge` (pixels; None keeps the size where the crop fits), then a `crop_size` square.

    `random_crop` and `random_flip` are used only where a generator is given; without one: centre crop, no flip.
    """

    resize_shorter_edge: int | None = 256
    crop_size: int | None = 224
    random_crop: bool = False
    random_flip: bool = False

    def __post_init__(self) -> None:
        edge, crop = self.resize_shorter_edge, self.crop_size
        for name, value in (("resize_shorter_edge", edge), ("crop_size", crop)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be positive, not {value}")
        if edge is not None and crop is not None and edge < crop:
            raise ConfigError(f"crop_size {crop} does not fit into resize_shorter_edge {edge}")

    def resize(
        self, image: Image.Image, mask: Image.Image | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """PIL -> uint8 (3,h,w), shorter edge as asked (antialiased bicubic), and int32 mask (h,w), nearest.

        Raises BadSample mask_size if the mask is of another size than the picture.
        """
        if mask is not None and mask.size != image.size:
            raise BadSample("mask_size", f"mask {mask.size}, image {image.size}")
        size = self._target(*image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
            mask = None if mask is None else mask.resize(size, Image.Resampling.NEAREST)
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()
        return pixels, None if mask is None else torch.from_numpy(numpy.array(mask))

    def _target(self, width: int, height: int) -> tuple[int, int]:
        shorter = min(width, height)
        edge = self.resize_shorter_edge or max(shorter, self.crop_size or 0)
        return max(1, round(width * edge / shorter)), max(1, round(height * edge / shorter))

    def crop(
        self, pixels: Tensor, mask: Tensor | None = None, rng: random.Random | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(3,h,w) and (h,w) -> the same crop and flip of both; still uint8 and int32."""
        height, width = pixels.shape[-2:]
        side = self.crop_size
        if side is not None:
            spare_h, spare_w = height - side, width - side
            if rng is not None and self.random_crop:
                top, left = rng.randint(0, spare_h), rng.randint(0, spare_w)
            else:
                top, left = spare_h // 2, spare_w // 2
            pixels = pixels[:, top : top + side, left : left + side]
            mask = None if mask is None else mask[top : top + side, left : left + side]
        if rng is not None and self.random_flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
            mask = None if mask is None else mask.flip(-1)
        return pixels, mask


def train_transform(
    image: Image.Image,
    rng: random.Random,
    resize_shorter_edge: int | None = 256,
    crop_size: int = 224,
    random_crop: bool = True,
    random_flip: bool = True,
) -> Tensor:
    """RGB picture -> float32 (3,crop,crop) in [0,1], crop and flip drawn from `rng`."""
    transform = Transform(resize_shorter_edge, crop_size, random_crop, random_flip)
    return to_float(transform.crop(transform.resize(image)[0], rng=rng)[0])


def eval_transform(
    image: Image.Image, resize_shorter_edge: int | None = 256, crop_size: int | None = 224
) -> Tensor:
    """RGB picture -> float32 (3,crop,crop) in [0,1]: shorter edge resized with antialias, centre crop.

    `crop_size` None: no crop.
    """
    transform = Transform(resize_shorter_edge, crop_size)
    return to_float(transform.crop(transform.resize(image)[0])[0])
