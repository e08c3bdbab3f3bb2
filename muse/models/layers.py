"""Small parts of the networks: pixel contract, pixel-unshuffle, rotary positions, norms, SwiGLU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PIXEL_RANGE = (-0.01, 1.01)
# Channel statistics to which most vision networks normalise their [0, 1] pixels.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_images(images: Tensor, what: str = "images", wait: bool = True) -> None:
    """The pixel contract: a floating (B, 3, H, W) tensor of RGB in [0, 1], or `ValueError`.

    Args:
        images: what was given.
        what: its name in the message.
        wait: False within a training step: the range is then checked on a CPU alone, since reading
            a number from an accelerator waits for all its work.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{what} must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{what} must be floating point RGB in [0, 1], got {images.dtype}")
    if images.numel() == 0:
        raise ValueError(f"{what} must not be empty, got {tuple(images.shape)}")
    if isinstance(images, FakeTensor):  # a shape without values, as the cost of a run is counted
        return
    if not wait and images.device.type != "cpu":
        return
    low, high = (bound.item() for bound in images.detach().aminmax())
    # A NaN fails every comparison, so the test asks for what must hold.
    if not (low >= PIXEL_RANGE[0] and high <= PIXEL_RANGE[1]):
        raise ValueError(f"{what} must be RGB in [0, 1], got values in [{low:.4g}, {high:.4g}]")


class DropPath(nn.Module):
    """Stochastic depth: in training each sample loses a residual branch with probability `rate`.

    Where it stays, the branch is divided by `1 - rate`, so that its expectation is unchanged.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = branch.new_empty((len(branch),) + (1,) * (branch.ndim - 1))  # (B, 1, ...)
        return branch * keep.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def pixel_unshuffle(
    tokens: Tensor, grid: tuple[int, int], side: int
) -> tuple[Tensor, tuple[int, int]]:
    """Fold each side×side cell of tokens into one; gives the new tokens and their grid.

    Within a cell the tokens follow each other row by row, each with its C channels (the order that
    the released weights expect).

    Args:
        tokens: (B, h*w, C), which become (B, h*w/side², C*side²).
        grid: (h, w).
        side: of a cell; 1 changes nothing.
    """
    if side == 1:
        return tokens, grid
    h, w = grid
    if h % side or w % side:
        raise ValueError(
            f"a token grid of {h}x{w} cannot be folded by {side}: "
            "both sides must be multiples of it"
        )
    cells = tokens.unflatten(1, (h // side, side, w // side, side))  # (B, h/s, s, w/s, s, C)
    cells = cells.transpose(2, 3)  # (B, h/s, w/s, s, s, C)
    return cells.flatten(3).flatten(1, 2), (h // side, w // side)


class RotaryEmbedding(nn.Module):
    """1-D rotary positions over the flattened grid, for any length."""

    def __init__(self, head_dim: int, base: float = 10000.0):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, got {head_dim}")
        self.head_dim, self.base = head_dim, base

    def forward(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (length, head_dim), float32."""
        # Made anew each time: a few hundred KB, for whatever length, and nothing to save.
        frequencies = self.base ** (
            -torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        )
        angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, heads, N, d) by `rotary` (each (N, d)): the two halves of d form the pairs."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), no biases, hidden width int(2 * 4 * dim / 3)."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = int(2 * 4 * dim / 3)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


def init_linear(part: nn.Module) -> None:
    """Every linear layer of `part`: weights normal with deviation 0.02 within ±2, biases zero."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself; the gradient that flows back through it is multiplied by `scale`."""
    return x if scale == 1.0 else _ScaleGradient.apply(x, scale)


def convolution_layout(images: Tensor) -> Tensor:
    """(B, C, H, W) as convolutions want it: channels last on a GPU, whose matrix units read it so.

    Each convolution hands the layout on. On a CPU the layout stays as it is.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.is_cuda else images


def padding_to_multiple(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Rows and columns that (H, W) lacks to the next multiple."""
    return tuple(math.ceil(side / multiple) * multiple - side for side in size)
