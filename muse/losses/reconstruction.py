"""Pixel distance between a reconstruction and its image: the first part of L_rec."""
from torch import Tensor


def pixel_loss(reconstruction: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """Mean over all elements of the squared (`l2`) or absolute (`l1`) difference; a float32 scalar.

    Both (B,3,H,W), nominal [0,1]; the reconstruction may leave the range. No gradient reaches `target`.
    Raises ValueError for another kind or for shapes that differ.
    """
    if reconstruction.shape != target.shape:
        raise ValueError(f"reconstruction {tuple(reconstruction.shape)} and target {tuple(target.shape)} "
                         "differ in shape")
    difference = reconstruction.float() - target.detach().float()
    if kind == "l2":
        return difference.square().mean()
    if kind == "l1":
        return difference.abs().mean()
    raise ValueError(f"pixel loss must be 'l1' or 'l2', got {kind!r}")
