"""DINOv2 ViT-L/14 as FD-DINOv2 (dgm-eval) uses it, with timm's network and weights.

Pictures are resized by Pillow to 224 x 224 and rounded to bytes; the feature is the class token
after the last norm. timm's default for this model is 518 pixels. Its position embedding, 37 x 37,
is brought to 16 x 16 as the authors' own code does it, without antialias and with their offset of
.1; timm's own way gives other features.
"""

import json
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from muse.errors import DataError
from muse.utils.weights import read_state_dict

MODEL = "vit_large_patch14_dinov2.lvd142m"
SIDE = 224
OFFSET = 0.1  # of the authors' interpolation: (16 + .1) / 37 in place of 16 / 37
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def hub_position_embedding(embedding: Tensor, own: tuple[int, int], grid: int) -> Tensor:
    """(1, 1 + h*w, C) of the class token and an (h, w) grid -> (1, 1 + grid*grid, C)."""
    token, patches = embedding[:, :1], embedding[:, 1:]
    maps = patches.float().transpose(1, 2).unflatten(2, own)  # (1,C,h,w)
    scale = tuple((grid + OFFSET) / side for side in own)
    maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
    return torch.cat((token, maps.flatten(2).transpose(1, 2).to(token)), 1)


def pillow_resize(images: Tensor, side: int) -> Tensor:
    """(B,3,H,W) in [0,1] -> (B,3,side,side) in [0,1]: bytes, bicubic with antialias, bytes."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    resized = [
        numpy.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC))
        for one in pixels
    ]
    return torch.from_numpy(numpy.stack(resized)).permute(0, 3, 1, 2).to(images.device) / 255


class DinoV2(nn.Module):
    """(B,3,H,W) in [0,1] -> (B,C), by a timm DINOv2 network as it is loaded for 518 pixels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        patches = network.patch_embed
        embedding = hub_position_embedding(
            network.pos_embed.data, patches.grid_size, SIDE // patches.patch_size[0]
        )
        network.set_input_size((SIDE, SIDE))
        network.pos_embed = nn.Parameter(embedding)
        self.network = network
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def pooled(self, images: Tensor) -> Tensor:
        """The class token after the last norm."""
        return self.network((pillow_resize(images, SIDE) - self.mean) / self.std)


def _check_folder(folder: Path, model: str) -> None:
    """DataError unless the folder's config.json is of the model."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is not a folder of timm's hub (config.json that names its architecture, "
            "model.safetensors), which fd_dinov2 could read"
        ) from error
    if found.split(".")[0] != model.split(".")[0]:
        raise DataError(f"{folder} holds {found}, and fd_dinov2 is by {model}")


def load_dinov2(weights: str | Path | None = None, model: str = MODEL) -> DinoV2:
    """DINOv2 by timm. DataError, one line, when there are no weights.

    Args:
        weights: a local file, or a local copy of timm's hub folder (config.json,
            model.safetensors); None fetches it from the hub.
        model: timm's name.
    """
    import timm  # noqa: PLC0415  seconds that other metrics need not wait

    try:
        if weights is None:
            network = timm.create_model(model, pretrained=True)
        elif Path(weights).is_dir():
            _check_folder(Path(weights), model)
            # at 518 even where the folder does not say so: timm would resample the embedding
            network = timm.create_model(f"local-dir:{weights}", pretrained=True, img_size=518)
        else:
            # one clear error for a missing or foreign file
            read_state_dict(weights, "the feature network dinov2")
            network = timm.create_model(model, checkpoint_path=str(weights))
    except (OSError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"no weights of {model} for fd_dinov2 ({reason}): pass a file with "
            "--feature-weights FILE"
        ) from error
    return DinoV2(network.eval().requires_grad_(False))
