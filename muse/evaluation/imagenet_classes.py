"""Which of ImageNet's 1000 classes a folder is: the variants of ImageNet by their class folders.

ImageNet-1k, -A, -R and -Sketch, Imagenette and ImageNet-100 name class folders by WordNet ids, and
ImageNet-V2 by the numbers 0 to 999. A label is a folder's place in the alphabet, so the classes
that are scored are those of the folders, in this order. Names are never guessed.

The ids are timm's list, the names open_clip's; both are in the order of the 1000 labels.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from muse.errors import DataError

CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")


class FolderClasses(NamedTuple):
    """What class folders stand for, in the folders' order.

    `indices` are places among ImageNet's 1000 classes, None for folders of any other names;
    `source` says, for a protocol, where the names are from.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...] | None
    source: str


@functools.cache
def imagenet_wordnet_ids() -> tuple[str, ...]:
    """The WordNet ids of the 1000 classes in the order of the labels."""
    from timm.data import ImageNetInfo  # noqa: PLC0415  takes seconds, and few runs need it

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """open_clip's names of the 1000 classes, the field's default."""
    from open_clip import IMAGENET_CLASSNAMES  # noqa: PLC0415  takes seconds, and few runs need it

    return tuple(IMAGENET_CLASSNAMES)


def _first(names: Sequence[str]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def folder_classes(folders: Sequence[str]) -> FolderClasses:
    """The classes behind the names of class folders, in their order.

    WordNet ids, and the numbers 0 to 999 together, are ImageNet's; other names are taken as they
    are, with blanks for underscores. DataError for ids that are not among the 1000, for ids mixed
    with other names, and for numbers that say nothing.
    """
    ids = [name for name in folders if _WORDNET_ID.fullmatch(name)]
    if ids:
        return _by_wordnet_ids(folders, ids)
    if folders and all(name.isdecimal() for name in folders):
        return _by_numbers(folders)
    return FolderClasses(tuple(name.replace("_", " ") for name in folders), None, "class folders")


def _by_wordnet_ids(folders: Sequence[str], ids: list[str]) -> FolderClasses:
    others = sorted(set(folders) - set(ids))
    if others:
        raise DataError(
            f"class folders mix WordNet ids such as {ids[0]!r} with other names: {_first(others)}"
        )
    place = {wordnet_id: index for index, wordnet_id in enumerate(imagenet_wordnet_ids())}
    unknown = [name for name in folders if name not in place]
    if unknown:
        raise DataError(
            f"class folders that are none of ImageNet's {CLASSES} WordNet ids: {_first(unknown)}; "
            "give the names of all classes with --classnames FILE"
        )
    return _imagenet(tuple(place[name] for name in folders), "WordNet ids")


def _by_numbers(folders: Sequence[str]) -> FolderClasses:
    indices = tuple(int(name) for name in folders)
    if sorted(indices) != list(range(CLASSES)):
        raise DataError(
            f"{len(folders)} class folders are numbers, which only all of 0 to {CLASSES - 1} mean "
            "ImageNet's classes: give the names with --classnames FILE"
        )
    return _imagenet(indices, "class numbers")


def _imagenet(indices: tuple[int, ...], how: str) -> FolderClasses:
    names = imagenet_names()
    return FolderClasses(
        tuple(names[index] for index in indices),
        indices,
        f"open_clip's ImageNet names by {how} of {len(indices)} class folders",
    )


def check_guess(labels: Sequence[int], count: int) -> None:
    """DataError unless labels without names are exactly 0 .. count - 1.

    For shards that hold class numbers and no list of names: taken for another set's classes, they
    would score the wrong names in silence.
    """
    present = sorted(set(labels))
    if present != list(range(count)):
        seen = f"{len(present)} classes, {present[0]} to {present[-1]}" if present else "no labels"
        raise DataError(
            f"no class names are given, and the data ({seen}) does not hold each of the {count} of "
            "ImageNet: give them with --classnames FILE, or as classes.txt beside the data; if the "
            "labels are ImageNet's all the same, --classnames imagenet says so"
        )
