"""What every kind of demo data gives: its pictures and how they are made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import NamedTuple

import numpy
from PIL import Image

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Sample:
    """One picture.

    `names` says what it was made of, for `index.jsonl`.
    """

    image: numpy.ndarray  # (H,W,3) uint8 RGB
    mask: numpy.ndarray  # (H,W) uint8: 0 background, 1 + label where an object is
    caption: str
    label: int  # index of the picture's class
    names: dict[str, str] = field(default_factory=dict)

    def members(self) -> dict[str, bytes]:
        """Its files in a shard, by ending."""
        return {
            "jpg": jpeg_bytes(self.image),
            "txt": self.caption.encode(),
            "cls": str(self.label).encode(),
            "seg.png": png_bytes(self.mask),
        }


def jpeg_bytes(image: numpy.ndarray) -> bytes:
    """(H,W,3) uint8 as a JPEG without chroma subsampling."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def png_bytes(mask: numpy.ndarray) -> bytes:
    """(H,W) uint8 as a grey PNG."""
    buffer = BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


class Kind(NamedTuple):
    """One kind of demo data."""

    version: int  # raised when the same arguments give other pictures
    classes: tuple[str, ...]
    # (size, seed, objects) -> a function (split, index) -> Sample
    prepare: Callable[[int, int, str], Callable[[str, int], Sample]]
    extra_splits: tuple[str, ...] = ()  # parts beside train and val, each of `val_images` pictures
