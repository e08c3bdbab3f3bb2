"""Stage 0 of the demo: what stands in for a pretrained InternViT where none can be fetched.

The small encoder learns to predict a frozen network's features (cosine) and, through a linear head, its own patch's
pixels, so that stages 1 and 2 can keep it frozen as the paper does. The heads live here and are thrown away afterwards.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureDistillation(nn.Module):
    """Mean of 1 - cosine between linearly projected encoder tokens and a teacher's features."""

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        self.head = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """tokens (B,C,h,w), features (B,Ct,ht,wt), resized (antialiased bilinear) to (h,w); a float32 scalar in [0,2].

        No gradient reaches the features.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            features = features.detach().float()
            if features.shape[-2:] != tokens.shape[-2:]:
                features = F.interpolate(features, size=tokens.shape[-2:], mode="bilinear", align_corners=False,
                                         antialias=True)
            return (1 - F.cosine_similarity(self.head(tokens.float()), features, dim=1)).mean()


class PixelHead(nn.Module):
    """Each token predicts the patch of pixels it was made from, linearly: mean squared error."""

    def __init__(self, channels: int, patch: int):
        super().__init__()
        self.patch = patch
        self.head = nn.Conv2d(channels, 3 * patch * patch, 1)

    def predict(self, tokens: Tensor) -> Tensor:
        """tokens (B,C,h,w) -> pixels (B,3,h*patch,w*patch), nominal [0,1], float32."""
        with torch.autocast(tokens.device.type, enabled=False):
            return F.pixel_shuffle(self.head(tokens.float()), self.patch)

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0,1]; a float32 scalar. Raises ValueError when (H,W) is not (h,w) times the patch."""
        predicted = self.predict(tokens)
        if predicted.shape != images.shape:
            raise ValueError(f"pixel head: tokens give pixels {tuple(predicted.shape)}, "
                             f"images are {tuple(images.shape)}")
        return F.mse_loss(predicted, images.detach().float())
