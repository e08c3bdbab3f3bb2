"""FSDP: parameters that are shared out over processes (DTensors) made whole to be saved or looked at, and shared out again.

accelerate shards the model (`configs/accelerate/fsdp.yaml`); this is what it leaves to its callers. Checkpoints hold whole tensors
and the same names however a run was started, so that a run may go on under DDP, FSDP or alone. Without FSDP every function here
gives back what it was given.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from muse.errors import ConfigError
from muse.models.muse_vit import MUSE_ViT


def is_sharded(accelerator: Any) -> bool:
    """Whether the run shares out its parameters."""
    return accelerator.is_fsdp2


def prepare_student(
    accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, heads: bool
) -> tuple[Any, Any]:
    """accelerate's `prepare` for the student; scalars, which cannot be shared out, stay whole on every process.

    heads: whether the loss has parameters of its own in the optimizer. Raises `ConfigError` for those under FSDP.
    """
    if is_sharded(accelerator):
        if heads:
            raise ConfigError(
                "losses.distillation trains heads of its own, which FSDP cannot share out: start this stage with "
                "configs/accelerate/ddp.yaml"
            )
        scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
        accelerator.state.fsdp_plugin.ignored_modules = (
            [nn.ParameterList(scalars)] if scalars else None
        )
        for scalar in scalars:
            if scalar.requires_grad:  # nobody else averages their gradients
                scalar.register_post_accumulate_grad_hook(_average_gradient)
    return accelerator.prepare(model, optimizer)


def _average_gradient(parameter: nn.Parameter) -> None:
    """After each backward pass; what was averaged before stays what it is, so accumulation is served too."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def prepare_small(
    accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any]:
    """accelerate's `prepare` for a network without the student's blocks: sharded as one unit."""
    if not is_sharded(accelerator):
        return accelerator.prepare(model, optimizer)
    plugin = accelerator.state.fsdp_plugin
    kept = plugin.auto_wrap_policy, plugin.ignored_modules
    plugin.auto_wrap_policy, plugin.ignored_modules = None, None
    prepared = accelerator.prepare(model, optimizer)
    plugin.auto_wrap_policy, plugin.ignored_modules = kept
    return prepared


def whole(tree: Any, everywhere: bool = False) -> Any:
    """Nested dicts and lists with every shared-out tensor made whole, on the CPU; None on all processes but the first, unless `everywhere`.

    All processes call it together.
    """
    if isinstance(tree, DTensor):
        full = tree.detach().full_tensor()
        return full.cpu() if everywhere or dist.get_rank() == 0 else None
    if isinstance(tree, dict):
        return {key: whole(value, everywhere) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [whole(value, everywhere) for value in tree]
    return tree


def clip_gradients(accelerator: Any, parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Unscale all optimizers' gradients and clip these to the norm `limit`, over whole and shared-out tensors; gives the norm before."""
    if not is_sharded(accelerator):
        return torch.as_tensor(accelerator.clip_grad_norm_(parameters, limit)).detach()
    accelerator.unscale_gradients()
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    shared = [parameter for parameter in parameters if isinstance(parameter.grad, DTensor)]
    own = [parameter for parameter in parameters if not isinstance(parameter.grad, DTensor)]
    norms = [
        number(nn.utils.get_total_norm([parameter.grad for parameter in group]))
        for group in (shared, own)
        if group
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if shared:
        nn.utils.clip_grads_with_norm_(
            shared, limit, DTensor.from_local(total, shared[0].grad.device_mesh)
        )
    nn.utils.clip_grads_with_norm_(own, limit, total)
    return total.detach()


def number(value: Tensor) -> Tensor:
    """A scalar that may be a DTensor (a norm over shared-out tensors) as a plain one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(reference: Any, value: Tensor) -> Tensor:
    """`value`, whole on every process, shared out as `reference` is; as it is where that is whole or of another shape."""
    if not isinstance(reference, DTensor) or value.shape != reference.shape:
        return value
    return distribute_tensor(
        value.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None
    )


def plain_copy(model: MUSE_ViT, accelerator: Any) -> MUSE_ViT:
    """The model itself; under FSDP a plain one with the same weights on every process, in eval mode, that any process may use alone.

    FSDP's own hooks count the forward passes of each process, so one that looks at pictures alone would part it from the others.
    """
    if not is_sharded(accelerator):
        return model
    with torch.random.fork_rng(
        devices=[]
    ):  # its start is overwritten, and must not move the run's generator
        copy = MUSE_ViT(model.portable_config()["model"], load_backbones=False)
    copy.load_state_dict(whole(model.state_dict(), everywhere=True))
    return copy.to(accelerator.device).eval()
