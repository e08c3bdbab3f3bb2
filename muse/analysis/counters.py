"""Counters for a piece of a training step: operations, and bytes kept for the backward pass."""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _convolution_backward(
    grad_out: tuple,
    x: tuple,
    weight: tuple,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: tuple[bool, ...],
    out_shape: Any = None,
    **_: Any,
) -> int:
    """Each gradient costs one forward pass.

    torch's own formula counts the weight's gradient of a grouped convolution `groups` times.
    """
    places = math.prod((x if transposed else grad_out)[2:])
    return 2 * x[0] * places * math.prod(weight) * (bool(mask[0]) + bool(mask[1]))


def _attention(
    query: tuple, key: tuple, value: tuple, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: tuple, query: tuple, key: tuple, value: tuple, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


class FlopCounter(FlopCounterMode):
    """torch's counter, silent; grouped convolutions count once, a CPU's fused attention counts."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        super().__init__(
            display=False,
            custom_mapping={
                aten.convolution_backward: _convolution_backward,
                aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            },
        )

    def by_module(self) -> dict[str, int]:
        """Operations of every module that ran, by its path from the outermost one's class."""
        return {path: sum(ops.values()) for path, ops in self.get_flop_counts().items()}


class SavedTensors:
    """Within the block: bytes that autograd keeps for the backward pass, by distinct storages.

    The parameters and buffers of `modules` are left out.
    """

    def __init__(self, *modules: nn.Module | None):
        self._own = {
            tensor.untyped_storage()._cdata
            for module in modules
            if module is not None
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._kept: dict[int, tuple[StorageWeakRef, int]] = {}
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._kept[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return tensor

    def bytes(self) -> int:
        """Of the storages that are still held."""
        return sum(size for storage, size in self._kept.values() if not storage.expired())

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
