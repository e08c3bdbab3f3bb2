"""Semantic injection L_ITC: the pooled semantic stream against the caption's embedding.

Symmetric InfoNCE over the global batch. The release contrasts within one rank's batch; here the
embeddings of all ranks are gathered with their gradients (`gather`). Equal captions of a batch are
positives of each other, not negatives.

Shapes: L blocks, B images, E joint width of images and text.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.losses.term import Needs, Term
from muse.losses.topology import select_blocks
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.teachers.build import shared_text_teacher
from muse.utils.distributed import world_size


class _AllGather(torch.autograd.Function):
    """Concatenates over ranks; backward sums every rank's gradient of this rank's part."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        ctx.count = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.narrow(0, dist.get_rank() * ctx.count, ctx.count)


def gather_batch(local: Tensor) -> Tensor:
    """(B,...) of this rank -> (world*B,...) of all ranks, in rank order, with gradient.

    Every rank must hold the same shape; one process gets its input back. Each rank then computes
    the same global loss; the backward pass sums over ranks and DistributedDataParallel averages,
    which together give the gradient of the global loss.
    """
    return _AllGather.apply(local) if world_size() > 1 else local


def caption_positives(
    captions: Sequence[str], gather: bool = True, device: torch.device | str = "cpu"
) -> Tensor:
    """Which captions are equal, boolean (B,B); B counts those of all ranks with `gather`.

    Args:
        captions: B strings.
        gather: compare with the captions of all ranks.
        device: where the answer shall be.
    """
    # Ranks exchange numbers, not strings: 64 bits of each caption's hash.
    digests = [hashlib.sha256(caption.encode()).digest()[:8] for caption in captions]
    ids = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])  # (B,)
    if torch.device(device).type == "cuda":
        ids = ids.pin_memory()  # from pageable memory the copy would wait for the device
    ids = ids.to(device, non_blocking=True)
    if gather:
        ids = gather_batch(ids)
    return ids[:, None] == ids[None, :]


def itc_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    positives: Tensor | None = None,
    gather: bool = True,
) -> Tensor:
    """Symmetric InfoNCE, averaged over blocks; a float32 scalar.

    Args:
        image_embeds: (L,B,E) or (B,E), L2-normalised.
        text_embeds: (B,E), L2-normalised. No gradient reaches it.
        logit_scale: the factor itself (exp taken).
        positives: boolean, from `caption_positives` with the same `gather`; each row spreads its
            target evenly over its positives. None: row i belongs to column i alone.
        gather: contrast over the batches of all ranks.

    Raises ValueError when shapes do not fit.
    """
    if image_embeds.ndim == 2:
        image_embeds = image_embeds[None]  # (1,B,E)
    _check_pair(image_embeds, text_embeds)
    with torch.autocast(image_embeds.device.type, enabled=False):
        images = image_embeds.float().transpose(0, 1)  # (B,L,E)
        texts = text_embeds.detach().float()  # (B,E)
        if gather:
            images, texts = gather_batch(images), gather_batch(texts)  # B is now of all ranks
        count = texts.shape[0]
        if positives is None:
            targets = torch.eye(count, device=texts.device)  # (B,B)
        elif positives.shape == (count, count):
            targets = positives.to(texts)
        else:
            raise ValueError(f"positives {tuple(positives.shape)} do not fit a batch of {count}")
        logits = logit_scale.float() * torch.einsum("ile,je->lij", images, texts)  # (L,B,B)
        image_to_text = _soft_cross_entropy(logits, targets)
        text_to_image = _soft_cross_entropy(logits.transpose(1, 2), targets.T)
        return (image_to_text + text_to_image) / 2


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the rows of logits (L,B,B) of the cross entropy with targets (B,B).

    Each row of the targets is scaled to sum 1.
    """
    targets = targets / targets.sum(dim=1, keepdim=True)
    return -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def passive_distillation_loss(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """The ablation's alternative to contrast: mean of 1 - cosine of each image and its caption.

    image_embeds (L,B,E) or (B,E), text_embeds (B,E); a float32 scalar. No negatives, no
    temperature; no gradient reaches the text.
    """
    _check_pair(image_embeds, text_embeds)
    texts = text_embeds.detach().float().expand_as(image_embeds)  # (L,B,E)
    return (1 - F.cosine_similarity(image_embeds.float(), texts, dim=-1)).mean()


def _check_pair(image_embeds: Tensor, text_embeds: Tensor) -> None:
    if (
        image_embeds.ndim not in (2, 3)
        or text_embeds.ndim != 2
        or image_embeds.shape[-2:] != text_embeds.shape
    ):
        raise ValueError(
            f"image embeddings {tuple(image_embeds.shape)} do not fit text embeddings "
            f"{tuple(text_embeds.shape)}: (L,B,E) or (B,E) against (B,E) was expected"
        )


class ITCTerm(Term):
    """Semantics: each block's mean S through the one projector, against its caption's embedding."""

    name, needs = "itc", Needs(semantics=True)

    def __init__(
        self, weight: float, teacher: nn.Module, blocks: str, gather: bool, objective: str
    ):
        super().__init__(weight)
        self.teacher, self.blocks, self.gather, self.objective = teacher, blocks, gather, objective

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.teacher(batch["text"], batch.get("tokens")).to(out.image_embeds.device)  # (B,E)
        images = select_blocks(out.image_embeds, self.blocks)  # (L,B,E)
        if self.objective == "distillation":
            # The scale has no part in a regression. Times zero, its gradient is still defined, and
            # DistributedDataParallel does not wait for it.
            return passive_distillation_loss(images, text) + 0 * out.logit_scale, {}
        positives = caption_positives(batch["text"], self.gather, images.device)
        loss = itc_loss(images, text, out.logit_scale, positives, self.gather)
        return loss, {"logit_scale": out.logit_scale.detach()}


def build_itc_term(cfg: DictConfig, student: MUSE_ViT, pretrained: bool = True) -> ITCTerm:
    """The term of `losses.itc` with the teacher of `teacher.text`."""
    section, teacher = cfg.losses.itc, shared_text_teacher(cfg, pretrained)
    return ITCTerm(section.weight, teacher, section.blocks, section.gather, section.objective)
