"""DC-AE, the student's decoder: the decoder half of diffusers' `AutoencoderDC`, latent to pixels.

Its source is a hub id, a local directory, or `random` (no network). Where `config` is given, it
alone fixes the architecture and the source gives only weights, so a checkpoint loads without its
sources.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from muse.errors import ConfigError
from muse.utils.weights import TensorFiles, load_into, locate, read_config, refuse_unknown

# What diffusers' `Decoder` calls its arguments, and the field of `AutoencoderDC` that each one is.
_ARGUMENTS = {
    "in_channels": "in_channels",
    "latent_channels": "latent_channels",
    "attention_head_dim": "attention_head_dim",
    "block_type": "decoder_block_types",
    "block_out_channels": "decoder_block_out_channels",
    "layers_per_block": "decoder_layers_per_block",
    "qkv_multiscales": "decoder_qkv_multiscales",
    "norm_type": "decoder_norm_types",
    "act_fn": "decoder_act_fns",
    "upsample_block_type": "upsample_block_type",
    "in_shortcut": "decoder_in_shortcut",
    "conv_act_fn": "decoder_conv_act_fn",
}
_BY_STAGE = ("block_type", "layers_per_block", "qkv_multiscales", "norm_type", "act_fn")


# ----------------------------------------------------------------------------------------- building
def build_decoder(
    source: str, config: dict[str, Any], load_weights: bool = True, recompute: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The decoder, whose output is nominal [-1, 1], and the fields of `AutoencoderDC` that made it.

    Args:
        source: hub id, local directory of an `AutoencoderDC`, or `random`.
        config: fields of `AutoencoderDC`; empty for those of the source.
        load_weights: read the source's weights; False leaves them random.
        recompute: each block is computed again in the backward pass instead of being kept.
    """
    directory = None
    if source != "random" and (load_weights or not config):
        directory = locate(source)
    fields = _all_fields(config, directory)
    decoder = _make(fields)
    if directory and load_weights:
        load_into(decoder, _decoder_tensors(directory, decoder), source, "model.decoder")
    if recompute:
        stages = (RecomputedSequence(*stage) for stage in decoder.up_blocks)
        decoder.up_blocks = nn.ModuleList(stages)
    return decoder, fields


def _all_fields(config: dict[str, Any], directory: Path | None) -> dict[str, Any]:
    """Every field of `AutoencoderDC`: the given ones, or the source's, over the defaults."""
    from diffusers import AutoencoderDC  # noqa: PLC0415 (takes seconds to import)

    parameters = inspect.signature(AutoencoderDC.__init__).parameters
    known = [name for name in parameters if name != "self"]
    if directory and not config:
        given = {name: value for name, value in read_config(directory).items() if name in known}
    else:
        given = config
    refuse_unknown(given, known, "model.decoder.config")
    return {name: given.get(name, parameters[name].default) for name in known}


def _make(fields: dict[str, Any]) -> nn.Module:
    """The decoder with random weights; `ConfigError` where the fields do not fit together."""
    from diffusers.models.autoencoders.autoencoder_dc import (  # noqa: PLC0415
        Decoder,
        ResBlock,
        RMSNorm,
    )

    _check_stages(fields)
    try:
        decoder = Decoder(**{argument: fields[name] for argument, name in _ARGUMENTS.items()})
    except (TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"model.decoder.config does not make an AutoencoderDC decoder: {error}"
        ) from None
    # Every residual branch starts at zero: a new decoder only unfolds channels into space, and is
    # two dB ahead after a thousand pictures (docs/demo.md). Pretrained weights overwrite it.
    for module in decoder.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.norm.weight)
    for parent in list(decoder.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, RMSNorm):
                setattr(parent, name, SameTypeRMSNorm(module.weight, module.bias, module.eps))
    return decoder


def _check_stages(fields: dict[str, Any]) -> None:
    """Lists by stage must be equally long: diffusers would silently build the shortest."""
    stages = len(fields["decoder_block_out_channels"])
    for argument in _BY_STAGE:
        name = _ARGUMENTS[argument]
        value = fields[name]
        if isinstance(value, (list, tuple)) and len(value) != stages:
            raise ConfigError(
                f"model.decoder.config.{name} has {len(value)} entries, but "
                f"decoder_block_out_channels makes {stages} stages"
            )


def _decoder_tensors(directory: Path, decoder: nn.Module) -> dict[str, Tensor]:
    """The decoder's tensors in float32 out of an autoencoder, whose encoder half is not read."""
    files, prefix = TensorFiles(directory), "decoder."
    expected, held = decoder.state_dict().keys(), set(files.keys())
    return {name: files[prefix + name].float() for name in expected if prefix + name in held}


# ------------------------------------------------------------------------------------------- pieces
class SameTypeRMSNorm(nn.Module):
    """diffusers' RMSNorm (x / rms(x) * weight + bias over the last dimension) in x's own type.

    Under autocast diffusers' gives float32, since its weights are, and from the first norm on the
    residual stream of the whole decoder is float32: twice the memory and traffic. In float32 both
    give the same bits, gradients included.

    Args:
        weight: (C,).
        bias: (C,), or None.
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype != torch.float32:
            weight = self.weight.to(x.dtype)
            with torch.autocast("cuda", enabled=False):  # one kernel, which sums in float32
                normed = F.rms_norm(x, weight.shape, weight, self.eps)
        else:
            normed = _RMSNorm.apply(x, self.weight.float(), self.eps)
        return normed if self.bias is None else normed + self.bias.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a place; autograd's own keeps x / rms(x) in float32 besides.

    The operations are those of diffusers' module and of its backward pass, in their order.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * inverse)).sum(dim=tuple(range(x.ndim - 1)))
        if ctx.needs_input_grad[0]:
            scaled = grad * weight
            grad_inverse = (scaled * wide).sum(dim=-1, keepdim=True)
            grad_mean = -0.5 * grad_inverse * inverse.pow(3)
            grad_x = scaled * inverse + grad_mean / x.shape[-1] * (2 * wide)
            grad_x = grad_x.to(x.dtype)
        return grad_x, grad_weight, None


class RecomputedSequence(nn.Sequential):
    """Modules in a row; in training each keeps its input alone and is computed again backwards."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            if self.training and torch.is_grad_enabled():
                x = checkpoint(module, x, use_reentrant=False)
            else:
                x = module(x)
        return x
