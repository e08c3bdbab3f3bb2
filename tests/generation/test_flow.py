"""Path, times and loss: golden values, distributions, and the loss that the best network has."""

import math

import pytest
import torch

from muse.generation import flow_loss, sample_times, shift_time
from muse.generation.flow import path_point, path_velocity


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def logit(t: float) -> float:
    return math.log(t / (1 - t))


def test_path_and_target_are_the_published_ones(golden):
    x_t = path_point(golden["x"], golden["noise"], golden["t"])
    assert torch.allclose(x_t, golden["x_t"], atol=1e-6)
    assert torch.allclose(path_velocity(golden["x"], golden["noise"]), golden["target"], atol=1e-6)


def test_losses_are_the_published_ones(net, golden):
    loss = flow_loss(net, golden["x"], golden["y"], golden["t"], golden["noise"])
    assert torch.allclose(loss.velocity, golden["loss_velocity"], rtol=1e-5)
    assert torch.allclose(loss.cosine, golden["loss_cosine"], rtol=1e-5)


def test_losses_by_hand():
    """Target (3, 4) everywhere. Answers: the same, twice it, its opposite, a right angle."""
    latents = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(4, 2, 3, 5)
    answers = torch.tensor([[3.0, 4.0], [6.0, 8.0], [-3.0, -4.0], [-4.0, 3.0]]).view(4, 2, 1, 1)
    loss = flow_loss(
        lambda x, t, y: answers.expand_as(x),
        latents,
        torch.zeros(4, dtype=torch.int64),
        noise=torch.zeros(4, 2, 3, 5),
    )
    assert torch.allclose(loss.velocity, torch.tensor([0.0, 12.5, 50.0, 25.0]))
    assert torch.allclose(loss.cosine, torch.tensor([0.0, 0.0, 2.0, 1.0]), atol=1e-6)


def test_first_gradient_of_a_zero_velocity_is_bounded():
    """Every new network says zero, where the cosine has no direction."""
    velocity = torch.zeros(1, 2, 1, 1, requires_grad=True)
    latents, labels = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.zeros(1, dtype=torch.int64)
    loss = flow_loss(lambda x, t, y: velocity, latents, labels, noise=torch.zeros(1, 2, 1, 1))
    assert loss.cosine.item() == 1
    loss.cosine.sum().backward()
    # d(1 - v·u / (max(|v|, 1e-3) |u|)) / dv = -u / |u| / 1e-3
    assert torch.allclose(velocity.grad.flatten(), torch.tensor([-600.0, -800.0]))


def test_loss_of_the_best_velocity_is_its_conditional_variance():
    """Data N(m, s²), noise N(0, 1): x_t and the velocity are jointly normal, so all is known."""
    mean, s, t = 0.7, 1.6, 0.3
    variance = t**2 * s**2 + (1 - t) ** 2
    slope = (t * s**2 - (1 - t)) / variance

    def best(x, times, labels):
        return mean + slope * (x - t * mean)

    generator = torch.Generator().manual_seed(1)
    data = mean + s * torch.randn(64, 16, 16, 16, generator=generator)
    loss = flow_loss(
        best, data, torch.zeros(64), t=torch.full((64,), t), generator=generator
    ).velocity.mean()
    expected = s**2 + 1 - slope**2 * variance
    deviation = expected * math.sqrt(2 / data.numel())  # of a mean of squared normals
    assert abs(loss.item() - expected) < 4 * deviation


def test_draws_depend_on_the_generator_alone(net, golden):
    def losses(seed):
        generator = torch.Generator().manual_seed(seed)
        return flow_loss(net, golden["x"], golden["y"], generator=generator).velocity

    first = losses(5)
    torch.manual_seed(99)
    assert torch.equal(losses(5), first) and not torch.equal(losses(6), first)


@pytest.mark.parametrize("mean, std, shift", [(0, 1, 1), (-0.75, 1, 1), (0, 1, 0.3), (0.4, 0.6, 2)])
def test_times_are_logit_normal(mean, std, shift):
    """P(t < q) = Φ((logit q - mean - ln shift) / std)."""
    count = 20000
    generator = torch.Generator().manual_seed(0)
    times = sample_times(count, mean, std, shift, generator)
    assert times.shape == (count,) and 0 < times.min() and times.max() < 1
    for q in (0.1, 0.35, 0.5, 0.8):
        p = normal_cdf((logit(q) - mean - math.log(shift)) / std)
        share = (times < q).float().mean().item()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count), q


def test_shift_has_its_closed_form():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for s in (0.3, 1.0, 3.0):
        assert torch.allclose(shift_time(t, s), s * t / (1 + (s - 1) * t))
        assert (shift_time(0.0, s), shift_time(1.0, s)) == (0.0, 1.0)
    # In Stable Diffusion 3's time, 1 - t, the shift is the reciprocal.
    assert torch.allclose(1 - shift_time(1 - t, 1 / 3), shift_time(t, 3.0))
    with pytest.raises(ValueError, match="shift must be above 0, got 0"):
        shift_time(t, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents": torch.zeros(5, 8, 4)}, r"latents must be .*\(5, 8, 4\)"),
        ({"latents": torch.zeros(5, 8, 4, 4, dtype=torch.uint8)}, "uint8"),
        ({"labels": torch.zeros(4)}, r"labels must have shape \(5,\).*\(4,\)"),
        ({"t": torch.zeros(5, 1)}, r"t must have shape \(5,\).*\(5, 1\)"),
        ({"noise": torch.zeros(5, 8, 4, 5)}, r"noise must have shape .*\(5, 8, 4, 5\)"),
    ],
)
def test_wrong_shapes_are_named(net, golden, change, message):
    with pytest.raises(ValueError, match=message):
        flow_loss(net, **{**{"latents": golden["x"], "labels": golden["y"]}, **change})
