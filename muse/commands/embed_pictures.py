"""Image embeddings of picture files, and how well texts fit them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from omegaconf import DictConfig
from torch import Tensor

from muse.commands.picture_batches import batches_by_size
from muse.config import load_config, shipped_config
from muse.errors import ConfigError, DataError
from muse.teachers.build import shared_text_teacher
from muse.utils.io import atomic_file, write_text
from muse.utils.weights import packaged


def embed_files(
    model, files: Sequence[Path], max_side: int = 2048, batch_size: int = 8
) -> tuple[list[Path], Tensor, list[tuple[Path, str]]]:
    """The embedding of each picture.

    Args:
        model: a `MUSE_ViT`.
        files: pictures of any size.
        max_side: larger pictures are shrunk to this side, pixels.
        batch_size: pictures of one size at a time.

    Returns:
        The files that could be read, their embeddings (N, E), float32 and L2-normalised, in the
        order of the files, and what could not be read with the reason.
    """
    rows: dict[int, Tensor] = {}
    failed: list[tuple[Path, str]] = []
    device = next(model.parameters()).device
    for batch in batches_by_size(files, batch_size, max_side, failed):
        images = torch.stack([picture.image for picture in batch]).to(device)
        with torch.inference_mode():
            embeds = model.embed_image(images).float().cpu()  # (B, E)
        rows.update(zip((picture.index for picture in batch), embeds))
    order = sorted(rows)
    stacked = torch.stack([rows[index] for index in order]) if order else torch.empty(0, 0)
    return [files[index] for index in order], stacked, failed


def write_embeddings(file: Path, names: Sequence[Path], embeds: Tensor) -> None:
    """`.csv`: a row a picture, its name first. `.npy`: (N, E) float32; names in FILE.names.json."""
    if file.suffix == ".npy":
        with atomic_file(file) as partial:
            numpy.save(partial, embeds.numpy())
        write_text(file.with_suffix(".names.json"), json.dumps(list(map(str, names)), indent=1))
        return
    with atomic_file(file) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file", *(f"e{number}" for number in range(embeds.shape[1]))])
        for name, values in zip(names, embeds.tolist()):
            rows.writerow([name, *(f"{value:.8g}" for value in values)])


def write_similarities(
    file: Path, names: Sequence[Path], texts: Sequence[str], cosines: Tensor
) -> None:
    """A CSV with a row a picture and a column a text: cosines, (N, T)."""
    with atomic_file(file) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file", *texts])
        for name, values in zip(names, cosines.tolist()):
            rows.writerow([name, *(f"{value:.6f}" for value in values)])


def read_texts(texts: Sequence[str], file: str | None) -> list[str]:
    """The texts of flags and of a file's lines, each once; `DataError` for an empty file."""
    lines: list[str] = []
    if file is not None:
        content = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        lines = [line.strip() for line in content if line.strip()]
        if not lines:
            raise DataError(f"{file}: holds no text")
    given = [text.strip() for text in texts]
    if "" in given:
        raise ConfigError("--text is empty")
    return list(dict.fromkeys([*given, *lines]))


def embed_texts(texts: Sequence[str], checkpoint: str | Path, config: str | None) -> Tensor:
    """(T, E): embeddings of texts by the text tower that a checkpoint was trained with.

    Args:
        texts: one or more.
        checkpoint: a packaged model, or one below a run's directory, which keeps its configuration.
        config: a configuration that names the tower (`teacher.text`); it wins.

    Raises:
        ConfigError: which tower it was is not known, or its width is another.
        CheckpointError: the tower's weights are not there.
    """
    return shared_text_teacher(text_config(checkpoint, config)).encode(list(texts)).cpu()


def text_config(checkpoint: str | Path, config: str | None = None) -> DictConfig:
    """The configuration whose `teacher.text` names a checkpoint's text tower; errors as above."""
    file = find_text_config(checkpoint, config)
    if file is None:
        raise ConfigError(
            f"{checkpoint}: does not say which text tower it was trained with; name its "
            "configuration with --config"
        )
    cfg = load_config(file)
    if cfg.teacher.text.kind == "none":
        raise ConfigError(f"{file}: teacher.text.kind=none, so texts cannot be embedded")
    return cfg


def find_text_config(checkpoint: str | Path, config: str | None = None) -> str | Path | None:
    """The file that names the text tower, or None where nothing does."""
    if config is not None:
        return config
    if packaged(checkpoint):
        return shipped_config(f"{checkpoint}/model.yaml")
    path = Path(checkpoint).expanduser().absolute()
    beside = (folder / "config.yaml" for folder in (path, *list(path.parents)[:2]))
    return next((file for file in beside if file.is_file()), None)
