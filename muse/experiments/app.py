"""The live page of `muse app`: drop a picture, see its reconstruction, attention and labels.

`LiveModel` does the work and knows nothing of the page; `build_app` is the page, made with Gradio.
"""

import re
from typing import Any

import numpy
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from muse.analysis.attention_pictures import query_cell, square
from muse.errors import CheckpointError, ConfigError
from muse.evaluation.metrics.psnr_ssim import psnr
from muse.experiments.run_report_sources import open_run
from muse.models.loading import load_model
from muse.models.muse_vit import MUSE_ViT
from muse.teachers import class_embeddings
from muse.teachers.build import shared_text_teacher
from muse.utils.viz_utils import attention_overlay, fit_side, to_uint8

LARGEST_SIDE = 1024  # a larger picture is shrunk, so that a CPU answers in seconds
PROMPTS = ("A photo of a {}.", "A {}.", "A picture of a {}.")
EXAMPLE_LABELS = "cat, dog, bird, car, flower, house"
NO_GRADIO = "the live page needs Gradio: pip install 'muse-tokenizer[app]' (or pip install gradio)"


class LiveModel:
    """A model, and what the page asks of it. Pictures are (H, W, 3) uint8 arrays.

    Args:
        model: a `MUSE_ViT`.
        cfg: names the text tower; None: labels cannot be ranked.
    """

    def __init__(self, model: MUSE_ViT, cfg: DictConfig | None):
        self.model, self.cfg = model.eval(), cfg
        side = cfg.dataset.preprocessing.crop_size if cfg else model.encoder.config.image_size[0]
        self.side = side // model.cell * model.cell

    @torch.inference_mode()
    def reconstruct(self, picture: numpy.ndarray) -> tuple[numpy.ndarray, str]:
        """The reconstruction at the picture's own size (at most LARGEST_SIDE), and a sentence."""
        image = fit_side(to_image(picture), LARGEST_SIDE)[None].to(self.device)
        recon = self.model.reconstruct(image)
        height, width = image.shape[-2:]
        quality = float(psnr(image.float(), recon.float())[0])
        return to_array(recon[0]), f"{width}×{height} pixels, PSNR {quality:.2f} dB"

    @torch.inference_mode()
    def attention(
        self, picture: numpy.ndarray, place: tuple[float, float] = (0.5, 0.5)
    ) -> list[tuple[numpy.ndarray, str]]:
        """The middle square's attention from a place, block by block, mean over heads.

        Args:
            picture: any size.
            place: (y, x), fractions of the middle square's height and width.
        """
        image = square(to_image(picture), self.side).to(self.device)
        encoding = self.model.encode(image[None], return_attention=True)
        cell = query_cell(place, encoding.grid)
        return [
            (
                to_array(attention_overlay(image, one[0].mean(0), encoding.grid, cell)),
                f"block {block}",
            )
            for block, one in enumerate(encoding.topology, start=1)
        ]

    @torch.inference_mode()
    def nearest_labels(self, picture: numpy.ndarray, typed: str) -> dict[str, float]:
        """Label -> its share: softmax of the cosines at the model's own temperature.

        Args:
            picture: any size.
            typed: labels between commas or in lines.

        Raises:
            ConfigError: no label was typed, or no configuration names a text tower.
            CheckpointError: the text tower's weights are not here.
        """
        labels = list(dict.fromkeys(filter(None, map(str.strip, re.split(r"[,;\n]", typed)))))
        if not labels:
            raise ConfigError("type one or more labels, with commas between them")
        if self.cfg is None or self.cfg.teacher.text.kind == "none":
            raise ConfigError("no text tower is configured; name one with --config")
        texts = class_embeddings(shared_text_teacher(self.cfg), labels, PROMPTS).float().cpu()
        image = square(to_image(picture), self.side)[None].to(self.device)
        cosines = (self.model.embed_image(image).float().cpu() @ texts.T)[0]
        shares = (cosines * self.model.logit_scale.exp().float().cpu()).softmax(0)
        return dict(zip(labels, shares.tolist()))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def open_live_model(
    word: str, config: str | None = None, checkpoint: str | None = None, device: str = "cpu"
) -> LiveModel:
    """The model of a run, a saved directory or a packaged name; errors of `open_run`."""
    run = open_run(word, config, checkpoint)
    if run.checkpoint is None:
        raise CheckpointError(f"{word}: holds no tokenizer's weights")
    if run.config is not None:
        return LiveModel(load_model(run.checkpoint, run.config.model, device), run.config)
    return LiveModel(MUSE_ViT.from_pretrained(run.checkpoint, device=device), None)


def to_image(picture: numpy.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in [0, 1]."""
    pixels = torch.from_numpy(numpy.array(Image.fromarray(picture).convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 255


def to_array(image: Tensor) -> numpy.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return to_uint8(image).permute(1, 2, 0).numpy()


def clicked_place(index: tuple[int, int], shape: tuple[int, ...]) -> tuple[float, float]:
    """A click at (column, row) of a picture (H, W) as (y, x) fractions of its middle square."""
    height, width = shape[:2]
    size = min(height, width)
    column, row = index
    places = ((row - (height - size) // 2) / size, (column - (width - size) // 2) / size)
    return tuple(min(max(place, 0.0), 0.9999) for place in places)


def build_app(live: LiveModel, title: str) -> Any:
    """Gradio's `Blocks`, not yet started; `ConfigError` where Gradio is not installed."""
    try:
        import gradio  # noqa: PLC0415 - an extra: everything else works without it
    except ModuleNotFoundError:
        raise ConfigError(NO_GRADIO) from None

    def look(picture: numpy.ndarray | None, labels: str) -> tuple:
        if picture is None:
            return None, "", [], None
        recon, sentence = live.reconstruct(picture)
        return recon, sentence, live.attention(picture), rank(picture, labels)

    def rank(picture: numpy.ndarray | None, labels: str) -> dict[str, float] | None:
        if picture is None or not labels.strip():
            return None
        try:
            return live.nearest_labels(picture, labels)
        except (ConfigError, CheckpointError) as error:
            gradio.Warning(str(error))
            return None

    def click(picture: numpy.ndarray, event: gradio.SelectData) -> list:
        return live.attention(picture, clicked_place(event.index, picture.shape))

    with gradio.Blocks(title=f"MUSE: {title}", analytics_enabled=False) as page:
        gradio.Markdown(
            f"# MUSE: {title}\nDrop a picture. Click it to see what a patch attends to."
        )
        with gradio.Row():
            picture = gradio.Image(type="numpy", label="picture", sources=["upload", "clipboard"])
            recon = gradio.Image(label="reconstruction", interactive=False)
        sentence = gradio.Markdown()
        maps = gradio.Gallery(label="attention, block by block", columns=6, height="auto")
        with gradio.Row():
            labels = gradio.Textbox(EXAMPLE_LABELS, label="labels, with commas between them")
            ranked = gradio.Label(label="nearest labels")
        picture.input(look, [picture, labels], [recon, sentence, maps, ranked])
        picture.select(click, [picture], [maps])
        labels.submit(rank, [picture, labels], [ranked])
    return page
