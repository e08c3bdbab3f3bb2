"""Which parameters learn, at which rate, with which decay: groups of an AdamW, carried as data."""
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.training.sharding import like


def select_trainable(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Set `requires_grad` by name: True where a pattern is found, False elsewhere. Returns the names that learn."""
    compiled = [_pattern(pattern, "training.trainable") for pattern in patterns]
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(pattern.search(name) for pattern in compiled))
        if parameter.requires_grad:
            names.append(name)
    if not names:
        raise ConfigError(f"training.trainable: no parameter of the model matches {list(patterns)}")
    return names


def _pattern(text: str, key: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{key}: {text!r} is not a regular expression ({error})") from None


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float,
                     multipliers: Mapping[str, float]) -> list[dict]:
    """Groups by (rate multiplier, decay, scalar or not). A pattern of `multipliers` that is found in a name multiplies its rate
    (all that are found do); vectors and scalars (norms, biases, scales) are not decayed. Each group keeps its tensors' `names`.
    """
    compiled = {_pattern(pattern, "optimizer.lr_multipliers"): multiplier for pattern, multiplier in multipliers.items()}
    groups: dict[tuple[float, float, bool], dict] = {}
    for name, parameter in named:
        factor = 1.0
        for pattern, multiplier in compiled.items():
            factor *= multiplier if pattern.search(name) else 1.0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        # Scalars apart: FSDP cannot share them out, and one kernel takes shared-out tensors or whole ones.
        group = groups.setdefault((factor, decay, parameter.ndim == 0),
                                  {"params": [], "names": [], "lr_multiplier": factor, "weight_decay": decay})
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
        raise ConfigError("the checkpoint to go on from trained other tensors: keep training.trainable as it was, or choose another "
                          "experiment.output_dir")
    moments = {name: state["state"][index] for index, name in enumerate(theirs) if index in state["state"]}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {index: {key: like(parameter, value) if isinstance(value, Tensor) else value for key, value in moments[name].items()}
              for index, (name, parameter) in enumerate(zip(mine, parameters)) if name in moments}
    optimizer.load_state_dict({"state": placed, "param_groups": optimizer.state_dict()["param_groups"]})


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """`grad_norm/MODULE` for each top-level module (and each block) that has gradients: before clipping."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".")
            groups.setdefault(".".join(parts[:2]) if parts[0] == "muse_blocks" else parts[0], []).append(parameter.grad)
    return {f"grad_norm/{name}": torch.nn.utils.get_total_norm(grads) for name, grads in groups.items()}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
