"""Counters for a piece of a training step: operations, bytes kept for its backward pass, moved."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

OTHER = "other"


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


class MovedBytes(TorchDispatchMode):
    """Within the block: bytes that operations without a FLOP count read and write, as run one by
    one: norms, activations, sums, copies, conversions. Views move nothing.

    Enter it before a `FlopCounter`, which takes composite operations apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._products = set(flop_registry)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in self._products and not _is_view(func):
            name = func.overloadpacket.__name__
            if not name.startswith(("empty", "new_empty", "detach", "alias")):
                given, made = tree_leaves((args, kwargs)), tree_leaves(out)
                self.total += _nbytes(given) + _nbytes(made)
        return out


def _is_view(func: Any) -> bool:
    """Whether an operation gives another look at its input's storage."""
    returned = [one.alias_info for one in func._schema.returns]
    return "view" in func.name() or any(one is not None and not one.is_write for one in returned)


def _nbytes(values: Iterable[Any]) -> int:
    return sum(
        value.numel() * value.element_size() for value in values if isinstance(value, Tensor)
    )


class SavedTensors:
    """Within the block: bytes that autograd keeps for the backward pass, by distinct storages.

    The parameters and buffers of `modules` are left out.

    Args:
        modules: networks whose own tensors do not count.
        rows: module -> the row under which `by_row` counts what is kept while it runs (the
            innermost one's; a storage counts where it was kept first).
    """

    def __init__(self, *modules: nn.Module | None, rows: Mapping[nn.Module, str] | None = None):
        self._own = {
            tensor.untyped_storage()._cdata
            for module in modules
            if module is not None
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._rows = rows or {}
        self._inside = [OTHER]
        self._kept: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._handles: list[RemovableHandle] = []

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        known = self._kept.get(storage._cdata)
        if storage._cdata not in self._own and (known is None or known[0].expired()):
            entry = (StorageWeakRef(storage), storage.nbytes(), self._inside[-1])
            self._kept[storage._cdata] = entry
        return tensor

    def bytes(self) -> int:
        """Of the storages that are still held."""
        return sum(size for storage, size, _ in self._kept.values() if not storage.expired())

    def by_row(self) -> dict[str, int]:
        """The same by row, `other` for what was kept outside of all."""
        rows = dict.fromkeys([*self._rows.values(), OTHER], 0)
        for storage, size, row in self._kept.values():
            rows[row] += 0 if storage.expired() else size
        return rows

    def __enter__(self) -> Self:
        for module, row in self._rows.items():
            self._handles += [
                module.register_forward_pre_hook(lambda *_, row=row: self._inside.append(row)),
                module.register_forward_hook(lambda *_: self._inside.pop() and None),
            ]
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
