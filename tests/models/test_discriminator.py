import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from muse.models.discriminator import BlurDownsample, PatchDiscriminator
from tests.golden.fill import GOLDEN, filled_state_dict


def test_logits_equal_golden():
    """Loading is strict, so this holds the release's state-dict layout too."""
    model = PatchDiscriminator()
    model.load_state_dict(
        filled_state_dict(GOLDEN / "release_discriminator_keys.json", prefix="disc:")
    )
    golden = load_file(GOLDEN / "release_losses.safetensors")
    with torch.no_grad():
        logits = model(golden["disc_input"])
    torch.testing.assert_close(logits, golden["disc_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("height, width", [(6, 6), (7, 4), (5, 9)])
def test_blur_against_loops(height, width):
    x = torch.rand(1, 2, height, width)
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 4), (1, 4)))
    rows, columns = -(-height // 2), -(-width // 2)
    expected = np.array(
        [
            [
                [
                    (padded[0, c, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] * taps).sum()
                    for j in range(columns)
                ]
                for i in range(rows)
            ]
            for c in range(2)
        ]
    )
    np.testing.assert_allclose(BlurDownsample()(x)[0].numpy(), expected, rtol=1e-5)


def test_a_tiny_one_takes_any_size_and_every_weight_learns():
    model = PatchDiscriminator(width=8, stages=2, groups=4, pool=4)
    assert [block[0].out_channels for block in model.blocks] == [8, 16]
    logits = model(torch.rand(2, 3, 40, 33))
    assert logits.shape == (2, 1, 4, 4)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not [name for name in model.state_dict() if "kernel" in name]


def test_bfloat16():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PatchDiscriminator(8, 2, 4, 4)(torch.rand(1, 3, 16, 16)).isfinite().all()
    assert (
        PatchDiscriminator(8, 2, 4, 4)
        .bfloat16()(torch.rand(1, 3, 16, 16).bfloat16())
        .isfinite()
        .all()
    )


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="multiple of groups"):
        PatchDiscriminator(width=20)
