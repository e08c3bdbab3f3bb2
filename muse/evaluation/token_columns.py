"""Vectors of a network's tokens for probes: class token, mean, several last blocks, in columns.

DINOv2's linear evaluation looks at the class tokens of the last blocks and the mean of the last
block's other tokens. They are stored once, side by side; every probe reads its own columns:

    encoder (with a class token)    [cls of block L-B+1 | ... | cls of block L | mean of block L]
    MUSE's streams (without one)    [mean of block L-B+1 | ... | mean of block L]

MUSE's tokens have no class token: the mean token of a block (for the semantic stream its anchor,
which the image embedding is made of) stands for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.evaluation.recipes import LinearProbeRecipe, NeighbourRecipe

ProbeKind = TypeVar("ProbeKind", LinearProbeRecipe, NeighbourRecipe)
POOLS = ("cls", "mean", "cls+mean")


class TokenLayers(NamedTuple):
    """Where a network's tokens can be read: the outputs of its blocks, in order."""

    blocks: Sequence[nn.Module]
    pick: Callable[[object], Tensor]  # a block's output -> (B, tokens, C)
    class_token: bool  # the first token
    width: int  # C

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Within it, every forward pass adds the tokens of every block to the list."""
        tokens: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda module, args, out: tokens.append(self.pick(out)))
            for block in self.blocks
        ]
        try:
            yield tokens
        finally:
            for hook in hooks:
                hook.remove()


def token_vectors(
    layers: TokenLayers, forward: Callable[[Tensor], object], images: Tensor, blocks: int
) -> Tensor:
    """(B,3,H,W) -> (B, columns) as described at the top of this file.

    Args:
        layers: of the network.
        forward: runs it on the images.
        images: in [0, 1].
        blocks: how many of the last ones.
    """
    with layers.recorded() as tokens:
        forward(images)
    last = tokens[-blocks:]
    if not layers.class_token:
        return torch.cat([each.mean(1) for each in last], 1)
    return torch.cat([*(each[:, 0] for each in last), last[-1][:, 1:].mean(1)], 1)


def columns_of(layers: TokenLayers, pooling: Sequence[str], last_blocks: Sequence[int]) -> dict:
    """Name -> columns of `token_vectors` for every pair of pooling and number of blocks."""
    most, width = max(last_blocks), layers.width
    columns = {}
    for pool in pooling:
        for blocks in last_blocks:
            first = (most - blocks) * width
            end = most * width + (width if pool == "cls+mean" else 0)
            if layers.class_token and pool == "mean":
                first, end = most * width, (most + 1) * width
            columns[f"{pool} of {blocks}"] = slice(first, end)
    return columns


def fitting_recipe(
    recipe: ProbeKind,
    layers: TokenLayers | None,
    feature: str,
    pooling: Sequence[str] | None = None,
    last_blocks: Sequence[int] | None = None,
) -> ProbeKind:
    """The recipe with the pooling and blocks that a feature can have.

    What a protocol asks for is fitted to the feature (without a class token the mean stands for
    it, and there are at most all blocks); what a user asks for is done or refused.

    Args:
        recipe: of a protocol.
        layers: of the network; None where there is only the mean of a map.
        feature: its name, for the error.
        pooling: --pool.
        last_blocks: --last_blocks.
    """
    depth = len(layers.blocks) if layers else 1
    class_token = layers is not None and layers.class_token
    for pool in pooling or ():
        if pool != "mean" and not class_token:
            raise ConfigError(
                f"--pool {pool}: {feature} features have no class token; --pool mean, or the "
                "encoder's own tokens (--feature encoder, --baseline encoder)"
            )
    for blocks in last_blocks or ():
        if not 1 <= blocks <= depth:
            raise ConfigError(f"--last_blocks {blocks}: {feature} features have {depth} block(s)")
    pooling = tuple(pooling or recipe.pooling)
    if not class_token:
        pooling = ("mean",)
    last_blocks = tuple(last_blocks or (min(blocks, depth) for blocks in recipe.last_blocks))
    if class_token and "mean" in pooling and max(last_blocks) > 1:
        raise ConfigError("--pool mean is of the last block: --last_blocks 1, or --pool cls+mean")
    return replace(
        recipe,
        pooling=tuple(dict.fromkeys(pooling)),
        last_blocks=tuple(dict.fromkeys(last_blocks)),
    )
