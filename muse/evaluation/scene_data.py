"""Pictures and masks for a probe that computes features as they come: training and evaluation."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor

from muse.data.dataloader import train_loader
from muse.data.eval import EvalLoader
from muse.data.part_of_source import PartOfSource
from muse.data.samples import SampleMaker
from muse.data.scenes import SceneCrop
from muse.data.train import TrainLoader
from muse.errors import ConfigError, DataError
from muse.evaluation import measurement
from muse.evaluation.measurement import Setup
from muse.evaluation.probed_network import ProbedNetwork
from muse.evaluation.recipes import SegmentationRecipe
from muse.evaluation.segmentation_scores import hold_out
from muse.evaluation.segmentation_settings import MaskLabels
from muse.utils.distributed import all_objects, process_index, world_size

FIELDS = ("images", "masks")


class SceneMaps:
    """Pictures on any device -> feature maps on the probe's; remembers the grid of every size.

    Args:
        network: what is probed.
        setup: its device and precision.
        drop: pictures are cut to whole cells, and the maps then stretch over all of them, as where
            a network drops what does not fill a patch; else they are padded, and the maps cover
            the padding (`covered_size`).
    """

    def __init__(self, network: ProbedNetwork, setup: Setup, drop: bool = False):
        self.network, self.setup, self.drop = network, setup, drop and network.cell is not None
        self.cell = None if drop else network.cell
        self.grids: dict[tuple[int, int], tuple[int, int]] = {}

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,C,h,w) float32."""
        size = tuple(pictures.shape[-2:])
        if self.drop:
            cell = self.network.cell
            rows, columns = (side - side % cell or side for side in size)
            pictures = pictures[..., :rows, :columns]
        with self.setup.autocast():
            maps = self.network.features(pictures.to(self.setup.device))
        maps = maps.float()
        if not torch.isfinite(maps).all():
            raise DataError("features contain NaN or infinity")
        self.grids[size] = tuple(maps.shape[-2:])
        return maps


class SceneTraining(NamedTuple):
    """Training pictures, and what is held out of them."""

    loader: TrainLoader
    batches: Iterator[tuple[Tensor, Tensor]]  # images (b,3,h,w) and masks (b,h,w) of this process
    steps: int
    epoch_steps: int | None  # where epochs are compared
    held_out: EvalLoader | None
    all_masks: Callable[[], list]  # of all training pictures, for the number of classes
    facts: dict

    def finished_facts(self, setup: Setup) -> dict:
        """`facts` with what was skipped, over all processes."""
        limit = setup.cfg.dataset.max_bad_fraction
        return {**self.facts, "samples": measurement.skipped(self.loader, limit)}


def evaluation_scenes(setup: Setup, part: str, labels: MaskLabels, source=None) -> EvalLoader:
    """Every picture once, with its mask, cut as the protocol cuts them.

    Args:
        setup: which data.
        part: train or val.
        labels: how masks are read.
        source: in place of the data of that part; none of it is left out.
    """
    if setup.picture_crop().crop_size is None:  # pictures of all sizes cannot be stacked
        setup = replace(setup, batch_size=1)
    if source is not None:
        setup = replace(setup, **{f"{part}_url": source, "max_images": None})
    return measurement.eval_data(setup, part, FIELDS, zero_label_ignored=labels.zero_ignored)


def training_scenes(setup: Setup, recipe: SegmentationRecipe, labels: MaskLabels) -> SceneTraining:
    """Endless batches of the part that is fitted, each process its share of a batch.

    ConfigError where the data or the number of processes do not fit the recipe.
    """
    whole = evaluation_scenes(setup, "train", labels)
    source, choose = whole.stream.source, len(recipe.learning_rates) > 1 or recipe.report == "best"
    world = world_size()
    if recipe.batch_size % world:
        raise ConfigError(f"batches of {recipe.batch_size} pictures do not go to {world} processes")
    facts = {"data": source.name, "selection": measurement.selection(setup, whole)}
    held_out, count = None, None
    if source.local:
        fitted, held = hold_out(whole.stream.places, setup.cfg.training.seed if choose else None)
        count = len(fitted)
        facts |= {"images": count}
        if held:
            part = PartOfSource(source, whole.stream.counts, held)
            held_out = evaluation_scenes(setup, "train", labels, part)
        if count < sum(whole.stream.counts):
            source = PartOfSource(source, whole.stream.counts, fitted)
    elif choose or recipe.steps is None:
        raise ConfigError(
            f"{source.name} is read as a stream, of which nothing can be held out: give local data,"
            " or a protocol with a number of --steps and one learning rate"
        )
    epoch = None if count is None else max(1, count // recipe.batch_size)
    steps = recipe.steps or recipe.epochs * epoch
    loader = _training_loader(setup, recipe, labels, source)
    batches = ((batch["images"], labels.read(batch["masks"])) for batch in loader)
    compared = epoch if recipe.report == "best" else None
    return SceneTraining(loader, batches, steps, compared, held_out, lambda: _masks(whole), facts)


def _training_loader(
    setup: Setup, recipe: SegmentationRecipe, labels: MaskLabels, source
) -> TrainLoader:
    cut = SceneCrop(**asdict(recipe.augmentation)) if recipe.augmentation else setup.picture_crop()
    world = world_size()

    def maker(_, *settings) -> SampleMaker:  # with this cut in place of the loader's
        return SampleMaker(cut, *settings)

    return train_loader(
        source,
        batch_size=recipe.batch_size // world,
        fields=FIELDS,
        zero_label_ignored=labels.zero_ignored,
        num_workers=min(setup.workers(), len(source.shards) // world),
        seed=setup.cfg.training.seed,
        rank=process_index(),
        world=world,
        shuffle_buffer=setup.cfg.dataset.params.shuffle_buffer,
        max_bad_fraction=setup.cfg.dataset.max_bad_fraction,
        pin_memory=setup.device.startswith("cuda"),
        maker=maker,
    )


def _masks(loader: EvalLoader) -> list:
    """The largest label of every process's masks, each as an array."""
    largest = [batch["masks"].unique() for batch in loader]
    mine = torch.cat(largest).unique() if largest else torch.empty(0, dtype=torch.int64)
    return [torch.cat(all_objects(mine)).unique().numpy()[None]]
