"""Pictures as layers: an object that can be placed anywhere, and what lies behind it.

Edits need both layers by themselves: the same object before another background, another object in
the same place. Cut-outs and drawn shapes give them through one interface.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy

from muse.experiments.demo_data import shapes, stamps
from muse.experiments.demo_data.compose import (
    MIN_CONTRAST,
    OBJECT_LIGHT,
    TRIES,
    Placement,
    contrast,
    draw_cutout,
    draw_photograph,
    draw_placement,
    gradient,
    jitter,
)
from muse.experiments.demo_data.library import Library
from muse.experiments.demo_data.stamp_tables import CLASSES, PLACES, PLAIN_PLACE


class Layer(NamedTuple):
    """An object inside the picture."""

    colour: numpy.ndarray  # (H, W, 3) in about [0, 1]
    alpha: numpy.ndarray  # (H, W) in [0, 1]


class Layers(Protocol):
    """What the pictures of one split are put together from."""

    size: int
    phrases: Sequence[str]  # of the objects, such as "a zebra"
    labels: Sequence[int]  # of the objects, indices of the classes
    grounds: Sequence[str]  # of the backgrounds, such as "on grass"

    def place(self, index: int, rng: numpy.random.Generator) -> Placement:
        """A random place for an object."""

    def draw(self, index: int, placement: Placement, rng: numpy.random.Generator) -> Layer:
        """The object there, in a light drawn by `rng`."""

    def ground(self, index: int, rng: numpy.random.Generator) -> numpy.ndarray:
        """A background (H, W, 3) of this kind, drawn by `rng`."""


class Picture(NamedTuple):
    """A drawn object on a drawn background."""

    item: int
    placement: Placement
    layer: Layer
    ground: int
    background: numpy.ndarray  # (H, W, 3)


def draw_picture(layers: Layers, item: int, rng: numpy.random.Generator) -> Picture:
    """Object `item` anywhere, on a background from which it stands out."""
    placement = layers.place(item, rng)
    layer = layers.draw(item, placement, rng)
    ground, background = contrasting_ground(layers, layer, rng)
    return Picture(item, placement, layer, ground, background)


def contrasting_ground(
    layers: Layers, layer: Layer, rng: numpy.random.Generator, but: int | None = None
) -> tuple[int, numpy.ndarray]:
    """A background other than `but` from which the object stands out: the best of a few tries."""
    best, best_distance = None, -1.0
    for _ in range(TRIES):
        index = int(rng.integers(len(layers.grounds) - (but is not None)))
        index += but is not None and index >= but
        background = layers.ground(index, rng)
        distance = contrast(layer.colour, layer.alpha, background)
        if distance > best_distance:
            best, best_distance = (index, background), distance
        if distance >= MIN_CONTRAST:
            break
    return best


# ------------------------------------------------------------------------------------------ kinds
class StampLayers:
    """Cut-outs on photographs; the last background is a plain one."""

    def __init__(self, library: Library, size: int):
        self.library, self.size = library, size
        self.phrases = [item.phrase.partition(",")[0] for item in library.objects]
        self.labels = [item.label for item in library.objects]
        names = [ground.name for ground in library.backgrounds]
        self.grounds = [*(PLACES.get(name, name) for name in names), PLAIN_PLACE]

    def place(self, index: int, rng: numpy.random.Generator) -> Placement:
        flip = self.library.objects[index].flip
        return draw_placement(self.library.cutouts[index], flip, self.size, rng)

    def draw(self, index: int, placement: Placement, rng: numpy.random.Generator) -> Layer:
        colour, alpha = draw_cutout(self.library.cutouts[index], self.size, placement)
        return Layer(jitter(colour, rng, **OBJECT_LIGHT), alpha)

    def ground(self, index: int, rng: numpy.random.Generator) -> numpy.ndarray:
        if index == len(self.library.photographs):
            return gradient(self.size, rng)
        return draw_photograph(self.library.photographs[index], self.size, rng)


class ShapeLayers:
    """Drawn shapes on drawn backgrounds. Val shows pairs of colour and shape, and backgrounds, that
    train never shows.
    """

    def __init__(self, split: str, size: int):
        self.size = size
        self._pairs = [
            (colour, shape)
            for shape in shapes.CLASSES
            for colour in shapes.COLOURS
            if shapes.held_out(colour, shape) == (split == "val")
        ]
        self._names = shapes.grounds_of(split)
        self.phrases = [shapes.noun(*pair) for pair in self._pairs]
        self.labels = [shapes.CLASSES.index(shape) for _, shape in self._pairs]
        self.grounds = [f"on {name}" for name in self._names]

    def place(self, index: int, rng: numpy.random.Generator) -> Placement:
        extent = rng.uniform(0.4, 0.64) * self.size
        centre = rng.uniform(0.5 * extent, self.size - 0.5 * extent, 2)
        return Placement(centre, extent, numpy.deg2rad(rng.uniform(-20, 20)))

    def draw(self, index: int, placement: Placement, rng: numpy.random.Generator) -> Layer:
        colour, shape = self._pairs[index]
        centre, extent, angle, _ = placement
        alpha = shapes.outline(shape, self.size, centre, extent / 2, numpy.rad2deg(angle))
        return Layer(shapes.draw_surface(shapes.COLOURS[colour], self.size, rng), alpha)

    def ground(self, index: int, rng: numpy.random.Generator) -> numpy.ndarray:
        return shapes.draw_ground(self._names[index], self.size, rng)


@dataclass(frozen=True)
class LayerSet:
    """The layers of both splits, and the names of the classes."""

    train: Layers
    val: Layers
    classes: tuple[str, ...]


def _stamp_layers(size: int, seed: int) -> LayerSet:
    made = stamps.prepare_stamps(size, seed)
    return LayerSet(StampLayers(made.train, size), StampLayers(made.val, size), CLASSES)


def _shape_layers(size: int, seed: int) -> LayerSet:
    return LayerSet(ShapeLayers("train", size), ShapeLayers("val", size), shapes.CLASSES)


# What `--objects` says -> (size, seed) -> the layers.
LAYERS: dict[str, Callable[[int, int], LayerSet]] = {
    "photo": _stamp_layers,
    "drawn": _shape_layers,
}


def the(phrase: str) -> str:
    """ "a zebra" -> "the zebra"."""
    head, _, rest = phrase.partition(" ")
    return f"the {rest if head in ('a', 'an') and rest else phrase}"


def balanced_object(layers: Layers, rng: numpy.random.Generator, but: int | None = None) -> int:
    """An object, each class equally likely, none of the class `but`."""
    labels = numpy.array(layers.labels)
    classes = [label for label in numpy.unique(labels) if label != but]
    return int(rng.choice(numpy.flatnonzero(labels == rng.choice(classes))))
