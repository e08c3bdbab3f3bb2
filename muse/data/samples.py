"""From a record's bytes to the tensors of a batch."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from muse.data.decode import (
    MAX_PIXELS,
    BadSample,
    decode_captions,
    decode_label,
    decode_picture,
    image_bytes,
)
from muse.data.masks import decode_mask, reduce_zero_label
from muse.data.records import Record
from muse.data.transforms import Transform, to_float
from muse.data.workers import outlive_stop_signals
from muse.errors import ConfigError

FIELDS = ("images", "text", "labels", "masks")


class Prepared(NamedTuple):
    """A decoded and resized sample, the same in every epoch: what a cache keeps."""

    key: str
    pixels: Tensor  # uint8 (3,h,w)
    captions: tuple[str, ...]
    label: int | None
    mask: Tensor | None  # int32 (h,w)


@dataclass(frozen=True)
class SampleMaker:
    """Decodes what `fields` asks for; a sample that lacks one of them is bad.

    A caption that was not asked for may be missing ("").

    Args:
        transform: how pictures are resized and cropped.
        fields: what a sample must have.
        zero_label_ignored: masks are numbered as in ADE20K.
        max_pixels: larger pictures are bad samples.
        as_bytes: batches hold uint8 pictures, a quarter of the memory on their way between
            processes and to a GPU; `floats` makes them float32.
        tokenize: makes a text teacher's tokens of a batch's captions, which are added to it.
    """

    transform: Transform
    fields: tuple[str, ...] = ("images", "text")
    zero_label_ignored: bool = False
    max_pixels: int = MAX_PIXELS
    as_bytes: bool = False
    tokenize: Callable[[list[str]], list[list[int]]] | None = None

    def __post_init__(self) -> None:
        unknown = set(self.fields) - set(FIELDS)
        if unknown:
            raise ConfigError(
                f"unknown field {sorted(unknown)[0]!r}; "
                f"the fields of a batch are {', '.join(FIELDS)}"
            )

    def prepare(self, record: Record) -> Prepared:
        """Decode and resize. Raises BadSample."""
        members = record.load().members
        if record.fault:
            raise BadSample(record.fault)
        captions = self._captions(members)
        label = decode_label(members) if "labels" in self.fields else None
        mask = decode_mask(members) if "masks" in self.fields else None
        draft = getattr(self.transform, "jpeg_draft", False)
        least = self.transform.target if draft else None
        image, turn, size = decode_picture(image_bytes(members), self.max_pixels, least)
        if mask is not None and turn is not None:  # masks lie as the picture is stored
            mask = mask.transpose(turn)
        drafted = {} if size is None else {"size": size}
        pixels, resized = self.transform.resize(image, mask, **drafted)
        if resized is not None and self.zero_label_ignored:
            resized = torch.from_numpy(reduce_zero_label(resized.numpy()))
        return Prepared(record.key, pixels, captions, label, resized)

    def _captions(self, members: dict[str, bytes]) -> tuple[str, ...]:
        try:
            return decode_captions(members)
        except BadSample:
            if "text" in self.fields:
                raise
            return ("",)

    def finish(self, prepared: Prepared, rng: random.Random | None = None) -> Prepared:
        """Crop, flip and pick a caption by `rng`; without it the centre and the first caption."""
        pixels, mask = self.transform.crop(prepared.pixels, prepared.mask, rng)
        captions = prepared.captions
        if len(captions) > 1:
            captions = (rng.choice(captions),) if rng else captions[:1]
        return Prepared(prepared.key, pixels, captions, prepared.label, mask)

    def collate(self, samples: Sequence[Prepared]) -> dict:
        """A batch: images float32 (B,3,H,W) in [0,1], or uint8 (B,3,H,W) if as_bytes; text, keys;
        labels, masks and tokens if asked for.
        """
        pixels = torch.stack([sample.pixels for sample in samples])
        batch = {
            "images": pixels if self.as_bytes else to_float(pixels),
            "text": [sample.captions[0] for sample in samples],
            "keys": [sample.key for sample in samples],
        }
        if "labels" in self.fields:
            labels = [sample.label for sample in samples]
            batch["labels"] = torch.tensor(labels, dtype=torch.int64)  # (B,)
        if "masks" in self.fields:
            masks = torch.stack([sample.mask for sample in samples])
            batch["masks"] = masks.to(torch.int64)  # (B,H,W)
        if self.tokenize is not None:
            batch["tokens"] = tuple(self.tokenize(batch["text"]))
        return batch


def floats(batch: dict, device: torch.device | None = None) -> dict:
    """The batch with its uint8 pictures as float32 in [0,1], on `device` if that is given."""
    made = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            here = value if device is None else value.to(device, non_blocking=True)
            made[name] = to_float(here)
    return made


def _as_it_is(batch: tuple) -> tuple:
    return batch


def torch_loader(
    dataset: IterableDataset, num_workers: int, seed: int, pin_memory: bool
) -> DataLoader:
    """torch's loader over a data set that makes its batches itself.

    Args:
        dataset: yields batches.
        num_workers: processes that read ahead, two batches each; 0 reads in this process.
        seed: of torch's own generators in the workers, which no random choice here depends on.
        pin_memory: batches lie where a GPU can fetch them without waiting.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        # Without one of its own, starting the workers would draw from the global generator.
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=outlive_stop_signals,
    )
