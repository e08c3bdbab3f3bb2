"""A saved model in memory once, in 32, 16 or 8 bits: nothing is drawn at random and then replaced.

The model is built on the meta device, where tensors have no bytes. `float32` maps the file itself;
`bf16` and `int8` read one tensor at a time and keep it smaller, so that no more than one is
there in float32. In `int8` every matrix and kernel is rounded to 255 steps for each output channel
and made float32 again when its layer runs: less memory and not less time. What each costs in PSNR
is in docs/performance.md.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.errors import CheckpointError, ConfigError
from muse.utils.memory import return_freed_memory
from muse.utils.weights import TensorFiles, load_into, read_state_dict

PRECISIONS = ("float32", "bf16", "int8")
LAYERS = (nn.Linear, nn.Conv2d)
STEPS = 127  # of an int8 to each side of zero
TRIM_EVERY = 64 * 2**20  # bytes read between two returns of freed memory
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,  # a batch norm's counter
}


# ------------------------------------------------------------------------------------------- layers
class RoundedLayer(nn.Module):
    """A linear layer or convolution whose weights are int8 with one scale an output channel.

    `weight` is made anew in float32 each time it is read.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise ConfigError(f"int8: no convolution with padding_mode={layer.padding_mode}")
        is_conv = isinstance(layer, nn.Conv2d)
        self.conv = (
            {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
            if is_conv
            else None
        )
        rounded, scale = round_weight(layer.weight.detach())
        self.register_buffer("rounded", rounded)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        return self.rounded.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.linear(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, **self.conv)


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 of the same shape, float32 scale that broadcasts): their product is near `weight`.

    The largest of each output channel (first dimension) becomes ±127.
    """
    others = tuple(range(1, weight.ndim))
    scale = weight.float().abs().amax(dim=others, keepdim=True) / STEPS
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (weight.float() / scale).round().to(torch.int8), scale


def lower_precision(model: nn.Module, precision: str) -> nn.Module:
    """Keep the weights of linear layers and convolutions in `precision`, in place; for inference.

    Norms, positions and biases stay in float32 (a bf16 layer's bias goes with it). Raises
    ConfigError for an unknown precision.
    """
    _check(precision)
    if precision == "bf16":
        for layer in model.modules():
            if isinstance(layer, LAYERS):
                layer.to(torch.bfloat16)
    elif precision == "int8":
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, LAYERS):
                    setattr(parent, name, RoundedLayer(layer))
    return model


def computing(model: nn.Module) -> AbstractContextManager:
    """Within it a model of `lower_precision` computes in its precision: autocast for bf16."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    if torch.bfloat16 not in kinds:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


def _check(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r}: one of {', '.join(PRECISIONS)}")


# ------------------------------------------------------------------------------------------ loading
def fill(
    build: Callable[[], nn.Module], files: list[Path], where: Path, precision: str = "float32"
) -> nn.Module:
    """The model that `build` makes, with the tensors of safetensors files, in eval mode.

    Args:
        build: makes the model with random weights; called on the meta device.
        files: a later file's tensors replace those of an earlier one.
        where: the checkpoint, for messages.
        precision: one of `PRECISIONS`.

    Raises:
        CheckpointError: a file is unreadable, or a tensor is missing, unexpected or misshapen.
    """
    _check(precision)
    with torch.device("meta"):
        model = build()
    model.place_statistics()
    if precision == "float32":
        state = {name: t.float() for file in files for name, t in read_state_dict(file).items()}
        load_into(model, state, where, assign=True)
        return model.eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    layers = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
        for part in ("weight", "bias")
    }
    lower_precision(model, precision)
    state, read = {}, 0
    for file in files:
        for name, tensor in _tensors(file):
            if name in shapes and tensor.shape != shapes[name]:
                raise CheckpointError(
                    f"{where} does not hold the weights of the model: {name} has shape "
                    f"{tuple(tensor.shape)}, the model makes it {tuple(shapes[name])}: a "
                    "checkpoint of another size"
                )
            state.update(_converted(name, tensor, name in layers, precision))
            if (read := read + tensor.nbytes) > TRIM_EVERY:
                return_freed_memory()  # what is kept lies between large temporaries
                read = 0
    load_into(model, state, where, assign=True)
    return_freed_memory()
    return model.eval()


def _converted(name: str, tensor: Tensor, of_layer: bool, precision: str) -> dict[str, Tensor]:
    """One tensor as the lowered model holds it."""
    if precision == "int8" and of_layer and name.endswith(".weight"):
        rounded, scale = round_weight(tensor)
        stem = name.removesuffix("weight")
        return {f"{stem}rounded": rounded, f"{stem}scale": scale}
    return {name: tensor.to(torch.bfloat16 if precision == "bf16" and of_layer else torch.float32)}


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, each read on its own.

    The library maps the whole file, and pages that were read count as the process's memory
    until the last tensor is gone.
    """
    names = TensorFiles(file).keys()  # checks the header against the file's length
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
        for name in names:
            entry = header[name]
            start, end = entry["data_offsets"]
            if start == end:
                raise CheckpointError(f"{file}: {name} is empty")
            stream.seek(8 + length + start)
            content = bytearray(stream.read(end - start))
            if len(content) < end - start or entry["dtype"] not in _TYPES:
                raise CheckpointError(f"{file}: {name} cannot be read")
            yield name, torch.frombuffer(content, dtype=_TYPES[entry["dtype"]]).view(entry["shape"])
