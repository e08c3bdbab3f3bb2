"""One composite: a cut-out at a random place, size, angle and light on a random background."""

from typing import NamedTuple

import numpy
from PIL import Image, ImageFilter

from muse.experiments.demo_data.captions import sentence
from muse.experiments.demo_data.catalogue import CLASSES, names_category
from muse.experiments.demo_data.library import Library
from muse.experiments.demo_data.sample import Sample

SCALE = (0.65, 0.95)  # longest side of the object, in picture sides
# Smallest geometric mean of the object's two sides, as far as SCALE allows: long thin objects are
# drawn longer, so that they stay visible.
_MIN_EXTENT = 0.55
ROTATION = 15.0  # degrees, both ways
PLAIN, BLURRED = 0.2, 0.35  # shares of synthetic and of out-of-focus backgrounds
CATEGORY_SHARE = 0.5  # of the captions name the category
MIN_CONTRAST = 0.22  # RGB distance to the object; below it another background is tried
TRIES = 4
OBJECT_LIGHT = {"light": 0.15, "saturation": 0.2}


class Placement(NamedTuple):
    """Where a cut-out stands in a picture."""

    centre: numpy.ndarray  # (x, y) in pixels
    extent: float  # longest side of the cut-out in pixels
    angle: float = 0.0  # radians
    mirrored: bool = False


def composite(library: Library, index: int, size: int, rng: numpy.random.Generator) -> Sample:
    """Object `index` of the library on a background drawn by `rng`."""
    item, cutout = library.objects[index], library.cutouts[index]
    colour, alpha = draw_cutout(cutout, size, draw_placement(cutout, item.flip, size, rng))
    colour = jitter(colour, rng, **OBJECT_LIGHT)
    best, best_name, best_distance = None, "", -1.0
    for _ in range(TRIES):
        background, name = _background(library, size, rng)
        distance = contrast(colour, alpha, background)
        if distance > best_distance:
            best, best_name, best_distance = background, name, distance
        if distance >= MIN_CONTRAST:
            break
    kind = CLASSES[item.label] if rng.random() < CATEGORY_SHARE and names_category(item) else None
    return Sample(
        to_uint8_rgb(blend(colour, alpha, best)),
        numpy.where(alpha >= 0.5, 1 + item.label, 0).astype(numpy.uint8),
        sentence(item.phrase, item.style, kind),
        item.label,
        {"object": item.name, "background": best_name},
    )


def blend(colour: numpy.ndarray, alpha: numpy.ndarray, background: numpy.ndarray) -> numpy.ndarray:
    """A layer (H,W,3) with its alpha (H,W) on a background (H,W,3)."""
    weight = alpha[..., None]
    return colour * weight + background * (1 - weight)


def contrast(colour: numpy.ndarray, alpha: numpy.ndarray, background: numpy.ndarray) -> float:
    """RGB distance between an object's mean colour and that of what it would cover."""
    weight, total = alpha[..., None], max(alpha.sum(), 1e-6)
    means = [(layer * weight).sum((0, 1)) / total for layer in (background, colour)]
    return float(numpy.linalg.norm(means[0] - means[1]))


def to_uint8_rgb(image: numpy.ndarray) -> numpy.ndarray:
    """(H,W,3) floats in about [0,1] -> uint8."""
    return (image.clip(0, 1) * 255).round().astype(numpy.uint8)


def draw_placement(
    cutout: Image.Image, flip: bool, size: int, rng: numpy.random.Generator
) -> Placement:
    """A random place, size and angle at which the whole cut-out is inside the picture."""
    angle = numpy.deg2rad(rng.uniform(-ROTATION, ROTATION))
    share = rng.uniform(*SCALE)
    mirrored = bool(flip and rng.random() < 0.5)
    longest, shortest = max(cutout.size), min(cutout.size)
    box = _box(cutout, angle)
    share = min(SCALE[1], max(share, _MIN_EXTENT * numpy.sqrt(longest / shortest)))
    scale = min(share * size / longest, 0.99 * size / box.max())
    centre = rng.uniform(0.5 * scale * box, size - 0.5 * scale * box)
    return Placement(centre, scale * longest, angle, mirrored)


def _box(cutout: Image.Image, angle: float) -> numpy.ndarray:
    """Width and height of the turned cut-out, unscaled."""
    cos, sin = abs(numpy.cos(angle)), abs(numpy.sin(angle))
    width, height = cutout.size
    return numpy.array([width * cos + height * sin, width * sin + height * cos])


def draw_cutout(
    cutout: Image.Image, size: int, placement: Placement
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Colour (H,W,3) and alpha (H,W), float32 in [0,1], of the cut-out inside the picture."""
    cos, sin = numpy.cos(placement.angle), numpy.sin(placement.angle)
    scale = placement.extent / max(cutout.size)
    # PIL wants output -> input: undo the shift, the rotation, the scale, the flip.
    turn = numpy.array([[cos, sin], [-sin, cos]]) / scale
    turn[0] *= -1.0 if placement.mirrored else 1.0
    shift = numpy.array(cutout.size) / 2 - turn @ placement.centre
    placed = cutout.transform(
        (size, size),
        Image.Transform.AFFINE,
        (*turn[0], shift[0], *turn[1], shift[1]),
        Image.Resampling.BICUBIC,
    )
    values = numpy.asarray(placed, dtype=numpy.float32) / 255
    return values[..., :3], values[..., 3]


def jitter(
    colour: numpy.ndarray, rng: numpy.random.Generator, light: float, saturation: float
) -> numpy.ndarray:
    """Random brightness, contrast about the middle grey, and saturation."""
    grey = colour @ numpy.array([0.299, 0.587, 0.114], dtype=numpy.float32)
    colour = grey[..., None] + (colour - grey[..., None]) * numpy.float32(
        rng.uniform(1 - saturation, 1 + saturation)
    )
    contrast, gain = rng.uniform(1 - light, 1 + light, 2).astype(numpy.float32)
    return ((colour - 0.5) * contrast + 0.5) * gain


def _background(
    library: Library, size: int, rng: numpy.random.Generator
) -> tuple[numpy.ndarray, str]:
    """Background (H,W,3) float32 and its name."""
    if rng.random() < PLAIN:
        return gradient(size, rng), "gradient"
    index = int(rng.integers(len(library.photographs)))
    return draw_photograph(library.photographs[index], size, rng), library.backgrounds[index].name


def draw_photograph(
    photograph: Image.Image, size: int, rng: numpy.random.Generator
) -> numpy.ndarray:
    """A random part of a photograph, (H,W,3) float32, in a light of its own."""
    side = rng.uniform(0.4, 1.0) * min(photograph.size)
    left, top = rng.uniform(0, numpy.array(photograph.size) - side)
    crop = photograph.resize(
        (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
    )
    if rng.random() < BLURRED:
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.01, 0.04) * size))
    values = numpy.asarray(crop, dtype=numpy.float32) / 255
    if rng.random() < 0.5:
        values = values[:, ::-1]
    return _tint(jitter(values, rng, light=0.25, saturation=0.4), rng)


def _tint(values: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """A coloured light: mild on colour pictures, strong on grey ones (brick, gravel, grass)."""
    grey = float(numpy.abs(values - values.mean(-1, keepdims=True)).mean()) < 0.01
    light = rng.uniform(1 - (0.45 if grey else 0.1), 1.1, 3).astype(numpy.float32)
    return (values * light).clip(0, 1)


def gradient(size: int, rng: numpy.random.Generator) -> numpy.ndarray:
    """A plain or linearly shaded background (H,W,3) float32 in [0,1]."""
    first = rng.uniform(0.1, 0.95, 3)
    first += rng.uniform(0.2, 0.7) * (first.mean() - first)  # few neon colours
    second = (first + rng.normal(0, 0.15, 3)).clip(0, 1)
    angle = rng.uniform(0, 2 * numpy.pi)
    y, x = numpy.mgrid[0:size, 0:size] / size - 0.5
    ramp = (numpy.cos(angle) * x + numpy.sin(angle) * y + 0.7) / 1.4
    return (first + (second - first) * ramp[..., None]).astype(numpy.float32)
