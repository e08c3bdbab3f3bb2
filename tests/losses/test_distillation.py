import numpy as np
import pytest
import torch
import torch.nn.functional as F

from muse.losses.distillation import FeatureDistillation, PixelHead


def test_cosine_against_numpy():
    loss = FeatureDistillation(4, 6)
    tokens, features = torch.randn(2, 4, 3, 5), torch.randn(2, 6, 3, 5)
    weight, bias = loss.head.weight[:, :, 0, 0].detach().numpy(), loss.head.bias.detach().numpy()
    projected = np.einsum("oc,bchw->bohw", weight, tokens.numpy()) + bias[None, :, None, None]
    cosine = (projected * features.numpy()).sum(1) / (
        np.linalg.norm(projected, axis=1) * np.linalg.norm(features.numpy(), axis=1)
    )
    assert loss(tokens, features).item() == pytest.approx(np.mean(1 - cosine), rel=1e-5)


def test_zero_for_a_linear_image_of_the_tokens_at_any_length():
    loss = FeatureDistillation(4, 6)
    tokens = torch.randn(2, 4, 3, 5)
    assert loss(tokens, 7.0 * loss.head(tokens)).item() == pytest.approx(0, abs=1e-6)
    assert loss(tokens, -loss.head(tokens)).item() == pytest.approx(2, abs=1e-5)


def test_features_are_resized_to_the_students_grid():
    """A teacher map that is constant over halves keeps its halves on a coarser, non-square grid."""
    loss = FeatureDistillation(2, 2)
    with torch.no_grad():
        loss.head.weight.copy_(torch.eye(2)[:, :, None, None])
        loss.head.bias.zero_()
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    features = torch.stack([left] * 6 + [right] * 6, dim=1)[None, :, None].expand(1, 2, 8, 12)
    tokens = torch.stack([left, right], dim=1)[None, :, None].expand(1, 2, 4, 2)
    assert loss(tokens, features).item() < 0.02
    assert loss(tokens.flip(-1), features).item() > 0.8


def test_pixel_head_reads_patches_in_place():
    images = torch.rand(2, 3, 8, 12)
    tokens = F.pixel_unshuffle(images, 4)
    head = PixelHead(48, 4)
    with torch.no_grad():
        head.head.weight.copy_(torch.eye(48)[:, :, None, None])
        head.head.bias.zero_()
    assert head(tokens, images).item() == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(head.predict(tokens), images)
    assert head(tokens, 1 - images).item() == pytest.approx(
        (2 * images - 1).square().mean().item(), rel=1e-4
    )
    with pytest.raises(ValueError, match="pixel head"):
        head(tokens, images[..., :8])


def test_gradients_and_float32_under_autocast():
    tokens = torch.randn(1, 4, 2, 2, requires_grad=True)
    features, images = (
        torch.randn(1, 6, 4, 4, requires_grad=True),
        torch.rand(1, 3, 8, 8, requires_grad=True),
    )
    distil, pixels = FeatureDistillation(4, 6), PixelHead(4, 4)
    plain = distil(tokens, features) + pixels(tokens, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = distil(tokens, features) + pixels(tokens, images)
    assert cast.dtype == torch.float32 and cast.item() == plain.item()
    cast.backward()
    assert features.grad is None and images.grad is None and tokens.grad.abs().max() > 0
    assert all(p.grad is not None for module in (distil, pixels) for p in module.parameters())
