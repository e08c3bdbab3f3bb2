"""Semantic injection L_ITC: the pooled semantic stream against the caption's embedding.

Symmetric InfoNCE over the global batch. The release contrasts within one rank's batch; here the
embeddings of all ranks are gathered with their gradients (`gather`), and each rank compares its own
rows with all columns. Equal captions of a batch are positives of each other, not negatives.

Shapes: L blocks, B images of this rank, N those contrasted with (of all ranks, or B), E joint width
of images and text.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.losses.term import Needs, Term
from muse.losses.topology import select_blocks
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.teachers.build import shared_text_teacher
from muse.utils.distributed import process_index, world_size

WINDOW_SHARE = "contrast_share"  # a batch's entry where the contrast spans several batches


class WindowShare(NamedTuple):
    """One batch's share in a contrast over several, without graph."""

    loss: Tensor  # scalar: the contrast over all of them
    image_grad: Tensor  # (L,B,E) of its embeddings, times the number of batches
    scale_grad: Tensor  # scalar


class _GivenGradient(torch.autograd.Function):
    """The loss of a `WindowShare`, whose gradients were taken before."""

    @staticmethod
    def forward(ctx, images: Tensor, scale: Tensor, share: WindowShare) -> Tensor:
        ctx.share = share
        return share.loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad * ctx.share.image_grad, grad * ctx.share.scale_grad, None


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


class _MeanOverRanks(torch.autograd.Function):
    """The mean of a number over ranks; backward gives each rank's own number the whole gradient."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total / world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def gather_batch(local: Tensor) -> Tensor:
    """(B,...) of this rank -> (world*B,...) of all ranks, in rank order, with gradient.

    Every rank must hold the same shape; one process gets its input back. The backward pass sums
    over ranks what each of them derived from this rank's part.
    """
    return _AllGather.apply(local) if world_size() > 1 else local


def caption_positives(
    captions: Sequence[str], gather: bool = True, device: torch.device | str = "cpu"
) -> Tensor:
    """Which captions are equal, boolean (B,N): those of this rank against those contrasted with.

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
    everyone = gather_batch(ids) if gather else ids  # (N,)
    return ids[:, None] == everyone[None, :]


def itc_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    positives: Tensor | None = None,
    gather: bool = True,
) -> Tensor:
    """Symmetric InfoNCE, averaged over blocks; a float32 scalar.

    With `gather` it is the loss of the global batch, the same number on every rank. Backward, each
    rank adds the part of its own B rows in both directions, (L,B,N) logits each; the mean over
    ranks, as DistributedDataParallel takes it, is the gradient of the global loss.

    Args:
        image_embeds: (L,B,E) or (B,E), L2-normalised.
        text_embeds: (B,E), L2-normalised. No gradient reaches it.
        logit_scale: the factor itself (exp taken).
        positives: boolean (B,N), from `caption_positives` with the same `gather`; each row spreads
            its target evenly over its positives. None: row i belongs to its own caption alone.
        gather: contrast over the batches of all ranks, which must be of one size.

    Raises ValueError when shapes do not fit.
    """
    if image_embeds.ndim == 2:
        image_embeds = image_embeds[None]  # (1,B,E)
    _check_pair(image_embeds, text_embeds)
    with torch.autocast(image_embeds.device.type, enabled=False):
        images = image_embeds.float().transpose(0, 1)  # (B,L,E)
        texts = text_embeds.detach().float()  # (B,E)
        all_images, all_texts, first = images, texts, 0
        if gather:
            all_images, all_texts = gather_batch(images), gather_batch(texts)  # (N,L,E), (N,E)
            first = process_index() * len(texts)
        shape = (len(texts), len(all_texts))
        if positives is None:
            targets = torch.zeros(shape, device=texts.device)  # (B,N)
            targets.diagonal(first).fill_(1)
        elif positives.shape == shape:
            targets = positives.to(texts)
        else:
            raise ValueError(
                f"positives {tuple(positives.shape)} do not fit a batch of {shape[0]} against "
                f"{shape[1]}"
            )
        targets = targets / targets.sum(dim=1, keepdim=True)
        # The scale multiplies the rows, so that autograd keeps no second copy of the logits.
        scale = logit_scale.float()
        image_to_text = torch.einsum("ile,je->lij", scale * images, all_texts)  # (L,B,N)
        text_to_image = torch.einsum("ie,jle->lij", scale * texts, all_images)  # (L,B,N)
        loss = (
            _soft_cross_entropy(image_to_text, targets)
            + _soft_cross_entropy(text_to_image, targets)
        ) / 2
        return _MeanOverRanks.apply(loss) if gather and world_size() > 1 else loss


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the rows of logits (L,B,N) of the cross entropy with targets (B,N) of sum 1."""
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
        images, scale = self.select(out), out.logit_scale  # (L,B,E), scalar
        numbers = {"logit_scale": scale.detach()}
        if WINDOW_SHARE in batch:
            return _GivenGradient.apply(images, scale, batch[WINDOW_SHARE]), numbers
        text = self.teacher(batch["text"], batch.get("tokens")).to(images.device)  # (B,E)
        if self.objective == "distillation":
            # The scale has no part in a regression. Times zero, its gradient is still defined, and
            # DistributedDataParallel does not wait for it.
            return passive_distillation_loss(images, text) + 0 * scale, {}
        positives = caption_positives(batch["text"], self.gather, images.device)
        return itc_loss(images, text, scale, positives, self.gather), numbers

    def select(self, out: StudentOutput) -> Tensor:
        """The embeddings that are contrasted, (L,B,E)."""
        return select_blocks(out.image_embeds, self.blocks)

    def over_window(
        self, embeds: Sequence[Tensor], captions: Sequence[Sequence[str]], logit_scale: Tensor
    ) -> list[WindowShare]:
        """The contrast over several batches of this rank as if they were one.

        Args:
            embeds: (L,B,E) of each batch, without graph.
            captions: the B strings of each.
            logit_scale: the factor itself (exp taken).

        Gives each batch's share; the mean over batches of `WINDOW_SHARE`'s losses has the gradient
        of the contrast over all of them.
        """
        device, count = embeds[0].device, len(embeds)
        text = torch.cat([self.teacher(some).to(device) for some in captions])  # (count*B,E)
        every = [caption for some in captions for caption in some]
        positives = caption_positives(every, self.gather, device)
        with torch.enable_grad():
            images = torch.cat(list(embeds), dim=1).float().requires_grad_()  # (L,count*B,E)
            scale = logit_scale.detach().clone().requires_grad_()
            loss = itc_loss(images, text, scale, positives, self.gather)
            image_grad, scale_grad = torch.autograd.grad(loss, (images, scale))
        sizes = [one.shape[1] for one in embeds]
        return [
            WindowShare(loss.detach(), count * part, scale_grad)
            for part in image_grad.split(sizes, dim=1)
        ]


def build_itc_term(cfg: DictConfig, student: MUSE_ViT, pretrained: bool = True) -> ITCTerm:
    """The term of `losses.itc` with the teacher of `teacher.text`."""
    section, teacher = cfg.losses.itc, shared_text_teacher(cfg, pretrained)
    return ITCTerm(section.weight, teacher, section.blocks, section.gather, section.objective)
