"""The packaged model itself: its size, its 16 bits, and that it decodes real pictures."""

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from muse import MUSE_ViT
from muse.config import load_config, shipped_config
from muse.models.internvit import build_encoder
from muse.models.loading import load_model, weights_file

NAME, MEGABYTES = "muse_tiny", 12


@pytest.fixture(scope="module")
def model():
    return MUSE_ViT.from_pretrained(NAME)


def photograph(name: str) -> torch.Tensor:
    """A photograph of scikit-image, (1,3,128,128) in [0,1]."""
    data = pytest.importorskip("skimage.data")
    pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(pixels, size=(128, 128), mode="bilinear", antialias=True)


def test_it_is_small_kept_in_16_bits_and_used_in_32(model):
    file = weights_file(NAME)
    assert file.stat().st_size <= MEGABYTES * 10**6
    with safe_open(file, "pt") as tensors:
        assert {tensors.get_tensor(name).dtype.itemsize for name in tensors.keys()} == {2}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert not model.training


def test_it_has_the_size_of_the_demos_configuration(model):
    cfg = load_config(
        shipped_config("muse_tiny/stage3.yaml"),
        ["dataset.params.train_shards_path_or_url=x", "dataset.params.eval_shards_path_or_url=x"],
    )
    again = load_model(NAME, cfg.model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    encoder = build_encoder(NAME, {})
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name])


def test_it_decodes_photographs_that_no_stage_has_seen(model):
    for name in ("astronaut", "chelsea", "coffee"):
        image = photograph(name)
        error = (model.reconstruct(image) - image).square().mean()
        small = F.interpolate(image, size=(8, 8), mode="bilinear", antialias=True)
        shrunk = F.interpolate(small, size=(128, 128), mode="bilinear", align_corners=False)
        assert error < 0.5 * (shrunk - image).square().mean()  # 3 dB better than its 8x8 cells
        assert error < 0.01  # 20 dB
