"""Flow matching with SANA: its loss, and the way from noise to latents with guidance.

SANA's convention (diffusers): noise level s from 0 (data) to 1 (noise), the network is told
1000 * s, and it predicts noise - data.

    x_s = (1 - s) * data + s * noise          dx/ds = noise - data

muse/generation/flow.py counts the same path from the noise: t = 1 - s.
"""

from typing import Any

import torch
from torch import Tensor, nn

from muse.generation.flow import path_point, path_velocity, sample_times
from muse.generation.sampler import evaluating

TIMESTEPS = 1000  # what SANA is told for noise level 1


def predict_noise(generator: nn.Module, x: Tensor, captions: Tensor, level: Tensor) -> Tensor:
    """noise - data (B, C, h, w), float32, as SANA sees it in x at the noise levels (B,)."""
    told = level.to(x.device) * TIMESTEPS * generator.config.timestep_scale
    dtype = generator.dtype
    return generator(
        x.to(dtype),
        encoder_hidden_states=captions.to(dtype),
        timestep=told,
        return_dict=False,
    )[0].float()


def sana_loss(
    generator: nn.Module,
    latents: Tensor,
    captions: Tensor,
    level: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Mean squared error of noise - data, of each sample (B,).

    Args:
        generator: SANA.
        latents: data (B, C, h, w), normalised (`LatentScale`).
        captions: (B, T, caption_channels).
        level: noise levels (B,) in [0, 1]; None draws them logit-normal(0, 1), which is the same
            law from either end of the path.
        noise: (B, C, h, w) of unit variance; drawn when None.

    Raises:
        ValueError: tensors whose shapes do not belong together.
    """
    if level is None:
        level = sample_times(len(latents), device=latents.device)
    if noise is None:
        noise = torch.randn_like(latents)
    for name, value, shape in (
        ("captions", captions, (len(latents), *captions.shape[1:])),
        ("level", level, latents.shape[:1]),
        ("noise", noise, latents.shape),
    ):
        if value.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)} for latents {tuple(latents.shape)}, "
                f"got {tuple(value.shape)}"
            )
    predicted = predict_noise(generator, path_point(latents, noise, 1 - level), captions, level)
    target = -path_velocity(latents, noise).float()
    return (predicted - target).square().flatten(1).mean(1)


@torch.no_grad()
def sample_latents(
    generator: nn.Module,
    noise: Tensor,
    captions: Tensor,
    empty: Tensor | None = None,
    *,
    steps: int = 20,
    guidance_scale: float = 4.5,
    solver: str = "dpm",
    flow_shift: float = 3.0,
) -> Tensor:
    """Normalised latents (B, C, h, w), float32, from standard normal noise.

    Guidance (Ho, arXiv 2207.12598) moves the prediction away from that without text:
    u + guidance_scale * (v - u). At 1 there is none, and SANA sees each sample once a step.

    Args:
        generator: SANA; it is in eval mode meanwhile.
        noise: (B, C, h, w).
        captions: (B, T, caption_channels).
        empty: captions of the same prompts without their text; needed unless guidance_scale is 1.
        steps: of the solver; the last one ends at noise level 0.
        guidance_scale: see above.
        solver: "dpm" (multistep DPM-Solver++ of second order) or "euler".
        flow_shift: moves the noise levels towards the noise: a*s / (1 + (a - 1)*s).
    """
    if len(captions) != len(noise):
        raise ValueError(f"{len(noise)} samples of noise, but {len(captions)} captions")
    guided = guidance_scale != 1.0
    if guided and (empty is None or empty.shape != captions.shape):
        seen = None if empty is None else tuple(empty.shape)
        raise ValueError(
            f"guidance needs captions without text of shape {tuple(captions.shape)}, got {seen}"
        )
    both = torch.cat([captions, empty]) if guided else captions  # (2B, T, C)
    scheduler = make_scheduler(solver, steps, flow_shift)
    x = noise.float()
    with evaluating(generator):
        for time, level in zip(scheduler.timesteps, scheduler.sigmas):  # levels: one more, the 0
            levels = level.expand(len(both))
            v = predict_noise(generator, torch.cat([x, x]) if guided else x, both, levels)
            if guided:
                v, u = v.chunk(2)
                v = u + guidance_scale * (v - u)
            x = scheduler.step(v, time, x, return_dict=False)[0]
    return x


def make_scheduler(solver: str, steps: int, flow_shift: float) -> Any:
    """One of diffusers' schedulers, ready for `steps` steps whose last ends at noise level 0."""
    from diffusers import (  # noqa: PLC0415 (slow to import)
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    )

    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if solver == "dpm":
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        )
        scheduler.set_timesteps(steps)
    elif solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
        # Levels of our own: the default grid spends its last step between .001 and 0.
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        raise ValueError(f"solver must be dpm or euler, got {solver!r}")
    # Many steps give several the same whole-numbered time; we walk by index instead.
    scheduler.set_begin_index(0)
    return scheduler
