"""Loaders and sample pictures as the configuration describes them."""
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from muse.config import plain
from muse.data.dataloader import EvalLoader, TrainLoader, eval_loader, train_loader


def build_train_loader(cfg: DictConfig, accelerator: Any) -> TrainLoader:
    """Endless batches of this process."""
    params, preprocessing = cfg.dataset.params, cfg.dataset.preprocessing
    return train_loader(
        plain(params.train_shards_path_or_url), batch_size=cfg.training.per_gpu_batch_size, **plain(preprocessing),
        num_workers=params.num_workers_per_gpu, seed=cfg.training.seed, rank=accelerator.process_index,
        world=accelerator.num_processes, shuffle_buffer=params.shuffle_buffer, resampled=params.resampled,
        cache_in_memory=params.cache_in_memory, max_bad_fraction=cfg.dataset.max_bad_fraction,
        fields=("images", "text") if cfg.losses.itc.weight > 0 else ("images",),
        pin_memory=accelerator.device.type == "cuda")


def build_eval_loader(cfg: DictConfig, accelerator: Any | None = None, source: Any = None, fields: tuple[str, ...] = ("images",),
                      max_images: int | None = None) -> EvalLoader:
    """Each picture of `source` (default: the evaluation set) once, over all processes."""
    params, preprocessing = cfg.dataset.params, cfg.dataset.preprocessing
    source = plain(params.eval_shards_path_or_url) if source is None else source
    return eval_loader(
        source, batch_size=params.eval_batch_size, fields=fields, resize_shorter_edge=preprocessing.resize_shorter_edge,
        crop_size=preprocessing.crop_size, num_workers=0, rank=accelerator.process_index if accelerator else 0,
        world=accelerator.num_processes if accelerator else 1, max_images=max_images or params.max_eval_images,
        max_bad_fraction=cfg.dataset.max_bad_fraction)


def sample_images(cfg: DictConfig, count: int) -> Tensor:
    """The first `count` evaluation pictures, (count, 3, H, W) in [0, 1]."""
    batches = [batch["images"] for batch in build_eval_loader(cfg, max_images=count)]
    return torch.cat(batches)
