"""Names of classes for zero-shot: from a file, from class folders, or ImageNet's; never guessed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from muse.data.eval import EvalLoader
from muse.errors import DataError
from muse.evaluation.imagenet_classes import check_guess, folder_classes, imagenet_names

IMAGENET = "imagenet"  # in place of a file of names


class ClassNames(NamedTuple):
    """Names in the order of the labels, and for the protocol where they are from."""

    names: list[str]
    source: str
    assumed: bool = False  # nothing says that the labels are ImageNet's but that they are all there

    def check(self, labels: Sequence[int]) -> None:
        """DataError where names are assumed and the labels are not those of all the classes."""
        if self.assumed:
            check_guess(labels, len(self.names))


def class_names(loader: EvalLoader, file: str | None = None) -> ClassNames:
    """The classes that are scored.

    From the file; else from `classes.txt` beside local data; else by the class folders, which may
    be WordNet ids; else ImageNet's, if all of them occur. DataError where class folders and names
    differ in number.

    Args:
        loader: of the data.
        file: names, one a line in the order of the labels; `imagenet` stands for ImageNet's.
    """
    source, folders = loader.stream.source, list(loader.classes)
    root = Path(source.root) if hasattr(source, "root") else Path(source.shards[0]).parent
    beside = root / "classes.txt"
    if file is None and beside.is_file():
        file = str(beside)
    if folders and file in (None, IMAGENET):
        found = folder_classes(folders)
        if file is None or found.indices is not None:
            return ClassNames(list(found.names), found.source)
    if file is None or file == IMAGENET:
        found = ClassNames(list(imagenet_names()), "open_clip's ImageNet names", file is None)
    else:
        found = ClassNames(read_class_names(file), file)
    if folders and len(folders) != len(found.names):
        raise DataError(
            f"{len(found.names)} class names ({found.source}) for the {len(folders)} class folders "
            f"of {source.name}, whose labels are their places in the alphabet"
        )
    return found


def read_class_names(path: str | Path) -> list[str]:
    """One name a line. DataError for a blank line before the last name: it would shift labels."""
    lines = _read(path, "class name")
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"class name file {path} has no lines")
    if "" in lines:
        raise DataError(
            f"class name file {path}: line {lines.index('') + 1} is blank, but a label is the "
            "place of a line: take it out, or write the name"
        )
    return lines


def read_lines(path: str | Path, what: str) -> list[str]:
    """The non-empty lines of a UTF-8 text file; DataError when it is missing or without any."""
    lines = [line for line in _read(path, what) if line]
    if not lines:
        raise DataError(f"{what} file {path} has no lines")
    return lines


def _read(path: str | Path, what: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} file {path} cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines()]
