"""The kind `edits`: exact pairs of pictures before and after a change, with the instruction.

The compositor knows object, mask and background, so that nothing differs but what was asked for.
In val the picture shows an object and a background that training never showed; what is asked for is
known from training, since no text model could guess an unseen word.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy

from muse.experiments.demo_data.compose import Placement, blend, to_uint8_rgb
from muse.experiments.demo_data.picture_layers import (
    LAYERS,
    Layers,
    LayerSet,
    Picture,
    balanced_object,
    contrasting_ground,
    draw_picture,
    the,
)
from muse.experiments.demo_data.sample import Sample, jpeg_bytes, png_bytes

VERSION = 1
_SPLITS = {"train": 20, "val": 21}
# One of each ten: 5 objects are replaced, 3 backgrounds, 2 objects are removed.
CHANGES = ("replace",) * 5 + ("background",) * 3 + ("remove",) * 2
_SMALLER = 0.7  # what replaces a long thin object may be this much smaller
WORDINGS = {
    "replace": ("Replace {it} by {new}.", "Change {it} into {new}.", "Turn {it} into {new}."),
    "background": ("Put {it} {place}.", "Put it {place}.", "Show {it} {place}."),
    "remove": ("Remove {it}.", "Take {it} away.", "Delete {it}."),
}


@dataclass(frozen=True)
class EditSample(Sample):
    """`image` is the picture after the change; `mask` is 1 where the two differ."""

    source: numpy.ndarray | None = None  # (H, W, 3) uint8

    def members(self) -> dict[str, bytes]:
        return {
            "input.jpg": jpeg_bytes(self.source),
            "output.jpg": jpeg_bytes(self.image),
            "txt": self.caption.encode(),
            "cls": str(self.label).encode(),
            "seg.png": png_bytes(self.mask),
        }


@dataclass(frozen=True)
class Edits:
    """Callable (split, index) -> EditSample."""

    layers: LayerSet
    seed: int

    def __call__(self, split: str, index: int) -> EditSample:
        rng = numpy.random.default_rng([self.seed, _SPLITS[split], index])
        own, known = getattr(self.layers, split), self.layers.train
        picture = draw_picture(own, balanced_object(own, rng), rng)
        change = CHANGES[index % len(CHANGES)]
        image, words, label = _CHANGES[change](picture, own, known, rng)
        source = to_uint8_rgb(blend(*picture.layer, picture.background))
        target = to_uint8_rgb(image)
        it = the(own.phrases[picture.item])
        wording = WORDINGS[change][int(rng.integers(len(WORDINGS[change])))]
        return EditSample(
            target,
            (source != target).any(-1).astype(numpy.uint8),
            wording.format(it=it, **words),
            label,
            {
                "object": own.phrases[picture.item],
                "background": own.grounds[picture.ground],
                "change": change,
                "becomes": next(iter(words.values()), ""),
            },
            source,
        )


def _replace(
    picture: Picture, own: Layers, known: Layers, rng: numpy.random.Generator
) -> tuple[numpy.ndarray, dict[str, str], int]:
    """Another object, upright, in the same place; as large, if that does not lead over the edge."""
    item = balanced_object(known, rng, but=own.labels[picture.item])
    centre, extent = picture.placement.centre, picture.placement.extent
    room = 2 * min(centre.min(), (own.size - centre).min())
    place = Placement(centre, max(min(extent, room), _SMALLER * extent))
    image = blend(*known.draw(item, place, rng), picture.background)
    return image, {"new": known.phrases[item]}, known.labels[item]


def _background(
    picture: Picture, own: Layers, known: Layers, rng: numpy.random.Generator
) -> tuple[numpy.ndarray, dict[str, str], int]:
    """The same object before another background."""
    but = picture.ground if own is known else None
    ground, background = contrasting_ground(known, picture.layer, rng, but)
    image = blend(*picture.layer, background)
    return image, {"place": known.grounds[ground]}, own.labels[picture.item]


def _remove(
    picture: Picture, own: Layers, known: Layers, rng: numpy.random.Generator
) -> tuple[numpy.ndarray, dict[str, str], int]:
    """The background alone; the label is that of what is gone."""
    return picture.background, {}, own.labels[picture.item]


_CHANGES: dict[str, Callable] = {
    "replace": _replace,
    "background": _background,
    "remove": _remove,
}


def prepare_edits(size: int, seed: int, objects: str = "photo") -> Edits:
    """Edits of cut-outs on photographs (photo) or of drawn shapes (drawn)."""
    return Edits(LAYERS[objects](size, seed), seed)
