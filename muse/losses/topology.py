"""Topological alignment L_topo: the student's attention follows the teacher's, block by block.

Paper: 1/(LH) sum over layers and heads of KL(Psi(A_T) || A_S), where Psi resizes the teacher's map,
queries and keys, to the student's grid. The release: the last block alone, and heads averaged on
both sides before the divergence.

Shapes: L blocks, B images, H heads, N = h*w tokens, Nt = ht*wt of the teacher. Rows (dimension -2)
are queries, columns (-1) keys. All in float32.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.losses.term import Needs, Term, ask
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.teachers.build import shared_topology_teacher

ROW_EPSILON = 1e-6
LOG_EPSILON = 1e-8
Blocks = TypeVar("Blocks", Tensor, Sequence[Tensor])


def resize_attention(
    maps: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int], transpose: bool = False
) -> Tensor:
    """Psi: attention on the teacher's grid -> attention on the student's, rows summing to 1.

    Bilinear over the keys, then over the queries, then rows re-normalised. Equal grids return the
    maps unchanged, in the release too.

    Args:
        maps: (B,H,Nt,Nt) on `from_grid`.
        from_grid: (ht, wt).
        to_grid: (h, w).
        transpose: what the released code computes: the map with queries and keys exchanged (before
            the rows are re-normalised), so that the student's queries learn which queries look *at*
            them.

    Returns (B,H,N,N) float32. Raises ValueError when the maps do not fit `from_grid`.
    """
    count = from_grid[0] * from_grid[1]
    if maps.ndim != 4 or maps.shape[-2:] != (count, count):
        raise ValueError(
            f"attention {tuple(maps.shape)} does not fit the grid {from_grid}: "
            f"(B,H,{count},{count}) was expected"
        )
    maps = maps.float()
    if tuple(from_grid) == tuple(to_grid):
        return maps
    by_keys = _resize_last(maps, from_grid, to_grid)  # (B,H,Nt,N)
    exchanged = _resize_last(
        by_keys.transpose(-1, -2), from_grid, to_grid
    )  # (B,H,N keys,N queries)
    resized = exchanged if transpose else exchanged.transpose(-1, -2)  # (B,H,N,N)
    return resized / (resized.sum(dim=-1, keepdim=True) + ROW_EPSILON)


def _resize_last(maps: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Resize the last dimension, each row of which is a picture on the grid."""
    batch, heads, rows, _ = maps.shape
    pictures = maps.reshape(batch * heads, rows, *from_grid)  # (B*H,M,ht,wt)
    resized = F.interpolate(pictures, size=tuple(to_grid), mode="bilinear", align_corners=False)
    return resized.reshape(batch, heads, rows, -1)  # (B,H,M,N)


def select_blocks(values: Blocks, blocks: str) -> Blocks:
    """What `losses.*.blocks` means: `all` blocks, or the `last` (as a slice of length 1)."""
    if blocks == "all":
        return values
    if blocks == "last":
        return values[-1:]
    raise ValueError(f"blocks must be 'all' or 'last', got {blocks!r}")


def attention_kl(target: Tensor, log_student: Tensor) -> Tensor:
    """KL(target || student) in nats, mean over queries: (B,H,N,N) twice -> (B,H).

    `target` holds probabilities, `log_student` log-probabilities. Zeros of the target count
    nothing; no gradient reaches it.
    """
    target = target.detach().float()
    divergence = torch.special.xlogy(target, target) - target * log_student.float()  # (B,H,N,N)
    return divergence.sum(dim=-1).mean(dim=-1)  # (B,H)


def topology_kl(
    log_topology: Sequence[Tensor], targets: Sequence[Tensor], heads: str = "mean"
) -> Tensor:
    """The divergence of every block, (L,) in nats: mean over images, queries and heads.

    Args:
        log_topology: L tensors (B,H,N,N) of the student's log-probabilities.
        targets: L tensors (B,1 or H,N,N) whose rows sum to 1.
        heads: `mean` compares the two averages over heads; `per_head` compares head by head, a
            single target head with all of the student's.

    Raises ValueError for another `heads`, another number of targets, or shapes that do not fit.
    """
    if heads not in ("mean", "per_head"):
        raise ValueError(f"topology heads must be 'mean' or 'per_head', got {heads!r}")
    if not log_topology or len(log_topology) != len(targets):
        raise ValueError(
            f"{len(targets)} topology targets for {len(log_topology)} blocks: as many were expected"
        )
    return torch.stack([_block_kl(*pair, heads) for pair in zip(log_topology, targets)])


def _block_kl(log_student: Tensor, target: Tensor, heads: str) -> Tensor:
    student_heads = log_student.shape[1]
    same_size = target.shape[:1] + target.shape[2:] == log_student.shape[:1] + log_student.shape[2:]
    if not same_size or (heads == "per_head" and target.shape[1] not in (1, student_heads)):
        raise ValueError(
            f"topology target {tuple(target.shape)} does not fit attention "
            f"{tuple(log_student.shape)} (heads={heads})"
        )
    log_student = log_student.float()  # (B,H,N,N)
    if heads == "mean":
        target = target.float().mean(dim=1, keepdim=True)  # (B,1,N,N)
        log_student = torch.logsumexp(log_student, dim=1, keepdim=True) - math.log(student_heads)
    return attention_kl(target, log_student).mean()


def topology_loss(
    log_topology: Sequence[Tensor], targets: Sequence[Tensor], heads: str = "mean"
) -> Tensor:
    """L_topo: mean over the blocks given of `topology_kl`; a float32 scalar."""
    return topology_kl(log_topology, targets, heads).mean()


class TopologyPrior(NamedTuple):
    """The divergence, in nats, of a student that ignores the image."""

    position: Tensor  # from the mean map
    uniform: Tensor  # from equal weights


def positional_prior(targets: Tensor, mean_map: Tensor) -> TopologyPrior:
    """Baselines of the divergence: KL of targets from one fixed map, and from the uniform map.

    A student has learned a topology only if it lies below `position`, which needs no image at all.

    Args:
        targets: (B,1 or H,N,N).
        mean_map: (N,N), (1,N,N) or (H,N,N): the mean target of the *training* set, heads averaged
            as in the targets.
    """
    mean_map = mean_map.float().expand(1, targets.shape[1], *mean_map.shape[-2:])  # (1,H,N,N)
    position = attention_kl(targets, mean_map.clamp_min(LOG_EPSILON).log())
    uniform = attention_kl(targets, torch.full_like(mean_map, -math.log(mean_map.shape[-1])))
    return TopologyPrior(position.mean(), uniform.mean())


class TopologyTerm(Term):
    """Structure: 1/(L·H) Σ KL(Ψ(A_T) ‖ A_S)."""

    name, needs = "topology", Needs(topology=True)

    def __init__(
        self, weight: float, teacher: nn.Module, blocks: str, heads: str, transpose: bool = False
    ):
        super().__init__(weight)
        self.teacher, self.blocks, self.heads, self.transpose = teacher, blocks, heads, transpose

    def targets(self, batch: dict[str, Any], grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """The teacher's maps on the student's grid: L tensors (B,1 or H,N,N)."""
        target = ask(self.teacher, batch)
        resized: dict[int, Tensor] = {}  # one map may stand for several blocks: resized once
        for maps in target.maps:
            if id(maps) not in resized:
                resized[id(maps)] = resize_attention(maps, target.grid, grid, self.transpose)
        return tuple(resized[id(maps)] for maps in target.maps)

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        targets = self.targets(batch, out.grid)
        self._check_heads(targets[0].shape[1], out.log_topology[0].shape[1])
        each = topology_kl(
            select_blocks(out.log_topology, self.blocks),
            select_blocks(targets, self.blocks),
            self.heads,
        )  # (L,)
        by_block = {f"topology_block{i}": value.detach() for i, value in enumerate(each)}
        return each.mean(), by_block if len(each) > 1 else {}

    def _check_heads(self, teacher: int, student: int) -> None:
        if self.heads == "per_head" and teacher not in (1, student):
            raise ConfigError(
                f"losses.topology.heads=per_head: the teacher has {teacher} heads, the student "
                f"{student}; use heads=mean"
            )


def build_topology_term(
    cfg: DictConfig, student: MUSE_ViT, pretrained: bool = True
) -> TopologyTerm:
    """The term of `losses.topology` with the teacher of `teacher.topology`."""
    section = cfg.losses.topology
    side = cfg.dataset.preprocessing.crop_size // student.cell
    teacher = shared_topology_teacher(cfg, (side, side), pretrained)
    return TopologyTerm(section.weight, teacher, section.blocks, section.heads, section.transpose)
