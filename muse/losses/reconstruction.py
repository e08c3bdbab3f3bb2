"""Pixel distance between a reconstruction and its image: the first part of L_rec."""

from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from muse.losses.term import Needs, Term
from muse.models.muse_vit import MUSE_ViT, StudentOutput


def pixel_loss(reconstruction: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """Mean over all elements of the squared (`l2`) or absolute (`l1`) difference; a float32 scalar.

    Both (B,3,H,W), nominal [0,1]; the reconstruction may leave the range. No gradient reaches `target`.
    Raises ValueError for another kind or for shapes that differ.
    """
    if reconstruction.shape != target.shape:
        raise ValueError(
            f"reconstruction {tuple(reconstruction.shape)} and target {tuple(target.shape)} "
            "differ in shape"
        )
    difference = reconstruction.float() - target.detach().float()
    if kind == "l2":
        return difference.square().mean()
    if kind == "l1":
        return difference.abs().mean()
    raise ValueError(f"pixel loss must be 'l1' or 'l2', got {kind!r}")


class ReconstructionTerm(Term):
    name, needs = "reconstruction", Needs(reconstruction=True)

    def __init__(self, weight: float, kind: str):
        super().__init__(weight)
        self.kind = kind

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return pixel_loss(out.reconstruction, batch["images"], self.kind), {}


def build_reconstruction_term(cfg: DictConfig, student: MUSE_ViT, grid: tuple[int, int]) -> Term:
    """The term of `losses.reconstruction`."""
    return ReconstructionTerm(cfg.losses.reconstruction.weight, cfg.losses.reconstruction.type)
