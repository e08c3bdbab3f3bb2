"""What every kind of demo data gives: its pictures and how they are made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy


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


class Kind(NamedTuple):
    """One kind of demo data."""

    version: int  # raised when the same arguments give other pictures
    classes: tuple[str, ...]
    # (size, seed, objects) -> a function (split, index) -> Sample
    prepare: Callable[[int, int, str], Callable[[str, int], Sample]]
    extra_splits: tuple[str, ...] = ()  # parts beside train and val, each of `val_images` pictures
