"""The latent spaces that the demo compares under one generator: MUSE, an untrained one, pixels."""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from muse.config import plain, shipped_config
from muse.errors import CheckpointError
from muse.evaluation.measurement import Crop
from muse.experiments.generation_judge import BATCH, ClassifiedSet, Judge, classified_set
from muse.generation.extraction import STATISTICS, ExtractionPlan, extract_latents
from muse.generation.generator import Generator
from muse.generation.generator_config import load_generator_config
from muse.generation.generator_task import GeneratorTask
from muse.generation.image_sampler import ImageSampler, blocks, labels_for
from muse.generation.latent_tokenizer import LatentTokenizer, MuseTokenizer, open_tokenizer
from muse.generation.latents import LatentStatistics
from muse.generation.sampler import noise_for
from muse.models.loading import weights_file
from muse.models.muse_vit import MUSE_ViT
from muse.models.pretrained import read_model_config
from muse.training.run_directory import was_run_with
from muse.training.trainer import Trainer

log = logging.getLogger(__name__)

SIDE = 128  # of the demo's pictures
TITLES = {
    "muse": "MUSE's latents",
    "untrained": "latents of an untrained MUSE",
    "pixels": "pixels shrunk to 8x8",
}
# Where a trained tokenizer is looked for, in this order.
DEFAULTS = ("muse_tiny", "outputs/demo/stage3/final", "outputs/demo-fast/stage3/final")


@dataclass
class PixelGrid:
    """A `LatentTokenizer` without a network: the picture shrunk to a grid of side x side pixels."""

    side: int = 8
    scale: int = 16  # of decoded pictures, where no size is asked for

    @property
    def sha256(self) -> str:
        """Of its settings: there are no weights."""
        return hashlib.sha256(f"pixels {self.side} x {self.side}".encode()).hexdigest()

    def encode(self, images: Tensor) -> Tensor:
        return F.interpolate(images, (self.side, self.side), mode="area")

    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (latents.shape[-2] * self.scale, latents.shape[-1] * self.scale)
        return F.interpolate(latents, size, mode="bicubic", align_corners=False).clamp(0, 1)


def find_tokenizer(given: str | None) -> str:
    """The checkpoint of a trained tokenizer: as given, or the first of `DEFAULTS` that exists."""
    for name in [given] if given else DEFAULTS:
        try:
            weights_file(name)
        except CheckpointError:
            if given:
                raise
            continue
        return name
    raise CheckpointError(
        f"no trained tokenizer: none of {', '.join(DEFAULTS)} exists; run tools/demo.sh first, or "
        "give --tokenizer DIR"
    )


def tokenizer_of(space: str, trained: MuseTokenizer, folder: Path) -> LatentTokenizer:
    """The tokenizer of one of `TITLES`.

    Args:
        space: its name.
        trained: MUSE's, whose architecture the untrained one has.
        folder: where the untrained one is kept.
    """
    if space == "muse":
        return trained
    if space == "pixels":
        return PixelGrid()
    if not (folder / "config.json").is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = trained.model.portable_config()["model"]
            MUSE_ViT(config, load_backbones=False).save_pretrained(folder)
    return open_tokenizer(folder)


def notes_of(tokenizer: LatentTokenizer) -> dict[str, Any]:
    """What `latents.json` says of the tokenizer, so that generate.py finds it."""
    if not isinstance(tokenizer, MuseTokenizer):
        return {}
    model = read_model_config(weights_file(tokenizer.path).parent)
    return {"checkpoint": {"path": tokenizer.path}, "config": {"model": model}}


@dataclass(frozen=True)
class GenerationDemoPlan:
    """How much of everything.

    Args:
        steps: of training, for each latent space.
        samples: pictures of every row of the table.
        sampler_steps: of the solver.
        guidance: cfg_scale of the guided rows.
        images: training pictures.
        watch_every: steps between pictures and distances while it trains; 0: none.
        seed: of everything.
    """

    steps: int
    samples: int
    sampler_steps: int
    guidance: float = 3.0
    images: int = 3000
    watch_every: int = 0
    seed: int = 0


@dataclass
class LatentSpace:
    """One latent space: its latents, its generator, its samples."""

    name: str
    tokenizer: LatentTokenizer
    output: Path
    plan: GenerationDemoPlan
    data: Path
    classes: int
    overrides: Sequence[str]

    def run(
        self, judge: Judge, other_half: ClassifiedSet, val: ClassifiedSet
    ) -> tuple[dict[str, Any], dict[str, ClassifiedSet]]:
        """Its part of the results, and its samples by row of the table.

        Args:
            judge: measures.
            other_half: the real pictures that the judge's distance is not to.
            val: real pictures that nobody learned.
        """
        measured = self.measure_tokenizer(judge, other_half, val)
        made = self.samples(self.train(), judge.network)
        return measured | {row: judge.measure(pictures) for row, pictures in made.items()}, made

    def measure_tokenizer(
        self, judge: Judge, other_half: ClassifiedSet, val: ClassifiedSet
    ) -> dict[str, Any]:
        """What is possible here without a generator: real pictures there and back, noise, mean."""
        index = extract_latents(
            self.tokenizer,
            [f"{self.data}/train-*.tar"],
            self.output / f"latents-{self.name}",
            ExtractionPlan(Crop(SIDE, SIDE), flip=True, batch_size=BATCH),
            notes_of(self.tokenizer),
        )
        latents = self.output / f"latents-{self.name}" / STATISTICS
        statistics = LatentStatistics.load(latents, self.tokenizer.sha256)
        labels = labels_for(self.plan.seed, range(self.plan.samples), "all", self.classes)

        def decoded(normalised: Tensor) -> Tensor:
            return self.tokenizer.decode(statistics.denormalise(normalised), (SIDE, SIDE))

        noise = (
            (
                decoded(noise_for(self.plan.seed, part, index["shape"])),
                labels[part.start : part.stop],
            )
            for part in blocks(self.plan.samples, BATCH)
        )
        mean = judge.network(decoded(torch.zeros(1, *index["shape"])))  # (1, D)
        floor = classified_set(
            self._there_and_back(other_half.first(self.plan.samples)), judge.network
        )
        held_out = classified_set(self._there_and_back(val), judge.network)
        return {
            "shape": index["shape"],
            # The distance as of all rows; class and neighbours of pictures that nobody learned.
            "reconstructions": {**judge.measure(held_out), "fd": judge.distance(floor.features)},
            "noise": judge.measure(classified_set(noise, judge.network)),
            "mean": {"fd": judge.distance(mean.expand(self.plan.samples, -1))},
        }

    def _there_and_back(self, pictures: ClassifiedSet) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(pictures.images.split(BATCH), pictures.labels.split(BATCH)):
            yield self.tokenizer.decode(self.tokenizer.encode(images / 255), (SIDE, SIDE)), labels

    # ------------------------------------------------------------------------------- training
    def config(self) -> DictConfig:
        """The generator's configuration."""
        plan = self.plan
        own = [
            f"latents.path={self.output / f'latents-{self.name}'}",
            f"generator.num_classes={self.classes}",
            f"sampling.steps={plan.sampler_steps}",
            f"tokenizer.image_size={SIDE}",
            f"evaluation.guidance={plan.guidance}",
            f"training.max_train_steps={plan.steps}",
            f"training.seed={plan.seed}",
            f"experiment.output_dir={self.output / self.name}",
            f"experiment.eval_every={plan.watch_every}",
            f"experiment.generate_every={plan.watch_every}",
        ]
        return load_generator_config(
            shipped_config("generation/tiny.yaml"), [*own, *self.overrides]
        )

    def train(self) -> ImageSampler:
        """Train, go on, or find it trained; a run with other settings is started anew."""
        cfg = self.config()
        folder = Path(cfg.experiment.output_dir)
        if (folder / "config.yaml").is_file() and not was_run_with(folder, cfg):
            log.info("%s was trained with other settings: starting it again", folder)
            shutil.rmtree(folder)
        if not (folder / "final").is_dir():
            Trainer(cfg, GeneratorTask(cfg, self.tokenizer)).run()
        generator = Generator.from_pretrained(folder / "final")
        options = plain(cfg.sampling)
        return ImageSampler(generator, self.tokenizer, options, self.plan.seed, SIDE)

    def samples(self, sampler: ImageSampler, network: Any) -> dict[str, ClassifiedSet]:
        """The same noise and classes without guidance and with it."""
        plan, made = self.plan, {}
        for row, scale in (("samples", 1.0), ("guided", plan.guidance)):
            sampler.options["cfg_scale"] = scale

            def pictures() -> Iterator[tuple[Tensor, Tensor]]:
                for part in blocks(plan.samples, BATCH):
                    labels = labels_for(plan.seed, part, "all", self.classes)
                    yield sampler.images(part, labels), labels

            made[row] = classified_set(pictures(), network)
        return made
