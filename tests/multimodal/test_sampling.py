"""Flow matching in SANA's convention, guidance by hand, and solvers that reach the data."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch import nn

from muse.multimodal.sampling import make_scheduler, sample_latents, sana_loss
from tests.multimodal.parts import SANA, filled


class Field(nn.Module):
    """A stand-in for SANA that predicts `rule(x, captions, level)` and notes how it was called."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.calls = rule, []
        self.config, self.dtype = SimpleNamespace(timestep_scale=1.0), torch.float32

    def forward(self, x, encoder_hidden_states, timestep, return_dict):
        self.calls.append((len(x), timestep.clone(), self.training))
        level = (timestep / 1000).view(-1, 1, 1, 1)
        return (self.rule(x, encoder_hidden_states, level),)


def to_the_caption(x, captions, level):
    """noise - data of the straight path on which x lies, if the data are the caption's number."""
    data = captions.mean((1, 2)).view(-1, 1, 1, 1)
    return (x - data) / level


# ------------------------------------------------------------------------------------------- loss
def test_loss_is_the_squared_error_of_noise_minus_data():
    sana = filled(SanaTransformer2DModel(**SANA))
    latents, noise = torch.randn(2, 2, 8, 2, 2)
    captions, level = torch.randn(2, 4, 24), torch.tensor([0.25, 0.9])
    s = level.view(-1, 1, 1, 1)
    predicted = sana((1 - s) * latents + s * noise, captions, timestep=1000 * level).sample
    expected = ((predicted - (noise - latents)) ** 2).mean((1, 2, 3))
    loss = sana_loss(sana, latents, captions, level, noise)
    torch.testing.assert_close(loss, expected)
    assert loss.shape == (2,)


def test_noisy_latents_are_those_of_diffusers():
    seen = []
    field = Field(lambda x, captions, level: seen.append(x) or x)
    latents, noise = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    scheduler = FlowMatchEulerDiscreteScheduler()
    time = scheduler.timesteps[300:301]
    sana_loss(field, latents, torch.zeros(1, 1, 1), time / 1000, noise)
    torch.testing.assert_close(seen[0], scheduler.scale_noise(latents, time, noise))
    torch.testing.assert_close(field.calls[0][1], time)


def test_levels_are_logit_normal():
    levels = []
    field = Field(lambda x, captions, level: levels.append(level) or x)
    sana_loss(field, torch.zeros(20000, 1, 1, 1), torch.zeros(20000, 1, 1))
    logits = levels[0].flatten().logit()
    assert logits.mean().abs() < 0.03
    assert (logits.std() - 1).abs() < 0.03


def test_loss_is_zero_for_a_network_that_knows():
    field = Field(to_the_caption)
    latents = torch.full((3, 2, 2, 2), 0.7)
    loss = sana_loss(field, latents, torch.full((3, 1, 4), 0.7))
    torch.testing.assert_close(loss, torch.zeros(3), rtol=0, atol=1e-8)


def test_loss_names_shapes_that_clash():
    field = Field(to_the_caption)
    latents, captions = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 1)
    with pytest.raises(ValueError, match=r"captions must have shape \(2, 1, 1\).* got \(3, 1, 1\)"):
        sana_loss(field, latents, torch.zeros(3, 1, 1))
    with pytest.raises(ValueError, match=r"level must have shape \(2,\)"):
        sana_loss(field, latents, captions, level=torch.zeros(3))
    with pytest.raises(ValueError, match="noise must have shape"):
        sana_loss(field, latents, captions, noise=torch.zeros(2, 2, 2, 2))


# --------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("solver", ["dpm", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 20, 400])
def test_the_last_step_reaches_no_noise(solver, steps):
    scheduler = make_scheduler(solver, steps, flow_shift=3.0)
    levels = scheduler.sigmas
    assert len(levels) == steps + 1
    assert levels[-1] == 0
    assert (levels[:-1] > levels[1:]).all()
    assert levels[0] > 0.99
    # The step before the end is a real one: SD3's shift of 1/steps (Euler), and no .001 remains.
    assert levels[-2] >= (3 / steps) / (1 + 2 / steps) - 2e-3


@pytest.mark.parametrize("solver", ["dpm", "euler"])
@pytest.mark.parametrize("steps", [1, 3, 20, 400])
def test_a_network_that_knows_is_followed_to_the_data(solver, steps):
    field = Field(to_the_caption)
    captions = torch.tensor([-0.5, 2.0]).view(2, 1, 1)
    noise = torch.randn(2, 3, 2, 2)
    out = sample_latents(
        field, noise, captions, steps=steps, guidance_scale=1.0, solver=solver, flow_shift=3.0
    )
    torch.testing.assert_close(out, captions.view(2, 1, 1, 1).expand_as(out), rtol=0, atol=2e-5)
    assert len(field.calls) == steps


def test_one_euler_step_by_hand_with_guidance():
    """Level 1 to 0 in one step: x - (u + scale * (v - u))."""
    field = Field(lambda x, captions, level: x * captions.mean((1, 2)).view(-1, 1, 1, 1))
    noise = torch.randn(2, 3, 2, 2)
    captions, empty = torch.full((2, 1, 4), 0.5), torch.full((2, 1, 4), 0.2)
    out = sample_latents(
        field, noise, captions, empty, steps=1, guidance_scale=4.5, solver="euler", flow_shift=1.0
    )
    u, v = 0.2 * noise, 0.5 * noise
    torch.testing.assert_close(out, noise - (u + 4.5 * (v - u)))
    assert field.calls[0][0] == 4  # with and without text in one call


@pytest.mark.parametrize("solver", ["dpm", "euler"])
def test_the_scale_of_guidance_is_used(solver):
    """Data of the text 1, without 0: the guided velocity leads to exactly `scale`."""
    captions, empty = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    for scale in (0.0, 1.0, 2.0, 4.5):
        field = Field(to_the_caption)
        out = sample_latents(
            field, torch.randn(1, 1, 2, 2), captions, empty,
            steps=8, guidance_scale=scale, solver=solver,
        )  # fmt: skip
        torch.testing.assert_close(out, torch.full_like(out, scale), rtol=0, atol=2e-5)
        assert field.calls[0][0] == (1 if scale == 1.0 else 2)


def test_sana_is_told_the_levels_of_the_solver():
    field = Field(to_the_caption)
    sample_latents(field, torch.randn(1, 1, 1, 1), torch.ones(1, 1, 1), steps=4, guidance_scale=1)
    told = torch.stack([time[0] for _, time, _ in field.calls])
    grid = torch.linspace(0.999, 0, 5)[:-1]  # diffusers' DPM-Solver starts at .999
    torch.testing.assert_close(told, 1000 * 3 * grid / (1 + 2 * grid), rtol=1e-5, atol=1e-3)


def test_the_network_is_in_eval_mode_meanwhile():
    field = Field(to_the_caption).train()
    sample_latents(field, torch.randn(1, 1, 1, 1), torch.ones(1, 1, 1), steps=1, guidance_scale=1)
    assert not field.calls[0][2]
    assert field.training


def test_sampling_names_what_is_missing():
    field = Field(to_the_caption)
    noise, captions = torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1)
    with pytest.raises(ValueError, match=r"guidance needs .* \(2, 1, 1\), got None"):
        sample_latents(field, noise, captions)
    with pytest.raises(ValueError, match="2 samples of noise, but 1 captions"):
        sample_latents(field, noise, captions[:1], guidance_scale=1.0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        sample_latents(field, noise, captions, steps=0, guidance_scale=1.0)
    with pytest.raises(ValueError, match="solver must be dpm or euler, got 'heun'"):
        sample_latents(field, noise, captions, solver="heun", guidance_scale=1.0)
