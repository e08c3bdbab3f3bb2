import numpy as np
import pytest
import torch

from muse.losses.reconstruction import pixel_loss


@pytest.mark.parametrize("kind, power", [("l1", 1), ("l2", 2)])
def test_mean_over_all_elements(kind, power):
    a, b = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5, 4)
    expected = np.mean(np.abs(a.double().numpy() - b.double().numpy()) ** power)
    assert pixel_loss(a, b, kind).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_reaches_the_reconstruction_alone_and_in_float32():
    a = torch.rand(1, 3, 4, 4).bfloat16().requires_grad_()
    b = torch.rand(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(a, b)
    loss.backward()
    assert loss.dtype == torch.float32 and b.grad is None
    torch.testing.assert_close(a.grad, (2 * (a.float() - b) / 48).detach().bfloat16())


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="'l3'"):
        pixel_loss(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), "l3")
    with pytest.raises(ValueError, match="differ in shape"):
        pixel_loss(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 1))
