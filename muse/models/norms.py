"""RMSNorm in its input's own type, which keeps no more than its backward pass needs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SameTypeRMSNorm(nn.Module):
    """diffusers' RMSNorm (x / rms(x) * weight + bias over the last dimension) in x's own type.

    Under autocast diffusers' gives float32, since its weights are, and from the first norm on the
    residual stream of the whole decoder is float32: twice the memory and traffic. In float32 both
    give the same bits, gradients included.

    Args:
        weight: (C,).
        bias: (C,), or None.
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype != torch.float32:
            weight = self.weight.to(x.dtype)
            with torch.autocast("cuda", enabled=False):  # one kernel, which sums in float32
                normed = F.rms_norm(x, weight.shape, weight, self.eps)
        else:
            normed = _RMSNorm.apply(x, self.weight.float(), self.eps)
        return normed if self.bias is None else normed + self.bias.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a place; autograd's own keeps x / rms(x) in float32 besides.

    The operations are those of diffusers' module and of its backward pass, in their order.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * inverse)).sum(dim=tuple(range(x.ndim - 1)))
        if ctx.needs_input_grad[0]:
            scaled = grad * weight
            grad_inverse = (scaled * wide).sum(dim=-1, keepdim=True)
            grad_mean = -0.5 * grad_inverse * inverse.pow(3)
            grad_x = scaled * inverse + grad_mean / x.shape[-1] * (2 * wide)
            grad_x = grad_x.to(x.dtype)
        return grad_x, grad_weight, None
