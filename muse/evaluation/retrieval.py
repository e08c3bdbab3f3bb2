"""Image-text retrieval, among few candidates or all, from L2-normalised embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from muse.evaluation.metrics.accuracy_iou import hit_probability

RECALLS = (1, 5)
ALL_RECALLS = (1, 5, 10)  # where all are candidates
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


def full_retrieval(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_of: Tensor,
    recalls: Sequence[int] = ALL_RECALLS,
) -> dict[str, float]:
    """R@k with every picture against every caption, image → text and text → image.

    A picture finds its text where any of its captions is among the k best; every caption is a query
    for its picture. Equal scores count as a random choice among them. Memory: one block of
    similarities.

    Args:
        image_embeds: (N, E), L2-normalised.
        text_embeds: (M, E), all captions of all pictures.
        image_of: (M,) each caption's picture; ValueError for a picture without one.
        recalls: the k.
    """
    pictures, texts = len(image_embeds), len(text_embeds)
    owned = torch.bincount(image_of, minlength=pictures)
    if len(image_of) != texts or len(owned) != pictures or not pictures or not owned.all():
        raise ValueError("retrieval needs a picture for every caption, and a caption for each")
    hits = {"image_to_text": torch.zeros(len(recalls)).double()}
    hits["text_to_image"] = hits["image_to_text"].clone()
    rows = max(1, BLOCK // texts)
    for start in range(0, pictures, rows):
        scores = image_embeds[start : start + rows].float() @ text_embeds.float().T  # (rows, M)
        own = image_of == torch.arange(start, start + len(scores))[:, None]
        hits["image_to_text"] += torch.stack([_any_hit(scores, own, k).sum() for k in recalls])
    rows = max(1, BLOCK // pictures)
    for start in range(0, texts, rows):
        scores = text_embeds[start : start + rows].float() @ image_embeds.float().T  # (rows, N)
        right = image_of[start : start + rows]
        found = [hit_probability(scores, right, k).sum() for k in recalls]
        hits["text_to_image"] += torch.stack(found)
    result: dict[str, float] = {"images": pictures, "captions": texts}
    for name, count in (("image_to_text", pictures), ("text_to_image", texts)):
        for k, total in zip(recalls, hits[name].tolist(), strict=True):
            result[f"{name}_r{k}"] = total / count
    for k in recalls:
        chance = _one_of(torch.full_like(owned, k), owned, texts - owned)
        result[f"image_to_text_chance_r{k}"] = float(chance.mean())
        result[f"text_to_image_chance_r{k}"] = min(k / pictures, 1.0)
    return result


def _any_hit(scores: Tensor, own: Tensor, k: int) -> Tensor:
    """(n,) probability that a row's k best hold one of its own (n, m), ties at random."""
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    level = scores == best
    places = k - ((scores > best) & ~own).sum(1)
    return _one_of(places, (level & own).sum(1), (level & ~own).sum(1))


def _one_of(places: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Probability that at least one of `right` is among the first `places` of a random order."""
    drawn = torch.minimum(places.clamp(min=0), wrong).double()
    right, wrong = right.double(), wrong.double()

    def log_choices(total: Tensor) -> Tensor:
        return (total + 1).lgamma() - (drawn + 1).lgamma() - (total - drawn + 1).lgamma()

    none = (log_choices(wrong) - log_choices(wrong + right)).exp()
    return torch.where(places > wrong, 1.0, 1 - none)


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
