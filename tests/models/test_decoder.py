"""The decoder's own pieces against diffusers' modules: norms that keep the type, memory, layout."""

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from torch import nn

from muse.analysis.counters import SavedTensors
from muse.models.dc_ae import SameTypeRMSNorm, build_decoder
from tests.helpers import DECODER, MIXED_DECODER, merged


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
