"""Masks: decoding, the ADE20K label mapping, and pairing folders of pictures with masks."""

import os
from collections.abc import Mapping

import numpy
from PIL import Image

from muse.data.decode import MASK_EXTENSION, BadSample, open_image
from muse.errors import DataError

IGNORE_INDEX = 65535  # of every mask in memory; files of 8 bits write 255, see `decode_mask`
_PAIRED_FOLDERS = (("images", "masks"), ("images", "annotations"), ("images", "labels"))


def decode_mask(members: Mapping[str, bytes]) -> Image.Image:
    """The label map `.seg.png` as a mode "I" picture of its stored numbers.

    Palette indices stay indices. Ignored pixels become `IGNORE_INDEX`: they are 255 in a file of 8
    bits, and 65535 in one of 16 bits, which may hold more than 255 classes.

    Raises BadSample missing_mask or bad_mask.
    """
    if MASK_EXTENSION not in members:
        raise BadSample("missing_mask")
    try:
        image = open_image(members[MASK_EXTENSION])
    except BadSample as error:
        raise BadSample("bad_mask", str(error)) from error
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise BadSample("bad_mask", f"mode {image.mode}: labels must be one channel")
    labels = numpy.asarray(image).astype(numpy.int32)
    return Image.fromarray(
        numpy.where(labels == 255, IGNORE_INDEX, labels)
        if image.mode in ("1", "L", "P")
        else labels
    )


def reduce_zero_label(mask: numpy.ndarray) -> numpy.ndarray:
    """ADE20K's numbers to training's: 0 ("other") and ignored -> ignored, 1..150 -> 0..149."""
    ignored = (mask == 0) | (mask == IGNORE_INDEX)
    return numpy.where(ignored, IGNORE_INDEX, mask - 1)


def paired_folders(root: str) -> tuple[str, str] | None:
    """(pictures, masks) if `root` holds `images/` beside `masks/`, `annotations/` or `labels/`."""
    for images, masks in _PAIRED_FOLDERS:
        pair = os.path.join(root, images), os.path.join(root, masks)
        if os.path.isdir(pair[0]) and os.path.isdir(pair[1]):
            return pair
    return None


def pair_masks(images: list[str], mask_folder: str) -> dict[str, str]:
    """The mask's path for each picture's relative path, matched without extension.

    Pictures without a mask are left out. Raises DataError if the folder is missing or no mask fits.
    """
    if not os.path.isdir(mask_folder):
        raise DataError(f"no such mask folder: {mask_folder}")
    masks = {}
    for folder, _, files in os.walk(mask_folder, followlinks=True):
        for name in files:
            path = os.path.join(folder, name)
            stem, extension = os.path.splitext(os.path.relpath(path, mask_folder))
            if extension.lower() in (".png", ".tif", ".tiff", ".bmp"):
                masks[stem.removesuffix(".seg")] = path
    pairs = {
        image: masks[stem] for image in images if (stem := os.path.splitext(image)[0]) in masks
    }
    if not pairs:
        raise DataError(
            f"no mask in {mask_folder} has the name of a picture (for example {images[0]!r})"
        )
    return pairs
