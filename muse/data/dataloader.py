"""The front door to data: endless batches for training, each sample once for evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from muse.config import plain
from muse.data.crops import PictureCrop
from muse.data.decode import MAX_PIXELS
from muse.data.eval import EvalLoader, EvalStream, count_samples
from muse.data.mixture import parse_mixture
from muse.data.records import InMemory, Source
from muse.data.samples import SampleMaker
from muse.data.shards import check_enough
from muse.data.sources import open_source
from muse.data.train import StreamSpec, TrainLoader
from muse.data.transforms import Transform
from muse.errors import ConfigError


def train_loader(
    source: object,
    *,
    batch_size: int,
    resize_shorter_edge: int | None = 256,
    crop_size: int = 224,
    random_crop: bool = True,
    random_flip: bool = True,
    fields: Sequence[str] = ("images", "text"),
    zero_label_ignored: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    shuffle_buffer: int = 1000,
    resampled: bool = False,
    mix: str = "sample",
    cache_in_memory: bool = False,
    max_bad_fraction: float = 0.01,
    pin_memory: bool = False,
    maker: type[SampleMaker] = SampleMaker,
    jpeg_draft: bool = True,
    device: torch.device | None = None,
    tokenize: Callable[[list[str]], list[list[int]]] | None = None,
) -> TrainLoader:
    """Endless shuffled batches of one rank.

    A batch is `{images (B,3,c,c) float32 [0,1], text, keys[, labels (B,)][, masks (B,c,c)]}`.

    Args:
        source: see `open_source`; or a list of `{"urls": ..., "weight": w}`, mixed as weighted.
        fields: what a sample must have, else it is skipped; other captions may be "".
        zero_label_ignored: masks are numbered as in ADE20K, see `reduce_zero_label`.
        resampled: each worker draws shards with replacement; resuming is then approximate.
        mix: `sample` or `batch`: what one draw from the mixture gives, always of one source.
        cache_in_memory: decoded pictures stay in memory, per worker: for small sets.
        maker: what a record becomes, where that is not one picture with its caption.
        jpeg_draft: see `Transform`.
        device: where pictures become float32; a GPU then gets them as bytes.
        tokenize: a text teacher's, run where the batch is made; its result is `tokens`.

    Raises DataError at once for missing or too few shards, later for more bad ones than allowed.
    """
    _check_numbers(batch_size, num_workers, rank, world, max_bad_fraction)
    sources, weights = _open_mixture(source, 0 if resampled else world, num_workers)
    transform = Transform(resize_shorter_edge, crop_size, random_crop, random_flip, jpeg_draft)
    spec = StreamSpec(
        sources=tuple(map(InMemory, sources) if cache_in_memory else sources),
        weights=tuple(weights),
        maker=maker(transform, tuple(fields), zero_label_ignored, MAX_PIXELS, True, tokenize),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world=world,
        workers=max(1, num_workers),
        shuffle_buffer=shuffle_buffer,
        resampled=resampled,
        mix=mix,
    )
    return TrainLoader(spec, num_workers, max_bad_fraction, pin_memory, device)


def eval_loader(
    source: object,
    *,
    batch_size: int,
    fields: Sequence[str] = ("images",),
    resize_shorter_edge: int | None = 256,
    crop_size: int | None = 224,
    transform: Transform | PictureCrop | None = None,
    zero_label_ignored: bool = False,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    max_images: int | None = None,
    sample_seed: int | None = None,
    max_bad_fraction: float = 0.01,
    pin_memory: bool = False,
    maker: type[SampleMaker] = SampleMaker,
) -> EvalLoader:
    """Each sample once over all ranks and workers, in order, centre crop, the last batch kept.

    Batches are `train_loader`'s with `indices` (B,) int64: the sample's place in the source, dense
    from 0 for local sources, for remote shards only ascending and unique. They are the same for any
    number of workers; a bad sample makes its batch shorter.

    Args:
        source: see `open_source`.
        fields: what a sample must have.
        crop_size: None for the picture as resized, which needs batch_size 1.
        transform: how pictures are cut, in place of the two sizes.
        zero_label_ignored: masks are numbered as in ADE20K, see `reduce_zero_label`.
        max_images: only so many samples.
        sample_seed: draws them evenly from the whole of a local source, see `spread_sample`; None,
            and a remote source, whose samples are not counted, gives the first ones.
        maker: what a record becomes, where that is not one picture with its caption.

    Raises:
        DataError: at once for a source that is missing, empty or has a broken shard; while
            iterating, when more than `max_bad_fraction` of the samples cannot be used.
    """
    _check_numbers(batch_size, num_workers, rank, world, max_bad_fraction)
    if max_images is not None and max_images < 1:
        raise ConfigError(f"max_images must be positive, not {max_images}")
    transform = transform or Transform(resize_shorter_edge, crop_size)
    if transform.crop_size is None and batch_size != 1:
        raise ConfigError("pictures without a crop differ in size: batch_size must be 1")
    opened = open_source(source)
    made = maker(transform, tuple(fields), zero_label_ignored, as_bytes=True)
    first = max_images if sample_seed is None else None
    counts = count_samples(opened, first) if opened.local else []
    stream = EvalStream(opened, made, batch_size, rank, world, max_images, counts, sample_seed)
    return EvalLoader(stream, num_workers, max_bad_fraction, pin_memory)


def _open_mixture(source: object, world: int, workers: int) -> tuple[list[Source], list[float]]:
    """Sources with their weights; with `world` above 0 each must have a shard for every reader."""
    specs, weights = parse_mixture(source)
    sources = [open_source(spec) for spec in specs]
    for one in sources if world else ():
        check_enough(len(one.shards), world, workers, one.name)
    return sources, weights


def _check_numbers(
    batch_size: int, num_workers: int, rank: int, world: int, max_bad_fraction: float
) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be positive, not {batch_size}")
    if num_workers < 0:
        raise ConfigError(f"num_workers must not be negative, but is {num_workers}")
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is not one of {world} ranks")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"max_bad_fraction must be between 0 and 1, not {max_bad_fraction}")


# -------------------------------------------------------------------------- out of a configuration
def build_train_loader(
    cfg: DictConfig,
    *,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    device: torch.device | None = None,
    tokenize: Callable[[list[str]], list[list[int]]] | None = None,
) -> TrainLoader:
    """The training batches of process `rank` of `world`.

    Args:
        cfg: a configuration.
        rank: of this process.
        world: how many there are.
        pin_memory: where batches go to a GPU.
        device: where pictures become float32.
        tokenize: the text teacher's. Without worker processes it is left to the teacher, which
            does it for captions that it does not remember.
    """
    params = cfg.dataset.params
    return train_loader(
        plain(params.train_shards_path_or_url),
        batch_size=cfg.training.per_gpu_batch_size,
        **plain(cfg.dataset.preprocessing),
        num_workers=params.num_workers_per_gpu,
        seed=cfg.training.seed,
        rank=rank,
        world=world,
        shuffle_buffer=params.shuffle_buffer,
        resampled=params.resampled,
        mix=params.mix,
        cache_in_memory=params.cache_in_memory,
        max_bad_fraction=cfg.dataset.max_bad_fraction,
        fields=("images", "text") if cfg.losses.itc.weight > 0 else ("images",),
        pin_memory=pin_memory,
        device=device,
        tokenize=tokenize if params.num_workers_per_gpu else None,
    )


def build_eval_loader(
    cfg: DictConfig,
    source: Any = None,
    fields: tuple[str, ...] = ("images",),
    max_images: int | None = None,
    *,
    rank: int = 0,
    world: int = 1,
) -> EvalLoader:
    """Each picture once, shared out over the processes: those of process `rank` out of `world`.

    Args:
        cfg: a configuration.
        source: see `open_source`; the configuration's evaluation set when None.
        fields: what a sample must have.
        max_images: only the first so many; when None, the configuration's number of its own
            evaluation set, and all of another source.
    """
    params, preprocessing = cfg.dataset.params, cfg.dataset.preprocessing
    if source is None:
        source, max_images = params.eval_shards_path_or_url, max_images or params.max_eval_images
    return eval_loader(
        plain(source),
        batch_size=params.eval_batch_size,
        fields=fields,
        resize_shorter_edge=preprocessing.resize_shorter_edge,
        crop_size=preprocessing.crop_size,
        rank=rank,
        world=world,
        max_images=max_images,
        max_bad_fraction=cfg.dataset.max_bad_fraction,
    )


def sample_images(cfg: DictConfig, count: int) -> Tensor:
    """The first `count` evaluation pictures, (count, 3, H, W) in [0, 1]."""
    batches = [batch["images"] for batch in build_eval_loader(cfg, max_images=count)]
    return torch.cat(batches)
