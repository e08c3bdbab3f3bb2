"""From hidden states behind the language model to what SANA reads as its caption.

A connector sees one sequence of one length for all samples of a batch: the source picture's tokens
if there is one, then the queries. Every token attends to every other, without a mask.
"""

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muse.errors import ConfigError
from muse.models.layers import RotaryEmbedding
from muse.models.synergistic_block import SynergisticBlock

# In the tokenizer the stops keep reconstruction out of what structure and semantics own. Here the
# flow matching loss alone trains the blocks: with a stop in place, W_Q, W_K or W_ITC would never
# learn.
OPEN_STREAMS = {
    "isolate_streams": False,
    "shield_attention": False,
    "join_semantics": True,
    "shield_semantics": False,
}


class SynergisticConnector(nn.Module):
    """SynergisticBlocks in a row (muse/models/synergistic_block.py).

    Args:
        width: of the hidden states that come in.
        num_layers: number of blocks.
        dim: width of the blocks and of what goes out; None is `width`.
        num_heads: of each block; None is one for every 64 of `dim`.
    """

    def __init__(
        self, width: int, num_layers: int, dim: int | None = None, num_heads: int | None = None
    ):
        super().__init__()
        dim = dim or width
        num_heads = num_heads or max(1, dim // 64)
        if dim % num_heads or (dim // num_heads) % 2:
            raise ConfigError(
                f"model.connector_dim={dim} must be model.connector_heads={num_heads} times an "
                "even head width"
            )
        self.width = dim
        self.gradient_checkpointing = False
        self.proj_in = nn.Identity() if dim == width else nn.Linear(width, dim)
        self.blocks = nn.ModuleList(
            SynergisticBlock(dim, num_heads, **OPEN_STREAMS) for _ in range(num_layers)
        )
        self.rotary = RotaryEmbedding(dim // num_heads)
        for module in self.blocks.modules():  # as MUSE_ViT starts its own
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, width) -> (B, T, dim)."""
        x = self.proj_in(x)
        rotary = self.rotary(x.shape[1], x.device)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, use_reentrant=False).tokens
            else:
                x = block(x, rotary).tokens
        return x


class LanguageLayersConnector(nn.Module):
    """A copy of the language model's last layers and its final norm, attending both ways (UniLIP).

    UniLIP's reads the prompt's positions too; ours reads what the other connector reads, so that
    the two can be compared.

    Args:
        language_model: transformers' decoder (`Qwen2Model` and its like), with its weights.
        num_layers: how many of its last layers.
    """

    def __init__(self, language_model: nn.Module, num_layers: int):
        super().__init__()
        if num_layers > len(language_model.layers):
            raise ConfigError(
                f"model.connector_layers={num_layers}, but the language model has "
                f"{len(language_model.layers)} layers to copy"
            )
        self.width = language_model.config.hidden_size
        self.layers = copy.deepcopy(language_model.layers[-num_layers:])
        self.norm = copy.deepcopy(language_model.norm)
        self.rotary_emb = copy.deepcopy(language_model.rotary_emb)
        self.requires_grad_(True)  # whatever the original's is
        self.gradient_checkpointing = False
        for layer in self.layers:
            layer.self_attn.is_causal = False

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, width) -> (B, T, width)."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary_emb(x, positions)
        # No mask, and not causal: everything sees everything.
        known = {
            "attention_mask": None,
            "position_ids": positions,
            "position_embeddings": rotary,
        }
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, **known)
            else:
                x = layer(x, **known)
        return self.norm(x)
