"""Stage 0 of the demo: what stands in for a pretrained InternViT where none can be fetched.

The small encoder learns to predict a frozen network's features (cosine) and, through a linear head,
its own patch's pixels, so that stages 1 and 2 can keep it frozen as the paper does. The heads are
parameters of the term: they train beside the student and are thrown away afterwards.
"""

from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.losses.term import Term, ask
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.teachers.build import build_feature_teacher, chosen_precision


class FeatureDistillation(nn.Module):
    """Mean of 1 - cosine between linearly projected encoder tokens and a teacher's features."""

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        self.head = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """A float32 scalar in [0,2]. No gradient reaches the features.

        tokens (B,C,h,w); features (B,Ct,ht,wt), resized (antialiased bilinear) to (h,w).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            features, grid = features.detach().float(), tokens.shape[-2:]
            if features.shape[-2:] != grid:
                features = F.interpolate(
                    features, size=grid, mode="bilinear", align_corners=False, antialias=True
                )  # (B,Ct,h,w)
            predicted = self.head(tokens.float())  # (B,Ct,h,w)
            return (1 - F.cosine_similarity(predicted, features, dim=1)).mean()


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
        """A float32 scalar for images (B,3,H,W) in [0,1].

        Raises ValueError when (H,W) is not (h,w) times the patch.
        """
        predicted = self.predict(tokens)  # (B,3,H,W)
        if predicted.shape != images.shape:
            raise ValueError(
                f"pixel head: tokens give pixels {tuple(predicted.shape)}, "
                f"images are {tuple(images.shape)}"
            )
        return F.mse_loss(predicted, images.detach().float())


class DistillationTerm(Term):
    """A frozen network's features, and the pixels, from the encoder's tokens."""

    name = "distillation"  # needs nothing: the encoder's tokens are always there

    def __init__(self, weight: float, teacher: nn.Module, pixel_weight: float, student: MUSE_ViT):
        super().__init__(weight)
        width = student.encoder.config.hidden_size
        self.teacher, self.pixel_weight = teacher, pixel_weight
        self.features = FeatureDistillation(width, teacher.dim)
        self.pixels = PixelHead(width, student.patch_size)

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features(out.encoder_tokens, ask(self.teacher, batch))
        pixels = self.pixels(out.encoder_tokens, batch["images"])
        return features + self.pixel_weight * pixels, {
            "distillation_cosine": features.detach(),
            "distillation_pixels": pixels.detach(),
        }


def build_distillation_term(
    cfg: DictConfig, student: MUSE_ViT, pretrained: bool = True
) -> DistillationTerm:
    """The term of `losses.distillation` with the teacher of `teacher.feature`."""
    section = cfg.losses.distillation
    teacher = build_feature_teacher(cfg.teacher.feature, pretrained=pretrained)
    teacher.set_precision(chosen_precision(cfg, cfg.teacher.precision))
    return DistillationTerm(section.weight, teacher, section.pixel_weight, student)
