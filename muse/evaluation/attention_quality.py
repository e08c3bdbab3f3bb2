"""How well a student's attention follows the teacher's, and how well it stays on its object.

Beside every figure stands what needs no image: the uniform map and the positional prior (the
teacher's mean map over a *training* set). Maps are averaged over heads. N = h*w tokens, L blocks,
rows are queries.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from muse.data.masks import IGNORE_INDEX
from muse.evaluation.mask_cells import cell_targets
from muse.losses.topology import attention_kl, positional_prior, resize_attention
from muse.utils.distributed import all_sum

TINY = 1e-30


@torch.no_grad()
def teacher_maps(
    teacher: Callable, images: torch.Tensor, grid: tuple[int, int]
) -> list[torch.Tensor]:
    """The teacher's head means on the student's grid: L tensors (B,1,N,N).

    A map that stands in several places is resized once.

    Args:
        teacher: images -> `TopologyTarget`.
        images: (B,3,H,W).
        grid: the student's (h, w).
    """
    target = teacher(images)
    done: dict[int, torch.Tensor] = {}
    for maps in target.maps:
        if id(maps) not in done:
            done[id(maps)] = resize_attention(maps.float().mean(1, keepdim=True), target.grid, grid)
    return [done[id(maps)] for maps in target.maps]


def mean_teacher_maps(
    teacher: Callable, batches: Iterable[dict], grid: tuple[int, int], device="cpu"
) -> torch.Tensor:
    """The positional prior (L,N,N): mean of `teacher_maps` over the images of a training set.

    Args:
        teacher: images -> `TopologyTarget`.
        batches: with `images`.
        grid: the student's (h, w).
        device: where the teacher is.
    """
    total, count = None, 0
    for batch in batches:
        maps = teacher_maps(teacher, batch["images"].to(device), grid)
        sums = torch.stack([m.sum(dim=(0, 1)) for m in maps])
        total = sums if total is None else total + sums
        count += len(batch["images"])
    if total is None:
        raise ValueError("the positional prior needs at least one image")
    return total / count


def object_cells(masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B,H,W) object labels, 0 background -> (B,N): the label on over half of a cell, else 0."""
    inside = masks.masked_fill(masks == IGNORE_INDEX, 0)
    share, label = cell_targets(inside, grid, int(inside.max()) + 1).max(-1)
    return torch.where(share > 0.5, label, 0)


def same_object_auc(maps: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """How well attention separates the query's object from the rest, (B,).

    Area under the ROC curve over the keys of each query on an object (the query itself left out,
    ties count half), averaged over the image's queries; NaN for an image without an object or with
    nothing else.

    Args:
        maps: (B,N,N) attention.
        cells: (B,N) object labels, 0 background.
    """
    count = maps.shape[-1]
    itself = torch.eye(count, dtype=torch.bool, device=maps.device)
    scores = maps.float().masked_fill(itself, -1.0)  # below every weight: rank 1, taken off again
    order = scores.sort(-1).values.contiguous()
    below = torch.searchsorted(order, scores.contiguous(), side="left")
    up_to = torch.searchsorted(order, scores.contiguous(), side="right")
    ranks = (below + up_to + 1).double() / 2 - 1  # mean rank among the other keys, from 1
    same = (cells[:, :, None] == cells[:, None, :]) & (cells > 0)[:, :, None] & ~itself
    positives = same.sum(-1)
    negatives = count - 1 - positives
    wins = (ranks * same).sum(-1) - positives * (positives + 1) / 2
    usable = (positives > 0) & (negatives > 0)
    auc = torch.where(usable, wins / (positives * negatives).clamp_min(1), 0.0)
    return torch.where(usable.any(1), auc.sum(1) / usable.sum(1).clamp_min(1), torch.nan)


class TopologyQuality:
    """Streaming means over images of the divergences and the AUC, by block.

    prior: (L,N,N), see `mean_teacher_maps`.
    """

    KEYS = ("kl", "kl_positional", "kl_uniform", "auc", "auc_teacher", "auc_positional")

    def __init__(self, prior: torch.Tensor):
        self.prior = prior
        self.sums = torch.zeros(len(prior), len(self.KEYS), dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)

    def update(
        self,
        topology: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        cells: torch.Tensor | None,
    ) -> None:
        """Add a batch.

        Args:
            topology: L student maps (B,heads,N,N).
            targets: L teacher maps (B,1,N,N).
            cells: (B,N) object labels, or None for no AUC.
        """
        if not len(topology) == len(targets) == len(self.prior):
            raise ValueError(
                f"{len(topology)} student maps, {len(targets)} teacher maps, "
                f"{len(self.prior)} priors"
            )
        for block, (maps, target, prior) in enumerate(
            zip(topology, targets, self.prior.to(targets[0].device), strict=True)
        ):
            student = maps.float().mean(1, keepdim=True)
            self._add(block, "kl", attention_kl(target, student.clamp_min(TINY).log())[:, 0])
            baselines = positional_prior(target, prior)
            self._add(block, "kl_positional", baselines.position.expand(len(target)))
            self._add(block, "kl_uniform", baselines.uniform.expand(len(target)))
            if cells is not None:
                self._add(block, "auc", same_object_auc(student[:, 0], cells))
                self._add(block, "auc_teacher", same_object_auc(target[:, 0], cells))
                self._add(
                    block, "auc_positional", same_object_auc(prior.expand_as(target[:, 0]), cells)
                )

    def _add(self, block: int, key: str, values: torch.Tensor) -> None:
        column = self.KEYS.index(key)
        values = values[torch.isfinite(values)].cpu().double()
        self.sums[block, column] += values.sum()
        self.counts[block, column] += len(values)

    def compute(self) -> dict:
        """Means over images by block, as `blocks`, and over blocks: `KEYS`, divergences in nats.

        AUC keys are absent without masks. ValueError without images.
        """
        sums, counts = all_sum(self.sums), all_sum(self.counts)
        if not counts[:, 0].all():
            raise ValueError("topology quality: no images were given")
        keys = [key for i, key in enumerate(self.KEYS) if counts[:, i].all()]
        blocks = [
            {
                key: float(sums[b, i] / counts[b, i])
                for i, key in enumerate(self.KEYS)
                if key in keys
            }
            for b in range(len(sums))
        ]
        means = {key: sum(block[key] for block in blocks) / len(blocks) for key in keys}
        return {"blocks": blocks, **means, "images": int(counts[0, 0])}
