"""What the demo measures before and after each stage, on pictures that no stage has seen."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from muse.config import plain
from muse.data.dataloader import build_eval_loader
from muse.evaluation.attention_quality import (
    TopologyQuality,
    mean_teacher_maps,
    object_cells,
    teacher_maps,
)
from muse.evaluation.class_names import read_class_names
from muse.evaluation.evaluator import Evaluator
from muse.evaluation.linear_probe import pixel_features, train_linear_probe
from muse.evaluation.segmentation import (
    evaluate_segmentation,
    foreground_iou,
    train_segmentation_probe,
)
from muse.evaluation.zero_shot import retrieval, zero_shot
from muse.models.muse_vit import MUSE_ViT
from muse.teachers import class_embeddings

TEMPLATES = ("A photo of a {}.", "A {}.", "A picture of a {}.", "Something, a kind of {}.")
FIELDS = ("images", "text", "labels", "masks")
PERCEPTUAL, FRECHET = "perceptual_efficientnet_lite0", "fd_efficientnet_lite0"


def latent_grid(cfg: DictConfig) -> tuple[int, int]:
    """(h, w) of the latent at the training crop."""
    side = cfg.dataset.preprocessing.crop_size // (
        plain(cfg.model.encoder.config)["patch_size"][0] * cfg.model.unshuffle
    )
    return side, side


@dataclass
class Pictures:
    """A set held in memory."""

    images: Tensor  # (n, 3, H, W) in [0, 1]
    text: list[str]
    labels: Tensor  # (n,)
    masks: Tensor  # (n, H, W), 0 is background

    @classmethod
    def load(cls, cfg: DictConfig, source: Any, limit: int | None = None) -> "Pictures":
        """The first `limit` pictures of a source."""
        batches = list(
            build_eval_loader(cfg, source=plain(source), fields=FIELDS, max_images=limit)
        )
        return cls(
            torch.cat([b["images"] for b in batches]),
            [t for b in batches for t in b["text"]],
            torch.cat([b["labels"] for b in batches]),
            torch.cat([b["masks"] for b in batches]),
        )

    def batches(self, size: int = 32) -> list[dict[str, Tensor]]:
        """In order, `size` at a time."""
        return [
            {"images": i, "masks": m}
            for i, m in zip(self.images.split(size), self.masks.split(size))
        ]


class Yardstick:
    """What stays the same between measurements: pictures, teachers, baselines.

    `measure(model)` gives the numbers; `beside(source)` is the same on other validation pictures.

    Args:
        cfg: names the data.
        topology_teacher: images -> `TopologyTarget`.
        text_teacher: captions -> (n, E).
        probe_images: how many training pictures the probes see.
        val_images: how many are measured; None is all.
    """

    def __init__(
        self,
        cfg: DictConfig,
        topology_teacher: Callable,
        text_teacher: Callable,
        probe_images: int = 600,
        val_images: int | None = None,
    ):
        params = cfg.dataset.params
        self._cfg, self._topology, self._text = cfg, topology_teacher, text_teacher
        self.train = Pictures.load(cfg, params.train_shards_path_or_url, probe_images)
        self.grid, self.blocks = latent_grid(cfg), cfg.model.num_blocks
        self.prior = mean_teacher_maps(topology_teacher, self.train.batches(), self.grid)
        self.classes = read_class_names(
            Path(str(params.train_shards_path_or_url)).parent / "classes.txt"
        )
        with torch.no_grad():
            self.class_text = class_embeddings(text_teacher, self.classes, TEMPLATES)
        self._take(params.eval_shards_path_or_url, val_images)

    def _take(self, source: Any, val_images: int | None) -> None:
        """Read the validation pictures, and what depends on them alone."""
        self.val = Pictures.load(self._cfg, source, val_images)
        self.targets = [
            teacher_maps(self._topology, b["images"], self.grid) for b in self.val.batches()
        ]
        with torch.no_grad():
            self.text = self._text(self.val.text)
        self.baselines = self._baselines()

    def beside(self, source: Any, val_images: int | None = None) -> "Yardstick":
        """A yardstick for other validation pictures, with this one's training pictures.

        Args:
            source: shards, as `dataset.params.eval_shards_path_or_url`.
            val_images: how many are measured; None is all.
        """
        other = copy.copy(self)
        other._take(source, val_images)
        return other

    def _baselines(self) -> dict[str, float]:
        """What needs no model: shrunk pictures, raw pixels under the same probe, chance."""
        probe = train_linear_probe(
            pixel_features(self.train.images),
            self.train.labels,
            pixel_features(self.val.images),
            self.val.labels,
            len(self.classes),
        )
        small = F.interpolate(self.val.images, size=self.grid, mode="bilinear", antialias=True)
        shrunk = F.interpolate(
            small, size=self.val.images.shape[-2:], mode="bilinear", align_corners=False
        ).clamp(0, 1)
        evaluator = Evaluator(("psnr", "ssim"))
        evaluator.update(self.val.images, shrunk)
        shrunk_quality = evaluator.compute()
        foreground = (self.val.masks > 0).float().mean()
        return {
            "psnr_shrunk_to_grid": shrunk_quality["psnr"],
            "ssim_shrunk_to_grid": shrunk_quality["ssim"],
            "probe_pixels": probe.last.macro,
            "probe_chance": probe.chance,
            "foreground_everywhere_iou": float(foreground),
        }

    @torch.no_grad()
    def _features(self, model: MUSE_ViT, pictures: Pictures) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {"semantic": [], "block": [], "encoder": []}
        for batch in pictures.batches():
            out = model(batch["images"], topology=False, semantics=False, reconstruction=False)
            parts["semantic"].append(out.anchors[:, -1])
            parts["block"].append(out.tokens)
            parts["encoder"].append(F.avg_pool2d(out.encoder_tokens, model.config.unshuffle))
        return {name: torch.cat(values) for name, values in parts.items()}

    @torch.no_grad()
    def _outputs(self, model: MUSE_ViT) -> tuple[Tensor, dict[str, Any], dict[str, float]]:
        """Embeddings, topology quality and picture quality of the validation set, from one pass."""
        quality, embeds = TopologyQuality(self.prior), []
        evaluator = Evaluator(("psnr", "ssim", PERCEPTUAL, FRECHET))
        for batch, targets in zip(self.val.batches(), self.targets):
            out = model(batch["images"])
            quality.update(
                [log.exp() for log in out.log_topology],
                targets,
                object_cells(batch["masks"], out.grid),
            )
            evaluator.update(batch["images"], out.reconstruction.clamp(0, 1))
            embeds.append(out.image_embeds[-1])
        return torch.cat(embeds), quality.compute(), evaluator.compute()

    def train_features(self, model: MUSE_ViT) -> dict[str, Tensor]:
        """What the probes of `measure` learn from: features of the training pictures, by kind."""
        return self._features(model.eval(), self.train)

    def measure(self, model: MUSE_ViT, train: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """All numbers of one model: shares in [0, 1], PSNR in dB, topology in nats.

        macro: mean over classes.

        Args:
            model: put into eval mode.
            train: its `train_features`, where another yardstick beside this one has them.
        """
        train = train or self.train_features(model)
        val = self._features(model, self.val)
        embeds, topology, quality = self._outputs(model)
        found = retrieval(embeds, self.text, self.val.text)
        classes = zero_shot(embeds, self.val.labels, self.class_text)
        probes = {}
        for name in ("semantic", "encoder"):
            pool = (lambda x: x) if name == "semantic" else (lambda x: x.mean((2, 3)))
            probes[name] = train_linear_probe(
                pool(train[name]),
                self.train.labels,
                pool(val[name]),
                self.val.labels,
                len(self.classes),
            ).last
        iou = {
            name: foreground_iou(
                train[name], self.train.masks, val[name], self.val.masks, steps=200
            )
            for name in ("block", "encoder")
        }
        parts = train_segmentation_probe(
            train["block"], self.train.masks, len(self.classes) + 1, steps=200
        )
        return {
            **quality,
            "topology": topology,
            "retrieval_r1": found["image_to_text_r1"],
            "retrieval_r5": found["image_to_text_r5"],
            "retrieval": found,
            "linear_probe_macro": probes["semantic"].macro,
            "linear_probe_micro": probes["semantic"].micro,
            "linear_probe_encoder_macro": probes["encoder"].macro,
            "zero_shot_macro": classes["top1_macro"],
            "zero_shot_micro": classes["top1"],
            "zero_shot": classes,
            "miou": evaluate_segmentation(parts, val["block"], self.val.masks).mean,
            "foreground_iou": iou["block"],
            "foreground_iou_encoder": iou["encoder"],
        }
