"""What a probe looks at: features of the student, of its bare encoder, or the pixels themselves."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from muse.config import plain
from muse.errors import CheckpointError
from muse.evaluation.measurement import Setup
from muse.evaluation.token_columns import TokenLayers, columns_of, token_vectors
from muse.models.internvit import build_encoder
from muse.models.layers import padding_to_multiple
from muse.models.loading import weights_file
from muse.models.muse_vit import IMAGENET_MEAN, IMAGENET_STD, MUSE_ViT
from muse.utils.io import file_sha256
from muse.utils.weights import state_sha256

PIXEL_SIDE = 16


class BareEncoder(nn.Module):
    """The encoder as its source gives it, without a checkpoint of MUSE.

    Args:
        config: of the model.
        own_grid: its tokens as they are, not averaged onto the latent grid.
    """

    def __init__(self, config: Any, own_grid: bool = False):
        super().__init__()
        self.own_grid = own_grid
        self.encoder = build_encoder(config.encoder.source, plain(config.encoder.config), True)
        self.patch, self.unshuffle = self.encoder.config.patch_size[0], config.unshuffle
        self.cell = self.patch * self.unshuffle  # pixels of a cell of the latent grid
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.eval()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> (B,C,h,w), as `MUSE_ViT.features` or `.encoder_features`."""
        rows, columns = padding_to_multiple(images.shape[-2:], self.cell)
        if rows or columns:
            images = F.pad(images, (0, columns, 0, rows), mode="replicate")
        tokens = self.encoder(pixel_values=(images - self.mean) / self.std).last_hidden_state[:, 1:]
        grid = [side // self.patch for side in images.shape[-2:]]
        maps = tokens.transpose(1, 2).unflatten(2, grid)  # (B, C, rows, columns) of patches
        return maps if self.own_grid else F.avg_pool2d(maps, self.unshuffle)  # (B, C, h, w)


def _grid_mean(maps: torch.Tensor) -> torch.Tensor:
    return maps.mean((2, 3))


class ProbedNetwork(NamedTuple):
    """What is probed, the facts that name it, and how a map becomes a vector."""

    features: Callable[[torch.Tensor], torch.Tensor]  # (B,3,H,W) -> (B,C,h,w)
    facts: dict
    pool: Callable[[torch.Tensor], torch.Tensor] = _grid_mean  # (B,C,h,w) -> (B,C')
    cell: int | None = None  # pixels of a cell, to whose multiples pictures are padded; None: never
    layers: TokenLayers | None = None  # where its tokens can be read; None: only `features`
    columns: dict[str, slice] | None = None  # of `pool`'s vectors; None: all are one set

    def vectors(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) -> (B, C') for probes of whole pictures."""
        if self.columns is None:
            return self.pool(self.features(images).float())
        blocks = self.facts["last_blocks"][-1]
        return token_vectors(self.layers, self.features, images, blocks).float()

    def with_pooling(self, pooling: Sequence[str], last_blocks: Sequence[int]) -> "ProbedNetwork":
        """The same network with vectors of its tokens, see token_columns.py.

        What the mean of the last block's map gives anyway stays as it is; so do pixels.
        """
        if self.pool is not _grid_mean:
            return self
        facts = {"pooling": list(pooling), "last_blocks": sorted(last_blocks)}
        if (tuple(pooling), tuple(last_blocks)) == (("mean",), (1,)):
            return self._replace(facts=self.facts | facts)
        columns = columns_of(self.layers, pooling, last_blocks)
        return self._replace(facts=self.facts | facts, columns=columns)


def _encoder_layers(encoder: nn.Module) -> TokenLayers:
    def tokens(out) -> torch.Tensor:  # older versions of transformers give a tuple
        return out if isinstance(out, torch.Tensor) else out[0]

    return TokenLayers(encoder.encoder.layer, tokens, True, encoder.config.hidden_size)


def _student_layers(student: MUSE_ViT, kind: str) -> TokenLayers | None:
    if kind == "encoder":
        return _encoder_layers(student.encoder)
    if kind not in ("semantic", "block"):
        return None
    place = 1 if kind == "semantic" else 0  # of a block's output: tokens, S, log A
    dim = student.config.dim
    return TokenLayers(student.muse_blocks, lambda out: out[place], False, dim)


def pixel_maps(images: torch.Tensor) -> torch.Tensor:
    """The raw-pixel baseline: (B,3,H,W) -> (B,3,16,16), the picture shrunk by area."""
    return F.interpolate(images, (PIXEL_SIDE, PIXEL_SIDE), mode="area")


def probed_network(
    setup: Setup, feature: str, baseline: str | None = None, own_grid: bool = False
) -> ProbedNetwork:
    """The network of a probe.

    Args:
        setup: its configuration and checkpoint.
        feature: a kind of `MUSE_ViT.features`.
        baseline: None; `pixels`; or `encoder`, as its source gives it (the checkpoint's where the
            source is random).
        own_grid: the encoder's tokens as they are, not averaged onto the latent grid.
    """
    model, device = setup.cfg.model, setup.device
    own_grid = own_grid and baseline == "encoder"
    if baseline == "pixels":
        facts = {"feature": f"pixels {PIXEL_SIDE}x{PIXEL_SIDE}"}
        return ProbedNetwork(pixel_maps, facts, lambda maps: maps.flatten(1))
    if baseline == "encoder" and model.encoder.source != "random":
        encoder = BareEncoder(model, own_grid).to(device)
        facts = {
            "feature": "bare encoder",
            "cell": encoder.cell,
            "source": model.encoder.source,
            "weights_sha256": state_sha256(encoder),
            **({"grid": "the encoder's own"} if own_grid else {}),
        }
        return ProbedNetwork(
            lambda images: encoder.features(images.to(device, non_blocking=True)),
            facts,
            cell=encoder.cell,
            layers=_encoder_layers(encoder.encoder),
        )
    if setup.checkpoint is None:
        raise CheckpointError(
            "--checkpoint is needed: only --baseline pixels, and the bare encoder of a pretrained "
            "source, go without"
        )
    student, kind = setup.load_model(), "encoder" if baseline else feature
    facts = {
        "feature": kind,
        "cell": student.cell,
        "checkpoint_sha256": file_sha256(weights_file(setup.checkpoint)),
        "routing": model.routing,
        "join_semantics": model.join_semantics,
        **({"grid": "the encoder's own"} if own_grid else {}),
    }
    if own_grid:
        return ProbedNetwork(
            lambda images: student.encoder_features(images.to(device)), facts, cell=student.cell
        )
    return ProbedNetwork(
        lambda images: student.features(images.to(device, non_blocking=True), kind),
        facts,
        cell=student.cell,
        layers=_student_layers(student, kind),
    )
