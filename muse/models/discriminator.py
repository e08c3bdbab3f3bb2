"""PatchGAN with blurred down-sampling, the adversary of stage 3, in the release's layout.

5x5 convolution, then stages of 3x3 convolution, blur (1,3,3,1) with stride 2, GroupNorm, LeakyReLU;
the map is then max-pooled to a fixed grid, so that every image size gives the same number of patch
logits. Blurring before sampling (Zhang, 2019) keeps the adversary from reading aliases.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLUR = (1.0, 3.0, 3.0, 1.0)


class BlurDownsample(nn.Module):
    """Depthwise blur (1,3,3,1) x (1,3,3,1) / 64 with stride 2 and zeros around: halves H and W."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor(BLUR)
        self.register_buffer(
            "kernel", (torch.outer(taps, taps) / taps.sum() ** 2)[None, None], persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(x, kernel, stride=2, groups=channels)  # (B, C, ceil(H/2), ceil(W/2))


class PatchDiscriminator(nn.Module):
    """Patch logits of an image.

    Args:
        width: channels, a multiple of `groups`, doubled from the second stage on; the release: 128.
        stages: halvings; the release: 3.
        groups: of each GroupNorm; the release: 32.
        pool: side of the logit map; the release: 16.
        slope: of every LeakyReLU.
        full_precision: float32 also within autocast.
    """

    def __init__(
        self,
        width: int = 128,
        stages: int = 3,
        groups: int = 32,
        pool: int = 16,
        slope: float = 0.1,
        full_precision: bool = False,
    ):
        super().__init__()
        self.full_precision = full_precision
        if stages < 1 or width % groups:
            raise ValueError(
                f"discriminator: width {width} must be a multiple of groups {groups}, "
                f"and stages {stages} at least 1"
            )
        self.block_in = nn.Sequential(nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(slope))
        outputs = [width * 2**stage for stage in range(stages)]
        inputs = [width, *outputs[:-1]]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 3, padding=1),
                BlurDownsample(),
                nn.GroupNorm(groups, fan_out),
                nn.LeakyReLU(slope),
            )
            for fan_in, fan_out in zip(inputs, outputs)
        )
        self.pool = nn.AdaptiveMaxPool2d(pool)
        self.to_logits = nn.Sequential(
            nn.Conv2d(outputs[-1], outputs[-1], 1),
            nn.LeakyReLU(slope),
            nn.Conv2d(outputs[-1], 1, 5, padding=2),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1], used as they are -> logits (B,1,pool,pool), high where the
        patch looks real.
        """
        if self.full_precision:
            with torch.autocast(images.device.type, enabled=False):
                return self._logits(images.float())
        return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        x = self.block_in(images)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.pool(x))
