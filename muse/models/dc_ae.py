"""The decoder half of diffusers' `AutoencoderDC` (DC-AE): latent in, pixels out."""

from typing import Any

from torch import nn

from muse.errors import ConfigError
from muse.models.internvit import _load_strict, _refuse_unknown
from muse.utils.weights import TensorFiles, locate, read_config


def build_decoder(
    source: str, config: dict[str, Any], load_weights: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """The decoder half of diffusers' `AutoencoderDC` and the fields that made it; output nominal [-1, 1].

    source: hub id, local directory of an `AutoencoderDC`, or `random`; config: fields of `AutoencoderDC`.
    """
    import inspect

    from diffusers import AutoencoderDC
    from diffusers.models.autoencoders.autoencoder_dc import Decoder

    directory = None
    if source != "random" and (load_weights or not config):
        directory = locate(source, ["config.json", "*.safetensors", "*.safetensors.index.json"])
    known = [
        name for name in inspect.signature(AutoencoderDC.__init__).parameters if name != "self"
    ]
    fields = (
        {name: value for name, value in read_config(directory).items() if name in known}
        if not config and directory is not None
        else dict(config)
    )
    _refuse_unknown(fields, known, "model.decoder.config")
    defaults = inspect.signature(AutoencoderDC.__init__).parameters
    full = {name: fields.get(name, defaults[name].default) for name in known}
    _check_stages(full)
    try:
        decoder = Decoder(
            in_channels=full["in_channels"],
            latent_channels=full["latent_channels"],
            attention_head_dim=full["attention_head_dim"],
            block_type=full["decoder_block_types"],
            block_out_channels=full["decoder_block_out_channels"],
            layers_per_block=full["decoder_layers_per_block"],
            qkv_multiscales=full["decoder_qkv_multiscales"],
            norm_type=full["decoder_norm_types"],
            act_fn=full["decoder_act_fns"],
            upsample_block_type=full["upsample_block_type"],
            in_shortcut=full["decoder_in_shortcut"],
            conv_act_fn=full["decoder_conv_act_fn"],
        )
    except (TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"model.decoder.config does not make an AutoencoderDC decoder: {error}"
        ) from None
    _rest_residuals(decoder)
    if directory is not None and load_weights:
        files = TensorFiles(directory)
        state = {
            name.removeprefix("decoder."): files[name].float()
            for name in files.keys()
            if name.startswith("decoder.")
        }
        _load_strict(decoder, state, source)
    return decoder, full


def _rest_residuals(decoder: nn.Module) -> None:
    """Start every residual branch at zero: a new decoder then unfolds channels into space and learns from there, two dB ahead
    after a thousand pictures (docs/demo.md). Pretrained weights overwrite it."""
    from diffusers.models.autoencoders.autoencoder_dc import ResBlock

    for module in decoder.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.norm.weight)


def _check_stages(fields: dict[str, Any]) -> None:
    """Lists by stage must be equally long: diffusers would silently build the shortest."""
    stages = len(fields["decoder_block_out_channels"])
    for name in (
        "decoder_block_types",
        "decoder_layers_per_block",
        "decoder_qkv_multiscales",
        "decoder_norm_types",
        "decoder_act_fns",
    ):
        value = fields[name]
        if isinstance(value, (list, tuple)) and len(value) != stages:
            raise ConfigError(
                f"model.decoder.config.{name} has {len(value)} entries, but decoder_block_out_channels makes "
                f"{stages} stages"
            )
