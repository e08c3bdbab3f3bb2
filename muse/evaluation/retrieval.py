"""Image-text retrieval among few candidates, from L2-normalised embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from muse.evaluation.metrics.accuracy_iou import hit_probability

RECALLS = (1, 5)
MOST_GROUPS = 1000
QUERIES = 32_000  # in all groups together; larger groups are fewer
BLOCK = 2**22  # similarities in memory at a time: 16 MB


def retrieval(
    image_embeds: Tensor,
    text_embeds: Tensor,
    captions: Sequence[str],
    group: int = 32,
    groups: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """R@1 and R@5 among few candidates, image → text and text → image, averaged over random groups.

    Every group holds `group` distinct captions, each with one of its images at random. Chance is
    1/group and 5/group. Memory: one block of similarities, for any group.

    Args:
        image_embeds: (N, E), L2-normalised.
        text_embeds: (N, E), in pairs with the images.
        captions: N.
        group: candidates; fewer distinct captions make the group smaller.
        groups: how many are drawn; None is QUERIES / group, at most MOST_GROUPS.
        seed: of the draw.
    """
    if not len(image_embeds) == len(text_embeds) == len(captions):
        raise ValueError("images, texts and captions differ in number")
    distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    if len(distinct) < 2:
        raise ValueError(f"retrieval needs at least two distinct captions, got {len(distinct)}")
    caption_of = torch.tensor([distinct[caption] for caption in captions])
    group = min(group, len(distinct))
    groups = groups or max(1, min(MOST_GROUPS, QUERIES // group))
    members = _draw_groups(
        caption_of, len(distinct), group, groups, torch.Generator().manual_seed(seed)
    )
    hits = {"image_to_text": torch.zeros(2).double(), "text_to_image": torch.zeros(2).double()}
    for row in members:
        images, texts = image_embeds[row].float(), text_embeds[row].float()  # (group, E)
        hits["image_to_text"] += _hits(images, texts)
        hits["text_to_image"] += _hits(texts, images)
    result: dict[str, float] = {
        "group": group,
        "groups": groups,
        "captions": len(distinct),
        "images": len(captions),
    }
    for name, sums in hits.items():
        for k, total in zip(RECALLS, sums.tolist(), strict=True):
            result[f"{name}_r{k}"] = total / members.numel()
    return result | {f"chance_r{k}": min(k / group, 1.0) for k in RECALLS}


def _hits(queries: Tensor, candidates: Tensor) -> Tensor:
    """(len(RECALLS),) how many of (n, E) queries find the candidate of their own row."""
    rows = max(1, BLOCK // len(candidates))
    found = torch.zeros(len(RECALLS), dtype=torch.float64)
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ candidates.T  # (rows, n)
        own = torch.arange(start, start + len(scores))
        found += torch.stack([hit_probability(scores, own, k).sum() for k in RECALLS])
    return found


def _draw_groups(
    caption_of: Tensor, distinct: int, group: int, groups: int, generator: torch.Generator
) -> Tensor:
    """(groups, group) sample indices with distinct captions in each row."""
    # one row at a time: all captions are ranked to choose a few
    chosen = torch.stack(
        [torch.rand(distinct, generator=generator).argsort()[:group] for _ in range(groups)]
    )
    order = caption_of.argsort(stable=True)  # samples of one caption lie together
    counts = torch.bincount(caption_of, minlength=distinct)
    starts = counts.cumsum(0) - counts
    within = (torch.rand(groups, group, generator=generator) * counts[chosen]).long()
    return order[starts[chosen] + within]
