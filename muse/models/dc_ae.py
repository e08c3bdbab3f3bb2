"""DC-AE, the student's decoder: the decoder half of diffusers' `AutoencoderDC`, latent to pixels.

Its source is a hub id, a local directory, or `random` (no network). Where `config` is given, it
alone fixes the architecture and the source gives only weights, so a checkpoint loads without its
sources.
"""

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn

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


def build_decoder(
    source: str, config: dict[str, Any], load_weights: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """The decoder, whose output is nominal [-1, 1], and the fields of `AutoencoderDC` that made it.

    Args:
        source: hub id, local directory of an `AutoencoderDC`, or `random`.
        config: fields of `AutoencoderDC`; empty for those of the source.
        load_weights: read the source's weights; False leaves them random.
    """
    directory = None
    if source != "random" and (load_weights or not config):
        directory = locate(source)
    fields = _all_fields(config, directory)
    decoder = _make(fields)
    if directory and load_weights:
        load_into(decoder, _decoder_tensors(directory, decoder), source, "model.decoder")
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
    from diffusers.models.autoencoders.autoencoder_dc import Decoder, ResBlock  # noqa: PLC0415

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
