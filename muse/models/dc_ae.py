"""DC-AE, the student's decoder: the decoder half of diffusers' `AutoencoderDC`, latent to pixels.

Its source is a hub id, a local directory, or `random` (no network). Where `config` is given, it
alone fixes the architecture and the source gives only weights, so a checkpoint loads without its
sources.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muse.errors import ConfigError
from muse.models.dc_blocks import DCDecoder, ResBlock
from muse.utils.weights import TensorFiles, load_into, locate, read_config, refuse_unknown

# The fields of diffusers' `AutoencoderDC` and what they are where a configuration leaves them out.
# The encoder's are kept, so that a saved configuration stays one of `AutoencoderDC`.
FIELDS: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}
_BY_STAGE = (
    "decoder_block_types",
    "decoder_layers_per_block",
    "decoder_qkv_multiscales",
    "decoder_norm_types",
    "decoder_act_fns",
)


# ----------------------------------------------------------------------------------------- building
def build_decoder(
    source: str, config: dict[str, Any], load_weights: bool = True, recompute: bool = False
) -> tuple[DCDecoder, dict[str, Any]]:
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
    if directory and not config:
        given = {name: value for name, value in read_config(directory).items() if name in FIELDS}
    else:
        given = config
    refuse_unknown(given, list(FIELDS), "model.decoder.config")
    return {**FIELDS, **given}


def _make(fields: dict[str, Any]) -> DCDecoder:
    """The decoder with random weights; `ConfigError` where the fields do not fit together."""
    _check_stages(fields)
    try:
        decoder = DCDecoder(fields)
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
    """Lists by stage must be equally long: the shortest would be built silently."""
    stages = len(fields["decoder_block_out_channels"])
    for name in _BY_STAGE:
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
class RecomputedSequence(nn.Sequential):
    """Modules in a row; in training each keeps its input alone and is computed again backwards."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            if self.training and torch.is_grad_enabled():
                x = checkpoint(module, x, use_reentrant=False)
            else:
                x = module(x)
        return x
