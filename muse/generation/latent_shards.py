"""Latents on disk: tar shards in WebDataset's layout, and `latents.json` once all are written.

A shard begins with a member `__latents__`, JSON that says which tokenizer made it and how many
latents it holds; readers of WebDataset pass over it. Then one member KEY.safetensors an image:
`latents` (V, C, h, w), V views (the picture, and its mirror image where flips were stored), and
`label`. Shards are whole or absent, so an extraction that was stopped goes on after those that
exist; `latents.json` says that none is missing.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from muse.errors import DataError
from muse.generation.latents import check_tokenizer, replacing
from muse.utils.io import write_json

HEAD, INDEX, SUFFIX = "__latents__", "latents.json", ".safetensors"
FORMAT = "muse latents 1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class LatentRecord(NamedTuple):
    """One image of a shard."""

    key: str
    latents: Tensor  # (V, C, h, w)
    label: int


@dataclass(frozen=True)
class ShardHead:
    """What a shard says of itself."""

    tokenizer_sha256: str
    views: int  # V
    shape: tuple[int, int, int]  # (C, h, w)
    dtype: str
    count: int  # images
    classes: int = 0  # one more than the largest label
    skipped: int = 0  # pictures that could not be used
    origin: str = ""  # which pictures, cut how


def write_latent_shard(
    path: str | Path,
    records: Sequence[LatentRecord],
    tokenizer_sha256: str,
    dtype: str = "float16",
    *,
    skipped: int = 0,
    origin: str = "",
) -> ShardHead:
    """Write one shard, whole or not at all, the same bytes for the same records.

    Args:
        path: of the tar; its folder is made.
        records: at least one; all latents of one shape, every key once.
        tokenizer_sha256: of the weights that encoded them.
        dtype: in which latents are stored: float16 (half the bytes), bfloat16 or float32.
        skipped: pictures of the same origin that could not be used.
        origin: which pictures these are, and how they were cut: what a resumed run compares.

    Raises:
        DataError: no records, shapes or keys as above, or a latent that is not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise DataError(f"latents are stored as {', '.join(DTYPES)}, not as {dtype!r}")
    if not records:
        raise DataError(f"{path}: no latents to write")
    shape = tuple(records[0].latents.shape)
    if len(shape) != 4:
        raise DataError(f"{records[0].key}: latents must be (views, C, h, w), got {shape}")
    classes = 1 + max(int(record.label) for record in records)
    head = ShardHead(
        tokenizer_sha256, shape[0], shape[1:], dtype, len(records), classes, skipped, origin
    )
    keys: set[str] = set()
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        _add(tar, HEAD, json.dumps({"format": FORMAT, **asdict(head)}).encode())
        for key, latents, label in records:
            stored = latents.detach().to("cpu", DTYPES[dtype]).contiguous()
            if tuple(stored.shape) != shape:
                raise DataError(f"{key}: latents {tuple(stored.shape)} beside latents {shape}")
            if not torch.isfinite(stored).all():
                raise DataError(f"{key}: a latent is not finite in {dtype}")
            if key in keys:
                raise DataError(f"{path}: two images have the key {key!r}")
            keys.add(key)
            _add(tar, key + SUFFIX, save({"latents": stored, "label": torch.tensor(int(label))}))
    return head


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(content), 0, 0o644
    tar.addfile(info, io.BytesIO(content))


def read_shard_head(path: str | Path) -> ShardHead:
    """What a shard says of itself. `DataError` where the file is missing or no shard of latents."""
    with _opened(path) as tar:
        return _head(tar, path)


def read_latent_shard(
    path: str | Path, tokenizer_sha256: str | None = None
) -> Iterator[LatentRecord]:
    """The records of one shard in order, latents in the stored dtype.

    `DataError` where it is missing, no shard of latents, or breaks off (after the records that are
    whole); `CheckpointError` where its tokenizer is not the one of the given hash.
    """
    with _opened(path) as tar:
        head = _head(tar, path)
        if tokenizer_sha256 is not None:
            check_tokenizer(path, head.tokenizer_sha256, tokenizer_sha256)
        for done in range(head.count):
            try:
                info = tar.next()
                tar.members = []  # tarfile would remember every header
                content = load(tar.extractfile(info).read())
                latents, label = content["latents"], int(content["label"])
            except (tarfile.TarError, SafetensorError, OSError, KeyError, AttributeError):
                raise DataError(
                    f"{path}: truncated or damaged after {done} of {head.count} latents; "
                    "delete it and extract it again"
                ) from None
            yield LatentRecord(info.name.removesuffix(SUFFIX), latents, label)


def _opened(path: str | Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a readable shard ({error})") from None


def _head(tar: tarfile.TarFile, path: str | Path) -> ShardHead:
    try:
        info = tar.next()
        if info is None or info.name != HEAD:
            raise KeyError(HEAD)
        facts = json.loads(tar.extractfile(info).read())
        if facts.pop("format") != FORMAT:
            raise ValueError("format")
        return ShardHead(**{**facts, "shape": tuple(facts["shape"])})
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a shard of latents (it does not begin with {HEAD})") from None


def write_latent_index(folder: str | Path, notes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write and return `latents.json`: tokenizer, shape, exact counts and bytes of all shards.

    notes: anything else worth keeping (the command's protocol). `DataError` where there are no
    shards or they do not belong together; `CheckpointError` where two tokenizers made them.
    """
    paths = sorted(Path(folder).glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: holds no shards of latents")
    heads = [read_shard_head(path) for path in paths]
    for path, head in zip(paths, heads):
        check_tokenizer(path, head.tokenizer_sha256, heads[0].tokenizer_sha256)
        for field in ("views", "shape", "dtype"):
            mine, first = getattr(head, field), getattr(heads[0], field)
            if mine != first:
                raise DataError(f"{path}: {field} {mine}, but {first} in {paths[0].name}")
    index = {
        "format": FORMAT,
        **{name: value for name, value in asdict(heads[0]).items() if name != "origin"},
        "count": sum(head.count for head in heads),
        "classes": max(head.classes for head in heads),
        "skipped": sum(head.skipped for head in heads),
        "shards": {
            path.name: {
                "count": head.count,
                "bytes": path.stat().st_size,
                "origin": head.origin,
            }
            for path, head in zip(paths, heads)
        },
        "notes": notes or {},
    }
    write_json(Path(folder) / INDEX, index)
    return index


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        return index
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no {INDEX}: the extraction of latents was not begun or not finished"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: cannot be used ({type(error).__name__}: {error})") from None


class LatentShards:
    """A complete folder of latents: every shard that `latents.json` names is there, in full size.

    Args:
        folder: what `write_latent_index` finished.
        tokenizer_sha256: of the tokenizer that will decode; None asks nothing.

    Raises:
        DataError: no index (the extraction did not finish), or a shard that is missing or
            truncated.
        CheckpointError: another tokenizer made the latents.
    """

    def __init__(self, folder: str | Path, tokenizer_sha256: str | None = None):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.shape: tuple[int, ...] = tuple(index["shape"])  # (C, h, w)
        self.views: int = index["views"]
        self.count: int = index["count"]
        self.classes: int = index["classes"]  # one more than the largest label
        self.notes: dict[str, Any] = index["notes"]
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        self.shards: dict[str, int] = {n: entry["count"] for n, entry in index["shards"].items()}
        if tokenizer_sha256 is not None:
            check_tokenizer(self.folder, self.tokenizer_sha256, tokenizer_sha256)
        for name, entry in index["shards"].items():
            path = self.folder / name
            if not path.is_file():
                raise DataError(f"{path}: is missing; extract it again")
            if path.stat().st_size != entry["bytes"]:
                raise DataError(
                    f"{path}: truncated or replaced: {path.stat().st_size} bytes instead of "
                    f"{entry['bytes']}; extract it again"
                )

    def __len__(self) -> int:
        """Images; each has `views` latents."""
        return self.count

    def read(self, shard: str) -> Iterator[LatentRecord]:
        """Records of one of `shards`, in order."""
        return read_latent_shard(self.folder / shard, self.tokenizer_sha256)

    def __iter__(self) -> Iterator[LatentRecord]:
        """All records, shard by shard."""
        for shard in self.shards:
            yield from self.read(shard)
