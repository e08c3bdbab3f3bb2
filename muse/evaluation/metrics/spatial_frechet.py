"""sFID: the Fréchet distance of features that still know where in the picture they are.

As in ADM's evaluator, these are the first seven channels of the tensor `mixed_6/conv:0` of the
Inception graph of 2015: the 1x1 branch of the third of its four 17x17 blocks, after its ReLU.
torch-fidelity's converter puts that block's weights into `Mixed_6d`. A picture gives 17 x 17 x 7 =
2023 numbers in TensorFlow's order (row, column, channel), so that `mu_s` and `sigma_s` of an ADM
reference file fit them.
"""

import torch
from torch import Tensor, nn

CHANNELS = 7


class SpatialTap:
    """Keeps the spatial features of every pass through a torch-fidelity Inception network.

    One pass then serves FID, IS and sFID.
    """

    def __init__(self, network: nn.Module):
        self._features: Tensor | None = None
        self._hook = network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        part = output[:, :CHANNELS]  # (B,192,17,17) -> (B,7,17,17)
        self._features = part.permute(0, 2, 3, 1).flatten(1).float()  # (B,2023)

    def take(self) -> Tensor:
        """(B,2023) of the last pass, once."""
        if self._features is None:
            raise RuntimeError("the network was not run since the last call")
        features, self._features = self._features, None
        return features

    def remove(self) -> None:
        """The network is as it was before."""
        self._hook.remove()


@torch.no_grad()
def spatial_features(network: nn.Module, images: Tensor) -> Tensor:
    """(B,3,H,W) uint8 -> (B,2023) by a torch-fidelity Inception network."""
    tap = SpatialTap(network)
    try:
        network(images)
        return tap.take()
    finally:
        tap.remove()
