"""FSDP: full tensors out of sharded parameters (DTensors), to be saved or looked at, and back.

accelerate shards the model (`configs/accelerate/fsdp.yaml`); this is what it leaves to its callers.
Checkpoints hold full tensors under the same names however a run was started, so that a run may go
on under DDP, FSDP or alone. Without FSDP every function here gives back what it was given.

Why not `torch.distributed.checkpoint.state_dict`: it names moments after the model alone and so
refuses an optimizer that trains heads of a loss as well, it fills the state of a new optimizer by a
step, and its optimizer states are another format than the checkpoints that exist.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(accelerator: Any) -> bool:
    """Whether the run shards its parameters."""
    return accelerator.is_fsdp2


# ------------------------------------------------------------------------------------- building
def prepare_model(
    accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any]:
    """accelerate's `prepare` for the model; scalars, which FSDP cannot shard, stay as they are.

    One accelerate file serves all models: of the block classes that it names, those of the model.
    """
    if is_sharded(accelerator):
        scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
        plugin = accelerator.state.fsdp_plugin
        own = {type(module).__name__ for module in model.modules()}
        named = plugin.transformer_cls_names_to_wrap or ()
        plugin.transformer_cls_names_to_wrap = [name for name in named if name in own]
        plugin.ignored_modules = [nn.ParameterList(scalars)] if scalars else None
        for scalar in scalars:
            if scalar.requires_grad:  # nobody else averages their gradients
                scalar.register_post_accumulate_grad_hook(_average_gradient)
        _autocast_forward(accelerator, model)
    return accelerator.prepare(model, optimizer)


def _autocast_forward(accelerator: Any, model: nn.Module) -> None:
    """Autocast within the forward pass and float32 outputs, which accelerate gives to all models
    but those that FSDP2 shards.
    """
    if accelerator.mixed_precision == "no":
        return
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            outputs = inner(*args, **kwargs)
        return convert_to_fp32(outputs)

    model.forward = forward


def _average_gradient(parameter: nn.Parameter) -> None:
    """After each backward pass; averaging an average changes nothing, so accumulation works."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def prepare_unit(
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    full_precision: bool = False,
) -> tuple[Any, Any]:
    """accelerate's `prepare` for a network without the model's blocks: sharded as one unit.

    Args:
        accelerator: of the run.
        model: the network.
        optimizer: its own.
        full_precision: its parameters are not cast where the run casts those of the model.
    """
    if not is_sharded(accelerator):
        return accelerator.prepare(model, optimizer)
    _autocast_forward(accelerator, model)
    plugin = accelerator.state.fsdp_plugin
    names = ["auto_wrap_policy", "ignored_modules"]
    names += ["mixed_precision_policy"] if full_precision else []
    kept = {name: getattr(plugin, name) for name in names}
    for name in names:
        setattr(plugin, name, None)
    prepared = accelerator.prepare(model, optimizer)
    for name, value in kept.items():
        setattr(plugin, name, value)
    return prepared


def unsharded(model: nn.Module, accelerator: Any, empty: Callable[[], nn.Module]) -> nn.Module:
    """The model itself; under FSDP an `empty` one filled with its weights, on every process.

    FSDP's hooks count the forward passes of each process, so one process that looked at pictures
    with the sharded model alone would fall out of step with the others.
    """
    if not is_sharded(accelerator):
        return model
    with torch.random.fork_rng(devices=[]):  # random weights must not move the run's generator
        copy = empty()
    copy.load_state_dict(full_tensors(model.state_dict(), everywhere=True))
    for own, parameter in zip(model.parameters(), copy.parameters()):
        parameter.requires_grad_(own.requires_grad)
    return copy.to(accelerator.device).train(model.training)


# ------------------------------------------------------------------------------------- gradients
def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clip unscaled gradients to the norm `limit`; gives the norm before, over all processes.

    torch's own function takes sharded or full gradients, not both, as a model with scalars has.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in parameters if isinstance(parameter.grad, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, limit).detach()
    full = [parameter for parameter in parameters if not isinstance(parameter.grad, DTensor)]
    norms = [
        full_scalar(nn.utils.get_total_norm([parameter.grad for parameter in group]))
        for group in (sharded, full)
        if group
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    mesh = sharded[0].grad.device_mesh
    nn.utils.clip_grads_with_norm_(sharded, limit, DTensor.from_local(total, mesh))
    nn.utils.clip_grads_with_norm_(full, limit, total)
    return total.detach()


def full_scalar(value: Tensor) -> Tensor:
    """A scalar that may be a DTensor (a norm over sharded tensors) as a plain one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


# ------------------------------------------------------------------------------------- states
def full_tensors(tree: Any, everywhere: bool = False) -> Any:
    """Nested dicts and lists with every sharded tensor as a full one on the CPU.

    All processes call it together. Only the first one gets them (the others None), unless
    `everywhere`.
    """
    if isinstance(tree, DTensor):
        full = tree.detach().full_tensor()
        return full.cpu() if everywhere or dist.get_rank() == 0 else None
    if isinstance(tree, dict):
        return {key: full_tensors(value, everywhere) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [full_tensors(value, everywhere) for value in tree]
    return tree


def shard_like(own: Mapping[str, Any], full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`full` tensors, the same on every process, each sharded as the one of its name in `own`."""
    return {name: shard(value, own.get(name)) for name, value in full.items()}


def shard(value: Tensor, reference: Any) -> Tensor:
    """`value` sharded as `reference` is; as it is where that is full or of another shape."""
    if not isinstance(reference, DTensor) or value.shape != reference.shape:
        return value
    return distribute_tensor(
        value.to(reference.device),
        reference.device_mesh,
        reference.placements,
        src_data_rank=None,  # every process has the full tensor: nothing is sent
    )
