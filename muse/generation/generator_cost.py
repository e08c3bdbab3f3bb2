"""What a generator costs to train and to sample from: counted without numbers, not measured."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from muse.analysis.counters import FlopCounter
from muse.config import plain
from muse.errors import ConfigError
from muse.generation.flow import flow_loss
from muse.generation.generator import build_network


def generator_cost(
    cfg: DictConfig,
    *,
    gpus: int = 8,
    utilisation: float = 0.4,
    peak: float = 989.0,
    peak_float32: float = 67.0,
    samples: int = 50_000,
) -> dict[str, Any]:
    """Parameters, operations an image, and GPU-hours of the training and of `samples` samples.

    One multiply-add is two operations; only matrix products and attention count.

    Args:
        cfg: a generator's configuration, with `latents.shape`.
        gpus: processes, which with its batch give the images of a step unless
            `training.global_batch_size` does.
        utilisation: share of the peak that is reached.
        peak: 10^12 operations a second and GPU in mixed precision.
        peak_float32: the same in float32.
        samples: pictures, by the configuration's sampler; their decoding is not counted.
    """
    shape = plain(cfg.latents.shape)
    if shape is None:
        raise ConfigError("the cost needs latents.shape, such as latents.shape=[32,8,8]")
    training, sampling = cfg.training, cfg.sampling
    with FakeTensorMode():  # a CPU's tensors without numbers; autocast knows no meta device
        net = build_network(cfg, tuple(shape)).train()
        net._check = lambda *_: None  # it would look at the label's number
        x, t, y = torch.empty(1, *shape), torch.empty(1), torch.empty(1, dtype=torch.int64)
        with FlopCounter() as forward, torch.no_grad():
            net(x, t, y)
        with FlopCounter() as both:
            loss = flow_loss(net, x, y, t, torch.empty(1, *shape))
            (loss.velocity.mean() + loss.cosine.mean()).backward()
    images = training.max_train_steps * (
        training.global_batch_size
        or training.per_gpu_batch_size * training.gradient_accumulation_steps * gpus
    )
    limit = (peak if training.mixed_precision != "no" else peak_float32) * 1e12 * utilisation * 3600
    passes = sampling.steps * (2 if sampling.method == "heun" else 1)
    passes *= 2 if sampling.cfg_scale != 1 else 1
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "flops_forward": forward.get_total_flops(),
        "flops_training": both.get_total_flops(),
        "images": images,
        "training_gpu_hours": both.get_total_flops() * images / limit,
        "sampling_gpu_hours": forward.get_total_flops() * passes * samples / limit,
        "samples": samples,
        "gpus": gpus,
    }


def generator_cost_text(name: str, cost: dict[str, Any]) -> str:
    """The numbers in lines for a terminal."""
    hours = cost["training_gpu_hours"]
    return "\n".join(
        [
            f"{name}: {cost['parameters']:,} parameters",
            f"  forward pass {cost['flops_forward'] / 1e9:,.1f} GFLOPs an image, "
            f"training {cost['flops_training'] / 1e9:,.1f}",
            f"  {cost['images'] / 1e6:,.1f} million images: {hours:,.1f} GPU-hours, "
            f"{hours / cost['gpus']:,.1f} hours on {cost['gpus']}",
            f"  {cost['samples']:,} samples: {cost['sampling_gpu_hours']:,.1f} GPU-hours, "
            "without decoding",
        ]
    )
