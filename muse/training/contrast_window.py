"""Contrast over all micro-batches of an optimizer step (`losses.itc.across_accumulation`).

Gradient caching (Gao et al., 2021): the encoder and the blocks first run over all micro-batches
without a graph, the contrast of all embeddings gives each embedding its gradient, and the usual
pass over each micro-batch hands that gradient on. Memory stays that of one micro-batch; the price
is the first pass. What a pass draws at random (stochastic depth) is drawn again in the second one.
"""

import logging
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.losses.contrastive import WINDOW_SHARE, ITCTerm

log = logging.getLogger(__name__)

RANDOM_STATE = "random_state"  # a batch's entry: the generators before its forward pass


def share_contrast(
    model: nn.Module, micro: list[dict[str, Any]], term: ITCTerm, needs: dict[str, bool]
) -> list[dict[str, Any]]:
    """The micro-batches of a step, each with its share in the contrast over all of them.

    Every process calls it with as many. Nothing is kept between steps.

    Args:
        model: the student as accelerate wraps it.
        micro: the micro-batches, on the device.
        term: the contrast.
        needs: the arguments of the student's forward in the passes that follow; what they ask of
            the blocks decides how attention is computed.
    """
    needs = {**needs, "reconstruction": False}
    embeds, states = [], []
    with torch.no_grad():
        for batch in micro:
            states.append(_random_state(batch["images"].device))
            out = model(batch["images"], **needs)
            embeds.append(term.select(out))  # (L,B,E)
    captions = [batch["text"] for batch in micro]
    shares = term.over_window(embeds, captions, out.logit_scale)
    return [
        {**batch, WINDOW_SHARE: share, RANDOM_STATE: state}
        for batch, share, state in zip(micro, shares, states)
    ]


def draw_again(batch: dict[str, Any]) -> None:
    """Put the generators where they were when `share_contrast` saw this micro-batch, if it did."""
    if RANDOM_STATE in batch:
        own, device_state = batch[RANDOM_STATE]
        torch.set_rng_state(own)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, batch["images"].device)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """torch's generators of the CPU and of a CUDA device; numbers on the host, nothing waits."""
    return torch.get_rng_state(), (
        torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    )


def say_where_negatives_come_from(cfg: DictConfig) -> None:
    """One line where accumulation and contrast do not fit as one may think."""
    itc, training = cfg.losses.itc, cfg.training
    count = training.gradient_accumulation_steps
    if itc.weight == 0 or itc.objective != "nce":
        return
    if count > 1 and not itc.across_accumulation:
        log.warning(
            "training.gradient_accumulation_steps=%d: the contrast takes its negatives from one "
            "micro-batch (%d images a process), not from all of a step; "
            "losses.itc.across_accumulation=true takes them from all",
            count,
            training.per_gpu_batch_size,
        )
    if count == 1 and itc.across_accumulation:
        log.warning(
            "losses.itc.across_accumulation=true changes nothing with "
            "training.gradient_accumulation_steps=1"
        )
