"""Zero-shot classification and image-text retrieval from L2-normalised embeddings."""

from collections.abc import Sequence
from pathlib import Path

import torch

from muse.errors import DataError
from muse.evaluation.linear_probe import Accuracy, check_labels
from muse.teachers.prompts import Template, imagenet_templates


def imagenet_prompts() -> tuple[list[str], list[Template]]:
    """open_clip's 1000 class names and 80 templates, the field's default."""
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES), imagenet_templates()


def read_lines(path: str | Path, what: str) -> list[str]:
    """The non-empty lines of a UTF-8 text file; DataError when it is missing, unreadable or empty."""
    try:
        lines = [
            line.strip()
            for line in Path(path).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} file {path} cannot be read: {error}") from error
    if not lines:
        raise DataError(f"{what} file {path} has no lines")
    return lines


def hit_probability(scores: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """(n, m) scores, (n,) right columns -> (n,) float64 probability that the right one is among the k best, ties broken
    at random.

    Without ties this is 0 or 1. With them a collapsed model scores chance, not 100%.
    """
    right = scores.gather(1, targets[:, None])
    above = (scores > right).sum(1)
    level = (scores == right).sum(1)
    return ((k - above).double() / level).clamp(0, 1)


def zero_shot(
    image_embeds: torch.Tensor, labels: torch.Tensor, class_embeds: torch.Tensor
) -> dict[str, float]:
    """Top-1 and top-5 (micro and macro) of (N, E) images against (K, E) classes, beside chance and the majority class.

    The majority class is that of `labels` themselves, the best that a constant answer can do.
    """
    if image_embeds.shape[1] != class_embeds.shape[1]:
        raise ValueError(
            f"image embeddings have width {image_embeds.shape[1]}, text embeddings {class_embeds.shape[1]}"
        )
    if not torch.isfinite(image_embeds).all():
        raise ValueError("image embeddings contain NaN or infinity")
    classes = check_labels(labels, len(class_embeds), "the data")
    counts = torch.bincount(labels, minlength=classes).double()
    present = counts > 0
    scores = image_embeds.float() @ class_embeds.float().T
    result: dict[str, float] = {}
    for k in (1, 5):
        hits = hit_probability(scores, labels, k)
        by_class = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, hits)
        found = Accuracy(float(hits.mean()), float((by_class[present] / counts[present]).mean()))
        result[f"top{k}"], result[f"top{k}_macro"] = found.micro, found.macro
        result[f"top{k}_chance"] = min(k / classes, 1.0)
    result["majority"] = float(counts.max() / counts.sum())
    result["majority_macro"] = 1 / int(present.sum())
    return result | {
        "classes": classes,
        "classes_present": int(present.sum()),
        "images": len(labels),
    }


def retrieval(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    captions: Sequence[str],
    group: int = 32,
    groups: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """R@1 and R@5 among `group` candidates, averaged over random groups, image → text and text → image.

    image_embeds and text_embeds (N, E) in pairs with their N captions. Every group holds `group` distinct captions,
    each with one of its images at random; fewer distinct captions make the group smaller. Chance is 1/group and
    5/group.
    """
    if not len(image_embeds) == len(text_embeds) == len(captions):
        raise ValueError("images, texts and captions differ in number")
    distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    if len(distinct) < 2:
        raise ValueError(f"retrieval needs at least two distinct captions, got {len(distinct)}")
    caption_of = torch.tensor([distinct[caption] for caption in captions])
    group = min(group, len(distinct))
    members = _draw_groups(
        caption_of, len(distinct), group, groups, torch.Generator().manual_seed(seed)
    )
    similarity = image_embeds.float() @ text_embeds.float().T
    scores = similarity[
        members[:, :, None], members[:, None, :]
    ]  # (groups, group images, group texts)
    targets = torch.arange(group).repeat(groups)
    result: dict[str, float] = {
        "group": group,
        "groups": groups,
        "captions": len(distinct),
        "images": len(captions),
    }
    for name, matrix in (("image_to_text", scores), ("text_to_image", scores.transpose(1, 2))):
        for k in (1, 5):
            result[f"{name}_r{k}"] = float(hit_probability(matrix.flatten(0, 1), targets, k).mean())
    return result | {"chance_r1": 1 / group, "chance_r5": min(5 / group, 1.0)}


def _draw_groups(
    caption_of: torch.Tensor, distinct: int, group: int, groups: int, generator: torch.Generator
) -> torch.Tensor:
    """(groups, group) sample indices with distinct captions in each row."""
    chosen = torch.rand(groups, distinct, generator=generator).argsort(1)[:, :group]
    order = caption_of.argsort(stable=True)  # samples of one caption lie together
    counts = torch.bincount(caption_of, minlength=distinct)
    starts = counts.cumsum(0) - counts
    within = (torch.rand(groups, group, generator=generator) * counts[chosen]).long()
    return order[starts[chosen] + within]
