"""Pixel distance between a reconstruction and its image: the first part of L_rec."""

from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from muse.losses.term import Needs, Term
from muse.models.muse_vit import MUSE_ViT, StudentOutput


def pixel_loss(reconstruction: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """Mean over all elements of the squared (`l2`) or absolute (`l1`) difference.

    Args:
        reconstruction: (B,3,H,W), nominal [0,1]; it may leave the range.
        target: (B,3,H,W) in [0,1]. No gradient reaches it.
        kind: `l2` or `l1`.

    Returns a float32 scalar. Raises ValueError for another kind or for shapes that differ.
    """
    if reconstruction.shape != target.shape:
        raise ValueError(
            f"reconstruction {tuple(reconstruction.shape)} and target {tuple(target.shape)} "
            "differ in shape"
        )
    difference = reconstruction.float() - target.detach().float()  # (B,3,H,W)
    if kind == "l2":
        return difference.square().mean()
    if kind == "l1":
        return difference.abs().mean()
    raise ValueError(f"pixel loss must be 'l1' or 'l2', got {kind!r}")


class ReconstructionTerm(Term):
    """`pixel_loss` of the student's reconstruction."""

    name, needs = "reconstruction", Needs(reconstruction=True)

    def __init__(self, weight: float, kind: str):
        super().__init__(weight)
        self.kind = kind

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return pixel_loss(out.reconstruction, batch["images"], self.kind), {}


def build_reconstruction_term(
    cfg: DictConfig, student: MUSE_ViT, pretrained: bool = True
) -> ReconstructionTerm:
    """The term of `losses.reconstruction`."""
    section = cfg.losses.reconstruction
    return ReconstructionTerm(section.weight, section.type)
