"""Bytes to pictures, captions and labels; what cannot be decoded is named, counted and skipped."""

import io
import json
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy
from PIL import ExifTags, Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")
MASK_EXTENSION = "seg.png"
TEXT_EXTENSIONS = ("txt", "text", "caption")  # members that hold a caption as it is
CAPTION_EXTENSIONS = (*TEXT_EXTENSIONS, "json")  # the first that is not empty counts
CAPTION_KEYS = ("caption", "text")  # of a `.json` member, the first that is not empty
PAIR = ("input", "output")  # of an edit: members such as `input.jpg` and `output.jpg`
SAMPLE_EXTENSIONS = frozenset(
    (
        *IMAGE_EXTENSIONS,
        *(f"{side}.{extension}" for side in PAIR for extension in IMAGE_EXTENSIONS),
        MASK_EXTENSION,
        *CAPTION_EXTENSIONS,
        "cls",
        "safetensors",  # latents
    )
)
MAX_PIXELS = 89_478_485  # Pillow's own bound: above it a file is taken for a decompression bomb
MAX_ASPECT = 50.0  # a 1 x 10000 strip resized by its shorter edge would fill the memory
# Pillow only tries these; its other readers start programs (EPS) or are rarely hardened.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# By EXIF's number of the corner that is first in the file.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_TURNS[number] for number in (5, 6, 7, 8))  # width and height change places
# What Pillow's readers raise on broken files.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


Size = tuple[int, int]  # (width, height)


class DecodedPicture(NamedTuple):
    """A decoded picture.

    image is RGB and upright; turn is how the stored picture was turned for that, so that a mask can
    follow; size is the upright picture's own size where the image may have been decoded smaller,
    else None.
    """

    image: Image.Image
    turn: Image.Transpose | None
    size: Size | None = None


class BadSample(Exception):
    """A sample that cannot be used; `kind` is the short name under which it is counted."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode `data` as it is stored (any mode).

    Raises BadSample: empty_file, not_an_image, decompression_bomb, truncated_image or
    corrupt_image.
    """
    return _open_reduced(data, max_pixels, None)[0]


def _open_reduced(
    data: bytes, max_pixels: int, least: Callable[[int, int], Size] | None
) -> tuple[Image.Image, Size]:
    """`open_image`, a JPEG perhaps smaller than stored; and the stored size."""
    if not data:
        raise BadSample("empty_file")
    try:
        with warnings.catch_warnings():
            # Damaged tags do no harm, and for the size there is the bound below.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise BadSample("decompression_bomb", f"{width}x{height}")
            if least is not None and image.format == "JPEG" and _may_shrink(image):
                image.draft(None, least(width, height))
            image.load()
    except UnidentifiedImageError as error:
        raise BadSample("not_an_image") from error
    except Image.DecompressionBombError as error:
        raise BadSample("decompression_bomb", str(error)) from error
    except _BROKEN as error:
        raise BadSample(
            "truncated_image" if "truncated" in str(error) else "corrupt_image", str(error)
        ) from error
    return image, (width, height)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode `data` to RGB: upright by its EXIF tag, transparency on white, 16 bits scaled to 8.

    Raises BadSample with one of the kinds of `open_image`, or unsupported_mode (float, 32-bit), or
    aspect_ratio (beyond 50:1).
    """
    return decode_picture(data, max_pixels).image


def decode_picture(
    data: bytes, max_pixels: int = MAX_PIXELS, least: Callable[[int, int], Size] | None = None
) -> DecodedPicture:
    """`decode_image`, with what else is known of the picture.

    Args:
        data: a file's content.
        max_pixels: of the stored picture.
        least: gives for a (width, height) those that are needed, wide and high alike: a JPEG is
            then decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 that is not below them.
    """
    image, (width, height) = _open_reduced(data, max_pixels, least)
    reduced = least is not None and image.format == "JPEG"
    turn = _exif_turn(image)
    if turn is not None:
        if turn in _SIDEWAYS:
            width, height = height, width
        image = image.transpose(turn)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample("aspect_ratio", f"{width}x{height}")
    try:
        return DecodedPicture(_to_rgb(image), turn, (width, height) if reduced else None)
    except _BROKEN as error:
        raise BadSample("unsupported_mode", f"{image.mode}: {error}") from error


def _may_shrink(image: Image.Image) -> bool:
    """False for a turned picture of odd size: it would begin with a part of a pixel."""
    return _exif_turn(image) is None or not (image.width % 8 or image.height % 8)


def _exif_turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the stored picture upright; None where it is, or where nothing is known."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except _BROKEN:
        logger.debug("unreadable EXIF block ignored")
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = numpy.asarray(image).astype(numpy.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit values")
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(numpy.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("the range of float pixels is not known")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def image_bytes(members: Mapping[str, bytes], side: str | None = None) -> bytes:
    """The picture among a sample's members, or one of a PAIR. Raises BadSample missing_image."""
    for extension in IMAGE_EXTENSIONS:
        name = f"{side}.{extension}" if side else extension
        if name in members:
            return members[name]
    raise BadSample("missing_image", f"members: {', '.join(sorted(members)) or 'none'}")


def decode_captions(members: Mapping[str, bytes]) -> tuple[str, ...]:
    """A sample's captions, stripped, at least one.

    The first of CAPTION_EXTENSIONS that is not empty counts; `.json` may hold a list. No sample is
    trained on an empty caption: where all are empty, it is a fault.
    Raises BadSample missing_caption, caption_not_utf8 or bad_json.
    """
    try:
        for extension in TEXT_EXTENSIONS:
            if text := members.get(extension, b"").decode("utf-8-sig").strip():
                return (text,)
        record = json.loads(members["json"].decode("utf-8-sig")) if "json" in members else {}
    except UnicodeDecodeError as error:
        raise BadSample("caption_not_utf8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error
    if not isinstance(record, dict):
        raise BadSample("bad_json", "not an object")
    for key in CAPTION_KEYS:
        if captions := _texts(record.get(key)):
            return captions
    raise BadSample("missing_caption")


def _texts(value: object) -> tuple[str, ...]:
    """The texts of a string or a list, stripped, without empty ones; () for anything else."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def decode_label(members: Mapping[str, bytes]) -> int:
    """The class index in `.cls` (>= 0). Raises BadSample missing_label or bad_label."""
    if "cls" not in members:
        raise BadSample("missing_label")
    try:
        label = int(members["cls"])  # int() takes ASCII bytes with blanks around
    except ValueError as error:
        raise BadSample("bad_label", repr(members["cls"][:20])) from error
    if label < 0:
        raise BadSample("bad_label", str(label))
    return label
