"""Plain image folders, as equals of tar shards.

root/cat/1.jpg, root/dog/7.jpg       class folders: the label is the place of the folder's name in
                                     alphabetical order
root/1.jpg, root/1.txt               flat: captions (.txt, .json ... of the same name) if there are
root/images/1.jpg, root/masks/1.png  segmentation (`annotations` or `labels` for `masks` too), or
                                     two folders given apart
"""

import os
from collections.abc import Iterator

from muse.data.decode import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, MASK_EXTENSION
from muse.data.masks import pair_masks, paired_folders
from muse.data.records import Record, Span
from muse.data.shards import SHARD_SUFFIXES
from muse.errors import DataError


def is_image_folder(path: str) -> bool:
    """True for a directory that holds pictures (at any depth) and no tar shards.

    Raises DataError if it holds neither.
    """
    if not os.path.isdir(path):
        return False
    if any(name.endswith(SHARD_SUFFIXES) for name in os.listdir(path)):
        return False
    if next(_walk_images(path), None) is None:
        raise DataError(
            f"directory {path} holds neither *.tar shards nor pictures "
            f"({', '.join(IMAGE_EXTENSIONS)})"
        )
    return True


def _walk_images(root: str) -> Iterator[str]:
    """Relative paths of pictures, sorted within each folder, without masks and hidden files."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or name.lower().endswith("." + MASK_EXTENSION):
                continue
            if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                yield os.path.relpath(os.path.join(folder, name), root)


class FolderSource:
    """Pictures in folders. Each is a shard of one sample, so any number of readers can share them.

    `classes` are the class folders' names, () for a flat folder. Keys are paths relative to `root`.
    """

    local = True
    one_per_shard = True

    def __init__(self, root: str | os.PathLike, masks: str | os.PathLike | None = None):
        root = os.fspath(root)
        if not os.path.isdir(root):
            raise DataError(f"no such image folder: {root}")
        pair = None if masks is not None else paired_folders(root)
        self.root, mask_folder = pair if pair else (root, masks and os.fspath(masks))
        self.mask_folder = mask_folder  # None: masks, if any, lie beside the pictures
        self.name = root
        self.shards = tuple(sorted(_walk_images(self.root)))
        if not self.shards:
            raise DataError(
                f"image folder {self.root} holds no pictures ({', '.join(IMAGE_EXTENSIONS)})"
            )
        self._masks = pair_masks(list(self.shards), mask_folder) if mask_folder else {}
        self.classes = () if mask_folder else self._class_folders()
        self._labels = {name: str(i).encode() for i, name in enumerate(self.classes)}

    def _class_folders(self) -> tuple[str, ...]:
        inside = [path for path in self.shards if os.sep in path]
        if inside and len(inside) < len(self.shards):
            loose = min(set(self.shards) - set(inside))
            raise DataError(
                f"image folder {self.root} mixes class folders with loose pictures "
                f"such as {loose!r}"
            )
        return tuple(sorted({path.split(os.sep, 1)[0] for path in inside}))

    def read(self, shard: str) -> Iterator[Record]:
        path = os.path.join(self.root, shard)
        stem, extension = os.path.splitext(path)
        members: dict[str, bytes | Span] = {extension[1:].lower(): Span(path, 0, -1)}
        for name in CAPTION_EXTENSIONS:
            if os.path.exists(f"{stem}.{name}"):
                members[name] = Span(f"{stem}.{name}", 0, -1)
        if self.classes:
            members["cls"] = self._labels[shard.split(os.sep, 1)[0]]
        if shard in self._masks:
            members[MASK_EXTENSION] = Span(self._masks[shard], 0, -1)
        elif os.path.exists(f"{stem}.{MASK_EXTENSION}"):
            members[MASK_EXTENSION] = Span(f"{stem}.{MASK_EXTENSION}", 0, -1)
        yield Record(shard, self.name, members)
