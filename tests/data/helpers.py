"""Tiny shards and pictures for the data tests."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def encode(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", ihdr)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def sample(number: int) -> dict[str, bytes]:
    """Members of a whole sample: its number is in the caption, label = number % 5, mask = number %
    7 everywhere.
    """
    mask = Image.fromarray(np.full((16, 20), number % 7, np.uint8))
    return {
        "png": encode(picture(number)),
        "txt": f"picture {number}".encode(),
        "cls": str(number % 5).encode(),
        "seg.png": encode(mask),
    }


def key(number: int) -> str:
    return f"{number:05d}"


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int, per_shard: int, first: int = 0, name: str = "t") -> str:
    """`shards` tars of `per_shard` good samples, numbered on from `first`; the brace pattern that
    names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        numbers = range(first + i * per_shard, first + (i + 1) * per_shard)
        write_tar(folder / f"{name}-{i:03d}.tar", {key(n): sample(n) for n in numbers})
    return f"{folder}/{name}-{{000..{shards - 1:03d}}}.tar"


FAULTS = {
    "empty_file": {"jpg": b"", "txt": b"x"},
    "not_an_image": {"jpg": b"this is text", "txt": b"x"},
    "truncated_image": {"jpg": encode(picture(0, 64, 64), "JPEG")[:900], "txt": b"x"},
    "decompression_bomb": {"png": png_header(30_000, 30_000), "txt": b"x"},
    "missing_image": {"txt": b"x"},
    "missing_caption": {"png": encode(picture(0))},
    "caption_not_utf8": {"png": encode(picture(0)), "txt": b"\xff\xfe"},
    "bad_json": {"png": encode(picture(0)), "json": b"{"},
}


def write_faulty(folder, good):
    """Two shards, one with `good` whole samples and one of each fault, one with three samples
    before it breaks off.
    """
    members = {key(n): sample(n) for n in range(good)}
    members.update({f"bad_{kind}": parts for kind, parts in FAULTS.items()})
    write_tar(folder / "a-0.tar", members)
    path = write_tar(folder / "a-1.tar", {key(n): sample(n) for n in range(good, good + 4)})
    path.write_bytes(
        path.read_bytes()[: -10_240 - 100]
    )  # without the end and a part of the last member
    return f"{folder}/a-{{0..1}}.tar"


def take(loader, count):
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == count:
            return batches


def same(left, right) -> bool:
    if len(left) != len(right):
        return False
    for a, b in zip(left, right, strict=True):
        for name in a:
            equal = (
                torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
            )
            if not equal:
                return False
    return True


def keys_of(batches) -> list[str]:
    return [name for batch in batches for name in batch["keys"]]
