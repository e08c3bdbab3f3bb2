"""How parameters learn: groups of an AdamW, the schedule of its rate, norms of gradients."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.stages import compile_pattern
from muse.training.fsdp import full_scalar, shard


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    multipliers: Mapping[str, float] | None = None,
    no_decay: Sequence[str] = (),
) -> list[dict]:
    """Groups by (rate multiplier, decay, scalar or not). Each keeps its tensors' `names`.

    Args:
        named: (name, parameter) pairs.
        weight_decay: of matrices; vectors and scalars (norms, biases, scales) are not decayed.
        multipliers: pattern -> factor of the rate where it is found in a name; all found multiply.
        no_decay: patterns of further names that are not decayed.
    """
    compiled = {
        compile_pattern(pattern, "optimizer.lr_multipliers"): multiplier
        for pattern, multiplier in (multipliers or {}).items()
    }
    exempt = [compile_pattern(pattern, "optimizer.no_decay") for pattern in no_decay]
    groups: dict[tuple[float, float, bool], dict] = {}
    for name, parameter in named:
        factor = 1.0
        for pattern, multiplier in compiled.items():
            factor *= multiplier if pattern.search(name) else 1.0
        decayed = parameter.ndim > 1 and not any(pattern.search(name) for pattern in exempt)
        decay = weight_decay if decayed else 0.0
        # Scalars apart: FSDP cannot shard them, and one kernel takes sharded tensors or full ones.
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
    """Restore the moments, each to the tensor of its name, sharded as that is (FSDP).

    Rates, multipliers, decays and betas stay as configured now. `ConfigError` when the state was
    written for other tensors.
    """
    theirs = [name for group in state["param_groups"] for name in group["names"]]
    mine = [name for group in optimizer.param_groups for name in group["names"]]
    if sorted(mine) != sorted(theirs):
        raise ConfigError(
            "the checkpoint to go on from trained other tensors: keep training.trainable as it "
            "was, or choose another experiment.output_dir"
        )
    moments = {
        name: state["state"][index] for index, name in enumerate(theirs) if index in state["state"]
    }
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {
        index: {
            key: shard(value, parameter) if isinstance(value, Tensor) else value
            for key, value in moments[name].items()
        }
        for index, (name, parameter) in enumerate(zip(mine, parameters))
        if name in moments
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": placed, "param_groups": groups})


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """`grad_norm/MODULE` for each top-level module, or each entry of a list of blocks."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".")
            is_list = isinstance(getattr(model, parts[0]), nn.ModuleList)
            key = ".".join(parts[: 2 if is_list else 1])
            groups.setdefault(key, []).append(parameter.grad)
    return {
        f"grad_norm/{name}": full_scalar(nn.utils.get_total_norm(grads))
        for name, grads in groups.items()
    }


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def scheduled_lr(cfg: DictConfig, step: int, base: float, end: float | None = None) -> float:
    """`lr_at` with a configuration's schedule, for a network whose full rate is `base`.

    end: its rate at the last step; None for the configuration's.
    """
    params = cfg.lr_scheduler.params
    return lr_at(
        step,
        base=base,
        end=min(params.end_lr if end is None else end, base),
        warmup=params.warmup_steps,
        total=cfg.training.max_train_steps,
        hold_fraction=params.hold_fraction,
        schedule=cfg.lr_scheduler.scheduler,
    )


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
    """The rate for one optimizer step.

    Args:
        step: counted from 0.
        base: the rate after the warm-up.
        end: the rate at the last step of `cosine`.
        warmup: steps of linear warm-up; the first has the rate base / warmup.
        total: steps in all.
        hold_fraction: share of the steps after the warm-up that stay at `base`.
        schedule: `cosine` (half a period down to `end`) or `constant`.
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
