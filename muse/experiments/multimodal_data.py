"""What the multimodal demo learns from and is measured on: three kinds of demo data, read back.

Captions are also written as questions ("Describe the picture."), since the language model learns
from questions and answers alone.
"""

import base64
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from muse.data.decode import PAIR, decode_captions, decode_image, decode_label, image_bytes
from muse.data.sources import open_source
from muse.errors import DataError
from muse.experiments.demo_data import make_demo_data
from muse.multimodal.benchmarks import Question
from muse.multimodal.umm_samples import decode_questions
from muse.utils.io import atomic_directory

log = logging.getLogger(__name__)

DESCRIBE = "Describe the picture."
# Folder -> (kind of demo data, what it shows), with cut-outs on photographs and with shapes.
FOLDERS = {
    "stamps": {
        "pictures": ("stamps", None),
        "edits": ("edits", None),
        "questions": ("questions", None),
    },
    "shapes": {
        "pictures": ("shapes", None),
        "edits": ("edits", "drawn"),
        "questions": ("questions", "drawn"),
    },
}


class Captioned(NamedTuple):
    """Pictures with captions and classes."""

    images: Tensor  # (n, 3, H, W) uint8
    labels: Tensor  # (n,)
    texts: list[str]


class EditPairs(NamedTuple):
    """Pictures before and after an exact change, with what was asked for."""

    sources: Tensor  # (n, 3, H, W) uint8
    targets: Tensor  # (n, 3, H, W) uint8
    stays: Tensor  # (n, H, W) bool: where the two are the same
    labels: Tensor  # (n,) class of the object afterwards; of a removed one, its own
    texts: list[str]
    changes: list[str]  # replace, background or remove
    grounds: list[str]  # the source's background
    becomes: list[str]  # the new object or background; "" where one is removed


# --------------------------------------------------------------------------------------- making
def make_multimodal_data(folder: Path, images: int, held_out: int, kind: str) -> str:
    """Make what is not there of pictures, edits, questions and captions in `folder`.

    Args:
        folder: gets a directory for each.
        images: training samples of each.
        held_out: of each other part.
        kind: stamps, or shapes, which also stand in where packages cannot be downloaded.

    Returns:
        The kind that was made.
    """
    for one in [kind] if kind == "shapes" else [kind, "shapes"]:
        try:
            for name, (data, objects) in FOLDERS[one].items():
                made = folder / f"{name}-{one}"
                make_demo_data(data, made, images, objects=objects, val_images=held_out)
        except DataError as error:
            if one == "shapes":
                raise
            log.warning("%s; going on with shapes", error)
            continue
        _write_captions(folder / f"pictures-{one}", folder / f"captions-{one}")
        return one
    raise AssertionError  # the last kind has returned or raised


def _write_captions(pictures: Path, target: Path) -> None:
    """The shards of `pictures` for training and val, their captions as answers."""
    if target.is_dir():
        return
    with atomic_directory(target) as folder:
        for file in sorted(pictures.glob("*.tar")):
            if not file.name.startswith(("train-", "val-")):
                continue
            with tarfile.open(folder / file.name, "w") as tar:
                for key, members in _samples(str(file)):
                    turn = {"question": DESCRIBE, "answer": decode_captions(members)[0]}
                    _add(tar, f"{key}.jpg", image_bytes(members))
                    _add(tar, f"{key}.json", json.dumps(turn).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def training_texts(folder: Path, kind: str) -> Iterator[str]:
    """Every text of the training shards: captions, instructions, questions and answers."""
    for name in ("pictures", "edits"):
        for _, members in _samples(f"{folder}/{name}-{kind}/train-*.tar"):
            yield from decode_captions(members)
    for name in ("questions", "captions"):
        for _, members in _samples(f"{folder}/{name}-{kind}/train-*.tar"):
            for pair in decode_questions(members):
                yield from pair


# -------------------------------------------------------------------------------------- reading
def _samples(pattern: str, most: int | None = None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of the shards' first `most` samples, in order."""
    source, count = open_source(pattern), 0
    for shard in source.shards:
        for record in source.read(shard):
            if count == most:
                return
            count += 1
            yield Path(record.key).name, record.load().members


def read_captioned(pattern: str, most: int | None = None) -> Captioned:
    """The first `most` pictures of shards of the kind stamps or shapes."""
    images, labels, texts = [], [], []
    for _, members in _samples(pattern, most):
        images.append(_pixels(image_bytes(members)))
        labels.append(decode_label(members))
        texts.append(decode_captions(members)[0])
    return Captioned(torch.stack(images), torch.tensor(labels), texts)


def read_edits(folder: Path, split: str, most: int | None = None) -> EditPairs:
    """The first `most` pairs of a folder of the kind edits."""
    with (folder / "index.jsonl").open(encoding="utf-8") as lines:
        facts = {fact["key"]: fact for fact in map(json.loads, lines)}
    rows = list(_samples(f"{folder}/{split}-*.tar", most))
    sources, targets = (
        torch.stack([_pixels(image_bytes(members, side)) for _, members in rows]) for side in PAIR
    )
    masks = [numpy.array(Image.open(io.BytesIO(members["seg.png"]))) for _, members in rows]
    about = [facts[key] for key, _ in rows]
    return EditPairs(
        sources,
        targets,
        torch.from_numpy(numpy.stack(masks) == 0),
        torch.tensor([fact["label"] for fact in about]),
        [fact["caption"] for fact in about],
        [fact["change"] for fact in about],
        [fact["background"] for fact in about],
        [fact["becomes"] for fact in about],
    )


def read_choices(pattern: str, most: int | None = None) -> list[Question]:
    """The multiple-choice questions of shards of the kind questions, as MMBench's rows."""
    found = []
    for number, (_, members) in enumerate(_samples(pattern, most)):
        prompt, letter = decode_questions(members)[0]
        text, *rest = prompt.split("\n")
        options = dict(re.fullmatch(r"([A-Z])\. (.*)", line).groups() for line in rest[:-1])
        picture = base64.b64encode(image_bytes(members)).decode()
        found.append(Question(number, text, options, letter, picture))
    return found


def _pixels(content: bytes) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(numpy.array(decode_image(content))).permute(2, 0, 1).contiguous()
