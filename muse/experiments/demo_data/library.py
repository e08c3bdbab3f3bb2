"""The two layers of a composite at working size: cut-outs with clean edges, and photographs."""

from dataclasses import dataclass

import numpy
from PIL import Image
from scipy import ndimage

from muse.errors import DataError
from muse.experiments.demo_data.catalogue import Background, Cutout

OBJECT_SIDE = 0.9  # longest side of a working cut-out, in picture sides: it is drawn at .65 to .95
BACKGROUND_SIDE = 3  # shorter side of a working photograph, in picture sides
_OPAQUE = 0.95
_DUST = 0.02  # components below this share of the largest one are stray pixels
_THIN = 5  # parts narrower than this (legs, twigs, poles; working pixels) are not eroded


@dataclass(frozen=True)
class Library:
    """Everything that composites of one split are drawn from: RGBA cut-outs and RGB photographs."""

    objects: list[Cutout]
    cutouts: list[Image.Image]
    backgrounds: list[Background]
    photographs: list[Image.Image]


def _open(path, mode: str | None = None) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, SyntaxError) as error:
        raise DataError(
            f"unreadable picture {path}; delete the package cache and run again"
        ) from error
    return picture.convert(mode) if mode else picture


def load_cutout(item: Cutout, size: int) -> Image.Image:
    """RGBA picture cropped to the object, longest side OBJECT_SIDE * size, light halo removed."""
    picture = _open(item.path, "RGBA")
    alpha = _largest_parts(numpy.asarray(picture)[..., 3])
    picture.putalpha(Image.fromarray(alpha))
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox())
    scale = OBJECT_SIDE * size / max(picture.size)
    target = [max(3, round(side * scale)) for side in picture.size]
    picture = picture.resize(target, Image.Resampling.LANCZOS)
    return _trim(picture)


def _largest_parts(alpha: numpy.ndarray) -> numpy.ndarray:
    """Alpha (H,W) uint8 without components far smaller than the largest one."""
    labels, count = ndimage.label(alpha > 40, structure=numpy.ones((3, 3)))
    if count < 2:
        return alpha
    areas = numpy.bincount(labels.ravel())
    areas[0] = 0
    return numpy.where(areas[labels] >= _DUST * areas.max(), alpha, 0).astype(numpy.uint8)


def _trim(picture: Image.Image) -> Image.Image:
    """Erode the alpha by a pixel, soften it, and colour the rim like the nearest inner pixels.

    The rim is mixed with the white that the object was cut from. Erosion would remove thin parts
    (legs, twigs); they are added back.
    """
    padded = numpy.pad(numpy.asarray(picture, dtype=numpy.float32) / 255, ((2, 2), (2, 2), (0, 0)))
    rgb, alpha = padded[..., :3], padded[..., 3]
    thin = alpha - ndimage.grey_opening(alpha, size=_THIN)
    inner = (
        ndimage.minimum_filter(alpha, footprint=ndimage.generate_binary_structure(2, 1)) > _OPAQUE
    )
    weight = ndimage.gaussian_filter(inner.astype(numpy.float32), 1.0)
    spread = numpy.stack([ndimage.gaussian_filter(rgb[..., c] * inner, 1.0) for c in range(3)], -1)
    reach = (weight > 0.02) & ~inner
    rgb = numpy.where(reach[..., None], spread / numpy.maximum(weight, 1e-6)[..., None], rgb)
    soft = numpy.minimum(
        ndimage.gaussian_filter(ndimage.minimum_filter(alpha, size=3), 0.6) + thin, alpha
    )
    out = numpy.concatenate([rgb, soft[..., None]], -1)
    return Image.fromarray((out.clip(0, 1) * 255).round().astype(numpy.uint8), "RGBA")


def load_photograph(item: Background, size: int) -> Image.Image:
    """RGB picture (its allowed part), shorter side BACKGROUND_SIDE * size."""
    picture = _open_scaled(item, BACKGROUND_SIDE * size)
    width, height = picture.size
    if item.part:
        left, top, right, bottom = item.part
        picture = picture.crop(
            (round(left * width), round(top * height), round(right * width), round(bottom * height))
        )
    scale = BACKGROUND_SIDE * size / min(picture.size)
    return picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)


def _open_scaled(item: Background, side: int) -> Image.Image:
    """RGB picture; a large JPEG is decoded smaller, with at least `side` pixels in its part."""
    try:
        picture = Image.open(item.path)
        part = item.part or (0, 0, 1, 1)
        share = min(part[2] - part[0], part[3] - part[1])
        picture.draft("RGB", (round(side / share), round(side / share)))
        return picture.convert("RGB")
    except OSError as error:
        raise DataError(
            f"unreadable picture {item.path}; delete the package cache and run again"
        ) from error


def load_library(objects: list[Cutout], backgrounds: list[Background], size: int) -> Library:
    """Decode and shrink every layer once."""
    return Library(
        objects,
        [load_cutout(item, size) for item in objects],
        backgrounds,
        [load_photograph(item, size) for item in backgrounds],
    )
