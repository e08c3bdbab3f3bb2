"""FD-DINOv2's network: its input by torchvision, its position embedding by a formula of numpy."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage.data import chelsea, coffee
from torchvision import transforms

from muse.errors import MuseError
from muse.evaluation.metrics.dinov2 import (
    DinoV2,
    hub_position_embedding,
    load_dinov2,
    pillow_resize,
)

SMALL = "vit_small_patch14_dinov2.lvd142m"  # the same code at a fourteenth of the weights


def cubic(x):
    """torch's kernel, a = -3/4."""
    a, x = -0.75, np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def interpolate(axis_length, count, scale):
    """(count, axis_length) weights of four neighbours, at (i + 1/2) / scale - 1/2, edges held."""
    weights = np.zeros((count, axis_length))
    for i in range(count):
        centre = (i + 0.5) / scale - 0.5
        for place in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[i, np.clip(place, 0, axis_length - 1)] += cubic(centre - place)
    return weights


def test_position_embedding_is_the_hubs():
    embedding = torch.randn(1, 1 + 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    weights = interpolate(37, 16, 16.1 / 37)
    maps = embedding[0, 1:].double().numpy().reshape(37, 37, 5)
    want = np.einsum("ia,jb,abc->ijc", weights, weights, maps).reshape(256, 5)
    got = hub_position_embedding(embedding, (37, 37), 16)
    assert got.shape == (1, 257, 5)
    assert torch.equal(got[:, 0], embedding[:, 0])
    np.testing.assert_allclose(got[0, 1:].numpy(), want, atol=1e-5)
    without_offset = interpolate(37, 16, 16 / 37)
    other = np.einsum("ia,jb,abc->ijc", without_offset, without_offset, maps).reshape(256, 5)
    assert np.abs(other - want).max() > 0.1


@pytest.mark.parametrize("picture", [coffee(), chelsea()[:, :300], coffee()[:100, :120]])
def test_its_input_is_dgm_evals(picture):
    theirs = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
        ]
    )(Image.fromarray(picture))
    images = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(pillow_resize(images, 224)[0], theirs, rtol=0, atol=1e-7)


def test_features_are_the_class_token_at_224():
    """By timm's blocks one after the other, with the embedding above."""
    torch.manual_seed(0)
    network = timm.create_model(SMALL).eval()
    assert network.pos_embed.shape == (1, 1 + 37 * 37, 384)
    torch.nn.init.normal_(network.pos_embed, std=0.5)
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):  # new layers scale by 1e-5, which would hide the picture
            torch.nn.init.ones_(parameter)
        elif parameter.ndim > 1 and name.startswith("blocks"):
            parameter.data.mul_(3)
    embedding = hub_position_embedding(network.pos_embed.data, (37, 37), 16)
    wrapped = DinoV2(network)
    images = torch.rand(2, 3, 64, 80)
    with torch.no_grad():
        got = wrapped.pooled(images)
        x = pillow_resize(images, 224)
        x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
            [0.229, 0.224, 0.225]
        )[:, None, None]
        x = torch.nn.functional.conv2d(
            x, network.patch_embed.proj.weight, network.patch_embed.proj.bias, stride=14
        )
        assert x.shape[-2:] == (16, 16)
        tokens = torch.cat((network.cls_token.expand(2, -1, -1), x.flatten(2).transpose(1, 2)), 1)
        tokens = tokens + embedding
        for block in network.blocks:
            tokens = block(tokens)
        want = network.norm(tokens)[:, 0]
    assert got.shape == (2, 384)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 1e-3


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(SMALL).eval()
    torch.save(network.state_dict(), tmp_path / "dinov2.pth")
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        loaded = load_dinov2(tmp_path / "dinov2.pth", SMALL).pooled(images)
        torch.testing.assert_close(loaded, DinoV2(network).pooled(images))


@pytest.mark.parametrize("file", [None, "none.pth", "other.pth"])
def test_missing_weights_are_one_line(tmp_path, file):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(MuseError) as error:
        load_dinov2(file and tmp_path / file, SMALL)
    assert "\n" not in str(error.value)
    assert "dinov2" in str(error.value)
