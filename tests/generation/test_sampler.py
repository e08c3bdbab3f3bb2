"""The sampler: golden samples, a flow known in closed form, guidance by hand, noise by index."""

import pytest
import torch

from muse.generation import noise_for, sample, time_grid

MEAN, STD = 0.7, 1.6
LABELS = torch.tensor([1, 0, 2])


def gaussian_flow(x, t, labels):
    """The exact velocity between N(0, 1) and N(MEAN, STD²); it takes x to MEAN + STD * x."""
    t = t.view(-1, 1, 1, 1)
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


class Field:
    """Channel c moves by 1 + 10 k + c for class k, by -c for "no class" (3); batches are noted."""

    num_classes = 3

    def __init__(self, extra: float = 0.0):
        self.extra, self.batches, self.times = extra, [], []

    def __call__(self, x, t, labels):
        self.batches.append(labels.tolist())
        self.times.append(t[0].item())
        channel = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)
        own = 1 + 10 * labels.view(-1, 1, 1, 1) + channel
        value = torch.where(labels.view(-1, 1, 1, 1) == 3, -channel, own) + self.extra
        return value.expand_as(x).to(x.dtype)


def run(field=None, **options):
    field = field or Field()
    x = torch.zeros(3, 2, 1, 1, dtype=torch.float64)
    return sample(field, x, LABELS, **{"steps": 4, **options})[:, :, 0, 0], field


OWN = torch.tensor([[11.0, 12], [1, 2], [21, 22]], dtype=torch.float64)  # of LABELS, by channel
NOTHING = torch.tensor([[0.0, -1]], dtype=torch.float64)


@pytest.mark.parametrize(
    "name, options",
    [
        ("sample_plain", {}),
        ("sample_shift", {"shift": 0.3}),
        (
            "sample_cfg3_interval",
            {"shift": 0.3, "cfg_scale": 3.0, "cfg_interval": (0.3, 1.0), "cfg_channels": 3},
        ),
    ],
)
def test_samples_are_the_published_ones(net, golden, name, options):
    ours = sample(net, golden["noise"], golden["y"], steps=8, **options)
    assert (ours - golden[name]).abs().max() / golden[name].abs().max() < 1e-5


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_order_of_the_error(method, order, shift):
    """Twice the steps: half of Euler's error, a quarter of Heun's."""
    noise = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.int64)
    errors = []
    for steps in (64, 128, 256):
        out = sample(gaussian_flow, noise, labels, steps, shift, method=method)
        errors.append((out - (MEAN + STD * noise)).abs().max().item())
    assert errors[-1] < 0.05
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_grid_has_its_closed_form_and_reaches_both_ends():
    for shift in (0.075, 0.3, 1.0, 3.33):
        grid = time_grid(250, shift)
        assert (len(grid), grid[0], grid[-1]) == (251, 0.0, 1.0)
        for i, t in enumerate(grid):
            assert t == pytest.approx(shift * (i / 250) / (1 + (shift - 1) * i / 250), abs=1e-14)
    assert time_grid(10)[3] == 0.3  # so that an interval's ends mean what they say
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        time_grid(0)


def test_without_guidance_each_image_is_seen_once_a_step():
    out, field = run(cfg_scale=1.0)
    assert torch.allclose(out, OWN)
    assert field.batches == [LABELS.tolist()] * 4 and field.times == [0, 0.25, 0.5, 0.75]


def test_guidance_by_hand():
    out, field = run(cfg_scale=2.5)
    assert torch.allclose(out, NOTHING + 2.5 * (OWN - NOTHING))
    assert field.batches == [[1, 0, 2, 3, 3, 3]] * 4
    assert torch.allclose(run(cfg_scale=0.0)[0], NOTHING.expand(3, 2))


def test_guidance_on_the_first_channels_by_hand():
    out, _ = run(cfg_scale=3.0, cfg_channels=1)
    guided = NOTHING + 3 * (OWN - NOTHING)
    assert torch.allclose(out, torch.stack([guided[:, 0], OWN[:, 1]], 1))
    assert torch.allclose(run(cfg_scale=3.0, cfg_channels=2)[0], guided)


@pytest.mark.parametrize(
    "interval, steps", [((0.25, 0.75), [1, 2]), ((0.0, 0.25), [0]), ((0.3, 1.0), [2, 3])]
)
def test_guidance_acts_from_its_low_end_to_below_its_high_end(interval, steps):
    out, field = run(cfg_scale=3.0, cfg_interval=interval)
    guided = NOTHING + 3 * (OWN - NOTHING)
    share = len(steps) / 4
    assert torch.allclose(out, share * guided + (1 - share) * OWN)
    assert [len(batch) for batch in field.batches] == [6 if i in steps else 3 for i in range(4)]


def test_both_halves_of_a_heun_step_are_guided_alike():
    out, field = run(cfg_scale=3.0, cfg_interval=(0.5, 1.0), method="heun")
    assert [len(batch) for batch in field.batches] == [3, 3, 3, 3, 6, 6, 6, 6]
    assert field.times == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0]
    assert torch.allclose(out, 0.5 * OWN + 0.5 * (NOTHING + 3 * (OWN - NOTHING)))


def test_autoguidance_moves_away_from_the_second_network():
    net, guide = Field(), Field(extra=-2.0)
    out, _ = run(net, guide=guide, cfg_scale=1.5)
    assert torch.allclose(out, OWN + 0.5 * 2)  # (own - 2) + 1.5 * 2
    assert net.batches == guide.batches == [LABELS.tolist()] * 4
    _, net = run(guide=guide, cfg_scale=1.0)
    assert len(net.batches) == 4 and len(guide.batches) == 4  # not asked again


def test_no_label_is_dropped_and_modes_come_back(make_net, golden):
    net = make_net(class_dropout_prob=0.9).train()
    net.blocks[1].eval()
    out = sample(net, golden["noise"], golden["y"], steps=8)
    assert (out - golden["sample_plain"]).abs().max() < 1e-4
    assert net.training and net.blocks[0].training and not net.blocks[1].training


def test_state_is_float32_at_least(net, golden):
    out = sample(net, golden["noise"].bfloat16(), golden["y"], steps=1)
    assert out.dtype == torch.float32 and not out.requires_grad
    noise = golden["noise"].bfloat16().float()
    with torch.no_grad():
        assert torch.allclose(out, noise + net(noise, torch.zeros(5), golden["y"]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"noise": torch.zeros(3, 2, 1)}, r"noise must be .*\(3, 2, 1\)"),
        ({"labels": torch.tensor([0, 1])}, r"labels must have shape \(3,\).*\(2,\)"),
        ({"labels": torch.tensor([0, 1, 4])}, "label 4: labels are 0 to 2, and 3"),
        ({"cfg_channels": 3}, "cfg_channels must be 1 to 2, got 3"),
        ({"cfg_channels": 0}, "cfg_channels must be 1 to 2, got 0"),
        ({"cfg_interval": (0.5, 0.2)}, r"cfg_interval .*\(0.5, 0.2\)"),
        ({"method": "dopri5"}, "method must be one of euler, heun, got 'dopri5'"),
        ({"steps": 0}, "steps"),
        ({"shift": -1.0}, "shift must be above 0, got -1"),
        ({"net": gaussian_flow, "cfg_scale": 2.0}, "num_classes"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"net": Field(), "noise": torch.zeros(3, 2, 1, 1), "labels": LABELS}
    with pytest.raises(ValueError, match=message):
        sample(**{**arguments, **change})


def test_noise_depends_on_seed_and_index_alone():
    shape = (4, 3, 3)
    together = noise_for(7, range(10), shape)
    assert together.shape == (10, *shape) and together.dtype == torch.float32
    torch.manual_seed(1)
    parts = [noise_for(7, indices, shape) for indices in ([0, 1, 2], [3], [4, 5, 6, 7, 8, 9])]
    assert torch.equal(torch.cat(parts), together)
    assert torch.equal(noise_for(7, [9, 2], shape), together[[9, 2]])
    assert noise_for(7, [], shape).shape == (0, *shape)


def test_noise_of_other_seeds_and_far_indices_is_other_noise():
    """A torch generator would take 5 and 5 + 2**32 for one seed."""
    rows = [
        noise_for(seed, [index], (64,))[0]
        for seed in (0, 5, 5 + 2**32)
        for index in (0, 5, 5 + 2**32)
    ]
    assert len({tuple(row.tolist()) for row in rows}) == 9
    with pytest.raises(ValueError, match="got 0 and -1"):
        noise_for(0, [-1], (1,))


def test_noise_is_standard_normal_and_independent():
    rows = noise_for(0, range(2000), (32,)).double()
    assert abs(rows.mean().item()) < 4 / 64000**0.5
    assert abs(rows.var().item() - 1) < 4 * (2 / 64000) ** 0.5
    neighbours = (rows[:-1] * rows[1:]).mean().item()
    assert abs(neighbours) < 4 / 64000**0.5
