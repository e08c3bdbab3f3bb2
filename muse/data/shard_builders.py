"""What people have (class folders, tables of captions, ADE20K, COCO, edits) as samples for shards.

Each function gives `ShardItems`: for every sample its members, whose content is known or lies in a
file, and the class names where there are some. Nothing is read here but lists; shard_writer.py
copies.
"""

import csv
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from muse.data.decode import IMAGE_EXTENSIONS
from muse.data.folders import FolderSource
from muse.data.masks import pair_masks
from muse.data.records import Span
from muse.errors import ConfigError, DataError

Members = dict[str, bytes | Span]
ADE20K_SPLITS = ("training", "validation")


class ShardItems(NamedTuple):
    """Members of every sample, by extension as in docs/data.md; names of the classes, if any."""

    samples: list[Members]
    classes: tuple[str, ...] = ()


class BuildOptions(NamedTuple):
    """What a kind may need beside its input.

    root is where the pictures of a table lie (None: beside it); columns are by role: image, caption
    (captions), input, output, instruction (edits); split is ADE20K's.
    """

    root: str | None = None
    columns: Mapping[str, str] = {}
    split: str = "training"


def list_samples(kind: str, source: str, options: BuildOptions) -> ShardItems:
    """The samples of `source`. Raises ConfigError for the kind, DataError for the content."""
    if kind not in BUILDERS:
        raise ConfigError(f"unknown kind {kind!r}: one of {', '.join(BUILDERS)}")
    if not os.path.exists(source):
        raise DataError(f"no such file or directory: {source}")
    found = BUILDERS[kind](source, options)
    if not found.samples:
        raise DataError(f"{source} holds no pictures of the kind {kind}")
    return found


# ------------------------------------------------------------------------------------ folders, tars
def _folder(source: str, options: BuildOptions) -> ShardItems:
    """A folder as training reads it: captions, labels and masks beside the pictures."""
    if not os.path.isdir(source):
        raise DataError(f"{source} is not a directory")
    return _of_source(FolderSource(source))


def _of_source(source: FolderSource) -> ShardItems:
    records = (record for shard in source.shards for record in source.read(shard))
    return ShardItems([record.members for record in records], source.classes)


def _imagenet(source: str, options: BuildOptions) -> ShardItems:
    """Class folders; or ImageNet's tar, whose members are a tar for each class or class folders."""
    if os.path.isdir(source):
        inner = sorted(Path(source).glob("*.tar"))
        found = [(tar.stem, *rest) for tar in inner for _, *rest in _tar_pictures(str(tar))]
        if not found:
            listed = _folder(source, options)
            if not listed.classes:
                raise DataError(f"{source} holds no class folders, but pictures side by side")
            return listed
    else:
        found = list(_tar_pictures(source))
        if any(not name for name, *_ in found):
            raise DataError(f"{source}: its pictures lie neither in tars nor in folders of classes")
    classes = tuple(sorted({name for name, *_ in found}))
    labels = {name: str(number).encode() for number, name in enumerate(classes)}
    return ShardItems(
        [{extension: span, "cls": labels[name]} for name, extension, span in found], classes
    )


def _tar_pictures(path: str) -> Iterator[tuple[str, str, Span]]:
    """(class, extension, place) of every picture in a tar of class tars or of class folders.

    The class is "" where there is none.
    """
    try:
        with tarfile.open(path, "r:") as outer:
            for info in outer:
                name = Path(info.name)
                if not info.isreg():
                    continue
                if name.suffix == ".tar":
                    with tarfile.open(fileobj=outer.extractfile(info), mode="r:") as inner:
                        for picture in inner:
                            if picture.isreg() and _is_picture(picture.name):
                                place = info.offset_data + picture.offset_data
                                span = Span(path, place, picture.size)
                                yield name.stem, _suffix(picture.name), span
                elif _is_picture(info.name):
                    span = Span(path, info.offset_data, info.size)
                    yield name.parent.name, _suffix(info.name), span
    except tarfile.TarError as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar ({error})") from error


def _is_picture(name: str) -> bool:
    return _suffix(name) in IMAGE_EXTENSIONS


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _ade20k(source: str, options: BuildOptions) -> ShardItems:
    """`images/SPLIT` and `annotations/SPLIT`, as the challenge's archive has them."""
    if options.split not in ADE20K_SPLITS:
        raise ConfigError(f"--split is one of {', '.join(ADE20K_SPLITS)}, not {options.split!r}")
    pair = [os.path.join(source, part, options.split) for part in ("images", "annotations")]
    for folder in pair:
        if not os.path.isdir(folder):
            raise DataError(f"no such directory: {folder} (ADE20K has images/ and annotations/)")
    pictures = FolderSource(pair[0], masks=pair[1])
    masks = pair_masks(list(pictures.shards), pair[1])
    missing = [name for name in pictures.shards if name not in masks]
    if missing:
        raise DataError(f"{len(missing)} pictures have no annotation, the first is {missing[0]}")
    return _of_source(pictures)


# ------------------------------------------------------------------------------------------ tables
def read_table(path: str) -> list[dict[str, Any]]:
    """The rows of a .csv, .tsv, .jsonl or .parquet file. Raises DataError with the line."""
    suffix = _suffix(path)
    try:
        if suffix in ("csv", "tsv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, delimiter="\t" if suffix == "tsv" else ","))
        if suffix in ("jsonl", "ndjson"):
            return _json_lines(path)
        if suffix == "parquet":
            return _parquet(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    raise DataError(f"{path}: a table is a .csv, .tsv, .jsonl or .parquet file")


def _json_lines(path: str) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from error
            if row is not None and not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not an object")
            rows += [row] if row else []
    return rows


def _parquet(path: str) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet  # noqa: PLC0415 - optional
    except ImportError as error:
        raise DataError(f"{path}: parquet needs pyarrow (pip install pyarrow)") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise DataError(f"{path} is no parquet file ({error})") from error


def _rows(path: str, options: BuildOptions, roles: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Rows by role. Raises DataError for a missing column, naming those that are there."""
    rows = read_table(path)
    columns = {role: options.columns.get(role) or default for role, default in roles.items()}
    there = dict.fromkeys(name for row in rows for name in row)
    for role, column in columns.items():
        if rows and column not in there:
            raise DataError(
                f"{path} has no column {column!r} ({', '.join(map(str, there))}): "
                f"name it with --{role}_column"
            )
    for row in rows:
        yield {role: row.get(column) for role, column in columns.items()}


def _captions(source: str, options: BuildOptions) -> ShardItems:
    """A table of picture and caption; rows of one picture are one sample with several captions."""
    captions: dict[Any, list[str]] = defaultdict(list)
    pictures: dict[Any, bytes | Span] = {}
    for number, row in enumerate(_rows(source, options, {"image": "image", "caption": "caption"})):
        value = row["image"]
        name = value if isinstance(value, str) else number
        pictures[name] = _picture(value, source, options)
        texts = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        captions[name] += [str(text) for text in texts if text is not None]
    return ShardItems(
        [{_extension(name): part, **_texts(captions[name])} for name, part in pictures.items()]
    )


def _extension(name: object) -> str:
    return (_suffix(name) if isinstance(name, str) else "") or "jpg"


def _picture(value: Any, table: str, options: BuildOptions) -> bytes | Span:
    """A path beside the table or under root; or bytes, as data sets in parquet have them."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    root = options.root or os.path.dirname(table)
    return Span(os.path.join(root, str(value)), 0, -1)


def _texts(captions: list[str]) -> Members:
    if len(captions) == 1:
        return {"txt": captions[0].encode()}
    return {"json": json.dumps({"caption": captions}, ensure_ascii=False).encode()}


def _coco(source: str, options: BuildOptions) -> ShardItems:
    """COCO's captions_*.json: a sample is a picture with all its captions."""
    try:
        content = json.loads(Path(source).read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[Any, list[str]] = defaultdict(list)
        for one in content["annotations"]:
            captions[one["image_id"]].append(one["caption"].strip())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{source} is not COCO's captions_*.json ({error!r})") from error
    return ShardItems(
        [
            {_extension(name): _picture(name, source, options), **_texts(captions[number])}
            for number, name in names.items()
            if captions[number]
        ]
    )


def _edits(source: str, options: BuildOptions) -> ShardItems:
    """A table of a picture before, the picture after, and the instruction between them."""
    roles = {"input": "input", "output": "output", "instruction": "instruction"}
    samples = []
    for row in _rows(source, options, roles):
        pair = {
            f"{side}.{_extension(row[side])}": _picture(row[side], source, options)
            for side in ("input", "output")
        }
        samples.append({**pair, "txt": str(row["instruction"] or "").encode()})
    return ShardItems(samples)


BUILDERS: dict[str, Callable[[str, BuildOptions], ShardItems]] = {
    "imagenet": _imagenet,
    "captions": _captions,
    "ade20k": _ade20k,
    "coco": _coco,
    "edits": _edits,
    "folder": _folder,
}
