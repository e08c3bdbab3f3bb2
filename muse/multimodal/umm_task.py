"""Training the multimodal model: one stage of `umm_stages.py`, through the one trainer.

The flow matching loss where a picture is to be made, the cross-entropy of the answer where a
question is to be answered. What is frozen is neither written into checkpoints nor given a gradient.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.config import plain, resolved
from muse.data.transforms import generator_for
from muse.errors import ConfigError
from muse.generation.sampler import noise_for
from muse.models.pretrained import write_weights
from muse.multimodal.chat_prompts import drop_texts
from muse.multimodal.umm import MUSE_UMM
from muse.multimodal.umm_loader import (
    KindsLoader,
    build_kinds_eval_loaders,
    build_kinds_loader,
    sources_by_kind,
)
from muse.multimodal.umm_loading import initial_umm
from muse.multimodal.umm_samples import kind_of_batch
from muse.multimodal.umm_stages import KINDS_OF_STAGES, UMM_STAGES
from muse.stages import select_trainable
from muse.training.task import TrainingTask
from muse.training.trainer import Trainer
from muse.utils.distributed import all_sum
from muse.utils.viz_utils import tile

log = logging.getLogger(__name__)


def train_umm(cfg: DictConfig) -> Path:
    """Run one stage to its end (an interrupted run goes on) and return its `final` directory."""
    return Trainer(cfg, UmmTask(cfg)).run()


class UmmTask(TrainingTask):
    """`MUSE_UMM` with the tensors of its stage to learn, on batches of one kind each."""

    model: MUSE_UMM

    # ------------------------------------------------------------------------------- building
    def build(self, accelerator: Any) -> MUSE_UMM:
        training, self.accelerator = self.cfg.training, accelerator
        kinds = self._kinds()
        if training.trainable is None and (odd := kinds - set(KINDS_OF_STAGES[training.stage])):
            raise ConfigError(
                f"training.stage={training.stage} learns from "
                f"{' and '.join(KINDS_OF_STAGES[training.stage])}, but a source is of kind "
                f"{sorted(odd)[0]}"
            )
        self.model = initial_umm(self.cfg)
        self.model.require_chat()
        if kinds & {"image", "edit"}:
            self.model.latent_scale.require()
            self._check_crop()
        patterns = training.trainable
        names = select_trainable(
            self.model, UMM_STAGES[training.stage].trainable if patterns is None else patterns
        )
        left_out = self.model.left_out(frozen=False)
        kept = self.model.portable_state(frozen=False).keys()
        self._left_out = self.model.state_dict().keys() - kept
        # Now, since the fingerprints of what is left out need it unsharded.
        self._configs = {
            False: self.model.portable_config(left_out),
            True: self.model.portable_config([]),
        }
        self.model.to(accelerator.device)
        log.info(
            "stage %s trains %d tensors, %.2fM parameters, on %s; checkpoints leave out %s",
            training.stage,
            len(names),
            sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6,
            ", ".join(sorted(kinds)),
            ", ".join(left_out) or "nothing",
        )
        return self.model

    def _kinds(self) -> set[str]:
        return set(sources_by_kind(plain(self.cfg.dataset.params.train_shards_path_or_url)))

    def _check_crop(self) -> None:
        crop, cell = self.cfg.dataset.preprocessing.crop_size, self.model.tokenizer.cell
        if crop % cell:
            raise ConfigError(
                f"dataset.preprocessing.crop_size={crop} must be a multiple of {cell}, the pixels "
                "of one of the tokenizer's latents"
            )

    def empty_model(self) -> MUSE_UMM:
        return MUSE_UMM(
            self._configs[True]["model"],
            load_sources=False,
            text_tokenizer=self.model.require_chat().tokenizer,
        )

    def prepare(self) -> None:
        """Give each process noise of its own; a resume restores the generators afterwards."""
        seed = ("noise", self.cfg.training.seed, self.accelerator.process_index)
        torch.manual_seed(generator_for(*seed).getrandbits(63))

    def leaves_tensors_unused(self) -> bool:
        """`latent_tokens` reads source pictures, and a batch of the kind image has none."""
        training, sources = self.cfg.training, self.cfg.model.source_tokens
        return training.trainable is not None or ("latent" in sources and "image" in self._kinds())

    # ------------------------------------------------------------------------------- a step
    def train_loader(self) -> KindsLoader:
        accelerator = self.accelerator
        return build_kinds_loader(
            self.cfg,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )

    def compute_loss(
        self, model: nn.Module, batch: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kind = kind_of_batch(batch)
        if kind == "question":
            losses = model(batch["text"], batch["images"], answers=batch["answers"])  # (B,)
        else:
            texts = drop_texts(batch["text"], self.cfg.training.drop_text)
            losses = model(texts, batch.get("sources"), targets=batch["images"])  # (B,)
        loss = losses.mean()
        return loss, {f"loss/{kind}": loss.detach()}

    # ------------------------------------------------------------------------------- watching
    def evaluate(self, model: MUSE_UMM) -> dict[str, float]:
        """The mean loss of each kind; a sample's noise depends on its number alone."""
        accelerator, found = self.accelerator, {}
        loaders = build_kinds_eval_loaders(
            self.cfg, rank=accelerator.process_index, world=accelerator.num_processes
        )
        for kind, of_kind in loaders.items():
            total = torch.zeros(2, dtype=torch.float64)  # sum of losses, samples
            for loader in of_kind:
                for batch in loader:
                    losses = self._evaluation_losses(model, batch).double().cpu()
                    total += torch.tensor([losses.sum(), len(losses)], dtype=torch.float64)
            total = all_sum(total)
            found[f"loss_{kind}"] = float(total[0] / total[1])
        return found

    def _evaluation_losses(self, model: MUSE_UMM, batch: dict[str, Any]) -> Tensor:
        """Losses (B,) at noise levels and with noise that are the same every time."""
        device, indices = self.accelerator.device, batch["indices"].tolist()
        images = batch["images"].to(device)
        if "answers" in batch:
            return model(batch["text"], images, answers=batch["answers"])
        sides = [side // model.tokenizer.cell for side in images.shape[-2:]]
        noise = noise_for(0, indices, (model.tokenizer.config.latent_dim, *sides))
        level = noise_for(1, indices, (1,)).flatten().sigmoid()  # logit-normal, as in training
        sources = batch["sources"].to(device) if "sources" in batch else None
        return model(
            batch["text"],
            sources,
            targets=images,
            level=level.to(device),
            noise=noise.to(device),
        )

    def pictures(self, model: MUSE_UMM) -> dict[str, Tensor]:
        """What the model makes of a few evaluation prompts and edits, below what it should."""
        count, sheets = self.cfg.experiment.num_pictures, {}
        options = plain(self.cfg.sampling)
        for kind, loaders in build_kinds_eval_loaders(self.cfg, max_images=count).items():
            batch = next(iter(loaders[0]))
            texts, images = batch["text"], batch["images"].to(self.accelerator.device)
            size = tuple(images.shape[-2:])
            if kind == "image":
                made = model.generate(texts, size=size, **options)
                rows = {"data": images, "generated": made}
            elif kind == "edit":
                sources = batch["sources"].to(self.accelerator.device)
                made = model.edit(sources, texts, **options)
                rows = {"source": sources, "data": images, "edited": made}
            else:
                continue
            log.info("%s: %s", kind, " | ".join(texts))
            sheets[kind] = tile([list(row) for row in rows.values()], list(rows))
        return sheets

    # ------------------------------------------------------------------------------- saving
    def continues(self, saved: dict[str, Any]) -> bool:
        """The same model in the same stage, from the same start."""
        mine = resolved(self.cfg)
        return (
            saved["model"] == mine["model"]
            and saved["training"]["stage"] == mine["training"]["stage"]
            and saved["experiment"]["init_from"] == mine["experiment"]["init_from"]
        )

    def left_out(self) -> Collection[str]:
        """What is frozen as its source gave it, and a head that is the embeddings' tensor."""
        return self._left_out

    def write_model(
        self, folder: Path, model: nn.Module, weights: dict[str, Tensor], final: bool
    ) -> None:
        """As `MUSE_UMM.save_pretrained`: a checkpoint without frozen parts, `final` with them."""
        whole = self.model.portable_state().keys()
        weights = {name: value for name, value in weights.items() if name in whole}
        write_weights(folder, weights, self._configs[final])
        self.model.require_chat().tokenizer.save_pretrained(folder)
