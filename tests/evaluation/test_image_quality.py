"""PSNR, SSIM and LPIPS against scikit-image and the lpips package, on photographs."""

from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from muse.evaluation.metrics.lpips import LPIPS_NETS, Lpips
from muse.evaluation.metrics.psnr_ssim import check_pair, psnr, ssim


@pytest.fixture(scope="module")
def pairs():
    photos = [
        data.astronaut(),
        data.coffee()[:400, :400],
        data.chelsea()[:300, :300],
        np.full((64, 64, 3), 100, np.uint8),
    ]
    real = torch.cat(
        [
            F.interpolate(
                torch.from_numpy(p.copy()).permute(2, 0, 1)[None] / 255, (96, 80), mode="area"
            )
            for p in photos
        ]
    )
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([0.02, 0.05, 0.1, 0.2]).view(4, 1, 1, 1)
    return real, (F.avg_pool2d(real, 3, 1, 1) + strength * noise).clamp(0, 1)


def each(function, real, fake, **options):
    arrays = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()) for a, b in zip(real, fake)]
    return np.array([function(a, b, data_range=1, **options) for a, b in arrays])


def test_psnr_is_scikit_images(pairs):
    np.testing.assert_allclose(psnr(*pairs), each(peak_signal_noise_ratio, *pairs), rtol=1e-6)
    assert torch.isinf(psnr(pairs[0], pairs[0])).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_ssim_is_scikit_images(pairs, dtype, tolerance):
    real, fake = (images.to(dtype) for images in pairs)
    reference = each(
        structural_similarity,
        real.double(),
        fake.double(),
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    np.testing.assert_allclose(ssim(real, fake), reference, atol=tolerance)


def test_ssim_needs_a_whole_window():
    with pytest.raises(ValueError, match="11×11"):
        ssim(torch.rand(1, 3, 10, 40), torch.rand(1, 3, 10, 40))


def test_range_and_nan_are_refused():
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"\[0, 1\].*255"):
        check_pair(images, images.clone().index_fill_(0, torch.tensor([0]), 255.0))
    with pytest.raises(ValueError, match="nan"):
        check_pair(torch.full_like(images, torch.nan), images)
    with pytest.raises(ValueError, match="shape"):
        check_pair(images, images[..., :8])


@pytest.mark.parametrize("net", ["squeeze", "alex", "vgg"])
def test_lpips_is_the_packages(net, pairs, tmp_path):
    """The package's own heads on a random backbone, which both get."""
    torch.manual_seed(0)
    backbone = getattr(torchvision.models, LPIPS_NETS[net])(weights=None)
    torch.save(backbone.state_dict(), tmp_path / f"{net}.pth")
    ours = Lpips(net, tmp_path / f"{net}.pth")
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    file = Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth"
    heads = torch.load(file, weights_only=True, map_location="cpu")
    for index, head in enumerate(theirs.lins):
        assert torch.equal(head.model[1].weight, heads[f"lin{index}.model.1.weight"])
    for name, own in theirs.net.named_parameters():
        own.data.copy_(backbone.get_parameter("features." + name.split(".", 1)[1]))
    with torch.no_grad():
        want = theirs(2 * pairs[0] - 1, 2 * pairs[1] - 1).flatten()
    torch.testing.assert_close(ours(*pairs), want)
    assert float(want.min()) > 0
