"""The pictures that a report shows a model: what was named, the run's evaluation set, or drawn."""

import logging
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from muse.analysis.attention_pictures import square
from muse.config import plain
from muse.data.dataloader import eval_loader
from muse.errors import ConfigError, DataError
from muse.experiments.demo_data import make_demo_data
from muse.inference import SUFFIXES, find_images, read_image

log = logging.getLogger(__name__)

POOL = 96  # pictures read: the first ones are shown, the others train the probe and give captions


class ShownPictures(NamedTuple):
    """A set of pictures of one size; captions and masks where the data has them."""

    images: Tensor  # (n, 3, S, S) in [0, 1]
    names: list[str]
    captions: list[str]  # empty where there are none
    masks: Tensor | None  # (n, S, S), 0 is background
    origin: str  # one sentence


def pictures_of(cfg: DictConfig | None, side: int, data: str | None, count: int) -> ShownPictures:
    """The pictures of --data, else of the run's evaluation set, else drawn scenes.

    Args:
        cfg: the run's configuration, if it has one.
        side: of the square that the model gets, pixels.
        data: a picture, a folder, a glob, or shards.
        count: how many will be shown.

    Raises:
        DataError: `data` names nothing that can be read.
    """
    if data is not None:
        return _named(data, side, count)
    source = _evaluation_set(cfg)
    if source is not None:
        try:
            return _loaded(source, side, count, "pictures of the run's evaluation set")
        except (DataError, OSError) as error:
            log.warning("the run's evaluation set cannot be read (%s): drawn scenes instead", error)
    why = "the run's evaluation pictures are not here" if cfg is not None else "no --data was given"
    with tempfile.TemporaryDirectory() as folder:
        make_demo_data(
            "shapes", f"{folder}/shapes", images=8, size=side, val_images=POOL, workers=1
        )
        return _loaded(f"{folder}/shapes/val-*.tar", side, count, f"drawn scenes, since {why}")


def _evaluation_set(cfg: DictConfig | None) -> Any:
    if cfg is None:
        return None
    try:
        return plain(cfg.dataset.params).get("eval_shards_path_or_url") or None
    except ConfigError:  # an environment variable that is not set
        return None


def _named(data: str, side: int, count: int) -> ShownPictures:
    path = Path(data).expanduser()
    one_folder = path.is_dir() and any(f.suffix.lower() in SUFFIXES for f in path.iterdir())
    if one_folder or path.suffix.lower() in SUFFIXES:
        files = find_images(data)[: max(count, 1)]
        images = torch.stack([square(read_image(file), side) for file in files])
        return ShownPictures(images, [file.name for file in files], [], None, f"pictures of {data}")
    return _loaded(data, side, count, f"pictures of {data}")


def _loaded(source: Any, side: int, count: int, origin: str) -> ShownPictures:
    """With captions and masks, or with one of them, or with pictures alone."""
    choices = (("images", "text", "masks"), ("images", "text"), ("images", "masks"), ("images",))
    for fields in choices:
        try:
            return _read(source, fields, side, max(count, POOL), origin)
        except DataError:
            if fields == choices[-1]:
                raise
    raise AssertionError("unreachable")


def _read(
    source: Any, fields: tuple[str, ...], side: int, count: int, origin: str
) -> ShownPictures:
    loader = eval_loader(
        source,
        batch_size=16,
        fields=fields,
        resize_shorter_edge=side,
        crop_size=side,
        max_images=count,
    )
    batches = list(loader)
    if not batches:
        raise DataError(f"{source}: holds no picture")
    images = torch.cat([batch["images"] for batch in batches])
    captions = [text for batch in batches for text in batch.get("text", ())]
    masks = torch.cat([batch["masks"] for batch in batches]) if "masks" in fields else None
    names = [str(key) for batch in batches for key in batch["keys"]]
    return ShownPictures(images, names, captions, masks, origin)
