"""Sums over processes. Without a process group every function returns its input."""

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that speaks and writes."""
    return world_size() == 1 or dist.get_rank() == 0


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum of `tensor` over all processes, on its own device."""
    if world_size() == 1:
        return tensor
    on_backend = tensor.cuda() if dist.get_backend() == "nccl" else tensor.cpu()
    on_backend = on_backend.clone()
    dist.all_reduce(on_backend)
    return on_backend.to(tensor.device)


def all_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(n, ...) of every process -> (sum of n, ...) on the CPU, ranks in order; n may differ."""
    return torch.cat(all_objects(tensor.cpu()))


def all_objects(value) -> list:
    """The picklable `value` of every process, ranks in order."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
