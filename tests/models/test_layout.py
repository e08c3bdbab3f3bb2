"""Channels last: on a GPU alone, and with the same numbers for every network that gets it."""

import pytest
import torch

from muse.losses.perceptual_parts import ConvNeXtDistance, LPIPSDistance
from muse.models.layers import convolution_layout
from tests.helpers import MIXED_DECODER, random_images, tiny_model


def last(images):
    return images.contiguous(memory_format=torch.channels_last)


def test_a_cpu_keeps_the_layout():
    images = random_images(2, 32, 32)
    assert convolution_layout(images) is images


def test_the_decoder_gives_the_same_and_hands_the_layout_on(monkeypatch):
    latent = torch.randn(2, 8, 3, 4)
    model = tiny_model(decoder={"config": MIXED_DECODER})
    inputs = []
    model.decoder.conv_out.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        plain = model.decode(latent)
        monkeypatch.setattr("muse.models.muse_vit.convolution_layout", last)
        other = model.decode(latent)
    assert torch.allclose(plain, other, atol=1e-5)
    assert inputs[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("part", [LPIPSDistance, ConvNeXtDistance])
def test_perceptual_networks_give_the_same(part, monkeypatch):
    torch.manual_seed(0)
    network = part(pretrained=False)
    images, target = random_images(2, 64, 64), random_images(2, 64, 64, seed=2)
    found = []
    for layout in (lambda images: images, last):
        monkeypatch.setattr("muse.losses.perceptual_parts.convolution_layout", layout)
        given = images.clone().requires_grad_()
        distance = network(given, target)
        distance.sum().backward()
        found.append((distance, given.grad))
    for plain, other in zip(*found):
        assert torch.allclose(plain, other, rtol=1e-4, atol=1e-7)
