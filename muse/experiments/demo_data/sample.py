"""What one demo picture is, whichever kind drew it."""

from dataclasses import dataclass, field

import numpy


@dataclass(frozen=True)
class Sample:
    """One picture.

    image: (H,W,3) uint8 RGB. mask: (H,W) uint8, 0 background and 1 + label where an object is.
    label: index of the picture's class. names: what it was made of, for the split's record (`index.jsonl`).
    """

    image: numpy.ndarray
    mask: numpy.ndarray
    caption: str
    label: int
    names: dict[str, str] = field(default_factory=dict)
