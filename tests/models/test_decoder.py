"""The decoder's own pieces against diffusers' modules: norms that keep the type, memory, layout."""

import inspect

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import Decoder
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from torch import nn

from muse.analysis.counters import SavedTensors
from muse.errors import ConfigError
from muse.models import tiling
from muse.models.dc_ae import FIELDS, build_decoder
from muse.models.muse_vit import MUSE_ViT
from muse.models.norms import SameTypeRMSNorm
from muse.models.tiling import decode_tiled
from tests.helpers import DECODER, MIXED_DECODER, merged, random_images


def norms(channels: int) -> tuple[nn.Module, nn.Module]:
    """diffusers' norm and ours with the same random weights."""
    theirs = DiffusersRMSNorm(channels, 1e-5, elementwise_affine=True, bias=True)
    nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    copies = (nn.Parameter(p.detach().clone()) for p in (theirs.weight, theirs.bias))
    return theirs, SameTypeRMSNorm(*copies, theirs.eps)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [7, 128])
def test_the_norm_gives_the_bits_of_diffusers_in_float32_gradients_included(channels, layout):
    torch.manual_seed(0)
    pair, found = norms(channels), []
    x = torch.randn(3, channels, 9, 11).to(memory_format=layout)
    gradient = torch.randn_like(x)
    for norm in pair:
        own = x.clone().requires_grad_()
        out = norm(own.movedim(1, -1)).movedim(-1, 1)
        out.backward(gradient)
        found.append((out.detach(), own.grad, norm.weight.grad, norm.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_norm_keeps_bfloat16_and_is_as_near_as_its_digits_allow():
    torch.manual_seed(0)
    theirs, ours = norms(64)
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    exact = theirs(x.detach().float())
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), exact, rtol=2**-7, atol=2**-7)
    reference = x.detach().float().requires_grad_()
    theirs(reference).sum().backward()
    out.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert torch.allclose(x.grad.float(), reference.grad, rtol=2**-6, atol=2**-6)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, rtol=2**-6, atol=2**-4)


def test_the_norm_keeps_its_input_and_one_number_a_place():
    _, norm = norms(64)
    x = torch.randn(10, 64, requires_grad=True)
    with SavedTensors(norm) as saved:
        out = norm(x)
    assert saved.bytes() == 4 * (10 * 64 + 10)
    del out


@pytest.mark.parametrize("fields", [DECODER, MIXED_DECODER], ids=["residual", "mixed"])
def test_the_decoder_equals_diffusers_with_the_same_names(fields):
    torch.manual_seed(0)
    decoder, all_fields = build_decoder("random", fields)
    for name, parameter in decoder.named_parameters():  # new residual branches rest at zero
        if "norm" in name:
            nn.init.normal_(parameter)
    whole = AutoencoderDC(**all_fields).decoder
    whole.load_state_dict(decoder.state_dict())
    latent = torch.randn(2, 8, 3, 4)
    images = [network(latent) for network in (decoder, whole)]
    assert torch.equal(*images)
    for image in images:
        image.square().mean().backward()
    ours, theirs = (dict(network.named_parameters()) for network in (decoder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in ours)


@pytest.mark.parametrize("fields", [DECODER, MIXED_DECODER], ids=["residual", "mixed"])
def test_under_autocast_every_activation_of_the_decoder_is_bfloat16(fields):
    decoder, _ = build_decoder("random", fields)
    types = {}
    for name, module in decoder.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: types.update({name: output.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        decoder(torch.randn(1, 8, 3, 4).bfloat16())  # as the student's latent is
    # Linear attention alone divides in float32, within itself.
    types = {name: kind for name, kind in types.items() if not name.endswith("attn.nonlinearity")}
    assert len(types) > 10 and set(types.values()) == {torch.bfloat16}, types


@pytest.mark.parametrize("fields", [DECODER, MIXED_DECODER], ids=["residual", "mixed"])
def test_a_recomputed_decoder_has_the_same_names_outputs_and_gradients(fields):
    torch.manual_seed(0)
    plain, _ = build_decoder("random", fields)
    light, _ = build_decoder("random", merged(fields), recompute=True)
    light.load_state_dict(plain.state_dict())
    latent, found, kept = torch.randn(2, 8, 3, 4), [], []
    for decoder in (plain.train(), light.train()):
        with SavedTensors(decoder) as saved:
            image = decoder(latent)
        kept.append(saved.bytes())
        image.square().mean().backward()
        found.append([image.detach(), *(p.grad for p in decoder.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and kept[1] < 0.8 * kept[0]
    with torch.no_grad():
        assert torch.equal(light(latent), plain(latent))


def test_the_fields_are_those_of_diffusers_with_its_defaults():
    parameters = inspect.signature(AutoencoderDC.__init__).parameters
    assert {n: p.default for n, p in parameters.items() if n != "self"} == FIELDS


BATCH_NORM = {
    "decoder_norm_types": ["batch_norm", "rms_norm", "batch_norm"],
    "decoder_act_fns": ["relu", "mish", "gelu"],
    "decoder_layers_per_block": [0, 1, 1],
    "upsample_block_type": "pixel_shuffle",
    "decoder_in_shortcut": False,
}


@pytest.mark.parametrize("fields", [MIXED_DECODER, merged(MIXED_DECODER, BATCH_NORM)])
def test_random_weights_are_drawn_as_diffusers_draws_them(fields):
    torch.manual_seed(0)
    decoder, all_fields = build_decoder("random", fields)
    torch.manual_seed(0)
    theirs = Decoder(
        **{
            argument: all_fields[name]
            for argument, name in {
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
            }.items()
        }
    )
    ours, others = decoder.state_dict(), theirs.state_dict()
    assert list(ours) == list(others)  # and in the same order
    drawn = [name for name in ours if "norm" not in name]
    assert drawn and all(torch.equal(ours[name], others[name]) for name in drawn)
    with torch.no_grad():
        for network in (decoder, theirs):
            for name, parameter in network.named_parameters():
                if "norm" in name:
                    parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    latent = torch.randn(2, 8, 3, 4)
    assert torch.equal(decoder(latent), theirs(latent))
    assert torch.equal(decoder(latent[..., :1, :2]), theirs(latent[..., :1, :2]))  # few places


@pytest.mark.parametrize(
    "wrong",
    [
        {"decoder_norm_types": "layer_norm"},
        {"decoder_act_fns": "none"},
        {"decoder_block_types": "Residual"},
        {"upsample_block_type": "deconvolution"},
    ],
)
def test_what_the_decoder_does_not_have_is_refused(wrong):
    with pytest.raises(ConfigError, match="does not make an AutoencoderDC decoder"):
        build_decoder("random", DECODER | wrong)


# --------------------------------------------------------------------------------------- in tiles
LARGE_LATENT = (11, 14)


def awake(fields) -> nn.Module:
    """A random decoder whose residual branches do something."""
    torch.manual_seed(0)
    decoder, _ = build_decoder("random", fields)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.constant_(parameter, 0.7)
    return decoder.eval()


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """dB, for pixels in [-1, 1]"""
    return float(10 * (4 / (image - reference).square().mean().clamp_min(1e-20)).log10())


# MUSE-1B's decoder with an eighth of its channels and one layer a stage.
SMALL_1B = {
    "latent_channels": 32,
    "attention_head_dim": 32,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_out_channels": [16, 32, 64, 64, 128, 128],
    "decoder_layers_per_block": [1] * 6,
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "interpolate",
}


@pytest.mark.parametrize("tile", [1, 24, 64, 100, 10_000])
@pytest.mark.parametrize(
    "fields", [DECODER, MIXED_DECODER, SMALL_1B, merged(MIXED_DECODER, BATCH_NORM)]
)
def test_tiles_have_no_seams(fields, tile):
    decoder = awake(fields)
    size = LARGE_LATENT if fields is not SMALL_1B else (4, 5)
    latent = torch.randn(1, decoder.conv_in.in_channels, *size)
    if tile == 1 and fields is SMALL_1B:
        tile = 40  # a thousand tiles of one cell would take minutes
    with torch.inference_mode():
        whole, tiled = decoder(latent), decode_tiled(decoder, latent, tile)
    assert tiled.shape == whole.shape and whole.std() > 1e-3
    assert psnr(tiled, whole) > 100
    assert torch.allclose(tiled, whole, atol=1e-4)


def test_a_tile_without_its_surroundings_would_have_seams(monkeypatch):
    """What the test above would see: the reach is needed, and no more than is needed."""
    decoder, latent = awake(DECODER), torch.randn(1, 8, *LARGE_LATENT)
    real, errors = tiling._scale_and_reach, []
    with torch.inference_mode():
        whole = decoder(latent)
        for fewer in (0, 1, 2, 100):
            monkeypatch.setattr(
                tiling,
                "_scale_and_reach",
                lambda *words, fewer=fewer: (real(*words)[0], max(0, real(*words)[1] - fewer)),
            )
            errors.append(float((decode_tiled(decoder, latent, 16) - whole).abs().max()))
    assert errors[0] < 1e-5 and errors[-1] > 1e-3 and errors[-1] > errors[2]


def test_the_packaged_model_reconstructs_in_tiles():
    model, images = MUSE_ViT.from_pretrained("muse_tiny"), random_images(1, 120, 72)
    with torch.inference_mode():
        whole, tiled = model.reconstruct(images), model.reconstruct(images, tile=32)
    assert tiled.shape == images.shape and psnr(2 * tiled, 2 * whole) > 100


def test_no_feature_map_of_a_tile_grows_with_the_picture():
    decoder, places = awake(DECODER), []
    for stage in decoder.up_blocks:
        for module in stage:
            module.register_forward_hook(lambda m, given, out: places.append(out[0, 0].numel()))
    largest = []
    for size in (32, 64):
        places.clear()
        with torch.inference_mode():
            decode_tiled(decoder, torch.randn(1, 8, size, size), 16)
        largest.append(max(places))
    assert largest[0] == largest[1] <= (4 * 32) ** 2 / 4


def test_a_tile_is_at_least_a_pixel():
    with pytest.raises(ValueError, match="at least 1 pixel, got -4"):
        decode_tiled(awake(DECODER), torch.randn(1, 8, 2, 2), -4)
