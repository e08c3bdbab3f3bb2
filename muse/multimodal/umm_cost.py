"""What a stage of the multimodal model costs: counted without numbers, not measured."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from muse.analysis.counters import FlopCounter
from muse.config import load_config, plain, shipped_config
from muse.errors import ConfigError
from muse.multimodal.language_model import tied
from muse.multimodal.sampling import predict_noise, sana_loss
from muse.multimodal.umm import MUSE_UMM
from muse.multimodal.umm_config import umm_config
from muse.multimodal.umm_stages import UMM_STAGES
from muse.stages import select_trainable

PROMPT_TOKENS = 64  # of an instruction with its turn, beside a picture's and the queries
ANSWER_TOKENS = 16


def umm_cost(
    cfg: DictConfig,
    variant: str = "",
    *,
    gpus: int = 8,
    utilisation: float = 0.4,
    peak: float = 989.0,
    peak_float32: float = 67.0,
) -> dict[str, Any]:
    """Parameters by part, operations of a training sample and of a picture, memory, GPU-hours.

    One multiply-add is two operations; only matrix products, convolutions and attention count, and
    nothing that activation checkpointing computes again.

    Args:
        cfg: of a stage (umm_run_config.py).
        variant: the name of its folder: a tokenizer without a configuration is then that of
            `muse_NAME` for `umm_NAME`.
        gpus: processes, which with its batch give the samples of a step unless
            `training.global_batch_size` does.
        utilisation: share of the peak that is reached.
        peak: 10^12 operations a second and GPU in mixed precision.
        peak_float32: the same in float32.
    """
    training = cfg.training
    config = _complete(cfg, variant)
    with torch.device("meta"):  # initialisers look at numbers, which the other mode does not have
        umm = MUSE_UMM(config, load_sources=False)
    one_tensor = tied(umm.internvl)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a CPU's tensors without numbers
        umm = umm.to_empty(device="cpu").train()
        if one_tensor:
            umm.internvl.lm_head.weight = umm.internvl.get_input_embeddings().weight
        select_trainable(umm, training.trainable or UMM_STAGES[training.stage].trainable)
        walk = _Walk(umm)
        answers = training.stage == "projector"
        flops = {"question": walk.question()} if answers else walk.pictures()
        parts = {name: _count(module) for name, module in umm.named_children() if _count(module)}
        parts["queries"] = umm.queries.numel()
        learns = sum(p.numel() for p in umm.parameters() if p.requires_grad)
        made = None if answers else walk.sampling(cfg.sampling)
    samples = training.max_train_steps * (
        training.global_batch_size
        or training.per_gpu_batch_size * training.gradient_accumulation_steps * gpus
    )
    limit = (peak if training.mixed_precision != "no" else peak_float32) * 1e12 * utilisation * 3600
    dearest = max(flops.values())
    return {
        "stage": training.stage,
        "parameters": sum(parts.values()),
        "parts": parts,
        "trained": learns,
        "flops_training": flops,
        "flops_picture": made,
        "samples": samples,
        "gpu_hours_most": dearest * samples / limit,
        "gpus": gpus,
        "bytes": _bytes(sum(parts.values()), learns, bool(training.ema_decay)),
    }


def _bytes(parameters: int, learns: int, ema: bool) -> dict[str, int]:
    """What one process holds in float32, without activations and unsharded."""
    return {
        "weights": 4 * parameters,
        "gradients": 4 * learns,
        "optimizer": 8 * learns,
        "ema": 4 * learns * ema,
    }


def _complete(cfg: DictConfig, variant: str) -> dict[str, Any]:
    """The section `model` with everything that building without sources needs."""
    section = {**_without_places(cfg), "latent_statistics": None, "text_tokenizer": None}
    if section["latent_factor"] is None:
        section["latent_factor"] = 1.0
    section["gradient_checkpointing"] = False
    if not section["tokenizer"]["config"]:
        if not variant.startswith("umm_"):
            raise ConfigError(
                "the cost needs model.tokenizer.config: the sizes of the tokenizer, whose source "
                "is not read"
            )
        own = shipped_config(f"{variant.replace('umm_', 'muse_', 1)}/stage3.yaml")
        section["tokenizer"] = {"source": "random", "config": plain(load_config(own).model)}
    for part in ("language_model", "generator"):
        if not section[part]["config"]:
            raise ConfigError(f"the cost needs model.{part}.config, whose source is not read")
    return umm_config(section)


def _without_places(cfg: DictConfig) -> dict[str, Any]:
    """The section `model` without the places of weights, whose variables may not be set."""
    model = cfg.model.copy()
    model._set_flag("readonly", False)
    model.latent_statistics = model.text_tokenizer = None
    for part in ("tokenizer", "language_model", "generator"):
        model[part].source = "random"
    return plain(model)


class _Walk:
    """Passes of one sample through a model of tensors without numbers."""

    def __init__(self, umm: MUSE_UMM):
        self.umm = umm
        side = umm.config["image_size"]
        self.image = torch.empty(1, 3, side, side)
        self.width = umm.queries.shape[1]
        self.places = umm._picture_side() ** 2
        self.latents = (1, umm.tokenizer.config.latent_dim, *[side // umm.tokenizer.cell] * 2)

    def pictures(self) -> dict[str, int]:
        """Operations of a training sample, by kind."""
        return {kind: self._training(kind == "edit") for kind in ("image", "edit")}

    def question(self) -> int:
        """Operations of a training sample of questions."""
        umm = self.umm
        with FlopCounter() as counter:
            prompt = torch.empty(1, PROMPT_TOKENS + ANSWER_TOKENS, self.width)
            rows = torch.cat([umm.read_pictures(self.image), prompt], 1)
            hidden = self._hidden(rows)[:, -ANSWER_TOKENS:]
            umm.internvl.lm_head(hidden).float().mean().backward()
        return counter.get_total_flops()

    def sampling(self, options: Any) -> int:
        """Operations of one picture from text."""
        umm = self.umm
        with FlopCounter() as before, torch.no_grad():
            captions = self._captions(edit=False)
        with FlopCounter() as step, torch.no_grad():
            predict_noise(umm.generator, torch.empty(self.latents), captions, torch.empty(1))
        with FlopCounter() as after, torch.no_grad():
            umm.tokenizer.decode(torch.empty(self.latents), size=tuple(self.image.shape[-2:]))
        passes = 2 if options.guidance_scale != 1 else 1
        steps = step.get_total_flops() * options.steps
        return passes * (before.get_total_flops() + steps) + after.get_total_flops()

    def _training(self, edit: bool) -> int:
        umm = self.umm
        with FlopCounter() as counter:
            with torch.no_grad():
                umm.tokenizer.encode(self.image)
            captions = self._captions(edit)
            loss = sana_loss(
                umm.generator,
                torch.empty(self.latents),
                captions,
                torch.empty(1),
                torch.empty(self.latents),
            )
            loss.mean().backward()
        umm.zero_grad()
        return counter.get_total_flops()

    def _captions(self, edit: bool) -> Tensor:
        """As `MUSE_UMM.captions`, on embeddings in place of a prompt's."""
        umm, count = self.umm, len(self.umm.queries)
        rows = [torch.empty(1, PROMPT_TOKENS, self.width)]
        pictures = umm.read_pictures(self.image) if edit else None
        if edit:
            rows.append(pictures)
        hidden = self._hidden(torch.cat([*rows, umm.queries[None]], 1))
        x = hidden[:, -count:]
        if edit:
            outputs = hidden[:, PROMPT_TOKENS : PROMPT_TOKENS + self.places]
            x = torch.cat([*umm._source_tokens(self.image, pictures, outputs), x], 1)
        x = umm.connector(x)
        return umm.to_caption(x[:, -count:] if umm.config["generator_reads"] == "queries" else x)

    def _hidden(self, rows: Tensor) -> Tensor:
        language_model = self.umm.internvl.model.language_model
        return language_model(inputs_embeds=rows, use_cache=False).last_hidden_state


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def umm_cost_text(name: str | Path, cost: dict[str, Any]) -> str:
    """The numbers in lines for a terminal."""
    parts = ", ".join(f"{part} {count:,}" for part, count in cost["parts"].items())
    flops = ", ".join(f"{k} {v / 1e9:,.1f}" for k, v in cost["flops_training"].items())
    hours = cost["gpu_hours_most"]
    lines = [
        f"{name}: {cost['parameters']:,} parameters, {cost['trained']:,} of them trained",
        f"  {parts}",
        f"  GFLOPs of a training sample: {flops}",
    ]
    if cost["flops_picture"] is not None:
        lines.append(f"  GFLOPs of a picture from text: {cost['flops_picture'] / 1e9:,.1f}")
    lines.append(
        f"  {cost['samples'] / 1e6:,.2f} million samples: at most {hours:,.0f} GPU-hours, "
        f"{hours / cost['gpus']:,.1f} hours on {cost['gpus']}"
    )
    kept = ", ".join(f"{what} {size / 2**30:.1f}" for what, size in cost["bytes"].items())
    return "\n".join([*lines, f"  GiB of one process, unsharded, without activations: {kept}"])
