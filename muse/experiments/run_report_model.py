"""What a report shows of a model: reconstructions, attention, features, captions, foreground."""

import base64
import io
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from muse.errors import MuseError
from muse.evaluation.attention_quality import teacher_maps
from muse.evaluation.mask_cells import foreground_masks
from muse.evaluation.metrics.psnr_ssim import psnr
from muse.evaluation.segmentation import train_segmentation_probe
from muse.experiments.run_report_pictures import ShownPictures
from muse.losses.topology import resize_attention
from muse.teachers.build import shared_text_teacher, shared_topology_teacher
from muse.utils.viz_utils import to_uint8

log = logging.getLogger(__name__)

FEATURE_NAMES = {
    "encoder": "encoder",
    "block": "after the last block",
    "semantic": "semantic stream",
}
ATTENTION_PICTURES = 4
LARGEST_GRID = 16  # attention on a finer grid is averaged to this side
NEAREST = 3
PROBE_PICTURES = 16  # fewer train no probe
PROBE_STEPS = 120
FOREGROUND = (0.95, 0.25, 0.45)
# What an offline machine raises for a network whose weights are not there.
ABSENT = (MuseError, ImportError, OSError)


class AttentionMaps(NamedTuple):
    """One set of maps on a grid, such as a block's: bytes, since a page holds thousands."""

    label: str
    weights: str  # base64 of (N, N) bytes: a query's weights over its largest, itself left out
    peaks: list[float]  # that largest weight, (N,)


class ModelView(NamedTuple):
    """Everything of one model that the page draws. Pictures are `data:` URIs."""

    originals: list[str]
    names: list[str]
    origin: str
    reconstructions: list[str]
    psnr: list[float]  # dB
    grid: tuple[int, int]  # of attention
    attention: list[list[AttentionMaps]]  # a list a picture
    features: list[dict[str, str]]  # kind -> picture, for each picture
    captions: list[list[tuple[str, float, bool]]]  # nearest captions, cosine, whether it is its own
    ranks: list[int]  # of the own caption among all, from 1
    caption_count: int
    foreground: list[tuple[str, str, float]]  # truth, prediction, IoU
    notes: list[str]  # what is not there, and why


@torch.inference_mode()
def look_at(model, cfg: DictConfig | None, shown: ShownPictures, count: int) -> ModelView:
    """Run a model on the first `count` pictures.

    Args:
        model: a `MUSE_ViT`.
        cfg: names the teachers; None: they are left out.
        shown: `pictures_of`.
        count: pictures.
    """
    notes: list[str] = []
    device = next(model.parameters()).device
    images = shown.images[:count].to(device)
    recon = torch.cat([model.reconstruct(part) for part in images.split(8)])
    grid, attention = _attention(model, cfg, images[:ATTENTION_PICTURES], notes)
    captions, ranks, choices = _captions(model, cfg, shown, len(images), notes)
    return ModelView(
        [jpeg_uri(image) for image in images],
        shown.names[: len(images)],
        shown.origin,
        [jpeg_uri(image) for image in recon],
        psnr(images.float(), recon.float()).tolist(),
        grid,
        attention,
        _feature_pictures(model, images),
        captions,
        ranks,
        choices,
        _foreground(model, shown, len(images), notes),
        notes,
    )


# --------------------------------------------------------------------------------------- pictures
def jpeg_uri(image: Tensor, quality: int = 88) -> str:
    """(3, H, W) in [0, 1] as a `data:` URI."""
    return picture_uri(Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()), "JPEG", quality)


def picture_uri(picture: Image.Image, form: str, quality: int = 88) -> str:
    """A picture as a `data:` URI; `form` is JPEG or PNG."""
    buffer = io.BytesIO()
    options = {"quality": quality} if form == "JPEG" else {"optimize": True}
    picture.convert("RGB").save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -------------------------------------------------------------------------------------- attention
def _attention(
    model, cfg: DictConfig | None, images: Tensor, notes: list[str]
) -> tuple[tuple[int, int], list[list[AttentionMaps]]]:
    encoding = model.encode(images, return_attention=True)
    shown = tuple(min(side, LARGEST_GRID) for side in encoding.grid)
    maps = {
        f"block {index}": one.float().mean(1).cpu()  # over heads
        for index, one in enumerate(encoding.topology, start=1)
    }
    try:
        if cfg is None:
            notes.append("The teacher's attention: no configuration says which teacher it was.")
        elif cfg.teacher.topology.kind != "none":
            teacher = shared_topology_teacher(cfg, encoding.grid).to(images.device)
            maps["teacher"] = teacher_maps(teacher, images, encoding.grid)[-1][:, 0].cpu()
    except ABSENT as error:
        notes.append(f"The teacher's attention: {_line(error)}")
    if shown != tuple(encoding.grid):
        maps = {
            name: resize_attention(one[:, None], encoding.grid, shown)[:, 0]
            for name, one in maps.items()
        }
    return shown, [
        [pack_attention(name, one[place]) for name, one in maps.items()]
        for place in range(len(images))
    ]


def pack_attention(label: str, attention: Tensor) -> AttentionMaps:
    """(N, N) with rows that sum to 1, as bytes. A query's weight on itself would hide the others,
    and is set to 0.
    """
    rows = attention.clone().fill_diagonal_(0)
    peaks = rows.amax(1)
    packed = (rows / peaks[:, None].clamp_min(1e-12) * 255).round().to(torch.uint8)
    text = base64.b64encode(packed.numpy().tobytes()).decode()
    return AttentionMaps(label, text, [round(peak, 5) for peak in peaks.tolist()])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:240]


# --------------------------------------------------------------------------------------- features
def _feature_pictures(model, images: Tensor) -> list[dict[str, str]]:
    coloured = {kind: pca_colours(model.features(images, kind)) for kind in FEATURE_NAMES}
    return [
        {
            kind: picture_uri(
                Image.fromarray(to_uint8(colours[place]).permute(1, 2, 0).numpy()), "PNG"
            )
            for kind, colours in coloured.items()
        }
        for place in range(len(images))
    ]


def pca_colours(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 3, h, w) in [0, 1]: the three directions in which the cells of all
    pictures differ most, each stretched between its 2nd and 98th percentile.
    """
    batch, channels, height, width = features.shape
    cells = features.float().cpu().permute(0, 2, 3, 1).reshape(-1, channels)
    cells = cells - cells.mean(0)
    _, _, directions = torch.linalg.svd(cells, full_matrices=False)
    directions = directions[:3] * directions[:3].sum(1, keepdim=True).sign()  # a sign is arbitrary
    scores = F.pad(cells @ directions.T, (0, 3 - len(directions)))  # (B*h*w, 3)
    low, high = (scores.quantile(share, dim=0) for share in (0.02, 0.98))
    scores = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return scores.view(batch, height, width, 3).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------- captions
def _captions(
    model, cfg: DictConfig | None, shown: ShownPictures, count: int, notes: list[str]
) -> tuple[list[list[tuple[str, float, bool]]], list[int], int]:
    if not shown.captions:
        notes.append(f"Nearest captions: {shown.origin} come without captions.")
        return [], [], 0
    if cfg is None or cfg.teacher.text.kind == "none":
        notes.append("Nearest captions: no configuration names a text tower.")
        return [], [], 0
    choices = list(dict.fromkeys(shown.captions))
    try:
        texts = shared_text_teacher(cfg).encode(choices).float().cpu()  # (T, E)
    except ABSENT as error:
        notes.append(f"Nearest captions: {_line(error)}")
        return [], [], 0
    device = next(model.parameters()).device
    cosines = model.embed_image(shown.images[:count].to(device)).float().cpu() @ texts.T
    nearest, ranks = [], []
    for row, own in zip(cosines, shown.captions):
        order = row.argsort(descending=True).tolist()
        ranks.append(order.index(choices.index(own)) + 1)
        best = order[:NEAREST]
        nearest.append([(choices[i], float(row[i]), choices[i] == own) for i in best])
        if ranks[-1] > NEAREST:
            index = choices.index(own)
            nearest[-1].append((own, float(row[index]), True))
    return nearest, ranks, len(choices)


# ------------------------------------------------------------------------------------- foreground
def _foreground(
    model, shown: ShownPictures, count: int, notes: list[str]
) -> list[tuple[str, str, float]]:
    """A linear probe on frozen block features, trained on the pictures that are not shown."""
    if shown.masks is None or not (shown.masks > 0).any():
        notes.append(f"Segmentation: {shown.origin} come without masks.")
        return []
    if len(shown.images) - count < PROBE_PICTURES:
        notes.append(f"Segmentation: fewer than {PROBE_PICTURES} more pictures to train a probe.")
        return []
    device = next(model.parameters()).device
    parts = [model.features(part.to(device), "block").cpu() for part in shown.images.split(16)]
    features, masks = torch.cat(parts), foreground_masks(shown.masks)
    with torch.inference_mode(False), torch.enable_grad():
        probe = train_segmentation_probe(
            features[count:].clone(), masks[count:].clone(), 2, steps=PROBE_STEPS
        )
    found = probe.predict(features[:count], tuple(masks.shape[-2:]))
    overlays = []
    for image, truth, guess in zip(shown.images, masks[:count] == 1, found == 1):
        union = (truth | guess).sum()
        iou = float((truth & guess).sum() / union) if union else 1.0
        overlays.append((_overlay(image, truth), _overlay(image, guess), iou))
    return overlays


def _overlay(image: Tensor, mask: Tensor) -> str:
    grey = image.mean(0, keepdim=True).expand(3, -1, -1)
    colour = torch.tensor(FOREGROUND)[:, None, None]
    return jpeg_uri(torch.where(mask, 0.45 * image + 0.55 * colour, 0.25 + 0.6 * grey))


def view_facts(view: ModelView) -> dict[str, Any]:
    """What the page's script needs of a view: attention, as numbers."""
    return {
        "grid": list(view.grid),
        "maps": [[one._asdict() for one in picture] for picture in view.attention],
    }
