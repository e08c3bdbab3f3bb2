"""Which parameters learn, at which rate, with which decay: groups of an AdamW, carried as data."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.stages import compile_pattern
from muse.training.fsdp import like


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, multipliers: Mapping[str, float]
) -> list[dict]:
    """Groups by (rate multiplier, decay, scalar or not). A pattern of `multipliers` that is found in a name multiplies its rate
    (all that are found do); vectors and scalars (norms, biases, scales) are not decayed. Each group keeps its tensors' `names`.
    """
    compiled = {
        compile_pattern(pattern, "optimizer.lr_multipliers"): multiplier
        for pattern, multiplier in multipliers.items()
    }
    groups: dict[tuple[float, float, bool], dict] = {}
    for name, parameter in named:
        factor = 1.0
        for pattern, multiplier in compiled.items():
            factor *= multiplier if pattern.search(name) else 1.0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        # Scalars apart: FSDP cannot share them out, and one kernel takes shared-out tensors or whole ones.
        group = groups.setdefault(
            (factor, decay, parameter.ndim == 0),
            {"params": [], "names": [], "lr_multiplier": factor, "weight_decay": decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_adamw(groups: list[dict], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW, fused: one kernel a group instead of one a tensor, on GPUs and on CPUs."""
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device in ("cuda", "cpu"))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore the moments, each to the tensor of its name; rates, multipliers, decays and betas stay as configured now.

    Moments are shared out as their tensors are (FSDP). `ConfigError` when the state was written for other tensors.
    """
    theirs = [name for group in state["param_groups"] for name in group["names"]]
    mine = [name for group in optimizer.param_groups for name in group["names"]]
    if sorted(mine) != sorted(theirs):
        raise ConfigError(
            "the checkpoint to go on from trained other tensors: keep training.trainable as it was, or choose another "
            "experiment.output_dir"
        )
    moments = {
        name: state["state"][index] for index, name in enumerate(theirs) if index in state["state"]
    }
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {
        index: {
            key: like(parameter, value) if isinstance(value, Tensor) else value
            for key, value in moments[name].items()
        }
        for index, (name, parameter) in enumerate(zip(mine, parameters))
        if name in moments
    }
    optimizer.load_state_dict(
        {"state": placed, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """`grad_norm/MODULE` for each top-level module (and each block) that has gradients: before clipping."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".")
            groups.setdefault(
                ".".join(parts[:2]) if parts[0] == "muse_blocks" else parts[0], []
            ).append(parameter.grad)
    return {
        f"grad_norm/{name}": torch.nn.utils.get_total_norm(grads) for name, grads in groups.items()
    }


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def lr_at(
    step: int,
    *,
    base: float,
    end: float,
    warmup: int,
    total: int,
    hold_fraction: float = 0.0,
    schedule: str = "cosine",
) -> float:
    """The rate for optimizer step `step` (0-based) of `total`.

    Linear warm-up over `warmup` steps (the first is base / warmup), then `base` for `hold_fraction` of the remaining steps, then
    half a cosine down to `end`, reached at the last step. `constant` stays at base after the warm-up.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    start = warmup + hold_fraction * (total - warmup)
    if step <= start:
        return base
    progress = min(1.0, (step - start) / max(1.0, total - 1 - start))
    return end + (base - end) * 0.5 * (1 + math.cos(math.pi * progress))
