"""Sums over processes; with no process group every function returns what one process gives."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join_processes(device: str, timeout: timedelta | None = None) -> str:
    """Join the process group that a launcher (torchrun, accelerate) has prepared, if any.

    Gives the device of this process: of several GPUs its own. `timeout` is how long a collective
    waits for the slowest process; None is torch's (10 minutes of nccl, 30 of gloo).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timeout)
    return device


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """This process's place, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """True in the one process that logs and writes."""
    return process_index() == 0


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum of `tensor` over all processes, on its own device; the input stays."""
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


def leave_processes() -> bool:
    """Leave the process group; True in the process that goes on to write results."""
    if not dist.is_initialized():
        return True
    main = is_main_process()
    dist.barrier()
    dist.destroy_process_group()
    return main
