"""Pictures for a file of prompts, or edits for a file of instructions, in the layout of its judge.

Processes share the prompts out; a picture depends on the seed and on its number alone.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse.inference import read_image
from muse.multimodal.prompt_files import (
    Prompt,
    PromptFile,
    grid_path,
    noise_indices,
    picture_paths,
    source_path,
    write_metadata,
)
from muse.multimodal.umm import MUSE_UMM
from muse.utils.distributed import process_index, world_size
from muse.utils.viz_utils import save_image, tile


def write_generated(
    umm: MUSE_UMM,
    file: PromptFile,
    root: str | Path,
    samples: int = 1,
    batch_size: int = 4,
    **options: Any,
) -> list[Path]:
    """Pictures of this process's prompts; gives their paths.

    Args:
        umm: the model.
        file: the prompts and their layout.
        root: the output folder.
        samples: pictures of each prompt.
        batch_size: pictures at a time; changes no result.
        options: of `umm.generate`: steps, guidance_scale, seed, size.
    """
    for prompt in file.prompts:  # a wrong number of samples, before anything else
        picture_paths(file.layout, root, prompt, samples)
    work = [
        (prompt, path, index)
        for prompt in _own_share(file.prompts)
        for path, index in zip(
            picture_paths(file.layout, root, prompt, samples), noise_indices(prompt, samples)
        )
    ]
    unfinished: list[Tensor] = []  # pictures of the prompt that is being made
    for batch in _batches(work, batch_size):
        texts, indices = [prompt.text for prompt, _, _ in batch], [i for _, _, i in batch]
        images = umm.generate(texts, indices=indices, **options).cpu()
        for (prompt, path, _), image in zip(batch, images):
            save_image(image, path)
            unfinished.append(image)
            if len(unfinished) == samples:
                _finish(file.layout, root, prompt, unfinished)
                unfinished = []
    return [path for _, path, _ in work]


def _finish(layout: str, root: str | Path, prompt: Prompt, images: list[Tensor]) -> None:
    """What a benchmark wants beside a prompt's pictures."""
    if layout == "geneval":
        write_metadata(root, prompt)
        save_image(tile([images]), grid_path(root, prompt))


def write_edited(
    umm: MUSE_UMM,
    file: PromptFile,
    root: str | Path,
    sources: str | Path,
    batch_size: int = 4,
    **options: Any,
) -> list[Path]:
    """Edits of this process's prompts; gives their paths.

    Args:
        umm: the model.
        file: the instructions with their source pictures.
        root: the output folder.
        sources: the folder of source pictures.
        batch_size: pictures at a time; changes no result.
        options: of `umm.edit`: steps, guidance_scale, seed.
    """
    for prompt in file.prompts:  # a missing picture, before anything else
        source_path(sources, prompt)
    written = []
    for batch in _batches(_own_share(file.prompts), batch_size):
        pictures = [read_image(source_path(sources, prompt)) for prompt in batch]
        pairs = zip(batch, pictures)
        # Of one batch those that are equally large go together.
        for _, group in groupby(pairs, key=lambda pair: pair[1].shape):
            prompts, images = zip(*group)
            edited = umm.edit(
                torch.stack(images).to(umm.queries.device),
                [prompt.text for prompt in prompts],
                indices=[prompt.number for prompt in prompts],
                **options,
            )
            for prompt, image in zip(prompts, edited.cpu()):
                (path,) = picture_paths(file.layout, root, prompt)
                save_image(image, path)
                written.append(path)
    return written


def _own_share(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    return prompts[process_index() :: world_size()]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
