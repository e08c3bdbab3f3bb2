"""Many pictures of a generator, written as PNG files or an npz, with a grid of the first ones."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from muse.evaluation.image_writer import image_writer
from muse.generation.image_sampler import ImageSampler, blocks, labels_for
from muse.utils.distributed import all_objects, is_main_process, process_index, world_size
from muse.utils.viz_utils import save_image, tile, to_uint8


@dataclass(frozen=True)
class GenerationPlan:
    """What is made and where it goes.

    Args:
        count: pictures.
        output: a folder, or a file that ends in .npz.
        labels: see `labels_for`.
        batch: pictures at a time.
        grid: a picture file for a sheet of the first `grid_count`, or None.
        grid_columns: of that sheet.
    """

    count: int
    output: str
    labels: str | tuple[int, ...] = "all"
    batch: int = 64
    grid: str | None = None
    grid_count: int = 48
    grid_columns: int = 8


def generate_images(sampler: ImageSampler, plan: GenerationPlan) -> None:
    """Make and write all pictures; every process calls it and makes its share.

    `ConfigError` for a label that is no class, `DataError` where the output cannot be written.
    """
    classes = sampler.generator.net.num_classes
    labels_for(sampler.seed, range(1), plan.labels, classes)  # a wrong label, before anything else
    shown: dict[int, Tensor] = {}
    with image_writer(plan.output) as add:
        for numbers in blocks(plan.count, plan.batch, process_index(), world_size()):
            labels = labels_for(sampler.seed, numbers, plan.labels, classes)
            images = sampler.images(numbers, labels)
            add(images, torch.tensor(numbers))
            if plan.grid:
                kept = zip(numbers, to_uint8(images))
                shown |= {number: image for number, image in kept if number < plan.grid_count}
    if plan.grid:
        parts = all_objects(shown)
        if is_main_process():
            everything = {number: image for part in parts for number, image in part.items()}
            save_image(_sheet(everything, plan.grid_columns), Path(plan.grid))


def _sheet(images: dict[int, Tensor], columns: int) -> Tensor:
    """Pictures in the order of their numbers, row by row."""
    row = [images[number] / 255 for number in sorted(images)]
    return tile([row[start : start + columns] for start in range(0, len(row), columns)])
