"""Pretraining of the small encoder: one pass of a frozen classifier gives three things to learn.

Its feature maps (cosine, place by place), its answer over ImageNet's 1000 classes (Kullback-Leibler
divergence, from the mean token), and beside them the token's own patch of pixels. The heads live
here and are thrown away afterwards. It stands where the paper has an InternViT that was trained on
pairs of pictures and texts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.losses.distillation import FeatureDistillation, PixelHead
from muse.losses.term import Term
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.teachers.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from muse.teachers.features import resize_features

BLOCKS = (4, 10, 14)  # strides 8, 16 and 32
_LAST_BLOCK = 15


class ClassDistillation(nn.Module):
    """KL(teacher || student) over the classes, in nats.

    The student predicts what the frozen classifier reads.
    """

    def __init__(self, student_channels: int, classifier: nn.Linear):
        super().__init__()
        self.norm = nn.LayerNorm(student_channels)
        self.head = nn.Linear(student_channels, classifier.in_features)

    def forward(self, tokens: Tensor, pooled: Tensor, classifier: nn.Linear) -> Tensor:
        """tokens (B,C,h,w) of the student, pooled (B,Ct) of the teacher -> a float32 scalar.

        Args:
            tokens: the encoder's output; the mean over places is taken after a LayerNorm.
            pooled: what the teacher's own classifier reads; no gradient reaches it.
            classifier: the teacher's last layer, frozen, used for both.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            mean = self.norm(tokens.float().flatten(2).transpose(1, 2)).mean(dim=1)  # (B,C)
            mine = F.log_softmax(classifier(self.head(mean)), dim=-1)  # (B,1000)
            target = F.log_softmax(classifier(pooled.detach().float()), dim=-1)
            return F.kl_div(mine, target, log_target=True, reduction="batchmean")


class RecognitionTerm(Term):
    """Features, pixels and classes, each with its weight."""

    name = "recognition"

    def __init__(self, section: DictConfig, network: EfficientNetLite0, student: MUSE_ViT):
        super().__init__(section.weight)
        width = student.encoder.config.hidden_size
        self.network = network
        self.pixel_weight, self.class_weight = section.pixel_weight, section.class_weight
        self.features = FeatureDistillation(width, sum(network.channels[b] for b in BLOCKS))
        self.pixels = PixelHead(width, student.patch_size)
        self.classes = ClassDistillation(width, network.classifier)

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, images = out.encoder_tokens, batch["images"]
        maps, pooled = self._teach(images, tuple(tokens.shape[-2:]))
        features = self.features(tokens, maps)
        pixels = self.pixels(tokens, images)
        classes = self.classes(tokens, pooled, self.network.classifier)
        numbers = {
            "recognition_cosine": features.detach(),
            "recognition_pixels": pixels.detach(),
            "recognition_classes": classes.detach(),
        }
        return features + self.pixel_weight * pixels + self.class_weight * classes, numbers

    @torch.no_grad()
    def _teach(self, images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Unit-length features of BLOCKS at `grid` (B,Ct,h,w), and the pooled features (B,1280)."""
        *maps, last = self.network(images, (*BLOCKS, _LAST_BLOCK))
        pooled = F.relu6(self.network.head(last)).mean(dim=(2, 3))
        return torch.cat([F.normalize(resize_features(m, grid), dim=1) for m in maps], 1), pooled


def build_recognition_term(cfg: DictConfig, student: MUSE_ViT, grid: tuple[int, int]) -> Term:
    return RecognitionTerm(cfg.losses.recognition, load_efficientnet_lite0(), student)
