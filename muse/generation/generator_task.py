"""Training a generator on latents, through the same trainer as the tokenizer."""

import logging
from pathlib import Path
from typing import Any

import numpy
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.config import plain, resolved
from muse.data.train import TrainLoader
from muse.errors import CheckpointError, ConfigError
from muse.evaluation.metrics.networks import load_feature_network
from muse.generation.extraction import STATISTICS
from muse.generation.flow import flow_loss
from muse.generation.generator import (
    Generator,
    build_network,
    generator_facts,
    read_weights_file,
)
from muse.generation.image_sampler import ImageSampler
from muse.generation.latent_data import latent_loader
from muse.generation.latent_shards import LatentShards
from muse.generation.latent_tokenizer import LatentTokenizer, open_tokenizer
from muse.generation.latents import LatentStatistics, check_tokenizer
from muse.generation.lightningdit import LightningDiT
from muse.generation.sample_distance import SampleDistance
from muse.training.task import TrainingTask
from muse.training.trainer import Trainer
from muse.utils.viz_utils import tile
from muse.utils.weights import load_into

log = logging.getLogger(__name__)

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_generator(cfg: DictConfig) -> Path:
    """Train to the end (an interrupted run goes on) and return the `final` directory."""
    return Trainer(cfg, GeneratorTask(cfg)).run()


class GeneratorTask(TrainingTask):
    """A LightningDiT on the latents of `cfg.latents.path`.

    Args:
        cfg: see `muse.generation.generator_config`.
        tokenizer: decodes samples while it trains; None opens the one that the latents name.
    """

    def __init__(self, cfg: DictConfig, tokenizer: LatentTokenizer | None = None):
        super().__init__(cfg)
        self._tokenizer = tokenizer
        self._distance: SampleDistance | None = None

    # ------------------------------------------------------------------------------- building
    def build(self, accelerator: Any) -> LightningDiT:
        """The network, and the latents with their statistics.

        `CheckpointError` where statistics or decoder are of another tokenizer than the latents,
        `ConfigError` where there are too few classes for them.
        """
        self.accelerator = accelerator
        self.shards = LatentShards(plain(self.cfg.latents.path))
        if self.shards.classes > self.cfg.generator.num_classes:
            raise ConfigError(
                f"generator.num_classes={self.cfg.generator.num_classes}, but "
                f"{self.shards.folder} has labels up to {self.shards.classes - 1}"
            )
        sha256 = self.shards.tokenizer_sha256
        self.statistics = LatentStatistics.load(self.shards.folder / STATISTICS, sha256)
        self.facts = generator_facts(self.cfg, self.shards)
        net = build_network(self.cfg, self.shards.shape)
        if source := self.cfg.experiment.init_from:
            self._start_from(net, source)
        net.facts = self.facts
        net.to(accelerator.device)
        self._open_networks()
        if self.cfg.training.compile:
            net.compile()
        count = sum(parameter.numel() for parameter in net.parameters())
        log.info(
            "%.1fM parameters; %d latents of %s (%d views each) by the tokenizer %s…",
            count / 1e6,
            len(self.shards),
            list(self.shards.shape),
            self.shards.views,
            sha256[:12],
        )
        return net

    def empty_model(self) -> LightningDiT:
        return build_network(self.cfg, self.shards.shape)

    def _start_from(self, net: LightningDiT, source: str) -> None:
        path = Path(source).expanduser()
        if path.is_file():
            load_into(net, read_weights_file(path), path, "the generator")
            return
        other = Generator.from_pretrained(source)
        theirs = other.facts["tokenizer"]["sha256"]
        if theirs != self.shards.tokenizer_sha256:
            raise CheckpointError(
                f"experiment.init_from={source}: learned latents of another tokenizer "
                f"({theirs[:12]}, these latents {self.shards.tokenizer_sha256[:12]})"
            )
        load_into(net, other.net.state_dict(), path, "the generator")

    def _open_networks(self) -> None:
        """What decodes and compares samples, where something is to be looked at.

        Without a decoder the run goes on all the same, unless the configuration names one. All are
        opened here and not at their first use, since building a network moves the generators.
        """
        options, experiment = self.cfg.evaluation, self.cfg.experiment
        measures = experiment.eval_every and options.images
        if self._tokenizer is None and (measures or experiment.generate_every):
            self._open_tokenizer()
        if measures and self._tokenizer is not None:
            network = load_feature_network(options.network, options.weights)
            network = network.to(self.accelerator.device)
            self._distance = SampleDistance(self.shards, options.images, network)

    def _open_tokenizer(self) -> None:
        facts = self.facts["tokenizer"]
        try:
            if facts["path"] is None:
                raise CheckpointError("the latents name no checkpoint")
            device, sha256 = self.accelerator.device, facts["sha256"]
            self._tokenizer = open_tokenizer(facts["path"], facts["model"], device, sha256)
        except CheckpointError as error:
            if self.cfg.tokenizer.checkpoint is not None:
                raise
            log.warning(
                "no samples are decoded while it trains: %s; give tokenizer.checkpoint", error
            )

    def prepare(self) -> None:
        """Times, noise and dropped labels differ between the processes: each seeds its own."""
        state = [self.cfg.training.seed, self.accelerator.process_index]
        seed = numpy.random.SeedSequence(state).generate_state(1, numpy.uint64)
        torch.manual_seed(int(seed[0]))

    # ------------------------------------------------------------------------------- a step
    def train_loader(self) -> TrainLoader:
        return latent_loader(
            self.cfg,
            self.shards,
            self.statistics,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def compute_loss(
        self, model: nn.Module, batch: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity, and the weighted cosine beside it."""
        flow = self.cfg.flow
        loss = flow_loss(
            model,
            batch["latents"],
            batch["labels"],
            time_mean=flow.time_mean,
            time_std=flow.time_std,
            shift=flow.shift,
        )
        velocity, cosine = loss.velocity.mean(), loss.cosine.mean()
        numbers = {"velocity": velocity.detach(), "cosine": cosine.detach()}
        return velocity + flow.cosine_weight * cosine, numbers

    # ------------------------------------------------------------------------------- watching
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The Fréchet distance of `evaluation`, under its network's name."""
        if self._distance is None:
            return {}
        value = self._distance.measure(self._sampler(model))
        return {f"fd_{self.cfg.evaluation.network}": value, "samples": self._distance.count}

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Samples of some classes, the same noise without guidance above and with it below."""
        if self._tokenizer is None:
            return {}
        count, classes = self.cfg.experiment.num_pictures, self.cfg.generator.num_classes
        labels = torch.arange(count) * max(1, classes // count) % classes
        scale = self.cfg.evaluation.guidance
        rows = [
            list(self._sampler(model, guidance).images(range(count), labels))
            for guidance in (1.0, scale)
        ]
        return {"samples": tile(rows, ["no guidance", f"guidance {scale:g}"])}

    def _sampler(self, model: nn.Module, guidance: float | None = None) -> ImageSampler:
        options = {**plain(self.cfg.sampling), "steps": self.cfg.evaluation.steps}
        if guidance is not None:
            options["cfg_scale"] = guidance
        return ImageSampler(
            Generator(model, self.statistics, self.facts),
            self._tokenizer,
            options,
            self.cfg.training.seed,
            self.cfg.tokenizer.image_size,
            PRECISIONS[self.cfg.training.mixed_precision],
        )

    # ------------------------------------------------------------------------------- saving
    def continues(self, saved: dict[str, Any]) -> bool:
        """The same network on latents of the same shape (the averages' names are its own)."""
        keys = ("hidden_size", "depth", "num_heads", "patch_size", "num_classes", "qk_norm")
        mine, theirs = resolved(self.cfg).get("generator"), saved.get("generator")
        return theirs is not None and all(mine[key] == theirs[key] for key in keys)

    def write_model(
        self, folder: Path, model: nn.Module, weights: dict[str, Tensor], final: bool
    ) -> None:
        """The weights and the statistics, without which nobody could use them."""
        super().write_model(folder, model, weights, final)
        self.statistics.save(folder / STATISTICS)

    def state_dict(self) -> dict[str, Any]:
        """Whose latents it learns."""
        return {"tokenizer_sha256": self.shards.tokenizer_sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`CheckpointError` where the latents have been extracted anew by another tokenizer."""
        check_tokenizer(
            f"{self.cfg.experiment.output_dir}: its checkpoint",
            state["tokenizer_sha256"],
            self.shards.tokenizer_sha256,
        )
