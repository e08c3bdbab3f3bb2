"""The running mean against its closed form."""

import pytest
import torch
from torch import nn

from muse.models.ema_model import EMAModel


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[1].requires_grad_(False)
    return model


@pytest.mark.parametrize("decay", [0.999, 0.5, 0.15])
def test_mean_is_the_weighted_sum_of_all_values(decay):
    model = small()
    weight = model[0].weight
    values = [weight.detach().clone().double()]
    ema = EMAModel(model, decay)
    for _ in range(7):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        ema.update()
        values.append(weight.detach().clone().double())
    # Unrolled: value t enters with (1 - d_t) and is shrunk by every decay after it; the first value
    # by all of them.
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(1, 8)]
    shares = [
        torch.tensor(decays).double()[t:].prod() * (1 if t == 0 else 1 - decays[t - 1])
        for t in range(8)
    ]
    assert abs(sum(shares) - 1) < 1e-6
    expected = sum(share * value for share, value in zip(shares, values))
    assert torch.allclose(ema.state_dict()["0.weight"].double(), expected, atol=1e-5)
    assert ema.step == 7


def test_only_trainable_tensors_are_averaged_in_float32():
    model = small().to(torch.bfloat16)
    ema = EMAModel(model)
    assert list(ema.state_dict()) == ["0.weight", "0.bias"]
    assert all(mean.dtype == torch.float32 for mean in ema.state_dict().values())
    ema.update()
    with ema.swapped_in():
        assert model[0].weight.dtype == torch.bfloat16


def test_swapping_in_and_out_even_through_an_error():
    model = small()
    ema = EMAModel(model, 0.5)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update()
    own = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError), ema.swapped_in():
        # decay at the first step: min(.5, 2/11)
        assert torch.allclose(model[0].weight, before + 9 / 11, atol=1e-6)
        raise RuntimeError
    assert torch.equal(model[0].weight, own)


def test_state_goes_out_and_in():
    model = small()
    ema = EMAModel(model, 0.9)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update()
    other = EMAModel(small(), 0.9)
    other.load_state_dict({name: mean.clone() for name, mean in ema.state_dict().items()}, ema.step)
    assert other.step == 1 and all(
        torch.equal(other.state_dict()[name], mean) for name, mean in ema.state_dict().items()
    )
    with pytest.raises(KeyError, match="not those that this stage trains"):
        other.load_state_dict({"0.weight": torch.zeros(2, 3)}, 1)
