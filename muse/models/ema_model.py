"""Exponential moving average of the tensors that train (docs/fidelity.md, row 23: decay 0.999).

Why not diffusers' `EMAModel`: it keeps all parameters, by their place in a list and in their own
precision; a checkpoint here holds those that train, by name, in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMAModel:
    """The running mean, in float32, of every parameter that requires a gradient.

    An update makes it `decay * mean + (1 - decay) * value`. The decay is warmed up,
    min(decay, (1 + step) / (10 + step)), so that a short run is not the mean of its first steps.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.step = decay, 0
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._mean = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Fold the present weights in: one fused call, which does not wait for the device."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        live = [p.detach().float() for p in self._live.values()]
        torch._foreach_lerp_(list(self._mean.values()), live, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own again."""
        kept = {name: p.detach().clone() for name, p in self._live.items()}
        self._copy(self._mean)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> averaged tensor."""
        return dict(self._mean)

    def load_state_dict(self, state: dict[str, Tensor], step: int) -> None:
        """Restore the averages and the number of updates that made them."""
        if state.keys() != self._mean.keys():
            raise KeyError("the averaged tensors are not those that this stage trains")
        for name, mean in self._mean.items():
            mean.copy_(state[name])
        self.step = step
